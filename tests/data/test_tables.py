"""Labels from tables that pandas and pyarrow write: what they name is what is read, and what they do not is said."""

import re
import tarfile

import pytest
import torch
from PIL import Image

from convmixer.data.memory import load_images
from convmixer.data.readers import has_split, open_split
from convmixer.errors import DataError, DependencyError

pandas = pytest.importorskip("pandas", reason="the train extra is not installed")

SIZE = (3, 4, 4)
NAMES = ("a.png", "b.png", "c.png", "d.png")
LABELS = {"a.png": "dog", "b.png": "cat", "c.png": "dog", "d.png": "cat"}


@pytest.fixture
def pictures(tmp_path):
    """Four images without class folders, each of another grey."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        Image.new("RGB", (4, 4), (10 * i,) * 3).save(folder / name)
    return folder


def write(path, **columns):
    table = pandas.DataFrame(columns)
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def read(source, split="train", **options):
    """Label by shade of grey."""
    images = load_images(source, split, SIZE, report=len, **options)
    shades = (images.pixels[:, 0, 0, 0] // 10).tolist()
    return {NAMES[shade]: images.classes[label] for shade, label in zip(shades, images.labels, strict=True)}


def test_a_table_of_tars(pictures, tmp_path):
    """The path of an image may have its tar, or the folder that the tar stands for."""
    (tmp_path / "set").mkdir()
    for split, names in (("train", NAMES[:2]), ("val", NAMES[2:])):
        with tarfile.open(tmp_path / "set" / f"{split}.tar", "w") as archive:
            for name in names:
                archive.add(pictures / name, name)
    for suffix in ("", ".tar"):
        images = [f"train{suffix}/a.png", f"train{suffix}/b.png", f"val{suffix}/c.png"]
        table = write(tmp_path / "labels.csv", image=images, label=["dog", "cat", "dog"])
        assert read(tmp_path / "set", labels=table) == {"a.png": "dog", "b.png": "cat"}
        assert read(tmp_path / "set", "test", labels=table) == {"c.png": "dog"}
        taken = open_split(tmp_path / "set", "test", labels=table).taken
        assert taken == (
            "test: 1 image in 1 class from set/val.tar by labels.csv, as there is no test split; "
            "left out: 1 image without a row in the table"
        )


def test_the_column_split_without_tests(pictures, tmp_path):
    """Validation images stand in for them, as those of folders do."""
    splits = ["train", "train", "val", "val"]
    table = write(tmp_path / "labels.csv", image=list(LABELS), label=list(LABELS.values()), split=splits)
    assert read(pictures, "test", labels=table) == {"c.png": "dog", "d.png": "cat"}
    assert "as there is no test split" in open_split(pictures, "test", labels=table).taken
    assert not has_split(pictures, "test", labels=table)


def test_a_file_of_the_name_of_an_image(pictures, tmp_path):
    (pictures / "a").write_text("about a.png")
    table = write(tmp_path / "labels.csv", image=["a", "b"], label=["dog", "cat"])
    assert read(pictures, labels=table) == {"a.png": "dog", "b.png": "cat"}


def test_several_labels_in_a_cell(pictures, tmp_path):
    table = write(tmp_path / "labels.parquet", image=list(LABELS), label=[[1, 2], [1], [2], [1]])
    with pytest.raises(DataError, match=r"row 1 of '.*labels.parquet' lacks text or a whole number"):
        open_split(pictures, "train", labels=table)


def test_classes_that_differ_in_their_accents(tmp_path):
    """macOS writes an accent as a character of its own."""
    for split, name in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        for label in (name, "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / label / "1.png")
    classes = open_split(tmp_path, "train").classes
    with pytest.raises(DataError, match="Some differ only in how Unicode writes an accent"):
        open_split(tmp_path, "test").labels_in(classes)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "CSV"])
def test_a_table_in_place_of_class_folders(pictures, tmp_path, suffix):
    table = write(tmp_path / f"labels.{suffix}", image=list(LABELS), label=list(LABELS.values()), width=[4] * 4)
    for split in ("train", "test", "validation"):
        assert read(pictures, split, labels=table) == LABELS
    assert open_split(pictures, "train", labels=table).taken == (
        f"train: 4 images in 2 classes from images/ by labels.{suffix}"
    )
    assert not has_split(pictures, "test", labels=table)


@pytest.mark.parametrize(
    "name",
    [
        lambda name, _: name,
        lambda name, _: name.removesuffix(".png"),
        lambda name, _: f"./{name}",
        lambda name, _: f"images/{name}",
        lambda name, _: f"images\\{name}",
        lambda name, folder: str(folder / name),
    ],
)
def test_ways_to_name_an_image(pictures, tmp_path, name):
    names = [name(image, pictures) for image in LABELS]
    table = write(tmp_path / "labels.csv", image=names, label=list(LABELS.values()))
    assert read(tmp_path, labels=table) == LABELS


def test_a_table_may_be_the_source_itself(pictures):
    """Its images lie next to it."""
    write(pictures / "labels.csv", image=list(LABELS), label=list(LABELS.values()))
    assert read(pictures / "labels.csv") == LABELS


def test_a_table_for_a_tar(pictures, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(pictures, "images")
    table = write(tmp_path / "labels.csv", image=list(LABELS), label=list(LABELS.values()))
    assert read(tmp_path / "images.tar", labels=table) == LABELS


def test_labels_are_text_as_it_stands_there(pictures, tmp_path):
    """pandas would take these for numbers and missing values."""
    labels = ["007", "NA", "1.0", "null"]
    table = write(tmp_path / "labels.csv", image=list(LABELS), label=labels)
    assert read(pictures, labels=table) == dict(zip(LABELS, labels, strict=True))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_numbers_are_labels(pictures, tmp_path, suffix):
    table = write(tmp_path / f"labels.{suffix}", image=list(LABELS), label=[10, 9, 10, 2])
    images = load_images(pictures, "train", SIZE, labels=table, report=len)
    assert images.classes == ("2", "9", "10")
    assert images.labels.tolist() == [2, 1, 2, 0]


def test_a_column_says_the_split(pictures, tmp_path):
    splits = ["train", "Training", "val", "test"]
    table = write(tmp_path / "labels.csv", image=list(LABELS), label=list(LABELS.values()), split=splits)
    assert read(pictures, labels=table) == {"a.png": "dog", "b.png": "cat"}
    assert read(pictures, "validation", labels=table) == {"c.png": "dog"}
    assert read(pictures, "test", labels=table) == {"d.png": "cat"}
    assert open_split(pictures, "train", labels=table).taken == (
        "train: 2 images in 2 classes from images/ by labels.csv; left out: 2 images without a row of the train split"
    )
    assert all(has_split(pictures, split, labels=table) for split in ("validation", "test"))


def test_folders_say_the_split_where_no_column_does(pictures, tmp_path):
    for split, names in {"train": "ab", "val": "c", "test": "d"}.items():
        (tmp_path / "set" / split).mkdir(parents=True)
        for name in names:
            (pictures / f"{name}.png").rename(tmp_path / "set" / split / f"{name}.png")
    table = write(tmp_path / "labels.csv", image=list(NAMES)[:3], label=["dog", "cat", "dog"])
    assert read(tmp_path / "set", labels=table) == {"a.png": "dog", "b.png": "cat"}
    assert read(tmp_path / "set", "validation", labels=table) == {"c.png": "dog"}
    assert has_split(tmp_path / "set", "validation", labels=table)
    assert not has_split(tmp_path / "set", "test", labels=table)
    with pytest.raises(DataError, match=r"no row of '.*labels\.csv' is of the test images of '.*', in set/test/"):
        open_split(tmp_path / "set", "test", labels=table)


def test_what_has_no_row_is_said(pictures, tmp_path):
    (pictures / "notes.txt").write_text("")
    table = write(tmp_path / "labels.csv", image=["a.png", "d.png"], label=["dog", "cat"])
    assert read(pictures, labels=table) == {"a.png": "dog", "d.png": "cat"}
    assert open_split(pictures, "train", labels=table).taken == (
        "train: 2 images in 2 classes from images/ by labels.csv; left out: 2 images without a row in the table, 1 .txt"
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("image,label\n", "has no rows"),
        ("", "cannot read the table"),
        ("image;label\na.png;cat\n", r"has the columns image;label: it needs image and label, and may have split"),
        ("file,class\na.png,cat\n", "has the columns file, class: it needs image and label"),
        ("image,label\na.png,\n", r"row 1 of .*\.csv' lacks text or a whole number: image 'a\.png', label ''"),
        ("image,label\na.png,cat\na.png,dog\n", r"row 2 of .* contradicts an earlier one on the image 'a\.png'"),
        ("image,label\na.png,cat\na,dog\n", r"gives a\.png the labels 'cat' and 'dog'"),
        (
            "image,label\nx.png,cat\na.png,dog\n",
            r"1 of 2 rows of .* name no image in '.*images': x\.png",
        ),
        ("image,label\nnotes.txt,cat\na.png,dog\n", "1 of 2 rows of .* name no image in"),
        (
            "image,label,split\na.png,cat,train\nb.png,dog,rest\n",
            "row 2 of .* has the split 'rest': call it train",
        ),
        ("image,label\na.png,cat\nb.png,cat\n", "has 1 class, cat, and training needs at least two"),
        ("image,label,label\na.png,cat,x\nb.png,dog,x\n", "has several columns called label: leave one of them"),
        ("image,label,Label\na.png,cat,x\nb.png,dog,x\n", "has several columns called label: leave one of them"),
        (
            "image,label\na.png,b.png,cat\nb.png,a.png,dog\n",
            "cannot read the table .*Expected 2 fields in line 2, saw 3",
        ),
        (b"image,label\na.png,\xff\xfe\n", "cannot read the table .*UnicodeDecodeError"),
    ],
)
def test_tables_that_cannot_be_used(pictures, tmp_path, content, text):
    (pictures / "notes.txt").write_text("")
    (tmp_path / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=text):
        load_images(pictures, "train", SIZE, labels=tmp_path / "labels.csv", report=len)


def test_the_same_name_twice(pictures, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for name in NAMES:
            (tmp_path / "set" / split / name).write_bytes((pictures / name).read_bytes())
    table = write(tmp_path / "labels.csv", image=list(LABELS), label=list(LABELS.values()))
    with pytest.raises(DataError, match=r"'a\.png' of '.*' could be test/a\.png, train/a\.png in .*: write the path"):
        read(tmp_path / "set", labels=table)
    assert read(tmp_path / "set" / "train", labels=table) == LABELS
    full = write(tmp_path / "full.csv", image=[f"train/{name}" for name in LABELS], label=list(LABELS.values()))
    assert read(tmp_path / "set", labels=full) == LABELS


@pytest.mark.usefixtures("pictures")
def test_an_image_in_two_splits(tmp_path):
    """Under two spellings, of which each names one file."""
    rows = {"image": ["a.png", "b.png", "c.png", "images/a.png"], "label": ["x", "y", "x", "x"]}
    table = write(tmp_path / "labels.csv", **rows, split=["train", "train", "test", "test"])
    for split in "train", "test":
        with pytest.raises(DataError, match=rf"labels\.csv' has '.*a\.png' twice, for {split} and for"):
            open_split(tmp_path, split, labels=table)


def test_what_another_split_names_does_not_matter(pictures, tmp_path):
    """An ambiguous or a missing image is an error of its own split only."""
    for name in "x", "y":
        (pictures / name).mkdir()
        (pictures / name / "two.png").write_bytes((pictures / "a.png").read_bytes())
    rows = {"image": ["a.png", "b.png", "two.png", "gone.png"], "label": ["x", "y", "x", "y"]}
    table = write(tmp_path / "labels.csv", **rows, split=["train", "train", "test", "test"])
    assert len(open_split(tmp_path, "train", labels=table).images) == 2
    with pytest.raises(DataError, match=r"'two\.png' of .* could be images/x/two\.png, images/y/two\.png"):
        open_split(tmp_path, "test", labels=table)


def test_what_is_no_table(pictures, tmp_path):
    with pytest.raises(DataError, match=r"no table at '.*none\.csv'"):
        open_split(pictures, "train", labels=tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"labels\.xlsx' is not a table of labels: give a file that ends in \.csv"):
        open_split(pictures, "train", labels=tmp_path / "labels.xlsx")
    with pytest.raises(DataError, match=r"labels='x\.csv' is for images in folders and tars: 'torch/cifar10' has"):
        open_split("torch/cifar10", "train", labels="x.csv")


def test_missing_values_of_a_parquet_file(pictures, tmp_path):
    table = write(tmp_path / "labels.parquet", image=["a.png", "b.png", "c.png"], label=[1.0, None, 2.0])
    with pytest.raises(DataError, match=r"row 2 of .* lacks text or a whole number: image 'b\.png', label ''"):
        open_split(pictures, "train", labels=table)
    table = write(tmp_path / "labels.parquet", image=["a.png", "b.png"], label=[1.5, 2.0])
    with pytest.raises(DataError, match=r"row 1 of .* lacks text or a whole number"):
        open_split(pictures, "train", labels=table)


def test_pandas_is_named_where_it_is_missing(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    text = re.escape("needs pandas, which is missing: pip install 'convmixer[train]'")
    with pytest.raises(DependencyError, match=text):
        open_split(pictures, "train", labels=tmp_path / "labels.csv")


def test_unknown_splits_do_not_matter_to_a_table(pictures, tmp_path):
    for part, names in {"one": "ab", "two": "cd"}.items():
        for side, name in zip(("left", "right"), names, strict=True):
            (tmp_path / "set" / part / side).mkdir(parents=True)
            (pictures / f"{name}.png").rename(tmp_path / "set" / part / side / f"{name}.png")
    with pytest.raises(DataError, match="hold folders of the same names"):
        read(tmp_path / "set")
    table = write(tmp_path / "labels.csv", image=list(LABELS), label=list(LABELS.values()))
    assert read(tmp_path / "set", labels=table) == LABELS
    assert torch.equal(open_split(tmp_path / "set", "train", labels=table).targets(), torch.tensor([1, 0, 1, 0]))
