"""Where labelled images lie, and how they are decoded one by one: timm's readers, and WebDataset shards."""

from __future__ import annotations

import abc
import contextlib
import io
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import create_reader
from torch import Tensor

from convmixer.errors import ConvMixerError, DataError, optional

READERS = ("torch/", "hfds/")
SHARDS = "wds/"
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")  # endings of the images of shards
SHUFFLE = 1000  # samples of shards from which the next one is drawn

Prepare = Callable[[Image.Image], Tensor]
Sample = tuple[Tensor, int] | DataError

SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}


def _find_split(source: Path, split: str) -> Path:
    """The folder or tar of a split inside `source`; `source` itself if it is a tar or holds classes, not splits."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r} of {str(source)!r}; valid: {', '.join(SPLITS)}")
    if source.is_file() and source.suffix == ".tar":
        return source
    if not source.is_dir():
        raise DataError(
            f"no data at {str(source)!r}: give a folder, a .tar of class folders, or a name that starts with "
            f"{' or '.join(READERS)} such as torch/cifar10 with --download"
        )
    places = {name: [source / f"{name}.tar", source / name] for names in SPLITS.values() for name in names}
    found = [place for name in SPLITS[split] for place in places[name] if place.exists()]
    if found:
        return found[0]
    other = [place.name for candidates in places.values() for place in candidates if place.exists()]
    if other or not any(child.is_dir() for child in source.iterdir()):
        looked_for = ", ".join(f"{name}.tar, {name}/" for name in SPLITS[split])
        raise DataError(f"no {split} split in {str(source)!r}: looked for {looked_for} or folders of classes")
    return source


def has_split(source: str | Path, split: str) -> bool:
    """Whether a source has its own training or test split; a named data set is taken to have both."""
    name = os.path.expanduser(str(source))
    if name.startswith(READERS):
        return True
    try:
        if name.startswith(SHARDS):  # those of a pattern are one split alone
            return ".tar" not in name and bool(_open_shards(name, split))
        return split == "train" or _find_split(Path(name), split) != Path(name)
    except DataError:
        return False


@dataclass(frozen=True)
class _Labelled(abc.ABC):
    """An open split of a data set, whose images are decoded one at a time; class names by label."""

    name: str
    classes: tuple[str, ...]

    @abc.abstractmethod
    def each(self, prepare: Prepare) -> Iterator[Sample]:
        """Every image, prepared, and its label; in the place of an unreadable one the error that names it."""

    def in_order(self, prepare: Prepare) -> Iterator[tuple[Tensor, int]]:
        """Every image, prepared, and its label. A DataError if an image cannot be read."""
        for sample in self.each(prepare):
            if isinstance(sample, DataError):
                raise sample
            yield sample

    def labels_in(self, classes: Sequence[str]) -> Tensor:
        """For each label of the split the label of the same name in `classes`; a DataError if one is not there."""
        foreign = [label for label in self.classes if label not in classes]
        if foreign:
            raise DataError(f"{self.name!r} has the classes {', '.join(foreign)}; the model knows {', '.join(classes)}")
        return torch.tensor([classes.index(label) for label in self.classes])


@dataclass(frozen=True)
class Split(_Labelled):
    """A split that timm's readers or torchvision open, any image of which can be read at any time."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int, prepare: Prepare) -> tuple[Tensor, int]:
        """What `prepare` makes of an image, and its label. A DataError if the image cannot be read."""
        reader = getattr(self.dataset, "reader", None)
        try:
            if reader is None:  # torchvision
                image, label = self.dataset[index]
                return prepare(image), label
            # Not through timm's data set, which puts the next image in the place of one that it cannot read.
            file, label = reader[index][:2]
            with file, Image.open(file) as image:
                return prepare(image), label
        except Exception as error:
            named = f" ({reader.filename(index)})" if reader is not None and "hfds/" not in self.name else ""
            raise DataError(f"cannot read image {index} of {self.name!r}{named}: {error}") from error

    def each(self, prepare: Prepare) -> Iterator[Sample]:
        for index in range(len(self)):
            try:
                yield self.read(index, prepare)
            except DataError as error:
                yield error

    def close(self) -> None:
        """Close a tar, which timm keeps open for the next image."""
        archive = getattr(getattr(self.dataset, "reader", None), "tar_state", None)
        if archive is not None and archive.tf is not None:
            archive.tf.close()
            for state in (archive, *archive.children.values()):
                state.reset()


@dataclass(frozen=True)
class ShardSplit(_Labelled):
    """A split in WebDataset tars, which are read from their start to their end.

    Attributes:
        urls: The tars: paths, or whatever webdataset opens.
        count: Number of samples in all of them.
    """

    urls: tuple[str, ...]
    count: int

    def __len__(self) -> int:
        return self.count

    def samples(self, urls: Iterable[str], rng: random.Random | None = None) -> Iterator[dict[str, Any]]:
        """What tars hold, as bytes by ending; with a generator of random numbers shuffled."""
        import webdataset
        from webdataset.tariterators import group_by_keys, tar_file_iterator

        def read() -> Iterator[dict[str, Any]]:
            for url in urls:
                with contextlib.closing(webdataset.gopen(url)) as file:
                    yield from group_by_keys({**member, "__url__": url} for member in tar_file_iterator(file))

        yield from webdataset.shuffle(SHUFFLE, initial=SHUFFLE, rng=rng)(read()) if rng else read()

    def decode(self, sample: dict[str, Any], prepare: Prepare) -> tuple[Tensor, int]:
        """What `prepare` makes of a sample's image, and its label. A DataError if it cannot be read."""
        try:
            content = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
            if content is None:
                raise DataError(f"none of its parts ends in {', '.join(IMAGE_KEYS)}")
            label = int(sample["cls"])
            if not 0 <= label < len(self.classes):
                raise DataError(f"class {label}, of {len(self.classes)} in classes.txt")
            with Image.open(io.BytesIO(content)) as image:
                return prepare(image), label
        except Exception as error:
            what = f"{sample.get('__key__')} in {sample.get('__url__')!r}"
            raise DataError(f"cannot read {what}: {type(error).__name__}: {error}") from error

    def each(self, prepare: Prepare) -> Iterator[Sample]:
        """As of any split.

        Raises:
            DataError: A tar that cannot be read, or another number of samples than `count`.
        """
        found = 0
        samples = self.samples(self.urls)
        while True:
            try:
                sample = next(samples, None)
            except Exception as error:  # of the tar, or of the network
                raise DataError(f"cannot read {self.name!r}: {type(error).__name__}: {error}") from error
            found += sample is not None
            if found > self.count or (sample is None and found < self.count):
                other = "more" if sample else str(found)
                raise DataError(f"{self.name!r} should have {self.count} samples and has {other}: correct the number")
            if sample is None:
                return
            try:
                yield self.decode(sample, prepare)
            except DataError as error:
                yield error

    def close(self) -> None:
        """Nothing stays open."""


def open_split(
    source: str | Path, split: str, *, root: str | Path | None = None, download: bool = False
) -> Split | ShardSplit:
    """Open a split through timm's readers, or WebDataset shards; the arguments are those of `load_images`.

    Raises:
        DataError: Nothing there, or no images.
    """
    name, root = os.path.expanduser(str(source)), root and os.path.expanduser(root)
    if name.startswith(SHARDS):
        return _open_shards(name, split)
    try:
        if name.startswith("torch/"):
            dataset = create_dataset(name, root=str(root or "data"), split=split, download=download)
        elif name.startswith("hfds/"):
            dataset = create_dataset(name, root=root and str(root), split=split, **_columns(name, split, root))
        else:
            dataset = create_dataset("", root=str(_find_split(Path(name), split)), search_split=False)
    except ConvMixerError:
        raise
    except Exception as error:  # each reader has its own; the message must name the source
        missing = isinstance(error, RuntimeError) and name.startswith("torch/") and not download
        hint = ". Add --download to fetch it" if missing else ""
        raise DataError(f"cannot open {name!r}: {type(error).__name__}: {error}{hint}") from error
    if not len(dataset):
        raise DataError(f"no images in the {split} split of {name!r}")
    return Split(name, _class_names(dataset), dataset)


def _columns(name: str, split: str, root: str | Path | None) -> dict[str, str]:
    """Which columns of a Hugging Face data set hold images and labels: timm expects "image" and "label"."""
    datasets = optional("datasets", repr(name), "train")
    loaded = datasets.load_dataset(name.removeprefix("hfds/"), split=split, cache_dir=root and str(root))
    kinds = {"input_key": datasets.Image, "target_key": datasets.ClassLabel}
    found = {key: [c for c, f in loaded.features.items() if isinstance(f, kind)] for key, kind in kinds.items()}
    if not all(found.values()):
        raise DataError(f"{name!r} has no column of images or none of class labels: {loaded.features}")
    return {key: columns[0] for key, columns in found.items()}


def _class_names(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)  # torchvision
    if names is None:
        reader = dataset.reader
        table = reader.class_name_to_idx if hasattr(reader, "class_name_to_idx") else reader.class_to_idx
        names = sorted(table, key=table.__getitem__)
    return tuple(str(name) for name in names)


# ---- WebDataset -----------------------------------------------------------------------------------------------------


def _open_shards(name: str, split: str) -> ShardSplit:
    webdataset = optional("webdataset", repr(name), "train")
    folder, _, pattern = name.removeprefix(SHARDS).rpartition("/") if ".tar" in name else (name[len(SHARDS) :], "", "")
    folder, problems = os.path.expanduser(folder), []
    for candidate in [pattern] if pattern else SPLITS[split]:
        try:
            reader = create_reader(SHARDS, root=folder, split=candidate)
            break
        except Exception as error:  # timm's and webdataset's
            problems.append(str(error))
    else:
        raise DataError(
            f"cannot open the {split} split of {name!r}: {'; '.join(problems)}. Give a folder with an _info.json, or a "
            "pattern with its number of samples such as wds/FOLDER/train-{0000..0012}.tar|12345"
        )
    if not reader.num_samples:
        raise DataError(f"{name!r} does not say how many samples it has: add |NUMBER to it")
    names = os.path.join(folder, "classes.txt")
    try:
        with webdataset.gopen(names) as file:
            classes = tuple(line.strip() for line in file.read().decode().splitlines() if line.strip())
    except Exception as error:
        raise DataError(
            f"cannot read {names!r}: {error}. It names the classes, one per line, in the order of the samples' .cls"
        ) from error
    urls = tuple(os.path.join(folder, file) for file in reader.split_info.filenames)
    return ShardSplit(name, classes, urls, reader.num_samples)
