"""Images decoded by worker processes when a step needs them, for sets that do not fit into memory.

Workers decode, crop and augment image by image; what is done to batches, `Augment` does on the device, as for images in
memory. `Stream` reads any image of a set at any time: order and augmentation follow from the seed, the epoch and the
image, whatever the number of workers. `Shards` reads WebDataset tars from their start to their end.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from timm.data.readers import create_reader
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.transforms import v2

from convmixer.errors import DataError, optional
from convmixer.inference import read_image
from convmixer.training.data import (
    SHARDS,
    SPLITS,
    Batch,
    Fit,
    Share,
    Split,
    image_changes,
    labels_in,
    open_split,
    seed_all,
    shorten,
)
from convmixer.training.recipes import Recipe, policy

SHUFFLE = 1000  # samples of shards from which the next one is drawn
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
Prepare = Callable[[Image.Image], Tensor]
Decoded = tuple[Tensor | None, int, list[str]]  # pixels, or none if unreadable; label; what could not be read
S = TypeVar("S", bound="_Workers")


@dataclass(frozen=True)
class Change:
    """An image of any kind -> uint8 (C, H, W), cropped and changed at random as a recipe says."""

    recipe: Recipe
    fit: Fit
    mean: tuple[float, ...]

    def __call__(self, source: Image.Image) -> Tensor:
        channels, *size = self.fit.size
        if self.recipe.crop_scale < 1:
            crop = RandomResizedCropAndInterpolation(
                size, (self.recipe.crop_scale, 1.0), (3 / 4, 4 / 3), self.fit.interpolation
            )
            pixels: Tensor = v2.functional.pil_to_tensor(crop(read_image(source, channels)))
        else:
            pixels = self.fit(source)
        if self.recipe.auto_augment:
            change = policy(self.recipe.auto_augment, (size[0], size[1]), self.mean)
            pixels = v2.functional.pil_to_tensor(change(v2.functional.to_pil_image(pixels)))
        for alter in image_changes(self.recipe):
            pixels = alter(pixels)
        return pixels


def default_workers() -> int:
    """Processor cores for each of the processes that train on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _collate(samples: list[Decoded]) -> tuple[Tensor, Tensor, list[str]]:
    """A batch of what could be read, which may be nothing."""
    read = [(pixels, label) for pixels, label, _ in samples if pixels is not None]
    pixels = torch.stack([pixels for pixels, _ in read]) if read else torch.empty(0)
    return pixels, torch.tensor([label for _, label in read]), [e for *_, errors in samples for e in errors]


def _leave_signals_to_the_main_process(_worker: int) -> None:
    # Ctrl-C, and SIGTERM of a batch system, reach all processes; the main one still needs batches to end its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class _Workers:
    """What streams have in common: worker processes, the labels of a model, unreadable images.

    Attributes:
        classes: Class names by label.
        labels: For each label of the data that of the model.
        fit: How images are prepared for validation.
        change: How they are prepared for training.
        workers: Worker processes; 0 decodes in the main process.
        skip_unreadable: Go on without images that cannot be read.
        device: Where batches go.
        unreadable: What was said of each image that could not be read, here or in another subset.
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    fit: Fit
    change: Change
    workers: int
    skip_unreadable: bool
    device: torch.device = field(default=torch.device("cpu"), kw_only=True)
    unreadable: set[str] = field(default_factory=set, kw_only=True)

    def to(self: S, device: torch.device) -> S:
        return replace(self, device=device)

    def close(self) -> None:
        """Close what decoding in this process has opened."""

    def record(self) -> dict[str, Any]:
        return {"images": len(self), "classes": list(self.classes)}  # type: ignore[arg-type]

    def _load(self, dataset: Any, *, training: bool, **how: Any) -> Iterator[Batch]:
        """Batches of a data set, on the device.

        Raises:
            DataError: An image that cannot be read, unless such are skipped; a training batch of nothing else.
        """
        loader = DataLoader(
            dataset,
            num_workers=self.workers if len(self) else 0,  # type: ignore[arg-type]
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # else the loader draws from the one that training uses
            **how,
        )
        try:
            for batch in loader:
                if isinstance(batch, DataError):
                    raise batch
                pixels, labels, errors = batch
                self.unreadable.update(errors)
                if errors and not self.skip_unreadable:
                    raise DataError(errors[0])
                if training and not len(pixels):
                    raise DataError(f"no image of {self.name!r} can be read: {shorten(errors)}")
                if len(pixels):
                    yield pixels.to(self.device, non_blocking=True), self.labels[labels].to(self.device)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that reads {self.name!r} ended: {error}. Give fewer workers") from error
        finally:
            self.close()


@dataclass(frozen=True)
class _Decoder(Dataset[Decoded]):
    """Decodes the image of a number, with randomness from further numbers."""

    split: Split
    index: Tensor
    prepare: Prepare
    replace: bool

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> Decoded:
        number, randomness = key
        if randomness:
            seed_all(*randomness)
        errors: list[str] = []
        for further in range(len(self.index) if self.replace else 1):  # the next image takes an unreadable one's place
            try:
                return *self.split.read(int(self.index[(number + further) % len(self.index)]), self.prepare), errors
            except DataError as error:
                errors.append(str(error))
        return None, 0, errors


@dataclass
class Stream(_Workers):
    """Images of a split, any of which can be read at any time.

    Attributes:
        split: Where they are.
        index: The numbers of the images that belong to this stream (N,).
    """

    split: Split
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, index: Tensor) -> Stream:
        return replace(self, index=self.index[index])

    def close(self) -> None:
        self.split.close()

    def parts(self, share: Share) -> Iterator[Batch]:
        """Training images part after part; with `skip_unreadable` others take the place of unreadable ones."""
        keys = ([(i, (share.seed, share.epoch, i)) for i in part.tolist()] for part in share.index(len(self)))
        decoder = _Decoder(self.split, self.index, self.change, replace=self.skip_unreadable)
        return self._load(decoder, training=True, batch_sampler=keys, collate_fn=_collate)

    def in_order(self, batch_size: int) -> Iterable[Batch]:
        keys = [(i, ()) for i in range(len(self))]
        batches = [keys[i : i + batch_size] for i in range(0, len(self), batch_size)]
        decoder = _Decoder(self.split, self.index, self.fit, replace=False)
        return _Sized(
            partial(self._load, decoder, training=False, batch_sampler=batches, collate_fn=_collate), len(batches)
        )


@dataclass(frozen=True)
class _Sized:
    """Something to iterate over, and about how long it is, for a progress bar."""

    begin: Callable[[], Iterator[Batch]]
    length: int

    def __iter__(self) -> Iterator[Batch]:
        return self.begin()

    def __len__(self) -> int:
        return self.length


def open_stream(
    source: str | Path,
    split: str,
    recipe: Recipe,
    fit: Fit,
    *,
    mean: tuple[float, ...],
    classes: tuple[str, ...] | None = None,
    workers: int | None = None,
    skip_unreadable: bool = False,
    processes: int = 1,
    root: str | Path | None = None,
    download: bool = False,
) -> Stream | Shards:
    """Open a split for streaming.

    Args:
        source: As for `load_images`, or WebDataset shards: `wds/FOLDER` with timm's `_info.json`, or a pattern with a
            number of samples such as `wds/FOLDER/train-{0000..0012}.tar|12345`. `FOLDER/classes.txt` names the classes.
        split: "train" or "test".
        recipe: Says how training images are changed.
        fit: How images are prepared.
        mean: Per channel, in [0, 1]; fills gaps.
        classes: Class names that the labels must follow.
        workers: Processes that decode, for each process that trains; 0 decodes there. By default one per core.
        skip_unreadable: Go on without images that cannot be read.
        processes: Processes that train.
        root: Where downloaded data sets lie.
        download: Let `torch/` data sets download what is missing.

    Raises:
        DataError: Nothing there, no images, other classes than asked for, too few shards.
    """
    name = str(source)
    common: dict[str, Any] = {
        "fit": fit,
        "change": Change(recipe, fit, tuple(mean)),
        "skip_unreadable": skip_unreadable,
    }
    if name.startswith(SHARDS):
        found, urls, count = _find_shards(name, split)
        names = classes or found
        here = default_workers() if workers is None else workers
        if split == "train":
            most = len(urls) // processes
            if most < max(here if workers is not None else 1, 1):
                raise DataError(
                    f"{name!r} has {len(urls)} shards for {processes} processes with {here} workers each, and each "
                    "worker needs one: give fewer workers, or cut the data into more shards"
                )
            here = min(here, most)
        return Shards(
            name,
            names,
            labels_in(name, found, names),
            workers=here,
            urls=urls,
            count=count,
            processes=processes,
            **common,
        )
    opened = open_split(source, split, root=root, download=download)
    names = classes or opened.classes
    here = default_workers() if workers is None else workers
    index = torch.arange(len(opened))
    return Stream(name, names, opened.labels_in(names), workers=here, split=opened, index=index, **common)


# ---- WebDataset -----------------------------------------------------------------------------------------------------


def _find_shards(name: str, split: str) -> tuple[tuple[str, ...], list[str], int]:
    """Class names, tars and number of samples of a split."""
    webdataset = optional("webdataset", repr(name), "train")
    folder, _, pattern = name.removeprefix(SHARDS).rpartition("/") if ".tar" in name else (name[len(SHARDS) :], "", "")
    problems = []
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
    return classes, [os.path.join(folder, file) for file in reader.split_info.filenames], reader.num_samples


def has_shards(source: str, split: str) -> bool:
    """Whether shards have a split; those of a pattern are one split alone."""
    try:
        return ".tar" not in source and bool(_find_shards(source, split))
    except DataError:
        return False


@dataclass
class Shards(_Workers):
    """Images in WebDataset tars, which are read from their start to their end.

    Each epoch draws an order of the tars and deals them out to the workers of all processes; each worker draws the next
    sample from `SHUFFLE` that it has read, and begins anew when its tars are done. So an epoch may miss some images and
    show others twice, and its order follows from the seed, the epoch and the number of workers.

    Attributes:
        urls: The tars: paths, or whatever webdataset opens.
        count: Number of samples in all of them.
        processes: Processes that train.
    """

    urls: list[str]
    count: int
    processes: int

    def __len__(self) -> int:
        return self.count

    def subset(self, index: Tensor) -> Shards:
        """All of them or none: `train` refuses to hold out a part of what has no numbers."""
        return self if len(index) else replace(self, urls=[], count=0)

    def record(self) -> dict[str, Any]:
        return {**super().record(), "streams": self.processes * max(self.workers, 1)}

    def parts(self, share: Share) -> Iterator[Batch]:
        """Training images part after part; with `skip_unreadable` others of a part stand in for unreadable ones."""
        return self._load(_ShardReader(self, share, 0), training=True, batch_size=None)

    def in_order(self, batch_size: int) -> Iterable[Batch]:
        load = partial(self._load, _ShardReader(self, None, batch_size), training=False, batch_size=None)
        return _Sized(load, math.ceil(self.count / batch_size))


@dataclass(frozen=True)
class _ShardReader(IterableDataset[Any]):
    """Batches of one worker: its part of a training epoch, or without a share its part of all samples."""

    shards: Shards
    share: Share | None
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]] | DataError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self._train(self.share, worker, workers) if self.share else self._validate(worker, workers)
        except Exception as error:  # of the tar, or of the network; raised here it would become a trace of the worker
            yield DataError(f"cannot read {self.shards.name!r}: {type(error).__name__}: {error}")

    def _train(self, share: Share, worker: int, workers: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        each = len(share.mine)
        done, total = share.steps.start * each, share.steps.stop * each
        # The loader asks the workers in turn, beginning with the first: after an interruption, too, each part must come
        # from the stream that it came from.
        stream = (done + worker) % workers
        process = share.mine.start // each
        samples = self._endless(share, process * workers + stream)
        for number in range(stream, total, workers):
            chosen = list(itertools.islice(samples, share.batch_size // share.parts))
            if number < done:
                continue
            part = number // each * share.parts + share.mine.start + number % each
            decoded = []
            for i, sample in enumerate(chosen):
                seed_all(share.seed, share.epoch, part, i, -1)
                decoded.append(self._decode(sample, self.shards.change))
            read = [d for d in decoded if d[0] is not None]
            filled = itertools.cycle(read) if read else itertools.repeat(decoded[0])
            yield _collate([d if d[0] is not None else (*next(filled)[:2], d[2]) for d in decoded])

    def _endless(self, share: Share, stream: int) -> Iterator[dict[str, Any]]:
        for turn in itertools.count():
            urls = list(self.shards.urls)
            random.Random(repr((share.seed, share.epoch, turn))).shuffle(urls)
            rng = random.Random(repr((share.seed, share.epoch, turn, stream)))
            empty = True
            for sample in self._samples(urls[stream :: self.shards.record()["streams"]], rng):
                empty = False
                yield sample
            if empty:
                raise DataError("a tar without samples")

    def _validate(self, worker: int, workers: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        samples = self._samples(self.shards.urls[worker::workers])
        while chosen := list(itertools.islice(samples, self.batch_size)):
            yield _collate([self._decode(sample, self.shards.fit) for sample in chosen])

    def _samples(self, urls: list[str], rng: random.Random | None = None) -> Iterator[dict[str, Any]]:
        """What the tars hold, as bytes by ending, shuffled by a generator of random numbers."""
        import webdataset
        from webdataset.tariterators import group_by_keys, tar_file_iterator

        def read() -> Iterator[dict[str, Any]]:
            for url in urls:
                with contextlib.closing(webdataset.gopen(url)) as file:
                    yield from group_by_keys({**member, "__url__": url} for member in tar_file_iterator(file))

        yield from webdataset.shuffle(SHUFFLE, initial=SHUFFLE, rng=rng)(read()) if rng else read()

    def _decode(self, sample: dict[str, Any], prepare: Prepare) -> Decoded:
        try:
            content = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
            if content is None:
                raise DataError(f"none of its parts ends in {', '.join(IMAGE_KEYS)}")
            label = int(sample["cls"])
            if not 0 <= label < len(self.shards.labels):
                raise DataError(f"class {label}, of {len(self.shards.labels)} in classes.txt")
            with Image.open(io.BytesIO(content)) as image:
                return prepare(image), label, []
        except Exception as error:
            what = f"{sample.get('__key__')} in {sample.get('__url__')!r}"
            return None, 0, [f"cannot read {what}: {type(error).__name__}: {error}"]
