"""Components, controllers and targets of yours: from Python, from ``file.py:NAME``, from ``package.module:NAME``.

A function of yours is called by the names of its parameters, as the functions of the catalogue are. A parameter with a
number for a default is a constant, which a recipe may set; one that names a field of the batch says that the function
reads it. For a knob of its own, put the function into an entry (:class:`~isentropic.recipes.stages.Shaping` and so on).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..control.controllers import CONTROLLERS, Controller
from ..control.names import suggest
from ..control.targets import Target
from ..types import TokenBatch
from .stages import KINDS, Component, Objective

# What a function of each stage may name, besides the fields of a batch and constants of its own.
_BATCH_NAMES = frozenset(TokenBatch._fields) | {"batch", "recipe", "predicted"}
_BATCH_NAMES |= {"clip_low", "clip_high", "entropy_coef", "penalty_coef"}
NAMES: dict[str, frozenset[str]] = {
    "baseline": frozenset({"rewards", "recipe"}),
    "selection": _BATCH_NAMES | {"clipped"},
    "shaping": _BATCH_NAMES,
    "bounds": frozenset({"clip_low", "clip_high", "facts", "recipe", "ratio", "prob_old", "adv", "mask"}),
    "objective": _BATCH_NAMES | {"bounds", "gradient"},
    "penalty": _BATCH_NAMES,
}
# Fields of a batch that may be None and mean something: nothing has moved since sampling.
OPTIONAL = frozenset({"logp_old", "entropy_old"})
_ALWAYS = frozenset({"logp", "adv", "mask"})


def entry(stage: str, value: Any) -> Component:
    """The entry of a component of yours, which is an entry already or a function.

    Args:
        stage: of the table it would be in.
        value: the entry or the function.

    Raises:
        ValueError: it cannot be called as the stage calls; an entry of another stage.

    Example:
        >>> def boosted(adv, entropy, strength=0.5):
        ...     return adv + strength * entropy
        >>> made = entry("shaping", boosted)
        >>> sorted(made.reads), made.constants
        (['entropy'], {'strength': 0.5})
    """
    if isinstance(value, Component):
        if value.stage != stage:
            raise ValueError(f"{stage} must be a {KINDS[stage].__name__}, got a {type(value).__name__}; name it there")
        if callable(value.at):
            _check(stage, value.at, value.constants)
        return value if value.written else replace(value, written=_written(value.at))
    if not callable(value):
        raise ValueError(f"{stage} must be a name, a function or a {KINDS[stage].__name__}, got {value!r}")
    parameters = _check(stage, value, {})
    known = NAMES[stage]
    constants = {
        name: p.default for name, p in parameters.items() if name not in known and type(p.default) in (int, float)
    }
    reads = {name for name in parameters if name in TokenBatch._fields} - _ALWAYS - OPTIONAL
    more: dict[str, Any] = {"clips": True} if KINDS[stage] is Objective else {}
    written = _written(value)
    return KINDS[stage](written.partition("@")[0], value, reads, constants, written=written, **more)


def _check(stage: str, function: Callable[..., Any], constants: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a function, each of which must be known to the stage, a constant, or have a default."""
    name = _written(function).partition("@")[0]
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{stage} {name} cannot be called by name: {error}; wrap it in a function of yours") from None
    for parameter in parameters.values():
        named = parameter.name in NAMES[stage] or parameter.name in constants
        loose = parameter.default is not inspect.Parameter.empty or parameter.kind in (
            inspect.Parameter.VAR_KEYWORD,
            inspect.Parameter.VAR_POSITIONAL,
        )
        if not (named or loose):
            raise ValueError(
                f"{stage} {name} asks for {parameter.name!r}, got no such value; it may name "
                f"{', '.join(sorted(NAMES[stage]))}, or give {parameter.name} a default, which makes it a constant"
            )
    return parameters


@dataclass(frozen=True)
class Factory:
    """A controller or a target of yours.

    Attributes:
        make: a function that returns one, or the object itself.
        written: its name in run.json, with a digest of its file.
    """

    make: Any
    written: str

    def __deepcopy__(self, memo: Any) -> Factory:
        return self

    def __str__(self) -> str:
        return self.written

    def controller(self, *args: Any) -> Controller:
        """The controller of a knob's range.

        Raises:
            ValueError: the function makes no controller.
        """
        return self._made(Controller, *args)

    def target(self, **known: Any) -> Target:
        """The target; a function gets those of ``first`` and ``steps`` that it names.

        Raises:
            ValueError: the function makes no target.
        """
        if isinstance(self.make, Target):
            return self.make
        named = inspect.signature(self.make).parameters
        return self._made(Target, **{name: value for name, value in known.items() if name in named})

    def _made(self, kind: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.make, kind):
            return self.make
        what = kind.__name__
        try:
            made = self.make(*args, **kwargs)
        except Exception as error:  # a function of the user's may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{self.written} must make a {what}, and raised {reason}") from error
        if not isinstance(made, kind):
            raise ValueError(f"{self.written} must make a {what}, got {type(made).__name__}; return {what}(...)")
        return made


def factory(what: str, value: Any) -> Factory:
    """A controller or a target of yours, from a function that makes one or from the object itself.

    Raises:
        ValueError: neither of them.
    """
    if isinstance(value, Factory):
        return value
    if isinstance(value, Controller | Target):
        return Factory(value, f"{what}@{_digest(value.update)}")
    if not callable(value):
        raise ValueError(f"{what} must be a text form, a function or a {what.capitalize()}, got {value!r}")
    return Factory(value, _written(value))


def resolve(what: str, text: str) -> Any:
    """What a text means: an entry or a factory of yours if it is a place, and else the text itself.

    Args:
        what: a stage, ``controller`` or ``target``.
        text: a name, or ``file.py:NAME`` or ``package.module:NAME``; for a controller or a target, options may follow.

    Raises:
        ValueError: nothing at that place, or something else.

    Example:
        >>> resolve("controller", "pi:gain=2"), resolve("target", "anneal:100%:50%"), resolve("shaping", "repo")
        ('pi:gain=2', 'anneal:100%:50%', 'repo')
    """
    if what in KINDS:
        return entry(what, load(text, what)) if ":" in text else text
    place, _, rest = text.partition(":")
    name, *pairs = rest.split(":")
    if place in CONTROLLERS or not (place.endswith(".py") or name.isidentifier()):
        return text
    value = load(f"{place}:{name}", what)
    options = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    if not options:
        return factory(what, value)
    numbers = {key: _number(what, key, value) for key, value in options.items()}
    try:
        inspect.signature(value).bind_partial(**numbers)
    except TypeError as error:
        raise ValueError(f"{what} {text!r}: {error}; its options are the parameters of {name}") from None
    return factory(what, partial(value, **numbers))


def _number(what: str, key: str, text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        if text:
            return text
        raise ValueError(f"{what} option {key} has no value; write {key}=0.1") from None


def _written(function: Any) -> str:
    """The name of a function, and eight characters of the file that defines it: an edited function is another one."""
    inner, bound = function, ""
    while isinstance(inner, partial):
        bound, inner = f"{bound}{inner.args}{sorted(inner.keywords.items())}", inner.func
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    if isinstance(inner, str):
        return inner
    return f"{named.__module__}.{named.__qualname__}@{_digest(named, bound)}"


def _digest(function: Any, more: str = "") -> str:
    try:
        content = Path(str(inspect.getsourcefile(function))).read_bytes()
    except (OSError, TypeError):  # typed at a prompt, or built in
        code = getattr(function, "__code__", None)
        content = repr(function).encode() if code is None else code.co_code + repr(code.co_consts).encode()
    return hashlib.sha256(content + more.encode()).hexdigest()[:8]


@lru_cache(maxsize=64)
def _run(path: Path, changed: int) -> Any:
    """A file as a module, once for each of its versions."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def load(text: str, what: str) -> Any:
    """What is at ``file.py:NAME`` or ``package.module:NAME``.

    Args:
        text: the place.
        what: what is expected there, for messages.

    Raises:
        ValueError: no such file, module or name, or a file that cannot be run; in one line.

    Example:
        >>> load("math:pi", "shaping")
        3.141592653589793
        >>> load("mine.py:LOOP", "recipe")
        Traceback (most recent call last):
        ...
        ValueError: recipe 'mine.py:LOOP': there is no file mine.py; name one that is here, or package.module:NAME
    """
    place, _, name = text.rpartition(":")
    path = Path(place).expanduser()
    try:
        if place.endswith(".py"):
            if not path.is_file():
                raise ValueError(f"there is no file {place}; name one that is here, or package.module:NAME")
            module = _run(path.resolve(), path.stat().st_mtime_ns)
        else:
            module = importlib.import_module(place)
    except ValueError as error:
        raise ValueError(f"{what} {text!r}: {error}") from None
    except Exception as error:  # a file of the user's may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what} {text!r}: {place} cannot be loaded: {reason}; run it alone to see where") from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ValueError(f"{what} {text!r}: {place} has no {name!r}{suggest(name, public)}; assign it there")
    return getattr(module, name)
