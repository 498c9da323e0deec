"""An engine of exact tabular policies, where the predicted entropy change of a step meets the measured one.

A policy is a table of logits ``[r v]`` in float64, one row for every prefix of a :class:`Tree`; a tree of depth 1 is a
set of contexts with one-token answers. Rows share no parameters, every answer can be enumerated, and so entropies,
expected gradients and visits of states are exact: the error of a prediction is its own. Any recipe that draws
one batch runs here, through ``recipes.loss``, and is controlled by the loop that every engine shares.

Left out: answers of different lengths, so that the token, the sequence and the constant reduction are one; dynamic
sampling, overlong penalties and second batches.

Notation beyond the axes of ``types.py``: ``r`` rows of the table, ``n`` answers of a prompt, ``v**t`` of them.
"""

from .batches import Batch, expected_batch, sampled_batch
from .simulate import Run, simulate
from .states import REGIMES, Tree, answers, expected_reward, make_rewards, mean_entropy, random_logits, reach
from .steps import Outcome, advance, gradient, step

__all__ = [
    "REGIMES",
    "Batch",
    "Outcome",
    "Run",
    "Tree",
    "advance",
    "answers",
    "expected_batch",
    "expected_reward",
    "gradient",
    "make_rewards",
    "mean_entropy",
    "random_logits",
    "reach",
    "sampled_batch",
    "simulate",
    "step",
]
