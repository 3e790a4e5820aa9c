"""Images that Parquet files hold as bytes, as data sets of the Hub store them."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from convmixer.data.layout import count_images, natural, walk_folder
from convmixer.errors import DataError, list_first, optional

# Columns that name images, where nobody says which one does.
KEYS = ("key", "__key__", "path", "image_path", "file_name", "filename", "id")
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "bytes", "image_bytes")
_ROWS = 64  # read at a time


@dataclass(frozen=True)
class ParquetImages:
    """Rows of Parquet files, in the order of the files' names.

    Attributes:
        name: Of the source.
        files: The files.
        rows: Number of rows of each.
        image: The column of images: bytes, or a struct with the field bytes.
        key: The column that names images; None where there is none.
    """

    name: str
    files: tuple[str, ...]
    rows: tuple[int, ...]
    image: str
    key: str | None

    def __len__(self) -> int:
        return sum(self.rows)

    @property
    def taken(self) -> str:
        """A line that says what was understood."""
        files = f"{len(self.files)} Parquet file{'' if len(self.files) == 1 else 's'}"
        named = f"named by the column {self.key}" if self.key else "named by file and row"
        return f"{count_images(len(self))} of the column {self.image} of {files}, {named}"

    def read(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        """Yield names and bytes of rows from `start` to `stop`; None for bytes that are missing.

        Raises:
            DataError: A file that cannot be read, or that has changed.
        """
        first = 0
        for file, count in zip(self.files, self.rows, strict=True):
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                yield from self._read_file(file, low, high)
            first += count

    def _read_file(self, file: str, low: int, high: int) -> Iterator[tuple[str, Any]]:
        parquet: Any = optional("pyarrow.parquet", repr(self.name), "batch")
        columns = [self.image, *([self.key] if self.key else [])]
        number = low
        try:
            with parquet.ParquetFile(file, pre_buffer=False) as opened:
                groups, before = _groups(opened.metadata, low, high)
                skipped = low - before
                for batch in opened.iter_batches(_ROWS, row_groups=groups, columns=columns):
                    wanted = batch.slice(min(skipped, len(batch)), max(high - number, 0))
                    skipped -= min(skipped, len(batch))
                    yield from self._named(file, number, wanted)
                    number += len(wanted)
        except Exception as error:  # pyarrow's, and the disk's
            raise DataError(f"cannot read {file!r}: {type(error).__name__}: {error}") from error
        if number < high:
            raise DataError(f"{file!r} had {high} rows or more and now has {number}: leave a source as it is meanwhile")

    def _named(self, file: str, number: int, batch: Any) -> Iterator[tuple[str, Any]]:
        keys = batch.column(self.key).to_pylist() if self.key else [None] * len(batch)
        for i, (key, image) in enumerate(zip(keys, batch.column(self.image), strict=True), start=number):
            content = image.as_py()
            name = f"{self._short(file)}:{i}" if key is None else str(key)
            yield name, content.get("bytes") if isinstance(content, dict) else content

    @functools.cached_property
    def _folder(self) -> str:
        """The innermost folder that holds all files."""
        return os.path.commonpath([os.path.dirname(file) for file in self.files])

    def _short(self, file: str) -> str:
        """Return the path of a file from `_folder` on, which no other file has."""
        return os.path.relpath(file, self._folder).replace(os.sep, "/")


def _groups(metadata: Any, low: int, high: int) -> tuple[list[int], int]:
    """Return the row groups that hold rows from `low` to `high`, and the number of the first row in them."""
    groups: list[int] = []
    before = first = 0
    for i in range(metadata.num_row_groups):
        count = metadata.row_group(i).num_rows
        if first < high and first + count > low:
            before = before if groups else first
            groups.append(i)
        first += count
    return groups, before


def find_parquet(source: str) -> list[str]:
    """Return the Parquet files that a source means: itself, those of a pattern, or those of a folder, at any depth."""
    if os.path.isdir(source):
        found = (file for file in walk_folder(source) if file.name.lower().endswith(".parquet"))
        return [file.path for file in sorted(found, key=lambda file: natural(file.name))]
    if not source.lower().endswith(".parquet"):
        return []
    if os.path.exists(source):
        return [source]
    return sorted(filter(os.path.isfile, glob.glob(source, recursive=True)), key=natural)


def have_images(files: Sequence[str]) -> bool:
    """Return whether any of some Parquet files has a column that could hold images."""
    parquet: Any = optional("pyarrow.parquet", list_first(files), "batch")
    for file in files:
        with contextlib.suppress(Exception):  # one that cannot be read has none
            if any(map(_is_image, parquet.read_schema(file))):
                return True
    return False


def open_parquet(
    source: str, files: Sequence[str], *, image_column: str | None = None, key_column: str | None = None
) -> ParquetImages | None:
    """Open Parquet files with images; return None if no column holds bytes, and none was asked for.

    Raises:
        DataError: A file that cannot be read, columns of that name that are not there, several that could be meant, or
            files with other columns than the first.
        DependencyError: pyarrow is not installed.
    """
    schemas, rows = _read_footers(source, files)
    schema = schemas[0]
    image = _image_column(source, schema, image_column)
    if image is None:
        return None
    for file, other in zip(files, schemas, strict=True):
        if not _is_image(other.field(image)):
            raise DataError(
                f"the column {image!r} has the bytes of images in {files[0]!r}, and {other.field(image).type} in "
                f"{file!r}: give files that belong together"
            )
    key = key_column or next((name for name in KEYS if name in schema.names and _is_key(schema.field(name))), None)
    if key is not None and key not in schema.names:
        raise DataError(f"no column {key!r} in {source!r}, which has {', '.join(schema.names)}")
    if not sum(rows):
        raise DataError(f"no rows in {source!r}")
    return ParquetImages(source, tuple(files), tuple(rows), image, key)


def _read_footers(source: str, files: Sequence[str]) -> tuple[list[Any], list[int]]:
    """Return the schema and the number of rows of each file; raise DataError if one lacks columns of the first."""
    parquet: Any = optional("pyarrow.parquet", repr(source), "batch")
    schemas: list[Any] = []
    rows: list[int] = []
    for file in files:
        try:
            with parquet.ParquetFile(file) as opened:
                schemas.append(opened.schema_arrow)
                rows.append(opened.metadata.num_rows)
        except Exception as error:  # pyarrow's, and the disk's
            raise DataError(f"cannot read {file!r}: {type(error).__name__}: {error}") from error
        if not set(schemas[0].names) <= set(schemas[-1].names):
            raise DataError(
                f"{file!r} has the columns {', '.join(schemas[-1].names)}, and {files[0]!r} "
                f"{', '.join(schemas[0].names)}: give files that belong together"
            )
    return schemas, rows


def _is_key(field: Any) -> bool:
    arrow: Any = optional("pyarrow", field.name, "batch")
    kind = _of_values(arrow, field.type)
    return kind in (arrow.string(), arrow.large_string(), arrow.string_view()) or arrow.types.is_integer(kind)


def _is_image(field: Any) -> bool:
    arrow: Any = optional("pyarrow", field.name, "batch")
    kind = _of_values(arrow, field.type)
    if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = _of_values(arrow, kind.field("bytes").type)
    return kind in (arrow.binary(), arrow.large_binary(), arrow.binary_view())


def _of_values(arrow: Any, kind: Any) -> Any:
    """Return the type of a column's values, which a file may store by their numbers in a dictionary."""
    return kind.value_type if arrow.types.is_dictionary(kind) else kind


def _image_column(source: str, schema: Any, wanted: str | None) -> str | None:
    found = [field.name for field in schema if _is_image(field)]
    if wanted is not None:
        if wanted not in found:
            holds = f"its columns of bytes are {', '.join(found)}" if found else f"it has {', '.join(schema.names)}"
            raise DataError(f"no column {wanted!r} with the bytes of images in {source!r}: {holds}")
        return wanted
    named = [name for name in _IMAGES if name in found] or found
    if len(named) > 1 and named[0] != "image":
        raise DataError(f"several columns of {source!r} could hold images, {', '.join(found)}: say image_column=")
    return named[0] if named else None
