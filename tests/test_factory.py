"""create_model: every form of name, every option, every source, and what goes wrong."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import run_client, serve
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch import nn
from torch.nn.utils import prune

import convmixer
from convmixer.errors import ArgumentError, ConvMixerError, UnknownModelError, WeightsError
from convmixer.hub.checkpoints import save_weights

NAME = "convmixer_256_8"
X = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


@pytest.fixture(scope="module")
def shipped():
    return convmixer.create_model(NAME, pretrained=True, device="cpu").eval()


@pytest.fixture
def folder(tmp_path, shipped) -> Path:
    """A folder in the Hub's format, with an architecture of its own size."""
    model = convmixer.ConvMixer(16, 2, 3, 2, num_classes=4, act_layer="relu")
    save_weights(model, tmp_path / "model.safetensors")
    config = {
        "architecture": NAME,
        "num_classes": 4,
        "label_names": ["a", "b", "c", "d"],
        "model_args": {"dim": 16, "depth": 2, "kernel_size": 3, "act_layer": "relu"},
        "pretrained_cfg": {
            "input_size": [3, 24, 24],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.2, 0.2, 0.2],
            "hf_hub_id": "x",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_config_in_timms_older_form(folder):
    """All keys at the top, and the classes called labels: timm still reads it."""
    config = json.loads((folder / "config.json").read_text())
    flat = config["pretrained_cfg"] | {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
    config = {"architecture": NAME, "num_classes": 4, "num_features": 256, "labels": config["label_names"], **flat}
    save_weights(convmixer.create_model(NAME, device="cpu", num_classes=4), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    model = convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg
    for key in ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation", "label_names"):
        assert np.array_equal(model.pretrained_cfg[key], theirs[key])


def test_equals_timm_with_the_same_weights(shipped):
    theirs = timm.models.convmixer.ConvMixer(256, 8, 5, 2, num_classes=10).eval()
    theirs.load_state_dict(shipped.state_dict())
    assert (shipped(X) - theirs(X)).norm() <= 1e-5 * theirs(X).norm()


@pytest.mark.parametrize("name", ["convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_1536_20"])
def test_equals_timms_own_three(name, tmp_path):
    theirs = timm.create_model(name).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = convmixer.create_model(name, checkpoint=tmp_path / "weights.safetensors", device="cpu").eval()
    x = torch.randn(1, 3, 70, 84)
    with torch.inference_mode():
        a, b = ours.forward_intermediates(x), theirs.forward_intermediates(x)
        pairs = [(ours(x), theirs(x)), (a[0], b[0]), *zip(a[1], b[1], strict=True)]
    assert all((p - q).norm() <= 1e-5 * q.norm() for p, q in pairs)


def test_tag_and_no_tag(shipped):
    tagged = convmixer.create_model(f"{NAME}.cifar10", pretrained=True, device="cpu").eval()
    assert torch.equal(tagged(X), shipped(X))
    assert tagged.pretrained_cfg["tag"] == "cifar10"
    assert not torch.equal(convmixer.create_model(NAME, device="cpu").eval()(X), shipped(X))


def test_comes_in_training_mode_with_all_parameters_trainable(shipped):
    model = convmixer.create_model(NAME, pretrained=True, device="cpu")
    assert model.training
    assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in model.parameters())
    model(X).sum().backward()
    before = shipped.state_dict()["head.weight"].clone()
    torch.optim.SGD(model.parameters(), 1.0).step()
    # The tensors are mapped from the file: a step must change neither it nor another model.
    again = convmixer.create_model(NAME, pretrained=True, device="cpu")
    assert torch.equal(again.head.weight, before)
    assert not torch.equal(model.head.weight, before)


def test_new_classes_keep_the_rest(shipped):
    model = convmixer.create_model(NAME, pretrained=True, device="cpu", num_classes=37).eval()
    assert model(X).shape == (2, 37)
    assert torch.equal(model.forward_features(X), shipped.forward_features(X))
    assert 0 < model.head.weight.std() < 0.1
    assert convmixer.create_model(NAME, pretrained=True, device="cpu", num_classes=0)(X).shape == (2, 256)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 13])
def test_new_channels_are_adapted_as_timm_does(in_chans):
    ours = convmixer.create_model(NAME, pretrained=True, device="cpu", in_chans=in_chans)
    theirs = timm.create_model(NAME, pretrained=True, in_chans=in_chans)
    assert torch.equal(ours.stem[0].weight, theirs.stem[0].weight)
    assert ours(torch.randn(2, in_chans, 32, 32)).shape == (2, 10)


def test_features_only(shipped):
    model = convmixer.create_model(NAME, pretrained=True, device="cpu", features_only=True, out_indices=(1, -2)).eval()
    expected = shipped.forward_intermediates(X, [1, 6], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model(X), expected, strict=True))
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([256, 256], [2, 2])
    assert len(model.model.blocks) == 7
    assert len(convmixer.create_model(NAME, features_only=True, device="cpu")(X)) == 3


@pytest.mark.parametrize("indices", [(3, 1), (-1, 2), [7, 0, 4]], ids=str)
def test_names_of_features_are_in_the_order_of_the_features(shipped, indices, tmp_path):
    for build in timm.create_model, convmixer.create_model:
        model = build(NAME, pretrained=True, features_only=True, out_indices=indices).to("cpu").eval()
        names = model.feature_info.module_name()
        assert len(names) == len(indices)
        for name, features in zip(names, model(X), strict=True):
            (expected,) = shipped.forward_intermediates(X, [int(name.rpartition(".")[2])], intermediates_only=True)
            assert (features - expected).norm() <= 1e-5 * expected.norm()
    outputs = convmixer.export_model(model, tmp_path / "features.pt2").outputs
    assert list(outputs) == [f"features_{name.rpartition('.')[2]}" for name in names]


@pytest.mark.parametrize(
    "indices", [np.array([1, 3]), np.array([1, -5]), [np.int64(1), np.int32(3)], torch.tensor([1, 3])], ids=str
)
def test_indices_of_numpy_and_torch(indices, shipped):
    expected = shipped.forward_intermediates(X, [1, 3], intermediates_only=True)
    for build in timm.create_model, convmixer.create_model:
        model = build(NAME, pretrained=True, features_only=True, out_indices=indices).to("cpu").eval()
        for found, wanted in zip(model(X), expected, strict=True):
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    found = shipped.forward_intermediates(X, indices, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_number_of_last_blocks_of_numpy(shipped):
    expected = shipped.forward_intermediates(X, 2, intermediates_only=True)
    found = shipped.forward_intermediates(X, np.int64(2), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model = convmixer.create_model(NAME, device="cpu", features_only=True, out_indices=np.int64(2))
    assert model.feature_info.out_indices == (6, 7)


def test_dtype_layout_and_device():
    model = convmixer.create_model(NAME, pretrained=True, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name in "bfloat16", "torch.bfloat16":
        named = convmixer.create_model(NAME, pretrained=True, device="cpu", dtype=name)
        assert {p.dtype for p in named.parameters()} == {torch.bfloat16}
        assert torch.equal(named.head.weight, model.head.weight)
    assert all(p.is_contiguous() for p in model.parameters())
    assert all(p.is_meta for p in convmixer.create_model(NAME, pretrained=True, device="meta").parameters())
    auto = next(convmixer.create_model(NAME, device="auto").parameters()).device.type
    assert auto == (torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu")


LAYOUTS = [
    {},
    {"fused": True},
    {"features_only": True, "out_indices": (0,)},
    {"in_chans": 1},  # tensors of one channel lie the same way in both layouts
    {"patch_size": 1},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_feature_maps_are_in_the_layout_that_was_chosen(options):
    """On CPUs channels_last by default, whatever the layout of images and weights, which lie as in any module."""
    x = X[:, : options.get("in_chans", 3)]
    for chosen in ({}, {"channels_last": True}, {"channels_last": False}):
        model = convmixer.create_model(NAME, depth=1, device="cpu", **options, **chosen).train()
        assert all(p.is_contiguous() for p in model.parameters())
        maps = model(x) if "features_only" in options else [model.forward_features(x)]
        wanted = torch.channels_last if chosen.get("channels_last", True) else torch.contiguous_format
        assert [y.is_contiguous(memory_format=wanted) for y in maps] == [True]


def test_layout_is_the_users_where_none_was_chosen():
    model = convmixer.create_model(NAME, depth=1, device="cpu", channels_last=False)
    assert not model.forward_features(X).is_contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    assert model.forward_features(X).is_contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.contiguous_format)
    images = X.contiguous(memory_format=torch.channels_last)
    assert model.forward_features(images).is_contiguous(memory_format=torch.channels_last)
    assert not timm.create_model(NAME, depth=1).forward_features(X).is_contiguous(memory_format=torch.channels_last)


def test_the_default_model_is_a_module_like_any_other():
    """Pruning, LBFGS and vectors of parameters want plain weights and gradients."""
    model = convmixer.create_model(NAME, pretrained=True, device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.l1_unstructured(module, "weight", amount=0.5)
            prune.remove(module, "weight")
            assert (module.weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert len(vector) == sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(2 * vector, model.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), 2 * vector)

    model = convmixer.create_model(NAME, pretrained=True, device="cpu").eval()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(X), torch.tensor([1, 2]))
        value.backward()
        return value

    before = optimizer.step(loss).item()
    assert loss().item() < before
    gradients = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    assert len(nn.utils.parameters_to_vector(gradients)) == len(vector)
    assert save(model.state_dict())  # safetensors refuses tensors that are not contiguous


def test_layout_does_not_change_the_result():
    outputs = [
        convmixer.create_model(NAME, pretrained=True, device="cpu", channels_last=last).eval()(X)
        for last in (True, False)
    ]
    assert (outputs[0] - outputs[1]).norm() <= 1e-5 * outputs[1].norm()


def test_checkpoint_brings_its_classes_and_names(tmp_path):
    trained = convmixer.create_model(NAME, device="cpu", num_classes=3, in_chans=1)
    save_weights(trained, tmp_path / "w.safetensors", {"label_names": ["x", "y", "z"]})
    weights = {"checkpoint": tmp_path / "w.safetensors", "device": "cpu"}
    model = convmixer.create_model(NAME, **weights, in_chans=1)
    assert model.pretrained_cfg["label_names"] == ("x", "y", "z")
    assert torch.equal(model.head.weight, trained.head.weight)
    adapted = convmixer.create_model(NAME, **weights, in_chans=3)
    assert adapted(X).shape == (2, 3)
    renewed = convmixer.create_model(
        NAME, checkpoint=tmp_path / "w.safetensors", device="cpu", in_chans=1, num_classes=5
    )
    assert torch.equal(renewed.stem[0].weight, trained.stem[0].weight)
    assert renewed.num_classes == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_are_float32_whatever_the_file_holds(tmp_path, dtype):
    save_weights(convmixer.create_model(NAME, device="cpu", dtype=dtype), tmp_path / "w.safetensors")
    for changes in {}, {"num_classes": 3}, {"in_chans": 1}:
        model = convmixer.create_model(NAME, checkpoint=tmp_path / "w.safetensors", device="cpu", **changes)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model(X[:, : model.in_chans]).isfinite().all()


def test_whole_numbers_are_no_weights(tmp_path):
    state = convmixer.create_model(NAME, device="cpu").state_dict()
    save_file({k: v.contiguous().int() for k, v in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"of whole numbers \(stem.0.weight"):
        convmixer.create_model(NAME, checkpoint=tmp_path / "w.safetensors", device="cpu")


def test_more_blocks_than_the_variant_has(tmp_path):
    save_weights(convmixer.ConvMixer(512, 16, 8, 7), tmp_path / "w.safetensors")
    for options in {}, {"features_only": True, "out_indices": (1,)}:
        with pytest.raises(WeightsError, match=r"unexpected \(blocks.12."):
            convmixer.create_model("convmixer_512_12", checkpoint=tmp_path / "w.safetensors", **options)


def test_local_folder(folder):
    model = convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu").eval()
    assert (model.dim, len(model.blocks), model.num_classes) == (16, 2, 4)
    assert convmixer.predict(model, torch.rand(3, 24, 24), topk=1)[0][0] in "abcd"
    assert model.pretrained_cfg["input_size"] == (3, 24, 24)
    x = torch.randn(2, 3, 24, 24)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert (model(x) - theirs(x)).norm() <= 1e-5 * theirs(x).norm()
    assert convmixer.create_model(f"local-dir:{folder}", device="cpu").num_classes == 4


# ---- the Hub, played by a server on this machine -------------------------------------------------------------------


def run(code: str, home: Path, endpoint: str, **environment: str) -> list[str]:
    return run_client(PRELUDE + code, home, endpoint, **environment)


PRELUDE = """
import convmixer, torch
def total(name, **options):
    print(convmixer.create_model(name, pretrained=True, device="cpu", **options).head.weight.sum().item())
def error(name, **options):
    try:
        convmixer.create_model(name, pretrained=True, **options)
    except convmixer.ConvMixerError as error:
        print(type(error).__name__, error)
"""


def test_hub(folder, tmp_path_factory):
    """One client that is online, and one that is not: each is a process that imports all of it."""
    cache = tmp_path_factory.mktemp("cache")
    expected = load_file(folder / "model.safetensors")["head.weight"].sum().item()
    name = "convmixer_1024_20_ks9_p14"
    source = timm.create_model(name)
    with serve() as hub:
        commit = hub.add("me/small", folder, "v2")
        weights = save(source.state_dict())
        hub.add(f"timm/{name}.in1k", {"model.safetensors": weights})
        registry = f"total('{name}'); total('{name}'); total('{NAME}')"
        online = "total('hf-hub:me/small@v2'); error('hf-hub:me/other'); error('hf-hub:me/small@v9')"
        cached = "total('hf-hub:me/small@v2'{0}); error('hf-hub:me/other@v2'{0}); error('convmixer_768_32'{0})"
        code = "\n".join((registry, online, cached.format(", local_files_only=True")))
        first, second, _, loaded, missing, unknown, *offline = run(code, cache, hub.endpoint)

        # Registered weights come from the cache first, if they are not in the package.
        assert float(first) == float(second) == source.head.weight.sum().item()
        assert len(hub.gets(hashlib.sha256(weights).hexdigest())) == 1
        assert not any("convmixer_768_32" in r or NAME in r for r in hub.requests)

        assert float(loaded) == expected
        ours = [r for r in hub.requests if " /me/" in r]
        assert ours[0] == "HEAD /me/small/resolve/v2/config.json"
        assert f"HEAD /me/small/resolve/{commit}/model.safetensors" in ours  # of the same commit
        assert missing.startswith("WeightsError cannot get 'config.json' of hf-hub:me/other: ")
        assert unknown.startswith("WeightsError cannot get 'config.json' of hf-hub:me/small@v9: 404")

        assert "/v9" in hub.requests[-1]  # local_files_only asked nothing after it
        hub.requests.clear()
        for loaded, missing, unregistered in offline, run(cached.format(""), cache, hub.endpoint, HF_HUB_OFFLINE="1"):
            assert float(loaded) == expected
            assert "'config.json' of hf-hub:me/other@v2 is not in the local cache" in missing
            assert "hf download me/other config.json --revision v2" in missing
            assert "hf download timm/convmixer_768_32.in1k model.safetensors" in unregistered
        assert hub.requests == []


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"name": "convmixer_256_9"}, UnknownModelError, "did you mean convmixer_256_8"),
        ({"name": "hub:me/x"}, ArgumentError, "unknown scheme 'hub'; valid: variant, variant.tag, hf-hub:, local-dir:"),
        ({"name": "hf-hub:x"}, ArgumentError, "give hf-hub:owner/repo"),
        ({"name": "hf-hub:me/x@1", "revision": "2"}, ArgumentError, "names one revision and revision='2' another"),
        (
            {"name": "local-dir:x", "revision": "2"},
            ArgumentError,
            "revision='2' is for a repository of the Hub, not",
        ),
        ({"name": "local-dir:/nowhere"}, WeightsError, "cannot read '/nowhere/config.json'"),
        ({"name": "convmixer_512_12", "pretrained": True}, WeightsError, "convmixer_512_12 has no weights. No public"),
        ({"numclasses": 3}, ArgumentError, "argument 'numclasses' is unknown; did you mean num_classes"),
        ({"pretraned": True}, ArgumentError, "argument 'pretraned' is unknown; did you mean pretrained"),
        ({"devcie": "cpu"}, ArgumentError, "argument 'devcie' is unknown; did you mean device"),
        ({"out_indices": (1,)}, ArgumentError, "set features_only=True"),
        ({"features_only": True, "out_indices": (9,)}, ArgumentError, "give different block indices from -8 to 7"),
        ({"features_only": True, "out_indices": (3, -5)}, ArgumentError, "give different block indices"),
        ({"features_only": True, "out_indices": "a"}, ArgumentError, "give different block indices"),
        ({"name": None}, ArgumentError, "name=None: give a string"),
        ({"name": f"{NAME}."}, UnknownModelError, "has no weights ''; valid: convmixer_256_8.cifar10"),
        ({"pretrained": True, "revision": "x"}, ArgumentError, "ships with the package"),
        ({"dtype": torch.float8_e4m3fn}, ArgumentError, "dtype=torch.float8_e4m3fn"),
        ({"pretrained": True, "depth": 2}, WeightsError, "unexpected (blocks.2."),
        ({"num_classes": -1}, ArgumentError, "num_classes=-1"),
        ({"device": "gpu"}, ArgumentError, "no device 'gpu' here"),
        ({"device": "cuda:99"}, ArgumentError, "no device 'cuda:99' here"),
        ({"dtype": torch.int8}, ArgumentError, "dtype=torch.int8: give a floating point type"),
        ({"dtype": "float8"}, ArgumentError, "dtype='float8': give a floating point type such as torch.bfloat16 or 'b"),
        ({"dtype": "int8"}, ArgumentError, "dtype=torch.int8"),
        ({"checkpoint": "/nowhere.safetensors"}, WeightsError, "no weights file at '/nowhere.safetensors'"),
        ({"pretrained": True, "dim": 64}, WeightsError, "expected (64, 3, 2, 2), found (256, 3, 2, 2)"),
        ({"pretrained": True, "depth": 9}, WeightsError, "missing (blocks.8."),
    ],
    ids=str,
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)) as caught:
        convmixer.create_model(**{"name": NAME, "device": "cpu", **arguments})
    assert isinstance(caught.value, ConvMixerError)


def test_checkpoint_of_another_variant(tmp_path):
    save_weights(convmixer.ConvMixer(256, 8, 9, 1, num_classes=10), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"stem.0.weight expected \(256, 3, 2, 2\), found \(256, 3, 1, 1\)"):
        convmixer.create_model(NAME, checkpoint=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ("[", WeightsError, "is not JSON"),
        ("[]", WeightsError, "names no architecture"),
        ('{"architecture": "resnet50"}', UnknownModelError, "is a 'resnet50', not a ConvMixer"),
        (f'{{"architecture": "{NAME}", "model_args": [1]}}', WeightsError, "must be objects"),
        (f'{{"architecture": "{NAME}", "num_classes": "10"}}', WeightsError, "num_classes='10'"),
        (f'{{"architecture": "{NAME}", "pretrained_cfg": {{"input_size": "x"}}}}', WeightsError, "input_size='x'"),
    ],
)
def test_bad_config(folder, config, error, text):
    (folder / "config.json").write_text(config)
    with pytest.raises(error, match=re.escape(text)):
        convmixer.create_model(f"local-dir:{folder}", pretrained=True)


def test_no_pickle_from_a_folder(folder):
    (folder / "model.safetensors").unlink()
    torch.save(nn.Linear(1, 1).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="no weights file at"):
        convmixer.create_model(f"local-dir:{folder}", pretrained=True)


# ---- a config.json from a stranger ----------------------------------------------------------------------------------


def _say(folder, part, **values):
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "values", "text"),
    [
        ("model_args", {"dim": 10**9}, "dim=1000000000: a whole number from 1 to 65536 is needed"),
        ("model_args", {"dim": True}, "dim=True: a whole number"),
        ("model_args", {"depth": 10**6}, "depth=1000000: a whole number from 1 to 1000 is needed"),
        ("model_args", {"dim": 65536, "depth": 900}, "parameters; at most 1,000,000,000 are built"),
        ("model_args", {"act_layer": "os.system"}, "act_layer='os.system': one of 'gelu', "),
        ("model_args", {"act_layer": ["gelu"]}, r"act_layer=\['gelu'\]: one of"),
        ("model_args", {"global_pool": 3}, "global_pool=3: one of 'avg'"),
        ("model_args", {"drop_rate": 1}, r"drop_rate=1: a probability in \[0, 1\) is needed"),
        ("model_args", {"num_classes": 5}, "says num_classes=5 in model_args and 4 elsewhere"),
        ("pretrained_cfg", {"std": [0.2, 0, 0.2]}, r"std=\[0.2, 0, 0.2\]: a list of numbers"),
        ("pretrained_cfg", {"mean": [float("nan")] * 3}, "mean="),
        ("pretrained_cfg", {"mean": [10**400]}, r"mean=\[10000\d+\.\.\.: a list"),
        ("pretrained_cfg", {"input_size": [3, 10**9, 24]}, r"input_size=\[3, 1000000000, 24\]: \[channels, height"),
        ("pretrained_cfg", {"interpolation": "\x1b[2J"}, r"interpolation='\\x1b\[2J': one of"),
        (None, {"label_names": [1, 2]}, r"label_names=\[1, 2\]: a list of texts is needed"),
        (None, {"label_names": "abcd"}, "label_names='abcd'"),
        (None, {"num_classes": 10**9}, "num_classes=1000000000"),
    ],
)
def test_senseless_values_in_a_config(folder, part, values, text):
    _say(folder, part, **values)
    for pretrained in (True, False):
        with pytest.raises(WeightsError, match=text):
            convmixer.create_model(f"local-dir:{folder}", pretrained=pretrained)


@pytest.mark.parametrize(
    ("part", "values", "text"),
    [
        ("model_args", {"dim": 6000}, "it says dim=6000, but the weights have 16"),
        ("model_args", {"depth": 3}, "it says depth=3, but the weights have 2"),
        ("model_args", {"kernel_size": 5}, "it says kernel_size=5, but the weights have 3"),
        ("model_args", {"in_chans": 1}, "it says in_chans=1, but the weights have 3"),
        (None, {"num_classes": 7}, "it says num_classes=7, but the weights have 4"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*label_names for 7 classes")
def test_a_config_that_does_not_fit_its_weights(folder, monkeypatch, part, values, text):
    """Found in the header, before a module is built."""
    _say(folder, part, **values)
    monkeypatch.setattr(convmixer.factory, "_build", None)
    with pytest.raises(WeightsError, match=text):
        convmixer.create_model(f"local-dir:{folder}", pretrained=True)


def test_unknown_keys_are_named_and_left_out(folder):
    _say(folder, "model_args", width=3, device="cuda", **{"\x1b[2J": 1})
    _say(folder, "pretrained_cfg", exec="x", file="/etc/passwd", url="http://x", custom_load=True)
    with pytest.warns(UserWarning, match="which are left out") as caught:
        model = convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu")
    (warning,) = caught
    for text in ("model_args 'width', model_args 'device', model_args '\\x1b[2J', pretrained_cfg 'exec'",):
        assert text in str(warning.message)
    assert "passwd" not in str(warning.message)
    assert warning.filename == __file__
    assert not {"exec", "file", "url", "custom_load"} & {k for k, v in model.pretrained_cfg.items() if v}


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"[" * 100_000, "is not JSON"), (b"\xff\xfe", "is not JSON"), (b" " * 5_000_000, "more than 4,194,304 bytes")],
)
def test_files_that_no_parser_should_see(folder, content, text):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=text):
        convmixer.create_model(f"local-dir:{folder}")


@pytest.mark.skipif(os.name == "nt", reason="no such files on Windows")
def test_a_pipe_is_not_waited_for(folder):
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "kept")
        os.mkfifo(folder / name)
        with pytest.raises(WeightsError, match=r"is not a file|no weights file at"):
            convmixer.create_model(f"local-dir:{folder}", pretrained=True)
        (folder / "kept").replace(folder / name)


def test_null_and_one_channel(folder):
    save_weights(
        convmixer.ConvMixer(16, 2, 3, 2, in_chans=1, num_classes=4, act_layer="relu"), folder / "model.safetensors"
    )
    _say(folder, "pretrained_cfg", input_size=[1, 24, 24], mean=None, tag=None)
    model = convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu")
    assert model.in_chans == 1
    assert len(model.pretrained_cfg["mean"]) == 3


def test_grey_weights_for_colours(tmp_path):
    """The model says how many channels it takes, not the file."""
    grey = convmixer.create_model(NAME, device="cpu", num_classes=3, in_chans=1)
    save_file(grey.state_dict(), tmp_path / "w.safetensors")
    model = convmixer.create_model(NAME, checkpoint=tmp_path / "w.safetensors", in_chans=3, num_classes=3, device="cpu")
    assert len(convmixer.predict(model.eval(), Image.new("RGB", (40, 40)))) == 3


def test_weights_of_a_model_twice_as_wide():
    """Their head would also fit a model with a pool of two kinds."""
    with pytest.raises(WeightsError, match=r"of another shape \(stem\.0\.weight expected") as caught:
        convmixer.create_model("convmixer_256_8", pretrained=True, dim=128, device="cpu")
    assert "global_pool" not in str(caught.value)


def test_weights_with_a_head_for_two_pools(tmp_path):
    wide = convmixer.create_model(NAME, device="cpu", num_classes=3, global_pool="catavgmax")
    save_file(wide.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"and global_pool='avg' makes \d+\. Give global_pool='catavgmax'"):
        convmixer.create_model(NAME, checkpoint=tmp_path / "w.safetensors", num_classes=3, device="cpu")
