"""The settings of a run: defaults, a TOML file, flags; checked in full before anything heavy is imported."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..models import check_saved
from ..recipes.compose import Recipe, check, compose
from ..tasks import KINDS, TASKS, load_task


class ConfigError(ValueError):
    """One line: where, key, what was got, what is allowed, the remedy."""


def _setting(default: Any, help: str, *, low: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """Everything `isentropic train` can be told; field names are the TOML keys, with dashes the flags."""

    model: str = _setting("tiny", "tiny (built here), smollm2 (see `isentropic model`), a local path, or a hub id")
    task: str = _setting("expr", "a name of `isentropic tasks`, or FILE.py:NAME of your own")
    recipe: str = _setting("isentropic", "a named algorithm; see `isentropic recipes`")
    knob: str | None = _setting(None, "what is turned: clip_high, clip_low, beta, zeta, entropy_coef, or none")
    controller: str | None = _setting(
        None, "how: predictive, pi, double_halve, multiplicative, sign_step, fixed; none only monitors"
    )
    target: str | None = _setting(
        None, "what entropy is held at: initial, 0.8, 80%%, anneal:FROM:TO[:STEPS], band:LOW:HIGH"
    )
    every: int | None = _setting(None, "optimizer steps between controller updates [a generated batch]", low=1)
    shaping: str | None = _setting(None, "how the advantage is shaped: none, repo, repo_r, repo_r_raw, repo_d, ...")
    steps: int = _setting(800, "optimizer steps", low=1)
    then: str | None = _setting(None, "a second task, trained on after the first in the same run")
    then_steps: int | None = _setting(None, "optimizer steps on the second task [as on the first]", low=1)
    stop_above: float | None = _setting(
        None,
        "stop with a checkpoint where entropy stays above so many times its target; 0 never [3 with a knob]",
        low=0.0,
    )
    seed: int = _setting(0, "seed of data, sampling and optimisation", low=0)
    out: str | None = _setting(None, "the run directory [runs/TASK-RECIPE-sSEED]")
    device: str = _setting("auto", "where to train", choices=("auto", "cpu", "cuda"))
    dtype: str = _setting(
        "float32",
        "dtype of weights and arithmetic; mixed keeps weights and AdamW in float32 and computes in bfloat16",
        choices=("float32", "bfloat16", "mixed"),
    )
    learning_rate: float = _setting(5e-4, "AdamW learning rate at its peak", low=0.0)
    schedule: str = _setting("linear", "of the learning rate, after warm-up", choices=("linear", "constant", "cosine"))
    warmup: int = _setting(50, "optimizer steps over which the learning rate rises to its peak", low=0)
    prompts: int = _setting(32, "prompts a generated batch", low=1)
    generations: int = _setting(16, "samples a prompt", low=2)
    updates: int = _setting(4, "optimizer steps a generated batch; 1 is on-policy", low=1)
    temperature: float = _setting(1.0, "sampling temperature", low=0.0)
    max_completion_length: int | None = _setting(None, "token limit of a completion [the task's]", low=1)
    micro_batch: int | None = _setting(
        None, "completions a device scores at a time; gradients add up to the same step [all of a step]", low=1
    )
    checkpointing: str = _setting(
        "off", "compute activations again in the backward pass, to save memory", choices=("on", "off")
    )
    vllm: str = _setting(
        "off",
        "who generates: the model itself, vLLM beside it, or a vLLM server",
        choices=("off", "colocate", "server"),
    )
    vllm_server: str = _setting("http://localhost:8000", "address of the vLLM server")
    vllm_memory: float = _setting(0.3, "share of a GPU's memory that vLLM takes beside the model", low=0.0)
    lora_rank: int = _setting(0, "rank of a LoRA adapter; 0 trains all weights", low=0)
    save_every: int = _setting(200, "optimizer steps between checkpoints; 0 keeps only the last", low=0)
    keep: int = _setting(2, "checkpoints kept", low=1)
    head: str = _setting(
        "auto", "who scores tokens: the fused head where it is faster, or TRL's", choices=("auto", "trl")
    )
    explain_every: int | None = _setting(
        None, "steps between two whose entropy change is explained; 0 never [1, or 10 with TRL's head]", low=0
    )
    eval_k: int = _setting(16, "samples a held-out prompt in the evaluations at start and end; 0 skips them", low=0)
    eval_rows: int = _setting(180, "held-out prompts of those evaluations: the first so many", low=1)
    audit: str = _setting("on", "check precision and sampling as the run starts, and warn", choices=("on", "off"))
    recipe_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "other fields of a recipe (TOML table)"}
    )


FLAGLESS = ("recipe_options",)
# Strictly on-policy recipes take one step a batch; what the user does not say follows from that.
_ON_POLICY_UPDATES = 1


def load(path: str | None, flags: dict[str, Any], base: dict[str, Any] | None = None) -> RunConfig:
    """Defaults, then ``base`` (a run that is resumed), then the file, then the flags; checked.

    Raises:
        ConfigError: anything that cannot work.
    """
    values: dict[str, Any] = dict(base or {})
    if path is not None:
        values |= _read(Path(path))
    said = set(values) | set(flags)
    values |= flags
    for key, value in values.items():
        where = f"--{key.replace('_', '-')}" if key in flags else f"{path or 'run.json'}: key {key}"
        _check_value(where, key, value)
    config = RunConfig(**values)
    return _check(config, path, "updates" in said)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name a TOML file, or leave it out to use the defaults")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    known = [f.name for f in fields(RunConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{suggest(key, known)}; allowed: {', '.join(known)}")
    return values


def suggest(word: str, known: list[str]) -> str:
    """`` (did you mean X?)`` where something close is known, else nothing."""
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _check_value(where: str, key: str, value: Any) -> None:
    setting = next(f for f in fields(RunConfig) if f.name == key)
    hint = get_type_hints(RunConfig)[key]
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if key in FLAGLESS:
        kinds = (dict,)
    fits = (isinstance(value, kinds) and not isinstance(value, bool)) or (float in kinds and type(value) is int)
    if not fits:
        names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise ConfigError(f"{where}: got {value!r}, must be {names}")
    low, choices = setting.metadata.get("low"), setting.metadata.get("choices")
    if low is not None and value is not None and not value >= low:
        raise ConfigError(f"{where}: got {value!r}, must be at least {low:g}")
    if choices and value not in choices:
        raise ConfigError(f"{where}: got {value!r}{suggest(str(value), list(choices))}; allowed: {', '.join(choices)}")


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe a config means.

    Raises:
        ValueError: a composition that cannot work.
    """
    control: dict[str, Any] = {"knob": config.knob, "controller": config.controller}
    if config.controller == "none":
        control = {"knob": "none", "controller": None}
    return compose(
        config.recipe,
        **control,
        target=config.target,
        every=config.every,
        shaping=config.shaping,
        **config.recipe_options,
    )


def _check(config: RunConfig, path: str | None, updates_said: bool) -> RunConfig:
    where = f"{path}: " if path else ""
    try:
        recipe = recipe_of(config)
        if recipe.on_policy and not updates_said:
            config = replace(config, updates=_ON_POLICY_UPDATES)
        check(recipe, config.updates)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}{error}") from None
    if not 0 < config.learning_rate < float("inf"):
        raise ConfigError(f"{where}learning_rate: got {config.learning_rate}, must be > 0 and finite")
    if not 0 < config.temperature < float("inf"):
        raise ConfigError(
            f"{where}temperature: got {config.temperature}, must be > 0, finite; greedy decoding has no entropy"
        )
    batch = config.prompts * config.generations
    if batch % config.updates:
        raise ConfigError(
            f"{where}updates: got {config.updates}, which does not divide the {batch} completions of a generated batch "
            f"(prompts {config.prompts} x generations {config.generations}); choose a divisor"
        )
    if config.micro_batch is not None and batch // config.updates % config.micro_batch:
        raise ConfigError(
            f"{where}micro_batch: got {config.micro_batch}, which does not divide the {batch // config.updates} "
            "completions of an optimizer step; choose a divisor"
        )
    if not 0 < config.vllm_memory < 1:
        raise ConfigError(f"{where}vllm_memory: got {config.vllm_memory}, must be a share above 0 and below 1")
    if config.explain_every == 0 and recipe.controller.startswith("predictive"):
        raise ConfigError(
            f"{where}explain_every: got 0, and controller predictive needs explained steps; leave it out, or choose pi"
        )
    if config.stop_above is not None and 0 < config.stop_above <= 1:
        raise ConfigError(f"{where}stop_above: got {config.stop_above}, must be above 1, or 0 for never")
    _check_then(config, where)
    _check_names(config, where)
    return config


def eval_settings(args: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What `isentropic eval` does: what is said on the command line, else what the first run had; checked.

    Args:
        args: of the command line, by name.
        runs: the settings of those among the models that are runs.

    Returns:
        ``task``, by name, ``k``, ``limit``, ``temperature``, ``seed``, ``max_tokens`` and ``greedy_limit``, the prompts
        that are answered greedily too.

    Raises:
        ConfigError: anything that cannot work.
    """
    usual: dict[str, Any] = {"task": None, "eval_k": 16, "seed": 0, "temperature": 1.0, **(runs[0] if runs else {})}
    said = {name: value for name, value in args.items() if value is not None}
    found = {
        "task": said.get("task", usual["task"]),
        "k": said.get("k", usual["eval_k"]),
        "limit": said.get("limit", usual.get("eval_rows", RunConfig.eval_rows)),
        "temperature": said.get("temperature", usual["temperature"]),
        "seed": said.get("seed", usual["seed"]),
        "max_tokens": said.get("max_completion_length", usual.get("max_completion_length")),
    }
    found["greedy_limit"] = said.get("greedy_limit", found["limit"] if said.get("greedy") else None)
    if found["task"] is None:
        raise ConfigError("--task: name the task that models are evaluated on; see `isentropic tasks`")
    limits = (("--limit", "limit"), ("--greedy-limit", "greedy_limit"), ("--max-completion-length", "max_tokens"))
    for flag, name in (("--k", "k"), *limits):
        if found[name] is not None and found[name] < 1:
            raise ConfigError(f"{flag}: got {found[name]}, must be at least 1")
    if not 0 < found["temperature"] < float("inf"):
        raise ConfigError(f"--temperature: got {found['temperature']}, must be > 0 and finite; --greedy is for none")
    try:
        load_task(found["task"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return found


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole run, a second task included."""
    return config.steps + ((config.then_steps or config.steps) if config.then else 0)


def _check_then(config: RunConfig, where: str) -> None:
    if config.then is None:
        if config.then_steps is not None:
            raise ConfigError(f"{where}then_steps: got {config.then_steps} without a second task; name one by then")
        return
    if config.then == config.task:
        raise ConfigError(f"{where}then: got {config.then!r}, the first task; name another, or raise steps")
    for name, steps in (("steps", config.steps), ("then_steps", config.then_steps or config.steps)):
        if steps % config.updates:
            raise ConfigError(
                f"{where}{name}: got {steps}, must be a multiple of updates ({config.updates}) where tasks follow one "
                "another: a generated batch is of one task"
            )


def _check_names(config: RunConfig, where: str) -> None:
    """A task is loaded, which reads no rows; a model is judged by its name and its directory. Nothing asks the hub."""
    for key, task in (("task", config.task), ("then", config.then)):
        if task is None:
            continue
        if ":" not in task and task not in [*TASKS, *KINDS]:
            raise ConfigError(
                f"{where}{key}: got {task!r}{suggest(task, [*TASKS, *KINDS])}; allowed: {', '.join([*TASKS, *KINDS])}, "
                "or FILE.py:NAME of your own; see `isentropic tasks`"
            )
        try:
            load_task(task)
        except ValueError as error:
            raise ConfigError(f"{where}{error}") from None
    try:
        check_saved(config.model)
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from None


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain values, as run.json holds it."""
    return asdict(config)
