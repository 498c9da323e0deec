"""The audit of rows of logits from one forward pass, for engines that cannot run another."""

from __future__ import annotations

import torch
from torch import Tensor

from .casts import from_logits
from .checks import LOW_PRECISION, effective_dtype, ratio_findings, rms, sampler_findings, target_findings
from .findings import CLIP, SEVERITIES, Clip, Finding
from .probe import CountedRows, Scored, dtype_findings, score_findings


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
    target: str | None = None,
) -> tuple[list[Finding], dict[str, float]]:
    """Run the checks of :func:`audit` that need one forward pass only, for engines that cannot run another.

    Args:
        logits: ``[n v]`` of counted tokens, as the head returned them. Bits that a low precision lost are drawn at
            random, so that the cost of the cast can be measured.
        ids: ``[n]`` sampled tokens.
        scored: ``[n]`` log-probs and entropies that the loss received, nats.
        dtypes: ``head``, ``autocast`` and ``output`` (of FSDP2's outputs); None for those that do not apply.
        temperature: the sampling temperature.
        clip: the clip that errors of the ratio are compared with.
        logp_old, logp_sampler: ``[n]`` nats; no update may lie between the tokens and this pass.
        where: name of the scoring in findings.
        target: the entropy target of the run, as its recipe names it.

    Returns:
        Findings, most severe first, and measured figures.
    """
    exact_logits, dtype = logits.double(), logits.dtype
    noisy_logits = exact_logits
    if dtype in LOW_PRECISION:
        generator = torch.Generator(logits.device).manual_seed(0)
        ulp = (
            torch.ldexp(torch.ones_like(exact_logits), exact_logits.float().frexp().exponent - 1)
            * torch.finfo(dtype).eps
        )
        noisy_logits = (
            exact_logits + (torch.rand(exact_logits.shape, generator=generator, device=exact_logits.device) - 0.5) * ulp
        )
    exact = from_logits(exact_logits, ids, temperature=temperature)
    rows = CountedRows(noisy_logits, None, ids, (exact[0], exact[1]), temperature, clip)
    row_dtypes: dict[str, torch.dtype | None] = {
        "head": dtypes.get("head"),
        "autocast": dtypes.get("autocast"),
        "logits": dtype,
        "head_out": dtype,
        "logp": effective_dtype(scored.logp),
        "entropy": None if scored.entropy is None else effective_dtype(scored.entropy),
    }
    findings = dtype_findings(rows, scored, row_dtypes, dtypes.get("output"), True)
    explained = max((f.nats or 0.0 for f in findings), default=0.0)
    findings += score_findings(rows, scored, explained, where)
    findings += ratio_findings(scored.logp, scored.logp, logp_old, clip, where)
    findings += target_findings(exact_logits, temperature, target)
    figures = {"entropy/mean": exact[1].mean().item(), "logp_error": rms(scored.logp - exact[0])}
    if scored.entropy is not None:
        figures["entropy_error"] = rms(scored.entropy - exact[1])
    if logp_old is not None:
        figures["ratio_error"] = rms(scored.logp - logp_old)
    if logp_sampler is not None:
        findings += sampler_findings(
            exact_logits, ids, scored.logp, logp_sampler.to(scored.logp.dtype), temperature, None, clip
        )
        figures["sampler_error"] = rms((scored.logp - logp_sampler)[logp_sampler.isfinite()])
    return sorted(findings, key=lambda f: SEVERITIES.index(f.severity)), figures
