"""`predict_dataset`: classify or embed all images of a source, into Parquet files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from convmixer.batch.cluster import check_address, write_on_ray
from convmixer.batch.manifest import claim, describe_model, reserve
from convmixer.batch.predictor import Answers, Predictor, import_pyarrow
from convmixer.data.parquet import ParquetImages
from convmixer.data.parts import Parts, open_parts
from convmixer.errors import ArgumentError, DataError, check_count, optional
from convmixer.files import remove_leftovers
from convmixer.inference import label_names, preparation
from convmixer.model import as_dtype
from convmixer.runtime.choose import check_backend
from convmixer.runtime.folding import find_convmixer
from convmixer.runtime.optimize import optimize
from convmixer.wrappers import copy_module, find_model


@dataclass(frozen=True)
class Summary:
    """What `predict_dataset` left in a folder.

    Attributes:
        images: Rows in all files.
        errors: Rows of images that could not be read.
        files: Number of Parquet files.
        kept: Rows that an earlier run wrote.
        seconds: Time that this run took to compute and write, without its preparation.
        choice: What computed the model.
    """

    images: int
    errors: int
    files: int
    kept: int
    seconds: float
    choice: str

    @property
    def images_per_second(self) -> float:
        """Images of this run per second, with reading, decoding and writing; 0 if it had nothing to do."""
        return (self.images - self.kept) / self.seconds if self.images > self.kept else 0.0


def predict_dataset(
    model: nn.Module,
    data: str | Path,
    output: str | Path,
    *,
    split: str | None = None,
    embed: bool = False,
    topk: int = 5,
    batch_size: int = 64,
    rows_per_file: int = 10_000,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    draft: bool = True,
    workers: int | None = None,
    ray: bool | str = False,
    actors: int | None = None,
    image_column: str | None = None,
    key_column: str | None = None,
    data_root: str | Path | None = None,
    download: bool = False,
    progress: Callable[[int, int | None], object] = lambda done, total: None,
    report: Callable[[str], None] = print,
) -> Summary:
    """Classify or embed all images of a source, and write a row for each into Parquet files.

    The columns are `image` (its name in the source), then `label`, `probability`, `labels` and `probabilities` (the
    `topk` most probable classes, most probable first), or with `embed` the `embedding`; last `error`. An image that
    cannot be read has its error there, and null in all other columns but `image`. `part-00000.parquet` and so on hold
    the rows in the order of the source. A file is written whole or not at all.

    If a run was interrupted, the same call resumes it: it keeps the files that exist, and writes the others.
    `_manifest.json` in the folder makes sure that source, model and settings are the same.

    Args:
        model: A model from `create_model`, as `optimize` takes it.
        data: A folder or a .tar with images at any depth; a table with the columns image and label; Parquet files with
            the bytes of images (a file, a folder or a pattern); WebDataset shards (`wds/...`); a data set of the Hub
            (`hfds/...`) or of torchvision (`torch/...`).
        output: A folder, which is created if it does not exist. On Ray, all machines must see it and `data`.
        split: A split of `data`. None takes all images of a folder, tar or table, and the only split of another source.
        embed: Write the pooled features in front of the head, (head_hidden_size,) each, instead of classes.
        topk: Number of classes in a row, at most all of them.
        batch_size: Images computed at a time.
        rows_per_file: Images in a file. A shard of a WebDataset becomes one file, whatever its size.
        backend: As in `optimize`.
        dtype: As in `optimize`, but not int8.
        draft: Decode large JPEG photographs at a reduced scale; see `predict`.
        workers: Processes that decode; 0 decodes in the process that computes. None: one per core; on Ray one fewer
            than the cores of an actor.
        ray: Compute on Ray Data, with a pool of actors: True for the cluster that `ray.init()` finds or starts, or an
            address. Each actor computes on a GPU if the cluster has any, and else on CPUs.
        actors: Number of actors; None: one per GPU, without GPUs one per machine.
        image_column: The column of Parquet files with the images; None: the only one with bytes, or one called image.
        key_column: The column that names them; None: key, path, file_name or id, or else file and row are their names.
        data_root: Where downloaded data sets lie; see `validate`.
        download: Let `torch/` data sets download what is missing.
        progress: Called as `progress(done, total)`, in rows; `total` is None where nothing says it.
        report: Takes a line that says what is read, and one that says what an earlier run has written.

    Returns:
        The numbers of rows and of errors, and the time.

    Raises:
        ArgumentError: An argument makes no sense, or the folder holds something else or another run.
        DataError: The source cannot be found or read.
        WriteError: The folder takes no files, or the disk is full.
        DependencyError: pyarrow, Ray or the backend is not installed.
        ConvMixerError: Ray failed (the same call resumes the run), or the model answered NaN or infinity.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> options = {"split": "test", "workers": 0, "backend": "eager", "report": lambda line: None}
        >>> summary = convmixer.predict_dataset(model, "data/flowers", "predictions", topk=1, **options)
        >>> summary.images
        6
    """
    _check_counts(topk, batch_size, rows_per_file, workers, actors)
    chosen = _check_backend(backend, dtype)
    import_pyarrow()
    _check_ray(ray, actors)
    model = find_model(model)
    computed, answers = _answering(model, embed, topk)
    prepare = preparation(model, draft=draft)
    source = open_parts(
        data,
        split,
        rows=rows_per_file,
        image_column=image_column,
        key_column=key_column,
        root=data_root,
        download=download,
    )
    folder = Path(os.path.abspath(os.path.expanduser(output)))
    _check_apart(source, folder)
    report(source.taken)
    compute_type = next(model.parameters()).dtype if chosen is None else chosen
    speed_up = partial(optimize, backend=backend, dtype=compute_type)
    fast = None if ray else speed_up(computed)  # before anything is written: it may raise an error
    predictor = Predictor(source, folder, answers, prepare, batch_size, workers)
    settings: dict[str, Any] = {"embed": embed, "topk": answers.topk, "rows_per_file": rows_per_file, "draft": draft}
    settings |= {"backend": backend, "dtype": str(compute_type).removeprefix("torch.")}
    with reserve(folder):
        record = {"source": source.record(), "model": describe_model(model, answers.labels), "settings": settings}
        claim(folder, record)
        counts = _count_existing(predictor, report)
        kept = sum(rows for rows, _ in counts.values())
        missing = [part for part in range(len(source)) if part not in counts]
        advance = _Counter(kept, source.count, progress)
        begun = time.perf_counter()
        if missing and fast is not None:
            predictor.write(fast, missing, advance)
        elif missing:
            address = ray if isinstance(ray, str) else None
            portable = copy_module(computed).cpu()  # a copy: the caller's model stays on its device
            write_on_ray(predictor, portable, speed_up, missing, address=address, actors=actors, advance=advance)
        seconds = time.perf_counter() - begun
        counts |= {part: _count_written(predictor, part) for part in missing}
    images, errors = (sum(column) for column in zip(*counts.values(), strict=True))
    if source.count not in (None, images):
        raise DataError(
            f"{source.name!r} should have {source.count} samples and has {images}: correct the number. All {images} "
            f"rows are in {str(folder)!r}"
        )
    choice = "actors on Ray" if fast is None else str(getattr(fast, "choice", "eager, the folded module"))
    return Summary(images, errors, len(counts), kept, seconds, choice)


def _check_counts(topk: int, batch_size: int, rows_per_file: int, workers: int | None, actors: int | None) -> None:
    """Raise ArgumentError for a number that makes no sense."""
    counts = {"topk": topk, "batch_size": batch_size, "rows_per_file": rows_per_file}
    for name, count in (counts if actors is None else {**counts, "actors": actors}).items():
        check_count(name, count)
    if workers is not None:
        check_count("workers", workers, least=0)


def _check_backend(backend: str, dtype: torch.dtype | str | None) -> Any:
    """Return the type to compute in, None for the model's, or "auto".

    `optimize` checks the rest, but on Ray only in another process.
    """
    check_backend(backend)
    kind = as_dtype(dtype)
    if kind == torch.int8:
        raise ArgumentError("dtype=int8 needs images for calibration: give bfloat16, float32 or auto")
    if not (kind is None or kind == "auto" or isinstance(kind, torch.dtype)):
        raise ArgumentError(f"dtype={dtype!r}: give a floating point type such as 'bfloat16', or 'auto'")
    return kind


def _check_ray(ray: bool | str, actors: int | None) -> None:
    """Raise an error if Ray is missing or does not answer at its address, or for actors without Ray."""
    if ray:
        optional("ray", "predict_dataset(ray=...)", "ray")
        if isinstance(ray, str):
            check_address(ray)
    elif actors is not None:
        raise ArgumentError(f"actors={actors} is for Ray: add ray=True, or an address")


def _check_apart(source: Parts, output: Path) -> None:
    """Raise ArgumentError if the next call would take the files of this one for images."""
    whole = source.name if os.path.isdir(source.name) else source.name.partition("**")[0]
    deep = whole == source.name or "**" in source.name
    read = isinstance(source.images, ParquetImages) and deep
    if read and os.path.isdir(whole) and Path(os.path.realpath(output)).is_relative_to(os.path.realpath(whole)):
        raise ArgumentError(
            f"{str(output)!r} would be read as a part of {source.name!r}: give a folder beside the data, and remove "
            "the files that an earlier run has left"
        )


def _answering(model: nn.Module, embed: bool, topk: int) -> tuple[nn.Module, Answers]:
    """Return the model that computes the answers, for embeddings one without a head, and the columns they go into."""
    inner: Any = find_convmixer(model)
    if isinstance(model, FeatureGetterNet):
        raise ArgumentError("this model returns feature maps: build it without features_only")
    if not embed:
        labels = label_names(model)
        return model, Answers(labels, min(topk, len(labels)))
    if inner.global_pool.is_identity():
        raise ArgumentError("this model has no pooling, so its features are maps: build it with global_pool='avg'")
    headless = copy_module(inner)
    headless.reset_classifier(0)
    return headless, Answers((), 0)


class _Counter:
    """Adds up images, and calls `progress` with the sum and the total."""

    def __init__(self, done: int, total: int | None, progress: Callable[[int, int | None], object]) -> None:
        self.done, self.total, self.progress = done, total, progress
        progress(done, total)

    def __call__(self, count: int) -> None:
        self.done += count
        self.progress(self.done, self.total)


def _count_existing(predictor: Predictor, report: Callable[[str], None]) -> dict[int, tuple[int, int]]:
    """Return `_count_rows` of the parts that have a file; remove the leftovers of a run that was killed."""
    remove_leftovers(predictor.output, "part-*.parquet")
    total = len(predictor.source)
    counts = {part: found for part in range(total) if (found := _count_rows(predictor, part))}
    if counts:
        rows = sum(rows for rows, _ in counts.values())
        report(f"{len(counts):,} of {total:,} files exist already, with {rows:,} rows, and are kept")
    return counts


def _count_rows(predictor: Predictor, part: int) -> tuple[int, int] | None:
    """Return the number of rows in the file of a part, and how many of them are errors; None if there is no file.

    Raises:
        DataError: The file cannot be read, or has another number of rows than the part has images.
    """
    file, parquet = predictor.file(part), import_pyarrow("pyarrow.parquet")
    if not file.exists():
        return None
    try:
        metadata = parquet.read_metadata(file)
        column = metadata.schema.names.index("error")
        groups = [g for i in range(metadata.num_row_groups) if (g := metadata.row_group(i)).num_rows]
        errors = sum(group.num_rows - group.column(column).statistics.null_count for group in groups)
    except Exception as error:  # pyarrow's, and the disk's
        raise DataError(f"cannot read {str(file)!r}: {type(error).__name__}: {error}. Delete it to write it") from error
    expected = predictor.source.size(part)
    if expected not in (None, metadata.num_rows):
        raise DataError(f"{str(file)!r} has {metadata.num_rows} rows instead of {expected}: delete it to write it")
    return metadata.num_rows, errors


def _count_written(predictor: Predictor, part: int) -> tuple[int, int]:
    """Return `_count_rows` of a part that has just been written, here or on another machine."""
    counts = _count_rows(predictor, part)
    if counts is None:
        raise DataError(
            f"{str(predictor.file(part))!r} was written, but this machine does not see it: give a shared folder"
        )
    return counts
