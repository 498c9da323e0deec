"""What a recipe hands to an engine's loss, against the recipe's own loss."""

import math

import pytest
import torch

from isentropic.control.controllers import Range
from isentropic.engines.rewrite import across_knob, advantages_at, lower_width, rewrite
from isentropic.recipes import RECIPES, Knob, Shaping, compose, knob_range, loss, with_knob
from isentropic.recipes.apply import token_loss
from isentropic.types import TokenBatch

# Recipes that read no more than log-probs, entropies and rewards.
PLAIN = [
    name for name, recipe in RECIPES.items() if not recipe.reads & {"logp_rows"} and recipe.selection != "clip_cov"
]


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(4, 5, generator=g, dtype=torch.float64) * 3
    old = logp + 0.2 * torch.randn(4, 5, generator=g, dtype=torch.float64)
    adv = torch.randn(4, generator=g, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([[5], [3], [4], [1]])).double()
    entropy = torch.rand(4, 5, generator=g, dtype=torch.float64)
    return TokenBatch(logp, old, adv, mask, entropy, entropy * 1.02, reward=(adv > 0).double())


@pytest.mark.parametrize("name", PLAIN)
def test_the_general_path_has_the_gradient_of_the_recipes_own_loss(name):
    """−exp(logp − sg(logp))·w by tokens, whose ratio is 1, has exactly the gradient of the objective."""
    recipe, tokens = RECIPES[name], batch()
    rewritten = rewrite(recipe, tokens, native=False)
    leaf = tokens.logp.clone().requires_grad_()
    assert torch.equal(rewritten.logp_old, tokens.logp)
    engine = -torch.where(tokens.mask.bool(), (leaf - rewritten.logp_old).exp() * rewritten.advantages, 0.0).sum()
    ours = token_loss(recipe, tokens._replace(logp=leaf), penalised=False)[0].sum()
    got, wanted = (torch.autograd.grad(x, leaf)[0] for x in (engine, ours))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["repo-r-loop", "isentropic", "entropic"])
def test_the_native_path_rewrites_advantages_alone(name):
    recipe, tokens = with_knob(RECIPES[name], 0.3), batch()
    rewritten = rewrite(recipe, tokens, native=True)
    assert rewritten.facts is None
    assert rewritten.logp_old is None
    leaf = tokens.logp.clone().requires_grad_()
    native = compose(recipe, shaping="none", knob="none")
    shaped = tokens._replace(logp=leaf, adv=rewritten.advantages)
    got = torch.autograd.grad(loss(native, shaped)[0].mean(), leaf)[0]
    wanted = torch.autograd.grad(loss(recipe, tokens._replace(logp=leaf))[0].mean(), leaf)[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_a_difference_across_the_knob_is_centred():
    recipe = compose("loop", knob="beta", target="1.0")
    moved = across_knob(recipe, 0.2, lambda end: torch.tensor(end.number("beta") ** 3, dtype=torch.float64))
    assert moved.width == pytest.approx(2 * 1e-3 * 2)  # a thousandth of [−1, 1] to either side
    assert (moved.change / moved.width).item() == pytest.approx(3 * 0.2**2, rel=1e-4)
    clip = across_knob(RECIPES["adapo"], 0.4, lambda end: torch.tensor(end.clip_high, dtype=torch.float64))
    assert clip.width == pytest.approx(0.2)  # half the width of the clip
    assert (clip.change / clip.width).item() == pytest.approx(1.0)


def test_advantages_at_another_value_of_the_knob():
    """A − β·L is linear in β, so that a difference gives −L exactly."""
    recipe, tokens = compose("loop", knob="beta", target="1.0"), batch()
    still = with_knob(recipe, 0.1)
    rewritten = rewrite(still, tokens, native=True)
    moved = across_knob(recipe, 0.1, lambda end: advantages_at(end, tokens, rewritten))
    torch.testing.assert_close(moved.change / moved.width, -(tokens.logp + tokens.entropy), rtol=0, atol=1e-9)
    assert knob_range(recipe) == Range(0.0, -1.0, 1.0, 1e-3)


def test_the_lower_width_of_a_reciprocal_clip():
    assert 1 - lower_width(RECIPES["loop"]) == pytest.approx(1 / 1.1)
    assert lower_width(RECIPES["dapo"]) == 0.2


def test_a_difference_across_the_knob_stays_in_its_range():
    """The formula of a knob need not be defined outside: here it is a root."""
    shaping = Shaping("A·(1+√k)", lambda adv, root: adv * (1 + math.sqrt(root)), constants={"root": 0.0},
                      knobs={"root": Knob(Range(0.0, 0.0, 4.0))})  # fmt: skip
    recipe = compose("loop", shaping=shaping, knob="root", controller="fixed")
    seen = []

    def quantity(recipe):
        seen.append(recipe.number("root"))
        return torch.tensor(2 * recipe.number("root"), dtype=torch.float64)

    for value, expected in ((0.0, [0.004, 0.0]), (4.0, [4.0, 3.996]), (1.0, [1.004, 0.996])):
        seen.clear()
        change, width = across_knob(recipe, value, quantity)
        assert seen == pytest.approx(expected)
        assert float(change) / width == pytest.approx(2.0)
