"""What a controlled step costs beside TRL's own: CPU time, interleaved, medians.

Processes run the real trainers: GRPOTrainer, and IsentropicTrainer that only monitors on TRL's head, that scores by the
fused head, and that explains every step and turns a knob by prediction; the run directory is written and samples are
kept. "trl again" is a second GRPOTrainer: the difference between two equal processes. They take turns, one generated
batch (4 optimizer steps) at a time, so that a machine whose speed drifts drifts for all. The learning rate is so small
that all sample answers of one length.

    python bench/overhead.py [--batches 150] [--batch 256]
"""

import argparse
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time

from results import ONE_THREAD, made, versions

os.environ |= ONE_THREAD
STEPS_A_BATCH = 4
WARM_UP = 5
KINDS = ("trl", "trl again", "monitored", "fused head", "controlled")
CONTROL = {"knob": "zeta", "controller": "predictive", "target": "initial"}


def child(kind, options, pipe):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
    from isentropic.models import resolve_model
    from isentropic.models.loading import quiet
    from isentropic.tasks import load_task

    quiet()
    torch.set_num_threads(1)

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % STEPS_A_BATCH == 0:
                pipe.recv()
                self.cpu, self.wall = time.process_time(), time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.last = state.global_step % STEPS_A_BATCH == 0

        def on_log(self, args, state, control, **kwargs):
            if getattr(self, "last", False):
                pipe.send((time.process_time() - self.cpu, time.perf_counter() - self.wall))
                self.last = False

    trainer, config, more = {
        "trl": (GRPOTrainer, GRPOConfig, {"loss_type": "dapo", "epsilon_high": 0.28}),
        "trl again": (GRPOTrainer, GRPOConfig, {"loss_type": "dapo", "epsilon_high": 0.28}),
        "monitored": (IsentropicTrainer, IsentropicConfig, {"recipe": "dapo", "head": "trl", "explain_every": 0}),
        "fused head": (IsentropicTrainer, IsentropicConfig, {"recipe": "dapo", "explain_every": 0}),
        "controlled": (IsentropicTrainer, IsentropicConfig, {"recipe": "dapo", **CONTROL}),
    }[kind]
    path, task = options.model or resolve_model("tiny"), load_task("expr")
    with tempfile.TemporaryDirectory() as out:
        args = config(
            output_dir=out,
            use_cpu=not options.cuda,
            bf16=options.cuda,
            activation_checkpointing=False,
            learning_rate=1e-9,
            lr_scheduler_type="constant",
            max_steps=options.batches * STEPS_A_BATCH,
            per_device_train_batch_size=options.batch // STEPS_A_BATCH,
            steps_per_generation=STEPS_A_BATCH,
            num_generations=16,
            max_completion_length=options.tokens or task.max_completion_length,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            seed=0,
            **more,
        )
        made = trainer(
            AutoModelForCausalLM.from_pretrained(path),
            task.reward,
            args=args,
            train_dataset=Dataset.from_list(task.train(0)),
            processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
            callbacks=[Turns()],
        )
        made.remove_callback(PrinterCallback)
        made.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=150, help="generated batches of each trainer")
    parser.add_argument("--batch", type=int, default=256, help="completions a generated batch")
    parser.add_argument("--model", help="a folder; the embedded model without it")
    parser.add_argument("--tokens", type=int, help="of an answer at most; the task's own without it")
    parser.add_argument("--cuda", action="store_true", help="on a GPU, in bf16")
    report(take_turns(KINDS, parser.parse_args()))


def take_turns(kinds, options):
    """(CPU seconds, wall seconds) of each generated batch, by trainer."""
    context, pipes, workers = mp.get_context("spawn"), {}, []
    for kind in kinds:
        pipes[kind], theirs = context.Pipe()
        workers.append(context.Process(target=child, args=(kind, options, theirs), daemon=True))
        workers[-1].start()
    times = {kind: [] for kind in pipes}
    for turn in range(options.batches):
        for kind in list(pipes) if turn % 2 else reversed(list(pipes)):
            pipes[kind].send("go")
            times[kind].append(pipes[kind].recv())
    for worker in workers:
        worker.join()
    return times


def report(times):
    print(made(versions("torch", "trl")))
    print(f"{'trainer':12}{'CPU ms per step':>15}{'wall ms per step':>16}{'CPU ratio to TRL (median of pairs)':>38}")
    result = {}
    for kind, rows in times.items():
        cpu, wall = ([row[i] / STEPS_A_BATCH * 1e3 for row in rows[WARM_UP:]] for i in (0, 1))
        pairs = [a[0] / b[0] for a, b in zip(rows[WARM_UP:], times["trl"][WARM_UP:], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        result[kind] = {"cpu_ms": statistics.median(cpu), "ratio": middle, "quartiles": [low, high]}
        spread = f"{middle:.3f}  (quartiles {low:.3f} {high:.3f})"
        print(f"{kind:12}{statistics.median(cpu):15.2f}{statistics.median(wall):16.2f}{spread:>38}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
