"""`convmixer predict`."""

import functools
import http.server
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from command import records, run
from hub_server import serving

import convmixer
from convmixer.hub.checkpoints import save_weights

pytestmark = pytest.mark.usefixtures("wide_terminal")


CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


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


def test_predict_a_file(cat, monkeypatch):
    monkeypatch.chdir(cat.parent)  # a long name with spaces takes several lines
    lines = run("predict", cat.name, "--topk", 3, "--device", "cpu").stdout.splitlines()
    assert lines[0].split() == ["image", "label", "probability"]
    assert len(lines) == 4
    assert lines[1].strip().startswith(f"{cat.name} ")
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


def test_hostile_texts_of_a_folder_are_not_obeyed(cat, tmp_path, monkeypatch):
    """Label names, and keys that a warning names, that come from somebody else's file."""
    monkeypatch.chdir(cat.parent)  # a long name with spaces takes several lines
    labels = ["\x1b]0;owned\x07", "\x1b[2Jgone", "[red]dog[/red]", "left\u202egnp", "[/]", "a\rb", "\x9b5m", ":cat:"]
    config = {"architecture": "convmixer_256_8", "num_classes": 8, "label_names": labels}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": {"\x1b[31m": 1}}))
    save_weights(convmixer.create_model("convmixer_256_8", device="cpu", num_classes=8), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="unknown keys") as caught:
        result = run("predict", cat.name, "--model", f"local-dir:{tmp_path}", "--topk", 8, "--device", "cpu")
    for text in (result.stdout, result.stderr, str(caught[0].message)):
        assert not re.search("[\x1b\x07\r\x9b\u202e]", text)
    for shown in ("\\x1b]0;owned\\x07", "[red]dog[/red]", "left\\u202egnp", "[/]", ":cat:"):
        assert shown in result.stdout
    assert len(result.stdout.splitlines()) == 9
