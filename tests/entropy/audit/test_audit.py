"""Casts against closed forms, the checks on numbers worked out by hand, and the audit of a small model of our own."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from isentropic.entropy.audit import (
    PLACES,
    AuditBatch,
    Clip,
    Finding,
    Report,
    Scored,
    audit,
    audit_rows,
    cast_effect,
    effective_dtype,
    entropy_findings,
    fitted_temperature,
    from_logits,
    grade,
    grade_entropy,
    half_ulp,
    head,
    independent_bias,
    kept_tokens,
    mask_findings,
    merged,
    num_experts,
    ratio_error,
    ratio_findings,
    rounded,
    routing_findings,
    sampler_findings,
    sequence_error,
    shape_findings,
    target_findings,
    truncation_findings,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_logits(n=256, v=500, scale=6.0, seed=0):
    """Rows of many entropies, fp64, and a token drawn from each."""
    g = generator(seed)
    heat = torch.rand(n, 1, generator=g, dtype=torch.float64) * scale
    logits = torch.randn(n, v, generator=g, dtype=torch.float64) * heat
    return logits, logits.softmax(-1).multinomial(1, generator=g)[:, 0]


# Casts.


def test_independent_rounding_has_the_bias_of_its_closed_form():
    a = half_ulp(40.0, BF16)
    assert a == 0.125
    error = a * (2 * torch.rand(2, 400_000, generator=generator(), dtype=torch.float64) - 1)
    result = ratio_error(error[0] - error[1], torch.zeros(400_000, dtype=torch.float64))
    assert result.bias == pytest.approx(independent_bias(a), abs=4 * result.bias_se)
    # Var(e)/2 of two uniform errors is a²/3, and E[exp e] ≈ 1 + Var(e)/2.
    assert result.half_var == pytest.approx(a**2 / 3, rel=0.01)
    assert independent_bias(a) == pytest.approx(a**2 / 3, rel=0.01)
    assert independent_bias(0.0) == 0.0


def test_rounding_of_a_real_logit_is_uniform_within_half_an_ulp():
    z = 32 + 32 * torch.rand(50_000, generator=generator(), dtype=torch.float64)
    error = rounded(z, BF16) - z
    # Rounding goes by way of fp32, which may turn a number just off a tie into one.
    assert error.abs().max() <= half_ulp(40.0, BF16) + 1e-5
    assert error.std().item() == pytest.approx(half_ulp(40.0, BF16) / math.sqrt(3), rel=0.02)


def test_without_a_cast_nothing_is_wrong_and_fp32_is_near_it():
    logits, ids = random_logits()
    logp, entropy = from_logits(logits, ids)
    reference = logits.log_softmax(-1)
    assert torch.equal(logp, reference.gather(1, ids[:, None])[:, 0])
    assert torch.allclose(entropy, -(reference.exp() * reference).sum(-1))
    for place in PLACES[2:]:
        cast, _ = from_logits(logits, ids, (place,), FP32)
        assert 0 < (cast - logp).abs().max() < 1e-5


def test_each_place_rounds_what_it_says():
    h, w = torch.randn(40, 16, generator=generator(1)).double(), torch.randn(300, 16, generator=generator(2)).double()
    ids = (h @ w.T).argmax(-1)
    exact = head(h, w, ids)[0]
    assert torch.equal(head(h, w, ids, ("hidden",), BF16)[0], head(rounded(h, BF16), w, ids)[0])
    assert torch.equal(head(h, w, ids, ("weights",), BF16)[0], head(h, rounded(w, BF16), ids)[0])
    logits = head(h, w, ids, ("logits",), BF16, chunk=40)[0]
    assert torch.equal(logits, from_logits(rounded(h @ w.T, BF16), ids)[0])
    assert torch.equal(head(h, w, ids, ("logp",), BF16)[0], rounded(exact, BF16))
    assert torch.equal(head(h, w, ids, ("log_softmax",), BF16)[0], rounded(exact, BF16))
    assert torch.allclose(head(h, w, ids, chunk=7)[0], exact, atol=1e-12)
    with pytest.raises(ValueError, match="'head'; leave it out"):
        head(h, w, ids, ("head",))


def test_bf16_is_coarser_than_fp16_and_logits_cost_more_than_log_probs():
    logits, ids = random_logits(scale=12.0)
    cost = {(p, d): cast_effect(logits, ids, p, d)[0] for p in ("logits", "logp") for d in (BF16, FP16, FP32)}
    for place in ("logits", "logp"):
        assert cost[place, BF16] == pytest.approx(8 * cost[place, FP16], rel=0.3)
        assert cost[place, FP32] < 1e-5
    assert cost["logits", BF16] > 3 * cost["logp", BF16]


def test_one_rounded_side_and_temperature():
    """The lse of rounded logits is biased up by half the mean square error: old log-probs are low, ratios high."""
    z = 40 + torch.randn(8000, 200, generator=generator(), dtype=torch.float64)
    ids = z.softmax(-1).multinomial(1, generator=generator(1))[:, 0]
    exact = from_logits(z, ids)[0]
    error = from_logits(z, ids, ("logits",), BF16)[0] - exact
    only_old, only_new = ratio_error(exact - error, exact), ratio_error(exact + error, exact)
    assert only_old.bias > 3 * only_old.bias_se
    assert only_old.bias - only_old.half_var == pytest.approx(half_ulp(40.0, BF16) ** 2 / 6, rel=0.5)
    assert only_new.bias < only_old.bias / 4
    cold = from_logits(z, ids, ("logits",), BF16, temperature=0.5)[0] - from_logits(z, ids, temperature=0.5)[0]
    assert cold.std() > 1.5 * error.std()


def test_wrong_clips_and_stuck_ratios_by_hand():
    true = torch.tensor([1.05, 1.05, 0.95, 1.3, 1.01]).double().log()
    cast = torch.tensor([1.25, 1.0, 0.85, 1.31, 1.01]).double().log()
    result = ratio_error(cast, true)
    assert result.wrong_high == (0.2, 0.2, 0.0)
    assert result.wrong_low == (0.2, 0.0, 0.0)
    assert result.stuck == 0.2
    with pytest.raises(ValueError, match="at least 2"):
        ratio_error(cast[:1], true[:1])


def test_sequences_average_their_errors():
    error = 0.02 * torch.randn(20_000, generator=generator(), dtype=torch.float64)
    result = sequence_error(error, 400, generator=generator())
    assert result.std == pytest.approx(0.02 / 20, rel=0.05)
    low, high = -3e-4 / 1e-3, 4e-4 / 1e-3
    inside = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
    assert result.outside == pytest.approx(1 - inside, abs=0.03)
    # The product of 400 ratios is log-normal with σ = 0.4.
    assert result.mean == pytest.approx(math.exp(400 * error.mean().item() + 0.08), rel=0.05)
    with pytest.raises(ValueError, match="length must be >= 1"):
        sequence_error(error, 0)


# Checks.


def test_grades():
    assert [grade(x) for x in (0.0, 9e-6, 1e-5, 0.049, 0.05)] == ["note", "note", "warning", "warning", "serious"]
    assert grade(math.nan) == "serious"
    # A cast that pushes no ratio out of the clip is no serious finding, one ratio in a thousand is.
    assert [grade(0.01, share) for share in (0.0, 9e-4, 1e-3)] == ["warning", "warning", "serious"]
    # Of entropies the shift of the mean counts, which is what a target is held against.
    assert [grade_entropy(x, 2.0) for x in (0.019, -0.019, 0.02, math.nan)] == ["warning"] * 2 + ["serious"] * 2


def test_reports_of_several_batches_are_one():
    def report(tokens, error, *findings):
        return Report([Finding(s, c, c, "", "", "", x) for s, c, x in findings], {"tokens": tokens}, {"a_error": error})

    both = merged(
        [
            report("30", 1.0, ("warning", "a", 0.1), ("note", "b", 0.1)),
            report("10", 3.0, ("serious", "a", 0.05), ("note", "b", 0.2), ("warning", "c", None)),
        ]
    )
    assert [(f.severity, f.code, f.nats) for f in both.findings] == [
        ("serious", "a", 0.05),
        ("warning", "c", None),
        ("note", "b", 0.2),
    ]
    assert both.checked == {"tokens": "40 in 2 batches"}
    assert both.figures["a_error"] == pytest.approx(((30 * 1 + 10 * 9) / 40) ** 0.5)
    alone = report("30", 1.0, ("warning", "a", 0.1))
    assert merged([alone]) == alone


def test_a_target_is_noted_at_another_temperature():
    logits, _ = random_logits()
    (note,) = target_findings(logits, 0.6, "80%")
    at, one = (from_logits(logits, torch.zeros(256, dtype=torch.long), temperature=t)[1].mean() for t in (0.6, 1.0))
    assert (note.severity, note.code) == ("note", "sampling_temperature")
    assert f"{at:.3g} nats per token at temperature 0.6, and {one:.3g} at 1" in note.effect
    assert target_findings(logits, 1.0, "80%") == target_findings(logits, 0.6, None) == []
    model = Small().eval()
    assert codes(audit(model, batch_of(model, 0.6), target="initial")) == {"sampling_temperature"}


def test_rounding_is_seen_whatever_the_storage():
    x = torch.randn(100, generator=generator())
    assert effective_dtype(x) == FP32
    assert effective_dtype(x.bfloat16().float()) == BF16
    assert effective_dtype(x.half().double()) == FP16
    assert effective_dtype(x.double()) == torch.float64
    assert effective_dtype(torch.zeros(100)) == FP32


def test_truncation_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().double()
    kept = kept_tokens(logits, top_p=0.7)
    assert kept.tolist() == [[True, True, False, False]]
    assert kept_tokens(logits, top_k=3).sum() == 3
    assert kept_tokens(logits, min_p=0.2).sum() == 3
    assert kept_tokens(logits, temperature=0.5, min_p=0.2).sum() == 2
    assert kept_tokens(logits).all()
    (finding,) = truncation_findings(logits, kept)
    assert finding.nats == pytest.approx(-math.log(0.8))
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.15, 0.05))
    sampled = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3)) / 0.8
    assert f"{sampled - entropy:+.2g} nats off" in finding.effect
    assert truncation_findings(logits, torch.ones_like(kept)) == []


def test_top_p_is_that_of_transformers():
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = random_logits(n=50)
    for ours, theirs in (
        ({"top_p": 0.9}, warpers.TopPLogitsWarper(0.9)),
        ({"top_k": 7}, warpers.TopKLogitsWarper(7)),
        ({"min_p": 0.05}, warpers.MinPLogitsWarper(0.05)),
    ):
        assert torch.equal(kept_tokens(logits, **ours), theirs(ids, logits.clone()).isfinite())


def test_a_temperature_is_fitted_and_another_difference_is_not_taken_for_one():
    logits, ids = random_logits()
    exact = from_logits(logits, ids)[0]
    for t in (0.3, 0.7, 1.5):
        logp = from_logits(logits, ids, temperature=t)[0]
        assert fitted_temperature(logits, ids, logp) == pytest.approx(t, rel=1e-3)
        (finding,) = sampler_findings(logits, ids, exact, logp)
        assert finding.code == "temperature"
        assert f"sampled at temperature {t:.3g} and scored at 1" in finding.what
    noise = 0.08 * torch.randn(len(ids), generator=generator()).double()
    (finding,) = sampler_findings(logits, ids, exact, exact + noise)
    assert (finding.code, finding.severity) == ("sampler_mismatch", "serious")
    assert finding.nats == pytest.approx(0.08, rel=0.2)
    missing = exact.clone()
    missing[::2] = math.nan
    assert sampler_findings(logits, ids, exact, missing) == []


def test_a_known_truncation_is_no_mismatch():
    logits, _ = random_logits()
    kept = kept_tokens(logits, top_p=0.8)
    cut = logits.masked_fill(~kept, -math.inf)
    ids = cut.softmax(-1).multinomial(1, generator=generator())[:, 0]
    assert sampler_findings(logits, ids, from_logits(logits, ids)[0], from_logits(cut, ids)[0], kept=kept) == []


def test_ratios_at_step_0():
    logp = -torch.rand(50, generator=generator())
    assert ratio_findings(logp, logp, logp) == []
    assert ratio_findings(logp, logp, None) == []
    (finding,) = ratio_findings(logp, logp, logp + 0.3)
    assert (finding.code, finding.clipped_frac) == ("stale_logp", 1.0)
    assert finding.nats == pytest.approx(0.3, rel=1e-4)
    (finding,) = ratio_findings(logp, logp + 0.3, logp + 0.3)
    assert finding.code == "dropout"
    # 0.002 nats per token is far inside a token's clip and far outside GSPO's.
    assert ratio_findings(logp, logp, logp + 0.002)[0].clipped_frac == 0.0
    assert ratio_findings(logp, logp, logp + 0.002, Clip(3e-4, 4e-4, length=64))[0].clipped_frac == 1.0


def test_entropies_that_are_none_zero_wrong_or_not_finite():
    exact = torch.rand(20, generator=generator()) + 0.5
    assert entropy_findings(exact.clone(), exact) == []
    assert entropy_findings(None, exact)[0].code == "entropy_none"
    assert entropy_findings(torch.zeros(20), exact)[0].code == "entropy_zero"
    assert entropy_findings(exact * math.nan, exact)[0].code == "entropy_nonfinite"
    (finding,) = entropy_findings(exact + 0.02, exact)
    assert (finding.code, finding.severity) == ("entropy_wrong", "serious")
    # 0.001 of about 1 nat moves a mean by a thousandth.
    assert entropy_findings(exact + 0.001, exact)[0].severity == "warning"
    assert entropy_findings(exact + 0.01, exact, explained=0.02) == []
    assert entropy_findings(torch.zeros(20), torch.zeros(20)) == []


def test_the_effect_of_the_micro_batch_decides_its_severity():
    logp = torch.zeros(2000)

    def found(at, value):
        other = logp.clone()
        other[:at] = value
        return shape_findings(logp, other)

    assert found(2000, 5e-6) == []
    # By hand: rms √(1/2000)·9e-4 = 2e-5, and |e^−9e-4 − 1| < 1e-3: no ratio moves by more than 1e-3.
    (note,) = found(1, 9e-4)
    assert (note.severity, note.code) == ("note", "batch_shape")
    assert note.nats == pytest.approx(2.01e-5, rel=0.01)
    assert "0.0009 nats at most; 0.00% of on-policy ratios" in note.effect
    (warning,) = found(4, 0.01)
    assert warning.severity == "warning"
    assert "0.01 nats at most; 0.20% of on-policy ratios" in warning.effect
    (serious,) = found(2, 0.3)  # e^−0.3 = 0.74 < 0.8
    assert (serious.severity, serious.clipped_frac) == ("serious", 1e-3)
    assert shape_findings(logp, logp * math.nan)[0].severity == "serious"
    assert shape_findings(logp, logp + 1e-3, Clip(3e-4, 4e-4, length=64))[0].severity == "serious"


def test_a_mixture_of_experts_is_told_by_its_config():
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        config = SimpleNamespace(**{name: 16})
        assert num_experts(config) == num_experts(SimpleNamespace(text_config=config)) == 16
        (finding,) = routing_findings(config)
        assert (finding.severity, finding.code) == ("warning", "moe_routing")
        assert "mixture of 16 experts" in finding.what
        assert routing_findings(config, replayed=True) == []
    assert num_experts(SimpleNamespace(moe_num_experts=[64, 32])) == 64
    dense = (None, SimpleNamespace(), SimpleNamespace(num_experts=None), SimpleNamespace(num_local_experts=1))
    assert all(routing_findings(config) == [] for config in dense)


def test_remedies_of_a_rounded_head_name_the_samplers_settings():
    z, ids = random_logits(n=64, v=50)
    logp = from_logits(z, ids)[0]
    (finding,) = sampler_findings(z, ids, logp, from_logits(z, ids, ("logits",))[0])
    assert finding.code == "sampler_mismatch"
    model = Small()
    bf16_logits(model)
    for found in (finding, audit(model, batch_of(model)).findings[0]):
        assert """--hf-overrides '{"head_dtype":"float32"}'""" in found.remedy
        assert "--enable-fp32-lm-head" in found.remedy


def test_masks():
    generated, entropy = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), torch.tensor([[1.0, 1, 1, 5], [1, 1, 5, 5]])
    assert mask_findings(generated, generated, 1 - generated, entropy) == []
    (finding,) = mask_findings(torch.ones(2, 4), generated, 1 - generated, entropy)
    assert (finding.code, finding.severity) == ("padding_counted", "serious")
    assert "3 of 8 positions" in finding.effect
    assert finding.nats == pytest.approx((5 * 1 + 3 * 5) / 8 - 1)
    dropped = generated.clone()
    dropped[0, 0] = 0
    assert mask_findings(dropped, generated, 1 - generated, entropy)[0].code == "wrong_mask"
    extra = generated.clone()
    extra[1, 2] = 1
    assert mask_findings(extra, generated, torch.zeros(2, 4), entropy)[0].code == "wrong_mask"


def test_a_report_in_text_and_json():
    (finding,) = ratio_findings(torch.zeros(9), torch.zeros(9), torch.ones(9))
    report = Report([finding._replace(nats=math.nan)], {"logits": "float32"}, {"logp_error": math.inf})
    assert [f.code for f in report.serious] == ["stale_logp"]
    read = json.loads(report.json())
    assert (read["serious"], read["findings"][0]["nats"], read["figures"]["logp_error"]) == (1, None, None)
    for part in ("serious: old log-probs", "[stale_logp]", "remedy", "logits"):
        assert part in report.text()


# The audit of a model.


class Output(dict):
    logits = property(lambda self: self["logits"])


class Small(nn.Module):
    """An embedding, a layer with dropout, and a head: what an audit needs of a transformers model, and no more."""

    def __init__(self, v=60, d=16, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(v, d), nn.Linear(d, d)
        self.drop, self.lm_head = nn.Dropout(dropout), nn.Linear(d, v, bias=True)
        self.after = None
        with torch.no_grad():
            self.lm_head.weight *= 12

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask, use_cache):
        hidden = self.drop(torch.tanh(self.mix(self.embed(input_ids))))
        logits = self.lm_head(hidden)
        return Output(logits=logits if self.after is None else self.after(logits))


def batch_of(model, temperature=1.0, **changes):
    ids = torch.randint(60, (12, 20), generator=generator(1))
    mask = torch.ones(12, 14, dtype=torch.long)
    mask[::3, 10:] = 0
    attention = torch.cat([torch.ones(12, 6, dtype=torch.long), mask], 1)
    batch = AuditBatch(ids, attention, mask, temperature=temperature)
    with torch.no_grad():
        rows = model(ids, attention, False).logits[:, 5:-1].float() / temperature
    logp = rows.log_softmax(-1).gather(2, ids[:, -14:, None])[:, :, 0].float()
    return batch._replace(**{"logp_old": logp, "logp_sampler": logp, **changes})


def codes(report):
    return {finding.code for finding in report.findings}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_clean_model_is_silent_and_left_as_it_was(temperature):
    model = Small(dropout=0.3).eval()
    report = audit(model, batch_of(model, temperature))
    assert report.findings == []
    assert not model.training
    assert not model.lm_head._forward_hooks
    assert report.checked["logits"] == report.checked["head"] == report.checked["log_softmax"] == "float32"
    assert report.checked["tokens"] == str(12 * 14 - 4 * 4)
    assert report.figures["ratio_error"] < 1e-6
    assert report.text().endswith("no findings")


def bf16_head(model):
    model.lm_head.to(BF16)
    model.lm_head.forward = lambda h: nn.functional.linear(h, model.lm_head.weight.float(), model.lm_head.bias.float())


def bf16_logits(model):
    model.after = lambda logits: logits.bfloat16()


def test_planted_casts_are_told_apart():
    for plant, code in ((bf16_head, "head_dtype"), (bf16_logits, "logits_dtype")):
        model = Small()
        plant(model)
        report = audit(model, batch_of(model))
        assert codes(report) == {code}
        assert 1e-3 < report.findings[0].nats < 0.1


def test_autocast_is_named():
    model = Small()
    with torch.autocast("cpu", dtype=BF16):
        report = audit(model, batch_of(model))
    assert codes(report) == {"logits_dtype"}
    assert "autocast to bfloat16" in report.findings[0].where
    assert report.checked["autocast"] == "bfloat16"


def scored(change):
    """A scoring pass of one's own: the exact one, changed."""

    def score(model, batch):
        num_tokens = batch.mask.shape[1]
        rows = model(batch.input_ids, batch.attention_mask, False).logits[:, -num_tokens - 1 : -1].double()
        logp = rows.log_softmax(-1)
        own = logp.gather(2, batch.input_ids[:, -num_tokens:, None])[:, :, 0]
        return change(own.float(), -(logp.exp() * logp).sum(-1).float())

    return score


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda logp, h: Scored(logp, h), set()),
        (lambda logp, h: Scored(logp, None), {"entropy_none"}),
        (lambda logp, h: Scored(logp, torch.zeros_like(h)), {"entropy_zero"}),
        (lambda logp, h: Scored(logp, h + 0.1), {"entropy_wrong"}),
        (lambda logp, h: Scored(logp.bfloat16(), h), {"logp_dtype"}),
        (lambda logp, h: Scored(logp, h.bfloat16().float()), {"entropy_dtype"}),
        (lambda logp, h: Scored(logp + 0.1 * torch.sin(99 * logp), h), {"logp_wrong"}),
    ],
)
def test_what_scoring_returns(change, expected):
    model = Small().eval()
    batch = batch_of(model, logp_old=None, logp_sampler=None)
    assert codes(audit(model, batch, scored(change))) == expected


def test_planted_sampling_and_bookkeeping():
    model = Small(dropout=0.3).eval()
    good = batch_of(model)
    wrong = good.mask.clone()
    wrong[:, 0] = 0
    cases = {
        "truncation": good._replace(top_p=0.9, logp_sampler=None),
        "stale_logp": good._replace(logp_old=good.logp_old - 0.1),
        "sampler_mismatch": good._replace(logp_sampler=good.logp_sampler + 0.1 * torch.sin(99 * good.logp_sampler)),
        "wrong_mask": good._replace(mask=wrong),
        "padding_counted": good._replace(mask=torch.ones_like(good.mask)),
    }
    for code, batch in cases.items():
        report = audit(model, batch)
        assert codes(report) == {code}
        assert report.serious
    cold = batch_of(model, temperature=0.5)
    assert codes(audit(model, good._replace(logp_sampler=cold.logp_sampler))) == {"temperature"}
    report = audit(model, cold._replace(logp_old=None, logp_sampler=None), scored(Scored))
    assert codes(report) == {"temperature"}
    assert "scored at temperature 1 and sampled at 0.5" in report.findings[0].what
    assert codes(audit(model.train(), good._replace(logp_old=None))) == {"dropout"}
    assert model.training


class Positions(Small):
    """A model whose answer depends on how many columns of padding stand before it, as absolute positions make it."""

    shift = 0.02

    def forward(self, input_ids, attention_mask, use_cache):
        out = super().forward(input_ids, attention_mask, use_cache)
        column = torch.arange(60) % 2 * self.shift * (input_ids.shape[1] + input_ids.shape[0])
        return Output(logits=out.logits + column)


def test_a_micro_batch_that_changes_log_probs_is_found():
    model = Positions().eval()
    model.lm_head.forward = lambda h: nn.functional.linear(h, model.lm_head.weight, model.lm_head.bias)
    batch = batch_of(model)
    (finding,) = [f for f in audit(model, batch).findings if f.code == "batch_shape"]
    whole, alone = [], []
    # Row 3, one of the four that are scored alone, has 4 columns of padding: 12 × 20 against 1 × 16, and 1 × 20.
    for row in (0, 3, 6, 9):
        length = int(batch.mask[row].sum())
        ids = batch.input_ids[row : row + 1, : 6 + length]
        rows = model(ids, None, False).logits[0, 5:-1].double().log_softmax(-1)
        alone.append(rows.gather(1, ids[0, 6:, None])[:, 0])
        whole.append(batch.logp_old[row, :length])
    error = torch.cat(whole).double() - torch.cat(alone)
    assert finding.nats == pytest.approx(error.square().mean().sqrt().item(), rel=1e-3)
    model.shift = 0.0
    assert "batch_shape" not in codes(audit(model, batch_of(model)))


def test_experts_without_replay_are_named_in_an_audit():
    model = Small().eval()
    model.config = SimpleNamespace(num_experts=8)
    assert codes(audit(model, batch_of(model))) == {"moe_routing"}
    assert audit(model, batch_of(model), replays_routing=True).findings == []


def test_a_soft_cap_after_the_head_is_not_taken_for_an_error():
    model = Small()
    model.after = lambda logits: 5 * torch.tanh(logits / 5)
    assert audit(model, batch_of(model)).findings == []


def test_a_batch_that_does_not_fit_is_refused():
    model = Small()
    good = batch_of(model)
    for change, message in (
        ({"mask": torch.zeros_like(good.mask)}, "at least 1 token"),
        ({"logp_old": good.logp_old[:, 1:]}, r"logp_old must be \[b t\]"),
        ({"mask": torch.ones(12, 20)}, "mask must cover 1 to 19"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            audit(model, good._replace(**change))


def scored_rows(logits, temperature=1.0):
    """Sampled ids, and the log-probs and entropies that fp32 arithmetic makes of these logits."""
    ids = torch.distributions.Categorical(logits=logits.float() / temperature).sample()
    rows = (logits.float() / temperature).log_softmax(-1)
    return ids, Scored(rows.gather(1, ids[:, None])[:, 0], -(rows.exp() * rows).sum(-1))


def test_rows_of_a_forward_pass_are_audited_without_another_one():
    torch.manual_seed(0)
    logits = 4 * torch.randn(256, 40)
    ids, scored = scored_rows(logits)
    dtypes = {"head": torch.float32, "autocast": None, "output": None}
    findings, figures = audit_rows(logits, ids, scored, dtypes, logp_old=scored.logp, logp_sampler=scored.logp)
    assert findings == []
    assert figures["entropy/mean"] == pytest.approx(scored.entropy.mean().item(), abs=1e-6)
    # Half an ulp of a bf16 logit between 4 and 8 is 2⁻⁶: no ratio leaves a clip of 0.2, and many leave that of GSPO.
    rounded_logits = logits.bfloat16()
    ids, scored = scored_rows(rounded_logits)
    findings, _ = audit_rows(rounded_logits, ids, scored, {**dtypes, "autocast": torch.bfloat16})
    assert [(f.code, f.severity, f.clipped_frac) for f in findings] == [("logits_dtype", "warning", 0.0)]
    band = Clip(3e-4, 4e-4, length=64)
    strict, _ = audit_rows(rounded_logits, ids, scored, {**dtypes, "autocast": torch.bfloat16}, clip=band)
    assert [(f.code, f.severity) for f in strict] == [("logits_dtype", "serious")]
    assert 1e-3 < findings[0].nats < 2**-6
    assert "under autocast to bfloat16" in findings[0].where


def test_rows_whose_scores_are_off_say_by_how_much():
    torch.manual_seed(0)
    logits = torch.randn(256, 40)
    ids, scored = scored_rows(logits)
    dtypes = {"head": torch.float32, "autocast": None, "output": None}
    shifted = {"logp_old": scored.logp - 0.01, "logp_sampler": scored.logp + 0.02 * torch.randn(256)}
    findings, figures = audit_rows(logits, ids, scored, dtypes, **shifted)
    assert {f.code for f in findings} == {"stale_logp", "sampler_mismatch"}
    assert figures["ratio_error"] == pytest.approx(0.01, rel=1e-3)
    assert figures["sampler_error"] == pytest.approx(0.02, rel=0.1)
    (findings,) = audit_rows(logits, ids, scored._replace(entropy=torch.zeros(256)), dtypes)[0]
    assert findings.code == "entropy_zero"
    cold = Scored((logits / 0.7).log_softmax(-1).gather(1, ids[:, None])[:, 0], scored.entropy)
    (findings,) = audit_rows(logits, ids, cold, dtypes)[0]
    assert findings.code == "temperature"
    assert findings.what == "tokens are scored at temperature 0.7 and sampled at 1"
