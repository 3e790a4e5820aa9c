"""`optimize`: the folded model, in the runtime, precision and pieces that suit the machine.

A runtime is a callable from images (B, C, H, W) to a list of outputs. It cuts a batch into pieces, for one reason: what
a block reads and writes should stay in the cache of the core that computes it. Graphs are compiled for one shape each,
when that shape comes first, and kept; all runtimes may be called from several threads. Copied, pickled or sent to
another process, a runtime is made anew from what it was made of.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import logging
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from convmixer.errors import ArgumentError, ConvMixerError, DependencyError, first_line, missing, optional
from convmixer.hardware import bf16_is_faster, has_int8_tiles, has_tiles, l2_cache
from convmixer.inference import preparation
from convmixer.model import DepthwiseConv2d, as_dtype, check_dtype, check_input
from convmixer.native import library as native
from convmixer.native.compiled_code import settle
from convmixer.ops import prefers_channels_last
from convmixer.ops.dispatch import DTYPES, KERNEL_SIZES, unsupported
from convmixer.ops.fused import ACTIVATIONS
from convmixer.runtime import openvino_core
from convmixer.runtime.cuda_graphs import Replayed
from convmixer.runtime.folding import FoldedConvMixer, find_convmixer, fold
from convmixer.tracing import computing, quietly, tracing
from convmixer.wrappers import find_inner, unwrap

BACKENDS = ("auto", "eager", "compile", "openvino", "onnxruntime", "native", "triton")
GRAPHS_KEPT = 32  # compiled graphs per model, one for each shape; the one unused for longest goes first
GRAPH_BYTES = 2**25  # of a feature map, above which launches on a GPU cost little and memory much
CALIBRATION_IMAGES = 512
NATIVE_DIM = 512  # above it OpenVINO is faster where there is no AMX: measured with 256 and 768 channels
MOST_LOST = 0.25  # of the outputs' size, by int8; what loses more classifies otherwise
_NEEDS = {  # modules of each runtime, and the extra that brings them
    "openvino": (("openvino",), "export"),
    "onnxruntime": (("onnxruntime", "onnxscript"), "export"),
    "int8": (("nncf",), "int8"),
}
# What OpenVINO calls the types.
_CAPABILITIES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16", torch.int8: "INT8"}
_CPU = torch.device("cpu")
_LEFT_BEHIND: list[Any] = []  # of the parent's, in a child by fork
_FORKED = threading.Lock()

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What `optimize` chose, and why.

    Attributes:
        backend: One of `BACKENDS`, but not "auto".
        dtype: Type that it computes in, such as "bfloat16".
        device: Where.
        layout: "channels_last" or "contiguous" activations; "own" where the runtime decides.
        threads: Threads that compute one call; 0 on a GPU.
        pieces: Into what batches are cut.
        reason: Why, in words.
    """

    backend: str
    dtype: str
    device: str
    layout: str
    threads: int
    pieces: str
    reason: str

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        where = f"{self.dtype} on {self.device}, {self.layout} layout{threads}, {self.pieces}"
        return f"{self.backend}, {where}: {self.reason}"


# ---- what there is --------------------------------------------------------------------------------------------------


def _missing(backend: str, device: torch.device = _CPU, dtype: torch.dtype | None = None) -> str | None:
    """What the backend lacks here, and how to get it; None if nothing."""
    if backend == "openvino" and dtype == torch.int8 and (lacking := _missing("int8")):
        return lacking
    modules, extra = _NEEDS.get(backend, ((), ""))
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        return missing(backend, absent, extra)
    if backend == "compile" and (lacking := native.inductor_lacks(device)):
        return f"compile {lacking}"
    if device.type == "cpu" and backend == "native" and native.compiler() is None:
        return "native needs a C++ compiler on a CPU, and there is none: install g++ or clang++, or name one in CXX"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton needs triton on a GPU, which is missing: pip install triton"
    return None


def _require(backend: str, device: torch.device = _CPU, dtype: torch.dtype | None = None) -> None:
    if lacking := _missing(backend, device, dtype):
        raise DependencyError(lacking)


def available_backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The backends that can compute in `dtype` on `device` with what is installed, the usually fastest first."""
    device = torch.device(device)
    ordered = ["triton", "compile", "eager"]  # as measured in bfloat16 on an H200: benchmarks/gpu.py
    if dtype == torch.float32:  # in which products by triton take three of TF32
        ordered = ["compile", "triton", "eager"]
    if device.type == "cpu":
        ordered = ["native", "openvino", "compile", "eager"]
        if dtype == torch.float32:
            ordered = ["native", "openvino", "onnxruntime", "compile", "eager"]
    elif device.type != "cuda":
        ordered = ["eager"]
    return tuple(b for b in ordered if not _unsupported(b, device, dtype) and not _missing(b, device, dtype))


def _unsupported(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend does not compute in this type on this device, by its nature; None if it does."""
    if backend in ("openvino", "onnxruntime", "native") and device.type != "cpu":
        return f"backend={backend!r} computes on the CPU, this model is on {device}: call model.cpu() first"
    if backend == "onnxruntime" and dtype != torch.float32:
        return f"dtype={dtype}: onnxruntime computes convolutions on a CPU in float32 alone; use openvino or compile"
    if backend == "openvino" and dtype not in _CAPABILITIES:
        return f"dtype={dtype}: openvino computes in float32, bfloat16, float16 or int8"
    if backend == "openvino" and not _missing(backend) and _CAPABILITIES[dtype] not in _openvino_types():
        return f"dtype={dtype}: openvino finds no products of that type in this CPU; use torch.float32"
    if backend == "native" and not torch.cpu._is_avx512_supported():
        return "backend='native' needs a CPU with AVX-512; choose another one, such as openvino"
    if backend == "native" and dtype == torch.int8 and not has_int8_tiles():
        return f"dtype={dtype}: native computes in int8 on CPUs with AMX and AVX512-VBMI; use openvino"
    if backend == "native" and dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"dtype={dtype}: native computes in float32, bfloat16 or int8"
    if backend == "triton" and device.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
        return f"backend='triton' computes on CUDA devices, this model is on {device}: call model.cuda() first"
    if backend == "triton" and device.type == "cuda" and torch.cuda.is_available() and (lacking := unsupported(device)):
        return f"backend='triton': {lacking}; use compile"
    if backend == "triton" and dtype not in DTYPES:
        return f"dtype={dtype}: triton computes in bfloat16, float16 or float32"
    if backend in ("eager", "compile") and dtype == torch.int8:
        return f"dtype={dtype}: give a floating point type such as torch.bfloat16, or backend='auto' with it"
    return None


@functools.lru_cache(maxsize=1)
def _openvino_types() -> tuple[str, ...]:
    return tuple(openvino_core.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _power_of_two(number: int) -> int:
    """The largest one that is not above the number."""
    return 1 << (max(number, 1).bit_length() - 1)


def pieces(batch: int, chunk: int, threads: int) -> list[int]:
    """Sizes into which a batch is cut: at most `chunk`, enough for all threads, few different ones.

    What is left after the pieces of the largest size comes in powers of two, so that few graphs serve all batches.
    """
    share = -(-batch // threads)
    most = chunk if chunk <= share else _power_of_two(share)
    sizes = [most] * (batch // most)
    rest = batch % most
    while rest:
        sizes.append(_power_of_two(rest))
        rest -= sizes[-1]
    return sizes


def fitting_chunk(dim: int, positions: int, itemsize: int) -> int:
    """Images whose activations (dim, positions) fill a core's second-level cache: a power of two."""
    return _power_of_two(l2_cache() // (dim * positions * itemsize))


Turn = Callable[[], contextlib.AbstractContextManager[Any]]


class _Graphs:
    """Compiled graphs by key, made once each whichever thread asks first; the one unused for longest is dropped.

    Args:
        make: From key to graph.
        turn: What a thread holds while it makes one; None: a lock of this object's own.
    """

    def __init__(self, make: Callable[..., Any], turn: Turn | None = None) -> None:
        making = threading.Lock()
        self._make, self._turn = make, turn or (lambda: making)
        self._kept, self._lock = OrderedDict[Any, Any](), threading.Lock()

    def __call__(self, *key: Any) -> Any:
        graph = self._find(key)
        if graph is None:
            with self._turn():
                graph = self._find(key)
                if graph is None:
                    graph = self._make(*key)
                    with self._lock:
                        self._kept[key] = graph
                        if len(self._kept) > GRAPHS_KEPT:
                            self._kept.popitem(last=False)
        return graph

    def _find(self, key: Any) -> Any:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]


def _join(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The outputs of several pieces, as those of one batch."""
    return list(parts[0]) if len(parts) == 1 else [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


# ---- runtimes -------------------------------------------------------------------------------------------------------

Rule = Callable[[int, int], int]  # height and width of images -> chunk


@dataclass(frozen=True)
class _Fixed:
    """The rule of one chunk for all sizes."""

    chunk: int

    def __call__(self, height: int, width: int) -> int:
        return self.chunk


@dataclass(frozen=True)
class _Fitting:
    """The rule of `fitting_chunk`."""

    dim: int
    patch_size: int
    itemsize: int

    def __call__(self, height: int, width: int) -> int:
        positions = (height // self.patch_size) * (width // self.patch_size)
        return fitting_chunk(self.dim, positions, self.itemsize)


@dataclass(frozen=True)
class _Together:
    """The rule of pieces that PyTorch's threads share: as many times as large as there are threads."""

    rule: Rule

    def __call__(self, height: int, width: int) -> int:
        return self.rule(height, width) * torch.get_num_threads()


@dataclass(frozen=True)
class _Small:
    """Whether a feature map of images has at most so many bytes."""

    dim: int
    patch_size: int
    most: int

    def __call__(self, x: Tensor) -> bool:
        batch, _, height, width = x.shape
        positions = (height // self.patch_size) * (width // self.patch_size)
        return batch * self.dim * positions * x.element_size() <= self.most


def _dynamic(module: nn.Module) -> tuple[dict[str, Any], Tensor]:
    """Arguments for torch.export with batch and image size left open, and an example.

    The example is larger than any kernel, and odd in its sizes, so that no dimension is taken for a constant.
    """
    stem = find_inner(module).stem[0]
    patch = stem.kernel_size[0]
    example = torch.zeros(2, stem.in_channels, 13 * patch, 11 * patch, dtype=stem.weight.dtype)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return {"dynamic_shapes": (dynamic,)}, example


def to_openvino(module: nn.Module) -> Any:
    """An `openvino.Model` of a ConvMixer in float32 on the CPU; batch, height and width are open."""
    _require("openvino")
    import openvino

    options, example = _dynamic(module)
    private = copy.deepcopy(module)  # OpenVINO reads the weights where they lie, and PyTorch may move a module's own
    with tracing(), quietly(), torch.no_grad():  # the exporters' own dependencies warn
        return openvino.convert_model(torch.export.export(private, (example,), **options))


def to_onnx(module: nn.Module) -> bytes:
    """An ONNX file of a ConvMixer in float32 on the CPU; batch, height and width are open."""
    _require("onnxruntime")
    options, example = _dynamic(module)
    with tracing(), quietly(), torch.no_grad():
        program: Any = torch.onnx.export(module, (example,), dynamo=True, verbose=False, **options)
    data: bytes = program.model_proto.SerializeToString()
    return data


class Whole:
    """A module as it is, a piece at a time. PyTorch's own threads share each piece.

    Args:
        module: In evaluation mode.
        rule: Images in a piece; None: all.
    """

    def __init__(self, module: nn.Module, rule: Rule | None = None) -> None:
        self.module, self.rule = module, rule

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self.rule)

    def after_fork(self) -> None:
        """In a child by fork, nothing of this package's own is missing."""

    def _run(self, x: Tensor) -> list[Tensor]:
        return as_list(self.module(x))

    def __call__(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            chunk = len(x) if self.rule is None else self.rule(*x.shape[2:])
            return _join([self._run(part) for part in x.split(chunk)])


def _inductor_folder() -> str:
    from torch._inductor.runtime.runtime_utils import default_cache_dir

    return default_cache_dir()


class Compiled(Whole):
    """A module compiled by TorchInductor, with its weights frozen into the graph, for each shape of a piece.

    It is compiled from an exported graph: no guards are checked at each call, and no limit of recompilations is shared
    with other models.
    """

    def __init__(self, module: nn.Module, rule: Rule | None = None) -> None:
        super().__init__(module, rule)
        for layer in module.modules():
            if isinstance(layer, DepthwiseConv2d):
                layer.exports_kernels = True  # TorchInductor takes the kernels whole
        settle("TORCHINDUCTOR_CACHE_DIR", _inductor_folder, "graphs of TorchInductor")
        self._graph = _Graphs(self._compile, tracing)

    def after_fork(self) -> None:
        """Compile anew, for the number of threads that the child has; OpenMP's own are gone."""
        self._graph = _Graphs(self._compile, tracing)

    def _compile(self, *key: Any) -> Callable[[Tensor], Any]:
        from torch import _inductor
        from torch._inductor import config

        shape, stride, dtype, device = key
        example = torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
        kernel_size = max(
            m.kernel_size[0] for m in self.module.modules() if isinstance(m, nn.Conv2d) and m.stride[0] == 1
        )
        # Inductor moves depthwise convolutions to channels_last, which is slow with 9x9 kernels on GPUs.
        moves = device.type != "cuda" or prefers_channels_last(device, dtype, kernel_size)
        with quietly(), torch.no_grad(), config.patch(freezing=True, layout_optimization=moves):
            program = torch.export.export(self.module, (example,)).module()
            try:
                compiled: Any = _inductor.compile(program, [example])
            except Exception as error:  # of the compiler at hand
                reason = first_line(error)
                raise DependencyError(
                    f"TorchInductor cannot compile here ({type(error).__name__}: {reason}): choose another backend"
                ) from error
        return compiled  # type: ignore[no-any-return]

    def _run(self, x: Tensor) -> list[Tensor]:
        if x.is_inference():
            with torch.inference_mode(False):
                x = x.clone()  # graphs are for ordinary tensors
        return as_list(self._graph(tuple(x.shape), x.stride(), x.dtype, x.device)(x))


class Triton(Whole):
    """A folded model whose blocks are two kernels each, of `convmixer.ops.triton`, on a CUDA device.

    What is left of a block's BatchNorm in front of it is added at the end of the block before.
    """

    def __init__(self, module: Any, rule: Rule | None = None) -> None:
        super().__init__(module, rule)
        home = os.environ.get("TRITON_HOME")
        settle("TRITON_CACHE_DIR", lambda: str(Path(home or Path.home(), ".triton", "cache")), "Triton's kernels")
        from convmixer.ops.triton import launch  # imports triton

        self._depthwise, self._pointwise = launch.depthwise_infer, launch.pointwise_infer
        self._blocks: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
        blocks = list(module.blocks)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            # Channels side by side, as the kernel reads them: it then copies nothing.
            weight = block.depthwise.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
            norm = [None, None] if following is None else [following.norm.scale, following.norm.shift]
            vectors = (block.depthwise.bias, block.gain, block.pointwise.bias, *norm)
            first, gain, second, scale, shift = (v if v is None else v.flatten().float() for v in vectors)
            self._blocks.append(
                (
                    (weight, first, ACTIVATIONS[type(block.act)], gain),
                    (block.pointwise.weight.flatten(1), second, ACTIVATIONS[type(block.last_act)], scale, shift),
                )
            )

    def _run(self, x: Tensor) -> list[Tensor]:
        folded: Any = self.module
        x = folded.stem(x).contiguous(memory_format=torch.channels_last)
        x = folded.blocks[0].norm(x)
        for (weight, bias, act, gain), product in self._blocks:
            x = self._depthwise(x, weight, bias, act, gain, None, x)
            x = self._pointwise(x, *product)
        if folded.global_pool.pool_type in ("avg", "fastavg"):
            x = x.mean((2, 3), keepdim=True)  # a mean commutes with the last BatchNorm
        return [folded.forward_head(folded.norms[-1](x))]


class OpenVINO:
    """An OpenVINO model on the CPU, one stream for each thread; a batch below that many images uses one stream of all.

    Args:
        model: From `to_openvino`, or quantised.
        precision: What it computes in, beside what is quantised.
        threads: Number of them.
        rule: Images in a piece; None: whole batches in one stream of all threads.
    """

    def __init__(self, model: Any, precision: torch.dtype, threads: int, rule: Rule | None) -> None:
        self._ov, self.model = optional("openvino", "openvino", "export"), model
        self.precision, self.threads, self.rule = precision, threads, rule
        hints = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
        self._options = {"INFERENCE_PRECISION_HINT": hints[precision], "INFERENCE_NUM_THREADS": threads}
        self._graph = _Graphs(self._compile)

    def after_fork(self) -> None:
        """OpenVINO's threads are gone: without them nothing can be compiled, nor what was compiled be released."""
        if self._graph not in _LEFT_BEHIND:
            _LEFT_BEHIND.append(self._graph)
        openvino_core.refuse_forked()

    def __reduce__(self) -> tuple[Any, ...]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.xml"
            self._ov.save_model(self.model, file, compress_to_fp16=False)
            graph, weights = file.read_bytes(), file.with_suffix(".bin").read_bytes()
        return _read_openvino, (graph, weights, self.precision, self.threads, self.rule)

    def _compile(self, streams: int, *shape: int) -> tuple[Any, queue.SimpleQueue[Any]]:
        fixed = self.model.clone()
        fixed.reshape(list(shape))
        compiled = openvino_core.core().compile_model(fixed, "CPU", {**self._options, "NUM_STREAMS": streams})
        return compiled, queue.SimpleQueue()

    def __call__(self, x: Tensor) -> list[Tensor]:
        batch, *rest = x.shape
        alone = self.rule is None or batch < self.threads
        sizes = [batch] if self.rule is None or alone else pieces(batch, self.rule(*rest[1:]), self.threads)
        running: list[tuple[Any, Any, Any]] = []
        try:
            for part in x.detach().float().contiguous().split(sizes):
                graph, idle = self._graph(1 if alone else self.threads, len(part), *rest)
                try:
                    request = idle.get_nowait()
                except queue.Empty:
                    request = graph.create_infer_request()
                array = part.numpy()  # kept until the request is done, which reads it in place
                request.set_input_tensor(self._ov.Tensor(array, shared_memory=True))
                request.start_async()
                running.append((request, idle, array))
        finally:
            for request, _, _ in running:
                request.wait()
        parts = []
        for request, idle, _ in running:
            parts.append([torch.from_numpy(output.data.copy()) for output in request.output_tensors])
            idle.put(request)
        return _join(parts)


def _read_openvino(graph: bytes, weights: bytes, *settings: Any) -> OpenVINO:
    return OpenVINO(openvino_core.core().read_model(graph, weights), *settings)


class OnnxRuntime:
    """An ONNX file in ONNX Runtime on the CPU, in float32: one thread to a piece, or all where images are few."""

    def __init__(self, data: bytes, threads: int, rule: Rule | None) -> None:
        self._library = optional("onnxruntime", "onnxruntime", "export")
        self._data, self.threads, self.rule = data, threads, rule
        self._start()

    def _start(self) -> None:
        self._session = _Graphs(self._load)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="convmixer")

    def after_fork(self) -> None:
        """Start threads anew; sessions whose threads are gone cannot even be released."""
        _LEFT_BEHIND.append((self._session, self._pool))
        self._start()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._data, self.threads, self.rule)

    def _load(self, threads: int) -> Any:
        options = self._library.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return self._library.InferenceSession(self._data, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> list[Tensor]:
        x = x.detach().float().contiguous()
        alone = self.rule is None or self.threads == 1 or len(x) < self.threads
        chunk = len(x) if self.rule is None else self.rule(*x.shape[2:])
        session = self._session(self.threads if alone else 1)
        name = session.get_inputs()[0].name

        def run(part: Tensor) -> list[Tensor]:
            return [torch.from_numpy(array) for array in session.run(None, {name: part.numpy()})]

        if alone:
            return _join([run(part) for part in x.split(chunk)])
        return _join(list(self._pool.map(run, x.split(pieces(len(x), chunk, self.threads)))))


# ---- the optimized model --------------------------------------------------------------------------------------------


class OptimizedConvMixer(nn.Module):
    """What `optimize` returns for a runtime: called with images it answers as the original does, and faster.

    Images may be of any floating point type, and the outputs come in that type. It may be called from several threads,
    copied, pickled, and sent to other processes, which make the runtime anew; a child by fork computes natively in one
    thread. Outputs carry no gradient. `num_classes`, `in_chans`, `num_features`, `head_hidden_size`, `feature_info` and
    `pretrained_cfg` are the original's.

    Attributes:
        choice: What was chosen, and why.
        folded: The `FoldedConvMixer`, or timm's extractor around one, in PyTorch: for export, `forward_features` and
            whatever else the runtime does not do.

    Raises:
        ArgumentError: From `train()`, `to()` another device or type, `load_state_dict()`, or for images on another
            device or of whole numbers.
        ImageError: Images that do not fit the model.
        DependencyError: From unpickling, where the runtime is not installed or the processor cannot compute it.
        ConvMixerError: On a GPU or with OpenVINO, in a child by fork.
    """

    def __init__(self, folded: nn.Module, runtime: Callable[[Tensor], list[Tensor]], choice: Choice) -> None:
        super().__init__()
        self.folded, self.choice = folded, choice
        self.runtime: Any = runtime
        inner: Any = find_inner(folded)
        self.num_classes, self.in_chans, self.num_features = inner.num_classes, inner.in_chans, inner.num_features
        self.head_hidden_size, self.patch_size = inner.head_hidden_size, inner.patch_size
        self.feature_info: Any = folded.feature_info
        self.pretrained_cfg: dict[str, Any] = inner.pretrained_cfg
        self._several = folded is not inner
        self._process = os.getpid()
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._process != os.getpid():
            self._after_fork()
        with computing():
            return super().__call__(*args, **kwargs)

    def _after_fork(self) -> None:
        if self.choice.device.startswith("cuda"):
            raise ConvMixerError(
                "a model on a GPU cannot be used in a process that was forked: start it by spawn, as in "
                "DataLoader(multiprocessing_context='spawn')"
            )
        with _FORKED:
            if self._process != os.getpid():
                self.runtime.after_fork()
                self._process = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._process = os.getpid()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedConvMixer:
        own = next(self.folded.parameters())
        new = fn(own.detach()[:1])
        if (new.dtype, new.device) != (own.dtype, own.device):
            raise ArgumentError(
                f"an optimized model stays what it is, {self.choice.dtype} on {self.choice.device}: move or cast the "
                "original, then optimize it again"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Weights are part of what was compiled; this is an error."""
        raise ArgumentError("an optimized model keeps its weights: load others into the original, then optimize it")

    def forward(self, x: Tensor) -> Any:
        """(B, in_chans, H, W) -> logits (B, num_classes); of a feature extractor a list of feature maps."""
        check_input(x, self.in_chans, self.patch_size)
        own = next(self.folded.parameters())
        if x.device != own.device or not x.is_floating_point():
            raise ArgumentError(
                f"images of {x.dtype} on {x.device}: this model takes floating point images on {own.device}"
            )
        inputs = x.to(own.dtype)
        outputs = self.runtime(inputs) if len(x) else as_list(self.folded(inputs))
        outputs = [output.to(x.dtype) for output in outputs]
        return outputs if self._several else outputs[0]

    def train(self, mode: bool = True) -> OptimizedConvMixer:
        """Evaluation mode is the only one; `train()` is an error."""
        if mode:
            raise ArgumentError("an optimized model cannot be trained: train the original, then optimize it again")
        return super().train(False)

    def extra_repr(self) -> str:
        return str(self.choice)


def optimize(
    model: nn.Module,
    *,
    normalization: bool = False,
    dtype: torch.dtype | str | None = None,
    backend: str = "eager",
    chunk: int | None = None,
    threads: int | None = None,
    calibration: Tensor | str | Path | None = None,
    example: Tensor | None = None,
    graphs: bool | Literal["auto"] = "auto",
) -> Any:
    """A copy of a ConvMixer for inference with equal outputs and without BatchNorm. The original stays as it is.

    The weights are folded in float64 and rounded once, so in the same type the copy differs from the original in
    evaluation mode by rounding alone, at every image size.

    With `backend="eager"` the copy is a plain PyTorch module, which `torch.export`, `torch.compile` and the ONNX
    exporter take. The other backends run it in a compiled form; what they chose is in the attribute `choice` and in the
    log of `convmixer.runtime.backends`.

    Args:
        model: A `ConvMixer`, whole or truncated, or what `create_model(features_only=True)` returns; also inside
            `torch.compile`, DataParallel, DistributedDataParallel, or an average of weights.
        normalization: Fold mean and std of the model's `pretrained_cfg` into the first convolution, too: the copy takes
            images with values in [0, 1], and its `pretrained_cfg` says mean 0 and std 1, as `predict` and
            `create_transform` need it.
        dtype: Type to compute in, such as `torch.bfloat16` or "bfloat16"; None keeps the model's. "auto" takes
            bfloat16 where the hardware has products for it, else float32. `torch.int8` quantises the convolutions and
            computes the rest in the type of "auto"; it needs `calibration` and `backend` "native", "openvino" or
            "auto".
        backend: "eager"; "compile" (TorchInductor); on CPUs "openvino", "onnxruntime" and "native" (own kernels, for
            x86 with AVX-512); on CUDA devices "triton" (own kernels); or "auto": by rule the usually fastest of those
            that work here, or by measurement if there is an `example`.
        chunk: Most images to compute at a time by one thread ("compile" on a CPU: times its threads); larger batches
            are cut up. None: on CPUs as many as fill a core's second-level cache. "native" takes single images.
        threads: Of "openvino", "onnxruntime" and "native"; None: as many as PyTorch uses.
        calibration: For int8: images as the model takes them (N, C, H, W), or a folder, a tar or a name such as
            `torch/cifar10`, of which at most 512 training images are taken. Never give test images.
        example: Images (B, C, H, W) as the model will get them: backends and chunks that come into question are timed
            with it, and the fastest is taken. It takes seconds, with "compile" among them minutes.
        graphs: On a CUDA device, replay calls as CUDA graphs, one for each shape that comes a second time: for few or
            small images, whose kernels take the GPU less time than launching them takes the host. At most eight graphs
            are kept. "auto" does so for every backend but "eager", where feature maps are at most 32 MiB; True for
            feature maps of any size, at the cost of their memory.

    Returns:
        A `FoldedConvMixer` with "eager" (for a feature extractor timm's `FeatureGetterNet` around one), otherwise an
        `OptimizedConvMixer`.

    Raises:
        ArgumentError: Another kind of module; a type or a device that the backend cannot compute; `normalization` for a
            model that says nothing about its preprocessing; arguments that do not go together.
        DependencyError: A backend that is not installed; the message says how to get it.
    """
    if backend not in BACKENDS:
        raise ArgumentError(f"unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")
    for name, value in {"chunk": chunk, "threads": threads}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ArgumentError(f"{name}={value!r}: give a whole number of at least 1, or None")
    model = unwrap(model)
    weight: Any = find_convmixer(model).stem[0].weight
    dtype = as_dtype(dtype)
    if dtype == "auto":
        kind = torch.bfloat16 if bf16_is_faster(weight.device) else torch.float32
    elif dtype is None:
        kind = weight.dtype
    elif isinstance(dtype, torch.dtype):
        kind = dtype
    else:
        raise ArgumentError(f"dtype={dtype!r}: give a floating point type such as 'bfloat16', 'int8', or 'auto'")
    candidates, reason = _candidates(backend, model, weight.device, kind)
    if kind != torch.int8:
        check_dtype(kind)
    if (kind == torch.int8) != (calibration is not None):
        what = "dtype=torch.int8 needs images" if calibration is None else "calibration is for dtype=torch.int8 alone"
        raise ArgumentError(f"{what}: give both, calibration being training images or a folder of them")
    if not (isinstance(graphs, bool) or graphs == "auto"):
        raise ArgumentError(f"graphs={graphs!r}; valid: True, False, 'auto'")
    if graphs is True and (weight.device.type != "cuda" or backend == "eager"):
        raise ArgumentError(
            f"graphs=True is for CUDA devices and backends other than 'eager', not for {backend!r} on {weight.device}: "
            "leave it out"
        )
    if backend == "eager":
        if chunk is not None or threads is not None or example is not None:
            raise ArgumentError("chunk, threads and example need a backend other than 'eager', such as 'auto'")
        return fold(model, normalization, kind)
    if backend == "native" and chunk is not None:
        raise ArgumentError(f"chunk={chunk}: native computes single images; leave it out")
    maker = _Maker(model, normalization, kind, threads or torch.get_num_threads(), calibration, graphs)
    optimized = maker.first(candidates, chunk, reason) if example is None else maker.best(candidates, chunk, example)
    _LOGGER.info("%s", optimized.choice)
    return optimized


def _candidates(
    backend: str, model: nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[str, ...], str]:
    """The backends that come into question, best first by rule, and why the first one is."""
    if backend != "auto":
        unsupported = _unsupported(backend, device, dtype) or _refusal(backend, model, dtype)
        if unsupported:
            raise ArgumentError(unsupported)
        _require(backend, device, dtype)
        return (backend,), "as asked"
    found = tuple(b for b in available_backends(device, dtype) if not _refusal(b, model, dtype))
    if not found:  # int8 alone, which openvino computes everywhere
        return _candidates("openvino", model, device, dtype)
    if "openvino" in found and find_convmixer(model).dim > NATIVE_DIM and not has_tiles():
        found = ("openvino", *(b for b in found if b != "openvino"))
    absent = [
        m
        for b in ("native", "openvino", "compile", "onnxruntime")
        if not _unsupported(b, device, dtype) and b not in found and (m := _missing(b, device, dtype))
    ]
    reason = f"by rule the fastest of {', '.join(found)} for {_name(dtype)} on {device.type}"
    return found, "; ".join([reason, *absent])


def _refusal(backend: str, model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why the backend does not take this model; None if it does."""
    if backend not in ("native", "triton"):
        return None
    if isinstance(model, FeatureGetterNet):
        other = "openvino" if backend == "native" else "compile"
        return f"{backend} returns the last output alone: use another backend for features_only, such as {other}"
    inner = find_convmixer(model)
    if backend == "native":
        return native.refusal(inner, dtype)
    block: Any = inner.blocks[0]
    depthwise, act, _ = block[0].fn
    if depthwise.kernel_size[0] not in KERNEL_SIZES:
        valid = f"{KERNEL_SIZES[0]} to {KERNEL_SIZES[-1]}"
        return f"triton computes kernels of {valid}, this model has {depthwise.kernel_size[0]}: use compile"
    if type(act) not in ACTIVATIONS or getattr(act, "approximate", "none") != "none":
        return f"triton computes {', '.join(ACTIVATIONS.values())}, this model has {act}: use compile"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Maker:
    """Makes optimized models of one model for several backends and chunks; what they can share is made once."""

    def __init__(
        self,
        model: nn.Module,
        normalization: bool,
        dtype: torch.dtype,
        threads: int,
        calibration: Tensor | str | Path | None,
        graphs: bool | Literal["auto"],
    ) -> None:
        self.graphs = graphs
        self.model, self.normalization, self.dtype, self.threads = model, normalization, dtype, threads
        inner: Any = find_convmixer(model)
        self.kernel_size: int = inner.blocks[0][0].fn[0].kernel_size[0]
        self.device: torch.device = inner.stem[0].weight.device
        self.calibration = calibration
        self.rest = dtype  # beside the quantised products
        if dtype == torch.int8:
            self.rest = torch.bfloat16 if bf16_is_faster(self.device) else torch.float32
        self.rule = _Fitting(inner.dim, inner.patch_size, self.rest.itemsize)
        self._sources: dict[str, tuple[nn.Module, Any]] = {}

    def first(self, backends: Sequence[str], chunk: int | None, reason: str) -> OptimizedConvMixer:
        """In the first backend that can be made; why others cannot is added to the reason."""
        for backend in backends[:-1]:
            try:
                if backend == "compile":  # otherwise its first call would tell, when nothing else can be taken
                    self.try_compiler()
                return self(backend, chunk, reason)
            except DependencyError as error:
                reason += f"; {error}"
                _LOGGER.warning("backend='auto' goes on without %s: %s", backend, error)
        return self(backends[-1], chunk, reason)

    def try_compiler(self) -> None:
        """Compile one small layer; a DependencyError if TorchInductor cannot."""
        layers = nn.Sequential(nn.Conv2d(1, 1, 1), nn.GELU()).to(self.device).eval()
        Compiled(layers)(torch.zeros(1, 1, 8, 8, device=self.device))

    def best(self, backends: Sequence[str], chunk: int | None, example: Tensor) -> OptimizedConvMixer:
        """In the backend and the pieces that are fastest for the example; why others cannot be made is said, too."""
        models, failures = [], ""
        for backend in backends:
            for size in (None,) if backend == "native" else (chunk,) if chunk else self.chunks(example):
                try:
                    made = self(backend, size, "")
                    made(example)  # what compiles does it now
                    models.append(made)
                except DependencyError as error:
                    if len(backends) == 1:
                        raise
                    failures += f"; {error}"
                    break
        return _fastest(models, example, failures)

    def chunks(self, example: Tensor) -> tuple[int, ...]:
        """Chunks worth a trial: around the rule's, and none."""
        if self.device.type != "cpu":
            return (len(example),)
        best = self.rule(*example.shape[2:])
        share = -(-len(example) // self.threads)
        return tuple(sorted({min(c, share) for c in (max(best // 2, 1), best, 2 * best, share)}))

    def _source(self, backend: str) -> tuple[nn.Module, Any]:
        """The folded module, and what the backend makes of it."""
        if backend not in self._sources:
            if backend in ("eager", "compile", "triton"):
                folded = fold(self.model, self.normalization, self.dtype)
                find_inner(folded).channels_last = prefers_channels_last(self.device, self.dtype, self.kernel_size)
                self._sources[backend] = folded, None
            else:
                # float16 ends early, which decides what may be folded
                limited = self.dtype == torch.float16
                precision = torch.float16 if limited else torch.float32
                folded = fold(self.model, self.normalization, precision, divide=self.dtype != torch.int8).float()
                make = self._int8 if self.dtype == torch.int8 else self._made
                self._sources[backend] = folded, make(backend, folded)
        return self._sources[backend]

    def _made(self, backend: str, folded: FoldedConvMixer) -> Any:
        if backend == "native":
            return native.Native(folded, self.dtype, self.threads)
        return to_openvino(folded) if backend == "openvino" else to_onnx(folded)

    def _int8(self, backend: str, folded: FoldedConvMixer) -> Any:
        images = calibration_images(self.calibration, folded)
        if backend == "native":
            with computing():
                ranges = native.calibrate(folded, images)
            runtime = native.NativeInt8(folded, ranges, self.threads)
            _check_int8(runtime, folded, images[:64].float())
            return runtime
        quantized = quantize(to_openvino(folded), images)
        _check_int8(OpenVINO(quantized, self.rest, self.threads, None), folded, images[:64].float())
        return quantized

    def __call__(self, backend: str, chunk: int | None, reason: str) -> OptimizedConvMixer:
        folded, source = self._source(backend)
        on_cpu = self.device.type == "cpu"
        rule: Rule | None = _Fixed(chunk) if chunk else self.rule if on_cpu else None
        runtime: Any
        if backend == "openvino":
            runtime = OpenVINO(source, self.rest, self.threads, rule)
        elif backend == "onnxruntime":
            runtime = OnnxRuntime(source, self.threads, rule)
        elif backend == "native":
            runtime = source
        else:
            together = _Together(rule) if rule and on_cpu else rule
            runtime = {"eager": Whole, "compile": Compiled, "triton": Triton}[backend](folded, together)
            if self.graphs and self.device.type == "cuda":
                inner = find_inner(folded)
                most = sys.maxsize if self.graphs is True else GRAPH_BYTES
                runtime = Replayed(runtime, _Small(inner.num_features, inner.patch_size, most))
        layout = "channels_last" if backend == "triton" else "own"
        if backend in ("eager", "compile"):
            layout = "channels_last" if find_inner(folded).channels_last else "contiguous"
        kind = f"int8 and {_name(self.rest)}" if self.dtype == torch.int8 else _name(self.dtype)
        fitting = f"pieces that fill {l2_cache() // 1024:,} KiB of cache" if on_cpu else "whole batches"
        times = torch.get_num_threads() if on_cpu and backend in ("eager", "compile") else 1  # of `_Together`
        cut = f"pieces of at most {chunk * times} images" if chunk else fitting
        if backend == "native":
            layout, cut = "contiguous" if source.planar else "channels_last", "single images"
        choice = Choice(
            backend=backend,
            dtype=kind,
            device=str(self.device),
            layout=layout,
            threads=self.threads if source is not None else torch.get_num_threads() if on_cpu else 0,
            pieces=cut,
            reason=reason,
        )
        return OptimizedConvMixer(folded, runtime, choice)


def _fastest(models: Sequence[OptimizedConvMixer], example: Tensor, failures: str) -> OptimizedConvMixer:
    """The one with the shortest median time for the example, of rounds in which they take turns."""
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(6):
        for model, times in zip(models, seconds, strict=True):
            begun = time.perf_counter()
            model(example)
            if example.is_cuda:
                torch.cuda.synchronize()
            if turn:  # after one to warm up
                times.append(time.perf_counter() - begun)
    medians = [statistics.median(times) for times in seconds]
    ranked = sorted(range(len(models)), key=medians.__getitem__)
    shown = ", ".join(
        f"{models[i].choice.backend} in {models[i].choice.pieces} {1000 * medians[i]:.2f} ms" for i in ranked
    )
    best = models[ranked[0]]
    best.choice = replace(best.choice, reason=f"fastest for {tuple(example.shape)}: {shown}{failures}")
    return best


# ---- int8 -----------------------------------------------------------------------------------------------------------


def quantize(model: Any, images: Tensor) -> Any:
    """An OpenVINO model with its convolutions in int8, by NNCF's post-training quantisation.

    Args:
        model: From `to_openvino`, of a model folded with `divide=False`.
        images: As the model takes them, (N, C, H, W).
    """
    _require("int8")
    import nncf

    data = nncf.Dataset([image[None].numpy() for image in images.detach().cpu().float()])
    preset = nncf.QuantizationPreset.MIXED  # activations after GELU are lopsided
    logger = logging.getLogger("nncf")  # writes to standard output, which may be somebody's JSON
    with quietly(), contextlib.redirect_stdout(io.StringIO()):  # progress bars
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            return openvino_core.aside(lambda: nncf.quantize(model, data, preset=preset, subset_size=len(images)))
        finally:
            logger.setLevel(level)


@torch.inference_mode()
def _check_int8(runtime: Callable[[Tensor], list[Tensor]], folded: nn.Module, images: Tensor) -> None:
    """Raise a ConvMixerError where eight bits do not hold what the model computes of calibration images."""
    with computing():
        pairs = list(zip(runtime(images), as_list(folded(images)), strict=True))
    for output, expected in pairs:
        lost = float((output.float() - expected).norm() / expected.norm())
        if not lost <= MOST_LOST:
            raise ConvMixerError(
                f"int8 changes the outputs for the calibration images by {lost:.0%} of their size, at most "
                f"{MOST_LOST:.0%} is accepted: these weights do not fit eight bits. Use dtype=torch.bfloat16"
            )


def calibration_images(
    source: Tensor | str | Path | None, model: nn.Module, *, report: Callable[[str], None] = _LOGGER.info
) -> Tensor:
    """At most `CALIBRATION_IMAGES` training images as the model takes them, (N, C, H, W).

    They need no labels. `report` takes a line about which were taken.
    """
    inner: Any = find_inner(model)
    if isinstance(source, Tensor):
        if not len(source):
            raise ArgumentError("calibration holds no images: give at least one, better some hundreds")
        check_input(source, inner.in_chans, inner.patch_size)
        return source[:CALIBRATION_IMAGES]
    from convmixer.data.readers import Split, open_split  # not needed for anything else here

    prepare = preparation(inner)
    opened = open_split(str(source), "train", labelled=False)
    report(f"calibration, {opened.taken}")
    if isinstance(opened, Split):  # spread over all classes, which may lie one after the other
        step = max(len(opened) / CALIBRATION_IMAGES, 1)
        samples: Any = (opened.read(int(i * step), prepare) for i in range(min(len(opened), CALIBRATION_IMAGES)))
    else:
        samples = opened.in_order(prepare)
    return torch.stack([image for image, _ in itertools.islice(samples, CALIBRATION_IMAGES)])
