"""Formulas by MathJax. Its script and fonts are copied into the build, so that pages need no network."""

from importlib.util import find_spec
from pathlib import Path
from shutil import copy, copytree

SCRIPT, FONTS = "tex-chtml.js", "output/chtml/fonts/woff-v2"


def _copy(app, error):
    if error is None and app.builder.format == "html":
        (package,) = find_spec("sphinx-mathjax-offline").submodule_search_locations
        source, target = Path(package) / "static" / "mathjax", Path(app.outdir) / "_static" / "mathjax"
        copytree(source / FONTS, target / FONTS, dirs_exist_ok=True)
        copy(source / SCRIPT, target)


def setup(app):
    app.setup_extension("sphinx.ext.mathjax")
    app.config.mathjax_path = f"mathjax/{SCRIPT}"
    app.config.mathjax3_config = {"options": {"enableMenu": False}}
    app.connect("build-finished", _copy)
    return {"version": "1", "parallel_read_safe": True}
