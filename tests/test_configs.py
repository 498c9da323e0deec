"""Every file in configs/ is checked as `train` checks it, offline and without reading rows or loading a model."""

import re
import tomllib
from pathlib import Path

import pytest

from isentropic.cli import main

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_dry_runs(path, capsys, tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    pytest.importorskip("textworld")
    monkeypatch.chdir(tmp_path)
    # AppWorld's ids are the user's; any will do here.
    for number, name in enumerate(("train.txt", "dev.txt")):
        Path(name).write_text(f"id_{number}\n")
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "optimizer steps of" in capsys.readouterr().out
    text = path.read_text()
    assert f"configs/{path.name}" in text, "the header has the launch command"
    values = tomllib.loads(text)
    # A step's completions fall into whole micro-batches on every process, as the header's command starts them.
    found = re.search(r"(?:--nproc-per-node|--num_processes) (\d+)", text)
    ranks = int(found[1]) if found else 8 if "fsdp2.yaml" in text else 1
    assert values["prompts"] * values["generations"] // values["updates"] % (ranks * values["micro_batch"]) == 0


def test_the_page_says_of_every_config_whether_it_was_run():
    page = (ROOT / "docs" / "configs.md").read_text()
    assert [path.name for path in FILES if f"`{path.name}`" not in page] == []


def test_there_are_configs():
    assert len(FILES) >= 6
