"""The functions that write Markdown from records, by the names that the `{records}` directive knows."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

DOCS = Path(__file__).parent.parent
RESULTS = DOCS.parent / "benchmarks" / "results"

Writer = Callable[..., str]
WRITERS: dict[str, Writer] = {}


def record(name: str) -> Callable[[Writer], Writer]:
    """Let `{records} name` call this function; words after the name are its arguments."""

    def register(function: Writer) -> Writer:
        WRITERS[name] = function
        return function

    return register


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], numbers: int = 0) -> str:
    """A Markdown table; the last `numbers` columns are aligned to the right."""
    rules = ["---"] * (len(titles) - numbers) + ["--:"] * numbers
    lines = [titles, rules, *rows]
    return "\n".join("| " + " | ".join(_cell(str(cell)) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Keeps a number with its unit, and a negative exponent, on one line."""
    text = re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", text)
    return re.sub(r"(?<=\d) (?=(?:%|[MG]|px|s|ms|min|[KM]iB)(?!\w))", "\N{NO-BREAK SPACE}", text.replace("|", r"\|"))


def csv_rows(name: str) -> list[list[str]]:
    """Return the rows of a file of results, first that of the titles."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@record("csv")
def csv_table(name: str) -> str:
    """A file of `benchmarks/results` as it is: measurements that no program wrote as JSON."""
    titles, *rows = csv_rows(name)
    return table(titles, rows)
