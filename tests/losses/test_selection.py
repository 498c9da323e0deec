"""Selections by hand, their counts, and masks that hide anything."""

import pytest
import torch
from defaults import default, table
from hypothesis import given, settings
from hypothesis import strategies as st

from isentropic.losses.selection import covariance, ranks, top

clip_cov = default("selection", "clip_cov")
high_entropy = default("selection", "high_entropy")
erc = default("selection", "erc")


def test_ranks_and_top_by_hand():
    score = torch.tensor([[3.0, 1.0, 2.0], [9.0, 2.0, 0.0]])
    inside = torch.tensor([[True, True, True], [False, True, True]])
    assert ranks(score, inside).tolist() == [[0, 3, 1], [5, 2, 4]]  # the tie of the two 2.0 goes by position
    # ⌊0.4·5⌋ = 2 tokens; a share too small for one takes one.
    assert top(score, 0.4, inside).tolist() == [[True, False, True], [False, False, False]]
    assert top(score, 1e-6, inside).sum() == 1
    assert top(score, 0.4, torch.zeros_like(inside)).sum() == 0


def test_a_share_that_is_not_exact_in_binary():
    assert top(torch.arange(100.0)[None], 0.29, torch.ones(1, 100).bool()).sum() == 29


def test_covariance_by_hand():
    # A − ½ = (½, −½, ½, −½), log π − (−2) = (1.5, 1, −0.5, −2); the fifth token is masked.
    adv = torch.tensor([[1.0, 0.0, 1.0, 0.0, 99.0]])
    logp = torch.tensor([[-0.5, -1.0, -2.5, -4.0, torch.nan]])
    cov = covariance(adv, logp, torch.tensor([[1, 1, 1, 1, 0]]))
    torch.testing.assert_close(cov, torch.tensor([[0.75, -0.5, -0.25, 1.0, 0.0]]))


def test_clip_cov_by_hand():
    # Covariances 0.75, −0.5, −0.25, 1.0 as above: two lie in (0.5, 5), of which ⌊0.25·4⌋ = 1 is drawn.
    adv, logp = torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([[-0.5, -1.0, -2.5, -4.0]])
    drawn = [clip_cov(adv, logp, torch.ones(1, 4), cov_share=0.25, cov_low=0.5) for _ in range(40)]
    assert {tuple(x.flatten().tolist()) for x in drawn} == {(0, 1, 1, 1), (1, 1, 1, 0)}
    both = clip_cov(adv, logp, torch.ones(1, 4), cov_share=0.5, cov_low=0.5)
    assert both.tolist() == [[0, 1, 1, 0]]
    # One that a clip has removed is not drawn, and above cov_high nothing is.
    gone = torch.tensor([[True, False, False, False]])
    assert clip_cov(adv, logp, torch.ones(1, 4), gone, cov_low=0.5).tolist() == [[1, 1, 1, 0]]
    assert clip_cov(adv, logp, torch.ones(1, 4), cov_low=0.5, cov_high=0.9).tolist() == [[0, 1, 1, 1]]
    assert clip_cov(adv, logp, torch.ones(1, 4)).all()


def test_a_generator_decides_the_draw():
    g = torch.Generator().manual_seed(0)
    adv, logp = torch.randn(4, 50, generator=g), -torch.rand(4, 50, generator=g)
    args = (adv, logp, torch.ones(4, 50))
    draws = [
        clip_cov(*args, cov_share=0.05, cov_low=0.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert all((1 - x).sum() == 10 for x in draws)


def test_high_entropy_by_hand():
    entropy = torch.tensor([[0.1, 2.0, 0.3], [1.0, torch.nan, 0.2]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    assert high_entropy(entropy, mask, entropy_share=0.4).tolist() == [[0, 1, 0], [1, 1, 0]]


def test_erc_by_hand():
    now = torch.tensor([[1.0, 1.06, 0.94, 0.96, 0.0, 0.5]])
    before = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    assert erc(now, before, torch.ones(1, 6)).tolist() == [[1, 0, 0, 1, 1, 0]]
    assert erc(now, before, torch.ones(1, 6), erc_width=0.1).tolist() == [[1, 1, 1, 1, 1, 0]]
    assert erc(now, None, torch.ones(1, 6)).all()


def test_erc_is_relative_to_the_entropy_before():
    # |1.052 − 1| > 0.05·1, but < 0.05·1.052; |0.951 − 1| < 0.05·1, but > 0.05·0.951.
    now, before = torch.tensor([[1.052, 0.951]]), torch.ones(1, 2)
    assert erc(now, before, torch.ones(1, 2), erc_width=0.05).tolist() == [[0, 1]]
    # In place of an absolute width: 0.2 ± 5 % holds 0.209 and not 0.24; 20 ± 5 % holds 20.9.
    now, before = torch.tensor([[0.209, 0.24, 20.9, 21.1]]), torch.tensor([[0.2, 0.2, 20.0, 20.0]])
    assert erc(now, before, torch.ones(1, 4), erc_width=0.05).tolist() == [[1, 0, 1, 0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 99))
def test_padding_changes_no_factor_and_counts_are_exact(n, share, seed):
    g = torch.Generator().manual_seed(seed)
    score = torch.randn(1, n, generator=g)
    wide, inside = torch.cat([torch.full((1, 7), torch.inf), score], 1), torch.arange(n + 7)[None] >= 7
    kept = top(score, share, torch.ones(1, n).bool())
    assert torch.equal(top(wide, share, inside)[:, 7:], kept)
    assert kept.sum() == max(1, int(share * n + 1e-4))


@pytest.mark.parametrize("name", table("selection"))
def test_nothing_waits_for_the_device(name):
    meta = torch.ones(2, 3, device="meta")
    args = {"clip_cov": (meta, meta, meta), "high_entropy": (meta, meta), "erc": (meta, meta, meta)}[name]
    assert default("selection", name)(*args).is_meta
