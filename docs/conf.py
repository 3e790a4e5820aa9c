"""Sphinx configuration. `sitegen` writes tables, figures and pages from the package's own records."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "convmixer"
author = "The convmixer developers"
release = version = metadata.version("convmixer")
copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sitegen.extension",
]
exclude_patterns = ["_build", "runs"]
smartquotes = False  # options such as --graph must stay what one can paste
html_theme = "furo"
html_title = f"convmixer {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook holds its outputs
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
