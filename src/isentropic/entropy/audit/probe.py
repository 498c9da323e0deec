"""The audit of a model and a batch: what it computes in, and by how much that is off from fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .casts import from_logits
from .checks import (
    CLIP,
    LOW,
    VISIBLE,
    Clip,
    Finding,
    Report,
    beyond,
    cast_effect,
    entropy_findings,
    fitted_temperature,
    grade,
    held_in,
    kept_tokens,
    mask_findings,
    measured,
    ratio_findings,
    rms,
    sampler_findings,
    truncation_findings,
)

MAX_LOGITS = 20_000_000
_ORDER = ("serious", "warning", "note")


class AuditBatch(NamedTuple):
    """Sampled sequences, and what is known of how they were sampled.

    Attributes:
        input_ids, attention_mask: ``[b s]``, prompts on the left, the ``t`` completion tokens last.
        mask: ``[b t]`` non-zero where the loss and the entropy count a token.
        generated: ``[b t]`` non-zero where the policy generated it; None is the attention mask.
        logp_old: ``[b t]`` log-probs the ratio is taken to, nats; no update may lie in between.
        logp_sampler: ``[b t]`` log-probs under the distribution the tokens were really drawn from, nats.
        kept: ``[b t v]`` true where the sampler could draw the token; None follows from the three numbers below.
        temperature, top_k, top_p, min_p: of the sampler, as the trainer is told.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    generated: Tensor | None = None
    logp_old: Tensor | None = None
    logp_sampler: Tensor | None = None
    kept: Tensor | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Scored(NamedTuple):
    """What a scoring pass returns: log-probs ``[b t]`` and entropies ``[b t]``, nats; None where there are none."""

    logp: Tensor
    entropy: Tensor | None


Score = Callable[[Any, AuditBatch], Scored]


class _Look(NamedTuple):
    """A plain forward pass, seen at its head."""

    exact: Tensor  # [b t v] fp64 logits of the hidden states and weights that the head was given
    noisy: Tensor | None  # the same with the bits that low-precision weights have lost drawn at random
    dtypes: dict[str, torch.dtype]


@contextmanager
def _mode(model: Any, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _completion(logits: Tensor, num: int) -> Tensor:
    """The rows that predict the last num tokens."""
    return logits[:, -num - 1 : -1]


def score_logits(model: Any, batch: AuditBatch) -> Scored:
    """Score with the model's own logits and our fp32 log-softmax, as a hand-written loop would."""
    from ..statistics import logits_stats

    num = batch.mask.shape[1]
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    stats = logits_stats(_completion(logits, num), batch.input_ids[:, -num:], batch.temperature)
    return Scored(stats.logp, stats.entropy)


def _matmul(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden · weightᵀ`` in fp64, by slices of the vocabulary."""
    wide = torch.float32 if hidden.device.type == "mps" else torch.float64
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [hidden.to(wide) @ w.to(wide).T for w in weight.split(8192)]
    out = torch.cat(parts, -1)
    return out if bias is None else out + bias.to(wide)


def _full(x: Any) -> Any:
    """A parameter whole: FSDP2 shards it as a DTensor. All ranks call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _look(model: Any, batch: AuditBatch) -> _Look:
    if hasattr(model, "reshard"):
        # After a forward FSDP2 leaves the outermost parameters as they were cast; their own dtype is under the shards.
        model.reshard()
    head, num, seen = model.get_output_embeddings(), batch.mask.shape[1], {}
    stored = head.weight.dtype

    def hook(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        hidden, weight = _completion(args[0], num), _full(module.weight).detach()
        seen["exact"] = _matmul(hidden, weight, _full(module.bias) if module.bias is not None else None)
        if stored in LOW:
            generator = torch.Generator(weight.device).manual_seed(0)
            step = torch.ldexp(torch.ones_like(weight, dtype=torch.float32), weight.float().frexp().exponent - 1)
            lost = (torch.rand(weight.shape, generator=generator, device=weight.device) - 0.5) * step
            noisy = weight.float() + lost * torch.finfo(stored).eps
            seen["noisy"] = seen["exact"] + _matmul(hidden, noisy - weight.float(), None)
        seen["hidden"], seen["head_out"] = args[0].dtype, out.dtype

    handle = head.register_forward_hook(hook)
    try:
        with _mode(model, training=False):
            out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    finally:
        handle.remove()
    given = _completion(out, num).to(seen["exact"].dtype)
    if rms(given - seen["exact"]) > 0.05 * seen["exact"].std().item():
        # A soft cap or a scale stands between the head and the logits: what the model returns is the best there is.
        seen["exact"], seen["noisy"] = given, None
    dtypes = {"head": stored, "hidden": seen["hidden"], "head_out": seen["head_out"], "logits": out.dtype}
    return _Look(seen["exact"], seen.get("noisy"), dtypes)


def output_dtype(model: Any) -> torch.dtype | None:
    """What FSDP2 casts the outputs of the whole model to; None where it does not, or there is no FSDP2."""
    state = getattr(model, "_get_fsdp_state", None)
    policy = getattr(state(), "_mp_policy", None) if callable(state) else None
    return getattr(policy, "output_dtype", None)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


_REMEDIES = {
    "head_dtype": "keep the head's master weights in fp32, or in TRL set cast_lm_head_to_fp32=True",
    "logits_dtype": "compute the head in fp32, in trainer and sampler alike: in TRL set cast_lm_head_to_fp32=True, "
    "elsewhere call it outside autocast",
    "fsdp_output_dtype": "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, "
    "output_dtype=None): Accelerate sets output_dtype to the mixed precision unless it is given a policy",
    "logp_dtype": "return log-probs in fp32",
    "entropy_dtype": "return entropies in fp32",
}


class _Case(NamedTuple):
    """What every check of one audit reads: rows of counted tokens, flat."""

    logits: Tensor
    noisy: Tensor | None
    ids: Tensor
    exact: tuple[Tensor, Tensor]
    temperature: float
    clip: Clip


def _dtype_findings(
    case: _Case, calm: Scored, dtypes: dict[str, torch.dtype | None], output: torch.dtype | None, scored: bool
) -> list[Finding]:
    found = []

    def add(code: str, what: str, where: str, nats: float, clipped: float) -> None:
        effect = measured(nats, clipped, case.clip)
        found.append(Finding(grade(nats, clipped), code, what, where, effect, _REMEDIES[code], nats, clipped))

    def effect(place: str, dtype: torch.dtype) -> tuple[float, float]:
        return cast_effect(case.logits, case.ids, place, dtype, case.temperature, case.clip)

    if dtypes["head"] in LOW and case.noisy is not None:
        error = from_logits(case.noisy, case.ids, temperature=case.temperature)[0] - case.exact[0]
        what = f"the head's weights are {_name(dtypes['head'])}: updates below half an ulp are lost"
        add("head_dtype", what, "output embedding", rms(error), beyond(error, case.clip))
    if output in LOW:
        what = f"FSDP2 rounds every output of the model to {_name(output)}, fp32 log-probs too"
        add(
            "fsdp_output_dtype",
            what,
            "MixedPrecisionPolicy.output_dtype",
            *effect("logp" if scored else "logits", output),
        )
    if dtypes["logits"] in LOW and (scored or dtypes["head_out"] in LOW or output not in LOW):
        under = "" if dtypes["autocast"] is None else f", under autocast to {_name(dtypes['autocast'])}"
        what = f"logits are {_name(dtypes['logits'])} before the log-softmax"
        add("logits_dtype", what, f"output of the head{under}", *effect("logits", dtypes["logits"]))
    if dtypes["logp"] in LOW and output not in LOW:
        what = f"log-probs are rounded to {_name(dtypes['logp'])}"
        add("logp_dtype", what, "log-softmax or returned log-probs", *effect("logp", dtypes["logp"]))
    if dtypes["entropy"] in LOW and output not in LOW and calm.entropy is not None:
        off = rms(calm.entropy - case.exact[1])
        what = f"entropies are rounded to {_name(dtypes['entropy'])}"
        found.append(
            Finding(
                grade(off),
                "entropy_dtype",
                what,
                "returned entropies",
                f"{off:.2g} nats rms",
                _REMEDIES["entropy_dtype"],
                off,
            )
        )
    return found


def _score_findings(case: _Case, calm: Scored, explained: float, where: str) -> list[Finding]:
    """Log-probs and entropies that no cast explains."""
    error = calm.logp - case.exact[0]
    nats, clipped = rms(error), beyond(error, case.clip)
    if not nats <= max(VISIBLE, 3 * explained):
        effect = measured(nats, clipped, case.clip)
        fit = fitted_temperature(case.logits, case.ids, calm.logp)
        again = from_logits(case.logits, case.ids, temperature=fit)[0]
        if rms(again - calm.logp) < nats / 5 and abs(fit / case.temperature - 1) > 1e-3:
            what = f"tokens are scored at temperature {fit:.3g} and sampled at {case.temperature:.3g}"
            remedy = "divide the logits by the sampling temperature before the log-softmax"
            return [Finding(grade(nats, clipped), "temperature", what, where, effect, remedy, nats, clipped)]
        what, remedy = "log-probs are not those of the model's hidden states and head", "compare with token_entropy"
        return [Finding(grade(nats, clipped), "logp_wrong", what, where, effect, remedy, nats, clipped)]
    return entropy_findings(calm.entropy, case.exact[1], where, 3 * explained)


def _trimmed(batch: AuditBatch, vocab: int) -> AuditBatch:
    rows = max(1, MAX_LOGITS // (vocab * batch.input_ids.shape[1]))
    parts: dict[str, Any] = {name: x[:rows] for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    return batch._replace(**parts)


def _check_batch(batch: AuditBatch) -> None:
    (b, s), num = batch.input_ids.shape, batch.mask.shape[1]
    if not 0 < num < s:
        raise ValueError(f"mask must cover 1 to {s - 1} of the {s} tokens, got {num}; the first token has no row")
    for name in ("mask", "generated", "logp_old", "logp_sampler"):
        x = getattr(batch, name)
        if x is not None and tuple(x.shape) != (b, num):
            raise ValueError(f"{name} must be [b t] = {(b, num)}, got {tuple(x.shape)}; align it to the last tokens")
    if not bool(batch.mask.bool().any()):
        raise ValueError("mask must count at least 1 token, got none; give completions that were sampled")
    if not batch.temperature > 0:
        raise ValueError(f"temperature must be > 0, got {batch.temperature}; greedy decoding has no entropy")


@torch.no_grad()
def audit(
    model: Any,
    batch: AuditBatch,
    score: Score = score_logits,
    clip: Clip = CLIP,
    logits_dtype: torch.dtype | None = None,
    where: str = "model",
) -> Report:
    """Look for what makes log-probs, ratios or entropies wrong before any update; the model is left as it was.

    Args:
        model: ``model(input_ids=, attention_mask=, use_cache=).logits`` and ``get_output_embeddings()``, as in
            transformers. Its train or eval mode is taken for what the loss uses.
        batch: tokens sampled from this very model.
        score: how the loss gets its log-probs and entropies; default: logits, and log-softmax in fp32.
        clip: what errors are held against.
        logits_dtype: of the logits inside ``score``; default: what the head gives in a plain forward.
        where: name of the scoring in findings.

    Returns:
        Findings, gravest first; what was looked at; measured figures.

    Raises:
        ValueError: a batch whose parts do not fit, or without a counted token.

    See ``docs/precision.md`` for every finding and its remedy.
    """
    _check_batch(batch)
    batch = _trimmed(batch, model.get_output_embeddings().weight.shape[0])
    look = _look(model, batch)
    with _mode(model, training=False):
        calm = score(model, batch)
    first, again = score(model, batch), score(model, batch)
    ids, keep = batch.input_ids[:, -batch.mask.shape[1] :], batch.mask.bool()
    exact = [
        x.view(ids.shape) for x in from_logits(look.exact.flatten(0, 1), ids.flatten(), temperature=batch.temperature)
    ]
    made = batch.attention_mask[:, -ids.shape[1] :] if batch.generated is None else batch.generated
    padding = (batch.attention_mask[:, -ids.shape[1] :] == 0) if batch.generated is None else ~made.bool()
    found = mask_findings(batch.mask, made, padding, exact[1])
    keep &= made.bool()
    noisy = None if look.noisy is None else look.noisy[keep]
    case = _Case(look.exact[keep], noisy, ids[keep], (exact[0][keep], exact[1][keep]), batch.temperature, clip)
    calm = Scored(calm.logp[keep], None if calm.entropy is None else calm.entropy[keep])
    device, plain = ids.device.type, score is score_logits
    dtypes: dict[str, torch.dtype | None] = {
        **look.dtypes,
        "logits": logits_dtype or look.dtypes["logits" if plain else "head_out"],
        "autocast": torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        "logp": held_in(calm.logp),
        "entropy": None if calm.entropy is None else held_in(calm.entropy),
    }
    casts = _dtype_findings(case, calm, dtypes, output_dtype(model), not plain)
    explained = max((f.nats or 0.0 for f in casts), default=0.0)
    found += casts + _score_findings(case, calm, explained, where)
    old = None if batch.logp_old is None else batch.logp_old[keep]
    found += ratio_findings(first.logp[keep], again.logp[keep], old, clip, where)
    found += _sampling_findings(case, batch, keep, calm.logp)
    return Report(
        sorted(found, key=lambda f: _ORDER.index(f.severity)),
        _checked(dtypes, output_dtype(model), batch, int(keep.sum())),
        _figures(case, calm, first.logp[keep], old, batch, keep),
    )


def audit_rows(
    logits: Tensor,
    ids: Tensor,
    scored: Scored,
    dtypes: dict[str, torch.dtype | None],
    temperature: float = 1.0,
    clip: Clip = CLIP,
    logp_old: Tensor | None = None,
    logp_sampler: Tensor | None = None,
    where: str = "trainer",
) -> tuple[list[Finding], dict[str, float]]:
    """The checks of :func:`audit` that rows of a forward pass allow, where an engine cannot be asked for another pass.

    Args:
        logits: ``[n v]`` of counted tokens, as the head gave them. Bits that a low precision has lost are drawn at
            random, so that what the cast costs can be measured.
        ids: ``[n]`` sampled tokens.
        scored: ``[n]`` what the loss was handed, nats.
        dtypes: ``head``, ``autocast`` and ``output`` (of FSDP2's outputs); None where there is none.
        temperature: the sampling temperature.
        clip: what errors are held against.
        logp_old, logp_sampler: ``[n]`` nats; no update may lie between the tokens and this pass.
        where: for the findings.

    Returns:
        Findings, gravest first, and measured figures.
    """
    given, dtype = logits.double(), logits.dtype
    full = given
    if dtype in LOW:
        generator = torch.Generator(logits.device).manual_seed(0)
        step = torch.ldexp(torch.ones_like(given), given.float().frexp().exponent - 1) * torch.finfo(dtype).eps
        full = given + (torch.rand(given.shape, generator=generator, device=given.device) - 0.5) * step
    exact = from_logits(given, ids, temperature=temperature)
    case = _Case(full, None, ids, (exact[0], exact[1]), temperature, clip)
    known: dict[str, torch.dtype | None] = {
        "head": dtypes.get("head"),
        "autocast": dtypes.get("autocast"),
        "logits": dtype,
        "head_out": dtype,
        "logp": held_in(scored.logp),
        "entropy": None if scored.entropy is None else held_in(scored.entropy),
    }
    found = _dtype_findings(case, scored, known, dtypes.get("output"), True)
    explained = max((f.nats or 0.0 for f in found), default=0.0)
    found += _score_findings(case, scored, explained, where)
    found += ratio_findings(scored.logp, scored.logp, logp_old, clip, where)
    figures = {"entropy/mean": exact[1].mean().item(), "logp_error": rms(scored.logp - exact[0])}
    if scored.entropy is not None:
        figures["entropy_error"] = rms(scored.entropy - exact[1])
    if logp_old is not None:
        figures["ratio_error"] = rms(scored.logp - logp_old)
    if logp_sampler is not None:
        found += sampler_findings(given, ids, scored.logp, logp_sampler.to(scored.logp.dtype), temperature, None, clip)
        figures["sampler_error"] = rms((scored.logp - logp_sampler)[logp_sampler.isfinite()])
    return sorted(found, key=lambda f: _ORDER.index(f.severity)), figures


def _sampling_findings(case: _Case, batch: AuditBatch, keep: Tensor, logp: Tensor) -> list[Finding]:
    kept = None if batch.kept is None else batch.kept[keep]
    if kept is None and (batch.top_k or batch.top_p < 1 or batch.min_p):
        kept = kept_tokens(case.logits, case.temperature, batch.top_k, batch.top_p, batch.min_p)
    found = []
    if kept is not None:
        where = f"sampler: top_k={batch.top_k}, top_p={batch.top_p:g}, min_p={batch.min_p:g}"
        found += truncation_findings(case.logits, kept, case.temperature, case.clip, where)
    if batch.logp_sampler is not None:
        sampler = batch.logp_sampler[keep].to(logp.dtype)
        found += sampler_findings(case.logits, case.ids, logp, sampler, case.temperature, kept, case.clip)
    return found


def _checked(
    dtypes: dict[str, torch.dtype | None], output: torch.dtype | None, batch: AuditBatch, num: int
) -> dict[str, str]:
    # No cast after the log-softmax is finer than the log-softmax: what log-probs are held in is the coarser of the two.
    known = {**dtypes, "log_softmax": dtypes["logp"]}
    names = ("head", "hidden", "logits", "log_softmax", "logp", "entropy")
    return {
        **{name: "none" if known[name] is None else _name(known[name]) for name in names},
        "autocast": "off" if dtypes["autocast"] is None else _name(dtypes["autocast"]),
        "fsdp_output": "none" if output is None else _name(output),
        "old_logp": "compared" if batch.logp_old is not None else "none given",
        "sampler_logp": "compared" if batch.logp_sampler is not None else "none given",
        "sampling": f"temperature {batch.temperature:g}, top_k {batch.top_k}, top_p {batch.top_p:g}, "
        f"min_p {batch.min_p:g}",
        "tokens": str(num),
    }


def _figures(
    case: _Case, calm: Scored, first: Tensor, old: Tensor | None, batch: AuditBatch, keep: Tensor
) -> dict[str, float]:
    figures = {"entropy/mean": case.exact[1].mean().item(), "logp_error": rms(calm.logp - case.exact[0])}
    if calm.entropy is not None:
        figures["entropy_error"] = rms(calm.entropy - case.exact[1])
    if old is not None:
        figures["ratio_error"] = rms(first - old)
    if batch.logp_sampler is not None:
        sampler = batch.logp_sampler[keep]
        at = sampler.isfinite()
        figures["sampler_error"] = rms((calm.logp - sampler)[at])
    return figures
