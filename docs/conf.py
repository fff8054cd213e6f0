"""The site that `make docs` builds: hand-written pages, and a reference that is made from the code (docs/reference.py).

Sphinx has autodoc and has been maintained for more than 15 years; zensical, the other candidate, is at 0.1.3, and its
interface may still change. MyST reads the same Markdown pages that GitHub shows.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import reference

import davae

project = "davae"
version = release = davae.__version__
html_title = f"davae {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
html_theme = "furo"
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go, .c1"

# The source folder is the repository's root, so that the relative links of all pages hold on the site, too.
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
include_patterns = ["docs/**", "README.md", "CHANGELOG.md", "experiments/**.md", "recipes/**.md"]
exclude_patterns = [".*", "build", "dist", "runs", "src", "tests"]

# Docstrings: Google's sections, and single backticks as in Markdown.
default_role = "py:obj"
autodoc_member_order = "bysource"


def setup(app: Sphinx) -> None:
    """Write the generated pages before Sphinx looks for pages."""
    reference.write(Path(__file__).parent / "reference")
