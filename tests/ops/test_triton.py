"""The Triton kernels against PyTorch in double precision.

Tests marked `gpu` run on a GPU, and without one in a process of their own in Triton's interpreter, on small shapes.
"""

import copy
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, vary_norms
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from convmixer.errors import ArgumentError, DependencyError
from convmixer.ops.triton import tables
from convmixer.ops.triton.tables import Direct, Gemm, Gradient, Library

pytest.importorskip("triton")
gpu = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest value, for one rounding to the type; sums are float32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ACTS = {"gelu": F.gelu, "relu": F.relu, "identity": lambda u: u}
SHAPES = [(2, 5, 6, 5), (1, 3, 17, 4), (2, 19, 2, 3), (1, 70, 1, 2)]


@pytest.fixture
def kernels():
    return importlib.import_module("convmixer.ops.triton.launch")


def interpreted():
    return "TRITON_INTERPRET" in os.environ


@pytest.mark.slow
def test_in_the_interpreter():
    """All tests below that are for a GPU."""
    if torch.cuda.is_available():
        pytest.skip("they run on the GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "failed" not in run.stdout


def values(*shape, dtype=torch.float32):
    tensor = torch.randn(shape, device=DEVICE).to(dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def per_channel(vector):
    return vector.double()[:, None, None]


def correlate(x, weight, bias=None):
    size = weight.shape[-1]
    padded = F.pad(x.double(), [(size - 1) // 2, size // 2] * 2)
    return F.conv2d(padded, weight.double(), None if bias is None else bias.double(), groups=x.shape[1])


def close(actual, expected, dtype=torch.float32, factor=1.0):
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    if actual.numel():
        error = (actual.double() - expected).abs().max().item()
        assert error <= factor * TOLERANCE[dtype] * max(expected.abs().max().item(), 1.0), error


def check_sums(s, q, stored, act, center):
    a = ACTS[act](stored.double()) - per_channel(center)
    count, factor = a.numel() / a.shape[1], rounding(stored.dtype, act)
    close(s / count, a.mean((0, 2, 3)), factor=2 * factor)
    close(q / count, a.square().mean((0, 2, 3)), factor=4 * factor)


def rounding(dtype, act):
    """GELU of 16-bit types is a polynomial within 9e-5."""
    return 1 if act != "gelu" or dtype == torch.float32 else 50


def choose(monkeypatch, operation, row):
    """Let one row of the tables serve whatever is asked of an operation."""
    monkeypatch.setitem(tables.TABLES, operation, defaultdict(lambda: row, {(80, 0, 2): row}))
    monkeypatch.setattr(tables, "tuned", lambda name: [])
    tables._row.cache_clear()


@pytest.fixture(autouse=True)
def _choices():
    yield
    tables._row.cache_clear()


# Few instructions, as the interpreter takes its time for each; tiles that fit no shape, and one that fits some.
DIRECT = [Direct(1, 2, 8, 4, 32, 4), Direct(2, 4, 4, 2, 16, 4), Direct(3, 3, 2, 1, 64, 2)]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 9, 15])
def test_depthwise(kernels, monkeypatch, dtype, size):
    if interpreted() and dtype == torch.bfloat16 and size > 4:
        pytest.skip("the interpreter is slow")
    choose(monkeypatch, "depthwise", DIRECT[size % 3] if size > 2 else DIRECT[1])
    shape = SHAPES[size % len(SHAPES)]
    channels = shape[1]
    x, weight = values(*shape, dtype=dtype), values(channels, 1, size, size, dtype=dtype) / size
    bias, center, scale, shift = values(4, channels)
    act = list(ACTS)[size % 3]
    expected = correlate(x, weight, bias)
    c, s, q = kernels.depthwise(x, weight, bias, act, center)
    assert c.is_contiguous(memory_format=torch.channels_last)
    close(c, expected, dtype)
    check_sums(s, q, c, act, center)
    y = kernels.depthwise_infer(x, weight, bias, act, scale, shift, x)
    close(y, per_channel(scale) * ACTS[act](expected) + per_channel(shift) + x.double(), dtype)
    grad = values(*shape, dtype=dtype)
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(correlate(leaf, weight), leaf, grad.double())
    residual = None if size % 2 else x
    expected = expected if residual is None else expected + x.double()
    close(kernels.depthwise_input_grad(grad, weight, residual), expected, dtype)


@gpu
@pytest.mark.parametrize("row", DIRECT)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 16, 1, 1), (2, 32, 9, 8)])
def test_shapes(kernels, row, shape):
    x, weight = values(*shape), values(shape[1], 1, 4, 4)
    c, (s, q) = kernels._convolve(x, weight, None, "relu", center=values(shape[1]) * 0, config=row)
    close(c, correlate(x, weight))
    check_sums(s, q, c, "relu", torch.zeros(shape[1], device=DEVICE))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 4])
def test_rows_of_the_tables(kernels, dtype, size):
    if interpreted() and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no products of bfloat16")
    x, weight = values(2, 5, 9, 6, dtype=dtype), values(5, 1, size, size, dtype=dtype)
    close(kernels.depthwise_infer(x, weight, None, "identity", None, None, None), correlate(x, weight), dtype)
    weight = values(7, 5, dtype=dtype)
    expected = F.gelu(torch.einsum("oc,bchw->bohw", weight.double(), x.double()))
    close(kernels.pointwise_infer(x, weight, None, "gelu", None, None), expected, dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4, 7, 9, 11, 15])
def test_weight_gradient(kernels, monkeypatch, dtype, size):
    if interpreted() and size not in ((4,) if dtype == torch.bfloat16 else (2, 3, 4, 11)):
        pytest.skip("the interpreter is slow")
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # some take several tiles
    choose(monkeypatch, "weight_gradient", Gradient(3, 3, 16, 32, 4))
    shape = [*SHAPES, (18, 2, 4, 9)][(size + 1) % 5]
    x, grad = values(*shape, dtype=dtype), values(*shape, dtype=dtype)
    weight = values(shape[1], 1, size, size).double().requires_grad_()
    bias = values(shape[1]).double().requires_grad_()
    expected = torch.autograd.grad(correlate(x, weight, bias), (weight, bias), grad.double())
    for actual, gradient in zip(kernels.depthwise_weight_grad(x, grad, size), expected, strict=True):
        close(actual, gradient)


@gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("act", "shape"), list(zip(ACTS, SHAPES, strict=False)))
def test_pointwise(kernels, monkeypatch, dtype, act, shape):
    if interpreted() and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no products of bfloat16")
    channels, outputs = shape[1], 9
    c, x = values(*shape, dtype=dtype), values(*shape, dtype=dtype)
    weight, (gain, offset) = values(outputs, channels, dtype=dtype) / channels, values(2, channels)
    bias, center, scale, shift = values(4, outputs)
    z = per_channel(gain) * ACTS[act](c.double()) + per_channel(offset) + x.double()
    product = torch.einsum("oc,bchw->bohw", weight.double(), z) + per_channel(bias)
    given = torch.einsum("oc,bchw->bohw", weight.double(), c.double()) + per_channel(bias)
    for row in (Gemm(32, 16, 16, 4, 2, False), Gemm(32, 16, 16, 4, 2, True), Library()):
        choose(monkeypatch, "pointwise", row)
        u, s, q = kernels.pointwise(c, gain, offset, x, weight, bias, act, center)
        close(u, product, dtype, factor=2)  # z is rounded, too
        check_sums(s, q, u, act, center)
        y = kernels.pointwise_infer(c, weight, bias, act, scale, shift)
        close(y, per_channel(scale) * ACTS[act](given) + per_channel(shift), dtype)
        close(kernels.pointwise_infer(c, weight, None, "identity", None, None), given - per_channel(bias), dtype)


@gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("act", "shape"), list(zip(ACTS, SHAPES[1:], strict=False)))
def test_elementwise(kernels, dtype, act, shape):
    channels = shape[1]
    u, grad = values(*shape, dtype=dtype) * 2, values(*shape, dtype=dtype)
    leaves = [leaf.double().requires_grad_() for leaf in (u, *values(2, channels))]
    scale, shift = (leaf.detach().float() for leaf in leaves[1:])
    expected = per_channel(leaves[1]) * ACTS[act](leaves[0]) + per_channel(leaves[2])
    close(kernels.normalize_act(u, scale, shift, act), expected.detach(), dtype)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    actual = kernels.normalize_act_grad(grad, u, scale, act)
    close(actual[0], gradients[0], dtype)
    close(actual[1], gradients[1], factor=10 * rounding(dtype, act))
    close(actual[2], gradients[2])
    other, gain, offset = values(*shape, dtype=dtype), *values(2, channels)
    more = expected.detach() + per_channel(gain) * F.relu(other.double()) + per_channel(offset)
    close(kernels.sum_normalized(u, scale, shift, act, other, gain, offset, "relu"), more, dtype)
    center, first, second = values(3, channels)
    a = ACTS[act](leaves[0]) - per_channel(center)
    loss = (a.sum((0, 2, 3)) * first).sum() + (a.square().sum((0, 2, 3)) * second).sum()
    (gradient,) = torch.autograd.grad(loss, leaves[0])
    summed, total = kernels.stats_grad(grad, u, act, center, first, second)
    close(summed, grad.double() + gradient, dtype)
    close(total, summed.double().sum((0, 2, 3)), factor=4)
    check_sums(*kernels.stats(u, act, center), u, act, center)


@gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("batch", [3, 0])
def test_pointwise_gradients(kernels, dtype, batch):
    """In the layout of the kernels; of matrices that are not square."""
    grad, z = values(batch, 6, 5, 4, dtype=dtype), values(batch, 9, 5, 4, dtype=dtype)
    weight = values(6, 9, dtype=dtype)
    leaves = [leaf.double().requires_grad_() for leaf in (z, weight)]
    expected = torch.autograd.grad(F.conv2d(leaves[0], leaves[1][..., None, None]), leaves, grad.double())
    for functions in (kernels, importlib.import_module("convmixer.ops.reference")):
        grad_z = functions.pointwise_input_grad(grad, weight)
        assert not batch or grad_z.is_contiguous(memory_format=torch.channels_last)
        close(grad_z, expected[0], dtype)
        close(functions.pointwise_weight_grad(grad, z), expected[1], dtype)


@gpu
@pytest.mark.parametrize("shape", [(1, 1300, 9), (2, 3, 130), (2, 512, 8), (3, 0, 4), (1, 1, 1)])
def test_partial_sums(kernels, shape):
    partials = values(*shape)
    close(kernels._add_up(partials), partials.double().sum(1), factor=4)


@gpu
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [5, 200])
def test_vectors(kernels, affine, channels):
    """BatchNorm of sums and its gradients, against autograd of the formula in float64."""
    from convmixer.ops import reference

    a = values(40, channels) * 2 + values(channels) * 3
    center = a.mean(0) + 0.1
    s, q = (a - center).sum(0), (a - center).square().sum(0)
    weight, bias = values(2, channels) if affine else (None, None)
    leaves = [None if v is None else v.double().requires_grad_() for v in (a, weight, bias)]
    var, mean = torch.var_mean(leaves[0], 0, correction=0)
    scale = (var + 1e-5).rsqrt() * (leaves[1] if affine else 1)
    expected = scale, (leaves[2] if affine else 0) - mean * scale, mean, var
    actual = kernels.affine(s, q, center, weight, bias, 40, 1e-5)
    for one, other in zip(actual, expected, strict=True):
        close(one, other.detach(), factor=4)
    grads = values(2, channels)
    loss = sum((its * grad).sum() for its, grad in zip(expected, grads.double(), strict=False))
    grad_a, *grad_weight = torch.autograd.grad(loss, leaves[:2] if affine else leaves[:1])
    grad_s, grad_q, weight_grad = kernels.affine_grad(*grads, s, q, center, weight, 40, 1e-5)
    close(grad_s + 2 * (a - center) * grad_q, grad_a, factor=4)
    if affine:
        close(weight_grad, grad_weight[0], factor=20)
    by_reference = reference.affine_grad(*grads, s, q, center, weight, 40, 1e-5)
    torch.testing.assert_close((grad_s, grad_q, weight_grad), by_reference)


@gpu
def test_values_that_are_all_the_same_or_not_finite(kernels):
    """A variance that rounding takes below zero counts as zero and has no gradient; NaN stays."""
    one, center = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    s, q = torch.tensor([[8.0, 8.0, torch.nan], [8.0, 7.9, 8.0]], device=DEVICE)
    for functions in (kernels, importlib.import_module("convmixer.ops.reference")):
        scale, shift, mean, var = functions.affine(s, q, center, None, None, 8, 0.25)
        assert scale.tolist()[:2] == [2, 2]
        assert var.tolist()[:2] == [0, 0]
        assert shift.tolist()[:2] == [-2, -2]
        assert all(torch.isnan(vector[2]) for vector in (scale, shift, mean, var))
        grad_s, grad_q, _ = functions.affine_grad(one, center, s, q, center, None, 8, 0.25)
        assert grad_q[:2].tolist() == [-0.5, 0.0]
        assert grad_s[1] == 0


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7, 1, 1), (20, 1, 3, 3), (9, 300, 1, 1)])
def test_expected_means(kernels, dtype, shape):
    weight, bias = values(*shape, dtype=dtype), values(shape[0], dtype=dtype)
    features = values(shape[0] if shape[1] == 1 else shape[1])
    wide = weight.double()
    x = features.double()[:, None, None].expand(-1, *shape[2:])
    expected = F.gelu(F.conv2d(x, wide, bias.double(), groups=shape[0] if shape[1] == 1 else 1).flatten())
    close(kernels.expected_mean(weight, bias, features, "gelu"), expected, factor=4)


@gpu
def test_expected_means_of_other_convolutions_are_refused(kernels):
    """The kernel would read past the end of the means: three by three weights, of more than one channel."""
    with pytest.raises(ArgumentError, match="features"):
        kernels.expected_mean(values(4, 2, 3, 3), values(4), values(2), "gelu")


@pytest.fixture(scope="module")
def static():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("kernels_static")


def check_compiled(records):
    """Hardly a spill; registers and shared memory of a multiprocessor hold a program."""
    for record in records:
        assert record["stack_bytes"] <= 16, record  # versions of Triton differ by that much
        assert record["registers"] * 32 * record["config"]["warps"] <= 2**16, record
        limit = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}[record["capability"]]  # KiB
        assert record["shared_bytes"] <= 1024 * limit, record


@pytest.mark.parametrize("capability", [80, 90])
def test_registers_suffice(static, capability):
    """Of the largest block, compiled without a GPU; benchmarks/kernels_static.py does so for all of them."""
    if interpreted():
        pytest.skip("nothing is compiled")
    names = ["depthwise_input_grad", "depthwise_weight_grad", "pointwise of z"]
    records = list(static.report(capability, torch.bfloat16, "convmixer_1536_20", names))
    assert [record["kernel"] for record in records] == names
    check_compiled(records)
    assert records[0]["loop"]["fma"] > 0.6 * records[0]["loop"]["total"]
    assert records[2]["instructions"]["tensor"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "size", "shape"),
    [
        (90, 4, (1, 70, 1, 1)),  # arguments that are 1 become constants, and nothing is aligned
        (90, 11, (64, 768, 32, 32)),
        (80, 15, (64, 768, 32, 32)),
        (86, 11, (64, 768, 32, 32)),
        (100, 9, (64, 768, 32, 32)),
        (120, 9, (64, 768, 32, 32)),
    ],
)
def test_other_sizes_and_gpus_compile(static, monkeypatch, capability, size, shape):
    if interpreted():
        pytest.skip("nothing is compiled")
    monkeypatch.setattr(static, "get_variant", lambda name: (SimpleNamespace(dim=shape[1], kernel_size=size), None))
    monkeypatch.setattr(static.harness, "feature_side", lambda name: shape[2])
    monkeypatch.setattr(static, "BATCH", shape[0])
    records = list(static.report(capability, torch.float16, "other"))
    assert len(records) == 12
    check_compiled(records)


@pytest.mark.parametrize("capability", [80, 90])
def test_functions_of_vectors_compile(kernels, static, capability):
    with static.launches(capability) as recorded:
        vector = torch.empty(256, device="cuda")
        for weight in (torch.empty(256, 256, 1, 1, device="cuda"), vector.view(256, 1, 1, 1).expand(-1, -1, 9, 9)):
            kernels.expected_mean.__wrapped__(weight, vector, vector, "gelu")
        kernels._affine.__wrapped__(vector, vector, vector, None, vector, 4096.0, 1e-5)
        kernels._affine_grad.__wrapped__(vector, vector, vector, vector, vector, vector, 4096.0, 1e-5)
        kernels._add_up(torch.empty(2, 4096, 256, device="cuda"))
    assert len(recorded) == 5
    for launch in recorded:
        assert not static.disassemble(static.compile_launch(launch, capability))["spill_instructions"]


def test_tuning(kernels, static, monkeypatch, tmp_path):
    """What is measured without a GPU to measure it; the fastest rows are written, found again and used."""
    if interpreted() or torch.cuda.is_available():
        pytest.skip("a GPU is replaced here")
    from convmixer.ops.triton import tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = {}

    def measured(function):
        row = function.__closure__[[*function.__code__.co_freevars].index("row")].cell_contents
        return times.setdefault(row, 100.0 - len(times))  # later ones are faster

    monkeypatch.setattr(tune, "microseconds", measured)
    monkeypatch.setattr(tune, "_differ", lambda one, other: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    todo, lines = tune.tasks([tune.Block(2, 256, 16, 16, 5)]), []
    with static.launches(90):
        found = tune.measure_all(todo, torch.bfloat16, 60, lines.append)
        assert not any("left out" in line for line in lines), lines
        assert {(r["operation"], r["key"]) for r in found} == {(t.operation, t.key) for t in todo}
        file = tune.write_rows("sm_90", found[:1])
        tune.write_rows("sm_90", found[1:])  # what is there stays
        assert file.parent == tmp_path / "convmixer"
        x = torch.empty(2, 256, 16, 16, device="cuda", dtype=torch.bfloat16)
        best = min((t for t in todo if t.operation == "depthwise"), key=lambda t: times[t.row])
        assert tables.row("depthwise", 5, x) == best.row != tables.DEPTHWISE[80, 5, 2]
        far = torch.empty(4096, 256, 16, 16, device="cuda", dtype=torch.bfloat16)
        assert tables.row("depthwise", 5, far) == tables.DEPTHWISE[80, 5, 2]
        assert tables.row("depthwise", 7, x) == tables.DEPTHWISE[80, 7, 2]
        rows = json.loads(file.read_text())
        file.write_text(json.dumps(rows | {"rows": rows["rows"][:1]}))  # as another process may
        tune.write_rows("sm_90", [])
        assert len(json.loads(file.read_text())["rows"]) == 1
        for damage in ({"channels": 0}, {"channels": "256"}, {"positions": None}, {"row": "ab"}, {"form": "Gradient"}):
            file.write_text(json.dumps({"rows": [found[0], rows["rows"][0] | damage]}))
            tables.forget_choices()
            assert tables.tuned("sm_90") == []
        file.write_text("{")
        tables.forget_choices()
        assert tables.row("depthwise", 5, x) == tables.DEPTHWISE[80, 5, 2]


@pytest.mark.slow
def test_the_benchmark_runs_through(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "--json", str(tmp_path / "gpu.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not report["left_out"]
    assert not report["failed"]
    assert "ours, triton" in report["sections"]["inference of tiny"]


@gpu
def test_gelu_is_exact_in_the_tails(kernels):
    u = torch.linspace(-12, 12, 4096, device=DEVICE).view(1, 128, 8, 4)
    one, zero = torch.ones(128, device=DEVICE), torch.zeros(128, device=DEVICE)
    error = kernels.normalize_act(u, one, zero, "gelu").double() - F.gelu(u.double())
    assert error.abs().max() < 5e-7
    half = u.half()
    error = kernels.normalize_act(half, one, zero, "gelu").double() - F.gelu(half.double())
    assert (error.abs() < 1e-4 + 2.0**-11 * F.gelu(half.double()).abs()).all()
    assert not kernels.normalize_act(half * 5000, one, zero, "gelu").isnan().any()
    assert kernels.normalize_act(half * float("nan"), one, zero, "gelu").isnan().all()
    assert not kernels.normalize_act(u * 1e18, one, zero, "gelu").isnan().any()
    assert kernels.normalize_act(u * float("nan"), one, zero, "gelu").isnan().all()


@gpu
def test_any_layout_gives_the_same(kernels):
    x, weight, vector = values(2, 8, 6, 6, dtype=torch.float16), values(8, 1, 3, 3), values(8)
    expected = kernels.depthwise(x, weight, vector, "gelu", vector)
    wide = torch.randn(2, 16, 8, 6, device=DEVICE).half()
    wide[:, ::2, 1:7] = x
    strided = torch.randn(8, 1, 3, 6, device=DEVICE)[..., ::2]
    strided.copy_(weight)
    for other in (x.contiguous(), wide[:, ::2, 1:7], x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        for a, b in zip(kernels.depthwise(other, strided, vector, "gelu", vector), expected, strict=True):
            assert torch.equal(a, b)


@gpu
def test_an_empty_batch(kernels):
    x, weight, vector = values(0, 4, 5, 5), values(4, 1, 3, 3), values(4)
    c, s, q = kernels.depthwise(x, weight, vector, "gelu", vector)
    assert c.shape == x.shape
    assert not s.any()
    assert not q.any()
    assert not any(grad.any() for grad in kernels.depthwise_weight_grad(x, x, 3))


@gpu
def test_operators_for_compilers(kernels):
    x, weight, vector = values(2, 4, 5, 3, dtype=torch.float16), values(4, 1, 3, 3), values(4)
    square = values(6, 4)
    wide = values(6)
    operators = torch.ops.convmixer
    for name, arguments in {
        "normalize_act": (x, vector, vector, "gelu"),
        "normalize_act_grad": (x, x, vector, "gelu"),
        "stats_grad": (x, x, "gelu", vector, vector, vector),
        "stats": (x, "gelu", vector),
        "depthwise": (x, weight, vector, "gelu", vector),
        "depthwise_infer": (x, weight, None, "relu", None, vector, x),
        "depthwise_input_grad": (x, weight, x),
        "sum_normalized": (x, vector, vector, "gelu", x, vector, vector, "relu"),
        "depthwise_weight_grad": (x, x, 3),
        "pointwise": (x, vector, vector, x, square, wide, "gelu", wide),
        "pointwise_infer": (x, square, wide, "gelu", None, None),
        "expected_mean": (square, wide, vector, "gelu"),
        "affine": (vector, vector, vector, None, vector, 30.0, 1e-5),
        "affine_grad": (vector, vector, vector, vector, vector, vector, 30.0, 1e-5),
    }.items():
        operator = getattr(operators, f"triton_{name}").default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))

    class Model(torch.nn.Module):
        def forward(self, x):
            return kernels.depthwise_infer(x, weight, vector, "gelu", None, None, x) + 1

    program = torch.export.export(Model(), (x,)).module()
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    expected = Model()(x)
    assert torch.equal(program(x), expected)
    assert torch.equal(compiled(x), expected)


@gpu
def test_more_than_two_to_the_31_elements(kernels):
    if interpreted() or torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs a GPU with 30 GB")
    x = torch.zeros(1050, 32, 32, 2048, dtype=torch.bfloat16, device=DEVICE).permute(0, 3, 1, 2)
    x[-1] = torch.randn_like(x[-1])
    weight, vector = values(2048, 1, 7, 7), values(2048)
    last = kernels.depthwise_infer(x, weight, vector, "gelu", None, None, None)[-1:]
    assert torch.equal(last, kernels.depthwise_infer(x[-1:], weight, vector, "gelu", None, None, None))
    one = kernels.depthwise_weight_grad(x[-1:], x[-1:], 7)[0]
    torch.testing.assert_close(kernels.depthwise_weight_grad(x, x, 7)[0], one, rtol=1e-4, atol=1e-2)
    _, s, _ = kernels.depthwise(x, weight, None, "identity", vector * 0)
    torch.testing.assert_close(s, kernels.depthwise(x[-1:], weight, None, "identity", vector * 0)[1])


@gpu
def test_arguments_that_do_not_fit(kernels):
    x, weight, vector = values(2, 4, 5, 5), values(4, 1, 3, 3), values(4)
    for call, message in [
        (lambda: kernels.depthwise(x.double(), weight, vector, "gelu", vector), "float64.*bfloat16, float16 or"),
        (lambda: kernels.depthwise(x[0], weight, vector, "gelu", vector), r"shape \(4, 5, 5\): \(B, C, H, W\)"),
        (lambda: kernels.depthwise(x, weight, vector, "silu", vector), "act='silu'.*gelu, relu, identity"),
        (lambda: kernels.depthwise(x, weight[:3], vector, "gelu", vector), r"\(4, 1, k, k\) is needed"),
        (lambda: kernels.depthwise(x, values(4, 1, 1, 1), vector, "gelu", vector), "kernel_size=1.*2 to 15"),
        (lambda: kernels.depthwise(x, values(4, 1, 16, 16), vector, "gelu", vector), "kernel_size=16.*2 to 15"),
        (lambda: kernels.depthwise(x, weight, vector[:3], "gelu", vector), r"bias of shape \(3,\).*\(4,\)"),
        (lambda: kernels.depthwise_weight_grad(x, x[:1], 3), r"grad of shape \(1, 4, 5, 5\)"),
        (lambda: kernels.pointwise_infer(x, values(4, 5), None, "gelu", None, None), r"\(outputs, 4\).*is needed"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()


def test_tensors_elsewhere_are_refused(kernels):
    x = torch.zeros(1, 4, 5, 5)
    with pytest.raises(ArgumentError, match=r"on cpu: the Triton kernels run on CUDA devices; convmixer.ops.reference"):
        kernels.normalize_act(x, x[0, :, 0, 0], x[0, :, 0, 0], "gelu")


def test_triton_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "convmixer.ops.triton.launch", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(DependencyError, match="pip install triton"):
        importlib.import_module("convmixer.ops.triton.launch")


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_fused_blocks(kernels, monkeypatch, compiled):
    """Loss, gradients and running statistics of training steps on the kernels, against the layers in float64."""
    from convmixer import ConvMixer
    from convmixer.ops import dispatch

    choose(monkeypatch, "depthwise", DIRECT[0])
    choose(monkeypatch, "weight_gradient", Gradient(3, 3, 16, 32, 4))
    monkeypatch.setattr(dispatch, "kernels", lambda x: kernels)  # of CPU tensors, too
    monkeypatch.setattr(dispatch, "check", lambda *_: None)
    monkeypatch.setattr("convmixer.ops.depthwise._enabled", False)  # the layers are to be those of PyTorch
    depth = 1 if compiled else 2
    plain = ConvMixer(8, depth, 3, 2, num_classes=3).to(DEVICE, torch.float64).train()
    fused = ConvMixer(8, depth, 3, 2, num_classes=3).to(DEVICE).train()
    fused.load_state_dict(plain.state_dict())
    fused.set_fused()
    run = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused
    for _ in range(depth):
        x = values(3, 3, 8, 6)
        for model, images in ((plain, x.double()), (run, x)):
            model(images).square().sum().backward()
    for (name, mine), (_, exact) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        assert (mine.grad.double() - exact.grad).abs().max() < 1e-4 * exact.grad.abs().max() + 1e-4, name
    for (name, mine), (_, exact) in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-5, atol=1e-5, msg=name)
    fused.eval()
    plain.eval()
    with torch.no_grad():
        close(fused(x), plain(x.double()), factor=20)


@gpu
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_optimize(kernels, monkeypatch, act):
    from convmixer import ConvMixer, optimize

    choose(monkeypatch, "depthwise", DIRECT[0])
    model = ConvMixer(12, 3, 3, 2, num_classes=5, act_layer=act).to(DEVICE)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    images = values(6, 3, 8, 10)
    model(images)  # statistics
    with torch.no_grad():
        model.blocks[1][3].weight[::4] = 0  # channels that cannot be divided by their scale
    expected = model.double().eval()(images.double())
    fast = optimize(model.float(), backend="triton")
    assert fast.choice.backend == "triton"
    close(fast(images), expected.detach(), factor=20)
    close(fast(images.to(torch.float16)), expected.detach(), torch.float16, factor=2)


@gpu
@torch.no_grad()
def test_copies_of_an_optimized_model(monkeypatch):
    from convmixer import ConvMixer, optimize

    choose(monkeypatch, "depthwise", DIRECT[0])
    model = ConvMixer(12, 1, 3, 2, num_classes=5).to(DEVICE).eval()
    vary_norms(model)
    fast, x = optimize(model, backend="triton"), values(1, 3, 8, 8)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x), fast(x))


def test_optimize_refuses_what_it_cannot_run(monkeypatch):
    from convmixer import ConvMixer, create_model, optimize

    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match=r"backend='triton' computes on CUDA devices.*model\.cuda\(\)"):
            optimize(ConvMixer(4, 1, 3, 2), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ArgumentError, match="kernels of 2 to 15, this model has 17"):
        optimize(ConvMixer(4, 1, 17, 2), backend="triton")
    with pytest.raises(ArgumentError, match="gelu, relu, identity, this model has SiLU"):
        optimize(ConvMixer(4, 1, 3, 2, act_layer="silu"), backend="triton")
    with pytest.raises(ArgumentError, match="float64: triton computes in"):
        optimize(ConvMixer(4, 1, 3, 2), backend="triton", dtype=torch.float64)
    features = create_model("convmixer_256_8", features_only=True, device="cpu")
    with pytest.raises(ArgumentError, match=r"triton returns only the last output.*such as compile"):
        optimize(features, backend="triton")


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_plain_layers(kernels, monkeypatch, compiled):
    """Outputs and gradients of layers that are not fused, against those of PyTorch in float64."""
    from convmixer import ConvMixer
    from convmixer.ops import depthwise, dispatch

    choose(monkeypatch, "depthwise", DIRECT[0])
    choose(monkeypatch, "weight_gradient", Gradient(3, 3, 16, 32, 4))
    if interpreted():
        monkeypatch.setattr(dispatch, "kernels", lambda x: kernels)
        monkeypatch.setattr(depthwise, "_device_kind", lambda x: "cuda")
        monkeypatch.setattr(depthwise, "_fits", lambda device, dtype, size: dtype == torch.float32)
    plain, ours = (ConvMixer(8, 1, 4, 2, num_classes=3).to(DEVICE) for _ in range(2))
    plain.double()
    ours.load_state_dict(plain.state_dict())
    operators = []

    def count(module, _inputs):
        operators.extend(str(n.target) for n in module.graph.nodes if "convmixer.triton" in str(n.target))
        return make_boxed_func(module.forward)

    run = torch.compile(ours, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
    x = values(3, 3, 8, 6)
    loss = (run if compiled else ours)(x).square().sum()
    loss.backward()
    plain(x.double()).square().sum().backward()
    names = [f"convmixer.triton_depthwise_{kind}.default" for kind in ("infer", "input_grad", "weight_grad")]
    assert operators == (names if compiled else [])
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad.double() - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-4, name
