"""`~` is the home folder in every path that a function or a command takes."""

import json
import shutil

import pytest
import torch
from command import run
from PIL import Image

import convmixer
from convmixer.data.memory import load_images
from convmixer.evaluation import validate
from convmixer.plots import plot_patch_embedding, write_figure
from convmixer.training.history import read_history, write_history
from convmixer.training.recipes import get_recipe
from convmixer.training.run import RunFolder

NAME = "convmixer_256_8"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a photo, weights and a data set; the working folder is another one."""
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("HOME", str(place))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for label in "ab":
        (place / "data" / "test" / label).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red" if label == "a" else "blue").save(place / "data" / "test" / label / "0.png")
    Image.new("RGB", (32, 32), "green").save(place / "photo.png")
    yield place
    assert not list((tmp_path / "elsewhere").iterdir())  # such as a folder named ~


def test_functions(home):
    model = convmixer.create_model(NAME, device="cpu", dim=8, depth=1, num_classes=2).eval()
    convmixer.save_pretrained(model, "~/folder")
    weights = "~/folder/model.safetensors"
    again = convmixer.create_model("local-dir:~/folder", pretrained=True, device="cpu").eval()
    assert torch.equal(again.head.weight, model.head.weight)
    by_file = convmixer.create_model(NAME, checkpoint=weights, device="cpu", dim=8, depth=1)
    assert torch.equal(by_file.head.weight, model.head.weight)
    convmixer.load_checkpoint(by_file, weights)
    assert len(convmixer.predict(model, "~/photo.png")) == 2
    assert validate(model, "~/data", classes=["a", "b"]).count == 2
    assert len(load_images("~/data", "test", (3, 32, 32)).pixels) == 2
    assert convmixer.export_model(model, "~/model.safetensors").path == home / "model.safetensors"
    write_figure(plot_patch_embedding(model), "~/figure.png")
    torch.save(convmixer.ConvMixer(256, 8, 5, 2, num_classes=10).state_dict(), home / "old.pth")
    assert convmixer.convert_checkpoint("~/old.pth", "~/new.safetensors") == NAME
    assert convmixer.convert_checkpoint("~/old.pth", "~/converted") == f"local-dir:{home / 'converted'}"
    convmixer.save_pretrained("~/new.safetensors", "~/of a file")
    assert RunFolder("~/run", get_recipe("cifar10"), resume=False).path == home / "run"
    write_history(home / "metrics.csv", [])
    assert read_history("~/metrics.csv") == []
    with pytest.raises(convmixer.ConvMixerError, match=f"not in the local cache in '{home}/cache'"):
        convmixer.create_model("hf-hub:me/x", pretrained=True, cache_dir="~/cache", local_files_only=True)
    found = {path.name for path in home.iterdir()}
    assert {"folder", "figure.png", "model.safetensors", "new.safetensors", "converted", "of a file"} <= found


def test_commands(home):
    shutil.copy(convmixer.model_info(f"{NAME}.cifar10").weights[0].path, home / "w.safetensors")
    found = json.loads(run("predict", "~/photo.png", "--checkpoint=~/w.safetensors", "--json").stdout)
    assert found[0]["image"] == str(home / "photo.png")
    run("export", "~/w.safetensors", "--format=hub", "--output=~/hub")
    run("plot", "~/w.safetensors", "--output=~/plots", "--image=~/photo.png")
    assert (home / "hub" / "config.json").is_file()
    assert (home / "plots" / "class_activation.png").is_file()
    wrong = run("validate", "local-dir:~/hub", "--data=~/data", status=2).stderr
    assert "has the classes a, b; the model knows" in wrong.replace("\n", " ")
