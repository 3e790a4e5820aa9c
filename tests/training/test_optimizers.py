"""The optimizer of a recipe against formulas in float64, and the average of the weights."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from timm.optim import Lookahead, Muon

import convmixer
from convmixer.data.memory import Images
from convmixer.errors import ArgumentError
from convmixer.training import get_recipe
from convmixer.training.machine import create_accelerator
from convmixer.training.optimizers import MUON as MUON_ARGUMENTS
from convmixer.training.optimizers import Average, BatchedMuon, create_optimizer, takes_tensors
from convmixer.training.trainer import PartialEpoch, Trainer
from convmixer.training.validation import no_progress

CPU = torch.device("cpu")
MUON = get_recipe("cifar10", opt="muon", lr=0.01, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-3)


def _model(**options) -> convmixer.ConvMixer:
    return convmixer.ConvMixer(24, 3, **{"kernel_size": 3, "patch_size": 1, "num_classes": 5, **options})


def _names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the iteration of Newton and Schulz, in float64."""
    x = matrix / matrix.norm()
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x


def _gradients(model: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in model.named_parameters()}


def test_muon_is_for_the_1x1_weights_of_blocks():
    """A stem of patch size 1 has weights of 1x1 pixels, too."""
    model = _model()
    groups = _names(model, create_optimizer(MUON, model, CPU))
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {n for n, g in groups.items() if "ns_steps" in g} == {f"blocks.{i}.1.weight" for i in range(3)}
    for name, parameter in model.named_parameters():
        assert groups[name]["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_muon_against_the_formula():
    """Matrices in bfloat16, so by 3 % of an update; what AdamW changes to float32's precision."""
    model = _model()
    optimizer = create_optimizer(MUON, model, CPU)
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    momenta = {n: torch.zeros_like(w) for n, w in weights.items()}
    squares = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in range(1, 5):
        rate = 0.01 / step
        gradients = _gradients(model, step)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(rate)
        optimizer.step()
        for name, parameter in model.named_parameters():
            before, gradient = weights[name], gradients[name].double()
            decayed = before * (1 - rate * 0.1) if before.ndim > 1 else before
            if name.startswith("blocks") and before.shape[1:] == (24, 1, 1):
                momenta[name] = 0.95 * momenta[name] + 0.05 * gradient
                ahead = 0.05 * gradient + 0.95 * momenta[name]
                change = 0.2 * math.sqrt(24) * _orthogonal(ahead[:, :, 0, 0])[:, :, None, None]
                tolerance = 0.03
            else:
                momenta[name] = 0.9 * momenta[name] + 0.1 * gradient
                squares[name] = 0.999 * squares[name] + 0.001 * gradient**2
                denominator = (squares[name] / (1 - 0.999**step)).sqrt() + 1e-3
                change = momenta[name] / (1 - 0.9**step) / denominator
                tolerance = 2e-4
            found = parameter.detach().double()
            assert (found - (decayed - rate * change)).norm() < tolerance * (rate * change).norm(), name
            weights[name] = found


def test_matrices_in_a_batch_change_as_one_by_one():
    """As timm's Muon changes them, over some steps; a matrix without a gradient stays."""
    ours, theirs = ([p.detach().clone().requires_grad_() for p in _matrices()] for _ in range(2))
    both = (
        BatchedMuon(ours, lr=0.02, weight_decay=0.1, **MUON_ARGUMENTS),
        Muon(theirs, lr=0.02, weight_decay=0.1, **MUON_ARGUMENTS),
    )
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for a, b in list(zip(ours, theirs, strict=True))[: 3 if step == 2 else 4]:
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    for a, b, start in zip(ours, theirs, _matrices(), strict=True):
        assert (a - b).norm() < 0.01 * (b - start).norm()
    assert [list(optimizer.state_dict()["state"][0]) for optimizer in both] == [
        ["momentum_buffer"],
        ["use_muon", "momentum_buffer"],
    ]


def _matrices() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, 16, 1, 1) / 4 for shape in (16, 24, 16, 24)]


@pytest.mark.parametrize("opt", ["adamw", "sgd", "muon"])
def test_tensors_for_rates_are_numbers_for_rates(opt):
    results = []
    for tensors in (False, True):
        torch.manual_seed(0)
        model = _model()
        optimizer = create_optimizer(MUON.override(opt=opt, betas=()), model, CPU)
        rates = torch.zeros(len(optimizer.param_groups))
        for step in range(1, 4):
            for name, gradient in _gradients(model, step).items():
                model.get_parameter(name).grad = gradient
            for i, group in enumerate(optimizer.param_groups):
                rates[i] = 0.5**step
                group["lr"] = rates[i] if tensors else 0.5**step
            optimizer.step()
        results.append(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3 if opt == "muon" else 1e-6, rtol=1e-5)


def test_muon_with_rates_by_layer():
    model = _model()
    groups = _names(model, create_optimizer(MUON.override(layer_decay=0.5), model, CPU))
    assert {n for n, g in groups.items() if "ns_steps" in g} == {f"blocks.{i}.1.weight" for i in range(3)}
    for kind in ("1.weight", "0.fn.0.weight"):
        assert groups[f"blocks.2.{kind}"]["lr_scale"] == 2 * groups[f"blocks.1.{kind}"]["lr_scale"]


def test_the_state_of_muon_is_one():
    model = _model()
    optimizer = create_optimizer(MUON, model, CPU)
    for name, gradient in _gradients(model, 1).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert len(state["state"]) == len(list(model.parameters()))
    twin = copy.deepcopy(model)
    other = create_optimizer(MUON, twin, CPU)
    other.load_state_dict(state)
    for it, its in ((model, optimizer), (twin, other)):
        for name, gradient in _gradients(model, 2).items():
            it.get_parameter(name).grad = gradient.clone()
        its.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["nmuon", "adamuon", "nadamuon"])
def test_kin_of_muon_leave_stem_and_head_alone_too(name):
    model = _model(patch_size=3)
    groups = _names(model, create_optimizer(MUON.override(opt=name), model, CPU))
    assert {n for n, g in groups.items() if not g.get("use_fallback")} == {f"blocks.{i}.1.weight" for i in range(3)}


def test_one_call_updates_all_tensors_where_there_is_one():
    model = _model()
    for opt in ("adamw", "adam", "sgd"):
        assert all(g["fused"] for g in create_optimizer(MUON.override(opt=opt, betas=()), model, CPU).param_groups)
    assert isinstance(create_optimizer(MUON.override(opt="lookahead_muon"), model, CPU), Lookahead)


def test_which_optimizers_take_tensors():
    cuda, mps = torch.device("cuda"), torch.device("mps")
    assert [takes_tensors(n, CPU) for n in ("adamw", "muon", "nadam", "lion")] == [True, True, False, False]
    assert [takes_tensors(n, cuda) for n in ("adamw", "muon", "nadam", "lion")] == [True, True, True, False]
    assert [takes_tensors(n, mps) for n in ("adamw", "muon", "nadam", "lion")] == [False] * 4


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"opt": "sgd", "betas": (0.9, 0.99)}, r"betas=\(0.9, 0.99\): give none: 'sgd' has no betas"),
        ({"opt": "adan", "betas": (0.9, 0.99)}, r"betas=\(0.9, 0.99\): give 3 numbers in \[0, 1\), or none"),
        ({"opt": "bnbademamix", "betas": (0.9, 0.99)}, r"betas=\(0.9, 0.99\): give 3 numbers in \[0, 1\), or none"),
        ({"opt": "muon", "betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): give 2 numbers in \[0, 1\), or none"),
        ({"opt": "muun"}, r"opt='muun': give a first-order optimizer of timm"),
    ],
)
def test_senseless_settings(fields, text):
    with pytest.raises(ArgumentError, match=text):
        get_recipe("cifar10", **fields)


def test_an_optimizer_of_a_package_that_is_not_here():
    with pytest.raises(ArgumentError, match=r"opt='fusedadam' cannot be used here: .* Give another, such as 'adamw'"):
        create_optimizer(MUON.override(opt="fusedadam"), _model(), CPU)


def test_the_average_follows_its_formula():
    model = _model()
    average = Average(model, 0.5)
    expected = {k: v.double() for k, v in model.state_dict().items() if v.is_floating_point()}
    for step in range(1, 8):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.randint_like(value, 9) if not value.is_floating_point() else torch.randn_like(value))
        average.update(average.weight(torch.tensor([step]))[0].float())
        decay = min(0.5, (1 + step) / (10 + step))
        for key in expected:
            expected[key] = decay * expected[key] + (1 - decay) * model.state_dict()[key].double()
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(
            value.double(), expected.get(key, model.state_dict()[key].double()), rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_300_steps_follow_a_plain_loop(tmp_path, monkeypatch):
    """The same model, images and schedule: loss by loss, and the averaged weights at the end."""
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images * 15).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    images = Images(pixels[:1600].contiguous(), torch.from_numpy(bunch.target[:1600]), tuple("0123456789"))
    recipe = MUON.override(
        model="convmixer_128_8_ks7_p2", model_args=(("depth", 3), ("dim", 32)),
        epochs=6, batch_size=32, warmup=0.1, knee=(1.0, 0.0), ema_decay=0.95,
        label_smoothing=0.1, flip=0.0, rand_augment=(0, 0),
    )  # fmt: skip
    accelerator = create_accelerator(CPU, (), tmp_path, "no")
    trainer = Trainer(recipe, images, CPU, accelerator, compile=False, fused=False)
    model, batches, found = copy.deepcopy(trainer.model), [], []
    part, compute = trainer._part, trainer._compute

    def noted_part(*arguments):
        batches.append(part(*arguments))
        return batches[-1]

    def noted_compute(*arguments, **options):
        before = trainer.sums[0].item()
        compute(*arguments, **options)
        found.append(trainer.sums[0].item() - before)

    monkeypatch.setattr(trainer, "_part", noted_part)
    monkeypatch.setattr(trainer, "_compute", noted_compute)
    for epoch in range(recipe.epochs):
        trainer.epoch(epoch, PartialEpoch(), lambda: 0, no_progress)

    expected, average = _plain_loop(model, recipe, [(x, y) for x, y, _ in batches])
    assert len(found) == len(expected) == 300
    found, expected = (torch.tensor(losses).view(10, 30).mean(1) for losses in (found, expected))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert found[-1] < 0.8 < 1.6 < found[0]
    same = [(trainer.eval_model(x).argmax(1) == average(x).argmax(1)).float().mean() for x, *_ in batches[:50]]
    assert torch.stack(same).mean() > 0.99


def _plain_loop(model: torch.nn.Module, recipe, batches) -> tuple[list[float], torch.nn.Module]:
    model.train()
    average, losses = copy.deepcopy(model).eval(), []
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("blocks") and p.shape[1:] == (32, 1, 1)}
    others = {n: p for n, p in model.named_parameters() if n not in matrices}
    momenta = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    squares = {n: torch.zeros_like(p) for n, p in others.items()}
    for step, (x, y) in enumerate(batches, 1):
        part = (step - 0.5) / len(batches)
        rate = recipe.lr * (part / 0.1 if part < 0.1 else (1 - part) / 0.9)
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter *= 1 - rate * recipe.weight_decay
            for name, parameter in matrices.items():
                momenta[name].lerp_(parameter.grad, 0.05)
                ahead = parameter.grad.lerp(momenta[name], 0.95)[:, :, 0, 0]
                parameter -= rate * 0.2 * math.sqrt(32) * _orthogonal(ahead)[:, :, None, None]
            for name, parameter in others.items():
                momenta[name].lerp_(parameter.grad, 0.1)
                squares[name].lerp_(parameter.grad**2, 0.001)
                denominator = (squares[name] / (1 - 0.999**step)).sqrt() + recipe.eps
                parameter -= rate * momenta[name] / (1 - 0.9**step) / denominator
            decay = min(recipe.ema_decay, (1 + step) / (10 + step))
            for kept, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                kept.copy_(decay * kept + (1 - decay) * value if value.is_floating_point() else value)
    return losses, average
