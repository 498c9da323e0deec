"""The plain torch path as an accelerator takes it: without a device, its operations on the CPU, and shapes on meta."""

from contextlib import nullcontext

import pytest
import torch
from head_case import case, plain, relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from isentropic.entropy.kernels import closed_forms, cpu, fused_logp, fused_policy_loss, head, loss, ops, token_stats
from isentropic.losses.reduce import SumCount

HEADS = {"plain": {}, "capped": {"bias": True, "softcap": 12.0, "scale": 0.5}}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-4}
# What waits for the device: a value or a shape that depends on data.
WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


@pytest.fixture
def accelerator(monkeypatch):
    """Every check of a device answers as on an accelerator, whose tiles are made small enough to be several."""
    for module in (head, ops, cpu):
        monkeypatch.setattr(module, "on_cpu", lambda x: False)
    monkeypatch.setattr(cpu, "WIDE_ROWS", 32)
    monkeypatch.setattr(cpu, "WIDE_COLUMNS", 600)


class Waits(TorchDispatchMode):
    """Lists the operations that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) in WAITS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def loss_fn(stats, where):
    return SumCount((stats.logp + 0.3 * stats.entropy).sum(), stats.logp.new_tensor(1.0))


def everything(c, mask=None):
    """Statistics without and with a gradient, the fused loss, and all gradients."""
    more = {"mask": mask, **c.options()}
    read = token_stats(c.hidden, c.weight, c.ids, c.temperature, **more)
    stats = fused_logp(c.hidden, c.weight, c.ids, c.temperature, **more)
    more["mask"] = None if mask is None else mask[None]
    fused = [
        fused_policy_loss(c.hidden[None], c.weight, c.ids[None], loss_fn, c.temperature[None], level=level, **more)
        for level in ("token", "sequence")
    ]
    losses = [(stats.logp + 0.3 * stats.entropy).sum(), *(f.loss.sum for f in fused)]
    return [*read, *stats], [torch.autograd.grad(x, c.leaves()) for x in losses]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_path_of_accelerators_equals_that_of_the_cpu_and_float64(accelerator, monkeypatch, dtype, name, frozen):
    c = case(dtype=dtype, frozen=frozen, **HEADS[name])
    monkeypatch.setattr(loss, "BUFFER", 20 * 2500 * 4)
    values, gradients = everything(c)
    expected = plain(c)
    for a, b in zip(values, [*expected, *expected], strict=True):
        assert (a - b).abs().max() < (1e-10 if dtype == torch.float64 else 2e-4)
    for got in gradients:
        for a, b in zip(got, torch.autograd.grad(loss_fn_of(expected), c.leaves(), retain_graph=True), strict=True):
            assert relative(a, b) < TOLERANCE[dtype]
    monkeypatch.undo()
    for a, b in zip(values, everything(c)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def loss_fn_of(expected):
    return (expected[0] + 0.3 * expected[1]).sum()


@pytest.mark.parametrize("name", HEADS)
def test_waits_do_not_grow_with_the_tiles(accelerator, monkeypatch, name):
    c, mask = case(**HEADS[name]), torch.arange(90) % 3 > 0
    counts = []
    for columns in (2500, 100):
        monkeypatch.setattr(cpu, "WIDE_COLUMNS", columns)
        with Waits() as waits:
            everything(c, mask)
        counts.append(len(waits.names))
    assert counts[0] == counts[1]
    with Waits() as waits:  # the rows of the mask, and which rows cancelled: no more
        token_stats(c.hidden, c.weight, c.ids, mask=mask)
    assert waits.names.count("nonzero") <= 2
    assert len(waits.names) <= 3
    stats = fused_logp(c.hidden, c.weight, c.ids, mask=mask, **c.options())
    with Waits() as waits:
        (stats.logp + stats.entropy).sum().backward()
    assert waits.names == []


@pytest.mark.parametrize("name", HEADS)
def test_sweeps_neither_wait_nor_leave_their_device(name, monkeypatch):
    """Fake tensors on meta refuse a tensor of the CPU beside them, and any value or shape that depends on data."""
    options = HEADS[name]
    monkeypatch.setattr(loss, "no_autocast", lambda x: nullcontext())  # meta has no autocast
    with FakeTensorMode():
        (n, d, v), wide = (90, 16, 2500), torch.float32

        def meta(*shape, dtype=wide):
            return torch.zeros(*shape, dtype=dtype, device="meta")

        bias = meta(v) if options else None
        weight = meta(v, d, dtype=torch.bfloat16)
        made = head.Head(weight, bias, options.get("softcap"), options.get("scale", 1.0), "exact", None, wide)
        rows = head.Rows(meta(n, d, dtype=torch.bfloat16), meta(n, dtype=torch.long), meta(n))
        sampled = cpu.sampled_logits(made, rows)
        z = cpu.final_logits(made, sampled.raw, rows.inv_t)
        sums = cpu.sweep(made, rows, sampled, z, meta(n, v), meta(n, d))
        row_stats = closed_forms.stats_from_sums(sums, z, cpu.max_logits(made, rows))
        upstream = ops.upstream_of(row_stats, meta(n), meta(n))
        assert ops.rows_with_gradient(upstream) is None
        out = [*cpu.gradients(made, rows, upstream, (True, True, bool(options)))]
        out.append(ops.logp_gradient(ops.Call(made, rows, None, rows.ids.shape), row_stats, meta(n, d)))
        accumulators = (meta(v, d), bias if options else None)
        out.append(loss._accumulate_gradients(made, rows, row_stats, upstream, meta(n, v), accumulators))
        assert all(x.is_meta for x in out if x is not None)
        with pytest.raises(RuntimeError, match=r"device"):
            rows.inv_t + torch.zeros(n)


def test_without_a_mask_the_value_is_named_and_with_one_the_device_asserts(accelerator):
    c = case()
    ids, mask = c.ids.clone(), torch.ones(90)
    ids[3] = -100
    with pytest.raises(ValueError, match="got -100"):
        token_stats(c.hidden, c.weight, ids)
    with pytest.raises(RuntimeError, match=r"ids must be in \[0, 2500\) where the mask"):
        token_stats(c.hidden, c.weight, ids, mask=mask)
    mask[3] = 0
    assert token_stats(c.hidden, c.weight, ids, mask=mask).logp[3] == 0


def test_triton_runs_only_where_it_was_tested(monkeypatch):
    class Weight:
        is_cuda, device = True, "cuda:0"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    made = head.Head(Weight(), None, None, 1.0, "exact", None, torch.float32)
    assert ops.backend(made) is cpu
    monkeypatch.setattr(ops, "TRITON_TESTED", frozenset({(9, 0)}))
    assert ops.backend(made._replace(wide=torch.float64)) is cpu  # Triton's sweeps are in fp32
    on_triton = ops.backend(made)
    assert on_triton is cpu or on_triton.__name__.endswith("kernels.triton")
    assert ops.backend(made._replace(weight=torch.zeros(2, 2))) is cpu


def test_autocast_of_an_accelerator_chooses_the_dtype_as_it_does_for_its_own_head(accelerator):
    c = case(n=40)
    expected = token_stats(c.hidden.bfloat16(), c.weight.bfloat16(), c.ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = token_stats(c.hidden, c.weight, c.ids)
    assert torch.equal(got.logp, expected.logp)


def test_an_accelerator_has_one_thread_and_so_one_stream(accelerator):
    spans, x = [], torch.zeros(1)
    torch.set_num_threads(2)
    try:
        cpu.run_threaded(spans.append, 10, 3, x)
    finally:
        torch.set_num_threads(1)
    assert spans == [slice(0, 10)]
