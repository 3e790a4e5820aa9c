"""Streams of images, on real images: scikit-learn's digits. What is in memory is what a stream must equal."""

import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, write_digits
from PIL import Image, ImageOps
from processes import alive, finish, kill, started
from safetensors.torch import load_file
from timm.data.auto_augment import rand_augment_transform

import convmixer
from convmixer.data.memory import Fit, Share, hold_out, load_images, seed_all
from convmixer.data.readers import has_split, open_split
from convmixer.data.stream import Change, open_stream
from convmixer.data.workers import default_workers
from convmixer.errors import ArgumentError, DataError, TrainingStopped
from convmixer.evaluation import validate
from convmixer.runtime.quantize import calibration_images
from convmixer.training import evaluate, get_recipe, train
from convmixer.training.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("no_curves")
QUICK = {"epochs": 2, "batch_size": 32, "lr": 0.01, **SMALL_MODEL}
SIZE = (3, 8, 8)
CLASSES = ("digit 0", "digit 1", "digit 2", "digit 3")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """150 training and 30 test images of handwritten digits 0 to 3, as folders of PNG files."""
    return write_digits(tmp_path_factory.mktemp("digits"), 150, 30, CLASSES)


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory) -> Path:
    """The same as WebDataset shards: four for training, two for testing."""
    root = tmp_path_factory.mktemp("shards")
    info = {"splits": {}}
    for split, name, count in (("train", "train", 4), ("test", "test", 2)):
        files = sorted((digits / split).rglob("*.png"))
        names = [f"{name}-{i}.tar" for i in range(count)]
        for i, tar in enumerate(names):
            _write_shard(root / tar, files[i::count])
        lengths = [len(files[i::count]) for i in range(count)]
        info["splits"][name] = {
            "name": name, "num_samples": len(files), "filenames": names, "shard_lengths": lengths
        }  # fmt: skip
    (root / "_info.json").write_text(json.dumps(info))
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def _write_shard(path: Path, files: list[Path], spoiled: tuple[str, ...] = ()) -> None:
    with tarfile.open(path, "w") as archive:
        for file in files:
            content = file.read_bytes()[: 40 if file.stem in spoiled else None]
            label = str(CLASSES.index(file.parent.name)).encode()
            for name, data in ((f"{file.stem}.png", content), (f"{file.stem}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def quiet(*_: object) -> None:
    pass


def _open(source, split="train", recipe=None, **options):
    recipe = recipe or get_recipe("cifar10", **QUICK, stream=True)
    return open_stream(source, split, recipe, Fit(SIZE), mean=(0.5, 0.5, 0.5), **{"workers": 0, **options})


def _share(count, *, parts=1, own=range(1), start=0, epoch=3, batch_size=30) -> Share:
    return Share(7, epoch, batch_size, parts, own, range(start, count // batch_size))


def _assert_same(a, b) -> None:
    a, b = list(a), list(b)
    assert len(a) == len(b)
    assert all(torch.equal(p, q) and torch.equal(m, n) for (p, m), (q, n) in zip(a, b, strict=True))


# ---- any image at any time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_has_the_images_of_memory(digits, tmp_path, packed, workers):
    source = digits
    if packed:
        source = tmp_path / "train.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(digits / "train", ".")
    images, stream = load_images(source, "train", SIZE), _open(source, workers=workers)
    assert (len(stream), stream.classes, stream.record()) == (150, CLASSES, images.record())
    _assert_same(stream.in_order(40), images.in_order(40))
    for own in (range(1), range(1, 3)):  # two of the processes of a run
        share = _share(150, parts=3, own=own, start=1)
        _assert_same(stream.parts(share), images.parts(share))
    held, held_stream = hold_out(images, 0.2, 5), hold_out(stream, 0.2, 5)
    for a, b in zip(held, held_stream, strict=True):
        _assert_same(a.in_order(64), b.in_order(64))


def test_augmentation_follows_from_the_image_and_the_epoch_alone(digits):
    recipe = get_recipe("imagenet1k", batch_size=30, color_jitter=0.3)
    one, two = (_open(digits, recipe=recipe, workers=workers) for workers in (0, 2))
    whole = list(one.parts(_share(150)))
    _assert_same(whole, two.parts(_share(150)))
    _assert_same(whole[2:], two.parts(_share(150, start=2)))  # after an interruption
    halves = [list(one.parts(_share(150, parts=2, own=range(i, i + 1)))) for i in range(2)]
    joined = [torch.cat([a[0], b[0]]) for a, b in zip(*halves, strict=True)]
    assert all(torch.equal(pixels, batch[0]) for pixels, batch in zip(joined, whole, strict=True))
    plain = _open(digits)
    assert [labels.tolist() for _, labels in plain.parts(_share(150))] == [labels.tolist() for _, labels in whole]
    changed = [(a != b).flatten(1).any(1) for (a, _), (b, _) in zip(plain.parts(_share(150)), whole, strict=True)]
    assert torch.cat(changed).float().mean() > 0.9
    again = torch.cat([labels for _, labels in one.parts(_share(150, epoch=4))])
    assert not torch.equal(again, torch.cat([labels for _, labels in whole]))


def test_an_image_that_is_drawn_twice_is_changed_in_two_ways(tmp_path):
    write_digits(tmp_path, 60, 3, ("0", "1"))
    for file in list((tmp_path / "train" / "1").iterdir())[2:]:
        file.unlink()
    stream = _open(tmp_path, recipe=get_recipe("imagenet1k", batch_size=30)).balanced()
    pixels, labels = map(torch.cat, zip(*stream.parts(_share(len(stream))), strict=True))
    rare = pixels[labels == 1]
    assert len(rare) > 4
    assert len(rare.unique(dim=0)) == len(rare)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_policy_is_timms(channels):
    from convmixer.data.stream import policy

    image = Image.effect_noise((24, 16), 80).convert("RGB" if channels == 3 else "L")
    hparams = {"translate_const": 7, "img_mean": (128,) * 3 if channels == 3 else 128, "magnitude_max": 9.99}
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", hparams)
    ours = policy("rand-m9-mstd0.5-inc1", (16, 24), (0.5,) * channels)
    for i in range(20):
        results = []
        for change in (ours, theirs):
            seed_all(i)
            results.append(np.asarray(change(image)))
        assert np.array_equal(*results)
    strongest = policy("rand-m10-n9-inc1", (16, 24), (0.5,) * channels)
    for _ in range(10):
        assert strongest(image).size == (24, 16)


def test_training_from_a_stream_is_training_from_memory(digits, tmp_path):
    """Where the workers crop nothing, to the bit."""
    fields = {"rand_augment": (2, 9), "color_jitter": 0.2, "random_erasing": 0.5, "shift": 1, "mixup": 0.2, "cutmix": 1}
    recipe = get_recipe("cifar10", **{**QUICK, **fields, "mix_until": 0.7, "image_sizes": ((0, 6),)})
    memory = train(recipe, digits, tmp_path / "memory", device="cpu", report=quiet)
    stream = train(recipe.override(stream=True), digits, tmp_path / "stream", device="cpu", workers=1, report=quiet)
    a, b = load_file(memory.weights), load_file(stream.weights)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert memory.test_accuracy == stream.test_accuracy
    assert memory.history[-1].validation_loss == pytest.approx(stream.history[-1].validation_loss)
    assert stream.model.pretrained_cfg["label_names"] == CLASSES


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_stream_that_is_stopped_goes_on_exactly(digits, shards, tmp_path, monkeypatch, kind):
    from convmixer.training.trainer import Trainer

    source = digits if kind == "folder" else f"wds/{shards}"
    fields = {"stream": True, "batch_size": 16, "crop_scale": 0.5, "rand_augment": (1, 9), "validation_fraction": 0.0}
    recipe = get_recipe("cifar10", **{**QUICK, **fields})
    options = {"device": "cpu", "report": quiet, "workers": 2}
    whole = train(recipe, source, tmp_path / "whole", **options)
    real, count = Trainer.step, []

    def step(self, *arguments):
        count.append(1)
        if len(count) == 12:  # of nine steps an epoch
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(TrainingStopped, match="stopped in epoch 2 after step 3 of 9"):
        train(recipe, source, tmp_path / "parts", **options)
    if kind == "shards":
        with pytest.raises(ArgumentError, match="2 workers of all processes read the shards, now 1"):
            train(recipe, source, tmp_path / "parts", **{**options, "workers": 1}, resume=True)
    parts = train(recipe, source, tmp_path / "parts", **options, resume=True)
    a, b = load_file(whole.weights), load_file(parts.weights)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert whole.test_accuracy.keys() == {source if kind == "shards" else digits.name}


def test_unreadable_images_are_named_and_others_take_their_place(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "set")
    spoiled = sorted((tmp_path / "set" / "train").rglob("*.png"))[::30]
    spoiled += sorted((tmp_path / "set" / "test").rglob("*.png"))[:1]
    for file in spoiled:
        file.write_bytes(file.read_bytes()[:40])
    recipe = get_recipe("cifar10", **QUICK, stream=True)
    lines: list[str] = []
    result = train(
        recipe, tmp_path / "set", tmp_path / "run", device="cpu", workers=1, skip_unreadable=True, report=lines.append
    )
    told = [line for line in lines if "cannot be read" in line]
    assert sum(int(line.split()[0]) for line in told) == 6
    assert "others take their place" in told[0]
    assert told[-1].startswith("1 images cannot be read, they are left out of the test set")
    assert all(sum(f"{file.parent.name}/{file.name}" in line for line in told) == 1 for file in spoiled)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_images"] == {"set": 29}
    assert len(result.history) == 2
    with pytest.raises(DataError, match=r"cannot read image \d+ of .*\.png"):
        train(recipe, tmp_path / "set", tmp_path / "fatal", device="cpu", workers=1, report=quiet)
    for file in (tmp_path / "set" / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"no image of .* can be read"):
        list(_open(tmp_path / "set", skip_unreadable=True).parts(_share(150)))


# ---- shards ---------------------------------------------------------------------------------------------------------


def _counts(batches) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for pixels, labels in batches:
        for image, label in zip(pixels, labels, strict=True):
            key = bytes([int(label)]) + image.numpy().tobytes()
            found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_the_images(digits, shards, workers):
    images, stream = load_images(digits, "train", SIZE), _open(f"wds/{shards}", workers=workers)
    assert (len(stream), stream.classes) == (150, CLASSES)
    assert _counts(stream.in_order(40)) == _counts(images.in_order(40))
    test = _open(f"wds/{shards}", "test", workers=workers, classes=(*CLASSES[::-1], "digit 9"))
    expected = load_images(digits, "test", SIZE, classes=(*CLASSES[::-1], "digit 9"))
    assert _counts(test.in_order(7)) == _counts(expected.in_order(7))


def test_validation_shards_are_used_for_validation(shards, tmp_path):
    """And tested on where there are no others, which is said."""
    shutil.copytree(shards, tmp_path / "set")
    info = json.loads((shards / "_info.json").read_text())
    info["splits"]["valid"] = info["splits"].pop("test")
    (tmp_path / "set" / "_info.json").write_text(json.dumps(info))
    source, lines = f"wds/{tmp_path}/set", list[str]()
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1}, stream=True)
    result = train(recipe, source, tmp_path / "run", device="cpu", workers=0, report=lines.append)
    assert lines[:3] == [
        f"train: 150 images in 4 classes from 4 shards of {source}, train",
        f"validation: 30 images in 4 classes from 2 shards of {source}, valid",
        "test: no images",
    ]
    assert result.test_accuracy == {}
    images = load_images(source, "test", SIZE, report=lines.append)
    assert lines[-1].endswith("valid, as there is no test split")
    expected = evaluate(result.model, images, precision="auto")["top1"]
    assert result.history[0].validation_accuracy == pytest.approx(expected)
    with pytest.raises(ArgumentError, match=r"no images of 'wds/.*' can be held out: give 0, or a validation set"):
        train(recipe, f"wds/{shards}", tmp_path / "none", device="cpu", workers=0, report=quiet)
    assert not (tmp_path / "none").exists()


def test_shards_hold_images_of_all_types(tmp_path):
    for i, suffix in enumerate(("jpg", "bmp", "tif", "webp", "gif", "jfif")):
        Image.new("RGB", (8, 8), (40 * i,) * 3).save(tmp_path / f"{i}.{suffix}")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for file in sorted(tmp_path.glob("[0-9].*")):
            archive.add(file, file.name)
            member = tarfile.TarInfo(f"{file.stem}.cls")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"%d" % (int(file.stem) % 2)))
    (tmp_path / "classes.txt").write_text("even\nodd\n")
    images = load_images(f"wds/{tmp_path}/a.tar|6", "train", SIZE, report=quiet)
    assert images.labels.tolist() == [0, 1] * 3
    assert (images.pixels[:, 0, 4, 4].float() - 40 * torch.arange(6)).abs().max() < 3


def test_a_shard_that_is_damaged_between_two_samples_is_an_error(digits, tmp_path):
    _write_shard(tmp_path / "a.tar", sorted((digits / "train").rglob("*.png"))[::30])
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    content = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        headers = [member.offset for member in archive]
    assert len(headers) == 10
    cut = headers[6]
    holes = (content[:cut] + hole + content[cut + len(hole) :] for hole in (b"\xff", bytes(512)))
    for spoiled in (content[:cut], *holes):
        (tmp_path / "a.tar").write_bytes(spoiled)
        for source in f"wds/{tmp_path}/a.tar|5", f"wds/{tmp_path}/a.tar|3":
            with pytest.raises(DataError, match=r"cannot read 'wds/.*(cut off|damaged|more follows)"):
                load_images(source, "test", SIZE, report=quiet)
        recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1, "batch_size": 2}, stream=True)
        with pytest.raises(DataError, match=r"cannot read 'wds/.*(cut off|damaged|more follows)"):
            train(
                recipe,
                digits,
                tmp_path / "run",
                val=f"wds/{tmp_path}/a.tar|5",
                device="cpu",
                workers=0,
                report=quiet,
            )
        shutil.rmtree(tmp_path / "run")


def test_a_sample_with_two_images_is_refused(tmp_path):
    """Such as a photograph and its mask, if nothing tells them apart."""
    for name in ("0.jpg", "0.png", "1.jpg", "1.mask.png"):
        Image.new("RGB", (8, 8), (40, 40, 40)).save(tmp_path / name)
    for i in range(2):
        (tmp_path / f"{i}.cls").write_text(str(i))
        with tarfile.open(tmp_path / f"{i}.tar", "w") as archive:
            for file in sorted(tmp_path.glob(f"{i}.*[gs]")):
                archive.add(file, file.name)
    (tmp_path / "classes.txt").write_text("even\nodd\n")
    with pytest.raises(DataError, match=r"0 in '.*0\.tar'.* its parts jpg and png are images.*such as mask\.png"):
        load_images(f"wds/{tmp_path}/0.tar|1", "test", SIZE, report=quiet)
    lines: list[str] = []
    assert load_images(f"wds/{tmp_path}/1.tar|1", "test", SIZE, report=lines.append).labels.tolist() == [1]
    assert f"from 1 shard of wds/{tmp_path}" in lines[0]


def test_large_photographs_are_cropped_alike_at_a_reduced_scale(photo, tmp_path):
    """The same crops, from fewer pixels; small images to the bit as timm crops them."""
    from timm.data.transforms import RandomResizedCropAndInterpolation

    recipe = get_recipe("imagenet1k", auto_augment="", crop_scale=0.25)
    large = Image.fromarray(photo).resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "large.jpg", quality=95, exif=exif)
    large.resize((800, 600)).save(tmp_path / "small.jpg", quality=95)
    theirs = RandomResizedCropAndInterpolation((32, 48), (0.25, 1.0), (3 / 4, 4 / 3), "bilinear")
    exact = 0
    for i in range(12):
        crops = {}
        for name, draft in (("large.jpg", True), ("large.jpg", False), ("small.jpg", True)):
            seed_all(i)
            change = Change(recipe, Fit((3, 32, 48), draft=draft), (0.5,) * 3)
            crops[name, draft] = change(tmp_path / name).float()
        for name in ("large.jpg", "small.jpg"):
            seed_all(i)
            with Image.open(tmp_path / name) as image:
                expected = theirs(ImageOps.exif_transpose(image))
            assert np.array_equal(crops[name, name != "large.jpg"].permute(1, 2, 0), np.asarray(expected))
        assert (crops["large.jpg", True] - crops["large.jpg", False]).abs().mean() < 4
        exact += torch.equal(crops["large.jpg", True], crops["large.jpg", False])
    assert exact < 12


def test_large_photographs_are_fitted_alike_at_a_reduced_scale(photo, tmp_path):
    Image.fromarray(photo).resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=95)
    for mode in ("center", "squash"):
        found = [Fit((3, 32, 48), crop_mode=mode, crop_pct=0.9, draft=d)(tmp_path / "large.jpg") for d in (True, False)]
        assert not torch.equal(*found)
        assert (found[0].float() - found[1].float()).abs().mean() < 2


def test_shards_are_validated_as_their_folder_is(digits, shards, tmp_path):
    model = convmixer.create_model("convmixer_128_8_ks7_p2", num_classes=4, device="cpu")
    found = [validate(model, source, classes=CLASSES) for source in (digits, f"wds/{shards}")]
    for name in ("top1", "top5", "loss", "count", "classes"):
        assert getattr(found[0], name) == pytest.approx(getattr(found[1], name))
    images, same = load_images(digits, "test", SIZE), load_images(f"wds/{shards}", "test", SIZE)
    assert _counts(same.in_order(7)) == _counts(images.in_order(7))
    for number, other in ((29, "more"), (31, "30")):
        source = f"wds/{shards}/test-{{0..1}}.tar|{number}"
        with pytest.raises(DataError, match=f"should have {number} samples and has {other}: correct the number"):
            load_images(source, "test", SIZE)
        with pytest.raises(DataError, match="correct the number"):
            validate(model, source, classes=CLASSES)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("said", [29, 31])
def test_a_wrong_number_of_samples_to_validate_on(shards, said, workers):
    stream = _open(f"wds/{shards}/test-{{0..1}}.tar|{said}", "validation", workers=workers)
    with pytest.raises(DataError, match=rf"should have {said} samples and has 30: correct the number"):
        list(stream.in_order(8))


def test_shards_without_classes(digits, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(next(digits.rglob("*.png")), "1.png")
    (tmp_path / "classes.txt").write_text("zero\none\n")
    with pytest.raises(DataError, match=r"cannot read 1 in '.*t\.tar': DataError: it has no \.cls"):
        list(_open(f"wds/{tmp_path}/t.tar|1", "test").in_order(8))


def test_tests_whose_labels_are_secret(digits, tmp_path, capsys):
    """As the Hub has many: every label of the test split is -1. They are left out, as if there were none."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one"])})
    (tmp_path / "set").mkdir()
    files = [sorted((digits / "train" / name).iterdir())[:10] for name in CLASSES[:2]]
    rows = [({"bytes": file.read_bytes(), "path": None}, label) for label in (0, 1) for file in files[label]]
    for split, labels in (("train", [0, 1]), ("validation", [0, 1]), ("test", [-1])):
        content = {"image": [row[0] for row in rows], "label": [row[1] if len(labels) == 2 else -1 for row in rows]}
        datasets.Dataset.from_dict(content, features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    source = f"hfds/{tmp_path / 'set'}"
    for stream in (False, True):
        recipe = get_recipe("cifar10", **QUICK | {"batch_size": 10}, stream=stream)
        result = train(
            recipe,
            source,
            tmp_path / f"run-{stream}",
            device="cpu",
            workers=0 if stream else None,
            data_root=tmp_path / "cache",
        )
        assert result.test_accuracy == {}
        said = capsys.readouterr().out
        assert f"test: no image in the split test of {source} has a label, so it is left out\n" in said
        assert "test: no images\n" in said
    with pytest.raises(DataError, match=r"no image in the split test of .* has a label: its labels are all -1"):
        open_split(source, "test", root=tmp_path / "cache")


def test_tests_of_which_no_image_can_be_read(digits, tmp_path):
    """An accuracy of them would be no number."""
    stream = _open(digits, "test", skip_unreadable=True)
    spoiled = replace(stream.split, images=[file._replace(path="gone.png") for file in stream.split.images])
    model = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", dim=8, depth=1, num_classes=len(CLASSES))
    with pytest.raises(DataError, match="none of the 30 images to validate on could be read"):
        evaluate(model, replace(stream, split=spoiled))


def test_processes_read_different_shards(digits, shards):
    images = _counts(load_images(digits, "train", SIZE).in_order(150))
    pattern = f"wds/{shards}/train-{{0..3}}.tar|150"
    streams = [_open(pattern, workers=0, processes=2) for _ in range(2)]
    shares = [_share(150, parts=2, own=range(i, i + 1), batch_size=30) for i in range(2)]
    seen = [_counts(stream.parts(share)) for stream, share in zip(streams, shares, strict=True)]
    assert seen[0].keys() | seen[1].keys() <= images.keys()
    # Equal drawings of digits occur; beside them no image is in both.
    assert all(images[key] > 1 for key in seen[0].keys() & seen[1].keys())
    assert sum(seen[0].values()) + sum(seen[1].values()) == 150


def test_unreadable_samples_of_shards(digits, shards, tmp_path):
    files = sorted((digits / "train").rglob("*.png"))
    _write_shard(tmp_path / "a.tar", files[:60], spoiled=(files[3].stem, files[50].stem))
    shutil.copy(shards / "classes.txt", tmp_path)
    source = f"wds/{tmp_path}/a.tar|60"
    stream = _open(source, skip_unreadable=True, workers=1)
    assert [len(pixels) for pixels, _ in stream.parts(_share(60))] == [30, 30]
    assert len(stream.unreadable) == 2
    assert any(f"cannot read {files[3].stem} in" in text and "a.tar" in text for text in stream.unreadable)
    assert sum(len(labels) for _, labels in stream.in_order(20)) == 58
    with pytest.raises(DataError, match=f"cannot read ({files[3].stem}|{files[50].stem}) in"):
        list(_open(source, workers=1).parts(_share(60)))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:-40_000])
    with pytest.raises(DataError, match=f"cannot read '{re.escape(source)}'"):
        list(_open(source, skip_unreadable=True, workers=1).parts(_share(60)))


def test_a_worker_that_dies(digits):
    """In the middle of a step: an error where the next batch is asked for."""
    batches = _open(digits, workers=1).parts(_share(150))
    next(batches)
    (worker,) = multiprocessing.active_children()
    next(batches)
    kill(worker.pid)
    text = f"a process that reads '{re.escape(str(digits))}' ended: .*(Killed|exited unexpectedly). Give fewer workers"
    with pytest.raises(DataError, match=text):
        list(batches)


@pytest.mark.parametrize("collected", [False, True])
def test_workers_end_with_what_reads_them(digits, collected):
    """Also where the garbage collector takes queues and workers at once."""
    before = set(multiprocessing.active_children())
    batches = iter(_open(digits, workers=2).in_order(4))
    next(batches)
    assert set(multiprocessing.active_children()) > before
    if collected:
        circle = [batches]
        circle.append(circle)
        del circle, batches
        gc.collect()
    else:
        batches.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_exits_with_streams_that_are_open(digits):
    """That of a forked child leaves its parent's workers alone."""
    program = f"""
import os, sys, multiprocessing
from convmixer.data.memory import Fit
from convmixer.data.stream import open_stream
from convmixer.training import Recipe
stream = open_stream({str(digits)!r}, "test", Recipe(stream=True), Fit((3, 8, 8)), mean=(0.5,) * 3, workers=1)
batches = iter(stream.in_order(4))
next(batches)
if not os.fork():
    sys.exit()
print(os.wait()[1], sum(1 for _ in batches))
unfinished = iter(stream.in_order(4))  # which the interpreter's end closes
next(unfinished)
"""
    result = finish([sys.executable, "-W", "ignore", "-c", program])
    assert result.stdout.splitlines()[-1] == "0 7"
    assert "workers.py" not in result.stderr  # multiprocessing itself complains there


def test_nothing_unreadable_is_left_out_in_silence(digits, shards, tmp_path, capsys):
    """Of shards as of a folder: the error names the tar and the sample."""
    root = tmp_path / "folder"
    shutil.copytree(digits / "train", root / "train")
    files = sorted((root / "train").rglob("*.png"))[:40:10]
    _write_shard(tmp_path / "a.tar", files, spoiled=(files[2].stem,))
    shutil.copy(shards / "classes.txt", tmp_path)
    files[2].write_bytes(files[2].read_bytes()[:40])
    model = convmixer.create_model("convmixer_128_8_ks7_p2", num_classes=4, device="cpu")
    named = f"cannot read {files[2].stem} in '{tmp_path}/a.tar': "
    sources = {f"wds/{tmp_path}/a.tar|4": re.escape(named), root: files[2].name}
    for source, text in sources.items():
        for read in (
            lambda data: calibration_images(data, model),
            lambda data: load_images(data, "train", SIZE),
            lambda data: validate(model, data, split="train", classes=CLASSES),
        ):
            with pytest.raises(DataError, match=text):
                read(source)
    kept = load_images(next(iter(sources)), "train", SIZE, skip_unreadable=True)
    assert len(kept) == 3
    assert f"1 of 4 images are left out: cannot read {files[2].stem} in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "options", "text"),
    [
        ("wds/nowhere", {}, "cannot open the train split of 'wds/nowhere'"),
        ("wds/{shards}/train-0.tar", {}, r"does not say how many samples it has: add \|NUMBER"),
        ("wds/{shards}", {"workers": 5}, "has 4 shards for 1 processes with 5 workers each"),
        ("wds/{shards}", {"workers": 2, "processes": 3}, "has 4 shards for 3 processes with 2 workers each"),
        ("wds/{shards}", {"classes": ("cat",)}, "has the classes digit 0, .*; the model knows cat"),
        ("wds/{empty}/a.tar|3", {}, r"cannot read '.*classes\.txt'"),
    ],
)
def test_shards_that_do_not_fit(shards, tmp_path, source, options, text):
    with pytest.raises(DataError, match=text):
        _open(source.format(shards=shards, empty=tmp_path), **options)


def test_shards_get_as_many_workers_as_they_can_feed(shards):
    assert _open(f"wds/{shards}", workers=None, processes=4).workers == 1
    assert default_workers() >= 1


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "fields", "options", "text"),
    [
        ("wds/nowhere", {}, {}, r"is read from start to end: give stream=True \(--set stream=true\)"),
        ("wds/a-0.tar|9", {"stream": True}, {}, r"no images of 'wds/a-0.tar\|9' can be held out: give 0, or a valid"),
        ("wds/nowhere", {"stream": True, "balanced": True}, {}, "balanced=True needs labels before images are read"),
        ("wds/nowhere", {"stream": True, "class_weights": "balanced"}, {}, "class_weights='balanced' needs labels"),
        ("nowhere", {}, {"workers": 2}, "workers=2: give at least 0, and only with stream=True"),
        ("nowhere", {"stream": True}, {"workers": -1}, "workers=-1: give at least 0"),
        ("nowhere", {"sync_batchnorm": True}, {}, "sync_batchnorm=True works only on GPUs.* not on 'cpu'"),
        ("nowhere", {}, {"precision": "float16"}, "'float16' needs a GPU, not 'cpu'; valid: auto, float32, bfloat16"),
    ],
)
def test_contradictions_are_found_before_data_are_read(tmp_path, data, fields, options, text):
    with pytest.raises(ArgumentError, match=text):
        train(get_recipe("cifar10", **QUICK, **fields), data, tmp_path / "run", device="cpu", report=quiet, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"stream": "yes"}, "recipe field stream='yes': give True or False"),
        ({"auto_augment": "rand-x9"}, "recipe field auto_augment='rand-x9': give a policy of timm"),
        ({"auto_augment": "rand-m9"}, "changes images one by one: give stream=True"),
        ({"auto_augment": "v0", "stream": True}, "takes the place of rand_augment=(2, 12): give rand_augment=(0, 0)"),
    ],
)
def test_senseless_recipes(fields, text):
    with pytest.raises(ArgumentError, match=re.escape(text)):
        get_recipe("cifar10", **fields)


def test_the_papers_recipe():
    recipe = get_recipe("imagenet1k")
    assert (recipe.opt, recipe.lr, recipe.batch_size, recipe.eps, recipe.epochs) == ("adamw", 0.01, 640, 1e-3, 150)
    assert (recipe.auto_augment, recipe.mixup, recipe.cutmix) == ("rand-m9-mstd0.5-inc1", 0.5, 0.5)
    assert (recipe.random_erasing, recipe.clip_grad, recipe.stream) == (0.25, 1.0, True)
    # The schedule of its code: up over two fifths, to a twentieth at four fifths, to nothing.
    expected = np.interp(np.linspace(0, 1, 31), [0, 0.4, 0.8, 1], [0, 0.01, 0.0005, 0])
    assert [learning_rate(recipe, p) for p in np.linspace(0, 1, 31)] == pytest.approx(list(expected))


def test_images_that_do_not_fit_into_memory(digits, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 2048}.__getitem__)
    with pytest.raises(DataError, match=r"the 150 images .* take 0\.0 GiB, .*: train with --set stream=true"):
        load_images(digits, "train", SIZE)


def test_synchronised_batchnorm_shares_the_tensors_of_the_model():
    from convmixer.training.trainer import with_sync_batchnorm

    model = convmixer.ConvMixer(8, 2, 3, 2, num_classes=2)
    twin = with_sync_batchnorm(model)
    kinds = [type(module) for module in twin.modules()]
    assert kinds.count(torch.nn.SyncBatchNorm) == 5
    assert torch.nn.BatchNorm2d not in kinds
    assert torch.nn.SyncBatchNorm not in [type(module) for module in model.modules()]
    images = torch.randn(4, 3, 8, 8)
    twin.train()(images).sum().backward()  # one process: as BatchNorm itself
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(model.eval()(images), twin.eval()(images))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_mixed_precision_on_a_gpu(digits, tmp_path, precision):
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 6, "flip": 0.0, "clip_grad": 1.0, "sync_batchnorm": True})
    result = train(recipe, digits, tmp_path / "run", device="cuda", precision=precision, report=quiet)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (state["scaler"] is not None) == (precision == "float16")
    assert result.test_accuracy[digits.name] > 60
    longer = recipe.override(epochs=7)
    train(longer, digits, tmp_path / "run", device="cuda", precision=precision, resume=True, report=quiet)


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accelerate_launch(digits, tmp_path):
    """Two processes on a CPU, which read a stream with a worker each."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "convmixer", "train", "cifar10", "--device", "cpu", "--data", digits, "--workers", "1"]
    for field, value in {"stream": "true", "batch_size": 44, "epochs": 1, "rand_augment": "[0, 0]"}.items():
        command += ["--set", f"{field}={value}"]
    command += ["--set", "model=convmixer_128_8_ks7_p2", "--set", "input_size=[8, 8]", "--set", "image_sizes=[[0, 4]]"]
    done = finish([*command, "--output", tmp_path / "run"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["processes"] == 2
    assert "2 x cpu" in done.stdout


DIVERGES = """
import sys
from convmixer.errors import ConvMixerError
from convmixer.training import get_recipe, train
recipe = get_recipe("cifar10", epochs=2, batch_size=8, lr=1e30, warmup=0.0, stream=True, rand_augment=(0, 0))
recipe = recipe.override(model="convmixer_128_8_ks7_p2", image_sizes=((0.0, 8),))
try:
    train(recipe, sys.argv[1], sys.argv[2], device="cpu", precision="float32", workers=2)
except ConvMixerError as error:
    print(error)
"""


def test_a_stream_whose_training_fails_ends(digits, tmp_path):
    """Its workers, made by fork, hold what their parent had open."""
    done = finish([sys.executable, "-W", "ignore", "-c", DIVERGES, digits, tmp_path / "run"], timeout=300)
    assert "became nan" in done.stdout, done.stderr


UNFINISHED = """
import multiprocessing, sys, time
from convmixer.data.memory import Fit, Share
from convmixer.data.stream import open_stream
from convmixer.training import Recipe

multiprocessing.set_start_method(sys.argv[2])
recipe = Recipe(stream=True, batch_size=2)
stream = open_stream(sys.argv[1], "train", recipe, Fit((3, 8, 8)), mean=(0.5, 0.5, 0.5), workers=2, report=str)
batches = stream.parts(Share(0, 0, 2, 1, range(1), range(75)))
next(batches)
print("reading", flush=True)
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_program_ends_with_a_stream_that_it_has_not_read_to_the_end(digits, method):
    done = finish([sys.executable, "-W", "ignore", "-c", UNFINISHED, digits, method, 0], timeout=60)
    assert (done.returncode, done.stdout) == (0, "reading\n"), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.slow
def test_workers_end_with_a_program_that_is_killed(digits, method):
    command = [sys.executable, "-W", "ignore", "-c", UNFINISHED, digits, method, 600]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == "reading\n"
        assert len(list(alive(process))) > 2
        process.kill()
        deadline = time.monotonic() + 60
        while list(alive(process)):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_home(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards.parent))
    source = f"wds/~/{shards.name}"
    assert has_split(source, "test")
    assert not has_split(source, "validation")
    assert len(open_split(source, "train")) == len(open_split(f"wds/{shards}", "train")) > 0


def test_an_empty_list_of_classes(shards, tmp_path):
    """Which would otherwise stand for labels that nobody needs."""
    shutil.copytree(shards, tmp_path / "set")
    (tmp_path / "set" / "classes.txt").write_text("\n")
    with pytest.raises(DataError, match=r"cannot read '.*classes\.txt': it is empty\. It names the classes"):
        open_split(f"wds/{tmp_path / 'set'}", "train")
