"""What folders and tars hold, by the layouts that people really have. Nothing is merged, renamed or lost in silence."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset

from convmixer.data.layout import role
from convmixer.data.memory import load_images
from convmixer.data.readers import has_split, open_split
from convmixer.errors import DataError

SIZE = (3, 4, 4)


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, value // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def lay(root: Path, *names: str) -> Path:
    """Files under these names: images, each of another colour, or what other suffixes stand for."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i) if path.suffix in (".png", "") else b"text")
    return root


def pack(folder: Path, archive: Path, prefix: str = "") -> Path:
    with tarfile.open(archive, "w") as tar:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            tar.add(file, prefix + file.relative_to(folder).as_posix())
    return archive


def held(source, split: str) -> dict[str, list[str]]:
    """Files by class, through `open_split`."""
    opened = open_split(source, split)
    found: dict[str, list[str]] = {name: [] for name in opened.classes}
    for file, label in zip(opened.images, opened.labels, strict=True):
        found[opened.classes[label]].append(file.name)
    return found


def classes(*splits: str) -> list[str]:
    return [f"{split}/{name}/{i}.png" for split in splits for name in ("cat", "dog") for i in range(2)]


# ---- splits ---------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "train": "train Train TRAIN training Training train_set training_set train-set trainset seg_train train_images"
    " training-data img_train train2017 images_train train_split",
    "validation": "val Val valid Validation validation dev val_set valid_set validation_set val2017 seg_val dev_set",
    "test": "test Test testing test_set testing_set testset seg_test test_images test2017 test-data",
}


@pytest.mark.parametrize(
    ("split", "name"), [(split, name) for split, names in SPELLINGS.items() for name in names.split()]
)
def test_names_of_splits(split, name):
    assert role(name) == split


@pytest.mark.parametrize(
    "name", ["cat", "trains", "bullet_train", "test_tube", "contest", "device", "latest", "seg_pred", ""]
)
def test_other_names(name):
    assert role(name) is None


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("training", "valid", None),
        ("Train", None, "Test"),
        ("training_set", None, "test_set"),
        ("seg_train/seg_train", None, "seg_test/seg_test"),
        ("train/train", "VALIDATION", "testing/test"),
        ("trainset", "dev", "testset"),
    ],
)
@pytest.mark.parametrize("packed", [None, "each", "all", "all in a folder"])
def test_splits_are_kept_apart(tmp_path, train, val, test, packed):
    source = lay(tmp_path / "set", *classes(*(name for name in (train, val, test) if name)))
    if packed == "each":
        (tmp_path / "tars").mkdir()
        for folder in source.iterdir():
            pack(folder, tmp_path / "tars" / f"{folder.name}.tar")
        source = tmp_path / "tars"
    elif packed:
        source = pack(source, tmp_path / "set.tar", "" if packed == "all" else "something/")
    expected = {"cat": ["cat/0.png", "cat/1.png"], "dog": ["dog/0.png", "dog/1.png"]}
    for split, name in {"train": train, "validation": val, "test": test}.items():
        assert has_split(source, split) == (name is not None)
        if name:
            assert held(source, split) == expected
            assert open_split(source, split).taken.startswith(f"{split}: 4 images in 2 classes from ")
    if test:
        trained, tested = (load_images(source, split, SIZE, report=len).pixels for split in ("train", "test"))
        assert not any(torch.equal(one, other) for one in trained for other in tested)


def test_what_was_taken_and_what_was_left_out_is_said(tmp_path):
    lay(tmp_path / "set", *classes("train", "valid"), "extra/cat/1.png", "stray.png", "train/cat/notes.txt")
    lay(tmp_path / "set", "train/dog/b.TXT", "train/dog/raw.nef", "train/odd.png", "train/list.csv", "train/dog/name.")
    (tmp_path / "set" / "train" / "empty").mkdir()
    lines: list[str] = []
    load_images(tmp_path / "set", "train", SIZE, report=lines.append)
    assert lines == [
        "train: 4 images in 2 classes from set/train/; left out: 2 .txt, 1 .csv, 1 .nef, 1 file "
        "without a suffix, 1 folder without files, 1 image beside the class folders; no split: set/extra/, 1 image"
    ]
    assert open_split(tmp_path / "set", "test").taken == (
        "test: 4 images in 2 classes from set/valid/, as there is no test split; no split: set/extra/, 1 image"
    )


def test_a_source_without_splits_is_all_of_any(tmp_path):
    lay(tmp_path, "cat/1.png", "dog/2.png")
    for split in ("train", "validation", "test"):
        assert held(tmp_path, split) == {"cat": ["cat/1.png"], "dog": ["dog/2.png"]}
    assert not has_split(tmp_path, "validation")
    assert not has_split(tmp_path, "test")


def test_a_split_may_be_given_itself(tmp_path):
    lay(tmp_path, *classes("seg_train/seg_train", "Test"))
    expected = {"cat": ["cat/0.png", "cat/1.png"], "dog": ["dog/0.png", "dog/1.png"]}
    assert held(tmp_path / "seg_train", "train") == expected
    assert held(tmp_path / "seg_train" / "seg_train", "train") == expected
    assert held(tmp_path / "Test", "test") == expected
    assert held(pack(tmp_path / "Test", tmp_path / "some.tar", "some/"), "test") == expected


@pytest.mark.parametrize(
    ("names", "split", "text"),
    [
        (
            classes("fold1", "fold2"),
            "train",
            "the folders fold1, fold2 of .* hold folders of the same names, cat, dog",
        ),
        (
            [*classes("A", "B"), "A/fish/1.png"],
            "test",
            "the folders A, B of .* hold folders of the same names, cat, dog",
        ),
        (classes("test"), "train", r"no train split in '.*', which holds .*/test/: call it one of train, training"),
        (
            [*classes("test"), "cat/1.png", "dog/1.png"],
            "train",
            "no train split in .*test/ beside .*/cat/, .*/dog/: call",
        ),
        (classes("train"), "test", r"no test split in '.*', which holds .*/train/: call it one of test, testing"),
        (classes("train"), "validation", r"no validation split in .*: call it one of val, valid, validation, dev"),
        (classes("train", "training"), "train", "several train splits in .*/train/, .*/training/. Leave one of them"),
        (classes("train", "val", "dev"), "validation", "several validation splits in .*/dev/, .*/val/"),
        (classes("train", "test"), "tset", "unknown split 'tset' of .*; valid: train, validation, test"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_splits_that_cannot_be_told_apart(tmp_path, names, split, text, packed):
    source = lay(tmp_path / "set", *names)
    if packed:
        source = pack(source, tmp_path / "set.tar")
        text = text.replace("/cat/, .*/dog/", "cat/, .*dog/").replace(".*/", ".*")
    with pytest.raises(DataError, match=text):
        open_split(source, split)


def test_a_tar_beside_the_folder_that_it_was_unpacked_to_counts_once(tmp_path):
    lay(tmp_path / "set", *classes("train"))
    pack(tmp_path / "set" / "train", tmp_path / "set" / "train.tar")
    assert open_split(tmp_path / "set", "train").taken == (
        "train: 4 images in 2 classes from set/train.tar; no split: set/train/"
    )
    lay(tmp_path / "all", "cat/1.png", "dog/1.png")
    pack(tmp_path / "all", tmp_path / "all" / "everything.tar")
    assert list(held(tmp_path / "all", "train")) == ["cat", "dog"]


def test_trains_are_a_class_among_other_vehicles(tmp_path):
    lay(tmp_path, "bus/1.png", "car/1.png", "train/1.png")
    assert list(held(tmp_path, "train")) == ["bus", "car", "train"]


# ---- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_the_top_folder_is_the_class(tmp_path, packed):
    names = [
        f"train/{name}/session{i}/{j}/{k}.png" for name in ("cat", "dog") for i in (1, 2) for j in "ab" for k in (1, 2)
    ]
    source = lay(tmp_path / "set", *names)
    source = pack(source, tmp_path / "set.tar") if packed else source
    found = held(source, "train")
    assert list(found) == ["cat", "dog"]
    assert [file for files in found.values() for file in files] == [name.removeprefix("train/") for name in names]


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_names_are_neither_classes_nor_images(tmp_path, packed):
    lay(tmp_path / "set", *classes("train"), "train/.ipynb_checkpoints/1.png", "train/__MACOSX/cat/1.png")
    lay(
        tmp_path / "set", "train/cat/._0.png", "train/cat/.thumbs/1.png", ".git/train/1.png", "__MACOSX/train/cat/1.png"
    )
    source = pack(tmp_path / "set", tmp_path / "set.tar") if packed else tmp_path / "set"
    opened = open_split(source, "train")
    assert (len(opened), opened.classes) == (4, ("cat", "dog"))
    assert "left out" not in opened.taken


@pytest.mark.parametrize("names", [["cat.0.png", "dog.1.png"], ["images/0.png", "labels.csv"], ["train/cat.0.png"]])
def test_images_without_classes_cannot_be_trained_on(tmp_path, names):
    lay(tmp_path, *names)
    with pytest.raises(DataError, match=r"These layouts are read: FOLDER/train/CLASS/image\.jpg.*--labels FILE\.csv"):
        load_images(tmp_path, "train", SIZE, report=len)


def test_one_class_cannot_be_trained_on(tmp_path):
    lay(tmp_path, "train/images/1.png", "train/list.csv")
    with pytest.raises(DataError, match=r"has 1 class, images, and training needs at least two .*left out: 1 \.csv"):
        load_images(tmp_path, "train", SIZE, report=len)
    assert len(load_images(tmp_path, "train", SIZE, classes=("cat", "images"), report=len)) == 1


def test_unlabelled_test_images(tmp_path):
    lay(tmp_path / "a", *classes("train"), "test/1.png", "test/2.png")
    text = r"the test images of '.*', 2 in a/test/, lie in no class folders, so nothing says what they show\. .*predict"
    with pytest.raises(DataError, match=text):
        load_images(tmp_path / "a", "test", SIZE, classes=("cat", "dog"))
    lay(tmp_path / "b", *classes("train"), "test/unknown/1.png")
    with pytest.raises(DataError, match=r"has the classes unknown; .*nobody has labelled is not a class: give a table"):
        load_images(tmp_path / "b", "test", SIZE, classes=("cat", "dog"), report=len)
    assert len(open_split(tmp_path / "a", "test", labelled=False)) == 2  # as calibration needs them


def test_folders_without_images(tmp_path):
    lay(tmp_path, "train/cat/a.txt", "train/dog/b.doc")
    with pytest.raises(DataError, match=r"no images in the train split of .*/\. It holds 1 \.doc, 1 \.txt\. These"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "jfif", "png", "BMP", "tif", "tiff", "webp", "gif", "ppm"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_file_type_is_read(tmp_path, suffix, packed):
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (200 * i,) * 3).save(tmp_path / "set" / "train" / name / f"1.{suffix}")
    source = pack(tmp_path / "set", tmp_path / "set.tar") if packed else tmp_path / "set"
    images = load_images(source, "train", SIZE, report=len)
    assert images.labels.tolist() == [0, 1]
    assert (images.pixels.float().mean((1, 2, 3)) - torch.tensor([0.0, 200.0])).abs().max() < 3


# ---- folders and tars as they are -----------------------------------------------------------------------------------


def test_images_come_in_the_order_of_timm(tmp_path):
    """So that what a seed holds out, and every shuffled order, are as they were."""
    names = [f"{name}/{i}.png" for name in ("b10", "b9", "A1") for i in (10, 9, "x2", "X10", "1")]
    lay(tmp_path / "train", *names)
    folder, packed = tmp_path / "train", pack(tmp_path / "train", tmp_path / "train.tar")
    for source in (folder, packed):
        reader = create_dataset("", root=str(source), search_split=False).reader
        opened = open_split(source, "train")
        assert [file.name for file in opened.images] == [reader.filename(i) for i in range(len(reader))]
        assert opened.labels == (
            reader.targets.tolist() if source is packed else [label for _, label in reader.samples]
        )
        assert opened.classes == ("A1", "b9", "b10")


def test_a_tar_of_tars_and_a_folder_of_tars(tmp_path):
    """As ImageNet comes: one tar for each class."""
    (tmp_path / "parts").mkdir()
    for i, name in enumerate(("n01440764", "n01443537")):
        with tarfile.open(tmp_path / "parts" / f"{name}.tar", "w") as tar:
            for j in range(3):
                member = tarfile.TarInfo(f"{name}_{j}.png")
                content = picture(10 * i + j)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    whole = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(whole, "w") as tar:
        for part in sorted((tmp_path / "parts").iterdir()):
            tar.add(part, part.name)
    for source in (whole, tmp_path / "parts"):
        images = load_images(source, "train", SIZE, report=len)
        assert images.classes == ("n01440764", "n01443537")
        assert images.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
        assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_links(tmp_path):
    lay(tmp_path / "elsewhere", "1.png", "2.png")
    lay(tmp_path / "set" / "train", "cat/1.png")
    (tmp_path / "set" / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "train" / "cat" / "2.png").symlink_to("1.png")
    (tmp_path / "set" / "train" / "cat" / "round").symlink_to(tmp_path / "set")
    opened = open_split(tmp_path / "set", "train")
    assert [file.name for file in opened.images] == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    assert opened.taken.endswith("; left out: 1 link to a folder that holds it")

    content = picture(7)
    with tarfile.open(tmp_path / "linked.tar", "w") as tar:
        member = tarfile.TarInfo("./cat/1.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
        for name, kind, target in (
            ("./dog/1.png", tarfile.LNKTYPE, "./cat/1.png"),
            ("./dog/2.png", tarfile.SYMTYPE, "../cat/1.png"),
            ("./dog/3.png", tarfile.SYMTYPE, "nowhere.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    images = load_images(tmp_path / "linked.tar", "train", SIZE, report=len)
    assert images.pixels[:, 0, 0, 0].tolist() == [7, 7, 7]
    assert images.labels.tolist() == [0, 1, 1]
    assert "left out: 1 link without a target" in open_split(tmp_path / "linked.tar", "train").taken


def test_links_in_a_tar_with_splits(tmp_path):
    """What is left out is counted below the split, with links to folders, which are followed only on a disk."""
    content = picture(7)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (
            ("train/dog/2.png", "/elsewhere/2.png"),
            ("train/dog/3.png", "nowhere.png"),
            ("train/bird", "cat"),
            ("train/cat/round", ".."),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        pipe = tarfile.TarInfo("test/dog/1.png")
        pipe.type = tarfile.FIFOTYPE
        tar.addfile(pipe)
    taken = open_split(tmp_path / "set.tar", "train").taken
    left_out = "left out: 2 links to a folder, 2 links without a target"
    assert taken == f"train: 2 images in 2 classes from set.tar/train/; {left_out}"
    taken = open_split(tmp_path / "set.tar", "test").taken
    left_out = "left out: 1 file of a special kind, 1 folder without files"
    assert taken == f"test: 1 image in 1 class from set.tar/test/; {left_out}"


def test_what_is_no_file_is_left_out(tmp_path):
    lay(tmp_path / "set" / "train", "cat/1.png", "dog/1.png")
    (tmp_path / "set" / "train" / "dog" / "2.png").symlink_to("nowhere.png")
    (tmp_path / "set" / "train" / "dog" / "3.png").symlink_to("3.png")
    os.mkfifo(tmp_path / "set" / "train" / "cat" / "2.png")
    taken = open_split(tmp_path / "set", "train").taken
    assert "train: 2 images in 2 classes" in taken
    assert "2 links without a target" in taken
    assert "1 file of a special kind" in taken


def test_members_above_the_top_of_their_tar(tmp_path):
    """As tar unpacks them."""
    lay(tmp_path / "set", *classes("train"))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set" / "train", "../../set/train")
    assert open_split(tmp_path / "set.tar", "train").images[0].name == "cat/0.png"


def test_a_tar_of_a_folder_and_what_it_was_unpacked_from(tmp_path):
    lay(tmp_path / "set", "train/cat/1.png", "train/dog/1.png")
    with tarfile.open(tmp_path / "set" / "train.tar", "w") as tar:
        tar.add(tmp_path / "set" / "train", "train")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", ".")
    for source, packed in (("set", "set/train.tar/train/"), ("set.tar", "set.tar/train.tar/train/")):
        opened = open_split(tmp_path / source, "train")
        assert opened.taken.startswith(f"train: 2 images in 2 classes from {packed}; no split: ")
        assert [file.name for file in opened.images] == ["cat/1.png", "dog/1.png"]


def test_digits_that_are_not_decimal(tmp_path):
    """int() takes none of them."""
    lay(tmp_path / "set", "train/\u2461/1.png", "train/10\u00b2/2.png", "train/2/x\u00b3.png")
    assert open_split(tmp_path / "set", "train").classes == ("2", "10\u00b2", "\u2461")


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_a_compressed_tar(tmp_path, mode):
    lay(tmp_path / "set", *classes("train"))
    with tarfile.open(tmp_path / "set.tar", mode) as tar:
        tar.add(tmp_path / "set", "set")
    with pytest.raises(DataError, match=r"cannot read '.*set\.tar' as a tar without compression"):
        open_split(tmp_path / "set.tar", "train")
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"set\.zip' is neither a folder nor a \.tar: unpack it\. These layouts"):
        open_split(tmp_path / "set.zip", "train")


def test_a_truncated_tar(tmp_path):
    archive = pack(lay(tmp_path / "set", *classes("train")), tmp_path / "set.tar")
    content = archive.read_bytes()
    archive.write_bytes(content[:1024])
    with pytest.raises(DataError, match="cannot read"):
        load_images(archive, "train", SIZE, report=len)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_that_is_damaged_between_two_files(tmp_path, form):
    """Its reader takes a header that makes no sense for the end, and would leave out the images behind it."""
    lay(tmp_path / "set", *classes("train"))
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, "w", format=form) as tar:
        for file in sorted((tmp_path / "set").rglob("*.png")):
            tar.add(file, file.relative_to(tmp_path / "set"))
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    content, end = archive.read_bytes(), members[-1].offset_data + 512
    assert members[-1].size <= 512
    assert len(open_split(archive, "train").images) == 4
    for position in (*range(0, end + 1, 512), *range(200, end, 712)):
        archive.write_bytes(content[:position])
        with pytest.raises(DataError, match=r"cannot read .*set\.tar"):
            open_split(archive, "train")
    for member in members:
        for spoiled in b"\xff", bytes(512), *([bytes(1024)] if member is not members[-1] else []):  # else it is an end
            archive.write_bytes(content[: member.offset] + spoiled + content[member.offset + len(spoiled) :])
            with pytest.raises(DataError, match=r"cannot read .*set\.tar"):
                open_split(archive, "train")


def test_of_members_with_one_name_the_last_one_counts(tmp_path):
    """As when a tar is unpacked, whether they are files or links; links may lead to links that come later."""

    def add(tar, name, *, value=None, target="", kind=tarfile.SYMTYPE):
        member = tarfile.TarInfo(name)
        content = b"" if value is None else picture(value)
        member.type, member.linkname, member.size = kind if target else tarfile.REGTYPE, target, len(content)
        tar.addfile(member, io.BytesIO(content))

    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        add(tar, "cat/1.png", value=1)
        add(tar, "cat/1.png", target="cat/1.png", kind=tarfile.LNKTYPE)  # as GNU tar writes a file that it packs twice
        add(tar, "dog/1.png", target="../cat/1.png")
        add(tar, "dog/1.png", value=9)
        add(tar, "dog/2.png", value=2)
        add(tar, "dog/2.png", target="3.png")
        add(tar, "dog/3.png", target="1.png")
    images = load_images(tmp_path / "set.tar", "train", SIZE, report=len)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 9, 9, 9]
    assert images.labels.tolist() == [0, 1, 1, 1]


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    lay(tmp_path, *classes("train"))
    real = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot list the folder '.*dog': Permission denied"):
        open_split(tmp_path, "train")


def test_a_changed_tar_is_read_anew(tmp_path):
    lay(tmp_path / "set", *classes("train"))
    archive = pack(tmp_path / "set", tmp_path / "set.tar")
    assert len(open_split(archive, "train")) == 4
    lay(tmp_path / "set", "train/cat/9.png")
    assert len(open_split(pack(tmp_path / "set", archive), "train")) == 5


def test_targets_are_the_labels(tmp_path):
    opened = open_split(lay(tmp_path, *classes("train")), "train")
    assert opened.targets().tolist() == [0, 0, 1, 1]
    read = [opened.read(i, lambda image: torch.tensor(np.asarray(Image.open(image)))) for i in range(4)]
    assert [label for _, label in read] == [0, 0, 1, 1]
