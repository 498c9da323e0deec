"""The embedded tiny model: a language model that is trained on the spot, in less than a minute, on one thread.

A Qwen3 causal language model with a character tokenizer, warm-started by supervised learning on noisy demonstrations of
`isentropic.tasks.expressions`. It is a good start for reinforcement learning: about a third of its samples are right,
the rest is noise that rewards can remove, and its entropy is high. Nothing is downloaded.

The demonstrations never contain a held-out target, neither as value nor as noise, and the model does as well on them as
on the others. Default settings: 166,624 parameters, fp32, 39 s and as many CPU seconds on one thread (AMD EPYC with
AVX-512, torch 2.13). Evaluated on all held-out rows, 16 samples each at temperature 1; seeds 1 and 2 have .36 and .31:

| task         | pass@1 | pass@16 | nats per token | distinct right of 16 |
|--------------|--------|---------|----------------|----------------------|
| `expr`       | .37    | 1.00    | 1.07           | 5.6                  |
| `expr-digit` | .20    | .91     | 1.08           | 2.9                  |

A policy that is always right and draws uniformly among all right answers has 0.83 nats per token there. Plain
group-relative policy gradient on `expr`, 4 prompts x 16 samples per step at 1e-4, one seed: reward .80 in steps 401-500
and .88 in steps 901-1000, at 0.60 and 0.44 nats per token.
"""

import hashlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..runs.text import duration
from ..tasks import Task
from ..tasks.expressions import (
    DIGITS,
    HELD_OUT,
    OPERATORS,
    TARGETS,
    enumerate_expressions,
    expr,
    format_prompt,
)
from . import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

# Part of every directory name: increment it when the code below builds another model from the same settings.
RECIPE_VERSION = 2
SPECIAL = ("<pad>", "<eos>", "<unk>")
PAD, EOS = 0, 1
LOG_EVERY = 10.0  # seconds
MAX_LENGTH = 256
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
TOKEN_OF = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET])}
OPERANDS = 4
LENGTH = 2 * OPERANDS - 1


@dataclass(frozen=True)
class TinySettings:
    """The shape of the model, its demonstrations, and the supervised steps. Every field is part of the cache key.

    Args:
        hidden: width d; a multiple of `heads`, with an even quotient (rotary positions come in pairs).
        layers, heads: depth, and attention heads a layer.
        steps, batch: supervised steps, and demonstrations in each.
        lr: peak learning rate of AdamW, for embeddings and norms.
        matrix_lr: peak learning rate of Muon, for all other weights.
        noise: share of demonstrations in [0, 1] that show a random target, once `noise_from` of the steps are done.
        noise_from: share of the steps in [0, 1] with clean demonstrations. Noise from the start slows the learning of
            arithmetic; noise at the end hides it, and rewards uncover it again.
        hint: share of demonstrations in [0, 1] whose answer always uses the digit of the prompt, so that the related
            task `expr-digit` starts above 0.
        hard: weight in [0, 1], against 1, of the expressions that take long to learn: two products, or one at the end.
        seed: of weights, demonstrations and the final evaluation.
    """

    hidden: int = 64
    layers: int = 3
    heads: int = 4
    steps: int = 1500
    batch: int = 64
    lr: float = 0.01
    matrix_lr: float = 0.02
    noise: float = 0.25
    noise_from: float = 0.85
    hint: float = 0.5
    hard: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "steps", "batch", "lr", "matrix_lr"):
            value, default = getattr(self, name), getattr(type(self), name)
            if value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}; the default is {default}")
        for name in ("noise", "noise_from", "hint", "hard"):
            value, default = getattr(self, name), getattr(type(self), name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a share in [0, 1], got {value}; the default is {default}")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden must be a multiple of 2 x heads = {2 * self.heads}, got {self.hidden}; "
                f"{self.hidden - self.hidden % (2 * self.heads) + 2 * self.heads} is the next one"
            )


def tiny_model(settings: TinySettings = TinySettings(), *, rebuild: bool = False, progress: bool = True) -> Path:
    """Return the directory of the tiny model, building it first if the cache has none of these settings.

    The directory holds config.json, model.safetensors, the tokenizer, and warm_start.json with the settings and the
    figures of the final evaluation. It is in `$ISENTROPIC_CACHE`, else in `$XDG_CACHE_HOME/isentropic`, else in
    `~/.cache/isentropic`. It appears there complete or not at all; if two processes build it, one of them is kept.

    The number of steps is fixed and torch uses one thread meanwhile, so that the same settings give the same model on
    the same processor and torch.

    Args:
        settings: what to build.
        rebuild: build even if the cache has it, and replace that.
        progress: show progress and the final figures on stderr.

    Raises:
        ImportError: transformers is not installed.
    """
    home = cache_root() / f"tiny-{_fingerprint(settings)}"
    if _is_model(home) and not rebuild:
        return home
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("the tiny model needs transformers, which is not installed; pip install 'isentropic[trl]'")
    started = time.monotonic()
    with _one_thread(), torch.random.fork_rng(devices=[]):
        model = _new_model(settings)
        with _progress_bar(settings.steps, progress) as advance:
            _warm_start(model, settings, advance)
        figures = evaluate(model, expr, seed=settings.seed, rows=60)
    _publish(model, settings, figures, home, rebuild=rebuild)
    if progress:
        print(
            f"tiny model: pass@1 {figures['pass@1']:.2f}, {figures['entropy']:.2f} nats per token on held-out targets; "
            f"{duration(time.monotonic() - started)}, {home}",
            file=sys.stderr,
        )
    return home


def _fingerprint(settings: TinySettings) -> str:
    text = json.dumps({"recipe": RECIPE_VERSION, **asdict(settings)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_model(home: Path) -> bool:
    return (home / "config.json").is_file()


def character_tokenizer() -> "PreTrainedTokenizerFast":
    """Return the tokenizer: one token a character, printable ASCII and the line break; anything else is `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(TOKEN_OF, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def _new_model(settings: TinySettings) -> "Qwen3ForCausalLM":
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        vocab_size=len(TOKEN_OF),
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        # Texts of a dozen tokens: slower rotations would distinguish their positions less well.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float()


def _tokens(texts: list[str]) -> np.ndarray:
    """Return the token ids [n, length] of texts of one length."""
    return np.array([[TOKEN_OF[c] for c in text] for text in texts])


class Demonstrator:
    """The noisy demonstrator that the model imitates: it draws answers, and gives the odds of every next character.

    For a target and a digit, it answers with one of the target's expressions, drawn by weight; with probability
    `noise` it takes a random target instead. Learning from its odds q(. | prompt, characters so far) instead of the one
    character that it drew is the same objective with less variance: after 1,600 clean steps .79 of the samples are
    right instead of .66.

    The odds are masses of ranges: with each target's expressions sorted as texts, those with a common prefix are
    adjacent, so two look-ups in a cumulative sum weigh all of them. Held-out targets do not occur.
    """

    SPAN = 16**LENGTH  # of the codes of texts: four bits a character
    ANY = TARGETS  # the code of a random target

    def __init__(self, hint: float, hard: float) -> None:
        values, texts = enumerate_expressions(OPERANDS)
        self.asked = np.setdiff1d(np.arange(TARGETS), HELD_OUT)
        kept = np.isin(values, self.asked)
        values, texts = values[kept].astype(np.int64), texts[kept]
        rank = np.zeros(128, dtype=np.int64)
        for symbols in (DIGITS, OPERATORS):
            rank[[ord(c) for c in symbols]] = np.arange(1, len(symbols) + 1)
        codes = (rank[texts] << (4 * np.arange(LENGTH)[::-1])).sum(axis=1)
        order = np.argsort(values * self.SPAN + codes)
        self.texts, self.codes, values = texts[order], codes[order], values[order]

        products = self.texts[:, 1::2] == ord("*")
        weight = np.where((products.sum(axis=1) > 1) | products[:, -1], hard, 1.0)
        self.edges = np.concatenate([[0.0], np.cumsum(weight)])
        self.first = np.searchsorted(values, np.arange(TARGETS + 1))
        total = np.bincount(values, weights=weight, minlength=TARGETS)
        # P(expression | target) P(digit | expression) for all nine digits, first by target, then for a random one.
        uses = (self.texts[:, 0::2, None] == np.arange(ord("1"), ord("9") + 1)).mean(axis=1)
        joint = (weight / total[values])[:, None] * (hint * uses + (1 - hint) / 9)
        by_code = np.argsort(self.codes)
        self.keys = np.concatenate([values * self.SPAN + self.codes, self.ANY * self.SPAN + self.codes[by_code]])
        masses = np.concatenate([joint, joint[by_code] / len(self.asked)])
        self.masses = np.concatenate([np.zeros((1, 9)), np.cumsum(masses, axis=0)])
        self.hint = hint

    def draw(self, noise: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return shown targets [n], digits [n], and the rows [n] of the expressions that answer them."""
        num = len(noise)
        value = rng.choice(self.asked, num)
        low, high = self.edges[self.first[value]], self.edges[self.first[value + 1]]
        rows = np.searchsorted(self.edges, low + rng.random(num) * (high - low), side="right") - 1
        shown = np.where(rng.random(num) < noise, rng.choice(self.asked, num), value)
        operand = self.texts[rows, 2 * rng.integers(0, OPERANDS, num)] - ord("0")
        digit = np.where(rng.random(num) < self.hint, operand, rng.integers(1, 10, num))
        return shown, digit, rows

    def odds(self, place: int, noise: np.ndarray, shown: np.ndarray, digit: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return q [n, 9 digits or 3 operators] of the character at `place`, given those before it in the answers."""
        num_symbols = len(OPERATORS) if place % 2 else len(DIGITS)
        shift = 4 * (LENGTH - place)
        edges = (self.codes[rows] >> shift << shift)[:, None] + (np.arange(1, num_symbols + 2) << (shift - 4))

        def mass(target: np.ndarray, index: np.ndarray) -> np.ndarray:
            at = np.searchsorted(self.keys, target[:, None] * self.SPAN + edges[index])
            return np.diff(self.masses[at, digit[index, None] - 1], axis=1)

        q = (1 - noise)[:, None] * mass(shown, np.arange(len(rows)))
        noisy = np.flatnonzero(noise)
        q[noisy] += noise[noisy, None] * mass(np.full(len(noisy), self.ANY), noisy)
        return q / q.sum(axis=1, keepdims=True)


# The tokens of answers: digits, operators, and the end.
ANSWER_TOKENS = [*(TOKEN_OF[c] for c in DIGITS + OPERATORS), EOS]


def _demonstrations(settings: TinySettings) -> tuple[Tensor, Tensor]:
    """Return token ids [steps, batch, length], and for their answers q [steps, batch, answer, len(ANSWER_TOKENS)].

    Targets are uniform: drawn among all expressions, small targets would be nearly all there is.
    """
    rng = np.random.default_rng(settings.seed)
    demonstrator = Demonstrator(settings.hint, settings.hard)
    late = np.arange(settings.steps) >= settings.noise_from * settings.steps
    noise = np.repeat(np.where(late, settings.noise, 0.0), settings.batch)
    shown, digit, rows = demonstrator.draw(noise, rng)

    q = np.zeros((len(noise), LENGTH + 1, len(ANSWER_TOKENS)), dtype=np.float32)
    for place in range(LENGTH):
        columns = slice(9, 12) if place % 2 else slice(0, 9)
        q[:, place, columns] = demonstrator.odds(place, noise, shown, digit, rows)
    q[:, -1, -1] = 1.0

    prompts = _tokens([format_prompt(t, int(d)) for t in range(TARGETS) for d in DIGITS])
    token_of_code = np.array([TOKEN_OF.get(chr(code), PAD) for code in range(128)])
    ends = np.full((len(noise), 1), EOS)
    ids = np.concatenate([prompts[shown * 9 + digit - 1], token_of_code[demonstrator.texts[rows]], ends], axis=1)
    shape = (settings.steps, settings.batch)
    return torch.from_numpy(ids).unflatten(0, shape), torch.from_numpy(q).unflatten(0, shape)


class Muon:
    """Momentum with nearly orthogonal updates of every matrix, by five Newton-Schulz steps.

    Matrices of one shape are updated together, so that a step costs a few batched products. On these demonstrations it
    takes half the time of AdamW alone to the same pass rate.

    Reference: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", whose coefficients these
    are.
    """

    def __init__(self, params: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in params:
            groups.setdefault((min(p.shape), max(p.shape)), []).append(p)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in groups.items()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all matrices from their gradients, and clear the gradients."""
        for params, trace in self.groups:
            grads = [p.grad for p in params if p.grad is not None]
            assert len(grads) == len(params), "every matrix is used in every forward pass"
            grad = torch.stack([g.T if g.shape[0] > g.shape[1] else g for g in grads])
            trace.mul_(self.momentum).add_(grad)
            update = grad.add(trace, alpha=self.momentum)
            update /= update.norm(dim=(1, 2), keepdim=True) + 1e-7
            for _ in range(5):
                gram = update @ update.mT
                update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
            for p, matrix in zip(params, update, strict=True):
                tall = p.shape[0] > p.shape[1]
                scale = (p.shape[0] / p.shape[1]) ** 0.5 if tall else 1.0
                p.mul_(1 - lr * self.weight_decay).add_(matrix.T if tall else matrix, alpha=-lr * scale)
                p.grad = None


def _warm_start(model: "Qwen3ForCausalLM", settings: TinySettings, advance: Callable[[], None]) -> None:
    """Minimise the cross-entropy to the demonstrator's odds along its answers. `advance` is called after every step."""
    batches, odds = _demonstrations(settings)
    answer_tokens = torch.tensor(ANSWER_TOKENS)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    model.train()
    for i, (ids, q) in enumerate(zip(batches, odds, strict=True)):
        pace = min(1.0, (i + 1) / 50) * (1 - i / settings.steps)
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=LENGTH + 1).logits
        logp = logits.log_softmax(-1)[..., answer_tokens]
        (-(q * logp).sum(-1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = settings.lr * pace
        adam.step()
        adam.zero_grad()
        muon.step(settings.matrix_lr * pace)
        advance()
    model.eval()


@torch.inference_mode()
def evaluate(
    model: "Qwen3ForCausalLM", task: Task, *, samples: int = 16, rows: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Evaluate a model with the character tokenizer on the held-out rows of a task, at temperature 1.

    Args:
        model: on the CPU.
        task: with prompts of one length.
        samples: g answers per row.
        rows: how many of the held-out rows, from the first; None for all.
        seed: of the sampling.

    Returns:
        `pass@1`; `pass@g`; `entropy`, exact, in nats per generated token; `distinct`, the mean number of distinct right
        answers among g.
    """
    asked = task.heldout()[:rows]
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.from_numpy(_tokens([row["prompt"] for row in asked])).repeat_interleave(samples, 0)
    ids, alive = prompts, torch.ones(len(prompts), dtype=torch.bool)
    entropy, num_tokens = 0.0, 0
    for _ in range(task.max_completion_length):
        logp = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].log_softmax(-1)
        entropy -= float((logp.exp() * logp).sum(-1)[alive].sum())
        num_tokens += int(alive.sum())
        token = torch.multinomial(logp.exp(), 1, generator=generator)[:, 0].where(alive, PAD)
        ids = torch.cat([ids, token[:, None]], 1)
        alive &= token != EOS
    symbols = ["", "", "", *ALPHABET]
    texts = ["".join(symbols[i] for i in row) for row in ids[:, prompts.shape[1] :].tolist()]
    columns = {name: [row[name] for row in asked for _ in range(samples)] for name in asked[0] if name != "prompt"}
    right = np.array(task.reward(texts, **columns)).reshape(-1, samples)
    distinct = 0
    for start, row in zip(range(0, len(texts), samples), right, strict=True):
        group = texts[start : start + samples]
        distinct += len({task.normalise(text) for text, ok in zip(group, row, strict=True) if ok})
    return {
        "pass@1": float(right.mean()),
        f"pass@{samples}": float(right.max(axis=1).mean()),
        "entropy": entropy / num_tokens,
        "distinct": distinct / len(asked),
    }


def _publish(
    model: "Qwen3ForCausalLM", settings: TinySettings, figures: dict[str, float], home: Path, *, rebuild: bool
) -> None:
    """Write everything beside `home`, then rename: readers see a whole model or none."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".building-") as scratch:
        built = Path(scratch, "built")
        with _without_progress_bar():
            model.save_pretrained(built)
        character_tokenizer().save_pretrained(built)
        header = {"recipe": RECIPE_VERSION, "settings": asdict(settings), "heldout": figures}
        (built / "warm_start.json").write_text(json.dumps(header, indent=2) + "\n")
        if rebuild and home.exists():
            home.rename(Path(scratch, "replaced"))
        try:
            built.rename(home)
        except OSError:
            # Another process was faster; the same settings give the same model.
            if not _is_model(home):
                raise


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Switch the progress bars of transformers off."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextmanager
def _one_thread() -> Iterator[None]:
    # More threads make matrix products of this size slower, many times slower on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress_bar(steps: int, visible: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step: a bar on a terminal if rich is installed, or a line every 10 s."""
    if visible and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("building the tiny model, once", total=steps)
            yield lambda: bar.advance(task)
        return
    started = last = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if visible and now - last >= LOG_EVERY:
            last, left = now, (now - started) * (steps - done) / done
            print(f"building the tiny model: {done}/{steps} steps, eta {duration(left)}", file=sys.stderr)

    yield advance
