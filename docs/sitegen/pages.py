"""A page for each variant of the registry."""

from __future__ import annotations

from pathlib import Path

from convmixer import registry
from convmixer.registry import Variant, Weights
from sitegen.models import billion, bytes_of, million, place, training_of
from sitegen.records import DOCS, record, table
from sitegen.runs import anchor, evaluation
from sitegen.speed import kept_for_backward, of_variant

PAGES = DOCS / "models"


@record("figure")
def figure(name: str, *description: str) -> str:
    """A drawing that has a version for light and one for dark pages."""
    images = "\n".join(
        f"```{{image}} /_figures/{name}-{scheme}.svg\n:alt: {' '.join(description)}\n:class: only-{scheme}\n```"
        for scheme in ("light", "dark")
    )
    kind = "chart" if name.startswith("accuracy") else "drawing"
    return f"````{{container}} {kind}\n{images}\n````"


@record("model-pages")
def model_pages() -> str:
    names = "\n".join(f"models/{variant.name}" for variant in registry.VARIANTS)
    return f"```{{toctree}}\n:maxdepth: 1\n:hidden:\n\n{names}\n```"


def _facts(v: Variant) -> str:
    rows, columns = v.input_size[1] // v.patch_size, v.input_size[2] // v.patch_size
    facts = [
        ("dim / depth", f"{v.dim} / {v.depth}"),
        ("kernel / patch", f"{v.kernel_size} x {v.kernel_size} / {v.patch_size} x {v.patch_size}"),
        ("activation", v.act_layer),
        ("parameters", million(v.parameters)),
        ("multiply-accumulates", f"{billion(v.macs)}, at {v.input_size[1]} x {v.input_size[2]} pixels"),
        ("feature maps", f"{v.dim} channels of {rows} x {columns}, from the first block to the last"),
        ("classes", f"{v.num_classes:,}"),
    ]
    return table(("", ""), facts)


def _accuracy(v: Variant) -> str:
    if not v.weights:
        return "No public weights are known, so no accuracy was measured."
    measured = [m for w in v.weights for m in w.metrics]
    if len({(m.dataset, m.measured_by) for m in measured}) == 1:
        figures = table(("", ""), [(m.name, f"{m.value:.2f} %") for m in measured])
        parts = [f"On {measured[0].dataset}, measured by {measured[0].measured_by}:", figures]
    else:
        titles = ("test set", "", "", "measured by")
        parts = [table(titles, [(m.dataset, m.name, f"{m.value:.2f} %", m.measured_by) for m in measured])]
    for w in v.weights:
        if w.path:
            link = f"[Training runs](../runs.md#{anchor(f'{v.name}.{w.tag}')})"
            parts.append(f"{link} has the settings, the losses, and the accuracy on changed images.")
    return "\n\n".join(parts)


def _speed(v: Variant) -> str:
    own = f"`convmixer bench {v.name}` measures your machine."
    measured = of_variant(v.name)
    if not measured:
        return f"Not measured yet. {own}"
    return (
        f"{measured}\n\n[Speed](../speed.md) and [GPU kernels](../kernels.md) say how each figure was measured. {own}"
    )


def _memory(v: Variant) -> str:
    positions = (v.input_size[1] // v.patch_size) * (v.input_size[2] // v.patch_size)
    rows = [
        ("parameters", bytes_of(4 * v.parameters), bytes_of(2 * v.parameters)),
        ("one feature map, per image", bytes_of(4 * v.dim * positions), bytes_of(2 * v.dim * positions)),
    ]
    text = "Computed from the shapes:\n\n" + table(("", "float32", "bfloat16"), rows)
    return text + "\n\n" + kept_for_backward(v.name)


def _preprocessing(v: Variant) -> str:
    def numbers(values: tuple[float, ...]) -> str:
        return ", ".join(f"{value:g}" for value in values)

    modes = {
        "center": "the shorter side is resized, then the centre is cut out",
        "squash": "the whole image is resized",
    }
    rows = [
        ("input", " x ".join(map(str, v.input_size))),
        ("crop", f"{v.crop_mode}: {modes[v.crop_mode]}"),
        ("crop_pct", f"{v.crop_pct:g}"),
        ("interpolation", v.interpolation),
        ("mean", numbers(v.mean)),
        ("std", numbers(v.std)),
    ]
    return table(("", ""), rows) + "\n\n`convmixer.create_transform` builds it, and `predict` applies it."


def snippets(v: Variant) -> dict[str, str]:
    """Python for each library, by its name."""
    weights = v.weights[0] if v.weights else None
    pretrained = ", pretrained=True" if weights else ""
    build = f'model = convmixer.create_model("{v.name}"{pretrained})'
    save = f'folder = convmixer.save_pretrained(model, "{v.name}")'
    found = {
        "convmixer": f"import convmixer\n\n{build}\n"
        + (
            'print(convmixer.predict(model, "examples/images/cat.png", topk=3))'
            if weights
            else "print(model.num_features)"
        ),
        "timm": "import timm\n\nimport convmixer  # tells timm the names that it does not have\n\n"
        f'model = timm.create_model("{v.name}"{pretrained}).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    }
    if weights and not weights.path:
        source = f'"{weights.hub_id}"'
        found["transformers"] = (
            "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
            f"model = AutoModelForImageClassification.from_pretrained({source})\n"
            f"processor = AutoImageProcessor.from_pretrained({source})"
        )
    else:
        found["transformers"] = (
            "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\nimport convmixer\n\n"
            f"{build}\n{save}\nmodel = AutoModelForImageClassification.from_pretrained(folder)\n"
            "processor = AutoImageProcessor.from_pretrained(folder)"
        )
    size = ", ".join(map(str, (1, *v.input_size)))
    found["ONNX"] = (
        "import numpy as np\nimport onnxruntime\n\nimport convmixer\n\n"
        f'{build}\nconvmixer.export_model(model, "{v.name}.onnx")\n'
        f'session = onnxruntime.InferenceSession("{v.name}.onnx")\n'
        f'(logits,) = session.run(["logits"], {{"images": np.zeros(({size}), np.float32)}})'
    )
    return found


def _code(v: Variant) -> str:
    tabs = "\n".join(f":::{{tab-item}} {name}\n```python\n{code}\n```\n:::" for name, code in snippets(v).items())
    return f"::::{{tab-set}}\n{tabs}\n::::"


def _mistakes(v: Variant, w: Weights) -> str:
    """What the weights that ship get wrong, from their confusion matrix."""
    name = f"{v.name}.{w.tag}"
    found = evaluation(name)
    classes, confusion = found["classes"], found["confusion"]
    pairs = sorted(
        ((count, classes[i], classes[j]) for i, row in enumerate(confusion) for j, count in enumerate(row) if i != j),
        reverse=True,
    )
    wrong = sum(count for count, _, _ in pairs)
    most = table(
        ("true", "predicted", "images", "of all mistakes"),
        [(true, guess, count, f"{100 * count / wrong:.1f} %") for count, true, guess in pairs[:8]],
        numbers=2,
    )
    return (
        f"Of {found['images']:,} test images the weights `{name}` get {wrong:,} wrong in float32. "
        f"The most frequent confusions:\n\n{most}\n\n"
        f"![Confusion matrix of {name}](/_figures/{anchor(name)}-confusion.png)\n\n"
        f"[Training runs](../runs.md#{anchor(name)}) lists the mistakes with the highest probabilities."
    )


def _weights(v: Variant) -> str:
    parts = []
    for w in v.weights:
        rows = [
            ("name", f"`{v.name}.{w.tag}`"),
            ("file from", place(w)),
            ("licence", w.licence),
            ("training data", w.training_data),
            ("recipe", w.recipe),
            ("machine, time, seed", training_of(w)),
        ]
        checksum = f"The file has {w.size:,} bytes and the sha256\n`{w.sha256}`." if w.sha256 else ""
        parts += [table(("", ""), rows), checksum]
    return "\n\n".join(parts) or v.note


def page(v: Variant) -> str:
    """Markdown of the page of a variant."""
    sections = [
        ("Code", _code(v)),
        ("Accuracy", _accuracy(v)),
        ("Weights", _weights(v)),
        ("Preprocessing", _preprocessing(v)),
        ("Speed", _speed(v)),
        ("Memory", _memory(v)),
    ]
    sections += [("What it gets wrong", _mistakes(v, w)) for w in v.weights if w.path]
    if any(w.path for w in v.weights):
        kernels = f"![Depthwise kernels of {v.name}](/_figures/{anchor(f'{v.name}.{v.weights[0].tag}')}-kernels.png)"
        sections.append(
            ("What it has learned", f"Depthwise kernels of four blocks, by `convmixer plot {v.name}`:\n\n{kernels}")
        )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    note = f"{v.note}\n\n" if v.note and v.weights else ""
    return f"# {v.name}\n\n{note}{figure(v.name, 'Architecture of', v.name)}\n\n{_facts(v)}\n\n{body}\n"


def write(file: Path, text: str) -> None:
    """Write only what changed, so that Sphinx reads only that again."""
    file.parent.mkdir(exist_ok=True)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def write_all() -> None:
    for variant in registry.VARIANTS:
        write(PAGES / f"{variant.name}.md", page(variant))
    notebook = DOCS.parent / "examples" / "from_scratch.ipynb"
    write(DOCS / notebook.name, notebook.read_text(encoding="utf-8"))
