"""Sphinx settings."""

project = "Rankfold"
author = "The Rankfold authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_ivar = True  # attributes are told in their class: a field named "bytes" is no target for the type
exclude_patterns = ["_build"]
