"""The run directory and its schema: the only contract between a run and everything that reads it.

::

    RUN/
      run.json           written first: schema, created, command, config (resolved), recipe, task, model, versions,
                         machine, seed; if isentropic train wrote it, origin: what the numbers depend on
                         besides the settings
      audit.json         when training starts: findings on precision and sampling, checks, measured figures
      metrics.jsonl      one row per optimizer step
      samples.jsonl      a few completions per generated batch, with surprisal and entropy by token
      evaluations.jsonl  one row per evaluation: pass@k, distinct answers, and their counts by prompt
      summary.json       written at the end: the closing table; stopped: why a run ended itself early;
                         before: earlier tasks' evaluations at the start, at every switch and at the end
      report.html        written at the end: the rest of the directory as a page
      README.md          the model card, with the first checkpoint and again at the end
      checkpoint-N/      the engine's own checkpoint after optimizer step N, with isentropic.json, the controller;
                         and checkpoint.json, sizes and digests of all these files, written last
      .run.lock          while the run is under way: its process

Rows are JSON objects; a number that is not finite, or not known, is null. Fields are only ever added within a schema
number. Text files are UTF-8, and a reader must ignore a last line that is cut short (a run may be killed in a write).

A row of metrics.jsonl has ``step`` (optimizer steps done), ``seconds`` (since this process began training) and the
fields below, as far as they are known. Trackers get those that are numbers, by the same names. The part of a name
before the slash is its group.

============================  ==========================================================================================
**entropy**                   nats per generated token; a nat is 1.44 bits
``entropy/mean``              of the trained policy, exact, at the sampling temperature; over the step and all ranks
``entropy/tokens``            number of tokens that were read
``entropy/target``            target H* in force; null while the first entropy is measured, or without a target
``entropy/target_why``        text: why a target that a rule finds is there
``entropy/error``             (H − H*)/H*; under a target that is a floor, 0 while H is above it
``entropy/refused``           readings refused in a row
``entropy/failing``           mean over tokens with the weight 1 − ρ, ρ the share of right answers in the token's group
``entropy/turn_N``            N from 1 to 8: over the tokens of an episode's turn N; the eighth holds the later ones too
**knob**                      the number that the controller turns
``knob/value``                value in force during the step
``knob/saturated``            1 if it is at a bound, else 0; under a floor, the bound at which it rests does not count
``knob/cut_out``              1 if entropy was above 1.5 times both its target and its first reading, so that the
                              knob was kept from raising it; absent otherwise
**clip, ratio, policy**       and how far the update is from the samples
``clip/low_frac``             share of tokens with A<0 whose gradient the lower bound removed
``clip/high_frac``            share of tokens with A>0 whose gradient the upper bound removed or capped
``clip/dropped_frac``         share of tokens whose gradient is dropped: by a bound, or with A≠0 by a selection
``clip/entropy_share``        share of all entropy that those tokens have; above ``clip/dropped_frac``, they have more
                              than the mean
``ratio/mean``                mean importance ratio r
``ratio/outside_frac``        share of tokens whose ratio is outside the clip, whatever the sign of A
``ratio/ess_frac``            effective sample size of the N tokens as a share, (Σr)²/(N·Σr²); 1 if all ratios are alike
``policy/age``                optimizer steps between the weights that sampled and those that are updated, mean over
                              tokens; verl: since the batch reached the actor, if its data has no versions of weights
``mismatch/kl``               KL of the sampler μ from the trainer π, nats per sampled token, at the weights that
                              sampled: mean of e^d − 1 − d with d = log π − log μ; absent if the engine does not know
                              both
``mismatch/kl_k1``            the same KL, estimated by the mean of −d
``mismatch/kl_over_entropy``  ``mismatch/kl`` over the mean entropy of the same tokens
``theorem2/violated_frac``    share of rows whose entropy left [(1−ε_low)·H, (1+ε_high)·H] of when they were sampled;
                              token ratios under a clip only
**adv, group, price**         advantages, and groups: the samples of one prompt
``adv/mean``                  mean unshaped advantage A over tokens
``cov/adv_logp``              covariance over tokens of the unshaped advantage and log π
``group/failed_frac``         share of completions whose group has no right answer
``group/mixed_frac``          share of completions whose group has right and wrong answers
``group/solved_frac``         share of completions whose group has no wrong answer
``group/distinct_frac``       distinct right answers as a share of the right answers, mean over completions whose group
                              has one
``group/repeats_frac``        chance that two right answers to a prompt are the same, mean over completions whose group
                              has two right ones
``price/nat``                 reward per completion that one nat per token costs: Σ(R − mean of the group)·L / ΣL² over
                              mixed groups, L = log π + H, times tokens per completion
**reward, length, episode**   of the latest generated batch; verl: of the step's completions
``reward/mean``               mean reward
``reward/std``                standard deviation of the rewards; not in verl
``reward/zero_std_frac``      share of groups whose rewards are all alike; not in verl
``reward/unscored``           completions without a finite reward, if there are any
``length/mean``               tokens per completion; verl: with an environment's tokens
``length/truncated_frac``     share of completions without an end token; verl: that reached the limit
``samples/total``             completions generated so far
``redraw/frac``               share of the batch that answers of another temperature replaced; only ``loss``,
                              ``predict/`` and ``tokens/`` count them
``episode/win_frac``          of episodes with an environment: share that was won
``episode/return``            mean sum of rewards of an episode
``episode/turns``             actions per episode
``episode/calls``             resets and steps of the environments in the batch
``episode/truncated_frac``    share of episodes that the limit of turns or tokens ended
``task``                      name of the task, if tasks follow one another; another name than before is a switch
**optimizer**                 of the step
``loss``                      as the engine computes it
``grad_norm``                 norm of the gradient before clipping
``learning_rate``             in force
**predict, tokens**           on steps that are explained (``explain_every``): the change of entropy that
                              ``entropy/prediction.py`` predicts, nats per token, to first order in the logits, times
                              the learning rate; each split adds up to ``predict/change``
``predict/change``            of the step: exact form, or without moments if ``predict/moments`` is 0
``predict/change_simple``     by the form without moments
``predict/change_natural``    of a natural-gradient step
``predict/absolute``          Σ of absolute contributions, the scale of the others
``predict/likely_up``         by quadrant: the sampled token is likely (surprisal < H), and is pushed up
``predict/rare_up``           rare, pushed up
``predict/likely_down``       likely, pushed down
``predict/rare_down``         rare, pushed down
``predict/bonus``             through H itself, by an entropy term
``predict/unclipped``         by clip: tokens inside it
``predict/clipped_low``       tokens that the lower bound stopped
``predict/clipped_high``      tokens that the upper bound stopped
``predict/removed_low``       beside the split: what the lower bound took away, estimated
``predict/removed_high``      what the upper bound took away, estimated
``predict/positive``          by sign of the advantage: A>0
``predict/negative``          A<0
``predict/neutral``           A=0
``predict/position_N``        N from 1 to 8: by eighth of the completion
``predict/finished``          by end: completions with an end token
``predict/truncated``         completions without one
``predict/short``             by length: the shortest third of the batch's completions, by the policy's tokens; equal
                              lengths share their mean rank
``predict/middle``            the middle third
``predict/long``              the longest third
``predict/gain``              derivative of the change by the knob; for a clip, an estimate from the tokens at its edge;
                              null for ``redraw``, which acts on what is drawn next
``predict/knob``              gain × knob: what the knob adds; null for a clip and for ``redraw``
``predict/numerics``          what the rounding of log π in this pass adds, to first order; null without moments
``predict/moments``           1 if the moments of the rows were available, else 0
``predict/top_tokens``        [text, change, count] of the tokens that moved entropy most, summed by token, main process
``tokens/finished_frac``      share of the tokens in completions with an end token
``tokens/truncated_frac``     in completions without one
``tokens/short_frac``         in the shortest third of completions
``tokens/middle_frac``        in the middle third
``tokens/long_frac``          in the longest third
``numerics/logp_rms``         rms difference between the engine's log π and that of an fp32 head, nats
``numerics/entropy_bias``     mean difference between their entropies, nats
============================  ==========================================================================================

audit.json (missing with ``--audit off``): ``findings``, gravest first, each with ``severity`` (serious, warning, note),
``code``, ``what``, ``where``, ``effect``, ``remedy``, ``nats`` and ``clipped_frac``; ``serious``, the number of the
serious ones; ``checked``, by name, as text; ``figures``, by name, in nats.

A row of samples.jsonl: ``step``, ``prompt``, ``completion``, ``reward``, ``advantage``, and, aligned by token,
``tokens``, ``surprisal`` (nats, current policy) and ``entropy``. For an episode with an environment, ``completion`` is
the whole dialogue, and the tokens are those that the policy wrote.

A row of evaluations.jsonl: ``step``, ``task``, ``k``, ``temperature``, ``pass@1``, ``pass@k`` under its own number,
``distinct`` (mean number of distinct right answers among k), ``majority`` (share of prompts whose most frequent answer
is right), ``truncated_frac`` (share of completions that reached the limit of tokens), ``num_tokens`` sampled,
``entropy`` (sampled estimate, nats per token), and by prompt ``prompts``, ``num_samples``, ``num_correct``,
``num_distinct``, ``num_truncated``. These are at ``temperature``, that of training; ``at`` holds the same figures and
counts at every other one, under its number as text: ``"0.3"``. ``greedy`` is the share of prompts whose greedy answer
is right, ``greedy_correct`` 1 by prompt where it is.

``origin`` in run.json has ``numbers``, the version of the code that makes a run's numbers, another one of which gives
others from the same settings; ``model``, a digest of the weights that the run started from; and ``tasks``, a digest of
the tasks' names, held-out rows and training rows. Runs are comparable only if they agree in all three.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import platform
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import Any, TypeGuard

SCHEMA = 1
CHECKPOINT_FILE = "isentropic.json"
# What may lie in a directory before a run begins in it: what a grid writes there, a lock, and drafts of run.json.
_BEFORE_A_RUN = re.compile(r"cell\.toml|log\.txt|\.run\.lock|\.run\.json\.\d+")
_PACKAGES = ("isentropic", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "vllm", "numpy")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a field of a row holds a finite number; a truth value is none.

    Example:
        >>> is_number(0.5), is_number(None), is_number(True), is_number(float("nan"))
        (True, False, False, False)
    """
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1023  # a larger one has no float
    return isinstance(value, float) and math.isfinite(value)


def plain(value: Any) -> Any:
    """The value with every number that JSON cannot hold replaced by None.

    Example:
        >>> plain({"a": float("nan"), "b": (1, 2.5)})
        {'a': None, 'b': [1, 2.5]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | bool) else str(getattr(value, "written", value))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    _write_whole(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8", errors="replace")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, without a last line that was cut short; none if the file is missing.

    Args:
        path: of the file, which is compressed if its name ends in ``.gz``.
    """
    if not path.exists():
        return
    if path.suffix == ".gz":
        yield from _rows(io.StringIO(_whole_members(path.read_bytes())[0].decode(errors="replace")))
        return
    # A write may end inside a character too.
    with path.open(encoding="utf-8", errors="replace") as lines:
        yield from _rows(lines)


def _rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row


def _whole_members(content: bytes) -> tuple[bytes, int]:
    """What the whole gzip members of a file hold, and where the last of them ends: a kill may cut a member short."""
    text, end = b"", 0
    while end < len(content):
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            part = member.decompress(content[end:])
        except zlib.error:
            break
        if not member.eof:
            break
        text, end = text + part, len(content) - len(member.unused_data)
    return text, end


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a JSONL file, compressed as a gzip member of its own if the name ends in ``.gz``.

    A last line or member that a kill cut short is dropped first.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl.gz"
        >>> append_row(path, {"a": 1})
        >>> append_row(path, {"a": 2})
        >>> list(read_rows(path))
        [{'a': 1}, {'a': 2}]
    """
    line = (json.dumps(plain(row), ensure_ascii=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        file.seek(0)
        content = file.read()
        if path.suffix == ".gz":
            _add(file, _whole_members(content)[1], gzip.compress(line, mtime=0))
            return
        last = content[content.rfind(b"\n") + 1 :]
        if last and list(_rows([last.decode(errors="replace")])):
            _add(file, len(content), b"\n" + line)  # a row that lacks its line break alone
        else:
            _add(file, len(content) - len(last), line)


def _add(file: FileIO, end: int, content: bytes) -> None:
    """Cut a file at ``end`` and append there: if the disk is full, what was there before stays, and nothing else."""
    file.truncate(end)
    try:
        while content:
            content = content[file.write(content) :]
    except OSError:
        file.truncate(end)
        raise


def _end_of_rows(file: FileIO) -> int:
    """The size in bytes of the rows that end in a line break."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    numbers = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue
    return numbers


class Record:
    """A run directory, open for writing or reading.

    Example:
        >>> import tempfile
        >>> run = Record(tempfile.mkdtemp())
        >>> run.append("metrics", {"step": 1, "entropy/mean": 0.5})
        >>> run.rows("metrics")
        [{'step': 1, 'entropy/mean': 0.5}]
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Record({str(self.path)!r})"

    def start(self, config: dict[str, Any], recipe: dict[str, Any], seed: int, **more: Any) -> None:
        """Write run.json, and create the directory if it is missing.

        Args:
            config: the settings of the run, resolved.
            recipe: its recipe, as a dict.
            seed: of the run.
            **more: further fields of run.json, such as ``task`` and ``model``.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        from datetime import datetime

        header = {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "seed": seed,
            "config": config,
            "recipe": recipe,
            "versions": versions(),
            "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
            **more,
        }
        write_json(self.path / "run.json", header)

    def header(self) -> dict[str, Any]:
        """run.json.

        Raises:
            ValueError: not a run directory, or a schema this version does not read.
        """
        path = self.path / "run.json"
        if not path.is_file():
            raise ValueError(
                f"{self.path} is not a run directory: it has no run.json; name the directory of `train --out`"
            )
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not the JSON of a run: {error}; name another run directory") from None
        if not isinstance(header, dict):
            raise ValueError(f"{path} is not the JSON of a run: it holds no object; name another run directory")
        if header.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} has schema {header.get('schema')}, this version reads {SCHEMA}; update isentropic"
            )
        return header

    def begun(self) -> bool:
        """Whether there is a run: it has written run.json."""
        return (self.path / "run.json").is_file()

    def strangers(self) -> list[str]:
        """Names in a directory without a run that no run wrote; a run must not begin among them.

        Raises:
            OSError: the directory cannot be read, or is none.
        """
        if self.begun() or not self.path.exists():
            return []
        return sorted(path.name for path in self.path.iterdir() if not _BEFORE_A_RUN.fullmatch(path.name))

    def append(self, name: str, *rows: dict[str, Any]) -> None:
        """Add rows to NAME.jsonl, all or none; a last line that a kill cut short is dropped first."""
        text = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
        path = self.path / f"{name}.jsonl"
        with path.open("a+b", buffering=0) as file:
            _add(file, _end_of_rows(file), text.encode(errors="replace"))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All rows of NAME.jsonl."""
        return list(read_rows(self.path / f"{name}.jsonl"))

    def rewind(self, step: int) -> None:
        """Delete the rows after an optimizer step, so that the run can continue from its checkpoint there."""
        for name in ("metrics", "samples", "evaluations"):
            path = self.path / f"{name}.jsonl"
            if path.exists():
                kept = [row for row in read_rows(path) if not is_number(row.get("step")) or row["step"] <= step]
                _write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and path of complete checkpoints, oldest first: those with an isentropic.json, which is written last."""
        complete = []
        for path in self.path.glob("checkpoint-*"):
            number = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if number and (path / CHECKPOINT_FILE).is_file():
                complete.append((int(number[1]), path))
        return sorted(complete)
