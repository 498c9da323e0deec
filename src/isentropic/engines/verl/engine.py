"""Entropy control inside verl's actor: the native loss is wrapped per micro-batch, never copied.

``+isentropic=RECIPE`` on verl's command line makes :class:`PolicyLoss` the config of the actor's loss. Where verl
builds that config, in each worker, this module is imported, and registers a subclass of the engine that verl would have
taken. Generation, parallelism, checkpoints and logging stay verl's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...recipes import Recipe, check
from . import fallback
from .audit import first_look
from .compat import (
    EngineHooks,
    PolicyLossConfig,
    actor_config,
    ask_for_entropy,
    ends_batch,
    install,
    log_row,
    register_policy_loss,
    temperature_of,
)
from .control import Control
from .groups import attach_groups, attach_lead
from .settings import check_actor, resolve


@dataclass
class PolicyLoss(PolicyLossConfig):
    """The config of the actor's loss, with a recipe.

    Attributes:
        recipe: a name of ``isentropic recipes``, or ``FILE.py:NAME`` of your own; None leaves verl's loss as it is,
            and reads.
        knob, controller, target: what is turned, how, and to what; None is the recipe's own. A controller and a target
            may be yours: ``FILE.py:NAME``.
        recipe_options: other fields of a Recipe, or constants of its components; a component may be ``FILE.py:NAME``.
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
        """Optimizer steps that reuse one generated batch, if verl's batch size is known."""
        if not self.batch_size:  # verl's fully asynchronous trainer has 0 there
            return None
        return max(1, self.batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs

    def steps(self, actor: Any) -> int | None:
        """Optimizer steps of the whole run, if verl's trainer passed the number of generated batches to the worker."""
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
        check_actor(actor, recipe, self.recipe)
        return recipe


class EntropyControl(EngineHooks):
    """Entropy control for a verl engine: wraps the loss of each optimizer step, and keeps the controller.

    Attributes:
        control: from the first step on that has a loss configured by :class:`PolicyLoss`.
    """

    control: Control | None = None
    _resumed: str | None = None
    _sent: dict[int, int] | None = None  # optimizer steps done when each version of the weights was sent; -1 unknown

    def _control_of(self, loss_function: Any) -> Control | None:
        config, settings = _settings_of(loss_function)
        if settings is None:
            return None
        if self.control is None:
            recipe, monitors = settings.checked(config), settings.recipe is None
            control = Control(recipe, monitors, settings.folder, settings.steps(config), self.save_checkpoint)
            if torch.distributed.get_rank() == 0:
                first_look(self, control)
            if self._resumed is not None:
                control.restore(self._resumed)
            control.start({"recipe": settings.recipe or "verl", "out": settings.folder})
            self.control = control
        return self.control

    def weights_sent(self, version: int) -> None:
        self._sent = {**(self._sent or {}), version: -1 if self.control is None else self.control.step}

    def batch_generated(self, data: Any, loss_function: Any) -> None:
        control = self._control_of(loss_function)
        if control is None:
            return
        attach_groups(self, data)
        # What was sent before the first batch were the weights that training starts from.
        self._sent = {version: control.step if at < 0 else at for version, at in (self._sent or {}).items()}
        attach_lead(data, control.step, self._sent)

    def one_step(self, native: Any, data: Any, loss_function: Any) -> Any:
        control = self._control_of(loss_function)
        if control is None:
            return native(data, loss_function)
        ask_for_entropy(data)
        rate = self.optimizer.param_groups[0]["lr"]
        with control.logits.watching():
            output = native(data, control.wrap(loss_function))
        row = control.end_step(self, rate, ends_batch(data), temperature_of(data))
        if self.is_mp_src_rank_with_outputs():
            log_row(output, row)
        return output

    def model_called(self, output: Any, data: Any) -> None:
        if self.control is not None:
            self.control.logits.keep(self, output, data)

    def checkpoint_saved(self, folder: str) -> None:
        if self.control is not None and torch.distributed.get_rank() == 0:
            self.control.save(folder)

    def checkpoint_loaded(self, folder: str | None) -> None:
        self._resumed = folder
        if self.control is not None and folder:
            self.control.restore(folder)


def _settings_of(loss_function: Any) -> tuple[Any, PolicyLoss | None]:
    """The actor's config behind a loss of verl's, and the part of it that is ours."""
    config = actor_config(loss_function)
    settings = getattr(config, "policy_loss", None)
    return config, settings if isinstance(settings, PolicyLoss) else None


register_policy_loss("isentropic")(fallback.by_loss)
install(EntropyControl)
