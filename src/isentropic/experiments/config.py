"""The settings of a run: defaults, a TOML file, flags; checked in full before anything heavy is imported."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from ..control.controllers import CONTROLLERS
from ..control.names import suggest
from ..control.targets import TARGETS
from ..models import check_saved
from ..recipes import Recipe, check, compose
from ..recipes.knobs import all_knobs
from ..recipes.stages import STAGES
from ..tasks import load_task
from ..tasks.environments import EnvironmentTask
from ..tasks.sequence import SEQUENCES

# Groups of settings with their titles, in the order in which `train --help` and the docs have them.
GROUPS = {
    "run": "the run",
    "control": "entropy control: a controller turns a knob, one number of the loss, so that the policy's entropy, in "
    "nats per token, stays at a target",
    "recipe": "components of the recipe: a name of `isentropic recipes`, or a custom function, FILE.py:NAME",
    "optimizer": "the optimizer",
    "generation": "generation",
    "model": "weights and devices",
    "diagnosis": "diagnosis",
    "saving": "checkpoints, trackers and the hub",
    "evaluation": "evaluation on held-out prompts: greedy, and sampled at several temperatures",
}

# Trackers of transformers that need no settings besides their own environment variables; each is also its package.
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab", "comet_ml", "clearml")


class ConfigError(ValueError):
    """A mistake in the settings, in one line: the place, the key, the value, what is allowed, the remedy."""


@contextmanager
def config_errors(where: str = "") -> Iterator[None]:
    """Raise a ValueError of the block as a ConfigError, which the command line prints in one line.

    Args:
        where: prefix of the message, such as the file that holds the setting.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from None


def _metadata(
    group: str,
    help: str,
    low: float | None = None,
    choices: tuple[str, ...] = (),
    trl: str | None = None,
) -> dict[str, Any]:
    """The facts of a setting besides its default.

    Args:
        group: a key of GROUPS.
        help: for `--help` and the docs.
        low: the smallest value.
        choices: the values, if they are names.
        trl: the field of TRL's GRPOConfig, or of IsentropicConfig, that takes the value unchanged.
    """
    assert group in GROUPS
    return {"group": group, "help": help, "low": low, "choices": choices, "trl": trl}


def _setting(default: Any, group: str, help: str, **more: Any) -> Any:
    metadata = _metadata(group, help, **more)
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _component(stage: str, help: str) -> Any:
    return _setting(None, "recipe", f"{help}: {', '.join(STAGES[stage])} [the recipe's]")


@dataclass(frozen=True)
class RunConfig:
    """All settings of `isentropic train`; field names are the TOML keys, and with dashes the flags."""

    model: str = _setting(
        "tiny", "run", "tiny (built here), smollm2 (see `isentropic model`), a local path, or a hub id"
    )
    task: str = _setting("expr", "run", "a task or a sequence of `isentropic tasks`, or FILE.py:NAME of your own")
    recipe: str = _setting("isentropic", "run", "an algorithm of `isentropic recipes`, or FILE.py:NAME of your own")
    steps: int = _setting(800, "run", "optimizer steps", low=1)
    then: list[str] = _setting(  # noqa: RUF009  (a field with a factory)
        (), "run", "another task, trained on after those before it in the same run; may be repeated"
    )
    then_steps: int | None = _setting(
        None, "run", "optimizer steps on each task after the first [as on the first]", low=1
    )
    seed: int = _setting(0, "run", "seed of data, sampling and optimization", low=0, trl="seed")
    out: str | None = _setting(None, "run", "the run directory [runs/TASK-RECIPE-sSEED]", trl="output_dir")

    knob: str | None = _setting(
        None, "control", f"the number that the controller turns: {', '.join(all_knobs())}, none [the recipe's]"
    )
    controller: str | None = _setting(
        None,
        "control",
        f"NAME[:OPTION=VALUE]: {', '.join(CONTROLLERS)}, FILE.py:NAME, or none, which only monitors [the recipe's]",
    )
    target: str | None = _setting(
        None, "control", f"entropy to hold: {', '.join(TARGETS)}, or FILE.py:NAME [the recipe's]"
    )
    every: int | None = _setting(
        None, "control", "optimizer steps between controller updates [a generated batch]", low=1
    )
    stop_above: float | None = _setting(
        None,
        "control",
        "stop with a checkpoint if entropy stays above this factor times its target or start; 0 never [3 with a knob]",
        low=0.0,
    )

    baseline: str | None = _component("baseline", "advantage from the rewards R of a group")
    selection: str | None = _component("selection", "tokens whose advantage counts")
    shaping: str | None = _component("shaping", "change of the advantage by token")
    bounds: str | None = _component("bounds", "clip bounds of the ratio")
    objective: str | None = _component("objective", "loss by token")
    penalty: str | None = _component("penalty", "penalty added to the loss")
    recipe_options: dict[str, Any] = field(
        default_factory=dict,
        metadata=_metadata("recipe", "other fields of the recipe, and constants of its components (TOML table)"),
    )

    learning_rate: float = _setting(5e-4, "optimizer", "AdamW learning rate at its peak", low=0.0, trl="learning_rate")
    schedule: str = _setting(
        "linear", "optimizer", "of the learning rate, after warm-up", choices=("linear", "constant", "cosine")
    )
    warmup: int = _setting(
        50, "optimizer", "optimizer steps until the learning rate is at its peak", low=0, trl="warmup_steps"
    )
    weight_decay: float = _setting(0.0, "optimizer", "AdamW weight decay", low=0.0, trl="weight_decay")
    kl: float = _setting(
        0.0,
        "optimizer",
        "coefficient of the KL divergence from the initial model, which is then kept in memory too",
        low=0.0,
        trl="beta",
    )
    updates: int = _setting(4, "optimizer", "optimizer steps per generated batch; 1 is on-policy", low=1)

    prompts: int = _setting(32, "generation", "prompts per generated batch", low=1)
    generations: int = _setting(16, "generation", "samples per prompt", low=2, trl="num_generations")
    temperature: float = _setting(1.0, "generation", "sampling temperature", low=0.0, trl="temperature")
    max_completion_length: int | None = _setting(None, "generation", "token limit of a completion [the task's]", low=1)
    system_prompt: str | None = _setting(
        None, "generation", "system message of every prompt, for tasks whose prompts are conversations"
    )
    vllm: str = _setting(
        "off",
        "generation",
        "generate with the model itself, with vLLM beside it, or on a vLLM server",
        choices=("off", "colocate", "server"),
    )
    vllm_server: str = _setting("http://localhost:8000", "generation", "address of the vLLM server")
    vllm_memory: float = _setting(
        0.3,
        "generation",
        "share of a GPU's memory for vLLM beside the model",
        low=0.0,
        trl="vllm_gpu_memory_utilization",
    )

    device: str = _setting("auto", "model", "device to train on", choices=("auto", "cpu", "cuda"))
    dtype: str = _setting(
        "float32",
        "model",
        "dtype of weights and arithmetic; mixed keeps weights and AdamW in float32 and computes in bfloat16",
        choices=("float32", "bfloat16", "mixed"),
    )
    lora_rank: int = _setting(0, "model", "rank of a LoRA adapter; 0 trains all weights", low=0)
    lora_alpha: int | None = _setting(
        None, "model", "alpha of the adapter, whose scale is alpha / rank [twice the rank]", low=1
    )
    lora_targets: list[str] = _setting(  # noqa: RUF009
        ("all-linear",), "model", "modules that get an adapter, such as q_proj; may be repeated"
    )
    micro_batch: int | None = _setting(
        None,
        "model",
        "completions a device scores at a time; gradients add up to the same step [all of a step]",
        low=1,
    )
    checkpointing: str = _setting(
        "off", "model", "recompute activations in the backward pass, to save memory", choices=("on", "off")
    )
    head: str = _setting(
        "auto",
        "model",
        "score tokens by the fused head if it is faster (auto), or always by TRL's",
        choices=("auto", "trl"),
        trl="head",
    )

    explain_every: int | None = _setting(
        None,
        "diagnosis",
        "optimizer steps between explanations of the entropy change; 0 never [1, or 10 with TRL's head]",
        low=0,
        trl="explain_every",
    )
    audit: str = _setting(
        "on", "diagnosis", "check precision and sampling at the start of the run, and warn", choices=("on", "off")
    )

    save_every: int = _setting(200, "saving", "optimizer steps between checkpoints; 0 keeps only the last", low=0)
    keep: int = _setting(2, "saving", "checkpoints kept", low=1)

    report_to: list[str] = _setting(  # noqa: RUF009
        (), "saving", "a tracker to log the metrics to; may be repeated", choices=TRACKERS, trl="report_to"
    )
    push_to_hub: str | None = _setting(
        None, "saving", "hub id, NAME or OWNER/NAME, that the trained model is pushed to", trl="hub_model_id"
    )

    eval_k: int = _setting(16, "evaluation", "samples per prompt; 0 skips the evaluations", low=0)
    eval_rows: int = _setting(180, "evaluation", "number of held-out prompts, from the first on", low=1)
    eval_every: int = _setting(
        0, "evaluation", "optimizer steps between evaluations during the run, each with a checkpoint; 0 for none", low=0
    )
    eval_temperatures: list[float] = _setting(  # noqa: RUF009
        (1.5, 1.0, 0.6, 0.3), "evaluation", "sampling temperatures, besides that of training; may be repeated"
    )


FLAGLESS = ("recipe_options",)
# A strictly on-policy recipe takes one step per batch, unless the user sets another number.
_ON_POLICY_UPDATES = 1


def load(path: str | None, flags: dict[str, Any], base: dict[str, Any] | None = None) -> RunConfig:
    """Defaults, then ``base`` (the settings of a run that is resumed), then the file, then the flags; checked.

    Options of the recipe that are given by ``--set`` join those of the file.

    Raises:
        ConfigError: anything that cannot work.
    """
    written = _read(Path(path)) if path is not None else {}
    given: dict[str, Any] = {**written, **flags}
    values = dict(base or {}) | given
    if isinstance(options := (dict(base or {}) | written).get("recipe_options"), dict):
        values["recipe_options"] = options | flags.get("recipe_options", {})
    for key, value in values.items():
        where = f"--{key.replace('_', '-')}" if key in flags else f"{path or 'run.json'}: key {key}"
        values[key] = _checked_value(where, key, value)
    if values.get("task") in SEQUENCES:
        first, *others = SEQUENCES[values["task"]].tasks
        # The tasks of a run that is resumed are those of the sequence already.
        values |= {"task": first, "then": [*others, *(values["then"] if "then" in given else [])]}
    return _check(RunConfig(**values), path, "updates" in values)


def read_toml(path: Path, remedy: str) -> dict[str, Any]:
    """The content of a TOML file.

    Args:
        path: of the file.
        remedy: end of the message about a file that does not exist.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {remedy}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    values = read_toml(path, "name a TOML file, such as one of `isentropic configs`, or leave it out")
    known = [f.name for f in fields(RunConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{suggest(key, known)}; allowed: {', '.join(known)}")
    return values


def _checked_value(where: str, key: str, value: Any) -> Any:
    """A value of the kind and in the range that a setting has; one value is read as a list of one where lists go."""
    setting = next(f for f in fields(RunConfig) if f.name == key)
    hint = get_type_hints(RunConfig)[key]
    if get_origin(hint) is list:
        items = list(value) if isinstance(value, list | tuple) else [value]
        for item in items:
            _check_kind(where, item, get_args(hint))
            _check_choice(where, item, setting.metadata["choices"])
        return items
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    _check_kind(where, value, (dict,) if key in FLAGLESS else kinds)
    low = setting.metadata["low"]
    if low is not None and value is not None and not value >= low:
        raise ConfigError(f"{where}: got {value!r}, must be at least {low:g}")
    _check_choice(where, value, setting.metadata["choices"])
    return value


def _check_choice(where: str, value: Any, choices: tuple[str, ...]) -> None:
    if choices and value not in choices:
        raise ConfigError(f"{where}: got {value!r}{suggest(value, choices)}; allowed: {', '.join(choices)}")


def _check_kind(where: str, value: Any, kinds: tuple[Any, ...]) -> None:
    fits = (isinstance(value, kinds) and not isinstance(value, bool)) or (float in kinds and type(value) is int)
    if not fits:
        names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise ConfigError(f"{where}: got {value!r}, must be {names}")


def recipe_of(config: RunConfig) -> Recipe:
    """Compose the recipe of a config.

    Raises:
        ValueError: a composition that cannot work, or a field that is set twice.
    """
    changes: dict[str, Any] = {
        name: getattr(config, name) for name in ("knob", "controller", "target", "every", *STAGES)
    }
    if config.controller == "none":
        changes |= {"knob": "none", "controller": None}
    changes = {name: value for name, value in changes.items() if value is not None}
    twice = sorted(set(config.recipe_options) & {"recipe", *changes})
    if twice:
        raise ValueError(f"{twice[0]} is set twice, by itself and in recipe_options; leave one of them out")
    return compose(config.recipe, **changes, **config.recipe_options)


def _check(config: RunConfig, path: str | None, has_updates: bool) -> RunConfig:
    where = f"{path}: " if path else ""
    with config_errors(where):
        recipe = recipe_of(config)
        if recipe.on_policy and not has_updates:
            config = replace(config, updates=_ON_POLICY_UPDATES)
        check(recipe, config.updates, config.generations)
    if not 0 < config.learning_rate < float("inf"):
        raise ConfigError(f"{where}learning_rate: got {config.learning_rate}, must be > 0 and finite")
    for name in ("weight_decay", "kl"):
        if getattr(config, name) == float("inf"):
            raise ConfigError(f"{where}{name}: got inf, must be finite; 0 leaves its term out")
    if not 0 < config.temperature < float("inf"):
        raise ConfigError(
            f"{where}temperature: got {config.temperature}, must be > 0, finite; greedy decoding has no entropy"
        )
    wrong = next((t for t in config.eval_temperatures if not 0 < t < float("inf")), None)
    if wrong is not None:
        raise ConfigError(
            f"{where}eval_temperatures: got {wrong}, must be > 0 and finite; greedy answers are always evaluated"
        )
    _check_batch(config, where)
    if not 0 < config.vllm_memory < 1:
        raise ConfigError(f"{where}vllm_memory: got {config.vllm_memory}, must be a share above 0 and below 1")
    if config.stop_above is not None and 0 < config.stop_above <= 1:
        raise ConfigError(f"{where}stop_above: got {config.stop_above}, must be above 1, or 0 for never")
    _check_then(config, where)
    _check_outside(config, where)
    _check_names(config, where)
    return config


def _check_batch(config: RunConfig, where: str) -> None:
    """A generated batch is a whole number of optimizer steps, and a step of micro-batches."""
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
    if config.eval_every % config.updates:
        raise ConfigError(
            f"{where}eval_every: got {config.eval_every}, must be a multiple of updates ({config.updates}): the "
            "checkpoint of an evaluation falls between two generated batches"
        )


def steps_of(config: RunConfig) -> list[int]:
    """Optimizer steps on each task, in order."""
    return [config.steps, *([config.then_steps or config.steps] * len(config.then))]


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole run, on all tasks."""
    return sum(steps_of(config))


def _check_then(config: RunConfig, where: str) -> None:
    if not config.then:
        if config.then_steps is not None:
            raise ConfigError(f"{where}then_steps: got {config.then_steps} without a second task; name one by then")
        return
    names = [config.task, *config.then]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}then: got {twice!r} twice in one run; name another task, or raise steps")
    for name, steps in (("steps", config.steps), ("then_steps", config.then_steps or config.steps)):
        if steps % config.updates:
            raise ConfigError(
                f"{where}{name}: got {steps}, must be a multiple of updates ({config.updates}) if tasks follow one "
                "another: a generated batch is of one task"
            )


def _check_outside(config: RunConfig, where: str) -> None:
    """What other packages take part in: adapters, trackers, the hub."""
    fresh = RunConfig()
    for name in ("lora_alpha", "lora_targets"):
        if not config.lora_rank and getattr(config, name) != getattr(fresh, name):
            raise ConfigError(f"{where}{name}: got {getattr(config, name)!r} without an adapter; set lora_rank too")
    for tracker in config.report_to:
        if find_spec(tracker) is None:
            raise ConfigError(f"{where}report_to: {tracker} is not installed; pip install {tracker}")
    if config.push_to_hub is not None and not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", config.push_to_hub):
        form = "NAME or OWNER/NAME of letters, digits, '-', '_' and '.'"
        raise ConfigError(f"{where}push_to_hub: got {config.push_to_hub!r}, must be {form}")


def _check_names(config: RunConfig, where: str) -> None:
    """A task is loaded, and its rows are read if a system prompt has to precede them; a model is judged by its name.

    No hub is asked.
    """
    seen: dict[str, str] = {}
    for key, task in (("task", config.task), *(("then", name) for name in config.then)):
        with config_errors(f"{where}{key}: "):
            loaded = load_task(task)
            name = loaded.name
            if config.system_prompt is not None and not isinstance(loaded, EnvironmentTask):
                loaded.with_system_prompt(config.system_prompt).heldout()
        if name in seen:
            raise ConfigError(f"{where}{key}: got {task!r}, the same task as {seen[name]!r}; name another")
        seen[name] = task
    with config_errors(where):
        check_saved(config.model)


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain values, as run.json holds it."""
    return asdict(config)


class EvalSettings(NamedTuple):
    """What `isentropic eval` does with each model.

    Attributes:
        task: its name.
        k: samples per prompt.
        limit: prompts, from the first.
        temperature: of sampling.
        temperatures: further ones.
        seed: of sampling.
        max_tokens: limit of a completion; None is the task's.
        system_prompt: system message of every prompt; None is the rows' own.
    """

    task: str
    k: int
    limit: int
    temperature: float
    temperatures: list[float]
    seed: int
    max_tokens: int | None
    system_prompt: str | None = None


def eval_settings(args: dict[str, Any], runs: list[dict[str, Any]]) -> EvalSettings:
    """The settings of `isentropic eval`: those of the command line, or the first run's; checked.

    Args:
        args: of the command line, by name; None for those that are missing.
        runs: the settings of those of the models that are runs.

    Raises:
        ConfigError: anything that cannot work.
    """
    run: dict[str, Any] = {"task": None, "eval_k": 16, "seed": 0, "temperature": 1.0, **(runs[0] if runs else {})}
    flags = {name: value for name, value in args.items() if value is not None}
    others = run.get("eval_temperatures", RunConfig().eval_temperatures)
    settings = EvalSettings(
        task=flags.get("task", run["task"]),
        k=flags.get("k", run["eval_k"]),
        limit=flags.get("limit", run.get("eval_rows", RunConfig.eval_rows)),
        temperature=flags.get("temperature", run["temperature"]),
        temperatures=flags.get("also", others),
        seed=flags.get("seed", run["seed"]),
        max_tokens=flags.get("max_completion_length", run.get("max_completion_length")),
        system_prompt=flags.get("system_prompt", run.get("system_prompt")),
    )
    if settings.task is None:
        raise ConfigError("--task: name the task that models are evaluated on; see `isentropic tasks`")
    limits = {
        "--k": settings.k,
        "--limit": settings.limit,
        "--max-completion-length": settings.max_tokens,
    }
    for flag, value in limits.items():
        if value is not None and value < 1:
            raise ConfigError(f"{flag}: got {value}, must be at least 1")
    for flag, value in (("--temperature", settings.temperature), *(("--also", t) for t in settings.temperatures)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{flag}: got {value}, must be > 0 and finite; greedy answers are always evaluated")
    with config_errors():
        load_task(settings.task)
    return settings
