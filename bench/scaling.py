"""What control costs as processes are added: collectives counted, CPU time beside TRL's own trainer.

For each number of processes, `torchrun` starts them on gloo. Every process holds three trainers, TRL's GRPOTrainer, one
that only monitors and one that controls, which take turns; all sample as many answers a process. Every call of a
collective of torch.distributed from Python is counted with its bytes; the reduction of gradients, which is
DistributedDataParallel's own and the same for all, is not among them.

    python bench/scaling.py [--processes 1 2 4] [--rounds 8] [--only-table]
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import ONE_THREAD, load, made, save, table, versions

os.environ |= ONE_THREAD
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
    """Counts calls and bytes of torch.distributed's Python functions."""

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

    trainer_class, config, more = {
        "trl": (GRPOTrainer, GRPOConfig, {"loss_type": "dapo", "epsilon_high": 0.28}),
        "monitored": (IsentropicTrainer, IsentropicConfig, {"recipe": "dapo", "explain_every": 0}),
        "controlled": (IsentropicTrainer, IsentropicConfig, {"recipe": "dapo", "knob": "zeta", "target": "initial"}),
    }[kind]
    path, task = resolve_model("tiny"), load_task("expr")
    trainer = trainer_class(
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
    trainer.remove_callback(PrinterCallback)

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

    trainer.meter = Meter()
    trainer.add_callback(trainer.meter)
    return trainer


def process(rounds, out):
    """One of the processes: the trainers in turn, three generated batches at a time, of which two are measured."""
    global counter
    import torch

    from isentropic.models.loading import quiet

    quiet()
    torch.set_num_threads(1)
    counter = Counter()
    trainers = {kind: make(kind, f"{out}/{kind}", 3 * UPDATES) for kind in KINDS}
    world = trainers["trl"].accelerator.num_processes
    assert world == int(os.environ["WORLD_SIZE"]), "torchrun made another number of processes"
    for turn in range(rounds):
        for kind in KINDS if turn % 2 else reversed(KINDS):
            trainers[kind].train()
    if int(os.environ["RANK"]) == 0:
        # The first turn warms everything up.
        rows = {kind: trainer.meter.rows[2:] for kind, trainer in trainers.items()}
        Path(out, "rows.json").write_text(json.dumps(rows))


def measure(processes, rounds):
    with tempfile.TemporaryDirectory() as out:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        here = [__file__, "--rounds", str(rounds), "--out", out]
        subprocess.run([*launch, "--master_port", port, *here], check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(out, "rows.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        process(options.rounds, options.out)
        return
    if not options.only_table:
        turns = f"{options.rounds} turns of two generated batches"
        line = made(versions("torch", "trl"), turns, threads="one thread a process")
        save("scaling.json", {"made": line, "processes": {n: measure(n, options.rounds) for n in options.processes}})
    write_table()


def write_table():
    facts = load("scaling.json")
    rows = []
    for number, by_kind in facts["processes"].items():
        for kind in KINDS:
            cpu = statistics.median(row[0] for row in by_kind[kind]) * 1e3
            pairs = [a[0] / b[0] for a, b in zip(by_kind[kind], by_kind["trl"], strict=True)]
            low, middle, high = statistics.quantiles(pairs, n=4)
            calls, size = (statistics.median(row[i] for row in by_kind[kind]) for i in (1, 2))
            ratio = f"{middle:.3f} ({low:.3f}..{high:.3f})"
            rows.append([number, kind, f"{cpu:.1f}", ratio, f"{calls:.2f}", f"{size:,.0f}"])
    head = ["processes", "trainer", "CPU ms a step and process", "ratio to TRL (quartiles)"]
    text = table([*head, "collectives a step", "bytes a step"], rows)
    save("scaling-table.md", f"{text}\n\n{facts['made']}.\n")
    print(text)


if __name__ == "__main__":
    main()
