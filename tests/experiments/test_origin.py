"""The origin of a run's numbers: what changes it, and that the constant NUMBERS is kept.

``python tests/experiments/test_origin.py`` records the numbers again.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isentropic import recipes
from isentropic.engines import tabular
from isentropic.experiments import origin as module
from isentropic.experiments.config import as_dict, load
from isentropic.experiments.origin import KEYS, NUMBERS, differs, digest, model_digest, origin, task_digest
from isentropic.runs import checkpoints

RECORDED = Path(__file__).parent / "numbers.json"
# Between them every stage, a knob of each kind, and the controllers that are used most.
TRAINED = {
    "grpo": recipes.compose("grpo"),
    "rloo": recipes.compose("rloo"),
    "dapo": recipes.compose("dapo"),
    "gspo": recipes.compose("gspo"),
    "cispo": recipes.compose("cispo"),
    "isentropic": recipes.compose("isentropic", target="60%"),
    "entropic": recipes.compose("entropic", target="95%"),
    "adapo": recipes.compose("adapo", target="101%"),
    "repo-d-loop": recipes.compose("repo-d-loop"),
    "aent": recipes.compose("aent", target="band:97%:98%"),
    "kl-cov": recipes.compose("kl-cov"),
    "bonus": recipes.compose("loop", knob="entropy_coef", controller="predictive", target="99%"),
}


def numbers() -> dict[str, dict[str, float]]:
    """Means over 24 steps of every recipe, to 6 significant digits; a knob that there is not is left out."""
    trained = {}
    for name, recipe in TRAINED.items():
        run = tabular.simulate(recipe, 24, seed=1, lr=16.0, updates=1 if recipe.on_policy else 4)
        means = {field: float(np.mean(values)) for field, values in run._asdict().items()}
        trained[name] = {field: float(f"{mean:.6g}") for field, mean in means.items() if np.isfinite(mean)}
    return trained


def moved(found, recorded):
    """Names of the numbers that differ by more than their rounding."""
    if {name: set(fields) for name, fields in found.items()} != {
        name: set(fields) for name, fields in recorded.items()
    }:
        return ["recipes or figures"]
    return [
        f"{name} {field} {recorded[name][field]} -> {value}"
        for name, fields in found.items()
        for field, value in fields.items()
        if value != pytest.approx(recorded[name][field], rel=2e-6, abs=1e-15)
    ]


def test_numbers_are_those_that_the_constant_promises():
    recorded = json.loads(RECORDED.read_text())
    again = "record them again by `python tests/experiments/test_origin.py`"
    found = moved(numbers(), recorded["trained"])
    increment = f"if on purpose, increment NUMBERS in experiments/origin.py and {again}"
    assert not found, f"numbers moved: {'; '.join(found[:6])}; {increment}"
    assert recorded["numbers"] == NUMBERS, f"numbers.json is of NUMBERS = {recorded['numbers']}, not {NUMBERS}; {again}"


def test_a_number_that_moves_in_its_sixth_digit_is_found():
    recorded = {"a": {"entropy": 1.23457, "knob": 0.0}}
    assert moved({"a": {"entropy": 1.234571, "knob": 0.0}}, recorded) == []
    assert moved({"a": {"entropy": 1.23458, "knob": 0.0}}, recorded) == ["a entropy 1.23457 -> 1.23458"]
    assert moved({"a": {"entropy": 1.23457, "knob": 1e-9}}, recorded) == ["a knob 0.0 -> 1e-09"]
    assert moved({"a": {"entropy": 1.23457}}, recorded) == ["recipes or figures"]


def test_a_digest_changes_with_any_byte_and_with_the_place_of_a_cut():
    assert len(digest([b"ab", b"c"])) == 12
    assert digest([b"ab", b"c"]) == digest(iter([b"ab", b"c"]))
    assert len({digest(parts) for parts in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"ab", b"d"], [b"c", b"ab"])}) == 5


def test_the_digest_of_a_model_is_that_of_its_weights(tmp_path):
    pytest.importorskip("trl")
    from trl_case import save_model

    first = save_model(tmp_path / "first")
    found = model_digest(first)
    shutil.copytree(first, tmp_path / "elsewhere")
    assert model_digest(str(tmp_path / "elsewhere")) == found
    weights = tmp_path / "elsewhere" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_digest(str(tmp_path / "elsewhere")) != found
    (tmp_path / "elsewhere" / "more.safetensors").write_bytes(b"")
    weights.write_bytes(Path(first, "model.safetensors").read_bytes())
    assert model_digest(str(tmp_path / "elsewhere")) != found


def test_of_large_weights_blocks_are_read(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    path, content = tmp_path / "model.safetensors", bytes(range(256)) * 4
    path.write_bytes(content)
    whole = model_digest(str(tmp_path))
    monkeypatch.setattr(checkpoints, "_BLOCK", 4)
    monkeypatch.setattr(checkpoints, "_BLOCKS", 3)
    sampled = model_digest(str(tmp_path))
    assert sampled == digest([content[:4] + content[510:514] + content[-4:]]) != whole


def test_a_model_that_is_elsewhere_has_its_name():
    assert model_digest("org/model") == model_digest("org/model") != model_digest("org/other")


def test_the_digest_of_a_task_changes_with_its_rows(monkeypatch):
    from task_cases import letters

    tasks = {"same": replace(letters), "name": replace(letters, name="other")}
    tasks["limit"] = replace(letters, max_completion_length=7)
    tasks["heldout"] = replace(letters, heldout=lambda: letters.heldout()[::-1])
    tasks["train"] = replace(letters, train=lambda seed: letters.train(seed)[1:])
    monkeypatch.setattr(module, "load_task", tasks.__getitem__)
    digests = {name: task_digest(name) for name in tasks}
    assert len(set(digests.values())) == len(tasks)
    tasks["same"] = letters
    assert task_digest("same") == digests["same"]


def test_an_origin_is_of_the_code_the_warm_start_and_all_tasks_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "model_digest", lambda name: f"of {name}")
    config = as_dict(load(None, {"model": "tiny"}))
    found = origin(config)
    assert tuple(found) == KEYS
    assert found["numbers"] == NUMBERS
    assert found["model"] == "of tiny"
    assert json.loads(json.dumps(found)) == found
    assert origin(as_dict(load(None, {"steps": 8, "seed": 4, "recipe": "grpo"}))) == found
    others = [["expr-digit"], ["expr-digit", "expr:need=odd"], ["expr:need=odd", "expr-digit"]]
    assert len({origin({**config, "then": then})["tasks"] for then in [[], *others]}) == 4
    assert origin({**config, "task": "expr:need=odd"})["tasks"] != found["tasks"]


def test_origins_differ_in_words():
    one = {"numbers": 1, "model": "a", "tasks": "b"}
    assert differs(one, dict(one)) is None
    assert differs({**one, "numbers": 2}, one) == "of another version of the code"
    assert differs({**one, "model": "c"}, one) == "of another warm start"
    assert differs({**one, "tasks": "c"}, one) == "of other rows"
    for other in (None, 3, "x", []):
        assert differs(other, one) == "without a record of their warm start, rows and code"
    assert differs({}, one) == "of another version of the code"


if __name__ == "__main__":
    RECORDED.write_text(json.dumps({"numbers": NUMBERS, "trained": numbers()}, indent=1) + "\n")
    print(f"{RECORDED}: {len(TRAINED)} recipes, NUMBERS = {NUMBERS}")
