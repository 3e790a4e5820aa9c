"""Tables of speed and memory, from what the programs in `benchmarks` wrote to `benchmarks/results`."""

from __future__ import annotations

import json
from typing import Any

from convmixer import registry
from sitegen.records import RESULTS, record, table
from sitegen.runs import evaluation


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def benches() -> list[dict[str, Any]]:
    """The reports of `convmixer bench`."""
    return [result(file.stem) for file in sorted(RESULTS.glob("bench_*.json"))]


def gpu_sections(kind: str) -> dict[str, dict[str, Any]]:
    """By model, what `benchmarks/gpu.py` measured of one kind, such as "inference of "."""
    sections: dict[str, dict[str, Any]] = result("gpu_h200")["sections"]
    names = [variant.name for variant in registry.VARIANTS]
    return {name: sections[kind + name] for name in names if kind + name in sections}


def gpu_machine() -> str:
    measured = result("gpu_h200")
    versions = ", ".join(f"{library} {measured[library]}" for library in ("torch", "triton", "timm"))
    return f"One {measured['device']}, {versions}, {measured['dtype'].removeprefix('torch.')}, random weights"


def machine(report: dict[str, Any]) -> str:
    facts = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in facts.items() if v and k not in ("device", "threads", "system"))
    return f"{facts['device']}, {facts['threads']} threads; {versions}"


# ---- convmixer bench ------------------------------------------------------------------------------------------------


def _bench_case(case: dict[str, Any]) -> list[str]:
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
    ratios = [
        f"{r['dtype']}: {r['ours']} / {r['peer']} = {r['ratio']:.2f} ({r['least']:.2f} to {r['largest']:.2f})."
        for r in case["ratios"]
    ]
    return [f"**Batch {case['batch_size']}, {case['image_size']} pixels**", table(titles, rows), *ratios]


@record("speed")
def speed() -> str:
    """The tables of `convmixer bench`."""
    parts = []
    for report in benches():
        parts.append(
            f"`{report['model']}` on {machine(report)}. "
            f"{report['rounds']} rounds of {report['seconds']} s. Weights: {report['weights']}."
        )
        for case in report["cases"]:
            parts += _bench_case(case)
    return "\n\n".join(parts)


# ---- other programs on CPUs -----------------------------------------------------------------------------------------


_TRAIN_STEP = "python benchmarks/train_step.py --batch-size 128 --precision bfloat16 --rounds 5"


@record("load")
def load() -> str:
    rows = [
        (
            f"`{name}`",
            f"{r['median_seconds']['convmixer']:.3f} s",
            f"{r['median_seconds']['timm']:.3f} s",
            f"{r['timm_to_convmixer']:.2f}",
        )
        for name, r in result("load")["results"].items()
    ]
    return table(("", "convmixer", "timm", "timm / convmixer"), rows, numbers=3)


@record("train-step")
def train_step() -> str:
    step = result("train_step")
    kept = step["activation_mib_per_image"]
    rows = [
        (name, f"{speed:,.0f}", f"{step['ratios'][name]:.2f}", f"{kept[name]:.1f} MiB")
        for name, speed in step["images_per_second"].items()
    ]
    return table(("", "images/s", f"to {step['best_of_timm']}", "kept for backward, per image"), rows, numbers=3)


@record("latency")
def latency() -> str:
    measured = result("latency")
    rows = []
    for dtype, loads in measured["milliseconds"].items():
        for name in loads["alone"]:
            times = [loads[load][name] for load in ("alone", "turns", "busy")]
            rows.append((name, dtype, *(f"{t['p50']:.2f}, {t['p90']:.2f}, {t['p99']:.1f}" for t in times)))
    text = table(("p50, p90, p99", "", "by itself", "in turns", "in turns, one core busy"), rows, numbers=3)
    return f"{text}\n\n{machine(measured)} (`python benchmarks/latency.py`)."


@record("train-epoch")
def train_epoch() -> str:
    measured = result("train_epoch")
    rows = [
        (f"`{row['recipe']}`", f"{row['batch_size']}", f"{row['images_per_second']:,.0f}", f"{row['ratio']:.2f}")
        for row in measured["recipes"]
    ]
    names = " ".join(row["recipe"] for row in measured["recipes"])
    command = f"python benchmarks/train_epoch.py {names} --images {measured['recipes'][0]['images']}"
    titles = ("recipe", "batch size", "images/s", "epoch / bare steps")
    return f"{table(titles, rows, numbers=3)}\n\n{machine(measured)} (`{command}`)."


@record("augment")
def augment() -> str:
    measured = result("augment")
    rows = [(way, f"{speed:,}") for way, speed in measured["images_per_second"].items()]
    text = table(("", "images/s"), rows, numbers=1)
    note = "kornia draws the two operations once for 128 images; the others draw them for each image."
    return f"{text}\n\n{machine(measured)} (`python benchmarks/augment.py`). {note}"


@record("cold-start")
def cold_start() -> str:
    measured = result("cold_start")
    rows = [(name, f"{value:.0f} ms") for name, value in measured["milliseconds"].items()]
    rows.append(("start to first prediction", f"{measured['to_first_prediction']:.0f} ms"))
    return f"On {measured['machine']['device']}:\n\n" + table(("step", "median"), rows, numbers=1)


_PARTS = {"matrix products of that size alone": "only matrix multiplications of that size"}


@record("native-parts")
def native_parts() -> str:
    """What `benchmarks/native_parts.py` measured."""
    tables = []
    for file in sorted(RESULTS.glob("native_parts_*.json")):
        measured = result(file.stem)
        kinds = measured["microseconds_per_image"]
        rows = [
            (
                _PARTS.get(part, part),
                *(f"{v[part]:,.0f} ({100 * v[part] / v['whole model']:.0f} %)" for v in kinds.values()),
            )
            for part in next(iter(kinds.values()))
        ]
        case = f"`{measured['model']}` at {measured['image_size']} pixels, batch {measured['batch_size']}"
        where = f"{measured['machine']['device']}, {measured['machine']['threads']} threads"
        tables.append(f"{case}, microseconds per image, on {where}:\n\n{table(('part', *kinds), rows)}")
    return "\n\n".join(tables)


@record("int8-accuracy")
def int8_accuracy() -> str:
    rows = []
    for name in registry.list_pretrained("*.cifar10"):
        scores = evaluation(name)["precisions"]
        rows.append((f"`{name}`", *(f"{scores[precision]['top1']:.2f} %" for precision in ("float32", "int8"))))
    return table(("weights", "float32", "int8, `native`"), rows, numbers=2)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def _speed_of(rows: dict[str, Any], name: str, key: str = "images_per_second") -> str:
    return f"{rows[name][key]:,.0f}" if name in rows else "not measured"


def _compiled_timm(rows: dict[str, Any]) -> dict[str, float] | None:
    return next((row for name, row in rows.items() if name.startswith("timm")), None)


@record("gpu-training")
def gpu_training() -> str:
    rows = []
    for name, measured in gpu_sections("training of ").items():
        timm = _compiled_timm(measured)
        for ours, row in measured.items():
            if ours.startswith("timm"):
                continue
            first = not rows or rows[-1][-1] != name
            peer = (
                f"{timm['images_per_second']:,.0f} / {timm['graph_images_per_second']:,.0f}" if timm else "not measured"
            )
            rows.append(
                (
                    f"`{name}`, {row['batch']:,}" if first else "",
                    ours.removeprefix("ours, "),
                    f"{row['images_per_second']:,.0f}",
                    f"{row['graph_images_per_second']:,.0f}",
                    f"{row['peak_mib']:,.0f}",
                    peer if first else "",
                    name,
                )
            )
    titles = ("model, batch", "ours", "step launched", "step as a graph", "peak MiB", "timm compiled, launched / graph")
    return table(titles, [row[:-1] for row in rows], numbers=4)


@record("gpu-inference")
def gpu_inference() -> str:
    rows = []
    for kind in ("inference of ", "inference of one image of "):
        for name, measured in gpu_sections(kind).items():
            timm = _compiled_timm(measured)
            rows.append(
                (
                    f"`{name}`, {next(iter(measured.values()))['batch']:,}",
                    _speed_of(measured, "ours, triton"),
                    _speed_of(measured, "ours, compile"),
                    f"{timm['images_per_second']:,.0f}" if timm else "not measured",
                )
            )
    return table(("model, batch", "`triton`", "`compile`", "timm compiled"), rows, numbers=3)


_OPERATIONS = {
    ("depthwise", None): "depthwise and sums",
    ("weight_gradient", None): "its weight gradient",
    ("pointwise", 0): "1x1, inference",
    ("pointwise", 2): "1x1 and sums, z made before",
    ("normalize", 0): "`normalize_act`",
    ("sums", 0): "its gradient",
    ("sums", 1): "`stats_grad`",
}
_TUNED = (  # batch, channels, side and kernel of the shapes that `convmixer.ops.triton.tune` measures
    (64, 1536, 32, 9),
    (128, 768, 32, 7),
    (256, 256, 16, 5),
    (128, 256, 32, 9),
)


@record("kernel-times")
def kernel_times() -> str:
    """Microseconds of each kernel with its fastest tile, from what `convmixer.ops.triton.tune` wrote."""
    rows = []
    measured = result("tune_h200")["rows"]
    for batch, channels, side, kernel in _TUNED:
        shape = (channels, batch * side * side)
        cells = []
        for operation, key in _OPERATIONS:
            wanted = kernel if key is None else key
            time = next(
                r["microseconds"]
                for r in measured
                if (r["operation"], r["key"], r["channels"], r["positions"]) == (operation, wanted, *shape)
            )
            cells.append(f"{time:,.0f}")
        rows.append((f"{batch} x {channels} x {side} x {side}, {kernel}x{kernel}", *cells))
    return table(("batch x channels x height x width, kernel", *_OPERATIONS.values()), rows, numbers=len(_OPERATIONS))


@record("kernels-static")
def kernels_static() -> str:
    """What the compiler made of each kernel for bfloat16 on sm_90."""
    rows = []
    for kernel in result("kernels_static")["kernels"]:
        if (kernel["capability"], kernel["dtype"]) != (90, "bfloat16"):
            continue
        loop = kernel["loop"]
        rows.append(
            (
                kernel["block"].removeprefix("convmixer_"),
                kernel["kernel"],
                kernel["registers"],
                f"{kernel['shared_bytes'] / 1024:.0f}",
                f"{kernel['instructions']['total']:,}",
                f"{loop['total']}, {loop['fma']}, {loop['tensor']}" if loop["total"] else "no loop",
                f"{kernel['h200_roof_us']:.2f} ({kernel['bound']})",
                f"{kernel['h200_issue_us']:.2f}",
            )
        )
    titles = (
        "block",
        "kernel",
        "registers",
        "shared KiB",
        "instructions",
        "loop: all, FMA, tensor",
        "roof, us",
        "issue, us",
    )
    return table(titles, rows)


# ---- one variant ----------------------------------------------------------------------------------------------------


def _on_cpu(report: dict[str, Any]) -> str:
    """Our fastest setting and timm's in each precision."""
    rows = []
    for case in report["cases"]:
        for dtype in ("int8", "bfloat16", "float32"):
            for library in ("convmixer", "timm"):
                speeds = {
                    r["name"]: r["images_per_second"]
                    for r in case["results"]
                    if r["images_per_second"] and r["dtype"] == dtype and r["name"].startswith(library)
                }
                if speeds:
                    best = max(speeds, key=speeds.__getitem__)
                    rows.append((case["batch_size"], dtype, best, f"{speeds[best]:,.0f}"))
    titles = ("batch", "precision", "fastest setting", "images/s")
    return f"Inference on {machine(report)}:\n\n{table(titles, rows, numbers=1)}"


def _on_gpu(name: str) -> str:
    rows = []
    for words, kind, key in (
        ("inference", "inference of ", "images_per_second"),
        ("inference", "inference of one image of ", "images_per_second"),
        ("training", "training of ", "graph_images_per_second"),
    ):
        for setting, row in gpu_sections(kind).get(name, {}).items():
            shown = setting.replace("ours,", "convmixer").partition(", layout")[0].partition(", default")[0]
            rows.append((words, f"{row['batch']:,}", shown, f"{row[key]:,.0f}", f"{row['peak_mib']:,.0f}"))
    titles = ("", "batch", "setting", "images/s", "peak MiB")
    text = f"{gpu_machine()}; a training step is replayed as a CUDA graph:\n\n{table(titles, rows, numbers=2)}"
    return text if rows else ""


def of_variant(name: str) -> str:
    """What was measured of a variant; empty if nothing was."""
    parts = [_on_cpu(report) for report in benches() if report["model"] == name]
    return "\n\n".join(part for part in (*parts, _on_gpu(name)) if part)


def kept_for_backward(name: str) -> str:
    """What a training step keeps for the backward pass, where it was measured."""
    if name != "convmixer_256_8":  # the model of benchmarks/train_step.py
        return ""
    step = result("train_step")
    kept = step["activation_mib_per_image"]
    return (
        f"A training step in {step['precision']} at batch size {step['batch_size']} keeps "
        f"{kept['convmixer compiled']:.1f} MiB per image for the backward pass when it is compiled, and "
        f"{kept['convmixer fused, compiled']:.1f} MiB with [fused blocks](../training_speed.md#fused-blocks); "
        f"timm's model keeps {kept['timm eager NCHW']:.1f} MiB in eager mode "
        f"(`{_TRAIN_STEP}`)."
    )
