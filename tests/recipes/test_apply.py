"""A recipe at work on components of one's own: what they get, what they must return, whose gradient is carried."""

import math
from dataclasses import dataclass

import pytest
import torch

from isentropic.recipes import Objective, Shaping, advantages, compose, loss, select, shape
from isentropic.recipes.apply import _lost, token_weights
from isentropic.recipes.stages import OBJECTIVES
from isentropic.types import TokenBatch, TokenFacts

NONE = torch.zeros(2, 2, dtype=torch.bool)
FACTS = TokenFacts(torch.ones(2, 2), NONE, NONE)


def tokens():
    """As many sequences as tokens, so that an advantage along the wrong axis would broadcast."""
    rows = torch.tensor([[[0.25, 0.75], [0.5, 0.5]], [[0.5, 0.5], [0.75, 0.25]]]).log().requires_grad_()
    logp = rows[..., 0]
    entropy = -(rows.exp() * rows).sum(-1)
    return TokenBatch(logp, None, torch.tensor([2.0, -1.0]), torch.ones(2, 2), entropy, None, rows)


def with_entropy(logp, adv, entropy):
    return -adv * logp - 0.1 * entropy, FACTS


def with_rows(logp, adv, logp_rows):
    return -adv * logp + 0.1 * logp_rows.exp().square().sum(-1), FACTS


def with_batch(batch):
    return with_entropy(batch.logp, batch.adv, batch.entropy)


@pytest.mark.parametrize(
    ("objective", "name"), [(with_entropy, "entropy"), (with_rows, "logp_rows"), (with_batch, "entropy")]
)
def test_a_gradient_that_an_engine_would_lose_is_refused(objective, name):
    recipe = compose("loop", objective=objective)
    says = rf"objective test_apply.{objective.__name__} depends on {name}, .*write that part as a penalty"
    with pytest.raises(ValueError, match=says):
        token_weights(recipe, tokens(), None)
    assert torch.isfinite(loss(recipe, tokens())[0].mean())  # a loop of one's own has the whole of it


def test_entropy_without_a_gradient_is_carried():
    def confident(logp, adv, entropy):
        return -adv * logp * (1 + entropy.detach()), FACTS

    batch = tokens()
    weights, _ = token_weights(compose("loop", objective=confident), batch, None)
    torch.testing.assert_close(weights, torch.tensor([[2.0], [-1.0]]) * (1 + batch.entropy.detach()))


def test_a_loss_without_a_gradient_is_refused():
    recipe = compose("loop", objective=lambda logp, adv: (-adv * logp.detach(), FACTS))
    with pytest.raises(ValueError, match="must depend on logp with a gradient, got none"):
        token_weights(recipe, tokens(), None)


def test_no_field_becomes_a_leaf_unless_an_objective_names_it():
    """The objectives of the package read the batch, and of it neither: a leaf is one more detached tensor."""
    assert [name for name in OBJECTIVES if _lost(compose("loop", objective=name))] == []
    assert _lost(compose("loop", objective=with_entropy)) == ["entropy"]
    assert _lost(compose("loop", objective=with_batch)) == ["entropy", "logp_rows"]
    assert _lost(compose("loop", objective=lambda logp, adv: (logp, FACTS))) == []


def test_an_objective_gets_advantages_by_token_from_the_table_and_from_a_function(monkeypatch):
    """With as many sequences as tokens, [b] would broadcast along the tokens without a word."""

    def plain(logp, adv):
        assert adv.shape == logp.shape
        return -adv * logp, FACTS

    monkeypatch.setitem(OBJECTIVES, "plain", Objective("−A·log π", plain))
    wanted = [[2.0, 2.0], [-1.0, -1.0]]
    for objective in ("plain", plain, "reinforce", OBJECTIVES["plain"]):
        assert token_weights(compose("loop", objective=objective), tokens(), None)[0].tolist() == wanted


def test_an_entry_of_a_table_as_an_object_is_its_name():
    from isentropic.recipes.stages import BOUNDS, SHAPINGS

    recipe = compose("loop", shaping=SHAPINGS["none"], bounds=BOUNDS["additive"], clip_low=0.1)
    assert (recipe.shaping, recipe.bounds) == ("none", "additive")
    assert recipe.plain


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda rewards: rewards.mean(1), r"\[2\]"),
        (lambda rewards: rewards, r"\[2, 3\]"),
        (lambda rewards: rewards.T, r"\[3, 2\]"),
        (lambda rewards: 0.0, "float"),
    ],
)
def test_a_baseline_returns_one_number_for_each_sample(function, got):
    with pytest.raises(ValueError, match=rf"baseline .* must return \[b\] \[6\], prompt by prompt, got {got}"):
        advantages(compose("loop", baseline=function), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("stage", "function", "got"),
    [
        ("shaping", lambda adv: 1.0, "float"),
        ("shaping", lambda adv: None, "NoneType"),
        ("shaping", lambda adv: adv.mean(), r"\[\]"),
        ("selection", lambda adv: None, "NoneType"),
        ("selection", lambda adv: adv[:, 0], r"\[2\]"),
        ("penalty", lambda logp: logp.mean(0), r"\[2\]"),
        ("penalty", lambda logp: logp.mean(), r"\[\]"),
    ],
)
def test_a_component_returns_a_number_for_each_token(stage, function, got):
    with pytest.raises(ValueError, match=rf"{stage} .* must return \[b t\] \[2, 2\], got {got}$"):
        loss(compose("loop", **{stage: function}), tokens())


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda logp: logp, r"must return a loss \[b t\] and TokenFacts, got \[2, 2\]; return both"),
        (lambda logp: (logp, None), r"must return a loss \[b t\] and TokenFacts, got \(\[2, 2\], NoneType\)"),
        (lambda logp: (logp.mean(), FACTS), r"must return a loss per token, \[b t\] \[2, 2\], got \[\]"),
        (lambda logp: (logp, FACTS._replace(ratio=1.0)), r"must return ratio per token, \[b t\] \[2, 2\], got float"),
    ],
)
def test_an_objective_returns_a_loss_and_facts(function, says):
    with pytest.raises(ValueError, match=says):
        loss(compose("loop", objective=function), tokens())


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda clip_low: 1 - clip_low, "float"),
        (lambda clip_low: (1 - clip_low, None), r"\(float, NoneType\)"),
        (lambda clip_low, adv: (1 - clip_low, adv[:, 0]), r"\(float, \[2\]\)"),
    ],
)
def test_bounds_return_two_ratios(function, got):
    with pytest.raises(ValueError, match=rf"bounds .* must return the lowest and the highest ratio, .*got {got}$"):
        loss(compose("loop", bounds=function), tokens())


def test_predicted_needs_entropies():
    recipe = compose("loop", shaping=lambda adv, predicted: adv * predicted.sign())
    assert recipe.reads == {"entropy"}
    with pytest.raises(ValueError, match=r"needs batch\.entropy, got None; pass the entropies of the rows"):
        shape(recipe, tokens()._replace(entropy=None))


def test_an_object_that_has_no_hash_is_a_component():
    @dataclass
    class Boost:
        strength: float

        def __call__(self, adv, logp):
            return self.strength * adv

    recipe = compose("loop", shaping=Boost(0.5))
    assert shape(recipe, tokens()).tolist() == [[1.0, 1.0], [-0.5, -0.5]]
    assert compose("loop", shaping=Shaping("", Boost(2.0))).component("shaping").written != recipe.shaping.written
    hash(recipe)


def test_a_selection_may_be_of_booleans():
    assert select(compose("loop", selection=lambda adv: adv > 0), tokens()).tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("shaping", ["repo", "repo_r", "repo_r_raw", "repo_d", "repo_d_token", "repo_r_positive"])
@pytest.mark.parametrize("field", ["logp", "entropy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_shaping_never_makes_an_advantage_that_is_not_finite(shaping, field, value):
    """A broken token keeps its advantage, and so do the others if a mean over the batch is broken by it."""
    knob = "beta" if shaping == "repo" else "zeta"
    recipe = compose("loop", shaping=shaping, constants={knob: 0.5})
    batch = tokens()._replace(adv=torch.tensor([-2.0, 1.0]))  # entropy is predicted to fall, by token and on average
    whole = shape(recipe, batch)
    wrong = getattr(batch, field).detach().clone()
    wrong[1, 0] = value
    shaped = shape(recipe, batch._replace(**{field: wrong}))
    assert shaped.isfinite().all()
    kept = [[-2.0, -2.0], [1.0, 1.0]]
    assert whole.tolist() != kept
    if field == "entropy" and shaping in ("repo_r_raw", "repo_r_positive"):
        assert torch.equal(shaped, whole)
    elif shaping == "repo_d":
        assert shaped.tolist() == kept
    else:
        others = torch.tensor([[True, True], [False, True]])
        assert torch.equal(shaped[others], whole[others])


def test_a_broken_entropy_adds_nothing_to_a_bonus():
    recipe, batch = compose("loop", entropy_coef=0.5), tokens()
    entropy = torch.tensor([[1.0, math.nan], [2.0, math.inf]], requires_grad=True)
    total, _ = loss(recipe, batch._replace(entropy=entropy))
    plain, _ = loss(compose("loop"), batch)
    assert (plain.sum - total.sum).item() == pytest.approx(0.5 * (1.0 + 2.0))
    slope = torch.autograd.grad(total.sum, entropy)[0]
    assert slope.tolist() == [[-0.5, 0.0], [-0.5, 0.0]]
