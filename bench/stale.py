"""How well is entropy held if samples are 0, 1, 4 and 16 optimizer steps old, with and without a corrected ratio?

Loops of this script through `isentropic.engines.function`: each step samples a batch by the present weights, and trains
on the one that was sampled some steps before. In the tabular engine, where the policy's entropy is exact, and on the
embedded task. Finished cells are kept in a file and not run again.

    python bench/stale.py                # both, and the table
    python bench/stale.py tabular        # minutes on one core
    python bench/stale.py embedded [--seeds 0]
    python bench/stale.py report         # the table and the figure from the cells that are there
"""

import argparse
import logging
import os
import time
from collections import deque
from statistics import fmean

from results import ONE_THREAD, append, made, pyplot, rows, save, save_figure, table, versions

os.environ |= ONE_THREAD
import numpy as np

OLD = [0, 1, 4, 16]
CAP = 2.0  # of a truncated ratio
TARGET = "75%"
STEPS, SETTLED = {"tabular": 300, "embedded": 100}, {"tabular": 140, "embedded": 40}
SEEDS = {"tabular": [0], "embedded": [0, 1]}
DATA = "stale.jsonl"
WINDOW = 5  # steps over which the entropy of the embedded model is averaged: each is read on 64 answers
CORRECTIONS = {
    "none": "old log-probs are the trainer's, as the batch is first trained on; no weight",
    "truncated": f"the same, and a weight min(ratio to the sampler, {CAP:g}) for each token",
    "clipped": "old log-probs are the sampler's, so that the recipe's clip acts on the whole ratio",
}


class Table:
    """A table of logits on which answers of two tokens are drawn; entropy is exact."""

    def __init__(self, recipe, seed):
        import torch

        from isentropic.engines.tabular import Tree, make_rewards, random_logits

        self.recipe, self.rate, self.tree = recipe, 4.0, Tree(16, 8, 2)
        self.logits = random_logits(self.tree, 1.0, seed)
        self.rewards = make_rewards(self.tree, self.logits, "uninformed", 0.2, seed)
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self):
        """A batch of the present weights: what scores it, its log-probs and entropies, advantages, mask."""
        import torch

        from isentropic.engines.tabular.batches import draw

        batch = draw(self.tree, self.logits, self.rewards, self.recipe, 16, self.generator)
        return batch, batch.logp_old, batch.entropy_old, batch.adv, torch.ones_like(batch.logp_old)

    def score(self, batch):
        self.leaf = self.logits.clone().requires_grad_()
        whole = self.leaf.log_softmax(-1)[batch.rows]
        return whole.gather(-1, batch.ids[..., None])[..., 0], -(whole.exp() * whole).sum(-1)

    def update(self, loss):
        loss.backward()
        self.logits = self.logits - self.rate * self.leaf.grad

    def entropy(self, fresh):
        """The policy's own, at the states that it visits."""
        from isentropic.engines.tabular import mean_entropy

        return mean_entropy(self.tree, self.logits)


class Embedded:
    """The embedded model on its task: 8 answers to each of 8 prompts a step."""

    def __init__(self, recipe, seed):
        import torch

        from isentropic.models import resolve_model
        from isentropic.models.loading import load_model
        from isentropic.tasks import load_task

        torch.manual_seed(seed)
        self.recipe, self.rate, self.task = recipe, 5e-4, load_task("expr")
        self.model, self.tokenizer = load_model(resolve_model("tiny"))
        self.rows, self.random = self.task.train(seed), np.random.default_rng(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.rate, weight_decay=0.0)

    def sample(self):
        import torch

        from isentropic.models.generation import encode, end_tokens, generate
        from isentropic.recipes import advantages

        chosen = [self.rows[i] for i in self.random.choice(len(self.rows), 8, replace=False) for _ in range(8)]
        ids = torch.tensor(encode(self.tokenizer, [row["prompt"] for row in chosen]))
        end = end_tokens(self.tokenizer, self.model)
        settings = {"do_sample": True, "max_new_tokens": self.task.max_completion_length, "eos_token_id": end}
        settings |= {"pad_token_id": self.tokenizer.pad_token_id}
        with torch.no_grad():
            whole = generate(self.model, settings, input_ids=ids, attention_mask=torch.ones_like(ids))
        answers = whole[:, ids.shape[1] :]
        ended = torch.isin(answers, torch.tensor(end)).int()
        mask = (ended.cumsum(1) - ended == 0).float()
        texts = [
            self.tokenizer.decode(row[m.bool()], skip_special_tokens=True) for row, m in zip(answers, mask, strict=True)
        ]
        columns = {name: [row[name] for row in chosen] for name in chosen[0] if name != "prompt"}
        rewards = torch.tensor(self.task.reward(texts, **columns)).view(8, 8)
        self.reward = float(rewards.mean())
        batch = whole, answers.shape[1]
        with torch.no_grad():
            logp, entropy = self.score(batch)
        return batch, logp, entropy, advantages(self.recipe, rewards), mask

    def score(self, batch):
        whole, length = batch
        logits = self.model(whole[:, :-1]).logits[:, -length:].log_softmax(-1)
        return logits.gather(-1, whole[:, -length:, None])[..., 0], -(logits.exp() * logits).sum(-1)

    def update(self, loss):
        import torch

        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def entropy(self, fresh):
        """That of the present weights on the answers that they have just given."""
        _, _, entropy, _, mask = fresh
        return float((entropy * mask).sum() / mask.sum())


WORLDS = {"tabular": Table, "embedded": Embedded}


def cells(world, seeds):
    """What is run: how old, which correction, where entropy is read, by which controller."""
    for seed in seeds:
        for old in OLD:
            for correction in CORRECTIONS if old else ["none"]:
                yield {
                    "old": old,
                    "correction": correction,
                    "read": "trainer",
                    "controller": "predictive",
                    "seed": seed,
                }
        late = [4, 16] if world == "embedded" else OLD[1:]
        for old in late:
            told = (
                [f"predictive:delay={old}"]
                if world == "embedded"
                else [f"predictive:delay={old}", "pi", f"pi:delay={old}"]
            )
            for controller in ["predictive", *told]:
                yield {"old": old, "correction": "truncated", "read": "sampler", "controller": controller, "seed": seed}


def run(world, old, correction, read, controller, seed):
    """One run: entropy of the policy, target, knob and figures of the old samples, a row a step."""
    import torch

    from isentropic.engines.function import LossControl
    from isentropic.recipes import compose
    from isentropic.types import EntropyReading

    torch.set_num_threads(1)
    recipe = compose("isentropic", controller=controller, target=TARGET)
    place, control = WORLDS[world](recipe, seed), LossControl(recipe, divided_by="tokens")
    # The first batches are all of the first weights, as an engine that samples ahead has them.
    waiting, path = deque(place.sample() for _ in range(old)), []
    for step in range(STEPS[world]):
        fresh = place.sample()
        waiting.append(fresh)
        batch, sampler, entropy_then, adv, mask = waiting.popleft()
        logp, entropy = place.score(batch)
        before = logp.detach()
        weight = (before - sampler).exp().clamp(max=CAP) if correction == "truncated" else 1.0
        loss = control.loss(
            logp,
            sampler if correction == "clipped" else before,
            adv,
            mask,
            entropy,
            weight=weight,
            sampler=sampler,
            age=min(step, old),
        )
        now = place.entropy(fresh)
        place.update(loss / mask.sum())
        late = EntropyReading(float((entropy_then * mask).sum()), float(mask.sum()))
        row = control.step(late if read == "sampler" else None, rate=place.rate)
        path.append([now, row["entropy/target"], row["knob/value"], row["mismatch/kl"], row["clip/dropped_frac"]])
    return np.array(path, dtype=float)


def figures(world, path):
    """RMS error and overshoot of the policy's entropy, shares of the target, and what is known of the samples."""
    target, window = path[-1, 1], WINDOW if world == "embedded" else 1
    error = np.convolve(path[:, 0], np.ones(window) / window, mode="valid") / target - 1
    settled, below = SETTLED[world], np.flatnonzero(error <= 0)
    late = path[settled:]
    return {
        "rms": float(np.sqrt(np.mean(error[settled:] ** 2))),
        "overshoot": float(max(-error[below[0] :].min(), 0.0)) if len(below) else 0.0,
        "knob": float(late[:, 2].mean()),
        "kl": float(late[:, 3].mean()),
        "dropped": float(late[:, 4].mean()),
        "trace": [round(float(x), 3) for x in error[:: 5 if world == "tabular" else 2]],
    }


def fill(world, seeds):
    done = [{k: row[k] for k in ("world", "old", "correction", "read", "controller", "seed")} for row in rows(DATA)]
    for cell in cells(world, seeds):
        if {"world": world, **cell} in done:
            continue
        began = time.monotonic()
        row = {"world": world, **cell, **figures(world, run(world, **cell))}
        append(DATA, row | {"seconds": round(time.monotonic() - began)})
        print(f"{world}, {cell}: RMS {row['rms']:.1%}, overshoot {row['overshoot']:.1%}", flush=True)


def mean_of(found, name):
    return fmean(row[name] for row in found) if found else float("nan")


def pick(world, **fields):
    return [row for row in rows(DATA) if row["world"] == world and all(row[k] == v for k, v in fields.items())]


def shown(found):
    return f"{mean_of(found, 'rms'):.1%} ({mean_of(found, 'overshoot'):.1%})" if found else "–"


def by_trainer(world):
    """The table of a world whose entropy is read by the trainer, on the rows of the old samples."""
    lines = []
    for old in OLD:
        found = {c: pick(world, old=old, read="trainer", correction=c if old else "none") for c in CORRECTIONS}
        kl, dropped = mean_of(found["none"], "kl"), mean_of(found["clipped"], "dropped")
        lines.append([str(old), *map(shown, found.values()), f"{kl:.4f}", f"{dropped:.0%}"])
    head = ["steps old", *CORRECTIONS, "KL to the sampler at none, nats", "dropped at clipped"]
    return table(head, lines, right=len(head) - 1)


def by_sampler(world):
    """The same if entropy is read as the batch is sampled, which is as old as the batch."""
    names = ["predictive", "predictive:delay={}", "pi", "pi:delay={}"]
    columns = [name for name in names if pick(world, read="sampler", controller=name.format(16))]
    lines = []
    for old in OLD[1:]:
        found = [pick(world, old=old, read="sampler", controller=name.format(old)) for name in columns]
        if any(found):
            lines.append([str(old), *map(shown, found)])
    return table(["steps old", *(f"`{name.format('D')}`" for name in columns)], lines, right=len(columns))


def draw():
    plt = pyplot()
    picture, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axis, read in zip(panels, ("trainer", "sampler"), strict=True):
        for old, colour in zip(OLD, ("#000000", "#009e73", "#e69f00", "#d55e00"), strict=True):
            fields = {"correction": "truncated" if old else "none", "seed": 0, "controller": "predictive"}
            found = pick("embedded", old=old, read=read if old else "trainer", **fields)
            if found:
                trace = [100 * x for x in found[0]["trace"]]
                axis.plot(range(0, 2 * len(trace), 2), trace, color=colour, lw=1.2, label=f"{old} steps old")
        axis.axhline(0, color="#9a9a9a", lw=0.8)
        axis.set(title=f"entropy read by the {read}", xlabel="optimizer step")
    panels[0].set(ylabel="policy's entropy, % off its target")
    panels[0].legend(frameon=False)
    save_figure(picture, "stale.svg")


def report():
    note = [f"- **{name}**: {text}." for name, text in CORRECTIONS.items()]
    text = [
        "RMS error of the policy's own entropy around its target once settled and, in brackets, overshoot below it.",
        "\n".join(note),
    ]
    for world in [name for name in WORLDS if pick(name)]:
        seeds = len({row["seed"] for row in pick(world)})
        title = {"tabular": "The tabular engine", "embedded": "The embedded task"}[world]
        text += [f"## {title}: entropy read by the trainer, on the rows of the old samples", by_trainer(world)]
        text += [f"## {title}: entropy read as the batch was sampled, so that it is as old", by_sampler(world)]
        text += [f"{STEPS[world]} steps, settled after {SETTLED[world]}, {seeds} seed{'s' * (seeds > 1)}."]
    facts = made(versions("python", "torch", "isentropic"), f"target {TARGET}", "python bench/stale.py")
    save("stale-table.md", "\n\n".join([*text, facts]) + "\n")
    draw()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=[*WORLDS, "report"])
    parser.add_argument("--seeds", type=int, nargs="+")
    args = parser.parse_args()
    # The watchdog says of each run how far off it starts.
    logging.getLogger("isentropic").setLevel(logging.ERROR)
    for world in WORLDS:
        if args.what in (None, world):
            fill(world, args.seeds or SEEDS[world])
    report()


if __name__ == "__main__":
    main()
