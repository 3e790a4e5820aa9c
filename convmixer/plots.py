"""Figures of a run and of a model: curves, confusion, mistakes, weights, class activation.

Each function returns a `matplotlib.figure.Figure` that belongs to no window and to no global state of pyplot, so any
thread may draw, with or without a display. `write_figure` makes a PNG file of it. matplotlib and captum come with
`pip install 'convmixer[train]'` and are imported when a figure is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from convmixer.data.images import read_image
from convmixer.data.memory import fitting, load_images
from convmixer.errors import ArgumentError, check_count, check_names, is_count, optional
from convmixer.files import write_atomically
from convmixer.inference import check_answers, class_logits, compute, label_names
from convmixer.model import mirror
from convmixer.tracing import computing
from convmixer.transforms import create_transform, normalization, preprocessing
from convmixer.wrappers import describe, find_inner, find_model, in_channels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from convmixer.training.history import Epoch

Array = Tensor | npt.NDArray[Any] | Sequence[Any]
MOST_CELL_TEXTS = 20  # classes up to which a confusion matrix has room for figures in its cells
MOST_TICK_LABELS = 150
MOST_KERNELS = 256  # of one block
_DTYPES = ("float32", "bfloat16", "int8")  # of benchmarks
COLOURS = "inferno"  # of class activation
SHOWN_SIDE = 224  # pixels; smaller inputs are drawn from the same part of the image at a higher resolution


def _figure(width: float, height: float) -> Figure:
    """Make an empty figure of that many inches."""
    figure: Figure = optional("matplotlib.figure", "this figure", "train").Figure((width, height), layout="constrained")
    return figure


def write_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file of 150 dots per inch, replaced as a whole or not at all.

    Raises:
        ArgumentError: There is no such folder, `path` is one, or it ends in the suffix of another format.
        WriteError: The folder takes no files, or the disk is full.

    Example:
        >>> from convmixer.plots import plot_confusion, write_figure
        >>> write_figure(plot_confusion([0, 1, 1], [0, 1, 0], ("cat", "dog")), "confusion.png")
    """
    check_figure(path)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def check_figure(path: str | Path) -> None:
    """Raise an ArgumentError for a path whose suffix promises another format than PNG."""
    if Path(path).suffix.lower() not in ("", ".png"):
        raise ArgumentError(f"cannot write {str(path)!r}: figures are PNG files, so give a name that ends in .png")


def _literal(name: str) -> str:
    """Escape a class name: matplotlib takes what stands between two dollar signs for a formula."""
    return name.replace("$", r"\$")


def _array(values: Array) -> npt.NDArray[Any]:
    tensor = torch.as_tensor(values).detach().cpu()
    array: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


# ---- a run ----------------------------------------------------------------------------------------------------------


def plot_history(history: Sequence[Epoch]) -> Figure:
    """Draw loss, accuracy and learning rate by epoch.

    Args:
        history: One row per epoch, from `read_history` or `TrainingResult.history`. A run without validation has NaN
            for it, which is left out.

    Raises:
        ArgumentError: No epoch at all.

    Example:
        >>> from convmixer.plots import plot_history
        >>> from convmixer.training.history import Epoch
        >>> rows = [Epoch(1, 0.01, 2.0, 25.0, 1.8, 30.0, 60.0, 750.0), Epoch(2, 0.0, 1.5, 45.0, 1.4, 50.0, 60.0, 750.0)]
        >>> [axes.get_title() for axes in plot_history(rows).axes]
        ['loss', 'accuracy', 'learning rate']
    """
    if not history:
        raise ArgumentError("this history has no epochs: draw it after the first one")
    figure = _figure(12, 3.6)
    panels: tuple[Axes, Axes, Axes] = figure.subplots(1, 3)
    epochs = [row.epoch for row in history]
    for axes, name, unit in zip(panels, ("loss", "accuracy"), ("cross entropy", "top-1 (%)"), strict=False):
        for split in ("train", "validation"):
            values = [getattr(row, f"{split}_{name}") for row in history]
            if not all(map(math.isnan, values)):
                axes.plot(epochs, values, ".-", label=split)
        axes.legend()
        axes.set(title=name, ylabel=unit)
    panels[2].plot(epochs, [row.learning_rate for row in history], ".-", color="tab:green")
    panels[2].set(title="learning rate", ylabel="at the end of the epoch")
    ticker = optional("matplotlib.ticker", "this figure", "train")
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return figure


def plot_losses(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw loss and accuracy by epoch of a training that another program did, as docs/runs keeps it in losses.csv.

    Args:
        rows: One per epoch: `epoch`, `train_loss`, `loss_of_5000_training_images` and `top1_of_5000_training_images`.
    """
    figure = _figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["train_loss"] for row in rows], ".-", label="training, augmented")
    left.plot(epochs, [row["loss_of_5000_training_images"] for row in rows], ".-", label="5,000 training images")
    left.set(title="loss", xlabel="epoch", ylabel="cross entropy")
    right.plot(epochs, [row["top1_of_5000_training_images"] for row in rows], ".-", color="tab:orange")
    right.set(title="accuracy of 5,000 training images", xlabel="epoch", ylabel="top-1 (%)")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


# ---- predictions ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def class_probabilities(
    model: nn.Module,
    pixels: Tensor,
    *,
    batch_size: int = 64,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Tensor:
    """Compute the class probabilities of images that are already decoded, as by `load_images`.

    Args:
        model: A classifier from `create_model`; wrappers are looked into, as by `predict`.
        pixels: uint8 (N, C, H, W).
        batch_size: Images computed at a time.
        progress: Wraps the iteration, for a progress bar.

    Returns:
        float32 (N, number of classes) on the CPU; rows sum to 1. One output tells two classes apart.

    Raises:
        ArgumentError: Pixels of another type or shape, or a batch size that makes no sense.

    Example:
        >>> from convmixer.plots import class_probabilities
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> class_probabilities(model, torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 10])
    """
    _check_pixels("pixels", pixels)
    check_count("batch_size", batch_size)
    model = find_model(model)
    device = next(model.parameters()).device
    normalize = normalization(preprocessing(model))
    batches = []
    for batch in progress(pixels.split(batch_size)):
        logits = class_logits(compute(model, normalize(batch.to(device))))
        batches.append(logits.softmax(1).cpu())
    return torch.cat(batches)


def _check_pixels(name: str, pixels: Tensor) -> None:
    """Raise an ArgumentError for images other than bytes: numbers of other types have no known range."""
    if pixels.ndim != 4 or pixels.dtype != torch.uint8:
        raise ArgumentError(f"{name} {tuple(pixels.shape)} of {pixels.dtype}: give uint8 (N, C, H, W)")


def plot_confusion(labels: Array, predictions: Array, classes: Sequence[str]) -> Figure:
    """Draw how the images of each true class (row) were classified (columns), in percent of the row.

    Shades follow the square root of the percentage, so that rare confusions are seen too. Up to 20 classes each cell
    also says its percentage and its number of images; empty cells say nothing.

    Args:
        labels: True classes, integers (N,).
        predictions: Predicted classes, integers (N,).
        classes: Names by class.

    Raises:
        ArgumentError: No images, lengths that differ, or an integer that is not a class.

    Example:
        >>> from convmixer.plots import plot_confusion
        >>> plot_confusion([0, 0, 1, 1], [0, 0, 1, 0], ("cat", "dog")).axes[0].get_title()
        'top-1 75.00 % of 4 images'
    """
    true, predicted = _array(labels), _array(predictions)
    names = [_literal(name) for name in check_names("classes", classes)]
    count = len(names)
    if true.shape != predicted.shape or true.ndim != 1 or not true.size:
        raise ArgumentError(f"labels {true.shape} and predictions {predicted.shape}: give both as (N,), N at least 1")
    for name, values in {"labels": true, "predictions": predicted}.items():
        _check_labels(name, values, count)
    cells = true.astype(np.int64) * count + predicted.astype(np.int64)
    matrix = np.bincount(cells, minlength=count**2).reshape(count, count)
    totals = matrix.sum(1, keepdims=True)
    percent = 100 * matrix / np.maximum(totals, 1)
    side = min(max(0.72 * count, 4), 16)
    figure = _figure(side + 1.5, side)
    axes = figure.subplots()
    root = optional("matplotlib.colors", "this figure", "train").PowerNorm(0.5, vmin=0, vmax=100)
    shown = axes.imshow(percent, cmap="Blues", norm=root)
    figure.colorbar(shown, ax=axes, label="% of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"top-1 {100 * matrix.trace() / true.size:.2f} % of {true.size} images")
    if count <= MOST_TICK_LABELS:
        size = min(10.0, 72 * side / count * 0.6)
        slope: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(count), names, fontsize=size, **slope if count <= MOST_CELL_TEXTS else {"rotation": 90})
        axes.set_yticks(range(count), names, fontsize=size)
    if count <= MOST_CELL_TEXTS:
        for row, column in np.argwhere(matrix):
            text = f"{percent[row, column]:.1f}%\n{matrix[row, column]}"
            color = "white" if percent[row, column] > 30 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    return figure


def _check_labels(name: str, values: npt.NDArray[Any], count: int) -> None:
    """Raise an ArgumentError for labels that are not integers from 0 to count - 1."""
    if values.size and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= count):
        raise ArgumentError(f"{name} from {values.min()} to {values.max()}: give integers from 0 to {count - 1}")


def plot_mistakes(
    images: Tensor, labels: Array, probabilities: Array, classes: Sequence[str], count: int = 25
) -> Figure:
    """Draw the misclassified images whose wrong class got the highest probability, most confident first.

    Args:
        images: uint8 (N, C, H, W), C 1 or 3.
        labels: True classes, integers (N,).
        probabilities: (N, number of classes), as from `class_probabilities`.
        classes: Names by class.
        count: Most images to show.

    Raises:
        ArgumentError: Shapes that do not fit together, an integer that is not a class, or a count below 1.

    Example:
        >>> from convmixer.plots import plot_mistakes
        >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> plot_mistakes(images, [0, 1], [[0.9, 0.1], [0.7, 0.3]], ("cat", "dog")).axes[0].get_title()
        'dog -> cat 70.0%'
    """
    true, share, classes = _array(labels), _array(probabilities), check_names("classes", classes)
    _check_pixels("images", images)
    if images.shape[1] not in (1, 3):
        raise ArgumentError(f"images {tuple(images.shape)} have {images.shape[1]} channels: give 1 or 3")
    if true.shape != (len(images),) or share.shape != (len(images), len(classes)):
        raise ArgumentError(
            f"{len(images)} images of {len(classes)} classes with labels {true.shape} and probabilities {share.shape}: "
            f"give ({len(images)},) and ({len(images)}, {len(classes)})"
        )
    _check_labels("labels", true, len(classes))
    if not ((share >= 0) & (share <= 1.001)).all():  # rounding of 16-bit types
        raise ArgumentError(f"probabilities from {share.min()} to {share.max()}: give those of `class_probabilities`")
    check_count("count", count)
    predicted, confidence = share.argmax(1), share.max(1)
    wrong = np.flatnonzero(predicted != true)
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    columns = math.ceil(math.sqrt(max(len(chosen), 1)))
    rows = math.ceil(max(len(chosen), 1) / columns)
    figure = _figure(max(1.9 * columns, 4), 2.1 * rows + 0.4)
    figure.suptitle(f"{len(wrong)} mistakes among {len(images)} images")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, chosen, strict=False):
        axes.imshow(_array(images[i].permute(1, 2, 0)), cmap="gray", vmin=0, vmax=255)
        title = f"{classes[true[i]]} -> {classes[predicted[i]]} {100 * confidence[i]:.1f}%"
        axes.set_title(_literal(textwrap.fill(title, 26)), fontsize=8)
    return figure


# ---- speed ----------------------------------------------------------------------------------------------------------


def plot_benchmark(report: Mapping[str, Any]) -> Figure:
    """Draw images per second of each candidate of `convmixer bench`, a panel for each case; lines span all rounds.

    Args:
        report: The record that `convmixer bench --json` writes.

    Raises:
        ArgumentError: No case in which anything was measured.

    Example:
        >>> from convmixer.plots import plot_benchmark
        >>> result = {"name": "convmixer eager", "dtype": "float32"}
        >>> result |= {"slowest": 90.0, "images_per_second": 100.0, "fastest": 110.0}
        >>> case = {"batch_size": 64, "image_size": 32, "results": [result]}
        >>> machine = {"device": "a CPU", "threads": 2}
        >>> figure = plot_benchmark({"model": "convmixer_256_8", "machine": machine, "cases": [case]})
        >>> figure.axes[0].get_title()
        'batch 64, 32 pixels'
    """
    cases = [(case, [r for r in case["results"] if r["images_per_second"]]) for case in report.get("cases", ())]
    cases = [(case, measured) for case, measured in cases if measured]
    if not cases:
        raise ArgumentError("this benchmark has no figures: give the JSON of `convmixer bench`")
    height = sum(1.0 + 0.24 * len(measured) for _, measured in cases)
    figure = _figure(9, height)
    sizes = [1.0 + 0.24 * len(measured) for _, measured in cases]
    panels = figure.subplots(len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": sizes})[:, 0]
    colors = {("convmixer", d): c for d, c in zip(_DTYPES, ("#6baed6", "#2171b5", "#08306b"), strict=True)}
    colors |= {("timm", d): c for d, c in zip(_DTYPES, ("#fdae6b", "#d94801", "#7f2704"), strict=True)}
    for axes, (case, measured) in zip(panels, cases, strict=True):
        rows = sorted(measured, key=lambda r: r["images_per_second"])
        speeds = [r["images_per_second"] for r in rows]
        errors = [
            [r["images_per_second"] - r["slowest"] for r in rows],
            [r["fastest"] - r["images_per_second"] for r in rows],
        ]
        shades = [colors[r["name"].split()[0], r["dtype"]] for r in rows]
        names = [f"{r['name']}, {r['dtype']}" for r in rows]
        axes.barh(range(len(rows)), speeds, xerr=errors, color=shades, error_kw={"elinewidth": 1, "ecolor": "0.3"})
        axes.set_yticks(range(len(rows)), names)  # a candidate may come twice
        for i, row in enumerate(rows):
            axes.annotate(
                f" {row['images_per_second']:,.{0 if speeds[-1] > 100 else 1}f}",
                (max(row["fastest"], row["images_per_second"]), i),
                va="center",
                fontsize=8,
            )
        axes.tick_params(axis="y", labelsize=8)
        axes.set_xlim(0, 1.15 * max(r["fastest"] for r in rows))
        axes.set_title(f"batch {case['batch_size']}, {case['image_size']} pixels", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    panels[-1].set_xlabel("images per second")
    figure.suptitle(
        f"{report['model']} on {report['machine']['device']}, {report['machine']['threads']} threads", fontsize=10
    )
    return figure


# ---- weights --------------------------------------------------------------------------------------------------------


def _weight(model: nn.Module, name: str) -> npt.NDArray[Any]:
    """Return a parameter by name; raise an ArgumentError if the model has none of that name."""
    try:
        return _array(find_inner(find_model(model)).get_parameter(name).float())
    except AttributeError as error:
        raise ArgumentError(
            f"{describe(find_inner(model))} has no {name}: give a ConvMixer as it was before optimize"
        ) from error


def _mosaic(tiles: npt.NDArray[Any], gap: float) -> npt.NDArray[Any]:
    """Lay tiles (N, h, w, ...) out as a nearly square picture, row by row, one pixel of the value `gap` apart."""
    count, height, width, *channels = tiles.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    border = [(0, rows * columns - count), (0, 1), (0, 1)] + [(0, 0)] * len(channels)
    tiles = np.pad(tiles, border, constant_values=gap)
    grid = tiles.reshape(rows, columns, height + 1, width + 1, *channels).swapaxes(1, 2)
    picture: npt.NDArray[Any] = grid.reshape(rows * (height + 1), columns * (width + 1), *channels)
    return picture[:-1, :-1]


def plot_patch_embedding(model: nn.Module) -> Figure:
    """Draw the filters of the stem as colour tiles, as the paper shows them in its Figure 4 (arXiv:2201.09792).

    Each filter is scaled by itself, its lowest weight to 0 and its highest to 1 over all its channels, so that hues
    within a filter are true and strengths of different filters cannot be compared. Three channels are shown as red,
    green and blue; of any other number the mean, as grey.

    Args:
        model: A ConvMixer.

    Raises:
        ArgumentError: Another model.

    Example:
        >>> from convmixer.plots import plot_patch_embedding
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> plot_patch_embedding(model).axes[0].get_title()
        'patch embedding: 256 filters of 2x2'
    """
    weight = _weight(model, "stem.0.weight").transpose(0, 2, 3, 1)  # (dim, p, p, in_chans)
    if weight.shape[3] != 3:
        weight = weight.mean(3, keepdims=True)
    low, high = weight.min((1, 2, 3), keepdims=True), weight.max((1, 2, 3), keepdims=True)
    tiles = (weight - low) / np.maximum(high - low, np.finfo(weight.dtype).tiny)
    figure = _figure(7, 7.3)
    axes = figure.subplots()
    axes.imshow(_mosaic(tiles, gap=1).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"patch embedding: {len(tiles)} filters of {tiles.shape[1]}x{tiles.shape[2]}")
    return figure


def plot_depthwise_kernels(model: nn.Module, block: int | None = None) -> Figure:
    """Draw the first 256 depthwise kernels of one block, or of up to four blocks from the first to the last.

    Colours run from blue (negative) through white (0) to red; their range is that of the panel's largest weight.

    Args:
        model: A ConvMixer.
        block: Index of the block, counted from the end if negative; None takes several, evenly spread.

    Raises:
        ArgumentError: Another model, or no such block.

    Example:
        >>> from convmixer.plots import plot_depthwise_kernels
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> plot_depthwise_kernels(model, block=-1).axes[0].get_title()
        'block 7: 256 of 256 kernels, 5x5'
    """
    _weight(model, "blocks.0.0.fn.0.weight")
    depth = len(find_inner(model).blocks)
    if block is not None and not -depth <= block < depth:
        raise ArgumentError(f"block={block}: this model has the blocks 0 to {depth - 1}")
    chosen = sorted({round(i * (depth - 1) / 3) for i in range(4)}) if block is None else [block % depth]
    columns = min(len(chosen), 2)
    rows = math.ceil(len(chosen) / columns)
    figure = _figure(6.4 * columns, 5.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, chosen, strict=False):
        weight = _weight(model, f"blocks.{i}.0.fn.0.weight")  # (dim, 1, k, k)
        kernels = weight[:MOST_KERNELS, 0]
        most = np.abs(kernels).max()
        shown = axes.imshow(_mosaic(kernels, gap=np.nan), cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        figure.colorbar(shown, ax=axes, shrink=0.8)
        axes.set_title(f"block {i}: {len(kernels)} of {len(weight)} kernels, {kernels.shape[1]}x{kernels.shape[2]}")
    return figure


# ---- class activation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassActivation:
    """Which regions of an image support a class, by `class_activation`.

    Attributes:
        probabilities: Of all classes, float32 (N).
        target: Index of the class that the map is of.
        seen: What the model sees, before it is normalised: values in [0, 1], (h, w, C).
        picture: The same part of the image in more pixels, (H, W, C).
        heat: The activation, from 0 to at most 1, (H, W).
    """

    probabilities: Tensor
    target: int
    seen: npt.NDArray[Any]
    picture: npt.NDArray[Any]
    heat: npt.NDArray[Any]

    @property
    def opacity(self) -> npt.NDArray[Any]:
        """How much of the picture the map covers, (H, W): the picture shows where nothing supports the class."""
        opacity: npt.NDArray[Any] = 0.8 * self.heat**0.5
        return opacity

    def overlay(self) -> Image.Image:
        """Lay the map over the picture, in matplotlib's colours "inferno": an RGB image of (W, H)."""
        colours = optional("matplotlib", "this figure", "train").colormaps[COLOURS](self.heat)[..., :3]
        share = self.opacity[..., None]
        pixels = (1 - share) * self.picture + share * colours  # a grey picture becomes RGB
        return Image.fromarray(np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8))


@torch.inference_mode(False)
@torch.enable_grad()
def class_activation(
    model: nn.Module, image: Any, target: int | None = None, *, side: int = SHOWN_SIDE
) -> ClassActivation:
    """Compute Grad-CAM: which regions of an image support a class, by the last block's output and its gradient.

    The activation is scaled to at most 1 and interpolated between the centres of the patches. Method: Selvaraju et al.,
    "Grad-CAM", arXiv:1610.02391; captum's `LayerGradCam` computes it.

    Args:
        model: A classifier from `create_model`, in any mode, which stays as it is.
        image: Whatever `read_image` takes; it is preprocessed as by `predict(draft=False)`.
        target: Index of the class; None takes the most probable one.
        side: Least pixels of a side of the picture and of the map, which have a whole multiple of the model's pixels.

    Raises:
        ImageError: An image that cannot be read.
        ArgumentError: A model without a head or one from `optimize`, or no such class.
        DependencyError: captum is not installed.

    Example:
        >>> from convmixer.plots import class_activation
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> class_activation(model, "cat.png", side=96).heat.shape
        (96, 96)
    """
    model = find_model(model)
    _weight(model, "blocks.0.0.fn.0.weight")  # a folded block puts out something else
    count = len(label_names(model))
    if target is not None and not (is_count(target, 0) and target < count):
        raise ArgumentError(f"target={target!r}: give the index of a class, 0 to {count - 1}")
    attribution = optional("captum.attr", "this figure", "train")
    channels = in_channels(model)
    opened, transform = read_image(image, channels), create_transform(model)
    parameter = next(model.parameters())
    inputs = transform(opened)[None].to(parameter.device, parameter.dtype).requires_grad_()  # weights may be frozen
    view: Any = mirror(model).eval()  # captum hangs hooks on layers, which others may be using
    view.fused = False  # fused blocks call no layers, so no hooks
    with computing():
        probabilities = class_logits(check_answers(model, view(inputs).detach().float())).softmax(1)[0]
        index = int(probabilities.argmax()) if target is None else target
        grad_cam = attribution.LayerGradCam(lambda x: class_logits(view(x)), view.blocks[-1])
        activation = grad_cam.attribute(inputs, target=index, relu_attributions=True).detach().float()
    height, width = inputs.shape[2:]
    scale = math.ceil(side / min(height, width))
    raw: dict[str, Any] = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    seen, picture = (
        _array(create_transform(model, input_size=(channels, k * height, k * width), **raw)(opened).permute(1, 2, 0))
        for k in (1, scale)
    )
    heat = activation.new_zeros(picture.shape[:2])  # the stem leaves out what fills no patch
    rows, columns = (scale * view.patch_size * patches for patches in activation.shape[2:])
    heat[:rows, :columns] = attribution.LayerAttribution.interpolate(activation, (rows, columns), "bilinear")[0, 0]
    heat = _array(heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny))
    return ClassActivation(probabilities.cpu(), index, seen, picture, heat)


def plot_class_activation(model: nn.Module, image: Any, target: int | None = None) -> Figure:
    """Draw Grad-CAM: which regions of an image support a class.

    On the left is what the model sees; on the right the activation over the same part of the image. `class_activation`
    computes it.

    Args:
        model: A classifier from `create_model`, in any mode, which stays as it is.
        image: Whatever `read_image` takes; it is preprocessed as by `predict(draft=False)`.
        target: Index of the class; None takes the most probable one.

    Raises:
        ImageError: An image that cannot be read.
        ArgumentError: A model without a head, or no such class.

    Example:
        >>> from convmixer.plots import plot_class_activation
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> plot_class_activation(model, "cat.png").axes[0].get_title()
        "the model's input, 32x32"
    """
    found, names = class_activation(model, image, target), label_names(find_model(model))
    best = int(found.probabilities.argmax())
    figure = _figure(9, 4.6)
    left, right = figure.subplots(1, 2)
    for axes, pixels in ((left, found.seen), (right, found.picture)):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
    shown = right.imshow(found.heat, cmap=COLOURS, vmin=0, vmax=1, alpha=found.opacity)
    figure.colorbar(shown, ax=right, label="activation, relative", shrink=0.8)
    height, width = found.seen.shape[:2]
    left.set_title(f"the model's input, {width}x{height}")
    share = 100 * found.probabilities[found.target]
    right.set_title(f"activation for {_literal(names[found.target])}, {share:.1f} %")
    figure.suptitle(f"predicted: {_literal(names[best])} {100 * found.probabilities[best]:.1f} %")
    return figure


def model_figures(
    model: nn.Module,
    *,
    data: str | Path | None = None,
    image: Any = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
    report: Callable[[str], None] = print,
) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of everything that can be drawn of a model.

    Args:
        model: A classifier from `create_model`.
        data: Source of test images, for the confusion matrix and the mistakes; see `load_images`.
        image: An image, for the class activation.
        progress: Called as `progress(iterable, description)`, for a progress bar.
        report: Takes a line about which images were taken.

    Raises:
        DataError: Test images that cannot be read.
        ImageError: The image cannot be read.
    """
    yield "patch_embedding", plot_patch_embedding(model)
    yield "depthwise_kernels", plot_depthwise_kernels(model)
    if image is not None:
        yield "class_activation", plot_class_activation(model, image)
    if data is not None:
        config = preprocessing(model)
        images = load_images(
            data,
            "test",
            config["input_size"],
            classes=label_names(model),
            progress=lambda items: progress(items, "reading test"),
            report=report,
            **fitting(config),
        )
        probabilities = class_probabilities(model, images.pixels, progress=lambda items: progress(items, "classifying"))
        yield "confusion", plot_confusion(images.labels, probabilities.argmax(1), images.classes)
        yield "mistakes", plot_mistakes(images.pixels, images.labels, probabilities, images.classes)
