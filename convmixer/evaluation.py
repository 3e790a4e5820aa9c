"""Measure a classifier on a labelled data set, with the preprocessing of `predict`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmixer.data.readers import ShardSplit, Split, open_split
from convmixer.errors import ArgumentError, DataError, check_count, check_names
from convmixer.factory import open_model
from convmixer.inference import check_answers, class_logits, count_classes, imagenet_labels, known_labels, preparation
from convmixer.model import evaluation_view
from convmixer.runtime.optimize import optimize
from convmixer.runtime.quantize import calibration_images
from convmixer.tracing import computing
from convmixer.training.precision import autocast, choose_precision
from convmixer.wrappers import find_model


@dataclass(frozen=True)
class Scores:
    """How good the probabilities are.

    Attributes:
        top1: Percent of images whose class is the most probable one.
        top5: Percent of images whose class is among the five most probable ones; 100 with five classes or fewer.
        loss: Mean cross entropy, in nats.
        calibration_error: Expected calibration error in percent; see `calibration_error`.
    """

    top1: float
    top5: float
    loss: float
    calibration_error: float


@dataclass(frozen=True)
class ClassAccuracy:
    """Percent top-1 over the `count` images of one class."""

    label: str
    top1: float
    count: int


@dataclass(frozen=True)
class Evaluation(Scores):
    """What `validate` found.

    Attributes:
        count: Number of images.
        images_per_second: Of one pass through the model, reading and preprocessing left out.
        classes: Accuracy per class that the data hold, in the model's order.
        flip: The scores with flip test-time augmentation, if asked for.
    """

    count: int
    images_per_second: float
    classes: tuple[ClassAccuracy, ...]
    flip: Scores | None


@torch.inference_mode()
def validate(
    model: nn.Module,
    data: str | Path,
    *,
    split: str = "test",
    labels: str | Path | None = None,
    classes: Sequence[str] | None = None,
    flip: bool = False,
    batch_size: int = 64,
    precision: str = "float32",
    draft: bool = True,
    data_root: str | Path | None = None,
    download: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    report: Callable[[str], None] = print,
) -> Evaluation:
    """Measure accuracy, loss and calibration of a classifier on a split.

    Images are read one batch at a time and prepared as `predict` does it. The data's classes are matched by name to the
    model's; for ImageNet-1k's weights they may also be called by their WordNet numbers. The data may lack some classes.

    Args:
        model: As `predict` takes it.
        data: A folder, a tar, WebDataset shards, or a name such as `torch/cifar10`; see
            `convmixer.data.memory.load_images`.
        split: "train", "validation" or "test"; of an `hfds/` data set any split that it has. Validation images stand in
            for missing test images.
        labels: A table with the columns image and label, instead of class folders; see `load_images`.
        classes: The model's class names by index, instead of those that came with its weights. A model without names
            is taken to have those of the data, in their order, if there are as many.
        flip: Also score the mean of the probabilities of each image and of its mirror image.
        batch_size: Images computed at a time.
        precision: "float32", "bfloat16" or, on a GPU, "float16" (autocast), or "auto": bfloat16 where the hardware has
            matrix multiplication for it, else float32.
        draft: Decode large JPEG photographs at a reduced scale; see `predict`.
        data_root: Where downloaded data sets lie: by default `data` for `torch/`, the Hub's cache for `hfds/`.
        download: Let `torch/` data sets download what is missing.
        progress: Wraps the iteration over batches, for a progress bar.
        report: Takes a line about what was taken for the split.

    Raises:
        ArgumentError: A model without a head, another kind of module, or an argument that makes no sense.
        DataError: Data that cannot be found or read, or classes that the model does not know.
        DependencyError: A library that reads the data is not installed.
        ConvMixerError: The model answers NaN or infinity.

    Example:
        >>> from convmixer.evaluation import validate
        >>> model = convmixer.create_model("convmixer_256_8", num_classes=2, device="cpu")
        >>> found = validate(model, "data/flowers", classes=("daisy", "rose"))
        test: 6 images in 2 classes from flowers/test/
        >>> found.count, [row.label for row in found.classes]
        (6, ['daisy', 'rose'])
    """
    model = find_model(model)
    names = check_names("classes", classes) if classes is not None else known_labels(model)
    count = count_classes(model)
    if classes is not None and len(classes) != count:
        raise ArgumentError(f"{len(classes)} class names for a model with {count} classes")
    check_count("batch_size", batch_size)
    parameter = next(model.parameters())
    autocast(parameter.device, precision)  # raises for a wrong precision before data are read
    prepare = preparation(model, draft=draft)

    view = evaluation_view(model)

    def compute(batch: Tensor) -> Tensor:
        with computing(), autocast(batch.device, precision):
            logits = check_answers(model, view(batch).float())
        return class_logits(logits).log_softmax(1).cpu()

    opened = open_split(data, split, labels=labels, root=data_root, download=download)
    report(opened.taken)
    plain, mirrored, targets, seconds = [], [], [], 0.0
    names, index = _match(opened, names, count)
    samples = opened.in_order(prepare)
    for _ in progress(range(0, len(opened), batch_size)):
        images = list(itertools.islice(samples, batch_size))
        targets += [label for _, label in images]
        batch = torch.stack([tensor for tensor, _ in images]).to(parameter.device, parameter.dtype)
        begun = time.perf_counter()
        plain.append(compute(batch))
        seconds += time.perf_counter() - begun
        if flip:
            mirrored.append(compute(batch.flip(3)))
    next(samples, None)  # shards say only at their end that they hold more than they should
    truth = index[targets]
    log_p = torch.cat(plain)
    return Evaluation(
        **asdict(_scores(log_p, truth)),
        count=len(truth),
        images_per_second=len(truth) / seconds,
        classes=_per_class(log_p, truth, names),
        flip=_scores(torch.logaddexp(log_p, torch.cat(mirrored)) - math.log(2), truth) if flip else None,
    )


@dataclass(frozen=True)
class Comparison:
    """A model as it is and, if that was asked for, optimized.

    Attributes:
        settings: What was measured, and how.
        original: Of the model as it is.
        optimized: Of its optimized copy, or None.
        choice: The backend of that copy.
    """

    settings: dict[str, Any]
    original: Evaluation
    optimized: Evaluation | None
    choice: str

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it."""
        optimized = {"optimized": {"choice": self.choice} | asdict(self.optimized)} if self.optimized else {}
        return self.settings | optimized | asdict(self.original)


def compare(
    model: str,
    data: str,
    *,
    split: str,
    labels: str | Path | None,
    precision: str,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    backend: str | None = None,
    int8: bool = False,
    calibration: str | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
    report: Callable[[str], None] = print,
    **options: Any,
) -> Comparison:
    """Measure a model on a split, and with a backend also its optimized copy, which keeps the same precision.

    Args:
        model: What `open_model` takes, with `checkpoint` and `device`.
        data: As for `validate`, like `split`, `labels` and `precision`.
        backend: A backend of `optimize`, or None to measure only the model as it is.
        int8: Optimize to int8.
        calibration: Source of the images for int8.
        progress: Called as `progress(iterable, description)`, for a progress bar.
        report: Takes a line about what was taken for the split.
        options: Further arguments of `validate`.

    Raises:
        ArgumentError: As `optimize` and `validate` do, or a precision that the device lacks.
        DataError: As `validate` does.
    """
    opened = open_model(model, checkpoint=checkpoint, device=device)
    choose_precision(next(opened.parameters()).device, precision)  # raises before anything is computed
    fast = None
    if backend:
        dtype = torch.int8 if int8 else precision if precision == "auto" else getattr(torch, precision)
        images = calibration_images(calibration, opened, report=report) if int8 and calibration else calibration
        fast = optimize(opened, backend=backend, dtype=dtype, calibration=images)
    measure = partial(validate, data=data, split=split, labels=labels, **options)
    original = measure(
        model=opened, precision=precision, progress=lambda items: progress(items, "validating"), report=report
    )
    optimized, choice = None, ""
    if fast is not None:
        # Without autocast: the optimized model computes in its own precision.
        optimized = measure(
            model=fast,
            precision="float32",
            progress=lambda items: progress(items, "optimized"),
            report=lambda _: None,
        )
        choice = str(getattr(fast, "choice", "eager, the folded module"))
    settings = {"model": model, "checkpoint": checkpoint and str(checkpoint), "data": data}
    settings |= {"split": split, "labels": labels and str(labels), "precision": precision}
    return Comparison(settings, original, optimized, choice)


def _match(data: Split | ShardSplit, names: tuple[str, ...] | None, count: int) -> tuple[tuple[str, ...], Tensor]:
    """Return the names of the model's `count` classes, and for each label of the data the model's label."""
    if names is None:
        if len(data.classes) != count:
            raise DataError(
                f"{data.name!r} has {len(data.classes)} classes, the model has {count} and no names for them: "
                "pass classes=, or weights whose header holds label_names"
            )
        names = data.classes
    if count == 1000 and names == imagenet_labels():
        from timm.data import ImageNetInfo  # reads its tables when it is constructed

        numbers = ImageNetInfo().label_names()
        if data.classes[0] in numbers:
            return names, data.labels_in(numbers)
    return names, data.labels_in(names)


def _hits(log_p: Tensor, labels: Tensor) -> Tensor:
    """Say which of the five most probable classes is the right one, (N, C), (N,) -> (N, 5)."""
    return log_p.topk(min(5, log_p.shape[1])).indices == labels[:, None]


def _scores(log_p: Tensor, labels: Tensor) -> Scores:
    hits = _hits(log_p, labels)
    return Scores(
        top1=100 * hits[:, 0].double().mean().item(),
        top5=100 * hits.any(1).double().mean().item(),
        loss=F.nll_loss(log_p, labels).item(),
        calibration_error=100 * calibration_error(log_p.amax(1).exp(), hits[:, 0]),
    )


def _per_class(log_p: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[ClassAccuracy, ...]:
    counts = labels.bincount(minlength=len(names)).tolist()
    correct = labels[_hits(log_p, labels)[:, 0]].bincount(minlength=len(names)).tolist()
    rows = zip(names, correct, counts, strict=True)
    return tuple(ClassAccuracy(name, 100 * right / count, count) for name, right, count in rows if count)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Compute the expected calibration error: how far confidence is from accuracy, on average over images.

    Images are put into bins ((m-1)/bins, m/bins] by confidence; the gap between mean confidence and accuracy of a bin
    is weighted by its share of the images. Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3
    (arXiv:1706.04599), with their 15 bins.

    Args:
        confidence: Probability of the predicted class (N,), in [0, 1].
        correct: Whether that class is the right one (N,).
        bins: Number of bins, all of one width.

    Returns:
        A part in [0, 1].

    Raises:
        ArgumentError: No images, or a number of bins that makes no sense.

    Example:
        >>> from convmixer.evaluation import calibration_error
        >>> round(calibration_error(torch.full((10,), 0.8), torch.arange(10) < 7), 6)  # 80 % sure, 70 % right
        0.1
    """
    check_count("bins", bins)
    if not len(confidence):
        raise ArgumentError("no images, and so no calibration error: give at least one")
    confidence = confidence.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    gaps = torch.zeros(bins, dtype=torch.float64)  # summed over the images of each bin
    gaps.index_add_(0, torch.bucketize(confidence, edges), confidence - correct.double())
    return gaps.abs().sum().item() / len(confidence)
