"""Sphinx configuration. Tables of figures are written from the package's own records while the site is built."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import re
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
from docutils.nodes import Node
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from convmixer import registry
from convmixer.plots import plot_confusion, plot_history, write_figure
from convmixer.training import RECIPES, Recipe, recipes
from convmixer.training.history import read_history

project = "convmixer"
author = "The convmixer developers"
release = version = metadata.version("convmixer")
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "runs"]
html_theme = "furo"
html_title = f"convmixer {release}"
html_copy_source = False

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True


# ---- tables from the records ----------------------------------------------------------------------------------------


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def _models() -> str:
    shape = ("dim / depth", "kernel", "patch", "activation", "input", "classes")
    rows = [
        (
            f"`{v.name}`",
            f"{v.dim} / {v.depth}",
            v.kernel_size,
            v.patch_size,
            v.act_layer,
            f"{v.input_size[1]} x {v.input_size[2]}",
            v.num_classes,
            f"{v.parameters / 1e6:.2f} M",
            f"{v.macs / 1e9:.2f} G",
            ", ".join(f"`{w.tag}`" for w in v.weights) or "none",
        )
        for v in registry.VARIANTS
    ]
    return _table(("name", *shape, "parameters", "MACs", "weights"), rows)


def _notes() -> str:
    return "\n".join(f"- `{v.name}`: {v.note}" for v in registry.VARIANTS if v.note)


def _metrics() -> str:
    rows = [
        (f"`{v.name}.{w.tag}`", m.name, f"{m.value:.2f} %", m.dataset, m.measured_by)
        for v in registry.VARIANTS
        for w in v.weights
        for m in w.metrics
    ]
    return _table(("weights", "metric", "value", "test set", "measured by"), rows)


def _weights() -> str:
    rows = [
        (
            f"`{v.name}.{w.tag}`",
            "the package" if w.path else f"`{w.hub_id}` on the Hub",
            w.licence,
            w.training_data,
            w.recipe,
            f"{w.machine}; {w.training_seconds:,.0f} s, seed {w.seed}" if w.machine else "not published",
            f"{w.size:,} bytes, sha256 `{w.sha256}`" if w.sha256 else "",
        )
        for v in registry.VARIANTS
        for w in v.weights
    ]
    return _table(("weights", "file from", "licence", "training data", "recipe", "machine, time, seed", "file"), rows)


def _timm_names(ours: bool) -> str:
    def registered_here(name: str) -> bool:
        return timm.model_entrypoint(name).__module__.startswith("convmixer.")

    return "\n".join(f"- `{v.name}`" for v in registry.VARIANTS if registered_here(v.name) == ours)


def _recipes() -> str:
    attributes = inspect.cleandoc(Recipe.__doc__ or "").partition("Attributes:\n")[2]
    meanings = {
        name: " ".join(text.split())
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", attributes, flags=re.MULTILINE)
    }

    def shown(value: object) -> str:
        return f"`{value}`" if value != () else "none"

    rows = [(f"`{f.name}`", meanings[f.name], shown(f.default)) for f in dataclasses.fields(Recipe)]
    return _table(("field", "meaning", "default"), rows)


_LOGS = Path(__file__).parent / "runs"
_CURVES = Path(__file__).parent / "_curves"

# The folders with the runs of recipes that were run to their end; the others are unverified.
_RUNS = {"finetune": "digits"}

_DATA = {"imagenet1k": "data/imagenet --precision float16", "finetune": "data/flowers"}
_FURTHER = {"cifar10-cpu-2": " --set checkpoint=runs/cifar10-cpu/model.safetensors"}


def _reached(name: str) -> str:
    """What the runs of a recipe reached and on what, from their logs."""
    if name not in _RUNS:
        return "Accuracy: unverified; no run to its end is recorded here."
    files = sorted((_LOGS / _RUNS[name]).rglob("result.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    first = results[0]
    accuracy = ", ".join(
        f"{_mean([r['test_accuracy'][test] for r in results])} of {count:,} images ({test})"
        for test, count in first["test_images"].items()
    )
    spread = "One run, no spread known" if len(results) == 1 else f"{len(results)} runs"
    minutes = statistics.mean(r["train_seconds"] for r in results) / 60
    return (
        f"Accuracy: top-1 {accuracy}. {spread}; {minutes:.1f} minutes on {first['device']}, "
        f"{first['threads']} threads. [Its command, settings and curves](runs.md)."
    )


def _recipe_sections() -> str:
    sections = []
    for name, recipe in RECIPES.items():
        given = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(Recipe) if f.name != "note"}
        changed = ", ".join(f"`{k}={v!r}`" for k, v in given.items() if v != getattr(Recipe(), k))
        data = _DATA.get(name, "torch/cifar10 --download")
        command = f"convmixer train {name} --data {data}{_FURTHER.get(name, '')}"
        sections.append(
            f"### {name}\n\n{recipe.note}\n\n```bash\n{command}\n```\n\n"
            f"Differs from the defaults in: {changed or 'nothing'}.\n\n{_reached(name)}\n"
        )
    return "\n".join(sections)


def _runs() -> list[list[tuple[str, dict[str, Any]]]]:
    """The runs in `docs/runs`, (folder, result) each; those that differ in the seed alone are together."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for file in sorted(_LOGS.rglob("result.json")):
        if file.parent.name in registry.list_pretrained():  # described among the weights that ship
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        settings = {k: v for k, v in result["recipe"].items() if k != "seed"}
        key = f"{file.parent.parent} {json.dumps(settings, sort_keys=True)}"
        groups.setdefault(key, []).append((file.parent.relative_to(_LOGS).as_posix(), result))
    return list(groups.values())


def _mean(values: Sequence[float]) -> str:
    spread = f" ({min(values):.2f} to {max(values):.2f}, n = {len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f} %{spread}"


def _run_table() -> str:
    rows = []
    for group in _runs():
        results = [result for _, result in group]
        first = results[0]
        tests = [
            f"{test}: {_mean([r['test_accuracy'][test] for r in results])}, {first['test_images'][test]:,} images"
            for test in first["test_accuracy"]
        ]
        validation = [r["validation_accuracy"] for r in results if r.get("validation_accuracy") is not None]
        minutes = statistics.mean(r["train_seconds"] for r in results) / 60
        rows.append(
            (
                ", ".join(f"[{name}](#{_anchor(name)})" for name, _ in group),
                first["recipe"]["epochs"],
                _mean(validation) if validation else "none",
                "<br>".join(tests),
                f"{minutes:.1f} min",
                f"{first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}",
            )
        )
    return _table(("run", "epochs", "top-1, validation", "top-1, tests", "time", "on"), rows)


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _run_sections() -> str:
    """Command and curves of each run."""
    return "\n\n".join(
        f"({_anchor(name)})=\n## {name}\n\n```bash\n{result['command']}\n```\n\n"
        f"![Loss, accuracy and learning rate of {name}](_curves/{_anchor(name)}.png)"
        for group in _runs()
        for name, result in group
    )


def _draw_curves(_app: Sphinx) -> None:
    _CURVES.mkdir(exist_ok=True)
    for group in _runs():
        for name, _ in group:
            write_figure(plot_history(read_history(_LOGS / name / "metrics.csv")), _CURVES / f"{_anchor(name)}.png")
    for name in registry.list_pretrained("*.cifar10"):
        losses = (
            _plot_losses(_losses(name))
            if _by_script(name)
            else plot_history(read_history(_LOGS / name / "metrics.csv"))
        )
        write_figure(losses, _CURVES / f"{_anchor(name)}-losses.png")
        found = _evaluation(name)
        true, predicted = zip(*_counted(found["confusion"]), strict=True)
        write_figure(plot_confusion(true, predicted, found["classes"]), _CURVES / f"{_anchor(name)}-confusion.png")


# ---- the weights that ship ------------------------------------------------------------------------------------------
# docs/runs/NAME holds what benchmarks/accuracy.py found (evaluation.json), and what `convmixer train` writes; for those
# that a script made, its settings (job.json) and losses.csv.


def _by_script(name: str) -> bool:
    return (_LOGS / name / "job.json").exists()


def _losses(name: str) -> list[dict[str, float]]:
    with (_LOGS / name / "losses.csv").open(newline="", encoding="utf-8") as file:
        return [{title: float(value) for title, value in row.items()} for row in csv.DictReader(file)]


def _evaluation(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_LOGS / name / "evaluation.json").read_text(encoding="utf-8"))
    return found


def _counted(confusion: list[list[int]]) -> list[tuple[int, int]]:
    """The true and the predicted class of each image that a confusion matrix counts."""
    cells = [(true, predicted, n) for true, row in enumerate(confusion) for predicted, n in enumerate(row)]
    return [(true, predicted) for true, predicted, n in cells for _ in range(n)]


def _plot_losses(rows: list[dict[str, float]]) -> Figure:
    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["train_loss"] for row in rows], ".-", label="training, augmented")
    left.plot(epochs, [row["loss_of_5000_training_images"] for row in rows], ".-", label="5,000 training images")
    left.set(title="loss", xlabel="epoch", ylabel="cross entropy")
    right.plot(epochs, [row["top1_of_5000_training_images"] for row in rows], ".-", color="tab:orange")
    right.set(title="accuracy of 5,000 training images", xlabel="epoch", ylabel="top-1 (%)")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _shipped_accuracy() -> str:
    rows = []
    for name in registry.list_pretrained("*.cifar10"):
        scores = _evaluation(name)["precisions"]
        exact = scores["float32"]
        rows.append(
            (
                f"[{name}](#{_anchor(name)})",
                *(f"{exact[key]:.2f} %" for key in ("top1", "top5", "calibration_error")),
                f"{exact['loss']:.4f}",
                *(f"{scores[precision]['top1']:.2f} %" for precision in ("bfloat16", "int8")),
            )
        )
    titles = ("weights", "top-1", "top-5", "calibration error", "loss", "top-1 in bfloat16", "top-1 in int8")
    return _table(titles, rows)


def _shipped_changed() -> str:
    names = registry.list_pretrained("*.cifar10")
    found = [_evaluation(name) for name in names]
    rows = [("none", *(f"{f['precisions']['bfloat16']['top1']:.2f} %" for f in found))]
    rows += [(change, *(f"{f['changed'][change]:.2f} %" for f in found)) for change in found[0]["changed"]]
    return _table(("change", *names), rows)


def _shipped_sections() -> str:
    return "\n\n".join(_shipped_section(name) for name in registry.list_pretrained("*.cifar10"))


def _job(name: str) -> dict[str, Any]:
    """What trained a set of weights: program, machine, versions, seconds and settings."""
    if _by_script(name):
        job: dict[str, Any] = json.loads((_LOGS / name / "job.json").read_text(encoding="utf-8"))
        return job
    result = json.loads((_LOGS / name / "result.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in result["recipe"].items() if key != "note"}
    return {
        "program": f"`{result['command']}`",
        "machine": f"one {result['device']}, {result['threads']} CPU threads",
        "versions": result["versions"],
        "seconds": result["train_seconds"],
        "settings": settings,
    }


def _epochs(name: str) -> str:
    """The losses by epoch; of a run of `convmixer train`, whose curves show all of them, of every eighth."""
    if _by_script(name):
        rows = [tuple(f"{value:g}" for value in row.values()) for row in _losses(name)]
        return _table(("epoch", "training loss", "loss of 5,000 training images", "top-1 of them, %"), rows)
    history = read_history(_LOGS / name / "metrics.csv")
    rows = [
        (row.epoch, f"{row.train_loss:.4f}", f"{row.train_accuracy:.2f}")
        for row in history
        if row.epoch % 8 == 0 or row.epoch == 1
    ]
    return _table(("epoch", "training loss", "top-1 of the augmented training images, %"), rows)


def _shipped_section(name: str) -> str:
    """Settings, losses, confusion and mistakes of one set of weights."""
    job = _job(name)
    found, anchor = _evaluation(name), _anchor(name)
    versions = ", ".join(f"{library} {version}" for library, version in job["versions"].items())
    right = [
        (label, f"{100 * row[i] / sum(row):.1f} %", f"{sum(row):,}")
        for i, (label, row) in enumerate(zip(found["classes"], found["confusion"], strict=True))
    ]
    mistakes = [
        (
            int(Path(m["file"]).stem),
            m["true"],
            m["predicted"],
            f"{100 * m['probability']:.1f} %",
            f"{100 * m['probability_of_true']:.2f} %",
        )
        for m in found["mistakes"]
    ]
    settings = [(f"`{key}`", value) for key, value in job["settings"].items()]
    parts = [
        f"({anchor})=\n### {name}",
        f"Trained by {job['program']}. It took {job['seconds']:.0f} s on {job['machine']}; {versions}.",
        _table(("setting", "value"), settings),
        _epochs(name),
        f"![Losses and accuracy of {name} by epoch](_curves/{anchor}-losses.png)",
        f"![Confusion matrix of {name}](_curves/{anchor}-confusion.png)",
        _table(("class", "top-1", "images"), right),
        f"The {len(mistakes)} mistakes with the highest probabilities, by the number of the image in the test batch:",
        _table(("image", "true", "predicted", "probability", "of the true class"), mistakes),
    ]
    return "\n\n".join(parts)


def _requirements() -> str:
    needed = [r for r in metadata.requires("convmixer") or () if "extra ==" not in r]
    return "\n".join(f"- `{requirement}`" for requirement in needed)


_RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def _speed() -> str:
    """The tables of `convmixer bench`, from what it wrote to `benchmarks/results/bench_*.json`."""
    parts = []
    for file in sorted(_RESULTS.glob("bench_*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        machine = report["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in machine.items() if v and k not in ("device", "threads", "system"))
        parts.append(
            f"`{report['model']}` on {machine['device']}, {machine['threads']} threads; {versions}. "
            f"{report['rounds']} rounds of {report['seconds']} s. Weights: {report['weights']}."
        )
        for case in report["cases"]:
            parts.append(f"**Batch {case['batch_size']}, {case['image_size']} pixels**")
            measured = [r for r in case["results"] if r["images_per_second"]]
            rows = [
                (
                    r["name"],
                    r["dtype"],
                    f"{r['images_per_second']:,.1f}",
                    f"{r['slowest']:,.1f} to {r['fastest']:,.1f}",
                    f"{r['latency_ms']['p50']:.2f} / {r['latency_ms']['p99']:.2f}",
                    f"{r['relative_error']:.0e}",
                    f"{100 * r['ceiling_share']:.0f} %" if r["ceiling_share"] else "",
                )
                for r in sorted(measured, key=lambda r: -r["images_per_second"])
            ]
            titles = ("", "dtype", "images/s", "rounds", "p50 / p99 ms", "error", "of ceiling")
            parts.append(_table(titles, rows))
            parts += [
                f"{r['dtype']}: {r['ours']} / {r['peer']} = {r['ratio']:.2f} ({r['least']:.2f} to {r['largest']:.2f})."
                for r in case["ratios"]
            ]
    return "\n\n".join(parts) or "Unmeasured: no run of `convmixer bench` is in `benchmarks/results` yet."


def _cold_start() -> str:
    file = _RESULTS / "cold_start.json"
    if not file.exists():
        return "Unmeasured: no run of the script is in `benchmarks/results` yet."
    record = json.loads(file.read_text(encoding="utf-8"))
    rows = [(name, f"{value:.0f} ms") for name, value in record["milliseconds"].items()]
    rows.append(("start to first prediction", f"{record['to_first_prediction']:.0f} ms"))
    return f"On {record['machine']['device']}:\n\n" + _table(("step", "median"), rows)


def _native_parts() -> str:
    """What `benchmarks/native_parts.py` measured."""
    tables = []
    for file in sorted(_RESULTS.glob("native_parts_*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        kinds = record["microseconds_per_image"]
        rows = [
            (part, *(f"{v[part]:,.0f} ({100 * v[part] / v['whole model']:.0f} %)" for v in kinds.values()))
            for part in next(iter(kinds.values()))
        ]
        machine = f"{record['machine']['device']}, {record['machine']['threads']} threads"
        case = f"`{record['model']}` at {record['image_size']} pixels, batch {record['batch_size']}"
        tables.append(f"{case}, microseconds per image, on {machine}:\n\n{_table(('part', *kinds), rows)}")
    return "\n\n".join(tables)


_RECORDS: dict[str, Callable[[], str]] = {
    "models": _models,
    "notes": _notes,
    "metrics": _metrics,
    "weights": _weights,
    "timm-registered-here": lambda: _timm_names(ours=True),
    "timm-own": lambda: _timm_names(ours=False),
    "recipes": _recipes,
    "recipe-sections": _recipe_sections,
    "runs": _run_table,
    "run-sections": _run_sections,
    "shipped-accuracy": _shipped_accuracy,
    "shipped-changed": _shipped_changed,
    "shipped-sections": _shipped_sections,
    "speed": _speed,
    "cold-start": _cold_start,
    "native-parts": _native_parts,
    "python": lambda: f"Python {metadata.metadata('convmixer')['Requires-Python']}".replace(">=", "") + " or newer.",
    "requirements": _requirements,
}


class Records(SphinxDirective):
    """`{records} NAME`: the text that the function of that name in `_RECORDS` writes."""

    required_arguments = 1

    def run(self) -> list[Node]:
        for source in (registry, Recipe, recipes):
            self.env.note_dependency(inspect.getfile(source))
        return self.parse_text_to_nodes(_RECORDS[self.arguments[0]]())


# ---- docstrings -----------------------------------------------------------------------------------------------------


def _code(text: str) -> list[str]:
    """Docstrings write code in single backticks, as in Markdown; reStructuredText wants two."""
    return re.sub(r"(?<![`:])`([^`]+)`(?!`)", r"``\1``", text).split("\n")


def _before_napoleon(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    lines[:] = _code("\n".join(lines))


def _after_napoleon(_app: Sphinx, what: str, _name: str, obj: object, _options: object, lines: list[str]) -> None:
    if what == "property":  # napoleon takes what stands before a colon for a type
        lines[:] = _code(inspect.getdoc(obj) or "")


def setup(app: Sphinx) -> None:
    app.add_directive("records", Records)
    app.connect("builder-inited", _draw_curves)
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
