"""The Python snippets of README and the documentation run, those of a page one after the other."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import convmixer
from convmixer import registry
from convmixer.hub.checkpoints import save_weights
from sitegen.pages import page as page_of

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "runs").glob("*/README.md"))
    if "```python" in page.read_text(encoding="utf-8")
)
EXPORTING = "docs/exporting.md"  # it takes longer: files for three runtimes
SYBIL = Sybil([PythonCodeBlockParser(), SkipParser()], path=str(ROOT))


@pytest.fixture
def _here(tmp_path, monkeypatch):
    """A folder with all that the pages name: photographs, data, the weights of a run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples" / "images", "examples/images")
    for flower, photograph in (("daisy", "cat.png"), ("rose", "dog.jpg")):
        with Image.open(Path("examples/images", photograph)) as photo:
            for split, angles in (("train", range(0, 360, 9)), ("test", (5, 95, 185))):
                folder = Path("data/flowers", split, flower)
                folder.mkdir(parents=True)
                for angle in angles:
                    photo.rotate(angle).resize((32, 32)).save(folder / f"{angle}.png")
    shutil.copytree("data/flowers/train", "data/train")
    Path("runs/flowers").mkdir(parents=True)
    flowers = convmixer.create_model("convmixer_256_8", num_classes=2, device="cpu")
    save_weights(flowers, "runs/flowers/model.safetensors", {"label_names": ["daisy", "rose"]})


@pytest.fixture
def _exported(_here):
    """What the commands of the page on exporting write."""
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    for file, format_ in (("convmixer_256_8.xml", "openvino"), ("convmixer_256_8.pt2", "torch-export")):
        convmixer.export_model(model, file, format_)


def run(page):
    document = SYBIL.parse(ROOT / page)
    # For the conditions under which snippets are left out.
    document.namespace["torch"] = torch
    document.namespace["installed"] = importlib.util.find_spec
    for example in document.examples():
        example.evaluate()


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("page", [page for page in PAGES if page != EXPORTING])
def test_page(page):
    run(page)


@pytest.mark.slow
@pytest.mark.usefixtures("_exported")
def test_exporting():
    run(EXPORTING)


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("name", [v.name for v in registry.VARIANTS if v.weights and v.weights[0].path])
def test_page_of_variant(name):
    """In convmixer, timm, transformers and ONNX Runtime."""
    pytest.importorskip("transformers")
    Path("page.md").write_text(page_of(registry.get_variant(name)[0]), encoding="utf-8")
    run(Path("page.md").resolve())
