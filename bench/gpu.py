"""What runs on a GPU, checked and measured in some minutes: every path of the head, a controlled step, a whole run.

Four parts. ``correct``: statistics, log-probabilities, the fused loss and all gradients, by each path (plain torch, and
Triton where it is installed), each dtype and each kind of head, against float64. ``head``: time and peak memory beside
TRL's head, torch's and logits. ``step``: TRL's trainer and a controlled one take turns, on a model of SmolLM2-135M's
size. ``run``: the default recipe on the embedded task.

A fifth part runs if it is named, and takes longer: ``pretrained``, SmolLM2-135M over two tasks, 300 and 150 steps,
six recipes, three seeds, after `isentropic model smollm2`. It continues after a stop.

Without a GPU, or with ``--small``, sizes are small and the figures say nothing about a GPU.

    python bench/gpu.py > gpu.md
    python bench/gpu.py --only correct head
    python bench/gpu.py --only pretrained
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import head as peers
import overhead
import torch
from results import ROOT, made, table, versions

from isentropic.entropy.kernels import fused_logp, fused_policy_loss, ops, token_stats
from isentropic.losses.reduce import SumCount

# Statistics in nats, gradients as a share of their norm.
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (5e-4, 1e-4),
    torch.bfloat16: (5e-4, 1e-2),
    torch.float16: (5e-4, 2e-3),
}
HEADS = {
    "plain": {},
    "softcap, bias": {"bias": True, "softcap": 12.0, "scale": 0.5},
    "frozen": {"frozen": True},
    "masked": {"mask": True},
}
HEAD_PEERS = ("ours", "ours, fused loss", "TRL chunked", "TRL logits", "torch linear_cross_entropy", "naive")


@contextmanager
def path(name):
    """Take the sweeps of one path, wherever they were tested."""
    before = ops.TRITON_TESTED
    ops.TRITON_TESTED = frozenset({torch.cuda.get_device_capability()} if name == "triton" else ())
    try:
        yield
    finally:
        ops.TRITON_TESTED = before


def paths(device):
    """The paths that can run here."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return ("torch",)
    return ("torch", "triton") if device == "cuda" else ("torch",)


def loss_fn(stats, where):
    return SumCount(-(stats.logp + 0.3 * stats.entropy).sum(), stats.logp.new_tensor(1.0))


def errors(data, dtype, device, bias=False, frozen=False, mask=False, softcap=None, scale=1.0):
    """The largest error of a statistic, and of a gradient as a share of its norm, over all entry points."""
    hidden, weight, ids, _ = data
    hidden = hidden.to(device, dtype, copy=True).requires_grad_()
    weight = weight.to(device, dtype, copy=True).requires_grad_(not frozen)
    gen = torch.Generator().manual_seed(1)
    offset = torch.randn(len(weight), generator=gen).to(device, dtype).requires_grad_() if bias else None
    ids = ids.to(device)
    kept = torch.rand(len(ids), generator=gen).to(device) < 0.7 if mask else torch.ones_like(ids, dtype=torch.bool)
    leaves = [x for x in (hidden, weight, offset) if x is not None and x.requires_grad]
    z = hidden.double() @ weight.double().T
    z = (z if offset is None else z + offset.double()) * scale
    logp = (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(-1)
    p = logp.exp()
    own = logp.gather(1, ids[:, None])[:, 0]
    moments = -(p * logp).sum(-1), p.square().sum(-1), (p**2 * logp).sum(-1), (p * logp).square().sum(-1)
    true = [torch.where(kept, x, 0.0) for x in (own, *moments)]
    true_grads = torch.autograd.grad(-(true[0] + 0.3 * true[1]).sum(), leaves)
    options = {"bias": offset, "softcap": softcap, "scale": scale, "mask": kept if mask else None}
    stats = fused_logp(hidden, weight, ids, **options)
    batch = {**options, "mask": options["mask"][None] if mask else None}
    losses = [loss_fn(stats, None).sum] + [
        fused_policy_loss(hidden[None], weight, ids[None], loss_fn, level=level, **batch).loss.sum
        for level in ("token", "sequence")
    ]
    with torch.no_grad():
        read = token_stats(hidden, weight, ids, **options)
    off = max(float((a - b).detach().abs().max()) for got in (stats, read) for a, b in zip(got, true, strict=True))
    shares = [
        float((a.double() - b.double()).norm() / b.double().norm())
        for loss in losses
        for a, b in zip(torch.autograd.grad(loss, leaves), true_grads, strict=True)
    ]
    return off, max(shares)


def correct(options):
    """Compare every path with float64."""
    tokens, d, v = (64, 16, 2500) if options.small else (512, 576, 49152)
    data, rows, wrong = peers.draw(tokens, d, v, torch.float32), [], []
    print(f"\n## Against float64\n\n{tokens} tokens, width {d}, vocabulary {v:,}, on {options.device}.\n")
    for name in paths(options.device):
        for dtype, (most, share) in TOLERANCE.items():
            if name == "triton" and dtype == torch.float64:
                continue  # float64 takes plain torch
            for kind, settings in HEADS.items():
                with path(name):
                    off, gradient = errors(data, dtype, options.device, **settings)
                fine = off <= most and gradient <= share
                wrong += [] if fine else [f"{name}, {dtype}, {kind}"]
                rows.append([name, str(dtype)[6:], kind, f"{off:.1e}", f"{gradient:.1e}", "yes" if fine else "NO"])
    print(table(["path", "dtype", "head", "statistics, nats", "gradients, share", "within bounds"], rows))
    return wrong


def timed(work, device):
    """Seconds of one run and its peak memory in MB beyond what was held; memory only on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start, float("nan")
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - held) / 1e6


def head(options):
    """Time the head beside its peers."""
    sizes = [(256, 64, 4096)] if options.small else [(8192, 576, 49152), (8192, 1024, 151936)]
    dtype = torch.float32 if options.small else torch.bfloat16
    for n, d, v in sizes:
        gen = torch.Generator(options.device).manual_seed(0)

        def randn(*shape, gen=gen):
            return torch.randn(*shape, generator=gen, device=options.device)

        data = [randn(n, d).to(dtype), (randn(v, d) / d**0.5).to(dtype)]
        data += [torch.randint(v, (n,), generator=gen, device=options.device), randn(n)]
        found = {}
        print(f"\n## Head: {n:,} tokens, width {d:,}, vocabulary {v:,}, {str(dtype)[6:]}\n")
        for mode in ("forward", "train"):
            names = [(p, x) for x in HEAD_PEERS if peers.available(x, dtype, mode) for p in paths(options.device)]
            names = [(p, x) for p, x in names if p == "torch" or x.startswith("ours")]
            for turn in range(1 + options.repeats):  # the first is imports and compilations
                for p, x in names if turn % 2 else names[::-1]:
                    try:
                        with path(p):
                            figures = timed(partial(peers.once, x, mode, *data), options.device)
                    except Exception as error:
                        print(f"{x}, {mode}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                        figures = (float("nan"), float("nan"))
                    if turn:
                        label = f"{x}, Triton" if p == "triton" else x
                        found.setdefault(label, {}).setdefault(mode, []).append(figures)
        rows = []
        for label, modes in found.items():
            row = [label]
            for mode in ("forward", "train"):
                for i, unit in ((0, 1e3), (1, 1)):
                    values = [figures[i] * unit for figures in modes.get(mode, [])]
                    known = bool(values) and values[0] == values[0]
                    row.append(f"{statistics.median(values):,.1f}" if known else "-")
            rows.append(row)
        print(table(["", "forward, ms", "peak, MB", "train, ms", "peak, MB"], rows, right=4))
    return []


def smollm2(folder):
    """A random model of SmolLM2-135M's size, whose answers never end: every step does equal work."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from isentropic.models.tiny import character_tokenizer

    tokenizer = character_tokenizer()
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **sizes, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def step(options):
    """Let TRL's trainer and a controlled one take turns."""
    kinds = ("trl", "trl again", "controlled")
    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(cuda=options.device == "cuda", model=None, tokens=None, batch=64, batches=4)
        if not options.small:
            settings = argparse.Namespace(cuda=True, model=smollm2(folder), tokens=64, batch=64, batches=20)
        times = overhead.take_turns(kinds, settings)
    warm, rows = 1 if options.small else overhead.WARM_UP, []
    for kind, turns in times.items():
        wall = [turn[1] / overhead.STEPS_A_BATCH * 1e3 for turn in turns[warm:]]
        ratios = [a[1] / b[1] for a, b in zip(turns[warm:], times["trl"][warm:], strict=True)]
        rows.append([kind, f"{statistics.median(wall):.1f}", f"{statistics.median(ratios):.3f}"])
    size = "the embedded model" if options.small else "random weights of SmolLM2-135M's size, answers of 64 tokens"
    print(f"\n## A step, generation included: {size}, {settings.batch} answers a generated batch\n")
    print(table(["trainer", "wall ms a step", "over TRL, median of pairs"], rows, right=2))
    return []


def run(options):
    """Train by the default recipe."""
    steps = 8 if options.small else 100
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        more = ["--eval-k", "4", "--eval-rows", "8"] if options.small else []
        flags = ["--steps", str(steps), "--seed", "0", "--device", options.device, "--out", str(out), *more]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "isentropic.cli", "train", *flags], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
            return [f"train ended with exit code {done.returncode}"]
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((out / "summary.json").read_text())
    held = [row for row in rows if row.get("entropy/error") is not None][len(rows) // 2 :]
    off = statistics.median(abs(row["entropy/error"]) for row in held)
    told = sum(row.get("predict/change") is not None for row in rows)
    print(f"\n## The default recipe, {steps} steps of the embedded task on {options.device}\n")
    print(
        f"{time.monotonic() - began:.0f} s in all. Entropy {summary['entropy/end']:.3f} nats per token at the end, "
        f"{off:.1%} from its target in the median of the second half; reward {summary['reward/end']:.3f}; "
        f"{told} of {len(rows)} steps explained."
    )
    return []


def pretrained(options):
    """Run the grid of the pretrained model on this device; its supervised start is made if it is missing."""
    if not (ROOT / "runs" / "smollm2-start" / "config.json").exists():
        start = subprocess.run([sys.executable, "bench/smollm2_start.py"], cwd=ROOT, check=False)
        if start.returncode:
            return [f"smollm2_start.py ended with exit code {start.returncode}"]
    sizes, seeds, cells = {"steps": 300, "then_steps": 150}, ["0", "1", "2"], []
    if options.small:
        cells = ["--recipes", "grpo", "auto"]
        sizes, seeds = {"steps": 2, "then_steps": 2, "eval_k": 2, "eval_rows": 4, "save_every": 0}, ["0"]
    out = f"runs/gpu-pretrained{'-small' if options.small else ''}"
    command = ["compare", "bench/grids/smollm2-long.toml", *cells, "--seeds", *seeds]
    command += ["--set", f"device={options.device}", *(f"{key}={value}" for key, value in sizes.items())]
    command += ["--jobs", "1", "--out", out, "--results", f"{out}/results.jsonl", "--markdown"]
    done = subprocess.run(
        [sys.executable, "-m", "isentropic.cli", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    print(f"\n## SmolLM2-135M over two tasks, on {options.device}\n\n{done.stdout}")
    return [f"compare ended with exit code {done.returncode}"] if done.returncode else []


def main():
    parts = {"correct": correct, "head": head, "step": step, "run": run, "pretrained": pretrained}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=[name for name in parts if name != "pretrained"])
    parser.add_argument("--small", action="store_true", help="small sizes; always without a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.small |= options.device == "cpu"
    name = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU: sizes are small"
    print(f"# On a GPU\n\n`python bench/gpu.py`, {name}; {made(versions('torch', 'transformers', 'trl'))}")
    wrong, began = [], time.monotonic()
    for part in options.only:
        wrong += parts[part](options)
        print(f"\n{part}: done, {time.monotonic() - began:.0f} s so far", file=sys.stderr, flush=True)
        sys.stdout.flush()
    for problem in wrong:
        print(f"wrong: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
