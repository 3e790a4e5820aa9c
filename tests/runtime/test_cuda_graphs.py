"""Captured steps and calls, by a stand-in on the CPU and by CUDA graphs where there is a GPU."""

import copy
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from capture import Tapes
from conftest import SMALL_MODEL
from PIL import Image

import convmixer
from convmixer.data.memory import Images
from convmixer.errors import ArgumentError
from convmixer.runtime import graph_cache
from convmixer.runtime.chunks import FixedChunk
from convmixer.runtime.compile import Compiled
from convmixer.runtime.cuda_graphs import WARM_UP, CudaGraphs, Graphed, Replayed
from convmixer.runtime.eager import Eager
from convmixer.training import get_recipe, train
from convmixer.training.checks import why_no_graph
from convmixer.training.machine import create_accelerator
from convmixer.training.precision import PRECISIONS
from convmixer.training.trainer import PartialEpoch, Trainer
from convmixer.training.validation import no_progress

pytestmark = pytest.mark.usefixtures("no_curves")
SMALL = {"epochs": 4, "batch_size": 16, "lr": 0.01, **SMALL_MODEL}
STEPS = 6  # an epoch


def _never(error: RuntimeError) -> None:
    raise error


# ---- capture --------------------------------------------------------------------------------------------------------


def test_a_graph_reads_and_writes_the_same_memory():
    total, calls = torch.zeros(3), []

    def add(x: torch.Tensor, *, factor: float) -> None:
        calls.append(1)
        total.add_(x * factor)

    step = Graphed(add, tapes := Tapes(), _never)
    expected = torch.zeros(3)
    for i in range(WARM_UP + 5):
        x = torch.full((3,), float(i))
        step(x, factor=2.0)
        x.fill_(99)  # the caller's memory is its own
        expected += 2.0 * i
        assert torch.equal(total, expected)
    assert len(calls) == WARM_UP + 1
    assert len(tapes.tapes) == 1


def test_the_stand_in_keeps_numbers_as_they_were():
    """As a CUDA graph does; else tests with it would not find a rate that is a number."""
    total, rate = torch.zeros(()), [1.0]
    step = Graphed(lambda x: total.add_(x, alpha=rate[0]), Tapes(), _never)
    for _ in range(WARM_UP + 1):
        step(torch.ones(()))
    rate[0] = 100.0
    step(torch.ones(()))
    assert total == WARM_UP + 2


def test_each_constant_has_a_graph_and_other_shapes_take_their_place():
    """A graph holds the memory of a whole step: it is gone before a step on other shapes needs as much."""
    seen, alive = [], []

    def record(x: torch.Tensor, *, last: bool) -> None:
        seen.append((*x.shape, last))
        alive.append(len(step.captured))

    step = Graphed(record, tapes := Tapes(), _never)
    for n in (1, 2, 1):
        for _ in range(WARM_UP + 2):
            for last in (False, True):
                step(torch.zeros(n), last=last)
    assert alive == [*[0] * 2 * WARM_UP, 0, 1] * 3
    assert seen[: 2 * WARM_UP] == [(1, False), (1, True)] * WARM_UP
    assert len(tapes.tapes) == 6


def test_a_failed_capture_has_left_its_memory_before_the_step_runs():
    kept, alive = [], []

    def step(x: torch.Tensor) -> None:
        alive.append(any(reference() is not None for reference in kept))
        if len(x) == 2 and len(alive) == 2 * (WARM_UP + 1):
            activations = x * 2
            kept.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("no memory")

    graphed = Graphed(step, Tapes(), lambda error: None)
    for n in (1, 2):
        for _ in range(WARM_UP + 1):
            graphed(torch.zeros(n))
    assert len(kept) == 1
    assert not alive[-1]
    assert not graphed.captured


def test_what_cannot_be_captured_goes_on_without():
    total, errors = torch.zeros(()), []

    def add(x: torch.Tensor) -> None:
        total.add_(x.sum().item())

    step = Graphed(add, Tapes(), errors.append)
    for i in range(WARM_UP + 4):
        step(torch.ones(2))
        assert total == 2 * (i + 1)
    assert [str(error) for error in errors] == ["the host reads a number during a capture"]


# ---- training -------------------------------------------------------------------------------------------------------


def _images() -> Images:
    pixels = torch.randint(256, (STEPS * 16 + 3, 3, 8, 8), dtype=torch.uint8)
    return Images(pixels, pixels.float().mean((1, 2, 3)).mul(0.7).long() % 3, ("a", "b", "c"))


def _trainer(tmp_path, graphs=None, device="cpu", precision="float32", **fields):
    options = {name: fields.pop(name, False) for name in ("compile", "fused")}
    recipe = get_recipe("cifar10", **{**SMALL, **fields})
    where = torch.device(device)
    accelerator = create_accelerator(where, (), tmp_path, PRECISIONS[precision])
    torch.manual_seed(7)
    trainer = Trainer(recipe, _images(), where, accelerator, graphs=graphs, not_captured=_never, **options)
    assert trainer.steps == STEPS
    return trainer


def _train(trainer: Trainer, epochs: int = 4, begin: int = 0) -> dict[str, torch.Tensor]:
    """Everything that a run keeps; losses are in it as "losses"."""
    losses = []
    for epoch in range(begin, begin + epochs):
        place, _ = trainer.epoch(epoch, PartialEpoch(), lambda: 0, no_progress)
        losses += [place.loss, place.correct]
    state = copy.deepcopy(trainer.state())
    kept = {f"{part}.{k}": v for part in ("model", "average") for k, v in (state[part] or {}).items()}
    for number, values in state["optimizer"]["state"].items():
        kept |= {f"optimizer.{number}.{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
    return kept | {"losses": torch.tensor(losses, dtype=torch.float64)}


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


RECIPES = {
    "adamw": {},
    "muon": {"opt": "muon", "eps": 1e-3, "weight_decay": 0.1, "ema_decay": 0.9, "clip_grad": 1.0},
    "sgd": {"opt": "sgd", "clip_grad": 0.1},
    "layers at their own rates": {"layer_decay": 0.5, "ema_decay": 0.5},
    "dropout, mixing": {"drop_rate": 0.2, "mixup": 0.5, "cutmix": 0.5, "label_smoothing": 0.1, "shift": 1},
    "two sizes": {"image_sizes": ((0.0, 6), (0.5, 8)), "drop_path_rate": 0.2},
}


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_captured_training_is_training_to_the_bit(tmp_path, fields):
    expected = _train(_trainer(tmp_path, **fields))
    found = _train(_trainer(tmp_path, tapes := Tapes(), **fields))
    _assert_equal(found, expected)
    assert len(tapes.tapes) == (2 if "image_sizes" in fields else 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_fused_blocks(tmp_path, precision):
    expected = _train(_trainer(tmp_path, fused=True, precision=precision))
    _assert_equal(_train(_trainer(tmp_path, Tapes(), fused=True, precision=precision)), expected)


def test_each_phase_has_a_graph(tmp_path):
    weights = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", depth=2, dim=16, num_classes=3)
    convmixer.save_pretrained(weights, tmp_path / "weights")
    fields = {"checkpoint": str(tmp_path / "weights" / "model.safetensors"), "frozen": 0.5, "opt": "muon"}
    expected = _train(_trainer(tmp_path, **fields))
    _assert_equal(_train(_trainer(tmp_path, tapes := Tapes(), **fields)), expected)
    assert len(tapes.tapes) == 2


@pytest.mark.parametrize("opt", ["adamw", "muon", "sgd", "lookahead_muon", "lion"])
def test_a_run_goes_on_where_another_stopped(tmp_path, opt):
    """Its first steps are eager; in the whole run they are replayed."""
    fields = {"opt": opt, "ema_decay": 0.9, "drop_rate": 0.1}
    graphs = None if opt in ("lookahead_muon", "lion") else Tapes
    whole = _train(_trainer(tmp_path, graphs and graphs(), **fields))
    first, second = (_trainer(tmp_path, graphs and graphs(), **fields) for _ in range(2))
    _train(first, 2)
    torch.save(first.state(), tmp_path / "state.pt")
    second.load(torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu"))
    rest = _train(second, 2, begin=2)
    assert torch.equal(whole.pop("losses")[4:], rest.pop("losses"))
    _assert_equal(rest, whole)


def test_training_on_a_gpu_goes_on_from_a_cpu(tmp_path):
    """What an optimizer of this device needs is not what the file says."""
    first, second = _trainer(tmp_path), _trainer(tmp_path)
    _train(first, 1)
    state = copy.deepcopy(first.state())
    for group in state["optimizer"]["param_groups"]:
        group |= {"fused": None, "capturable": False, "lr": 0.1}
    second.load(state)
    assert {group["fused"] for group in second.optimizer.param_groups} == {True}
    _assert_equal(_train(second, 1, begin=1), _train(first, 1, begin=1))


def test_a_state_that_does_not_fit_is_named(tmp_path):
    folder = tmp_path / "data"
    for i in range(32):
        (folder / "train" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (8 * i, 0, 0)).save(folder / "train" / f"{i % 2}" / f"{i}.png")
    recipe = get_recipe("cifar10", **{**SMALL, "epochs": 1, "validation_fraction": 0.0})
    train(recipe, folder, tmp_path / "run", device="cpu", report=lambda line: None)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["optimizer"]["param_groups"].pop()
    torch.save(state, tmp_path / "run" / "last.pt")
    with pytest.raises(convmixer.ConvMixerError, match=r"cannot resume from .*groups\. Another version .* start again"):
        train(recipe.override(epochs=2), folder, tmp_path / "run", device="cpu", resume=True, report=lambda _: None)


def test_a_graph_that_cannot_be_is_refused(tmp_path):
    recipe = get_recipe("cifar10", **SMALL)
    for graph, text in (
        (True, r"graph=True: 'cpu' is not a CUDA device; give 'auto', or False \(--no-graph\)"),
        ("yes", "graph='yes'; valid: True, False, 'auto'"),
    ):
        with pytest.raises(ArgumentError, match=text):
            train(recipe, "nowhere", tmp_path / "run", device="cpu", graph=graph)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "precision", "processes", "text"),
    [
        ({}, "bfloat16", 1, ""),
        ({"opt": "muon"}, "float32", 1, ""),
        ({}, "float32", 2, "2 processes exchange gradients within a step"),
        ({"accumulate": 2}, "float32", 1, "accumulate=2 makes several passes in a step"),
        ({}, "float16", 1, "float16 checks its gradients on the host"),
        ({"opt": "lion"}, "float32", 1, "the optimizer 'lion' keeps numbers on the host"),
        ({"opt": "lookahead_adamw"}, "float32", 1, "the optimizer 'lookahead_adamw' keeps numbers on the host"),
    ],
)
def test_why_a_step_is_not_a_graph(fields, precision, processes, text):
    recipe = get_recipe("cifar10", **{**SMALL, **fields})
    assert why_no_graph(recipe, torch.device("cuda"), precision, processes) == text


def _read_in_each_step(trainer, monkeypatch) -> list[str]:
    """Let the host read a number, so that no step can be captured; what is told of it."""
    told: list[str] = []
    trainer.not_captured = lambda error: told.append(str(error))
    update = trainer._update

    def reads() -> None:
        trainer.sums[0].item()
        update()

    monkeypatch.setattr(trainer, "_update", reads)
    return told


def test_a_step_that_cannot_be_captured_still_runs(tmp_path, monkeypatch):
    expected = _train(_trainer(tmp_path, ema_decay=0.9))
    trainer = _trainer(tmp_path, Tapes(), ema_decay=0.9)
    told = _read_in_each_step(trainer, monkeypatch)
    _assert_equal(_train(trainer), expected)
    assert told == ["the host reads a number during a capture"]


# ---- inference ------------------------------------------------------------------------------------------------------


def _replayed(run, worth=lambda x: True):
    tapes = Tapes()
    return Replayed(run, worth, lambda _: tapes), lambda: len(tapes.tapes)


def _pooled(x):
    return [x.exp(), x.mean((2, 3))]


def test_calls_are_replayed_from_the_second_one_on():
    model, graphs = _replayed(_pooled)
    answers = []
    for i in range(5):
        x = torch.randn(2, 3, 4, 4)
        answers.append((model(x), _pooled(x)))
        assert graphs() == (i > 0)
    for found, expected in answers:  # what was returned stays, whatever was computed after it
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.inference_mode():
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(model(x)[0], x.exp())
    assert graphs() == 1
    model(x.double()), model(x.double())
    model(x[:1]), model(x[:1])
    assert graphs() == 3
    assert torch.equal(pickle.loads(pickle.dumps(Replayed(_pooled, torch.is_tensor)))(x)[0], x.exp())


def test_few_graphs_are_kept():
    model, graphs = _replayed(_pooled)
    for n in range(1, 2 * Replayed.most_graphs):
        for _ in range(2):
            model(torch.zeros(n, 1, 2, 2))
    assert len(model._calls) == Replayed.most_graphs
    model(torch.zeros(n, 1, 2, 2))
    assert graphs() == n


def test_what_is_not_worth_a_graph_or_cannot_be_captured_is_computed(caplog):
    model, graphs = _replayed(_pooled, lambda x: len(x) < 3)
    for _ in range(3):
        assert model(torch.ones(3, 1, 2, 2))[1].sum() == 3
    assert graphs() == 0
    model, _ = _replayed(lambda x: [x * x.sum().item()])
    for _ in range(3):
        assert model(torch.ones(3, 1, 2, 2))[0].sum() == 144
    assert [record.message for record in caplog.records if "replayed" in record.message] == [
        "calls are not replayed as CUDA graphs: the host reads a number during a capture"
    ]


def test_images_that_do_not_lie_next_to_each_other_where_a_capture_fails():
    """What a shape was bound to gets images laid out as those that it was bound for."""

    def bind(images):
        def compute(x):
            assert x.stride() == images.stride()
            return [x * x.sum().item()]

        return compute

    model = Replayed(lambda x: [x], lambda x: True, lambda device: Tapes(), bind)
    for _ in range(3):
        assert model(torch.ones(1, 4, 2, 2)[:, :3])[0].sum() in (12, 144)


def test_a_graph_owns_the_weights_that_it_reads():
    module = torch.nn.Conv2d(1, 1, 1, bias=False)
    bound = Eager(module).bind(torch.zeros(1, 1, 2, 2))
    old = module.weight.data_ptr()
    module.weight.data = module.weight.clone()  # as by .to(memory_format=...)
    assert old in {tensor.data_ptr() for tensor in bound.args[1]}
    assert torch.equal(bound(torch.ones(1, 1, 2, 2))[0], module(torch.ones(1, 1, 2, 2)))


def test_threads_share_graphs():
    model, _ = _replayed(_pooled)

    def differing(seed):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(1 + seed % 2, 3, 4, 4, generator=generator) for _ in range(20)]
        return sum(not torch.equal(model(x)[1], _pooled(x)[1]) for x in inputs)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(differing, range(8))) == 0


@pytest.mark.skipif("compile" not in convmixer.runtime.choose.available_backends("cpu"), reason="no C++ compiler")
def test_a_first_call_that_compiles_waits_for_no_other_thread():
    fast = convmixer.optimize(convmixer.ConvMixer(8, 1, 3, 2, num_classes=3).eval(), backend="compile")
    fast.runtime = Replayed(fast.runtime, lambda x: True, Tapes)
    x, together = torch.rand(1, 3, 8, 8), threading.Barrier(3)

    def call(_):
        together.wait()
        return [fast(x) for _ in range(4)]

    with ThreadPoolExecutor(3) as pool:
        answers = [answer for found in pool.map(call, range(3), timeout=120) for answer in found]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("batch", [2, 5])  # one chunk, and three of two sizes
def test_weights_live_as_long_as_a_graph_that_reads_them(monkeypatch, batch):
    """What `Compiled` drops takes its frozen weights with it, and a CUDA graph would read what comes into their memory.

    Neither is it compiled again for the capture, which holds a lock that other threads wait for.
    """

    class Graph:
        def __init__(self, key):
            self.weight = torch.full((), float(key[0][0]))

        def __call__(self, x):
            return x * self.weight

    made = []

    def compile_graph(*key):
        made.append(weakref.ref(graph := Graph(key)))
        return graph

    monkeypatch.setattr(graph_cache, "MOST_GRAPHS", 4)
    monkeypatch.setattr(Compiled, "_compile", lambda self, *key: compile_graph(*key))
    compiled = Compiled(torch.nn.Identity(), FixedChunk(2))
    replayed = Replayed(compiled, lambda x: len(x) == batch, Tapes, compiled.bind)
    x = torch.rand(batch, 1, 4, 4)
    expected = replayed(x)[0]
    count = len(made)
    for side in range(5, 10):  # more shapes than are kept
        compiled(torch.rand(1, 1, side, side))
    assert made[-5]() is None  # as those of other models are
    for _ in range(3):
        assert torch.equal(replayed(x)[0], expected)
    assert len(made) == count + 5
    assert all(graph() for graph in made[:count])


def test_images_that_do_not_lie_next_to_each_other():
    compiled = Eager(torch.nn.Flatten())
    replayed = Replayed(compiled, lambda x: True, Tapes, compiled.bind)
    for _ in range(3):
        x = torch.rand(1, 1, 8, 8)[..., ::2].expand(3, 2, 8, 4)
        assert torch.equal(replayed(x)[0], x.flatten(1))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"graphs": True, "backend": "compile"}, "graphs=True is for CUDA devices .*, not for 'compile' on cpu"),
        ({"graphs": "yes", "backend": "compile"}, "graphs='yes'; valid: True, False, 'auto'"),
        ({"graphs": True}, "graphs=True is for CUDA devices and backends other than 'eager', not for 'eager' on cpu"),
    ],
)
def test_graphs_that_were_asked_for_and_cannot_be(arguments, text):
    with pytest.raises(ArgumentError, match=text):
        convmixer.optimize(convmixer.ConvMixer(4, 1, 3, 2), **arguments)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "compile"])
def test_optimized_models_are_replayed(backend):
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cuda").eval()
    fast = convmixer.optimize(model, backend=backend, dtype=torch.bfloat16)
    replayed = fast.runtime.worth

    def plain(x):  # by the same kernels: another compilation may choose others
        fast.runtime.worth = lambda _: False
        expected = fast(x)
        fast.runtime.worth = replayed
        return expected

    streams = [torch.cuda.Stream() for _ in range(4)]
    with torch.inference_mode():
        for i in range(20):
            x = torch.randn(1 + i % 3, 3, 32, 32, device="cuda")
            streams[i % 4].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(streams[i % 4]):
                found = fast(x)
            torch.cuda.synchronize()
            assert torch.equal(found, plain(x))
    assert len(fast.runtime._calls) == 3
    x = torch.randn(512, 3, 32, 32, device="cuda")
    assert torch.equal(fast(x), plain(x))
    assert len(fast.runtime._calls) == 3  # too large for a graph


WAYS = {"plain": {}, "compiled": {"compile": True}, "fused": {"fused": True}}


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("opt", ["muon", "adamw", "sgd"])
def test_cuda_graphs_train_alike(tmp_path, opt, way):
    """24 steps, of which the first three are eager."""
    fields = {"opt": opt, "ema_decay": 0.9, "clip_grad": 1.0, "device": "cuda", "precision": "bfloat16", **way}
    expected = _train(_trainer(tmp_path, **fields))
    trainer = _trainer(tmp_path, CudaGraphs(torch.device("cuda")), **fields)
    found = _train(trainer)
    assert len(trainer.compute.captured) == 1
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=2e-2, rtol=2e-2, msg=key)
    torch.testing.assert_close(found["losses"], expected["losses"], atol=0.05, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{"drop_rate": 0.5}, {"drop_path_rate": 0.5}, {"block_drop_rate": 0.5}])
def test_cuda_graphs_draw_what_the_seed_says(tmp_path, fields):
    fields = {"lr": 1e-9, "device": "cuda", "flip": 0.0, **fields}
    expected = _train(_trainer(tmp_path, **fields), 2)["losses"]
    found = _train(_trainer(tmp_path, CudaGraphs(torch.device("cuda")), **fields), 2)["losses"]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    other = _train(_trainer(tmp_path, **{**fields, "seed": 1}), 2)["losses"]
    assert not torch.allclose(other, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.gpu
def test_a_cuda_step_that_cannot_be_captured_still_runs(tmp_path, monkeypatch):
    fields = {"ema_decay": 0.9, "drop_rate": 0.2, "device": "cuda"}
    expected = _train(_trainer(tmp_path, **fields))
    trainer = _trainer(tmp_path, CudaGraphs(torch.device("cuda")), **fields)
    told = _read_in_each_step(trainer, monkeypatch)
    found = _train(trainer)
    assert len(told) == 1
    torch.testing.assert_close(found["losses"], expected["losses"], atol=0.05, rtol=0.02)
