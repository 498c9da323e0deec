"""Every number of a method, published or ours, once more: a slip of a digit trains another method."""

import pytest

from isentropic.control.controllers import Range
from isentropic.recipes import RECIPES
from isentropic.recipes.recipe import Recipe
from isentropic.recipes.stages import STAGES

# Constants of components: the defaults of their papers, or neutral.
CONSTANTS = {
    ("baseline", "quantile"): {"quantile": 0.4},
    ("baseline", "pass_at_k"): {"pass_k": 4},
    ("baseline", "unlikeliness"): {"rank_penalty": 0.25},
    ("baseline", "uniform_correct"): {"uniform_share": 0.2},
    ("selection", "clip_cov"): {"cov_share": 0.0002, "cov_low": 1.0, "cov_high": 5.0},
    ("selection", "high_entropy"): {"entropy_share": 0.2},
    ("selection", "erc"): {"erc_width": 0.05},
    ("shaping", "repo"): {"beta": 0.0},
    ("shaping", "repo_r"): {"zeta": 0.0},
    ("shaping", "repo_r_raw"): {"zeta": 0.0},
    ("shaping", "repo_r_positive"): {"zeta": 0.0},
    ("shaping", "repo_d"): {"zeta": 0.0},
    ("shaping", "repo_d_token"): {"zeta": 0.0},
    ("shaping", "sign_weight"): {"alpha": 0.0},
    ("shaping", "one_sided"): {"reject": 0.0},
    ("shaping", "one_sided_reward"): {"reject": 0.0},
    ("shaping", "steer"): {"steer_least": 0.8},
    ("shaping", "tempered"): {"tilt": 0.0, "temper_high": 1.2, "temper_low": 0.8},
    ("shaping", "surprisal_boost"): {"boost": 1.0, "surprisal_share": 0.1},
    ("bounds", "linear"): {"slope": -0.2},
    ("bounds", "dcpo"): {"ratio_cap": 10.0},
    ("bounds", "balanced"): {
        "positive_share": 0.5,
        "lower_to": 0.9,
        "upper_to": 3.0,
        "lower_step": 0.02,
        "upper_step": 0.05,
    },
    ("objective", "gradient_preserving"): {"grad_low": 0.5, "grad_high": 1.0},
    ("objective", "sapo"): {"tau_positive": 1.0, "tau_negative": 1.05},
    ("penalty", "kl_cov"): {"kl_share": 0.002},
    ("penalty", "lp_reg"): {"lp_share": 0.01, "lp_kappa": 0.02},
    ("penalty", "aent"): {"aent_drop": 0.3},
    ("penalty", "tre_p"): {"tre_mass": 0.99},
    ("penalty", "tre_k"): {"tre_keep": 2},
}
# Start, lowest, highest, smallest step, sign, and the value that does nothing.
KNOBS = {
    ("repo", "beta"): (0.0, -1.0, 1.0, 0.001, 1, None),
    ("repo_r", "zeta"): (0.0, -1.0, 1.0, 0.001, 1, None),
    ("repo_r_raw", "zeta"): (0.001, -0.05, 0.05, 0.0001, 1, None),
    ("repo_r_positive", "zeta"): (0.001, -0.05, 0.05, 0.0001, 1, None),
    ("repo_d", "zeta"): (1.0, 0.0, 64.0, 0.01, 1, None),
    ("repo_d_token", "zeta"): (1.0, 0.0, 64.0, 0.01, 1, None),
    ("sign_weight", "alpha"): (0.0, -1.0, 1.0, 0.001, -1, 0.0),
    ("one_sided", "reject"): (0.0, -1.0, 1.0, 0.001, 1, 0.0),
    ("one_sided_reward", "reject"): (0.0, -1.0, 1.0, 0.001, 1, 0.0),
    ("tempered", "tilt"): (0.0, -0.1, 0.1, 0.001, 1, None),
    ("surprisal_boost", "boost"): (1.0, 1.0, 1.5, 1.0, 1, 1.0),
}
# Numbers of the recipes beside the defaults: clip widths 0.2 and 0.2, no bonus, penalty weighed by 1.
NUMBERS = {
    "isentropic": {"clip_low": 0.1, "clip_high": 0.1, "every": 1},
    "loop": {"clip_low": 0.1, "clip_high": 0.1},
    "dapo": {"clip_high": 0.28},
    "gspo": {"clip_low": 0.0003, "clip_high": 0.0004},
    "cispo": {"clip_high": 4.0},
    "entropy-bonus": {"entropy_coef": 0.003},
    "entropy-bonus-adaptive": {"knob_high": 0.005, "knob_start": 0.0, "every": 1},
    "adapo": {"clip_high": 0.28},
    "repo-r-loop": {"clip_low": 0.1, "clip_high": 0.1},
    "repo-r-dapo": {"clip_high": 0.28},
    "repo-r-gspo": {"clip_low": 0.0003, "clip_high": 0.0004},
    "repo-d-loop": {"clip_low": 0.1, "clip_high": 0.1},
    "repo-d-dapo": {"clip_high": 0.28},
    "repo-d-gspo": {"clip_low": 0.0003, "clip_high": 0.0004},
    "entropic": {"every": 1},
    "dynamic-clip": {"clip_high": 0.28, "every": 1},
    "dcpo": {"clip_low": 0.16},
    "bapo": {"clip_low": 0.4},
    "ce-gppo": {"clip_high": 0.28},
    "qae": {"clip_high": 0.28},
    "pass-at-k": {"clip_high": 0.28},
    "nsr": {"reject": 1.0},
    "w-reinforce": {"reject": 0.9},
    "distribution-centric": {"every": 1},
    "up": {"clip_high": 0.28},
    "steer": {"clip_high": 0.28},
    "erc": {"clip_high": 0.28},
    "high-entropy": {"clip_high": 0.28},
    "mai": {"clip_low": 0.6, "clip_high": 1.5, "knob_low": 1.5, "knob_high": 4.0},
    "stare": {"knob_start": 1.1, "every": 1},
    "tre-p": {"penalty_coef": 0.001},
    "tre-k": {"penalty_coef": 0.001},
    "aent": {"penalty_coef": 0.0002, "knob_high": 0.005, "every": 1},
}


def numbers(recipe):
    """The fields of a recipe that are numbers."""
    return {
        name: value
        for name in Recipe.__dataclass_fields__
        if isinstance(value := getattr(recipe, name), int | float) and not isinstance(value, bool)
    }


def test_constants_of_components():
    found = {(s, n): dict(c.constants) for s, table in STAGES.items() for n, c in table.items() if c.constants}
    assert {key: value for key, value in found.items() if key in CONSTANTS} == CONSTANTS


@pytest.mark.parametrize(("component", "knob"), KNOBS)
def test_ranges_of_knobs(component, knob):
    assert STAGES["shaping"][component].knobs[knob].range == Range(*KNOBS[component, knob])


def test_numbers_of_the_recipes():
    default = {"overlong_buffer": 0, "clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.0, "penalty_coef": 1.0}
    default |= {"initial_readings": 1, "redraw": 0.0, "redraw_high": 1.2, "redraw_low": 0.8}
    for name, recipe in RECIPES.items():
        assert numbers(recipe) | dict(recipe.constants) == default | NUMBERS.get(name, {}), name
