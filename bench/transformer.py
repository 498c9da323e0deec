"""Predicted against measured entropy change on the embedded transformer, whose tokens share their parameters.

The prediction moves each row of logits by its own token alone, which is true of tables of logits and not here. At every
update of short training runs the same tokens are scored again after a plain gradient step, which is then undone, and
after the AdamW step of the training. Correlation and calibration slope, with intervals, are printed and written to
docs/results/transformer.md and .json.gz.

    python bench/transformer.py [--seeds 0 1 2] [--batches 10] [--only-table]
"""

import argparse
import os
import time

from results import ONE_THREAD, load, made, save, table, versions

os.environ |= ONE_THREAD
import numpy as np
import torch

from isentropic import recipes
from isentropic.entropy.prediction import change_of, effective_weights, natural_change, predicted_change
from isentropic.entropy.statistics import logits_stats, token_entropy
from isentropic.types import TokenBatch

# Name -> recipe, value of its knob, updates a generated batch.
RUNS = {
    "RLOO": (recipes.compose("rloo"), None, 1),
    "GRPO": (recipes.compose("grpo"), None, 4),
    "LOOP": (recipes.compose("loop"), None, 4),
    "REPO-R centred": (recipes.compose("loop", knob="zeta"), 0.5, 4),
    "entropy bonus": (recipes.compose("entropy-bonus", entropy_coef=0.05), None, 4),
}
PROMPTS, GROUP, UPDATES = 16, 16, 4
ADAM, SGD = 5e-4, 0.002
FORMS = ("exact", "simple", "natural", "parameters")


@torch.no_grad()
def generate(model, tokenizer, task, asked, generator):
    """Sample GROUP answers a prompt: ids [b l], mask [b t], logp_old [b t], rewards [p g]."""
    prompts = tokenizer([row["prompt"] for row in asked], return_tensors="pt")["input_ids"].repeat_interleave(GROUP, 0)
    ids, alive, masks, logps = prompts, torch.ones(len(prompts), dtype=torch.bool), [], []
    for _ in range(task.max_completion_length):
        logp = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].log_softmax(-1)
        token = torch.multinomial(logp.exp(), 1, generator=generator).where(alive[:, None], tokenizer.pad_token_id)
        masks.append(alive)
        logps.append(logp.gather(1, token)[:, 0])
        ids, alive = torch.cat([ids, token], 1), alive & (token[:, 0] != tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
    columns = {name: [row[name] for row in asked for _ in range(GROUP)] for name in asked[0] if name != "prompt"}
    rewards = torch.tensor(task.reward(texts, **columns)).reshape(-1, GROUP)
    return ids, torch.stack(masks, 1).float(), torch.stack(logps, 1), rewards


def score(model, ids, length):
    return model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=length).logits


@torch.no_grad()
def entropies(model, ids, mask):
    return token_entropy(score(model, ids, mask.shape[1]))[mask.bool()].double()


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors]).double()


def predict(recipe, knob, model, ids, mask, logp_old, adv):
    """The gradients of the loss and of the mean entropy, and the predictions by token, per unit step."""
    logits = score(model, ids, mask.shape[1])
    tokens = ids[:, -mask.shape[1] :]
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    entropy, stats = token_entropy(logits), logits_stats(logits.detach(), tokens)
    loss = recipes.loss(recipe, TokenBatch(logp, logp_old, adv, mask, entropy), knob)[0].mean()
    w = effective_weights(loss, logp, entropy)
    by_token = {
        "exact": change_of(w, stats),
        "simple": predicted_change(w.logp, stats.logp, stats.entropy, entropy_weight=w.entropy),
        "natural": natural_change(w.logp, stats.logp, stats.entropy, w.entropy),
    }
    params = list(model.parameters())
    slope = torch.autograd.grad(loss, params, retain_graph=True)
    rise = torch.autograd.grad((entropy * mask).sum() / mask.sum(), params)
    return slope, flat(rise), {name: x[mask.bool()].double() for name, x in by_token.items()}


@torch.no_grad()
def move(params, by, scale):
    for p, d in zip(params, by, strict=True):
        p.add_(d, alpha=scale)


def pearson(x, y):
    return float(np.corrcoef(x, y)[0, 1])


def measure(recipe, knob, model, optimizer, minibatch):
    """One update: predictions, the change after a plain step that is undone, and after the AdamW step."""
    ids, mask = minibatch[:2]
    params = list(model.parameters())
    slope, rise, by_token = predict(recipe, knob, model, *minibatch)
    before, start = entropies(model, ids, mask), [p.detach().clone() for p in params]
    move(params, slope, -SGD)
    plain = entropies(model, ids, mask) - before
    for p, s, g in zip(params, start, slope, strict=True):
        p.data.copy_(s)
        p.grad = g
    optimizer.step()
    adam = entropies(model, ids, mask) - before
    taken = flat([p.detach() - s for p, s in zip(params, start, strict=True)])
    row = {"entropy": float(before.mean())}
    for name, lr, change, along in (
        ("sgd", SGD, plain, -SGD * float(rise @ flat(slope))),
        ("adamw", ADAM, adam, float(rise @ taken)),
    ):
        row[f"{name} measured"], row[f"{name} parameters"] = float(change.mean()), along
        for form, x in by_token.items():
            row[f"{name} {form}"] = lr * float(x.sum())
            row[f"{name} {form} by token"] = pearson(x.numpy(), change.numpy())
    return row


def run(name, seed, num_batches):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from isentropic.models import resolve_model
    from isentropic.tasks import load_task

    recipe, knob, updates = RUNS[name]
    path, task = resolve_model("tiny"), load_task("expr")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=ADAM, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    asked = task.train(seed)
    # On-policy runs generate a minibatch at a time: as many updates, and the same answers in each.
    prompts, rows = PROMPTS * updates // UPDATES, []
    for batch in range(num_batches * UPDATES // updates):
        chosen = [asked[i] for i in torch.randint(len(asked), (prompts,), generator=generator).tolist()]
        ids, mask, logp_old, rewards = generate(model, tokenizer, task, chosen, generator)
        adv = recipes.advantages(recipe, rewards)
        for part in torch.randperm(len(ids), generator=generator).chunk(updates):
            row = measure(recipe, knob, model, optimizer, [x[part] for x in (ids, mask, logp_old, adv)])
            rows.append({"batch": batch * updates // UPDATES, "reward": float(rewards.mean()), **row})
    return rows


def fit(x, y):
    """Correlation and least-squares slope of y on x, and the share of equal signs."""
    return np.array([pearson(x, y), np.polyfit(x, y, 1)[0], np.mean(np.sign(x) == np.sign(y))])


def summarise(blocks, optimizer, form, draws=1000):
    """The fit over all points, with 95 % intervals from resampling the generated batches."""
    pairs = [np.array([(r[f"{optimizer} {form}"], r[f"{optimizer} measured"]) for r in block]) for block in blocks]
    rng = np.random.default_rng(0)
    fits = [fit(*np.concatenate([pairs[i] for i in rng.integers(len(pairs), size=len(pairs))]).T) for _ in range(draws)]
    low, high = np.quantile(fits, [0.025, 0.975], axis=0)
    centre = fit(*np.concatenate(pairs).T)
    names = ("correlation", "slope", "same sign")
    return {n: [float(c), float(a), float(b)] for n, c, a, b in zip(names, centre, low, high, strict=True)}


def steps_between(runs, optimizer, form):
    """Correlation of the changes from one update to the next: a trend that both share does not count."""
    x, y = (
        np.concatenate([np.diff([r[f"{optimizer} {key}"] for r in rows]) for rows in runs])
        for key in (form, "measured")
    )
    return pearson(x, y)


def analyse(by_run):
    result = {}
    groups = {**{name: {name: by_seed} for name, by_seed in by_run.items()}, "all": by_run}
    for group, members in groups.items():
        runs = [rows for by_seed in members.values() for rows in by_seed.values()]
        blocks = [[r for r in rows if r["batch"] == b] for rows in runs for b in sorted({r["batch"] for r in rows})]
        for optimizer in ("sgd", "adamw"):
            for form in FORMS:
                cell = summarise(blocks, optimizer, form)
                cell["differences"] = steps_between(runs, optimizer, form)
                if form != "parameters":
                    cell["by token"] = float(
                        np.mean([r[f"{optimizer} {form} by token"] for rows in runs for r in rows])
                    )
                result.setdefault(group, {}).setdefault(optimizer, {})[form] = cell
    return result


def interval(values, digits=2):
    return "{0:.{3}f} ({1:.{3}f}..{2:.{3}f})".format(*values, digits)


def step_table(fits, optimizer):
    head = ["recipe", "form", "correlation", "calibration slope", "same sign", "correlation of differences", "by token"]
    rows = []
    for group, by_optimizer in fits.items():
        for form, c in by_optimizer[optimizer].items():
            cells = [interval(c["correlation"]), interval(c["slope"]), f"{c['same sign'][0]:.0%}"]
            token = f"{c['by token']:.2f}" if "by token" in c else "-"
            rows.append([group, form, *cells, f"{c['differences']:.2f}", token])
    return table(head, rows, right=len(head) - 2)


def shortened(x):
    """Numbers to four digits."""
    if isinstance(x, dict):
        return {key: shortened(value) for key, value in x.items()}
    return [shortened(value) for value in x] if isinstance(x, list) else float(f"{x:.4g}")


def page(facts):
    """The Markdown page of what the JSON file holds."""
    lines = ["# Does the prediction hold if parameters are shared?", "", PREAMBLE, ""]
    for optimizer, title in (("sgd", f"Plain gradient step of {SGD:g}"), ("adamw", f"AdamW step of {ADAM:g}")):
        lines += [f"## {title}", "", step_table(facts["fits"], optimizer), ""]
    return "\n".join([*lines, f"{facts['made']}.", ""])


PREAMBLE = """
One command, `python bench/transformer.py`, makes this page and [the figures](transformer.json.gz).

The embedded model (0.17M parameters) is trained on the embedded task. At every update the entropies of the minibatch's
own tokens are read again after a plain gradient step that is then undone, and after the AdamW step of the training. The
prediction treats every row of logits as a parameter of its own: `exact` with moments, `simple` without, `natural` for a
natural-gradient step, each summed over tokens with the weights of the loss and multiplied by the learning rate.
`parameters` is another prediction, first-order as well: the gradient of the mean entropy by the parameters times the
actual step. It takes into account how parameters are shared, and costs a backward pass.

`correlation` and `calibration slope` are of measured on predicted change of the mean entropy, both in nats per token,
with 95 % intervals from resampling generated batches. The slope is 1 if a prediction has the right size. `correlation
of differences` is between changes from one update to the next, so that a common trend over training does not count.
`by token` is the mean correlation within a minibatch.
""".strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=10, help="generated batches of a run, 4 updates each")
    parser.add_argument("--only-table", action="store_true", help="the page from the figures that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.only_table:
        began, by_run = time.monotonic(), {}
        for name in RUNS:
            for seed in options.seeds:
                by_run.setdefault(name, {})[seed] = run(name, seed, options.batches)
                print(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
        how = f"{options.batches * UPDATES} updates a run, {PROMPTS * GROUP // UPDATES} answers each"
        packages = versions("isentropic", "torch", "transformers")
        line = made(packages, f"seeds {options.seeds}", how, f"{time.monotonic() - began:.0f} s")
        facts = {"made": line, "fits": analyse(by_run), "rows": shortened(by_run)}
        save("transformer.json.gz", facts)
    text = page(load("transformer.json.gz"))
    save("transformer.md", text)
    print(text)


if __name__ == "__main__":
    main()
