"""Classify images: one, a list, or a stream of any length."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, overload

import torch
from timm.data.constants import DEFAULT_CROP_PCT
from torch import Tensor, nn

from convmixer.data.images import Size, check_channels, enough, is_one_image, read_image
from convmixer.data.layout import count_images, describe_left_out, list_folder
from convmixer.errors import ArgumentError, ConvMixerError, ImageError, check_count, check_names
from convmixer.model import count_outputs, evaluation_view
from convmixer.tracing import computing
from convmixer.transforms import create_transform, preprocessing
from convmixer.wrappers import find_model, in_channels

Prediction = list[tuple[str, float]]


@lru_cache(maxsize=1)
def imagenet_labels() -> tuple[str, ...]:
    """Return ImageNet-1k's classes in words, in the order of the weights."""
    from timm.data import ImageNetInfo  # reads its tables when it is constructed

    info = ImageNetInfo()
    return tuple(info.index_to_description(i) for i in range(1000))


def count_classes(model: nn.Module) -> int:
    """Return how many classes a model tells apart: two by one output, else one for each output.

    Raises:
        ArgumentError: A model without a head.
    """
    outputs = count_outputs(model)
    if not outputs:
        raise ArgumentError("this model has no classes: build it without features_only and with num_classes above 0")
    return max(outputs, 2)


def class_logits(logits: Tensor) -> Tensor:
    """Return logits (B, N) of all classes. One output z gives two, -z/2 and z/2, whose softmax is the sigmoid of z."""
    return torch.cat([-logits, logits], 1) / 2 if logits.shape[1] == 1 else logits


def check_answers(model: nn.Module, outputs: Tensor) -> Tensor:
    """Return what a model answers (N, ...), of which -inf may be a part, as where classes are masked.

    Raises:
        ArgumentError: The model has another number of outputs than it says.
        ConvMixerError: An answer holds NaN or infinity, or nothing but -inf.
    """
    expected = count_outputs(model)
    if expected and outputs.ndim == 2 and outputs.shape[1] != expected:
        raise ArgumentError(
            f"the model has {outputs.shape[1]} outputs, and its num_classes says {expected}: if its head was replaced, "
            'set model.num_classes and model.pretrained_cfg["label_names"]'
        )
    wrong = ~outputs.flatten(1).amax(1).isfinite()  # NaN counts as the largest
    if not bool(wrong.any()):
        return outputs
    if broken := broken_tensor(model):
        reason = f"its {broken} is damaged: take other weights"
    else:
        numbers = ", ".join(map(str, wrong.nonzero()[:5, 0].tolist()))
        reason = (
            f"values become too large on the way (image {numbers} of {len(wrong)}). float16 ends at 65,504; bfloat16 "
            "and float32 have a larger range"
        )
    raise ConvMixerError(f"the model answers NaN or infinity: {reason}")


def broken_tensor(model: nn.Module) -> str | None:
    """Return the name of a parameter or buffer with values that no training leaves."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta:
            values = tensor.float()
            if bool(values.isnan().any() | values.isposinf().any()):
                return name
            if name.endswith("running_var") and bool((values < 0).any()):
                return name
    return None


def known_labels(model: nn.Module) -> tuple[str, ...] | None:
    """Return the model's class names by index; None if nothing says what they are.

    A model with one output has two classes, and its `label_names` name both, or only the second, whose probability is
    the sigmoid of the output: from "cat" follow "not cat" and "cat".

    Raises:
        ArgumentError: A model without a head.
    """
    count = count_classes(model)
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    given = config.get("label_names")
    names = check_names("pretrained_cfg['label_names']", given) if given is not None and len(given) else ()
    if len(names) == count_outputs(model) == 1:
        names = (f"not {names[0]}", names[0])
    if names and len(names) == count:
        return names
    if count == 1000 and str(config.get("tag") or "").startswith("in1k"):
        return imagenet_labels()
    return None


def label_names(model: nn.Module) -> tuple[str, ...]:
    """Return the model's class names by index; "class 0", ... if nothing says what they are."""
    return known_labels(model) or tuple(f"class {i}" for i in range(count_classes(model)))


def least_size(model: nn.Module) -> Size:
    """Return the (width, height) from which on an image is large enough for a model: twice what its transform keeps."""
    config = preprocessing(model)
    _, height, width = config["input_size"]
    return enough(height, width, config.get("crop_pct") or DEFAULT_CROP_PCT)


@dataclass(frozen=True)
class Preparation:
    """An image, as `read_image` takes it -> the tensor (C, H, W) that `predict` computes.

    Attributes:
        transform: From a PIL image to the tensor.
        channels: 1 or 3.
        least: As in `read_image`.
    """

    transform: Callable[[Any], Tensor]
    channels: int
    least: Size | None

    def __call__(self, image: Any) -> Tensor:
        return self.transform(read_image(image, self.channels, least=self.least))


def preparation(model: nn.Module, *, draft: bool = True) -> Preparation:
    """Build the function from an image to a tensor that belongs to a model; worker processes can be given it.

    Args:
        model: A classifier from `create_model`.
        draft: Decode large JPEG photographs at a reduced scale, of which the transform needs at most half.

    Raises:
        ArgumentError: The model does not take images with 1 or 3 channels.
    """
    channels = in_channels(model)
    check_channels(channels)
    return Preparation(create_transform(model), channels, least_size(model) if draft else None)


@overload
def predict(
    model: nn.Module, images: list[Any] | tuple[Any, ...], topk: int = ..., *, batch_size: int = ..., draft: bool = ...
) -> list[Prediction]: ...


@overload
def predict(
    model: nn.Module, images: Iterator[Any], topk: int = ..., *, batch_size: int = ..., draft: bool = ...
) -> Iterator[Prediction]: ...


@overload
def predict(
    model: nn.Module, images: Any, topk: int = ..., *, batch_size: int = ..., draft: bool = ...
) -> Prediction: ...


def predict(
    model: nn.Module, images: Any, topk: int = 5, *, batch_size: int = 64, draft: bool = True
) -> Prediction | list[Prediction] | Iterator[Prediction]:
    """Return the most probable classes of one image or many.

    Args:
        model: A classifier from `create_model`, in any mode, which stays as it is. It is computed in evaluation mode,
            eagerly where it was compiled. Many threads may share it. Also one inside `torch.compile`, DataParallel,
            DistributedDataParallel, torch's AveragedModel or timm's ModelEma: the model inside is computed.
        images: Whatever `read_image` takes: a path, a URL, bytes, a file object, a PIL image, an array or a tensor. Or
            many of them: a list, a tuple, or any other iterable, such as a generator, of any length.
        topk: How many classes to return, at most all of them.
        batch_size: Images read and computed at a time. Use 1 for a generator that waits for each answer.
        draft: Decode large JPEG photographs, of a megapixel or more, at a reduced scale that still has at least twice
            the pixels per side that the model's transform needs. It takes a fraction of the time and changes
            probabilities a little; False decodes every pixel. Other images are the same to the bit.

    Returns:
        `[(label, probability), ...]`, most probable first. For a list or tuple of images a list of these. For another
        iterable an iterator of these, which takes the next images only when it is asked for their answers. A model with
        one output has two classes: see `known_labels`.

    Raises:
        ImageError: An image that cannot be read; from an iterator, when its batch is due.
        ArgumentError: A model without a head, another kind of module, or a topk below 1.
        ConvMixerError: The model answers NaN or infinity, as with damaged weights.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True)
        >>> [label for label, probability in convmixer.predict(model, "cat.png", topk=1)]
        ['cat']
    """
    model = find_model(model)
    names = label_names(model)
    check_count("topk", topk)
    check_count("batch_size", batch_size)
    one, prepare = is_one_image(images), preparation(model, draft=draft)
    sources = iter([images] if one else images)

    def answer() -> Iterator[Prediction]:
        while batch := [prepare(source) for source in itertools.islice(sources, batch_size)]:
            yield from _classify(model, torch.stack(batch), topk, names)

    if one:
        return next(answer())
    return list(answer()) if isinstance(images, list | tuple) else answer()


@torch.inference_mode()
def compute(model: nn.Module, batch: Tensor) -> Tensor:
    """Return what a model answers in evaluation mode to prepared images (N, C, H, W), as float32 on its device.

    Raises:
        ConvMixerError: The answer holds NaN or infinity.
    """
    parameter = next(model.parameters())
    view = evaluation_view(model)
    with computing():
        outputs: Tensor = view(batch.to(parameter.device, parameter.dtype)).float()
    return check_answers(model, outputs)


@torch.inference_mode()
def top_classes(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return probabilities and numbers of the most probable classes, (N, topk) each, most probable first.

    The arguments are what a model answers, (N, num_classes), and how many classes are wanted, at most all of them.
    """
    logits = class_logits(logits)
    return tuple(logits.softmax(1).topk(min(topk, logits.shape[1])))  # type: ignore[return-value]


def _classify(model: nn.Module, batch: Tensor, topk: int, names: Sequence[str]) -> list[Prediction]:
    """Compute the predictions for prepared images (N, C, H, W)."""
    values, indices = top_classes(compute(model, batch), topk)
    rows = zip(indices.tolist(), values.tolist(), strict=True)
    return [[(names[i], p) for i, p in zip(row, probabilities, strict=True)] for row, probabilities in rows]


@dataclass(frozen=True)
class FileResult:
    """What became of an image file: its predictions, or the reason why it could not be read."""

    image: str
    predictions: Prediction = field(default_factory=list)
    error: ImageError | None = None


def find_images(sources: Iterable[str], *, report: Callable[[str], None] = print) -> list[str]:
    """Return paths and URLs as they are, and instead of each folder all images that it holds.

    `report` takes a line about each folder that holds other files, too.

    Raises:
        ImageError: A folder without images.
    """
    found: list[str] = []
    for source in sources:
        if not os.path.isdir(source):
            found.append(source)
            continue
        folder = list_folder(source)
        left_out = describe_left_out(folder.left_out)
        if not folder.images:
            raise ImageError(f"no images in the folder {source!r}" + (f"; it holds {left_out}" if left_out else ""))
        if left_out:
            report(f"{source}: {count_images(len(folder.images))}; left out: {left_out}")
        found += [file.path for file in folder.images]
    return found


def predict_files(
    model: nn.Module, images: Iterable[str], topk: int = 5, *, batch_size: int = 64, draft: bool = True
) -> Iterator[FileResult]:
    """Classify image files and URLs, a batch at a time; one that cannot be read does not stop the others.

    Arguments are those of `predict`.
    """
    model = find_model(model)
    names = label_names(model)
    check_count("topk", topk)
    check_count("batch_size", batch_size)
    prepare, paths = preparation(model, draft=draft), iter(images)
    while batch := list(itertools.islice(paths, batch_size)):
        prepared, errors = {}, {}
        for i, path in enumerate(batch):
            try:
                prepared[i] = prepare(path)
            except ImageError as error:
                errors[i] = error
        answers = _classify(model, torch.stack(list(prepared.values())), topk, names) if prepared else []
        predictions = dict(zip(prepared, answers, strict=True))
        for i, path in enumerate(batch):
            yield FileResult(path, predictions.get(i, []), errors.get(i))
