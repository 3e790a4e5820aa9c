"""Checkpoints of other programs: each form in which people have them, read against the model that wrote it."""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from command import run
from conftest import logits, shake, small
from safetensors.torch import load_file, save_file
from timm.models.convmixer import ConvMixer as TimmConvMixer
from timm.utils import CheckpointSaver
from torch import nn

import convmixer
from convmixer.errors import ArgumentError, ConvMixerError, WeightsError
from convmixer.hub.checkpoints import read_metadata

NAME = "convmixer_256_8"


@pytest.fixture
def model():
    return small()


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


def paper_convmixer(dim, depth, kernel_size, patch_size, classes, act=nn.GELU):
    """The architecture as the paper's appendix writes it: one flat Sequential."""
    return nn.Sequential(
        nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size),
        act(),
        nn.BatchNorm2d(dim),
        *[
            nn.Sequential(
                Residual(
                    nn.Sequential(
                        nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same"), act(), nn.BatchNorm2d(dim)
                    )
                ),
                nn.Conv2d(dim, dim, kernel_size=1),
                act(),
                nn.BatchNorm2d(dim),
            )
            for _ in range(depth)
        ],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, classes),
    )


def timm_convmixer(classes=10):
    """timm's own class in the shape of convmixer_256_8."""
    return shake(TimmConvMixer(dim=256, depth=8, kernel_size=5, patch_size=2, num_classes=classes))


def loaded(name, path, **arguments):
    model = convmixer.create_model(name, device="cpu", **arguments).eval()
    convmixer.load_checkpoint(model, path)
    return model


@pytest.mark.parametrize(
    ("name", "shape", "act", "size"),
    [("convmixer_256_8", (256, 8, 5, 2, 10), nn.GELU, 28), ("convmixer_768_32", (768, 32, 7, 7, 1000), nn.ReLU, 28)],
)
def test_flat_checkpoint_of_the_paper(tmp_path, name, shape, act, size):
    theirs = shake(paper_convmixer(*shape, act=act))
    source, destination = tmp_path / "old.pth.tar", tmp_path / "new.safetensors"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, source)
    assert convmixer.convert_checkpoint(source, destination) == name
    torch.testing.assert_close(logits(loaded(name, destination), size), logits(theirs, size), rtol=1e-4, atol=1e-4)
    assert read_metadata(destination)["architecture"] == name


@pytest.mark.parametrize("nesting", [(), ("state_dict",), ("state_dict_ema",), ("model",), ("model_ema",),
                                     ("model", "state_dict"), ("model_state_dict",), ("model_state",), ("net",),
                                     ("params",), ("params_ema",)])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "timm_model."])
def test_nesting_and_prefixes(tmp_path, nesting, prefix):
    tensors = timm_convmixer().state_dict()
    content = {prefix + key: tensor for key, tensor in tensors.items()}
    for name in nesting:
        content = {name: content, "epoch": 1}
    torch.save(content, tmp_path / "old.pth")
    assert convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors") == "convmixer_256_8"
    with safetensors.safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(key), tensors[key]) for key in tensors)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("prefix", ["model.", "net.", "model.backbone.", "encoder._orig_mod."])
def test_lightning_checkpoint(tmp_path, prefix, flat):
    """A model inside a module, next to tensors of the loss and of metrics."""
    theirs = paper_convmixer(256, 8, 5, 2, 10) if flat else TimmConvMixer(256, 8, 5, 2, num_classes=10)
    shake(theirs)
    state = {prefix + key: tensor for key, tensor in theirs.state_dict().items()}
    state |= {"loss.weight": torch.ones(10), "accuracy.correct": torch.zeros(1), "accuracy.0.weight": torch.zeros(1)}
    content = {"state_dict": state, "epoch": 2, "global_step": 9, "pytorch-lightning_version": "2.5.0"}
    torch.save({**content, "hyper_parameters": {"lr": 0.1}, "callbacks": {}, "loops": {}}, tmp_path / "last.ckpt")
    assert convmixer.convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "new.safetensors") == "convmixer_256_8"
    mine = loaded("convmixer_256_8", tmp_path / "new.safetensors")
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)


def test_averaged_weights_come_first_and_others_are_not_guessed(tmp_path):
    model, average = timm_convmixer(), timm_convmixer()

    def save(*prefixes):
        parts = [{p + k: v for k, v in m.state_dict().items()} for p, m in zip(prefixes, (model, average), strict=True)]
        torch.save({**parts[0], **parts[1], "n_averaged": torch.tensor(3)}, tmp_path / "old.pth")
        return convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors")

    for prefix in ("ema.", "ema_model.", "model_ema.module."):
        assert save("model.", prefix) == "convmixer_256_8"
        with safetensors.safe_open(tmp_path / "new.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor("head.weight"), average.head.weight)
    settings = {"decay": 0.99, "steps": 7}
    for key in ("ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "average"):
        content = {"model": model.state_dict(), key: average.state_dict(), "model_ema": settings}
        torch.save(content, tmp_path / "old.pth")
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors")
        with safetensors.safe_open(tmp_path / "new.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor("head.weight"), average.head.weight), key
    with pytest.raises(WeightsError, match=r"holds 2 models, with the prefixes student\., teacher\.: save a file of"):
        save("student.", "teacher.")


def test_no_model_of_several_is_guessed(tmp_path):
    """Wherever in the file they are; an average is taken whatever is around it."""
    raw, other = (timm_convmixer().state_dict() for _ in range(2))
    wrapped = {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in other.items()}}
    for content in (
        {"model": raw, "ema": {"module": other, "updates": 10}},
        {"model": raw, "ema": {"decay": 0.9, "shadow": other}},
        {"net": raw, "swa_model": wrapped},
        {"state": {"net": raw, "model_ema": other}, "epoch": 3},
        {"state_dict": other, "model": other},
    ):
        torch.save(content, tmp_path / "theirs.pth")
        convmixer.convert_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
        assert torch.equal(load_file(tmp_path / "ours.safetensors")["head.weight"], other["head.weight"])
    for content in ({"net": raw, "params": other}, {"model": raw, "state_dict": other}, {"a": {"b": raw}, "c": other}):
        torch.save(content, tmp_path / "theirs.pth")
        with pytest.raises(WeightsError, match=r"holds 2 models, under \S+, \S+: save a file of the state dict of one"):
            convmixer.convert_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours.safetensors")


def test_a_variant_that_is_asked_for(tmp_path):
    torch.save(timm_convmixer().state_dict(), tmp_path / "old.pth")
    paths = tmp_path / "old.pth", tmp_path / "new.safetensors"
    assert convmixer.convert_checkpoint(*paths, variant="convmixer_256_8") == "convmixer_256_8"
    with pytest.raises(
        WeightsError, match=r"is not a convmixer_512_12, which has dim=512, .*: it has dim=256, depth=8, k"
    ):
        convmixer.convert_checkpoint(*paths, variant="convmixer_512_12")
    with pytest.raises(convmixer.ConvMixerError, match="did you mean convmixer_256_8"):
        convmixer.convert_checkpoint(*paths, variant="convmixer_256_9")


def test_what_was_written_is_computed_once(tmp_path):
    """Finite weights of a model that overflows."""
    theirs = timm_convmixer()
    for block in theirs.blocks:
        nn.init.constant_(block[3].weight, 1e30)
    torch.save(theirs.state_dict(), tmp_path / "old.pth")
    with pytest.raises(WeightsError, match="the model computes values that are not finite"):
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors")
    assert os.listdir(tmp_path) == ["old.pth"]


@pytest.mark.parametrize("ema", [False, True])
def test_checkpoint_that_timm_wrote(tmp_path, ema):
    """timm's training script keeps its command line in the file; of two models the averaged one is taken."""
    model, average = timm_convmixer(), timm_convmixer()
    optimizer = torch.optim.AdamW(model.parameters())
    CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="convmixer_256_8", lr=0.1, data_dir=None),
        model_ema=average if ema else None,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    ).save_checkpoint(epoch=0, metric=50.0)
    assert convmixer.convert_checkpoint(tmp_path / "last.pth.tar", tmp_path / "new.safetensors") == "convmixer_256_8"
    mine = loaded("convmixer_256_8", tmp_path / "new.safetensors")
    torch.testing.assert_close(logits(mine), logits(average if ema else model), rtol=1e-4, atol=1e-4)


def test_other_class_counts_and_half_precision(tmp_path):
    theirs = timm_convmixer(classes=7)
    torch.save(theirs.half().state_dict(), tmp_path / "old.pth")
    assert convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors") == "convmixer_256_8"
    mine = loaded("convmixer_256_8", tmp_path / "new.safetensors", num_classes=7)
    torch.testing.assert_close(logits(mine), logits(theirs.float()), rtol=1e-4, atol=1e-4)


class Evil:
    """Unpickling it would create the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["old.pth", "old.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, model, name, zipped):
    trap, source, destination = tmp_path / "trap", tmp_path / name, tmp_path / "new.safetensors"
    content = {"state_dict": model.state_dict(), "note": Evil(trap)}
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="without running code from it"):
        convmixer.convert_checkpoint(source, destination)
    with pytest.raises(WeightsError, match="is a pickle"):
        convmixer.load_checkpoint(model, source)
    assert not trap.exists()
    assert not destination.exists()
    torch.load(source.rename(tmp_path / "opened.pth"), weights_only=False)
    assert trap.exists()  # the trap works


def test_the_refusal_does_not_tell_to_run_the_code(tmp_path):
    """PyTorch's own text goes on to say how to switch the protection off, in bold."""
    torch.save({"a": subprocess.Popen}, tmp_path / "old.pth")
    with pytest.raises(WeightsError) as caught:
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors")
    assert "\x1b" not in str(caught.value)
    assert "weights_only=False" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "holds no state dict: found list"),
        ({}, "holds no state dict"),
        ({"epoch": 1, "lr": 0.1}, "holds no tensors: its keys are epoch, lr"),
        ({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}, "is not a ConvMixer: its keys are conv1.weight"),
        ({"0.weight": torch.zeros(8, 3, 2, 2)}, "is not a ConvMixer"),
        ({"0.weight": torch.zeros(8, 3, 2, 2), "fc.bias": torch.zeros(3)}, "is not a ConvMixer"),
        ({"stem.0.weight": torch.zeros(()), "blocks.0.0.fn.0.weight": torch.zeros(())}, "is not a ConvMixer"),
    ],
    ids=["list", "empty", "no tensors", "resnet", "one flat layer", "flat and named", "scalars"],
)
def test_what_is_no_convmixer(tmp_path, content, text):
    torch.save(content, tmp_path / "old.pth")
    with pytest.raises(WeightsError, match=r"old\.pth") as caught:
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors")
    assert text in str(caught.value)
    assert os.listdir(tmp_path) == ["old.pth"]


def test_shapes_of_no_variant(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "old.pth")
    text = r"dim=8, depth=2, kernel_size=3, patch_size=2, which no variant .*: convmixer convert \S*old.pth \S*/new"
    with pytest.raises(WeightsError, match=text + "$"):
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors")
    assert os.listdir(tmp_path) == ["old.pth"]


def test_a_checkpoint_with_a_hole_is_not_converted(tmp_path):
    tensors = timm_convmixer().state_dict()
    del tensors["blocks.3.1.weight"]
    torch.save(tensors, tmp_path / "old.pth")
    with pytest.raises(WeightsError, match=r"blocks\.3\.1\.weight"):
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"some text\n"])
def test_what_is_no_pickle_either(tmp_path, content):
    (tmp_path / "old.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot read .*old\.pth"):
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors")


def test_missing_source_and_missing_destination_folder(tmp_path):
    with pytest.raises(WeightsError, match=r"no checkpoint at .*none\.pth"):
        convmixer.convert_checkpoint(tmp_path / "none.pth", tmp_path / "new.safetensors")
    torch.save(timm_convmixer().state_dict(), tmp_path / "old.pth")
    with pytest.raises(convmixer.ConvMixerError, match="nowhere"):
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "nowhere" / "new.safetensors")


# ---- other libraries ------------------------------------------------------------------------------------------------


def as_mmpretrain(tensors, prefix=""):
    """The names of mmpretrain's ImageClassifier: stem and stages in a backbone, a linear head next to it."""
    names = {"stem.": "backbone.stem.", "blocks.": "backbone.stages.", "head.": "head.fc."}
    return {
        prefix + next(new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)): tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_mmpretrain(tmp_path, prefix):
    theirs = timm_convmixer()
    content = {"meta": {"epoch": 3}, "state_dict": as_mmpretrain(theirs.state_dict(), prefix)}
    torch.save(content, tmp_path / "old.pth")
    assert convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors") == NAME
    torch.testing.assert_close(logits(loaded(NAME, tmp_path / "new.safetensors")), logits(theirs), rtol=1e-4, atol=1e-4)


def test_batch_norms_without_counters(tmp_path):
    """As PyTorch wrote them before 0.4.1, and as other frameworks export them."""
    theirs = timm_convmixer()
    tensors = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(tensors, tmp_path / "old.pth")
    assert convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors") == NAME
    written = load_file(tmp_path / "new.safetensors")
    assert written.keys() == theirs.state_dict().keys()
    assert all(t == 0 for k, t in written.items() if k.endswith("num_batches_tracked"))
    torch.testing.assert_close(logits(loaded(NAME, tmp_path / "new.safetensors")), logits(theirs), rtol=1e-4, atol=1e-4)


def test_safetensors_with_other_names(tmp_path):
    theirs = timm_convmixer(classes=3)
    foreign = {f"timm_model.{k}": v.contiguous() for k, v in theirs.state_dict().items()}
    save_file(foreign, tmp_path / "old.safetensors", {"label_names": json.dumps(["a", "b", "c"])})
    assert convmixer.convert_checkpoint(tmp_path / "old.safetensors", tmp_path / "new.safetensors") == NAME
    mine = convmixer.create_model(NAME, checkpoint=tmp_path / "new.safetensors", device="cpu").eval()
    assert mine.pretrained_cfg["label_names"] == ("a", "b", "c")
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "act_layer"),
    [({}, None), ({"act_layer": nn.ReLU, "in_chans": 1}, "relu"), ({"act_layer": "prelu", "num_classes": 0}, "prelu")],
    ids=["gelu", "relu", "prelu"],
)
def test_sizes_of_no_variant_make_a_folder(tmp_path, changes, act_layer):
    theirs = small(**changes)
    torch.save({"model_state": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "old.pth")
    name = convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new", act_layer=act_layer)
    assert name == f"local-dir:{tmp_path / 'new'}"
    x = torch.linspace(-2, 2, 2 * theirs.in_chans * 28 * 28).view(2, theirs.in_chans, 28, 28)
    for mine in (
        convmixer.create_model(name, pretrained=True, device="cpu").eval(),
        timm.create_model(name, pretrained=True).eval(),
    ):
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_a_variant_makes_a_folder_too(tmp_path):
    theirs = timm_convmixer()
    torch.save(theirs.state_dict(), tmp_path / "old.pth")
    name = convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["architecture"] == NAME
    mine = convmixer.create_model(name, pretrained=True, device="cpu").eval()
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)


def test_the_command_says_what_was_assumed(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "old.pth")
    said = run("convert", tmp_path / "old.pth", tmp_path / "new", "--act-layer", "relu").stdout
    assert f"local-dir:{tmp_path / 'new'}" in said
    assert "activation ReLU, and the preprocessing of convmixer_256_8 for 32x32 pixels" in said


def test_a_file_of_another_format_is_no_folder(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "old.pth")
    with pytest.raises(ArgumentError, match=r"x\.onnx': give a file that ends in \.safetensors, or a folder"):
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "x.onnx")
    assert os.listdir(tmp_path) == ["old.pth"]


@pytest.mark.parametrize("destination", ["new.safetensors", "new"])
def test_what_is_not_finite_is_named_by_its_source(tmp_path, destination):
    theirs = timm_convmixer()
    theirs.head.bias.data[0] = float("nan")
    torch.save(theirs.state_dict(), tmp_path / "old.pth")
    with pytest.raises(WeightsError, match=r"old\.pth': head\.bias has 1 of 10 values that are not finite"):
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / destination)
    assert os.listdir(tmp_path) == ["old.pth"]


def test_destinations_that_are_neither(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "old.pth")
    (tmp_path / "note.txt").write_text("mine")
    for name in "new.pth", "note.txt":
        with pytest.raises(ArgumentError, match=r"give a file that ends in \.safetensors, or a folder"):
            convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / name)
    assert (tmp_path / "note.txt").read_text() == "mine"
    with pytest.raises(ArgumentError, match=r"act_layer='relu': a \.safetensors file does not say"):
        convmixer.convert_checkpoint(tmp_path / "old.pth", tmp_path / "new.safetensors", act_layer="relu")
    torch.save(small(act_layer="prelu").state_dict(), tmp_path / "prelu.pth")
    with pytest.raises(WeightsError, match=r"unexpected \(stem\.1\.weight"):
        convmixer.convert_checkpoint(tmp_path / "prelu.pth", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["note.txt", "old.pth", "prelu.pth"]


# ---- who refuses such a file names this command ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["prefix", "mmpretrain", "flat", "no counters"])
def test_refusals_name_the_command(tmp_path, form):
    theirs = timm_convmixer()
    tensors = theirs.state_dict()
    if form == "flat":
        tensors = paper_convmixer(256, 8, 5, 2, 10).state_dict()
    foreign = {
        "prefix": lambda: {f"_orig_mod.{k}": v for k, v in tensors.items()},
        "mmpretrain": lambda: as_mmpretrain(tensors),
        "flat": lambda: tensors,
        "no counters": lambda: {k: v for k, v in tensors.items() if "num_batches" not in k},
    }[form]()
    path = tmp_path / "foreign file.safetensors"
    save_file({k: v.contiguous() for k, v in foreign.items()}, path)
    text = r"It is a convmixer_256_8 as another program writes it\. Convert it once: convmixer convert '.*foreign file"
    with pytest.raises(WeightsError, match=text):
        convmixer.create_model(NAME, checkpoint=path, device="cpu")
    with pytest.raises(WeightsError, match=text):
        convmixer.load_checkpoint(convmixer.create_model(NAME, device="cpu"), path)
    if form != "no counters":
        with pytest.raises(WeightsError, match=text):
            convmixer.save_pretrained(path, tmp_path / "folder")


def test_refusals_say_which_sizes_a_file_has(model, tmp_path):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "small.safetensors")
    text = r"dim=8, depth=2, kernel_size=3, patch_size=2, which no variant .*: convmixer convert \S+ FOLDER writes a"
    with pytest.raises(WeightsError, match=text):
        convmixer.create_model(NAME, checkpoint=tmp_path / "small.safetensors", device="cpu")
    with pytest.raises(WeightsError, match=text):
        convmixer.save_pretrained(tmp_path / "small.safetensors", tmp_path / "folder")
    save_file({k: v.contiguous() for k, v in timm_convmixer().state_dict().items()}, tmp_path / "known.safetensors")
    with pytest.raises(WeightsError, match=r"It has the sizes of convmixer_256_8$"):
        convmixer.create_model("convmixer_512_12", checkpoint=tmp_path / "known.safetensors", device="cpu")


@pytest.mark.parametrize("header", [{"mean": "0.5"}, {"label_names": "cat"}])
def test_a_header_that_makes_no_sense_is_not_converted(tmp_path, header):
    model = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", num_classes=3)
    save_file(model.state_dict(), tmp_path / "theirs.safetensors", header)
    with pytest.raises(WeightsError, match=next(iter(header))):
        convmixer.convert_checkpoint(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors")
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_folders_that_may_not_be_searched():
    """Path.is_file raises there, where os.path.isfile says no."""
    with tempfile.TemporaryDirectory() as folder:  # those of pytest are open to their owner alone
        Path(folder).chmod(0o777)
        locked = Path(folder) / "locked"
        locked.mkdir()
        locked.chmod(0o600)
        model = convmixer.create_model("convmixer_256_8", device="cpu")
        os.seteuid(65534)
        try:
            with pytest.raises(WeightsError, match=r"cannot read .*Permission denied"):
                convmixer.create_model("convmixer_256_8", checkpoint=locked / "w.safetensors", device="cpu")
            with pytest.raises(WeightsError, match=r"no checkpoint at .*, or none that may be read"):
                convmixer.convert_checkpoint(locked / "x.pth", Path(folder) / "y.safetensors")
            with pytest.raises(ConvMixerError, match="cannot write"):
                convmixer.save_pretrained(model, locked / "new")
        finally:
            os.seteuid(0)
