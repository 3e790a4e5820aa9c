"""Tables and sections of training runs and recipes, from `docs/runs` and the recipes themselves.

For weights that ship, `docs/runs/NAME` holds what benchmarks/accuracy.py found (evaluation.json) and what
`convmixer train` wrote. If a script made them, it holds the script's settings (job.json) and losses.csv instead.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convmixer import registry
from convmixer.hub.zoo import read_losses
from convmixer.training import RECIPES, Recipe
from convmixer.training.history import read_history
from sitegen.records import DOCS, record, table

LOGS = DOCS / "runs"


_RUNS = {
    "cifar10": "cifar10",
    "cifar10-best": "convmixer_256_8.cifar10",
    "cifar10-best-128": "convmixer_128_8_ks7_p2.cifar10",
    "cifar10-fast": "cifar10-fast",
    "finetune": "digits",
}


_DATA = {"imagenet1k": "data/imagenet --precision float16", "finetune": "data/flowers"}


_FURTHER = {"cifar10-cpu-2": " --set checkpoint=runs/cifar10-cpu/model.safetensors"}


@record("recipes")
def _recipes() -> str:
    attributes = inspect.cleandoc(Recipe.__doc__ or "").partition("Attributes:\n")[2]
    meanings = {
        name: " ".join(text.split())
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", attributes, flags=re.MULTILINE)
    }

    def shown(value: object) -> str:
        return "none" if value in ((), "") else f"`{value}`"

    rows = [(f"`{f.name}`", meanings[f.name], shown(f.default)) for f in dataclasses.fields(Recipe)]
    return table(("field", "meaning", "default"), rows)


def _results(folder: str) -> list[dict[str, Any]]:
    """The results of all runs in a folder of `docs/runs`."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((LOGS / folder).rglob("result.json"))]


def _reached(name: str) -> str:
    """What the runs of a recipe reached and on what, from their logs."""
    if name not in _RUNS:
        return "Accuracy: unverified; no run to its end is recorded here."
    results = _results(_RUNS[name])
    first = results[0]
    accuracy = ", ".join(
        f"{mean([r['test_accuracy'][test] for r in results])} of {count:,} images ({test})"
        for test, count in first["test_images"].items()
    )
    spread = "One run, no spread known" if len(results) == 1 else f"{len(results)} runs"
    minutes = statistics.mean(r["train_seconds"] for r in results) / 60
    recipe = json.loads(json.dumps(dataclasses.asdict(RECIPES[name])))
    other = [f"`{k}={v!r}`" for k, v in first["recipe"].items() if v != recipe[k] and k not in ("seed", "note")]
    changed = f" with {', '.join(other)}" if other else ""
    return (
        f"Accuracy{changed}: top-1 {accuracy}. {spread}; {minutes:.1f} minutes on {first['device']}, "
        f"{first['threads']} threads. [Its command, settings and curves](runs.md)."
    )


@record("recipe-sections")
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


def runs() -> list[list[tuple[str, dict[str, Any]]]]:
    """The runs in `docs/runs`, (folder, result) each; those that differ only in the seed are together."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for file in sorted(LOGS.rglob("result.json")):
        if file.relative_to(LOGS).parts[0] in registry.list_pretrained():  # described among the weights that ship
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        settings = {k: v for k, v in result["recipe"].items() if k != "seed"}
        key = f"{file.parent.parent} {json.dumps(settings, sort_keys=True)}"
        groups.setdefault(key, []).append((file.parent.relative_to(LOGS).as_posix(), result))
    return list(groups.values())


def mean(values: Sequence[float], digits: int = 2) -> str:
    """The mean in percent, with the range and the number of values if there are several."""
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f}, n = {len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f} %{spread}"


@record("runs")
def _run_table() -> str:
    rows = []
    for group in runs():
        results = [result for _, result in group]
        first = results[0]
        tests = [
            f"{test}: {mean([r['test_accuracy'][test] for r in results])}, {first['test_images'][test]:,} images"
            for test in first["test_accuracy"]
        ]
        validation = [r["validation_accuracy"] for r in results if r.get("validation_accuracy") is not None]
        minutes = statistics.mean(r["train_seconds"] for r in results) / 60
        rows.append(
            (
                ", ".join(f"[{name}](#{anchor(name)})" for name, _ in group),
                first["recipe"]["epochs"],
                mean(validation) if validation else "none",
                "<br>".join(tests),
                f"{minutes:.1f} min",
                f"{first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}",
            )
        )
    return table(("run", "epochs", "top-1, validation", "top-1, tests", "time", "on"), rows)


def anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


@record("run-sections")
def _run_sections() -> str:
    """Command and curves of each run."""
    return "\n\n".join(
        f"({anchor(name)})=\n## {name}\n\n```bash\n{result['command']}\n```\n\n"
        f"![Loss, accuracy and learning rate of {name}](_figures/{anchor(name)}.png)"
        for group in runs()
        for name, result in group
    )


def by_script(name: str) -> bool:
    return (LOGS / name / "job.json").exists()


def evaluation(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((LOGS / name / "evaluation.json").read_text(encoding="utf-8"))
    return found


def counted(confusion: list[list[int]]) -> list[tuple[int, int]]:
    """The true and the predicted class of each image that a confusion matrix counts."""
    cells = [(true, predicted, n) for true, row in enumerate(confusion) for predicted, n in enumerate(row)]
    return [(true, predicted) for true, predicted, n in cells for _ in range(n)]


@record("shipped-accuracy")
def _shipped_accuracy() -> str:
    rows = []
    for name in registry.list_pretrained("*.cifar10"):
        scores = evaluation(name)["precisions"]
        exact = scores["float32"]
        rows.append(
            (
                f"[{name}](#{anchor(name)})",
                *(f"{exact[key]:.2f} %" for key in ("top1", "top5", "calibration_error")),
                f"{exact['loss']:.4f}",
                *(f"{scores[precision]['top1']:.2f} %" for precision in ("bfloat16", "int8")),
            )
        )
    titles = ("weights", "top-1", "top-5", "calibration error", "loss", "top-1 in bfloat16", "top-1 in int8")
    return table(titles, rows)


@record("shipped-changed")
def _shipped_changed() -> str:
    names = registry.list_pretrained("*.cifar10")
    found = [evaluation(name) for name in names]
    rows = [("none", *(f"{f['precisions']['bfloat16']['top1']:.2f} %" for f in found))]
    rows += [(change, *(f"{f['changed'][change]:.2f} %" for f in found)) for change in found[0]["changed"]]
    return table(("change", *(name.removeprefix("convmixer_").partition(".")[0] for name in names)), rows)


def _folded(title: str, text: str) -> str:
    """Text that shows when the reader opens it."""
    return f"::::{{dropdown}} {title}\n{text}\n::::"


@record("shipped-sections")
def _shipped_sections() -> str:
    return "\n\n".join(_shipped_section(name) for name in registry.list_pretrained("*.cifar10"))


def _job(name: str) -> dict[str, Any]:
    """What trained a set of weights: program, machine, versions, seconds and settings."""
    if by_script(name):
        job: dict[str, Any] = json.loads((LOGS / name / "job.json").read_text(encoding="utf-8"))
        return job
    result = json.loads((LOGS / name / "result.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in result["recipe"].items() if key != "note"}
    return {
        "program": f"`{result['command']}`",
        "machine": f"one {result['device']}, {result['threads']} CPU threads",
        "versions": result["versions"],
        "seconds": result["train_seconds"],
        "settings": settings,
    }


def _seeds(name: str) -> str:
    """Top-1 of the runs of a set of weights, where there is more than one seed."""
    results = _results(name)
    if len(results) < 2:
        return "One seed, so no spread is known."
    reached = {r["recipe"]["seed"]: next(iter(r["test_accuracy"].values())) for r in results}
    each = ", ".join(f"{accuracy:.2f} % (seed {seed})" for seed, accuracy in reached.items())
    return f"{len(reached)} runs reached {mean(list(reached.values()))} of the test images: {each}. Seed 0 ships."


def _epochs(name: str) -> str:
    """The losses by epoch; of a run of `convmixer train`, whose curves show all of them, of every eighth."""
    if by_script(name):
        rows = [tuple(f"{value:g}" for value in row.values()) for row in read_losses(LOGS / name)]
        return table(("epoch", "training loss", "loss of 5,000 training images", "top-1 of them, %"), rows)
    history = read_history(LOGS / name / "metrics.csv")
    rows = [
        (row.epoch, f"{row.train_loss:.4f}", f"{row.train_accuracy:.2f}")
        for row in history
        if row.epoch % 8 == 0 or row.epoch == 1
    ]
    return table(("epoch", "training loss", "top-1 of the augmented training images, %"), rows)


def _shipped_section(name: str) -> str:
    """Settings, losses, confusion and mistakes of one set of weights."""
    job = _job(name)
    found, here = evaluation(name), anchor(name)
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
        f"({here})=\n### {name}",
        f"Trained by {job['program']}. It took {job['seconds']:.0f} s on {job['machine']}; {versions}. {_seeds(name)}",
        _folded("Settings", table(("setting", "value"), settings)),
        _folded("Losses by epoch", _epochs(name)),
        f"![Losses and accuracy of {name} by epoch](_figures/{here}-losses.png)",
        f"![Confusion matrix of {name}](_figures/{here}-confusion.png)",
        _folded("Accuracy by class", table(("class", "top-1", "images"), right)),
        _folded(
            f"The {len(mistakes)} most confident mistakes, by the number of the image in the test batch",
            table(("image", "true", "predicted", "probability", "of the true class"), mistakes),
        ),
    ]
    return "\n\n".join(parts)
