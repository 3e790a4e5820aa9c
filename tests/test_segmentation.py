"""Encoders for segmentation_models_pytorch, alone and in its models."""

import pytest
import torch

import convmixer
import convmixer.segmentation
from convmixer.errors import ArgumentError, DependencyError
from convmixer.segmentation import ConvMixerEncoder, register_encoders

smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install 'convmixer[dense]'")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(smp.encoders, "encoders", dict(smp.encoders.encoders))
    register_encoders(channels=16)


def test_names():
    assert set(convmixer.list_models()) | set(convmixer.list_pretrained()) <= set(smp.encoders.get_encoder_names())


@pytest.mark.parametrize("depth", [3, 5])
@pytest.mark.parametrize(("patch_size", "finest", "channels"), [(2, 2, 16), (7, 2, 16), (7, 4, 0)])
@torch.inference_mode()
def test_what_an_encoder_returns(monkeypatch, depth, patch_size, finest, channels):
    small = convmixer.create_model
    monkeypatch.setattr(
        convmixer.segmentation, "create_model", lambda name, pretrained, **args: small(name, dim=8, depth=2, **args)
    )
    name = {2: "convmixer_256_8", 7: "convmixer_768_32"}[patch_size]
    encoder = ConvMixerEncoder(name, False, 16, finest, depth=depth).eval()
    image = torch.randn(2, 3, 50, 71)
    features = encoder(image)
    assert features[0] is image
    assert encoder.out_channels == [3, channels, *[16] * (depth - 1)]
    sizes = [(-(-50 // 2**i), -(-71 // 2**i)) for i in range(depth + 1)]
    assert [tuple(y.shape[1:]) for y in features] == [
        (c, *size) for c, size in zip(encoder.out_channels, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Unet", {}),
        ("Unet", {"encoder_depth": 3, "decoder_channels": (32, 16, 16)}),
        ("UnetPlusPlus", {}),
        ("MAnet", {}),
        ("Linknet", {}),
        ("FPN", {}),
        ("PSPNet", {}),
        ("PAN", {}),
        ("DeepLabV3", {}),
        ("DeepLabV3Plus", {}),
        ("DeepLabV3Plus", {"encoder_output_stride": 8}),
        ("UPerNet", {}),
        ("Segformer", {}),
    ],
    ids=str,
)
def test_models_of_the_library(kind, options):
    model = getattr(smp, kind)("convmixer_128_8_ks7_p2", encoder_weights=None, classes=5, **options)
    side = 128 if kind == "PAN" else 64  # it pools the last map three times
    y = model(torch.randn(2, 3, side, side))
    assert y.shape == (2, 5, side, side)
    y.square().mean().backward()
    assert model.encoder.pyramid.backbone.model.stem[0].weight.grad.abs().sum() > 0


@torch.inference_mode()
def test_pretrained():
    encoder = smp.Unet("convmixer_128_8_ks7_p2.cifar10", encoder_weights=None).encoder.eval()
    backbone = convmixer.create_model("convmixer_128_8_ks7_p2", pretrained=True, device="cpu").eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(encoder.pyramid.backbone(image)[0], backbone.forward_features(image))


@torch.inference_mode()
def test_grey_images():
    """Pretrained weights are adapted as `create_model` adapts them."""
    encoder = smp.FPN("convmixer_128_8_ks7_p2.cifar10", encoder_weights=None, in_channels=1).encoder.eval()
    one = convmixer.create_model("convmixer_128_8_ks7_p2", pretrained=True, in_chans=1, device="cpu").eval()
    image = torch.randn(1, 1, 32, 32)
    assert torch.equal(encoder.pyramid.backbone(image)[0], one.forward_features(image))
    assert encoder.out_channels[0] == encoder(image)[0].shape[1] == 1


@torch.inference_mode()
def test_save_and_load(tmp_path):
    model = smp.Unet("convmixer_128_8_ks7_p2.cifar10", encoder_weights=None, classes=2).eval()
    torch.nn.init.normal_(model.encoder.pyramid.backbone.model.stem[0].weight)
    model.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image), model(image))


@torch.no_grad()
def test_an_earlier_block():
    """The maps are made of that block's output, and the blocks after it are removed."""
    register_encoders(channels=16, block=2)
    name = "convmixer_128_8_ks7_p2.cifar10"
    backbone = smp.Unet(name, encoder_weights=None).encoder.pyramid.backbone.eval()
    expected = convmixer.create_model(name, pretrained=True, features_only=True, device="cpu", out_indices=(2,)).eval()
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(image), expected(image), rtol=0, atol=0)
    assert len(backbone.model.blocks) == 3
    register_encoders(block=8)
    with pytest.raises(ArgumentError, match=r"indices=\[8\]: give different block indices from -8 to 7"):
        smp.Unet(name, encoder_weights=None)
    with pytest.raises(ArgumentError, match="block='last': give the number of a block, such as 3, or -1"):
        register_encoders(block="last")


def test_errors(monkeypatch):
    text = r"encoder_weights='imagenet': the weights .* are in its name, such as 'convmixer_\S+'; pass .*=None"
    with pytest.raises(ArgumentError, match=text):
        smp.Unet("convmixer_128_8_ks7_p2")
    with pytest.raises(ArgumentError, match="encoder_depth=1: give a whole number of at least 2"):
        smp.Unet("convmixer_128_8_ks7_p2", encoder_weights=None, encoder_depth=1, decoder_channels=(8,))
    with pytest.raises(ArgumentError, match="finest=8; valid: 2, 4"):
        register_encoders(finest=8)
    with pytest.raises(ArgumentError, match="finest=8; valid: 2, 4"):
        ConvMixerEncoder("convmixer_256_8", False, 16, finest=8)
    with pytest.raises(ArgumentError, match="channels=0: give a whole number"):
        register_encoders(channels=0)
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch.encoders", None)
    with pytest.raises(DependencyError, match=r"register_encoders needs segmentation_models_pytorch, .*\[dense\]"):
        register_encoders()
