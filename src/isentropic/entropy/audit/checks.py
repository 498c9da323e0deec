"""Findings, and the checks on plain tensors that make them: no model is needed here."""

import math
from json import dumps
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .casts import from_logits, rounded, sequence_error

# From 1e-3 nats a log-prob leaves GSPO's band in short sequences; fp32 arithmetic stays far below 1e-5.
SERIOUS, VISIBLE = 1e-3, 1e-5
LOW = (torch.bfloat16, torch.float16)


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        severity: ``serious``, ``warning`` or ``note``.
        code: a stable name, such as ``logits_dtype``.
        what, where: one sentence, and the place.
        effect: what was measured, in words.
        remedy: what to change.
        nats: the measured error or mismatch, nats (root mean square over tokens unless ``effect`` says otherwise).
        clipped_frac: share of tokens that the clip would take for moved though the policy did not move so far.
    """

    severity: str
    code: str
    what: str
    where: str
    effect: str
    remedy: str
    nats: float | None = None
    clipped_frac: float | None = None


class Clip(NamedTuple):
    """The ratios an error is held against: ``[1 − low, 1 + high]``, of tokens, or of sequences of a length.

    A sequence's ratio is the geometric mean of its tokens', whose errors are taken to be independent.
    """

    low: float = 0.2
    high: float = 0.2
    length: int = 1


CLIP = Clip()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Report(NamedTuple):
    """What an audit saw: the findings, gravest first, what was looked at, and the figures that were measured."""

    findings: list[Finding]
    checked: dict[str, str]
    figures: dict[str, float]

    @property
    def serious(self) -> list[Finding]:
        """The findings that make a run not worth starting."""
        return [f for f in self.findings if f.severity == "serious"]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        found = [f._asdict() for f in self.findings]
        return {"serious": len(self.serious), "findings": found, "checked": self.checked, "figures": self.figures}

    def json(self) -> str:
        """The report as JSON; a figure that is not finite is null."""
        return dumps(_finite(self.as_dict()), indent=2, ensure_ascii=False)

    def text(self) -> str:
        """The report for people.

        >>> print(Report([], {"logits": "float32"}, {"logp_error": 2e-7}).text())
        checked
          logits      float32
          logp_error  2e-07
        no findings
        """
        width = max(len(name) for name in (*self.checked, *self.figures))
        lines = ["checked", *(f"  {name:{width}}  {value}" for name, value in self.checked.items())]
        lines += [f"  {name:{width}}  {value:.2g}" for name, value in self.figures.items()]
        for f in self.findings:
            lines += [f"{f.severity}: {f.what} [{f.code}]", f"  where   {f.where}"]
            lines += [f"  effect  {f.effect}", f"  remedy  {f.remedy}"]
        return "\n".join(lines if self.findings else [*lines, "no findings"])


def grade(nats: float, clipped_frac: float = 0.0) -> str:
    """The severity of a measured error: serious from 1e-3 nats or one token in a thousand, a note below 1e-5 nats.

    >>> grade(0.02), grade(1e-4), grade(1e-4, clipped_frac=0.01), grade(0.0)
    ('serious', 'warning', 'serious', 'note')
    """
    if nats >= SERIOUS or clipped_frac >= 1e-3 or math.isnan(nats):
        return "serious"
    return "warning" if nats >= VISIBLE else "note"


def rms(x: Tensor) -> float:
    """Root mean square; 0 of nothing."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def beyond(error: Tensor, clip: Clip) -> float:
    """The share of ratios that an error of log-ratios alone pushes out of the clip."""
    if not error.numel():
        return 0.0
    if clip.length > 1:
        generator = torch.Generator().manual_seed(0)
        return sequence_error(error.cpu(), clip.length, 512, (-clip.low, clip.high), generator).outside
    ratio = error.double().exp()
    return ((ratio < 1 - clip.low) | (ratio > 1 + clip.high)).double().mean().item()


def measured(nats: float, clipped: float, clip: Clip) -> str:
    """An error in words."""
    of = f"sequences of {clip.length}" if clip.length > 1 else "tokens"
    return f"{nats:.2g} nats rms; alone it pushes {clipped:.2%} of {of} out of [{1 - clip.low:g}, {1 + clip.high:g}]"


def held_in(x: Float[Tensor, "..."]) -> torch.dtype:
    """The dtype that x was last rounded to: bf16 or fp16 where it holds every value, however x is stored now.

    >>> held_in(torch.rand(99).bfloat16().float()), held_in(torch.rand(99))
    (torch.bfloat16, torch.float32)
    """
    if x.unique().numel() >= 8:
        for dtype in LOW:
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
    """What rounding at a place costs on these logits.

    Args:
        logits: [n v] float64.
        ids: [n] sampled tokens.
        place: ``logits``, ``log_softmax`` or ``logp``.
        dtype: what is rounded to.
        temperature: the sampling temperature.
        clip: what errors are held against.

    Returns:
        Root mean square error of log π, nats; and the share of tokens whose ratio is pushed out of the clip when both
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
    return rms(errors[0]), beyond(errors[1] - errors[0], clip)


def entropy_findings(
    entropy: Float[Tensor, " n"] | None, exact: Float[Tensor, " n"], where: str = "head", explained: float = 0.0
) -> list[Finding]:
    """No entropy, zeros, numbers that are not finite, or entropies off by more than a known cast explains.

    >>> entropy_findings(torch.zeros(3), torch.full((3,), 0.7))[0].code
    'entropy_zero'
    """
    mean = exact.mean().item() if exact.numel() else 0.0
    remedy = "have the head compute the exact entropy of each row in fp32; isentropic.token_entropy does"
    if entropy is None:
        return [Finding("serious", "entropy_none", "no entropy is returned", where, f"{mean:.3g} nats", remedy, mean)]
    off = rms(entropy - exact)
    if not bool(entropy.isfinite().all()):
        code, what = "entropy_nonfinite", "entropies are not finite"
    elif bool((entropy == 0).all()) and mean > SERIOUS:
        code, what = "entropy_zero", "every entropy is exactly 0"
    elif off > max(VISIBLE, explained):
        code, what = "entropy_wrong", "entropies are not those of the rows"
    else:
        return []
    effect = f"true mean {mean:.3g} nats a token, {off:.2g} nats rms off"
    return [Finding(grade(off), code, what, where, effect, remedy, off)]


def ratio_findings(
    logp: Float[Tensor, " n"],
    again: Float[Tensor, " n"],
    logp_old: Float[Tensor, " n"] | None,
    clip: Clip = CLIP,
    where: str = "scoring",
) -> list[Finding]:
    """The ratio must be 1 before the first update: two passes agree, and the old log-probs are the current ones.

    >>> ratio_findings(torch.zeros(3), torch.zeros(3), torch.full((3,), 0.5))[0].code
    'stale_logp'
    """
    pairs = [("dropout", "two scoring passes over the same tokens differ", again)]
    if logp_old is not None:
        pairs.append(("stale_logp", "old log-probs are not the current ones though nothing was updated", logp_old))
    remedies = {
        "dropout": "score without dropout: disable_dropout=True, and attention_dropout=0 in the model's config",
        "stale_logp": "compute old log-probs with the weights, temperature and dtype that the loss scores with",
    }
    for code, what, other in pairs:
        nats, clipped = rms(logp - other), beyond(logp - other, clip)
        if nats >= VISIBLE or math.isnan(nats):
            effect = f"at step 0 {measured(nats, clipped, clip)}"
            return [Finding(grade(nats, clipped), code, what, where, effect, remedies[code], nats, clipped)]
    return []


def fitted_temperature(logits: Float[Tensor, "n v"], ids: Int[Tensor, " n"], logp: Float[Tensor, " n"]) -> float:
    """The temperature in [1/8, 8] at which the logits come nearest to these log-probs.

    >>> z = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]]).double()
    >>> round(fitted_temperature(z, torch.tensor([1, 2]), (z / 0.7).log_softmax(-1)[[0, 1], [1, 2]]), 3)
    0.7
    """
    logits, ids, logp = logits[:256], ids[:256], logp[:256]
    low, high = -math.log(8), math.log(8)
    for _ in range(4):
        grid = torch.linspace(low, high, 17).tolist()
        misses = [rms(from_logits(logits, ids, temperature=math.exp(t))[0] - logp) for t in grid]
        best = grid[misses.index(min(misses))]
        low, high = best - (high - low) / 16, best + (high - low) / 16
    return math.exp(best)


def kept_tokens(
    logits: Float[Tensor, "n v"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Bool[Tensor, "n v"]:
    """Which tokens top-k, then top-p, then min-p leave to be sampled; 0, 1 and 0 keep all.

    >>> kept_tokens(torch.tensor([[0.6, 0.3, 0.1]]).log(), top_p=0.7)
    tensor([[ True,  True, False]])
    """
    z = logits / temperature
    if top_k:
        z = z.masked_fill(z < z.topk(min(top_k, z.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        p, order = z.softmax(-1).sort(-1, descending=True)
        cut = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, p.cumsum(-1) - p >= top_p)
        z = z.masked_fill(cut, -math.inf)
    p = z.softmax(-1)
    return p >= min_p * p.amax(-1, keepdim=True) if min_p else p > 0


def truncation_findings(
    logits: Float[Tensor, "n v"],
    kept: Bool[Tensor, "n v"],
    temperature: float = 1.0,
    clip: Clip = CLIP,
    where: str = "sampler",
) -> list[Finding]:
    """What sampling from a kept set S does: with ``Z = Σ_S π`` the true ratio to the sampler is Z, not 1.

    The sampled estimate of entropy becomes ``E_q[−log π]``, ``q = π/Z`` on S, never above ``H(π)``.

    >>> truncation_findings(torch.zeros(2, 4).double(), torch.tensor([[True, True, True, False]] * 2))[0].nats
    0.2877
    """
    logp = (logits / temperature).log_softmax(-1)
    p, safe = logp.exp(), logp.masked_fill(logp.isinf(), 0.0)
    z = (p * kept).sum(-1)
    gap = (-(p * kept * safe).sum(-1) / z + (p * safe).sum(-1)).mean().item() if len(z) else 0.0
    nats, clipped = -z.log().mean().item() if len(z) else 0.0, beyond(z.log(), clip)
    if nats < VISIBLE:
        return []
    effect = (
        f"{1 - z.mean().item():.1%} of the mass is cut: the ratio to the sampler is off by {nats:.2g} nats on average, "
        f"{clipped:.1%} of ratios would leave the clip; the sampled entropy estimate is {gap:+.2g} nats off"
    )
    what = "truncated sampling (top-k, top-p, min-p): tokens come from another policy than is scored"
    remedy = "sample with top_k=0, top_p=1 and min_p=0; shape entropy by temperature or by a target instead"
    return [Finding(grade(nats, clipped), "truncation", what, where, effect, remedy, nats, clipped)]


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
    """Sampler against trainer: another temperature, or log-probs that differ although the distribution should not.

    Args:
        logits: [n v] float64, before the temperature.
        ids: [n] sampled tokens.
        logp, logp_sampler: [n] of the trainer and of the sampler, nats; entries that are not finite are left out.
        temperature: what the trainer scores with.
        kept: [n v] what truncation left; its known effect is taken out of the comparison.
        clip: what errors are held against.
        where: for the findings.

    >>> z, ids = torch.randn(64, 9).double() * 3, torch.zeros(64, dtype=torch.int64)
    >>> cold = from_logits(z, ids, temperature=0.5)[0]
    >>> sampler_findings(z, ids, from_logits(z, ids)[0], cold)[0].code
    'temperature'
    """
    at = logp_sampler.isfinite()
    logits, ids, logp, logp_sampler = logits[at], ids[at], logp[at], logp_sampler[at]
    if kept is not None:
        logits, full = logits.masked_fill(~kept[at], -math.inf), logits
        logp = logp + (
            from_logits(logits, ids, (), temperature=temperature)[0]
            - from_logits(full, ids, (), temperature=temperature)[0]
        ).to(logp.dtype)
    nats, clipped = rms(logp - logp_sampler), beyond(logp - logp_sampler, clip)
    if nats < VISIBLE:
        return []
    fit = fitted_temperature(logits, ids, logp_sampler)
    left = rms(from_logits(logits, ids, temperature=fit)[0] - logp_sampler)
    effect = measured(nats, clipped, clip)
    if left < nats / 5 and abs(fit / temperature - 1) > 1e-3:
        what = f"tokens are sampled at temperature {fit:.3g} and scored at {temperature:.3g}"
        remedy = "give sampler and scoring one temperature; in TRL set temperature, not generation_kwargs"
        return [Finding(grade(nats, clipped), "temperature", what, where, effect, remedy, nats, clipped)]
    what = "sampler and trainer give different log-probs to the same tokens"
    remedy = "run both in one precision and with the same penalties, or correct by the ratio of the two"
    return [Finding(grade(nats, clipped), "sampler_mismatch", what, where, effect, remedy, nats, clipped)]


def mask_findings(
    mask: Shaped[Tensor, "b t"],
    generated: Shaped[Tensor, "b t"],
    padding: Shaped[Tensor, "b t"],
    entropy: Float[Tensor, "b t"],
    where: str = "mask",
) -> list[Finding]:
    """The mask must count what the policy generated: no padding, nothing else, and none of it left out.

    Args:
        mask: [b t] non-zero where a token counts.
        generated: [b t] non-zero where the policy generated it.
        padding: [b t] non-zero where there is no token at all.
        entropy: [b t] nats, for the effect on its mean.
        where: for the findings.

    >>> one = torch.tensor([[1, 1, 0]])
    >>> mask_findings(torch.ones(1, 3), one, 1 - one, torch.rand(1, 3))[0].code
    'padding_counted'
    """
    counts, made, empty = mask.bool(), generated.bool(), padding.bool()
    shift = abs((entropy[counts].mean() - entropy[made].mean()).item())
    remedy = "count exactly the tokens that the policy sampled, its end-of-text token included"
    cases = {
        "padding_counted": (counts & empty, "the mask counts padding"),
        "wrong_mask": ((counts & ~made & ~empty) | (made & ~counts), "the mask is not the generated tokens"),
    }
    return [
        Finding(
            "serious",
            code,
            what,
            where,
            f"{int(at.sum())} of {at.numel()} positions; mean entropy off by {shift:.2g} nats",
            remedy,
            shift,
        )
        for code, (at, what) in cases.items()
        if bool(at.any())
    ]
