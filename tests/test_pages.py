"""How the documentation is built: API pages, tables without a place in the sidebar, notebooks as pages."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

import isentropic

pytest.importorskip("myst_parser")
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def extensions():
    sys.path.insert(0, str(DOCS / "_ext"))
    yield {name: import_module(name) for name in ("api", "notebooks", "pages")}
    sys.path.remove(str(DOCS / "_ext"))


def test_every_public_name_is_described_once(extensions):
    api = extensions["api"]
    there = api.modules()
    shown = [
        (getattr(getattr(import_module(f"isentropic.{module}"), name), "__module__", module), name)
        for page in api.PAGES.values()
        for module in page
        if module in there
        for name in api.names(module)
    ]
    assert sorted(set(shown)) == sorted(shown)
    # The recipes are a page of their own.
    assert set(isentropic.__all__) - {name for _, name in shown} == {"RECIPES"}


def test_a_config_shows_its_own_fields_and_not_those_of_the_engine(extensions):
    pytest.importorskip("trl")
    from isentropic.engines.trl import EntropyControlConfig, IsentropicConfig

    short = extensions["pages"]._short
    fields = ", ".join(f"{name}: str" for name in IsentropicConfig.__dataclass_fields__)
    assert short(None, "class", "", IsentropicConfig, None, f"({fields})", None) == ("(**settings)", None)
    fields = ", ".join(f"{name}: str" for name in EntropyControlConfig.__dataclass_fields__)
    assert short(None, "class", "", EntropyControlConfig, None, f"({fields})", None) is None


def test_a_table_has_a_title_and_is_neither_in_the_sidebar_nor_in_the_search(extensions):
    source = ["| a |\n|---|\n"]
    extensions["pages"]._table(None, "results/plant-table", source)
    assert source == ["---\norphan: true\nnosearch: true\n---\n\n# Table: plant\n\n| a |\n|---|\n"]
    page = ["# Plants\n"]
    extensions["pages"]._table(None, "results/plant", page)
    assert page == ["# Plants\n"]


def test_formulas_and_bold_words_of_a_docstring_survive(extensions):
    lines = ["`code` of **bold words**, |A| and **kwargs", "    >>> 2 ** 3 | 1"]
    extensions["pages"]._plain(None, "function", "f", None, None, lines)
    assert lines == ["``code`` of **bold words**, \\|A\\| and \\**kwargs", "    >>> 2 ** 3 | 1"]


def test_a_notebook_becomes_its_cells_and_stored_outputs(extensions):
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["a\n", "```\n"]},
        {"output_type": "display_data", "data": {"text/plain": ["table"], "text/html": ["<table></table>"]}},
        {"output_type": "display_data", "data": {"text/plain": ["figure"], "image/png": "QUJD\n"}},
        {"output_type": "display_data", "data": {"text/plain": ["3"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {"cell_type": "code", "source": ["x = 1"], "outputs": outputs},
    ]
    assert extensions["notebooks"].markdown(json.dumps({"cells": cells})).split("\n\n") == [
        "# Title\nText.",
        "```python\nx = 1\n```",
        "````text\na\n```\n````",
        '```{raw} html\n<div class="frame"><table></table></div>\n```',
        "![Figure of the cell above](data:image/png;base64,QUJD)",
        "```text\n3\n```",
    ]
