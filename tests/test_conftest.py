"""The import hook is in force: a wrong rank, dtype or axis size does not reach the body of a function."""

import pytest
import torch
from jaxtyping import TypeCheckError

from isentropic.losses.advantages import group_mean


@pytest.mark.parametrize("rewards", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)])
def test_signatures_are_checked(rewards):
    with pytest.raises(TypeCheckError, match=r"p g"):
        group_mean(rewards)


def test_one_thread():
    assert torch.get_num_threads() == 1
