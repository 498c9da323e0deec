"""Every private name of TRL that this package touches, and nothing else: what a new version of TRL can break.

TRL's own steps are overridden only here, and each is given to a method with our own name, which gets TRL's own as
its first argument. ``CONTRACT`` lists the names, and ``tests/engines/trl/test_compat.py`` tests each of them. A version
of TRL newer than the tested ones is let in with a warning if it keeps the contract.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

logger = logging.getLogger("isentropic")
# The versions that the tests run with, `make test-versions`.
OLDEST, NEWEST = (1, 15), (1, 16)


def _require_trl() -> bool:
    """Refuse a missing TRL and one that is too old.

    Returns:
        Whether it is newer than the tested ones.

    Raises:
        ImportError: what is needed, and what was found.
    """
    try:
        got = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            "isentropic.engines.trl needs trl, which is not installed; pip install 'isentropic[trl]'"
        ) from None
    found = tuple(int(part) for part in got.split(".")[:2])
    if found < OLDEST:
        raise ImportError(
            f"isentropic.engines.trl wraps private methods of trl {OLDEST[0]}.{OLDEST[1]} and newer, got trl {got}; "
            "pip install 'isentropic[trl]' brings a supported one"
        )
    return found > NEWEST


_NEWER = _require_trl()

from trl import GRPOConfig, GRPOTrainer, models  # noqa: E402  (after the version check, whose message is better)
from trl.trainer import utils  # noqa: E402

__all__ = ["GRPOConfig", "GRPOTrainer", "Trainer", "TrainerHooks"]

LOG_PROB_FUNCTION = "_ChunkedLogProbFunction"
# Each private name that is touched: the parameters that it takes, and the names that its code has to use. After "..."
# come those that are passed by name; any others must have defaults. A name without parameters only has to be there.
CONTRACT = {
    "GRPOTrainer._tag_names": ("", ""),
    "GRPOTrainer.__init__": ("", "_metrics, _logs, _step, _dist, _tokenizer"),
    "GRPOTrainer._prepare_inputs": ("", "_generate_and_score_completions"),
    "GRPOTrainer._generate_and_score_completions": (
        "self, inputs",
        "_calculate_rewards, _get_per_token_logps_and_entropies",
    ),
    "GRPOTrainer._calculate_rewards": ("self, inputs, prompts, completions, completion_ids_list", ""),
    "GRPOTrainer.compute_loss": ("self, model, inputs, ...", "_compute_loss"),
    "GRPOTrainer._compute_loss": (
        "self, model, inputs",
        "_get_per_token_logps_and_entropies, epsilon_low, epsilon_high",
    ),
    "GRPOTrainer._get_per_token_logps_and_entropies": (
        "self, model, input_ids, attention_mask, logits_to_keep, ..., compute_entropy",
        "",
    ),
    "GRPOTrainer._save_checkpoint": ("self, model, trial", ""),
    "GRPOTrainer._get_output_dir": ("self, trial, ...", ""),
    "GRPOTrainer._load_from_checkpoint": ("self, resume_from_checkpoint, ...", ""),
    "GRPOTrainer._load_optimizer_and_scheduler": ("self, checkpoint", ""),
    "models.unwrap_model_for_generation": ("model, accelerator, ..., gather_deepspeed3_params", ""),
    f"utils.{LOG_PROB_FUNCTION}.forward": (
        "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs",
        "",
    ),
}


def _accepts(function: Any, takes: str) -> bool:
    """Whether a function can be called with the parameters of a line of the contract, and by TRL with no others."""
    parameters = inspect.signature(function).parameters
    first, more, named = takes.partition("...")
    first, named = ([name for name in part.split(", ") if name] for part in (first, named))
    rest = [p for p in list(parameters.values())[len(first) :] if p.name not in named]
    optional = all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in rest)
    fits = list(parameters)[: len(first)] == first and parameters.keys() >= {*named}
    return fits and (optional if more else not rest)


def breach(name: str) -> str | None:
    """How the installed TRL breaks a line of the contract: what it is, and what is expected; None if it keeps it."""
    takes, uses = CONTRACT[name]
    owner, _, path = name.partition(".")
    try:
        value = attrgetter(path)({"GRPOTrainer": GRPOTrainer, "models": models, "utils": utils}[owner])
    except AttributeError:
        # A head that cannot be replaced is left as it is; TRL 1.15 has none without Triton.
        return None if LOG_PROB_FUNCTION in path else f"{name} is missing"
    if takes and not _accepts(value, takes):
        return f"{name} takes ({', '.join(inspect.signature(value).parameters)}), expected ({takes})"
    used = inspect.unwrap(value).__code__.co_names if uses else ()
    missing = [part for part in uses.split(", ") if part and part not in used]
    return f"{name} uses no {', '.join(missing)}, expected it to" if missing else None


def _check_contract() -> None:
    """Warn of a TRL that is newer than the tested ones.

    Raises:
        ImportError: it breaks the contract: the names, what they are, what is expected.
    """
    tested = f"isentropic.engines.trl is tested up to trl {NEWEST[0]}.{NEWEST[1]}, got trl {version('trl')}"
    remedy = f"pip install 'trl<{NEWEST[0]}.{NEWEST[1] + 1}'"
    if found := [text for name in CONTRACT if (text := breach(name))]:
        raise ImportError(f"{tested}, in which {'; '.join(found)}; {remedy}")
    logger.warning("%s, which keeps the names and parameters that it wraps; if training fails, %s", tested, remedy)


if _NEWER:
    _check_contract()

if TYPE_CHECKING:
    from ...recipes import Recipe
    from ..loop import ControlLoop


class Trainer(Protocol):
    """What this adapter needs of a trainer: transformers' and TRL's attributes, and the few that the mixin adds."""

    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    state: Any
    control: Any
    optimizer: Any
    processing_class: Any
    train_dataset: Any
    temperature: float
    num_generations: Any
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    use_vllm: bool
    current_gradient_accumulation_steps: int
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    reward_weights: torch.Tensor
    max_completion_length: Any
    mask_truncated_completions: bool
    eos_token_ids: Any
    generation_config: Any
    generation_kwargs: Any
    reward_funcs: Any
    reward_func_names: Any
    rollout_func: Any
    hub_model_id: Any
    add_callback: Any
    pop_callback: Any
    # Ours.
    recipe: Recipe
    loop: ControlLoop
    run_log: Any
    explainer: Any
    say: Callable[[str], None]
    native: bool


# To a type checker the hooks are a GRPOTrainer; at run time they come before one.
_Base = GRPOTrainer if TYPE_CHECKING else object


class TrainerHooks(_Base):
    """TRL's private steps under our own names. A subclass overrides the methods without an underscore."""

    _tag_names = ["trl", "grpo", "isentropic"]  # noqa: RUF012  (TRL's convention)
    args: Any
    model: Any
    processing_class: Any

    def rewards_calculated(self, rewards: torch.Tensor, completion_ids: Any) -> torch.Tensor:
        """Take the rewards ``[all samples, functions]`` of a generated batch, and return those that TRL shall use."""
        return rewards

    def generate_batch(self, native: Callable[[Any], dict[str, Any]], inputs: Any) -> dict[str, Any]:
        """Generate and score a batch."""
        return native(inputs)

    def score_tokens(self, native: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute log-probabilities and entropies."""
        return native(model, *args, **kwargs)

    def micro_batch_loss(self, native: Callable[..., torch.Tensor], model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute the loss of a micro-batch."""
        return native(model, inputs)

    def before_checkpoint(self) -> None:
        """A checkpoint is about to be written."""

    def after_checkpoint(self, folder: Path) -> None:
        """A checkpoint was written by this process."""

    def checkpoint_loaded(self, folder: str) -> None:
        """A checkpoint was loaded."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except (TypeError, ValueError) as error:  # reward functions are the user's
            raise ValueError(
                f"the rewards of a batch cannot be read: {error}; a reward function returns a number for each "
                "completion, or None for one that it cannot score"
            ) from error
        return self.rewards_calculated(rewards, completion_ids_list)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return self.generate_batch(super()._generate_and_score_completions, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return self.score_tokens(super()._get_per_token_logps_and_entropies, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return self.micro_batch_loss(super()._compute_loss, model, inputs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.before_checkpoint()
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.after_checkpoint(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.checkpoint_loaded(checkpoint)


def metrics(trainer: Any, mode: str = "train") -> dict[str, list[float]]:
    """What TRL logs next, lists of values by name."""
    return trainer._metrics[mode]


# What generating and scoring a batch changes in place.
CHANGED_IN_PLACE = ("_metrics", "_logs")


def scored_tokens(trainer: Any, model: Any, ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int) -> Any:
    """Log-probabilities and entropies of the last tokens, as training computes them."""
    return trainer._get_per_token_logps_and_entropies(model, ids, attention_mask, num_tokens, compute_entropy=True)[:2]


def generated_batch(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch that is generated and scored as in training."""
    return trainer._generate_and_score_completions(rows)


def scores_old_logps(trainer: Any) -> bool:
    """Whether TRL computes the old log-probs of a generated batch, which it then does in its first scoring call."""
    every = trainer.args.steps_per_generation * trainer.num_iterations
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return trainer.args.gradient_accumulation_steps % every != 0 or corrected


def opens_batch(trainer: Any) -> bool:
    """Whether the micro-batch under way is the first one of a generated batch."""
    return trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) == 0


def load_weights(trainer: Any, checkpoint: str) -> None:
    """Load the weights of a checkpoint, and nothing else of it."""
    trainer._load_from_checkpoint(checkpoint)


def replaceable_head(model: Any) -> bool:
    """Whether TRL has given this model its fused head: a ``forward`` of the instance's own."""
    return hasattr(utils, LOG_PROB_FUNCTION) and "forward" in model.__dict__


@contextmanager
def log_prob_function(stand_in: Any) -> Iterator[Any]:
    """Exchange the function by which TRL's head scores tokens; yields TRL's own."""
    native = getattr(utils, LOG_PROB_FUNCTION)
    setattr(utils, LOG_PROB_FUNCTION, stand_in)
    try:
        yield native
    finally:
        setattr(utils, LOG_PROB_FUNCTION, native)


@contextmanager
def generating(trainer: Any) -> Iterator[Any]:
    """The bare model, as TRL has it while it generates."""
    unwrap, args = models.unwrap_model_for_generation, trainer.args
    # TRL 1.15 does not take it.
    name = "gradient_checkpointing_kwargs"
    more = {name: args.gradient_checkpointing_kwargs} if name in inspect.signature(unwrap).parameters else {}
    bare = unwrap(
        trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=args.ds3_gather_for_generation, **more
    )
    with bare as model, trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False):
        yield model


@contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """Keep what is generated and scored inside out of what TRL logs."""
    kept = {name: copy.deepcopy(getattr(trainer, name)) for name in CHANGED_IN_PLACE}
    try:
        yield
    finally:
        vars(trainer).update(kept)


def _samplers(trainer: Any) -> list[Any]:
    """The objects whose ``temperature`` TRL samples at."""
    named = (getattr(trainer, name, None) for name in ("generation_config", "vllm_generation"))
    return [sampler for sampler in named if sampler is not None]


def sampling_temperature(trainer: Any) -> float:
    """The temperature that completions are sampled at; scores are always at that of the trainer."""
    return float(next((sampler.temperature for sampler in _samplers(trainer)), trainer.temperature))


@contextmanager
def sampling_at(trainer: Any, factor: float) -> Iterator[None]:
    """Multiply the temperature that completions are sampled at, and leave that of scores."""
    before = sampling_temperature(trainer)

    def sample_at(temperature: float) -> None:
        for sampler in _samplers(trainer):
            sampler.temperature = temperature
        if getattr(trainer, "generation_kwargs", None) is not None:
            trainer.generation_kwargs["temperature"] = temperature

    sample_at(factor * before)
    try:
        yield
    finally:
        sample_at(before)


def model_id(model: Any) -> str:
    """The hub id or the directory that a model was loaded from; empty if it was made in the script."""
    return getattr(model.config, "_name_or_path", "") or ""


def apply_settings(trainer: Any) -> None:
    """Have a trainer that was made take the settings of its loss from its config again, and tag its model as ours."""
    args = trainer.args
    trainer.loss_type, trainer.scale_rewards = args.loss_type, args.scale_rewards
    trainer.importance_sampling_level = args.importance_sampling_level
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.model.add_model_tags(trainer._tag_names)


# Steps of TRL in which ours are called, and the ones that an override may call in place of TRL's own.
_STEPS: dict[str, set[str]] = {
    "compute_loss": {"_compute_loss"},
    "_compute_loss": set(),
    "_prepare_inputs": {"_generate_and_score_completions"},
    "_generate_and_score_completions": {"_calculate_rewards"},
}
# A loss of its own can be watched, but need not take advantages per token.
_WATCHED = {**_STEPS, "_compute_loss": {"_get_per_token_logps_and_entropies"}}


def bypassed(kind: type, watched: bool) -> str | None:
    """A step that a GRPOTrainer subclass replaces without a call by which ours would be reached.

    Args:
        kind: the subclass.
        watched: whether entropy is only monitored.

    Returns:
        The method, as ``Class.method``; None if there is no such step.
    """
    for owner in kind.__mro__[: kind.__mro__.index(GRPOTrainer)]:
        unwrapped = [inspect.unwrap(getattr(value, "__func__", value)) for value in vars(owner).values()]
        functions = [f for f in unwrapped if hasattr(f, "__code__")]
        called = {name for f in functions for name in f.__code__.co_names}
        above = {name for f in functions if _names_a_base(f, owner) for name in f.__code__.co_names}
        for step, others in (_WATCHED if watched else _STEPS).items():
            reached = called & others or step in above
            if step in vars(owner) and (not reached or _takes_more(owner, step)):
                return f"{owner.__module__.partition('.')[0]}'s {owner.__name__}.{step}"
    # A package may have put its own class in the place of TRL's.
    replaced = [step for step in _STEPS if breach(f"GRPOTrainer.{step}")]
    return f"{GRPOTrainer.__name__}.{replaced[0]}" if replaced else None


def _names_a_base(function: Any, owner: type) -> bool:
    """Whether a method may call what its class derives from: by ``super``, or by a base's name."""
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    bases = [value for value in named if isinstance(value, type) and value in owner.__mro__[1:]]
    return bool(bases) or "super" in function.__code__.co_names


def _takes_more(owner: type, step: str) -> bool:
    """Whether an override needs more arguments than TRL's own, and so is called in another way."""
    parameters = inspect.signature(getattr(owner, step)).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(needed) > len(inspect.signature(getattr(GRPOTrainer, step)).parameters)


def replaced_steps(trainer: Any) -> list[str]:
    """The steps of TRL in which ours are called that were replaced on the object itself."""
    return [step for step in _STEPS if step in vars(trainer)]


def tags_of(kind: Any) -> list[str]:
    """The tags that a trainer's class gives its models."""
    return list(kind._tag_names)


def tokenizer_of(trainer: Any) -> Any:
    """The tokenizer, which for a model of several modalities is a part of the processor."""
    return trainer._tokenizer


def stop_at(trainer: Any, ids: Sequence[int]) -> None:
    """Have a GRPO trainer end completions at these tokens too; none of them restores what it was made with.

    TRL generates with, masks by, and counts as not truncated whatever is in its trainer's ``eos_token_ids``. The
    model's own generation config stays, so that a checkpoint of the run ends where the model ended before. vLLM gets
    the tokens by ``stop_token_ids``.
    """
    if not hasattr(trainer, "_ends_of_model"):
        if not ids:
            return
        trainer._ends_of_model = list(trainer.eos_token_ids)
    every = list(dict.fromkeys([*trainer._ends_of_model, *ids]))
    trainer.eos_token_ids = every
    if getattr(trainer, "generation_config", None) is not None:
        trainer.generation_config.eos_token_id = every
        trainer.generation_kwargs["eos_token_id"] = every
    if getattr(trainer, "vllm_generation", None) is not None:
        trainer.vllm_generation.generation_kwargs["stop_token_ids"] = list(ids)


def limit_to(trainer: Any, tokens: int) -> None:
    """Have a GRPO trainer cut completions at this number of tokens from its next generated batch on."""
    trainer.max_completion_length = trainer.args.max_completion_length = tokens
    if getattr(trainer, "generation_config", None) is not None:
        trainer.generation_config.max_new_tokens = trainer.generation_kwargs["max_new_tokens"] = tokens
    if getattr(trainer, "vllm_generation", None) is not None:
        trainer.vllm_generation.max_completion_length = tokens
