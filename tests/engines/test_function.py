"""Control behind a loss function: any layout, any recipe, and the loops of engines that take one."""

import json
from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from isentropic.engines.function import LossControl
from isentropic.engines.loop import EntropyReadingError
from isentropic.engines.packing import Layout, sequence_ids
from isentropic.engines.tabular import Tree, mean_entropy, random_logits, sampled_batch
from isentropic.recipes import RECIPES, compose, loss
from isentropic.types import EntropyReading, TokenBatch

LENGTHS = [5, 1, 3, 4, 2, 5]
NUM_TOKENS = sum(LENGTHS)
ENGINES_PART = {"dynamic_sampling": False, "overlong_buffer": 0}
DRAWN_ONCE = [name for name, recipe in RECIPES.items() if not recipe.redraws]
TOKEN_FIELDS = ("logp_old", "adv", "mask", "entropy", "entropy_old", "logp_rows")


class Case:
    """Six answers of uneven length from one leaf of logits; outside the mask a padded field is NaN."""

    def __init__(self, recipe):
        generator = torch.Generator().manual_seed(3)
        self.mask = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).double()
        self.logits = torch.randn(6, 5, 7, generator=generator, dtype=torch.float64)
        self.ids = torch.randint(7, (6, 5), generator=generator)
        moved = self.logits + 0.4 * torch.randn(self.logits.shape, generator=generator, dtype=torch.float64)
        self.old = None if recipe.on_policy else self.facts(moved)
        self.adv = torch.randn(6, generator=generator, dtype=torch.float64)
        self.of_sequences = {
            "reward": torch.tensor([1.0, 0, 1, 1, 0, 0]).double(),
            "group_rate": torch.tensor([0.5, 0.5, 1, 1, 0, 0]).double(),
        }

    def facts(self, logits):
        rows = logits.log_softmax(-1)
        return rows.gather(-1, self.ids[..., None])[..., 0], -(rows.exp() * rows).sum(-1), rows

    def batch(self, leaf, rows=slice(None)):
        logp, entropy, whole = self.facts(leaf)
        old, entropy_old = (None, None) if self.old is None else self.old[:2]
        adv = self.adv[:, None].expand_as(logp)
        fields = (logp, old, adv, self.mask, entropy, entropy_old, whole)
        cut = (None if x is None else x[rows] for x in fields)
        return TokenBatch(*cut, **{name: x[rows] for name, x in self.of_sequences.items()})


def padded(batch):
    """The batch as a padded call, with NaN where there is no token."""
    outside = {
        n: x for n, x in batch._asdict().items() if n in TOKEN_FIELDS and n not in ("mask", "adv") and x is not None
    }
    broken = {n: x.masked_fill(~_like(batch.mask, x), float("nan")) for n, x in outside.items()}
    return batch._asdict() | broken


def _like(mask, x):
    return mask.bool().view(*mask.shape, *[1] * (x.dim() - 2))


def packed(batch):
    """The batch as one row of tokens, ``[1 t]``, with sequence ids from position ids."""
    inside = batch.mask.bool()
    fields = {n: x[inside][None] for n, x in batch._asdict().items() if x is not None and x.dim() > 1}
    positions = torch.arange(5).expand(inside.shape)[inside][None]
    rest = {n: x for n, x in batch._asdict().items() if x is None or x.dim() == 1}
    return fields | rest | {"sequences": sequence_ids(positions)}


def flat(batch):
    """The same without the first axis, ``[t]``."""
    call = packed(batch)
    return {n: x if x is None or x.dim() == 1 else x[0] for n, x in call.items()}


def listed(batch):
    """A tensor for each sequence."""
    cut = {
        n: [row[:k] for row, k in zip(x, batch.mask.sum(1).long(), strict=True)]
        for n, x in batch._asdict().items()
        if x is not None and x.dim() > 1
    }
    return cut | {n: x for n, x in batch._asdict().items() if x is None or x.dim() == 1}


LAYOUTS = {"padded": padded, "packed": packed, "flat": flat, "listed": listed}


def call(control, fields, **more):
    fields = {name: x for name, x in fields.items() if x is not None or name in ("logp_old", "entropy")}
    names = ("logp", "logp_old", "adv", "mask", "entropy")
    return control.loss(
        *(fields[name] for name in names), **{n: x for n, x in fields.items() if n not in names}, **more
    )


def gradient(case, function):
    leaf = case.logits.clone().requires_grad_()
    torch.manual_seed(0)
    return torch.autograd.grad(function(leaf), leaf)[0]


def held(name, **changes):
    """A recipe of the catalogue with its knob in the middle of its range, so that it acts."""
    recipe = replace(RECIPES[name], **ENGINES_PART)
    control = LossControl(replace(recipe, **changes), updates=1 if recipe.on_policy else 2)
    if control.loop.state is not None:
        span = control.loop.range
        value = span.low + 0.7 * (span.high - span.low)
        state = control.loop.state
        control.loop.state = state._replace(controller=state.controller._replace(value=value))
    return control


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DRAWN_ONCE)
def test_the_gradient_is_that_of_the_recipe_in_the_core(name, layout):
    control = held(name)
    case = Case(control.recipe)
    weight = {"token": 1.0, "sequence": 1 / torch.tensor(LENGTHS).double(), "constant": 1 / 5}[control.recipe.reduction]
    direct = gradient(case, lambda leaf: loss(control.loop.recipe_now, case.batch(leaf))[0].sum)
    got = gradient(case, lambda leaf: call(control, LAYOUTS[layout](case.batch(leaf)), weight=weight))
    assert got.abs().max() > 1e-4
    torch.testing.assert_close(got, direct, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_reading(layout):
    """Entropy, facts and the predicted change of a step are the same however its tokens are laid out."""
    rows = []
    for shape in ("padded", layout):
        control = held("isentropic")
        case = Case(control.recipe)
        leaf = case.logits.clone().requires_grad_()
        call(control, LAYOUTS[shape](case.batch(leaf)))
        rows.append(control.step(rate=0.1))
    assert rows[0] == pytest.approx(rows[1])
    assert rows[0]["entropy/tokens"] == NUM_TOKENS
    assert rows[0]["entropy/mean"] == pytest.approx(float(case.facts(case.logits)[1][case.mask.bool()].mean()))
    assert rows[0]["predict/gain"] != 0
    assert rows[0]["ratio/ess_frac"] < 1


def test_sequence_ids_may_be_in_any_order():
    """A run of equal ids is a sequence, and a row ends one."""
    logp = torch.arange(10.0).view(2, 5)
    layout = Layout(logp, torch.tensor([[7, 7, 2, 9, 9], [9, 9, 9, 0, 0]]))
    assert layout.rows("logp", logp).tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 0], [5, 6, 7], [8, 9, 0]]
    assert torch.equal(layout.back(layout.rows("logp", logp)), logp)


def test_the_prediction_knows_the_entropy_bonus():
    """Its gain is the predicted change of a bonus of 1."""
    rows = []
    for coef in (0.0, 1.0):
        control = LossControl(compose("grpo", knob="entropy_coef", knob_start=coef, knob_high=2.0, target="5.0"))
        case = Case(control.recipe)
        call(control, padded(case.batch(case.logits.clone().requires_grad_())))
        rows.append(control.step(rate=0.1))
    none, one = (row["predict/change"] for row in rows)
    assert rows[0]["predict/gain"] == pytest.approx(one - none, rel=1e-6)
    assert one > none


def test_a_loop_that_packs_sequences_as_prime_rl_does():
    """A call for each sequence of a packed row, a sum over its tokens; divided by all tokens of the step at the end."""
    control = held("isentropic")
    case = Case(control.recipe)
    direct = gradient(case, lambda leaf: loss(control.loop.recipe_now, case.batch(leaf))[0].mean())

    def engine(leaf):
        fields = {
            n: x for n, x in flat(case.batch(leaf)).items() if n in ("logp", "logp_old", "adv", "mask", "entropy")
        }
        parts = [
            dict(zip(fields, cut, strict=True))
            for cut in zip(*(x.split(LENGTHS) for x in fields.values()), strict=True)
        ]
        return sum(call(control, part) for part in parts) / NUM_TOKENS

    torch.testing.assert_close(gradient(case, engine), direct, rtol=1e-9, atol=1e-12)
    assert control.step()["entropy/tokens"] == NUM_TOKENS


SKYRL = {  # what each reduction multiplies advantages by, so that a plain sum makes the mean
    "token_mean": (lambda mask: mask.new_full((6, 1), 1 / NUM_TOKENS), "token"),
    "sequence_mean": (lambda mask: 1 / (6 * mask.sum(1, keepdim=True)), "sequence"),
    "seq_mean_token_sum_norm": (lambda mask: mask.new_full((6, 1), 1 / (6 * 5)), "constant"),
}


@pytest.mark.parametrize("reduction", SKYRL)
@pytest.mark.parametrize("name", ["isentropic", "entropy-bonus", "adapo", "gspo", "kl-cov"])
def test_a_loop_that_scales_advantages_beforehand_as_skyrl_does(name, reduction):
    """Advantages hold the normaliser of the mini-batch; micro-batches are summed."""
    scale_of, ours = SKYRL[reduction]
    control = held(name, reduction=ours)
    case = Case(control.recipe)
    scale = scale_of(case.mask)
    direct = gradient(case, lambda leaf: loss(control.loop.recipe_now, case.batch(leaf), length=5)[0].mean())
    micro = [slice(None)] if name == "kl-cov" else [slice(0, 2), slice(2, 6)]  # its share is of the batch of a call

    def engine(leaf):
        total = 0.0
        for rows in micro:
            batch = case.batch(leaf, rows)
            scaled, by = batch.adv * scale[rows], scale[rows].expand_as(batch.adv)
            total = total + call(control, padded(batch._replace(adv=scaled / by)), weight=by)
        return total

    torch.testing.assert_close(gradient(case, engine), direct, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("recipe", "same"), [(RECIPES["isentropic"], True), (compose("loop", knob="beta"), False)])
def test_a_shaping_that_scales_with_the_advantage_needs_no_weight(recipe, same):
    """A − ζ|A|L of scaled advantages is the scaled A − ζ|A|L; A − βL is not."""
    control, case = LossControl(recipe, updates=2), Case(recipe)
    state = control.loop.state
    control.loop.state = state._replace(controller=state.controller._replace(value=0.3))
    direct = gradient(case, lambda leaf: call(control, padded(case.batch(leaf))))
    case.adv /= 8
    scaled = gradient(case, lambda leaf: 8 * call(control, padded(case.batch(leaf))))
    assert torch.allclose(direct, scaled) == same


def test_the_engine_adds_up_by_its_own_reducer():
    """A reducer over the tokens of a list in one row, as slime and miles hand one in; the prediction follows it."""
    control, plain = held("isentropic"), held("isentropic")
    case = Case(control.recipe)

    def sum_of_sample_mean(x):
        return sum(part.mean() for part in x.split(LENGTHS))

    ours = gradient(case, lambda leaf: call(plain, padded(case.batch(leaf)), weight=1 / torch.tensor(LENGTHS).double()))
    torch.testing.assert_close(
        gradient(case, lambda leaf: call(control, listed(case.batch(leaf)), reduce=sum_of_sample_mean)), ours
    )
    assert control.step(rate=0.1) == pytest.approx(plain.step(rate=0.1))


def test_micro_batches_and_ranks_add_up_to_one_batch():
    """Three ranks, of which one has no loss in this step."""
    whole = held("isentropic")
    case = Case(whole.recipe)
    leaf = case.logits.clone().requires_grad_()
    shares = [[slice(0, 1), slice(1, 3)], [slice(3, 6)], []]

    def step(cuts, over_ranks):
        control = held("isentropic")
        control.over_ranks = over_ranks
        for rows in cuts:
            call(control, padded(case.batch(leaf, rows)))
        return control.step(rate=0.1), control.state_dict()

    vectors = []
    for cuts in shares:
        step(cuts, lambda vector: vectors.append(vector) or vector)
    total = torch.stack(vectors).sum(0)
    call(whole, padded(case.batch(leaf)))
    seen = whole.step(rate=0.1)
    (row, state), *others = [step(cuts, lambda vector: total) for cuts in shares]
    assert row == pytest.approx(seen)
    assert others == [(row, state)] * 2


def test_what_the_engine_divides_by_afterwards_enters_the_prediction():
    rows = {}
    for by, weight in (("tokens", 1.0), ("sequences", 1.0), (4.0, 1.0), (1.0, 1 / NUM_TOKENS)):
        control = held("isentropic")
        control.divided_by = by
        case = Case(control.recipe)
        call(control, padded(case.batch(case.logits.clone().requires_grad_())), weight=weight)
        rows[by] = control.step(rate=0.1)["predict/change"]
    assert rows["tokens"] == pytest.approx(rows[1.0])
    assert rows["sequences"] == pytest.approx(rows["tokens"] * NUM_TOKENS / 6)
    assert rows[4.0] == pytest.approx(rows["tokens"] * NUM_TOKENS / 4)


def policy_run(control, steps, start=None):
    """A policy of two-token answers, packed in a row by a loop of two micro-batches; its entropy after each step."""
    tree, (logits, first) = Tree(8, 6, 2), start or (random_logits(Tree(8, 6, 2), 1.0), 0)
    rewards = (torch.arange(36) % 5 == 0).double().expand(8, -1)
    path, rate = [], 16.0
    for step in range(first, first + steps):
        batch = sampled_batch(tree, logits, rewards, control.recipe, group=16, seed=step)
        leaf = logits.clone().requires_grad_()
        for part in torch.arange(128).tensor_split(2):
            rows, ids = (x[part].flatten() for x in (batch.rows, batch.ids))
            whole = leaf.log_softmax(-1)[rows]
            logp, entropy = whole.gather(-1, ids[:, None])[:, 0], -(whole.exp() * whole).sum(-1)
            sequences = torch.arange(len(part)).repeat_interleave(2)
            old = batch.logp_old[part].flatten()
            (
                control.loss(logp, old, batch.adv[part], torch.ones_like(logp), entropy, sequences=sequences) / 256
            ).backward()
        logits = logits - rate * leaf.grad
        row = control.step(rate=rate)
        path.append((mean_entropy(tree, logits), row["knob/value"], row.get("predict/change")))
    return path, (logits, first + steps)


def test_the_entropy_of_a_policy_is_held_at_60_percent():
    """By the default recipe; without its knob the same policy falls below a third of that."""
    control, free = (
        LossControl(compose("isentropic", target="60%"), divided_by=256),
        LossControl(compose("isentropic", controller="fixed")),
    )
    start = mean_entropy(Tree(8, 6, 2), random_logits(Tree(8, 6, 2), 1.0))
    late = torch.tensor([entropy for entropy, *_ in policy_run(control, 60)[0][20:]]) / start
    assert late.mean().item() == pytest.approx(0.6, abs=0.03)
    assert late.std() < 0.01
    assert policy_run(free, 60)[0][-1][0] < 0.4 * start


def test_a_run_resumes_bit_for_bit_through_json():
    recipe = compose("isentropic", target="98%")
    whole, part, rest = (LossControl(recipe, divided_by=256, updates=2) for _ in range(3))
    path, _ = policy_run(whole, 9)
    first, start = policy_run(part, 5)
    rest.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert rest.steps_done == 5
    last, _ = policy_run(rest, 4, start)
    assert first + last == path
    assert rest.state_dict() == whole.state_dict()
    assert len({knob for _, knob, _ in path}) > 3


def test_without_entropies_the_reading_is_the_sampled_estimate():
    control = held("adapo", target="5.0", every=1)
    case = Case(control.recipe)
    batch = case.batch(case.logits.clone().requires_grad_())
    call(control, padded(batch._replace(entropy=None, entropy_old=None, logp_rows=None)))
    row = control.step(rate=0.1)
    assert row["entropy/sampled"] == pytest.approx(-float(batch.logp[batch.mask.bool()].mean().detach()))
    assert "entropy/mean" not in row
    assert "predict/change" not in row
    assert control.loop.value > held("adapo").loop.value


def test_a_reading_of_the_engine_takes_the_place_of_ours():
    control, told = (
        LossControl(compose("loop", knob="beta", controller="sign_step:step=0.1", target="1.0", every=1))
        for _ in range(2)
    )
    case = Case(control.recipe)
    for one, reading in ((control, EntropyReading(5.0, 10.0)), (told, EntropyReading(20.0, 10.0))):
        call(one, padded(case.batch(case.logits.clone().requires_grad_())))
        assert one.step(reading)["entropy/mean"] == reading.mean
    assert (control.loop.value, told.loop.value) == (0.1, -0.1)


def test_a_generated_batch_ends_after_its_updates():
    recipe = compose("loop", knob="beta", controller="sign_step:step=0.1", target="9.0")
    control = LossControl(replace(recipe, every=None), updates=3)
    values = []
    for _ in range(7):
        control.step(EntropyReading(5.0, 10.0))
        values.append(round(control.loop.value, 3))
    assert values == [0, 0, 0.1, 0.1, 0.1, 0.2, 0.2]


def test_the_hook_of_torch_ends_a_step():
    """Where an engine tells nobody of its optimizer steps; its second optimizer ends no second step."""
    control = held("isentropic")
    case, other = Case(control.recipe), torch.nn.Parameter(torch.ones(1))
    leaf = torch.nn.Parameter(case.logits)
    optimizers = [torch.optim.AdamW([leaf], lr=0.1), torch.optim.SGD([other], lr=0.2)]
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: control.step(rate=optimizer.param_groups[0]["lr"]))
    for _ in range(3):
        call(control, padded(case.batch(leaf))).backward()
        for optimizer in optimizers:
            optimizer.step()
    hook.remove()
    assert control.steps_done == 3
    assert control.loop.state.rate == 0.1


def test_calls_without_a_gradient_and_steps_without_a_call_are_not_read():
    control = held("isentropic")
    case = Case(control.recipe)
    with torch.no_grad():
        assert call(control, padded(case.batch(case.logits))).isfinite()
    before = control.state_dict()
    assert control.step(rate=0.1) == {}
    assert control.state_dict() == before


def test_broken_entropies_reach_neither_the_knob_nor_the_weights(caplog):
    control = held("isentropic")
    case = Case(control.recipe)
    leaf = case.logits.clone().requires_grad_()
    call(control, padded(case.batch(leaf)))
    control.step(rate=0.1)
    value, batch = control.loop.value, case.batch(leaf)
    total = call(control, padded(batch._replace(entropy=batch.entropy.masked_fill(case.ids == 3, float("inf")))))
    (slope,) = torch.autograd.grad(total, leaf)
    assert slope.isfinite().all()
    control.step(rate=0.1)
    assert control.loop.value == value
    assert "refused" in caplog.text
    for _ in range(8):
        control.step(EntropyReading(float("nan"), 4.0))
    with pytest.raises(EntropyReadingError, match="10 entropy readings in a row"):
        control.step(EntropyReading(float("nan"), 4.0))


def test_losses_of_half_precision_are_computed_in_fp32():
    control = held("isentropic")
    case = Case(control.recipe)
    half = case.batch(case.logits.to(torch.bfloat16).requires_grad_())
    fields = {
        n: x if x is None or not x.is_floating_point() else x.to(torch.bfloat16) for n, x in half._asdict().items()
    }
    assert call(control, padded(TokenBatch(**fields))).dtype == torch.float32


ONE = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(3, 5)}, r"mask must have the shape of logp, \[3, 4\], got \[3, 5\]; cut both"),
        ({"mask": torch.ones(3)}, r"mask must have the shape of logp, \[3, 4\], got \[3\]"),
        ({"adv": torch.ones(4)}, r"adv must have .* or one value for each sequence, \[3\], got \[4\]"),
        ({"entropy": torch.ones(3, 4, 1)}, r"entropy must have the shape of logp, \[3, 4\], got \[3, 4, 1\]"),
        (
            {"logp": torch.ones(3, 4, 1)},
            r"logp must be log-probabilities \[t\] or \[b t\], .* got torch.float32 \[3, 4, 1\]",
        ),
        ({"logp": torch.ones(3, 4).long()}, "logp must be log-probabilities .* got torch.int64"),
        (
            {"sequences": torch.ones(3, 5).long()},
            r"sequences must be integers of the shape .* got torch.int64 \[3, 5\] and",
        ),
        ({"sequences": torch.ones(3, 4)}, "sequences must be integers"),
        ({"logp": []}, "logp must be .* or a list of .t., got no sequence; pass those of the tokens"),
        ({"logp": [ONE]}, r"logp must be .* or a list of \[t\], got torch.float32 \[3, 4\]"),
        ({"weight": torch.ones(2)}, r"weight must have .* \[3\], got \[2\]"),
        ({"logp_rows": torch.ones(3, 5, 7)}, r"logp_rows must have the shape of logp, \[3, 4, 'v'\], got \[3, 5, 7\]"),
        ({"reward": torch.ones(4)}, r"reward must have one value for each sequence, \[3\], got \[4\]"),
        ({"rewards": torch.ones(3)}, "field must be one of .* got 'rewards' .did you mean reward"),
        ({"logp": [ONE[0], ONE[1, :2]]}, r"logp_old|mask|adv must"),
        (
            {"logp": [ONE[0], ONE[1, :2]], "logp_old": [ONE[0], ONE[1]]},
            r"logp_old must be a list of \[t\], .*\[4, 2\] tokens, got \[4, 4\]",
        ),
        ({"mask": [ONE[0]]}, "mask must be a list .* logp, None tokens, got .4.; pass both as lists"),
    ],
)
def test_shapes_that_do_not_match_are_refused(arguments, message):
    control = LossControl(RECIPES["isentropic"])
    fine = {"logp": ONE, "logp_old": ONE, "adv": ONE, "mask": ONE, "entropy": ONE}
    with pytest.raises(ValueError, match=message):
        call(control, fine | arguments)


def test_what_a_recipe_needs_is_asked_for():
    leaf = torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"repo_r needs batch.entropy, got None; pass the entropies"):
        LossControl(RECIPES["isentropic"]).loss(leaf, ONE, ONE, ONE)
    with pytest.raises(
        ValueError, match="entropy bonus of this recipe needs entropy with gradient, got it without one"
    ):
        LossControl(RECIPES["entropy-bonus"], 2).loss(leaf, ONE, ONE, ONE, ONE)
    with pytest.raises(ValueError, match="aent of this recipe needs logp_rows with gradient, got None"):
        LossControl(RECIPES["aent"], 2).loss(leaf, ONE, ONE, ONE, ONE)
    control = LossControl(RECIPES["adapo"] if not RECIPES["adapo"].dynamic_sampling else held("adapo").recipe, 2)
    control.loss(leaf, ONE, ONE, ONE)
    with pytest.raises(ValueError, match="entropy must come with each loss of a run or with none, got both"):
        control.loss(leaf, ONE, ONE, ONE, ONE)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="a loss function cannot do dynamic_sampling, got True; switch it off"):
        LossControl(compose("loop", dynamic_sampling=True))
    with pytest.raises(
        ValueError, match="a loss function draws no second batch, got redraw=0 and knob=redraw; set redraw=0 and"
    ):
        LossControl(RECIPES["aepo"])
    with pytest.raises(ValueError, match="divided_by must be tokens, sequences or a number > 0, got 'batch'"):
        LossControl(RECIPES["loop"], divided_by="batch")
    with pytest.raises(ValueError, match="strictly on-policy"):
        LossControl(RECIPES["rloo"], updates=4)
    with pytest.raises(ValueError, match="clip_high"):  # every ratio is 1
        LossControl(RECIPES["adapo"], updates=1)
    LossControl(RECIPES["adapo"])


def test_skyrl_runs_it_as_a_registered_policy_loss():
    """SkyRL's registry, its scaling of advantages and its configuration; micro-batches of a mini-batch are summed."""
    ppo_utils = pytest.importorskip("skyrl.backends.skyrl_train.utils.ppo_utils")
    from skyrl.train.config import AlgorithmConfig

    control = held("repo-r-loop")
    case, config = Case(control.recipe), AlgorithmConfig(loss_reduction="token_mean")

    @ppo_utils.register_policy_loss("isentropic")
    def policy_loss(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):
        return control.loss(log_probs, old_log_probs, advantages, loss_mask, sampler=rollout_logprobs), {}

    scaled = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        case.adv[:, None].expand(6, 5), case.mask, config.loss_reduction, micro_batch_size=2, max_seq_len=5
    )
    native = ppo_utils.PolicyLossRegistry.get("isentropic")

    def engine(leaf):
        logp, total = case.facts(leaf)[0], 0.0
        for i in (0, 2, 4):
            cut = (x[i : i + 2] for x in (logp, case.old[0], scaled))
            total = total + native(*cut, config=config, loss_mask=case.mask[i : i + 2])[0]
        return total

    direct = gradient(case, lambda leaf: loss(control.loop.recipe_now, case.batch(leaf))[0].mean())
    torch.testing.assert_close(gradient(case, engine), direct, rtol=1e-9, atol=1e-12)
    assert control.step()["entropy/tokens"] == NUM_TOKENS


def test_tinker_runs_it_as_a_custom_loss():
    """The half of ``forward_backward_custom`` that runs at the client: log-probabilities in, weights out."""
    tinker = pytest.importorskip("tinker")
    control = held("repo-r-loop")
    case = Case(control.recipe)
    logp, old = case.facts(case.logits)[0].float(), case.old[0].float()
    tensor = tinker.TensorData.from_torch
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(case.ids[i, :n].tolist()),
            loss_fn_inputs={
                "target_tokens": tensor(case.ids[i, :n]),
                "logprobs": tensor(old[i, :n]),
                "advantages": tensor(case.adv[i].float().expand(n)),
                "mask": tensor(torch.ones(n)),
            },
        )
        for i, n in enumerate(LENGTHS)
    ]
    outputs = [{"logprobs": tensor(logp[i, :n])} for i, n in enumerate(LENGTHS)]
    forward = tinker.ForwardBackwardOutput(loss_fn_output_type="", loss_fn_outputs=outputs, metrics={})

    def loss_fn(data, logprobs):
        old, adv, mask = ([d.loss_fn_inputs[k].to_torch() for d in data] for k in ("logprobs", "advantages", "mask"))
        return control.loss(logprobs, old, adv, mask), {}

    sent = tinker.TrainingClient._compute_custom_loss(data, loss_fn, forward)
    weights = torch.cat([datum.loss_fn_inputs["weights"].to_torch() for datum in sent.data])
    leaf = logp.clone().requires_grad_()
    batch = TokenBatch(leaf, old, case.adv.float(), case.mask)
    (direct,) = torch.autograd.grad(loss(control.loop.recipe_now, batch)[0].sum, leaf)
    torch.testing.assert_close(weights, -direct[case.mask.bool()])
    assert control.step()["entropy/sampled"] > 0
