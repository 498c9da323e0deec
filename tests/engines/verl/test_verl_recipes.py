"""Every recipe on a micro-batch of verl's: what verl's loss differentiates is what the core's does."""

import os
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

try:
    version("verl")  # not by import: this directory would be found as a package of that name
except PackageNotFoundError:
    pytest.skip("verl has an environment of its own: make test-verl", allow_module_level=True)

os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}
import cpu_platform  # noqa: F401
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from isentropic.engines.verl import fallback as verl_fallback
from isentropic.engines.verl.control import Control
from isentropic.engines.verl.engine import PolicyLoss
from isentropic.engines.verl.plugin import AGG_MODES, estimator_of, group_entry
from isentropic.recipes import (
    RECIPES,
    advantages,
    build_thermostat,
    compose,
    load_recipe,
    loss,
    with_knob,
)
from isentropic.types import TokenBatch

PROMPT, ANSWER, ROWS, VOCAB = 2, 5, 6, 7


class Case:
    """Six answers of uneven length, as verl's loss gets them, and as the core does; both from one leaf of logits."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        lengths = torch.tensor([5, 1, 3, 4, 2, 5])
        self.mask = (torch.arange(ANSWER) < lengths[:, None]).long()
        attention = torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.long), self.mask], 1)
        ids = torch.randint(VOCAB, (ROWS, PROMPT + ANSWER), generator=generator)
        self.ids = ids[:, PROMPT:]
        self.logits = torch.randn(ROWS, ANSWER, VOCAB, generator=generator).requires_grad_()
        with torch.no_grad():
            moved = self.logits + 0.4 * torch.randn(self.logits.shape, generator=generator)
        self.old = self.stats(moved)
        self.adv = torch.randn(ROWS, 1, generator=generator).expand(-1, ANSWER).contiguous()
        fields = {
            "input_ids": torch.nested.as_nested_tensor(
                [row[: PROMPT + n] for row, n in zip(ids, lengths, strict=True)], layout=torch.jagged
            ),
            "prompts": ids[:, :PROMPT],
            "responses": self.ids,
            "attention_mask": attention,
            "response_mask": self.mask,
            "old_log_probs": self.old[0],
            "entropy": self.old[1],
            "advantages": self.adv,
        }
        self.data = TensorDict(fields, batch_size=ROWS)
        settings = {"dp_size": 1, "batch_num_tokens": int(self.mask.sum()), "global_batch_size": ROWS}
        tu.assign_non_tensor(self.data, **settings, temperature=1.0)

    def stats(self, logits):
        logp = logits.log_softmax(-1)
        return logp.gather(-1, self.ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    def packed(self, x):
        """``[tokens ...]``: the row of a token stands at the token before it, and there is one for the last token."""
        shape = (PROMPT - 1, *x.shape[2:]), (1, *x.shape[2:])
        return torch.cat(
            [
                torch.cat([x.new_zeros(shape[0]), row[:n], x.new_zeros(shape[1])])
                for row, n in zip(x, self.mask.sum(1), strict=True)
            ]
        )

    def core(self, recipe, knob):
        logp, entropy = self.stats(self.logits)
        rows = self.logits.log_softmax(-1) if recipe.needs_rows else None
        batch = TokenBatch(logp, self.old[0], self.adv, self.mask, entropy, self.old[1], rows)
        total, _ = loss(recipe, batch, knob, ANSWER)
        return torch.autograd.grad(total.mean(), self.logits)[0]

    def verl(self, recipe, actor):
        control = Control(recipe, False, None)
        control.logits.wanted = recipe.needs_rows
        logp, entropy = self.stats(self.logits)
        output = {"log_probs": self.packed(logp), "entropy": self.packed(entropy)}
        if recipe.needs_rows:
            control.logits._seen = self.packed(self.logits)
        total, _ = control.wrap(partial(ppo_loss, config=actor))(model_output=output, data=self.data)
        return torch.autograd.grad(total, self.logits)[0], control


def actor_of(name):
    recipe = RECIPES[name]
    # A clip of verl's that no recipe has: far enough to be out of the way.
    return ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=ROWS,
        loss_agg_mode=AGG_MODES[recipe.reduction],
        loss_scale_factor=ANSWER if recipe.reduction == "constant" else None,
        clip_ratio_c=1e6,
        policy_loss=PolicyLoss(recipe=name),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_verls_loss_has_the_gradient_of_the_recipe(name):
    case, actor = Case(), actor_of(name)
    recipe = actor.policy_loss.checked(actor)
    thermostat = build_thermostat(recipe)
    knob = thermostat.init().value if thermostat else None
    torch.manual_seed(1)
    wanted = case.core(recipe, knob)
    torch.manual_seed(1)
    got, control = case.verl(recipe, actor)
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-7)
    # The reading: the entropy of the 20 tokens that count.
    entropy = (case.stats(case.logits)[1] * case.mask).sum().item()
    assert control.window[:2].tolist() == pytest.approx([entropy, 20.0], rel=1e-6)


def test_every_recipe_is_composed_with_an_estimator_that_verl_knows():
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    import isentropic.engines.verl.estimator  # noqa: F401

    for name, recipe in RECIPES.items():
        entry = group_entry(recipe, name)
        assert entry["algorithm"]["adv_estimator"] in ADV_ESTIMATOR_REGISTRY, name
        ours = entry["actor_rollout_ref"].get("model", {}).get("external_lib")
        assert (ours is not None) == (entry["algorithm"]["adv_estimator"] == "isentropic"), name


@pytest.mark.parametrize("baseline", ["none", "mean", "mean_std", "leave_one_out", "quantile"])
def test_the_estimators_are_the_recipes_baselines(baseline):
    """Two groups of three whose members are mixed, rewards at the last token."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn

    import isentropic.engines.verl.estimator  # noqa: F401

    scores = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
    order, index = [0, 3, 1, 4, 2, 5], ["a", "b", "a", "b", "a", "b"]
    mask = torch.ones(6, 4)
    mask[1, 2:] = 0
    rewards = torch.zeros(6, 4)
    rewards[:, 1] = scores.flatten()[order]
    recipe = compose("dapo", baseline=baseline)
    wanted = advantages(recipe, scores)[order].unsqueeze(-1) * mask
    name, norm = estimator_of(recipe)
    given = {"token_level_rewards": rewards, "response_mask": mask, "index": index}
    if name == "grpo":
        got, _ = compute_grpo_outcome_advantage(**given, norm_adv_by_std_in_grpo=norm)
    else:
        options = {"recipe": "dapo", "recipe_options": {"baseline": baseline}}
        got, _ = get_adv_estimator_fn(name)(**given, config={"isentropic": options})
    torch.testing.assert_close(got, wanted, rtol=3e-4, atol=1e-5)  # what is added to the std differs


REFUSED = [
    ({"recipe": "qae", "adv_estimator": "grpo"}, "needs algorithm.adv_estimator=isentropic"),
    ({"recipe": "qae", "adv_estimator": "isentropic", "external_lib": "mine"}, "add isentropic.engines.verl.estimator"),
    ({"recipe": "grpo", "adv_estimator": "grpo", "norm_adv_by_std": False}, "norm_adv_by_std_in_grpo=True"),
    ({"recipe": "dapo", "recipe_options": {"dynamic_sampling": True}}, "algorithm.filter_groups.enable=True"),
    ({"recipe": "dapo", "recipe_options": {"overlong_buffer": 4}}, "overlong_buffer_cfg"),
    ({"recipe": "isentropic", "strategy": "megatron"}, "repo_r reads the entropies .* fsdp or fsdp2, or take one of "),
    ({"recipe": "aent", "strategy": "megatron"}, "whole rows of log-probabilities, .* got .*strategy=megatron"),
    ({"recipe": "entropy-bonus", "strategy": "veomni"}, "entropy bonus needs entropies with a gradient"),
    ({"strategy": "megatron"}, "monitor reads entropies from the engine, .* set .* to fsdp or fsdp2"),
    ({"knob": "zeta"}, "need a recipe"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_work_is_refused_before_anything_starts(given, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**given)


def test_a_recipe_off_its_data_names_the_remedy():
    case, actor = Case(), actor_of("erc")
    del case.data["entropy"]
    with pytest.raises(ValueError, match="bypass_mode=True; set it to False"):
        case.verl(load_recipe("erc"), actor)


def test_the_fallback_has_the_gradient_of_the_recipe_and_says_once_what_it_lacks(caplog):
    """verl's loss without our engine: the same gradient for recipes that need no entropy; the rest are refused."""
    able = [name for name in RECIPES if not verl_fallback.why_not(RECIPES[name])]
    assert {"adapo", "repo-r-loop", "gspo", "kl-cov", "rloo"} <= set(able)
    for name in able:
        case, actor = Case(), actor_of(name)
        actor = ActorConfig(**{**vars(actor), "strategy": "megatron"})
        object.__setattr__(actor.policy_loss, "loss_mode", "isentropic")
        recipe = actor.policy_loss.checked(actor)
        torch.manual_seed(1)
        wanted = case.core(recipe, build_thermostat(recipe).init().value if recipe.knob else None)
        torch.manual_seed(1)
        output = {"log_probs": case.packed(case.stats(case.logits)[0])}
        for _ in range(2):
            total, metrics = ppo_loss(actor, output, case.data)
        got = torch.autograd.grad(total, case.logits)[0]
        if recipe.selection != "clip_cov":  # draws anew in each call
            torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-7)
        assert "entropy/mean" not in metrics
    said = [record for record in caplog.records if "is not wrapped" in record.message]
    assert len(said) == len(able)


def test_the_fallback_turns_its_knob_at_the_optimizer_step():
    case = Case()
    loss_config = PolicyLoss(recipe="adapo", loss_mode="isentropic", target="0.5", strategy="megatron")
    actor = ActorConfig(
        strategy="megatron", rollout_n=1, ppo_micro_batch_size_per_gpu=ROWS, policy_loss=loss_config, clip_ratio_c=1e6
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    output = {"log_probs": case.packed(case.stats(case.logits)[0])}
    ppo_loss(actor, output, case.data)
    start = actor.policy_loss.fallback.state.value
    parameter.grad = torch.zeros(1)
    optimizer.step()
    behind = actor.policy_loss.fallback
    sampled = -(case.stats(case.logits)[0] * case.mask).sum().item() / 20
    assert behind.last == pytest.approx(sampled, rel=1e-6)
    assert behind.last > 0.5
    # ADAPO lowers ε_high by 5 % where entropy stands above its target.
    assert behind.state.value == pytest.approx(start / 1.05, rel=0.01)
    _, metrics = ppo_loss(actor, output, case.data)
    assert metrics["entropy/sampled"].aggregate() == pytest.approx(sampled, rel=1e-6)
    optimizer.step()
    optimizer.step()  # another optimizer in the process: nothing was computed, nothing is read
    assert behind.step == 2


def test_what_the_knob_does_is_what_its_recipe_says():
    """One step of a knob changes the gradient as the core's recipe does: the knob in force is the one that is read."""
    case, actor = Case(), actor_of("adapo")
    recipe = with_knob(load_recipe("adapo"), 0.05)
    near = case.core(recipe, 0.05)
    assert not torch.allclose(near, case.core(recipe, 1.0))
    control = Control(recipe, False, None)
    control.state = control.state._replace(controller=control.state.controller._replace(value=0.05))
    logp, entropy = case.stats(case.logits)
    output = {"log_probs": case.packed(logp), "entropy": case.packed(entropy)}
    total, _ = control.wrap(partial(ppo_loss, config=actor))(model_output=output, data=case.data)
    torch.testing.assert_close(torch.autograd.grad(total, case.logits)[0], near, rtol=2e-4, atol=2e-7)
