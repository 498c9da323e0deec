"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def snippet(name):
    return re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", README, re.DOTALL)[1]


def test_the_core_in_a_hand_written_loop_holds_its_target():
    torch.manual_seed(0)
    seen = {}
    code = snippet("core")
    assert len(code.strip().splitlines()) <= 20
    exec(code, seen)
    probabilities = seen["policy"].softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean().item()
    # 10 answers start at log 10 = 2.30 nats; three right ones alone would leave at most log 3 = 1.10.
    assert entropy == pytest.approx(1.5, rel=0.1)
    assert probabilities[:, :3].sum(-1).mean() > 0.6


def test_trl_in_three_lines(tmp_path):
    pytest.importorskip("trl")
    import sys

    sys.path.insert(0, str(Path(__file__).parent / "engines"))
    from datasets import Dataset
    from trl_case import BASE, parts, share_of_digits

    model, tokenizer = parts()
    settings = {k: v for k, v in BASE.items() if k != "steps_per_generation"} | {
        "output_dir": str(tmp_path),
        "max_steps": 4,
    }
    names = {"your_settings": settings, "model": model, "tokenizer": tokenizer, "reward": share_of_digits}
    names["dataset"] = Dataset.from_list([{"prompt": "12>"}] * 64)
    exec(snippet("trl"), names)
    assert (tmp_path / "metrics.jsonl").read_text().count("entropy/target") == 4
