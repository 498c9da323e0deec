"""Tasks that tests share, by name too: ``--task task_cases:letters``; and a count of the expression tasks' answers."""

from dataclasses import replace

from isentropic.tasks import Task
from isentropic.tasks.environments import EnvironmentTask
from isentropic.tasks.expressions import enumerate_expressions

letters = Task(
    name="letters",
    description="Start with a digit.",
    train=lambda seed: [{"prompt": f"{(seed + i) % 90 + 10}>", "digit": i % 10} for i in range(64)],
    heldout=lambda: [{"prompt": f"{i}>", "digit": i} for i in range(6)],
    verify=lambda completion, digit: completion[:1].isdigit(),
    normalise=lambda text: text[:1],
    max_completion_length=6,
)

spaces = Task(
    name="spaces",
    description="Start with anything but a digit.",
    train=lambda seed: [{"prompt": f"{i % 90 + 10}<", "other": i} for i in range(5)],
    heldout=lambda: [{"prompt": f"{i}<", "other": i} for i in range(4)],
    verify=lambda completion, other: not completion[:1].isdigit(),
    normalise=lambda text: text[:1],
    max_completion_length=4,
)

empty = Task(
    name="empty",
    description="Say nothing.",
    train=lambda seed: [{"prompt": f"{i % 90 + 10}=", "place": i} for i in range(7)],
    heldout=lambda: [{"prompt": f"{i}=", "place": i} for i in range(3)],
    verify=lambda completion, place: not completion,
    normalise=lambda text: text[:1],
    max_completion_length=5,
)


def _fail(completion):
    raise RuntimeError("verifier is down")


broken = replace(letters, name="broken", verify=_fail)


class Corridor:
    """`size` steps east; `choices` also offers to stay."""

    def reset(self, size, **row):
        self.left = size
        return f"{size} steps"

    def step(self, action):
        self.left -= action == "east"
        return f"{self.left} left", float(not self.left), not self.left

    def advice(self):
        return "east"

    def choices(self):
        return ["stay"]


def corridor(**changes):
    settings = {"max_turns": 4, "max_action_tokens": 4, "max_completion_length": 64, **changes}
    rows = [{"prompt": "Walk. ", "size": 2}, {"prompt": "Walk. ", "size": 3}]
    return EnvironmentTask(
        name="corridor",
        description="",
        make=Corridor,
        train=lambda seed: rows,
        heldout=lambda: [{"prompt": "Walk. ", "size": 1}],
        **settings,
    )


walk = corridor()


class Digits:
    """Says how many digits a line has; over after `turns` lines, won if the last one has any."""

    def reset(self, turns, **row):
        self.left = turns
        return f"{turns} lines"

    def step(self, action):
        self.left -= 1
        num = sum(c.isdigit() for c in action)
        return f"{num} digits", float(num > 0) if not self.left else 0.0, not self.left


def digits(**changes):
    rows = [{"prompt": f"{i}? ", "turns": i % 3 + 1} for i in range(16)]
    settings = {"max_turns": 3, "max_action_tokens": 5, "max_completion_length": 60, **changes}
    return EnvironmentTask(
        name="digits", description="", make=Digits, train=lambda seed: rows, heldout=lambda: rows[:4], **settings
    )


def digits_model():
    """The character model of the other tests, with a line break likely enough to occur."""
    import torch
    from trl_case import parts

    model, tokenizer = parts()
    bias = torch.zeros(len(tokenizer))
    bias[tokenizer.convert_tokens_to_ids("\n")] = 3.0
    head = torch.nn.Linear(32, len(tokenizer))
    head.weight, head.bias = model.lm_head.weight, torch.nn.Parameter(bias)
    model.lm_head = head
    return model.eval(), tokenizer


def logp_and_entropy(model, ids, temperature=1.0):
    """Of every token but the first, by a separate pass over one whole sequence, without padding or cache."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double() / temperature
    logp = logits.log_softmax(-1)
    return logp[range(len(ids) - 1), ids[1:]], -(logp.exp() * logp).sum(-1)


def count_solutions(target, operands=4, *, digit=None):
    """How many different expressions of k digits have the value `target` (and use `digit`)."""
    values, texts = enumerate_expressions(operands)
    operand_texts = texts[values == target][:, ::2]
    return len(operand_texts) if digit is None else int((operand_texts == ord(str(digit))).any(axis=1).sum())
