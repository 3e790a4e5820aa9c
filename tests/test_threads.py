"""One model in many threads: each answer is that of a single thread, and the model stays as it was, to the bit."""

import contextlib
import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import numpy as np
import pytest
import torch
from conftest import vary_norms
from PIL import Image
from torch.nn.utils import parametrizations, prune

import convmixer
from convmixer import plots
from convmixer.data.memory import load_images
from convmixer.errors import ArgumentError
from convmixer.evaluation import validate
from convmixer.model import evaluation_view
from convmixer.runtime.choose import available_backends
from convmixer.tracing import computing, quietly, tracing
from convmixer.training import evaluate

SMALL = {"dim": 64, "depth": 2, "kernel_size": 5, "patch_size": 2, "num_classes": 7, "device": "cpu"}


def make(**changes):
    """In training mode, as `create_model` hands it out."""
    model = convmixer.create_model("convmixer_256_8", **{**SMALL, **changes})
    vary_norms(model)
    return model


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(10)]


@contextlib.contextmanager
def unchanged(model):
    """Every tensor, where it lies, and every mode are the same after the block."""
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    yield
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, tensor in model.state_dict().items():
        pointer, before = state[name]
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, before), name


def in_threads(count, work, items):
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, items))


@pytest.mark.parametrize("fused", [False, True])
def test_predict(images, fused):
    model = make(fused=fused)
    model.blocks[0].eval()  # modes may be mixed
    expected = [convmixer.predict(copy.deepcopy(model), image) for image in images]
    with unchanged(model):
        got = in_threads(4, lambda _: [convmixer.predict(model, image) for image in images], range(4))
    assert got == [expected] * 4


def test_everything_at_once(images, tmp_path):
    model = make()
    for i, image in enumerate(images[:8]):
        file = tmp_path / "test" / f"{'ab'[i % 2]}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    data = load_images(tmp_path, "test", (3, 32, 32))
    x = torch.randn(3, 3, 16, 16)
    names = [*"abcdefg"]

    def validated():
        found = validate(model, tmp_path, classes=names)
        return found.loss, found.top1, found.classes

    def drawn():
        figure = plots.plot_class_activation(model, images[0], target=1)
        return figure.axes[1].images[-1].get_array().tolist()

    def optimized():
        with torch.no_grad():
            return convmixer.optimize(model)(x).tolist()

    works = [
        lambda: convmixer.predict(model, images[1]),
        lambda: evaluate(model, data),
        validated,
        lambda: plots.class_probabilities(model, data.pixels).tolist(),
        drawn,
        optimized,
    ]
    expected = [work() for work in works]
    with unchanged(model):
        got = in_threads(4, lambda i: works[i % len(works)](), range(4 * len(works)))
    assert got == expected * 4


def test_a_call_that_raises(images):
    model = make()

    def fail(_module, _inputs, _output):
        raise RuntimeError("a hook fails")

    handle = model.blocks[1].register_forward_hook(fail)
    with unchanged(model):
        for call in (
            lambda: convmixer.predict(model, images[0]),
            lambda: plots.class_probabilities(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
            lambda: plots.plot_class_activation(model, images[0]),
        ):
            with pytest.raises(RuntimeError, match="a hook fails"):
                call()
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_mode_is_not_switched_while_a_call_runs(images):
    """Another thread may be training."""
    model = make()
    seen = []
    model.stem.register_forward_hook(lambda *_: seen.append(all(m.training for m in model.modules())))
    convmixer.predict(model, images[0])
    assert seen == [True]


# ---- what a model may carry -----------------------------------------------------------------------------------------


def test_wrapped_models(images):
    model = make()
    expected = convmixer.predict(model, images[0])
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    pruned = copy.deepcopy(model)
    prune.identity(pruned.blocks[0][1], "weight")
    parametrized = copy.deepcopy(model)
    parametrizations.weight_norm(parametrized.blocks[0][1])
    replaced = copy.deepcopy(model)
    replaced.forward = MethodType(lambda self, x: self.forward_head(self.forward_features(x)), replaced)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for name in ("in_chans", "num_classes", "num_features", "pretrained_cfg"):
        setattr(traced, name, getattr(model, name))
    for given in (compiled, in_place, pruned, parametrized, replaced, traced):
        with unchanged(given):
            got = convmixer.predict(given, images[0])
        assert [label for label, _ in got] == [label for label, _ in expected]
        assert [p for _, p in got] == pytest.approx([p for _, p in expected], abs=1e-6)
    for given in (compiled, in_place):
        given(torch.zeros(2, 3, 8, 8)).sum().backward()  # still its own


def test_layers_that_are_shared_stay_shared(images):
    model = make()
    model.blocks[1] = model.blocks[0]
    expected = convmixer.predict(copy.deepcopy(model).eval(), images[0])
    assert convmixer.predict(model, images[0]) == expected
    view = evaluation_view(model)
    assert view.blocks[1] is view.blocks[0]
    assert [p.data_ptr() for p in view.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert evaluation_view(view) is view


def test_what_cannot_be_computed_aside():
    closed = make()
    forward = closed.forward
    closed.forward = lambda x: forward(x)
    scripted = torch.jit.script(make())
    for model in (closed, scripted):
        with pytest.raises(ArgumentError, match=r"whose computation cannot be put in evaluation mode .* call eval\(\)"):
            evaluation_view(model)
        model.eval()
        assert evaluation_view(model) is model


# ---- while another thread traces ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "fused"),
    [("openvino", True), ("onnxruntime", False), ("compile", False), ("native", False)],
)
def test_predictions_while_models_are_optimized(images, backend, fused):
    """Exporters and compilers change flags and methods of PyTorch for the whole process."""
    if backend not in available_backends("cpu"):
        pytest.skip(f"no {backend}")
    model = make(fused=fused, depth=1)
    x = torch.randn(2, 3, 8, 8)
    eager = convmixer.optimize(model)
    expected = convmixer.predict(model, images[:2]), convmixer.predict(eager, images[:2])
    done = threading.Event()

    def answer(_):
        got = []
        while not done.is_set() or not got:
            got.append((convmixer.predict(model, images[:2]), convmixer.predict(eager, images[:2])))
        return got

    def work(_):
        fast = convmixer.optimize(model, backend=backend)
        return fast(x), fast(x[:, :, :4])

    with unchanged(model), ThreadPoolExecutor(4) as threads:
        answers = threads.map(answer, range(2))
        try:
            made = list(threads.map(work, range(2)))
        finally:
            done.set()
        assert all(got == expected for many in answers for got in many)
    with torch.no_grad():
        for whole, part in made:
            assert torch.allclose(whole, eager(x), atol=1e-5)
            assert torch.allclose(part, eager(x[:, :, :4]), atol=1e-5)


def test_the_gate():
    """Many compute at a time, one traces alone; a call may trace in between without waiting for itself."""
    entered = []

    def compute(number):
        with computing():
            both.wait(60)
            with tracing(), computing(), tracing():
                entered.append(number)
                entered.append(number)
            with computing():
                return number

    both = threading.Barrier(2)
    assert in_threads(2, compute, range(2)) == [0, 1]
    assert entered in ([0, 0, 1, 1], [1, 1, 0, 0])
    with pytest.raises(ArgumentError), tracing():
        raise ArgumentError("what is raised inside comes out")
    with computing():
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_waits_for_nobody():
    held, release = threading.Event(), threading.Event()

    def hold(_):
        with tracing():
            held.set()
            release.wait(60)

    with ThreadPoolExecutor(1) as other:
        other.map(hold, [0])
        held.wait(60)
        pid = os.fork()
        if not pid:
            with computing(), tracing(), quietly():
                os._exit(7)
        release.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
