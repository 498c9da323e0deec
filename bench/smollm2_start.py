"""Teach SmolLM2-135M how an answer to `expr` looks, so that prompts need no solved examples.

A few-shot prompt of `expr` has about 120 tokens for an answer of 8; after this short supervised start a prompt has 5.
Reinforcement learning starts from it in ``bench/grids/smollm2-long.toml``. The demonstrations are those of the embedded
model (`isentropic.models.tiny`), without its noise; no held-out target is among them.

    isentropic model smollm2
    python bench/smollm2_start.py
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from results import ROOT, versions

# HINT and HARD as in `TinySettings`.
HINT, HARD, BATCH = 0.5, 0.05, 32


def demonstrations(tokenizer, num, rng):
    """Token ids [num, 13]: five of the prompt, seven of the answer, and the end; one token per character."""
    import torch

    from isentropic.models.tiny import Demonstrator
    from isentropic.tasks.expressions import format_prompt

    demonstrator = Demonstrator(HINT, HARD)
    shown, digits, rows = demonstrator.draw(np.zeros(num), rng)
    texts = [bytes(text).decode() for text in demonstrator.texts[rows]]
    full = [format_prompt(t, int(d)) + text for t, d, text in zip(shown, digits, texts, strict=True)]
    ids = tokenizer(full, add_special_tokens=False)["input_ids"]
    assert {len(one) for one in ids} == {12}, "one token per character"
    return torch.tensor([[*one, tokenizer.eos_token_id] for one in ids])


def train(model, batches, rate, say):
    """Cross-entropy of the answers, in bfloat16 with float32 weights; the loss of the last tenth, in nats per token."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    losses, started, steps = [], time.monotonic(), len(batches)
    model.train()
    for step, ids in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 10 == 9:
            left = (time.monotonic() - started) / (step + 1) * (steps - step - 1)
            say(f"step {step + 1}/{steps}  loss {np.mean(losses[-10:]):.3f} nats per token  eta {left / 60:.1f} min")
    model.eval()
    return float(np.mean(losses[-max(1, steps // 10) :]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "smollm2-start")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be >= 1, got {args.steps}; 200 is the start of the committed runs")
    if not args.rate > 0:
        parser.error(f"--rate must be > 0, got {args.rate}; 3e-4 is that of the committed runs")
    from isentropic.models.smollm2 import smollm2_model

    try:
        home = smollm2_model()
    except ValueError as error:
        parser.error(str(error))
    from isentropic.models.generation import seeded
    from isentropic.models.loading import load_model, quiet

    quiet()
    model, tokenizer = load_model(str(home))
    ids = demonstrations(tokenizer, args.steps * BATCH, np.random.default_rng(args.seed))
    with seeded(args.seed):
        loss = train(model, list(ids.split(BATCH)), args.rate, print)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    config = json.loads((args.out / "config.json").read_text(encoding="utf-8"))
    # A step of 12 tokens on a CPU takes 2.3 s so, and 2.6 s with torch's fused attention, whose backward is slow there.
    config["attn_implementation"] = "eager"
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    settings = {"steps": args.steps, "rate": args.rate, "seed": args.seed, "batch": BATCH}
    header = {"settings": settings, "loss": loss, "versions": versions("python", "torch", "transformers")}
    (args.out / "start.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
