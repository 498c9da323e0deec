"""What a model wrote reaches no terminal as it is: escape sequences, bells, marks of direction."""

import json

import pytest
from run_fixture import NASTY, make_run

from isentropic.cli import main
from isentropic.runs.text import as_json, one_line, visible

EVIL = "a\x1b]0;owned\x07b\x9b2Jc\u202ed\u2066e\r\x08\x7f\u2028f\ud800"


def harmless(text):
    return all(char.isprintable() or char in "\n\xa0" for char in text)


def test_visible_keeps_what_is_harmless_and_pictures_the_rest():
    assert visible("é → 𝒳\tx\n") == "é → 𝒳\tx\n"
    assert visible(EVIL) == "a␛]0;owned␇b\ufffd2Jc⟦U+202E⟧d⟦U+2066⟧e␍␈\ufffd⟦U+2028⟧f\ufffd"
    assert harmless(visible(EVIL))
    assert len(one_line(EVIL + "\n").splitlines()) == 1
    for code in [*range(0x20), *range(0x7F, 0xA0)]:
        assert visible(chr(code)) != chr(code) or chr(code) in "\t\n"


def test_json_keeps_the_data_and_is_harmless():
    value = {EVIL: [EVIL, 1.5, None]}
    assert harmless(as_json(value))
    assert json.loads(as_json(value)) == value


@pytest.fixture
def evil_run(tmp_path):
    run = make_run(tmp_path / "run", steps=20, recipe=EVIL.replace("\ud800", ""), tasks=(EVIL.replace("\ud800", ""),))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["predict/top_tokens"] = [[EVIL, -1.0, 3], [NASTY, 1.0, 2]]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    sample = {"step": EVIL, "prompt": EVIL, "completion": EVIL, "reward": 1.0, "tokens": [EVIL], "surprisal": [2.0]}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    finding = {"severity": EVIL, "what": EVIL, "where": EVIL, "remedy": EVIL}
    (run / "audit.json").write_text(json.dumps({"findings": [finding]}))
    (run / "summary.json").write_text(json.dumps({"steps": 20, "stopped": EVIL}))
    return run


@pytest.mark.parametrize(
    "argv", [["explain"], ["explain", "--json"], ["watch", "--once"], ["compare"], ["compare", "--json"]]
)
def test_commands_print_nothing_that_controls_a_terminal(evil_run, capsys, argv):
    assert main([argv[0], str(evil_run), *argv[1:]]) == 0
    out, err = capsys.readouterr()
    assert harmless(out)
    assert harmless(err)
    assert "owned" in out


def test_errors_are_harmless_and_one_line(tmp_path, capsys):
    for argv in (["explain", f"{tmp_path}/{EVIL}"], ["train", "--task", EVIL], ["train", f"--{EVIL}"], ["eval", EVIL]):
        with pytest.raises(SystemExit):
            main(argv)
        err = capsys.readouterr().err
        assert harmless(err)
        assert len(err.splitlines()) == 1
