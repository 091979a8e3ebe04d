"""Optimizers and learning-rate schedules.

Three AdamW (arXiv 1711.05101). `adamw` computes and stores in fp32: torch's own, fused, where the weights are fp32; for
bf16 weights with fp32 masters beside them (arXiv 1710.03740). `adamw_bf16` stores bf16 weights and moments alone and
rounds them stochastically, so that updates smaller than half a bf16 step survive on average (arXiv 2010.06192).
`adamw_8bit` is bitsandbytes' with block-wise quantized moments (arXiv 2110.02861). A_log, D, dt_bias, norms, biases and
the scales of quantized matrices take no weight decay. Schedules are functions of the step alone and the noise is a
function of (seed, update, parameter), so that nothing about them needs to be saved. Left out: Muon, parameter offload.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from moai_core import cuda
from moai_core.errors import UsageError
from moai_core.training import adamw_cuda

NO_DECAY = ("A_log", "D", "dt_bias", "scales", "zeros")

# Elements updated at once by AdamWBF16: bounds its fp32 temporaries (five of them) to a few hundred MB whatever the
# size of a parameter.
_CHUNK = 1 << 24


def learning_rate(
    step: int, *, total: int, peak: float, schedule: str, warmup: int, min_ratio: float, decay_fraction: float
) -> float:
    """Learning rate of optimizer step `step` (the first is 1, the last is `total`).

    Linear warm-up reaches `peak` at step `warmup`; then `cosine` falls to min_ratio * peak at step `total` (arXiv
    1608.03983), `constant` stays, and `wsd` stays until the last decay_fraction of the steps and falls there as 1 -
    sqrt (arXiv 2405.18392, section 3).
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        start = max(warmup, total - round(decay_fraction * total))
        shape = 1.0 if step <= start else 1.0 - math.sqrt(min(1.0, (step - start) / max(1, total - start)))
    elif schedule == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
    else:
        raise UsageError(f"unknown schedule {schedule!r}", hint="schedules: cosine, wsd, constant")
    return peak * (min_ratio + (1.0 - min_ratio) * max(0.0, shape))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of (name, parameter), with and without weight decay; matrices, convolutions and embeddings decay."""
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY
            (plain if spared else decayed).append((name, parameter))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def make_optimizer(model: nn.Module, optim: Any, *, lr: float, seed: int) -> torch.optim.Optimizer:
    """The optimizer that a recipe's `optim` section names. UsageError when its package is missing."""
    groups = parameter_groups(model, optim.weight_decay)
    common = {"lr": lr, "betas": tuple(optim.betas), "eps": optim.eps}
    bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    if optim.name == "adamw" and not bf16:
        return torch.optim.AdamW(groups, fused=True, **common)
    if optim.name in ("adamw", "adamw_bf16"):
        return AdamWBF16(groups, seed=seed, masters=optim.name == "adamw", **common)
    if optim.name == "adamw_8bit":
        require_8bit()
        if bf16:
            why = "rounds bf16 weights to the nearest, which loses small updates"
            raise UsageError(
                f"optim.name=adamw_8bit {why}", hint="use train.precision=bf16-mixed, or optim.name=adamw_bf16"
            )
        from bitsandbytes.optim import AdamW8bit

        for group in groups:
            group["params"] = [parameter for _, parameter in group["params"]]
        return AdamW8bit(groups, **common)
    raise UsageError(f"unknown optimizer {optim.name!r}", hint="optimizers: adamw, adamw_bf16, adamw_8bit")


def require_8bit() -> None:
    """UsageError when bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("optim.name=adamw_8bit needs bitsandbytes", hint="pip install 'moai[quant]'")


class AdamWBF16(torch.optim.Optimizer):
    """AdamW for bf16 weights, computed in fp32.

    With `masters`: fp32 weights and moments in the state, of which the model's weights are the rounded copy; 12 bytes a
    parameter beside the weight. Without: moments in bf16 (4 bytes), weights and moments rounded stochastically. fp32
    parameters (A_log, D, dt_bias) get plain AdamW. Takes groups of (name, parameter): names seed the noise, so that it
    depends on nothing but seed, count of updates and name.
    """

    def __init__(
        self,
        groups: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
        masters: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed, self.masters = seed, masters
        self._keys: dict[str, int] = {}
        self._tables: dict[str | tuple[int, torch.device, torch.dtype], adamw_cuda.Table] = {}

    @torch.no_grad()
    def step(self, closure: Any = None, *, scale: Tensor | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, in one kernel a group where moai's kernels run.

        scale: what every gradient is multiplied by on its way, a number in fp32 on the parameters' device.
        """
        assert closure is None
        for index, group in enumerate(self.param_groups):
            fused: dict[tuple[torch.device, torch.dtype, int], list[adamw_cuda.Entry]] = {}
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                state = self._advance(name, parameter)
                if cuda.why_not(parameter.device) is None:
                    entry = self._entry(name, parameter, state)
                    fused.setdefault((parameter.device, parameter.dtype, state["step"]), []).append(entry)
                else:
                    self._update(name, parameter, state, group, scale)
            for (device, dtype, count), entries in fused.items():
                table = self._tables.setdefault((index, device, dtype), adamw_cuda.Table())
                adamw_cuda.update(table, entries, count=count, scale=scale, **_values(group))

    @torch.no_grad()
    def step_one(self, group: dict[str, Any], name: str, parameter: Tensor, squares: Tensor) -> None:
        """The update of one parameter that has a gradient, as `step` does it, with the same bits.

        squares: fp32 (blocks(parameter),), on its device, receives numbers that add up to the sum of the gradient's
        squares. What of the gradient is not finite changes nothing.
        """
        state = self._advance(name, parameter)
        if cuda.why_not(parameter.device) is None:
            table = self._tables.setdefault(name, adamw_cuda.Table())
            entries = [self._entry(name, parameter, state)]
            adamw_cuda.update(table, entries, count=state["step"], scale=None, squares=squares, **_values(group))
        else:
            assert parameter.grad is not None
            squares.copy_(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square())
            self._update(name, parameter, state, group, None, guarded=not math.isfinite(float(squares)))

    def _advance(self, name: str, parameter: Tensor) -> dict[str, Any]:
        """The parameter's state, one update later by its count."""
        assert parameter.is_contiguous(), name
        state = self.state[parameter]
        if not state:
            state.update(self._start(parameter))
        state["step"] = int(state["step"]) + 1
        return state

    def _entry(self, name: str, parameter: Tensor, state: dict[str, Any]) -> adamw_cuda.Entry:
        weight = state.get("master", parameter)
        return adamw_cuda.Entry(self._key(name), parameter, state["exp_avg"], state["exp_avg_sq"], weight)

    def _start(self, parameter: Tensor) -> dict[str, Any]:
        dtype = torch.float32 if self.masters else parameter.dtype
        state: dict[str, Any] = {"step": 0, "exp_avg": torch.zeros_like(parameter, dtype=dtype)}
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        if self.masters and parameter.dtype != torch.float32:
            state["master"] = parameter.float()
        return state

    def _key(self, name: str) -> int:
        if name not in self._keys:
            self._keys[name] = _mix(self.seed, name)
        return self._keys[name]

    def _update(
        self,
        name: str,
        parameter: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        scale: Tensor | None,
        guarded: bool = False,
    ) -> None:
        """guarded: leave what belongs to gradients that are not finite."""
        assert parameter.grad is not None
        count = state["step"]
        noise = torch.Generator(parameter.device)
        noise.manual_seed(_mix(self.seed, count, name))
        (beta1, beta2), lr = group["betas"], group["lr"]
        step, root = lr / (1 - beta1**count), math.sqrt(1 - beta2**count)
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state.get("master", parameter))
        for p, g, m, v, w in zip(*(t.reshape(-1).split(_CHUNK) for t in tensors), strict=True):
            g = g.float() if scale is None else g.float() * scale
            m32 = m.float().lerp_(g, 1 - beta1)
            v32 = v.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w32 = w.float().mul_(1 - lr * group["weight_decay"])
            w32.addcdiv_(m32, v32.sqrt().div_(root).add_(group["eps"]), value=-step)
            for target, value in ((w, w32), (m, m32), (v, v32)):
                rounded = round_stochastic(value, noise) if target.dtype == torch.bfloat16 else value
                target.copy_(torch.where(g.isfinite(), rounded, target) if guarded else rounded)
            if "master" in state:
                p.copy_(w)


def _values(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}


def blocks(parameter: Tensor) -> int:
    """How many numbers `AdamWBF16.step_one` leaves of a parameter's gradient."""
    return -(-parameter.numel() // adamw_cuda.CHUNK) if cuda.why_not(parameter.device) is None else 1


def round_stochastic(value: Tensor, noise: torch.Generator) -> Tensor:
    """fp32 -> bf16, to one of the two neighbours with the probability that makes the expectation exact; bf16 values
    stay as they are.
    """
    bits = value.view(torch.int32)
    low = torch.randint(0, 1 << 16, value.shape, generator=noise, device=value.device, dtype=torch.int32)
    # Sign and magnitude: a carry out of the lower half goes to the neighbour further from zero, for either sign.
    return ((bits + low) & -65536).view(torch.float32).to(torch.bfloat16)


def _mix(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def grad_norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, in fp32 whatever their type; NaN or infinite when one of them is."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault((parameter.grad.device, parameter.grad.dtype), []).append(parameter.grad)
    # One pass over each list in few launches on a GPU, without copies in fp32.
    norms = [one for grads in kinds.values() for one in torch._foreach_norm(grads, 2, dtype=torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], norm: Tensor, clip: float | None
) -> None:
    """One update from gradients of that norm, scaled down to the norm `clip` (None: never) where they exceed it."""
    if clip is not None and isinstance(optimizer, AdamWBF16):
        # Folded into the update: no pass over the gradients, and no rounding of theirs.
        optimizer.step(scale=(clip / (norm + 1e-6)).clamp(max=1.0))
        return
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimizer.step()
