"""The command line as a user meets it: output, errors and exit statuses."""

import functools
import http.server
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run
from hub_server import serving
from PIL import Image
from timm.models.convmixer import ConvMixer as TimmConvMixer

import convmixer
from convmixer.cli import main
from convmixer.hub.checkpoints import save_weights

CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def records(*arguments, **options):
    return json.loads(run(*arguments, **options).stdout)


@pytest.fixture
def pictures(cat, tmp_path):
    """A folder with three photographs, one of them in a folder of its own, and a text file."""
    folder = tmp_path / "pictures"
    (folder / "inside").mkdir(parents=True)
    shutil.copy(cat, folder / "cat.png")
    shutil.copy(cat.parent / "coffee.png", folder / "coffee.PNG")
    shutil.copy(cat.parent / "camera.png", folder / "inside" / "camera.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


# ---- the program ----------------------------------------------------------------------------------------------------


def test_help_names_every_command():
    text = run("--help").stdout
    for name in ("list", "info", "predict", "train", "push", "convert", "export", "plot"):
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
    assert run("-h").stdout == text


@pytest.mark.parametrize("name", main.commands)
def test_help_of_every_command(name):
    text = run(name, "--help").stdout
    assert text.startswith(f"Usage: main {name}")
    assert re.search(r"^  \w.+\.$", text, re.MULTILINE)  # it says what it does


def test_version():
    assert run("--version").stdout.strip().endswith(importlib.metadata.version("convmixer"))


def test_unknown_command():
    assert "No such command 'classify'" in run("classify", status=2).stderr


def test_as_a_module(monkeypatch, capsys):
    """What `python -m convmixer` does; in a process of its own it trains in test_training.py."""
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("convmixer", run_name="__main__")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Usage: convmixer" in shown.out
    assert "predict" in shown.out


# ---- list and info --------------------------------------------------------------------------------------------------


def test_list():
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == ["model", "input", "params", "MACs", "weights", "top-1"]
    assert {line.split()[0] for line in lines[1:]} >= set(convmixer.list_models())
    big = next(line for line in lines if "convmixer_1536_20" in line)
    assert big.split() == ["convmixer_1536_20", "224", "51.63", "M", "51.10", "G", "in1k", "(Hub)", "81.37"]


def test_list_by_pattern():
    assert [r["name"] for r in records("list", "convmixer_256*", "--json")] == [
        "convmixer_256_8",
        "convmixer_256_8_ks9_p1",
    ]
    text = run("list", "convmixer_256*").stdout
    assert "convmixer_256_8_ks9_p1" in text
    assert "convmixer_768_32" not in text
    assert records("list", "resnet*", "--json") == []


def test_list_of_what_has_weights():
    found = records("list", "--pretrained", "--json")
    assert [r["name"] for r in found] == convmixer.list_models(pretrained=True)
    names = [f"{r['name']}.{w['tag']}" for r in found for w in r["weights"]]
    assert sorted(names) == convmixer.list_pretrained()
    assert "convmixer_512_12" not in run("list", "--pretrained").stdout


def test_list_for_programs():
    found = {r["name"]: r for r in records("list", "--json")}
    assert set(found) == set(convmixer.list_models())
    for name, record in found.items():
        model = convmixer.create_model(name, device="meta")
        assert record["parameters"] == sum(p.numel() for p in model.parameters())
        assert record["input_size"] == list(model.pretrained_cfg["input_size"])
    # 16 x 16 patches: the stem, eight blocks of a depthwise and a pointwise convolution, the head
    assert found["convmixer_256_8"]["macs"] == 256 * (12 * 256 + 8 * (25 * 256 + 256 * 256)) + 256 * 10


def test_info():
    text = run("info", "convmixer_768_32").stdout
    for piece in ("768 / 32", "7 / 7", "relu", "21,110,248", "3x224x224", "bicubic", "MIT", "80.16 %"):
        assert piece in text
    assert "hf-hub:timm/convmixer_768_32.in1k/model.safetensors@main" in text


def test_info_for_programs():
    (listed,) = records("list", "convmixer_256_8", "--json")
    record = records("info", "convmixer_256_8", "--json")
    assert record == listed
    assert record["mean"] == [0.4914, 0.4822, 0.4465]
    (weights,) = records("info", "convmixer_256_8.cifar10", "--json")["weights"]
    assert weights["source"] == "package"
    assert "top-1" in {m["name"] for m in weights["metrics"]}


def test_info_of_a_model_without_weights():
    assert "No public weights are known" in run("info", "convmixer_512_12").stdout
    assert records("info", "convmixer_512_12", "--json")["weights"] == []


def test_a_narrow_terminal_cuts_nothing_off(monkeypatch):
    """A checksum or a name that lost its end is of no use."""
    monkeypatch.setenv("COLUMNS", "40")
    checksum = convmixer.model_info("convmixer_256_8.cifar10").weights[0].sha256
    text = run("info", "convmixer_256_8").stdout
    assert checksum in re.sub(r"\s+", "", text)
    monkeypatch.setenv("COLUMNS", "80")
    assert all(name in run("list").stdout for name in convmixer.list_models())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("info", "convmixer_256_9"), r"error: unknown model 'convmixer_256_9'; did you mean convmixer_256_8 or "),
        (("info", "resnet"), r"error: unknown model 'resnet'; valid: convmixer_1024_12, "),
        (("info", "convmixer_256_8.in1k"), r"has no weights 'in1k'; valid: convmixer_256_8\.cifar10"),
        (("predict", "x.png", "--model", "convmixer_768_31"), r"did you mean convmixer_768_32"),
        (("predict", "x.png", "--model", "convmixer_512_12"), r"convmixer_512_12 has no weights"),
    ],
)
def test_unknown_models(cat, arguments, text):
    result = run(*(cat if a == "x.png" else a for a in arguments), status=2)
    assert re.search(text, result.stderr)
    assert result.stdout == ""


# ---- predict --------------------------------------------------------------------------------------------------------


def test_predict_a_file(cat):
    lines = run("predict", cat, "--topk", 3, "--device", "cpu").stdout.splitlines()
    assert lines[0].split() == ["image", "label", "probability"]
    assert len(lines) == 4
    assert lines[1].split()[0] == str(cat)
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    for line, (label, probability) in zip(lines[1:], convmixer.predict(model, cat, topk=3), strict=True):
        assert line.split()[-3:] == [label, f"{100 * probability:.1f}", "%"]


def test_predict_for_programs(cat, pictures):
    found = records("predict", pictures, cat, "--json", "--topk", 99, "--device", "cpu")
    images = [pictures / "cat.png", pictures / "coffee.PNG", pictures / "inside" / "camera.png", cat]
    assert [r["image"] for r in found] == [str(path) for path in images]
    for record in found:
        assert {guess["label"] for guess in record["predictions"]} == CIFAR10
        shares = [guess["probability"] for guess in record["predictions"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
    assert found[0]["predictions"] == found[3]["predictions"]


def test_batches_do_not_change_answers(pictures):
    one, many = (records("predict", pictures, "--json", "--batch-size", n, "--device", "cpu") for n in (1, 64))
    for a, b in zip(one, many, strict=True):
        assert a["image"] == b["image"]
        for x, y in zip(a["predictions"], b["predictions"], strict=True):
            assert (x["label"], x["probability"]) == (y["label"], pytest.approx(y["probability"], abs=1e-4))


def test_float32_is_float32_on_gpus(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as PyTorch has it
    run("list")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_broken_image_among_good_ones(pictures, batch_size):
    broken = pictures / "broken.jpg"
    broken.write_bytes(b"no picture")
    options = ("--topk", 1, "--batch-size", batch_size, "--device", "cpu")
    result = run("predict", pictures, *options, status=1)
    assert f"error: {str(broken)!r} is not an image" in result.stderr
    assert result.stdout.count(" %") == 3
    assert str(broken) not in result.stdout
    result = run("predict", pictures, "--json", *options, status=1)
    found = {r["image"]: r for r in json.loads(result.stdout)}
    assert "is not an image" in found[str(broken)]["error"]
    assert "predictions" not in found[str(broken)]
    assert sum("predictions" in r for r in found.values()) == 3


def test_what_a_folder_holds_beside_images_is_counted(cat, tmp_path):
    for name in ("a.png", ".hidden.png", "__MACOSX/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(cat, tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("")
    shown = run("predict", tmp_path / "in", "--json", "--no-draft", "--device", "cpu")
    assert [record["image"] for record in json.loads(shown.stdout)] == [str(tmp_path / "in" / "a.png")]
    assert shown.stderr.strip() == f"{tmp_path / 'in'}: 1 image; left out: 1 .txt"


def test_predict_an_address(cat):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    make = functools.partial(Handler, directory=str(cat.parent))
    with serving(make) as server:
        url = f"http://127.0.0.1:{server.server_port}/{cat.name}"
        by_url, by_path, missing = records(
            "predict", url, cat, url.replace("cat", "mouse"), "--json", "--device", "cpu", status=1
        )
    assert by_url == {"image": url, "predictions": by_path["predictions"]}
    assert missing["error"].endswith("mouse.png: the server answers 404 File not found")


def test_nothing_but_broken_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    result = run("predict", tmp_path / "a.png", tmp_path / "none.png", status=1)
    assert "a.png' is not an image" in result.stderr
    assert "no image at" in result.stderr
    assert "none.png" in result.stderr
    assert result.stdout == ""


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert re.search(r"error: no images in the folder .*empty", run("predict", tmp_path / "empty", status=2).stderr)


def test_a_folder_that_is_called_like_an_image(pictures):
    (pictures / "album.png").mkdir()
    assert len(records("predict", pictures, "--json", "--device", "cpu")) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--topk", "0"), "topk"),
        (("--topk", "many"), "many"),
        (("--batch-size", "0"), "batch-size"),
        (("--device", "abacus"), "'abacus'"),
        (("--checkpoint", "none.safetensors"), "no weights file at 'none.safetensors'"),
        (("--model", "hf-hub:nobody"), "give hf-hub:owner/repo"),
        (("--model", "local-dir:/none"), "cannot read"),
    ],
)
def test_senseless_options(cat, options, text):
    result = run("predict", cat, *options, status=2)
    assert text in result.stderr
    assert result.stdout == ""


def test_predict_needs_an_image():
    assert "Missing argument" in run("predict", status=2).stderr


def test_predict_with_a_checkpoint(cat, tmp_path):
    """Class names come from the file; so does their number."""
    model = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=2)
    save_weights(model, tmp_path / "two.safetensors", {"label_names": ["tom", "jerry"]})
    (record,) = records("predict", cat, "--checkpoint", tmp_path / "two.safetensors", "--json", "--device", "cpu")
    assert {guess["label"] for guess in record["predictions"]} == {"tom", "jerry"}
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["tom", "jerry"]}
    expected = dict(convmixer.predict(model, cat))
    assert {g["label"]: g["probability"] for g in record["predictions"]} == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(os.name == "nt", reason="such names do not exist on Windows")
@pytest.mark.parametrize(
    "name",
    [
        "\x1b]0;owned\x07.png",  # sets the title of the window
        "\x1b[2J\x1b[1;1Hall is well.png",  # clears the screen
        "good.png\r\x1b[31mhidden.png",
        "\x9b5mblink.png",
        "left\u202egnp.exe.png",  # turns the direction of writing
        "two\nlines.png",
        os.fsdecode(b"latin-\xe9.png"),
    ],
    ids=["title", "clear", "return", "C1", "direction", "newline", "no UTF-8"],
)
@pytest.mark.parametrize("good", [True, False])
def test_control_sequences_in_file_names_are_not_obeyed(cat, tmp_path, monkeypatch, name, good):
    monkeypatch.chdir(tmp_path)  # long paths are shown shortened
    path = Path("odd", name)
    path.parent.mkdir()
    if good:
        shutil.copy(cat, path)
    else:
        path.write_bytes(b"broken")
    result = run("predict", path.parent, "--topk", 1, "--device", "cpu", status=0 if good else 1)
    for text in (result.stdout, result.stderr):
        assert not re.search("\x1b\\]|\x1b\\[2J|\x1b\\[1;1H|\x1b\\[31mhidden|[\x07\r\x9b\u202e\udce9]", text)
    assert len(result.stdout.splitlines()) == (2 if good else 0)
    assert len(result.stderr.splitlines()) == (0 if good else 1)
    shown = result.stdout if good else result.stderr
    assert ".png" in shown
    (record,) = records("predict", path.parent, "--json", "--device", "cpu", status=0 if good else 1)
    assert record["image"] == str(path)  # escaped, as JSON does: nothing is lost


@pytest.mark.parametrize("name", ["[red]x.png", "[red.png", ":cat:.png", "[b]:dog:[b].png", "100%.png"])
@pytest.mark.parametrize("good", [True, False])
def test_names_are_shown_as_they_are(cat, tmp_path, monkeypatch, name, good):
    """Not as the markup or the pictographs of the library that prints them."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd" / name
    path.parent.mkdir()
    if good:
        shutil.copy(cat, path)
    result = run("predict", os.path.join("odd", name), "--topk", 1, "--device", "cpu", status=0 if good else 1)
    shown = os.path.join("odd", name) if good else repr(os.path.join("odd", name))
    assert shown in (result.stdout if good else result.stderr)


def test_hostile_texts_of_a_folder_are_not_obeyed(cat, tmp_path):
    """Label names, and keys that a warning names, that come from somebody else's file."""
    labels = ["\x1b]0;owned\x07", "\x1b[2Jgone", "[red]dog[/red]", "left\u202egnp", "[/]", "a\rb", "\x9b5m", ":cat:"]
    config = {"architecture": "convmixer_256_8", "num_classes": 8, "label_names": labels}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": {"\x1b[31m": 1}}))
    save_weights(convmixer.create_model("convmixer_256_8", device="cpu", num_classes=8), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="unknown keys") as caught:
        result = run("predict", cat, "--model", f"local-dir:{tmp_path}", "--topk", 8, "--device", "cpu")
    for text in (result.stdout, result.stderr, str(caught[0].message)):
        assert not re.search("[\x1b\x07\r\x9b\u202e]", text)
    for shown in ("\\x1b]0;owned\\x07", "[red]dog[/red]", "left\\u202egnp", "[/]", ":cat:"):
        assert shown in result.stdout
    assert len(result.stdout.splitlines()) == 9


# ---- convert --------------------------------------------------------------------------------------------------------


def test_convert_and_predict(cat, tmp_path):
    theirs = TimmConvMixer(dim=256, depth=8, kernel_size=5, patch_size=2, num_classes=10).eval()
    old, new = tmp_path / "old.pth.tar", tmp_path / "new.safetensors"
    torch.save({"state_dict": theirs.state_dict()}, old)
    assert run("convert", old, new).stdout.strip() == f"{new}: convmixer_256_8"
    (record,) = records("predict", cat, "--checkpoint", new, "--json", "--topk", 10, "--device", "cpu")
    with Image.open(cat) as image, torch.no_grad():
        x = convmixer.create_transform("convmixer_256_8")(image.convert("RGB"))
        expected = sorted(theirs(x[None]).softmax(1)[0].tolist(), reverse=True)
    assert [g["probability"] for g in record["predictions"]] == pytest.approx(expected, abs=1e-4)


def test_a_pickle_is_not_loaded_and_the_way_on_is_named(cat, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pth")
    result = run("predict", cat, "--checkpoint", tmp_path / "old.pth", status=2)
    assert "Convert it once: convmixer convert " in result.stderr


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "no checkpoint at"), (b"text", "cannot read"), ({"conv1.weight": torch.zeros(1)}, "is not a ConvMixer")],
)
def test_what_cannot_be_converted(tmp_path, content, text):
    source = tmp_path / "old.pth"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    result = run("convert", source, tmp_path / "new.safetensors", status=2)
    assert text in result.stderr
    assert not (tmp_path / "new.safetensors").exists()


def test_convert_into_a_folder_that_is_not_there(tmp_path):
    torch.save(convmixer.create_model("convmixer_256_8", device="cpu").state_dict(), tmp_path / "old.pth")
    result = run("convert", tmp_path / "old.pth", tmp_path / "nowhere" / "new.safetensors", status=2)
    assert "nowhere" in result.stderr


# ---- train ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Forty training and eight test images of 8 x 8 pixels: bright and dark noise."""
    folder = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for name, low in (("bright", 160), ("dark", 0)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(low, low + 90, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


SMALL = ("--set", "batch_size=8", "--set", "epochs=1", "--set", "image_sizes=[[0, 8]]", "--device", "cpu")


def test_train_then_predict(shapes, tmp_path):
    output = tmp_path / "run"
    options = ("--data", shapes, "--output", output, "--set", "model=convmixer_256_8", *SMALL)
    text = run("train", "cifar10-cpu", *options).stdout
    assert "convmixer_256_8 on cpu: 36 training, 4 validation images, 8 test images" in text
    assert "epoch   1" in text
    assert re.search(r"top-1 \d+\.\d\d % of 8 images", text)
    recipe = json.loads((output / "recipe.json").read_text())
    assert (recipe["batch_size"], recipe["epochs"], recipe["image_sizes"]) == (8, 1, [[0, 8]])
    assert recipe["lr"] == 0.01  # the rest is the recipe's
    assert len((output / "metrics.csv").read_text().splitlines()) == 2
    result = json.loads((output / "result.json").read_text())
    assert list(result["test_images"].values()) == [8]

    weights = output / "model.safetensors"
    found = records("predict", shapes / "test", "--checkpoint", weights, "--json", "--device", "cpu")
    assert len(found) == 8
    assert {guess["label"] for r in found for guess in r["predictions"]} == {"bright", "dark"}

    again = run("train", "cifar10-cpu", *options, status=2)
    assert "holds a run: resume it (--resume) or choose another folder" in again.stderr
    run("train", "cifar10-cpu", *options, "--resume")
    other = run("train", "cifar10-cpu", *options, "--resume", "--set", "lr=0.02", status=2)
    assert "with another recipe: lr was 0.01, is 0.02" in other.stderr


def test_tables_validation_sets_and_weights_by_the_command_line(shapes, tmp_path):
    rows = [f"{file.relative_to(shapes)},{file.parent.name}" for file in sorted(shapes.rglob("*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    labels = ("--data", shapes, "--labels", tmp_path / "labels.csv")
    options = (*labels, "--val", shapes / "test", "--output", tmp_path / "run", *SMALL)
    text = run("train", "cifar10-cpu", *options, "--set", "class_weights=[1, 2.5]", "--set", "draft=false").stdout
    assert text.splitlines()[:3] == [
        f"train: 40 images in 2 classes from {shapes.name}/train/ by labels.csv",
        "validation: 8 images in 2 classes from test/",
        f"test: 8 images in 2 classes from {shapes.name}/test/ by labels.csv",
    ]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["class_weights"] == [1, 2.5]
    taken = f"test: 8 images in 2 classes from {shapes.name}/test/ by labels.csv"
    shown = run("validate", tmp_path / "run", *labels, "--json", "--device", "cpu")
    assert json.loads(shown.stdout)["count"] == 8  # nothing but JSON
    assert taken in shown.stderr
    assert taken in run("validate", tmp_path / "run", *labels, "--no-draft", "--device", "cpu").stdout
    other = run("train", "cifar10-cpu", *options[:-4], "--set", "class_weights=even", status=2)
    assert "class_weights='even': give \"balanced\", or a number" in other.stderr


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("batch=8", r"'batch=8': give FIELD=VALUE with a field of model, checkpoint, "),
        ("batch_size", r"'batch_size': give FIELD=VALUE"),
        ("=8", r"'=8': give FIELD=VALUE"),
        ("epochs=ten", r"'epochs=ten': 'ten' is no int"),
        ("epochs=1.5", r"'1\.5' is no int"),
        ("lr=fast", r"'fast' is no float"),
        ("knee=0.8,0.05", r"'0\.8,0\.05' is no list such as \[2, 12\]"),
        ("rand_augment=2", r"'2' is no list"),
        ("epochs=0", r"recipe field epochs=0: give at least 1"),
        ("lr=-1", r"recipe field lr=-1\.0: give above 0"),
        ("lr=nan", r"recipe field lr=nan"),
        ("flip=2", r"recipe field flip=2\.0: give in \[0, 1\]"),
        ("knee=[0.8]", r"knee"),
        ('knee=["a", 1]', r"knee"),
        ("rand_augment=[2]", r"rand_augment"),
        ('rand_augment=["a", 1]', r"rand_augment"),
        ("image_sizes=[1, 2]", r"image_sizes"),
        ("image_sizes=[[0]]", r"image_sizes"),
        ("model=convmixer_256_9", r"unknown model 'convmixer_256_9'; did you mean convmixer_256_8"),
        ("opt=adamm", r"adamm"),
    ],
)
def test_wrong_settings(shapes, tmp_path, setting, text):
    options = ("--data", shapes, "--output", tmp_path / "run", *SMALL)
    result = run("train", "cifar10-cpu", *options, "--set", setting, status=2)
    assert re.search(text, result.stderr)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("cifar10", "--data", "{shapes}/none"), r"no data at .*none"),
        (("cifar10-gpu", "--data", "{shapes}"), r"unknown recipe 'cifar10-gpu'; did you mean cifar10"),
        (("cifar10-cpu",), r"Missing option '--data'"),
        (("cifar10-cpu", "--data", "{shapes}", "--resume"), r"nothing to resume"),
        (("cifar10-cpu", "--data", "{shapes}", "--set", "batch_size=64"), r"36 training images do not fill one batch"),
        (("cifar10-cpu", "--data", "{shapes}", "--precision", "float8"), r"float8"),
    ],
)
def test_training_that_cannot_start(shapes, tmp_path, arguments, text):
    arguments = [a.format(shapes=shapes) for a in arguments]
    result = run("train", *arguments, "--output", tmp_path / "run", "--device", "cpu", status=2)
    assert re.search(text, result.stderr)


def test_a_broken_training_image_is_named(shapes, tmp_path):
    """Nothing else may stand in for it: the accuracy would be that of other images."""
    shutil.copytree(shapes, tmp_path / "data")
    (tmp_path / "data" / "test" / "dark" / "2.png").write_bytes(b"broken")
    options = ("--data", tmp_path / "data", "--output", tmp_path / "run", *SMALL)
    assert "cannot read image 6 of" in run("train", "cifar10-cpu", *options, status=2).stderr
