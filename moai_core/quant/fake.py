"""Matrices that are trained as they will be stored: fake quantization, and packed codes whose scales are trained.

`FakeQuantLinear` keeps a full-precision weight and multiplies with what it rounds to (quantization-aware training;
straight-through estimator, arXiv 1308.3432; learned scales, LSQ, arXiv 1902.08153). `ScaledQuantLinear` keeps int4
codes as they are and trains their scales and zeros, which takes a tenth of the memory. Both are saved as the format's
plain tensors, so that the file is the quantized model; multiplying in fp32, the packed model gives the same bits. The
full weights are training state and travel with the optimizer's (checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moai_core.errors import UsageError
from moai_core.quant import dequantize, hadamard
from moai_core.quant.formats import FORMATS, Spec, codes4, codes8, grouped, pack4, rounded, unpack4
from moai_core.quant.linear import QuantEmbedding, QuantLinear, quantized, replace, retie


class FakeQuantLinear(nn.Module):
    """x @ Q(W)^T, W (out, in) trained through the rounding Q; scales (and zeros, where not symmetric) trained too."""

    def __init__(self, in_features: int, out_features: int, spec: Spec) -> None:
        """Raises UsageError for a format that can't be trained, or doesn't hold such a matrix."""
        super().__init__()
        if spec.format not in ("int4", "int8"):
            raise UsageError(f"{spec.format} can't be trained", hint="train int4 or int8")
        FORMATS[spec.format].check(spec, out_features, in_features)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.stored = FORMATS[spec.format].tensors(spec, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        shape = self.stored["scales"][0]
        self.scales = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.zeros = nn.Parameter(torch.empty(shape, dtype=torch.float32)) if "zeros" in self.stored else None
        self.rotation: nn.Module | None = None  # of the inputs, as QuantLinear's

    @torch.no_grad()
    def start(self, weight: Tensor, tensors: Mapping[str, Tensor] | None = None) -> FakeQuantLinear:
        """Takes over a weight (out, in); scales and zeros from `tensors`, or such that nothing is cut off. Returns
        itself."""
        found = FORMATS[self.spec.format].encode(self.spec, weight) if tensors is None else tensors
        self.weight = nn.Parameter(weight.detach().clone().to(self.weight.dtype))
        self.scales = nn.Parameter(found["scales"].float().clone())
        if self.zeros is not None:
            self.zeros = nn.Parameter(found["zeros"].float().clone())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype (or autocast's)."""
        x = x if self.rotation is None else self.rotation(x)
        return F.linear(x, fake_quantize(self.weight, self.scales, self.zeros, self.spec).to(x.dtype))

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What is stored: the format's tensors of Q(W)."""
        scales, zeros = _stored(self.scales), None if self.zeros is None else _stored(self.zeros)
        w = grouped(self.spec, self.weight.float())
        if self.spec.format == "int8":
            return {"qweight": codes8(w, scales).flatten(1).to(torch.int8), "scales": scales}
        kept = {"scales": scales} if zeros is None else {"scales": scales, "zeros": zeros}
        return {"qweight": pack4(codes4(w, scales, zeros).flatten(1)), **kept}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _in_fp32(self, ("scales", "zeros"), lambda: super(FakeQuantLinear, self)._apply(fn, recurse))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor for name, tensor in self.tensors().items()})

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, trained as {self.spec.format}"


class FakeQuantEmbedding(FakeQuantLinear):
    """Rows of Q(W), W (V, H) trained through the rounding, by id and, as a tied head, x @ Q(W)^T."""

    def __init__(self, num_embeddings: int, embedding_dim: int, spec: Spec) -> None:
        super().__init__(embedding_dim, num_embeddings, spec)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) integers -> (..., H) in the weight's dtype."""
        flat = ids.reshape(-1)
        zeros = None if self.zeros is None else self.zeros[flat]
        rows = fake_quantize(self.weight[flat], self.scales[flat], zeros, self.spec).to(self.weight.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)

    def head(self, x: Tensor) -> Tensor:
        """x (..., H) -> logits (..., V)."""
        return super().forward(x)


class ScaledQuantLinear(nn.Module):
    """x @ ((q - zeros) * scales)^T with constant int4 codes q, and trained scales (and zeros, where not symmetric)."""

    qweight: Tensor

    def __init__(self, source: QuantLinear) -> None:
        """Takes over the numbers of a quantized layer. Raises UsageError for another format than int4."""
        super().__init__()
        if source.spec.format != "int4":
            raise UsageError(f"{source.spec.format} has no scales to train", hint="train scales of int4")
        self.in_features, self.out_features, self.spec = source.in_features, source.out_features, source.spec
        self.stored, found = source.stored, source.tensors()
        self.register_buffer("qweight", found["qweight"])
        self.scales = nn.Parameter(found["scales"].float())
        self.zeros = nn.Parameter(found["zeros"].float()) if "zeros" in found else None
        self.rotation = source.rotation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype. No more than one weight of full size exists at a time."""
        x = x if self.rotation is None else self.rotation(x)
        return _Scaled.apply(x, self.qweight, self.scales, self.zeros, self.spec)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        kept = {"scales": _stored(self.scales)} | ({} if self.zeros is None else {"zeros": _stored(self.zeros)})
        return {"qweight": self.qweight, **kept}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _in_fp32(self, ("scales", "zeros"), lambda: super(ScaledQuantLinear, self)._apply(fn, recurse))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor for name, tensor in self.tensors().items()})


def _stored(values: Tensor) -> Tensor:
    """Scales or zeros as they are stored: fp16, none of them lost."""
    return rounded(values.detach())


def _in_fp32(module: nn.Module, names: tuple[str, ...], apply: Any) -> None:
    """Moves and casts like any module, but keeps these parameters fp32: their steps are smaller than half precision."""
    before = {name: p.data for name in names if (p := getattr(module, name)) is not None}
    apply()
    for name, old in before.items():
        new = getattr(module, name)
        if new.dtype != torch.float32:
            new.data = old.to(device=new.device, dtype=torch.float32)


# ---- rounding with gradients -------------------------------------------------------------------------------------


def fake_quantize(weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: Spec) -> Tensor:
    """The values (out, in), fp32, that `weight` has once stored under scales and zeros (out, groups): the same bits as
    decoding the stored tensors. Differentiable in all three (see `_FakeQuantize`)."""
    return _FakeQuantize.apply(weight, scales, zeros, spec)


class _FakeQuantize(torch.autograd.Function):
    """Straight through to the weight where it isn't cut off; to a scale by LSQ, equations 3 and 4, whose factor
    1 / sqrt(numbers x levels) keeps its steps in proportion to the weights'."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: Spec) -> Tensor:
        s = _stored(scales)
        z = None if zeros is None else _stored(zeros)
        w = grouped(spec, weight.float())
        codes = codes8(w, s) if spec.format == "int8" else codes4(w, s, z)
        ctx.save_for_backward(weight, s, z, codes.to(torch.int8))
        ctx.spec, ctx.dtype = spec, weight.dtype
        return ((codes - _zero(spec, z)) * s.float()[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        weight, s, z, stored = ctx.saved_tensors
        spec = ctx.spec
        low, high = (-127, 127) if spec.format == "int8" else (0, 15)
        zero, scale = _zero(spec, z), s.float()[..., None]
        g, codes = grouped(spec, gradient.float()), stored.float()
        exact = torch.where(scale != 0, grouped(spec, weight.float()) / scale, 0.0)
        inside = ((exact + zero).round() >= low) & ((exact + zero).round() <= high)
        factor = (codes.shape[-1] * (127 if spec.format == "int8" else 7)) ** -0.5
        d_scale = (g * (codes - zero - torch.where(inside, exact, 0.0))).sum(-1) * factor
        d_zero = None if z is None else (torch.where(inside, 0.0, -g) * scale).sum(-1) * factor
        return (g * inside).flatten(1).to(ctx.dtype), d_scale, d_zero, None


def _zero(spec: Spec, zeros: Tensor | None) -> Any:
    if zeros is not None:
        return zeros.float()[..., None]
    return 8.0 if spec.format == "int4" else 0.0


class _Scaled(torch.autograd.Function):
    """Decodes again in the backward pass instead of keeping the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, spec: Spec) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # what is multiplied is kept; gradients come in this type
        ctx.save_for_backward(x, qweight, scales, zeros)
        ctx.spec = spec
        return F.linear(x, _decode(qweight, scales, zeros, spec, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, qweight, scales, zeros = ctx.saved_tensors
        spec = ctx.spec
        d_x = gradient @ _decode(qweight, scales, zeros, spec, gradient.dtype) if ctx.needs_input_grad[0] else None
        d_w = gradient.reshape(-1, gradient.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        if (found := dequantize.gradients(d_w, qweight, scales, zeros, spec.group_size)) is not None:
            return d_x, None, *found, None
        g = grouped(spec, d_w.float())
        d_scale = (g * (grouped(spec, unpack4(qweight)).float() - _zero(spec, zeros))).sum(-1)
        d_zero = None if zeros is None else -(g.sum(-1) * scales.float())
        return d_x, None, d_scale, d_zero, None


def _decode(qweight: Tensor, scales: Tensor, zeros: Tensor | None, spec: Spec, dtype: torch.dtype) -> Tensor:
    kept = {"scales": _stored(scales)} | ({} if zeros is None else {"zeros": _stored(zeros)})
    return dequantize.decoded(spec, {"qweight": qweight, **kept}, dtype)


# ---- a model -----------------------------------------------------------------------------------------------------


def trainable(model: nn.Module, mode: str, masters: Mapping[str, Tensor] | None = None) -> None:
    """Makes every quantized matrix of `model` one that is trained, in place: mode "full" the weights behind fake
    quantization, mode "scales" the scales and zeros of constant codes, everything else frozen.

    masters: the full-precision weights that the codes were made of, by module; without them mode full begins with what
    the codes stand for. In mode scales what isn't int4 stays as it is. Raises UsageError for another mode, a format
    that can't be trained, and a model without int4 matrices.
    """
    if mode not in ("full", "scales"):
        raise UsageError(f"mode must be full or scales (got {mode!r})")
    found = quantized(model)
    if mode == "scales":
        found = {name: layer for name, layer in found.items() if layer.spec.format == "int4"}
        model.requires_grad_(False)
        if not any(not isinstance(layer, QuantEmbedding) for layer in found.values()):
            raise UsageError(
                "the model has no int4 matrix, whose scales could be trained",
                hint="moai quantize --method int4 makes them",
            )
    for name, layer in found.items():
        if mode == "full":
            replace(model, name, _faked(layer, (masters or {}).get(name)))
        elif not isinstance(layer, QuantEmbedding):
            replace(model, name, ScaledQuantLinear(layer))
    retie(model)


def _faked(layer: QuantLinear, master: Tensor | None) -> FakeQuantLinear:
    if isinstance(layer, QuantEmbedding):
        new: FakeQuantLinear = FakeQuantEmbedding(layer.num_embeddings, layer.embedding_dim, layer.spec)
    else:
        new = FakeQuantLinear(layer.in_features, layer.out_features, layer.spec)
    new.rotation = layer.rotation
    if master is not None and layer.rotation is not None:
        master = hadamard.fold(master.float())
    return new.start(layer.weight_values() if master is None else master, layer.tensors())
