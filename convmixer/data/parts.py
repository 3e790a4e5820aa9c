"""Images without labels, in numbered parts that any process can read: what inference over a data set takes.

A part is a range of images, or one shard of a WebDataset. Its number says which images it has and in which order, so
parts can be computed in any order, on any machine, and again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convmixer.data.images import SUFFIXES
from convmixer.data.layout import holds_images
from convmixer.data.parquet import ParquetImages, find_parquet, have_images, open_parquet
from convmixer.data.readers import READERS, SHARDS, FileSplit, Prepare, ShardSplit, Split, open_split
from convmixer.errors import DataError, list_first


@dataclass(frozen=True)
class Parts(ABC):
    """A source of images in parts.

    Attributes:
        name: The source; an absolute path if it is in the file system.
        split: The split that was asked for.
        images: The split, the shards or the Parquet files that are cut into parts.
    """

    name: str
    split: str | None
    images: Any

    @property
    def taken(self) -> str:
        """A line that says which images were taken."""
        return str(self.images.taken)

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def count(self) -> int | None:
        """Number of images in all parts; None if nobody knows yet."""

    @abstractmethod
    def size(self, part: int) -> int | None:
        """Return the number of images in a part; None if nobody knows yet."""

    @abstractmethod
    def read(self, part: int) -> Iterator[tuple[str, Any]]:
        """Yield the name of each image of a part, and what `decode` takes.

        Raises:
            DataError: A file of the source that cannot be read.
        """

    @abstractmethod
    def decode(self, item: Any, prepare: Prepare) -> Tensor:
        """Return what `prepare` makes of an image that `read` gave, in any process; raise DataError if it is broken."""

    @abstractmethod
    def listing(self) -> Iterable[object]:
        """Yield what tells this source from another one: names, and sizes where a listing has them, but no pixels."""

    def record(self) -> dict[str, Any]:
        """Return what must be the same when a run is resumed."""
        digest = hashlib.blake2b(digest_size=16)
        for line in self.listing():
            digest.update(repr(line).encode())
        return {"data": self.name, "split": self.split, "parts": len(self), "listing": digest.hexdigest()}


@dataclass(frozen=True)
class _Ranges(Parts):
    """Parts of `rows` images each, but the last.

    Attributes:
        rows: Images of a part.
    """

    rows: int

    @property
    def count(self) -> int:
        return len(self.images)

    def __len__(self) -> int:
        return -(-self.count // self.rows)

    def size(self, part: int) -> int:
        return min(self.rows, self.count - part * self.rows)

    def range(self, part: int) -> range:
        return range(part * self.rows, part * self.rows + self.size(part))


@dataclass(frozen=True)
class _SplitParts(_Ranges):
    """Files, members of tars, and data sets of libraries, which the process that decodes reads."""

    images: Split

    def read(self, part: int) -> Iterator[tuple[str, int]]:
        for index in self.range(part):
            yield self.images.image_name(index), index

    def decode(self, item: int, prepare: Prepare) -> Tensor:
        return self.images.read(item, prepare)[0]

    def listing(self) -> Iterable[object]:
        if isinstance(self.images, FileSplit):
            return ((file.name, file.start, file.size) for file in self.images.images)
        return [(self.images.name, len(self.images))]


@dataclass(frozen=True)
class _ParquetParts(_Ranges):
    """Rows of Parquet files, of which the main process reads the bytes."""

    images: ParquetImages

    def read(self, part: int) -> Iterator[tuple[str, Any]]:
        rows = self.range(part)
        for name, content in self.images.read(rows.start, rows.stop):
            yield name, (name, content)

    def decode(self, item: tuple[str, Any], prepare: Prepare) -> Tensor:
        name, content = item
        try:
            if content is None:
                raise DataError(f"its {self.images.image} has no bytes")
            return prepare(content)
        except Exception as error:
            raise DataError(f"cannot read image {name} of {self.name!r}: {error}") from error

    def listing(self) -> Iterable[object]:
        yield self.images.image, self.images.key
        for file, rows in zip(self.images.files, self.images.rows, strict=True):
            yield file, rows, os.path.getsize(file)


@dataclass(frozen=True)
class _ShardParts(Parts):
    """Shards of a WebDataset, each of which is a part and is read from its start to its end by the main process."""

    images: ShardSplit

    def __len__(self) -> int:
        return len(self.images.urls)

    @property
    def count(self) -> int | None:
        return self.images.count or None

    def size(self, part: int) -> None:
        return None

    def read(self, part: int) -> Iterator[tuple[str, Any]]:
        url, name = self.images.urls[part], self._names[part]
        suffixes = {suffix[1:] for suffix in SUFFIXES}
        try:
            for sample in self.images.samples([url]):
                # What else a sample holds, such as a mask or a text, does not go to the workers.
                image = {key: value for key, value in sample.items() if key in suffixes or key.startswith("__")}
                image.setdefault("__parts__", [key for key in sample if not key.startswith("__")])
                yield f"{name}/{sample['__key__']}", image
        except Exception as error:  # of the tar, or of the network
            raise DataError(f"cannot read the shard {url!r}: {type(error).__name__}: {error}") from error

    def decode(self, item: dict[str, Any], prepare: Prepare) -> Tensor:
        return self.images.decode(item, prepare)[0]

    @functools.cached_property
    def _names(self) -> list[str]:
        """The paths of the shards below the innermost folder that holds all of them, which may be one of a URL."""
        paths = [url.replace(os.sep, "/").split("/") for url in self.images.urls]
        levels = zip(*(path[:-1] for path in paths), strict=False)  # the names at each depth, down to the least deep
        shared = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
        return ["/".join(path[shared:]) for path in paths]

    def listing(self) -> Iterable[object]:
        return ((url, os.path.getsize(url) if os.path.exists(url) else None) for url in self.images.urls)


def open_parts(
    source: str | Path,
    split: str | None = None,
    *,
    rows: int,
    image_column: str | None = None,
    key_column: str | None = None,
    root: str | Path | None = None,
    download: bool = False,
) -> Parts:
    """Open a source of images without labels.

    Args:
        source: A folder or a .tar with images, at any depth; a table with the columns image and label; a .parquet file
            with the bytes of images, a folder or a pattern of such files; `wds/` shards, `hfds/` or `torch/` data sets,
            as in `open_split`.
        split: A split of the source; None takes all images of folders, tars and tables, and the only split of others.
        rows: Images of a part; a shard is a part of its own.
        image_column: The column of a Parquet file with the images. None: the only one with bytes, or one called image.
        key_column: The column that names them. None: one of `convmixer.data.parquet.KEYS`.
        root: Where downloaded data sets lie.
        download: Let `torch/` data sets download what is missing.

    Raises:
        DataError: Nothing there, no images, or several that could be meant.
    """
    path = _absolute(os.path.expanduser(str(source)))
    columns = {"image_column": image_column, "key_column": key_column}
    files = find_parquet(path)
    if files and not any(columns.values()) and os.path.isdir(path) and holds_images(path):
        if have_images(files):
            raise DataError(
                f"{str(source)!r} holds images, and Parquet files that may hold some, {list_first(files)}: give "
                f"{os.path.join(str(source), '**', '*.parquet')!r}, or keep the images in a folder of their own"
            )
        files = []
    if files:
        table = open_parquet(path, files, **columns)
        if table is not None:
            if split is not None:
                raise DataError(f"Parquet files have no splits: give the files of {split!r} in {path!r}")
            return _ParquetParts(path, None, table, rows)
    if image_column or key_column:
        raise DataError(f"image_column and key_column are for Parquet files with images, {str(source)!r} holds none")
    opened = open_split(path, split, labelled=False, root=root, download=download)
    if isinstance(opened, Split):
        return _SplitParts(path, split, opened, rows)
    return _ShardParts(path, split, opened)


def _absolute(source: str) -> str:
    """Return a source as all processes and machines understand it, whatever folder they are in."""
    if source.startswith(SHARDS):
        location = os.path.expanduser(source.removeprefix(SHARDS))
        return source if ":" in location else SHARDS + os.path.abspath(location)
    exists = os.path.exists(source) or find_parquet(source)
    return os.path.abspath(source) if exists and not source.startswith(READERS) else source
