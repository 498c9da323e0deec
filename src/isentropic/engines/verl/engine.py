"""Entropy control inside verl's actor: the native loss is wrapped per micro-batch, never copied.

``+isentropic=RECIPE`` on verl's command line makes :class:`PolicyLoss` the config of the actor's loss. Where verl
builds that config, in each worker, this module is imported, and registers a subclass of the engine that verl would have
taken. Generation, parallelism, checkpoints and logging stay verl's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar

from ...recipes.compose import Recipe, check, compose
from . import fallback
from .audit import first_look
from .control import Control
from .plugin import AGG_MODES, ESTIMATOR_MODULE, OURS, estimator_of

SUPPORTED = (0, 9)


def _require_verl() -> None:
    try:
        got = version("verl")
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            "isentropic.engines.verl.engine needs verl, which is not installed; pip install 'isentropic[verl]'",
            name="verl",
        ) from None
    if tuple(int(part) for part in got.split(".")[:2]) != SUPPORTED:
        raise ImportError(
            f"isentropic.engines.verl.engine wraps the engine of verl 0.9, got verl {got}; install verl==0.9.1"
        )


_require_verl()

import torch  # noqa: E402
from verl.trainer.ppo.core_algos import register_policy_loss  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.device import get_device_name, get_vendor  # noqa: E402
from verl.workers.config import PolicyLossConfig  # noqa: E402
from verl.workers.engine import EngineRegistry  # noqa: E402

BACKENDS = ("fsdp", "fsdp2")


@dataclass
class PolicyLoss(PolicyLossConfig):
    """The config of the actor's loss, with a recipe.

    Attributes:
        recipe: a name of ``isentropic recipes``; None leaves verl's loss as it is, and reads.
        knob, controller, target: what is turned, how, and to what; None is the recipe's own.
        recipe_options: other fields of a Recipe.
        folder: the run directory that rank 0 writes; None writes none.
        adv_estimator, norm_adv_by_std, batch_size, strategy, external_lib: what verl is set to, for the checks; None is
            not checked.
    """

    recipe: str | None = None
    knob: str | None = None
    controller: str | None = None
    target: str | None = None
    recipe_options: dict[str, Any] | None = None
    folder: str | None = None
    adv_estimator: str | None = None
    norm_adv_by_std: bool | None = None
    batch_size: int | None = None
    strategy: str | None = None
    external_lib: Any = None

    fallback: ClassVar[Any] = None  # the controller where the engine is not wrapped; no field, so no setting

    def __post_init__(self) -> None:
        resolve(self)

    def updates(self, actor: Any) -> int | None:
        """Optimizer steps that reuse one generated batch, where verl's batch size is known."""
        if self.batch_size is None:
            return None
        return max(1, self.batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs

    def steps(self, actor: Any) -> int | None:
        """Optimizer steps of the whole run, where verl's trainer has told the worker its generated batches."""
        batches = getattr(getattr(actor, "optim", None), "total_training_steps", None) or 0
        return batches * (self.updates(actor) or 1) if batches > 0 else None

    def checked(self, actor: Any) -> Recipe:
        """The recipe, held against the actor's settings; without a name it is what they amount to.

        Raises:
            ValueError: settings that the recipe excludes.
        """
        recipe = check(resolve(self), self.updates(actor))
        if self.recipe is None:
            return replace(recipe, clip_low=actor.clip_ratio_low, clip_high=actor.clip_ratio_high)
        _check_actor(actor, recipe, self.recipe)
        return recipe


def resolve(config: PolicyLoss) -> Recipe:
    """The recipe that a config means.

    Raises:
        ValueError: an unknown name, a composition that cannot work, or one that verl's settings or workers exclude.
    """
    changes: dict[str, Any] = {
        "knob": config.knob,
        "controller": config.controller,
        "target": None if config.target is None else str(config.target),
    }
    options = dict(config.recipe_options or {})
    if config.recipe is None:
        if any(value is not None for value in changes.values()) or options:
            raise ValueError("knob, controller, target and recipe_options need a recipe; name one: +isentropic=NAME")
        if config.strategy is not None and config.strategy not in BACKENDS:
            raise ValueError(
                "monitor reads entropies from the engine, which is not wrapped here, got "
                f"actor_rollout_ref.actor.strategy={config.strategy}; set it to {' or '.join(BACKENDS)}"
            )
        return Recipe(formula="verl's own loss", source="the actor's settings")
    if config.controller == "none":
        changes |= {"knob": "none", "controller": None}
    recipe = compose(config.recipe, **changes, **options)
    _check_verl(config, recipe)
    return recipe


def _check_verl(config: PolicyLoss, recipe: Recipe) -> None:
    if recipe.dynamic_sampling:
        raise ValueError(
            "dynamic_sampling is verl's own, got dynamic_sampling=True in recipe_options; set "
            "algorithm.filter_groups.enable=True instead"
        )
    if recipe.overlong_buffer:
        raise ValueError(
            f"the overlong penalty is verl's own, got overlong_buffer={recipe.overlong_buffer} in recipe_options; set "
            "reward.reward_manager.name=dapo and +reward.reward_kwargs.overlong_buffer_cfg instead"
        )
    if config.strategy is not None and config.strategy not in BACKENDS:
        fallback.check(recipe, config.strategy)
    wanted = estimator_of(recipe)
    got = (str(getattr(config.adv_estimator, "value", config.adv_estimator)), config.norm_adv_by_std)
    if config.adv_estimator is None:
        return
    norm = "" if wanted[1] is None else f" algorithm.norm_adv_by_std_in_grpo={wanted[1]}"
    if got[0] != wanted[0] or wanted[1] not in (None, got[1]):
        raise ValueError(
            f"recipe {config.recipe} needs algorithm.adv_estimator={wanted[0]}{norm}, got adv_estimator={got[0]} "
            f"norm_adv_by_std_in_grpo={got[1]}; leave them out of the command, or set them so"
        )
    libraries = [config.external_lib] if isinstance(config.external_lib, str) else list(config.external_lib or ())
    if wanted[0] == OURS and ESTIMATOR_MODULE not in libraries:
        raise ValueError(
            f"baseline {recipe.baseline} is an estimator of isentropic's, which verl must be told to import, got "
            f"actor_rollout_ref.model.external_lib={config.external_lib}; add {ESTIMATOR_MODULE} to it"
        )


register_policy_loss("isentropic")(fallback.by_loss)


# To a type checker the mixin is an engine of verl's; at run time it stands before one.
if TYPE_CHECKING:
    from verl.workers.engine import BaseEngine as _Engine
else:
    _Engine = object


class EntropyControl(_Engine):
    """The mixin before a verl engine: wraps the loss of each optimizer step, and keeps the controller."""

    control: Control | None = None
    _resumed: str | None = None

    def _control_of(self, loss_function: Any) -> Control | None:
        config: Any = getattr(loss_function, "keywords", {}).get("config")
        chosen = getattr(config, "policy_loss", None)
        if not isinstance(chosen, PolicyLoss):
            return None
        if self.control is None:
            recipe = chosen.checked(config)
            self.control = Control(recipe, chosen.recipe is None, chosen.folder, chosen.steps(config))
            self.control.logits.wanted = recipe.needs_rows
            if torch.distributed.get_rank() == 0:
                first_look(self, self.control)
            if self._resumed is not None:
                self.control.restore(self._resumed)
            self.control.start({"recipe": chosen.recipe or "verl", "out": chosen.folder})
        return self.control

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        """One optimizer step of verl's, under control where its loss is configured by :class:`PolicyLoss`."""
        control = self._control_of(loss_function)
        if control is None:
            return super().train_batch(data, loss_function)
        tu.assign_non_tensor(data, calculate_entropy=True)
        rate = self.optimizer.param_groups[0]["lr"]
        with control.logits.watching():
            output = super().train_batch(data, control.wrap(loss_function))
        act = bool(tu.get_non_tensor_data(data, "update_lr_scheduler", default=True))
        temperature = tu.get_non_tensor_data(data, "temperature", default=1.0)
        temperature = float(temperature) if isinstance(temperature, int | float) else 1.0
        row = control.close(self, rate, act, temperature)
        if self.is_mp_src_rank_with_outputs():
            output["metrics"].update({name: [value] for name, value in row.items()})
        return output

    def prepare_model_outputs(self, output: Any, output_args: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """As verl's; what the head gave is kept for the loss, where the loss asks for it."""
        if self.control is not None:
            self.control.logits.keep(self, output, micro_batch)
        return super().prepare_model_outputs(output, output_args, micro_batch, *args, **kwargs)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """As verl's, and the controller beside it."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.control is not None and torch.distributed.get_rank() == 0:
            self.control.save(local_path)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """As verl's; the controller goes on from there when it is built."""
        super().load_checkpoint(local_path, *args, **kwargs)
        self._resumed = local_path
        if self.control is not None and local_path:
            self.control.restore(local_path)


def _check_actor(config: Any, recipe: Recipe, name: str) -> None:
    """Refuse settings of the actor that a recipe excludes."""
    mode = AGG_MODES[recipe.reduction]
    if config.loss_agg_mode != mode:
        raise ValueError(
            f"recipe {name} needs actor_rollout_ref.actor.loss_agg_mode={mode}, got {config.loss_agg_mode}; "
            "leave it out, or set it so"
        )
    if config.entropy_coeff:
        raise ValueError(
            f"recipe {name} sets the entropy bonus, got actor_rollout_ref.actor.entropy_coeff="
            f"{config.entropy_coeff}; leave it out, or set entropy_coef in recipe_options"
        )


def install() -> None:
    """Register a subclass of the engine that verl would take here, under this device and vendor.

    Raises:
        RuntimeError: another package has registered an engine there.
    """
    device = os.getenv("VERL_ENGINE_DEVICE") or get_device_name()
    vendor = os.getenv("VERL_ENGINE_VENDOR") or get_vendor()
    for backend in BACKENDS:
        known = EngineRegistry._engines["language_model"][backend]
        if (device, vendor) in known:
            raise RuntimeError(
                f"an engine is registered for {backend} on {device}, {vendor}: {known[device, vendor]}; "
                "isentropic must stand around the last one: load the other package first, or leave it out"
            )
        base = EngineRegistry.get_engine_cls("language_model", backend)
        made = type(f"Isentropic{base.__name__}", (EntropyControl, base), {"__module__": __name__})
        EngineRegistry.register("language_model", backend, device, vendor)(made)


install()
