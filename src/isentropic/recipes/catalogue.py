"""The catalogue: published algorithms as data, each a few fields of a :class:`~isentropic.recipes.recipe.Recipe`.

``source`` names the paper, and what is not the paper's: numbers marked (?) could not be confirmed, [ours] are choices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .recipe import Recipe

_REPO = "arXiv:2603.11682"
_BASES: dict[str, Recipe] = {
    "reinforce": Recipe(
        "−R·log π", "Williams 1992", baseline="none", objective="reinforce", on_policy=True, reduction="constant"
    ),
    "rloo": Recipe(
        "−(R − mean of the others)·log π, strictly on-policy",
        "arXiv:2402.14740",
        baseline="leave_one_out",
        objective="reinforce",
        on_policy=True,
        reduction="constant",
    ),
    "grpo": Recipe(
        "−min(rA, clip(r)A), A = (R−mean)/std, mean over sequences", "arXiv:2402.03300", reduction="sequence"
    ),
    "dr-grpo": Recipe(
        "GRPO without the std and without the length mean", "arXiv:2503.20783", baseline="mean", reduction="constant"
    ),
    "loop": Recipe(
        "−min(rA, clip(r)A), leave-one-out A, r in [1/(1+ε), 1+ε], ε=0.1",
        "arXiv:2502.01600; ε and the token mean are [ours]",
        baseline="leave_one_out",
        bounds="reciprocal",
        clip_low=0.1,
        clip_high=0.1,
    ),
    "dapo": Recipe("GRPO with ε_high=0.28 > ε_low=0.2 and a token mean", "arXiv:2503.14476", clip_high=0.28),
    "gspo": Recipe(
        "clip of the sequence ratio exp(mean log r)",
        "arXiv:2507.18071",
        objective="sequence_clipped",
        reduction="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    "cispo": Recipe(
        "−sg(min(r, 1+ε_high))·A·log π, ε_high=4",
        "arXiv:2506.13585; the ceiling of 5 is TRL's advice, the paper's is unknown",
        objective="cispo",
        clip_high=4.0,
    ),
}


def _on(base: str, suffix: str, source: str, **changes: Any) -> Recipe:
    recipe = _BASES[base]
    return replace(recipe, formula=f"{base} with {suffix}", source=f"{source}; {recipe.source}", **changes)


# Its controller, target and pace are those of any knob that is named without its own.
DEFAULT = "isentropic"
RECIPES: dict[str, Recipe] = {
    "isentropic": _on(
        "loop",
        "centred REPO-R, A − ζ|A|·L, ζ by prediction on every optimizer step",
        f"ours; REPO-R is of {_REPO}",
        shaping="repo_r",
        knob="zeta",
        controller="predictive",
        target="auto",
        every=1,
    ),
    **_BASES,
    "entropy-bonus": _on("grpo", "loss − c·mean H, c fixed", "common practice", entropy_coef=0.003),
    "entropy-bonus-adaptive": _on(
        "grpo",
        "loss − c·mean H while H<H*; c ± δ by the sign of H*−H",
        "Skywork-OR1 arXiv:2505.22312 (their H* is 0.2 nats)",
        knob="entropy_coef",
        knob_start=0.0,
        knob_high=0.005,
        controller="gated_step:step=1e-4",
        every=1,
    ),
    "adapo": _on(
        "dapo",
        "ε_high raised below the target, lowered above",
        f"{_REPO} [paper: direction; step and bounds ours]",
        knob="clip_high",
        controller="multiplicative:rate=0.05",
    ),
    **{
        f"repo-r-{base}": _on(
            base,
            "REPO-R: A − ζ|A|·log π",
            f"{_REPO} [paper]",
            shaping="repo_r_raw",
            knob="zeta",
            controller="double_halve",
        )
        for base in ("rloo", "loop", "grpo", "dapo", "gspo")
    },
    **{
        f"repo-d-{base}": _on(
            base,
            "REPO-D: A − ζ·max(−mean ΔĤ, 0)·L",
            f"{_REPO} [a reconstruction, ours]",
            shaping="repo_d",
            knob="zeta",
            controller="multiplicative:rate=0.1",
        )
        for base in ("rloo", "loop", "grpo", "dapo", "gspo")
    },
    "clip-cov": _on(
        "grpo",
        "the loss of a few random tokens with 1 < (A−Ā)(log π − mean log π) < 5 dropped, token mean",
        "Clip-Cov arXiv:2505.22617",
        selection="clip_cov",
        reduction="token",
    ),
    "kl-cov": _on(
        "grpo",
        "−rA + |log r| on the 0.2 % of tokens with the largest (A−Ā)(log π − mean log π), no clip, token mean",
        "KL-Cov arXiv:2505.22617 (share of the 7B runs)",
        objective="importance",
        penalty="kl_cov",
        reduction="token",
    ),
    "entropic": _on(
        "grpo",
        "A·(1 + α·sign A), α by PI",
        "EntroPIC arXiv:2511.15248; its gains are unknown (?), base and range of α [ours]",
        shaping="sign_weight",
        knob="alpha",
        controller="pi",
        every=1,
    ),
    "entrocraft": _on(
        "grpo",
        "−1 for wrong and 0 for right answers below the band, 1 for right and 0 for wrong ones above it, GRPO inside",
        "Entrocraft arXiv:2604.26326, released code: bands 0.1 nats wide, [0.6, 0.7] to [0.4, 0.5] in a line over the "
        "run, here target anneal:0.65:0.45:STEPS; a width of 9 % either side for 0.05 nats, the target and no KL term "
        "[ours]",
        shaping="one_sided_reward",
        knob="reject",
        controller="switch:width=0.09",
        reduction="token",
    ),
    "dynamic-clip": _on(
        "dapo",
        "ε_high(p) = β − 0.2·p, β up and down again over 800 steps",
        "dynamic clip thresholds arXiv:2602.09782; constants (?), curve, p_old for p [ours]",
        bounds="linear",
        knob="clip_high",
        controller="schedule:shape=up_down:steps=800",
        every=1,
    ),
    "dcpo": _on(
        "dapo",
        "−0.16 ≤ (r−1)·p ≤ 0.2, r ≤ 10",
        "DCPO arXiv:2509.02333, its clip alone: without the smoothed advantages",
        bounds="dcpo",
        clip_low=0.16,
        clip_high=0.2,
    ),
    "bapo": _on(
        "dapo",
        "bounds widened from [0.6, 1.2] to at most [0.9, 3] until the positive share of the loss is ½",
        "BAPO arXiv:2510.18927; steps of the bounds (?) [ours]",
        bounds="balanced",
        clip_low=0.4,
        clip_high=0.2,
    ),
    "ce-gppo": _on(
        "dapo",
        "bounded gradients ½(1−ε_low)·A and (1+ε_high)·A where the clip removes them",
        "CE-GPPO arXiv:2509.20712: β1 0.5 to 0.75, β2 1; base and ε (?)",
        objective="gradient_preserving",
    ),
    "qae": _on(
        "dapo",
        "A = R − 0.4-quantile of the group, linear between samples",
        "QAE arXiv:2509.22611; its interpolation is unknown (?): 8 samples, 5 right give 0.8 [ours]; no std [ours]",
        baseline="quantile",
    ),
    "pass-at-k": _on(
        "dapo",
        "A of a draw of k: (1−ρ)/σ if right, less C(n−c−1,k−1)/(σ·C(n−1,k−1)) if wrong, σ = √(ρ(1−ρ))",
        "pass@k training arXiv:2508.10751, analytic form, and its released code; k = 4 [ours]",
        baseline="pass_at_k",
    ),
    "unlikeliness": _on(
        "grpo",
        "R·(1 − 0.25·(n−k)/n) in place of R for right answers, k the rank by probability in the group, token mean",
        "unlikeliness reward arXiv:2506.02355; the mean log-probability ranks, as in its released code, whose weights "
        "are larger by 0.25/n; without its KL term of 0.1",
        baseline="unlikeliness",
        reduction="token",
    ),
    "ucpo": _on(
        "grpo",
        "A·c·(0.8/c + 0.2·(1/q)/Σ 1/q) for the c right answers of a group, q their shares of probability, token mean",
        "UCPO arXiv:2605.00365, released code",
        baseline="uniform_correct",
        reduction="token",
    ),
    "nsr": _on(
        "grpo",
        "A = −1 for wrong answers, 0 for right ones, token mean",
        "negative-sample reinforcement arXiv:2506.01347, released code; its entropy bonus of 0.001 left out, the mean "
        "over right answers' tokens too [ours]",
        baseline="signed",
        shaping="one_sided",
        constants={"reject": 1.0},
        reduction="token",
    ),
    "w-reinforce": _on(
        "grpo",
        "A = 0.1 for right answers, −1 for wrong ones, token mean",
        "W-REINFORCE arXiv:2506.01347, released code, λ = 0.1; its entropy bonus of 0.001 left out [ours]",
        baseline="signed",
        shaping="one_sided",
        constants={"reject": 0.9},
        reduction="token",
    ),
    "up": _on(
        "dapo",
        "−A·log π for A>0, without ratio and clip; the clip's lower bound alone for A<=0",
        "UP arXiv:2607.06987 by TRL's account; without its dual clip",
        objective="unbounded_positive",
    ),
    "steer": _on(
        "dapo",
        "A·exp(−k|Ω|), Ω = A·r·(1−π)·L, the largest |Ω| weighed by 0.8",
        "STEER arXiv:2510.10150, released code; the paper's later version has 0.7 by a secondary account (?)",
        shaping="steer",
    ),
    "opefo": _on(
        "grpo",
        "(1+λ)·A where a token raises entropy, (1−λ)·A where it lowers it, predicted change 0, strictly on-policy",
        "OPEFO arXiv:2605.11491 by a secondary account; its estimate of a token's change (?), here ours [ours]; token "
        "mean (?)",
        shaping="entropy_balance",
        objective="reinforce",
        on_policy=True,
        reduction="token",
    ),
    "aepo": _on(
        "grpo",
        "GRPO in which up to 2.3 % of a batch are right answers of a second one, with A 1, drawn from a quarter of the "
        "prompts at temperature 1.2 below H*, up to 1.2 % at 0.8 above it, H* 0.5 nats, token mean",
        "AEPO arXiv:2510.08141, released code; shares of the batch for its 60 and 30 answers of 2,560, exact H of the "
        "first batch, no second batch before the first reading, no dual clip [ours]",
        reduction="token",
        knob="redraw",
        controller="switch:width=0",
        target="0.5",
    ),
    "distribution-centric": _on(
        "grpo",
        "(A + a·π_T/π)/(1+a) for right answers, A/(1+a) for wrong ones, a = min(|H*−H|, 0.1)/share of right answers, "
        "T 1.2 below H* and 0.8 above it, H* 0.5 nats, token mean",
        "distribution-centric policy optimization arXiv:2601.12730, released code; κ at every step, π of the latest "
        "policy, shares of a micro-batch, no dual clip [ours]",
        shaping="tempered",
        reduction="token",
        knob="tilt",
        # κ = H* − H in nats: the span of 0.2 times 2.5 times (H* − H)/0.5.
        controller="pi:gain=2.5:integral_gain=0",
        target="0.5",
        every=1,
    ),
    "erc": _on(
        "dapo",
        "tokens dropped whose H/H_old leaves (0.95, 1.05)",
        "ERC arXiv:2512.05591; base (?)",
        selection="erc",
    ),
    "sapo": _on(
        "grpo",
        "−(4/τ)·σ(τ(r−1))·A, τ 1.0 for A>0 and 1.05 for A<0",
        "SAPO arXiv:2511.20347",
        objective="sapo",
    ),
    "high-entropy": _on(
        "dapo",
        "the loss of the 20 % of tokens with the highest entropy alone",
        "80/20 arXiv:2506.01939; divided by all tokens [ours]",
        selection="high_entropy",
    ),
    "mai": _on(
        "dapo",
        "clip [0.4, 2.5+k], k ± 0.25 by the sign of H*−H, in [0, 2.5], H* 0.3 nats",
        "MAI-Thinking-1 report of 2026-06, by a secondary account; base (?)",
        clip_low=0.6,
        clip_high=1.5,
        knob="clip_high",
        knob_low=1.5,
        knob_high=4.0,
        controller="sign_step:step=0.25",
        target="0.3",
    ),
    "stare": _on(
        "grpo",
        "W·A on the 10 % rarest tokens where A>0 while H<H*; W ± 0.01 by the sign of H*−H, at most 1.5, H* 0.3 nats",
        "STARE arXiv:2606.19236; rank over all tokens, base (?) [ours]",
        shaping="surprisal_boost",
        knob="boost",
        knob_start=1.1,
        controller="gated_step:step=0.01",
        target="0.3",
        every=1,
    ),
    "lp-reg": _on(
        "grpo",
        "+ KL(min-p filter of π ‖ π) on the 1 % least likely tokens with A<0, κ 0.02, token mean",
        "Lp-Reg arXiv:2510.03222; filter of the current policy [ours], base (?)",
        penalty="lp_reg",
        reduction="token",
    ),
    "aent": _on(
        "grpo",
        "loss − c·H over the likeliest 70 % of the vocabulary, c ± δ towards a band",
        "AEnt arXiv:2509.03493; band, step and bound of c (?) [ours], and the band is on H [ours]",
        penalty="aent",
        penalty_coef=2e-4,
        knob="penalty_coef",
        knob_high=5e-3,
        controller="sign_step:step=5e-5",
        target="band:60%:90%",
        every=1,
    ),
    **{
        f"tre-{kind}": _on(
            "grpo",
            f"loss − 0.001·(log v/log n)·H over the {what}, token mean",
            "TRE arXiv:2602.03635, released code; theirs is PPO with a critic, GRPO is [ours]",
            penalty=f"tre_{kind}",
            penalty_coef=1e-3,
            reduction="token",
        )
        for kind, what in (("p", "nucleus of 99 %"), ("k", "two likeliest tokens"))
    },
}
