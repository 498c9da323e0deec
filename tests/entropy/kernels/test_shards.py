"""A vocabulary split over two gloo processes, and an FSDP2 weight: the whole head's statistics and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from head_case import case, plain, relative

from isentropic.entropy.kernels import Shard, fused_logp, fused_policy_loss, token_stats
from isentropic.losses.reduce import SumCount

CUT = 1100  # not a multiple of a tile, and not the middle
HEADS = {"plain": {}, "frozen": {"frozen": True}, "capped": {"bias": True, "softcap": 12.0}}


def all_reduce(x, op):
    import torch.distributed as dist

    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return x


def check_split(rank, head):
    """This rank's part of the head against float64 on the whole one."""
    whole = case(**head)
    rows = slice(0, CUT) if rank == 0 else slice(CUT, None)
    shard = Shard(rows.start, all_reduce)
    weight = whole.weight.detach()[rows].requires_grad_(whole.weight.requires_grad)
    bias = None if whole.bias is None else whole.bias.detach()[rows].requires_grad_()
    hidden = whole.hidden.detach().requires_grad_()
    options = {"bias": bias, "softcap": whole.softcap, "shard": shard}
    expected = plain(whole)
    assert expected[0].min() < -20
    for a, b in zip(token_stats(hidden, weight, whole.ids, whole.temperature, **options), expected, strict=True):
        assert (a - b).abs().max() < 1e-4

    def loss_fn(stats, where):
        return SumCount((stats.logp + 0.3 * stats.entropy).sum(), stats.logp.new_tensor(1.0))

    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    stats = fused_logp(hidden, weight, whole.ids, whole.temperature, **options)
    fused = fused_policy_loss(
        hidden[None], weight, whole.ids[None], loss_fn, whole.temperature[None], level="token", **options
    )
    expected_grads = torch.autograd.grad((expected[0] + 0.3 * expected[1]).sum(), whole.leaves())
    expected_grads = [expected_grads[0], *(x[rows] for x in expected_grads[1:])]
    for loss in ((stats.logp + 0.3 * stats.entropy).sum(), fused.loss.sum):
        for a, b in zip(torch.autograd.grad(loss, leaves), expected_grads, strict=True):
            assert relative(a, b) < 3e-5


def check_dtensor(rank):
    """A weight that FSDP2 holds in parts is gathered, and its gradient scattered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard as Rows
    from torch.distributed.tensor import distribute_tensor

    c = case()
    weight = distribute_tensor(c.weight.detach(), init_device_mesh("cpu", (2,)), [Rows(0)]).requires_grad_()
    stats = fused_logp(c.hidden, weight, c.ids)
    torch.testing.assert_close(stats.logp, token_stats(c.hidden, c.weight, c.ids).logp)
    (got,) = torch.autograd.grad(stats.logp.sum(), weight)
    (expected,) = torch.autograd.grad(fused_logp(c.hidden, c.weight, c.ids).logp.sum(), c.weight)
    torch.testing.assert_close(got.full_tensor(), expected, rtol=1e-5, atol=1e-5)


def main(rank, store):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for head in HEADS.values():
        check_split(rank, head)
    check_dtensor(rank)
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "store")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "helpers"), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


def test_one_shard_is_the_whole():
    c = case()
    alone = token_stats(c.hidden, c.weight, c.ids)
    for a, b in zip(token_stats(c.hidden, c.weight, c.ids, shard=Shard(0, lambda x, op: x)), alone, strict=True):
        assert torch.equal(a, b)


def test_six_numbers_a_token_are_exchanged():
    c, exchanged = case(), []

    def counting(x, op):
        exchanged.append((op, x.numel()))
        return x

    likely = c.ids.clone()
    likely[:] = (c.hidden @ c.weight.T).argmax(-1)
    token_stats(c.hidden, c.weight, likely, shard=Shard(0, counting))
    assert exchanged == [("sum", 90), ("sum", 5 * 90)]


if __name__ == "__main__":
    main(int(sys.argv[2]), sys.argv[1])
