"""Settings of the documentation, which `make docs` builds."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_extensions")]

project = "bnn_jax"
author = "the developers of bnn_jax"
copyright = "the developers of bnn_jax, Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
    "docstrings",
    "accessible",
    "notebooks_ahead",
    "api_pages",
    "gallery",
    "results_pages",
    "zoo_pages",
]
root_doc = "index"
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "_extensions", "_templates"]
nitpicky = False
suppress_warnings = ["misc.highlighting_failure"]

# Docstrings: a name in single backticks is code; the formulas of Forward and Backward keep their lines.
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Reference", "notes"), ("References", "notes")]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build" / ".jupyter_cache")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

highlight_language = "none"
html_theme = "furo"
templates_path = ["_templates"]
html_title = "bnn_jax"
html_static_path = ["_static", "../bnn_jax/analysis/sort_tables.js"]
html_css_files = ["site.css"]
html_js_files = ["sort_tables.js", "scrolling.js"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
