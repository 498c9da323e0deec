"""Episodes with an environment as TRL's ``rollout_func``.

``env_mask`` is 1 for tokens that the policy sampled and 0 for those of the environment. TRL passes it on as
``tool_mask``, and loss and entropy exclude the latter.
"""

from __future__ import annotations

from typing import Any

import torch

from ...models.episodes import Episode, Sampling, figures, play
from .compat import Trainer, generating, metrics, sampling_temperature, tokenizer_of

_SAMPLING_ARGS = ("top_k", "top_p", "min_p", "repetition_penalty")


class Rollout:
    """A task's episodes as TRL's ``rollout_func``.

    The rewards reach the reward functions as a column, ``episode_return``, which ``task.reward`` reads::

        IsentropicTrainer(model, task.reward, args=args, train_dataset=rows, rollout_func=Rollout(task), ...)

    TRL passes the prompts alone, repeated for each generation; the rows come from the trainer, which must be ours.

    Args:
        task: an ``EnvironmentTask``.
    """

    def __init__(self, task: Any):
        self.task = task
        self.pool: list[Any] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Play one episode a prompt; returns prompt_ids, completion_ids, logprobs, env_mask, and episode_return.

        Raises:
            ValueError: a trainer that does not keep the rows of its batch, or one that samples by vLLM.
        """
        batches = getattr(trainer, "batches", None)
        rows = None if batches is None else batches.rows
        if rows is None or len(rows) != len(prompts):
            raise ValueError(
                "an episode needs the columns of its row, and TRL's rollout_func is given prompts alone; "
                "use IsentropicTrainer, or put EntropyControlMixin in front of your trainer"
            )
        if trainer.use_vllm:
            raise ValueError("use_vllm has no effect on episodes, which the model itself generates; leave it out")
        with generating(trainer) as model:
            sampling = Sampling(sampling_temperature(trainer), _generation_kwargs(trainer))
            episodes = play(model, tokenizer_of(trainer), self.task, rows, sampling, self.pool)
        _log(trainer, episodes, self.task.win_at)
        return {
            "prompt_ids": [e.prompt_ids for e in episodes],
            "completion_ids": [e.ids for e in episodes],
            "logprobs": [e.logp for e in episodes],
            "env_mask": [e.mask for e in episodes],
            "episode_return": [e.total for e in episodes],
        }


def _log(trainer: Trainer, episodes: list[Episode], win_at: float) -> None:
    """Append the batch's figures, over all processes, to the trainer's metrics."""
    log = metrics(trainer, "train" if trainer.model.training else "eval")
    local = figures(episodes, win_at)
    device = trainer.accelerator.device
    means = trainer.accelerator.gather(torch.tensor([list(local.values())], device=device)).mean(0).tolist()
    calls = torch.tensor([sum(len(e.actions) + 1 for e in episodes)], device=device)
    for name, value in zip(local, means, strict=True):
        log[name].append(value)
    log["episode/calls"].append(float(trainer.accelerator.gather(calls).sum()))


def _generation_kwargs(trainer: Trainer) -> dict[str, Any]:
    """The trainer's sampling settings besides the temperature, as arguments of ``generate``."""
    values = {name: getattr(trainer.args, name) for name in _SAMPLING_ARGS}
    return {name: value for name, value in values.items() if value is not None} | (trainer.args.generation_kwargs or {})
