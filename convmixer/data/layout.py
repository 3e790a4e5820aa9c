"""What a folder or a tar of labelled images holds: which splits, which classes, which images, and what is left out.

Every command that reads such a source uses this module, so that all of them agree about splits, classes and images.
"""

from __future__ import annotations

import functools
import itertools
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from convmixer.data.images import image_suffixes
from convmixer.errors import DataError, list_first

ROLES = ("train", "validation", "test")
LAYOUTS = (
    "These layouts are read: FOLDER/train/CLASS/image.jpg, with val and test beside train; FOLDER/CLASS/image.jpg; the "
    "same in .tar files; and images in any folder with a table of the columns image and label (--labels FILE.csv)"
)

# Compared without case and what separates words: train, Training, train_set, seg_train, val2017, test-images, ...
_SPLIT = re.compile(
    "(?:seg|img|images?|data)?"
    "(?:(?P<train>train(?:ing)?)|(?P<validation>val|valid|validation|dev)|(?P<test>test(?:ing)?))"
    r"(?:sets?|data|dataset|split|imgs?|images?)?(?:\d{4})?"
)


def role(name: str) -> str | None:
    """Return "train", "validation" or "test" for any usual name of a split; None for other names."""
    found = _SPLIT.fullmatch(re.sub(r"[\W_]+", "", name.lower()))
    return found.lastgroup if found else None


class File(NamedTuple):
    """A file, or a part of one, as in a tar: `size` bytes from `start` on. A `size` of None is all of it."""

    name: str  # its path below the folder of its split
    path: str
    start: int = 0
    size: int | None = None


class Folder:
    """A folder, on a disk or in a tar: what is in it by name, hidden names left out.

    Attributes:
        name: The path from the source on, with a slash at its end; a tar that stands for a folder keeps its suffix.
        odd: How many entries are neither folders nor files that can be read, by kind.
    """

    def __init__(self, name: str) -> None:
        self.name, self.odd = name, Counter[str]()

    @functools.cached_property
    def content(self) -> tuple[dict[str, Folder], dict[str, File]]:
        return {}, {}

    @property
    def folders(self) -> dict[str, Folder]:
        return self.content[0]

    @property
    def files(self) -> dict[str, File]:
        return self.content[1]

    def __str__(self) -> str:
        return self.name[:-1] if self.name.endswith(".tar/") else self.name

    def walk(self, above: str = "") -> Iterator[File]:
        """Yield all files, named by their paths below this folder."""
        for name, file in self.files.items():
            yield file._replace(name=above + name)
        for name, folder in self.folders.items():
            yield from folder.walk(f"{above}{name}/")

    def count_odd(self) -> Counter[str]:
        """Return `odd` of this folder and all below it."""
        return sum((folder.count_odd() for folder in self.folders.values()), self.odd)


_LOST = "link without a target"
_SPECIAL = "file of a special kind"  # a pipe, a socket or a device, and in a tar a file that is stored sparsely


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _without_tar(name: str) -> str:
    return name[:-4] if _is_tar(name) else name


class _DiskFolder(Folder):
    """A folder on a disk, listed when it is asked for what it holds."""

    def __init__(self, path: str, name: str, above: tuple[str, ...] = ()) -> None:
        super().__init__(name)
        self.path, self.above = path, (*above, path)

    @functools.cached_property
    def content(self) -> tuple[dict[str, Folder], dict[str, File]]:
        folders: dict[str, Folder] = {}
        files: dict[str, File] = {}
        try:
            for entry in sorted(os.scandir(self.path), key=lambda entry: entry.name):
                if _is_hidden(entry.name):
                    continue
                if entry.is_symlink() and not os.path.exists(entry.path):  # also one to itself
                    self.odd[_LOST] += 1
                elif entry.is_file():
                    files[entry.name] = File(entry.name, entry.path)
                elif not entry.is_dir():
                    self.odd[_SPECIAL] += 1
                elif entry.is_symlink() and os.path.realpath(entry.path) in map(os.path.realpath, self.above):
                    self.odd["link to a folder that holds it"] += 1
                else:
                    folders[entry.name] = _DiskFolder(entry.path, f"{self.name}{entry.name}/", self.above)
        except OSError as error:
            raise DataError(f"cannot list the folder {self.path!r}: {error.strerror or error}") from error
        return folders, files


class _TopFolder(_DiskFolder):
    """The top folder of a source, in which tars stand for splits, or for classes where there are no folders."""

    @functools.cached_property
    def content(self) -> tuple[dict[str, Folder], dict[str, File]]:
        folders, files = super().content
        classes = not folders
        for name in [name for name in files if _is_tar(name)]:
            if classes or role(_without_tar(name)):
                folders[name] = _open_tar(files.pop(name).path, f"{self.name}{name}/")
        return folders, files


class StrictTarInfo(tarfile.TarInfo):
    """A member of a tar; a damaged header, or none where one should be, is an error and not the end of the tar."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> StrictTarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            while block := archive.fileobj.read(2**20):
                if block.strip(b"\0"):
                    raise tarfile.ReadError(f"more follows a block of zeros at byte {archive.offset:,}") from None
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"it ends at byte {archive.offset:,} without an end marker: cut off") from error
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}: damaged or cut off") from error


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar without keeping them: a million of them would fill the memory."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        yield member


def _open_tar(path: str, name: str) -> Folder:
    try:
        status = os.stat(path)
        return _read_tar(path, name, status.st_size, status.st_mtime_ns)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read {path!r} as a tar without compression: {error}") from error


@functools.lru_cache(maxsize=2)  # the splits of one tar are opened one after the other
def _read_tar(path: str, name: str, _size: int, _changed: int) -> Folder:
    """Read the folder that a tar stands for; tars in it are folders, too."""
    top = Folder(name)
    with tarfile.open(path, "r:", tarinfo=StrictTarInfo) as archive:
        _add_members(archive, top, path, 0)
    return top


def _add_members(archive: tarfile.TarFile, top: Folder, path: str, base: int) -> None:
    """Enter into `top` what an archive holds that begins at byte `base` of the file at `path`."""
    found: dict[str, File] = {}
    links: dict[str, str] = {}
    for member in members(archive):
        name = _inside(member.name)
        parts = PurePosixPath(name).parts
        if any(_is_hidden(part) for part in parts) or member.isdir():
            continue
        if member.islnk() or member.issym():
            target = member.linkname if member.islnk() else posixpath.join(posixpath.dirname(name), member.linkname)
            target = _inside(target)
            if target != name:  # GNU tar links a file that it was told to pack twice to itself
                links[name] = target
                found.pop(name, None)  # of members with one name the last one counts
        elif not member.isreg() or member.issparse():
            _below(top, parts[:-1]).odd[_SPECIAL] += 1
        elif _is_tar(name):
            content = archive.extractfile(member)
            with tarfile.open(fileobj=content, mode="r:", tarinfo=StrictTarInfo) as inner:
                _add_members(inner, _below(top, parts), path, base + member.offset_data)
        else:
            found[name] = File(name, path, base + member.offset_data, member.size)
            links.pop(name, None)
    while ready := {name: found[target] for name, target in links.items() if target in found}:  # links to links, too
        for name, file in ready.items():
            found[name] = file._replace(name=name)
            del links[name]
    folders = {str(folder) for file in found for folder in PurePosixPath(file).parents} if links else set()
    for name, target in links.items():
        _below(top, PurePosixPath(name).parts[:-1]).odd["link to a folder" if target in folders else _LOST] += 1
    for name, file in found.items():
        *above, last = PurePosixPath(name).parts
        _below(top, above).files[last] = file


def _inside(name: str) -> str:
    """Return the path of a member below the top of its tar, as tar unpacks it."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _below(top: Folder, parts: Iterable[str]) -> Folder:
    """Return the folder at a path below `top`; make what is missing of it."""
    folder = top
    for part in parts:
        if part not in folder.folders:
            folder.folders[part] = Folder(f"{folder.name}{part}/")
        folder = folder.folders[part]
    return folder


# ---- splits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which part of a source is which split.

    Attributes:
        source: Its name, for messages.
        top: All of it.
        splits: The folders or tars that could be meant by each of `ROLES`; empty if the source is one set of classes.
        other: Names of what lies next to splits and is not one.
    """

    source: str
    top: Folder
    splits: dict[str, list[Folder]]
    other: tuple[str, ...] = ()

    def folder_of(self, split: str) -> Folder:
        """Return the folder of a split, which without splits is all of the source.

        Raises:
            DataError: The source has splits, but not this one, or several that could be meant by it.
        """
        if not self.splits:
            return self.top
        found = self.splits.get(split)
        names = ", ".join(str(folder) for folders in self.splits.values() for folder in folders)
        if not found:
            others = f" beside {list_first(self.other)}" if self.other else ""
            spellings = {"train": "train, training, train_set", "validation": "val, valid, validation, dev"}
            raise DataError(
                f"no {split} split in {self.source!r}, which holds {names}{others}: call it one of "
                f"{spellings.get(split, 'test, testing, test_set')}, in a folder or .tar of that name"
            )
        if len(found) > 1:
            raise DataError(
                f"several {split} splits in {self.source!r}: {', '.join(map(str, found))}. Leave one of "
                "them there, or give the folder that is meant"
            )
        return found[0]

    def check_classes(self) -> None:
        """Raise DataError if the top folders hold folders of mostly equal names: splits or classes."""
        tops = self.top.folders
        if self.splits or len(tops) < 2 or any(not f.folders or _images(f.files) for f in tops.values()):
            return
        names = Counter(itertools.chain.from_iterable(folder.folders for folder in tops.values()))
        shared = [name for name, count in names.items() if count > 1]
        if len(names) > 1 and 2 * len(shared) >= len(names):
            raise DataError(
                f"the folders {list_first(tops)} of {self.source!r} hold folders of the same names, "
                f"{list_first(shared)}. Where they are splits, call them train, val and test; where they are classes, "
                "put them into a folder called train"
            )


def find_layout(source: str | Path) -> Layout:
    """Find what a folder or a tar holds.

    Raises:
        DataError: There is nothing, or neither a folder nor a tar.
    """
    path = os.path.expanduser(str(source))
    if os.path.isfile(path) and _is_tar(path):
        return _layout(str(source), _open_tar(path, f"{os.path.basename(path)}/"))
    if os.path.isdir(path):
        return _layout(str(source), _TopFolder(path, f"{Path(path).resolve().name}/"))
    if os.path.isfile(path):
        raise DataError(f"{str(source)!r} is neither a folder nor a .tar: unpack it. {LAYOUTS}")
    raise DataError(
        f"no data at {str(source)!r}: give a folder, a .tar of class folders, or a name that starts with torch/ or "
        "hfds/ such as torch/cifar10 with --download"
    )


def _layout(source: str, top: Folder) -> Layout:
    stems = {name: _without_tar(name) for name in top.folders}
    roles = {name: found for name, stem in stems.items() if (found := role(stem))}
    if not roles and len(stems) == 1 and not _images(top.files):
        ((name, only),) = top.folders.items()
        inner = _layout(source, only)
        same = stems[name].lower() == _without_tar(Path(source).resolve().name).lower()
        return inner if inner.splits or same else Layout(source, top, {})
    others = [folder for name, folder in top.folders.items() if name not in roles]
    if len(others) > 1 and set(roles.values()) == {"train"} and all(_images(f.files) for f in top.folders.values()):
        roles = {}  # the class of trains, among other vehicles
    if not roles:
        return Layout(source, top, {})
    splits: dict[str, list[Folder]] = {}
    for name, found in roles.items():
        if f"{name}.tar" in roles:  # the folder was unpacked from it
            others.append(top.folders[name])
        else:
            splits.setdefault(found, []).append(_nested(top.folders[name], found))
    loose = [count_images(len(_images(top.files)))] if _images(top.files) else []
    return Layout(source, top, splits, (*map(str, others), *loose))


def _nested(folder: Folder, split: str) -> Folder:
    """Return the folder of the same split inside a folder, as in train/train; else the folder itself."""
    if len(folder.folders) == 1 and not _images(folder.files):
        ((name, inner),) = folder.folders.items()
        return inner if role(_without_tar(name)) == split else folder
    return folder


def _images(files: Iterable[str]) -> list[str]:
    return [name for name in files if os.path.splitext(name)[1].lower() in image_suffixes()]


def count_images(count: int) -> str:
    """Return "1 image", "3,068 images"."""
    return f"{count:,} image{'' if count == 1 else 's'}"


# ---- classes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        images: Their files, in natural order.
        labels: Index of each one's class.
        classes: Names of the classes, in natural order.
        left_out: How many other files there are, by kind.
    """

    images: list[File]
    labels: list[int]
    classes: tuple[str, ...]
    left_out: Counter[str]


def list_classes(top: Folder) -> Listing:
    """List the images of class folders, however deep: the top folder is the class."""
    left_out: Counter[str] = Counter()
    found: list[tuple[File, str]] = []
    for name, folder in top.folders.items():
        files = [file._replace(name=f"{name}/{file.name}") for file in folder.walk()]
        left_out["folder without files"] += not files
        found += [(file, _without_tar(name)) for file in _take_images(files, left_out)]
    left_out["image beside the class folders"] += len(_take_images(top.files.values(), left_out))
    return list_labelled(found, left_out + top.count_odd())


def list_labelled(found: Iterable[tuple[File, str]], left_out: Counter[str], *, by_path: bool = True) -> Listing:
    """List images, given with the names of their classes, by their paths or in the order in which they are given."""
    pairs = sorted(found, key=lambda pair: natural(pair[0].name)) if by_path else list(found)
    classes = tuple(sorted({label for _, label in pairs}, key=natural))
    index = {name: i for i, name in enumerate(classes)}
    return Listing([file for file, _ in pairs], [index[label] for _, label in pairs], classes, +left_out)


def list_folder(path: str | Path) -> Listing:
    """List all images in a folder on a disk, without labels."""
    return list_images(_DiskFolder(str(path), ""))


def walk_folder(path: str | Path) -> Iterator[File]:
    """Yield all files in a folder on a disk, at any depth, named by their paths below it."""
    return _DiskFolder(str(path), "").walk()


def holds_images(path: str | Path) -> bool:
    """Return whether a folder on a disk holds an image or a tar, at any depth; look no further than the first one."""
    suffixes = {*image_suffixes(), ".tar"}
    return any(os.path.splitext(file.name)[1].lower() in suffixes for file in walk_folder(path))


def list_images(folder: Folder) -> Listing:
    """List all images of a folder, without labels."""
    left_out: Counter[str] = Counter()
    images = sorted(_take_images(folder.walk(), left_out), key=lambda file: natural(file.name))
    return Listing(images, [0] * len(images), (), left_out + folder.count_odd())


def natural(name: str) -> tuple[object, str]:
    """Return the key of an order in which 2 comes before 10, as in timm.

    timm's own function fails at superscript and circled digits.
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def _take_images(files: Iterable[File], left_out: Counter[str]) -> list[File]:
    """Return the files that are images, and count the others by suffix."""
    suffixes = image_suffixes()
    images = []
    for file in files:
        suffix = os.path.splitext(file.name)[1].lower()
        if suffix in suffixes:
            images.append(file)
        else:
            left_out[suffix if len(suffix) > 1 else "file without a suffix"] += 1
    return images


def describe_left_out(left_out: Counter[str]) -> str:
    """Return "12 .txt, 3 images beside the class folders"."""
    return ", ".join(
        f"{count:,} {kind if kind.startswith('.') or count == 1 else re.sub(' |$', 's ', kind, count=1).strip()}"
        for kind, count in sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0]))
    )
