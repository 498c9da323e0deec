"""What the TRL tests share: a random tiny model, a task, and a trainer in one call. Also a script for torchrun."""

import json
import os
import re
import sys
from pathlib import Path

import torch

BASE = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "per_device_train_batch_size": 16,
    "steps_per_generation": 4,
    "num_generations": 8,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": [],
    "seed": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
}
# What most tests need no run to do at its start and at its end.
QUIET = {"audit": False, "report": False}
# `make test-heads` runs the suite under each of these: TRL's head, one that cannot be replaced, rare explanations.
VARIANTS = {
    "trl": {"head": "trl"},
    "fixed": {},
    "explain-2": {"explain_every": 2},
    "explain-10": {"explain_every": 10},
}
VARIANT = os.environ.get("TRL_VARIANT", "")
OTHER_HEAD = VARIANT in ("trl", "fixed")


def _of_variant(config, settings):
    """The settings of the variant under test, for a config of ours that does not set them itself."""
    from isentropic.engines.trl import EntropyControlConfig
    from isentropic.engines.trl import head as module

    if VARIANT == "fixed":
        module.replaceable_head = lambda model: False
    ours = issubclass(config, EntropyControlConfig)
    return {**QUIET, **VARIANTS.get(VARIANT, {}), **settings} if ours else settings


def parts(seed=0):
    """A random model that ends its answers now and then, and its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from isentropic.models.tiny import character_tokenizer

    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model, tokenizer


def save_model(path):
    model, tokenizer = parts()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def share_of_digits(completions, **columns):
    """A reward that varies from answer to answer."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def make(trainer, config, out, steps=8, model=None, reward=share_of_digits, peft_config=None, **settings):
    from datasets import Dataset
    from transformers import PrinterCallback

    fresh, tokenizer = parts()
    args = config(output_dir=str(out), max_steps=steps, **{**BASE, **_of_variant(config, settings)})
    rows = Dataset.from_list([{"prompt": f"{i % 90 + 10}>"} for i in range(64)])
    made = trainer(
        model or fresh, reward, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )
    made.remove_callback(PrinterCallback)
    return made


def train(*args, **kwargs):
    """Make a trainer and train it at once: making one sets the seed."""
    made = make(*args, **kwargs)
    made.train()
    return made


def documented():
    """Names in the table of metrics.jsonl, as patterns."""
    from isentropic.runs import record

    text = record.__doc__.partition("A row of metrics.jsonl")[2].partition("audit.json (missing")[0]
    return re.findall(r"^``([\w/]+)``", text, re.MULTILINE)


def undocumented(row):
    """Fields of a row of metrics.jsonl that its table does not name."""
    known = re.compile("|".join(re.sub(r"_N$", r"_[1-8]", name) for name in [*documented(), "step", "seconds"]))
    return [name for name in row if not known.fullmatch(name)]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _rank(out):
    """Two ranks: train, keep what the first step saw, and write what each rank believes."""
    from isentropic.control.thermostat import to_json
    from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer

    seen = []

    class Spy(IsentropicTrainer):
        def _compute_loss(self, model, inputs):
            if self.model.training and self.state.global_step == 0:
                seen.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
            return super()._compute_loss(model, inputs)

    trainer = train(
        Spy,
        IsentropicConfig,
        out,
        steps=8,
        recipe="loop",
        knob="zeta",
        controller="predictive",
        target="1.0",
        recipe_options={"every": 1},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
    )
    assert trainer.accelerator.num_processes == 2, "this case needs two processes"
    rank = trainer.accelerator.process_index
    torch.save(seen, Path(out) / f"seen-{rank}.pt")
    state = {"state": to_json(trainer.loop.state), "world": trainer.accelerator.num_processes}
    (Path(out) / f"state-{rank}.json").write_text(json.dumps(state))


AUTO = {
    "recipe": "loop",
    "knob": "zeta",
    "target": "auto:success:memory=2:failing=10%:rate=0.1:settle=25%",
    "recipe_options": {"every": 1},
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "save_strategy": "steps",
    "save_steps": 4,
}


def _resumed_ranks(out):
    """Two ranks under an automatic target: a whole run, and one that is continued; what each rank ends with."""
    from isentropic.control.thermostat import to_json
    from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer

    ends, folder = [], Path(out) / "run"
    for checkpoint in (None, str(folder / "checkpoint-4")):
        trainer = make(IsentropicTrainer, IsentropicConfig, folder, steps=8, **AUTO)
        if checkpoint is None and trainer.accelerator.is_main_process:
            trainer.loop.tell_held_out(3.0, 4.0)
        trainer.train(resume_from_checkpoint=checkpoint)
        total = sum(float(x.double().sum()) for x in weights(trainer).values())
        ends.append({"state": to_json(trainer.loop.state), "weights": total.hex()})
    rank = trainer.accelerator.process_index
    (Path(out) / f"ends-{rank}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"rank": _rank, "resumed": _resumed_ranks}[sys.argv[2] if len(sys.argv) > 2 else "rank"](sys.argv[1])
