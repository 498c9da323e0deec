"""What share of a training step goes into explaining it? On the embedded task and at SmolLM2's size, one thread.

The real trainer trains; the calls that explaining adds (weights of the loss, moments, attribution, gain, writing them
out) are timed inside it, step by step, with the fused head, which brings the moments, and with TRL's, which needs a
second product for them. At SmolLM2's size the model is random, in fp32: 30 layers, width 576, vocabulary 49,152.

    python bench/explain.py [--size embedded smollm2]
"""

import argparse
import os
import tempfile
import time

from results import ONE_THREAD, made, save, table, versions

os.environ |= ONE_THREAD
SIZES = {
    "embedded": {"batch": 128, "tokens": None, "warm": 4, "steps": 56},
    "smollm2": {"batch": 8, "tokens": 24, "warm": 1, "steps": 24},
}


def model_of(size):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from isentropic.models import resolve_model

    path = resolve_model("tiny")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if size == "embedded":
        return AutoModelForCausalLM.from_pretrained(path), tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


def shares(size, head, steps):
    """CPU seconds of each step, and of what explaining it took."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
    from isentropic.engines.trl.explain import Explainer
    from isentropic.tasks import load_task

    spent, rows = [0.0], []

    def timed(call):
        def run(*args, **kwargs):
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent[0] += time.process_time() - began

        return run

    class Timed(IsentropicTrainer):
        def training_step(self, *args, **kwargs):
            began, spent[0] = time.process_time(), 0.0
            out = super().training_step(*args, **kwargs)
            rows.append((time.process_time() - began, spent[0]))
            return out

    setting, task = SIZES[size], load_task("expr")
    model, tokenizer = model_of(size)
    native = {name: getattr(Explainer, name) for name in ("add", "close")}
    for name, call in native.items():
        setattr(Explainer, name, timed(call))
    with tempfile.TemporaryDirectory() as out:
        args = IsentropicConfig(
            output_dir=out,
            recipe="isentropic",
            controller="predictive",
            target="initial",
            head=head,
            explain_every=1,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            learning_rate=1e-9,
            max_steps=steps,
            per_device_train_batch_size=setting["batch"],
            steps_per_generation=4,
            num_generations=8,
            max_completion_length=setting["tokens"] or task.max_completion_length,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            seed=0,
        )
        data = Dataset.from_list(task.train(0))
        trainer = Timed(model, task.reward, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for name, call in native.items():
        setattr(Explainer, name, call)
    return rows


def summary(rows, warm):
    """Seconds a step and the share of explaining, over all steps after the first batches, and the range by batch.

    Generation happens in one step of four, the comparison of the fused head in one of ten: totals weigh both rightly.
    """
    counted = rows[warm : warm + (len(rows) - warm) // 20 * 20]
    batches = [counted[i : i + 4] for i in range(0, len(counted), 4)]
    part = [sum(r[1] for r in batch) / sum(r[0] for r in batch) for batch in batches]
    step, spent = (sum(r[i] for r in counted) for i in (0, 1))
    return step / len(counted), spent / step, min(part), max(part)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    options = parser.parse_args()
    import torch

    from isentropic.models.loading import quiet

    quiet()
    torch.set_num_threads(1)
    rows = []
    for size in options.size:
        for head in ("auto", "trl"):
            step, part, low, high = summary(shares(size, head, SIZES[size]["steps"]), SIZES[size]["warm"] * 4)
            name = {"auto": "fused", "trl": "TRL's"}[head]
            rows.append([size, name, f"{step:.3f}", f"{part:.2%}", f"{low:.2%}..{high:.2%}"])
            print(*rows[-1], flush=True)
    head = ["size", "head", "CPU seconds per step", "share of explaining it", "lowest..highest"]
    line = made(versions("torch", "trl"), "seed 0", "totals over steps, range over generated batches of 4 steps")
    save("explain-table.md", f"{table(head, rows)}\n\n{line}.\n")
    print(table(head, rows))


if __name__ == "__main__":
    main()
