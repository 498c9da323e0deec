"""What does a cast cost? Rounding at each place of the head, in bf16, fp16 and fp32, on one side and on both.

A planted head: a few likely tokens over a Gaussian background, so that the entropy of rows spans 1e-3 to 8 nats and
their top logits 10 to 36. The new policy is the old one with its hidden states moved by 0.4 %. Everything else is fp64,
which is also the truth. Writes docs/results/casts.md and casts.json.gz.

    python bench/casts.py [--tokens 10240] [--seeds 0 1 2] [--only-table]
"""

import argparse
import os

from results import ONE_THREAD, load, made, save, table, versions

os.environ |= ONE_THREAD
import torch

from isentropic.entropy.audit import WIDTHS, half_ulp, head, independent_bias, ratio_error, sequence_error

VOCAB, WIDTH, PLANTED, MOVE = 8192, 128, 16, 0.004
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# One place each; then a head that runs in the dtype, and that with a rounded result as well.
PLACES = {
    "hidden": ("hidden",),
    "weights": ("weights",),
    "logits": ("logits",),
    "log_softmax": ("log_softmax",),
    "logp": ("logp",),
    "head": ("hidden", "weights", "logits"),
    "head + logp": ("hidden", "weights", "logits", "logp"),
}
SIDES = {"both": (1, 1), "old only": (0, 1), "new only": (1, 0)}
BANDS = {"< 0.1": (0, 0.1), "0.1-0.5": (0.1, 0.5), "0.5-1": (0.5, 1), "1-2": (1, 2), "> 2": (2, 99)}
SIZES = {"[8, 16)": (8, 16), "[16, 32)": (16, 32), "[32, 64)": (32, 64)}
LENGTHS = (256, 1024, 4096)
MOVES = (0.004, 0.001, 0.00025)


def planted(num, seed, move=MOVE):
    """Hidden states of the old and the new policy, the head, and tokens drawn from the old one, in fp64."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64)
    block = VOCAB // PLANTED
    top = torch.randint(block, (num, PLANTED), generator=g) + block * torch.arange(PLANTED)
    height = 10 + 26 * torch.rand(num, 1, generator=g, dtype=torch.float64)
    gap = (torch.rand(num, 1, generator=g, dtype=torch.float64) * 6 - 3.5).exp()
    want = (height - gap * torch.arange(PLANTED)).clamp(min=0)
    background = torch.randn(num, WIDTH, generator=g, dtype=torch.float64) * (3.5 / WIDTH**0.5)
    # The least hidden state that gives the planted tokens their logits, the background included.
    rows = weight[top]
    missing = want - (rows @ background[:, :, None])[:, :, 0]
    solved = torch.linalg.solve(rows @ rows.mT, missing[:, :, None])
    old = background + (rows.mT @ solved)[:, :, 0]
    step = torch.randn(num, WIDTH, generator=g, dtype=torch.float64)
    new = old + move * old.norm(dim=1, keepdim=True) * step / step.norm(dim=1, keepdim=True)
    ids = torch.cat([(h @ weight.T).softmax(-1).multinomial(1, generator=g)[:, 0] for h in old.split(1024)])
    return old, new, weight, ids


def measure(num, seed):
    """By place and dtype, the errors of log-probs of both policies and of the entropy of the new one, by token."""
    old, new, weight, ids = planted(num, seed)
    logp_old, _ = head(old, weight, ids)
    logp_new, entropy = head(new, weight, ids)
    data = {"log_ratio": logp_new - logp_old, "entropy": entropy, "logit": (old * weight[ids]).sum(-1), "errors": {}}
    for place, places in PLACES.items():
        for name, dtype in DTYPES.items():
            cast_old, _ = head(old, weight, ids, places, dtype)
            cast_new, cast_entropy = head(new, weight, ids, places, dtype)
            data["errors"][place, name] = (cast_new - logp_new, cast_old - logp_old, cast_entropy - entropy)
            print(f"seed {seed}: {place}, {name}", flush=True)
    return data


def by_move(num, seed):
    """How many ratios stick at 1 when the policy moves less and less, both sides rounded."""
    rows = []
    for move in MOVES:
        old, new, weight, ids = planted(num, seed, move)
        true = head(new, weight, ids)[0] - head(old, weight, ids)[0]
        for place in ("logits", "logp", "head", "head + logp"):
            for name in ("bf16", "fp16"):
                new_logp, old_logp = (head(h, weight, ids, PLACES[place], DTYPES[name])[0] for h in (new, old))
                stuck = ratio_error(new_logp - old_logp, true).stuck
                rows.append({"move": move, "rms": rms(true), "place": place, "dtype": name, "stuck": stuck})
        print(f"seed {seed}: moved by {move:.3%}", flush=True)
    return rows


def join(parts):
    first = parts[0]
    joined = {key: torch.cat([part[key] for part in parts]) for key in ("log_ratio", "entropy", "logit")}
    joined["errors"] = {
        key: tuple(torch.cat(x) for x in zip(*(part["errors"][key] for part in parts), strict=True))
        for key in first["errors"]
    }
    return joined


def compared(data, key, side, at=slice(None)):
    """Error statistics of the ratio if the named sides go through the cast."""
    new, old, _ = data["errors"][key]
    use_new, use_old = SIDES[side]
    true = data["log_ratio"][at]
    return ratio_error(true + use_new * new[at] - use_old * old[at], true)


def rms(x):
    return x.square().mean().sqrt().item() if len(x) else float("nan")


def statistics(parts):
    data = join(parts)
    tokens = [
        {
            "place": place,
            "dtype": dtype,
            "side": side,
            **compared(data, (place, dtype), side)._asdict(),
            "bias_by_seed": [compared(part, (place, dtype), side).bias for part in parts],
        }
        for place, dtype in data["errors"]
        for side in SIDES
    ]
    by_entropy, entropy_error = [], []
    for place, dtype in data["errors"]:
        for band, (low, high) in BANDS.items():
            at = (data["entropy"] >= low) & (data["entropy"] < high)
            rows = {"place": place, "dtype": dtype, "band": band, "tokens": int(at.sum())}
            by_entropy += [
                {**rows, "side": side, **compared(data, (place, dtype), side, at)._asdict()} for side in SIDES
            ]
            entropy_error.append({**rows, "rms": rms(data["errors"][place, dtype][2][at])})
    by_size = []
    for size, (low, high) in SIZES.items():
        at = (data["logit"].abs() >= low) & (data["logit"].abs() < high)
        envelope = independent_bias(half_ulp(low, torch.bfloat16))
        for side in SIDES:
            facts = compared(data, ("logits", "bf16"), side, at)._asdict()
            by_size.append({"logit": size, "side": side, "envelope": envelope, **facts})
    pool, sequences = data["entropy"] < 2, []
    for place in ("logits", "logp", "head"):
        for dtype in DTYPES:
            new, old, _ = data["errors"][place, dtype]
            for side, (use_new, use_old) in SIDES.items():
                for length in LENGTHS:
                    error = (use_new * new - use_old * old)[pool]
                    drawn = sequence_error(error, length, generator=torch.Generator().manual_seed(0))
                    row = {"place": place, "dtype": dtype, "side": side, "length": length, **drawn._asdict()}
                    sequences.append(row)
    return {
        "true_log_ratio_rms": rms(data["log_ratio"]),
        "tokens": tokens,
        "by_entropy": by_entropy,
        "by_size": by_size,
        "sequences": sequences,
        "entropy_error": entropy_error,
    }


def percent(x):
    return "0" if x == 0 else f"{100 * x:.2g} %"


def pair(row, i):
    return f"{percent(row['wrong_high'][i])} / {percent(row['wrong_low'][i])}"


def page(facts):
    """The Markdown page of what the JSON file holds."""

    def pick(rows, **want):
        return [
            row for row in rows if all(row[k] in v if isinstance(v, tuple) else row[k] == v for k, v in want.items())
        ]

    tokens = [
        [
            r["place"], r["dtype"], r["side"], f"{r['std']:.2g}", f"{r['bias']:+.1e} ({r['bias_se']:.0e})",
            f"{r['half_var']:.1e}", *(pair(r, i) for i in range(3)), percent(r["stuck"]),
        ]
        for r in facts["tokens"]
    ]  # fmt: skip
    bands = [
        [r["place"], r["band"], str(r["tokens"]), f"{r['std']:.2g}", f"{r['bias']:+.1e} ({r['bias_se']:.0e})",
         *(pair(r, i) for i in range(3)), percent(r["stuck"])]
        for r in pick(facts["by_entropy"], dtype="bf16", side="both")
    ]  # fmt: skip
    sizes = [
        [r["logit"], r["side"], str(r["num_tokens"]), f"{r['bias']:+.1e} ({r['bias_se']:.0e})",
         f"{r['half_var']:.1e}", f"{r['envelope']:.1e}", *(pair(r, i) for i in range(3))]
        for r in facts["by_size"]
    ]  # fmt: skip
    sequences = [
        [r["place"], r["dtype"], r["side"], str(r["length"]), f"{r['std']:.1e}", percent(r["outside"]),
         f"{r['median']:.3g} / {r['mean']:.3g}"]
        for r in facts["sequences"]
    ]  # fmt: skip
    entropies = [
        [place, dtype, *(f"{r['rms']:.1e}" for r in pick(facts["entropy_error"], place=place, dtype=dtype))]
        for place in PLACES
        for dtype in DTYPES
    ]
    stuck = [
        [place, dtype, *(percent(r["stuck"]) for r in pick(facts["by_move"], place=place, dtype=dtype))]
        for place in ("logits", "logp", "head", "head + logp")
        for dtype in ("bf16", "fp16")
    ]
    moves = {r["move"]: r["rms"] for r in facts["by_move"]}
    wrong = [f"wrong at {w}: high / low" for w in WIDTHS]
    spread = ["std, nats", "E[r/r*] − 1 (se)"]
    num = facts["tokens_a_seed"]
    return f"""# What does a cast cost?

One command, `python bench/casts.py`, makes everything on this page and [the figures](casts.json.gz). {facts["made"]}.

A planted head (vocabulary {VOCAB}, width {WIDTH}, {num} tokens a seed): rows of 1e-3 to 8 nats, top logits of 10 to 36.
The new policy is the old one with its hidden states moved by {MOVE:.1%}; the true log-ratio has an rms of
{facts["true_log_ratio_rms"]:.4f}. One place is rounded, everything else is fp64; `head` rounds hidden states, weights
and logits, as a head that runs in that dtype does, and `head + logp` its result as well. *old only* is a trainer
in full precision with a sampler that rounds. *Wrong* is a token outside the clip whose true ratio is inside; *stuck* a
ratio of exactly 1 in fp32 that is not 1 in truth. Errors are those of the log-ratio.

## By token

{table(["place", "dtype", "side", *spread, "Var/2", *wrong, "stuck"], tokens)}

## By entropy of the row: bf16 on both sides

{table(["place", "H, nats", "tokens", *spread, *wrong, "stuck"], bands)}

## By size of the sampled logit: bf16 logits

The envelope is `(sinh a / a)² − 1` with half an ulp a at the lower end: two roundings that have nothing in common.

{table(["abs logit", "side", "tokens", spread[1], "Var/2", "envelope", *wrong], sizes)}

## Stuck ratios by how far the policy moved, both sides rounded (seed {facts["by_move_seed"]})

The less it moves, the more ratios stay at exactly 1: one small step is lost whole.

{table(["place", "dtype", *(f"moved {m:.3%}: true rms {r:.1e}" for m, r in moves.items())], stuck)}

## By sequence

Tokens of H < 2 nats, drawn independently; the true ratio of every sequence is 1. GSPO's band is [1 − 3e-4, 1 + 4e-4].

{table(["place", "dtype", "side", "tokens", "std of mean", "outside the band", "product: median / mean"], sequences)}

## Error of the entropy itself, nats rms, by entropy of the row

{table(["place", "dtype", *(f"H {band}" for band in BANDS)], entropies)}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-table", action="store_true", help="the page from the figures that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.only_table:
        facts = statistics([measure(options.tokens, seed) for seed in options.seeds])
        facts |= {"by_move": by_move(options.tokens, options.seeds[0]), "by_move_seed": options.seeds[0]}
        line = made(versions("python", "isentropic", "torch"), f"seeds {options.seeds}")
        save("casts.json.gz", {"made": line, "tokens_a_seed": options.tokens, **facts})
    save("casts.md", page(load("casts.json.gz")))
    print(page(load("casts.json.gz")))


if __name__ == "__main__":
    main()
