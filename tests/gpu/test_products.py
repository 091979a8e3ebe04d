"""Products fused with what stands beside them (moai_core/model/products.py) against float64, in both checkpointing
modes, and whole models with and without them. Run on a machine with a CUDA GPU: `pytest -m gpu
tests/gpu/test_products.py`.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moai_core import cuda
from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM, products
from moai_core.model.norm import RMSNorm
from moai_core.model.recompute import Recomputed

pytestmark = pytest.mark.gpu

B, S = torch.bfloat16, torch.float32
# Relative norm error: fp32 sums; in bf16 results and what lies between are rounded.
LIMIT = {S: 3e-6, B: 1.2e-2}


@pytest.fixture(autouse=True)
def _can_run(device):
    if reason := cuda.why_not(device):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _all_poisoned(poisoned):
    with poisoned():
        yield


def random(device, *shape, dtype=S, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)


def leaf(x, dtype=None):
    return x.detach().to(dtype or x.dtype).requires_grad_()


def error(got, want):
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def linear(device, size, out, dtype, seed):
    module = nn.Linear(size, out, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(random(device, out, size, seed=seed, scale=size**-0.5))
    return module


@pytest.mark.parametrize("first", [False, True], ids=["sum", "first layer"])
@pytest.mark.parametrize("stream, dtype", [(B, B), (S, B), (S, S)], ids=str)
def test_norm_and_products(device, stream, dtype, first):
    H, widths = 96, (40, 136)
    residual, x = leaf(random(device, 3, 11, H, dtype=stream)), leaf(random(device, 3, 11, H, dtype=dtype, seed=1))
    norm = RMSNorm(H, 1e-5).to(device, dtype)
    with torch.no_grad():
        norm.weight.add_(random(device, H, scale=0.3))
    linears = [linear(device, H, width, dtype, seed) for seed, width in enumerate(widths)]
    assert products.fusable(residual, *linears, norm=norm)
    inputs = [residual, *([] if first else [x]), norm.weight, *(m.weight for m in linears)]
    given = [random(device, 3, 11, n, dtype=d, seed=7) for n, d in ((H, stream), *((w, dtype) for w in widths))]

    wide = [leaf(t, torch.float64) for t in inputs]
    total64 = wide[0] * 1 if first else wide[0] + wide[1]
    y64 = F.rms_norm(total64, (H,), wide[-3], 1e-5)
    wanted = [total64, y64 @ wide[-2].T, y64 @ wide[-1].T]
    d_wanted = torch.autograd.grad(wanted, wide, [g.double() for g in given], retain_graph=True)
    d_part = torch.autograd.grad(wanted[1], wide, given[1].double(), allow_unused=True)

    runs = []
    for keep in (True, False):
        total, made = products.norm_products(residual, None if first else x, norm, linears, keep)
        assert made.keep == keep and total.dtype == stream and all(r.dtype == dtype for r in made.results)
        outputs = [total, *made.results]
        found = torch.autograd.grad(outputs, inputs, given, retain_graph=True)
        part = torch.autograd.grad(made.results[0], inputs, given[1], allow_unused=True, retain_graph=True)
        (only,) = torch.autograd.grad(total, residual, given[0])
        assert torch.equal(only, given[0])
        assert part[-1] is None and d_part[-1] is None
        pairs = [*zip(outputs, wanted, strict=True), *zip(found, d_wanted, strict=True)]
        pairs += zip(part[:-1], d_part[:-1], strict=True)
        assert [e for e in (error(*pair) for pair in pairs) if not e < LIMIT[dtype]] == []
        assert [g.dtype for g in found] == [t.dtype for t in inputs]
        runs.append([*outputs, *found])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "made again with other bits"


@pytest.mark.parametrize("dtype", [S, B], ids=str)
def test_swiglu_and_product(device, dtype):
    gate, up = (leaf(random(device, 2, 9, 88, dtype=dtype, seed=seed)) for seed in (0, 1))
    down = linear(device, 88, 24, dtype, 2)
    given = random(device, 2, 9, 24, dtype=dtype)
    inputs = [gate, up, down.weight]
    wide = [leaf(t, torch.float64) for t in inputs]
    want = (F.silu(wide[0]) * wide[1]) @ wide[2].T
    wanted = [want, *torch.autograd.grad(want, wide, given.double())]
    runs = []
    for keep in (True, False):
        y = products.swiglu_product(gate, up, down, keep)
        before = given.clone()
        runs.append([y, *torch.autograd.grad(y, inputs, given, retain_graph=True)])
        again = torch.autograd.grad(y, inputs, given)  # nothing that was saved may have been overwritten
        assert torch.equal(given, before) and all(map(torch.equal, runs[-1][1:], again))
        assert [e for e in map(error, runs[-1], wanted) if not e < LIMIT[dtype]] == []
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", [S, B], ids=str)
def test_product_beside_another_reader(device, dtype):
    u, proj = leaf(random(device, 2, 9, 48, dtype=dtype)), linear(device, 48, 20, dtype, 1)
    d_mixed, scale = random(device, 2, 9, 20, dtype=dtype), random(device, 48, dtype=dtype, seed=5)
    wide = [leaf(t, torch.float64) for t in (u, proj.weight)]
    want = torch.autograd.grad((wide[0] @ wide[1].T * d_mixed.double()).sum() + (wide[0] * scale.double()).sum(), wide)
    for drop in (False, True):
        made = []

        def make(made=made):
            made.append(1)
            return u.detach().clone()

        mixed, beside = products.product_beside(Recomputed(u * 1, make) if drop else u, proj)
        read = beside.tensor if drop else beside
        found = torch.autograd.grad([(mixed * d_mixed).sum() + (read * scale).sum()], [u, proj.weight])
        assert [e for e in map(error, found, want) if not e < LIMIT[dtype]] == [] and len(made) == drop


def test_added_inside_of_the_product(device):
    total, x, out = random(device, 2, 7, 32, dtype=B), random(device, 2, 7, 48, dtype=B), linear(device, 48, 32, B, 1)
    want = total.double() + x.double() @ out.weight.detach().double().T
    assert products.onto(total, True, out) is None
    with torch.no_grad():
        assert products.onto(total, True, out) is total and products.onto(total.float(), True, out) is None
        assert products.onto(total, False, out) is None
        products.add_product(total, x, out)
    assert error(total, want) < 4e-3


def test_what_wants_to_be_called_is_called(device):
    x = random(device, 2, 16, dtype=B)
    plain = linear(device, 16, 16, B, 0)
    assert products.fusable(x, plain)
    hooked, biased = linear(device, 16, 16, B, 0), nn.Linear(16, 16, device=device, dtype=B)
    hooked.register_forward_hook(lambda *_: None)
    other = type("Other", (nn.Linear,), {})(16, 16, bias=False, device=device, dtype=B)
    for module in (hooked, biased, other, linear(device, 16, 16, torch.float64, 0), linear(device, 16, 16, S, 0)):
        assert not products.fusable(x, module)
    with torch.no_grad():
        assert not products.fusable(x, plain)
    norm = RMSNorm(16, 1e-5).to(device)
    assert not products.fusable(x, plain, norm=norm)
    with torch.autocast(x.device.type, B):
        assert products.fusable(x.float(), linear(device, 16, 16, S, 0), norm=norm)


@pytest.mark.parametrize("fields", [{}, {"dt_bc_norm": False, "ffn": "none"}, {"residual_in_fp32": True}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_a_model_with_and_without(device, monkeypatch, precision, fields):
    """The gradients of a model, as far from float64 as without the fused products."""
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "state_size": 8}
    numbers = {**shape, "initializer_range": 0.1, **fields}
    ids = torch.randint(5, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    seq_idx = (torch.arange(40) >= 25).int().expand(2, -1).contiguous()

    def step(model, mode, kind=None):
        model.set_checkpointing(mode)
        model.zero_grad(set_to_none=True)
        where = next(model.parameters()).device
        with torch.autocast(where.type, B) if kind == "bf16-mixed" else nullcontext():
            model(ids.to(where), labels=ids.to(where), seq_idx=seq_idx.to(where)).loss.backward()
        return {name: p.grad.double().cpu() for name, p in model.named_parameters()}

    torch.manual_seed(0)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers)).train().to(device)
    model = model.to(B) if precision == "bf16" else model
    exact = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers)).train()
    exact.load_state_dict(model.state_dict())
    exact.double().set_scan_backend("reference")
    calls = []
    real = products.fusable
    monkeypatch.setattr(products, "fusable", lambda *a, **k: calls.append(real(*a, **k)) or calls[-1])
    fused = {mode: step(model, mode, precision) for mode in ("none", "selective")}
    assert calls and all(calls)
    monkeypatch.setattr(products, "fusable", lambda *_, **__: False)
    plain, want = step(model, "none", precision), step(exact, "none")
    for name, grad in want.items():
        assert torch.equal(fused["none"][name], fused["selective"][name]), name
        limit = 1e-4 if precision == "fp32" else 1.5 * error(plain[name], grad) + 1e-2
        assert error(fused["none"][name], grad) < limit, name


@pytest.mark.parametrize("fields", [{}, {"dt_bc_norm": False, "ffn": "none"}], ids=str)
def test_reading_without_gradients(device, fields):
    """What the model works on is its own: the caller's tensors stay as they are, hidden states are those of each layer."""
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "state_size": 8}
    torch.manual_seed(0)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(initializer_range=0.1, **shape, **fields)).to(device).eval()
    given = random(device, 2, 9, 64)
    before = given.clone()
    want = model.model(inputs_embeds=given, output_hidden_states=True)
    with torch.no_grad():
        got = model.model(inputs_embeds=given)
        start = model.model(inputs_embeds=given[:, :4])
        rest = model.model(inputs_embeds=given[:, 4:], state=start.state)
        shown = model.model(inputs_embeds=given, output_hidden_states=True)
    assert torch.equal(given, before)
    parts = torch.cat([start.last_hidden_state, rest.last_hidden_state], 1)
    for found in (got.last_hidden_state, parts):
        assert error(found, want.last_hidden_state.double()) < 1e-5
    for found, wanted in zip(shown.hidden_states, want.hidden_states, strict=True):
        assert error(found, wanted.double()) < 1e-5
