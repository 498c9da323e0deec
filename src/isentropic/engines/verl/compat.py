"""Every private or version-dependent name of verl that this package touches: what a new version of verl can break.

verl's own steps are overridden only here, and each calls a method with our own name; a step that it may replace
comes as its first argument. ``CONTRACT`` lists the names; it is checked at import, and by
``tests/engines/verl/test_verl_compat.py``, which also tests what each of them does.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import re
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

logger = logging.getLogger("isentropic")
# The versions that the tests run with, `make test-verl` and `make test-verl-versions`.
OLDEST, NEWEST = (0, 9, 0), (0, 9, 1)

_FSDP = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"
# Each name that is touched, and the parameters that it takes. After "..." come those that are passed by name, and then
# there may be others; without it, any others must have defaults. A name without parameters only has to be there.
CONTRACT = {
    "verl.trainer.ppo.core_algos:agg_loss": (
        "loss_mat, loss_mask, loss_agg_mode, ..., dp_size, batch_num_tokens, global_batch_size, loss_scale_factor"
    ),
    "verl.trainer.ppo.core_algos:get_policy_loss_fn": "name",
    "verl.trainer.ppo.core_algos:register_adv_est": "name_or_enum",
    "verl.trainer.ppo.core_algos:register_policy_loss": "name",
    "verl.trainer.ppo.core_algos:compute_policy_loss_vanilla": (
        "..., old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights"
    ),
    "verl.utils.tensordict_utils:TensorDict": "",
    "verl.utils.tensordict_utils:get_non_tensor_data": "data, key, ..., default",
    "verl.utils.tensordict_utils:assign_non_tensor": "tensor_dict",
    "verl.utils.device:get_device_name": "",
    "verl.utils.device:get_vendor": "",
    "verl.workers.config:PolicyLossConfig": "..., loss_mode",
    "verl.workers.config:ActorConfig": (
        "..., strategy, ppo_mini_batch_size, ppo_epochs, policy_loss, optim, clip_ratio_low, clip_ratio_high, "
        "loss_agg_mode, loss_scale_factor, entropy_coeff, global_batch_info"
    ),
    "verl.workers.engine:EngineRegistry._engines": "",
    "verl.workers.engine:EngineRegistry.get_engine_cls": "model_type, backend",
    "verl.workers.engine:EngineRegistry.register": "model_type, backend, device, vendor",
    f"{_FSDP}.train_batch": "self, data, loss_function",
    f"{_FSDP}.prepare_model_outputs": "self, output, output_args, micro_batch, ...",
    f"{_FSDP}.save_checkpoint": "self, local_path, hdfs_path, global_step, ...",
    f"{_FSDP}.load_checkpoint": "self, local_path, ...",
    f"{_FSDP}.get_data_parallel_group": "self",
    f"{_FSDP}.get_data_parallel_size": "self",
    f"{_FSDP}.is_mp_src_rank_with_outputs": "self",
    "verl.workers.engine_workers:TrainingWorker.train_mini_batch": "self, data, ...",
    "verl.workers.engine_workers:ActorRolloutRefWorker.update_weights": "self, global_steps, ...",
    "verl.workers.utils.losses:ppo_loss": "config, model_output, data, dp_group",
    "verl.workers.utils.padding:no_padding_2_padding": "tensor, data",
    "verl.workers.utils.padding:response_to_nested": "tensor, response_mask",
}


def _accepts(function: Any, takes: str) -> bool:
    """Whether a function has the parameters of a line of the contract, and needs no others."""
    parameters = inspect.signature(function).parameters
    first, more, named = ([part for part in x.split(", ") if part] for x in takes.partition("..."))
    rest = [p for p in list(parameters.values())[len(first) :] if p.name not in named]
    optional = all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in rest)
    return list(parameters)[: len(first)] == first and parameters.keys() >= {*named} and (optional or bool(more))


def breach(name: str) -> str | None:
    """How the installed verl breaks a line of the contract: what it is, what is expected; None if it keeps it."""
    module, _, path = name.partition(":")
    try:
        found = attrgetter(path)(import_module(module))
    except (ImportError, AttributeError) as error:
        return f"{name} is missing ({error})"
    takes = CONTRACT[name]
    if not takes or _accepts(found, takes):
        return None
    return f"{name} takes ({', '.join(inspect.signature(found).parameters)}), expected ({takes})"


def _require_verl() -> None:
    """Refuse a verl that is older than the tested ones; let in a newer one, with a warning, if it keeps the contract.

    Raises:
        ModuleNotFoundError: there is none.
        ImportError: what is needed, what was found, and what to install.
    """
    try:
        got = version("verl")
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            "isentropic.engines.verl needs verl, which is not installed; pip install 'isentropic[verl]'", name="verl"
        ) from None
    found = tuple(map(int, re.findall(r"\d+", got)[:3]))
    oldest, newest = (".".join(map(str, x)) for x in (OLDEST, NEWEST))
    tested, remedy = f"isentropic.engines.verl is tested with verl {oldest} to {newest}", f"pip install verl=={newest}"
    if found < OLDEST:
        raise ImportError(f"{tested}, got verl {got}, which is older; {remedy}")
    if found <= NEWEST:
        return
    if broken := [text for name in CONTRACT if (text := breach(name))]:
        raise ImportError(f"{tested}, got verl {got}, in which {'; '.join(broken)}; {remedy}")
    logger.warning(
        "%s, got verl %s, which keeps the names and parameters that it wraps; if training fails, %s",
        *(tested, got, remedy),
    )


_require_verl()

import torch  # noqa: E402  (after the version check, whose message is the better one)
from verl.trainer.ppo.core_algos import (  # noqa: E402
    agg_loss,
    get_policy_loss_fn,
    register_adv_est,
    register_policy_loss,
)
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.device import get_device_name, get_vendor  # noqa: E402
from verl.workers.config import PolicyLossConfig  # noqa: E402
from verl.workers.engine import BaseEngine, EngineRegistry  # noqa: E402
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker  # noqa: E402
from verl.workers.utils.padding import no_padding_2_padding, response_to_nested  # noqa: E402

__all__ = ["PolicyLossConfig", "get_policy_loss_fn", "register_adv_est", "register_policy_loss"]

MODEL_TYPE = "language_model"
BACKENDS = ("fsdp", "fsdp2")  # those whose engines are wrapped


class Keys:
    """Keys of verl's data: of a micro-batch, of a generated batch, and of the model's output."""

    LOGP = "log_probs"
    ENTROPY = "entropy"  # of the output, and of the data: that of sampling time
    LOGP_OLD = "old_log_probs"
    LOGP_SAMPLER = "rollout_log_probs"
    CORRECTION = "rollout_is_weights"
    ADV = "advantages"
    MASK = "response_mask"  # of the tokens that are trained on
    GENERATED = "loss_mask"  # of all that the policy generated, if verl's rejection took some out of the other
    ANSWERS = "responses"
    IDS = "input_ids"
    GROUP = "uid"
    # Of these the first that is there: scores come before verl's KL term, which would blur right and wrong.
    REWARDS = ("token_level_scores", "rm_scores", "token_level_rewards")
    # Ours, attached to a generated batch.
    REWARD = "isentropic_reward"
    GROUP_RATE = "isentropic_group_rate"
    GROUP_REWARD = "isentropic_group_reward"
    GROUP_DISTINCT = "isentropic_group_distinct"
    GROUP_REPEATS = "isentropic_group_repeats"
    LEAD = "isentropic_lead"


class Engine(Protocol):
    """What this adapter needs of verl's engine: its attributes, and its answers on how data is spread over ranks."""

    module: Any
    optimizer: Any

    def get_data_parallel_group(self) -> Any: ...

    def get_data_parallel_size(self) -> int: ...

    def is_mp_src_rank_with_outputs(self) -> bool: ...

    def save_checkpoint(self, local_path: str, hdfs_path: str | None = None, global_step: int = 0) -> None: ...


# To a type checker the hooks are an engine of verl's; at run time they come before one.
_Base = BaseEngine if TYPE_CHECKING else object


class EngineHooks(_Base):
    """verl's steps under our own names, before an engine. A subclass overrides the first six methods."""

    def weights_sent(self, version: int) -> None:
        """The sampler has got the weights as they are, under this number."""

    def batch_generated(self, data: Any, loss_function: Any) -> None:
        """This rank's whole share of a generated batch is about to be trained on."""

    def one_step(self, native: Callable[[Any, Any], Any], data: Any, loss_function: Any) -> Any:
        """Take an optimizer step."""
        return native(data, loss_function)

    def model_called(self, output: Any, data: Any) -> None:
        """The model's forward pass on a micro-batch is done."""

    def checkpoint_saved(self, folder: str) -> None:
        """A checkpoint was written by all ranks."""

    def checkpoint_loaded(self, folder: str | None) -> None:
        """A checkpoint was loaded."""

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        return self.one_step(super().train_batch, data, loss_function)

    def prepare_model_outputs(self, output: Any, output_args: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.model_called(output, micro_batch)
        return super().prepare_model_outputs(output, output_args, micro_batch, *args, **kwargs)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        self.checkpoint_saved(local_path)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().load_checkpoint(local_path, *args, **kwargs)
        self.checkpoint_loaded(local_path)


def install(hooks: type[EngineHooks]) -> None:
    """Register a subclass of each engine that verl would take here, under this device and vendor.

    Raises:
        RuntimeError: another package has registered an engine there.
    """
    device = os.getenv("VERL_ENGINE_DEVICE") or get_device_name()
    vendor = os.getenv("VERL_ENGINE_VENDOR") or get_vendor()
    for backend in BACKENDS:
        known = EngineRegistry._engines[MODEL_TYPE][backend]
        if (device, vendor) in known:
            raise RuntimeError(
                f"an engine is registered for {backend} on {device}, {vendor}: {known[device, vendor]}; isentropic "
                "must wrap the last one: load the other package first, or leave it out"
            )
        base = EngineRegistry.get_engine_cls(MODEL_TYPE, backend)
        wrapped = type(f"Isentropic{base.__name__}", (hooks, base), {"__module__": hooks.__module__})
        EngineRegistry.register(MODEL_TYPE, backend, device, vendor)(wrapped)
    _announce_batches()
    _announce_weights()


def _announce_batches() -> None:
    """Have a worker tell its engine of each generated batch, before verl cuts it into mini-batches."""
    native = TrainingWorker.train_mini_batch

    # The wrapper keeps the attributes by which verl spreads the call over its workers.
    @wraps(native)
    def train_mini_batch(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.engine, EngineHooks) and isinstance(data, tu.TensorDict):
            self.engine.batch_generated(data, self.loss_fn)
        return native(self, data, *args, **kwargs)

    TrainingWorker.train_mini_batch = train_mini_batch


def _announce_weights() -> None:
    """Have a worker tell its engine of each version of the weights that goes to the sampler."""
    native = ActorRolloutRefWorker.update_weights

    @wraps(native)
    async def update_weights(self: Any, global_steps: Any = None, *args: Any, **kwargs: Any) -> Any:
        engine = getattr(getattr(self, "actor", None), "engine", None)
        if isinstance(engine, EngineHooks) and global_steps is not None:
            engine.weights_sent(global_steps)
        return await native(self, global_steps, *args, **kwargs)

    ActorRolloutRefWorker.update_weights = update_weights


# Configs.


def actor_config(loss_function: Any) -> Any:
    """The actor's config that verl has bound to its loss, or None."""
    return getattr(loss_function, "keywords", {}).get("config")


def with_config(loss_function: Any, config: Any) -> Callable[..., Any]:
    """verl's loss, bound to another config."""
    return partial(loss_function.func, *loss_function.args, **{**loss_function.keywords, "config": config})


def set_field(config: Any, name: str, value: Any) -> None:
    """Set a field of a config of verl's, which are frozen."""
    object.__setattr__(config, name, value)


def replaced(config: Any, **values: Any) -> Any:
    """A copy of a config with other values; what it holds is shared."""
    config = copy.copy(config)
    for name, value in values.items():
        set_field(config, name, value)
    return config


# Data.


def holds(data: Any, key: str) -> bool:
    """Whether verl's data has a key."""
    return key in data.keys()  # noqa: SIM118  (a TensorDict)


def setting(data: Any, key: str, default: Any) -> Any:
    """A setting that travels with verl's data."""
    return tu.get_non_tensor_data(data, key, default=default)


def ask_for_entropy(data: Any) -> None:
    """Have the engine compute the entropies of the rows."""
    tu.assign_non_tensor(data, calculate_entropy=True)


def ends_batch(data: Any) -> bool:
    """Whether the mini-batch is the last one of its generated batch."""
    return bool(setting(data, "update_lr_scheduler", True))


def temperature_of(data: Any) -> float:
    """The sampling temperature that verl scores with."""
    value = setting(data, "temperature", 1.0)
    return float(value) if isinstance(value, int | float) else 1.0


def groups_of(data: Any) -> list[str] | None:
    """The name of each sample's group, or None if the data does not say."""
    if not holds(data, Keys.GROUP):
        return None
    names = data.get(Keys.GROUP).tolist()
    return [str(name) for name in names]


def versions_of(data: Any) -> list[int | None] | None:
    """The version of the weights that sampled the last token of each answer; None if the data does not say."""
    name, fields = "max_global_steps", "extra_fields"
    if holds(data, name):
        versions = data.get(name).tolist()
    elif holds(data, fields):
        versions = [known.get(name) if isinstance(known, dict) else None for known in data.get(fields).tolist()]
    else:
        return None
    return versions if any(version is not None for version in versions) else None


def answers_of(values: torch.Tensor, data: Any) -> torch.Tensor:
    """A model's output ``[tokens ...]`` or jagged, at the tokens of the answers, ``[b t ...]``."""
    return no_padding_2_padding(values, data)


def answer_lengths(data: Any) -> torch.Tensor:
    """Tokens of each answer, those of an environment too, ``[b]``."""
    answers = data[Keys.ANSWERS]
    if answers.is_nested:
        return answers.offsets().diff()
    return data["attention_mask"][:, -answers.shape[1] :].sum(1)


def answer_hashes(data: Any) -> list[int]:
    """A number for each answer, equal for equal answers on any process; 0 for all if the data holds no answers."""
    if not holds(data, Keys.ANSWERS):
        return [0] * len(data)
    lengths, answers = answer_lengths(data).tolist(), data[Keys.ANSWERS]
    rows = answers.unbind() if answers.is_nested else answers
    return [hash(tuple(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]


def answer_limit(data: Any) -> int | None:
    """The number of tokens at which answers are cut, or None if the data does not say."""
    answers = data[Keys.ANSWERS]
    return setting(data, "max_response_len", None) if answers.is_nested else answers.shape[1]


def padded(x: torch.Tensor) -> torch.Tensor:
    """``[b t]``, whether it came padded or jagged."""
    return x.to_padded_tensor(0) if x.is_nested else x


def aligned(x: torch.Tensor, length: int) -> torch.Tensor:
    """``[b t]`` of so many tokens, whether it came padded or jagged."""
    x = padded(x)
    return torch.nn.functional.pad(x, (0, length - x.shape[1]))[:, :length]


def in_layout_of(like: torch.Tensor, x: torch.Tensor, data: Any) -> torch.Tensor:
    """``[b t]`` in the layout and dtype of a field of the data that it replaces."""
    return response_to_nested(x, data[Keys.MASK]) if like.is_nested else x.to(like.dtype)


def aggregated(by_token: torch.Tensor, mask: torch.Tensor, config: Any) -> torch.Tensor:
    """A loss ``[b t]`` reduced as verl reduces it: over the whole batch of the step, this rank's part."""
    return agg_loss(by_token, mask, config.loss_agg_mode, **config.global_batch_info)


def log_row(output: dict[str, Any], row: dict[str, float]) -> None:
    """Add figures of an optimizer step to what verl logs."""
    output["metrics"].update({name: [value] for name, value in row.items()})
