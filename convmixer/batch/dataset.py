"""`predict_dataset`: classify or embed all images of a source, into Parquet files."""

from __future__ import annotations

import copy
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
from convmixer.batch.predictor import Answers, Predictor
from convmixer.data.parts import open_parts
from convmixer.errors import ArgumentError, DataError, check_count, optional
from convmixer.inference import label_names, preparation
from convmixer.model import as_dtype
from convmixer.runtime.choose import BACKENDS
from convmixer.runtime.folding import find_convmixer
from convmixer.runtime.optimize import optimize
from convmixer.wrappers import find_model


@dataclass(frozen=True)
class Summary:
    """What `predict_dataset` left in a folder.

    Attributes:
        images: Rows in all files.
        errors: Rows of images that could not be read.
        files: Number of Parquet files.
        kept: Rows that an earlier run had written.
        seconds: What this run took from the first part on.
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
        """Images of this run per second, with reading, decoding and writing; 0 if nothing was left to do."""
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
    cannot be read has its error there, and null in the columns before. `part-00000.parquet` and so on hold the rows in
    the order of the source. A file is written whole or not at all.

    If a run was interrupted, the same call goes on where it stopped: files that are there are kept, the others are
    written. `_manifest.json` in the folder makes sure that source, model and settings are the same.

    Args:
        model: A model from `create_model`, as `optimize` takes it.
        data: A folder or a .tar with images at any depth; a table with the columns image and label; Parquet files with
            the bytes of images (a file, a folder or a pattern); WebDataset shards (`wds/...`); a data set of the Hub
            (`hfds/...`) or of torchvision (`torch/...`).
        output: A folder, which is created if it is not there. On several machines all of them must see it, and `data`.
        split: A split of `data`. None takes all images of a folder, tar or table, and the only split of another source.
        embed: Write the pooled features in front of the head, (head_hidden_size,) each, instead of classes.
        topk: Classes of a row, at most all of them.
        batch_size: Images computed at a time.
        rows_per_file: Images of a file. A shard of a WebDataset becomes one file, whatever its size.
        backend: As in `optimize`.
        dtype: As in `optimize`, but not int8.
        draft: Decode large JPEG photographs at a reduced scale; see `predict`.
        workers: Processes that decode; 0 decodes in the process that computes. None: one per core; on Ray one fewer
            than the cores of an actor.
        ray: Compute on Ray Data, with a pool of actors: True for the cluster that `ray.init()` finds or starts, or an
            address. Each actor computes on a GPU if the cluster has some, and else on CPUs.
        actors: Their number; None: one per GPU, without GPUs one per machine.
        image_column: The column of Parquet files with the images; None: the only one with bytes, or one called image.
        key_column: The column that names them; None: key, path, file_name or id, or else file and row are their names.
        data_root: Where downloaded data sets lie; see `validate`.
        download: Let `torch/` data sets download what is missing.
        progress: Called with how many rows are written or computed, and how many there will be if that is known.
        report: Takes a line about what was taken for the source, and one about what an earlier run has done.

    Returns:
        How many rows there are, how many of them errors, and how long it took.

    Raises:
        ArgumentError: An argument that makes no sense, a folder that holds something else or another run.
        DataError: A source that cannot be found or read.
        WriteError: A folder that takes no files, or a full disk.
        DependencyError: pyarrow, Ray or the backend is not installed.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> options = {"split": "test", "workers": 0, "backend": "eager", "report": lambda line: None}
        >>> summary = convmixer.predict_dataset(model, "data/flowers", "predictions", topk=1, **options)
        >>> summary.images
        6
    """
    for name, value in {"topk": topk, "batch_size": batch_size, "rows_per_file": rows_per_file}.items():
        check_count(name, value)
    if actors is not None:
        check_count("actors", actors)
    if workers is not None:
        check_count("workers", workers, least=0)
    chosen = _check_backend(backend, dtype)
    optional("pyarrow", "predict_dataset", "batch")
    if ray:
        optional("ray", "predict_dataset(ray=...)", "ray")
        if isinstance(ray, str):
            check_address(ray)
    elif actors is not None:
        raise ArgumentError(f"actors={actors} is for Ray: add ray=True, or an address")
    model = find_model(model)
    kind = next(model.parameters()).dtype if chosen is None else chosen
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
    report(source.taken)
    folder = Path(os.path.abspath(os.path.expanduser(output)))
    predictor = Predictor(source, folder, answers, prepare, batch_size, workers)
    speed_up = partial(optimize, backend=backend, dtype=kind)
    fast = None if ray else speed_up(computed)  # what is wrong with it is said before anything is written
    settings: dict[str, Any] = {"embed": embed, "topk": answers.topk, "rows_per_file": rows_per_file, "draft": draft}
    settings |= {"backend": backend, "dtype": str(kind).removeprefix("torch.")}
    with reserve(folder):
        record = {"source": source.record(), "model": describe_model(model, answers.labels), "settings": settings}
        claim(folder, record)
        for leftover in folder.glob(".part-*"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        done = {part: counts for part in range(len(source)) if (counts := _count_rows(predictor, part))}
        kept, missing = sum(rows for rows, _ in done.values()), [p for p in range(len(source)) if p not in done]
        if done:
            report(f"{len(done):,} of {len(source):,} files are there already, with {kept:,} rows, and stay")
        advance = _Counter(kept, source.count, progress)
        begun = time.perf_counter()
        if not missing:
            pass
        elif fast is not None:
            predictor.write(fast, missing, advance)
        else:
            address = ray if isinstance(ray, str) else None
            options = {"address": address, "actors": actors, "advance": advance}
            sent = copy.deepcopy(computed).cpu()  # the caller's stays where it is
            write_on_ray(predictor, sent, speed_up, missing, **options)  # type: ignore[arg-type]
        seconds = time.perf_counter() - begun
        done |= {part: _written(predictor, part) for part in missing}
    images, errors = (sum(counts) for counts in zip(*done.values(), strict=True))
    if source.count not in (None, images):
        raise DataError(
            f"{source.name!r} should have {source.count} samples and has {images}: correct the number. All {images} "
            f"rows are in {str(folder)!r}"
        )
    choice = "actors on Ray" if fast is None else str(getattr(fast, "choice", "eager, the folded module"))
    return Summary(images, errors, len(done), kept, seconds, choice)


def _check_backend(backend: str, dtype: torch.dtype | str | None) -> Any:
    """Return the type to compute in, or None or "auto"; `optimize` checks further, but on Ray in another process."""
    if backend not in BACKENDS:
        raise ArgumentError(f"unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")
    kind = as_dtype(dtype)
    if kind == torch.int8:
        raise ArgumentError("dtype=int8 needs images for calibration: give bfloat16, float32 or auto")
    if not (kind is None or kind == "auto" or isinstance(kind, torch.dtype)):
        raise ArgumentError(f"dtype={dtype!r}: give a floating point type such as 'bfloat16', or 'auto'")
    return kind


def _answering(model: nn.Module, embed: bool, topk: int) -> tuple[nn.Module, Answers]:
    """Return the model to compute, and the columns of what it answers."""
    inner: Any = find_convmixer(model)
    if isinstance(model, FeatureGetterNet):
        raise ArgumentError("this model returns feature maps: build it without features_only")
    if not embed:
        labels = label_names(model)
        return model, Answers(labels, min(topk, len(labels)), 0)
    if inner.global_pool.is_identity():
        raise ArgumentError("this model has no pooling, so its features are maps: build it with global_pool='avg'")
    headless = copy.deepcopy(inner)
    headless.reset_classifier(0)
    return headless, Answers((), 0, inner.head_hidden_size)


class _Counter:
    """Adds up images for a progress bar."""

    def __init__(self, done: int, total: int | None, progress: Callable[[int, int | None], object]) -> None:
        self.done, self.total, self.progress = done, total, progress
        progress(done, total)

    def __call__(self, count: int) -> None:
        self.done += count
        self.progress(self.done, self.total)


def _count_rows(predictor: Predictor, part: int) -> tuple[int, int] | None:
    """Count the rows of the file of a part, and those of errors; None if it is not there."""
    file, parquet = predictor.file(part), optional("pyarrow.parquet", "predict_dataset", "batch")
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


def _written(predictor: Predictor, part: int) -> tuple[int, int]:
    counts = _count_rows(predictor, part)
    if counts is None:
        raise DataError(f"{str(predictor.file(part))!r} was written, and cannot be seen here: give a shared folder")
    return counts
