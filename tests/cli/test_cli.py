"""The command line: errors in one line within two seconds and without torch, and what needs no training."""

import subprocess
import sys
import time

import pytest

from isentropic.cli import main
from isentropic.control.controllers import CONTROLLERS
from isentropic.control.targets import TARGETS
from isentropic.recipes import RECIPES
from isentropic.recipes.knobs import all_knobs
from isentropic.runs.record import Record

# (flags, what the one line must hold: what was got, what is allowed, the remedy)
BAD_FLAGS = {
    "unknown flag": (["--targt", "1"], ["--targt", "did you mean --target?"]),
    "not a number": (["--steps", "many"], ["--steps", "many"]),
    "too small": (["--steps", "0"], ["--steps: got 0", "at least 1"]),
    "recipe": (["--recipe", "repo-d-lop"], ["repo-d-lop", "did you mean repo-d-loop?"]),
    "knob": (["--knob", "clip_hi"], ["clip_hi", "did you mean clip_high?"]),
    "controller": (["--controller", "pid"], ["pid", "double_halve", "did you mean pi?"]),
    "controller option": (["--controller", "pi:gian=1"], ["gian", "gain"]),
    "target": (["--target", "hot"], ["hot", "initial", "SHARE%"]),
    "target zero": (["--target", "0"], ["must be > 0"]),
    "clip knob without a clip": (["--recipe", "rloo", "--knob", "clip_high"], ["needs a clip", "zeta"]),
    "clip knob on-policy": (["--recipe", "adapo", "--updates", "1"], ["no ratio leaves 1", "several optimizer steps"]),
    "on-policy recipe": (["--recipe", "rloo", "--updates", "4"], ["strictly on-policy", "got 4"]),
    "updates": (["--updates", "5"], ["does not divide the 512"]),
    "model": (["--model", "tny"], ["tny", "did you mean tiny?"]),
    "model path": (["--model", "./nowhere"], ["no config.json"]),
    "task": (["--task", "exr"], ["exr", "did you mean expr?"]),
    "device": (["--device", "gpu"], ["gpu", "auto, cpu, cuda"]),
    "dtype": (["--dtype", "float16"], ["float16", "bfloat16"]),
    "temperature": (["--temperature", "0"], ["must be > 0"]),
    "infinite temperature": (["--temperature", "inf"], ["got inf", "finite"]),
    "infinite learning rate": (["--learning-rate", "inf"], ["got inf", "finite"]),
    "learning rate": (["--learning-rate", "0"], ["must be > 0"]),
    "shaping": (["--shaping", "repo_x"], ["repo_x", "did you mean repo"]),
    "penalty": (["--penalty", "lp_rge"], ["lp_rge", "did you mean lp_reg?"]),
    "component of a file": (["--penalty", "nowhere.py:mine"], ["there is no file nowhere.py"]),
    "option by set": (["--set", "recipe.clip_hihg=0.3"], ["clip_hihg", "did you mean clip_high?"]),
    "set without recipe": (["--set", "steps=3"], ["'steps=3'", "recipe.OPTION=VALUE", "flags of their own"]),
    "set without a value": (["--set", "recipe.clip_high"], ["recipe.OPTION=VALUE"]),
    "tracker": (["--report-to", "wandbb"], ["wandbb", "did you mean wandb?"]),
    "adapter": (["--lora-alpha", "8"], ["lora_alpha", "set lora_rank too"]),
    "hub": (["--push-to-hub", "a b"], ["'a b'", "OWNER/NAME"]),
    "every": (["--every", "0"], ["at least 1"]),
    "head": (["--head", "liger"], ["liger", "auto, trl"]),
    "audit": (["--audit", "maybe"], ["maybe", "on, off"]),
    "no such file": (["missing.toml"], ["missing.toml: no such file"]),
    "resume a file": (["--resume", "--out", __file__], ["is a file", "new or empty"]),
    "resume in a directory of other things": (["--resume", "--out", "/"], ["/ holds no run", "new or empty"]),
    "out in a directory of other things": (["--out", "/"], ["/ holds no run", "new or empty"]),
}
BAD_FILES = {
    "unknown key": ("stepps = 3", ["unknown key 'stepps'", "did you mean steps?"]),
    "wrong type": ('steps = "3"', ["key steps", "got '3'", "must be int"]),
    "boolean": ("steps = true", ["key steps", "got True"]),
    "not toml": ("steps = = 3", ["not valid TOML"]),
    "option": ("[recipe_options]\nclip_hihg = 0.3", ["clip_hihg", "did you mean clip_high?"]),
    "option type": ('[recipe_options]\nclip_high = "x"', ["clip_high"]),
    "set twice": ('penalty = "aent"\n[recipe_options]\npenalty = "lp_reg"', ["penalty is set twice", "leave one"]),
    "option value": ("[recipe_options]\nclip_high = -1.0", ["clip_high must be > 0"]),
}


def refused(capsys, argv):
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert time.monotonic() - began < 2
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(capsys, name):
    flags, says = BAD_FLAGS[name]
    text = refused(capsys, ["train", *flags])
    assert all(part in text for part in says), text


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(capsys, tmp_path, name):
    content, says = BAD_FILES[name]
    path = tmp_path / "run.toml"
    path.write_text(content)
    text = refused(capsys, ["train", str(path)])
    assert str(path) in text
    assert all(part in text for part in says), text


def test_an_error_comes_before_torch_and_within_two_seconds():
    code = (
        "import sys\nfrom isentropic.cli import main\n"
        "try:\n    main(['train', '--targt', '1'])\nexcept SystemExit as stop:\n"
        "    sys.exit(9 if 'torch' in sys.modules else stop.code)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, time.monotonic() - began < 2) == (2, True), done.stderr


def test_a_run_directory_is_never_overwritten(capsys, tmp_path):
    Record(tmp_path).start({}, {}, 0)
    assert "already holds a run" in refused(capsys, ["train", "--out", str(tmp_path)])


def test_resume_with_a_file_needs_the_directory(capsys, tmp_path):
    (tmp_path / "a.toml").write_text("")
    assert "leave the file out" in refused(capsys, ["train", str(tmp_path / "a.toml"), "--resume"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_dry_runs(capsys, name):
    assert main(["train", "--recipe", name, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"{name}: " in text
    assert "runs/expr-" in text


def test_eval_of_a_run_without_checkpoints(capsys, tmp_path):
    assert "is not a run directory" in refused(capsys, ["eval", str(tmp_path)])
    Record(tmp_path).start({}, {}, 0)
    assert "no complete checkpoint" in refused(capsys, ["eval", str(tmp_path)])


def test_help_lists_every_setting_in_its_group(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--penalty STR",
        "kl_cov, lp_reg, aent",
        *all_knobs(),
        *CONTROLLERS,
        *TARGETS,
        "a controller turns a knob",
        "nats per token",
        "[800]",
    ):
        assert words in text


def test_the_name_of_a_run_directory_is_a_default(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Record(tmp_path / "runs" / "expr-grpo-s0").start({}, {}, 0)
    assert main(["train", "--recipe", "grpo", "--dry-run"]) == 0
    assert "runs/expr-grpo-s0-2\n" in capsys.readouterr().out
