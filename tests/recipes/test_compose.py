"""Recipes: every composition, the special cases that must coincide, and what is refused by name."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from isentropic.control.controllers import CONTROLLERS
from isentropic.control.targets import constant, parse_level
from isentropic.entropy.prediction import predicted_change
from isentropic.losses import reduce
from isentropic.recipes import (
    RECIPES,
    Recipe,
    advantages,
    build_thermostat,
    check,
    compose,
    knob_range,
    loss,
    shape,
    with_knob,
)
from isentropic.recipes.knobs import all_knobs
from isentropic.types import EntropyReading, TokenBatch


def batch(b=6, t=5, v=11, seed=0, off=0.3):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, t, v, generator=g, requires_grad=True)
    ids = torch.randint(v, (b, t, 1), generator=g)
    logs = logits.log_softmax(-1)
    logp = logs.gather(-1, ids)[..., 0]
    entropy = -(logs.exp() * logs).sum(-1)
    mask = (torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)).float()
    old = logp.detach() + off * torch.randn(b, t, generator=g)
    return logits, TokenBatch(logp, old, torch.randn(b, generator=g), mask, entropy)


def rows(tokens, part):
    return TokenBatch(*(None if x is None else x[part] for x in tokens))


def gradient(recipe, knob=None, seed=0, **kw):
    logits, tokens = batch(seed=seed, **kw)
    total, _ = loss(recipe, tokens, knob)
    return torch.autograd.grad(total.mean(), logits)[0]


def test_the_catalogue_holds_what_is_promised():
    bases = ["rloo", "loop", "grpo", "dapo", "gspo"]
    wanted = {f"repo-{kind}-{base}" for kind in "rd" for base in bases} | set(bases)
    wanted |= {"isentropic", "reinforce", "dr-grpo", "cispo", "entropy-bonus", "entropy-bonus-adaptive", "adapo"}
    wanted |= set("clip-cov kl-cov entropic entrocraft dynamic-clip dcpo bapo ce-gppo qae erc sapo".split())
    wanted |= set("high-entropy mai stare lp-reg aent pass-at-k up steer tre-p tre-k opefo nsr w-reinforce".split())
    wanted |= {"unlikeliness", "ucpo", "distribution-centric", "aepo"}
    assert set(RECIPES) == wanted
    for recipe in RECIPES.values():
        assert check(recipe) is recipe


@pytest.mark.parametrize(
    ("recipe", "knob", "controller", "target"),
    list(
        itertools.product(
            ["loop", "gspo", "rloo"],
            [name for name, knob in all_knobs().items() if knob.needs != "penalty"],
            CONTROLLERS,
            ["initial", "0.8", "80%", "anneal:100%:50%:9", "band:80%:120%"],
        )
    ),
)
def test_any_knob_any_controller_any_target_composes(recipe, knob, controller, target):
    if recipe == "rloo" and knob.startswith("clip"):
        with pytest.raises(ValueError, match=f"knob {knob} needs a clip"):
            compose(recipe, knob=knob)
        return
    made = compose(recipe, knob=knob, controller=controller, target=target)
    control = build_thermostat(made)
    state = control.init()
    for mean in (1.0, 0.5, 0.4, 2.0, 3.0):
        state = control.update(state, EntropyReading(mean * 8, 8.0, predicted=-1e-3, gain=5e-3, steps=1))
        _, tokens = full()
        total, _ = loss(made, tokens, state.value)
        assert torch.isfinite(total.mean())


@pytest.mark.parametrize(
    ("recipe", "changes", "says"),
    [
        ("repo-r", {}, "did you mean repo-r"),
        ("rloo", {"knob": "clip_high"}, "needs a clip"),
        ("grpo", {"knob": "clip_hihg"}, "did you mean clip_high"),
        ("grpo", {"controller": "pi"}, "has no knob to turn"),
        ("grpo", {"target": "0.8"}, "target has no effect without a knob"),
        ("grpo", {"targt": "1"}, "did you mean target"),
        ("grpo", {"clip_low": 1.5}, "clip_low must be < 1"),
        ("grpo", {"clip_high": -0.1}, "clip_high must be > 0"),
        ("grpo", {"knob": "zeta", "shaping": "none"}, "needs a shaping"),
        ("adapo", {"knob_low": 2.0}, "knob low must be < high"),
        ("adapo", {"controller": "pi:gain=x"}, "must be a number"),
        ("adapo", {"target": "0"}, "must be > 0"),
        ("grpo", {"baseline": "median"}, "baseline must be one of"),
        ("grpo", {"knob_low": 0.1}, "knob_low has no effect without a knob"),
        ("grpo", {"knob_start": 0.1}, "knob_start has no effect without a knob"),
        ("grpo", {"penalty_coef": 0.1}, "penalty_coef has no effect without a penalty, got 0.1; name one of"),
        ("grpo", {"entropy_coef": math.nan}, "entropy_coef must be a number, got nan"),
        ("grpo", {"entropy_coef": math.inf}, "entropy_coef must be a finite number, got inf"),
        ("grpo", {"overlong_buffer": -3}, "overlong_buffer must be >= 0 tokens, got -3"),
        ("grpo", {"redraw": 0.6}, "redraw must be a share of the batch in .-0.5, 0.5., got 0.6"),
        ("aepo", {"knob_high": 0.7}, "knob_high must be a share of the batch in .-0.5, 0.5., got 0.7"),
        ("grpo", {"redraw": 0.1, "redraw_low": 1.0}, "redraw_low must be in .0, 1. and redraw_high above 1"),
        ("clip-cov", {"constants": {"cov_low": math.nan}}, "cov_low must be a number, got nan"),
        ("qae", {"knob": "quantile", "knob_low": 0.1, "knob_high": 0.9}, "number of the baseline, which can have none"),
        ("clip-cov", {"knob": "cov_low", "knob_low": 0.1, "knob_high": 2.0}, "number of the selection, which can"),
        ("bapo", {"knob": "clip_low", "knob_high": 1.5}, "knob_high of clip_low must be < 1 with balanced bounds"),
        ("dapo", {"knob": "clip_high", "knob_low": -0.1}, "knob_low of clip_high must be >= 0, got -0.1"),
        ("mine.py", {}, "recipe 'mine.py' must name what is in it"),
    ],
)
def test_what_cannot_work_is_refused_by_name(recipe, changes, says):
    with pytest.raises(ValueError, match=says):
        compose(recipe, **changes)


def test_numbers_of_numpy_are_numbers():
    recipe = compose(
        "clip-cov", clip_high=np.float64(0.3), every=None, overlong_buffer=np.int64(2), cov_low=np.float32(2)
    )
    assert [type(x) for x in (recipe.clip_high, recipe.overlong_buffer, recipe.constants["cov_low"])] == [
        float,
        int,
        float,
    ]
    assert compose("grpo", penalty_coef=1.0) == RECIPES["grpo"]
    assert compose("adapo", knob="none", knob_low=0.1).knob is None


def test_on_policy_and_clip_knobs_exclude_one_another():
    with pytest.raises(ValueError, match="no ratio leaves 1"):
        check(RECIPES["adapo"], updates=1)
    with pytest.raises(ValueError, match="strictly on-policy"):
        check(RECIPES["rloo"], updates=4)
    check(RECIPES["repo-r-loop"], updates=1)


def test_a_knob_brings_its_shaping_and_a_controller():
    made = compose("dapo", knob="zeta")
    assert (made.shaping, made.controller, made.target, made.every) == ("repo_r", "predictive", "auto", 1)
    assert compose("dapo", knob="beta").shaping == "repo"
    assert compose("repo-d-loop", knob="zeta").shaping == "repo_d"
    assert compose("repo-r-loop", knob="none").knob is None


def test_knob_range_follows_the_recipe():
    # 4·0.4 where the bound would be below 0: capped, whichever rule it is.
    for name in ("bapo", "mai"):
        assert knob_range(compose(name, knob="clip_low", target="80%")).high == 0.95
    assert knob_range(compose("bapo", knob="clip_low", target="80%", bounds="reciprocal")).high == 1.6
    assert knob_range(compose("gspo", knob="clip_high")).start == 4e-4
    assert knob_range(compose("adapo", knob_high=0.5, knob_start=0.3))[:3] == (0.3, 0.07, 0.5)


@pytest.mark.parametrize(
    "target", ["auto", "auto:price", "floor:60%", constant(parse_level("60%"))._replace(one_way=True)]
)
def test_a_floor_leaves_the_half_of_the_range_that_raises_entropy(target):
    def bounds(name="loop", **settings):
        return knob_range(compose(name, target=target, **settings))[:3]

    assert bounds(knob="zeta") == (0.0, 0.0, 1.0)
    assert bounds("entropic") == (0.0, -1.0, 0.0)  # a larger α lowers entropy
    assert bounds("dapo", knob="clip_high") == (0.28, 0.28, 1.12)  # a bound does nothing at the recipe's own
    assert bounds("bapo", knob="clip_low") == (0.4, 0.1, 0.4)
    assert bounds(knob="boost") == (1.0, 1.0, 1.5)
    # Whoever gives the other bound wants it, and a knob that follows nothing may be anywhere.
    assert bounds(knob="zeta", knob_low=-0.5) == (0.0, -0.5, 1.0)
    assert bounds(knob="zeta", knob_start=-0.5, controller="fixed") == (-0.5, -1.0, 1.0)
    assert knob_range(compose("loop", knob="zeta", target="auto:settle=10%")).low == -1.0  # to let entropy down
    assert knob_range(compose("loop", knob="zeta", target="60%")).low == -1.0


def test_grpo_is_dapo_with_equal_bounds_and_its_own_reduction():
    dapo = compose("dapo", clip_high=0.2, reduction="sequence")
    assert torch.equal(gradient(RECIPES["grpo"]), gradient(dapo))


def test_loop_is_the_clip_with_a_leave_one_out_baseline():
    loop = compose("dapo", baseline="leave_one_out", bounds="reciprocal", clip_low=0.1, clip_high=0.1)
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    # Leave-one-out by hand: 1 − 0 = 1, 0 − 1/2 = −0.5; 1 − 1/2 = 0.5, 0 − 1 = −1.
    assert advantages(loop, rewards).tolist() == pytest.approx([1.0, -0.5, -0.5, 0.5, 0.5, -1.0])
    assert torch.equal(gradient(RECIPES["loop"]), gradient(loop))


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("repo")])
def test_repo_with_a_knob_of_zero_is_its_base(name):
    base = compose(name.split("-", 2)[2])
    assert torch.allclose(gradient(compose(name), knob=0.0), gradient(base), atol=1e-7)


def test_on_policy_surrogates_share_one_gradient():
    same = [replace(RECIPES["rloo"], objective=o) for o in ("reinforce", "importance", "clipped", "cispo")]
    logits, tokens = batch()
    tokens = tokens._replace(logp_old=None)
    grads = [torch.autograd.grad(loss(r, tokens)[0].mean(), logits, retain_graph=True)[0] for r in same]
    for grad in grads[1:]:
        assert torch.allclose(grad, grads[0], atol=1e-7)


def test_micro_batches_add_up_to_the_whole():
    for name in ("grpo", "dapo", "dr-grpo", "gspo", "entropy-bonus", "repo-r-loop"):
        recipe = RECIPES[name]
        _, tokens = batch(b=8)
        whole, _ = loss(recipe, tokens, None, length=5)
        parts = [loss(recipe, rows(tokens, slice(i, i + 3)), None, length=5)[0] for i in range(0, 8, 3)]
        joined = reduce.merge(*parts)
        assert torch.allclose(joined.mean(), whole.mean(), atol=1e-6), name


def test_a_bonus_adds_its_gradient():
    logits, tokens = batch()
    recipe = compose("dapo", entropy_coef=0.01)
    plain = torch.autograd.grad(loss(RECIPES["dapo"], tokens)[0].mean(), logits, retain_graph=True)[0]
    both = torch.autograd.grad(loss(recipe, tokens)[0].mean(), logits, retain_graph=True)[0]
    mean_entropy = (tokens.entropy * tokens.mask).sum() / tokens.mask.sum()
    bonus = torch.autograd.grad(mean_entropy, logits)[0]
    assert torch.allclose(both, plain - 0.01 * bonus, atol=1e-7)


def test_repo_r_by_hand():
    # log π = −2, ζ = 0.1. A = 1: raw 1 − 0.1·(−2) = 1.2, centred with H = 0.5: 1 − 0.1·(−1.5) = 1.15; A = −1: −0.8.
    tokens = TokenBatch(
        torch.tensor([[-2.0], [-2.0]]), None, torch.tensor([1.0, -1.0]), torch.ones(2, 1), torch.full((2, 1), 0.5)
    )
    raw = Recipe("", "", shaping="repo_r_raw", constants={"zeta": 0.1})
    assert shape(raw, tokens).flatten().tolist() == pytest.approx([1.2, -0.8])
    assert shape(replace(raw, shaping="repo_r"), tokens).flatten().tolist() == pytest.approx([1.15, -0.85])
    assert shape(replace(raw, shaping="repo_r_positive"), tokens).flatten().tolist() == pytest.approx([1.2, -1.0])


@pytest.mark.parametrize(("name", "right"), [("nsr", 0.0), ("w-reinforce", 0.1)])
def test_negative_sample_reinforcement_by_hand(name, right):
    """−1 for every wrong answer, in groups that are all wrong too, and λ for right ones."""
    adv = advantages(RECIPES[name], torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    tokens = TokenBatch(torch.full((6, 1), -2.0), None, adv, torch.ones(6, 1))
    assert shape(RECIPES[name], tokens)[:, 0].tolist() == pytest.approx([right, -1, -1, -1, right, right])
    controlled = compose(name, knob="reject", target="60%")
    assert knob_range(controlled).start == pytest.approx(1 - right)


def test_the_tilt_is_the_distance_to_the_target_in_nats():
    """Released code: κ = H* − H, at most 0.1, at H* = 0.5 nats."""
    control = build_thermostat(RECIPES["distribution-centric"])
    for mean, tilt in ((0.46, 0.04), (0.2, 0.1), (0.55, -0.05), (0.5, 0.0), (2.0, -0.1)):
        state = control.update(control.init(), EntropyReading(mean * 8, 8.0))
        assert state.value == pytest.approx(tilt, abs=1e-12)


def test_answers_of_another_temperature_move_entropy():
    """AEPO by hand: π is (0.8, 0.2), the expected step with A = 1 is π_T − π, and ∂H/∂z = −π·L = (−0.2218, 0.2218)."""
    p = torch.tensor([0.8, 0.2])
    logp, entropy = p.log(), -(p * p.log()).sum().expand(2)
    moments = [(p**2 * p.log() ** n).sum().expand(1, 2) for n in (0, 1)]
    change = predicted_change(torch.ones(1, 2), logp[None], entropy[None], *moments)[0]
    # π_T is (2/3, 1/3) at 2, π itself at 1, and (16/17, 1/17) at 1/2.
    for temperature, moved in ((2.0, 0.0591), (1.0, 0.0), (0.5, -0.0626)):
        drawn = (logp / temperature).softmax(0)
        assert float((drawn * change).sum()) == pytest.approx(moved, abs=1e-4)


def test_a_share_is_drawn_again_on_the_side_of_the_target():
    """Released code: 60 of 2,560 answers at 1.2 below H* = 0.5 nats, 30 at 0.8 above it."""
    control, recipe = build_thermostat(RECIPES["aepo"]), RECIPES["aepo"]
    for mean, count in ((0.4, 60), (0.6, -30)):
        state = control.update(control.init(), EntropyReading(mean * 8, 8.0))
        assert 2560 * with_knob(recipe, state.value).redraw == pytest.approx(count, abs=0.1)
    assert (recipe.redraw_high, recipe.redraw_low, control.init().value) == (1.2, 0.8, 0.0)
    assert recipe.redraws
    assert compose("grpo", redraw=0.1).redraws
    assert not RECIPES["grpo"].redraws


def test_a_baseline_that_ranks_by_probability_needs_it():
    rewards, logp = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[-1.0, -2.0, -3.0]])
    got = advantages(RECIPES["unlikeliness"], rewards, logp)
    worth = torch.tensor([[1 - 0.25, 1 - 0.25 * 2 / 3, 0.0]])
    assert got.tolist() == pytest.approx(advantages(RECIPES["grpo"], worth).tolist())
    with pytest.raises(ValueError, match=r"baseline unlikeliness needs the log-probabilities of .*, got rewards alone"):
        advantages(RECIPES["unlikeliness"], rewards)
    assert torch.equal(advantages(RECIPES["grpo"], rewards, logp), advantages(RECIPES["grpo"], rewards))


def by_probability(rewards, logp_mean):
    return (rewards * logp_mean).flatten()


@pytest.mark.parametrize("baseline", ["unlikeliness", "uniform_correct", by_probability])
def test_a_baseline_that_ranks_by_probability_needs_several_updates(baseline):
    recipe, message = compose("grpo", baseline=baseline), "needs the log-probabilities of sampling time, which engines"
    assert check(recipe, updates=2) is recipe
    with pytest.raises(ValueError, match=message):
        check(recipe, updates=1)
    with pytest.raises(ValueError, match=message):
        compose("rloo", baseline=baseline)  # strictly on-policy


def full(seed=0):
    """A batch that holds all that any recipe reads, with anything at all where it is masked."""
    logits, tokens = batch(seed=seed)
    hidden = tokens.mask == 0
    g = torch.Generator().manual_seed(seed + 1)
    entropy_old = tokens.entropy.detach() * (1 + 0.1 * torch.randn(tokens.mask.shape, generator=g))
    tokens = tokens._replace(
        logp_old=tokens.logp_old.masked_fill(hidden, float("nan")),
        entropy_old=entropy_old.masked_fill(hidden, float("inf")),
        logp_rows=logits.log_softmax(-1),
        reward=(tokens.adv > 0).float(),
    )
    return logits, tokens


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_in_a_hand_written_loop(name):
    recipe = RECIPES[name]
    control = build_thermostat(recipe)
    value = control.init().value if control else None
    logits, tokens = full()
    torch.manual_seed(0)
    total, facts = loss(recipe, tokens, value, length=5)
    slope = torch.autograd.grad(total.mean(), logits)[0]
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
    assert (slope[tokens.mask == 0] == 0).all()
    assert facts.ratio[tokens.mask == 0].eq(1).all() or recipe.objective == "sequence_clipped"
    # The loss alone decides: a token more that is masked, and nothing changes.
    if recipe.selection != "clip_cov":
        wide = tokens._replace(**{k: pad(x) for k, x in tokens._asdict().items() if k not in ("adv", "reward")})
        again, _ = loss(recipe, wide, value, length=5)
        assert torch.allclose(again.mean(), total.mean(), atol=1e-6)


def pad(x):
    return None if x is None else torch.cat([x, torch.zeros_like(x[:, :1])], 1)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("entropic", 0.5, -0.5),
        ("entrocraft", -1.0, 1.0),
        ("stare", 1.0, 1.5),
        ("aent", 0.0, 0.5),
        ("mai", 1.5, 4.0),
        ("distribution-centric", -0.1, 0.1),
    ],
)
def test_a_knob_changes_the_loss(name, low, high):
    logits, tokens = full()
    # All answers are rewarded and on-policy, but for the one whose knob is a clip: there a ratio of e^1.2 = 3.3.
    back = 1.2 if name == "mai" else 0.0
    tokens = tokens._replace(logp_old=tokens.logp.detach() - back, adv=tokens.adv.abs())
    slopes = [
        torch.autograd.grad(loss(RECIPES[name], tokens, value)[0].mean(), logits, retain_graph=True)[0]
        for value in (low, high)
    ]
    assert not torch.allclose(*slopes, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "target", "seen", "wanted"),
    [
        # 1 + 1.5 = 1/(1 − 0.6); k up by 0.25 below 0.3 nats to 2.5 at most, down to 0 above.
        ("mai", 0.3, [0.2] * 12 + [0.4], [1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.0, 4.0, 3.75]),
        # c up by 1e-4 below its target, in force only there; 0.005 at most.
        ("entropy-bonus-adaptive", 0.2, [0.1, 0.1, 0.3, 0.1], [1e-4, 2e-4, 0.0, 2e-4]),
        ("entropy-bonus-adaptive", 0.2, [0.1] * 60, [min(i * 1e-4, 0.005) for i in range(1, 61)]),
    ],
)
def test_published_knobs_by_hand(name, target, seen, wanted):
    control = build_thermostat(compose(name, target=str(target)))
    state, values = control.init(), []
    for entropy in seen:
        state = control.update(state, EntropyReading(entropy, 1.0))
        values.append(state.value)
    assert values == pytest.approx(wanted)


def test_what_needs_entropies_says_so():
    _, tokens = batch()
    for recipe in (compose("loop", knob="zeta"), compose("loop", entropy_coef=0.1), compose("repo-d-loop")):
        with pytest.raises(ValueError, match=r"needs batch\.entropy"):
            loss(recipe, tokens._replace(entropy=None), 0.1 if recipe.knob else None)


def test_with_knob_turns_only_the_knob():
    assert with_knob(RECIPES["grpo"], 0.7) is RECIPES["grpo"]
    assert with_knob(RECIPES["adapo"], 0.7) == replace(RECIPES["adapo"], clip_high=0.7)


def test_recipe_names_need_no_torch():
    code = "import sys, isentropic.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_penalty_that_is_switched_off_may_still_be_a_knob():
    assert knob_range(compose("lp-reg", knob="penalty_coef", penalty_coef=0.0))[:3] == (0.0, 0.0, 1.0)
    assert knob_range(compose("lp-reg", knob="penalty_coef", penalty_coef=0.5))[:3] == (0.5, 0.0, 2.0)


def test_pass_at_k_needs_more_samples_than_k():
    assert check(RECIPES["pass-at-k"], 4, 5) == check(RECIPES["pass-at-k"])
    for samples in (2, 4):
        with pytest.raises(ValueError, match=f"pass_k must be below the samples per prompt, got 4 with {samples}"):
            check(RECIPES["pass-at-k"], 4, samples)
