"""What timm's own test suite asks of a model, for every name that this package adds to timm."""

import pytest
import timm.optim
import torch
from timm.models import get_pretrained_cfg

import convmixer
from convmixer.errors import WeightsError
from convmixer.registry import VARIANTS

TIMM = {"convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"}
# PyTorch warns of its own class of traced modules.
TRACED = pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support instance-level")
OURS = [v.name for v in VARIANTS if v.name not in TIMM]


def size_of(name: str) -> int:
    """Small enough for a quick test, a few patches wide."""
    return 8 * convmixer.model_info(name).patch_size


def make(name: str, **options):
    """Fewer blocks, so that the large ones are quick."""
    return timm.create_model(name, depth=2, **options)


def images(name: str, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size_of(name), size_of(name))


def test_names():
    assert set(OURS) <= set(timm.list_models("convmixer*"))
    assert timm.list_pretrained("convmixer_256_8*") == ["convmixer_256_8.cifar10", "convmixer_256_8_ks9_p1.cifar10"]
    assert set(timm.list_models("convmixer*")) == {v.name for v in VARIANTS}


@pytest.mark.parametrize("name", sorted(TIMM))
def test_timms_own_stay_timms(name):
    entry = timm.model_entrypoint(name)
    assert entry.__module__ == "timm.models.convmixer"
    assert get_pretrained_cfg(name).hf_hub_id == f"timm/{name}.in1k"


@pytest.mark.parametrize("name", OURS)
def test_configuration(name):
    model = make(name)
    config = model.default_cfg
    variant = convmixer.model_info(name)
    assert model.pretrained_cfg is config
    assert config["architecture"] == name
    assert config["num_classes"] == model.num_classes == variant.num_classes
    assert model.num_features == model.head_hidden_size == variant.dim
    state = model.state_dict()
    assert config["classifier"] + ".weight" in state
    assert config["first_conv"] + ".weight" in state
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["mean"], data["std"]) == (variant.input_size, variant.mean, variant.std)
    assert [data[k] for k in ("interpolation", "crop_pct", "crop_mode")] == [
        variant.interpolation,
        variant.crop_pct,
        variant.crop_mode,
    ]
    full = timm.create_model(name, device="meta")
    assert full.forward_features(torch.empty(1, *variant.input_size, device="meta")).shape[-2:] == config["pool_size"]


@pytest.mark.parametrize("name", OURS)
def test_forward_backward_and_checkpointing(name):
    model, x = make(name, num_classes=42), images(name)
    y = model(x)
    assert y.shape == (2, 42)
    assert y.isfinite().all()
    y.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    plain = model(x)
    model.set_grad_checkpointing()
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", OURS)
@torch.inference_mode()
def test_heads_and_features(name):
    model, x = make(name).eval(), images(name)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 8, 8)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    last, intermediates = model.forward_intermediates(x)
    assert torch.equal(last, features)
    assert torch.equal(intermediates[-1], features)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    assert make(name, num_classes=0, global_pool="").eval()(x).shape == features.shape
    assert make(name, num_classes=0).eval()(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", OURS)
@torch.inference_mode()
def test_features_only(name):
    model, x = timm.create_model(name, features_only=True, out_indices=(0, 2)).eval(), images(name)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(model.model.blocks) == 3
    for feature, channel, reduction in zip(model(x), channels, reductions, strict=True):
        assert feature.shape == (2, channel, size_of(name) // reduction, size_of(name) // reduction)


@TRACED
@pytest.mark.parametrize("name", OURS)
def test_torchscript_and_fx(name):
    model, x = make(name).eval(), images(name)
    expected = model(x)
    assert torch.equal(torch.jit.script(model)(x), expected)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), expected)
    assert torch.equal(torch.jit.script(traced)(x), expected)


@TRACED
@pytest.mark.parametrize("name", [v.name for v in VARIANTS])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_torchscript_of_an_fx_trace(name, mode):
    """Of every name, with the layout that create_model chooses, and of what optimize makes of it."""
    model, x = convmixer.create_model(name, depth=2, device="cpu").train(mode), images(name)
    models = [model] if mode else [model, convmixer.optimize(model)]
    for each in models:
        scripted = torch.jit.script(torch.fx.symbolic_trace(each))
        torch.manual_seed(0)
        expected = each(x)
        torch.manual_seed(0)
        assert torch.equal(scripted(x), expected)


@TRACED
@pytest.mark.parametrize("arguments", [{"global_pool": "catavgmax"}, {"num_classes": 0, "global_pool": ""}], ids=str)
def test_torchscript_of_an_fx_trace_with_other_ends(arguments):
    model, x = make("convmixer_256_8", drop_path_rate=0.1, **arguments).eval(), images("convmixer_256_8")
    assert torch.equal(torch.jit.script(torch.fx.symbolic_trace(model))(x), model(x))


@pytest.mark.parametrize("pool", ["catavgmax", "fastcatavgmax"])
def test_pretrained_heads_do_not_fit_a_pool_of_twice_the_features(pool):
    text = f"the head takes 256 features, and global_pool='{pool}' makes 512.*reset_classifier\\(10, '{pool}'\\)"
    for build in timm.create_model, convmixer.create_model:
        with pytest.raises(WeightsError, match=text):
            build("convmixer_256_8", pretrained=True, global_pool=pool)
        model = build("convmixer_256_8", pretrained=True)
        model.reset_classifier(10, pool)
        assert model(images("convmixer_256_8").to(model.head.weight.device)).shape == (2, 10)
        assert build("convmixer_256_8", pretrained=True, global_pool=pool, num_classes=7).head.in_features == 512


def test_pretrained_by_timm():
    ours = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu", channels_last=False).eval()
    x = images("convmixer_256_8")
    assert torch.equal(timm.create_model("convmixer_256_8", pretrained=True).eval()(x), ours(x))
    assert torch.equal(timm.create_model("convmixer_256_8.cifar10", pretrained=True).eval()(x), ours(x))
    one = timm.create_model("convmixer_256_8", pretrained=True, in_chans=1, num_classes=37)
    assert one(images("convmixer_256_8", 1)).shape == (2, 37)
    backbone = timm.create_model("convmixer_256_8", pretrained=True, features_only=True, out_indices=(3,)).eval()
    assert torch.equal(backbone(x)[0], ours.forward_intermediates(x, [3], intermediates_only=True)[0])


def test_optimizer_groups_of_timm():
    model = make("convmixer_256_8")
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.7)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == pytest.approx([0.7**3, 0.7**2, 0.7, 1.0])
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert {p.ndim >= 2 for p in model.parameters() if id(p) in decayed} == {True}
