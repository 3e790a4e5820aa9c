"""Drawings in SVG, for light and dark pages: the architecture of a variant, steps in turn, and the way of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from convmixer.registry import Variant


@dataclass(frozen=True)
class Palette:
    """Colours of text and lines, and of boxes: (fill, outline) of each kind of layer."""

    text: str
    quiet: str
    plain: tuple[str, str]
    patches: tuple[str, str]
    depthwise: tuple[str, str]
    pointwise: tuple[str, str]


PALETTES = {
    "light": Palette(
        text="#1f2328",
        quiet="#59636e",
        plain=("#f6f8fa", "#818b98"),
        patches=("#ddf4ff", "#0969da"),
        depthwise=("#fff1e5", "#bc4c00"),
        pointwise=("#dafbe1", "#1a7f37"),
    ),
    "dark": Palette(
        text="#f0f6fc",
        quiet="#9198a1",
        plain=("#21262d", "#6e7681"),
        patches=("#0c2d6b", "#58a6ff"),
        depthwise=("#4d2100", "#f0883e"),
        pointwise=("#0b3a1e", "#3fb950"),
    ),
}
WIDTH, HEIGHT = 750, 330
FONTS = "system-ui, 'DejaVu Sans', sans-serif"
ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU"}


class _Drawing:
    """SVG elements, one after the other, in the colours of one palette."""

    def __init__(self, palette: Palette) -> None:
        self.palette = palette
        self.elements: list[str] = []

    def text(self, x: float, y: float, words: str, *, quiet: bool = False, bold: bool = False, size: int = 13) -> None:
        colour = self.palette.quiet if quiet else self.palette.text
        weight = ' font-weight="600"' if bold else ""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="middle"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str, title: str, *lines: str) -> None:
        fill, outline = getattr(self.palette, kind)
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
            f'stroke="{outline}" stroke-width="1.5"/>'
        )
        middle = y + height / 2 + 4.5 - 8 * len(lines)
        self.text(x + width / 2, middle, title, bold=True)
        for i, line in enumerate(lines, 1):
            self.text(x + width / 2, middle + 16 * i, line, size=12)

    def path(self, points: str, *, arrow: bool = False, dashed: bool = False) -> None:
        style = ' stroke-dasharray="4 4"' if dashed else ""
        tip = ' marker-end="url(#tip)"' if arrow else ""
        self.elements.append(
            f'<path d="{points}" fill="none" stroke="{self.palette.quiet}" stroke-width="1.5"{style}{tip}/>'
        )

    def image(self, x: float, y: float, side: float, cells: int) -> None:
        """A square cut into patches."""
        fill, outline = self.palette.patches
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="{fill}" stroke="{outline}" '
            'stroke-width="1.5"/>'
        )
        lines = "".join(
            f"M{x + i * side / cells:g} {y:g}v{side:g}M{x:g} {y + i * side / cells:g}h{side:g}" for i in range(1, cells)
        )
        self.elements.append(f'<path d="{lines}" stroke="{outline}" stroke-width="0.75"/>')

    def plus(self, x: float, y: float) -> None:
        fill, outline = self.palette.depthwise
        self.elements.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="{fill}" stroke="{outline}" stroke-width="1.5"/>'
        )
        self.elements.append(
            f'<path d="M{x - 6:g} {y:g}h12M{x:g} {y - 6:g}v12" stroke="{outline}" stroke-width="1.5"/>'
        )

    def svg(self, title: str, height: int = HEIGHT) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="{FONTS}" role="img">\n'
            f"<title>{escape(title)}</title>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{self.palette.quiet}"/></marker></defs>\n'
            + "\n".join(self.elements)
            + "\n</svg>\n"
        )


def _network(drawing: _Drawing, v: Variant) -> None:
    """The upper row: image, patches, blocks, mean, linear layer, with the shapes between them."""
    channels, height, width = v.input_size
    rows, columns = height // v.patch_size, width // v.patch_size
    act = ACTIVATIONS.get(v.act_layer, v.act_layer)
    stride = f"{v.patch_size}x{v.patch_size}, stride {v.patch_size}"
    drawing.image(14, 34, 64, 4)
    drawing.text(46, 118, "image", bold=True)
    drawing.text(46, 134, f"{channels} x {height} x {width}", quiet=True, size=12)
    drawing.box(120, 28, 142, 76, "patches", "patch embedding", stride, f"{act}, BatchNorm")
    drawing.box(308, 28, 150, 76, "plain", f"{v.depth} blocks", "ConvMixer block", "the size stays the same")
    drawing.box(504, 38, 100, 56, "plain", "mean", "over positions")
    drawing.box(642, 38, 94, 56, "plain", "linear", f"{v.num_classes:,} classes")
    for start, end in ((80, 118), (263, 306), (459, 502), (605, 640)):
        drawing.path(f"M{start} 66H{end}", arrow=True)
    for x in (285, 481):
        drawing.text(x, 20, f"{v.dim} x {rows} x {columns}", quiet=True, size=12)
    drawing.text(623, 20, f"{v.dim}", quiet=True, size=12)


def _block(drawing: _Drawing, v: Variant) -> None:
    """The lower row: the layers of one block."""
    act = ACTIVATIONS.get(v.act_layer, v.act_layer)
    top, middle = 206, 236
    drawing.path("M308 106L14 160M458 106L736 160", dashed=True)
    drawing.path("M14 160H736V316H14Z", dashed=True)
    drawing.box(72, top, 136, 60, "depthwise", f"depthwise {v.kernel_size}x{v.kernel_size}", "mixes positions")
    drawing.box(232, top, 100, 60, "plain", act, "BatchNorm")
    drawing.plus(374, middle)
    drawing.box(418, top, 142, 60, "pointwise", "1x1 convolution", "mixes channels")
    drawing.box(584, top, 100, 60, "plain", act, "BatchNorm")
    for start, end in ((22, 70), (209, 230), (333, 361), (386, 416), (561, 582), (685, 728)):
        drawing.path(f"M{start} {middle}H{end}", arrow=True)
    drawing.path(f"M44 {middle}V182H374V223", arrow=True)
    drawing.text(209, 176, "residual", quiet=True, size=12)
    drawing.text(374, 304, "one ConvMixer block", bold=True)


def draw(variant: Variant, palette: Palette) -> str:
    """SVG of the whole network above, and of one of its blocks below."""
    drawing = _Drawing(palette)
    _network(drawing, variant)
    _block(drawing, variant)
    return drawing.svg(f"Architecture of {variant.name}: patch embedding, {variant.depth} blocks, mean, linear layer")


# Of each drawing its title, and of each step the colours, what it is, and what it does.
FLOWS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "zoo": (
        "From the package to the Hub and back",
        (
            ("patches", "source tree", "weights,", "docs/runs"),
            ("plain", "push-zoo", "writes, opens,", "compares"),
            ("depthwise", "the Hub", "a repository each,", "a collection"),
            ("plain", "registry.py", "commit, sha256,", "size"),
            ("pointwise", "create_model", "package first,", "then the Hub"),
        ),
    ),
    "release": (
        "What a tag starts",
        (
            ("patches", "tag", "the version,", "the changelog"),
            ("plain", "build", "sdist, wheel,", "twine check"),
            ("depthwise", "test", "Linux, macOS,", "Windows"),
            ("pointwise", "PyPI", "trusted", "publishing"),
            ("pointwise", "Pages", "the site", ""),
        ),
    ),
}


def draw_flow(name: str, palette: Palette) -> str:
    """SVG of steps from left to right, with an arrow between two of them."""
    title, steps = FLOWS[name]
    drawing = _Drawing(palette)
    width, gap = 126, 23
    for i, (kind, *texts) in enumerate(steps):
        x = 14 + i * (width + gap)
        drawing.box(x, 14, width, 76, kind, *filter(None, texts))
        if i:
            drawing.path(f"M{x - gap + 2} 52H{x - 3}", arrow=True)
    return drawing.svg(title, height=104)


def draw_batch(palette: Palette) -> str:
    """SVG of `predict_dataset`: a source in parts, workers that decode, the model, a file for each part."""
    drawing = _Drawing(palette)
    drawing.box(14, 66, 118, 76, "plain", "source", "folder, tar, shards,", "Parquet, hfds/")
    for i, y in enumerate((20, 84, 148)):
        drawing.box(186, y, 100, 40, "patches", f"part {i}")
        drawing.path(f"M133 104L184 {y + 20}", arrow=True)
        drawing.path(f"M287 {y + 20}L334 104", arrow=True)
        drawing.box(598, y, 138, 40, "patches", f"part-0000{i}.parquet")
        drawing.path(f"M549 104L596 {y + 20}", arrow=True)
    drawing.box(336, 66, 92, 76, "depthwise", "workers", "decode", "ahead")
    drawing.box(464, 66, 84, 76, "pointwise", "model", "optimized")
    drawing.path("M429 104H462", arrow=True)
    drawing.path("M324 50H560V158H324Z", dashed=True)
    drawing.text(442, 40, "one process, or each actor on Ray", quiet=True, size=12)
    drawing.text(606, 214, "a file that is there is not computed again", quiet=True, size=12)
    drawing.text(236, 214, "same images, same order, always", quiet=True, size=12)
    return drawing.svg("From a source in parts, through workers and the model, to a Parquet file for each part", 228)
