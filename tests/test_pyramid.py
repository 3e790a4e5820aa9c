"""Feature pyramids: sizes, places of cells, weights, and the libraries that they work with."""

from collections import OrderedDict
from math import ceil

import pytest
import timm
import torch
from conftest import shake
from torch import nn

import convmixer
from convmixer import FeaturePyramid
from convmixer.errors import ArgumentError, WeightsError
from convmixer.hub.checkpoints import save_weights

ALL = (2, 4, 8, 16, 32)


def make(reductions=ALL, patch_size=2, depth=2, channels=6, **options) -> FeaturePyramid:
    backbone = convmixer.ConvMixer(dim=8, depth=depth, kernel_size=3, patch_size=patch_size, num_classes=4)
    return shake(FeaturePyramid(backbone, reductions, channels=channels, **options))


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 5, 7, 14, 16])
@torch.inference_mode()
def test_sizes(patch_size):
    """Maps have ceil(H / r) rows for any image, also for one smaller than a patch."""
    model = make(patch_size=patch_size)
    for height, width in ((1, 1), (3, 40), (13, 14), (15, 29), (32, 64), (33, 65), (63, 50), (97, 56)):
        maps = model(torch.randn(2, 3, height, width))
        assert [tuple(y.shape) for y in maps] == [(2, 6, ceil(height / r), ceil(width / r)) for r in ALL]
        assert all(y.isfinite().all() for y in maps)


class Coordinates(nn.Module):
    """A backbone whose two channels are the row and the column of each cell's centre, in pixels."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(stride)
        info = [{"num_chs": 2, "reduction": stride, "module": "pool"}]
        self.feature_info = timm.models.FeatureInfo(info, (0,))
        self.register_parameter("unused", nn.Parameter(torch.zeros(1)))

    def forward(self, x):
        rows, columns = (torch.arange(n) + 0.5 for n in x.shape[-2:])
        return [self.pool(torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None])]


@pytest.mark.parametrize(("stride", "reduction"), [(7, 8), (14, 16), (5, 4), (3, 4), (6, 7), (8, 8), (9, 8)])
def test_cells_stay_in_their_places(stride, reduction):
    """Away from the border, a cell is centred on its own pixels, whatever the patch size."""
    model = FeaturePyramid(Coordinates(stride), (reduction,))
    model.levels[0].project = nn.Identity()
    (centres,) = model(torch.zeros(1, 3, 200, 150))
    inside = 200 // reduction - 2, 150 // reduction - 2
    rows, columns = ((torch.arange(n) + 0.5) * reduction for n in inside)
    expected = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    torch.testing.assert_close(centres[0, :, : inside[0], : inside[1]][:, 1:, 1:], expected[:, 1:, 1:])


@torch.inference_mode()
def test_padding_is_zeros_at_the_right_and_at_the_bottom():
    model = make((4, 8), patch_size=7)
    image = torch.randn(1, 3, 38, 50)
    padded = torch.zeros(1, 3, 42, 56)
    padded[..., :38, :50] = image
    for part, whole in zip(model(image), model(padded), strict=True):
        torch.testing.assert_close(part[..., :-1, :-1], whole[..., : part.shape[2] - 1, : part.shape[3] - 1])


@torch.inference_mode()
def test_maps_are_normalised():
    for y in make(patch_size=7)(torch.randn(2, 3, 64, 64)):
        torch.testing.assert_close(y.mean(dim=1), torch.zeros_like(y[:, 0]), atol=1e-5, rtol=0)
        assert (y.std(dim=1, correction=0) - 1).abs().max() < 0.01


def test_feature_info():
    model = make((4, 8, 16), channels=12)
    assert model.feature_info.channels() == [12, 12, 12]
    assert model.feature_info.reduction() == [4, 8, 16]
    assert [type(model.get_submodule(name)) for name in model.feature_info.module_name()] == [type(model.levels[0])] * 3
    assert model.out_channels == 12


def test_gradients_reach_every_parameter():
    model = make((4, 8, 16), patch_size=7, depth=3, out_indices=(0, 1, 1)).train()
    assert len(model.backbone.model.blocks) == 2
    sum(y.square().mean() for y in model(torch.randn(2, 3, 40, 40))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@torch.inference_mode()
def test_blocks():
    """A map changes with its own block, and not with a later one."""
    model = make((4, 8), depth=2, out_indices=(0, 1))
    image = torch.randn(1, 3, 32, 32)
    before = model(image)
    nn.init.normal_(model.backbone.model.blocks[1][1].weight)
    after = model(image)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("patch_size", [2, 7])
def test_torch_export(patch_size):
    model, image = make((4, 8), patch_size=patch_size), torch.randn(2, 3, 50, 70)
    any_size = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (image,), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},)).module()
    for x in (image, torch.randn(3, 3, 64, 64), torch.randn(2, 3, 33, 111)):
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("out_indices", [None, (0, 1, 1)])
def test_fused_training(out_indices):
    """Fused blocks give the maps, running statistics and gradients of plain layers."""
    models = [make((4, 8, 16), out_indices=out_indices).double().train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].set_fused()
    assert models[1].backbone.model.fused
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = [model(image) for model in models]
    torch.testing.assert_close(*results)
    for maps in results:
        sum(y.square().mean() + y[:, 0].mean() for y in maps).backward()
    plain, fused = ({name: p.grad for name, p in model.named_parameters()} for model in models)
    torch.testing.assert_close(plain, fused)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def test_checkpointing():
    model = make((4, 8)).train()
    image = torch.randn(2, 3, 16, 16)
    expected = model(image)
    model.set_grad_checkpointing()
    assert torch.equal(model(image)[0], expected[0])


# ---- create_model ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_pretrained():
    """The keys are timm's with a prefix, and the backbone computes what it computes without a pyramid."""
    model = convmixer.create_model("convmixer_256_8", pretrained=True, pyramid=(4, 8), device="cpu").eval()
    backbone = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu").eval()
    own = {f"backbone.model.{k}": v for k, v in backbone.state_dict().items() if not k.startswith("head.")}
    state = model.state_dict()
    assert own.keys() == {k for k in state if k.startswith("backbone.")}
    assert all(torch.equal(state[k], v) for k, v in own.items())
    image = torch.randn(1, 3, 32, 48)
    assert torch.equal(model.backbone(image)[0], backbone.forward_features(image))
    assert model.feature_info.channels() == [256, 256]
    assert convmixer.create_transform(model) is not None
    assert model.pretrained_cfg["mean"] == backbone.pretrained_cfg["mean"]


def test_arguments_of_create_model(tmp_path):
    model = convmixer.create_model(
        "convmixer_256_8", depth=4, pyramid=[4, 16], pyramid_channels=5, out_indices=(1, -2), return_dict=True,
        in_chans=1, num_classes=0, device="cpu", dtype=torch.bfloat16, fused=True,
    )  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(model.backbone.model.blocks) == 3
    assert model.backbone.model.fused
    maps = model.eval()(torch.randn(1, 1, 20, 20, dtype=torch.bfloat16))
    assert isinstance(maps, OrderedDict)
    assert {k: tuple(v.shape) for k, v in maps.items()} == {"0": (1, 5, 5, 5), "1": (1, 5, 2, 2)}


def test_save_and_load(tmp_path):
    make_one = lambda **args: convmixer.create_model(  # noqa: E731
        "convmixer_128_8_ks7_p2", dim=8, depth=2, pyramid=(4, 8), pyramid_channels=6, device="cpu", **args
    )
    one, two = make_one().eval(), make_one().eval()
    save_weights(one, tmp_path / "pyramid.safetensors")
    convmixer.load_checkpoint(two, tmp_path / "pyramid.safetensors")
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(one(image)[0], two(image)[0])
    # `checkpoint` is for the backbone: weights of a classifier fit, those of a pyramid say where they belong.
    classifier = convmixer.create_model("convmixer_128_8_ks7_p2", dim=8, depth=2, num_classes=7, device="cpu")
    save_weights(classifier, tmp_path / "classifier.safetensors")
    three = make_one(checkpoint=tmp_path / "classifier.safetensors")
    assert torch.equal(three.backbone.model.stem[0].weight, classifier.stem[0].weight)
    with pytest.raises(WeightsError, match=r"weights of a FeaturePyramid: .*convmixer\.load_checkpoint"):
        make_one(checkpoint=tmp_path / "pyramid.safetensors")


@torch.inference_mode()
def test_an_optimized_backbone_computes_the_same():
    model = make((4, 8))
    image = torch.randn(1, 3, 32, 32)
    expected = model(image)
    model.backbone = convmixer.optimize(model.backbone)
    torch.testing.assert_close(model(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
@torch.inference_mode()
def test_other_backbones(name):
    """One of timm's extractors with a map for each level, and a model with one resolution."""
    if name.startswith("vit"):
        model = FeaturePyramid(timm.create_model(name, depth=2, img_size=64), (8, 16, 32), channels=8)
    else:
        extractor = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
        model = FeaturePyramid(extractor, (8, 16, 32), channels=8, out_indices=(0, 1, 2))
    assert [tuple(y.shape) for y in model.eval()(torch.randn(1, 3, 64, 64))] == [(1, 8, n, n) for n in (8, 4, 2)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pyramid": True}, r"pyramid=True: give whole numbers in increasing order, such as \(4, 8, 16, 32\)"),
        ({"pyramid": ()}, r"pyramid=\(\)"),
        ({"pyramid": (8, 4)}, r"pyramid=\(8, 4\): give whole numbers in increasing order"),
        ({"pyramid": (4, 4)}, r"pyramid=\(4, 4\)"),
        ({"pyramid": (0.5, 4)}, r"pyramid=\(0\.5, 4\)"),
        ({"pyramid": (0, 4)}, r"pyramid=\(0, 4\)"),
        ({"pyramid": (4,), "features_only": True}, r"pyramid=\(4,\) returns feature maps itself: leave features_only"),
        ({"pyramid": (4,), "num_classes": 3, "drop_rate": 0.1}, r"num_classes, drop_rate with pyramid=.*no head"),
        ({"pyramid": (4,), "pyramid_channels": 0}, "channels=0: give a whole number of at least 1"),
        ({"pyramid": (4, 8), "out_indices": (0, 1, 2)}, r"out_indices=\(0, 1, 2\): .* all 2 maps or 2 of them"),
        ({"pyramid": (4,), "out_indices": (8,)}, r"out_indices=\(8,\): .* from -8 to 7"),
        ({"pyramid": (4,), "out_indices": 1}, "out_indices=1: give one index"),
        ({"pyramid_channels": 9}, r"pyramid_channels without pyramid: add .* pyramid=\(4, 8, 16, 32\)"),
        ({"out_indices": (1,)}, "set features_only=True or pyramid="),
        ({"pyramids": (4,)}, "'pyramids' is unknown; did you mean pyramid"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, text):
    with pytest.raises(ArgumentError, match=text):
        convmixer.create_model("convmixer_256_8", device="cpu", **arguments)


def test_wrong_backbones():
    with pytest.raises(ArgumentError, match=r"Linear does not say which feature maps it has: give a ConvMixer"):
        FeaturePyramid(nn.Linear(2, 2))
    swin = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, img_size=64, embed_dim=8)
    with pytest.raises(ArgumentError, match="channels last: give the model of timm without features_only"):
        FeaturePyramid(swin, (8,))
    resnet = FeaturePyramid(timm.create_model("resnet10t", features_only=True), (8,))
    with pytest.raises(ArgumentError, match="has no fused blocks: they are for a convmixer"):
        resnet.set_fused()


def test_a_pyramid_is_not_a_classifier(cat):
    with pytest.raises(ArgumentError, match="FeaturePyramid is not a ConvMixer"):
        convmixer.predict(make((4,)), cat)


# ---- torchvision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FasterRCNN", "RetinaNet"])
def test_torchvisions_detectors(kind):
    """Losses in training, with gradients down to the stem; boxes inside the images in evaluation."""
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    sizes = ((8,), (16,), (32,), (64,), (128,))
    detector = getattr(detection, kind)(
        make((4, 8, 16, 32, 64), channels=16, return_dict=True),
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(sizes, ((1.0,),) * 5),
    ) if kind == "FasterRCNN" else detection.RetinaNet(
        make((8, 16, 32), channels=16, return_dict=True),
        num_classes=3,
        min_size=64,
        max_size=96,
        anchor_generator=AnchorGenerator(sizes[:3], ((1.0,),) * 3),
    )  # fmt: skip
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 5, 30, 40]]), "labels": torch.tensor([1])} for _ in images]
    detector.train()
    sum(detector(images, targets).values()).backward()
    assert detector.backbone.backbone.model.stem[0].weight.grad.abs().sum() > 0
    detector.eval()
    with torch.inference_mode():
        found = detector(images)
    for image, result in zip(images, found, strict=True):
        assert result["boxes"].shape == (len(result["scores"]), 4)
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"].view(-1, 2, 2) <= torch.tensor([image.shape[2], image.shape[1]])).all()
