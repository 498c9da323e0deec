"""Plotly's script cut to the kinds of figure on the page: a quarter of its bytes, and a fifth of the time to parse it.

The script is a list of modules, ``var name=W((exports,module)=>{...});``, which run when another calls ``name()``, and
ends in a call that registers every kind of trace. With that list cut to ours, modules that nothing calls are left out.
"""

from __future__ import annotations

import re
from itertools import pairwise

KINDS = ("bar",)  # besides scatter, which is part of the core
# Versions with which the tests in tests/report drew every figure from the cut script. Another is taken whole.
TESTED = ("v4.1.1",)
_MODULE = re.compile(r"(?<=;)var [\w$]+=W\(")
_DEFINED = re.compile(r"([\w$]+)=(?:W|Ea)\(")  # W: CommonJS, Ea: ES modules
_USED = re.compile(r"([\w$]+)\(\)")
_REGISTERED = re.compile(r"\.register\(\[([\w$(),]+)\]\)")
_KIND = re.compile(r'moduleType:"trace",name:"(\w+)"')
_WRAPPER = re.compile(r"self : this, (\(\) => \{.*\})\)\);\s*$", re.DOTALL)


def cut(script: str) -> str:
    """The script with the traces in ``KINDS`` alone; unchanged if its version is not in ``TESTED``.

    Args:
        script: plotly.min.js.

    Returns:
        The script, which draws the same figures.

    Example:
        >>> cut("/* plotly.js v0.0.1 */")
        '/* plotly.js v0.0.1 */'
    """
    if not any(f"plotly.js {version}\n" in script[:100] for version in TESTED):
        return script
    starts = [match.start() for match in _MODULE.finditer(script)]
    modules = [script[a:b] for a, b in pairwise(starts)]
    places = {name: i for i, module in enumerate(modules) for name in _DEFINED.findall(module)}
    before, last = script[: starts[0]], script[starts[-1] :]
    listed = _REGISTERED.search(last)
    assert listed, "a tested version registers its traces last"
    ours = [name for name in _USED.findall(listed[1]) if _kind(modules[places[name]], modules, places) in KINDS]
    last = f"{last[: listed.start(1)]}{','.join(f'{name}()' for name in ours)}{last[listed.end(1) :]}"
    kept = _reached(before + last, modules, places)
    # A function in brackets is compiled at once; any other is parsed twice, first to find its end.
    return _WRAPPER.sub(r"self : this, (\1)));\n", before + "".join(modules[i] for i in sorted(kept)) + last, count=1)


def _kind(module: str, modules: list[str], places: dict[str, int]) -> str | None:
    """The name of the trace that a module exports, itself or by another."""
    kind = _KIND.search(module)
    if kind:
        return kind[1]
    other = re.search(r"\.exports=([\w$]+)\(\)\}\);$", module)
    return _kind(modules[places[other[1]]], modules, places) if other else None


def _reached(text: str, modules: list[str], places: dict[str, int]) -> set[int]:
    """Places of the modules that a text calls, directly or through others."""
    reached: set[int] = set()
    texts = [text]
    while texts:
        called = {places[name] for name in _USED.findall(texts.pop()) if name in places} - reached
        reached |= called
        texts += [modules[i] for i in called]
    return reached
