"""Optimized models that are copied, pickled and sent to other processes answer there as they did here."""

import copy
import gc
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import vary_norms
from torch.utils.data import DataLoader, Dataset

import convmixer
from convmixer.errors import ArgumentError, ConvMixerError, DependencyError
from convmixer.runtime import onnxruntime, openvino
from convmixer.runtime.choose import available_backends, find_backend
from convmixer.runtime.optimized_model import OptimizedConvMixer

CPU = [name for name in available_backends("cpu") if name != "compile"]
INT8 = available_backends("cpu", torch.int8)


def make(**changes):
    options = {"dim": 64, "depth": 2, "kernel_size": 3, "patch_size": 2, "num_classes": 5, "device": "cpu", **changes}
    model = convmixer.create_model("convmixer_256_8", **options).eval()
    vary_norms(model)
    return model


def kinds():
    """Each runtime and precision that this machine has, by name, made of the same model; and images."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 3, 8, 8)
    found = {name: convmixer.optimize(model, backend=name, threads=2) for name in CPU if name != "eager"}
    found["eager"] = convmixer.optimize(model)
    for name in INT8:
        found[f"{name} int8"] = convmixer.optimize(model, backend=name, dtype=torch.int8, calibration=x)
    return found, x


@pytest.fixture(scope="module")
def made():
    return kinds()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled, saved])
@torch.no_grad()
def test_copies(made, copied):
    models, x = made
    for name, model in models.items():
        expected = model(x), model(x[:1, :, :4])
        twin = copied(model)
        again = copied(twin)
        del twin
        gc.collect()
        for image, answer in zip((x, x[:1, :, :4]), expected, strict=True):
            assert torch.equal(again(image), answer), name
            assert torch.equal(model(image), answer), name
        if name != "eager":
            assert isinstance(again, OptimizedConvMixer)
            assert again.choice == model.choice
            if copied is not copy.copy:
                assert again.runtime is not model.runtime
                assert again.folded is not model.folded
            shared = getattr(again.runtime, "folded", again.folded)
            assert shared is again.folded  # once in memory, and once in the file


@torch.no_grad()
def test_runtimes_have_weights_of_their_own():
    """PyTorch moves the parameters of what is sent to another process, and frees where they were."""
    x = torch.randn(2, 3, 8, 8)
    for name in {"native", "openvino", "onnxruntime"} & set(CPU):
        fast = convmixer.optimize(make(num_classes=0), backend=name)
        expected = fast(x)
        for module in (fast.folded.stem, fast.folded.blocks):
            for tensor in module.state_dict().values():
                tensor.fill_(float("nan"))
        assert torch.equal(fast(x), expected), name
        assert fast(x[:1, :, :4]).isfinite().all()  # a shape that is compiled now


@pytest.mark.skipif(find_backend("compile").missing() is not None, reason="no C++ compiler")
@torch.no_grad()
def test_compiled():
    model, x = make(depth=1), torch.randn(2, 3, 8, 8)
    fast = convmixer.optimize(model, backend="compile")
    expected = fast(x)
    for twin in (copy.deepcopy(fast), pickled(fast)):
        assert torch.equal(twin(x), expected)


@torch.no_grad()
def test_feature_extractors():
    x = torch.randn(2, 3, 8, 8)
    for backend in {"eager", "openvino"} & set(CPU):
        fast = convmixer.optimize(make(features_only=True, out_indices=(0, 1)), backend=backend)
        for twin in (copy.deepcopy(fast), pickled(fast)):
            assert all(torch.equal(a, b) for a, b in zip(twin(x), fast(x), strict=True))


# ---- other processes ------------------------------------------------------------------------------------------------


class _Answers(Dataset):
    """What models answer to one batch, computed where the data set is read."""

    def __init__(self, models, x):
        self.models, self.x = models, x

    def __len__(self):
        return len(self.models)

    def __getitem__(self, i):
        with torch.no_grad():
            return os.getpid(), list(self.models.values())[i](self.x)


def _answer(models, x):
    with torch.no_grad():
        return os.getpid(), {name: model(x) for name, model in models.items()}


@torch.no_grad()
def test_spawned_process(made):
    models, x = made
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        process, answers = pool.apply(_answer, (models, x))
    assert process != os.getpid()
    assert all(torch.equal(answers[name], model(x)) for name, model in models.items())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # of Python 3.12
@pytest.mark.parametrize("start", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
@torch.no_grad()
def test_workers_of_a_data_loader(made, start):
    """By fork, the threads of each runtime stay behind in the parent, which has used them."""
    models, x = made
    if start == "fork":  # the next test is about OpenVINO
        models = {n: m for n, m in models.items() if not isinstance(getattr(m, "runtime", None), openvino.OpenVINO)}
    for model in models.values():
        model(x)
    loader = DataLoader(_Answers(models, x), batch_size=None, num_workers=1, multiprocessing_context=start, timeout=240)
    answers = list(loader)
    assert os.getpid() not in {process for process, _ in answers}
    for (name, model), (_, answer) in zip(models.items(), answers, strict=True):
        assert torch.allclose(answer, model(x), rtol=1e-5, atol=1e-6), name
        assert torch.equal(model(x), models[name](x))


MADE_IN_A_CHILD = """
import copy, os, pickle, torch
from convmixer import ConvMixer, optimize
torch.set_num_threads(2)
model, x = ConvMixer(64, 1, 3, 2, num_classes=3).eval(), torch.randn(2, 3, 8, 8)
fast = optimize(model, backend="native")
expected, pickled = fast(x), pickle.dumps(fast)
for make in (lambda: pickle.loads(pickled), lambda: copy.deepcopy(fast), lambda: optimize(model, backend="native")):
    child = os.fork()
    if not child:
        os._exit(not torch.equal(make()(x), expected))
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif("native" not in CPU or not hasattr(os, "fork"), reason="no native kernels, or no fork")
def test_native_models_made_in_a_forked_process():
    done = subprocess.run(
        [sys.executable, "-c", MADE_IN_A_CHILD], capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.split() == ["0"] * 3, done.stderr


@torch.no_grad()
def test_recorders_are_told_that_they_see_nothing():
    fast = convmixer.optimize(make(depth=1), backend=next(name for name in CPU if name != "eager"))
    with pytest.raises(ArgumentError, match=r"torch\.jit\.trace sees nothing of an optimized model: give it the orig"):
        torch.jit.trace(fast, torch.zeros(1, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # of Python 3.12
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_forked_process_has_no_openvino(made):
    """Where compiling can wait for ever for threads of the parent."""
    models, x = made
    if "openvino" not in models:
        pytest.skip("no OpenVINO")
    models["openvino"](x)
    answers = _Answers({"openvino": models["openvino"]}, x)
    loader = DataLoader(answers, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    with pytest.raises(ConvMixerError, match=r"OpenVINO cannot be used in a process that was forked.*by spawn"):
        list(loader)


def test_a_forked_process_has_no_gpu(made):
    name = next((name for name in made[0] if name != "eager"), None)
    if name is None:
        pytest.skip("no other backend")
    fast = copy.copy(made[0][name])
    fast.choice = replace(fast.choice, device="cuda:0")
    fast._process = -1
    with pytest.raises(ConvMixerError, match=r"a process that was forked: start it by spawn, as in DataLoader\(multi"):
        fast(made[1])


# ---- where they cannot go -------------------------------------------------------------------------------------------


def test_arrival_without_the_runtime(made, monkeypatch):
    def missing(module, what, extra):
        raise DependencyError(f"{what} needs {module}, which is missing: pip install 'convmixer[{extra}]'")

    files = {name: pickle.dumps(made[0][name]) for name in ("openvino", "onnxruntime") if name in made[0]}
    for module in (onnxruntime, openvino, openvino.openvino_core):
        monkeypatch.setattr(module, "optional", missing)
    for name, file in files.items():
        with pytest.raises(DependencyError, match=rf"{name} needs {name}, which is missing: pip install"):
            pickle.loads(file)


def test_what_was_compiled_stays_what_it_is(made):
    models, x = made
    for name, fast in models.items():
        if name == "eager":
            continue
        expected = fast(x)
        for change in (torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to("meta")):
            with pytest.raises(ArgumentError, match=r"stays what it is, .* on cpu: move or cast the original"):
                change(fast)
        with pytest.raises(ArgumentError, match="keeps its weights: load others into the original"):
            fast.load_state_dict(fast.state_dict())
        pipeline = torch.nn.Sequential(torch.nn.Identity(), fast)
        weights = pipeline.state_dict()
        pipeline.load_state_dict(weights)  # its own
        others = {key: tensor + 1 for key, tensor in weights.items()}
        with pytest.raises(ArgumentError, match="keeps its weights: load others into the original"):
            pipeline.load_state_dict(others)
        assert fast.to("cpu").float().eval().share_memory() is fast
        assert torch.equal(fast(x), expected)
