"""What the documentation shows runs as it stands there: every block of code of every page, by a rule for its language.

Python blocks of a page run in one namespace. A command runs for real where it only reads a run, and as a dry run where
it trains; TOML goes through the config. ``<!-- test: NAME -->`` before a block gives it what NAMES makes, ``<!-- file:
NAME -->`` writes it to a file as well, ``<!-- needs: gpu|cluster|network -->`` has it compiled or dry-run only.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
OUTPUT = {"text"}
PROGRAMS = ("isentropic", "make", "python", "pip", "torchrun", "accelerate", "trl", "git")
NEEDS = {"gpu", "cluster", "network"}
FENCE = re.compile(r"(?:^<!-- (\w+): (.*?) -->\n)?^(`{3,})(.*?)\n(.*?)^\3 *$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: str
    line: int
    marker: str | None
    value: str
    language: str
    code: str


def blocks(path):
    """Every fenced block of a page; blocks of Sphinx are no code."""
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    for m in FENCE.finditer(text):
        if not m[4].startswith("{"):
            yield Block(name, text[: m.start(4)].count("\n") + 1, m[1], m[2] or "", m[4].strip(), m[5])


ALL = {str(path.relative_to(ROOT)): list(blocks(path)) for path in PAGES}
WITH_CODE = [name for name, found in ALL.items() if found]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    pytest.importorskip("trl")
    from trl_case import save_model

    return save_model(tmp_path_factory.mktemp("docs") / "model")


@pytest.fixture(scope="session")
def example(model_dir, tmp_path_factory):
    """A run directory with the files of a long run and the checkpoints of a short one."""
    from run_fixture import make_run

    from isentropic.cli import main

    home = tmp_path_factory.mktemp("example")
    flags = "--steps 4 --prompts 4 --generations 4 --save-every 4 --eval-k 0 --audit off"
    assert main(["train", "--model", model_dir, "--out", str(home / "run"), *flags.split()]) == 0
    made = make_run(home / "long", steps=400)
    for name in ("metrics", "samples", "evaluations"):
        shutil.copy(made / f"{name}.jsonl", home / "run")
    return home / "run"


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch, capsys, model_dir, example):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    site = Site(tmp_path, model_dir, example)
    for block in ALL[page]:
        if block.marker == "file":
            (tmp_path / block.value).write_text(block.code)
    # A module of its own: what a page defines can be pickled, as in a script.
    page_module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page_module)
    names = vars(page_module)
    for block in ALL[page]:
        where = f"{block.page}:{block.line}"
        with _Located(where):
            run_block(block, names, site, where)
    for check in AFTER.get(page, ()):
        check(names, tmp_path)
    sys.modules.pop("my_tasks", None)


class _Located:
    """Says which block failed."""

    def __init__(self, where):
        self.where = where

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            error.add_note(f"in the block at {self.where}")


class Site(NamedTuple):
    """Where a page's blocks run."""

    home: Path
    model: str
    example: Path

    def run_dir(self, name):
        """The example, under the name that the page gives it."""
        for path in glob(name) or [name]:
            if not Path(path).exists():
                shutil.copytree(self.example, self.home / path)
                if seed := re.search(r"-s(\d+)$", path):
                    header = json.loads((self.home / path / "run.json").read_text())
                    (self.home / path / "run.json").write_text(json.dumps(header | {"seed": int(seed[1])}))
        return glob(name) or [name]


def run_block(block, names, site, where):
    if block.language in OUTPUT:
        start = re.search(rf"^(\$ |\.venv/bin/|({'|'.join(PROGRAMS)}) [a-z])", block.code, re.MULTILINE)
        assert not start, f"{where}: a command belongs in a block of sh, got {start[0]!r} in one of output"
        return
    if block.marker == "needs":
        assert block.value in NEEDS, f"{where}: needs must be one of {NEEDS}"
    assert block.marker in (None, "needs", "test", "file"), f"{where}: no rule for the marker {block.marker}"
    rules = {"python": run_python, "sh": run_shell, "toml": run_toml}
    assert block.language in rules, (
        f"{where}: no rule for a block of {block.language!r}; sh, toml, python, text have one"
    )
    rules[block.language](block, names, site)


def run_python(block, names, site):
    code = compile(block.code, f"{block.page}:{block.line}", "exec")
    if block.marker == "needs":
        return
    for name in re.findall(r'"(runs/[\w-]+)"', block.code):
        site.run_dir(name)
    if block.marker == "test":
        names.update(NAMES[block.value](site.home, block.line))
    exec(code, names)


def run_toml(block, names, site):
    from isentropic.cli import main

    if block.value == "grid.toml":
        assert main(["compare", block.value, "--dry-run"]) == 0
        return
    path = site.home / "run.toml"
    path.write_text(block.code.replace('"PATH"', f'"{site.model}"'))
    assert main(["train", str(path), "--dry-run"]) == 0


def run_shell(block, names, site):
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if not words:
            continue
        if "isentropic" in words and words[0] == "torchrun":
            words = words[words.index("isentropic") :]
        program = words[0].removeprefix(".venv/bin/")
        if block.marker == "needs" and program in ("torchrun", "accelerate", "trl", "appworld"):
            continue
        assert program in SHELL, f"{block.page}:{block.line}: no rule for the command {program!r}"
        SHELL[program](words[1:], site)


def shell_isentropic(args, site):
    from isentropic.cli.catalogue import configs
    from isentropic.cli.main import build_parser, main
    from isentropic.experiments.config import load
    from isentropic.tasks import load_task

    (site.home / "run.toml").touch()
    args = [site.model if word == "PATH" else word for word in args]
    command = args[0]
    if command == "train":
        if "--resume" in args:
            site.run_dir("runs/expr-isentropic-s0")
        assert main(args if "--dry-run" in args else [*args, "--dry-run"]) == 0
    elif command == "configs" and ">" in args:
        (site.home / args[-1]).write_text(configs()[args[1]])
    elif command == "warmup":
        given = build_parser().parse_args(args)
        if not given.task.startswith("textworld:") or find_spec("textworld"):
            load_task(given.task)
        shutil.copytree(site.model, site.home / given.out)
    elif command == "audit" and site.model not in args:
        given = vars(build_parser().parse_args(args))
        load(given["config"], {k: v for k, v in given.items() if k not in ("config", "command", "json")})
    elif command == "compare" and not any(word.startswith("runs/") for word in args):
        assert main(args if "--dry-run" in args else [*args, "--dry-run"]) == 0
    elif command == "model" or (command == "eval" and "smollm2" in args):
        build_parser().parse_args(args)  # what would be fetched, or was
    elif command in ("explain", "watch", "report", "eval", "compare"):
        for i, word in reversed(list(enumerate(args))):
            if word.startswith("runs/") or word == "my-run":
                args[i : i + 1] = site.run_dir(word)
        if "--serve" in args:
            build_parser().parse_args(args)
            return
        assert main([*args, "--once"] if command == "watch" and "--once" not in args else args) == 0
    else:
        assert main(args) in ((0, 1) if command == "audit" else (0,))


def shell_make(args, site):
    subprocess.run(["make", "-n", *args], cwd=ROOT, check=True, capture_output=True)


def shell_pip(args, site):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert args[0] == "install"
    for word in args[1:]:
        if "==" in word:
            # The one package that no extra brings: it lives in an environment of its own.
            assert word == "appworld==0.1.3"
            continue
        name, _, rest = word.partition("[")
        assert name == "isentropic"
        assert all(extra in extras for extra in rest.rstrip("]").split(",") if extra)


def shell_tail(args, site):
    site.run_dir(str(Path(args[-1]).parent))
    subprocess.run(["tail", *args], check=True, capture_output=True)


def shell_python(args, site):
    """A command of verl's: its recipe is one, and the settings of ours that it names are there and hold."""
    from isentropic.engines.verl.plugin import MONITOR, group_entry
    from isentropic.recipes import RECIPES, compose

    assert args[:2] == ["-m", "verl.trainer.main_ppo"]
    given = dict(word.split("=", 1) for word in args[2:] if "=" in word)
    name, prefix = given.pop("+isentropic"), "actor_rollout_ref.actor.policy_loss."
    ours = {key.removeprefix(prefix): value for key, value in given.items()}
    if name == MONITOR:
        assert not ours
        return
    known = group_entry(RECIPES[name], name)["actor_rollout_ref"]["actor"]["policy_loss"]
    assert set(ours) <= set(known)
    compose(name, **ours)


def shell_ray(args, site):
    assert args[0] == "start"
    assert args[1] == "--head" or args[1].startswith("--address=")


def shell_sh(args, site):
    subprocess.run(["sh", "-n", str(ROOT / args[0])], check=True, capture_output=True)


SHELL = {
    "appworld": lambda args, site: None,
    "isentropic": shell_isentropic,
    "make": shell_make,
    "pip": shell_pip,
    "python": shell_python,
    "ray": shell_ray,
    "sh": shell_sh,
    "tail": shell_tail,
}


def trl_names(home, line, **changes):
    """A model, a reward, data and settings, as a user of TRL has them."""
    from datasets import Dataset
    from trl_case import BASE, parts, share_of_digits

    settings = {k: v for k, v in BASE.items() if k != "steps_per_generation"}
    settings |= {"output_dir": str(home / f"out-{line}"), "max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    settings = {k: v for k, v in (settings | changes).items() if v is not None}
    model, tokenizer = parts()
    data = Dataset.from_list([{"prompt": "12>"}] * 64)
    return {
        "your_settings": settings,
        "model": model,
        "tokenizer": tokenizer,
        "reward": share_of_digits,
        "dataset": data,
    }


def trainer_names(home, line):
    from trl_case import make

    from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer

    return {"trainer": make(IsentropicTrainer, IsentropicConfig, home / f"out-{line}")}


def model_names(home, line):
    """A model, and completions that it drew itself with their log-probabilities."""
    from trl_case import parts

    model, tokenizer = parts()
    model.eval()
    prompts = tokenizer(["12>", "34>"] * 8, return_tensors="pt")
    ids = model.generate(
        **prompts, do_sample=True, top_k=0, min_new_tokens=8, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():
        logp = model(ids).logits[:, -9:-1].log_softmax(-1).gather(-1, ids[:, -8:, None])[..., 0]
    every = torch.ones_like(ids)
    names = {"model": model, "input_ids": ids, "attention_mask": every, "mask": every[:, -8:]}
    return names | {"logp_old": logp, "logp_sampler": logp}


NAMES = {
    "trl": trl_names,
    "tracker": lambda home, line: trl_names(home, line, report_to=None),
    "resume": lambda home, line: {},
    "audit-trainer": trainer_names,
    "audit-model": model_names,
    "play": lambda home, line: trl_names(home, line, max_completion_length=96),
    "core": lambda home, line: torch.manual_seed(0) and {},
}


def the_core_holds_its_target(names, home):
    code = next(block.code for block in ALL["README.md"] if block.value == "core")
    assert len(code.strip().splitlines()) <= 20
    probabilities = names["policy"].softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean().item()
    # 10 answers start at log 10 = 2.30 nats; three right ones alone would leave at most log 3 = 1.10.
    assert entropy == pytest.approx(1.5, rel=0.1)
    assert probabilities[:, :3].sum(-1).mean() > 0.6


def the_subclass_and_the_function_hold_entropy_in_trl(names, home):
    made = list(home.glob("out-*/metrics.jsonl"))
    assert [path.read_text().count('entropy/target"') for path in made] == [4, 4]


def the_core_holds_in_both_loops(names, home):
    assert names["stats"].entropy.mean().item() == pytest.approx(1.5, rel=0.1)
    assert names["state"].refused == 0


def the_tracker_has_our_names(names, home):
    """TensorBoard's files are in the run directory and hold every figure of metrics.jsonl that is a number."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from isentropic.runs.record import Record

    (events,) = home.glob("out-*/runs/*/events*")
    seen = EventAccumulator(str(events))
    seen.Reload()
    (row, *_) = Record(events.parents[2]).rows("metrics")
    rooms = ("entropy", "knob", "clip", "ratio", "cov", "adv", "predict")
    ours = [name for name, value in row.items() if name.split("/")[0] in rooms and isinstance(value, int | float)]
    assert {"entropy/mean", "entropy/target", "knob/value", "clip/high_frac", "cov/adv_logp"} <= set(ours)
    assert {f"train/{name}" for name in ours} <= set(seen.Tags()["scalars"])
    assert seen.Scalars("train/entropy/mean")[0].value == pytest.approx(row["entropy/mean"], rel=1e-6)


AFTER = {
    "README.md": [the_core_holds_its_target, the_subclass_and_the_function_hold_entropy_in_trl],
    "docs/own-loop.md": [the_core_holds_in_both_loops],
    "docs/trl.md": [the_tracker_has_our_names],
}


def test_a_block_without_a_rule_fails(tmp_path):
    site = Site(tmp_path, "", tmp_path)
    for language, code, marker in (
        ("ruby", "puts 1", None),
        ("", "x", None),
        ("sh", "rm -r /", None),
        ("sh", "ls", "skip"),
    ):
        with pytest.raises(AssertionError, match="no rule"):
            run_block(Block("page.md", 1, marker, "", language, code), {}, site, "page.md:1")


def test_no_page_names_a_page_that_is_not_there():
    for path in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8")):
            made = target.startswith(("api/", "../api/"))
            assert made or (path.parent / target).exists(), f"{path.relative_to(ROOT)} links {target}"
