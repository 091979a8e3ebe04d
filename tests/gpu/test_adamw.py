"""The optimizer's kernel on a CUDA GPU, against float64 with noise of an own Philox, against the torch path and torch's
AdamW. Run on a machine with one: `pytest -m gpu tests/gpu/test_adamw.py`.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from moai_core.training import adamw_cuda, in_backward, optim

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def settings(name="adamw_bf16", **values):
    return SimpleNamespace(**{"name": name, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **values})


class Odd(nn.Module):
    """Sizes that are no multiple of a vector, several chunks and a single element; fp32 beside bf16; an address that no
    vector load takes."""

    def __init__(self, device, dtype=BF16, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(301, 601).to(dtype))
        self.chunk = nn.Parameter(torch.randn(2, adamw_cuda.CHUNK // 2).to(dtype))
        self.one = nn.Parameter(torch.randn(1).to(dtype))
        self.empty = nn.Parameter(torch.randn(0).to(dtype))
        self.aside = nn.Parameter(torch.randn(3001).to(device, dtype)[1:])
        self.A_log = nn.Parameter(torch.randn(64, 16))
        self.D = nn.Parameter(torch.randn(67))
        self.to(device)
        assert self.aside.data_ptr() % 16


def give_gradients(model, step, size=0.01):
    noise = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        grad = (size * torch.randn(p.numel() + 3, generator=noise)).to(p.device, p.dtype)
        p.grad = (grad[3:] if name == "chunk" else grad[:-3]).view_as(p)


def philox(counter, key, rounds=7):
    """Philox4x32 in 64-bit numpy: four words for each counter."""
    low = np.uint64(0xFFFFFFFF)
    x, (k0, k1) = [np.asarray(c, dtype=np.uint64) & low for c in counter], (int(k) for k in key)
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        shift = np.uint64(32)
        x = [(b >> shift) ^ x[1] ^ np.uint64(k0), b & low, (a >> shift) ^ x[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


def test_philox_is_random123s():
    """The known answers that come with Random123, for 7 and for 10 rounds."""
    assert [int(v) for v in philox([0] * 4, [0] * 2)] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(v) for v in philox([0] * 4, [0] * 2, 10)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def noise(key, update, size, which):
    """The 16 bits that each of `size` elements is rounded with."""
    i = np.arange(-(-size // 8))
    words = philox([i, i >> 32, np.full_like(i, update), np.full_like(i, which)], [key & 0xFFFFFFFF, key >> 32])
    halves = [(words[e // 2] >> np.uint64(e % 2 * 16)) & np.uint64(0xFFFF) for e in range(8)]
    return torch.from_numpy(np.stack(halves, 1).reshape(-1)[:size].astype(np.int64))


def rounded(value, low):
    bits = value.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return (((bits + low.view(value.shape)) >> 16) << 16).to(torch.int32).view(torch.float32)


def copies(model, own):
    cpu = {n: p.detach().double().cpu() for n, p in model.named_parameters()}
    states = {n: own.state.get(p, {}) for n, p in model.named_parameters()}
    return cpu, {n: {k: v.double().cpu() for k, v in s.items() if k != "step"} for n, s in states.items()}


def in_float64(before, state, grad, step, decay, lr=1e-2):
    """(weight, exp_avg, exp_avg_sq) after one update."""
    m = 0.9 * state.get("exp_avg", torch.zeros_like(grad)) + 0.1 * grad
    v = 0.95 * state.get("exp_avg_sq", torch.zeros_like(grad)) + 0.05 * grad**2
    w = state.get("master", before) * (1 - lr * decay)
    return w - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8), m, v


@pytest.mark.parametrize("name", ["adamw_bf16", "adamw"])
def test_equals_float64_and_its_own_noise(device, name):
    model = Odd(device)
    own = optim.make_optimizer(model, settings(name), lr=1e-2, seed=5)
    assert type(own) is optim.AdamWBF16
    for step in (1, 2, 3):
        give_gradients(model, step)
        weights, states = copies(model, own)
        scale = None if step == 1 else torch.tensor(0.375, device=device)
        own.step(scale=scale)
        for n, p in model.named_parameters():
            if not p.numel():
                continue
            decay = 0.1 if n in ("matrix", "chunk") else 0.0
            grad = p.grad.double().cpu() * (1.0 if scale is None else 0.375)
            want = in_float64(weights[n], states[n], grad, step, decay)
            got = (own.state[p].get("master", p), own.state[p]["exp_avg"], own.state[p]["exp_avg_sq"])
            for which, (ours, theirs) in enumerate(zip(got, want, strict=True)):
                ours = ours.detach().cpu()
                if ours.dtype == BF16:
                    expected = rounded(theirs.float(), noise(own._key(n), step, p.numel(), which))
                    # fp32 differs from float64 in its last place, and rarely that decides a rounding.
                    assert (expected != ours.float()).double().mean() < 2e-3 or p.numel() < 500, (n, which)
                    step_of_bf16 = 2**-7 * theirs.abs() + 1e-6 * theirs.abs().max()
                    assert torch.all((ours.double() - theirs).abs() < step_of_bf16), (n, which)
                else:
                    assert (ours.double() - theirs).norm() < 2e-7 * theirs.norm(), (n, which)
            if "master" in own.state[p]:
                assert torch.equal(p, own.state[p]["master"].to(BF16))


def by_torch(monkeypatch):
    monkeypatch.setattr(optim.cuda, "why_not", lambda device: "not now")


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "torch"])
def test_expectation_is_exact(device, monkeypatch, fused):
    """A million equal elements: the means of weights and moments are what fp32 has, within the mean's own spread."""
    model = nn.Module()
    model.p = nn.Parameter(torch.full((1 << 20,), 1.5, device=device, dtype=BF16))
    model.p.grad = torch.full_like(model.p, 0.123)
    if not fused:
        by_torch(monkeypatch)
    own = optim.make_optimizer(model, settings(weight_decay=0.0), lr=1e-4, seed=1)
    grad = model.p.grad[:1].double().cpu()
    want = in_float64(torch.full((1,), 1.5).double(), {}, grad, 1, 0.0, lr=1e-4)
    own.step()
    state = own.state[model.p]
    for got, exact in zip((model.p.detach(), state["exp_avg"], state["exp_avg_sq"]), want, strict=True):
        low, high = got.double().min(), got.double().max()
        assert low < exact.item() < high and got.unique().numel() == 2
        sigma = float(high - low) / 2 / math.sqrt(got.numel())
        assert abs(got.double().mean().item() - exact.item()) < 5 * sigma


def test_kernel_and_torch_path_agree(device, monkeypatch):
    """In fp32 to the last places; in bf16 within the noise, after as many steps."""
    ends = {}
    for path in ("kernel", "torch"):
        model = Odd(device)
        own = optim.make_optimizer(model, settings(), lr=1e-3, seed=5)
        if path == "torch":
            by_torch(monkeypatch)
        for step in range(1, 9):
            give_gradients(model, step)
            own.step(scale=torch.tensor(0.5, device=device))
        ends[path] = {n: p.detach().double() for n, p in model.named_parameters()}
    start = {n: p.detach().double() for n, p in Odd(device).named_parameters()}
    for n, ours in ends["kernel"].items():
        theirs = ends["torch"][n]
        if n in ("A_log", "D"):
            # Eight updates, each rounded to fp32 in another order.
            assert (ours - theirs).norm() < 1e-6 * (theirs - start[n]).norm() + 8 * 2**-24 * theirs.norm(), n
        elif n in ("matrix", "chunk"):
            # Noise of eight roundings, of standard deviation up to half a bf16 step, in each of the two.
            assert (ours - theirs).norm() < 2**-8 * math.sqrt(2 * 8) * theirs.norm(), n
            moved, wanted = (ours - start[n]).mean(), (theirs - start[n]).mean()
            spread = (ours - theirs).std() / math.sqrt(ours.numel())
            assert abs(moved - wanted) < 5 * spread, n


def trained(device, steps, *, seed=5, model=None, own=None, first=0):
    model = model or Odd(device)
    own = own or optim.make_optimizer(model, settings(), lr=1e-2, seed=seed)
    for step in range(first, steps):
        give_gradients(model, step)
        own.step()
    return model, own


def test_same_seed_same_bits_and_resumes_exactly(device):
    whole, own = trained(device, 6)
    again, _ = trained(device, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    half, own = trained(device, 3)
    resumed = Odd(device, seed=1)
    resumed.load_state_dict(half.state_dict())
    fresh = optim.make_optimizer(resumed, settings(), lr=1e-2, seed=5)
    fresh.load_state_dict(own.state_dict())
    trained(device, 6, model=resumed, own=fresh, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    other, _ = trained(device, 6, seed=6)
    assert not torch.equal(whole.matrix, other.matrix)


def test_parameters_without_gradient_stay(device):
    model, own = trained(device, 2)
    before = model.matrix.detach().clone()
    give_gradients(model, 2)
    model.matrix.grad = None
    own.step()
    assert torch.equal(model.matrix, before)
    trained(device, 4, model=model, own=own, first=3)  # its count of updates is now another than the others'
    assert not torch.equal(model.matrix, before)
    assert int(own.state[model.matrix]["step"]) == 3 and int(own.state[model.one]["step"]) == 4


@pytest.mark.parametrize("name", ["adamw_bf16", "adamw"])
def test_one_parameter_alone_has_the_same_bits(device, name):
    """As in the backward pass, with the sum of its gradient's squares."""
    whole, parts = Odd(device), Odd(device)
    own, other = (optim.make_optimizer(m, settings(name), lr=1e-2, seed=5) for m in (whole, parts))
    for step in range(3):
        give_gradients(whole, step)
        own.step()
        give_gradients(parts, step)
        for group in other.param_groups:
            for key, p in zip(group["param_names"], group["params"], strict=True):
                if not p.numel():
                    continue
                squares = torch.full((optim.blocks(p),), math.nan, device=device)
                exact = float((p.grad.double() ** 2).sum())
                other.step_one(group, key, p, squares)
                assert float(squares.double().sum()) == pytest.approx(exact, rel=1e-5), key
    for (key, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q), key
        for which, value in own.state[p].items() if p.numel() else ():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][which])), (key, which)


@pytest.mark.parametrize("name", ["adamw_bf16", "adamw"])
def test_what_is_not_finite_changes_nothing(device, name):
    model, _ = trained(device, 2)
    own = optim.make_optimizer(model, settings(name), lr=1e-2, seed=5)
    give_gradients(model, 2)
    own.step()
    p = model.matrix
    before, state = p.detach().clone(), {k: torch.as_tensor(v).clone() for k, v in own.state[p].items()}
    give_gradients(model, 3)
    wrong = torch.zeros_like(p, dtype=torch.bool)
    wrong.view(-1)[::7] = True
    p.grad[wrong] = (
        torch.tensor([math.nan, math.inf, -math.inf], device=device).repeat(1 << 16)[: int(wrong.sum())].to(BF16)
    )
    own.step()
    assert torch.equal(p[wrong], before[wrong]) and p.isfinite().all()
    for key, old in state.items():
        if key != "step":
            assert torch.equal(own.state[p][key][wrong], old[wrong]) and own.state[p][key].isfinite().all()
            assert not torch.equal(own.state[p][key][~wrong], old[~wrong])


def test_inside_of_the_backward_pass(device, monkeypatch):
    """Gradients of a chain of products, each of which still needs its weights: the same bits as after it."""
    monkeypatch.setattr(in_backward, "UPDATED_ALONE", 1000)
    ends = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(256, 256), nn.SiLU()))).to(device, BF16)
        own = optim.make_optimizer(model, settings(), lr=1e-3, seed=5)
        early = in_backward.InBackward(own) if inside else None
        norms = []
        for step in range(4):
            noise = torch.Generator().manual_seed(step)
            x = torch.randn(64, 256, generator=noise).to(device, BF16)
            (model(x).float() ** 2).mean().backward()
            parameters = list(model.parameters())
            norms.append(optim.grad_norm(parameters) if early is None else early.norm(parameters))
            own.step()
            own.zero_grad(set_to_none=True)
        ends.append((list(model.parameters()), [float(norm) for norm in norms]))
    assert all(torch.equal(p, q) for p, q in zip(ends[0][0], ends[1][0], strict=True))
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-4)


def test_small_updates_survive(device):
    model = nn.Module()
    model.p = nn.Parameter(torch.ones(100, 100, device=device, dtype=BF16))
    own = optim.make_optimizer(model, settings(weight_decay=0.0), lr=2**-12, seed=3)
    for _ in range(64):
        model.p.grad = torch.ones_like(model.p)
        own.step()
    assert 1.0 - model.p.float().mean().item() == pytest.approx(64 * 2**-12, rel=0.05)


def test_autograd_sees_the_change(device):
    model = nn.Module()
    model.p = nn.Parameter(torch.ones(8, device=device, dtype=BF16))
    own = optim.make_optimizer(model, settings(), lr=0.1, seed=3)
    loss = (model.p**2).sum()
    model.p.grad = torch.ones_like(model.p)
    own.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_clipping_is_torchs(device):
    """On fp32 parameters, where torch's scaling of the gradients loses nothing."""
    ours, theirs = Odd(device, torch.float32), Odd(device, torch.float32)
    own = optim.AdamWBF16(optim.parameter_groups(ours, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, seed=0)
    groups = [{**g, "params": [p for _, p in g["params"]]} for g in optim.parameter_groups(theirs, 0.1)]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step, size in enumerate((10.0, 1e-6, 1.0)):  # far above, below, above
        for model in (ours, theirs):
            give_gradients(model, step, size)
        parameters = list(ours.parameters())
        optim.clip_and_step(own, parameters, optim.grad_norm(parameters), 1.0)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adam.step()
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7, msg=n)


def test_the_gradients_norm(device):
    model = Odd(device)
    give_gradients(model, 0)
    parameters = [p for p in model.parameters() if p.numel()]
    exact = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters))
    assert float(optim.grad_norm(parameters)) == pytest.approx(exact, rel=1e-5)
    assert optim.grad_norm(parameters) == optim.grad_norm(parameters), "the same bits"
    for wrong in (math.nan, math.inf):
        model.matrix.grad[7, 3] = wrong
        assert not math.isfinite(float(optim.grad_norm(parameters)))


def test_more_elements_than_32_bits_count(device):
    size = (1 << 31) + 1003
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 5 * 2 * size:
        pytest.skip("needs 22 GB")
    model = nn.Module()
    model.p = nn.Parameter(torch.ones(size, device=device, dtype=BF16))
    model.p.grad = torch.ones_like(model.p)
    own = optim.make_optimizer(model, settings(weight_decay=0.0), lr=0.5, seed=3)
    own.step()
    for part in (model.p.detach()[:1000], model.p.detach()[-2000:]):
        assert torch.all(part == 0.5)
