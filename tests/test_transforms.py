"""Preprocessing against timm's own and against closed formulas."""

import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform as timm_create_transform
from timm.data import resolve_data_config, resolve_model_data_config

import convmixer
from convmixer.errors import ArgumentError, UnknownModelError

ALL = convmixer.list_models()
# Models that timm has too, with a preprocessing that it wrote down itself.
TIMM = ["convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"]


@pytest.fixture
def photo(cat):
    with Image.open(cat) as image:
        return image.convert("RGB")


@pytest.fixture
def model():
    return convmixer.create_model("convmixer_256_8", device="cpu")


def repeatable(transform, image):
    """The result with the random numbers of seed 1."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return transform(image)


# ---- against timm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_name_and_model_and_timm_agree(name, photo):
    model = convmixer.create_model(name, device="meta")
    by_name, by_model = convmixer.create_transform(name)(photo), convmixer.create_transform(model)(photo)
    theirs = timm_create_transform(**resolve_model_data_config(model))(photo)
    assert by_name.dtype == torch.float32
    assert by_name.shape == convmixer.model_info(name).input_size
    assert torch.equal(by_name, by_model)
    assert torch.equal(by_name, theirs)


@pytest.mark.parametrize("name", TIMM)
def test_as_timm_prepares_its_own_models(name, photo):
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert torch.equal(convmixer.create_transform(name)(photo), timm_create_transform(**config)(photo))


@pytest.mark.parametrize("name", ["convmixer_256_8", "convmixer_768_32"])
def test_training_as_timm(name, photo):
    model = convmixer.create_model(name, device="meta")
    theirs = timm_create_transform(**resolve_model_data_config(model), is_training=True)
    for source in (name, model):
        mine = convmixer.create_transform(source, is_training=True)
        assert torch.equal(repeatable(mine, photo), repeatable(theirs, photo))


@pytest.mark.parametrize("further", [{"auto_augment": "rand-m9-mstd0.5"}, {"re_prob": 1.0}, {"hflip": 1.0}])
def test_further_arguments_of_timm(model, photo, further):
    mine = convmixer.create_transform(model, is_training=True, **further)
    theirs = timm_create_transform(**resolve_model_data_config(model), is_training=True, **further)
    result = repeatable(mine, photo)
    assert torch.equal(result, repeatable(theirs, photo))
    assert not torch.equal(result, repeatable(convmixer.create_transform(model, is_training=True), photo))


def test_training_is_random_and_inference_is_not(photo):
    training = convmixer.create_transform("convmixer_256_8", is_training=True)
    inference = convmixer.create_transform("convmixer_256_8")
    assert training(photo).shape == inference(photo).shape == (3, 32, 32)
    assert len({training(photo).sum().item() for _ in range(5)}) == 5
    assert torch.equal(inference(photo), inference(photo))


# ---- against formulas -----------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_only_normalised(photo):
    """No resize, no crop: (value / 255 - mean) / std, with the figures of CIFAR-10."""
    image = photo.crop((200, 100, 232, 132))
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2471, 0.2435, 0.2616])
    expected = (np.asarray(image) / 255 - mean) / std
    result = convmixer.create_transform("convmixer_256_8.cifar10")(image)
    np.testing.assert_allclose(result.permute(1, 2, 0), expected, atol=1e-5)


def test_the_shorter_side_is_resized_and_the_centre_cropped(photo):
    """224 / 0.96 = 233 pixels, bicubic, then the middle 224: done here with Pillow alone."""
    width, height = photo.size
    resized = photo.resize((233 * width // height, 233), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), round((233 - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    result = convmixer.create_transform("convmixer_768_32", **plain)(photo)
    np.testing.assert_allclose(result.permute(1, 2, 0), expected, atol=1e-6)


def test_one_channel_takes_the_mean_of_the_statistics(photo):
    model = convmixer.create_model("convmixer_256_8", device="cpu", in_chans=1)
    image = photo.convert("L").crop((200, 100, 232, 132))
    expected = (np.asarray(image) / 255 - (0.4914 + 0.4822 + 0.4465) / 3) / ((0.2471 + 0.2435 + 0.2616) / 3)
    result = convmixer.create_transform(model)(image)
    assert result.shape == (1, 32, 32)
    np.testing.assert_allclose(result[0], expected, atol=1e-5)
    assert model.eval()(convmixer.create_transform(model)(photo.convert("L"))[None]).shape == (1, 10)


def test_a_backbone_of_one_channel_as_well(photo):
    arguments = {"device": "cpu", "in_chans": 1}
    classifier = convmixer.create_model("convmixer_256_8", **arguments)
    backbone = convmixer.create_model("convmixer_256_8", features_only=True, out_indices=(0,), **arguments)
    grey = photo.convert("L")
    expected = convmixer.create_transform(classifier)(grey)
    assert torch.equal(convmixer.create_transform(backbone)(grey), expected)


def test_a_backbone_and_a_new_head_keep_the_preprocessing(photo):
    expected = convmixer.create_transform("convmixer_256_8")(photo)
    backbone = convmixer.create_model("convmixer_256_8", device="cpu", features_only=True, out_indices=(0,))
    swapped = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=3)
    assert torch.equal(convmixer.create_transform(backbone)(photo), expected)
    assert torch.equal(convmixer.create_transform(swapped)(photo), expected)


# ---- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {"input_size": (3, 48, 48)},
        {"input_size": (3, 64, 96)},
        {"interpolation": "nearest"},
        {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
        {"crop_pct": 0.5},
        {"crop_mode": "squash"},
        {"crop_mode": "border", "crop_pct": 0.9},
    ],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_overrides(model, photo, overrides, by_name):
    mine = convmixer.create_transform("convmixer_256_8" if by_name else model, **overrides)
    theirs = timm_create_transform(**{**resolve_model_data_config(model), **overrides})
    result = mine(photo)
    assert torch.equal(result, theirs(photo))
    assert result.shape == overrides.get("input_size", (3, 32, 32))


def test_overrides_do_not_change_the_model(model, photo):
    before = dict(model.pretrained_cfg)
    convmixer.create_transform(model, input_size=(3, 64, 64), mean=(0.0, 0.0, 0.0))
    assert model.pretrained_cfg == before


def test_mean_and_std_by_formula(photo):
    image = photo.crop((0, 0, 32, 32))
    result = convmixer.create_transform("convmixer_256_8", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))(image)
    np.testing.assert_allclose(result.permute(1, 2, 0), np.asarray(image) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("crop_pc", "crop_pct"), ("size", "input_size"), ("interpolate", "interpolation"), ("zq", "valid")],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_unknown_overrides(model, name, hint, by_name):
    with pytest.raises(ArgumentError, match=f"unknown argument '{name}' of create_transform; .*{hint}"):
        convmixer.create_transform("convmixer_256_8" if by_name else model, **{name: 1})


@pytest.mark.parametrize(
    "overrides",
    [
        {"input_size": 64},
        {"input_size": (64, 64)},
        {"mean": 0.5},
        {"mean": (0.5, 0.5)},
        {"interpolation": "bicubik"},
        {"crop_mode": "centre"},
        {"crop_pct": -1.0},
        {"crop_pct": "0.9"},
        {"std": ("0.5", "0.5", "0.5")},
    ],
)
def test_senseless_overrides(overrides):
    (name,) = overrides
    with pytest.raises(ArgumentError, match=name):
        convmixer.create_transform("convmixer_256_8", **overrides)


# ---- names and models without preprocessing -------------------------------------------------------------------------


def test_unknown_names():
    with pytest.raises(UnknownModelError, match=r"unknown model 'convmixer_256_88'; did you mean convmixer_256_8"):
        convmixer.create_transform("convmixer_256_88")
    with pytest.raises(UnknownModelError, match=r"no weights 'cifar'; valid: convmixer_256_8\.cifar10"):
        convmixer.create_transform("convmixer_256_8.cifar")


def test_a_model_that_says_nothing_about_its_preprocessing():
    with pytest.raises(ArgumentError, match=r"this ConvMixer says nothing .* convmixer\.create_model, or pass a"):
        convmixer.create_transform(convmixer.ConvMixer(8, 1))
    with pytest.raises(ArgumentError, match="this NoneType says nothing"):
        convmixer.create_transform(None)


def test_a_model_that_says_too_little_about_its_preprocessing():
    model = convmixer.ConvMixer(8, 1, num_classes=2)
    image = np.zeros((8, 8, 3), np.uint8)
    model.pretrained_cfg = {"label_names": ("a", "b")}
    with pytest.raises(ArgumentError, match=r"does not say how images are prepared: add mean, std, or"):
        convmixer.predict(model, image)
    model.pretrained_cfg |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ArgumentError, match=r"input_size=None: give \(channels, height, width\)"):
        convmixer.predict(model, image)
    model.pretrained_cfg |= {"input_size": (3, 8, 8)}
    assert [label for label, _ in convmixer.predict(model, image)] in (["a", "b"], ["b", "a"])
