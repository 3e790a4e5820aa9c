"""Where labelled images lie, and how they are decoded one by one: folders, tars, tables, timm's readers, shards."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import random
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset
from timm.data.readers import create_reader
from torch import Tensor

from convmixer.data.images import SUFFIXES, image_suffixes
from convmixer.data.layout import (
    LAYOUTS,
    ROLES,
    File,
    Layout,
    Listing,
    StrictTarInfo,
    count_images,
    describe_left_out,
    find_layout,
    list_classes,
    list_images,
    members,
    role,
)
from convmixer.data.tables import has_rows, is_table, list_rows, read_table
from convmixer.errors import DataError, list_first, optional

READERS = ("torch/", "hfds/")
SHARDS = "wds/"
_SHARDS_WANTED = (
    "Give a folder with an _info.json, or a pattern with its number of samples such as "
    "wds/FOLDER/train-{0000..0012}.tar|12345"
)
SHUFFLE = 1000  # samples of shards from which the next one is drawn

Prepare = Callable[[Any], Tensor]  # of whatever `read_image` takes
Sample = tuple[Tensor, int] | DataError


@dataclass(frozen=True)
class _Labelled(abc.ABC):
    """An open split of a data set, whose images are decoded one at a time.

    Attributes:
        name: Of the data set.
        classes: Class names by label; none where labels were not asked for.
        taken: A line that says what was taken for the split, with counts, and what was left out.
    """

    name: str
    classes: tuple[str, ...]
    taken: str

    @abc.abstractmethod
    def each(self, prepare: Prepare) -> Iterator[Sample]:
        """Yield every image, prepared, and its label; instead of an unreadable one the error that names it."""

    def in_order(self, prepare: Prepare) -> Iterator[tuple[Tensor, int]]:
        """Yield every image, prepared, and its label; raise a DataError if an image cannot be read."""
        for sample in self.each(prepare):
            if isinstance(sample, DataError):
                raise sample
            yield sample

    def labels_in(self, classes: Sequence[str]) -> Tensor:
        """Return for each label of the split the label of the same name in `classes`.

        Raises:
            DataError: One is not there, or is there twice.
        """
        if tuple(classes) == self.classes:
            return torch.arange(len(classes))  # by position: ImageNet has two classes that are called crane
        foreign = [label for label in self.classes if label not in classes]
        if foreign:
            hint = ""
            if _normalized(foreign) <= _normalized(classes):
                hint = ". Some differ only in how Unicode writes an accent, in one character or two: rename them"
            elif len(self.classes) == 1:
                hint = ". A folder of images that nobody has labelled is not a class: give a table of labels"
            raise DataError(
                f"{self.name!r} has the classes {', '.join(foreign)}; the model knows {', '.join(classes)}{hint}"
            )
        if twice := [label for label in self.classes if classes.count(label) > 1]:
            raise DataError(
                f"several classes of the model are called {list_first(twice)}, as one of {self.name!r} is: nothing "
                "says which is meant. Give the model different names (label_names, classes=), or for ImageNet folders "
                "named by WordNet numbers"
            )
        return torch.tensor([classes.index(label) for label in self.classes])

    def check_classes(self) -> None:
        """Raise DataError if these are too few classes to train on."""
        if len(self.classes) < 2:
            raise DataError(
                f"{self.name!r} has {len(self.classes)} class, {', '.join(self.classes)}, and training needs at least "
                f"two ({self.taken}). {LAYOUTS}"
            )


def _normalized(names: Iterable[str]) -> set[str]:
    return {unicodedata.normalize("NFC", name) for name in names}


@dataclass(frozen=True)
class Split(_Labelled):
    """A split whose images can be read in any order."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int, prepare: Prepare) -> tuple[Tensor, int]:
        """Return what `prepare` makes of an image, and its label; raise DataError if the image cannot be read."""

    @abc.abstractmethod
    def targets(self) -> Tensor:
        """Return the label of each image (N,)."""

    def image_name(self, index: int) -> str:
        """Return what an image is called, which no other image of the split is: by default its number."""
        return str(index)

    def each(self, prepare: Prepare) -> Iterator[Sample]:
        for index in range(len(self)):
            try:
                yield self.read(index, prepare)
            except DataError as error:
                yield error


@dataclass(frozen=True)
class FileSplit(Split):
    """A split in a folder or a tar.

    Attributes:
        images: Its files.
        labels: The label of each.
    """

    images: list[File]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.images)

    def targets(self) -> Tensor:
        return torch.tensor(self.labels)

    def image_name(self, index: int) -> str:
        return self.images[index].name

    def read(self, index: int, prepare: Prepare) -> tuple[Tensor, int]:
        file = self.images[index]
        try:
            if file.size is None:
                return prepare(Path(file.path)), self.labels[index]
            with open(file.path, "rb") as archive:
                archive.seek(file.start)
                return prepare(archive.read(file.size)), self.labels[index]
        except Exception as error:  # of the image, or of the disk
            raise DataError(f"cannot read image {index} of {self.name!r} ({file.name}): {error}") from error


@dataclass(frozen=True)
class NamedSplit(Split):
    """A split of a data set of torchvision or of the Hub, which timm opens."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def _check(self, label: Any) -> int:
        """Return the label, 0 if none is needed; raise a DataError if there is none: data sets of the Hub write -1."""
        if not self.classes:
            return 0
        if label is None or not 0 <= label < len(self.classes):
            raise DataError(f"its label is {label}, so it shows none of the {len(self.classes)} classes: not labelled")
        return int(label)

    def targets(self) -> Tensor:
        if hasattr(self.dataset, "reader"):
            return torch.tensor(list(self.dataset.reader.iter_targets()))
        for name in ("targets", "labels"):
            if hasattr(self.dataset, name):
                return torch.as_tensor(getattr(self.dataset, name))
        return torch.tensor([self.dataset[index][1] for index in range(len(self))])

    def read(self, index: int, prepare: Prepare) -> tuple[Tensor, int]:
        try:
            if not hasattr(self.dataset, "reader"):  # torchvision
                image, label = self.dataset[index]
                return prepare(image), self._check(label)
            # Not through timm's data set, which replaces an image that it cannot read by the next one.
            file, label = self.dataset.reader[index][:2]
            with file:
                return prepare(file), self._check(label)
        except Exception as error:
            raise DataError(f"cannot read image {index} of {self.name!r}: {error}") from error


@dataclass(frozen=True)
class HubImages(Split):
    """The images of a data set of the Hub, without labels.

    Attributes:
        rows: Its rows, whose images are not decoded.
        column: The column of images.
    """

    rows: Any
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self) -> Tensor:
        return torch.zeros(len(self), dtype=torch.int64)

    def read(self, index: int, prepare: Prepare) -> tuple[Tensor, int]:
        try:
            image = self.rows[index][self.column]
            if image is None:
                raise DataError(f"its {self.column} is empty")
            return prepare(image["bytes"] or image["path"]), 0
        except Exception as error:
            raise DataError(f"cannot read image {index} of {self.name!r}: {error}") from error


def _read_files(file: Any) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar as webdataset's iterator does, which takes a damaged header for the end of the tar."""
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as archive:
        for member in members(archive):
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None and not re.match(r"__[^/]*__($|/)", member.name):
                yield {"fname": member.name, "data": content.read()}


@dataclass(frozen=True)
class ShardSplit(_Labelled):
    """A split in WebDataset tars, which are read from their start to their end.

    Attributes:
        urls: The tars: paths, or whatever webdataset opens.
        count: Number of samples in all of them; 0 where labels were not asked for and nothing says it.
    """

    urls: tuple[str, ...]
    count: int

    def __len__(self) -> int:
        return self.count

    def samples(self, urls: Iterable[str], rng: random.Random | None = None) -> Iterator[dict[str, Any]]:
        """Yield what tars hold, as bytes by ending; shuffled if a generator of random numbers is given."""
        import webdataset
        from webdataset.tariterators import group_by_keys

        def read() -> Iterator[dict[str, Any]]:
            for url in urls:
                with contextlib.closing(webdataset.gopen(url)) as file:
                    yield from group_by_keys({**member, "__url__": url} for member in _read_files(file))

        yield from webdataset.shuffle(SHUFFLE, initial=SHUFFLE, rng=rng)(read()) if rng else read()

    def decode(self, sample: dict[str, Any], prepare: Prepare) -> tuple[Tensor, int]:
        """Return what `prepare` makes of a sample's image, and its label; raise DataError if it cannot be read."""
        try:
            keys = [suffix[1:] for suffix in SUFFIXES if suffix in image_suffixes()]
            images = [key for key in keys if key in sample]
            if not images:
                parts = sample.get("__parts__") or [key for key in sample if not key.startswith("__")]
                raise DataError(
                    f"none of its parts, {list_first(parts)}, ends in {', '.join(keys)}. The name of a sample ends at "
                    "its first dot"
                )
            if len(images) > 1:
                raise DataError(
                    f"its parts {' and '.join(images)} are images, and nothing says which is meant: give the other "
                    f"an ending such as mask.{images[1]}"
                )
            return prepare(sample[images[0]]), self._label(sample)
        except Exception as error:
            what = f"{sample.get('__key__')} in {sample.get('__url__')!r}"
            raise DataError(f"cannot read {what}: {type(error).__name__}: {error}") from error

    def _label(self, sample: dict[str, Any]) -> int:
        if not self.classes:
            return 0
        if "cls" not in sample:
            raise DataError("it has no .cls, the number of its class")
        label = int(sample["cls"])
        if not 0 <= label < len(self.classes):
            raise DataError(f"class {label}, of {len(self.classes)} in classes.txt")
        return label

    def each(self, prepare: Prepare) -> Iterator[Sample]:
        """Yield every sample, prepared, and its label; instead of an unreadable one the error that names it.

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
            if self.count and (found > self.count or (sample is None and found < self.count)):
                other = "more" if sample else str(found)
                raise DataError(f"{self.name!r} should have {self.count} samples and has {other}: correct the number")
            if sample is None:
                return
            try:
                yield self.decode(sample, prepare)
            except DataError as error:
                yield error


# ---- which split ----------------------------------------------------------------------------------------------------


def open_split(
    source: str | Path,
    split: str | None,
    *,
    labels: str | Path | None = None,
    labelled: bool = True,
    root: str | Path | None = None,
    download: bool = False,
) -> Split | ShardSplit:
    """Open a split of folders, tars, tables, data sets that timm opens by name, or WebDataset shards.

    Args:
        source: As for `load_images`.
        split: "train", "validation" or "test"; of an `hfds/` data set any split that it has. None, where labels are
            not needed: all images of a folder, tar or table; the only split of another data set.
        labels: A table of labels.
        labelled: Whether labels are needed; without them, all images of a folder or tar are taken, shards need no
            classes.txt, and data sets of the Hub no column of labels.
        root: Where downloaded data sets lie.
        download: Let `torch/` data sets download what is missing.

    Raises:
        DataError: Nothing there, no images, nothing that says what they show, or splits that cannot be told apart.
    """
    name, root = os.path.expanduser(str(source)), root and os.path.expanduser(root)
    if labels is not None and name.startswith((*READERS, SHARDS)):
        raise DataError(f"labels={str(labels)!r} is for images in folders and tars: {name!r} has labels of its own")
    if name.startswith("hfds/"):
        return _open_hub(name, split, root, labelled)
    wanted = split and role(split)
    if wanted is None and split is not None:
        raise DataError(f"unknown split {split!r} of {name!r}; valid: {', '.join(ROLES)}")
    if name.startswith(SHARDS):
        return _open_shards(name, wanted, labelled)
    if name.startswith("torch/"):
        if wanted is None:
            raise DataError(f"{name!r} has the splits train and test: say which one is meant")
        found = _open_torchvision(name, wanted, root, download)
        return found if labelled else replace(found, classes=())
    return _open_files(source, wanted, labels, labelled)


def has_split(
    source: str | Path,
    split: str,
    *,
    labels: str | Path | None = None,
    root: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> bool:
    """Return whether a source has a split of its own, besides the training images.

    Of a data set of the Hub it must have labels: those of tests are often kept secret, which a line to `report` says.
    """
    name, root = str(source), root and os.path.expanduser(root)
    if name.startswith("torch/"):
        return split != "validation"
    if name.startswith("hfds/"):
        found = {own: rows for own, rows in _load_hub(name, root).items() if role(own) == split}
        secret = [own for own, rows in found.items() if not _is_labelled(rows)]
        for own in secret:
            report(f"{split}: no image in the split {own} of {name} has a label, so it is left out")
        return len(found) > len(secret)
    if name.startswith(SHARDS):
        return ".tar" not in name and _find_shards(name, split) is not None  # those of a pattern are only one split
    layout, labels = _lay_out(source, labels)
    if labels is None:
        return split in layout.splits
    return has_rows(layout, read_table(labels), split, str(labels))


def _describe(split: str | None, count: int, classes: Sequence[str], origin: str) -> str:
    """Return "test: 372 images in 10 classes from clothing/test.tar"."""
    kinds = f" in {len(classes)} class{'' if len(classes) == 1 else 'es'}" if classes else ""
    return f"{f'{split}: ' if split else ''}{count_images(count) if count else 'images'}{kinds} from {origin}"


def _lay_out(source: str | Path, labels: str | Path | None) -> tuple[Layout, str | Path | None]:
    """Return what a source holds, and its table of labels. The source may be the table, next to its images."""
    if labels is None and is_table(source):
        source, labels = Path(source).parent, source
    return find_layout(source), labels


def _open_files(source: str | Path, split: str | None, labels: str | Path | None, labelled: bool) -> Split:
    layout, table = _lay_out(source, labels)
    rows = read_table(table) if table is not None else []
    splits = {row.split for row in rows if row.split} or set(layout.splits)
    replaced = split == "test" and "test" not in splits and "validation" in splits
    meant = "validation" if replaced else split
    if table is not None:
        folder, listing = list_rows(layout, rows, meant, str(table), by_path=labelled)
    else:
        folder = layout.top if meant is None else layout.folder_of(meant)
        if labelled:
            layout.check_classes()
        listing = list_classes(folder) if labelled else list_images(folder)
    shown = str(folder)
    if not listing.images:
        raise DataError(_why_empty(str(source), split, shown, listing, table))
    taken = _describe(split, len(listing.images), listing.classes, shown)
    if table is not None:
        taken += f" by {Path(table).name}"
    if replaced:
        taken += ", as there is no test split"
    if listing.left_out:
        taken += f"; left out: {describe_left_out(listing.left_out)}"
    if layout.other and split is not None:
        taken += f"; no split: {list_first(layout.other)}"
    return FileSplit(str(source), listing.classes, taken, listing.images, listing.labels)


def _why_empty(source: str, split: str | None, folder: str, listing: Listing, table: str | Path | None) -> str:
    """Say why no image with a label was found."""
    loose = listing.left_out["image beside the class folders"]
    if loose:
        without = "" if split == "train" else ". To train without them, give the folder of the training images as data"
        return (
            f"the {split} images of {source!r}, {loose:,} in {folder}, lie in no class folders, so nothing says what "
            f"they show{without}. {LAYOUTS}. `convmixer predict` classifies images without labels"
        )
    if table is not None and split is None:
        return f"no row of {str(table)!r} names an image of {source!r}"
    if table is not None:
        return f"no row of {str(table)!r} is of the {split} images of {source!r}, in {folder}"
    left_out = f" It holds {describe_left_out(listing.left_out)}." if listing.left_out else ""
    if split is None:
        return f"no images in {source!r}.{left_out} Files of images are known by their suffixes: .jpg, .png, ..."
    return f"no images in the {split} split of {source!r}, {folder}.{left_out} {LAYOUTS}"


# ---- data sets by name ----------------------------------------------------------------------------------------------


def _open_torchvision(name: str, split: str, root: str | Path | None, download: bool) -> NamedSplit:
    if split == "validation":
        raise DataError(f"no validation split in {name!r}: data sets of torchvision are read as train and test")
    if name.lower() in ("torch/image_folder", "torch/folder"):
        raise DataError(f"{name!r} is not a data set: give the folder itself")
    try:
        dataset = create_dataset(name, root=str(root or "data"), split=split, download=download)
        count, classes = len(dataset), tuple(map(str, dataset.classes))
    except Exception as error:  # each data set has its own; the message must name the source
        hint = ". Add --download to fetch it" if isinstance(error, RuntimeError) and not download else ""
        raise DataError(f"cannot open {name!r}: {type(error).__name__}: {error}{hint}") from error
    return NamedSplit(name, classes, _describe(split, count, classes, name), dataset)


def _load_hub(name: str, root: str | Path | None) -> Any:
    """Load all splits of a Hugging Face data set, by name."""
    datasets = optional("datasets", repr(name), "train")
    try:
        return datasets.load_dataset(name.removeprefix("hfds/"), cache_dir=root and str(root))
    except Exception as error:  # it has many
        raise DataError(f"cannot open {name!r}: {type(error).__name__}: {error}") from error


def _choose_split(name: str, split: str | None, valid: Sequence[str]) -> str:
    """Return the name that a data set of the Hub has for a split."""
    if split is None:
        meant = list(valid)
    elif split in valid:
        meant = [split]
    else:
        meant = [own for own in valid if role(own) and role(own) == role(split)]
        if not meant and role(split) == "test":  # as in a folder
            meant = [own for own in valid if role(own) == "validation"]
    if len(meant) != 1:
        wrong = f"no split {split!r} in {name!r}" if split else f"{name!r} has several splits: say which one is meant"
        raise DataError(f"{wrong}; valid: {', '.join(valid)}")
    return meant[0]


def _open_hub(name: str, split: str | None, root: str | Path | None, labelled: bool) -> Split:
    splits = _load_hub(name, root)
    chosen_split = _choose_split(name, split, list(splits))
    if not labelled:
        return _open_hub_images(name, chosen_split, splits[chosen_split])
    rows = splits[chosen_split]
    columns = {"input_key": _columns(rows, "Image"), "target_key": _columns(rows, "ClassLabel")}
    if not all(columns.values()):
        raise DataError(f"{name!r} has no column of images or none of class labels: {rows.features}")
    if len(rows) and not _is_labelled(rows):
        raise DataError(f"no image in the split {chosen_split} of {name!r} has a label: its labels are all -1 or empty")
    chosen = {key: names[0] for key, names in columns.items()}
    origin = f"{name}, split {chosen_split}" + "".join(_describe_choice(names) for names in columns.values())
    try:
        dataset = create_dataset(name, root=root and str(root), split=chosen_split, **chosen)
    except Exception as error:
        raise DataError(f"cannot open {name!r}: {type(error).__name__}: {error}") from error
    if not len(dataset):
        raise DataError(f"no images in the {chosen_split} split of {name!r}")
    table = dataset.reader.class_to_idx
    classes = tuple(map(str, sorted(table, key=table.__getitem__)))
    taken = _describe(role(chosen_split) or chosen_split, len(dataset), classes, origin)
    return NamedSplit(name, classes, taken, dataset)


def _columns(rows: Any, kind: str) -> list[str]:
    """Return the columns of a data set of the Hub that hold a kind of feature."""
    wanted: Any = getattr(optional("datasets", "a data set of the Hub", "train"), kind)
    return [column for column, feature in rows.features.items() if isinstance(feature, wanted)]


def _is_labelled(rows: Any) -> bool:
    """Return whether any row of a split has a label; where labels are kept secret, all of them are -1 or missing."""
    columns = _columns(rows, "ClassLabel")
    return bool(columns) and not set(rows.unique(columns[0])) <= {-1, None}


def _describe_choice(columns: Sequence[str]) -> str:
    """Return ", column fine_label (not coarse_label)" where the first of several columns was taken."""
    return f", column {columns[0]} (not {', '.join(columns[1:])})" if len(columns) > 1 else ""


def _open_hub_images(name: str, split: str, rows: Any) -> Split:
    """Open a split of a data set of the Hub, of which only the images are read."""
    datasets = optional("datasets", repr(name), "train")
    columns = _columns(rows, "Image")
    if not columns or not len(rows):
        raise DataError(f"{name!r} has no images in its split {split}: {rows.features}")
    column, origin = columns[0], f"{name}, split {split}{_describe_choice(columns)}"
    images = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
    return HubImages(name, (), _describe(None, len(rows), (), origin), images, column)


# ---- WebDataset -----------------------------------------------------------------------------------------------------


def _find_shards(name: str, split: str | None) -> str | None:
    """Return what the `_info.json` of a folder of shards calls a split, None being any; None if it does not have it."""
    webdataset = optional("webdataset", repr(name), "train")
    folder, problems = os.path.expanduser(name[len(SHARDS) :]), []
    for file in ("_info.json", "info.json"):  # as timm looks for them
        try:
            with webdataset.gopen(os.path.join(folder, file)) as stream:
                own = [key for key in json.load(stream)["splits"] if split is None or role(key) == split]
        except Exception as error:  # of webdataset, of the network, of JSON
            problems.append(f"{type(error).__name__}: {error}")
            continue
        if len(own) > 1:
            advice = f"Leave one of them in {file}" if split else "Say which one is meant"
            raise DataError(f"several {f'{split} ' if split else ''}splits in {name!r}: {', '.join(own)}. {advice}")
        return own[0] if own else None
    raise DataError(f"cannot open the {split or 'only'} split of {name!r}: {'; '.join(problems)}. {_SHARDS_WANTED}")


def _open_shards(name: str, split: str | None, labelled: bool) -> ShardSplit:
    optional("webdataset", repr(name), "train")
    folder, _, chosen = name.removeprefix(SHARDS).rpartition("/") if ".tar" in name else (name[len(SHARDS) :], "", "")
    folder, note = os.path.expanduser(folder), ""
    if not chosen:
        chosen = _find_shards(name, split) or ""
        if not chosen and split == "test":  # as in a folder
            chosen, note = _find_shards(name, "validation") or "", ", as there is no test split"
        if not chosen:
            raise DataError(f"no {split or 'single'} split in the _info.json of {name!r}. {_SHARDS_WANTED}")
    try:
        reader = create_reader(SHARDS, root=folder, split=chosen)
    except Exception as error:  # timm's and webdataset's
        raise DataError(f"cannot open the {split or 'only'} split of {name!r}: {error}. {_SHARDS_WANTED}") from error
    if not reader.num_samples and labelled:
        raise DataError(f"{name!r} does not say how many samples it has: add |NUMBER to it")
    classes = _read_classes(os.path.join(folder, "classes.txt")) if labelled else ()
    urls = tuple(os.path.join(folder, file) for file in reader.split_info.filenames)
    shards = f"{len(urls)} shard{'' if len(urls) == 1 else 's'}"
    taken = _describe(split, reader.num_samples, classes, f"{shards} of {name}, {chosen}{note}")
    return ShardSplit(name, classes, taken, urls, reader.num_samples)


def _read_classes(file: str) -> tuple[str, ...]:
    webdataset = optional("webdataset", repr(file), "train")
    try:
        with webdataset.gopen(file) as lines:
            classes = tuple(line.strip() for line in lines.read().decode().splitlines() if line.strip())
        if not classes:
            raise DataError("it is empty")
    except Exception as error:
        raise DataError(
            f"cannot read {file!r}: {error}. It names the classes, one per line, in the order of the samples' .cls"
        ) from error
    return classes
