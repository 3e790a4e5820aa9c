"""Every figure of the site and of README, drawn from records, weights that ship and the notebook's outputs.

The site's figures are drawn anew by each build. Those of README are files of the repository:

    python docs/draw_readme.py
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

import convmixer
from convmixer import plots, registry
from convmixer.hub import zoo
from convmixer.training.history import read_history
from sitegen import transfer
from sitegen.diagram import FLOWS, PALETTES, draw, draw_batch, draw_flow
from sitegen.records import DOCS, csv_rows
from sitegen.runs import LOGS, anchor, counted, evaluation, runs
from sitegen.speed import benches, gpu_sections, result

FIGURES = DOCS / "_figures"
README = DOCS / "images"
EXAMPLES = DOCS.parent / "examples"
SETS = {"ImageNet-1k": "o", "CIFAR-10": "s"}  # test sets of the weights, and their markers


# ---- charts in two colour schemes -----------------------------------------------------------------------------------


@contextmanager
def _scheme(name: str) -> Iterator[dict[str, str]]:
    """matplotlib's settings for transparent SVG on light or dark pages; yields the colours of the series."""
    palette = PALETTES[name]
    settings: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), palette.text
    )
    settings |= {"axes.edgecolor": palette.quiet, "grid.color": palette.quiet, "grid.alpha": 0.25}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
    settings |= {"svg.fonttype": "none", "svg.hashsalt": "convmixer", "savefig.transparent": True}
    with matplotlib.rc_context(settings):
        yield {
            "ImageNet-1k": palette.patches[1],
            "CIFAR-10": palette.depthwise[1],
            "convmixer": palette.patches[1],
            "timm": palette.quiet,
        }


def _write_svg(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(
        r"font-family: [^;\"]+", "font-family: 'DejaVu Sans', Verdana, sans-serif", path.read_text(encoding="utf-8")
    )
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def _points() -> list[tuple[registry.Variant, str, float]]:
    """(variant, test set, top-1) of all weights."""
    found = []
    for variant in registry.VARIANTS:
        for weights in variant.weights:
            top1 = weights.metrics[0]
            found.append((variant, next(name for name in SETS if top1.dataset.startswith(name)), top1.value))
    return found


Point = tuple[str, str, float, float]  # label, test set, x, top-1


def _scatter(axes: Axes, points: list[Point], colours: dict[str, str], labels_on_the_left: tuple[str, ...]) -> None:
    """Points with their labels, over a logarithmic x."""
    for name, marker in SETS.items():
        of_set = [p for p in points if p[1] == name]
        axes.plot([p[2] for p in of_set], [p[3] for p in of_set], marker, color=colours[name], label=name, markersize=8)
    for label, _, x, y in points:
        left = label in labels_on_the_left
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "right" if left else "left", "va": "center"}
        axes.annotate(label, (x, y), (-9 if left else 9, 0), fontsize=10, **place)
    axes.set_xscale("log")
    axes.set_xlim(min(p[2] for p in points) / 5, 5 * max(p[2] for p in points))
    axes.set(ylim=(74, 98), ylabel="top-1 (%)")
    axes.grid()
    axes.set_axisbelow(True)


def accuracy_by_parameters(colours: dict[str, str]) -> Figure:
    """Top-1 of all weights over the number of parameters."""
    figure = Figure((5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    points = [(v.name.removeprefix("convmixer_"), data, v.parameters / 1e6, top1) for v, data, top1 in _points()]
    _scatter(axes, points, colours, ("256_8", "768_32", "1024_20_ks9_p14"))
    axes.set(xlabel="parameters (millions)", title="accuracy and size")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.legend(loc="lower left", frameon=False)
    return figure


def accuracy_by_speed(colours: dict[str, str]) -> Figure:
    """Top-1 over images per second on an H200, of the weights whose variant was measured there."""
    speeds = {name: rows["ours, triton"] for name, rows in gpu_sections("inference of ").items()}
    figure = Figure((5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    points = [
        (v.name.removeprefix("convmixer_"), data, speeds[v.name]["images_per_second"], top1)
        for v, data, top1 in _points()
        if v.name in speeds
    ]
    _scatter(axes, points, colours, ("1536_20", "256_8"))
    device = result("gpu_h200")["device"].removeprefix("NVIDIA ")
    axes.set(xlabel=f"images per second, one {device}, bfloat16", title="accuracy and speed")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return figure


def ratios() -> list[tuple[str, float, float, float]]:
    """(case, convmixer's images per second, those of timm's fastest, their ratio), in bfloat16."""
    found = []
    for report in benches():
        for case in report["cases"]:
            speeds = {f"{r['name']} {r['dtype']}": r["images_per_second"] for r in case["results"]}
            ratio = next(r for r in case["ratios"] if r["dtype"] == "bfloat16")
            what = f"{report['model'].removeprefix('convmixer_')}, batch {case['batch_size']}, CPU"
            found.append((what, speeds[f"{ratio['ours']} bfloat16"], speeds[ratio["peer"]], ratio["ratio"]))
    for name, precision, batch, *speeds in csv_rows("train_step_native")[1:]:
        if precision == "bfloat16":
            short = name.split("`")[1].removeprefix("convmixer_")
            ours, *timm = (float(speed.replace(",", "")) for speed in speeds[:3])
            found.append((f"{short}, training, batch {batch}, CPU", ours, max(timm), ours / max(timm)))
    for kind, key, words in (
        ("inference of ", "images_per_second", ""),
        ("training of ", "graph_images_per_second", "training, "),
    ):
        for name, rows in gpu_sections(kind).items():
            peer = next((row[key] for row_name, row in rows.items() if row_name.startswith("timm")), None)
            if peer is not None:
                ours, batch = max((row[key], row["batch"]) for what, row in rows.items() if what.startswith("ours"))
                short = name.removeprefix("convmixer_")
                found.append((f"{short}, {words}batch {batch:,}, H200", ours, peer, ours / peer))
    return found


def _speed(images: float) -> str:
    return f"{images:,.0f}" if images >= 20 else f"{images:.1f}"


def speed_against_timm(colours: dict[str, str]) -> Figure:
    """How many times as fast as timm's fastest setting, in bfloat16, for each case that was measured."""
    rows = ratios()[::-1]
    figure = Figure((8.4, 0.36 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.barh([row[0] for row in rows], [row[3] for row in rows], color=colours["convmixer"], height=0.62)
    axes.axvline(1, color=colours["timm"], linestyle="--", linewidth=1.5)
    widest = 1.6 * max(row[3] for row in rows)
    for i, (_, ours, peer, ratio) in enumerate(rows):
        axes.text(ratio + 0.007 * widest, i, f"{ratio:.1f}x", va="center", fontweight="bold")
        speeds = f"{_speed(ours)} : {_speed(peer)} images/s"
        axes.text(ratio + 0.093 * widest, i, speeds, va="center", fontsize=10, color=colours["timm"])
    axes.set_xlim(0, widest)
    axes.set_xlabel("speed relative to timm's fastest setting (dashed line), bfloat16")
    axes.tick_params(axis="y", length=0)
    return figure


CHARTS = {
    "accuracy-parameters": accuracy_by_parameters,
    "accuracy-speed": accuracy_by_speed,
    "speed": speed_against_timm,
}


def draw_charts(folder: Path) -> None:
    """The charts and the architecture, in both colour schemes."""
    folder.mkdir(parents=True, exist_ok=True)
    for scheme, palette in PALETTES.items():
        for name, chart in CHARTS.items():
            with _scheme(scheme) as colours:
                _write_svg(chart(colours), folder / f"{name}-{scheme}.svg")
        shown = registry.get_variant("convmixer_256_8")[0]
        (folder / f"architecture-{scheme}.svg").write_text(draw(shown, palette), encoding="utf-8")


# ---- figures of runs and weights ------------------------------------------------------------------------------------


def _draw_runs() -> None:
    for group in runs():
        for name, _ in group:
            history = read_history(LOGS / name / "metrics.csv")
            plots.write_figure(plots.plot_history(history), FIGURES / f"{anchor(name)}.png")


def _draw_shipped(name: str) -> None:
    """Losses, confusion matrix and kernels of one set of weights that ships."""
    found = evaluation(name)
    true, predicted = zip(*counted(found["confusion"]), strict=True)
    model = convmixer.create_model(name, pretrained=True, device="cpu")
    for what, figure in {
        "losses": zoo.curves(LOGS / name),
        "confusion": plots.plot_confusion(true, predicted, found["classes"]),
        "kernels": plots.plot_depthwise_kernels(model),
    }.items():
        plots.write_figure(figure, FIGURES / f"{anchor(name)}-{what}.png")


def _from_notebook(call: str) -> bytes:
    """The PNG that the cell of the notebook with this call shows."""
    cells = json.loads((EXAMPLES / "from_scratch.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = next(cell["outputs"] for cell in cells if call in "".join(cell["source"]))
    return base64.b64decode(next(o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})))


def _draw_gallery() -> None:
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    for name, figure in {
        "patch_embedding": plots.plot_patch_embedding(model),
        "class_activation": plots.plot_class_activation(model, EXAMPLES / "images" / "cat.png"),
        "benchmark": plots.plot_benchmark(result("bench_256_8")),
    }.items():
        plots.write_figure(figure, FIGURES / f"{name}.png")
    (FIGURES / "mistakes.png").write_bytes(_from_notebook("plot_mistakes("))


def _draw_transfer() -> None:
    found, run = result("transfer"), transfer.shown()["all layers"]
    labels, predicted = transfer.digits(found["labels"]), transfer.digits(run["predicted"])
    plots.write_figure(plots.plot_confusion(labels, predicted, found["classes"]), FIGURES / "transfer-confusion.png")


def draw_all() -> None:
    """Every figure that a page of the site shows."""
    draw_charts(FIGURES)
    for scheme, palette in PALETTES.items():
        (FIGURES / f"batch-{scheme}.svg").write_text(draw_batch(palette), encoding="utf-8")
        for variant in registry.VARIANTS:
            (FIGURES / f"{variant.name}-{scheme}.svg").write_text(draw(variant, palette), encoding="utf-8")
        for flow in FLOWS:
            (FIGURES / f"{flow}-{scheme}.svg").write_text(draw_flow(flow, palette), encoding="utf-8")
    _draw_runs()
    for name in registry.list_pretrained("*.cifar10"):
        _draw_shipped(name)
    _draw_gallery()
    _draw_transfer()
