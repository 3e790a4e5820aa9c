"""Optimized models in each runtime against the original, which is the oracle throughout."""

import copy
import importlib.util
import json
import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from command import run
from runtimes import HAS_NATIVE, HAS_NATIVE_INT8, NO_NATIVE, error, make

import convmixer
from convmixer import optimize
from convmixer.errors import ArgumentError, ConvMixerError, DependencyError, ImageError
from convmixer.hardware import bf16_is_faster, l2_cache
from convmixer.model import DepthwiseConv2d
from convmixer.runtime import choose
from convmixer.runtime import native as native_backend
from convmixer.runtime.choose import available_backends, candidates, find_backend
from convmixer.runtime.chunks import chunk_sizes, fitting_chunk
from convmixer.runtime.folding import FoldedConvMixer
from convmixer.runtime.optimized_model import OptimizedConvMixer
from convmixer.runtime.quantize import calibration_images

RUNTIMES = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"no {name}"))
    for name in ("openvino", "onnxruntime")
]
FOREIGN = [*RUNTIMES]
RUNTIMES.append(pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)))


@pytest.fixture(scope="module")
def shared():
    """A model, and its copies per runtime with chunks of at most four images."""
    torch.manual_seed(0)
    model = make()
    found = [name for name in ("openvino", "onnxruntime") if importlib.util.find_spec(name)]
    copies = {name: optimize(model, backend=name, chunk=4, threads=2) for name in found}
    return model, copies | ({"native": optimize(model, backend="native", threads=2)} if HAS_NATIVE else {})


# ---- equal outputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", RUNTIMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 6, 10), (3, 9, 8), (11, 8, 8), (16, 2, 3)])
@torch.no_grad()
def test_any_batch_and_image_size(shared, backend, shape):
    model, fast = shared[0], shared[1][backend]
    x = torch.randn(shape[0], 3, *shape[1:])
    assert error(fast(x), model(x)) < 1e-5
    strided = x.contiguous(memory_format=torch.channels_last)[:, :, ::1].flip(3)
    assert error(fast(strided), model(strided)) < 1e-5


@pytest.mark.parametrize("backend", RUNTIMES)
@torch.no_grad()
def test_types_of_images(shared, backend):
    model, fast = shared[0], shared[1][backend]
    x = torch.randn(2, 3, 8, 8)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        result = fast(x.to(dtype))
        assert result.dtype == dtype
        assert error(result.float(), model(x)) < 4 * torch.finfo(dtype).eps + 1e-5
    with torch.inference_mode():
        assert error(fast(x), model(x)) < 1e-5
    assert not fast(x.requires_grad_()).requires_grad
    assert fast(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("backend", RUNTIMES)
def test_threads(shared, backend):
    fast = shared[1][backend]
    images = [torch.randn(n, 3, size, 8) for n, size in ((1, 4), (2, 8), (5, 6), (9, 8))] * 6
    expected = [fast(x) for x in images]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(fast, images))
    assert all(error(a, b) < 1e-6 for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("backend", RUNTIMES)
@torch.no_grad()
def test_kernels_patches_and_channels(backend):
    model = make(kernel_size=4, patch_size=3, in_chans=5, act_layer="relu", num_classes=0)
    x = torch.randn(3, 5, 13, 10)
    assert error(optimize(model, backend=backend)(x), model(x)) < 1e-5


@pytest.mark.parametrize("backend", FOREIGN)
@torch.no_grad()
def test_features_only(backend):
    options = {"dim": 16, "depth": 3, "features_only": True, "out_indices": (0, 2), "device": "cpu"}
    backbone = convmixer.create_model("convmixer_256_8", **options).eval()
    fast = optimize(backbone, backend=backend, chunk=2, threads=2)
    x = torch.randn(5, 3, 16, 16)
    for a, b in zip(fast(x), backbone(x), strict=True):
        assert error(a, b) < 1e-5
    assert fast.feature_info.channels() == [16, 16]


@pytest.mark.parametrize("backend", RUNTIMES)
def test_predict(backend, cat):
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    expected = convmixer.predict(model, cat, topk=10)
    got = convmixer.predict(optimize(model, backend=backend, normalization=True), cat, topk=10)
    assert [label for label, _ in got] == [label for label, _ in expected]
    assert [p for _, p in got] == pytest.approx([p for _, p in expected], abs=1e-4)


def test_models_that_native_does_not_take():
    if not HAS_NATIVE:
        pytest.skip(NO_NATIVE)
    for changes, text in (
        ({"dim": 96}, "native takes models whose dim is a multiple of 64, this one has 96"),
        ({"act_layer": "gelu_tanh"}, "native takes the activations gelu and relu, this model has GELUTanh"),
    ):
        with pytest.raises(ArgumentError, match=text):
            optimize(make(**changes), backend="native")
        found, _ = candidates("auto", make(**changes), torch.device("cpu"), torch.float32)
        assert "native" not in {backend.name for backend in found}
    for place, layer, text in (
        ("blocks.1.2", torch.nn.ReLU(), "native takes one activation in all layers, this model has gelu and relu"),
        ("blocks.0.0.fn.1", torch.nn.GELU("tanh"), "native takes the activations gelu and relu, .*tanh"),
        (
            "blocks.1.0.fn.0",
            DepthwiseConv2d(64, 64, 7, groups=64),
            "native takes one kernel size in all blocks, this model has 5, 7",
        ),
    ):
        model = make(depth=2)
        model.set_submodule(place, layer)
        with pytest.raises(ArgumentError, match=text):
            optimize(model, backend="native")
        found, _ = candidates("auto", model, torch.device("cpu"), torch.float32)
        assert "native" not in {backend.name for backend in found}
    with pytest.raises(ArgumentError, match="chunk=4: native computes single images; leave it out"):
        optimize(make(), backend="native", chunk=4)
    backbone = convmixer.create_model("convmixer_256_8", features_only=True, device="cpu")
    with pytest.raises(ArgumentError, match="native returns only the last output: use another backend"):
        optimize(backbone, backend="native")


@torch.no_grad()
def test_bfloat16_in_openvino():
    pytest.importorskip("openvino")
    if not bf16_is_faster(torch.device("cpu")):
        with pytest.raises(ArgumentError, match=r"dtype=torch\.bfloat16: openvino finds no matrix multiplication"):
            optimize(make(), backend="openvino", dtype=torch.bfloat16)
        return
    model, x = make(), torch.randn(4, 3, 12, 12)
    fast = optimize(model, backend="openvino", dtype=torch.bfloat16)
    assert 1e-5 < error(fast(x), model(x)) < 0.03
    assert fast.choice.dtype == "bfloat16"


@pytest.mark.parametrize(
    "backend",
    [
        *RUNTIMES,
        pytest.param(
            "compile", marks=pytest.mark.skipif(bool(find_backend("compile").missing()), reason="no compiler")
        ),
    ],
)
def test_autocast_changes_nothing(backend):
    """Nor does it stay in what is compiled at the first call."""
    model = make()
    fast, x = optimize(model, backend=backend), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    for enabled in True, False:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = fast(x)
        assert found.dtype == torch.float32
        assert error(found, expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):  # while it is converted
        fast = optimize(model, backend=backend)
    assert error(fast(x), expected) < 1e-5


@pytest.mark.skipif(find_backend("compile").missing() is not None, reason="no C++ compiler")
@torch.no_grad()
def test_compile():
    model = make(depth=1)
    fast = optimize(model, backend="compile", chunk=2)
    torch._dynamo.reset()
    x = torch.randn(2 * torch.get_num_threads(), 3, 8, 8)
    assert error(fast(x), model(x)) < 1e-5
    with torch.inference_mode():
        assert error(fast(x * 1), model(x)) < 1e-5
    torch.export.export(fast.folded, (x,))


# ---- int8 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def turned(cat):
    """A photograph turned and resized as a model takes it, and a folder of such."""
    from PIL import Image

    photo = Image.open(cat).convert("RGB")
    return [photo.rotate(45 * i).resize((32, 32)) for i in range(8)]


INT8 = [
    pytest.param("openvino", marks=pytest.mark.skipif(not importlib.util.find_spec("nncf"), reason="needs nncf")),
    pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE_INT8, reason="needs AMX, AVX512-VBMI, a compiler")),
]


@torch.no_grad()
@pytest.mark.parametrize("backend", INT8)
def test_int8(turned, tmp_path, capfd, backend):
    model = convmixer.create_model("convmixer_256_8.cifar10", pretrained=True, device="cpu").eval()
    for i, image in enumerate(turned):
        file = tmp_path / "train" / "cat" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    x = torch.stack([convmixer.create_transform(model)(image) for image in turned])
    assert torch.equal(calibration_images(tmp_path, model).sum(0), x.sum(0))
    fast = optimize(model, backend=backend, dtype=torch.int8, calibration=x)
    assert 1e-4 < error(fast(x), model(x)) < (0.1 if backend == "native" else 0.2)
    assert fast.choice.dtype.startswith("int8")
    assert capfd.readouterr().out == ""  # it may be used where standard output is JSON
    if backend == "openvino":
        types = {op.get_element_type().get_type_name() for op in fast.runtime.model.get_ops() if op.get_output_size()}
        assert "i8" in types


@pytest.mark.skipif(not HAS_NATIVE_INT8, reason="needs AMX, AVX512-VBMI, a compiler")
def test_int8_by_rule():
    assert "native" in available_backends("cpu", torch.int8)
    x = torch.randn(2, 3, 8, 8)
    assert optimize(make(), backend="auto", dtype=torch.int8, calibration=x).choice.backend == "native"
    with pytest.raises(ArgumentError, match="native takes kernels of at most 13 in int8, this model has 15"):
        optimize(make(kernel_size=15), backend="native", dtype=torch.int8, calibration=x)


def test_int8_without_tiles(monkeypatch):
    monkeypatch.setattr(native_backend, "has_int8_tiles", lambda: False)
    with pytest.raises(ArgumentError, match="native computes in int8 on CPUs with AMX and AVX512-VBMI; use openvino"):
        optimize(make(), backend="native", dtype=torch.int8, calibration=torch.zeros(1, 3, 8, 8))


@torch.no_grad()
def test_int8_that_computes_something_else_is_refused(turned):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    model = convmixer.create_model("convmixer_256_8.cifar10", pretrained=True, device="cpu").eval()
    x = torch.stack([convmixer.create_transform(model)(image) for image in turned])
    expected = model(x)
    for i in range(0, 256, 2):  # what half of the channels carry shrinks, and what reads them grows: equal in floats
        model.stem[2].weight[i], model.stem[2].bias[i] = model.stem[2].weight[i] / 1e4, model.stem[2].bias[i] / 1e4
        residual, pointwise = model.blocks[0][0].fn, model.blocks[0][1]
        residual[0].weight[i] *= 1e4
        residual[2].weight[i] /= 1e4
        residual[2].bias[i] /= 1e4
        pointwise.weight[:, i] *= 1e4
    assert error(model(x), expected) < 1e-4
    with pytest.raises(
        ConvMixerError, match=r"int8 changes the outputs .* these weights do not fit eight bits. Use dtype=torch\.bf"
    ):
        optimize(model, backend="openvino", dtype=torch.int8, calibration=x)


def test_int8_needs_images():
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    with pytest.raises(ArgumentError, match=r"dtype=torch\.int8 needs images: give both"):
        optimize(make(), backend="openvino", dtype=torch.int8)
    with pytest.raises(ArgumentError, match=r"calibration is only for dtype=torch\.int8"):
        optimize(make(), calibration=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ArgumentError, match="calibration holds no images"):
        optimize(make(), backend="openvino", dtype=torch.int8, calibration=torch.zeros(0, 3, 8, 8))
    pixels = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    for images, text in (
        (
            pixels,
            r"calibration of torch\.uint8: give images as the model takes them",
        ),  # would be read as 0 to 255 deviations
        (pixels.long(), r"calibration of torch\.int64"),
        (torch.full((2, 3, 8, 8), torch.nan), "calibration holds NaN or infinity"),
        (pixels.float().numpy(), r"calibration is a numpy\.ndarray: give a tensor"),
        (list(pixels.float()), r"calibration is a builtins\.list: give a tensor"),
    ):
        with pytest.raises(ArgumentError, match=text):
            optimize(make(), backend="openvino", dtype=torch.int8, calibration=images)


# ---- choices --------------------------------------------------------------------------------------------------------


def test_eager_is_the_default():
    assert isinstance(optimize(make()), FoldedConvMixer)
    assert isinstance(optimize(make(), backend="eager"), FoldedConvMixer)


def test_auto_says_what_it_took(caplog):
    with caplog.at_level(logging.INFO, "convmixer.runtime.optimize"):
        fast = optimize(make(), backend="auto", dtype="auto")
    dtype = torch.bfloat16 if bf16_is_faster(torch.device("cpu")) else torch.float32
    found = available_backends("cpu", dtype)
    assert fast.choice.backend == found[0]
    assert fast.choice.dtype == str(dtype).removeprefix("torch.")
    assert f"by rule the fastest of {', '.join(found)}" in fast.choice.reason
    assert str(fast.choice) in caplog.text
    assert str(fast.choice) in repr(fast)


@pytest.mark.parametrize(("tiles", "backend"), [(False, "openvino"), (True, "native")])
def test_auto_for_wide_models(monkeypatch, tiles, backend):
    if not {"native", "openvino"} <= set(available_backends()):
        pytest.skip("needs both")
    monkeypatch.setattr(choose, "has_tiles", lambda: tiles)
    wide = convmixer.ConvMixer(576, 1, 3, 2, num_classes=2).eval()
    assert optimize(wide, backend="auto").choice.backend == backend


def test_auto_without_other_libraries(monkeypatch):
    found = importlib.util.find_spec
    absent = ("openvino", "onnxruntime")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else found(name, *a))
    monkeypatch.setenv("CXX", "no-such-compiler")
    model, x = make(), torch.randn(5, 3, 8, 8)
    fast = optimize(model, backend="auto", chunk=2)
    assert fast.choice.backend == "eager"
    assert "pip install 'convmixer[export]'" in fast.choice.reason
    with torch.no_grad():
        assert error(fast(x), model(x)) < 1e-5
    for backend, text in {
        "openvino": "openvino needs openvino, which is missing: pip install 'convmixer[export]'",
        "native": "native needs a C++ compiler on a CPU, and CXX='no-such-compiler' is not the name or the path of a",
        "compile": "compile needs a C++ compiler on a CPU, and CXX='no-such-compiler' is not the name or the path",
    }.items():
        with pytest.raises(DependencyError, match=re.escape(text)):
            optimize(model, backend=backend)
    with pytest.raises(DependencyError, match=r"onnxruntime needs onnxruntime.*: pip install 'convmixer\[export\]'"):
        optimize(model, backend="onnxruntime")


@pytest.mark.parametrize("backend", FOREIGN)
def test_measured_choice(backend):
    fast = optimize(make(), backend=backend, example=torch.randn(8, 3, 8, 8), threads=2)
    assert re.match(rf"fastest for \(8, 3, 8, 8\): {backend} in chunks of at most \d+ images \d", fast.choice.reason)


def test_eager_takes_part_in_measurements(monkeypatch):
    monkeypatch.setattr(choose, "available_backends", lambda *_: ("eager",))
    fast = optimize(make(), backend="auto", example=torch.randn(8, 3, 8, 8))
    assert isinstance(fast, OptimizedConvMixer)
    assert fast.choice.backend == "eager"


def test_auto_goes_on_where_a_library_fails(monkeypatch):
    def fail(*_):
        raise DependencyError("the compiler is broken")

    monkeypatch.setattr(choose, "available_backends", lambda *_: ("native", "eager"))
    monkeypatch.setattr(native_backend, "Native", fail)
    for example in (None, torch.randn(2, 3, 8, 8)):
        fast = optimize(make(), backend="auto", example=example)
        assert fast.choice.backend == "eager"
        assert fast.choice.reason.endswith("; the compiler is broken")


def test_no_backend_can_be_built(monkeypatch):
    def fail(*_):
        raise DependencyError("the compiler is broken")

    monkeypatch.setattr(choose, "available_backends", lambda *_: ("native", "native"))
    monkeypatch.setattr(native_backend, "Native", fail)
    text = "no backend can be built: the compiler is broken; the compiler is broken"
    with pytest.raises(DependencyError, match=text):
        optimize(make(), backend="auto", example=torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 64, 65, 1017])
@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_chunk_sizes(batch, chunk, threads):
    sizes = chunk_sizes(batch, chunk, threads)
    assert sum(sizes) == batch
    assert max(sizes) <= chunk
    assert len(sizes) >= min(batch, threads)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) <= max(chunk, 2).bit_length() + 1


def test_fitting_chunk(tmp_path):
    assert l2_cache() >= 2**16
    for level, size in ((1, "48K"), (2, "2048K"), (3, "64M")):
        folder = tmp_path / f"index{level}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    assert l2_cache(tmp_path) == 2**21
    assert l2_cache(tmp_path / "none") == 2**20
    assert fitting_chunk(1, l2_cache() // 8, 2) == 4
    assert fitting_chunk(1536, 32 * 32 * 100, 4) == 1


# ---- the command line -----------------------------------------------------------------------------------------------


def test_validate_measures_twice(cat, tmp_path):
    (tmp_path / "test" / "cat").mkdir(parents=True)
    shutil.copy(cat, tmp_path / "test" / "cat")
    options = ("validate", "convmixer_256_8", "--data", tmp_path, "--device", "cpu")
    record = json.loads(run(*options, "--backend", "eager", "--json").stdout)
    assert record["optimized"]["loss"] == pytest.approx(record["loss"], abs=1e-4)
    assert record["optimized"]["top1"] == record["top1"] == 100
    assert "top-1 changed by +0.00 points" in run(*options, "--backend", "eager").stdout
    assert "add --backend auto" in run(*options, "--int8", status=2).stderr
    assert "dtype=torch.int8: give a floating" in run(*options, "--int8", "--backend", "compile", status=2).stderr


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"backend": "tensorrt"},
            "unknown backend 'tensorrt'; valid: auto, eager, compile, openvino, onnxruntime, native",
        ),
        ({"backend": "auto", "chunk": 0}, "chunk=0: give a whole number of at least 1, or None"),
        ({"backend": "auto", "threads": True}, "threads=True: give a whole number of at least 1, or None"),
        ({"backend": "compile", "threads": 2}, "threads is not for backend='compile', which takes PyTorch's"),
        ({"backend": "compile", "dtype": torch.int8}, "dtype=torch.int8: give a floating point type such as"),
        ({"backend": "onnxruntime", "dtype": torch.bfloat16}, "only in float32; use openvino or compile"),
        ({"backend": "openvino", "dtype": torch.float64}, "openvino computes in float32, bfloat16, float16 or int8"),
        ({"chunk": 4}, "chunk, threads and example need a backend other than 'eager'"),
        ({"dtype": "brain16"}, "dtype='brain16': give a floating point type"),
    ],
)
def test_arguments(arguments, text):
    with pytest.raises(ArgumentError, match=re.escape(text)):
        optimize(make(), **arguments)


@pytest.mark.parametrize(
    ("example", "error", "text"),
    [
        (torch.zeros(3, 16, 16), ImageError, r"a batch of images \(B, 3, H, W\) is needed"),
        (torch.zeros(2, 3, 1, 1), ImageError, "smaller than one 2x2 patch"),
        (torch.zeros(0, 3, 16, 16), ArgumentError, r"example is one of shape \(0, 3, 16, 16\): give a tensor"),
        ([torch.zeros(2, 3, 16, 16)], ArgumentError, r"example is a builtins\.list: give a tensor"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_examples_that_do_not_fit(example, error, text, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    with pytest.raises(error, match=text):
        optimize(make(), backend=backend, example=example)


def test_inputs_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(choose, "available_backends", lambda *_: ("eager",))
    fast = optimize(make(), backend="auto")
    with pytest.raises(ImageError, match="has 4 channels, this model takes in_chans=3"):
        fast(torch.zeros(1, 4, 8, 8))
    with pytest.raises(
        ArgumentError, match=r"images of torch\.uint8 on cpu: this model takes floating point images on"
    ):
        fast(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ArgumentError, match="cannot be trained: train the original"):
        fast.train()
    assert fast.eval() is fast
    assert copy.deepcopy(fast.folded) is not fast.folded
