"""The examples run, on a small budget."""

import ast
import csv
import json
import runpy
import sys
import tempfile
from pathlib import Path

import pytest
import sklearn.datasets
from sklearn.utils import Bunch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def _half_of_the_digits(monkeypatch):
    """Enough to run everything; what training on all of them reaches is seen in test_script."""
    digits = sklearn.datasets.load_digits()
    half = Bunch(images=digits.images[:900], target=digits.target[:900])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: half)


@pytest.mark.slow
def test_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["from_scratch.py", "--epochs", "2", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "from_scratch.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    accuracy = {line.split(":")[0]: line for line in lines if "calibration" in line}
    assert accuracy.keys() == {"from scratch", "fine-tuned"}
    assert all(float(line.split("top-1 ")[1].split(" %")[0]) > 80 for line in accuracy.values())
    label, probability = ast.literal_eval(lines[-1])[0]
    assert label.isdigit()
    assert 0 < probability <= 1
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == ["history.png", "mistakes.png"]


@pytest.mark.slow
@pytest.mark.usefixtures("_half_of_the_digits")
def test_notebook(tmp_path, monkeypatch, capsys):
    """All code cells in their order, as plain Python; the only magic command is for figures."""
    monkeypatch.setenv("CONVMIXER_EPOCHS", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cells = json.loads((EXAMPLES / "from_scratch.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in code:
        exec("".join(cell["source"]).removeprefix("%matplotlib inline\n"), names)
    assert "fine-tuned: top-1" in capsys.readouterr().out


def test_outputs_of_the_notebook():
    """The site shows them: five figures, no warning or error, no folder of the machine that ran it."""
    text = (EXAMPLES / "from_scratch.ipynb").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert "/tmp" not in printed
    assert "/home" not in printed
    assert len(text) < 700_000


@pytest.mark.slow
@pytest.mark.usefixtures("_half_of_the_digits")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves images open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_timm_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timm_finetune.py", "--epochs", "1", "--data", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "timm_finetune.py"), run_name="__main__")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("epoch 1: loss")
    assert float(line.split("accuracy ")[1].split(" %")[0]) > 30  # of ten classes
    assert len(list((tmp_path / "validation").rglob("*.png"))) == 225


def test_dense_prediction(tmp_path, monkeypatch):
    """Both heads on one backbone; what training for longer reaches is in the documentation."""
    for library in ("segmentation_models_pytorch", "torchmetrics", "pycocotools", "matplotlib"):
        pytest.importorskip(library, reason="pip install 'convmixer[dense]' matplotlib")
    options = ["--steps", "2", "--scenes", "6", "--backbones", "convmixer_128_8_ks7_p2.cifar10"]
    monkeypatch.setattr(sys, "argv", ["dense_digits.py", *options, "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "dense_digits.py"), run_name="__main__")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["U-Net", "RetinaNet"]
    assert [row["score"].split(" 0.")[0] for row in rows] == ["mean IoU", "mAP"]
    assert (tmp_path / "dense.png").stat().st_size > 10_000


def test_near_duplicates(monkeypatch, capsys):
    """Nearly all changed copies find their original, and nearly all pairs are an image and its copy."""
    monkeypatch.setattr(sys, "argv", ["near_duplicates.py"])
    runpy.run_path(str(EXAMPLES / "near_duplicates.py"), run_name="__main__")
    *changes, pairs = capsys.readouterr().out.splitlines()[-5:]
    counts = [[int(word) for word in line.split() if word.isdigit()] for line in changes]
    assert sum(found for found, _ in counts) > 0.8 * sum(count for _, count in counts)
    closer, right = [int(word) for word in pairs.split() if word.isdigit()][:2]
    assert right > 0.9 * closer > 10


@pytest.mark.parametrize("name", ["from_scratch.py", "fine_tune_digits.py"])
def test_length(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60
