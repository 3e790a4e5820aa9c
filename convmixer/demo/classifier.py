"""What the page shows of one model: classes, the class activation map of the first, and the time of each backend."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from convmixer.data.images import read_image
from convmixer.errors import ArgumentError, ConvMixerError
from convmixer.factory import open_model
from convmixer.inference import Prediction, label_names, predict
from convmixer.plots import class_activation
from convmixer.registry import get_variant, list_pretrained
from convmixer.runtime.choose import available_backends, candidates, check_backend, find_backend
from convmixer.runtime.optimize import optimize
from convmixer.runtime.timing import time_calls
from convmixer.transforms import preprocessing
from convmixer.wrappers import find_model, in_channels

TOP = 5
MAP_SIDE = 448  # pixels of the class activation map
SECONDS = 0.2  # for all timed calls of a backend


@dataclass(frozen=True)
class Answer:
    """What a model predicts for an image.

    Attributes:
        predictions: `[(label, probability), ...]`, most probable first, at most five.
        activation: The class activation map of the first one, drawn over what the model sees of the image.
    """

    predictions: Prediction
    activation: Image.Image


@dataclass(frozen=True)
class BackendTime:
    """How long a backend takes for one image, prepared and in memory.

    Attributes:
        backend: As in `optimize(backend=...)`.
        milliseconds: Median of the calls; None if the backend failed.
        failure: Why there is no time.
    """

    backend: str
    milliseconds: float | None
    failure: str = ""


class Classifier:
    """A model of the page. Several threads may use it.

    Args:
        model: A classifier of images with 1 or 3 channels.
        backends: The backends to time; None: all that can compute the model here except "compile", which compiles for
            minutes.

    Attributes:
        labels: Class names by index.
        backends: The backends that `time_backends` times.

    Raises:
        ArgumentError: The model has no classes or takes other channels, or a backend is unknown or does not
            compute the model here.
        DependencyError: A backend is not installed.
    """

    def __init__(self, model: nn.Module, *, backends: Sequence[str] | None = None) -> None:
        self.model = find_model(model)
        self.labels = label_names(self.model)
        self.channels = in_channels(self.model)
        if self.channels not in (1, 3):
            raise ArgumentError(f"this model takes images with {self.channels} channels: a picture has 3, or 1 if grey")
        weight = next(self.model.parameters())
        if backends is None:
            found = available_backends(weight.device, weight.dtype)
            refuses = [name for name in found if find_backend(name).refuses(self.model, weight.dtype)]
            backends = [name for name in found if name != "compile" and name not in refuses]
        if isinstance(backends, str):
            raise ArgumentError(f"backends={backends!r}: give a list of names")
        for name in backends:
            check_backend(name)
            candidates(name, self.model, weight.device, weight.dtype)  # raises
        self.backends = tuple(backends)
        self._optimized: dict[str, Any] = {}
        self._building = threading.Lock()

    def classify(self, image: Any) -> Answer:
        """Classify an image; every pixel is decoded, as by `predict(draft=False)`.

        Args:
            image: Whatever `read_image` takes.

        Raises:
            ImageError: The image cannot be read.
            DependencyError: captum or matplotlib is not installed.
        """
        opened = read_image(image, self.channels)
        activation = class_activation(self.model, opened, side=MAP_SIDE)
        return Answer(predict(self.model, opened, TOP), activation.overlay())

    def time_backends(self) -> Iterator[BackendTime]:
        """Time each backend on one image of noise. The first call builds the backends.

        If one fails, the others are timed all the same.
        """
        for backend in self.backends:
            try:
                yield BackendTime(backend, self._milliseconds(backend))
            except ConvMixerError as error:
                yield BackendTime(backend, None, str(error))
            except Exception as error:  # of a backend's library
                yield BackendTime(backend, None, f"{type(error).__name__}: {error}")

    @torch.inference_mode()
    def _milliseconds(self, backend: str) -> float:
        """Return the median time of a call, in milliseconds; build the backend first if that has not been done."""
        with self._building:
            if backend not in self._optimized:
                self._optimized[backend] = optimize(self.model, backend=backend)
        weight, optimized = next(self.model.parameters()), self._optimized[backend]
        image = torch.randn(1, *preprocessing(self.model)["input_size"], device=weight.device, dtype=weight.dtype)
        return 1000 * statistics.median(time_calls(lambda: optimized(image), SECONDS, weight.device))


def packaged_models() -> list[str]:
    """Return the names of the weights that ship with the package, first the ones that `convmixer predict` uses."""
    names = [name for name in list_pretrained() if (weights := get_variant(name)[1]) and weights.path]
    return sorted(names, key=lambda name: name != "convmixer_256_8.cifar10")


def open_classifiers(
    models: Sequence[str] | Mapping[str, str] = (), *, device: str = "auto", backends: Sequence[str] | None = None
) -> dict[str, Classifier]:
    """Open models, and return them by the names that the page shows.

    Args:
        models: Names of `create_model`, folders of finished runs of `convmixer train`, or .safetensors files; or a
            mapping from the name that the page shows to one of these. Without any, the weights that ship with the
            package.
        device: As in `create_model`.
        backends: As in `Classifier`.

    Raises:
        ArgumentError: `models` is a string instead of a list.
        UnknownModelError: There is no such folder, file or model.
        ConvMixerError: A model cannot be opened, or as `Classifier`.

    Example:
        >>> from convmixer.demo import open_classifiers
        >>> models = open_classifiers({"small": "convmixer_128_8_ks7_p2"}, device="cpu", backends=())
        >>> models["small"].classify("cat.png").predictions[0][0]
        'cat'
    """
    if isinstance(models, str):
        raise ArgumentError(f"models={models!r}: give a list of names, or a mapping from the names that the page shows")
    models = models or packaged_models()
    named = models if isinstance(models, Mapping) else {name: name for name in models}
    return {name: Classifier(open_model(source, device=device), backends=backends) for name, source in named.items()}
