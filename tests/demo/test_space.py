"""The files of a Space: their content, their application, and what is refused."""

import ast
import errno
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import time
from importlib import metadata

import pytest
from command import run
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from processes import started

import convmixer
from convmixer.demo import space as module
from convmixer.demo import write_space
from convmixer.errors import ArgumentError, ConvMixerError, DependencyError, UnknownModelError
from convmixer.hub.checkpoints import save_weights

NAME = "convmixer_128_8_ks7_p2"
FILES = ["README.md", "app.py", "requirements.txt"]


@pytest.fixture
def trained(tmp_path):
    """The folder of a finished run."""
    folder = tmp_path / "runs" / 'flowers "2"'
    folder.mkdir(parents=True)
    sizes = [["dim", 8], ["depth", 2], ["kernel_size", 3], ["num_classes", 3]]
    (folder / "recipe.json").write_text(json.dumps({"model": NAME, "model_args": sizes}))
    (folder / "result.json").write_text("{}")
    model = convmixer.create_model(NAME, **dict(sizes), device="cpu")
    save_weights(model, folder / "model.safetensors", {"label_names": ["aster", "rose", "tulip"]})
    return folder


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def models(folder):
    """The models that app.py passes to `serve`: the source code of each one by its name."""
    (call,) = (
        node
        for node in ast.walk(ast.parse((folder / "app.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "serve"
    )
    return {key.value: ast.unparse(value) for key, value in zip(call.args[0].keys, call.args[0].values, strict=True)}


def header(folder):
    return SpaceCard.load(folder / "README.md").data.to_dict()


def start(folder, *, seconds=300):
    """Run app.py in a process, as a Space does; return Gradio's configuration of the page. Ctrl-C ends the process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(module.__file__).partition(f"{os.sep}convmixer{os.sep}")[0], *sys.path])
    with started([sys.executable, "app.py"], env=env, cwd=folder) as process:
        deadline = time.monotonic() + seconds
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
            try:
                connection.request("GET", "/config")
                config = json.loads(connection.getresponse().read())
                process.send_signal(signal.SIGINT)  # Ctrl-C
                assert process.wait(seconds) == 0
                return config
            except ConnectionRefusedError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
            finally:
                connection.close()


def choices(config):
    """The models that the page offers."""
    (dropdown,) = (c["props"] for c in config["components"] if c["type"] == "dropdown")
    return [name for name, _ in dropdown["choices"]]


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="a Space needs gradio: pip install 'convmixer[demo]'")


@pytest.mark.usefixtures("gradio")
def test_packaged_weights(tmp_path):
    folder = write_space(tmp_path / "space", NAME)
    assert names(folder) == FILES
    assert header(folder) == {
        "title": f"{NAME}.cifar10",
        "emoji": "🖼️",
        "colorFrom": "green",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": metadata.version("gradio"),
        "app_file": "app.py",
        "python_version": ".".join(map(str, sys.version_info[:2])),
        "license": "mit",
    }
    assert models(folder) == {f"{NAME}.cifar10": f"'{NAME}.cifar10'"}
    requirement = Requirement((folder / "requirements.txt").read_text().strip())
    assert (requirement.name, requirement.extras) == ("convmixer", {"demo"})
    assert metadata.version("convmixer") in requirement.specifier
    assert "# convmixer_128" in (folder / "README.md").read_text()


@pytest.mark.usefixtures("gradio")
def test_the_application_of_a_run_starts(tmp_path, trained):
    """It starts in another folder, after the run is gone: the weights were copied."""
    written = write_space(tmp_path / "space", str(trained))
    assert names(written) == [
        "README.md",
        "app.py",
        *(f"model/{n}" for n in ("README.md", "config.json")),
        *["model/model.safetensors", "model/recipe.json"],
        "requirements.txt",
    ]
    assert header(written)["title"] == 'flowers "2"'
    folder = shutil.move(written, tmp_path / "elsewhere")
    shutil.rmtree(trained)
    config = start(folder)
    assert config["title"] == "convmixer"
    assert choices(config) == ['flowers "2"']
    assert "aster, rose, tulip" in json.dumps(config["components"])


@pytest.mark.usefixtures("gradio")
def test_files_and_folders(tmp_path, trained):
    save_weights(convmixer.create_model(NAME, pretrained=True, device="cpu"), tmp_path / "mine.safetensors")
    convmixer.save_pretrained(str(trained), tmp_path / "hub")
    for model, title in ((str(tmp_path / "mine.safetensors"), "mine"), (f"local-dir:{tmp_path / 'hub'}", "hub")):
        folder = write_space(tmp_path / f"space of {title}", model)
        assert header(folder)["title"] == title
        assert {"model/config.json", "model/model.safetensors", *FILES} <= set(names(folder))
        (source,) = models(folder).values()
        assert source == "f\"local-dir:{HERE / 'model'}\""


@pytest.mark.usefixtures("gradio")
@pytest.mark.parametrize(
    ("model", "repository", "source"),
    [
        ("hf-hub:me/flowers@v1", "me/flowers", "hf-hub:me/flowers@v1"),
        ("convmixer_768_32", "timm/convmixer_768_32.in1k", "convmixer_768_32.in1k"),
    ],
)
def test_weights_on_the_hub(tmp_path, monkeypatch, model, repository, source):
    asked = []
    monkeypatch.setattr(module, "open_classifiers", lambda models, **_: asked.append(models))
    folder = write_space(tmp_path / "space", model)
    assert asked == [[model]]
    assert names(folder) == FILES
    assert header(folder)["models"] == [repository]
    assert list(models(folder).values()) == [repr(source)]


def test_the_command(tmp_path, gradio):
    lines = run("demo", "--space", tmp_path / "space", NAME).stdout.splitlines()
    assert [line.split()[2] for line in lines[:3]] == [str(tmp_path / "space" / name) for name in FILES]
    assert lines[3] == (
        "Publish it: hf repos create OWNER/NAME --type space --sdk gradio && "
        f"hf upload OWNER/NAME {tmp_path / 'space'} --type space"
    )
    for arguments, text in (
        ([NAME, "convmixer_256_8"], "--space is for one model, not for 2: convmixer_128_8_ks7_p2, convmixer_256_8"),
        (["--port", 1], "--space writes files and serves nothing: leave out --port"),
        (["--backend", "eager"], "--space writes files and serves nothing: leave out --backend"),
    ):
        assert text in " ".join(run("demo", "--space", tmp_path / "other", *arguments, status=2).stderr.split())
    assert not (tmp_path / "other").exists()


def test_what_is_refused(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for path, what in ((tmp_path / "full", "not empty"), (tmp_path / "full" / "letter.txt", "a file")):
        with pytest.raises(
            ArgumentError, match=rf"folder='.*' is {what}: give a folder that is empty or does not exist"
        ):
            write_space(path, NAME)
    assert names(tmp_path / "full") == ["letter.txt"]
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(DependencyError, match=r"a Space needs gradio, .*: pip install 'convmixer\[demo\]'"):
        write_space(tmp_path / "space", NAME)
    assert not (tmp_path / "space").exists()


def fill_disk(staging):
    """Write one file of two."""
    (staging / "app.py").write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("gradio")
def test_nothing_is_left_behind(tmp_path, monkeypatch, trained):
    with pytest.raises(UnknownModelError, match="no folder or file 'convmixer_265_8'"):
        write_space(tmp_path / "space", "convmixer_265_8")
    (tmp_path / "empty").mkdir()
    (trained / "result.json").unlink()
    for folder in ("space", "empty"):
        with pytest.raises(ConvMixerError, match="is not the folder of a finished run"):
            write_space(tmp_path / folder, str(trained))
    assert not (tmp_path / "space").exists()
    assert names(tmp_path / "empty") == []
    assert (tmp_path / "empty").is_dir()
    monkeypatch.setattr(module, "_write", lambda staging, _: fill_disk(staging))
    for folder in ("space", "empty"):
        with pytest.raises(
            ConvMixerError, match=rf"cannot write '.*{folder}': No space left on device\. Choose another"
        ):
            write_space(tmp_path / folder, NAME)
    assert not (tmp_path / "space").exists()
    assert names(tmp_path / "empty") == []
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(ConvMixerError, match=r"cannot write '.*/letter/space': Not a directory\. Choose another"):
        write_space(tmp_path / "letter" / "space", NAME)
