"""Several tasks with one trainer: rules for completions, and the switches; a stop token ends, masks and counts."""

from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")
from trl_case import make

from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.engines.trl.compat import stop_at
from isentropic.engines.trl.sequence import CompletionRules, SequentialTrainer, SwitchTask


def test_a_switch_changes_the_rules_for_completions_and_clears_the_optimizer():
    generation = SimpleNamespace(eos_token_id=[1], max_new_tokens=9)
    trainer = SimpleNamespace(eos_token_ids=[1], generation_config=generation, generation_kwargs={}, starts=(0, 4, 6))
    trainer.place = partial(SequentialTrainer.place, trainer)
    trainer.args, trainer.vllm_generation = SimpleNamespace(), SimpleNamespace(generation_kwargs={})
    trainer.rules = (CompletionRules([5], 7), CompletionRules([], 3, rollout="rollout"), CompletionRules([8], 2))
    seen, switched = [], []
    callback = SwitchTask(trainer, switched.append)
    for step in (0, 3, 4, 5, 6, 9):
        trainer.optimizer = SimpleNamespace(state={"moments": 1})
        callback.on_step_begin(None, SimpleNamespace(global_step=step), None)
        limits = (trainer.args.max_completion_length, trainer.vllm_generation.max_completion_length)
        ends = (trainer.eos_token_ids, generation.eos_token_id, generation.max_new_tokens)
        seen.append((*ends, *limits, trainer.rollout_func, bool(trainer.optimizer.state)))
    first, then, last = ([1, 5], [1, 5], 7, 7, 7, None), ([1], [1], 3, 3, 3, "rollout"), ([1, 8], [1, 8], 2, 2, 2, None)
    states = [(*first, True), (*first, True), (*then, False), (*then, True), (*last, False), (*last, True)]
    assert seen == states
    assert switched == [4, 6]


def test_the_place_of_a_step_is_the_last_task_that_began():
    trainer = SimpleNamespace(starts=(0, 4, 6))
    assert [SequentialTrainer.place(trainer, step) for step in range(9)] == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def test_trl_ends_masks_and_counts_by_our_stops(tmp_path):
    seen = []

    class Spy(IsentropicTrainer):
        def _compute_loss(self, model, inputs):
            seen.append({k: inputs[k].clone() for k in ("completion_ids", "completion_mask")})
            return super()._compute_loss(model, inputs)

    trainer = make(Spy, IsentropicConfig, tmp_path, 4)
    stop = trainer.processing_class.convert_tokens_to_ids(list("0123456789ABCDEFGHIJ"))
    own = list(trainer.eos_token_ids)
    stop_at(trainer, stop)
    trainer.train()
    num_ended = num_cut = 0
    for batch in seen:
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            kept = ids[mask.bool()].tolist()
            assert not set(kept[:-1]) & {*stop, *own}
            num_ended += kept[-1] in stop
            num_cut += kept[-1] not in (*stop, *own)
    assert num_ended > 10
    assert trainer.run_log.record.rows("metrics")[0]["length/truncated_frac"] == pytest.approx(num_cut / 64)
    assert trainer.model.generation_config.eos_token_id in (own, own[0])
    stop_at(trainer, [])
    assert trainer.eos_token_ids == own
