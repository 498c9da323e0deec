"""Where the tokens of a loss call are: padded rows, packed rows, or a tensor for each sequence; all become rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..control.names import choose

Values = Tensor | Sequence[Tensor]
OF_SEQUENCES = ("reward", "group_rate", "group_reward", "group_distinct", "group_repeats")


def sequence_ids(positions: Tensor) -> Tensor:
    """The sequence of each token of a packed row, from position ids: one begins where they do not go up by 1.

    Args:
        positions: ``[t]`` or ``[b t]``.

    Example:
        >>> sequence_ids(torch.tensor([[0, 1, 2, 0, 1, 0]]))
        tensor([[1, 1, 1, 2, 2, 3]])
    """
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[..., 1:] = positions.diff() != 1
    return begins.flatten().cumsum(0).view_as(positions)


class Layout:
    """How the tensors of one call become rows ``[b t]``, a sequence each, and back.

    Args:
        logp: ``[b t]``; packed, ``[t]`` or ``[b t]`` with ``sequences``; or a ``[t]`` for each sequence.
        sequences: an integer for each token, of the shape of ``logp``: neighbours that share it are one sequence.

    Raises:
        ValueError: any other shape.
    """

    def __init__(self, logp: Values, sequences: Tensor | None):
        parts = [logp] if isinstance(logp, Tensor) else list(logp)
        allowed = (1, 2) if isinstance(logp, Tensor) else (1,)
        if not parts or not all(x.dim() in allowed and x.is_floating_point() for x in parts):
            raise ValueError(
                "logp must be log-probabilities [t] or [b t], or a list of [t], got "
                f"{', '.join(f'{x.dtype} {[*x.shape]}' for x in parts[:3]) or 'no sequence'}; pass those of the tokens"
            )
        self.lengths = None if isinstance(logp, Tensor) else [len(x) for x in parts]
        whole = self._joined("logp", logp)
        self.shape, device = whole.shape, whole.device
        if sequences is not None and (self.lengths or sequences.shape != self.shape or sequences.is_floating_point()):
            got = "a list" if self.lengths else f"{sequences.dtype} {list(sequences.shape)} and {list(self.shape)}"
            raise ValueError(
                f"sequences must be integers of the shape of a packed logp, got {got}; leave it out of a list"
            )
        self.at: tuple[Tensor, Tensor] | None = None
        self.size = (1, *self.shape) if whole.dim() == 1 else tuple(self.shape)
        if self.lengths or sequences is not None:
            lengths = torch.tensor(self.lengths, device=device) if sequences is None else _run_lengths(sequences)
            row = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
            column = torch.arange(whole.numel(), device=device) - (lengths.cumsum(0) - lengths)[row]
            self.at, self.size = (row, column), (len(lengths), int(lengths.max()))

    def _joined(self, name: str, x: Values) -> Tensor:
        """A list as one tensor of its tokens, checked against the lengths of ``logp``."""
        if isinstance(x, Tensor):
            return x
        lengths = [len(part) for part in x]
        if not lengths or lengths != self.lengths:
            raise ValueError(
                f"{name} must be a list of [t], one for each sequence of logp, {self.lengths} tokens, got {lengths}; "
                "pass both as lists"
            )
        return torch.cat(list(x))

    def rows(self, name: str, x: Values | None, wide: bool = False) -> Tensor | None:
        """A tensor of the call as rows ``[b t]``, 0 where there is no token; ``[b]`` if it is one for each sequence.

        Args:
            name: for messages; advantages and weights may be one for each sequence.
            x: of the shape of ``logp``.
            wide: it has the vocabulary as another axis.

        Raises:
            ValueError: another shape.
        """
        if x is None:
            return None
        whole = self._joined(name, x)
        shape, behind = (whole.shape[:-1], whole.shape[-1:]) if wide else (whole.shape, whole.shape[:0])
        if shape == self.shape:
            if self.at is None:
                return whole.reshape(*self.size, *behind)
            return whole.new_zeros(*self.size, *behind).index_put(self.at, whole.reshape(-1, *behind))
        each = name in ("adv", "weight")
        return whole if each and shape in (self.size[:1], ()) else self._refuse(name, whole, wide, each)

    def of_sequences(self, name: str, x: Tensor | None) -> Tensor | None:
        """A field of a batch that has a value for each sequence, ``[b]``, checked."""
        choose("field", name, OF_SEQUENCES)
        return x if x is None or x.shape == self.size[:1] else self._refuse(name, x, False, True, False)

    def _refuse(self, name: str, x: Tensor, wide: bool, each: bool, tokens: bool = True) -> NoReturn:
        allowed = [f"the shape of logp, {[*self.shape, 'v'] if wide else list(self.shape)}"] if tokens else []
        allowed += [f"one value for each sequence, [{self.size[0]}]"] if each else []
        raise ValueError(f"{name} must have {' or '.join(allowed)}, got {list(x.shape)}; cut both to the same tokens")

    def back(self, rows: Tensor) -> Tensor:
        """Rows ``[b t]`` in the layout of the call; a list's tokens one after the other."""
        return (rows if self.at is None else rows[self.at]).reshape(self.shape)


def _run_lengths(sequences: Tensor) -> Tensor:
    """Lengths of the runs of equal ids, which end with a row."""
    ends = torch.ones_like(sequences, dtype=torch.bool)
    ends[..., :-1] = sequences.diff() != 0
    last = ends.flatten().nonzero()[:, 0] + 1
    return last.diff(prepend=last.new_zeros(1))
