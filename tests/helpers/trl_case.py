"""What the TRL tests share: a random tiny model, a task, and a trainer in one call. Also a script for torchrun."""

import json
import os
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
    return {**VARIANTS.get(VARIANT, {}), **settings} if ours else settings


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    _rank(sys.argv[1])
