"""`convmixer bench`: what it reports, not how fast anything is."""

import json
import re
import sys

import pytest
import torch
from command import run
from torch.utils.flop_counter import FlopCounterMode

import convmixer
from convmixer.errors import ArgumentError
from convmixer.plots import plot_benchmark
from convmixer.runtime import benchmark as benchmarks
from convmixer.runtime import benchmark_cases
from convmixer.runtime.benchmark import benchmark, device_name, macs
from convmixer.runtime.benchmark_cases import Candidate, timms
from convmixer.runtime.timing import PeakMemory

QUICK = {"rounds": 2, "seconds": 0.001, "report": lambda line: None, "device": "cpu"}


@pytest.fixture(scope="module")
def report():
    """One small case with our eager form and timm's two eager ones, the rest made to fail."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("Compiled", "OpenVINO", "OnnxRuntime"):
            patch.setattr(benchmark_cases, name, lambda *_: 1 / 0)
        patch.setattr(benchmark_cases, "GEMM_SIDE", 64)
        for name in ("to_openvino", "to_onnx"):
            patch.setattr(benchmark_cases, name, lambda module: None)
        return benchmark("convmixer_256_8", batch_sizes=[2], backends=["eager"], dtypes=["float32"], **QUICK)


def test_report(report):
    (case,) = report.cases
    assert (case.batch_size, case.image_size, report.weights) == (2, 32, "convmixer_256_8")
    measured = {r.name: r for r in case.results if not r.failure}
    assert set(measured) == {"convmixer unfolded", "convmixer eager", "timm eager", "timm channels_last"}
    for r in measured.values():
        assert 0 < r.slowest <= r.images_per_second <= r.fastest
        assert 0 < r.latency_ms["p50"] <= r.latency_ms["p90"] <= r.latency_ms["p99"]
        assert r.calls >= 2
        assert r.relative_error < 1e-5
        assert r.ceiling_share > 0
    assert case.gemm_gflops["float32"] > 0
    (ratio,) = case.ratios
    assert ratio.ours.startswith("convmixer")
    assert ratio.peer.startswith("timm")
    assert 0 < ratio.least <= ratio.ratio <= ratio.largest


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak")
def test_peak_memory_counts_what_was_freed_again():
    memory = PeakMemory(torch.device("cpu"))
    torch.ones(2**26)  # 256 MiB, of which some may lie where others did
    assert memory.growth() > 200


def test_failures_are_reported(report):
    failed = {r.name: r.failure for r in report.cases[0].results if r.failure}
    assert {"timm compile", "timm onnxruntime", "timm openvino"} <= set(failed)
    assert set(failed.values()) == {"ZeroDivisionError: division by zero"}


@torch.no_grad()
def test_peer_has_our_weights():
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu").eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(timms(model)(x), model(x), atol=1e-4)
    assert type(timms(model)).__module__ == "timm.models.convmixer"


@pytest.mark.parametrize(
    ("name", "height", "width", "pool"),
    [
        ("convmixer_256_8", 32, 48, "avg"),
        ("convmixer_128_8_ks7_p2", 70, 224, "avg"),
        ("convmixer_256_8", 8, 8, "catavgmax"),
    ],
)
def test_macs(name, height, width, pool):
    model = convmixer.create_model(name, device="meta", global_pool=pool).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, height, width, device="meta"))
    assert counter.get_total_flops() == 2 * macs(model, height, width)


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_cases, "GEMM_SIDE", 64)
    files = tmp_path / "speed.json", tmp_path / "speed.png"
    options = ("--batch-size", 1, "--batch-size", 3, "--image-size", 8, "--backend", "eager", "--dtype", "bfloat16")
    result = run(
        "bench", *options, "--no-peers", "--rounds", 1, "--seconds", 0.001, "--device", "cpu",
        "--json", files[0], "--plot", files[1],
    )  # fmt: skip
    assert "batch 3 at 8 pixels" in result.stdout
    assert re.search(r"convmixer eager +bfloat16 +[\d,.]+", result.stdout)
    record = json.loads(files[0].read_text())
    assert [case["batch_size"] for case in record["cases"]] == [1, 3]
    assert record["machine"]["device"] == device_name(torch.device("cpu"))
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_the_reasons_are_shown_where_nothing_can_be_drawn(tmp_path, monkeypatch):
    def fail():
        raise ArgumentError("it is gone")

    monkeypatch.setattr(benchmarks, "our_candidates", lambda *_, **__: [Candidate("x", "float32", fail)])
    monkeypatch.setattr(benchmark_cases, "GEMM_SIDE", 64)
    options = ("--no-peers", "--rounds", 1, "--seconds", 0.001, "--device", "cpu", "--plot", tmp_path / "speed.png")
    result = run("bench", *options, status=2)
    assert "x float32 failed: it is gone" in result.stdout
    assert "this benchmark has no figures" in result.stderr


def test_weights_of_a_file(tmp_path):
    path = str(convmixer.model_info("convmixer_256_8").weights[0].path)
    model, weights = benchmarks._open(path, torch.device("cpu"), None)
    assert (weights, model.training, model.num_classes) == (path, False, 10)


def test_random_weights():
    model, weights = benchmarks._open("convmixer_768_32", torch.device("meta"), None)
    assert (weights, model.training) == ("random", False)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backends": ["tvm"]}, "unknown backend 'tvm'; valid: eager, compile, openvino, onnxruntime, native"),
        ({"dtypes": ["fp8"]}, "unknown dtype 'fp8'; valid: float32, bfloat16, int8"),
        ({"dtypes": ["int8"]}, "int8 needs calibration"),
        ({"batch_sizes": [0]}, "batch_sizes=[0]: give whole numbers of at least 1"),
        ({"batch_sizes": []}, "batch_sizes=[]: give whole numbers of at least 1"),
        ({"image_sizes": [32, -1]}, "image_sizes=[32, -1]: give whole numbers"),
        ({"seconds": 0}, "seconds=0: give a time above 0"),
    ],
)
def test_arguments(arguments, text):
    with pytest.raises(ArgumentError, match=re.escape(text)):
        benchmark("convmixer_256_8", **{**QUICK, **arguments})


def test_nothing_to_draw():
    with pytest.raises(ArgumentError, match="this benchmark has no figures: give the JSON of `convmixer bench`"):
        plot_benchmark({"cases": []})
