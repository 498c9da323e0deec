"""TRL's tools and environments: several turns in a completion, of which the environment's tokens are not the policy's.

The smallest template that TRL takes: a digit ends a turn and calls the tool, and the tool answers "ok".
"""

import json

import pytest
import torch

pytest.importorskip("trl")
from by_hand import mean, plain_entropy, weights_of
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl_case import BASE, VARIANT, VARIANTS, parts

from isentropic.engines.trl import compat, control

TEMPLATE = """{% for m in messages %}
{%- if m.role == 'user' %}U:{{ m.content }}{% elif m.role == 'tool' %}T:{{ m.content }}
{%- else %}A:{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}
{{- call.function.arguments | tojson }}{% endfor %}<eos>{% endif %}{% endfor %}
{%- if add_generation_prompt %}A:{% endif %}"""
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"key": "{digit}"}}}
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "A:",
    "fields": {
        "tool_calls": {"open_pattern": "(?P<digit>[0-9])", "content": "text", "repeats": True, "transform": CALL},
        "content": {"content": "text"},
    },
}
ANSWER = "T:okA:"  # with the opening of the next turn


def look_up(key: str) -> str:
    """Look a key up.

    Args:
        key: a digit.
    """
    return "ok"


class Shelf:
    """An environment that counts how often it was asked, and rewards it."""

    def reset(self, **row):
        self.asked = 0

    def look_up(self, key: str) -> str:
        """Look a key up.

        Args:
            key: a digit.
        """
        self.asked += 1
        return "ok"

    def get_reward(self):
        return float(self.asked)


class Library(Shelf):
    """Another environment."""


def varied(completions, completion_ids, **columns):
    return [len(ids) % 5 / 4 for ids in completion_ids]


CASES = {
    "tools": (varied, {"tools": [look_up]}),
    "an environment": (None, {"environment_factory": Shelf}),
    "environments": (varied, {"environment_factory": {"shelf": Shelf, "library": Library}}),
}


def of_turns(out, case):
    """A trainer whose completions have up to three turns."""
    reward, more = CASES[case]
    model, tokenizer = parts()
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    settings = {**BASE, "max_completion_length": 24, "max_tool_calling_iterations": 2}
    rows = [
        {"prompt": [{"role": "user", "content": str(i + 10)}], "environment": ("shelf", "library")[i % 2]}
        for i in range(64)
    ]
    args = GRPOConfig(output_dir=str(out), max_steps=4, **settings)
    trainer = GRPOTrainer(
        model, reward, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more
    )
    compat.stop_at(trainer, tokenizer.convert_tokens_to_ids(list("0123456789")))
    return trainer


def turns(ids, answer):
    """The turn of each token, from 1; 0 for a token of an answer."""
    turn, found, i = 1, [], 0
    while i < len(ids):
        if ids[i : i + len(answer)] == answer:
            found, turn, i = found + [0] * len(answer), turn + 1, i + len(answer)
        else:
            found, i = [*found, turn], i + 1
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_of_an_environment_are_neither_read_nor_counted(tmp_path, monkeypatch, case):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = of_turns(tmp_path, case)
    control(trainer, target="60%", report=False, **VARIANTS.get(VARIANT, {}))
    start = weights_of(trainer)
    trainer.train()
    rows, first = trainer.record.rows("metrics"), trainer._buffered_inputs[0]
    answer = trainer.processing_class(ANSWER)["input_ids"]
    turn = torch.tensor([turns(ids, answer) for ids in first["completion_ids"].tolist()])
    generated = first["completion_mask"] * (turn > 0)
    assert turn.max() == 3
    trainer.model.load_state_dict(start)
    entropy = plain_entropy(trainer.model, first)
    assert rows[0]["entropy/tokens"] == generated.sum()
    assert rows[0]["entropy/mean"] == pytest.approx(mean(entropy, generated), abs=1e-5)
    # The environment's tokens would be seen in the mean.
    assert abs(mean(entropy, first["completion_mask"]) - mean(entropy, generated)) > 0.01
    for n in (1, 2, 3):
        assert rows[0][f"entropy/turn_{n}"] == pytest.approx(mean(entropy, generated * (turn == n)), abs=1e-5)
    assert len({row["knob/value"] for row in rows}) > 1
    assert json.loads((tmp_path / "audit.json").read_text())["findings"] == []
