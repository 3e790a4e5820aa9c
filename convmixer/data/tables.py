"""Labels from a table: a CSV, TSV or Parquet file with the columns image and label, read by pandas."""

from __future__ import annotations

import itertools
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from convmixer.data.layout import File, Folder, Layout, Listing, list_images, list_labelled, role
from convmixer.errors import DataError, brief, list_first, optional

SUFFIXES = (".csv", ".tsv", ".parquet")


def is_table(source: str | Path) -> bool:
    """Return whether a source is a table, by its suffix."""
    return os.path.splitext(str(source))[1].lower() in SUFFIXES


@dataclass(frozen=True)
class Row:
    """What a table says about an image: its label, and its split if there is a column of that name."""

    image: str
    label: str
    split: str | None


def read_table(path: str | Path) -> list[Row]:
    """Read the rows of a table, each image once.

    Raises:
        DataError: No such file, other columns, an empty cell, a split of no known name, or an image with two labels.
        DependencyError: pandas is not installed.
    """
    pandas = optional("pandas", f"the table {str(path)!r}", "train")
    file, suffix = os.path.expanduser(str(path)), os.path.splitext(str(path))[1].lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{str(path)!r} is not a table of labels: give a file that ends in {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            table = pandas.read_parquet(file)
        else:  # text as it is: 007 and NA are names of classes like others
            separator = "\t" if suffix == ".tsv" else ","
            # Without a header, as pandas would rename columns of one name, and move the cells of longer rows.
            options = {"header": None, "dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
            lines = pandas.read_csv(file, sep=separator, **options)
            table = lines.iloc[1:].set_axis(lines.iloc[0], axis="columns")
    except FileNotFoundError as error:
        raise DataError(f"no table at {str(path)!r}") from error
    except Exception as error:  # pandas' and pyarrow's
        raise DataError(f"cannot read the table {str(path)!r}: {type(error).__name__}: {error}") from error
    names = [str(column).strip().lower() for column in table.columns]
    if twice := [name for name in ("image", "label", "split") if names.count(name) > 1]:
        raise DataError(f"{str(path)!r} has several columns called {', '.join(twice)}: leave one of them")
    columns = dict(zip(names, table.columns, strict=True))
    if not {"image", "label"} <= columns.keys():
        found = ", ".join(brief(str(column)) for column in table.columns)
        raise DataError(f"{str(path)!r} has the columns {found}: it needs image and label, and may have split")
    cells = {
        name: [_cell(value, missing) for value, missing in zip(table[column], table[column].isna(), strict=True)]
        for name, column in columns.items()
        if name in ("image", "label", "split")
    }
    rows: dict[str, Row] = {}
    splits: Iterable[str | None] = cells.get("split", itertools.repeat(None, len(table)))
    for number, (image, label, split) in enumerate(zip(cells["image"], cells["label"], splits, strict=True), start=1):
        if "" in (image, label, split):
            raise DataError(
                f"row {number} of {str(path)!r} lacks text or a whole number: image {image!r}, label {label!r}"
                + (f", split {split!r}" if "split" in cells else "")
            )
        if split is not None and role(split) is None:
            raise DataError(f"row {number} of {str(path)!r} has the split {brief(split)!r}: call it train, val or test")
        row = Row(image, label, split and role(split))
        if rows.setdefault(image, row) != row:
            raise DataError(f"row {number} of {str(path)!r} contradicts an earlier one on the image {brief(image)!r}")
    if not rows:
        raise DataError(f"{str(path)!r} has no rows")
    return list(rows.values())


def _cell(value: object, missing: bool) -> str:
    """Return a value as text: "" if it is missing, or is no text, whole number, boolean or date."""
    if isinstance(value, float) and value.is_integer():  # whole numbers, in a column in which one is missing
        value = int(value)
    if missing or isinstance(value, float) or (isinstance(value, Sized) and not isinstance(value, str)):
        return ""
    return str(value).strip()


def has_rows(layout: Layout, rows: Sequence[Row], split: str, table: str) -> bool:
    """Return whether a table has rows for a split that has a name or a folder of its own."""
    if any(row.split for row in rows):
        return any(row.split == split for row in rows)
    return split in layout.splits and bool(list_rows(layout, rows, split, table)[1].images)


def list_rows(
    layout: Layout, rows: Sequence[Row], split: str | None, table: str, *, by_path: bool = True
) -> tuple[Folder, Listing]:
    """Return the folder of a split, or of all images without one, and those of its images for which a table has rows.

    The column split decides where there is one; else the folder of the split, where the source has one. Images come by
    their paths, or else in the order of the rows.

    Raises:
        DataError: Rows without a file, with several that could be meant, or of one file with two labels.
    """
    folder, unlisted = layout.top, "image without a row in the table"
    chosen, others = rows, list[Row]()
    if split is not None and any(row.split for row in rows):
        chosen, others = [row for row in rows if row.split == split], [row for row in rows if row.split != split]
        unlisted = f"image without a row of the {split} split"
    elif split is not None:
        folder = layout.folder_of(split)
    files = {(file.path, file.start): file for file in folder.walk()}
    labels: dict[File, str] = {}
    meant = _match(layout, rows)
    for row, found in _find(layout, chosen, meant, table):
        file = files.get((found.path, found.start))
        if file is not None and labels.setdefault(file, row.label) != row.label:
            raise DataError(f"{table!r} gives {file.name} the labels {labels[file]!r} and {row.label!r}")
    for row in others:
        if len(meant[row.image]) == 1 and meant[row.image][0] in labels:
            raise DataError(f"{table!r} has {row.image!r} twice, for {split} and for {row.split}")
    listed = list_images(folder)
    listed.left_out[unlisted] += len(listed.images) - len(labels)
    return folder, list_labelled(labels.items(), listed.left_out, by_path=by_path)


def _find(
    layout: Layout, rows: Sequence[Row], meant: Mapping[str, Sequence[File]], table: str
) -> list[tuple[Row, File]]:
    """Return each row with the one file that it means; raise a DataError where there is none or more than one."""
    for row in rows:
        if len(meant[row.image]) > 1:
            raise DataError(
                f"{brief(row.image)!r} of {table!r} could be {list_first(f.name for f in meant[row.image])} in "
                f"{layout.source!r}: write the path from there, or give the folder that the table belongs to"
            )
    lost = [brief(row.image) for row in rows if not meant[row.image]]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(rows)} rows of {table!r} name no image in {layout.source!r}: {list_first(lost)}. "
            "Write paths from that folder, or names of files that are there once"
        )
    return [(row, meant[row.image][0]) for row in rows]


def _match(layout: Layout, rows: Sequence[Row]) -> dict[str, list[File]]:
    """Return the images that each row could mean, by its `image`.

    That is a path from the source, or else the end of a path, with or without its suffix and those of tars.
    """
    exact = {file.name: file for file in list_images(layout.top).images}
    absolute = {}
    if any(os.path.isabs(row.image) for row in rows):
        absolute = {os.path.abspath(file.path): file for file in exact.values() if file.size is None}
    by_basename: dict[str, list[File]] = defaultdict(list)  # with and without the suffix
    for known in exact.values():
        name = posixpath.basename(known.name)
        by_basename[name].append(known)
        by_basename[posixpath.splitext(name)[0]].append(known)
    meant: dict[str, list[File]] = {}
    for row in rows:
        name = posixpath.normpath(row.image.replace("\\", "/"))
        file = exact.get(name) or absolute.get(os.path.abspath(row.image))
        near = by_basename.get(posixpath.basename(name), ())
        meant[row.image] = [f for f in near if _ends(f"/{f.name}", f"/{name}")] if file is None else [file]
    return meant


def _ends(path: str, name: str) -> bool:
    """Return whether a path ends in a name, with or without its own suffix and those of tars."""
    spellings = (path, path.replace(".tar/", "/"))
    return any(spelling.endswith(name) or posixpath.splitext(spelling)[0].endswith(name) for spelling in spellings)
