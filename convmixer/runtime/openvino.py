"""The backend "openvino": a model in OpenVINO on the CPU."""

from __future__ import annotations

import functools
import queue
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convmixer.errors import optional
from convmixer.runtime import openvino_core
from convmixer.runtime.chunks import ChunkRule, chunk_sizes, join_chunks
from convmixer.runtime.convert import to_openvino
from convmixer.runtime.folding import FoldedConvMixer
from convmixer.runtime.graph_cache import GraphCache
from convmixer.runtime.protocol import CPU, Built, CpuBackend, Prepared, Request, missing_modules
from convmixer.runtime.quantize import CHECKED_IMAGES, calibration_images, check_int8, quantize

if TYPE_CHECKING:
    import openvino

# What OpenVINO calls the types.
_CAPABILITIES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16", torch.int8: "INT8"}
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_UNRELEASABLE: list[Any] = []  # in a forked child: the parent's graphs


class OpenVINO:
    """An OpenVINO model on the CPU, one stream for each thread; a batch below that many images uses one stream of all.

    Args:
        model: From `to_openvino`, or quantized.
        precision: Type of whatever is not quantized.
        threads: Number of threads.
        chunk_rule: Images in a chunk; None: whole batches in one stream of all threads.
    """

    def __init__(self, model: Any, precision: torch.dtype, threads: int, chunk_rule: ChunkRule | None) -> None:
        self._ov, self.model = optional("openvino", "openvino", "export"), model
        self.precision, self.threads, self.chunk_rule = precision, threads, chunk_rule
        self._options = {"INFERENCE_PRECISION_HINT": _PRECISIONS[precision], "INFERENCE_NUM_THREADS": threads}
        self._graphs = GraphCache(self._compile)

    def after_fork(self) -> None:
        """Refuse: without OpenVINO's threads nothing can be compiled, and nothing compiled can be released."""
        if self._graphs not in _UNRELEASABLE:
            _UNRELEASABLE.append(self._graphs)
        openvino_core.refuse_forked()

    def __reduce__(self) -> tuple[Any, ...]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.xml"
            self._ov.save_model(self.model, file, compress_to_fp16=False)
            graph, weights = file.read_bytes(), file.with_suffix(".bin").read_bytes()
        return _read_openvino, (graph, weights, self.precision, self.threads, self.chunk_rule)

    def _compile(self, streams: int, *shape: int) -> tuple[Any, queue.SimpleQueue[Any]]:
        """Return a graph for one shape, and its idle requests."""
        fixed = self.model.clone()
        fixed.reshape(list(shape))
        compiled = openvino_core.core().compile_model(fixed, "CPU", {**self._options, "NUM_STREAMS": streams})
        return compiled, queue.SimpleQueue()

    def __call__(self, x: Tensor) -> list[Tensor]:
        one_stream = self.chunk_rule is None or len(x) < self.threads
        sizes = [len(x)]
        if self.chunk_rule is not None and not one_stream:
            sizes = chunk_sizes(len(x), self.chunk_rule(*x.shape[2:]), self.threads)
        running: list[tuple[Any, Any, Any]] = []
        try:
            for part in x.detach().float().contiguous().split(sizes):
                running.append(self._submit(part, 1 if one_stream else self.threads))
        finally:
            for request, _, _ in running:
                request.wait()
        outputs = []
        for request, idle, _ in running:
            outputs.append([torch.from_numpy(output.data.copy()) for output in request.output_tensors])
            idle.put(request)
        return join_chunks(outputs)

    def _submit(self, chunk: Tensor, streams: int) -> tuple[Any, Any, Any]:
        """Start a request, which reads the chunk in place: return it, where it goes when idle, and the chunk."""
        graph, idle = self._graphs(streams, *chunk.shape)
        try:
            request = idle.get_nowait()
        except queue.Empty:
            request = graph.create_infer_request()
        array = chunk.numpy()
        request.set_input_tensor(self._ov.Tensor(array, shared_memory=True))
        request.start_async()
        return request, idle, array


def _read_openvino(graph: bytes, weights: bytes, *settings: Any) -> OpenVINO:
    return OpenVINO(openvino_core.core().read_model(graph, weights), *settings)


@functools.lru_cache(maxsize=1)
def _processor_types() -> tuple[str, ...]:
    return tuple(openvino_core.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class OpenVINOBackend(CpuBackend):
    """OpenVINO, in float32, bfloat16, float16 or, quantized by NNCF, int8."""

    name = "openvino"

    def missing(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str | None:
        lacking = missing_modules("int8", ("nncf",), "int8") if dtype == torch.int8 else None
        return lacking or missing_modules("openvino", ("openvino",), "export")

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        if dtype not in _CAPABILITIES:
            return f"dtype={dtype}: openvino computes in float32, bfloat16, float16 or int8"
        if not self.missing() and _CAPABILITIES[dtype] not in _processor_types():
            return f"dtype={dtype}: openvino finds no matrix multiplication of that type in this CPU; use torch.float32"
        return None

    def convert(self, request: Request, folded: FoldedConvMixer) -> openvino.Model:
        model = to_openvino(folded)
        if request.dtype != torch.int8:
            return model
        images = calibration_images(request.calibration, folded)
        quantized = quantize(model, images)
        runtime = OpenVINO(quantized, request.float_dtype, request.threads, None)
        check_int8(runtime, folded, images[:CHECKED_IMAGES].float())
        return quantized

    def build(self, request: Request, prepared: Prepared, chunk: int | None) -> Built:
        runtime = OpenVINO(prepared.program, request.float_dtype, request.threads, request.chunk_rule(chunk))
        return Built(runtime, "own", request.threads, request.describe_chunks(chunk))
