"""From a part of a source to its file: workers decode batch after batch, the model computes, rows are written."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convmixer.data.parts import Parts
from convmixer.data.stream import default_workers, leave_signals_to_the_main_process, watching_workers
from convmixer.errors import DataError, optional
from convmixer.files import write_atomically
from convmixer.inference import Preparation, compute, top_classes

ROW_GROUP = 8192  # rows that are compressed together, and kept in memory until then

Item = tuple[str, Any]  # the name of an image, and what `Parts.decode` takes


class Decoded(NamedTuple):
    """A batch of a part.

    Attributes:
        part: Its number.
        names: Of all images.
        images: Those that could be read, (N, C, H, W); None if none could.
        errors: Why the others could not, by their position.
    """

    part: int
    names: list[str]
    images: Tensor | None
    errors: dict[int, str]


@dataclass(frozen=True)
class _Decoder(Dataset[Decoded]):
    """Decodes batches in worker processes."""

    source: Parts
    prepare: Preparation

    def __getitem__(self, batch: tuple[int, list[Item]]) -> Decoded:
        part, items = batch
        tensors, errors = [], {}
        for i, (_, item) in enumerate(items):
            try:
                tensors.append(self.source.decode(item, self.prepare))
            except DataError as error:
                errors[i] = str(error)
        return Decoded(part, [name for name, _ in items], torch.stack(tensors) if tensors else None, errors)


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Answers:
    """What a model says of images, as columns of a table.

    Attributes:
        labels: Names of the classes; none for embeddings.
        topk: How many classes a row names.
        width: Numbers of an embedding.
    """

    labels: tuple[str, ...]
    topk: int
    width: int

    def schema(self) -> Any:
        """Return the columns of a file, as pyarrow.Schema."""
        arrow: Any = optional("pyarrow", "predict_dataset", "batch")
        if self.labels:
            columns = {
                "label": arrow.string(),
                "probability": arrow.float32(),
                "labels": arrow.list_(arrow.string()),
                "probabilities": arrow.list_(arrow.float32()),
            }
        else:
            columns = {"embedding": arrow.list_(arrow.float32(), self.width)}
        return arrow.schema({"image": arrow.string(), **columns, "error": arrow.string()})

    def columns(self, outputs: Tensor) -> list[Any]:
        """Return what the model answered, (N, classes) or (N, width), as the columns between image and error."""
        arrow: Any = optional("pyarrow", "predict_dataset", "batch")
        if not self.labels:
            return [arrow.FixedSizeListArray.from_arrays(arrow.array(outputs.cpu().numpy().ravel()), self.width)]
        values, indices = (tensor.cpu().numpy() for tensor in top_classes(outputs, self.topk))
        names = arrow.array(self.labels, arrow.string())
        offsets = arrow.array(range(0, values.size + 1, values.shape[1]), arrow.int32())
        return [
            names.take(arrow.array(indices[:, 0])),
            arrow.array(values[:, 0]),
            arrow.ListArray.from_arrays(offsets, names.take(arrow.array(indices.ravel()))),
            arrow.ListArray.from_arrays(offsets, arrow.array(values.ravel())),
        ]


@dataclass(frozen=True)
class Predictor:
    """Writes parts of a source. It can be sent to other processes, which see the same files.

    Attributes:
        source: The images.
        output: The folder that takes a file for each part.
        answers: The columns.
        prepare: From an image to what the model takes.
        batch_size: Images computed at a time; a batch has images of one part.
        workers: Processes that decode; 0 decodes in this one; None: as many as there are cores.
    """

    source: Parts
    output: Path
    answers: Answers
    prepare: Preparation
    batch_size: int
    workers: int | None

    def file(self, part: int) -> Path:
        return self.output / f"part-{part:05}.parquet"

    def write(self, model: nn.Module, parts: Iterable[int], advance: Callable[[int], object]) -> None:
        """Write the files of parts, one after the other.

        Args:
            model: The optimized model.
            parts: Their numbers.
            advance: Called with the number of images whenever some have been computed.

        Raises:
            DataError: A source that cannot be read further, or a worker that died. Files of other parts stay.
            WriteError: The disk is full, or the folder takes no files.
        """
        with watching_workers(self.source.name):
            for part, batches in itertools.groupby(self._load(model, parts), key=lambda batch: batch.part):
                write_atomically(self.file(part), lambda path, b=batches: self._fill(path, model, b, advance))  # type: ignore[misc]

    def _load(self, model: nn.Module, parts: Iterable[int]) -> Iterator[Decoded]:
        """Yield the batches of parts in their order, which workers decode ahead of the model."""
        loader = DataLoader(
            _Decoder(self.source, self.prepare),
            sampler=((part, batch) for part in parts for batch in self._batches(part)),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=default_workers() if self.workers is None else self.workers,
            pin_memory=next(model.parameters()).is_cuda,
            worker_init_fn=leave_signals_to_the_main_process,
            generator=torch.Generator(),  # else the loader draws from the caller's
        )
        return iter(loader)

    def _batches(self, part: int) -> Iterator[list[Item]]:
        """Yield the images of a part by batch; one without images for an empty part, whose file is written too."""
        items = self.source.read(part)
        yield list(itertools.islice(items, self.batch_size))
        while batch := list(itertools.islice(items, self.batch_size)):
            yield batch

    def _fill(self, path: Path, model: nn.Module, batches: Iterable[Decoded], advance: Callable[[int], object]) -> None:
        arrow: Any = optional("pyarrow", "predict_dataset", "batch")
        parquet: Any = optional("pyarrow.parquet", "predict_dataset", "batch")
        schema = self.answers.schema()
        with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            waiting: list[Any] = []
            for batch in batches:
                waiting.append(self._rows(model, batch, arrow, schema))
                if sum(map(len, waiting)) >= ROW_GROUP:
                    writer.write_table(arrow.Table.from_batches(waiting, schema))
                    waiting = []
                advance(len(batch.names))
            if waiting:
                writer.write_table(arrow.Table.from_batches(waiting, schema))

    def _rows(self, model: nn.Module, batch: Decoded, arrow: Any, schema: Any) -> Any:
        """Return a row for each image; where there is an error, what the model would say is null."""
        count = len(batch.names)
        errors = arrow.array([batch.errors.get(i) for i in range(count)], arrow.string())
        names = arrow.array([_valid(name) for name in batch.names], arrow.string())
        if batch.images is None:
            answers = [arrow.nulls(count, field.type) for field in list(schema)[1:-1]]
        else:
            answers = self.answers.columns(compute(model, batch.images))
            if batch.errors:
                read = iter(range(count))
                places = [None if i in batch.errors else next(read) for i in range(count)]
                answers = [column.take(arrow.array(places, arrow.int64())) for column in answers]
        return arrow.RecordBatch.from_arrays([names, *answers, errors], schema=schema)


def _valid(name: str) -> str:
    """Return a name that Parquet holds, which stores UTF-8: what else a file name has is escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
