"""Models in files that other programs run: ONNX, OpenVINO, Core ML, ExecuTorch, `torch.export`, and plain safetensors.

Each file is written to a folder next to its destination, opened there by the runtime that it is for, and compared with
the model on a few images. Only a file that agrees is moved to its destination. Core ML only runs on Apple's systems:
elsewhere the file's specification is checked.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from convmixer.errors import ArgumentError, ConvMixerError, ExportError, WriteError, first_line, nearest, optional
from convmixer.files import check_writable, write_atomically
from convmixer.hub.checkpoints import matching_variant, read_tensors, save_weights
from convmixer.hub.write_config import shape_of
from convmixer.inference import known_labels
from convmixer.model import ConvMixer, as_dtype, count_outputs
from convmixer.registry import PREPROCESSING, SHAPE
from convmixer.runtime import folding, openvino_core
from convmixer.runtime.chunks import as_list
from convmixer.runtime.convert import Dimensions, to_onnx_program, to_openvino, to_program
from convmixer.runtime.folding import FoldedConvMixer
from convmixer.tracing import quietly, tracing
from convmixer.transforms import preprocessing
from convmixer.wrappers import ADVICE, copy_module, describe, find_inner, unwrap

# The largest difference that a format may make, relative to the largest logit: that of many roundings in the type.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

OPSET = 18  # of ONNX, by default and at least
MOST_IMAGES = 64  # in a batch, where a format needs a bound

Compute = Callable[[Tensor], Sequence[Tensor]]  # images (B, C, H, W) -> the outputs of a file


@dataclass(frozen=True)
class Exported:
    """The file that `export_model` has written.

    Attributes:
        path: The file; OpenVINO's weights are in a second one next to it, which ends in .bin. Core ML's is a folder.
        format: A key of `FORMATS`.
        dtype: Type of its weights.
        folded: Whether every BatchNorm was folded into its neighbours.
        difference: Largest difference between an output of the file and of the model, relative to the largest output;
            NaN where this system cannot run the file.
        outputs: Names of what it returns.
    """

    path: Path
    format: str
    dtype: torch.dtype
    folded: bool
    difference: float
    outputs: tuple[str, ...]


class _Float32(nn.Module):
    """A model of any type that takes float32 (B, C, H, W) and returns float32, one tensor for each output."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = tuple(output.float() for output in as_list(self.model(images.to(self.dtype))))
        return outputs if len(outputs) > 1 else outputs[0]


@dataclass(frozen=True)
class _Job:
    """All that a writer needs.

    Attributes:
        model: Computes in `dtype`, or in float32 where the format does.
        dtype: Type of the weights in the file.
        example: Images (2, C, H, W).
        dimensions: Which of their axes stay open.
        outputs: Names of the outputs.
        metadata: What a user of the file must know.
        opset: Version of ONNX's operators.
    """

    model: nn.Module
    dtype: torch.dtype
    example: Tensor
    dimensions: Dimensions
    outputs: tuple[str, ...]
    metadata: dict[str, str]
    opset: int

    def program(self, dtype: torch.dtype, most: int | None = None) -> torch.export.ExportedProgram:
        """Trace the computation in a type; `most` bounds the batch."""
        dimensions, example = self.dimensions, self.example
        if most is not None:
            dimensions = dimensions | {0: torch.export.Dim("batch", min=1, max=most)}
            example = example[:1].repeat(most, 1, 1, 1)  # a smaller example would lower the bound
        return to_program(_Float32(self.model, dtype), example, dimensions)


# ---- one writer for each format: write the file, open it again, return what runs it --------------------------------


def _onnx(job: _Job, path: Path) -> Compute:
    onnxruntime = [optional(name, "the format onnx", "export") for name in ("onnx", "onnxscript", "onnxruntime")][-1]
    names = {"input_names": ["images"], "output_names": list(job.outputs)}
    module = _Float32(job.model, job.dtype)
    program = to_onnx_program(module, job.example, job.dimensions, opset_version=job.opset, **names)
    program.model.metadata_props.update(job.metadata)
    written = program.model.opset_imports[""]
    if written != job.opset:
        raise ExportError(f"this exporter writes opset {written} where {job.opset} was asked for: set another opset")
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(a) for a in session.run(list(job.outputs), {"images": images.numpy()})]


def _openvino(job: _Job, path: Path) -> Compute:
    openvino = optional("openvino", "the format openvino", "export")
    model = to_openvino(_Float32(job.model, torch.float32), job.example, job.dimensions)
    # The conversion leaves open what the program does not; a fixed size lets the runtime plan ahead.
    model.reshape([-1 if axis in job.dimensions else side for axis, side in enumerate(job.example.shape)])
    model.inputs[0].get_tensor().set_names({"images"})
    for output, name in zip(model.outputs, job.outputs, strict=True):
        output.get_tensor().set_names({name})
    for key, value in job.metadata.items():
        model.set_rt_info(value, ["convmixer", key])
    openvino.save_model(model, path, compress_to_fp16=job.dtype == torch.float16)
    # The program's own precision could be bfloat16, which depends on the processor.
    compiled = openvino_core.core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def compute(images: Tensor) -> list[Tensor]:
        found = compiled({"images": images.numpy()})
        return [torch.from_numpy(found[name].copy()) for name in job.outputs]

    return compute


def _torch_export(job: _Job, path: Path) -> Compute:
    content = io.BytesIO()  # where the disk is full, PyTorch's writer of files ends the process
    torch.export.save(job.program(job.dtype), content, extra_files={"metadata.json": json.dumps(job.metadata)})
    path.write_bytes(content.getbuffer())
    program = torch.export.load(path).module()
    return lambda images: as_list(program(images))


def _safetensors(job: _Job, path: Path) -> Compute:
    model = copy_module(job.model).float()
    save_weights(find_inner(job.model), path, job.metadata)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # nothing may be left of the model itself
    find_inner(model).load_state_dict(read_tensors(path))
    return lambda images: as_list(model(images))


def _executorch(job: _Job, path: Path) -> Compute:
    for name in ("executorch.exir", "executorch.runtime"):
        optional(name, "the format executorch", "executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    from executorch.runtime import Runtime

    program = job.program(job.dtype, MOST_IMAGES)
    constants = {"metadata": json.dumps(job.metadata)}
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=constants)
    config = ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())  # the batch's bound
    path.write_bytes(lowered.to_executorch(config).buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda images: list(method.execute([images.contiguous()]))


def _coreml(job: _Job, path: Path) -> Compute | None:
    coremltools = optional("coremltools", "the format coreml", "coreml")
    program = job.program(torch.float32, MOST_IMAGES).run_decompositions({torch.ops.aten.addcmul.default: _addcmul})
    precision = coremltools.precision
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model = coremltools.convert(
            program,
            convert_to="mlprogram",
            outputs=[coremltools.TensorType(name=name) for name in job.outputs],
            compute_precision=precision.FLOAT16 if job.dtype == torch.float16 else precision.FLOAT32,
            minimum_deployment_target=coremltools.target.iOS16,
            skip_model_load=True,
        )
    model.user_defined_metadata.update(job.metadata)
    model.save(str(path))
    _check_coreml(coremltools.utils.load_spec(str(path)), job)
    if sys.platform != "darwin":
        return None
    loaded = coremltools.models.MLModel(str(path))

    def compute(images: Tensor) -> list[Tensor]:
        found = loaded.predict({"images": images.numpy()})
        return [torch.from_numpy(found[name]) for name in job.outputs]

    return compute


def _addcmul(x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    """Compute `torch.addcmul`, which Core ML's tools do not know."""
    return x + value * a * b


def _check_coreml(spec: Any, job: _Job) -> None:
    """Raise an ExportError where a specification has other inputs, outputs or layers than the model."""
    (given,), outputs = spec.description.input, spec.description.output
    names = (given.name, *(output.name for output in outputs))
    if names != ("images", *job.outputs):
        raise ExportError(f"the file has the input and outputs {', '.join(names)}")
    function = spec.mlProgram.functions["main"]
    (block,) = function.block_specializations.values()
    found = sum(operation.type in ("conv", "linear") for operation in block.operations)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in job.model.modules())
    if found != layers:
        raise ExportError(f"the file has {found} convolutions and linear layers where the model has {layers}")


@dataclass(frozen=True)
class _Format:
    suffix: str
    write: Callable[[_Job, Path], Compute | None]
    dtypes: tuple[torch.dtype, ...]
    folds: bool  # whether it can hold a folded model, which it then does by default
    computes: bool = True  # in the type of its weights, rather than in float32
    bounded: bool = False  # the image size is fixed, and the batch at most MOST_IMAGES


_FLOATS = (torch.float32, torch.float16)
FORMATS = {
    "onnx": _Format(".onnx", _onnx, _FLOATS, True),
    "openvino": _Format(".xml", _openvino, _FLOATS, True, computes=False),
    "coreml": _Format(".mlpackage", _coreml, _FLOATS, True, computes=False, bounded=True),
    "executorch": _Format(".pte", _executorch, (torch.float32,), True, bounded=True),
    "torch-export": _Format(".pt2", _torch_export, (*_FLOATS, torch.bfloat16), True),
    "safetensors": _Format(".safetensors", _safetensors, (*_FLOATS, torch.bfloat16), False),
}


# ---- export ---------------------------------------------------------------------------------------------------------


def export_model(
    model: nn.Module,
    path: str | Path,
    format: str | None = None,
    *,
    dtype: torch.dtype | str = torch.float32,
    fold: bool | None = None,
    normalization: bool = False,
    image_size: int | Sequence[int] | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
) -> Exported:
    """Write a model for another runtime, open the file with that runtime, and compare the outputs.

    The file takes float32 images (B, in_chans, H, W) named `images`, preprocessed as for the model, and returns float32
    `logits` (B, num_classes); of a model without a head `features`, of a feature extractor the maps of its blocks, each
    named by its block: `features_0`, ... B may be anything, for coreml and executorch 1 to 64. Label names and
    preprocessing are in the file's metadata. The model is unchanged.

    Args:
        model: A `ConvMixer`, a feature extractor of `create_model(features_only=True)`, or the "eager" copy that
            `optimize` makes of one. It may be inside wrappers, as for `predict`.
        path: The file to write, which ends in .onnx, .xml (OpenVINO, with a .bin next to it), .mlpackage (Core ML, a
            folder), .pte (ExecuTorch), .pt2 (torch.export) or .safetensors; replaced completely or not at all.
        format: "onnx", "openvino", "coreml", "executorch", "torch-export" or "safetensors"; None goes by the ending.
        dtype: Type of the weights, or its name: float32; float16, except for executorch; bfloat16, for torch-export
            and safetensors.
        fold: Fold every BatchNorm, as `optimize` does; None folds wherever the format holds a computation rather than a
            model's own weights.
        normalization: Also fold mean and std: the file takes images with values in [0, 1].
        image_size: Side, or (height, width), in pixels; None takes the model's.
        dynamic_size: Leave height and width open as well; not for coreml and executorch.
        opset: Version of ONNX's operators, 18 or up to what PyTorch's exporter knows; None takes 18.

    Raises:
        ArgumentError: Another kind of model, or an argument that the format does not allow.
        DependencyError: The format's libraries are not installed.
        WriteError: No file can be written to the folder.
        ExportError: The format cannot hold the model, or the file computes something else. Nothing is left behind.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> written = convmixer.export_model(model, "convmixer.pt2")
        >>> written.format, written.outputs, written.difference < 1e-4
        ('torch-export', ('logits',), True)
    """
    path = Path(os.path.expanduser(path))
    format = _find_format(path, format)
    model = unwrap(model)
    fold = FORMATS[format].folds if fold is None else fold
    kind: Any = as_dtype(dtype)
    _check(model, path, format, kind, fold, normalization, dynamic_size, opset)
    _check_destination(path)
    reference = _reference(model)
    folded = isinstance(find_inner(model), FoldedConvMixer)
    size = _image_size(image_size, reference)
    compute_dtype = kind if FORMATS[format].computes else torch.float32
    if fold and not folded:
        computed = folding.fold(reference, normalization=normalization, dtype=compute_dtype)
    else:
        computed = copy_module(reference).to(compute_dtype)
    dimensions: Dimensions = {0: torch.export.Dim("batch")}
    if dynamic_size:
        dimensions |= dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    # Traced at a single patch, what is exported would be bound to it.
    traced = [max(side, 2 * find_inner(reference).patch_size) for side in size] if dynamic_size else size
    job = _Job(
        model=computed,
        dtype=kind,
        example=torch.zeros(2, find_inner(reference).in_chans, *traced, dtype=torch.float32),
        dimensions=dimensions,
        outputs=_output_names(reference),
        metadata=_metadata(reference, _preprocessing(computed if normalization else reference), size, folded or fold),
        opset=opset or OPSET,
    )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True) as folder:
        difference = _write(format, job, Path(folder) / path.name, reference, normalization)
        _move(Path(folder), path)
    return Exported(path, format, kind, folded or fold, difference, job.outputs)


def _find_format(path: Path, format: str | None) -> str:
    """Return a format that was given, or else the one of a path's ending."""
    if format is None:
        endings = {chosen.suffix: name for name, chosen in FORMATS.items()}
        if path.suffix not in endings:
            raise ArgumentError(f"cannot tell the format of {str(path)!r}: let it end in {', '.join(endings)}")
        return endings[path.suffix]
    if format not in FORMATS:
        raise ArgumentError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    return format


def _check_destination(path: Path) -> None:
    """Raise a WriteError where the file cannot be written; a folder is only replaced by another Core ML model."""
    replaced = path.suffix == ".mlpackage" and (path / "Manifest.json").is_file()
    check_writable(path.with_name(f"{path.name}.new") if replaced else path)
    if path.suffix == ".xml":
        check_writable(path.with_suffix(".bin"))


def _reference(model: nn.Module) -> Any:
    """Return a copy of a model in float32 on the CPU, in evaluation mode."""
    reference: Any = copy_module(model)
    reference.to("cpu", torch.float32, memory_format=torch.contiguous_format).eval()
    find_inner(reference).channels_last = False
    return reference


def _preprocessing(model: nn.Module) -> Mapping[str, Any]:
    """Return a model's preprocessing; nothing where it does not say."""
    inner = find_inner(model)
    return preprocessing(inner) if getattr(inner, "pretrained_cfg", None) else {}


def _write(format: str, job: _Job, file: Path, reference: nn.Module, normalization: bool) -> float:
    """Write a file, and return how far its outputs are from the reference's; NaN where this system cannot run it."""
    try:
        with tracing(), quietly():  # exporters and what they import warn
            compute = FORMATS[format].write(job, file)
            if compute is None:
                return math.nan
            difference = _difference(compute, reference, job, normalization)
    except ConvMixerError:
        raise
    except Exception as error:  # each exporter and runtime has its own
        reason = first_line(error)
        raise ExportError(f"the export to {format} failed: {type(error).__name__}: {reason}") from error
    if not difference <= TOLERANCE[job.dtype]:
        raise ExportError(
            f"{file.name} differs from the model by {difference:.2g} of the largest output, where {job.dtype} allows "
            f"{TOLERANCE[job.dtype]:g}: nothing was written"
            + ("" if job.dtype == torch.float32 else ". Export it as float32")
        )
    return difference


def _check(
    model: nn.Module,
    path: Path,
    format: str,
    dtype: torch.dtype,
    fold: bool,
    normalization: bool,
    dynamic_size: bool,
    opset: int | None,
) -> None:
    """Raise an ArgumentError for arguments that contradict each other."""
    chosen = FORMATS[format]
    if path.suffix != chosen.suffix:
        raise ArgumentError(f"{str(path)!r}: a file of the format {format} ends in {chosen.suffix}")
    if dtype not in chosen.dtypes:
        valid = ", ".join(str(valid) for valid in chosen.dtypes)
        raise ArgumentError(f"dtype={dtype!r}; valid for {format}: {valid}")
    if not isinstance(find_inner(model), ConvMixer | FoldedConvMixer):
        raise ArgumentError(f"cannot export {describe(model)}, which is not a convmixer.ConvMixer: {ADVICE}")
    if opset is not None and (format != "onnx" or type(opset) is not int or opset < OPSET):
        raise ArgumentError(f"opset={opset!r}: it is for the format onnx, a whole number of at least {OPSET}")
    if dynamic_size and chosen.bounded:
        raise ArgumentError(f"dynamic_size: {format} plans memory ahead: leave it out, and give image_size")
    folded = isinstance(find_inner(model), FoldedConvMixer)
    if not chosen.folds and (fold or folded or normalization):
        raise ArgumentError(f"a {format} file holds a model's own weights: export the model without folding")
    if format == "safetensors":
        _check_weights_file(model)
    if normalization and (folded or not fold):
        raise ArgumentError("normalization is part of folding: give the model itself, with fold=True")


def _check_weights_file(model: nn.Module) -> None:
    """Raise an ArgumentError where opening a file of the weights alone would build a model that computes otherwise."""
    inner = find_inner(model)
    shape = shape_of(inner)
    variant = matching_variant({name: int(shape[name]) for name in SHAPE})
    built = {"act_layer": variant.act_layer if variant else "gelu"}
    found: dict[str, Any] = {"act_layer": shape["act_layer"]}
    if inner is model and count_outputs(model):
        built["global_pool"], found["global_pool"] = "avg", find_inner(model).global_pool.pool_type
    for name, value in found.items():
        if value != built[name]:
            raise ArgumentError(
                f"a safetensors file has no place for {name}={value!r}, and who opens it would build {built[name]!r}: "
                "write a folder with convmixer.save_pretrained, or --format hub"
            )


def _move(folder: Path, path: Path) -> None:
    """Move the files written in a folder to a path and next to it."""
    first, *others = sorted(folder.iterdir())  # .bin before .xml
    old = folder / "old"
    if path.exists() and (others or first.is_dir()):
        path.rename(old)  # an old graph must not meet new weights
    try:
        _put(first, path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    for file in others:
        try:
            _put(file, path)
        except WriteError as error:
            why = f"{first.name!r} is new, and {path.name!r} is gone"
            raise WriteError(f"{error.__cause__}: {why}. Export again") from error


def _put(file: Path, path: Path) -> None:
    """Move a file to the folder of a path, or a folder to the path."""
    if file.is_dir():
        file.rename(path)
    else:
        write_atomically(path.parent / file.name, file.replace)


def _output_names(model: Any) -> tuple[str, ...]:
    if isinstance(model, FeatureGetterNet):
        return tuple(f"features_{name.rpartition('.')[2]}" for name in model.feature_info.module_name())
    return ("logits",) if count_outputs(model) else ("features",)


def _image_size(image_size: int | Sequence[int] | None, model: nn.Module) -> tuple[int, int]:
    """Return height and width, as given or as the model's."""
    if image_size is None:
        config = _preprocessing(model)
        if not config:
            raise ArgumentError("this model says nothing about its preprocessing: give image_size=(height, width)")
        height, width = config["input_size"][1:]
        return height, width
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    patch_size = find_inner(model).patch_size
    if len(sides) != 2 or not all(type(side) is int and side >= patch_size for side in sides):
        raise ArgumentError(
            f"image_size={image_size!r}: give one or two whole numbers of at least a patch, {patch_size} pixels"
        )
    return sides


def _metadata(model: nn.Module, config: Mapping[str, Any], size: Sequence[int], folded: bool) -> dict[str, str]:
    """Return what a user of the file must know; lists and numbers as JSON."""
    inner = find_inner(model)
    classes = count_outputs(inner) if inner is model else 0  # a feature extractor has none
    facts: dict[str, Any] = {"num_classes": classes, "batch_norm": "folded" if folded else "as in the model"}
    facts |= {key: config[key] for key in ("architecture", "license", *PREPROCESSING) if config.get(key) is not None}
    facts["input_size"] = (inner.in_chans, *size)
    labels = known_labels(inner) if classes else None
    if labels:
        facts["label_names"] = labels
    if classes == 1:
        facts["probability"] = "the sigmoid of the logit is the probability of the last of label_names"
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


@torch.inference_mode()
def _difference(compute: Compute, model: Any, job: _Job, normalization: bool) -> float:
    """Return the largest difference of outputs for smooth random images, relative to the largest output."""
    height, width = job.example.shape[2:]
    dynamic_size = 2 in job.dimensions
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    inner, config = find_inner(model), _preprocessing(model)
    for count, extra in ((1, 0), (3, inner.patch_size if dynamic_size else 0)):
        noise = torch.rand(count, inner.in_chans, 4, 4, generator=generator, dtype=torch.float32)
        images = F.interpolate(noise, (height + extra, width + 2 * extra), mode="bilinear")
        normalized = images
        if config:
            mean, std = (images.new_tensor(config[name])[:, None, None] for name in ("mean", "std"))
            normalized = (images - mean) / std
        answers = compute(images if normalization else normalized)
        for found, expected in zip(answers, as_list(model(normalized)), strict=True):
            if found.shape != expected.shape:
                shapes = f"{tuple(found.shape)} where the model returns {tuple(expected.shape)}"
                raise ExportError(f"the file returns {shapes}")
            difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
            if not difference.isfinite():
                return float("inf")
            largest = max(largest, float(difference))
    return largest
