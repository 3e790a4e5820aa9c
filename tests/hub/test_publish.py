"""One folder that opens everywhere, its card, and publishing it with the Hub's real client."""

import copy
import dataclasses
import html
import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import READER, WRITER, run_client, serve
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from processes import finish
from safetensors.torch import load_file, save_file
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn
from wrapping import WRAPPERS

import convmixer
from convmixer.errors import ArgumentError, ConvMixerError, DataError, WeightsError
from convmixer.hub import publish, publishable, verify, write_config
from convmixer.registry import Metric
from convmixer.training import get_recipe

ROOT = Path(__file__).parents[2]
NAME = "convmixer_256_8"
SHAPES = {
    "another head": {"num_classes": 5},
    "another size": {"dim": 24, "depth": 3, "kernel_size": 4, "patch_size": 3, "num_classes": 5},
    "grey, prelu": {"dim": 16, "depth": 2, "act_layer": "prelu", "in_chans": 1, "num_classes": 3},
    "hard_swish, five channels": {"dim": 16, "depth": 2, "act_layer": "hard_swish", "in_chans": 5, "num_classes": 2},
    "pool": {"dim": 16, "depth": 2, "act_layer": "tanh", "global_pool": "catavgmax", "num_classes": 4},
}


def make(**arguments):
    """A model whose running statistics are not those of a new one."""
    model = convmixer.create_model(NAME, device="cpu", **arguments)
    with torch.no_grad():
        model(torch.randn(8, model.in_chans, 32, 32))
    return model.eval()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return make(dim=16, depth=1, num_classes=3)


# ---- one folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_opens_everywhere(shape, tmp_path, cat):
    transformers = pytest.importorskip("transformers")
    model = make(**SHAPES[shape])
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (model.in_chans, 40, 40), "crop_pct": 0.8}
    labels = [f"kind {i}" for i in range(model.num_classes)]
    folder = convmixer.save_pretrained(model, tmp_path / "folder", label_names=labels)
    x = torch.randn(2, model.in_chans, 40, 40)
    expected = model(x)

    ours = convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu").eval()
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    for logits in ours(x), theirs(x), wrapped(x).logits:
        assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert list(ours.pretrained_cfg["label_names"]) == list(theirs.pretrained_cfg["label_names"]) == labels
    assert list(wrapped.config.id2label.values()) == labels

    features = model.forward_features(x)
    inner = transformers.AutoModel.from_pretrained(folder).eval()
    # from_pretrained of transformers 5.23 resets every BatchNorm of any model of timm; frozen ones are left alone.
    about = transformers.TimmBackboneConfig(
        backbone=f"local-dir:{folder}", num_channels=model.in_chans, freeze_batch_norm_2d=True
    )
    backbone = transformers.TimmBackbone(about, pretrained=True).eval()
    for found in inner(x).last_hidden_state, backbone(x).feature_maps[-1]:
        assert (found - features).norm() <= 1e-5 * features.norm()
    if model.in_chans in (1, 3):
        image = Image.open(cat).convert("L" if model.in_chans == 1 else "RGB")
        pixels = convmixer.create_transform(model)(image)
        assert pixels.shape == (model.in_chans, 40, 40)
        assert torch.equal(convmixer.create_transform(ours)(image), pixels)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        assert torch.equal(processor.val_transforms(image), pixels)
    if model.in_chans == 3:
        classify = transformers.pipeline("image-classification", str(folder), device="cpu")
        found, asked = classify(str(cat))[0], convmixer.predict(ours, cat, topk=1)[0]
        assert (found["label"], pytest.approx(found["score"], rel=1e-4)) == asked


@pytest.mark.parametrize("arguments", [{}, {"dim": 16, "depth": 2}], ids=str)
def test_what_transformers_saves_opens_everywhere(arguments, tmp_path):
    """Fine-tuning for other classes, by transformers alone."""
    transformers = pytest.importorskip("transformers")
    folder = convmixer.save_pretrained(make(num_classes=3, **arguments), tmp_path / "ours", label_names=list("abc"))
    labels = {0: "no", 1: "yes"}
    tuned = transformers.AutoModelForImageClassification.from_pretrained(
        folder,
        num_labels=2,
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
        ignore_mismatched_sizes=True,
    )
    tuned.save_pretrained(tmp_path / "forgotten")
    tuned.config.label_names = list(tuned.config.id2label.values())
    tuned.save_pretrained(tmp_path / "tuned")
    x = torch.randn(2, 3, 32, 32)
    expected = tuned.eval()(x).logits
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    assert again.config.id2label == labels
    ours = convmixer.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True, device="cpu").eval()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True).eval()
    assert list(ours.pretrained_cfg["label_names"]) == list(theirs.pretrained_cfg["label_names"]) == ["no", "yes"]
    for logits in again(x).logits, ours(x), theirs(x):
        assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert convmixer.predict(ours, torch.rand(3, 32, 32), topk=1)[0][0] in ("no", "yes")

    # Whoever forgets label_names is told: transformers keeps those of the old classes and drops id2label.
    with pytest.warns(UserWarning, match=r"has 3 label_names for 2 classes: they are left out\. Before transformers"):
        model = convmixer.create_model(f"local-dir:{tmp_path / 'forgotten'}", pretrained=True, device="cpu")
    assert convmixer.predict(model, torch.rand(3, 32, 32), topk=1)[0][0] in ("class 0", "class 1")


def test_names_that_contradict_each_other(small, tmp_path):
    folder = convmixer.save_pretrained(small, tmp_path, label_names=list("abc"))
    config = json.loads((folder / "config.json").read_text())

    def names(others):
        (folder / "config.json").write_text(json.dumps({**config, "id2label": others}))
        return convmixer.create_model(f"local-dir:{folder}", device="cpu").pretrained_cfg["label_names"]

    assert names({"0": "a", "2": "c", "1": "b"}) == tuple("abc")
    for nonsense in None, [], {}, {"0": "x"}, {"a": "x", "b": "y", "c": "z"}:
        assert names(nonsense) == tuple("abc")
    with pytest.warns(UserWarning, match=r"calls class 1 'b' in label_names, which counts, and 'x' in id2label"):
        assert names({"0": "a", "1": "x", "2": "c"}) == tuple("abc")


PLAIN = """
import importlib.util, sys
import timm
from safetensors.torch import load_file, save_file

folder, given = sys.argv[1], load_file(sys.argv[2])

def compare(logits):
    assert (logits - given["logits"]).norm() <= 1e-5 * given["logits"].norm()

model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
compare(model(given["images"]))
assert list(model.pretrained_cfg["label_names"]) == list("abcde")
if importlib.util.find_spec("transformers"):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    compare(model(given["images"]).logits)
    assert list(model.config.id2label.values()) == list("abcde")
    AutoImageProcessor.from_pretrained(folder)
assert "timm.models.convmixer" in sys.modules
assert not [name for name in sys.modules if name.partition(".")[0] == "convmixer"]
print(type(model).__module__)
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("convmixer_768_32", marks=pytest.mark.slow),
        pytest.param("convmixer_1024_20_ks9_p14", marks=pytest.mark.slow),
        pytest.param("convmixer_1536_20", marks=pytest.mark.slow),
    ],
)
def test_stock_shapes_open_without_convmixer(name, tmp_path):
    """In timm and transformers, in a process that never imports convmixer."""
    model = convmixer.create_model(name, device="cpu", num_classes=5).eval()
    folder = convmixer.save_pretrained(model, tmp_path / "folder", label_names=list("abcde"))
    assert json.loads((folder / "config.json").read_text())["model_args"] == {}
    assert 'timm.create_model("local-dir:' in (folder / "README.md").read_text()
    images = torch.randn(1, 3, 5 * model.patch_size, 4 * model.patch_size)
    with torch.inference_mode():
        given = {"images": images, "logits": model(images)}
    save_file(given, tmp_path / "given.safetensors")
    command = [sys.executable, "-c", PLAIN, folder, tmp_path / "given.safetensors"]
    run = finish(command, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    kind = "transformers.models.timm_wrapper" if find_spec("transformers") else "timm.models.convmixer"
    assert run.stdout.startswith(kind)


@pytest.mark.parametrize("name", convmixer.list_models())
def test_registered_shapes_keep_their_names(name):
    model = convmixer.create_model(name, device="meta")
    assert write_config.architecture(write_config.shape_of(model)) == (name, {})


def test_timms_class_and_a_head_put_in_by_hand(tmp_path):
    model = TimmConvMixer(16, 1, 3, 2, num_classes=4)
    model.pretrained_cfg = dict(convmixer.create_model(NAME, device="meta").pretrained_cfg)
    model.head = nn.Linear(16, 6)
    folder = convmixer.save_pretrained(model.eval(), tmp_path / "folder")
    ours = convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu").eval()
    x = torch.randn(2, 3, 32, 32)
    assert ours.num_classes == 6
    assert (ours(x) - model(x)).norm() <= 1e-5 * model(x).norm()


def test_without_classes(tmp_path):
    model = make(dim=16, depth=1, num_classes=0)
    folder = convmixer.save_pretrained(model, tmp_path / "folder")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu").eval()(x), model(x))
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "image-feature-extraction"


def test_layouts_and_wrappers(small, tmp_path):
    group = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=group, rank=0, world_size=1)
    try:
        wrapped = {
            "channels_last": convmixer.create_model(NAME, dim=16, depth=1, num_classes=3, device="cpu").to(
                memory_format=torch.channels_last
            ),
            **{name: wrap(small) for name, wrap in WRAPPERS.items()},
        }
        wrapped["channels_last"].load_state_dict(small.state_dict())
        for name, model in wrapped.items():
            folder = convmixer.save_pretrained(model, tmp_path / name)
            saved = load_file(folder / "model.safetensors")
            assert all(torch.equal(saved[k], v) for k, v in small.state_dict().items())
            assert all(tensor.is_contiguous() for tensor in saved.values())
            assert json.loads((folder / "config.json").read_text())["model_args"]["dim"] == 16
    finally:
        torch.distributed.destroy_process_group()


# ---- whole or not at all --------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_folder(small, tmp_path, monkeypatch):
    folder = convmixer.save_pretrained(small, tmp_path / "folder")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "write_card", full)  # the weights are written before
    for place in folder, tmp_path / "new" / "folder":
        with pytest.raises(
            ConvMixerError, match=r"cannot write .*No space left on device.*What it held before is unchanged"
        ):
            convmixer.save_pretrained(small, place)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "new" / "folder").exists()


SAVE_AND_DIE = """
import os, sys
from pathlib import Path
import torch
import convmixer

torch.manual_seed(1)
model = convmixer.create_model("convmixer_256_8", dim=16, depth=1, num_classes=3, act_layer="relu", device="cpu")
real = Path.replace

def replace(self, target):
    result = real(self, target)
    if self.name == "model.safetensors" and ".writing-" in str(self):
        os._exit(9)
    return result

Path.replace = replace
convmixer.save_pretrained(model, sys.argv[1])
"""


def test_killed_while_files_are_put_in_place(small, tmp_path):
    """No model opens that has the weights of one save and the config of another."""
    folder = convmixer.save_pretrained(small, tmp_path / "folder", label_names=["a", "b", "c"])
    assert finish([sys.executable, "-c", SAVE_AND_DIE, folder]).returncode == 9
    with pytest.raises(WeightsError, match=r"config\.json"):
        convmixer.create_model(f"local-dir:{folder}", pretrained=True)
    convmixer.save_pretrained(small, folder)
    opened = convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu")
    assert torch.equal(opened.head.weight, small.head.weight)


def test_a_folder_in_the_place_of_a_file(small, tmp_path):
    folder = convmixer.save_pretrained(small, tmp_path / "folder")
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(ArgumentError, match=r"cannot write .*README\.md': it is a folder\. Nothing was changed"):
        convmixer.save_pretrained(make(dim=16, depth=1, num_classes=3), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_a_file_that_cannot_be_replaced(small, tmp_path, monkeypatch):
    """Before any was: all of the old stays. Later: nothing opens."""
    folder = convmixer.save_pretrained(small, tmp_path / "folder")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real = Path.replace
    other = make(dim=16, depth=1, num_classes=3)
    for name, text in (("model.safetensors", "What it held before is unchanged"), ("README.md", "no config.json now")):

        def refuse(self, target, name=name):
            if self.name == name:
                raise PermissionError(13, "Permission denied")
            return real(self, target)

        monkeypatch.setattr(Path, "replace", refuse)
        with pytest.raises(ConvMixerError, match=text):
            convmixer.save_pretrained(other, folder)
        if name == "model.safetensors":
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize("kind", [np.array, lambda v: tuple(np.float32(n) for n in v), torch.tensor])
def test_preprocessing_of_numpy_and_torch(tmp_path, kind):
    model = make(dim=16, depth=1, num_classes=3)
    names = {"label_names": np.array(["a", "b", "c"])}
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        **names,
        "mean": kind([0.5, 0.25, 0.125]),
        "input_size": (3, 16, 16),
    }
    folder = convmixer.save_pretrained(model, tmp_path / "folder")
    opened = convmixer.create_model(f"local-dir:{folder}", device="cpu").pretrained_cfg
    assert (tuple(opened["mean"]), tuple(opened["label_names"])) == ((0.5, 0.25, 0.125), ("a", "b", "c"))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("crop_pct", 1.15, r"crop_pct=1\.15: a part of the image in \(0, 1\] is needed"),
        ("std", (1e-9, 1.0, 1.0), "std="),
        ("input_size", None, "has no input_size: add it"),
    ],
)
def test_preprocessing_that_nobody_could_open(tmp_path, key, value, text):
    model = make(dim=16, depth=1, num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, key: value}
    with pytest.raises(ArgumentError, match=text):
        convmixer.save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_card_with_a_byte_order_mark(small, tmp_path):
    folder = convmixer.save_pretrained(small, tmp_path / "folder", licence="mit")
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"\ufeff{text}")
    convmixer.save_pretrained(small, folder)
    assert ModelCard.load(folder / "README.md").data.license == "mit"


def test_weights_that_are_not_finite(small, tmp_path):
    model = make(dim=16, depth=1)
    model.head.bias.data[0] = float("nan")
    with pytest.raises(WeightsError, match="1 of 10 values that are not finite"):
        convmixer.save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# ---- the card -------------------------------------------------------------------------------------------------------


def test_card(small, tmp_path):
    folder = convmixer.save_pretrained(
        small,
        tmp_path,
        metrics=[Metric("top-1", 81.5, "flowers | test", "me"), Metric("f1", 0.8, "flowers | test", "")],
        licence="MIT",
        training_data="flowers <script>",
        recipe="ten epochs",
        description="Tells flowers.",
        tags=["flowers"],
        label_names=["<b>", "|", "c"],
        repo_id="me/flowers",
    )
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    assert card.data.tags == ["convmixer", "timm", "transformers", "flowers"]
    assert card.data.model_name == "flowers"
    (accuracy, f1) = card.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_name) == ("accuracy", 81.5, "flowers | test")
    assert (f1.metric_type, f1.metric_value) == ("f1", 0.8)
    assert "| top-1 | 81.50 % | flowers \\| test | me |" in card.text
    assert "Training data: flowers &lt;script>." in card.text
    assert "Classes: &lt;b>, \\|, c." in card.text
    assert "Tells flowers." in card.text
    assert '"hf-hub:me/flowers"' in card.text


def test_own_text_of_a_card_is_kept(small, tmp_path):
    convmixer.save_pretrained(small, tmp_path, metrics={"top-1": 70}, test_data="flowers", tags=["one"])
    path = tmp_path / "README.md"
    card = ModelCard.load(path)
    card.data.language = "en"
    card.data.tags.append("mine")
    text = card.text.replace("top-1", "WRONG").strip()
    path.write_text(f"---\n{card.data.to_yaml()}\n---\nAbove.\n{text}\nBelow.\n")
    convmixer.save_pretrained(small, tmp_path, metrics={"top-1": 75}, test_data="flowers", licence="mit")
    again = ModelCard.load(path)
    assert again.text.strip().startswith("Above.")
    assert again.text.strip().endswith("Below.")
    assert "WRONG" not in again.text
    assert again.text.count("# ") == card.text.count("# ")
    assert (again.data.language, again.data.license) == ("en", "mit")
    assert again.data.tags == ["convmixer", "timm", "transformers", "one", "mine"]
    assert [result.metric_value for result in again.data.eval_results] == [75]


def test_braces_and_fields_of_others_are_text(small, tmp_path):
    """What users write is not filled in as a template, whatever it is called."""
    (tmp_path / "README.md").write_text("---\ncard_data: 1\nplain: 2\n---\nMine: {{ 7 * 6 }} {% if %}\n")
    convmixer.save_pretrained(
        small, tmp_path, description="{{ 7 * 6 }}", recipe="{# none #}", label_names=["{%", "b", "c"]
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data["card_data"], card.data["plain"], card.data.library_name) == (1, 2, "timm")
    assert "Mine: {{ 7 * 6 }} {% if %}" in card.text
    assert "\n\n{{ 7 * 6 }}\n\n" in card.text
    assert "Recipe: {# none #}." in card.text
    assert "Classes: {%, b, c." in card.text


def test_a_card_of_another_hand_is_kept_whole(small, tmp_path):
    (tmp_path / "README.md").write_text("# Flowers\n\nBy hand.\n")
    convmixer.save_pretrained(small, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.endswith("# Flowers\n\nBy hand.\n")
    (tmp_path / "README.md").write_text("---\na: [\n---\nText\n")
    with pytest.raises(ArgumentError, match=r"older README.md has a header that cannot be read"):
        convmixer.save_pretrained(small, tmp_path)


@pytest.mark.parametrize("arguments", [{}, {"in_chans": 1}, {"in_chans": 4}, {"num_classes": 0}], ids=str)
def test_snippets_run(arguments, tmp_path, monkeypatch, cat, capsys):
    pytest.importorskip("transformers")
    folder = convmixer.save_pretrained(make(dim=16, depth=1, **arguments), tmp_path / "folder")
    Image.open(cat).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == (2 if arguments else 3)
    for block in blocks:
        exec(block, {})
    photos_and_classes = arguments.get("in_chans", 3) < 4 and "num_classes" not in arguments
    assert ("class " in capsys.readouterr().out) == photos_and_classes


@pytest.fixture
def finished_run(tmp_path):
    """A run as `convmixer train` leaves it, with the weights that ship."""
    run = tmp_path / "run"
    shutil.copytree(ROOT / "docs" / "runs" / "keras-post" / "dropout-0-seed-0", run)
    shutil.copy(convmixer.model_info(f"{NAME}.cifar10").weights[0].path, run / "model.safetensors")
    (run / "plots").mkdir()
    Image.new("RGB", (4, 4)).save(run / "plots" / "history.png")
    result = json.loads((run / "result.json").read_text()) | {"data": "data/photos", "training_images": 45000}
    (run / "result.json").write_text(json.dumps(result))
    return run


def test_run(finished_run, tmp_path, monkeypatch):
    read, read_text = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: read.append(path.name) or read_text(path, **how))
    folder = convmixer.save_pretrained(finished_run, tmp_path / "folder", licence="mit")
    assert read.count("recipe.json") == 1  # model and card are of one recipe, though a run be resumed meanwhile
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"model.safetensors", "config.json", "README.md", "recipe.json", "metrics.csv", "plots/history.png"}
    model = convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu")
    assert torch.equal(model.head.weight, convmixer.create_model(NAME, pretrained=True, device="cpu").head.weight)
    card = ModelCard.load(folder / "README.md")
    result = json.loads((finished_run / "result.json").read_text())
    assert [(r.metric_value, r.dataset_name) for r in card.data.eval_results] == [
        (top1, f"{name} ({result['test_images'][name]:,} images)") for name, top1 in result["test_accuracy"].items()
    ]
    assert "Training data: photos, 45,000 images." in card.text
    assert "`lr=0.001`" in card.text
    assert f"{result['train_seconds'] / 3600:.2f} hours on {result['device']}." in card.text
    assert "(plots/history.png)" in card.text


def test_a_run_by_the_default_settings(finished_run, tmp_path):
    """As `convmixer train cifar10` leaves it, whose recipe changes nothing but the note."""
    settings = dataclasses.asdict(get_recipe("cifar10"))
    (finished_run / "recipe.json").write_text(json.dumps(settings))
    card = (convmixer.save_pretrained(finished_run, tmp_path / "folder") / "README.md").read_text(encoding="utf-8")
    assert "Recipe: `convmixer train` with the defaults of its `Recipe`. " in card


FOLDERS = {
    "/home/me/start.safetensors": "start.safetensors",
    r"C:\Users\me\start.safetensors": "start.safetensors",
    "../me/cats/": "cats",
    "wds//home/me/cats/train-{0000..0012}.tar|12345": "wds/train-{0000..0012}.tar|12345",
    "hfds//home/me/cats": "hfds/cats",
    "hfds/uoft-cs/cifar10": "hfds/uoft-cs/cifar10",
    "torch/cifar10": "torch/cifar10",
    "local-dir:/home/me/start/": "local-dir:start",
    "hf-hub:owner/name": "hf-hub:owner/name",
    "convmixer_256_8": "convmixer_256_8",
    "": "",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_names_without_their_folder(name):
    assert publishable._without_folder(name) == FOLDERS[name]


def test_nothing_of_this_computer_is_published(finished_run, tmp_path, monkeypatch):
    """Neither of the place where it was made, nor who made it."""
    monkeypatch.setattr(publish.client.constants, "HF_HUB_OFFLINE", True)
    home = tmp_path / "home" / "somebody"
    base = convmixer.save_pretrained(NAME, home / "base")
    recipe = json.loads((finished_run / "recipe.json").read_text())
    recipe |= {"model": f"local-dir:{base}", "checkpoint": str(home / "start.safetensors")}
    (finished_run / "recipe.json").write_text(json.dumps(recipe))
    result = json.loads((finished_run / "result.json").read_text())
    result |= {"data": f"wds/{home}/cats-{{0..9}}.tar|10", "command": f"convmixer train {home}/x", "recipe": recipe}
    result |= {"test_accuracy": {f"hfds/{home}/cats": 50.0}, "test_images": {f"hfds/{home}/cats": 10}}
    (finished_run / "result.json").write_text(json.dumps(result))
    for name, source in {"run": finished_run, "folder": f"local-dir:{base}", "model": NAME}.items():
        folder = convmixer.save_pretrained(source, home / name)
        contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        contents.append(convmixer.push_to_hub(source, f"me/{name}", dry_run=True).card.encode())
        for content in contents:
            assert b"somebody" not in content
            assert str(tmp_path).encode() not in content
    card = (home / "run" / "README.md").read_text()
    assert "Training data: wds/cats-{0..9}.tar\\|10, 45,000 images." in card
    assert "`checkpoint='start.safetensors'`" in card


@pytest.mark.parametrize("number", [np.float64(88.25), np.float32(88.25), torch.tensor(88.25)])
def test_numbers_of_arrays_are_metrics(small, tmp_path, number):
    convmixer.save_pretrained(small, tmp_path, metrics={"top-1": number})
    assert [result.metric_value for result in ModelCard.load(tmp_path / "README.md").data.eval_results] == [88.25]


def test_class_names_are_no_markdown(small, tmp_path):
    names = ["__background__", "*star*", "[a](b)", "`c`", "a\\b", "#1"][: small.num_classes]
    convmixer.save_pretrained(small, tmp_path, label_names=names)
    line = next(line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("Classes: "))
    rendered = MarkdownIt().render(line).strip().removeprefix("<p>").removesuffix("</p>")
    assert html.unescape(rendered) == f"Classes: {', '.join(names)}."


def test_a_card_does_not_claim_the_data_of_earlier_weights(small, tmp_path):
    """Its licence stays, as header and text say."""
    convmixer.save_pretrained(f"{NAME}.cifar10", tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["uoft-cs/cifar10"]
    convmixer.save_pretrained(small, tmp_path, training_data="my flowers")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.datasets, card.data.license) == (None, "mit")
    assert "mit" in card.text.partition("## Licence")[2].split()


def test_a_weights_file(tmp_path):
    """A file of a variant's shapes says nothing of itself but its class names."""
    weights = convmixer.model_info(f"{NAME}.cifar10").weights[0]
    folder = convmixer.save_pretrained(weights.path, tmp_path / "folder")
    assert json.loads((folder / "config.json").read_text())["label_names"] == list(weights.label_names)
    assert ModelCard.load(folder / "README.md").data.license is None


def test_registered_weights_bring_their_record(tmp_path):
    folder = convmixer.save_pretrained(f"{NAME}.cifar10", tmp_path / "folder")
    card = ModelCard.load(folder / "README.md")
    record = convmixer.model_info(f"{NAME}.cifar10").weights[0]
    assert [r.metric_value for r in card.data.eval_results] == [m.value for m in record.metrics]
    assert card.data.license == "mit"
    assert record.training_data in card.text


# ---- errors ---------------------------------------------------------------------------------------------------------


class Other(nn.ReLU):
    pass


def put(name, layer):
    """A function that replaces a layer of a model."""

    def change(model):
        model.set_submodule(name, layer)
        return model

    return change


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        (
            lambda m: convmixer.optimize(m),
            {},
            "FoldedConvMixer is not a ConvMixer, without features_only",
        ),
        (lambda m: nn.Linear(1, 1), {}, "torch.nn.modules.linear.Linear is not a ConvMixer"),
        (lambda m: convmixer.ConvMixer(8, 1), {}, "says nothing about its preprocessing"),
        (lambda m: make(dim=8, depth=1, act_layer=Other), {}, "the activation Other has no name"),
        (put("blocks.0.2", nn.ReLU()), {}, "blocks.0.2 has activation='relu': config.json cannot say so"),
        (put("blocks.0.0.fn.1", nn.GELU("tanh")), {}, "blocks.0.0.fn.1 has approximate='tanh': config.json cannot"),
        (put("stem.2", nn.BatchNorm2d(16, eps=1e-3)), {}, "stem.2 has eps=0.001: config.json cannot say so"),
        (put("stem.2", nn.BatchNorm2d(16, eps=1e-3)), {}, "Add eps - 1e-05 to its running_var, and set eps to 1e-05"),
        (
            put("blocks.0.0.fn.0", nn.Conv2d(16, 16, 5, padding=4, dilation=2, groups=16)),
            {},
            "blocks.0.0.fn.0 has dilation=(2, 2): config.json cannot say so, and whoever opens it would build "
            "dilation=(1, 1)",
        ),
        (
            put("blocks.0.1", nn.Conv2d(16, 16, 1, padding=1)),
            {},
            "blocks.0.1 has padding=[(1, 1), (1, 1)]: config.json cannot say so, and whoever opens it would build "
            "padding=[(0, 0), (0, 0)]",
        ),
        (lambda m: m, {"label_names": ["a"]}, "label_names has 1 entries, the model 3 classes"),
        (
            lambda m: m.reset_classifier(0) or m,
            {"label_names": ["a", "b"]},
            "label_names has 2 entries, the model 0 classes",
        ),
        (lambda m: m, {"label_names": "abc"}, "label_names='abc': give a list of strings, in the order of the outputs"),
        (lambda m: m, {"label_names": {"a", "b", "c"}}, "give a list of strings, in the order of the outputs"),
        (lambda m: m, {"label_names": {"a": 2, "b": 1, "c": 0}}, "give a list of strings, in the order of the outputs"),
        (lambda m: m, {"label_names": (n for n in "abc")}, "give a list of strings, in the order of the outputs"),
        (lambda m: m, {"test_data": "flowers"}, "test_data='flowers' says what metrics were measured on: give metrics"),
        (lambda m: m, {"metrics": {"top-1": "good"}}, "metric 'top-1' is 'good': give a number"),
        (lambda m: m, {"metrics": [88.2]}, "give a mapping such as {'top-1': 88.2}"),
        (lambda m: m, {"repo_id": "flowers"}, "repo_id='flowers': give owner/name"),
    ],
)
def test_errors(small, tmp_path, change, options, text):
    with pytest.raises(ArgumentError, match=re.escape(text)):
        convmixer.save_pretrained(change(copy.deepcopy(small)), tmp_path / "folder", **options)
    assert not (tmp_path / "folder").exists()


def test_other_heads_and_places(small, tmp_path, finished_run):
    model = make(dim=8, depth=1)
    model.head = nn.Sequential(nn.Linear(8, 2))
    with pytest.raises(ArgumentError, match="the head is a Sequential: only a Linear"):
        convmixer.save_pretrained(model, tmp_path / "folder")
    model = make(dim=8, depth=1)
    model.blocks[0][1] = nn.utils.parametrizations.weight_norm(model.blocks[0][1])
    with pytest.raises(WeightsError, match=r"this ConvMixer does not fit this model: 1 missing \(blocks.0.1.weight\)"):
        convmixer.save_pretrained(model, tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="is a file: give a folder"):
        convmixer.save_pretrained(small, tmp_path / "file")
    for name, source in {"folder": small, "of a run": finished_run}.items():
        folder = convmixer.save_pretrained(source, tmp_path / name)
        with pytest.raises(ArgumentError, match="is a folder in the Hub's form already"):
            convmixer.push_to_hub(folder, "me/x")
    (finished_run / "result.json").rename(tmp_path / "result.json")
    with pytest.raises(DataError, match=r"is not the folder of a finished run, whose end writes a result.json"):
        convmixer.push_to_hub(finished_run, "me/x")
    (finished_run / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no model.safetensors, which the end of a run writes"):
        convmixer.push_to_hub(finished_run, "me/x")
    with pytest.raises(DataError, match=r"is not the folder of a run, which has a recipe.json"):
        convmixer.push_to_hub(tmp_path, "me/x")


def test_other_logits_are_not_published(small, tmp_path, monkeypatch):
    def wrong(folder, x):
        return verify.with_timm(folder, x)[0] + 1, None

    monkeypatch.setitem(verify.LIBRARIES, "timm", wrong)
    with pytest.raises(WeightsError, match="timm opens what would be published, but its logits differ by 1 from"):
        convmixer.push_to_hub(small, "me/x", dry_run=True)
    monkeypatch.setitem(verify.LIBRARIES, "timm", lambda folder, x: (torch.zeros(1, 7), None))
    with pytest.raises(WeightsError, match=r"timm opens .*, but its logits have the shape \(1, 7\), the model's \(1, "):
        convmixer.push_to_hub(small, "me/x", dry_run=True)
    monkeypatch.setitem(verify.LIBRARIES, "timm", lambda folder, x: 1 / 0)
    with pytest.raises(WeightsError, match=r"timm cannot open what would be published. ZeroDivisionError"):
        convmixer.push_to_hub(small, "me/x", dry_run=True)


# ---- the Hub, played by a server on this machine --------------------------------------------------------------------

CLIENT = f"""
import dataclasses, json, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import convmixer, torch
from command import run as cli
from convmixer.hub import client
from huggingface_hub import HfApi, ModelCard, hf_hub_download

def show(case, **record):
    print(json.dumps({{"case": case, **record}}))

def push(case, *arguments, **options):
    try:
        show(case, **dataclasses.asdict(convmixer.push_to_hub(*arguments, **options)))
    except convmixer.ConvMixerError as error:
        show(case, error=f"{{type(error).__name__}}: {{error}}")

def text(revision="main"):
    return Path(hf_hub_download("me/flowers", "README.md", revision=revision)).read_text()

torch.manual_seed(0)
model = convmixer.create_model("convmixer_256_8", dim=16, depth=1, num_classes=3, device="cpu")
card = {{"metrics": {{"top-1": 70.0}}, "test_data": "flowers", "licence": "mit", "label_names": ["a", "b", "c"]}}

push("dry", model, "me/flowers", dry_run=True, **card)
push("first", model, "me/flowers", private=True, **card)
written = ModelCard(text())
written.data.tags.append("mine")
api = HfApi()
content = f"---\\n{{written.data.to_yaml()}}\\n---\\nAbove.\\n{{written.text.strip()}}\\nBelow.\\n"
api.upload_file(repo_id="me/flowers", path_in_repo="README.md", path_or_fileobj=content.encode())
push("again", model, "me/flowers", **card | {{"metrics": {{"top-1": 75.0}}}})
push("branch", model, "me/flowers", revision="v2", message="Second", **card)
push("pull_request", model, "me/flowers", create_pr=True, **card)
show("loaded", sums=[
    convmixer.create_model(name, pretrained=True, device="cpu").head.weight.sum().item()
    for name in ("hf-hub:me/flowers", "hf-hub:me/flowers@v2")
], expected=model.head.weight.sum().item())
branch = client.read_branch("me/flowers")
api.upload_file(repo_id="me/flowers", path_in_repo="notes.txt", path_or_fileobj=b"x")
try:
    client.commit(branch, {{"config.json": Path(os.environ["RUN"]) / "recipe.json"}}, "Late", create_pr=False)
except convmixer.ConvMixerError as error:
    show("late", error=f"{{type(error).__name__}}: {{error}}")
push("reader", model, "me/flowers", token={READER!r} + "\\n", **card)
push("stranger", model, "me/other", token="hf_StrangerStranger", **card)
show("command", text=cli("push", os.environ["RUN"], "me/run", "--licence", "mit", "--tag", "x").stdout)
show("command_dry", text=cli("push", "convmixer_256_8", "me/dry", "--metric", "top-1=1.5", "--dry-run").stdout)
cli("push", "convmixer_256_8", "me/dry", "--metric", "top-1", "--dry-run", status=2)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server after all pushes, and the client's records."""
    run = tmp_path_factory.mktemp("parent") / "run"
    shutil.copytree(ROOT / "docs" / "runs" / "keras-post" / "dropout-0-seed-0", run)
    shutil.copy(convmixer.model_info(f"{NAME}.cifar10").weights[0].path, run / "model.safetensors")
    with serve() as server:
        lines = run_client(CLIENT, tmp_path_factory.mktemp("home"), server.endpoint, HF_TOKEN=WRITER, RUN=str(run))
    return server, {record["case"]: record for record in map(json.loads, lines)}


def test_dry_run(hub):
    _, records = hub
    record = records["dry"]
    assert record["url"] is None
    assert set(record["files"]) == {"model.safetensors", "config.json", "README.md"}
    assert set(record["differences"]) >= {"convmixer", "timm"}
    assert record["card"] == records["first"]["card"]


def test_one_commit_with_everything(hub):
    server, records = hub
    repository = server.repositories["me/flowers"]
    assert repository.private
    assert repository.messages[:2] == ["", "flowers, written by convmixer"]  # the Hub's own, and that of the push
    shas = list(repository.commits)
    assert records["first"]["url"] == f"{server.endpoint}/me/flowers/commit/{shas[1]}"
    files = repository.commits[shas[1]]
    assert {k: len(v) for k, v in files.items() if k != ".gitattributes"} == records["first"]["files"]
    assert files["README.md"].decode() == records["first"]["card"]
    assert sum("PUT /objects/" in r for r in server.requests) == 2  # equal weights go once


def test_text_of_the_card_is_kept(hub):
    server, records = hub
    card = ModelCard(server.repositories["me/flowers"].files()["README.md"].decode())
    assert card.text.strip().startswith("Above.")
    assert card.text.strip().endswith("Below.")
    assert card.data.tags[-1] == "mine"
    assert [r.metric_value for r in card.data.eval_results] == [75]
    assert records["again"]["card"] == card.content


def test_branch_and_pull_request(hub):
    server, records = hub
    repository = server.repositories["me/flowers"]
    assert set(repository.refs) == {"main", "v2", "refs/pr/1"}
    assert "Second" in repository.messages
    assert records["pull_request"]["url"] == f"{server.endpoint}/me/flowers/discussions/1"
    assert "README.md" in repository.files("refs/pr/1")
    assert "notes.txt" in repository.files()
    assert "notes.txt" not in repository.files("v2")


def test_loads_what_was_pushed(hub):
    record = hub[1]["loaded"]
    assert record["sums"] == [record["expected"]] * 2


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("late", "412"),
        ("late", "Nothing was committed. It was changed meanwhile: run this again"),
        ("reader", "The token may not write to me/flowers"),
        ("stranger", "Log in with `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_refusals(hub, case, text):
    assert hub[1][case]["error"].startswith("HubError: hf-hub:me/")
    assert text in hub[1][case]["error"]
    assert "me/other" not in hub[0].repositories


def test_token_is_nowhere(hub):
    server, records = hub
    secrets = [WRITER, READER, "hf_StrangerStranger"]
    contents = [json.dumps(records).encode()]
    for repository in server.repositories.values():
        contents += [content for files in repository.commits.values() for content in files.values()]
    assert not [s for s in secrets for content in contents if s.encode() in content]


def test_command(hub):
    server, records = hub
    lines = records["command"]["text"].splitlines()
    assert lines[0].startswith("opened with convmixer: logits differ by at most ")
    assert any(re.fullmatch(r" +2,4\d\d,\d\d\d bytes  model\.safetensors", line) for line in lines)
    assert lines[-1].startswith(f"{server.endpoint}/me/run/commit/")
    assert set(server.repositories["me/run"].files()) >= {"recipe.json", "metrics.csv"}
    text = records["command_dry"]["text"]
    assert "# dry" in text
    assert "| top-1 | 1.50 % | a test set without a name | not stated |" in text
    assert text.splitlines()[-1] == "dry run: nothing was uploaded to me/dry"
    assert "me/dry" not in server.repositories


def test_publication_has_what_the_documentation_names():
    names = [field.name for field in dataclasses.fields(publish.Publication)]
    assert names == ["repo_id", "files", "card", "differences", "url"]
