"""The examples run, on a small budget."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def _run(*command: str, **environment: str) -> str:
    env = {**os.environ, **environment}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_script(tmp_path):
    output = _run(str(EXAMPLES / "from_scratch.py"), "--epochs", "1", "--output", str(tmp_path))
    accuracy = {line.split(":")[0]: line for line in output.splitlines() if "calibration" in line}
    assert accuracy.keys() == {"from scratch", "fine-tuned"}
    assert float(accuracy["from scratch"].split("top-1 ")[1].split(" %")[0]) > 12  # of ten classes, after one epoch
    label, probability = ast.literal_eval(output.splitlines()[-1])[0]
    assert label.isdigit()
    assert 0 < probability <= 1
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == ["history.png", "mistakes.png"]


def test_notebook(tmp_path):
    """All code cells in their order, as plain Python: there are no magic commands in them."""
    cells = json.loads((EXAMPLES / "from_scratch.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    output = _run(str(script), CONVMIXER_EPOCHS="1", TMPDIR=str(tmp_path))
    assert "fine-tuned: top-1" in output


@pytest.mark.parametrize("name", ["from_scratch.py", "fine_tune_digits.py"])
def test_length(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60
