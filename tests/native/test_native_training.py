"""The native kernels of fused blocks against the layers in double precision, and what they do not take."""

import copy
import itertools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import loss_after_200_steps, vary_norms
from torch import nn

import convmixer
from convmixer import ConvMixer
from convmixer.errors import ArgumentError, ConvMixerError
from convmixer.native import library
from convmixer.native import training as native

pytestmark = pytest.mark.skipif(
    library.lacks() is not None or not torch.cpu._is_avx512_supported(), reason="no C++ compiler, or no AVX-512"
)
SHAPE = {"dim": 32, "depth": 2, "kernel_size": 5, "patch_size": 2, "num_classes": 7}
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 0.03}

# Shapes of models and images that differ from what the tiles like, each in its own way.
CASES = [
    ({}, (4, 3, 32, 32)),  # whole tiles
    ({}, (3, 3, 26, 22)),  # rows and columns that are not real; a group of images that is not full
    ({"kernel_size": 4}, (1, 3, 13, 70)),  # an even kernel; several strips of columns; one image
    ({"kernel_size": 9, "patch_size": 1, "depth": 1}, (2, 3, 35, 18)),  # several bands of rows
    ({"kernel_size": 15, "dim": 12}, (2, 3, 10, 14)),  # a kernel larger than the image; one block of channels, not full
    ({"kernel_size": 8, "dim": 40, "patch_size": 7, "in_chans": 4}, (3, 4, 59, 63)),  # patches of 196 inputs
    ({"kernel_size": 2, "act_layer": "relu"}, (5, 3, 17, 16)),
    ({"kernel_size": 1}, (5, 3, 12, 13)),
    ({"kernel_size": 7, "dim": 96, "depth": 1, "patch_size": 1}, (1, 3, 48, 64)),
]


@pytest.fixture
def native_calls(monkeypatch):
    """How often the kernels were called, forward and backward."""
    calls = {"forward": 0, "backward": 0}

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(native, name, counted(name, getattr(native, name)))
    return calls


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that is used again holds no number: what is not written is not read."""
    allocate = native._allocate
    monkeypatch.setattr(native, "_allocate", lambda size: allocate(size).fill_(255))


def pair(**changes) -> tuple[ConvMixer, ConvMixer]:
    """A model of layers in double precision, and the same with fused blocks in float32."""
    plain = ConvMixer(**{**SHAPE, **changes}, dtype=torch.float64)
    vary_norms(plain)
    fused = copy.deepcopy(plain).float()
    fused.set_fused()
    return plain, fused


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def results(model, x, dtype=torch.float32):
    """Features and all gradients of stem and blocks, for a gradient of the features that is the same for all models."""
    model.zero_grad()
    with autocast(dtype):
        y = model.forward_features(x)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator).bfloat16()  # exact in every type
    y.backward(grad.to(y.dtype))
    named = dict(model.named_parameters())
    return {"features": y.detach()} | {name: p.grad for name, p in named.items() if p.grad is not None}


def error(a, b) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / (b.norm() + 1e-12))


def assert_near(found, expected, tolerance):
    assert found.keys() == expected.keys()
    errors = {name: error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, errors


def assert_near_weights(found, expected, tolerance):
    """Without gradients of vectors, which are small differences of large sums."""
    found, expected = ({name: t for name, t in each.items() if t.ndim > 1} for each in (found, expected))
    assert_near(found, expected, tolerance)


@pytest.mark.parametrize(("changes", "size"), CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_float32(native_calls, changes, size, threads):
    before = torch.get_num_threads()
    plain, fused = pair(**changes)
    x = torch.randn(size, dtype=torch.float64)
    try:
        torch.set_num_threads(threads)
        found = results(fused, x.float())
    finally:
        torch.set_num_threads(before)
    assert_near(found, results(plain, x), TOLERANCES[torch.float32])
    for (name, ours), theirs in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert error(ours, theirs) <= 1e-5, name
    assert native_calls == {"forward": 1, "backward": 1}


WIDE = ({"dim": 256, "depth": 1}, (2, 3, 32, 32))  # long sums; several tiles of weights


@pytest.mark.parametrize(("changes", "size"), [*CASES, WIDE], ids=str)
def test_float32_is_as_exact_as_the_layers(native_calls, changes, size):
    """With AMX it multiplies parts of each value; errors against float64 are no larger than those of float32.

    Without AMX it adds up one term after the other, which is less exact than how PyTorch does it.
    """
    torch.manual_seed(0)
    plain, fused = pair(**changes)
    layers = copy.deepcopy(plain).float()
    x = torch.randn(size, dtype=torch.float64)
    expected = results(plain, x)
    found = [results(model, x.float()) for model in (fused, layers)]
    ours, theirs = (
        {name: error(each[name], expected[name]) for name in expected if expected[name].ndim > 1} for each in found
    )
    allowed = 1.25 if native.kernels().convmixer_tiles() else 2.0
    assert sum(ours.values()) <= allowed * sum(theirs.values()), (ours, theirs)
    assert all(ours[name] <= 2 * theirs[name] + 1e-7 for name in ours), (ours, theirs)
    assert native_calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_float32_of_any_magnitude(scale):
    """Its parts reach as far as its exponents: the stem's convolution of tiny or huge pixels, undone by the weights."""
    plain, fused = pair()
    for model in (plain, fused):
        model.stem[0].weight.data /= scale
    x = torch.randn(2, 3, 20, 20)
    found, expected = results(fused, x * scale), results(plain, x.double() * scale)
    assert error(found["features"], expected["features"]) <= TOLERANCES[torch.float32]
    assert error(found["stem.0.weight"], expected["stem.0.weight"]) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], ids=hex)
def test_what_is_not_finite_stays_so(dtype, bits):
    """Infinities and each kind of NaN, of which rounding must not make numbers."""
    _, fused = pair()
    x = torch.randn(2, 3, 20, 20)
    x.view(torch.int32)[1, 1, 5, 5] = bits - (bits >> 31 << 32)
    assert results(fused, x, dtype)["features"].isnan().any()


@pytest.mark.parametrize(("changes", "size"), CASES, ids=str)
def test_bfloat16_is_as_good_as_the_layers(native_calls, changes, size):
    plain, fused = pair(**changes)
    x = torch.randn(size, dtype=torch.float64)
    layers = copy.deepcopy(plain).float()
    expected = results(plain, x)
    found = [results(model, x.float(), torch.bfloat16) for model in (fused, layers)]
    ours, theirs = ({name: error(each[name], expected[name]) for name in expected} for each in found)
    assert found[0]["features"].dtype == torch.bfloat16
    weights = [name for name in expected if expected[name].ndim > 1]
    assert sum(ours[name] for name in weights) <= 1.2 * sum(theirs[name] for name in weights)
    assert all(ours[name] <= 3 * theirs[name] + 0.02 for name in expected), (ours, theirs)
    assert native_calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_parameters_of_their_own_type(dtype):
    plain, fused = pair()
    fused.to(dtype)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(4, 3, 32, 32, dtype=dtype)
    found = results(fused, x)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert_near_weights(found, results(plain, x.double()), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kernel_size", [4, 5])
def test_checkpointing_changes_no_bit(dtype, kernel_size):
    _, fused = pair(kernel_size=kernel_size)
    twin = copy.deepcopy(fused)
    twin.set_grad_checkpointing()
    x = torch.randn(3, 3, 20, 36)
    first, second = results(fused, x, dtype), results(twin, x, dtype)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_same_threads_give_the_same_bits(dtype):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            _, fused = pair()
            twin = copy.deepcopy(fused)
            x = torch.randn(5, 3, 36, 32)
            first, second = results(fused, x, dtype), results(twin, x, dtype)
            assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_after_several_steps(momentum):
    models = pair()
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    for _ in range(3):
        x = torch.randn(3, 3, 20, 24, dtype=torch.float64)
        for model in models:
            results(model, x.to(model.stem[0].weight.dtype))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 1e-3 * parameter.grad
    for (name, theirs), ours in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert error(ours, theirs) <= 1e-4, name
    for model in models:
        model.eval()
    with torch.no_grad():
        assert error(models[1](x.float()), models[0](x)) <= 1e-4
    assert_near(results(models[1], x.float()), results(models[0], x), 1e-4)


def test_each_batchnorm_has_its_own_mode(native_calls):
    models = pair()
    for model in models:
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        norms[0].eval()
        norms[3].eval()
        norms[1].track_running_stats = False
        norms[1].running_mean = norms[1].running_var = norms[1].num_batches_tracked = None
        norms[2].weight = norms[2].bias = None
        norms[4].eps = 0.1
        norms[4].track_running_stats = False  # and the statistics stay where they are
    x = torch.randn(3, 3, 20, 24, dtype=torch.float64)
    assert_near(results(models[1], x.float()), results(models[0], x), 1e-4)
    for name, theirs in models[0].state_dict().items():
        assert error(models[1].state_dict()[name], theirs) <= 1e-4, name
    assert native_calls["backward"] == 1


def test_frozen_parameters_get_no_gradient():
    plain, fused = pair()
    for model in (plain, fused):
        model.stem.requires_grad_(False)
        model.blocks[1][1].bias.requires_grad_(False)
    x = torch.randn(3, 3, 20, 24, dtype=torch.float64)
    assert_near(results(fused, x.float()), results(plain, x), 1e-4)


def test_statistics_far_from_zero():
    plain, fused = pair(kernel_size=1, act_layer="relu")
    for model in (plain, fused):
        model.stem[0].bias.data += 3000.0
        model.stem[2].bias.data += 3000.0
    x = torch.randn(8, 3, 16, 16)
    assert error(fused(x), plain(x.double())) <= 1e-3


def test_memory_is_used_again():
    _, fused = pair()
    x = torch.randn(4, 3, 32, 32)
    native._free.clear()
    results(fused, x)
    first = {id(region) for region in native._free}
    results(fused, x)
    assert {id(region) for region in native._free} == first
    assert len(first) == 2  # what is kept, and the gradient of a feature map
    results(fused, torch.randn(16, 3, 32, 32))
    assert len(native._free) == 2  # what is too small goes


def test_too_little_memory(monkeypatch):
    _, fused = pair()
    native._free.clear()

    def none(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(native.mmap, "mmap", none)
    with pytest.raises(
        ConvMixerError, match=r"1 MiB for feature maps cannot be allocated .Cannot allocate.*fewer images"
    ):
        fused(torch.randn(4, 3, 32, 32))


def test_two_forward_passes_before_their_backward_passes():
    plain, fused = pair()
    inputs = [torch.randn(2, 3, 20, 20, dtype=torch.float64) for _ in range(2)]
    for model in (plain, fused):
        losses = [model(x.to(model.stem[0].weight.dtype)).square().sum() for x in inputs]
        for loss in losses:
            loss.backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert error(a.grad, b.grad) <= 1e-4, name


def test_what_they_do_not_take_runs_on_pytorch(native_calls, caplog):
    caplog.set_level(logging.INFO, "convmixer.native.training")
    native._log_choice.cache_clear()
    _, fused = pair()
    x = torch.randn(2, 3, 12, 12)
    fused.forward_intermediates(x, [0, 1])
    fused(x.clone().requires_grad_())
    fused.double()(x.double())
    _, wide = pair(kernel_size=17)
    wide(x)
    _, none = pair(act_layer="identity")
    none(x)
    native.set_native_training(False)
    try:
        fused.float()(x)
    finally:
        native.set_native_training(True)
    assert native_calls["forward"] == 0
    fused(x)
    assert native_calls["forward"] == 1
    told = [record.getMessage().split(": ", 1)[-1] for record in caplog.records]
    assert told[:-1] == [
        "features of several blocks are wanted, and the native kernels give the last one's",
        "a gradient of the images is wanted, which the native kernels do not compute",
        "the native kernels compute in float32 and bfloat16, not torch.float64",
        "the native kernels take one kernel size from 1 to 15, this model has [17, 17]",
        "the native kernels take GELU and ReLU, this model has Identity",
        "set_native_training(False) was called",
    ]
    units = "AMX" if native.kernels().convmixer_tiles() else "AVX-512"
    assert told[-1] == f"fused blocks in torch.float32 run on native kernels, on {units}"


def test_one_value_per_channel():
    _, fused = pair()
    with pytest.raises(ArgumentError, match=r"more than 1 value per channel, and features of shape \(1, 32, 1, 1\)"):
        fused(torch.randn(1, 3, 2, 2))


def test_second_derivatives_are_refused():
    _, fused = pair()
    loss = fused(torch.randn(2, 3, 12, 12)).square().sum()
    grads = torch.autograd.grad(loss, list(fused.parameters()), create_graph=True)
    with pytest.raises(ConvMixerError, match=r"only first derivatives"):
        grads[0].sum().backward()


def test_auto(caplog):
    caplog.set_level(logging.INFO, "convmixer.model")
    model = ConvMixer(**SHAPE)
    model.set_fused("auto")
    assert model.fused
    other = ConvMixer(**SHAPE, act_layer="identity")
    other.set_fused("auto")
    assert not other.fused
    assert [record.getMessage() for record in caplog.records] == [
        "fused='auto': on, by native kernels",
        "fused='auto': off, on cpu: the native kernels take GELU and ReLU, this model has Identity",
    ]


def test_losses_go_down_as_with_layers_in_float32():
    losses = []
    for fused in (False, True):
        torch.manual_seed(3)
        model = ConvMixer(32, 2, 3, 1, in_chans=1, num_classes=10)
        model.set_fused(fused)
        losses.append(loss_after_200_steps(model, bfloat16=fused))  # in float32 losses vary less
    assert losses[1] == pytest.approx(losses[0], abs=0.03)
    assert losses[0] < 0.8


WITHOUT_TILES = """
import ctypes, sys
sys.path[:0] = sys.argv[1:3]
libc = ctypes.CDLL(None, use_errno=True)

class Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]

class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint16), ("filters", ctypes.POINTER(Filter))]

# seccomp: arch_prctl(ARCH_REQ_XCOMP_PERM, ...) fails, as where a system does not permit AMX.
filters = (Filter * 6)((0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023),
                       (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000))
libc.prctl(38, 1, 0, 0, 0)
if libc.prctl(22, 2, ctypes.byref(Program(6, filters)), 0, 0):
    sys.exit("no seccomp")
import torch
from convmixer.native import training as native
import test_native_training as tests
assert not native.kernels().convmixer_tiles()
torch.manual_seed(0)
for changes, size in tests.CASES[:3]:
    plain, fused = tests.pair(**changes)
    x = torch.randn(size, dtype=torch.float64)
    expected = tests.results(plain, x)
    for dtype, tolerance in tests.TOLERANCES.items():
        tests.assert_near_weights(tests.results(fused, x.float(), dtype), expected, tolerance)
print("computed")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp is Linux's")
def test_without_amx():
    """Where the system refuses AMX, the kernels for AVX-512 compute maps of both types."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", WITHOUT_TILES, str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "no seccomp" in done.stderr:
        pytest.skip("this system permits no seccomp filters")
    assert done.stdout.strip() == "computed", done.stderr


def test_without_a_compiler(monkeypatch, caplog):
    """Fused blocks run on PyTorch then, and the log says why, once."""
    caplog.set_level(logging.INFO, "convmixer.native.training")
    monkeypatch.setattr(library, "compiler", lambda: None)
    for function in (native.kernels, native._lacking, native._log_choice):
        function.cache_clear()
    try:
        plain, fused = pair()
        x = torch.randn(2, 3, 12, 12)
        for _ in range(2):
            assert error(fused(x), plain(x.double())) <= 1e-4
    finally:
        for function in (native.kernels, native._lacking, native._log_choice):
            function.cache_clear()
    (record,) = caplog.records
    assert re.search("run on PyTorch: native needs a C\\+\\+ compiler on a CPU, and there is none", record.getMessage())


FORKED = """
import os, torch
from convmixer import ConvMixer
torch.set_num_threads(2)
model = ConvMixer(32, 1, 3, 1)
model.set_fused()
x = torch.randn(2, 3, 8, 8)
expected = model.forward_features(x).detach()
child = os.fork()
if not child:
    os._exit(not torch.allclose(model.forward_features(x), expected, atol=1e-4))
print("equal" if os.waitpid(child, 0)[1] == 0 else "different")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_by_fork_computes():
    """Where OpenMP would wait for threads that are gone."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "equal", done.stderr


def test_compiled_where_nothing_has_a_gradient():
    """As in validation, where the backbone is frozen, and where statistics are computed anew."""
    if lacking := convmixer.ops.fused.cannot_compile():
        pytest.skip(lacking)
    torch._dynamo.reset()
    plain, fused = pair(depth=1)
    run = torch.compile(fused.forward_features, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    for training, mode in itertools.product((True, False), (torch.no_grad, torch.inference_mode)):
        fused.train(training), plain.train(training)
        with mode():
            assert error(run(x.float()), plain.forward_features(x)) <= 1e-5
    for model in fused, plain:
        model.train().requires_grad_(False)
    assert error(run(x.float()), plain.forward_features(x)) <= 1e-5
    for key, value in fused.state_dict().items():
        assert error(value, plain.state_dict()[key]) <= 1e-5, key


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64])
def test_images_that_are_no_floating_point_are_refused_as_by_layers(native_calls, dtype):
    _, fused = pair(depth=1)
    with autocast(torch.bfloat16), pytest.raises(RuntimeError, match="type"):
        fused(torch.ones(2, 3, 12, 12, dtype=dtype))
    assert not native_calls["forward"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic):
    if lacking := convmixer.ops.fused.cannot_compile():
        pytest.skip(lacking)
    torch._dynamo.reset()
    plain, fused = pair(depth=1)
    run = torch.compile(fused.forward_features, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((2, 3, 12, 12), (3, 3, 14, 12)):
        x = torch.randn(size, dtype=torch.float64)
        for model, call in ((fused, run), (plain, plain.forward_features)):
            model.zero_grad()
            y = call(x.to(model.stem[0].weight.dtype))
            (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
            assert b.grad is None or error(a.grad, b.grad) <= 1e-4, name


def test_no_images():
    """As an empty split gives them."""
    plain, fused = pair()
    x = torch.empty(0, 3, 12, 12)
    with torch.no_grad():
        assert fused.eval()(x).shape == plain.eval()(x.double()).shape == (0, 7)


@pytest.mark.parametrize("march", ["skylake-avx512", "cooperlake", "sapphirerapids"])
def test_processors_without_this_one_s_instructions(march):
    """AVX-512 alone, with bfloat16, and with AMX: the sources compile for each."""
    flags = [flag for flag in library.FLAGS if flag not in ("-march=native", "-shared")]
    for source in (native.SOURCES[0], library.SOURCES[0]):
        command = [library.compiler(), *flags, f"-march={march}", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [(2, 4, 12, 12), (2, 1, 12, 12), (2, 3, 1, 12), (2, 3, 12)])
@pytest.mark.parametrize("compiled", [False, True])
def test_images_that_do_not_fit_the_stem(native_calls, size, compiled):
    _, fused = pair()
    torch._dynamo.reset()
    call = torch.compile(fused, backend="aot_eager") if compiled else fused
    with pytest.raises(Exception, match=r"."):  # PyTorch's or ours; a crash is what must not be
        call(torch.randn(size))
    assert native_calls["forward"] == 0


def test_layers_of_other_widths(native_calls):
    """As structural pruning leaves them: PyTorch computes them."""
    plain, fused = pair()
    for model in (plain, fused):
        dtype = model.head.weight.dtype
        model.blocks[1][1] = nn.Conv2d(32, 48, 1, dtype=dtype)
        model.blocks[1][3] = nn.BatchNorm2d(48, dtype=dtype)
        model.head = nn.Linear(48, 7, dtype=dtype)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 12, 12)
    assert_near({"features": fused(x)}, {"features": plain(x.double())}, 3e-5)
    assert native_calls["forward"] == 0
    assert "32 channels in every layer" in native.refusal(fused.stem, fused.blocks, torch.float32)


def test_no_images_in_training():
    _, fused = pair()
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ArgumentError, match=r"more than 1 value per channel, .* have 0: give more images"):
        fused(torch.empty(0, 3, 12, 12))
    assert all(torch.equal(before[name], tensor) for name, tensor in fused.state_dict().items())


def test_memory_is_given_back():
    _, fused = pair()
    fused(torch.randn(2, 3, 12, 12)).sum().backward()
    native.set_native_training(False)
    try:
        assert not native._free
    finally:
        native.set_native_training(True)
