"""Docstrings write code in single backticks, as in Markdown; reStructuredText wants two."""

from __future__ import annotations

import inspect
import re

from sphinx.application import Sphinx


def _code(text: str) -> list[str]:
    return re.sub(r"(?<![`:])`([^`]+)`(?!`)", r"``\1``", text).split("\n")


def _before_napoleon(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    lines[:] = _code("\n".join(lines))


def _after_napoleon(_app: Sphinx, what: str, _name: str, obj: object, _options: object, lines: list[str]) -> None:
    if what == "property":  # napoleon takes what stands before a colon for a type
        lines[:] = _code(inspect.getdoc(obj) or "")


def connect(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
