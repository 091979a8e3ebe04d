"""Quantized layers under the names of those they replace: `QuantLinear`, `QuantEmbedding` and the head that shares an
embedding.

`install` puts them into a model as its configuration says (`config.quantization`), before weights are loaded; after
that every way of loading and saving works, since what is stored are plain tensors NAME.qweight, NAME.scales, … Only who
multiplies differs from device to device (kernels.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moai_core.errors import UsageError
from moai_core.quant import dequantize, kernels, scaled_mm
from moai_core.quant.formats import FORMATS, Spec
from moai_core.quant.hadamard import OnlineHadamard, why_not

# Of config.json's `quantization`: the method's name; formats by module; inputs that are rotated; a vector between
# convolution and scan (model/mamba.py).
KEYS = ("method", "modules", "rotate", "conv_scale")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class QuantLinear(nn.Module):
    """x @ W^T with a quantized W (out, in); no bias. In place of an `nn.Linear`."""

    qweight: Tensor  # every format has one

    def __init__(self, in_features: int, out_features: int, spec: Spec) -> None:
        """Raises UsageError where the format can't hold such a matrix."""
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.kernel = "auto"
        # Applied to the inputs of a matrix that is stored for rotated ones (hadamard.py).
        self.rotation: OnlineHadamard | None = None
        self._prepared: dict[Any, Any] = {}
        FORMATS[spec.format].check(spec, out_features, in_features)
        self.stored = FORMATS[spec.format].tensors(spec, out_features, in_features)
        for name, (shape, dtype) in self.stored.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, with the types of the format. Raises UsageError after `release`."""
        held = {name: getattr(self, name) for name in self.stored}
        if any(tuple(held[name].shape) != shape for name, (shape, _) in self.stored.items()):
            raise UsageError(
                "the stored weights were given up for the kernel's own copy of them",
                hint="load the model again to save or convert it",
            )
        return {name: held[name].to(dtype) for name, (_, dtype) in self.stored.items()}

    def weight_values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in), exactly the stored values where dtype is fp32."""
        return dequantize.decoded(self.spec, self.tensors(), dtype)

    def multiplied_with(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`weight_values`, by the kernel that multiplies such inputs where it can: fast, and also after `release`."""
        chosen, prepared = self._ready(device, dtype)
        if not hasattr(chosen, "values"):
            return self.weight_values(dtype)
        return chosen.values(self.spec, prepared, self.out_features, self.in_features, dtype)

    def forward(self, x: Tensor | scaled_mm.Quantized) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype. The gradient is that of x alone. x may be rounded to e4m3 already,
        for a layer that `scaled_mm` multiplies with as it is (model/fused_fp8.py asks)."""
        if isinstance(x, scaled_mm.Quantized):
            _, prepared = self._ready(x.codes.device, x.dtype)
            y = scaled_mm.product(prepared, x, self.out_features)
            return y.reshape(*x.shape[:-1], self.out_features)
        given: Tensor = x if self.rotation is None else self.rotation(x)
        if given.requires_grad and torch.is_grad_enabled():
            y = _Multiply.apply(given.reshape(-1, self.in_features), self)
            return y if given.dim() == 2 else y.reshape(*given.shape[:-1], self.out_features)
        return self.multiply(given)

    def multiply(self, x: Tensor) -> Tensor:
        """`forward` without a gradient, of inputs that are rotated already."""
        chosen, prepared = self._ready(x.device, x.dtype)
        y = chosen.linear(self.spec, prepared, x.reshape(-1, self.in_features), self.out_features)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def _ready(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        chosen = kernels.pick(self.spec, device, dtype, self.kernel)
        if chosen not in self._prepared:
            self._prepared = {chosen: chosen.prepare(self.spec, self.tensors())}
        return chosen, self._prepared[chosen]

    def release(self, dtype: torch.dtype) -> None:
        """Prepare for inputs of this type on the weights' device, and give up the stored tensors where the kernel has
        a copy of its own: half the memory, but the model can't be saved or moved any more."""
        _, prepared = self._ready(self.qweight.device, dtype)
        kept = {tensor.data_ptr() for tensor in leaves(prepared)}
        for name in self.stored:
            if getattr(self, name).data_ptr() not in kept:
                setattr(self, name, torch.empty(0, dtype=self.stored[name][1], device=self.qweight.device))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves like any module; a cast leaves the stored types alone."""
        for name, (_, dtype) in self.stored.items():
            # As integers they are nothing that a cast of floating-point numbers changes.
            setattr(self, name, fn(getattr(self, name).view(_INTEGERS[dtype.itemsize])).view(dtype))
        self._prepared = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy (deepcopy, pickle) prepares for itself: what kernels made knows addresses and modules."""
        return self.__dict__ | {"_prepared": {}}

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._prepared = {}  # the numbers are copied into the same tensors
        super()._load_from_state_dict(*args, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.tensors().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def extra_repr(self) -> str:
        s = self.spec
        return f"in={self.in_features}, out={self.out_features}, {s.format}, group {s.group_size or 'row'}"


def leaves(prepared: Any) -> Iterator[Tensor]:
    """The tensors of what a kernel prepared."""
    if isinstance(prepared, Tensor):
        yield prepared
    elif isinstance(prepared, Mapping):
        for value in prepared.values():
            yield from leaves(value)
    elif isinstance(prepared, (list, tuple)):
        for value in prepared:
            yield from leaves(value)


class _Multiply(torch.autograd.Function):
    """The matrix is constant: adapters and earlier layers train through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantLinear) -> Tensor:
        ctx.module = module
        y = module.multiply(x)
        # The loss writes its gradient into the logits, which autograd refuses where a function returned a view.
        return y.clone() if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.module.multiplied_with(gradient.device, gradient.dtype), None


class QuantEmbedding(QuantLinear):
    """Rows of a quantized W (V, H) by id, and, as a tied head, x @ W^T (`multiply`). In place of an `nn.Embedding`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, spec: Spec) -> None:
        """Raises UsageError where the format can't hold such a matrix, or give single rows of it."""
        if not FORMATS[spec.format].by_rows:
            raise UsageError(f"{spec.format} can't be an embedding: its scales run over the ends of the rows")
        super().__init__(embedding_dim, num_embeddings, spec)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = torch.get_default_dtype()

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """ids (...) integers -> (..., H) in `dtype`, the type of the model's other weights."""
        flat = ids.reshape(-1)
        # A tensor without dimensions belongs to all rows.
        rows = {name: tensor[flat] if tensor.dim() else tensor for name, tensor in self.tensors().items()}
        values = FORMATS[self.spec.format].decode(self.spec, rows)
        return values.to(self.dtype).reshape(*ids.shape, self.embedding_dim)

    def head(self, x: Tensor) -> Tensor:
        """x (..., H) -> logits (..., V)."""
        return super().forward(x)

    def release(self, dtype: torch.dtype) -> None:
        """Keeps what is stored: rows are read from it."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        return self


class TiedHead(nn.Module):
    """A head that multiplies with the embedding's matrix and has none of its own."""

    def __init__(self, embedding: Any) -> None:
        """embedding: has embedding_dim, num_embeddings, and `head`, which multiplies."""
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self._embedding = [embedding]  # in a list: no module of this one, so that nothing is stored twice

    def forward(self, x: Tensor) -> Tensor:
        """x (..., H) -> logits (..., V)."""
        return self._embedding[0].head(x)


# ---- a model -----------------------------------------------------------------------------------------------------


def plan(quantization: Any, names: list[str], *, whole: bool = True) -> dict[str, Spec]:
    """`{module: Spec}` of those of `names` that config.json's `quantization` speaks of. A key of its `modules` is a
    module's name or the last parts of it ("in_proj"); the longest that fits wins, and a value of null leaves a module
    as it is.

    Raises UsageError for what isn't of this form and, where `names` are the whole model's, for a key that fits none.
    """
    modules = quantization.get("modules") if isinstance(quantization, Mapping) else None
    if not isinstance(modules, Mapping) or not all(isinstance(key, str) for key in modules):
        raise UsageError("model field quantization must have modules, {name: {format, group_size, symmetric}}")
    if unknown := [str(key) for key in quantization if key not in KEYS]:
        raise UsageError(
            f"model field quantization: unknown key {unknown[0][:80]!r}",
            hint=f"known: {', '.join(KEYS)}; was it written by a newer moai?",
        )
    specs = {key: None if value is None else Spec.from_dict(value) for key, value in modules.items()}
    if whole and (idle := [key for key in specs if not any(_fits(key, name) for name in names)]):
        raise UsageError(f"model field quantization: the model has no module {idle[0][:80]!r}")
    found = {}
    for name in names:
        keys = [key for key in specs if _fits(key, name)]
        if keys and (spec := specs[max(keys, key=len)]) is not None:
            found[name] = spec
    return found


def _fits(key: str, name: str) -> bool:
    return name == key or name.endswith(f".{key}")


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that can be quantized, by name: matrix products and the embedding."""
    kinds = (nn.Linear, nn.Embedding, QuantLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def install(model: nn.Module, quantization: Any, *, prefix: str = "") -> None:
    """Put quantized layers in place of those that `quantization` names; their numbers are yet to be loaded.

    prefix: where `model` stands in the whole ("model."), empty for the whole. Raises UsageError as `plan` does, and
    where a matrix doesn't fit its format.
    """
    found = matrices(model)
    for path, spec in plan(quantization, [prefix + name for name in found], whole=not prefix).items():
        name = path.removeprefix(prefix)
        old = found[name]
        try:
            if isinstance(old, nn.Embedding):
                replace(model, name, QuantEmbedding(old.num_embeddings, old.embedding_dim, spec))
            elif isinstance(old, nn.Linear):
                replace(model, name, QuantLinear(old.in_features, old.out_features, spec))
        except UsageError as exc:
            raise UsageError(f"{path}: {exc.message}", hint=exc.hint) from exc
    _rotate(model, quantization, prefix)


def rotated(quantization: Any, names: Iterable[str]) -> list[str]:
    """Those of `names` whose inputs are rotated, says config.json's `quantization`. Raises UsageError."""
    keys = quantization.get("rotate", [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UsageError(f"model field quantization: rotate must be a list of modules (got {str(keys)[:80]})")
    return [name for name in names if any(_fits(key, name) for key in keys)]


def _rotate(model: nn.Module, quantization: Any, prefix: str) -> None:
    """Give the quantized layers that `quantization.rotate` names their rotation."""
    layers = {prefix + name: layer for name, layer in quantized(model).items() if not isinstance(layer, QuantEmbedding)}
    turned = rotated(quantization, layers)
    keys = [] if prefix else quantization.get("rotate", [])
    if idle := [key for key in keys if not any(_fits(key, name) for name in turned)]:
        raise UsageError(
            f"model field quantization: rotate names {idle[0][:80]!r}, which is no quantized matrix product"
        )
    for name in turned:
        if reason := why_not(layers[name].in_features):
            raise UsageError(f"{name}: its inputs can't be rotated: {reason}")
        layers[name].rotation = OnlineHadamard(layers[name].in_features)


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def retie(model: nn.Module) -> None:
    """After the embedding was replaced: let a tied head multiply with the new one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TiedHead):
            replace(model, name, TiedHead(model.get_input_embeddings()))  # type: ignore[operator]


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    """The model's quantized layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def set_kernel(model: nn.Module, name: str) -> None:
    """Let every quantized layer multiply with the kernel `name` ("auto": the first that can). Raises UsageError for a
    name that isn't one."""
    if name != "auto" and name not in kernels.KERNELS:
        raise UsageError(f"unknown kernel {name!r}", hint=f"choose one of: auto, {', '.join(kernels.KERNELS)}")
    for module in quantized(model).values():
        module.kernel = name


def release(model: nn.Module, dtype: torch.dtype) -> None:
    """Give up what is stored twice, for a model that is only going to be used (QuantLinear.release)."""
    for module in quantized(model).values():
        module.release(dtype)
