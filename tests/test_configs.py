"""Every configuration that the package ships is checked as `train` checks it: offline, and no model is loaded."""

import re
import tomllib
from pathlib import Path

import pytest

from isentropic.cli import main
from isentropic.cli.catalogue import configs

PAGE = (Path(__file__).parent.parent / "docs" / "configs.md").read_text()
FILES = {name: text for name, text in configs().items() if name != "fsdp2"}


@pytest.mark.parametrize("name", FILES)
def test_a_config_dry_runs_as_it_is_printed(name, capsys, tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    pytest.importorskip("textworld")
    monkeypatch.chdir(tmp_path)
    # AppWorld's ids are the user's; any will do here.
    for number, path in enumerate(("train.txt", "dev.txt")):
        Path(path).write_text(f"id_{number}\n")
    assert main(["configs", name]) == 0
    text = capsys.readouterr().out
    assert text == FILES[name]
    Path("run.toml").write_text(text)
    assert main(["train", "run.toml", "--dry-run"]) == 0
    assert "optimizer steps of" in capsys.readouterr().out
    assert f"isentropic configs {name} > run.toml" in text, "the header has the commands"
    assert ("isentropic configs fsdp2 > fsdp2.yaml" in text) == ("--config_file fsdp2.yaml" in text)
    values = tomllib.loads(text)
    # A step's completions fall into whole micro-batches on every process, as the header's command starts them.
    found = re.search(r"(?:--nproc-per-node|--num_processes) (\d+)", text)
    ranks = int(found[1]) if found else 8 if "fsdp2.yaml" in text else 1
    assert values["prompts"] * values["generations"] // values["updates"] % (ranks * values["micro_batch"]) == 0


def test_configs_are_listed_with_a_line_each(capsys):
    assert main(["configs"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert "isentropic configs NAME" in title
    assert [line.split()[0] for line in lines] == list(configs())
    assert all(len(line.split()) > 5 and line.endswith((".", "flags.")) for line in lines)


def test_a_name_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["configs", "qwen3-8b-math-8gpus"])
    assert "did you mean qwen3-8b-math-8gpu?" in capsys.readouterr().err


def test_the_page_says_of_every_config_whether_it_was_run():
    assert [name for name in FILES if f"`{name}`" not in PAGE] == []


def test_there_are_configs():
    assert len(FILES) >= 6
    assert "fsdp_version: 2" in configs()["fsdp2"]
