"""Control of an existing trainer: the object gets our methods, and keeps its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ...control.names import choose
from ...recipes import Recipe
from .compat import GRPOConfig, GRPOTrainer, apply_settings, replaced_steps, tags_of
from .trainer import EntropyControlConfig, EntropyControlMixin, IsentropicConfig, IsentropicTrainer

T = TypeVar("T", bound=GRPOTrainer)


def control(
    trainer: T,
    target: Callable[..., Any] | str | float | None = None,
    recipe: Recipe | str | None = None,
    knob: str | None = None,
    controller: Callable[..., Any] | str | None = None,
    **settings: Any,
) -> T:
    """Put a GRPOTrainer that is already made under control, from its next ``train()`` on.

    Args:
        trainer: a GRPOTrainer, or an object of a class that derives from it.
        target, recipe, knob, controller: see :class:`~isentropic.engines.trl.trainer.EntropyControlConfig`.
        **settings: its other fields, such as ``head="trl"`` or ``report=False``.

    Returns:
        The same object, which is now an ``EntropyControlMixin`` too.

    Raises:
        ValueError: not a GRPOTrainer, one that is under control already, one that replaces the steps in which
            entropy is read, or settings that cannot work. The trainer is left as it was.

    Example::

        control(trainer, target="60%").train()
    """
    _check(trainer)
    made: Any = trainer
    args, kind = made.args, type(trainer)
    own = {f.name: f for f in fields(EntropyControlConfig)}
    for name in settings:
        choose("a setting of control()", name, own)
    given = {"target": target, "recipe": recipe, "knob": knob, "controller": controller}
    named = settings | {name: value for name, value in given.items() if value is not None}
    before = type(args), dict(vars(args)), dict(vars(trainer))
    try:
        args.__class__ = _config_kind(type(args))
        for name, f in own.items():
            if name in named or name not in vars(args):
                setattr(args, name, named.get(name, f.default))
        args.take_settings(lambda: None)
        made.__class__ = _trainer_kind(kind)
        apply_settings(made)
        made.take_control()
    except BaseException:
        made.__class__, args.__class__ = kind, before[0]
        for owner, state in ((args, before[1]), (trainer, before[2])):
            vars(owner).clear()
            vars(owner).update(state)
        raise
    return trainer


def _check(trainer: Any) -> None:
    """Refuse what cannot be put under control.

    Raises:
        ValueError: what was got, and what is needed.
    """
    names = [c.__name__ for c in type(trainer).__mro__]
    if isinstance(trainer, EntropyControlMixin):
        raise ValueError(
            f"control() needs a trainer that is not under control, got {names[0]}, which is; set its target and recipe "
            "in its config, or make another trainer"
        )
    if not isinstance(trainer, GRPOTrainer):
        remedy = "train with GRPOTrainer and recipe='rloo'" if "RLOOTrainer" in names else "use GRPOTrainer"
        got = f"the class {trainer.__name__}" if isinstance(trainer, type) else names[0]
        raise ValueError(f"control() needs an object of TRL's GRPOTrainer or of a subclass, got {got}; {remedy}")
    if steps := replaced_steps(trainer):
        raise ValueError(
            f"control() needs the steps of TRL's that entropy is read in, and {', '.join(steps)} of this "
            f"{names[0]} is replaced on the object; override it in a subclass that calls super()"
        )


def _trainer_kind(kind: type) -> type:
    if kind is GRPOTrainer:
        return IsentropicTrainer
    more = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_tag_names": [*tags_of(kind), "isentropic"]}
    return type(f"Controlled{kind.__name__}", (EntropyControlMixin, kind), more)


def _config_kind(kind: type) -> type:
    """The class of a config with our fields in front."""
    if issubclass(kind, EntropyControlConfig):
        return kind
    if kind is GRPOConfig:
        return IsentropicConfig

    def reduced(self: Any) -> Any:
        # training_args.bin names the class that can be imported.
        return _blank, (kind,), self.__getstate__()

    more = {"__module__": kind.__module__, "__reduce__": reduced}
    return dataclass(type(f"Controlled{kind.__name__}", (EntropyControlConfig, kind), more))


def _blank(kind: type) -> Any:
    return object.__new__(kind)
