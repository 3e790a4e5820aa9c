"""Inference over data sets in one process: for every kind of source, the rows are what `predict` returns."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import RUNNER, main, records, run
from conftest import write_digits
from processes import finish, kill, started

import convmixer
from convmixer.data.parts import open_parts
from convmixer.errors import ArgumentError, ConvMixerError, DataError, WriteError

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'convmixer[batch]'")
pa = pytest.importorskip("pyarrow")

COUNT = 90


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """90 handwritten digits as PNG files in class folders."""
    return write_digits(tmp_path_factory.mktemp("digits"), COUNT, 0, ("zero", "one", "two")) / "train"


@pytest.fixture(scope="module")
def files(digits) -> list[Path]:
    """The files of `digits`, in the order of their names."""
    return sorted(digits.rglob("*.png"))


@pytest.fixture(scope="module")
def model() -> convmixer.ConvMixer:
    torch.manual_seed(1)
    made = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", dim=16, depth=2, num_classes=3)
    made.pretrained_cfg = {**made.pretrained_cfg, "input_size": (3, 8, 8), "label_names": ("zero", "one", "two")}
    return made


def write_parquet(path: Path, files: list[Path], *, struct: bool = True, row_group: int = 7) -> None:
    content = [file.read_bytes() for file in files]
    names = [f"{file.parent.name}/{file.name}" for file in files]
    images = [{"bytes": b, "path": None} for b in content] if struct else content
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"label": [1] * len(files), "image": images, "key": names}), path, row_group_size=row_group)


def write_shard(path: Path, files: list[Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, f"{file.parent.name}-{file.name}")


def compute(model, data, output, **options):
    """Run `predict_dataset`; return the rows in the order of its files, and the summary."""
    # Workers would take longer to start than these images to decode.
    settings = {"workers": 0, "backend": "eager", "topk": 3, "report": lambda _: None, **options}
    summary = convmixer.predict_dataset(model, data, output, **settings)
    return rows(output), summary


def rows(output) -> list[dict]:
    files = sorted(Path(output).glob("*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def answers(found: list[dict]) -> list[tuple]:
    """Rows without what depends on the source: the names of images."""
    return [(row["labels"], row["probabilities"], row["error"]) for row in found]


@pytest.fixture(scope="module")
def expected(model, digits, tmp_path_factory) -> list[dict]:
    return compute(model, digits, tmp_path_factory.mktemp("expected") / "out", rows_per_file=40)[0]


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_what_predict_says(model, files, digits, tmp_path, workers):
    lines = []
    found, summary = compute(model, digits, tmp_path / "out", rows_per_file=40, workers=workers, report=lines.append)
    assert [row["image"] for row in found] == [f"{file.parent.name}/{file.name}" for file in files]
    for row, prediction in zip(found, convmixer.predict(model, files, topk=3), strict=True):
        assert list(row) == ["image", "label", "probability", "labels", "probabilities", "error"]
        assert row["labels"] == [label for label, _ in prediction]
        assert row["probabilities"] == pytest.approx([p for _, p in prediction], abs=1e-5)
        assert (row["label"], row["probability"]) == (row["labels"][0], row["probabilities"][0])
        assert row["error"] is None
    names = ["_manifest.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == names
    assert [pq.read_metadata(tmp_path / "out" / name).num_rows for name in names[1:]] == [40, 40, 10]
    assert (summary.images, summary.errors, summary.files, summary.kept) == (COUNT, 0, 3, 0)
    assert lines == [f"90 images from {digits.name}/"]


def test_the_folder_opens_as_one_table(model, digits, tmp_path):
    pandas = pytest.importorskip("pandas")
    compute(model, digits, tmp_path / "out", rows_per_file=50, topk=1)
    table = pandas.read_parquet(tmp_path / "out")
    assert len(table) == table.image.nunique() == COUNT
    assert table.label.value_counts().sum() == COUNT


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_embeddings_are_the_pooled_features(model, files, digits, tmp_path, backend):
    found, _ = compute(model, digits, tmp_path / "out", embed=True, backend=backend)
    assert list(found[0]) == ["image", "embedding", "error"]
    transform = convmixer.create_transform(model)
    images = torch.stack([transform(convmixer.data.images.read_image(file)) for file in files])
    evaluated = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", dim=16, depth=2, num_classes=3).eval()
    evaluated.load_state_dict(model.state_dict())
    with torch.inference_mode():
        features = evaluated.double().forward_features(images.double()).mean((2, 3))
    assert np.allclose([row["embedding"] for row in found], features.numpy(), atol=1e-4)
    assert pq.read_schema(tmp_path / "out" / "part-00000.parquet").field("embedding").type == pa.list_(pa.float32())
    assert model.num_classes == 3


def test_a_model_with_one_output(digits, tmp_path):
    model = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", dim=16, depth=2, num_classes=1)
    found, _ = compute(model, digits, tmp_path / "out")
    assert {len(row["labels"]) for row in found} == {2}
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in found)


# ---- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(model, files, expected, tmp_path, struct):
    """Neither files nor row groups end where a part ends."""
    write_parquet(tmp_path / "in" / "b-10.parquet", files[33:], struct=struct, row_group=9)
    write_parquet(tmp_path / "in" / "b-9.parquet", files[:33], struct=struct)
    for i, source in enumerate((tmp_path / "in", str(tmp_path / "in" / "*.parquet"))):
        found, _ = compute(model, source, tmp_path / f"out-{i}", rows_per_file=25)
        assert [row["image"] for row in found] == [row["image"] for row in expected]
        assert answers(found) == answers(expected)


def test_parquet_without_names(model, files, expected, tmp_path):
    table = pa.table({"picture": [file.read_bytes() for file in files], "text": ["a"] * COUNT})
    pq.write_table(table, tmp_path / "in.parquet")
    found, _ = compute(model, tmp_path / "in.parquet", tmp_path / "out", rows_per_file=40)
    assert [row["image"] for row in found] == [f"in.parquet:{i}" for i in range(COUNT)]
    assert answers(found) == answers(expected)
    named, _ = compute(model, tmp_path / "in.parquet", tmp_path / "named", rows_per_file=40, key_column="text")
    assert {row["image"] for row in named} == {"a"}


def test_tar_and_table(model, digits, expected, tmp_path):
    with tarfile.open(tmp_path / "digits.tar", "w") as archive:
        archive.add(digits, "digits")
    lines = [f"{row['image']},{row['label']}" for row in expected]
    (tmp_path / "table").mkdir()
    shutil.copytree(digits, tmp_path / "table" / "images")
    (tmp_path / "table" / "labels.csv").write_text("\n".join(["image,label", *lines]))
    (tmp_path / "table" / "backwards.csv").write_text("\n".join(["image,label", *reversed(lines)]))
    found, _ = compute(model, tmp_path / "table" / "backwards.csv", tmp_path / "backwards-out")
    assert answers(found) == answers(expected)[::-1]  # the order is the table's
    for name in ("digits.tar", "table/labels.csv"):
        found, _ = compute(model, tmp_path / name, tmp_path / f"{Path(name).stem}-out", rows_per_file=40)
        assert [row["image"].removeprefix("digits/").removeprefix("images/") for row in found] == [
            row["image"] for row in expected
        ]
        assert answers(found) == answers(expected)


@pytest.mark.parametrize("declared", ["", "|90"])
def test_shards(model, files, expected, tmp_path, declared):
    """Without labels and classes.txt. Every shard becomes a file, even an empty one."""
    pytest.importorskip("webdataset")
    for i, part in enumerate((files[:40], [], files[40:80], files[80:])):
        write_shard(tmp_path / f"s-{i}.tar", part)
    source = f"wds/{tmp_path}/s-{{0..3}}.tar{declared}"
    found, summary = compute(model, source, tmp_path / "out")
    assert [row["image"] for row in found][38:42] == [
        f"s-{i}.tar/{file.parent.name}-{file.stem}" for i, file in zip((0, 0, 2, 2), files[38:42], strict=True)
    ]
    assert answers(found) == answers(expected)
    assert (summary.files, summary.images) == (4, COUNT)


def test_shards_by_their_record(model, files, expected, tmp_path):
    pytest.importorskip("webdataset")
    names = ["s-0.tar", "s-1.tar"]
    write_shard(tmp_path / names[0], files[:40])
    write_shard(tmp_path / names[1], files[40:])
    split = {"name": "train", "num_samples": COUNT, "filenames": names, "shard_lengths": [40, 50]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    assert [len(row["labels"]) for row in compute(model, f"wds/{tmp_path}", tmp_path / "out")[0]] == [3] * COUNT
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split, "test": split}}))
    with pytest.raises(DataError, match=r"several splits in .*: train, test\. Say which one is meant"):
        compute(model, f"wds/{tmp_path}", tmp_path / "out2")
    assert len(compute(model, f"wds/{tmp_path}", tmp_path / "out2", split="test")[0]) == COUNT


def test_shards_of_one_name(model, files, tmp_path):
    pytest.importorskip("webdataset")
    names = ["a/0.tar", "b/0.tar"]
    for name in names:
        write_shard(tmp_path / name, files[:1])
    split = {"name": "train", "num_samples": 2, "filenames": names, "shard_lengths": [1, 1]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    found, _ = compute(model, f"wds/{tmp_path}", tmp_path / "out")
    key = f"{files[0].parent.name}-{files[0].stem}"
    assert [row["image"] for row in found] == [f"a/0.tar/{key}", f"b/0.tar/{key}"]


def test_shards_that_have_changed(model, files, tmp_path):
    pytest.importorskip("webdataset")
    source = f"wds/{tmp_path}/s-{{0..1}}.tar"
    for i in range(2):
        write_shard(tmp_path / f"s-{i}.tar", files[i : i + 1])
    compute(model, source, tmp_path / "out")
    (tmp_path / "out" / "part-00001.parquet").unlink()
    write_shard(tmp_path / "s-0.tar", files[10:30])
    with pytest.raises(ArgumentError, match="source listing was "):
        compute(model, source, tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_cut_off(model, files, tmp_path, workers):
    """What comes before it is written, also where workers read ahead of the model."""
    pytest.importorskip("webdataset")
    for i in range(6):
        write_shard(tmp_path / f"s-{i}.tar", files[2 * i : 2 * i + 2])
    cut = tmp_path / "s-4.tar"
    cut.write_bytes(cut.read_bytes()[:1300])
    for _ in range(2):
        with pytest.raises(DataError, match=r"cannot read the shard '.*s-4\.tar'"):
            compute(model, f"wds/{tmp_path}/s-{{0..5}}.tar", tmp_path / "out", workers=workers)
        written = sorted(file.name for file in (tmp_path / "out").glob("*.parquet"))
        assert written == [f"part-0000{i}.parquet" for i in range(4)]


def test_a_wrong_number_of_samples(model, files, tmp_path):
    pytest.importorskip("webdataset")
    write_shard(tmp_path / "s-0.tar", files)
    with pytest.raises(DataError, match=r"should have 91 samples and has 90: correct the number. All 90 rows are in"):
        compute(model, f"wds/{tmp_path}/s-0.tar|91", tmp_path / "out")


def test_a_data_set_of_the_hub(model, files, expected, tmp_path):
    """Without a column of labels. Rows are named by their numbers."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    content = {"text": ["x"] * COUNT, "image": [{"bytes": f.read_bytes(), "path": None} for f in files]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(content, features).to_parquet(tmp_path / "set" / "train.parquet")
    source = f"hfds/{tmp_path / 'set'}"
    found, _ = compute(model, source, tmp_path / "out", rows_per_file=40, data_root=tmp_path / "cache")
    assert [row["image"] for row in found] == [str(i) for i in range(COUNT)]
    assert answers(found) == answers(expected)
    with pytest.raises(DataError, match=r"no split 'test' in .*; valid: train"):
        compute(model, source, tmp_path / "out2", split="test", data_root=tmp_path / "cache")


def test_splits(model, tmp_path):
    write_digits(tmp_path / "in", 20, 10, ("zero", "one"))
    for split, count in ((None, 30), ("train", 20), ("test", 10)):
        assert len(compute(model, tmp_path / "in", tmp_path / f"out-{split}", split=split)[0]) == count
    with pytest.raises(DataError, match="unknown split 'tset'"):
        compute(model, tmp_path / "in", tmp_path / "out", split="tset")


# ---- broken images --------------------------------------------------------------------------------------------------


def test_a_model_of_other_channels_is_refused_before_anything_is_written(digits, tmp_path):
    model = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", dim=8, depth=1, in_chans=4)
    with pytest.raises(ArgumentError, match="images have 1 or 3 channels, this model takes 4"):
        compute(model, digits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("embed", [False, True])
def test_a_model_that_answers_nan_writes_nothing(digits, tmp_path, embed):
    model = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", dim=8, depth=1)
    torch.nn.init.constant_(model.blocks[0][1].bias, math.nan)
    with pytest.raises(ConvMixerError, match=r"answers NaN or infinity"):
        compute(model, digits, tmp_path / "out", embed=embed)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_row_of_the_hub_without_an_image(model, files, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    content = {"image": [{"bytes": files[0].read_bytes(), "path": None}, None]}
    data = datasets.Dataset.from_dict(content, datasets.Features({"image": datasets.Image()}))
    data.to_parquet(tmp_path / "set" / "train.parquet")
    source = f"hfds/{tmp_path / 'set'}"
    found, summary = compute(model, source, tmp_path / "out", data_root=tmp_path / "cache")
    assert (summary.errors, found[0]["error"]) == (1, None)
    assert found[1]["error"] == f"cannot read image 1 of {source!r}: its image is empty"


def test_a_broken_image_is_a_row(model, digits, expected, tmp_path):
    shutil.copytree(digits, tmp_path / "in")
    broken = [expected[i]["image"] for i in (0, 41, 42)]
    for name in broken:
        (tmp_path / "in" / name).write_bytes(b"not an image")
    lone = tmp_path / "in" / "zzz" / "lone.png"  # a batch, and a part, without any image
    lone.parent.mkdir()
    lone.write_bytes(b"")
    found, summary = compute(model, tmp_path / "in", tmp_path / "out", rows_per_file=30, batch_size=10)
    assert (summary.images, summary.errors, len(found)) == (91, 4, 91)
    assert found[90]["image"] == "zzz/lone.png"
    for row, whole in zip(found[:90], expected, strict=True):
        assert row["image"] == whole["image"]
        if row["image"] in broken:
            assert f"({row['image']}): " in row["error"]
            assert "is not an image that Pillow can read" in row["error"]
            assert {row[key] for key in ("label", "probability", "labels", "probabilities")} == {None}
        else:
            assert row["labels"] == whole["labels"]
            assert row["probabilities"] == pytest.approx(whole["probabilities"], abs=1e-5)
    embedded, _ = compute(model, tmp_path / "in", tmp_path / "embedded", embed=True, batch_size=10)
    assert [row["embedding"] is None for row in embedded] == [row["error"] is not None for row in found]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="all names of files are Unicode there")
def test_broken_images_whose_names_are_not_unicode(model, tmp_path):
    """Parquet stores only UTF-8, also where an error names the file."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"broken")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "images", "")
    write_shard(tmp_path / "shards" / "a-0000.tar", [tmp_path / "images" / os.fsdecode(b"caf\xe9.png")])
    sources = [tmp_path / "images", tmp_path / "images.tar", f"wds/{tmp_path}/shards/a-{{0000..0000}}.tar"]
    for i, source in enumerate(sources):
        (row,), _ = compute(model, source, tmp_path / f"out{i}")
        assert row["image"].endswith(r"caf\udce9" if i == 2 else r"caf\udce9.png")
        assert r"caf\udce9" in row["error"]


def test_broken_rows_of_parquet_and_shards(model, files, tmp_path):
    pytest.importorskip("webdataset")
    content = [files[0].read_bytes(), None, b"broken"]
    pq.write_table(
        pa.table({"image": pa.array(content, pa.binary()), "key": ["a", None, "c"]}), tmp_path / "in.parquet"
    )
    found, _ = compute(model, tmp_path / "in.parquet", tmp_path / "out")
    assert [row["image"] for row in found] == ["a", "in.parquet:1", "c"]
    assert found[0]["error"] is None
    assert found[1]["error"].endswith("its image has no bytes")
    assert "cannot read image c of" in found[2]["error"]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "b.txt").write_text("no image")
    write_shard(tmp_path / "s.tar", [files[0], tmp_path / "text" / "b.txt"])
    found, _ = compute(model, f"wds/{tmp_path}/s.tar", tmp_path / "out2")
    assert found[0]["error"] is None
    assert "none of its parts, txt, ends in " in found[1]["error"]


@pytest.mark.skipif(os.name == "nt", reason="such names do not exist on Windows")
def test_a_name_that_is_not_utf_8(model, files, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(files[0], os.path.join(tmp_path, "in", os.fsdecode(b"latin-\xe9.png")))
    ((row,), _) = compute(model, tmp_path / "in", tmp_path / "out")
    assert (row["image"], row["error"]) == ("latin-\\udce9.png", None)


# ---- interrupted runs -----------------------------------------------------------------------------------------------


def test_resume_writes_what_is_missing(model, digits, expected, tmp_path):
    out, lines, seen = tmp_path / "out", [], []
    compute(model, digits, out, rows_per_file=20)
    first = (out / "part-00000.parquet").stat().st_mtime_ns
    for i in (1, 4):
        (out / f"part-{i:05}.parquet").unlink()
    (out / ".part-00001.parquet.abcd0123").write_bytes(b"half")  # of a run that was killed
    options = {"report": lines.append, "progress": lambda *counts: seen.append(counts)}
    found, summary = compute(model, digits, out, rows_per_file=20, batch_size=8, **options)
    assert [row["image"] for row in found] == [row["image"] for row in expected]
    assert (summary.images, summary.kept, summary.files) == (90, 60, 5)
    assert (out / "part-00000.parquet").stat().st_mtime_ns == first
    assert lines[1] == "3 of 5 files exist already, with 60 rows, and are kept"
    assert seen == [(60, 90), (68, 90), (76, 90), (80, 90), (88, 90), (90, 90)]
    assert not list(out.glob(".part*"))
    _, again = compute(model, digits, out, rows_per_file=20)
    assert (again.kept, again.images, again.images_per_second) == (90, 90, 0)


def test_another_run_in_the_folder(model, digits, tmp_path):
    out = tmp_path / "out"
    compute(model, digits, out)
    before = {file: file.read_bytes() for file in out.glob("[!.]*")}
    with pytest.raises(ArgumentError, match=r"rows of another run: settings topk was 3 and is 2\. To resume it, give"):
        compute(model, digits, out, topk=2)
    with pytest.raises(
        ArgumentError, match=r"settings dtype was 'float32' and is 'bfloat16'; settings rows_per_file was"
    ):
        compute(model, digits, out, dtype="bfloat16", rows_per_file=7)
    with pytest.raises(ArgumentError, match=r"source data was '.*train' and is '.*zero'; source listing was "):
        compute(model, digits / "zero", out)
    other = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", dim=16, depth=2, num_classes=3)
    other.pretrained_cfg = model.pretrained_cfg
    with pytest.raises(ArgumentError, match=r"another run: model digest was '\w+' and is '\w+'"):
        compute(other, digits, out)
    other.load_state_dict(model.state_dict())
    assert compute(other, digits, out)[1].kept == COUNT  # the same weights are the same model
    assert {file: file.read_bytes() for file in out.glob("[!.]*")} == before


def test_a_source_that_has_changed(model, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "in")
    compute(model, tmp_path / "in", tmp_path / "out")
    next((tmp_path / "in" / "zero").iterdir()).rename(tmp_path / "in" / "zero" / "other.png")
    with pytest.raises(ArgumentError, match="source listing was "):
        compute(model, tmp_path / "in", tmp_path / "out")


def test_a_damaged_file(model, digits, tmp_path):
    compute(model, digits, tmp_path / "out")
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cannot read .*part-00000.parquet'.* Delete it to write it"):
        compute(model, digits, tmp_path / "out")


PROGRAM = """
import sys, convmixer
model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
convmixer.predict_dataset(model, sys.argv[1], sys.argv[2], rows_per_file=5, batch_size=1, backend="eager", workers=2)
"""


@pytest.mark.slow
def test_killed(digits, tmp_path):
    """By kill -9 in the middle: a half-written file does not count, and the next run has every image once."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", PROGRAM, digits, out]
    with started(command) as process:
        while not (out / "part-00000.parquet").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = len(list(out.glob("part*")))
    assert 1 <= kept < 18
    result = finish(command)
    assert result.returncode == 0, result.stderr
    assert f"{kept} of 18 files exist already, with {5 * kept} rows, and are kept" in result.stdout
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    whole, _ = compute(model, digits, tmp_path / "whole", rows_per_file=5, batch_size=1, topk=5)
    assert rows(out) == whole
    assert len({row["image"] for row in whole}) == COUNT


def test_two_runs_at_once(model, digits, tmp_path):
    def start_another(*_):
        with pytest.raises(ArgumentError, match=r"another run is writing into .*out'"):
            compute(model, digits, tmp_path / "out")

    compute(model, digits, tmp_path / "out", progress=start_another)


def test_a_worker_that_dies(model, digits, tmp_path):
    """An error between two batches, never within a step or while a file is written."""
    steps = []

    def advance(done: int, _total: int) -> None:
        if done == 60:
            (worker,) = multiprocessing.active_children()
            kill(worker.pid)
        steps.append(done)

    options = {"rows_per_file": 10, "batch_size": 10, "workers": 1, "progress": advance}
    with pytest.raises(DataError, match=r"a process that reads '.*train' ended: .*(Killed|exited .*)\. Give fewer"):
        compute(model, digits, tmp_path / "out", **options)
    assert 60 in steps
    assert len(list((tmp_path / "out").glob("part*"))) >= 4
    assert not list((tmp_path / "out").glob(".part*"))
    assert compute(model, digits, tmp_path / "out", rows_per_file=10)[1].images == COUNT


def test_an_error_of_the_caller_ends_the_workers(model, digits, tmp_path):
    """Though the error that is kept holds all frames, as a notebook keeps the last one."""

    def fail(done: int, _total: int) -> None:
        if done:
            raise ZeroDivisionError

    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError) as caught:
        compute(model, digits, tmp_path / "out", batch_size=10, workers=2, progress=fail)
    assert caught.tb
    assert set(multiprocessing.active_children()) == before


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"topk": 0}, ArgumentError, "topk=0: give a whole number of at least 1"),
        ({"workers": -1}, ArgumentError, "workers=-1: give a whole number of at least 0"),
        ({"rows_per_file": 2.5}, ArgumentError, "rows_per_file=2.5"),
        ({"actors": 2}, ArgumentError, "actors=2 is for Ray: add ray=True, or an address"),
        ({"backend": "egaer"}, ArgumentError, "unknown backend 'egaer'; valid: auto, eager"),
        ({"dtype": "int8"}, ArgumentError, "dtype=int8 needs images for calibration"),
        ({"dtype": "flaot"}, ArgumentError, "flaot"),
        ({"split": "train", "data": "torch/nothing"}, DataError, "cannot open 'torch/nothing'"),
        ({"data": "torch/cifar10"}, DataError, "has the splits train and test: say which one is meant"),
        ({"data": "phtoos"}, DataError, "no data at 'phtoos'"),
        ({"data": "none.parquet"}, DataError, "no table at 'none.parquet'"),
        ({"data": "wds/none/x-{0..1}.tar"}, DataError, "none/x-0.tar'"),
        ({"image_column": "image"}, DataError, "image_column and key_column are for Parquet files"),
    ],
)
def test_senseless_arguments(model, digits, tmp_path, monkeypatch, options, error, text):
    monkeypatch.chdir(tmp_path)
    data = options.pop("data", digits)
    with pytest.raises(error) as caught:
        compute(model, data, "out", **options)
    assert text in str(caught.value)
    assert not list(tmp_path.glob("out/part*"))


def test_parquet_files_of_one_name(model, files, tmp_path):
    """As the Hub converts data sets: a folder for each split, with a 0000.parquet each."""
    for split in ("test", "train"):
        (tmp_path / "in" / split).mkdir(parents=True)
        table = pa.table({"image": [files[0].read_bytes()] * 2})
        pq.write_table(table, tmp_path / "in" / split / "0000.parquet")
    found, _ = compute(model, tmp_path / "in", tmp_path / "out")
    assert [row["image"] for row in found] == [
        f"{split}/0000.parquet:{i}" for split in ("test", "train") for i in (0, 1)
    ]


def test_which_parquet_files_are_read(model, files, tmp_path):
    """In folders of all depths, whatever the case of the suffix. An image among them leaves open what is meant."""
    content = files[0].read_bytes()
    for count, name in enumerate(("a.parquet", "x/b.PARQUET", "x/y/c.parquet"), start=1):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [content] * count}), tmp_path / "in" / name)
    (tmp_path / "in" / "d.parquet").mkdir()
    assert len(compute(model, tmp_path / "in", tmp_path / "out")[0]) == 6
    pattern = str(tmp_path / "in" / "**" / "*.parquet")
    assert len(compute(model, pattern, tmp_path / "out2")[0]) == 4
    shutil.copy(files[0], tmp_path / "in" / "x" / "preview.png")
    with pytest.raises(
        DataError, match=r"in' holds images, and Parquet files that may hold some, .*a\.parquet.*: give"
    ):
        compute(model, tmp_path / "in", tmp_path / "out3")
    assert len(compute(model, tmp_path / "in", tmp_path / "out3", image_column="image")[0]) == 6
    for file in (tmp_path / "in").rglob("*.[pP][aA]*"):
        if file.is_file():
            pq.write_table(pa.table({"file_name": ["x/preview.png"], "width": [8]}), file)  # what describes images
    assert len(compute(model, tmp_path / "in", tmp_path / "out4")[0]) == 1


def test_dictionaries_of_parquet(model, files, tmp_path):
    """As pandas writes categories, and DuckDB what repeats."""
    content = pa.array([files[0].read_bytes()] * 2).dictionary_encode()
    pq.write_table(
        pa.table({"image": content, "key": pa.array(["a", "b"]).dictionary_encode()}), tmp_path / "in.parquet"
    )
    assert [row["image"] for row in compute(model, tmp_path / "in.parquet", tmp_path / "out")[0]] == ["a", "b"]


def test_output_among_parquet_files(model, files, tmp_path):
    """It would be read by the next call."""
    write_parquet(tmp_path / "in" / "a.parquet", files[:2])
    with pytest.raises(ArgumentError, match=r"in/out' would be read as a part of .*in': give a folder beside the data"):
        compute(model, tmp_path / "in", tmp_path / "in" / "out")
    assert not (tmp_path / "in" / "out").exists()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for source, output in (("in/**/*.parquet", "in/out"), ("in", "link/out")):
        with pytest.raises(ArgumentError, match="would be read as a part of"):
            compute(model, tmp_path / source, tmp_path / output)
    for _ in range(2):  # neither is read by the second call
        compute(model, tmp_path / "in" / "*.parquet", tmp_path / "in" / "out")
        compute(model, tmp_path / "in" / "a.parquet", tmp_path / "in" / "out2")


def test_parquet_files_of_different_types(model, files, tmp_path):
    """A column of text in a later file names no image: it would be read as the path of one."""
    (tmp_path / "in").mkdir()
    for name, column in (("a", [files[0].read_bytes()]), ("b", [str(files[1])])):
        pq.write_table(pa.table({"image": column}), tmp_path / "in" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"'image' has the bytes of images in .*a.parquet', and string in .*b.parquet'"):
        compute(model, tmp_path / "in", tmp_path / "out")


def test_ambiguous_parquet(model, files, tmp_path):
    content = [file.read_bytes() for file in files[:2]]
    pq.write_table(pa.table({"left": content, "right": content, "n": [1, 2]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"several columns of .* could hold images, left, right: say image_column="):
        compute(model, tmp_path / "in.parquet", tmp_path / "out")
    with pytest.raises(
        DataError, match=r"no column 'rihgt' with the bytes of images in .*columns of bytes are left, right"
    ):
        compute(model, tmp_path / "in.parquet", tmp_path / "out", image_column="rihgt")
    with pytest.raises(DataError, match=r"no column 'k' in .*, which has left, right, n"):
        compute(model, tmp_path / "in.parquet", tmp_path / "out", image_column="left", key_column="k")
    with pytest.raises(DataError, match=r"Parquet files have no splits: give the files of 'test'"):
        compute(model, tmp_path / "in.parquet", tmp_path / "out", image_column="left", split="test")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"cannot read '.*bad.parquet'"):
        compute(model, tmp_path / "bad.parquet", tmp_path / "out")


def test_an_output_that_cannot_be_used(model, digits, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArgumentError, match=r"cannot make the folder .*; give another output"):
            compute(model, digits, path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("text")
    with pytest.raises(
        ArgumentError, match=r"is not empty and has no _manifest.json: it holds thesis.txt\. Give a new"
    ):
        compute(model, digits, tmp_path / "full")
    assert sorted(file.name for file in (tmp_path / "full").glob("[!.]*")) == ["thesis.txt"]


def test_a_full_disk(model, digits, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(WriteError, match=r"cannot write .*part-00000.parquet'.*No space left on device"):
        compute(model, digits, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*part*"))


def test_models_without_answers(digits, tmp_path):
    headless = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=0)
    with pytest.raises(ArgumentError, match="this model has no classes"):
        compute(headless, digits, tmp_path / "out")
    assert len(compute(headless, digits, tmp_path / "embedded", embed=True)[0][0]["embedding"]) == 256
    with pytest.raises(ArgumentError, match="returns feature maps: build it without features_only"):
        compute(convmixer.create_model("convmixer_256_8", device="cpu", features_only=True), digits, tmp_path / "out")
    maps = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=0, global_pool="")
    with pytest.raises(ArgumentError, match="has no pooling"):
        compute(maps, digits, tmp_path / "out", embed=True)
    assert not (tmp_path / "out").exists()


def test_parts_are_the_same_in_any_order(files, tmp_path):
    write_parquet(tmp_path / "in.parquet", files)
    parts = open_parts(tmp_path / "in.parquet", rows=13)
    backwards = {part: [name for name, _ in parts.read(part)] for part in reversed(range(len(parts)))}
    names = [name for part in sorted(backwards) for name in backwards[part]]
    assert names == [f"{file.parent.name}/{file.name}" for file in files]
    assert [parts.size(part) for part in range(len(parts))] == [13] * 6 + [12]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command(digits, tmp_path):
    options = ("--data", digits, "--output", tmp_path / "out", "--device", "cpu", "--workers", 0, "--topk", 2)
    shown = run("predict", *options, "--rows-per-file", 50)
    assert f"90 images, in 2 files of {tmp_path / 'out'}" in shown.stdout
    assert "images/s; " in shown.stdout
    assert shown.stderr.startswith("90 images from train")
    assert {len(row["labels"]) for row in rows(tmp_path / "out")} == {2}
    record = records("predict", *options, "--rows-per-file", 50, "--json")
    assert (record["images"], record["kept"], record["files"]) == (90, 90, 2)
    run("predict", *options[:2], "--output", tmp_path / "embedded", "--embed", "--workers", 0, "--device", "cpu")
    assert len(rows(tmp_path / "embedded")[0]["embedding"]) == 256


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--data", "x"), "--data needs --output FOLDER"),
        (("cat.png", "--data", "x", "--output", "y"), "give --data or images, not both: 'cat.png'"),
        (("cat.png", "--embed"), "--embed is for data sets: add --data SOURCE and --output FOLDER"),
        (("cat.png", "--output", "x"), "--output is for data sets"),
        (("cat.png", "--workers", "0"), "--workers is for data sets"),
        (("--data", "none", "--output", "y"), "no data at 'none'"),
    ],
)
def test_senseless_commands(options, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text in run("predict", *options, status=2).stderr
    assert not list(tmp_path.iterdir())


def test_extra_that_is_missing(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = RUNNER.invoke(main, ["predict", "--data", str(digits), "--output", str(tmp_path / "out")])
    assert "predict_dataset needs pyarrow, which is missing: pip install 'convmixer[batch]'" in result.stderr
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    result = RUNNER.invoke(main, ["predict", "--data", str(digits), "--output", str(tmp_path / "out"), "--ray"])
    assert "needs ray, which is missing: pip install 'convmixer[ray]'" in result.stderr
    assert not (tmp_path / "out").exists()
