"""The page, in Gradio's components. Import this module only where Gradio is installed."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping
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


def theme() -> Any:
    """Return Gradio's theme "Soft" in the fonts of the reader's system, so that browsers fetch none."""
    return gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
        font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
    )


def build_page(classifiers: Mapping[str, Classifier]) -> Any:
    """Build the page for models, by the names that it shows; the first one is selected at the beginning."""
    names = list(classifiers)

    def about_model(name: str) -> str:
        return describe(classifiers[name])

    def classify(name: str, file: dict[str, Any] | None, latest: dict[str, int]) -> tuple[Any, ...]:
        latest["number"] = number = latest["number"] + 1
        if file is None:
            return {}, None, _alert(""), "", 0
        path = file["path"] or ""
        try:
            answer = classifiers[name].classify(Path(path))  # a text could be a URL
        except ConvMixerError as error:
            return {}, None, _alert(str(error).replace(path, os.path.basename(path))), "", 0
        return bars_by_label(answer.predictions), answer.activation, _alert(""), "", number

    def time(name: str, number: int, latest: dict[str, int]) -> Iterator[str]:
        if not number:  # no picture, or a broken one
            yield ""
            return
        rows: list[BackendTime] = []
        backends = classifiers[name].backends
        yield table_of_times(name, rows, backends)
        for row in classifiers[name].time_backends():
            if number != latest["number"]:  # the picture has gone meanwhile
                yield ""
                return
            rows.append(row)
            yield table_of_times(name, rows, backends[len(rows) :])

    with gr.Blocks(title="convmixer", analytics_enabled=False, delete_cache=(DELETED_AFTER, DELETED_AFTER)) as page:
        gr.Markdown("# convmixer\nDrop a picture, and see what a ConvMixer takes it for, and why.")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "webcam", "clipboard"], height=340, buttons=[])
                alert = gr.HTML(visible=False)
                gr.Examples([[str(path)] for path in sorted(PHOTOGRAPHS.glob("*.jpg"))], picture, cache_examples=False)
                model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
                about = gr.Markdown(about_model(names[0]))
            with gr.Column():
                bars = gr.Label(label=f"Top {TOP}", num_top_classes=TOP)
                activation = gr.Image(
                    label="What speaks for it",
                    height=340,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    alt_text="The regions of the picture that support the first class",
                )
                times = gr.Markdown(elem_classes="times")
        latest = gr.State({"number": 0})  # of the last answer of this visitor; running functions see it change
        answered = gr.State(0)  # that number; 0 without a picture that could be read
        model.change(about_model, model, about, show_progress="hidden")
        event = gr.on(
            [picture.change, model.change],
            classify,
            [model, picture, latest],
            [bars, activation, alert, times, answered],
            preprocess=False,  # Gradio checks the file's path; this package reads it, with its own errors
            trigger_mode="always_last",
            concurrency_limit=4,
            show_progress="minimal",
        )
        # One at a time, whoever asks: backends that are timed together share the processor.
        event.then(
            time,
            [model, answered, latest],
            times,
            trigger_mode="always_last",  # of the next picture when those of the last one have ended
            concurrency_limit=1,
            show_progress="minimal",
        )
    return page


def _alert(text: str) -> Any:
    return gr.update(value=f'<p role="alert">{html.escape(text)}</p>', visible=bool(text))
