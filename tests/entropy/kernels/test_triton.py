"""The Triton path without a device: by its interpreter at small sizes, and compiled for devices, in own processes."""

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
        module.backend = lambda head: triton
    triton.BUFFER = 20 * 300 * 4
    loss.BUFFER = 30 * 300 * 4
    for dtype, head, frozen in itertools.product((torch.float32, torch.bfloat16, torch.float16), HEADS, (False, True)):
        check(dtype, head, frozen)
        print(dtype, head, frozen, "ok")


def compile_kernels():
    """Every mode of the kernel to machine code: fp32 for sm80, half precision for sm90."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from isentropic.entropy.kernels import triton

    kernel, names = triton._kernel, triton._kernel.arg_names
    types = dict.fromkeys(("n", "v", "d", "split", "hidden_stride", "weight_stride"), "i32")
    types |= {"scale": "fp32", "softcap": "fp32", "ids": "*i64"}
    settings = {"HAS_BIAS": True, "HAS_CAP": True, "HAS_ENTROPY": True, "SLOPED": True}
    settings |= {"X_EXCLUDED": triton.EXCLUDED, "B_MASKED": triton.MASKED_LOGIT}
    for mode, (capability, half) in itertools.product(triton.MODES, ((80, False), (90, True))):
        sizes = dict(zip(("BLOCK_N", "BLOCK_V", "BLOCK_D"), (128, 128, 64) if half else (64, 64, 32), strict=True))
        fixed = {**settings, **sizes, **{name.upper(): name == mode for name in triton.MODES if name != "sums"}}
        dtypes = dict.fromkeys(("hidden", "weight", "buffer"), "*bf16" if half else "*fp32")
        signature = {n: "constexpr" if n in fixed else {**types, **dtypes}.get(n, "*fp32") for n in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
        options = {"num_warps": 8 if half else 4}
        assert compiled(source, GPUTarget("cuda", capability, 32), options).asm["cubin"]


NEEDS_TRITON = pytest.mark.skipif(
    not HAS_TRITON, reason="THE GPU PATH IS NOT TESTED: triton is not installed; pip install triton"
)


def run(what, cache, **env):
    path = os.pathsep.join([str(Path(__file__).parents[2] / "helpers"), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), **env}
    result = subprocess.run([sys.executable, __file__, what], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@NEEDS_TRITON
def test_interpreted(tmp_path):
    run("interpret", tmp_path, TRITON_INTERPRET="1")


@NEEDS_TRITON
def test_compiled_for_devices(tmp_path):
    """The interpreter takes what the compiler refuses, such as a global that is no constexpr."""
    run("compile", tmp_path, TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.parametrize("tested", [False, True], ids=["torch", "triton"])
def test_on_a_device(monkeypatch, tested):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from head_case import case

    from isentropic.entropy.kernels import ops, token_stats

    if tested:
        pytest.importorskip("triton")
        monkeypatch.setattr(ops, "TRITON_TESTED", frozenset({torch.cuda.get_device_capability()}))
    c = case(n=200, d=64, v=5000, dtype=torch.bfloat16)
    got = token_stats(c.hidden.cuda(), c.weight.cuda(), c.ids.cuda())
    for a, b in zip(got, token_stats(c.hidden, c.weight, c.ids), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=2e-4)


if __name__ == "__main__":
    {"interpret": main, "compile": compile_kernels}[sys.argv[1]]()
