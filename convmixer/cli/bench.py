"""`convmixer bench`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from convmixer import plots
from convmixer.cli import options
from convmixer.cli.console import ERR, OUT, Command, plain, say
from convmixer.files import check_writable, write_atomically
from convmixer.runtime.benchmark import Report, Result, benchmark
from convmixer.runtime.benchmark_cases import DTYPES
from convmixer.runtime.choose import BACKENDS


@click.command(cls=Command)
@click.argument("model", default="convmixer_256_8")
@click.option(
    "--batch-size", "batch_sizes", multiple=True, type=click.IntRange(min=1), default=(1, 64), show_default=True
)
@click.option("--image-size", "image_sizes", multiple=True, type=click.IntRange(min=1), help="[default: the model's]")
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS[1:]), help="[default: all]")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(tuple(DTYPES)), help="[default: float32 bfloat16]")
@click.option("--calibration", help="Training images for int8: folder, .tar, or a name such as torch/cifar10.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Also time timm's model.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=0.3, show_default=True, help="Per round."
)
@options.checkpoint
@options.device
@click.option("--json", "json_file", type=options.PATH, help="A file to write all figures to.")
@click.option("--plot", "plot_file", type=options.PATH, help="A .png file to draw a bar chart into.")
def bench(
    model: str,
    backends: tuple[str, ...],
    dtypes: tuple[str, ...],
    image_sizes: tuple[int, ...],
    calibration: str | None,
    json_file: Path | None,
    plot_file: Path | None,
    **further: Any,
) -> None:
    """Time MODEL in all backends and precisions, against timm's, in one process.

    MODEL is any name of create_model, the folder of a run of `convmixer train`, or a .safetensors file.

    Options that may be given again: --batch-size, --image-size, --backend, --dtype.
    """
    for file in filter(None, (json_file, plot_file)):
        check_writable(file)
    if plot_file:
        plots.check_figure(plot_file)
    if not dtypes:
        dtypes = ("float32", "bfloat16", "int8") if calibration else ("float32", "bfloat16")
    with ERR.status("") as status:
        report = benchmark(
            model,
            backends=backends or None,
            dtypes=dtypes,
            image_sizes=image_sizes or None,
            calibration=calibration,
            report=lambda line: status.update(plain(line)),
            **further,
        )
    record = dataclasses.asdict(report)
    if json_file:
        text = json.dumps(record, indent=2) + "\n"
        write_atomically(json_file, lambda path: path.write_text(text, encoding="utf-8"))
    _show(report)
    if plot_file:
        plots.write_figure(plots.plot_benchmark(record), plot_file)


def _show(report: Report) -> None:
    machine = report.machine
    libraries = ", ".join(f"{k} {v}" for k, v in machine.items() if v and k not in ("device", "threads", "system"))
    say(f"{report.model} (weights: {report.weights}) on {machine['device']}, {machine['threads']} threads; {libraries}")
    if report.calibration:
        say(report.calibration)
    for case in report.cases:
        ceilings = ", ".join(f"{dtype} {value:,.0f}" for dtype, value in case.gemm_gflops.items())
        OUT.print()
        say(
            f"batch {case.batch_size} at {case.image_size} pixels; GFLOP/s of a matrix multiplication: "
            f"{ceilings or 'none'}"
        )
        table = _table(case.results)
        Console(highlight=False, emoji=False, width=max(OUT.width, 120)).print(table)  # narrower would cut figures
        for r in case.results:
            if r.failure:
                say(f"{r.name} {r.dtype} failed: {r.failure}")
        for ratio in case.ratios:
            spread = f"{ratio.least:.2f} to {ratio.largest:.2f}"
            say(f"{ratio.dtype}: {ratio.ours} / {ratio.peer} = {ratio.ratio:.2f} ({spread})")


def _table(results: Sequence[Result]) -> Table:
    """Return a table of what was measured, the fastest first."""
    table = Table(box=None, header_style="bold")
    table.add_column("", no_wrap=True)
    for title in ("dtype", "images/s", "rounds from", "to", "p50 ms", "p90", "p99", "MiB", "error", "of ceiling"):
        table.add_column(title, justify="left" if title == "dtype" else "right", no_wrap=True)
    for r in sorted(results, key=lambda r: -(r.images_per_second or 0)):
        if r.images_per_second is None:
            continue
        digits = 0 if r.images_per_second >= 100 else 2
        table.add_row(
            r.name,
            r.dtype,
            *(f"{value:,.{digits}f}" for value in (r.images_per_second, r.slowest, r.fastest)),
            *(f"{value:.2f}" for value in r.latency_ms.values()),
            "" if r.peak_memory_mib is None else f"{r.peak_memory_mib:,.0f}",
            "" if r.relative_error is None else f"{r.relative_error:.0e}",
            "" if r.ceiling_share is None else f"{100 * r.ceiling_share:.1f} %",
        )
    return table
