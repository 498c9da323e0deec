"""A small word-level model, created for some environments and trained on the spot: no pretrained weights, no download.

A Qwen3 causal language model with random weights and one token a word, for environments whose vocabulary is closed. It
is trained on demonstrations by :func:`isentropic.models.warmup.warm_up`.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..tasks.environments import EnvironmentTask, demonstrate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

SPECIAL = ("<pad>", "<eos>", "<unk>")
PUNCTUATION = ["\n", *(c for c in map(chr, range(33, 127)) if not c.isalpha())]
# A line break, a word, a digit, or one punctuation mark; other white space is dropped.
PIECE = r"\n|[A-Za-z][A-Za-z'\-]*|[0-9]|[^\sA-Za-z0-9]"


def word_tokenizer(words: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Return a tokenizer with one token a word, small and capital letters alike; an unknown word is `<unk>`.

    Example:
        >>> tokenizer = word_tokenizer(["go", "north"])
        >>> tokenizer.decode(tokenizer("Go north\\n>")["input_ids"])
        'go north \\n >'
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = sorted({word.lower() for word in words} - set(PUNCTUATION))
    ids = {token: i for i, token in enumerate([*SPECIAL, *PUNCTUATION, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def words_of(tasks: Sequence[EnvironmentTask], seed: int = 0) -> set[str]:
    """The words of tasks: a task's own list if it has one, and those of demonstrations with and without noise."""
    words: set[str] = set()
    for task in tasks:
        words |= set(task.words()) if task.words else set()
        environment = task.make()
        for row in task.train(seed):
            for noise in (0.0, 0.5, 0.9):
                turns, _ = demonstrate(task, row, environment, noise, seed)
                words |= set(re.findall(PIECE, "".join(text for text, _ in turns).lower()))
    return words


def word_model(
    tasks: Sequence[EnvironmentTask], *, hidden: int = 64, layers: int = 3, heads: int = 4, seed: int = 0
) -> tuple["Qwen3ForCausalLM", "PreTrainedTokenizerFast"]:
    """Return a model with random weights, and the tokenizer of the words of all tasks.

    Args:
        tasks: environments that give advice.
        hidden: width d, a multiple of twice the heads.
        layers, heads: depth, and attention heads a layer.
        seed: of the weights.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = word_tokenizer(words_of(tasks))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=hidden // heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        return Qwen3ForCausalLM(config).float(), tokenizer
