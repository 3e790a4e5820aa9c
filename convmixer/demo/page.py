"""The page, in Gradio's components. Import this module only where Gradio is installed."""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from convmixer.demo.classifier import TOP, BackendTime, Classifier
from convmixer.demo.text import bars_by_label, describe, table_of_times
from convmixer.errors import ConvMixerError

PHOTOGRAPHS = Path(__file__).parent / "photographs"
CSS = """
.times.times table { width: 100%; border: none; }
.times.times :is(tr, th, td) { border: none; border-bottom: 1px solid var(--border-color-primary); }
[role="alert"] { margin: 0; color: var(--error-text-color); font-weight: 600; }
"""
DELETED_AFTER = 3600  # seconds that uploaded pictures are kept
INTERVAL = 0.5  # seconds between updates of the times, until they are complete
AT_ONCE = 4  # pictures that are classified at a time


@dataclass
class Shown:
    """The picture that a visitor sees classified.

    Attributes:
        model: As the page names it.
        path: Path of the uploaded file.
        times: Times of the model's backends, as they become known.
        gone: Whether the visitor has another picture or model by now; then nobody waits for the times.
    """

    model: str
    path: str
    times: list[BackendTime] = field(default_factory=list)
    gone: bool = False


def theme() -> Any:
    """Return Gradio's theme "Soft" in the fonts of the reader's system, so that browsers fetch none."""
    return gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
        font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
    )


class _Callbacks:
    """What the components of the page call, with values as Gradio sends them."""

    def __init__(self, classifiers: Mapping[str, Classifier]) -> None:
        self.classifiers = classifiers
        self.classifying = threading.Semaphore(AT_ONCE)
        self.timing = ThreadPoolExecutor(1)  # whoever asks: backends that are timed together share the processor

    def about(self, name: str) -> str:
        return describe(self.classifiers[name])

    def update(self, name: str, file: dict[str, Any] | None, shown: Shown | None) -> tuple[Any, ...]:
        """Classify the picture if a visitor does not see it yet; else only complete the times."""
        path = (file["path"] or "") if file else None
        if shown and (shown.model, shown.path) == (name, path):
            return gr.skip(), gr.skip(), gr.skip(), *self._times(shown), shown
        if shown:
            shown.gone = True
        if path is None:
            return _cleared("")
        try:
            with self.classifying:
                answer = self.classifiers[name].classify(Path(path))  # a text could be a URL
        except ConvMixerError as error:
            return _cleared(str(error).replace(path, os.path.basename(path)))
        shown = Shown(name, path)
        self.timing.submit(self._measure, shown)
        return bars_by_label(answer.predictions), answer.activation, _alert(""), *self._times(shown), shown

    def _measure(self, shown: Shown) -> None:
        rows = self.classifiers[shown.model].time_backends()
        while not shown.gone and (row := next(rows, None)):
            shown.times.append(row)

    def _times(self, shown: Shown) -> tuple[str, Any]:
        rows = list(shown.times)
        waiting = self.classifiers[shown.model].backends[len(rows) :]
        return table_of_times(shown.model, rows, waiting), gr.Timer(active=bool(waiting))


def build_page(classifiers: Mapping[str, Classifier]) -> Any:
    """Build the page for models, by the names that it shows; the first one is selected at the beginning."""
    names, callbacks = list(classifiers), _Callbacks(classifiers)
    with gr.Blocks(title="convmixer", analytics_enabled=False, delete_cache=(DELETED_AFTER, DELETED_AFTER)) as page:
        gr.Markdown("# convmixer\nDrop a picture, and see what a ConvMixer takes it for, and why.")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "webcam", "clipboard"], height=340, buttons=[])
                alert = gr.HTML(visible=False)
                gr.Examples([[str(path)] for path in sorted(PHOTOGRAPHS.glob("*.jpg"))], picture, cache_examples=False)
                model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
                about = gr.Markdown(callbacks.about(names[0]))
            with gr.Column():
                bars = gr.Label(label=f"Top {TOP}", num_top_classes=TOP)
                activation = gr.Image(
                    label="Regions that support it",
                    height=340,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    alt_text="The regions of the picture that support the first class",
                )
                times = gr.Markdown(elem_classes="times")
        timer = gr.Timer(INTERVAL, active=False)
        shown = gr.State(None)
        # Without Gradio's queue: its stream of events can close while a picture joins, and then no answer ever comes.
        model.change(callbacks.about, model, about, show_progress="hidden", queue=False)
        gr.on(
            [picture.change, model.change, timer.tick],
            callbacks.update,
            [model, picture, shown],
            [bars, activation, alert, times, timer, shown],
            api_name="classify",
            preprocess=False,  # Gradio checks the file's path; this package reads it, with its own errors
            trigger_mode="always_last",
            show_progress="hidden",
            queue=False,
        )
    return page


def _cleared(error: str) -> tuple[Any, ...]:
    """Return the outputs of `update` without a picture, or for one that cannot be read."""
    return {}, None, _alert(error), "", gr.Timer(active=False), None


def _alert(text: str) -> Any:
    return gr.update(value=f'<p role="alert">{html.escape(text)}</p>', visible=bool(text))
