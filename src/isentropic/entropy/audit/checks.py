"""The checks that make findings from plain tensors, without a model."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .casts import from_logits, rounded, sequence_error
from .findings import CLIP, VISIBLE, Clip, Finding, grade, grade_entropy

LOW_PRECISION = (torch.bfloat16, torch.float16)
# How configs of mixture-of-experts models name the number of experts, and where they nest the language model.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
SAMPLER_HEAD = """vLLM --hf-overrides '{"head_dtype":"float32"}', SGLang --enable-fp32-lm-head"""


def rms(x: Tensor) -> float:
    """Root mean square; 0 of an empty tensor."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def clipped_share(error: Tensor, clip: Clip) -> float:
    """The share of ratios that an error of log-ratios alone pushes outside the clip."""
    if not error.numel():
        return 0.0
    if clip.length > 1:
        generator = torch.Generator().manual_seed(0)
        return sequence_error(error.cpu(), clip.length, 512, (-clip.low, clip.high), generator).outside
    ratio = error.double().exp()
    return ((ratio < 1 - clip.low) | (ratio > 1 + clip.high)).double().mean().item()


def describe_error(nats: float, clipped_frac: float, clip: Clip) -> str:
    """An error in words."""
    unit, low, high = f"sequences of {clip.length}" if clip.length > 1 else "tokens", 1 - clip.low, 1 + clip.high
    return f"{nats:.2g} nats rms; alone it pushes {clipped_frac:.2%} of {unit} out of [{low:g}, {high:g}]"


def effective_dtype(x: Float[Tensor, "..."]) -> torch.dtype:
    """The dtype that x was last rounded to: bf16 or fp16 if it represents every value exactly, else the dtype of x.

    >>> effective_dtype(torch.rand(99).bfloat16().float()), effective_dtype(torch.rand(99))
    (torch.bfloat16, torch.float32)
    """
    if x.unique().numel() >= 8:
        for dtype in LOW_PRECISION:
            if torch.equal(rounded(x, dtype), x):
                return dtype
    return x.dtype


def cast_effect(
    logits: Float[Tensor, "n v"],
    ids: Int[Tensor, " n"],
    place: str,
    dtype: torch.dtype,
    temperature: float = 1.0,
    clip: Clip = CLIP,
) -> tuple[float, float]:
    """Measure the error that rounding at one place makes with these logits.

    Args:
        logits: [n v] float64.
        ids: [n] sampled tokens.
        place: ``logits``, ``log_softmax`` or ``logp``.
        dtype: the dtype that values are rounded to.
        temperature: the sampling temperature.
        clip: the clip that errors of the ratio are compared with.

    Returns:
        Root mean square error of log π, nats; and the share of tokens whose ratio is pushed outside the clip if both
        sides are rounded and the logits have moved by 1 % of their spread in between.

    >>> cast_effect(torch.zeros(8, 4).double(), torch.zeros(8, dtype=torch.int64), "logits", torch.bfloat16)
    (0.0, 0.0)
    """
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    spread = logits.masked_fill(~logits.isfinite(), 0.0).std(-1, keepdim=True)
    errors = []
    for z in (logits, logits + 0.01 * spread * noise.to(logits.device)):
        exact, _ = from_logits(z, ids, (), dtype, temperature)
        errors.append(from_logits(z, ids, (place,), dtype, temperature)[0] - exact)
    return rms(errors[0]), clipped_share(errors[1] - errors[0], clip)


def entropy_findings(
    entropy: Float[Tensor, " n"] | None, exact: Float[Tensor, " n"], where: str = "head", explained: float = 0.0
) -> list[Finding]:
    """Find missing, zero or non-finite entropies, and errors above ``explained``, the error of known casts.

    >>> entropy_findings(torch.zeros(3), torch.full((3,), 0.7))[0].code
    'entropy_zero'
    """
    mean = exact.mean().item() if exact.numel() else 0.0
    remedy = "let the head compute the exact entropy of each row in fp32; isentropic.token_entropy does"
    if entropy is None:
        return [Finding("serious", "entropy_none", "no entropy is returned", where, f"{mean:.3g} nats", remedy, mean)]
    error = rms(entropy - exact)
    if not bool(entropy.isfinite().all()):
        code, what = "entropy_nonfinite", "entropies are not finite"
    elif bool((entropy == 0).all()) and mean > VISIBLE:
        code, what = "entropy_zero", "every entropy is exactly 0"
    elif error > max(VISIBLE, explained):
        code, what = "entropy_wrong", "entropies are not those of the rows"
    else:
        return []
    shift = (entropy - exact).mean().item()
    effect = f"true mean {mean:.3g} nats per token, {error:.2g} nats rms off, {shift:+.2g} on average"
    return [Finding(grade_entropy(shift, mean), code, what, where, effect, remedy, error)]


def target_findings(
    logits: Float[Tensor, "n v"], temperature: float, target: str | None, where: str = "sampling"
) -> list[Finding]:
    """Note that a target is held at a sampling temperature other than 1, and what entropy is at 1.

    Args:
        logits: [n v] float64, before the temperature.
        temperature: of sampling, at which entropy is read.
        target: as the recipe names it; None finds nothing.
        where: place named in the finding.

    >>> z = torch.tensor([[0.0, 1.0, 3.0]]).double()
    >>> [f.code for f in target_findings(z, 0.6, "80%")], target_findings(z, 1.0, "80%"), target_findings(z, 0.6, None)
    (['sampling_temperature'], [], [])
    """
    if target is None or temperature == 1 or not len(logits):
        return []
    ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    at, at_one = (from_logits(logits, ids, temperature=t)[1].mean().item() for t in (temperature, 1.0))
    what = f"the target, {target}, is held at sampling temperature {temperature:g}, not 1"
    effect = f"mean entropy is {at:.3g} nats per token at temperature {temperature:g}, and {at_one:.3g} at 1"
    remedy = "sample at temperature 1, or read entropies and target as those of the tempered policy"
    return [Finding("note", "sampling_temperature", what, where, effect, remedy)]


def ratio_findings(
    logp: Float[Tensor, " n"],
    logp_again: Float[Tensor, " n"],
    logp_old: Float[Tensor, " n"] | None,
    clip: Clip = CLIP,
    where: str = "scoring",
) -> list[Finding]:
    """Check that the ratio is 1 before the first update: two passes agree, and old log-probs are the current ones.

    >>> ratio_findings(torch.zeros(3), torch.zeros(3), torch.full((3,), 0.5))[0].code
    'stale_logp'
    """
    pairs = [("dropout", "two scoring passes over the same tokens differ", logp_again)]
    if logp_old is not None:
        pairs.append(("stale_logp", "old log-probs are not the current ones though nothing was updated", logp_old))
    remedies = {
        "dropout": "score without dropout: disable_dropout=True, and attention_dropout=0 in the model's config",
        "stale_logp": "compute old log-probs with the weights, temperature and dtype that the loss scores with",
    }
    for code, what, logp_other in pairs:
        nats, clipped_frac = rms(logp - logp_other), clipped_share(logp - logp_other, clip)
        if nats >= VISIBLE or math.isnan(nats):
            effect = f"at step 0 {describe_error(nats, clipped_frac, clip)}"
            return [Finding(grade(nats, clipped_frac), code, what, where, effect, remedies[code], nats, clipped_frac)]
    return []


def shape_findings(
    logp: Float[Tensor, " n"], logp_other: Float[Tensor, " n"], clip: Clip = CLIP, where: str = "scoring"
) -> list[Finding]:
    """Check that log-probs do not depend on the micro-batch: the same tokens in two sizes and paddings.

    Serious if the difference alone pushes one ratio in a thousand out of the clip, a warning if it moves one in a
    thousand by more than 1e-3, else a note.

    Args:
        logp: [n] nats, scored in one micro-batch.
        logp_other: [n] nats, of the same tokens and weights, scored in micro-batches of another shape.
        clip: the clip that errors of the ratio are compared with.
        where: place named in the findings.

    >>> shape_findings(torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 0.01]))[0].severity
    'warning'
    """
    error = (logp - logp_other).double()
    nats, clipped_frac = rms(error), clipped_share(error, clip)
    if nats < VISIBLE:
        return []
    moved = (error.expm1().abs() > 1e-3).double().mean().item()
    severity = "serious" if clipped_frac >= 1e-3 or math.isnan(nats) else "warning" if moved >= 1e-3 else "note"
    effect = (
        f"{describe_error(nats, clipped_frac, clip)}; {error.abs().max().item():.2g} nats at most; "
        f"{moved:.2%} of on-policy ratios would be off 1 by more than 1e-3"
    )
    what = "the micro-batch shape changes log-probs: the same tokens score differently alone and in a batch"
    remedy = "score old and current log-probs in one micro-batch size, packing and padding, or in fp32"
    return [Finding(severity, "batch_shape", what, where, effect, remedy, nats, clipped_frac)]


def num_experts(config: Any) -> int:
    """The number of routed experts that a model's config names, the language model's inside it included; 0 if dense.

    >>> from types import SimpleNamespace
    >>> num_experts(SimpleNamespace(text_config=SimpleNamespace(num_local_experts=8))), num_experts(None)
    (8, 0)
    """
    found = [getattr(config, name, None) or 0 for name in EXPERTS]
    counts = [max(x) if isinstance(x, list | tuple) else int(x) for x in found]
    counts += [num_experts(inner) for name in _NESTED if (inner := getattr(config, name, None)) is not None]
    largest = max(counts)
    return largest if largest > 1 else 0


def routing_findings(config: Any, replayed: bool = False, where: str = "router") -> list[Finding]:
    """Name a mixture of experts whose routes are not replayed: sampler and trainer may take different experts.

    The effect is not measured here: where the sampler's log-probs are given, ``sampler_findings`` does.

    Args:
        config: the model's, as transformers has it; None finds nothing.
        replayed: whether the trainer takes the experts that the sampler took.
        where: place named in the findings.

    >>> from types import SimpleNamespace
    >>> [f.code for f in routing_findings(SimpleNamespace(num_experts=64))]
    ['moe_routing']
    """
    experts = num_experts(config)
    if replayed or not experts:
        return []
    what = f"mixture of {experts} experts without router replay: sampler and trainer may route a token differently"
    effect = "not measured here; a token that changes experts moves its log-prob by more than rounding does"
    remedy = (
        "replay the sampler's routes where the engine can (verl on Megatron or VeOmni: router_replay.mode=R3), "
        "or correct by the ratio of trainer to sampler"
    )
    return [Finding("warning", "moe_routing", what, where, effect, remedy)]


def fitted_temperature(logits: Float[Tensor, "n v"], ids: Int[Tensor, " n"], logp: Float[Tensor, " n"]) -> float:
    """Fit the temperature in [1/8, 8] at which the logits come nearest to these log-probs.

    >>> z = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]]).double()
    >>> round(fitted_temperature(z, torch.tensor([1, 2]), (z / 0.7).log_softmax(-1)[[0, 1], [1, 2]]), 3)
    0.7
    """
    logits, ids, logp = logits[:256], ids[:256], logp[:256]
    low, high = -math.log(8), math.log(8)
    for _ in range(4):
        grid = torch.linspace(low, high, 17).tolist()
        errors = [rms(from_logits(logits, ids, temperature=math.exp(t))[0] - logp) for t in grid]
        best = grid[errors.index(min(errors))]
        low, high = best - (high - low) / 16, best + (high - low) / 16
    return math.exp(best)


def kept_tokens(
    logits: Float[Tensor, "n v"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Bool[Tensor, "n v"]:
    """Mark the tokens that remain after top-k, then top-p, then min-p; 0, 1 and 0 keep all.

    >>> kept_tokens(torch.tensor([[0.6, 0.3, 0.1]]).log(), top_p=0.7)
    tensor([[ True,  True, False]])
    """
    z = logits / temperature
    if top_k:
        z = z.masked_fill(z < z.topk(min(top_k, z.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        p, order = z.softmax(-1).sort(-1, descending=True)
        excluded = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, p.cumsum(-1) - p >= top_p)
        z = z.masked_fill(excluded, -math.inf)
    p = z.softmax(-1)
    return p >= min_p * p.amax(-1, keepdim=True) if min_p else p > 0


def truncation_findings(
    logits: Float[Tensor, "n v"],
    kept: Bool[Tensor, "n v"],
    temperature: float = 1.0,
    clip: Clip = CLIP,
    where: str = "sampler",
) -> list[Finding]:
    """Measure the effect of sampling from a kept set S: with ``Z = Σ_S π`` the true ratio to the sampler is Z, not 1.

    The sampled estimate of entropy becomes ``E_q[−log π]`` with ``q = π/Z`` on S, which is never above ``H(π)``.

    >>> truncation_findings(torch.zeros(2, 4).double(), torch.tensor([[True, True, True, False]] * 2))[0].nats
    0.2877
    """
    logp = (logits / temperature).log_softmax(-1)
    p, finite_logp = logp.exp(), logp.masked_fill(logp.isinf(), 0.0)
    kept_mass = (p * kept).sum(-1)
    entropy_error = (
        (-(p * kept * finite_logp).sum(-1) / kept_mass + (p * finite_logp).sum(-1)).mean().item()
        if len(kept_mass)
        else 0.0
    )
    nats, clipped_frac = -kept_mass.log().mean().item() if len(kept_mass) else 0.0, clipped_share(kept_mass.log(), clip)
    if nats < VISIBLE:
        return []
    effect = (
        f"{1 - kept_mass.mean().item():.1%} of the mass is cut: the ratio to the sampler is off by {nats:.2g} nats "
        f"on average, {clipped_frac:.1%} of ratios would leave the clip; the sampled entropy estimate is "
        f"{entropy_error:+.2g} nats off"
    )
    what = "truncated sampling (top-k, top-p, min-p): tokens come from another policy than is scored"
    remedy = "sample with top_k=0, top_p=1 and min_p=0; shape entropy by temperature or by a target instead"
    return [Finding(grade(nats, clipped_frac), "truncation", what, where, effect, remedy, nats, clipped_frac)]


def sampler_findings(
    logits: Float[Tensor, "n v"],
    ids: Int[Tensor, " n"],
    logp: Float[Tensor, " n"],
    logp_sampler: Float[Tensor, " n"],
    temperature: float = 1.0,
    kept: Bool[Tensor, "n v"] | None = None,
    clip: Clip = CLIP,
    where: str = "sampler",
) -> list[Finding]:
    """Compare sampler and trainer: another temperature, or different log-probs for the same distribution.

    Args:
        logits: [n v] float64, before the temperature.
        ids: [n] sampled tokens.
        logp, logp_sampler: [n] of the trainer and of the sampler, nats; tokens whose ``logp_sampler`` is not finite are
            left out.
        temperature: the temperature of the trainer's log-probs.
        kept: [n v] true for the tokens that truncation kept; the comparison corrects for its known effect.
        clip: the clip that errors of the ratio are compared with.
        where: place named in the findings.

    >>> z, ids = torch.randn(64, 9).double() * 3, torch.zeros(64, dtype=torch.int64)
    >>> cold = from_logits(z, ids, temperature=0.5)[0]
    >>> sampler_findings(z, ids, from_logits(z, ids)[0], cold)[0].code
    'temperature'
    """
    finite = logp_sampler.isfinite()
    logits, ids, logp, logp_sampler = logits[finite], ids[finite], logp[finite], logp_sampler[finite]
    if kept is not None:
        logits, untruncated = logits.masked_fill(~kept[finite], -math.inf), logits
        logp = logp + (
            from_logits(logits, ids, (), temperature=temperature)[0]
            - from_logits(untruncated, ids, (), temperature=temperature)[0]
        ).to(logp.dtype)
    nats, clipped_frac = rms(logp - logp_sampler), clipped_share(logp - logp_sampler, clip)
    if nats < VISIBLE:
        return []
    fitted = fitted_temperature(logits, ids, logp_sampler)
    residual = rms(from_logits(logits, ids, temperature=fitted)[0] - logp_sampler)
    effect = describe_error(nats, clipped_frac, clip)
    if residual < nats / 5 and abs(fitted / temperature - 1) > 1e-3:
        what = f"tokens are sampled at temperature {fitted:.3g} and scored at {temperature:.3g}"
        remedy = "give sampler and scoring one temperature; in TRL set temperature, not generation_kwargs"
        return [Finding(grade(nats, clipped_frac), "temperature", what, where, effect, remedy, nats, clipped_frac)]
    what = "sampler and trainer give different log-probs to the same tokens"
    remedy = (
        f"run both in one precision, the head's logits in fp32 ({SAMPLER_HEAD}), and with the same penalties, "
        "or correct by the ratio of the two"
    )
    return [Finding(grade(nats, clipped_frac), "sampler_mismatch", what, where, effect, remedy, nats, clipped_frac)]


def mask_findings(
    mask: Shaped[Tensor, "b t"],
    generated: Shaped[Tensor, "b t"],
    padding: Shaped[Tensor, "b t"],
    entropy: Float[Tensor, "b t"],
    where: str = "mask",
) -> list[Finding]:
    """Check that the mask counts every token that the policy generated, and neither padding nor other tokens.

    Args:
        mask: [b t] non-zero where a token counts.
        generated: [b t] non-zero where the policy generated it.
        padding: [b t] non-zero where there is no token at all.
        entropy: [b t] nats; its mean gives the effect.
        where: place named in the findings.

    >>> one = torch.tensor([[1, 1, 0]])
    >>> mask_findings(torch.ones(1, 3), one, 1 - one, torch.rand(1, 3))[0].code
    'padding_counted'
    """
    is_counted, is_generated, is_padding = mask.bool(), generated.bool(), padding.bool()
    entropy_shift = abs((entropy[is_counted].mean() - entropy[is_generated].mean()).item())
    remedy = "count exactly the tokens that the policy sampled, its end-of-text token included"
    cases = {
        "padding_counted": (is_counted & is_padding, "the mask counts padding"),
        "wrong_mask": (
            (is_counted & ~is_generated & ~is_padding) | (is_generated & ~is_counted),
            "the mask is not the generated tokens",
        ),
    }
    return [
        Finding(
            "serious",
            code,
            what,
            where,
            f"{int(wrong.sum())} of {wrong.numel()} positions; mean entropy off by {entropy_shift:.2g} nats",
            remedy,
            entropy_shift,
        )
        for code, (wrong, what) in cases.items()
        if bool(wrong.any())
    ]
