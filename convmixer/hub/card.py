"""The model card, README.md: a header for the Hub, and the text of `card.md.jinja` between two marks.

A new card takes the place of an older one's generated part. What somebody wrote above or below it stays, and so do the
fields and tags that somebody added to the header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    constants,
    eval_result_entries_to_yaml,
)
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

from convmixer.errors import ArgumentError
from convmixer.hub.publishable import Publishable
from convmixer.hub.write_config import num_classes, shape_of
from convmixer.registry import Metric
from convmixer.transforms import preprocessing

BEGIN = "<!-- convmixer writes this part anew with each push; text above and below it is kept -->"
END = "<!-- the part that convmixer writes ends here -->"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(source: Publishable, name: str, model_name: str, repository: str, old: str) -> str:
    """Return the text of README.md.

    Args:
        source: The model, and what is known of it.
        name: The title.
        model_name: What the card's examples give to `create_model`.
        repository: What the card's examples give to transformers.
        old: An earlier card, or "".

    Raises:
        ArgumentError: The older card's header is not YAML.
    """
    earlier = _parse(old)
    # Jinja2, which fills in the template, is a dependency of torch.
    card = ModelCard.from_template(
        _header(source, name),
        template_path=str(_TEMPLATE),
        plain=_plain,
        literal=lambda label: _plain(literal(label)),
        begin=BEGIN,
        end=END,
        name=name,
        description=source.description.replace("<!--", "&lt;!--").strip(),
        parameters=sum(p.numel() for p in source.model.parameters()),
        shape=shape_of(source.model),
        classes=num_classes(source.model),
        input_size=preprocessing(source.model)["input_size"],
        labels=source.labels,
        create=f"create_model({json.dumps(model_name)}, pretrained=True).eval()",
        repository=json.dumps(repository),
        metrics=source.metrics,
        training_data=source.training_data,
        recipe=source.recipe,
        licence=source.licence or str(earlier.data.get("license") or ""),
        files=source.extra,
    )
    kept: dict[str, Any] = dict(earlier.data.to_dict())  # type: ignore[no-untyped-call]
    if source.training_data:  # the earlier data set is that of other weights
        kept.pop("datasets", None)
    _keep_fields(card.data, kept)
    text = _keep_text(card.text.strip(), earlier.text)
    return f"---\n{card.data.to_yaml()}\n---\n\n{text.strip()}\n"


def _plain(text: str) -> str:
    """Escape text of others, so that it starts no HTML, and in a table no cell."""
    return " ".join(text.replace("<", "&lt;").replace("|", r"\|").split())


def literal(label: str) -> str:
    """Escape a class name, so that Markdown shows it as it is; HTML's signs are left to the caller."""
    return re.sub(r"([\\`*_\[\]#~])", r"\\\1", label)


def _header(source: Publishable, name: str) -> ModelCardData:
    classes = num_classes(source.model)
    return ModelCardData(
        license=source.licence or None,
        library_name="timm",
        pipeline_tag="image-classification" if classes else "image-feature-extraction",
        datasets=[source.dataset] if source.dataset else None,
        tags=["convmixer", "timm", *(["transformers"] if classes else []), *source.tags],
        model_name=name if source.metrics else None,
        eval_results=_results(source.metrics) or None,
    )


def _results(metrics: Sequence[Metric]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=metric.dataset,
            dataset_name=metric.dataset,
            metric_type="accuracy" if metric.name.startswith(("top-1", "acc")) else metric.name,
            metric_name=f"{metric.name} ({metric.measured_by})" if metric.measured_by else metric.name,
            metric_value=metric.value,
        )
        for metric in metrics
    ]


def eval_results(metric: Metric, dataset: str, repository: str) -> bytes:
    """Return a file of the folder `.eval_results`, by which the Hub compares models on a benchmark.

    A leaderboard has one number per model and file, so only one metric goes there.

    Args:
        metric: In percent.
        dataset: Name of the benchmark's data set on the Hub.
        repository: "owner/name", which has the evaluation as evaluation.json.
    """
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id="default",
        value=metric.value,
        source_url=f"{constants.ENDPOINT}/{repository}/blob/main/evaluation.json",
        source_name="evaluation.json",
        notes=f"{metric.name} in percent, {metric.dataset}, measured by {metric.measured_by}",
    )
    return yaml_dump(eval_result_entries_to_yaml([entry])).encode()


def _parse(old: str) -> ModelCard:
    # The client warns of a card without a header.
    try:
        return ModelCard(old if old.startswith("---") else f"---\n{{}}\n---\n{old}")
    except Exception as error:  # the YAML library has its own errors
        reason = " ".join(str(error).split())
        raise ArgumentError(f"the older README.md has a header that cannot be read: {reason}. Mend it first") from error


def _keep_fields(data: Any, earlier: Mapping[str, Any]) -> None:
    """Add to a header what only the earlier one has; results of evaluations are replaced."""
    for key, value in earlier.items():
        if key == "tags":
            data.tags = list(dict.fromkeys([*data.tags, *(value or ())]))
        elif key != "model-index" and data.get(key) is None:
            data[key] = value


def _keep_text(text: str, earlier: str) -> str:
    """Return the generated text, with what stands above and below the generated part of an earlier card."""
    start, end = earlier.find(BEGIN), earlier.find(END)
    if 0 <= start < end:
        return earlier[:start] + text + earlier[end + len(END) :]
    return f"{text}\n\n{earlier.strip()}"
