"""The native kernels against the original model, which is the oracle, in each precision."""

import copy

import pytest
import torch
from runtimes import HAS_NATIVE, HAS_NATIVE_INT8, NO_NATIVE, error, make

from convmixer import optimize
from convmixer.errors import DependencyError
from convmixer.native import library as native


@pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)
@pytest.mark.parametrize("kernel_size", [1, 3, 4, 5, 7, 8, 9, 15, 16])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@torch.no_grad()
def test_native_kernels(kernel_size, dtype, limit):
    model = make(kernel_size=kernel_size, dim=128)
    exact = copy.deepcopy(model).double()
    fast = optimize(model, backend="native", dtype=dtype, threads=2)
    for shape in ((1, 3, 2, 2), (3, 3, 26, 38), (2, 3, 9, 17), (2, 3, 70, 100)):
        x = torch.randn(shape)
        assert error(fast(x), exact(x.double())) < limit


@pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)
@pytest.mark.parametrize("threads", [4, 5, 7, 12])
@torch.no_grad()
def test_native_shares_one_image(threads):
    """Among more threads than there are rows, or positions by 32."""
    model = make()
    for height, width in ((10, 10), (12, 32), (28, 28)):
        x = torch.randn(1, 3, height, width)
        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
            assert error(optimize(model, backend="native", dtype=dtype, threads=threads)(x), model(x)) < limit
        if HAS_NATIVE_INT8:
            fast = optimize(model, backend="native", dtype=torch.int8, calibration=x, threads=threads)
            assert error(fast(x), model(x)) < 0.02


@pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)
@torch.no_grad()
def test_native_without_tiles(monkeypatch):
    """Compiled for AMX, and not permitted to use it."""
    monkeypatch.setattr(native.library(), "convmixer_amx", lambda: 0)
    model, x = make(), torch.randn(3, 3, 22, 36)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
        assert error(optimize(model, backend="native", dtype=dtype, threads=2)(x), model(x)) < limit
    if HAS_NATIVE_INT8:
        with pytest.raises(DependencyError, match=r"native computes int8 on AMX, which .* this system does not permit"):
            optimize(model, backend="native", dtype=torch.int8, calibration=x)


@pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_native_keeps_nan(dtype):
    """NaN of any kind, and only in its own image."""
    model, x = make(), torch.randn(3, 3, 12, 12)
    for bits in (0x7FC00000, -1, 0x7F800001):
        spoilt = x.clone()
        spoilt[1, 0, 3, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        got = optimize(model, backend="native", dtype=dtype, threads=1)(spoilt)
        assert got[1].isnan().all()
        assert error(got[::2], model(x)[::2]) < 0.01


@pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)
@pytest.mark.parametrize("pool", ["avg", "max", "catavgmax", "fastavg", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_native_pools(pool, dtype):
    """Without a classifier each channel counts for itself, so none may be out of place."""
    model = make(global_pool=pool, num_classes=0)
    fast, x = optimize(model, backend="native", dtype=dtype, threads=2), torch.randn(3, 3, 10, 12)
    got, expected = fast(x), model(x)
    assert got.shape == expected.shape
    assert ((got - expected).abs().amax(0) < (1e-4 if dtype == torch.float32 else 0.1) * expected.abs().max()).all()


@pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-3)])
def test_native_gelu(dtype, limit):
    """Far from zero, too: the model is made to pass 64 values through one GELU each."""
    model = make(depth=1, kernel_size=1, patch_size=1, num_classes=0)
    values = torch.linspace(-12, 12, 64)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_parameters()
                module.eps = 0.0
        model.stem[0].weight.zero_()
        model.stem[0].bias.copy_(values)
        model.blocks[0][0].fn[0].weight.zero_()
        model.blocks[0][0].fn[0].bias.zero_()
        model.blocks[0][1].weight.zero_()
        model.blocks[0][1].bias.copy_(values)
        got = optimize(model, backend="native", dtype=dtype)(torch.zeros(1, 3, 2, 2))[0]
    exact = torch.nn.functional.gelu(values.double())
    assert ((got - exact).abs() <= limit * exact.abs().clamp_min(0.1)).all()


def test_compiler_that_fails(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DependencyError, match=r"false cannot compile the native kernels \(no message\): name another"):
        native.library()
    assert list((tmp_path / "convmixer").iterdir()) == []


@torch.no_grad()
@pytest.mark.skipif(not HAS_NATIVE_INT8, reason="needs AMX, AVX512-VBMI, a compiler")
@pytest.mark.parametrize(
    ("kernel_size", "patch_size", "act_layer", "height", "width"),
    [
        (1, 2, "relu", 6, 70),
        (3, 2, "gelu", 2, 2),
        (4, 1, "gelu", 7, 19),
        (5, 2, "gelu", 32, 32),
        (7, 7, "relu", 56, 231),
        (9, 2, "gelu", 34, 50),
        (11, 1, "relu", 33, 16),
        (13, 2, "gelu", 8, 70),
    ],
)
def test_native_int8(kernel_size, patch_size, act_layer, height, width):
    """Kernels of each number of rows in a tile, borders, strips, rows that fill no tile; pooled, and as a map."""
    model = make(kernel_size=kernel_size, patch_size=patch_size, act_layer=act_layer)
    model.blocks[0][0].fn[2].weight[::3] *= -1  # what is taken from x counts as what is added to it
    x = torch.randn(3, 3, height, width)
    outputs = []
    for threads in (1, 2, 3):
        fast = optimize(model, backend="native", dtype=torch.int8, calibration=x, threads=threads)
        outputs.append(fast(x))
        assert torch.equal(outputs[0], outputs[-1])
    assert error(outputs[0], model(x)) < 0.03
    model.global_pool.pool_type = "max"
    assert error(optimize(model, backend="native", dtype=torch.int8, calibration=x)(x), model(x)) < 0.03


@torch.no_grad()
@pytest.mark.skipif(not HAS_NATIVE_INT8, reason="needs AMX, AVX512-VBMI, a compiler")
def test_native_int8_where_residuals_take_as_much_as_they_add():
    """Small values make GELU half of a line: what it adds to x and what it takes from x is of one size."""
    model = make()
    for block in model.blocks:
        convolution, _, norm = block[0].fn
        convolution.weight.mul_(0.05)
        convolution.bias.mul_(0.05)
        norm.running_mean.mul_(0.02)
        norm.running_var.mul_(5e-5)
    x = torch.randn(16, 3, 32, 32)
    fast = optimize(model, backend="native", dtype=torch.int8, calibration=x)
    assert error(fast(x), model(x)) < 0.03
