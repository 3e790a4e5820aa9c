"""Tables of the variants and their weights, from `convmixer.registry`."""

from __future__ import annotations

from importlib import metadata

import timm

from convmixer import registry
from convmixer.registry import Variant, Weights
from sitegen.records import record, table


def million(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def billion(count: int) -> str:
    return f"{count / 1e9:.2f} G"


def bytes_of(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


@record("models")
def models() -> str:
    shape = ("dim/depth", "kernel", "patch", "activation", "input", "classes")
    rows = [
        (
            f"[{v.name}](models/{v.name}.md)",
            f"{v.dim}/{v.depth}",
            v.kernel_size,
            v.patch_size,
            v.act_layer,
            f"{v.input_size[1]} px",
            v.num_classes,
            million(v.parameters),
            billion(v.macs),
            ", ".join(f"`{w.tag}`" for w in v.weights) or "none",
        )
        for v in registry.VARIANTS
    ]
    return table(("name", *shape, "parameters", "MACs", "weights"), rows)


@record("notes")
def notes() -> str:
    return "\n".join(f"- `{v.name}`: {v.note}" for v in registry.VARIANTS if v.note)


def metrics_of(weights: Weights) -> list[tuple[str, ...]]:
    return [(m.name, f"{m.value:.2f} %", m.dataset, m.measured_by) for m in weights.metrics]


@record("metrics")
def metrics() -> str:
    rows = [(f"`{v.name}.{w.tag}`", *row) for v in registry.VARIANTS for w in v.weights for row in metrics_of(w)]
    return table(("weights", "metric", "value", "test set", "measured by"), rows)


def place(weights: Weights) -> str:
    return "the package" if weights.path else f"`{weights.hub_id}` on the Hub"


def training_of(weights: Weights) -> str:
    if not weights.machine:
        return "not published"
    return f"{weights.machine}; {weights.training_seconds:,.0f} s, seed {weights.seed}"


@record("weights")
def weights_table() -> str:
    rows = [
        (f"`{v.name}.{w.tag}`", place(w), w.licence, w.training_data, training_of(w))
        for v in registry.VARIANTS
        for w in v.weights
    ]
    return table(("weights", "file from", "licence", "training data", "machine, time, seed"), rows)


def _size(variant: Variant) -> tuple[str, ...]:
    float32 = bytes_of(4 * variant.parameters)
    return (million(variant.parameters), float32, billion(variant.macs))


@record("choice")
def choice() -> str:
    """The weights with what decides between them: test set, accuracy, size, computation."""
    found = [(v, w) for v in registry.VARIANTS for w in v.weights]
    rows = [
        (
            f"[{v.name}](models/{v.name}.md)",
            f"{w.metrics[0].value:.2f} %",
            w.training_data.partition(" train")[0],
            f"{v.input_size[1]} px",
            *_size(v),
            "package" if w.path else "Hub",
        )
        for v, w in found
    ]
    return table(("weights of", "top-1", "on", "input", "parameters", "in float32", "MACs", "from"), rows)


def _timm_names(ours: bool) -> str:
    def registered_here(name: str) -> bool:
        return timm.model_entrypoint(name).__module__.startswith("convmixer.")

    return "\n".join(f"- `{v.name}`" for v in registry.VARIANTS if registered_here(v.name) == ours)


@record("timm-registered-here")
def timm_registered_here() -> str:
    return _timm_names(ours=True)


@record("timm-own")
def timm_own() -> str:
    return _timm_names(ours=False)


@record("python")
def python() -> str:
    return f"Python {metadata.metadata('convmixer')['Requires-Python']}".replace(">=", "") + " or newer."


@record("requirements")
def requirements() -> str:
    needed = [r for r in metadata.requires("convmixer") or () if "extra ==" not in r]
    return "\n".join(f"- `{requirement}`" for requirement in needed)
