"""Settings of the documentation's site; `make docs` builds it."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

project = "backpack-anew"
version = release = installed("backpack-anew")
copyright = "the backpack-anew authors"  # noqa: A001

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "myst_parser",
    "sphinx_design",
    "sphinx_copybutton",
    "undocumented",
    "maths",
    "names",
    "grid",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = html_favicon = "_static/logo.svg"
html_math_renderer = "mathml"
html_show_sourcelink = False
pygments_style = "friendly"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings name shapes; the signatures' types say less
autodoc_preserve_defaults = True

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "colon_fence"]

sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": ".",
    "subsection_order": [
        f"../tutorials/{each}" for each in ("quantities", "models", "training", "datasets", "curvature")
    ],
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "show_signature": False,
    "remove_config_comments": True,
    "reset_modules": ("matplotlib", "figures.style"),
}
