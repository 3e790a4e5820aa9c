"""The model inside each wrapper that people use, for each function that takes a model."""

import re

import pytest
import timm
import torch
from conftest import vary_norms
from PIL import Image
from torch import nn
from wrapping import WRAPPERS

import convmixer
from convmixer import plots
from convmixer.errors import ArgumentError
from convmixer.evaluation import validate
from convmixer.hub.checkpoints import save_weights
from convmixer.wrappers import find_inner, find_model, unwrap

NAME = "convmixer_256_8"
X = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def small(**arguments):
    model = convmixer.create_model(NAME, device="cpu", dim=16, depth=2, num_classes=3, **arguments)
    vary_norms(model)
    return model


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of this process, for DistributedDataParallel."""
    address = f"file://{tmp_path_factory.mktemp('group') / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two images of each of three classes."""
    folder = tmp_path_factory.mktemp("data")
    for i, name in enumerate("abc"):
        (folder / name).mkdir()
        for j in range(2):
            Image.new("RGB", (32, 32), (80 * i, 200 - 60 * i, 40 * j)).save(folder / name / f"{j}.png")
    return folder


TAKERS = {
    "predict": lambda model, **_: convmixer.predict(model, [X[0].clamp(0, 1), X[1].clamp(0, 1)]),
    "validate": lambda model, data, **_: validate(model, data, classes=list("abc")).classes,
    "class_probabilities": lambda model, **_: plots.class_probabilities(model, (X.abs() * 100).byte()).tolist(),
    "plot_class_activation": lambda model, cat, **_: plots.plot_class_activation(model, cat).get_suptitle(),
    "plot_patch_embedding": lambda model, **_: len(plots.plot_patch_embedding(model).axes),
    "plot_depthwise_kernels": lambda model, **_: len(plots.plot_depthwise_kernels(model).axes),
    "optimize": lambda model, **_: convmixer.optimize(model)(X).tolist(),
    "create_transform": lambda model, **_: str(convmixer.create_transform(model)),
    "export_model": lambda model, place, **_: convmixer.export_model(model, place / "model.safetensors").difference,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("group")
def test_each_function_looks_into_each_wrapper(wrapper, data, cat, tmp_path):
    model = small()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wrapped = WRAPPERS[wrapper](model)
    others = {"data": data, "cat": cat, "place": tmp_path}
    for name, take in TAKERS.items():
        assert take(wrapped, **others) == take(model, **others), name
    assert all(torch.equal(tensor, state[key]) for key, tensor in unwrap(wrapped).state_dict().items())

    save_weights(small(), tmp_path / "other.safetensors")
    convmixer.load_checkpoint(wrapped, tmp_path / "other.safetensors")
    assert not torch.equal(unwrap(wrapped).head.weight, state["head.weight"])


def test_feature_extractors():
    model = small(features_only=True, out_indices=(0, 1))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    fast = convmixer.optimize(averaged)
    for found, expected in zip(fast(X), model.eval()(X), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert find_inner(averaged).dim == 16
    assert type(unwrap(averaged)) is type(model)
    assert len(plots.plot_depthwise_kernels(averaged).axes) == 4  # two panels, each with its colour bar
    grey = small(features_only=True, out_indices=(0,), in_chans=1)
    assert convmixer.create_transform(grey)(Image.new("L", (40, 40))).shape == (1, 32, 32)


class Lightning(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("name", [n for n in TAKERS if n != "create_transform"])
def test_an_unknown_wrapper_is_named(name, data, cat, tmp_path):
    """It may compute something else than the model in it."""
    for wrapped in Lightning(small()), nn.DataParallel(Lightning(small())):
        with pytest.raises(ArgumentError, match=rf"{re.escape(__name__)}\.Lightning.*give the model inside it"):
            TAKERS[name](wrapped, data=data, cat=cat, place=tmp_path)
    with pytest.raises(ArgumentError, match=r"Lightning is not a ConvMixer.*give the model inside it"):
        convmixer.save_pretrained(Lightning(small()), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_timms_own_class(cat):
    """timm.create_model makes it of the three names that timm has."""
    theirs = timm.create_model("convmixer_768_32", num_classes=3, in_chans=1).eval()
    assert len(convmixer.predict(theirs, cat)) == 3
    assert find_model(torch.compile(theirs)) is theirs


def test_optimized_models_are_no_wrappers():
    folded = convmixer.optimize(small())
    assert find_model(folded) is folded
    with pytest.raises(ArgumentError, match=r"has no blocks\.0\.0.*give a ConvMixer as it was before optimize"):
        plots.plot_depthwise_kernels(folded)
