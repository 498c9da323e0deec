"""Plotly's script cut to the kinds of figure on the page: a quarter of its bytes, and a fifth of the time to read it.

The script is a list of modules, ``var name=W((exports,module)=>{...});``, that run where another says ``name()``, and
ends in a call that registers every kind of trace. With that list cut to ours, what nothing names any more is left out.
"""

from __future__ import annotations

import re
from itertools import pairwise

KINDS = ("bar",)  # besides scatter, which is part of the core
# Versions whose cut script the tests in tests/report drew every figure with. Another is taken whole.
TESTED = ("v4.1.1",)
_MODULE = re.compile(r"(?<=;)var [\w$]+=W\(")
_DEFINED = re.compile(r"([\w$]+)=(?:W|Ea)\(")  # W: CommonJS, Ea: ES modules
_USED = re.compile(r"([\w$]+)\(\)")
_REGISTERED = re.compile(r"\.register\(\[([\w$(),]+)\]\)")
_KIND = re.compile(r'moduleType:"trace",name:"(\w+)"')
_WRAPPER = re.compile(r"self : this, (\(\) => \{.*\})\)\);\s*$", re.DOTALL)


def cut(script: str) -> str:
    """The script with the traces in ``KINDS`` alone; as it was given, where its version is not in ``TESTED``.

    Args:
        script: plotly.min.js.

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
    # In brackets it is compiled once; else it is read twice, once to look for its end.
    return _WRAPPER.sub(r"self : this, (\1)));\n", before + "".join(modules[i] for i in sorted(kept)) + last, count=1)


def _kind(module: str, modules: list[str], places: dict[str, int]) -> str | None:
    """The name of the trace that a module exports, itself or by another."""
    found = _KIND.search(module)
    if found:
        return found[1]
    handed_on = re.search(r"\.exports=([\w$]+)\(\)\}\);$", module)
    return _kind(modules[places[handed_on[1]]], modules, places) if handed_on else None


def _reached(text: str, modules: list[str], places: dict[str, int]) -> set[int]:
    """Places of the modules that a text names, and those name, and so on."""
    reached: set[int] = set()
    ahead = [text]
    while ahead:
        named = {places[name] for name in _USED.findall(ahead.pop()) if name in places} - reached
        reached |= named
        ahead += [modules[i] for i in named]
    return reached
