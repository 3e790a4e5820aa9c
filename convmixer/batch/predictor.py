"""From a part of a source to its file: workers decode batches, the model computes them, rows are written."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from convmixer.data.parts import Parts
from convmixer.data.workers import default_workers, load
from convmixer.errors import DataError, optional
from convmixer.files import write_atomically
from convmixer.inference import Preparation, compute, top_classes

ROW_GROUP = 8192  # rows that are compressed together, and kept in memory until then

Item = tuple[str, Any]  # the name of an image, and what `Parts.decode` takes


def import_pyarrow(module: str = "pyarrow") -> Any:
    """Return pyarrow or a module of it; raise a DependencyError if it is not installed."""
    return optional(module, "predict_dataset", "batch")


class Decoded(NamedTuple):
    """A decoded batch, whose images are all of one part.

    Attributes:
        part: The number of the part.
        names: The names of all images.
        images: The images that could be read, (N, C, H, W); None if none could.
        errors: Why the others could not, by position in `names`.
        end: Why the source cannot be read further.
    """

    part: int
    names: list[str]
    images: Tensor | None
    errors: dict[int, str]
    end: DataError | None = None


@dataclass(frozen=True)
class _Decoder(Dataset[Decoded]):
    """Decodes batches, as a worker of a DataLoader asks for them: by the number of their part, and their images."""

    source: Parts
    prepare: Preparation

    def __getitem__(self, batch: tuple[int, list[Item] | DataError]) -> Decoded:
        part, items = batch
        if isinstance(items, DataError):
            return Decoded(part, [], None, {}, items)
        tensors, errors = [], {}
        for i, (_, item) in enumerate(items):
            try:
                tensors.append(self.source.decode(item, self.prepare))
            except DataError as error:
                errors[i] = str(error)
        return Decoded(part, [name for name, _ in items], torch.stack(tensors) if tensors else None, errors)


def _uncollated(batch: Any) -> Any:
    """Return what a worker decoded: it is a batch already."""
    return batch


@dataclass(frozen=True)
class Answers:
    """The columns of a table that hold a model's answers: classes or embeddings.

    Attributes:
        labels: Names of the classes; empty for embeddings.
        topk: Number of classes in a row.
    """

    labels: tuple[str, ...]
    topk: int

    def schema(self) -> Any:
        """Return names and types of all columns of a file, a pyarrow.Schema."""
        arrow: Any = import_pyarrow()
        if self.labels:
            columns = {
                "label": arrow.string(),
                "probability": arrow.float32(),
                "labels": arrow.list_(arrow.string()),
                "probabilities": arrow.list_(arrow.float32()),
            }
        else:
            # Not of a fixed length: pyarrow up to 25 cannot read nulls of such lists.
            columns = {"embedding": arrow.list_(arrow.float32())}
        return arrow.schema({"image": arrow.string(), **columns, "error": arrow.string()})

    def columns(self, outputs: Tensor) -> list[Any]:
        """Return the columns between image and error, pyarrow arrays, for outputs (N, classes) or (N, width)."""
        arrow: Any = import_pyarrow()
        if not self.labels:
            return [_lists(arrow.array(outputs.cpu().numpy().ravel()), outputs.shape[1])]
        values, indices = (tensor.cpu().numpy() for tensor in top_classes(outputs, self.topk))
        names = arrow.array([_escaped(label) for label in self.labels], arrow.string())
        return [
            names.take(arrow.array(indices[:, 0])),
            arrow.array(values[:, 0]),
            _lists(names.take(arrow.array(indices.ravel())), self.topk),
            _lists(arrow.array(values.ravel()), self.topk),
        ]


def _lists(values: Any, length: int) -> Any:
    """Cut a pyarrow.Array into lists of a length."""
    arrow: Any = import_pyarrow()
    return arrow.ListArray.from_arrays(arrow.array(range(0, len(values) + 1, length), arrow.int32()), values)


@dataclass(frozen=True)
class Predictor:
    """Computes parts of a source and writes their files. It can be sent to processes that see the same files.

    Attributes:
        source: The images.
        output: The folder for the files.
        answers: The columns of the files.
        prepare: Turns an image into what the model takes.
        batch_size: Images computed at a time; a batch has images of one part only.
        workers: Processes that decode; 0 decodes in this one; None: one per core.
    """

    source: Parts
    output: Path
    answers: Answers
    prepare: Preparation
    batch_size: int
    workers: int | None

    def file(self, part: int) -> Path:
        """Return the path of a part's file."""
        return self.output / f"part-{part:05}.parquet"

    def write(self, model: nn.Module, parts: Iterable[int], advance: Callable[[int], object]) -> None:
        """Write the files of parts, one after the other.

        Args:
            model: The optimized model.
            parts: The numbers of the parts.
            advance: Called after each batch with its number of images.

        Raises:
            DataError: The source cannot be read further, or a worker died. Files that were written before stay.
            WriteError: The disk is full, or the folder takes no files.
        """
        with contextlib.closing(self._load(model, parts)) as loaded:
            for part, batches in itertools.groupby(loaded, key=lambda batch: batch.part):
                write_atomically(self.file(part), lambda path, b=batches: self._write_file(path, model, b, advance))  # type: ignore[misc]

    def _load(self, model: nn.Module, parts: Iterable[int]) -> Generator[Decoded]:
        """Yield the decoded batches of parts, in order; workers decode ahead of the model."""
        return load(
            _Decoder(self.source, self.prepare),
            self.source.name,
            sampler=self._items(parts),
            batch_size=None,
            collate_fn=_uncollated,
            num_workers=default_workers() if self.workers is None else self.workers,
            pin_memory=next(model.parameters()).is_cuda,
        )

    def _items(self, parts: Iterable[int]) -> Iterator[tuple[int, list[Item] | DataError]]:
        """Yield the batches of parts.

        An error of the source comes instead of a batch. Raised here, ahead of the model, it would end the loader before
        the batches that workers decode already.
        """
        for part in parts:
            try:
                for batch in self._batches(part):
                    yield part, batch
            except DataError as error:
                yield part, error
                return

    def _batches(self, part: int) -> Iterator[list[Item]]:
        """Yield the images of a part by batches. An empty part is one empty batch, so that its file is written, too."""
        items = self.source.read(part)
        yield list(itertools.islice(items, self.batch_size))
        while batch := list(itertools.islice(items, self.batch_size)):
            yield batch

    def _write_file(
        self, path: Path, model: nn.Module, batches: Iterable[Decoded], advance: Callable[[int], object]
    ) -> None:
        """Compute the batches of a part, and write their rows into a file."""
        arrow: Any = import_pyarrow()
        parquet: Any = import_pyarrow("pyarrow.parquet")
        schema = self.answers.schema()
        with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            waiting: list[Any] = []
            for batch in batches:
                if batch.end is not None:
                    raise batch.end
                waiting.append(self._rows(model, batch, arrow, schema))
                if sum(map(len, waiting)) >= ROW_GROUP:
                    writer.write_table(arrow.Table.from_batches(waiting, schema))
                    waiting = []
                advance(len(batch.names))
            if waiting:
                writer.write_table(arrow.Table.from_batches(waiting, schema))

    def _rows(self, model: nn.Module, batch: Decoded, arrow: Any, schema: Any) -> Any:
        """Return a row for each image, a pyarrow.RecordBatch; where the image could not be read, answers are null."""
        count = len(batch.names)
        texts = [batch.errors.get(i) for i in range(count)]
        errors = arrow.array([text if text is None else _escaped(text) for text in texts], arrow.string())
        names = arrow.array([_escaped(name) for name in batch.names], arrow.string())
        if batch.images is None:
            answers = [arrow.nulls(count, field.type) for field in list(schema)[1:-1]]
        else:
            answers = self.answers.columns(compute(model, batch.images))
            if batch.errors:
                positions = iter(range(count))  # of readable images in the model's output
                taken = [None if i in batch.errors else next(positions) for i in range(count)]
                answers = [column.take(arrow.array(taken, arrow.int64())) for column in answers]
        return arrow.RecordBatch.from_arrays([names, *answers, errors], schema=schema)


def _escaped(text: str) -> str:
    """Return a text, such as a file name, with escapes for what is not UTF-8, which is all that Parquet stores."""
    return text.encode("utf-8", "backslashreplace").decode()
