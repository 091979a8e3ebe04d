"""One token a row through the whole stack, on a processor, as one call.

Why: the modules' own way asks for some twenty operations a layer, each ten microseconds of Python; for a model of 30 M
parameters, or one with 4-bit weights, that is a third of the time and more. Here the operations of all layers are a
program (moai_core/cpu/program.py) of the kernels that the modules themselves would call, and of a few for what lies
between them (step_kernels.py). A row's numbers don't depend on the rows beside it, at any width.

The modules stay the definition: whatever they are but the plain fp32 model, with matrices of fp32, int4 or int8, goes
their own way (`take` answers None): other types, adapters, hooks, rotations, gradients, a scan named by the user. A
program is made anew when any weight, module or hook changed since. Results agree with the modules' to the rounding of
fp32: sums are taken in another order.

Letters: M rows, H hidden, I inner, N states, K convolution width, R rank.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moai_core import cpu
from moai_core.cpu.program import Operation, Program
from moai_core.model.ffn import SwiGLU
from moai_core.model.mamba import LayerState, MambaMixer
from moai_core.model.norm import RMSNorm
from moai_core.quant import cpu as integers
from moai_core.quant import kernels
from moai_core.quant.linear import QuantEmbedding, QuantLinear

WIDEST = 64
_OURS = "moai_core.model.step_kernels"
_SCAN, _CONV = "moai_core.scan.cpu_kernels", "moai_core.scan.cpu_conv_kernels"
_known: WeakKeyDictionary[nn.Module, dict[int, Step]] = WeakKeyDictionary()


def take(model: Any, x: Tensor, layers: list[LayerState]) -> tuple[Tensor, list[LayerState]] | None:
    """x (M, 1, H), the embedded tokens, and the states before them: the final norm's result (M, 1, H) and the new
    states; None where the modules have to do it. The states given are not modified."""
    rows = x.shape[0]
    plain = type(x) is Tensor and x.dtype == torch.float32 and x.device.type == "cpu" and 0 < rows <= WIDEST
    if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling() or cpu.problem():
        return None
    if any(part.dtype != torch.float32 or part.device.type != "cpu" for layer in layers for part in layer):
        return None
    steps = _known.setdefault(model, {})
    step = steps.get(rows)
    if step is None or not step.current(model):
        step = steps[rows] = Step(model, rows)
    return step.run(x, layers) if step.program is not None else None


class Step:
    """The program of a model for so many rows, and what it was made of."""

    def __init__(self, model: Any, rows: int) -> None:
        self.rows = rows
        self.lock = threading.Lock()
        self.backend = model.scan_backend
        self._remember(model)
        self.operations: list[Operation] = []
        self.kept: list[Any] = []
        self.places: list[tuple[int, int]] = []
        self.program: Program | None = None
        if self.backend in ("auto", "cpu") and _plain(model):
            self._build(model)

    def _remember(self, model: Any) -> None:
        modules = [module for name, module in model.named_modules() if name]
        every = (model, *modules)
        self.modules = [(one._modules, name, child) for one in every for name, child in one.named_children()]
        self.hooks = [hooks for one in every for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self.count = [len(hooks) for hooks in self.hooks]
        # The embedding is no part of the step.
        owners = [module for module in modules if not isinstance(module, (nn.Embedding, QuantEmbedding))]
        self.tensors = [
            (held, name, tensor, _mark(tensor))
            for owner in owners
            for held in (owner._parameters, owner._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        self.quantized = [(module, module.kernel) for module in modules if isinstance(module, QuantLinear)]

    def current(self, model: Any) -> bool:
        """Whether modules, weights and hooks are those that the program was made of."""
        return (
            self.backend == model.scan_backend
            and all(held.get(name) is child for held, name, child in self.modules)
            and all(held.get(name) is tensor and _mark(tensor) == mark for held, name, tensor, mark in self.tensors)
            and [len(hooks) for hooks in self.hooks] == self.count
            and all(module.kernel == kernel for module, kernel in self.quantized)
        )

    # ---- building

    def _build(self, model: Any) -> None:
        rows, config = self.rows, model.config
        hidden, inner, states = config.hidden_size, config.inner_size, config.state_size
        rank, width, ffn = int(config.time_step_rank or 1), config.conv_kernel_size, config.intermediate_size
        self.sizes = inner, width, states
        self.stream, self.h, self.out = (self._room(hidden) for _ in range(3))
        both, u, dt, y = self._room(2 * inner), *(self._room(inner) for _ in range(3))
        mixed, A = self._room(rank + 2 * states), torch.empty(inner, states)
        self.kept.append(A)
        blocks = next(count for count in (64, 8, 4, 2, 1) if inner % count == 0)
        gate, up, product = (self._room(ffn if config.ffn != "none" else 0) for _ in range(3))
        tiles = rows * -(-inner // cpu.load(_SCAN).W)
        x = None
        for layer in model.layers:
            m = layer.mamba
            self._add_norm(x, layer.input_layernorm)
            self._linear([m.in_proj], self.h, [both])
            conv = (1, inner, width, 0, _at(both), 8 * inner, 0, *map(self._solid, (m.conv1d.weight, m.conv1d.bias)))
            self._add(_CONV, "conv_forward", tiles, rows * inner * width, *conv, 0, 0, _at(u))
            self.places += [(len(self.operations) - 1, 9), (len(self.operations) - 1, 10)]
            if m.conv_scale is not None:
                self._add(_OURS, "scale", rows, rows * inner, inner, _at(u), self._solid(m.conv_scale))
            self._linear([m.x_proj], u, [mixed])
            if m.norms:
                norms = (m.dt_layernorm, m.b_layernorm, m.c_layernorm)
                weights = (self._solid(norm.weight) for norm in norms)
                eps = self._number(m.dt_layernorm.eps)
                self._add(_OURS, "small_norms", rows, rows * rank, rank, states, _at(mixed), *weights, eps)
            self._linear([m.dt_proj], mixed[:, :rank], [dt])
            # Made at each token: who changes A_log through `.data` leaves no trace.
            self._add(
                _OURS, "negative_exp", blocks, inner * states, states * inner // blocks, self._solid(m.A_log), _at(A)
            )
            row = 4 * mixed.shape[1]
            self._add(
                _SCAN, "scan_step", tiles, rows * inner * states, inner, states, _at(u), 4 * inner, _at(dt), 4 * inner,
                _at(both) + 4 * inner, 8 * inner, _at(mixed) + 4 * rank, row, _at(mixed) + 4 * (rank + states), row,
                _at(A), *map(self._solid, (m.D, m.dt_bias)), 0, 0, _at(y),
            )  # fmt: skip
            self.places += [(len(self.operations) - 1, 15), (len(self.operations) - 1, 16)]
            self._linear([m.out_proj], y, [self.out])
            x = self.out
            if layer.feed_forward is not None:
                f = layer.feed_forward
                self._add_norm(x, layer.pre_ff_layernorm)
                self._linear([f.gate_proj, f.up_proj], self.h, [gate, up])
                self._add(_OURS, "swiglu", rows, rows * ffn, ffn, _at(gate), _at(up), _at(product))
                self._linear([f.down_proj], product, [self.out])
        self._add_norm(x, model.final_layernorm)
        self.program = Program(self.operations)
        self.addresses = [self.program.slot(operation, number) for operation, number in self.places]

    def _add(self, module: str, kernel: str, items: int, work: int, *slots: int) -> None:
        self.operations.append(Operation(module, kernel, items, work, slots))

    def _add_norm(self, x: Tensor | None, norm: Any) -> None:
        hidden, stream = self.stream.shape[1], _at(self.stream)
        slots = (hidden, stream, 0 if x is None else _at(x), stream, self._solid(norm.weight), self._number(norm.eps))
        self._add(_OURS, "add_norm", self.rows, self.rows * hidden, *slots, _at(self.h))

    def _linear(self, modules: list[Any], x: Tensor, results: list[Any]) -> None:
        """Products with the same x; integers made of it serve all matrices of the same groups."""
        made: Any = None
        for module, y in zip(modules, results, strict=True):
            if not isinstance(module, QuantLinear):
                self._dense(module.weight, x, y)
                continue
            _, prepared = module._ready(x.device, x.dtype)
            room = integers.Integers(prepared, self.rows, module.in_features)
            if made is None or (made.group, made.bits) != (room.group, room.bits):
                made = room
                self.operations.append(made.made_of(x))
            self.operations.append(made.times(prepared, y))
            self.kept += [made, prepared]

    def _dense(self, weight: Tensor, x: Tensor, y: Tensor) -> None:
        out, columns = weight.shape
        some = max(1, min(64, out // 64))
        self._add(
            _OURS, "dense", -(-out // some), self.rows * out * columns, self.rows, out, columns, some,
            self._solid(weight), _at(x), 4 * x.stride(0), _at(y), 4 * y.stride(0),
        )  # fmt: skip

    def _room(self, size: int) -> Tensor:
        self.kept.append(torch.empty(self.rows, size))
        return self.kept[-1]

    def _solid(self, tensor: Tensor | None) -> int:
        """The address of its numbers, which lie side by side; the tensor is kept."""
        if tensor is None:
            return 0
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _number(self, value: float) -> int:
        return self._solid(torch.tensor(value, dtype=torch.float32))

    # ---- running

    def run(self, x: Tensor, layers: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """See `take`."""
        assert self.program is not None
        inner, width, states = self.sizes
        before = [tuple(part.contiguous() for part in layer) for layer in layers]
        after = [(torch.empty(self.rows, inner, width - 1), torch.empty(self.rows, inner, states)) for _ in layers]
        addresses: list[int] = []
        for (conv, ssm), (new_conv, new_ssm) in zip(before, after, strict=True):
            addresses += conv.data_ptr(), new_conv.data_ptr(), ssm.data_ptr(), new_ssm.data_ptr()
        with self.lock:
            self.stream.copy_(x[:, 0])
            self.program.slots[self.addresses] = addresses
            self.program.run()
            return self.h.clone()[:, None], after  # type: ignore[return-value]


def _plain(model: Any) -> bool:
    """Whether all modules are what the program is made of."""
    if model.config.mixer != "mamba" or model.config.conv_kernel_size < 2:
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    scales = [layer.mamba.conv_scale for layer in model.layers if layer.mamba.conv_scale is not None]
    if not all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (*model.parameters(), *scales)):
        return False
    norms = [model.final_layernorm]
    for layer in model.layers:
        mixer, ffn = layer.mamba, layer.feed_forward
        if type(mixer) is not MambaMixer or (ffn is not None and type(ffn) is not SwiGLU):
            return False
        matrices = [mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj]
        matrices += [] if ffn is None else [ffn.gate_proj, ffn.up_proj, ffn.down_proj]
        norms += [norm for norm in (layer.input_layernorm, layer.pre_ff_layernorm) if norm is not None]
        norms += [mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm] if mixer.norms else []
        if type(mixer.conv1d) is not nn.Conv1d:
            return False
        if not all(_known_matrix(matrix) for matrix in matrices):
            return False
    return all(type(norm) is RMSNorm for norm in norms)


def _known_matrix(module: Any) -> bool:
    if type(module) is QuantLinear:
        chosen = kernels.pick(module.spec, torch.device("cpu"), torch.float32, module.kernel)
        return chosen is integers and module.rotation is None
    return type(module) is nn.Linear and module.bias is None


def _at(tensor: Any) -> int:
    return tensor.data_ptr()


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Changes when the numbers do; tensors of inference mode count no changes."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
