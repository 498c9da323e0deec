"""Every private or version-dependent name of verl that this package touches: what a new version of verl can break.

verl's own steps are overridden only here, and each calls a method with our own name; a step that it may replace
comes as its first argument. ``tests/engines/verl/test_verl_compat.py`` has a contract test for each name.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

SUPPORTED = (0, 9)


def _require_verl() -> None:
    try:
        got = version("verl")
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            "isentropic.engines.verl needs verl, which is not installed; pip install 'isentropic[verl]'", name="verl"
        ) from None
    if tuple(int(part) for part in got.split(".")[:2]) != SUPPORTED:
        raise ImportError(
            f"isentropic.engines.verl wraps the engine of verl {SUPPORTED[0]}.{SUPPORTED[1]}, got verl {got}; "
            "pip install 'isentropic[verl]' brings the supported one"
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
from verl.workers.engine_workers import TrainingWorker  # noqa: E402
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
    ADV = "advantages"
    MASK = "response_mask"
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
    """verl's steps under our own names, before an engine. A subclass overrides the first five methods."""

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
