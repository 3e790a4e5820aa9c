"""Images decoded by worker processes when a step needs them, for sets that do not fit into memory.

Workers decode, crop, and apply timm's policies, image by image; all other changes `Augment` makes on the device, as for
images in memory. `Stream` reads any image of a set at any time: order and changes follow from the seed, the epoch and
the image, whatever the number of workers. `Shards` reads WebDataset tars from their start to their end.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.transforms import v2

from convmixer.data.images import enough, read_image
from convmixer.data.memory import Batch, Fit, Share, balancing_odds, labels_digest, names_digest, seed_all
from convmixer.data.readers import FileSplit, Prepare, ShardSplit, Split, open_split
from convmixer.data.workers import default_workers, load
from convmixer.errors import DataError, list_first

if TYPE_CHECKING:
    from convmixer.training.recipe import Recipe

Decoded = tuple[Tensor | None, int, list[str]]  # pixels, or none if unreadable; label; what could not be read
S = TypeVar("S", bound="_StreamBase")


@lru_cache
def policy(name: str, size: tuple[int, int], mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """Build timm's augmentation of that name for PIL images of (height, width); gaps get the mean, in [0, 1]."""
    fill = tuple(min(255, round(255 * value)) for value in mean)
    hparams: dict[str, Any] = {"translate_const": int(min(size) * 0.45), "img_mean": fill if len(fill) > 1 else fill[0]}
    hparams["magnitude_max"] = 9.99  # at 10, posterize keeps 0 bits, which newer versions of Pillow refuse
    make = rand_augment_transform if name.startswith("rand") else auto_augment_transform
    change: Callable[[Image.Image], Image.Image] = make(name, hparams)
    return change


@dataclass(frozen=True)
class Change:
    """Turns what `read_image` takes into uint8 (C, H, W), cropped at random and changed by a policy of timm."""

    recipe: Recipe
    fit: Fit
    mean: tuple[float, ...]

    def __call__(self, source: Any) -> Tensor:
        size = self.fit.size[1:]
        pixels = self._crop(source) if self.recipe.crop_scale < 1 else self.fit(source)
        if self.recipe.auto_augment:
            change = policy(self.recipe.auto_augment, (size[0], size[1]), self.mean)
            pixels = v2.functional.pil_to_tensor(change(v2.functional.to_pil_image(pixels)))
        return pixels

    def _crop(self, source: Any) -> Tensor:
        """Crop at random, as timm does. The crop is drawn before an image is decoded, perhaps at a reduced scale."""
        channels, height, width = self.fit.size
        crop = RandomResizedCropAndInterpolation(
            (height, width), (self.recipe.crop_scale, 1.0), (3 / 4, 4 / 3), self.fit.interpolation
        )
        whole, box = (0, 0), (0, 0, 0, 0)

        def draw(across: int, down: int) -> tuple[int, int]:
            """Return the (width, height) of the whole image at which the crop has enough pixels."""
            nonlocal whole, box
            shape = torch.empty(1, down, across, device="meta")
            whole, box = (across, down), crop.get_params(shape, crop.scale, crop.ratio)
            if not self.fit.draft:
                return whole
            wanted = enough(height, width)
            return math.ceil(wanted[0] * whole[0] / box[3]), math.ceil(wanted[1] * whole[1] / box[2])

        image = read_image(source, channels, least=draw)
        if image.size == whole:
            cropped = v2.functional.resized_crop(image, *box, [height, width], crop.interpolation)
        else:  # at a reduced scale the crop may begin and end within pixels
            x, y = image.width / whole[0], image.height / whole[1]
            top, left, tall, wide = box
            part = (left * x, top * y, (left + wide) * x, (top + tall) * y)
            cropped = image.resize((width, height), Image.Resampling[crop.interpolation.name], part)
        result: Tensor = v2.functional.pil_to_tensor(cropped)
        return result


def _collate(samples: list[Decoded]) -> tuple[Tensor, Tensor, list[str]]:
    """Return a batch of what could be read, which may be nothing."""
    read = [(pixels, label) for pixels, label, _ in samples if pixels is not None]
    pixels = torch.stack([pixels for pixels, _ in read]) if read else torch.empty(0)
    return pixels, torch.tensor([label for _, label in read]), [e for *_, errors in samples for e in errors]


@dataclass
class _StreamBase:
    """What streams have in common: worker processes, the labels of a model, unreadable images.

    Attributes:
        classes: Class names by label.
        labels: The model's label for each label of the data.
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

    @property
    def at_once(self) -> int:
        """Parts that the workers hold ready, halved, so that they work on while the model learns."""
        return max(1, self.workers)

    def record(self) -> dict[str, Any]:
        return {"images": len(self), "classes": list(self.classes)}  # type: ignore[arg-type]

    def _load(self, dataset: Any, *, training: bool, **options: Any) -> Iterator[Batch]:
        """Yield the batches of a data set, on the device.

        Raises:
            DataError: An image that cannot be read, unless those are skipped, a training batch without any that can, or
                another number of images to validate on than there should be.
        """
        found = 0
        workers = self.workers if len(self) else 0  # type: ignore[arg-type]
        pinned = self.device.type == "cuda"
        with closing(load(dataset, self.name, num_workers=workers, pin_memory=pinned, **options)) as batches:
            for batch in batches:
                if isinstance(batch, DataError):
                    raise batch
                pixels, labels, errors = batch
                self.unreadable.update(errors)
                found += len(labels) + len(errors)
                if errors and not self.skip_unreadable:
                    raise DataError(errors[0])
                if training and not len(pixels):
                    raise DataError(f"no image of {self.name!r} can be read: {list_first(errors, separator='; ')}")
                if len(pixels):
                    yield pixels.to(self.device, non_blocking=True), self.labels[labels].to(self.device)
        if not training and found != len(self):  # type: ignore[arg-type]
            raise DataError(f"{self.name!r} should have {len(self)} samples and has {found}: correct the number")  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Decoder(Dataset[Decoded]):
    """Decodes images by their numbers, with randomness from further numbers."""

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
class Stream(_StreamBase):
    """Images of a split that can be read in any order.

    Attributes:
        split: Where they are.
        index: The numbers of the images that belong to this stream (N,).
        odds: By which each is drawn for training (N,); none takes each once in an epoch.
    """

    split: Split
    index: Tensor
    odds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, index: Tensor) -> Stream:
        return replace(self, index=self.index[index], odds=None)

    def targets(self) -> Tensor:
        return self.labels[self.split.targets()[self.index]]

    def balanced(self) -> Stream:
        return replace(self, odds=balancing_odds(self))

    def record(self) -> dict[str, Any]:
        if not isinstance(self.split, FileSplit):  # other labels take long to read
            return super().record()
        return super().record() | {
            "labels": labels_digest(self.targets()),
            "names": names_digest(self.split.images),
        }

    def parts(self, share: Share) -> Iterator[Batch]:
        """Yield training images part after part; with `skip_unreadable` others replace unreadable ones."""
        each = share.batch_size // share.parts
        starts = (step * share.batch_size + part * each for step in share.steps for part in share.own)
        # By position, as an image may be drawn more than once in an epoch.
        keys = (
            [(number, (share.seed, share.epoch, position)) for position, number in enumerate(part.tolist(), start)]
            for start, part in zip(starts, share.index(len(self), odds=self.odds), strict=True)
        )
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
    """An iterable with a length, for a progress bar."""

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
    labels: str | Path | None = None,
    workers: int | None = None,
    skip_unreadable: bool = False,
    processes: int = 1,
    root: str | Path | None = None,
    download: bool = False,
    report: Callable[[str], None] = print,
) -> Stream | Shards:
    """Open a split for streaming.

    Args:
        source: As for `load_images`, or WebDataset shards: `wds/FOLDER` with timm's `_info.json`, or a pattern with a
            number of samples such as `wds/FOLDER/train-{0000..0012}.tar|12345`. `FOLDER/classes.txt` names the classes.
        split: "train", "validation" or "test", as for `load_images`.
        recipe: Says how training images are changed.
        fit: How images are prepared.
        mean: Per channel, in [0, 1]; fills gaps.
        classes: Class names that the labels must follow. Without them, training images must be of two at least.
        labels: A table of labels, as for `load_images`.
        workers: Processes that decode, for each process that trains; 0 decodes there. By default one per core.
        skip_unreadable: Go on without images that cannot be read.
        processes: Processes that train.
        root: Where downloaded data sets lie.
        download: Let `torch/` data sets download what is missing.
        report: Takes a line about what was taken for the split.

    Raises:
        DataError: Nothing there, no images, other classes than asked for, too few shards.

    Example:
        >>> from convmixer.data.memory import Fit
        >>> from convmixer.data.stream import open_stream
        >>> from convmixer.training import Recipe
        >>> stream = open_stream(
        ...     "data/flowers", "test", Recipe(stream=True), Fit((3, 32, 32)), mean=(0.5, 0.5, 0.5), workers=0
        ... )
        test: 6 images in 2 classes from flowers/test/
        >>> [pixels.shape for pixels, labels in stream.in_order(batch_size=4)]
        [torch.Size([4, 3, 32, 32]), torch.Size([2, 3, 32, 32])]
    """
    name = str(source)
    common: dict[str, Any] = {
        "fit": fit,
        "change": Change(recipe, fit, tuple(mean)),
        "skip_unreadable": skip_unreadable,
    }
    opened = open_split(source, split, labels=labels, root=root, download=download)
    report(opened.taken)
    if classes is None and split == "train":
        opened.check_classes()
    names = classes or opened.classes
    here = default_workers() if workers is None else workers
    common |= {"name": name, "classes": names, "labels": opened.labels_in(names)}
    if isinstance(opened, Split):
        return Stream(workers=here, split=opened, index=torch.arange(len(opened)), **common)
    if split == "train":
        most = len(opened.urls) // processes
        if most < max(here if workers is not None else 1, 1):
            raise DataError(
                f"{name!r} has {len(opened.urls)} shards for {processes} processes with {here} workers each, and each "
                "worker needs one: give fewer workers, or cut the data into more shards"
            )
        here = min(here, most)
    return Shards(workers=here, split=opened, processes=processes, **common)


# ---- WebDataset -----------------------------------------------------------------------------------------------------


@dataclass
class Shards(_StreamBase):
    """Images in WebDataset tars, which are read from their start to their end.

    Each epoch draws an order of the tars and deals them out to the workers of all processes; each worker draws the next
    sample from those that it has read ahead, and begins anew when its tars are done. So an epoch may miss some images
    and show others twice, and its order follows from the seed, the epoch and the number of workers.

    Attributes:
        split: Where they are.
        processes: Processes that train.
    """

    split: ShardSplit
    processes: int

    def __len__(self) -> int:
        return len(self.split)

    def subset(self, index: Tensor) -> Shards:
        """Return all of them or none: `train` refuses to hold out a part of what has no numbers."""
        return self if len(index) else replace(self, split=replace(self.split, urls=(), count=0))

    def targets(self) -> Tensor:
        raise DataError(f"the labels of {self.name!r} are known when its shards are read, not before")

    def balanced(self) -> Shards:
        raise DataError(f"{self.name!r} is read from start to end, so its classes cannot be balanced: give false")

    def record(self) -> dict[str, Any]:
        return {**super().record(), "streams": self.processes * max(self.workers, 1)}

    def parts(self, share: Share) -> Iterator[Batch]:
        """Yield training images part after part; with `skip_unreadable` others of a part replace unreadable ones."""
        return self._load(_ShardReader(self, share, 0), training=True, batch_size=None)

    def in_order(self, batch_size: int) -> Iterable[Batch]:
        load = partial(self._load, _ShardReader(self, None, batch_size), training=False, batch_size=None)
        return _Sized(load, math.ceil(len(self) / batch_size))


@dataclass(frozen=True)
class _ShardReader(IterableDataset[Any]):
    """Yields the batches of one worker: its part of a training epoch, or without a share its part of all samples."""

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
        each = len(share.own)
        done, total = share.steps.start * each, share.steps.stop * each
        # The loader asks the workers in turn, beginning with the first: after an interruption, too, each part must come
        # from the stream that it came from.
        stream = (done + worker) % workers
        process = share.own.start // each
        samples = self._endless(share, process * workers + stream)
        for number in range(stream, total, workers):
            chosen = list(itertools.islice(samples, share.batch_size // share.parts))
            if number < done:
                continue
            part = number // each * share.parts + share.own.start + number % each
            decoded = []
            for i, sample in enumerate(chosen):
                seed_all(share.seed, share.epoch, part, i, -1)
                decoded.append(self._decode(sample, self.shards.change))
            read = [d for d in decoded if d[0] is not None]
            filled = itertools.cycle(read) if read else itertools.repeat(decoded[0])
            yield _collate([d if d[0] is not None else (*next(filled)[:2], d[2]) for d in decoded])

    def _endless(self, share: Share, stream: int) -> Iterator[dict[str, Any]]:
        for turn in itertools.count():
            urls = list(self.shards.split.urls)
            random.Random(repr((share.seed, share.epoch, turn))).shuffle(urls)
            rng = random.Random(repr((share.seed, share.epoch, turn, stream)))
            empty = True
            for sample in self.shards.split.samples(urls[stream :: self.shards.record()["streams"]], rng):
                empty = False
                yield sample
            if empty:
                raise DataError("a tar without samples")

    def _validate(self, worker: int, workers: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        samples = self.shards.split.samples(self.shards.split.urls[worker::workers])
        while chosen := list(itertools.islice(samples, self.batch_size)):
            yield _collate([self._decode(sample, self.shards.fit) for sample in chosen])

    def _decode(self, sample: dict[str, Any], prepare: Prepare) -> Decoded:
        try:
            return *self.shards.split.decode(sample, prepare), []
        except DataError as error:
            return None, 0, [str(error)]
