"""Every error that this package raises on purpose.

ConvMixerError
├── ArgumentError          a value that makes no sense (also a ValueError)
├── UnknownModelError      a model or weights name that is not in the registry (also a LookupError)
├── WeightsError           a weights file that is missing, foreign, short, corrupt or non-finite
├── ImageError             an image that cannot be read or does not fit the model
├── DataError              a data set or a run's record that cannot be found or read
├── ExportError            a model that another format cannot hold, or a file that computes something else
├── WriteError             a file or a folder that cannot be written (also an OSError)
├── HubError               the Hugging Face Hub cannot be reached, or refuses an upload
├── DependencyError        an optional library that is not installed (also an ImportError)
└── TrainingStopped        a signal stopped the training, which has saved its state
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType


class ConvMixerError(Exception):
    """Base of every error raised on purpose: the value received, what is valid, what to do next."""


class ArgumentError(ConvMixerError, ValueError):
    """An argument has a value that makes no sense."""


class UnknownModelError(ConvMixerError, LookupError):
    """No model or weights of that name."""


class WeightsError(ConvMixerError):
    """Weights that cannot be found, read or fitted to the model."""


class ImageError(ConvMixerError):
    """An image that cannot be read or does not fit the model."""


class DataError(ConvMixerError):
    """A data set or a run's record that cannot be found or read."""


class ExportError(ConvMixerError):
    """A model that another format cannot hold, or an exported file that does not compute what the model computes."""


class WriteError(ConvMixerError, OSError):
    """A file or a folder that cannot be written."""


class HubError(ConvMixerError):
    """The Hugging Face Hub cannot be reached, or refuses an upload."""


class DependencyError(ConvMixerError, ImportError):
    """An optional library that is not installed."""


class TrainingStopped(ConvMixerError):
    """SIGTERM or SIGINT stopped the training, which has saved its state.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def missing(what: str, modules: Sequence[str], extra: str) -> str:
    """Say that `what` needs modules that are not installed, and which extra of this package brings them."""
    verb = "is" if len(modules) == 1 else "are"
    return f"{what} needs {' and '.join(modules)}, which {verb} missing: pip install 'convmixer[{extra}]'"


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says; "" if it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")


def optional(module: str, what: str, extra: str) -> ModuleType:
    """Import a module of an optional library.

    Raises:
        DependencyError: It is not installed; the text says what needs it and which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        lacking = (error.name or module).partition(".")[0]  # it may be there, and what it needs itself not
        raise DependencyError(missing(what, [lacking], extra)) from error


def is_count(value: object, least: int = 1) -> bool:
    """Return whether a value is a whole number of at least `least`; True and False are not numbers here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_names(name: str, value: object) -> tuple[str, ...]:
    """Return class names by index; raise an ArgumentError for what has no order, or is not a collection of strings."""
    items = value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ArgumentError(f"{name}={brief(repr(value))}: give a list of strings, in the order of the outputs")
    return tuple(map(str, items))


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise an ArgumentError if an argument is not a whole number of at least `least`."""
    if not is_count(value, least):
        raise ArgumentError(f"{name}={value!r}: give a whole number of at least {least}")


def brief(value: object, longest: int = 80) -> str:
    """Return a value from a file for a message: cut if it is long, escaped if a terminal would obey it."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def list_first(items: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """List the first items for a message, and "..." for the others."""
    items = list(items)
    return separator.join([*items[:most], *(["..."] if len(items) > most else [])])


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a sentence that names the nearest valid spellings, or all of them if none is near."""
    valid = sorted(valid)
    name = str(name)[:80]  # comparing takes time that grows with its square
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(valid)}"
