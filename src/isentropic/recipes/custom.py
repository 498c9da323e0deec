"""Custom components, controllers and targets: from Python, from ``file.py:NAME``, from ``package.module:NAME``.

A custom function is called by the names of its parameters, as the functions of the catalogue are. A parameter with a
number for a default is a constant, which a recipe may set; one that names a field of the batch says that the function
reads it. For a knob of its own, put the function into an entry (:class:`~isentropic.recipes.stages.Shaping` and so on).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from numbers import Real
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from ..control.controllers import CONTROLLERS, Controller
from ..control.names import suggest
from ..control.targets import TARGETS, Target
from ..types import TokenBatch
from .stages import KINDS, Component, Objective

# What a function of each stage may name, besides the fields of a batch and constants of its own.
_BATCH_NAMES = frozenset(TokenBatch._fields) | {"batch", "recipe", "predicted"}
_BATCH_NAMES |= {"clip_low", "clip_high", "entropy_coef", "penalty_coef"}
NAMES: dict[str, frozenset[str]] = {
    "baseline": frozenset({"rewards", "logp_mean", "recipe"}),
    "selection": _BATCH_NAMES | {"clipped"},
    "shaping": _BATCH_NAMES,
    "bounds": frozenset({"clip_low", "clip_high", "facts", "recipe", "ratio", "prob_old", "adv", "mask"}),
    "objective": _BATCH_NAMES | {"bounds", "gradient"},
    "penalty": _BATCH_NAMES,
}
# Fields of a batch that may be None and mean something: nothing has moved since sampling.
OPTIONAL = frozenset({"logp_old", "entropy_old"})
_ALWAYS = frozenset({"logp", "adv", "mask"})
_LOOSE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def entry(stage: str, value: Any) -> Component:
    """The entry of a custom component, which is an entry already or a function.

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
        return _completed(stage, value)
    if not callable(value):
        raise ValueError(f"{stage} must be a name, a function or a {KINDS[stage].__name__}, got {value!r}")
    parameters = _check(stage, value, {}, {})
    known = NAMES[stage]
    constants = {name: p.default for name, p in parameters.items() if name not in known and _is_number(p.default)}
    more: dict[str, Any] = {"clips": True} if KINDS[stage] is Objective else {"needs_logp": "logp_mean" in parameters}
    written = _written(value)
    formula = written.partition("@")[0]
    return _complete(KINDS[stage](formula, value, _reads(parameters), constants, written=written, **more))


def _completed(stage: str, value: Component) -> Component:
    """An entry with what its function reads, and with what is written of it."""
    if value.stage != stage:
        raise ValueError(f"{stage} must be a {KINDS[stage].__name__}, got a {type(value).__name__}; name it there")
    if "completed" in vars(value):
        return value
    if isinstance(value.at, str) and ":" in value.at:
        return _complete(replace(value, written=value.written or value.at))
    if not callable(value.at):
        raise ValueError(f"{stage} {value.formula!r} must have a custom function, got at={value.at!r}; write at=f")
    parameters = _check(stage, value.at, value.constants, value.options)
    reads = value.reads | (_reads(parameters) - set(value.options))
    more = {"needs_logp": value.needs_logp or "logp_mean" in parameters}
    return _complete(replace(value, reads=reads, written=value.written or _written(value.at), **more))


def _complete(made: Component) -> Component:
    """Mark an entry as checked: a recipe is made again at every step of its knob."""
    object.__setattr__(made, "completed", True)
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _reads(parameters: Mapping[str, Any]) -> frozenset[str]:
    """The fields of a batch that parameters name, those that ``predicted`` is made from among them."""
    fields = {name for name in parameters if name in TokenBatch._fields}
    return frozenset(fields | ({"entropy"} if "predicted" in parameters else set())) - _ALWAYS - OPTIONAL


def _check(
    stage: str, function: Callable[..., Any], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, inspect.Parameter]:
    """The parameters of a function: known to the stage, constants, or with a default; no constant is left over."""
    name = _written(function).partition("@")[0]
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise ValueError(f"{stage} {name} cannot be called by name, got no signature; wrap it in a function") from None
    allowed = ", ".join(sorted(NAMES[stage]))
    named = {key: p for key, p in parameters.items() if p.kind not in _LOOSE}
    if not named:
        got = ", ".join(map(str, parameters.values())) or "no parameters"
        raise ValueError(f"{stage} {name} must name what it reads, got {got}; write a function of some of {allowed}")
    for parameter in named.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"{stage} {name} is called by name, got {parameter.name!r} by position only; leave out the slash"
            )
        given = parameter.name in NAMES[stage] or parameter.name in constants or parameter.name in options
        if not given and parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"{stage} {name} asks for {parameter.name!r}, got no such value; it may name {allowed}, "
                f"or give {parameter.name} a default, which makes it a constant"
            )
    for key in (*constants, *options):
        if key not in named:
            raise ValueError(
                f"{stage} {name} does not take its constant {key!r}, got parameters {', '.join(named)}"
                f"{suggest(key, named)}; name it among them"
            )
    return named


@dataclass(frozen=True)
class Factory:
    """A custom controller or target.

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
        named = () if isinstance(self.make, Target) else inspect.signature(self.make).parameters
        return self._made(Target, **{name: value for name, value in known.items() if name in named})

    def _made(self, kind: Any, *args: Any, **kwargs: Any) -> Any:
        what = kind.__name__
        made = self.make
        if not isinstance(made, kind):
            try:
                made = self.make(*args, **kwargs)
            except Exception as error:  # a function of the user's may raise anything
                raise ValueError(f"{self.written} must make a {what}, and raised {_reason(error)}") from error
        if not isinstance(made, kind):
            raise ValueError(f"{self.written} must make a {what}, got {type(made).__name__}; return {what}(...)")
        self._check_state(what, made)
        return made

    def _check_state(self, what: str, made: Any) -> None:
        """A state goes into a checkpoint as JSON, and comes back by the names of its fields."""
        must = f"{self.written}: init() of a {what} must return a NamedTuple of plain numbers"
        try:
            state = made.init()
        except Exception as error:  # as above
            raise ValueError(f"{must}, and raised {_reason(error)}") from error
        if not (isinstance(state, tuple) and hasattr(state, "_asdict")):
            raise ValueError(f"{must}, got {type(state).__name__}; return ValueState(knob.start), or your own tuple")
        for name, value in state._asdict().items():
            if value is not None and not isinstance(value, int | float | str):
                raise ValueError(f"{must}, got {name} of type {type(value).__name__}; write float({name})")
        if what == "Controller" and not (
            isinstance(value := getattr(state, "value", None), int | float) and math.isfinite(value)
        ):
            raise ValueError(f"{must} whose field value is finite, got {state!r}; it is the knob, start at knob.start")


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def factory(what: str, value: Any) -> Factory:
    """A custom controller or target, from a function that makes one or from the object itself.

    Raises:
        ValueError: neither of them.
    """
    if isinstance(value, Factory):
        return value
    if isinstance(value, Controller | Target):
        kind = type(value).__name__
        if kind.lower() != what:
            raise ValueError(
                f"{what} must be a text form, a function or a {what.capitalize()}, got a {kind}; "
                f"give it as {kind.lower()}"
            )
        return Factory(value, f"{what}@{_digest(value.update, _facts(value))}")
    if not callable(value):
        raise ValueError(f"{what} must be a text form, a function or a {what.capitalize()}, got {value!r}")
    try:
        inspect.signature(value)
    except (TypeError, ValueError):
        name = getattr(value, "__name__", type(value).__name__)
        raise ValueError(f"{what} {name} cannot be called by name, got no signature; wrap it in a function") from None
    return Factory(value, _written(value))


def resolve(what: str, text: str) -> Any:
    """What a text means: a custom entry or factory if it is a place, and else the text itself.

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
        return entry(what, load(text, what)) if ":" in text or text.endswith(".py") else text
    head, dot_py, tail = text.rpartition(".py:")
    place, _, rest = (f"{head}.py", ":", tail) if dot_py else text.partition(":")
    name, *pairs = rest.split(":")
    if text.endswith(".py"):
        place, name = text, ""
    elif not dot_py and (not name.isidentifier() or _is_form(what, place)):
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


def _is_form(what: str, place: str) -> bool:
    """Whether a text that starts so is a text form, or is meant as one: its own parser then says what is wrong."""
    kinds = CONTROLLERS if what == "controller" else {key.partition(":")[0] for key in TARGETS}
    words = place.split(".")
    if place in kinds or not all(word.isidentifier() for word in words):
        return True
    there = len(words) > 1 or place in sys.modules or importlib.util.find_spec(place) is not None
    return not there and bool(suggest(place, kinds))


def _number(what: str, key: str, text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        if text:
            return text
        raise ValueError(f"{what} option {key} has no value; write {key}=0.1") from None


def _written(function: Any) -> str:
    """The name of a function, and eight characters of the file that defines it: an edited function is another one."""
    inner, facts = function, _facts(function)
    while isinstance(inner, partial):
        inner = inner.func
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    module = re.sub(rf"^{_PRIVATE}[0-9a-f]{{8}}_", "", str(named.__module__))
    return f"{module}.{named.__qualname__}@{_digest(named, facts)}"


def _digest(function: Any, more: str = "") -> str:
    try:
        content = Path(str(inspect.getsourcefile(function))).read_bytes()
    except (OSError, TypeError):  # typed at a prompt, or built in
        called = function if hasattr(function, "__code__") else getattr(function, "__dict__", {}).get("__call__")
        code = getattr(called, "__code__", None)
        content = _facts(code or repr(type(function))).encode()
    return hashlib.sha256(content + more.encode()).hexdigest()[:8]


def _facts(value: Any, depth: int = 5) -> str:
    """What tells two functions or objects of one file apart, as text without addresses: what they hold, if plain."""
    if value is None or isinstance(value, str | bytes | int | float | complex):
        return repr(value)
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, tuple | list):
        held = [_facts(x, depth - 1) for x in value[:_WIDTH]]
    elif isinstance(value, set | frozenset):
        held = sorted(_facts(x, depth - 1) for x in value)[:_WIDTH]
    elif isinstance(value, Mapping):
        held = [f"{key!r}:{_facts(x, depth - 1)}" for key, x in list(value.items())[:_WIDTH] if isinstance(key, str)]
    elif isinstance(value, CodeType):
        held = [value.co_code.hex(), *value.co_names, *(_facts(x, depth - 1) for x in value.co_consts)]
    elif isinstance(value, FunctionType):
        code = value.__code__
        where = f"{value.__qualname__}:{code.co_firstlineno}" if Path(code.co_filename).is_file() else code
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        held = [_facts(x, depth - 1) for x in (where, value.__defaults__, value.__kwdefaults__, cells)]
    elif isinstance(value, MethodType):
        held = [_facts(x, depth - 1) for x in (value.__func__, value.__self__)]
    elif isinstance(value, partial):
        held = [_facts(x, depth - 1) for x in (value.func, value.args, value.keywords)]
    elif isinstance(value, type | ModuleType):
        return value.__name__
    else:
        held = [_facts(getattr(value, "__dict__", None), min(depth - 1, 2))]
    return f"{type(value).__qualname__}({', '.join(held)})"


_PRIVATE = "_isentropic_"
_EMPTY = CellType()
_WIDTH = 64


@lru_cache(maxsize=64)
def _run(path: Path, changed: int) -> Any:
    """A file as a module, once for each of its versions, under a name that no other module and no other file has."""
    name = f"{_PRIVATE}{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module, before = importlib.util.module_from_spec(spec), sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
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
    if not name or text.endswith(".py"):
        bare = text.rstrip(":")
        raise ValueError(f"{what} {bare!r} must name what is in it, got the place alone; write {bare}:NAME")
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
    except (Exception, SystemExit) as error:  # a file of the user's may raise anything
        raise ValueError(
            f"{what} {text!r}: {place} cannot be loaded: {_reason(error)}; run it alone to see where"
        ) from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ValueError(f"{what} {text!r}: {place} has no {name!r}{suggest(name, public)}; assign it there")
    return getattr(module, name)
