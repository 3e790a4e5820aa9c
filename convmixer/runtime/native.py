"""The backend "native": a folded model in this package's own kernels for x86 CPUs, `convmixer.native`."""

from __future__ import annotations

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from convmixer.hardware import has_int8_tiles
from convmixer.native.int8 import NativeInt8, calibrate
from convmixer.native.library import lacks
from convmixer.native.packing import Native, refusal
from convmixer.runtime.folding import FoldedConvMixer, find_convmixer
from convmixer.runtime.protocol import CPU, Built, CpuBackend, Prepared, Request
from convmixer.runtime.quantize import CHECKED_IMAGES, calibration_images, check_int8
from convmixer.tracing import computing


class NativeBackend(CpuBackend):
    """Own kernels, in float32, bfloat16 or, with AMX, int8."""

    name = "native"
    splits_batches = False

    def missing(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str | None:
        return lacks() if device.type == "cpu" else None

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        if not torch.cpu._is_avx512_supported():
            return "backend='native' needs a CPU with AVX-512; choose another one, such as openvino"
        if dtype == torch.int8 and not has_int8_tiles():
            return f"dtype={dtype}: native computes in int8 on CPUs with AMX and AVX512-VBMI; use openvino"
        if dtype not in (torch.float32, torch.bfloat16, torch.int8):
            return f"dtype={dtype}: native computes in float32, bfloat16 or int8"
        return None

    def refuses(self, model: nn.Module, dtype: torch.dtype) -> str | None:
        if isinstance(model, FeatureGetterNet):
            return "native returns only the last output: use another backend for features_only, such as openvino"
        return refusal(find_convmixer(model), dtype)

    def chunks_to_time(self, request: Request, example: Tensor) -> tuple[None]:
        return (None,)

    def convert(self, request: Request, folded: FoldedConvMixer) -> Native:
        if request.dtype != torch.int8:
            return Native(folded, request.dtype, request.threads)
        images = calibration_images(request.calibration, folded)
        with computing():
            ranges = calibrate(folded, images)
        runtime = NativeInt8(folded, ranges, request.threads)
        check_int8(runtime, folded, images[:CHECKED_IMAGES].float())
        return runtime

    def build(self, request: Request, prepared: Prepared, chunk: int | None) -> Built:
        runtime: Native = prepared.program
        layout = "contiguous" if runtime.planar else "channels_last"
        return Built(runtime, layout, request.threads, "single images")
