"""Models in files that other programs run: ONNX, OpenVINO, `torch.export`, and plain safetensors.

Each file is written beside its destination, opened there by the runtime that it is for, and compared with the model on
a few images. Only a file that agrees is put in place.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmixer import folding, openvino_core
from convmixer.checkpoints import check_writable, read_tensors, save_weights, write_atomically
from convmixer.errors import ArgumentError, ConvMixerError, ExportError, nearest, optional
from convmixer.folding import FoldedConvMixer
from convmixer.inference import known_labels
from convmixer.model import ConvMixer
from convmixer.tracing import tracing
from convmixer.transforms import preprocessing

# The largest difference that a format may make, relative to the largest logit: many roundings in the type.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file; OpenVINO's weights are in a second one beside it, which ends in .bin.
        format: A key of `FORMATS`.
        dtype: Type of its weights.
        folded: Whether every BatchNorm was folded into its neighbours.
        difference: Largest difference between an output of the file and of the model, relative to the largest output.
    """

    path: Path
    format: str
    dtype: torch.dtype
    folded: bool
    difference: float


class _Float32(nn.Module):
    """A model of any type that takes and returns float32, (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.model(images.to(self.dtype)).float()
        return result


@dataclass(frozen=True)
class _Job:
    """All that a writer needs; `model` computes in `dtype`, `shapes` are torch.export's dynamic shapes."""

    model: nn.Module
    dtype: torch.dtype
    example: Tensor
    shapes: dict[str, dict[int, Any]]
    output: str
    metadata: dict[str, str]

    def program(self, dtype: torch.dtype) -> torch.export.ExportedProgram:
        return torch.export.export(_Float32(self.model, dtype), (self.example,), dynamic_shapes=self.shapes)


# ---- one writer for each format: write the file, open it again, return what runs it --------------------------------


def _onnx(job: _Job, path: Path) -> Run:
    onnxruntime = [optional(name, "the format onnx", "export") for name in ("onnx", "onnxscript", "onnxruntime")][-1]
    names = {"input_names": ["images"], "output_names": [job.output]}
    program: Any = torch.onnx.export(
        _Float32(job.model, job.dtype),
        (job.example,),
        dynamo=True,
        dynamic_shapes=job.shapes,
        opset_version=18,
        verbose=False,
        **names,  # type: ignore[arg-type]
    )
    program.model.metadata_props.update(job.metadata)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([job.output], {"images": images.numpy()})[0])


def _openvino(job: _Job, path: Path) -> Run:
    openvino = optional("openvino", "the format openvino", "export")
    model = openvino.convert_model(job.program(torch.float32))
    # The conversion leaves open what the program does not; a fixed size lets the runtime plan ahead.
    model.reshape([-1 if axis in job.shapes["images"] else side for axis, side in enumerate(job.example.shape)])
    model.inputs[0].get_tensor().set_names({"images"})
    model.outputs[0].get_tensor().set_names({job.output})
    for key, value in job.metadata.items():
        model.set_rt_info(value, ["convmixer", key])
    openvino.save_model(model, path, compress_to_fp16=job.dtype == torch.float16)
    # The program's own precision could be bfloat16, which depends on the processor.
    compiled = openvino_core.core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled({"images": images.numpy()})[job.output].copy())


def _torch_export(job: _Job, path: Path) -> Run:
    torch.export.save(job.program(job.dtype), path, extra_files={"metadata.json": json.dumps(job.metadata)})
    program: Run = torch.export.load(path).module()
    return program


def _safetensors(job: _Job, path: Path) -> Run:
    save_weights(job.model, path, job.metadata)
    model = copy.deepcopy(job.model).float()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # nothing may be left of the model itself
    model.load_state_dict(read_tensors(path))
    return model


@dataclass(frozen=True)
class _Format:
    suffix: str
    write: Callable[[_Job, Path], Run]
    dtypes: tuple[torch.dtype, ...]
    folds: bool  # by default, and whether it can
    computes: bool = True  # in the type of its weights, rather than in float32


_HALF = (torch.float32, torch.float16)
FORMATS = {
    "onnx": _Format(".onnx", _onnx, _HALF, True),
    "openvino": _Format(".xml", _openvino, _HALF, True, computes=False),
    "torch-export": _Format(".pt2", _torch_export, (*_HALF, torch.bfloat16), True),
    "safetensors": _Format(".safetensors", _safetensors, (*_HALF, torch.bfloat16), False),
}


# ---- the one function for all of them -------------------------------------------------------------------------------


def export_model(
    model: nn.Module,
    path: str | Path,
    format: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    fold: bool | None = None,
    normalization: bool = False,
    image_size: int | Sequence[int] | None = None,
    dynamic_size: bool = False,
) -> Exported:
    """Write a model for another runtime, open the file with that runtime, and compare the outputs.

    The file takes float32 images (B, in_chans, H, W) named `images`, preprocessed as for the model, and returns float32
    `logits` (B, num_classes); of a model without a head `features`. B may be anything. Label names and preprocessing
    are in the file's metadata. The model stays as it is.

    Args:
        model: A `ConvMixer`, or what `optimize` made of one.
        path: The file to write, which ends in .onnx, .xml (OpenVINO, with a .bin beside it), .pt2 (torch.export) or
            .safetensors; replaced as a whole or not at all.
        format: "onnx", "openvino", "torch-export" or "safetensors"; None goes by the ending.
        dtype: Type of the weights: float32, float16, and for torch-export and safetensors bfloat16.
        fold: Fold every BatchNorm, as `optimize` does; None folds wherever the format holds a computation rather than a
            model's own weights.
        normalization: The file takes images with values in [0, 1]: mean and std are folded, too.
        image_size: Side, or (height, width), in pixels; None takes the model's.
        dynamic_size: Leave height and width open as well.

    Raises:
        ArgumentError: Another kind of model, or a choice that does not go with the format.
        DependencyError: The format's libraries are not installed.
        WriteError: The file's folder takes no files.
        ExportError: The format cannot hold the model, or the file computes something else. Nothing is left behind.
    """
    path = Path(path)
    endings = {chosen.suffix: name for name, chosen in FORMATS.items()}
    if format is None:
        format = endings.get(path.suffix)
        if format is None:
            raise ArgumentError(f"cannot tell the format of {str(path)!r}: let it end in {', '.join(endings)}")
    if format not in FORMATS:
        raise ArgumentError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    chosen = FORMATS[format]
    if path.suffix != chosen.suffix:
        raise ArgumentError(f"{str(path)!r}: a file of the format {format} ends in {chosen.suffix}")
    if dtype not in chosen.dtypes:
        valid = ", ".join(str(valid) for valid in chosen.dtypes)
        raise ArgumentError(f"dtype={dtype!r}; valid for {format}: {valid}")
    if not isinstance(model, ConvMixer | FoldedConvMixer):
        kind = type(model)
        raise ArgumentError(
            f"cannot export a {kind.__module__}.{kind.__qualname__}: give a model of convmixer.create_model, "
            "before torch.compile and without features_only"
        )
    folded = isinstance(model, FoldedConvMixer)
    fold = chosen.folds if fold is None else fold
    if not chosen.folds and (fold or folded or normalization):
        raise ArgumentError(f"a {format} file holds a model's own weights: export the model without folding")
    if normalization and (folded or not fold):
        raise ArgumentError("normalization is part of folding: give the model itself, with fold=True")

    check_writable(path)
    reference: Any = copy.deepcopy(model)
    reference.to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()
    config = preprocessing(reference) if getattr(reference, "pretrained_cfg", None) else {}
    size = _image_size(image_size, config, reference)
    inside = torch.float32 if not chosen.computes else dtype
    if fold and not folded:
        computed = folding.fold(reference, normalization=normalization, dtype=inside)
        config = computed.pretrained_cfg if normalization else config
    else:
        computed = copy.deepcopy(reference).to(inside)
    output = "logits" if reference.num_classes else "features"
    dimensions: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic_size:
        dimensions |= dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    metadata = _metadata(reference, config, size, folded or fold)
    job = _Job(computed, dtype, torch.zeros(2, reference.in_chans, *size), {"images": dimensions}, output, metadata)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        try:
            with tracing():
                difference = _difference(chosen.write(job, written), reference, size, normalization, dynamic_size)
        except ConvMixerError:
            raise
        except Exception as error:  # each exporter and runtime has its own
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ExportError(f"the export to {format} failed: {type(error).__name__}: {reason}") from error
        if not difference <= TOLERANCE[dtype]:
            raise ExportError(
                f"{path.name} differs from the model by {difference:.2g} of the largest output, where {dtype} allows "
                f"{TOLERANCE[dtype]:g}: nothing was written"
                + ("" if dtype == torch.float32 else ". Export it as float32")
            )
        if len(files := sorted(Path(folder).iterdir())) > 1:
            path.unlink(missing_ok=True)  # an old graph must not meet new weights
        for file in files:  # .bin before .xml
            write_atomically(path.parent / file.name, file.replace)
    return Exported(path, format, dtype, folded or fold, difference)


def _image_size(image_size: int | Sequence[int] | None, config: Mapping[str, Any], model: Any) -> tuple[int, int]:
    if image_size is None:
        if not config:
            raise ArgumentError("this model says nothing about its preprocessing: give image_size=(height, width)")
        height, width = config["input_size"][1:]
        return height, width
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(type(side) is int and side >= model.patch_size for side in sides):
        raise ArgumentError(
            f"image_size={image_size!r}: give one or two whole numbers of at least a patch, {model.patch_size} pixels"
        )
    return sides


def _metadata(model: nn.Module, config: Mapping[str, Any], size: Sequence[int], folded: bool) -> dict[str, str]:
    """What a user of the file must know; lists and numbers as JSON."""
    facts: dict[str, Any] = {"num_classes": model.num_classes, "batch_norm": "folded" if folded else "as in the model"}
    facts |= {key: config[key] for key in ("architecture", "license", *_PREPROCESSING) if config.get(key) is not None}
    facts["input_size"] = (model.in_chans, *size)
    labels = known_labels(model) if model.num_classes else None
    if labels:
        facts["label_names"] = labels
    if model.num_classes == 1:
        facts["probability"] = "the sigmoid of the logit is the probability of the last of label_names"
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


@torch.inference_mode()
def _difference(run: Run, model: Any, size: Sequence[int], normalization: bool, dynamic_size: bool) -> float:
    """The largest difference of outputs, relative to the largest output, over batches of smooth random images."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for count, extra in ((1, 0), (3, model.patch_size if dynamic_size else 0)):
        noise = torch.rand(count, model.in_chans, 4, 4, generator=generator)
        images = F.interpolate(noise, (size[0] + extra, size[1] + 2 * extra), mode="bilinear")
        normalized = images
        if getattr(model, "pretrained_cfg", None):
            config = preprocessing(model)
            mean, std = (images.new_tensor(config[name])[:, None, None] for name in ("mean", "std"))
            normalized = (images - mean) / std
        expected = model(normalized)
        found = run(images if normalization else normalized)
        if found.shape != expected.shape:
            raise ExportError(f"the file returns {tuple(found.shape)} where the model returns {tuple(expected.shape)}")
        difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        if not difference.isfinite():
            return float("inf")
        largest = max(largest, float(difference))
    return largest
