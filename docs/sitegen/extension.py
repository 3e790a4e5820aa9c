"""What Sphinx loads: the `{records}` directive, and what is drawn and written before the pages are read."""

from __future__ import annotations

import inspect

from docutils.nodes import Node
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from convmixer import registry
from convmixer.training import Recipe, recipes
from sitegen import docstrings, figures, pages
from sitegen.records import RESULTS, WRITERS


class Records(SphinxDirective):
    """`{records} NAME [ARGUMENT ...]`: the text that the function registered as NAME writes."""

    required_arguments = 1
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[Node]:
        name, *arguments = " ".join(self.arguments).split()
        writer = WRITERS[name]
        for source in (*map(inspect.getfile, (writer, registry, Recipe, recipes)), *map(str, RESULTS.iterdir())):
            self.env.note_dependency(source)
        return self.parse_text_to_nodes(writer(*arguments))


def _before_reading(_app: Sphinx) -> None:
    figures.draw_all()
    pages.write_all()


def setup(app: Sphinx) -> None:
    app.add_directive("records", Records)
    app.connect("builder-inited", _before_reading)
    docstrings.connect(app)
