"""The Triton path through its interpreter, on the CPU, at small sizes: run in a process of its own."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
TOLERANCE = {"torch.float32": 3e-5, "torch.bfloat16": 8e-3, "torch.float16": 3e-3}
HEADS = [{}, {"bias": True, "softcap": 12.0, "scale": 0.5}]


def check(dtype, head, frozen):
    import torch
    from head_case import case, plain, relative

    from isentropic.entropy.kernels import fused_logp, fused_policy_loss, token_stats
    from isentropic.losses.reduce import SumCount

    # Neither rows nor columns nor width fill their tiles.
    c = case(n=70, d=24, v=300, dtype=dtype, frozen=frozen, **head)
    expected = plain(c)
    for a, b in zip(token_stats(c.hidden, c.weight, c.ids, c.temperature, **c.options()), expected, strict=True):
        assert (a - b).abs().max() < 2e-4, (a - b).abs().max()

    def loss_fn(stats, where):
        return SumCount((stats.logp + 0.3 * stats.entropy).sum(), stats.logp.new_tensor(1.0))

    stats = fused_logp(c.hidden, c.weight, c.ids, c.temperature, **c.options())
    fused = fused_policy_loss(
        c.hidden[None], c.weight, c.ids[None], loss_fn, c.temperature[None], level="token", **c.options()
    )
    expected_grads = torch.autograd.grad((expected[0] + 0.3 * expected[1]).sum(), c.leaves())
    for loss in ((stats.logp + 0.3 * stats.entropy).sum(), fused.loss.sum):
        for a, b in zip(torch.autograd.grad(loss, c.leaves()), expected_grads, strict=True):
            assert relative(a, b) < TOLERANCE[str(dtype)], relative(a, b)


def main():
    import torch

    from isentropic.entropy.kernels import loss, ops, triton

    for module in (ops, loss):
        module.backend = lambda weight: triton
    triton.BUFFER = 20 * 300 * 4
    loss.BUFFER = 30 * 300 * 4
    for dtype, head, frozen in itertools.product((torch.float32, torch.bfloat16, torch.float16), HEADS, (False, True)):
        check(dtype, head, frozen)
        print(dtype, head, frozen, "ok")


@pytest.mark.skipif(not HAS_TRITON, reason="THE GPU PATH IS NOT TESTED: triton is not installed; pip install triton")
def test_interpreted():
    path = os.pathsep.join([str(Path(__file__).parents[2] / "helpers"), *sys.path])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.gpu
def test_on_a_device():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from head_case import case

    from isentropic.entropy.kernels import token_stats

    c = case(n=200, d=64, v=5000, dtype=torch.bfloat16)
    got = token_stats(c.hidden.cuda(), c.weight.cuda(), c.ids.cuda())
    for a, b in zip(got, token_stats(c.hidden, c.weight, c.ids), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=2e-4)


if __name__ == "__main__":
    main()
