"""The documentation site, from docs/ and the docstrings: `make docs`. What leads nowhere is an error."""

from protomamba import __version__

project = "protomamba"
author = "the protomamba authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
