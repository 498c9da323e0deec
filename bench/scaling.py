"""What control costs as processes are added: collectives counted, CPU time beside TRL's own trainer.

For each number of processes, `torchrun` starts them on gloo. Every process holds three trainers, TRL's GRPOTrainer, one
that only monitors and one that controls, which take turns; all sample as many answers a process. Every call of a
collective of torch.distributed from Python is counted with the bytes it carries; the reduction of gradients, which is
DistributedDataParallel's own and the same for all, is not among them.

    python bench/scaling.py [--processes 1 2 4] [--rounds 8]
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
UPDATES, ANSWERS = 4, 16  # optimizer steps a generated batch; answers a process and step
KINDS = ("trl", "monitored", "controlled")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "reduce",
    "gather",
    "all_gather_object",
)


class Counter:
    """Counts what goes through torch.distributed's Python functions."""

    def __init__(self):
        import torch.distributed as dist

        self.calls = self.bytes = 0
        for name in COLLECTIVES:
            setattr(dist, name, self._around(getattr(dist, name)))

    def _around(self, native):
        import torch

        def counted(*args, **kwargs):
            self.calls += 1
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            self.bytes += tensors[-1].numel() * tensors[-1].element_size() if tensors else 0
            return native(*args, **kwargs)

        return counted

    def read(self):
        return self.calls, self.bytes


def make(kind, out, steps):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
    from isentropic.models import resolve_model
    from isentropic.tasks import load_task

    trainer, config, more = {
        "trl": (GRPOTrainer, GRPOConfig, {"loss_type": "dapo", "epsilon_high": 0.28}),
        "monitored": (IsentropicTrainer, IsentropicConfig, {"recipe": "dapo", "explain_every": 0}),
        "controlled": (IsentropicTrainer, IsentropicConfig, {"recipe": "dapo", "knob": "zeta", "target": "initial"}),
    }[kind]
    path, task = resolve_model("tiny"), load_task("expr")
    made = trainer(
        AutoModelForCausalLM.from_pretrained(path),
        task.reward,
        args=config(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            learning_rate=1e-9,
            lr_scheduler_type="constant",
            max_steps=steps,
            per_device_train_batch_size=ANSWERS,
            steps_per_generation=UPDATES,
            num_generations=16,
            max_completion_length=task.max_completion_length,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            seed=0,
            **more,
        ),
        train_dataset=Dataset.from_list(task.train(0)),
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
    )
    made.remove_callback(PrinterCallback)

    class Meter(TrainerCallback):
        """CPU time and collectives from the begin of a generated batch to the begin of the next."""

        def __init__(self):
            self.rows, self.last = [], None

        def on_step_begin(self, args, state, control, **kwargs):
            now = (time.process_time(), *counter.read())
            if state.global_step % UPDATES == 0:
                if self.last is not None:
                    self.rows.append([(b - a) / UPDATES for a, b in zip(self.last, now, strict=True)])
                self.last = now

        def on_train_begin(self, args, state, control, **kwargs):
            self.last = None

    made.meter = Meter()
    made.add_callback(made.meter)
    return made


def process(rounds, out):
    """One of the processes: the trainers in turn, three generated batches at a time, of which two are measured."""
    global counter
    import torch

    from isentropic.experiments.train import quiet

    quiet()
    torch.set_num_threads(1)
    counter = Counter()
    makers = {kind: make(kind, f"{out}/{kind}", 3 * UPDATES) for kind in KINDS}
    world = makers["trl"].accelerator.num_processes
    assert world == int(os.environ["WORLD_SIZE"]), "torchrun made another number of processes"
    for turn in range(rounds):
        for kind in KINDS if turn % 2 else reversed(KINDS):
            makers[kind].train()
    if int(os.environ["RANK"]) == 0:
        # The first turn warms everything up.
        found = {kind: made.meter.rows[2:] for kind, made in makers.items()}
        Path(out, "found.json").write_text(json.dumps(found))


def measure(processes, rounds):
    with tempfile.TemporaryDirectory() as out:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        here = [__file__, "--rounds", str(rounds), "--out", out]
        subprocess.run([*launch, "--master_port", port, *here], check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(out, "found.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        process(options.rounds, options.out)
    else:
        table(options)


def table(options):
    import torch
    import trl

    rows = [
        "| processes | trainer | CPU ms a step and process | ratio to TRL (quartiles) | collectives a step "
        "| bytes a step |",
        "|---" * 6 + "|",
    ]
    kept = {}
    for number in options.processes:
        found = measure(number, options.rounds)
        kept[number] = found
        for kind in KINDS:
            cpu = statistics.median(row[0] for row in found[kind]) * 1e3
            pairs = [a[0] / b[0] for a, b in zip(found[kind], found["trl"], strict=True)]
            low, middle, high = statistics.quantiles(pairs, n=4)
            calls, size = (statistics.median(row[i] for row in found[kind]) for i in (1, 2))
            rows.append(
                f"| {number} | {kind} | {cpu:.1f} | {middle:.3f} ({low:.3f}..{high:.3f}) | {calls:.2f} | {size:,.0f} |"
            )
            print(rows[-1], flush=True)
    made = f"{date.today().isoformat()}; {platform.machine()}, {os.cpu_count()} cores, one thread a process; "
    made += f"torch {torch.__version__}, trl {trl.__version__}; {options.rounds} turns of two generated batches."
    (RESULTS / "scaling-table.md").write_text("\n".join([*rows, "", made]) + "\n")
    (RESULTS / "scaling.json").write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
