"""What token statistics cost: this library's head beside its peers, CPU time, memory and accuracy, on one thread.

Hidden states and a weight are drawn so that entropies go from 1e-3 to 10 nats; ids are drawn from the rows. A mode is
``forward`` (statistics without gradient), ``train`` (a policy loss, gradients of both) or ``frozen`` (of the hidden
states alone, as under LoRA). Implementations take turns, so that a machine whose speed drifts drifts for all; the time
is the median CPU time of the process. Peak memory is that of a child process, beyond its inputs. Peers that are not
installed are left out; two that are no packages are restated here and marked so.

    python bench/head.py time   [--size smollm2|qwen3] [--tokens N] [--dtype float32|bfloat16] [--repeats 3]
    python bench/head.py memory [--size ...] [--tokens N] [--dtype ...] [--modes train]
    python bench/head.py accuracy
    python bench/head.py step       a training step in TRL, a random model of SmolLM2's size, the head on and off
    python bench/head.py table --json FILE    a file of results as Markdown
    --only PART,PART  of the implementations' names; --json FILE adds the result to a list in a file
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from results import ONE_THREAD, exists, load, save, table

os.environ |= ONE_THREAD
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
SIZES = {"smollm2": (2048, 576, 49152), "qwen3": (4096, 1024, 151936)}
MODES = ("forward", "train", "frozen")


def draw(tokens, d, v, dtype, seed=0):
    """Hidden states [n d] from flat to peaked rows, a weight [v d], ids from the rows, and advantages."""
    gen = torch.Generator().manual_seed(seed)
    weight = torch.empty(v, d, dtype=dtype)
    for part in weight.split(8192):
        part.copy_(torch.randn(part.shape, generator=gen) * 1.2 / d**0.5)
    hidden = (torch.randn(tokens, d, generator=gen) * torch.logspace(-0.5, 0.9, tokens)[:, None]).to(dtype)
    ids = torch.empty(tokens, dtype=torch.long)
    for rows in range(0, tokens, 128):
        logits = hidden[rows : rows + 128].float() @ weight.float().T
        ids[rows : rows + 128] = torch.multinomial(logits.softmax(-1), 1, generator=gen)[:, 0]
    return hidden, weight, ids, torch.randn(tokens, generator=gen)


class Restated(torch.autograd.Function):
    """Chunks of rows × vocabulary, an online normaliser, logits made again in the backward, all in the inputs' dtype.

    The algorithm of prime-rl's and verl's fused heads as published, in our words; not their code.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ids, rows, columns):
        logp, entropy, normaliser = (torch.empty(len(ids)) for _ in range(3))
        for r in torch.arange(len(ids)).split(rows):
            r = slice(int(r[0]), int(r[-1]) + 1)
            top, total, weighted = (torch.zeros(r.stop - r.start) for _ in range(3))
            top.fill_(-torch.inf)
            for start in range(0, len(weight), columns):
                z = (hidden[r] @ weight[start : start + columns].T).float()
                new = torch.maximum(top, z.amax(-1))
                e, scale = (z - new[:, None]).exp(), (top - new).exp()
                total = total * scale + e.sum(-1)
                weighted = weighted * scale + (e * z).sum(-1)
                top = new
            normaliser[r] = top + total.log()
            entropy[r] = normaliser[r] - weighted / total
            logp[r] = (hidden[r].float() * weight[ids[r]].float()).sum(-1) - normaliser[r]
        ctx.save_for_backward(hidden, weight, ids, normaliser)
        ctx.sizes = rows, columns
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, g, _):
        hidden, weight, ids, normaliser = ctx.saved_tensors
        rows, columns = ctx.sizes
        grad_hidden, grad_weight = torch.zeros_like(hidden), None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        for r in torch.arange(len(ids)).split(rows):
            r = slice(int(r[0]), int(r[-1]) + 1)
            for start in range(0, len(weight), columns):
                part = weight[start : start + columns]
                z = ((hidden[r] @ part.T).float() - normaliser[r, None]).exp_()
                own = ids[r] - start
                here = ((own >= 0) & (own < len(part))).nonzero()[:, 0]
                z[here, own[here]] -= 1
                z = z.mul_(-g[r, None]).to(hidden.dtype)
                grad_hidden[r] += z @ part
                if grad_weight is not None:
                    grad_weight[start : start + columns] += z.T @ hidden[r]
        return grad_hidden, grad_weight, None, None, None


def ours_fused(hidden, weight, ids, adv):
    from isentropic.entropy.kernels import fused_policy_loss
    from isentropic.losses.reduce import SumCount

    def loss_fn(stats, where):
        return SumCount(-(stats.logp * adv[None][where]).sum(), adv.new_tensor(float(stats.logp.numel())))

    return fused_policy_loss(hidden[None], weight, ids[None], loss_fn, level="token").loss.sum


def per_token(function):
    """A loss from log-probabilities; without a gradient, the log-probabilities are all there is to do."""

    def run(hidden, weight, ids, adv):
        logp = function(hidden, weight, ids)
        return -(logp * adv).sum() if torch.is_grad_enabled() else logp

    return run


def ours(arithmetic):
    def function(hidden, weight, ids):
        from isentropic.entropy.kernels import fused_logp, token_stats

        call = fused_logp if torch.is_grad_enabled() else token_stats
        return call(hidden, weight, ids, arithmetic=arithmetic).logp

    return per_token(function)


def trl_chunked(hidden, weight, ids):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    wanted = ("log_probs", "entropy")
    return ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, 32768, None, 1.0, wanted)[0]


def trl_logits(hidden, weight, ids):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = hidden @ weight.T
    with torch.no_grad():
        entropy_from_logits(logits)
    return selective_log_softmax(logits, ids)


def naive(hidden, weight, ids):
    logp = (hidden @ weight.T).log_softmax(-1)
    with torch.no_grad():
        (logp.exp() * logp).sum(-1)
    return logp.gather(1, ids[:, None])[:, 0]


def liger(hidden, weight, ids, adv):
    """GRPO's loss, one sequence of 512 tokens a chunk; log-probabilities alone, and gradients in the forward."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)
    b = max(1, len(ids) // 512)
    shape = (b, len(ids) // b)
    ones = torch.ones(shape)
    return loss(hidden.view(*shape, -1), weight, ids.view(shape), ones, adv.view(shape)[:, 0])[0]


def apple(hidden, weight, ids):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, ids, reduction="none", impl="torch_compile")


def torch_linear(hidden, weight, ids):
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, ids, reduction="none", options=options)


def restated(rows, columns):
    return per_token(lambda hidden, weight, ids: Restated.apply(hidden, weight, ids, rows, columns)[0])


# name -> (function, its other outputs beside logp)
PEERS = {
    "ours": (ours("exact"), "H, 3 moments"),
    "ours, shifted": (ours("shifted"), "H, 3 moments"),
    "ours, fused loss": (ours_fused, "H, 3 moments"),
    "TRL chunked": (per_token(trl_chunked), "H"),
    "TRL logits": (per_token(trl_logits), "H"),
    "prime-rl (restated)": (restated(8192, 8192), "H"),
    "verl (restated)": (restated(512, 2**30), "H"),
    "Liger GRPO": (liger, "-"),
    "CCE torch": (per_token(apple), "-"),
    "torch linear_cross_entropy": (per_token(torch_linear), "-"),
    "naive": (per_token(naive), "H"),
}


def available(name, dtype, mode):
    if mode == "forward" and name == "ours, fused loss":
        return False
    if name == "ours, shifted" and (dtype == torch.float32 or mode != "forward"):
        return False
    packages = {"TRL": "trl", "Liger": "liger_kernel", "CCE": "cut_cross_entropy"}
    try:
        for start, package in packages.items():
            if name.startswith(start):
                __import__(package)
    except ImportError as error:
        print(f"{name}: left out, {error}", file=sys.stderr)
        return False
    return "torch lin" not in name or hasattr(F, "linear_cross_entropy")


def once(name, mode, hidden, weight, ids, adv):
    function = PEERS[name][0]
    if mode == "forward":
        with torch.no_grad():
            function(hidden, weight, ids, adv)
        return
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(mode == "train")
    function(hidden, weight, ids, adv).backward()


def cpu_seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def attempt(name, mode, data):
    """CPU seconds of one run; NaN, and why, if a peer fails."""
    try:
        return cpu_seconds(lambda: once(name, mode, *data))
    except Exception as error:
        print(f"{name}, {mode}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return float("nan")


def floor_seconds(hidden, weight, tile=(256, 2048)):
    """One product of the head, [n d] × [d v], at the rate of an fp32 tile that stays in the cache."""
    a, b = hidden[: tile[0]].float(), weight[: tile[1]].float().T
    out, times = torch.empty(len(a), b.shape[1]), 20
    seconds = cpu_seconds(lambda: [torch.mm(a, b, out=out) for _ in range(times)])
    return seconds / times * (len(hidden) / len(a)) * (len(weight) / b.shape[1])


def statistics_cost(hidden, weight, ids, repeats):
    """Time of all statistics over that of log π(a) alone by the same code; median of interleaved pairs."""
    from isentropic.entropy.kernels import cpu, token_stats

    whole, ratios = cpu._fold, []

    def only_sum(x, e, sums):
        sums[0] += e.sum(-1)

    for _ in range(repeats):
        cpu._fold = only_sum
        one = cpu_seconds(lambda: token_stats(hidden, weight, ids))
        cpu._fold = whole
        ratios.append(cpu_seconds(lambda: token_stats(hidden, weight, ids)) / one)
    return statistics.median(ratios)


def measure_time(options):
    dtype, (tokens, d, v) = getattr(torch, options.dtype), SIZES[options.size]
    tokens = options.tokens or tokens
    data = draw(tokens, d, v, dtype)
    result = {"what": "time", "size": [tokens, d, v], "dtype": options.dtype, "repeats": options.repeats, "modes": {}}
    floors = [floor_seconds(*data[:2]) for _ in range(5)]
    for mode in options.modes:
        names = [n for n in PEERS if options.wants(n) and available(n, dtype, mode)]
        times = {name: [] for name in names}
        for name in names:  # imports and compilations
            attempt(name, mode, [x if x is data[1] else x[:64] for x in data])
        for turn in range(options.repeats):
            for name in names if turn % 2 else names[::-1]:
                times[name].append(attempt(name, mode, data))
            floors.append(floor_seconds(*data[:2]))
        result["modes"][mode] = {name: statistics.median(rows) for name, rows in times.items()}
        report_time(result, mode)
    result["gemm_floor"] = statistics.median(floors)
    if "forward" in options.modes and options.wants("ours"):
        result["all_over_logp_alone"] = statistics_cost(*data[:3], max(3, options.repeats))
    print({key: round(value, 3) for key, value in result.items() if isinstance(value, float)})
    return result


def report_time(result, mode):
    rows = result["modes"][mode]
    print(f"\n{result['size']} {result['dtype']} {mode}: CPU seconds, and over ours")
    best = min((rows[n] for n in rows if n in ("ours", "ours, fused loss")), default=float("nan"))
    for name, seconds in rows.items():
        print(f"  {name:28}{seconds:9.2f}{seconds / best:8.2f}   {PEERS[name][1]}", flush=True)


def peak_kilobytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]), int(status.split("VmRSS:")[1].split()[0])


def child(options):
    dtype, (tokens, d, v) = getattr(torch, options.dtype), SIZES[options.size]
    data = draw(options.tokens or tokens, d, v, dtype)
    # Imports and thread pools count as inputs.
    once(options.only[0], options.modes[0], *(x[:64] if i != 1 else x[:4096] for i, x in enumerate(small(data))))
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory left over from drawing the inputs is not the run's
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kilobytes()[1]
    once(options.only[0], options.modes[0], *data)
    print((peak_kilobytes()[0] - before) * 1024 / 1e6)


def small(data):
    hidden, weight, ids, adv = data
    return hidden, weight, ids.clamp(max=4095), adv


def measure_memory(options):
    result = {"what": "memory", "size": list(SIZES[options.size]), "dtype": options.dtype, "megabytes": {}}
    result["size"][0] = options.tokens or result["size"][0]
    for mode in options.modes:
        for name in (n for n in PEERS if options.wants(n) and available(n, getattr(torch, options.dtype), mode)):
            command = [sys.executable, __file__, "child", "--size", options.size, "--dtype", options.dtype]
            command += ["--modes", mode, "--exact", name] + (
                ["--tokens", str(options.tokens)] if options.tokens else []
            )
            done = subprocess.run(command, capture_output=True, text=True)
            megabytes = float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")
            result["megabytes"].setdefault(mode, {})[name] = megabytes
            print(f"{result['size']} {options.dtype} {mode:8} {name:28}{megabytes:9.0f} MB", flush=True)
            if done.returncode:
                print(done.stderr[-300:], file=sys.stderr)
    return result


def measure_accuracy(options):
    """Errors against float64 from the same inputs, at SmolLM2's width and vocabulary."""
    result = {"what": "accuracy", "tokens": 256, "rows": {}}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        hidden, weight, ids, _ = draw(256, *SIZES["smollm2"][1:], dtype)
        wide = hidden.double().requires_grad_()
        logp = (wide @ weight.double().T).log_softmax(-1)
        want = logp.gather(1, ids[:, None])[:, 0]
        true = torch.autograd.grad(want.sum(), wide)[0]
        del logp
        for name in ("ours", "ours, shifted", "ours, fused loss", "TRL chunked", "TRL logits", "prime-rl (restated)"):
            if not available(name, dtype, "forward" if "shifted" in name else "train"):
                continue
            leaf, ones = hidden.detach().requires_grad_(), -torch.ones(256)
            trained = weight.detach().requires_grad_()
            grad = torch.autograd.grad(PEERS[name][0](leaf, trained, ids, ones), leaf)[0].double()
            relative = (grad - true).norm(dim=1) / true.norm(dim=1)
            sure = (want > -0.02) & (want < -1e-6)
            row = {"gradient_median": relative.median().item(), "gradient_sure": relative[sure].median().item()}
            if name != "ours, fused loss":
                with torch.no_grad():
                    error = PEERS[name][0](hidden, weight, ids, ones).double() - want
                row |= {"logp_rms": error.square().mean().sqrt().item(), "logp_max": error.abs().max().item()}
            result["rows"].setdefault(str(dtype).removeprefix("torch."), {})[name] = row
            print(dtype, f"{name:22}", {key: f"{value:.1e}" for key, value in row.items()}, flush=True)
    return result


def step_child(options):
    """Optimizer steps on a made-up batch of 8 answers of 96 tokens: CPU seconds of each, and the peak in MB."""
    import tempfile

    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from isentropic.engines.trl.head import install
    from isentropic.models.tiny import character_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    b, prompt, t = 8, 32, 96
    made = {
        "prompt_ids": torch.randint(3, 49152, (b, prompt)),
        "prompt_mask": torch.ones(b, prompt, dtype=torch.long),
        "completion_ids": torch.randint(3, 49152, (b, t)),
        "completion_mask": torch.ones(b, t, dtype=torch.long),
        "advantages": torch.randn(b),
        "num_items_in_batch": torch.tensor(b * t),
    }

    class Given(GRPOTrainer):
        def _prepare_inputs(self, generation_batch):
            return dict(made)

    class Clock(TrainerCallback):
        seconds, start = [], 0.0

        def on_step_begin(self, *args, **kwargs):
            self.start = time.process_time()

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.process_time() - self.start)

    with tempfile.TemporaryDirectory() as out:
        args = GRPOConfig(out, use_cpu=True, bf16=False, max_steps=options.repeats + 1, per_device_train_batch_size=b)
        args.report_to, args.disable_tqdm, args.save_strategy, args.gradient_checkpointing = [], True, "no", False
        rows = Dataset.from_list([{"prompt": "1+1="}] * 64)
        parts = {"args": args, "train_dataset": rows, "processing_class": character_tokenizer()}
        trainer = Given(model, lambda **columns: [0.0] * b, callbacks=[Clock()], **parts)
        trainer.remove_callback(PrinterCallback)
        if options.only[0] == "on":
            assert install(trainer)
        trainer.train()
    print(json.dumps([Clock.seconds[1:], peak_kilobytes()[0] * 1024 / 1e6]))


def measure_step(options):
    turns, result = {"off": [], "on": []}, {"what": "step", "dtype": options.dtype}
    for turn in range(2):
        for flag in ("off", "on") if turn else ("on", "off"):
            command = [sys.executable, __file__, "step-child", "--exact", flag, "--dtype", options.dtype]
            done = subprocess.run([*command, "--repeats", str(options.repeats)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            turns[flag].append(json.loads(done.stdout.strip().splitlines()[-1]))
    for flag, runs in turns.items():
        seconds = statistics.median(second for run in runs for second in run[0])
        result[flag] = {"seconds": seconds, "peak_megabytes": statistics.median(run[1] for run in runs)}
        print(f"head {flag:4}{seconds:8.2f} CPU s a step, peak {result[flag]['peak_megabytes']:7.0f} MB", flush=True)
    return result


def markdown(options):
    """Print the tables of a file of results."""
    results = load(options.json)
    for result in (r for r in results if r["what"] in ("time", "memory")):
        modes = result["modes"] if result["what"] == "time" else result["megabytes"]
        unit = "CPU seconds (over the least of ours)" if result["what"] == "time" else "MB beyond the inputs"
        n, d, v = result["size"]
        print(f"\n**{n:,} tokens, width {d:,}, vocabulary {v:,}, {result['dtype']}**, {unit}:\n")
        best = {
            m: min((s for name, s in rows.items() if name.startswith("ours")), default=1) for m, rows in modes.items()
        }
        names = dict.fromkeys(name for rows in modes.values() for name in rows)
        cells = [[n, *(_cell(result["what"], rows.get(n), best[m]) for m, rows in modes.items())] for n in names]
        print(table(["", *modes], cells))
        if "gemm_floor" in result:
            more = result.get("all_over_logp_alone")
            costs = f"; all five statistics over log π(a) alone: {more:.3f}" if more else ""
            print(f"\nOne product of the head at the rate of a tile in the cache: {result['gemm_floor']:.2f} s{costs}.")
    for result in (r for r in results if r["what"] == "step"):
        for flag in ("off", "on"):
            row = result[flag]
            print(f"\nstep, head {flag}: {row['seconds']:.1f} CPU s, peak {row['peak_megabytes']:,.0f} MB")
    for result in (r for r in results if r["what"] == "accuracy"):
        keys = ("logp_rms", "logp_max", "gradient_median", "gradient_sure")
        cells = [
            [name, dtype, *(f"{row[k]:.1e}" if k in row else "-" for k in keys)]
            for dtype, rows in result["rows"].items()
            for name, row in rows.items()
        ]
        print("", table(["", "dtype", "log π rms", "log π max", "gradient, median", "gradient, sure"], cells), sep="\n")


def _cell(what, value, best):
    if value is None or value != value:
        return "-"
    return f"{value:.2f} ({value / best:.2f})" if what == "time" else f"{value:,.0f}"


def main():
    kinds = {"time": measure_time, "memory": measure_memory, "accuracy": measure_accuracy, "step": measure_step}
    kinds |= {"child": child, "step-child": step_child, "table": markdown}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--size", choices=SIZES, default="smollm2")
    parser.add_argument("--tokens", type=int, help="default: the size's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--only", default="", help="parts of names, with commas")
    parser.add_argument("--exact", help="one name")
    parser.add_argument("--json", type=lambda name: Path(name).resolve())
    options = parser.parse_args()
    options.modes = options.modes.split(",")
    options.only = [options.exact] if options.exact else [part for part in options.only.split(",") if part]
    options.wants = lambda name: not options.only or any(part in name for part in options.only)
    result = kinds[options.what](options)
    if options.json and result:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": 1, "torch": torch.__version__}
        machine |= {"date": time.strftime("%Y-%m-%d"), "isa": torch.backends.cpu.get_cpu_capability()}
        save(options.json, [*(load(options.json) if exists(options.json) else []), {**result, **machine}])


if __name__ == "__main__":
    main()
