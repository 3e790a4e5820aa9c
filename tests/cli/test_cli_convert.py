"""`convmixer convert`, and checkpoints before it."""

import pytest
import torch
from command import records, run
from PIL import Image
from timm.models.convmixer import ConvMixer as TimmConvMixer

import convmixer

pytestmark = pytest.mark.usefixtures("wide_terminal")


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
