"""Where a completion ends besides the end of the sequence: at a line break, for tasks whose answer is one line.

TRL generates with, masks by, and counts as not truncated whatever is in its trainer's `eos_token_ids`: a token that
holds a line break becomes one of them. It is generated, scored and trained on, as an end of sequence is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=4)
def line_breaks(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of all tokens whose text holds a line break; byte-pair vocabularies have hundreds."""
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return tuple(i for i, text in enumerate(texts) if "\n" in text and i not in special)


def ends(tokenizer: Any, model: Any) -> list[int]:
    """Return the ids by which a model ends a sequence: the tokenizer's, then those of its generation config."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
    return [i for i in dict.fromkeys(found) if i is not None]


def stop_at(trainer: Any, ids: Sequence[int]) -> None:
    """Have a GRPO trainer end completions at these tokens too; none of them leaves it as it was made.

    The model's own generation config stays, so that a checkpoint of the run ends where the model ended before. vLLM
    gets the tokens by `stop_token_ids`.
    """
    if not hasattr(trainer, "_ends_of_model"):
        if not ids:
            return
        trainer._ends_of_model = list(trainer.eos_token_ids)
    every = list(dict.fromkeys([*trainer._ends_of_model, *ids]))
    trainer.eos_token_ids = every
    if getattr(trainer, "generation_config", None) is not None:
        trainer.generation_config.eos_token_id = every
        trainer.generation_kwargs["eos_token_id"] = every
    if getattr(trainer, "vllm_generation", None) is not None:
        trainer.vllm_generation.generation_kwargs["stop_token_ids"] = list(ids)


def limit_to(trainer: Any, tokens: int) -> None:
    """Have a GRPO trainer cut completions at so many tokens from its next generated batch on."""
    trainer.max_completion_length = trainer.args.max_completion_length = tokens
    if getattr(trainer, "generation_config", None) is not None:
        trainer.generation_config.max_new_tokens = trainer.generation_kwargs["max_new_tokens"] = tokens
    if getattr(trainer, "vllm_generation", None) is not None:
        trainer.vllm_generation.max_completion_length = tokens
