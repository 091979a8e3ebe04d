"""One token for every row of a batch, on a GPU, as few launches: the step of the decode engine.

A step of the plain path asks torch for about twenty operators a layer, and the host is slower than the GPU. Here it is
recorded as a CUDA graph for each width of the batch, the choice of the next token by four kernels included, and reads
each weight once at nearly the memory's rate:

    1 row         one kernel for the whole step (decode_whole.py), where it takes the model
    2 to 64 rows  on Hopper: embedding | norm | in_proj, convolution, x_proj | norms | dt_proj, scan, gate | out_proj
                  | norm | gate and up, silu | down | ... | norm | head (decode_stream.py)
    to 8 rows     elsewhere: embedding | norm, in_proj, convolution | x_proj | norms, dt_proj, scan, gate | out_proj,
                  + residual | norm, gate and up, silu | down, + residual | ... | norm, head
    to 64 rows    the same, but products leave sums (decode_wide.py) that a small kernel takes in behind each

Where kernels may overlap (compute capability 9.0) the next one's weights are on their way before the last one ends. A
row has the same bits whatever stands beside it, at any width to `narrow` (8; on Hopper 1) and at any beyond: sums over
K are divided by the shape alone. States are kept twice: a step reads one copy and writes the other, so that the state
before a token is still there when the host gets to see the token.

Left out: gradients, prompts (the model itself reads them), logits for the host, everything `why_not` names.

Letters: M rows of a step, H hidden, I inner, N states, K convolution width, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.generation import decode_choice, decode_stream, decode_wide
from moai_core.generation import decode_kernels as kernels
from moai_core.generation.decode_kernels import Launch, Matrix, Product, linear, matrix
from moai_core.generation.decode_weights import Layer, Rotation, layer_of, why_not
from moai_core.generation.decode_whole import Whole
from moai_core.generation.sampling import Settings
from moai_core.model.state import MoaiState

__all__ = ["Decoder", "decoder", "run", "why_not"]

WIDTHS = (1, 2, 4, 8, 16, 32, 64)

Step = list[Launch | Product]


class Decoder:
    """A model made ready to generate: its weights as the kernels read them, and for up to `capacity` rows the state
    (twice), settings, random numbers and the token to be read next.

    `rows` of it are static: place 0 to capacity - 1, of which a step takes the first so many.
    """

    def __init__(self, model: Any, known: int) -> None:
        """known: ids from this on are never chosen."""
        self.config, self.device = model.config, model.device
        self.dtype = model.model.final_layernorm.weight.dtype
        self.known = min(known, self.config.vocab_size)
        self.stream = torch.float32 if self.config.residual_in_fp32 else self.dtype
        self.layers = [layer_of(layer, self.dtype) for layer in model.model.layers]
        self.embedding, self.head = matrix(model.model.embed_tokens), matrix(model.lm_head)
        self.final = model.model.final_layernorm.weight.detach()
        products = [m for one in self.layers for m in (one.in_proj, one.x_proj, one.out_proj, one.gate, one.down) if m]
        self.narrow = kernels.most_rows([*products[:5], self.head], self.dtype)
        self.most = WIDTHS[-1] if self.dtype.itemsize == 2 else max(w for w in WIDTHS if w <= self.narrow)
        streams = decode_stream.takes_all(self.layers, self.config, self.dtype)
        self.whole = Whole.of(self.layers, self.head, self.final, self.embedding, self.config, digits=streams)
        if streams:
            self.narrow = 0 if self.whole is None else 1
        self.capacity, self.turn = 0, 0
        self._graphs: dict[tuple[int, int], Callable[[], object]] = {}
        self.overlap = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)

    @property
    def bytes(self) -> int:
        """Weights that a step reads, whatever its width."""
        return sum(layer.bytes for layer in self.layers) + self.head.bytes

    # ---- rows -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # what is made here is also changed outside of that mode
    def reserve(self, rows: int) -> None:
        """Have room for so many rows (at most `most`); those that are there stay."""
        if rows <= self.capacity:
            return
        c, before, old = self.config, self.capacity, vars(self).copy()
        self.capacity = next(width for width in WIDTHS if width >= rows)
        depth, inner = len(self.layers), c.inner_size

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        if before and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # graphs that may still run go away
        self._graphs = {}
        self.conv = make(2, depth, self.capacity, inner, c.conv_kernel_size - 1, dtype=self.dtype)
        self.ssm = make(2, depth, self.capacity, inner, c.state_size)
        # temperature, top_p, min_p, penalty; token, top_k, seed, draws: a column a row
        self.numbers, self.counts = (
            make(4, self.capacity, dtype=torch.float64),
            make(4, self.capacity, dtype=torch.int64),
        )
        self.numbers[1], self.numbers[3] = 1, 1
        self.seen = make(self.capacity, c.vocab_size, dtype=torch.uint8)
        self.host = torch.zeros(2, self.capacity, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        if before:
            for name, at in (("conv", 2), ("ssm", 2), ("numbers", 1), ("counts", 1), ("seen", 0)):
                getattr(self, name).narrow(at, 0, before).copy_(old[name])
            self.host[:, :before] = old["host"]
        self._make_work(make)

    def _make_work(self, make: Callable[..., Tensor]) -> None:
        """What a step leaves behind for itself."""
        c, rows = self.config, self.capacity
        width = c.time_step_rank + 2 * c.state_size
        one = self.layers[0]
        least = c.inner_size // 32 if rows > self.narrow else 0
        mixes = max(least, kernels.slices_of(one.x_proj, kernels.PARTIAL)) * width
        sums = [kernels.slices_of(m, kernels.RESIDUAL) * m.rows for m in (one.out_proj, one.down) if m is not None]
        if rows > self.narrow:
            products = [(one.in_proj, 1), (one.x_proj, 1), (one.out_proj, 1), (one.gate, 2), (one.down, 1)]
            sums += [decode_wide.slices_of(m, n) * m.rows * n for m, n in products if m is not None]
        padded = self.most if rows > self.narrow else rows
        self.residual = make(rows, c.hidden_size, dtype=self.stream)
        self.x = make(padded, c.hidden_size, dtype=self.dtype)
        self.u, self.z = (make(rows, c.inner_size, dtype=self.dtype) for _ in range(2))
        self.y = make(padded, c.inner_size, dtype=self.dtype)
        self.product = make(padded, c.intermediate_size, dtype=self.dtype)
        self.dt = make(rows, c.time_step_rank, dtype=self.dtype)
        self.mixed, self.mixes, self.sums = make(rows, width), make(rows * mixes), make(rows * max(sums))
        self.logits = make(padded, c.vocab_size, dtype=self.dtype)
        self.found = decode_choice.Found.make(make, rows, self.known)

    def put(self, place: int, state: MoaiState, token: int, settings: Settings, seed: int, draws: int) -> None:
        """A row that goes on from `state` (of one row) by reading `token`."""
        layers = list(zip(*state.layers, strict=True))
        self.conv[self.turn, :, place] = torch.cat(layers[0])
        self.ssm[self.turn, :, place] = torch.cat(layers[1])
        s = settings
        self.numbers[:, place] = torch.tensor(
            [s.temperature, s.top_p, s.min_p, s.repetition_penalty], dtype=torch.float64
        )
        self.counts[:, place] = torch.tensor([token, s.top_k, seed - (1 << 64) if seed >> 63 else seed, draws])

    def mark(self, place: int, seen: Tensor) -> None:
        """The tokens (known,) bool that a repetition penalty knows of."""
        self.seen[place, : seen.shape[0]] = seen.to(torch.uint8)

    def move(self, source: int, place: int) -> None:
        """The row at `source` goes to `place`."""
        for tensor, at in ((self.conv[self.turn], 1), (self.ssm[self.turn], 1), (self.numbers, 1), (self.counts, 1)):
            tensor.select(at, place).copy_(tensor.select(at, source))
        self.seen[place] = self.seen[source]

    def state(self, place: int, read: int, turn: int) -> MoaiState:
        """A copy of the state in buffer `turn`; read: tokens that it has read."""
        conv, ssm = self.conv[turn, :, place].clone(), self.ssm[turn, :, place].clone()
        return MoaiState(
            [(a[None], b[None]) for a, b in zip(conv, ssm, strict=True)], torch.tensor([read], device=self.device)
        )

    # ---- a step ---------------------------------------------------------------------------------------------------

    def step(self, rows: int) -> int:
        """Let the first `rows` rows read their tokens and choose the next; they are in `host[turn]` when the GPU has
        done it. Returns that turn."""
        width, turn = next(w for w in WIDTHS if w >= rows), self.turn
        if (width, turn) not in self._graphs:
            self._graphs[width, turn] = self._record(width, turn)
        self._graphs[width, turn]()
        self.host[turn, :width].copy_(self.counts[0, :width], non_blocking=True)
        self.turn = 1 - turn
        return turn

    def launches(self, width: int, turn: int, *, sample: bool = True) -> Step:
        """The kernels of a step that reads buffer `turn` of the states and writes the other."""
        if width == 1 and self.whole is not None:
            states = [(kept[turn], kept[1 - turn]) for kept in (self.conv, self.ssm)]
            one = self.whole.launch(self.counts[0], states[0], states[1], self.logits)
            return [one, *(decode_choice.launches(self, 1) if sample else [])]
        steps: Step = [self._embed(width)]
        pending: Tensor | None = None
        for index, layer in enumerate(self.layers):
            pending = self._mixer(steps, layer, index, width, turn, pending)
            if layer.gate is not None:
                pending = self._ffn(steps, layer, width, pending)
        x = self._norm(steps, self.final, width, pending)
        if x is not None and decode_wide.stores(self.head, self.dtype):
            steps.append(decode_wide.product(self.head, x, self.logits[:width]))
        elif x is not None and self.head.format == "Plain":
            # Always the most rows there can be: a row's bits don't depend on the width.
            steps.append(Product(self.logits, self.x, self.head.weight))
        else:
            steps += linear(
                self.head, x, self.logits[:width], dtype=self.dtype, batch=width, wide=width > self.narrow,
                **self._stream_of(self.final, width),
            )  # fmt: skip
        if sample:
            steps += decode_choice.launches(self, width)
        return steps

    def _stream_of(self, norm: Tensor, width: int) -> dict[str, Any]:
        return {"residual": self.residual[:width], "norm": norm, "eps": self.config.rms_norm_eps}

    def _norm(
        self, steps: Step, norm: Tensor, width: int, pending: Tensor | None, behind: Matrix | None = None
    ) -> Tensor | None:
        """The norm of the stream for a wide batch, which also takes in what the product before left; None for a narrow
        one, whose next product does it. behind: the weight for which it is arranged (decode_stream.py)."""
        if width <= self.narrow:
            return None
        hidden, slices = self.config.hidden_size, 0 if pending is None else pending.shape[0]
        how = decode_stream.arrangement(behind, width)
        args = (self.residual, pending, norm, self.x, hidden, slices, *how, float(self.config.rms_norm_eps))
        steps.append(Launch(self._kernel("decode_norm"), width, 256, args))
        return self.x[: width if behind is None else decode_stream.padded(width)]

    def _mixer(
        self, steps: Step, layer: Layer, index: int, width: int, turn: int, pending: Tensor | None
    ) -> Tensor | None:
        common: dict[str, Any] = {"dtype": self.dtype, "batch": width, "wide": width > self.narrow}
        windows = (self.conv[turn, index, :width], self.conv[1 - turn, index, :width])
        mixes = self._convolve(steps, layer, windows, pending, common)
        fused = mixes is not None
        if mixes is None:
            mixes = self._x_proj(steps, layer, common)
        if common["wide"]:
            self._mix(steps, layer, mixes, width, fused)
        y, arranged = self._scan(steps, layer, mixes, (self.ssm[turn, index], self.ssm[1 - turn, index]), width)
        self._rotate(steps, layer.rotation, y)
        return self._add(steps, layer.out_proj, y, common, arranged)

    def _convolve(
        self, steps: Step, layer: Layer, windows: tuple[Tensor, Tensor], pending: Tensor | None, common: dict[str, Any]
    ) -> Tensor | None:
        """in_proj and the convolution's step, which leave u and z. x_proj's sums where the same kernel makes them."""
        width, c = common["batch"], self.config
        streams = common["wide"] and decode_stream.takes_convolution(layer.in_proj, layer.x_proj, c, self.dtype)
        x = self._norm(steps, layer.norm, width, pending, layer.in_proj if streams else None)
        u, z = self.u[:width], self.z[:width]
        if x is not None and streams:
            mixes = self._mixes(layer, width, c.inner_size // 64)
            steps.append(decode_stream.convolution(layer.in_proj, x, layer.conv, layer.x_proj, windows, u, z, mixes, c))
            return mixes
        if x is None or not decode_wide.fits(layer.in_proj, self.dtype):
            steps += linear(
                layer.in_proj, x, u, result=kernels.CONV, conv=(*layer.conv, *windows, z), width=c.conv_kernel_size,
                **common, **self._stream_of(layer.norm, width),
            )  # fmt: skip
            return None
        sums = self._sums(steps, layer.in_proj, x)
        if decode_wide.takes_convolution(layer.x_proj, c, self.dtype):
            mixes = self._mixes(layer, width, c.inner_size // 32)
            both = (sums, *layer.conv, layer.x_proj.weight, *windows, u, z, mixes, len(sums), width, c.inner_size)
            steps.append(Launch(self._kernel("decode_conv_x"), c.inner_size // 16, 256, both))
            return mixes
        grid = (-(-2 * c.inner_size // (256 * (16 // self.dtype.itemsize))), width, 1)
        moved = (sums, *layer.conv, *windows, u, z, len(sums), c.inner_size)
        steps.append(Launch(self._kernel("decode_conv"), grid, 256, moved))
        return None

    def _x_proj(self, steps: Step, layer: Layer, common: dict[str, Any]) -> Tensor:
        """x_proj of u: its sums."""
        width = common["batch"]
        u = self.u[:width]
        if common["wide"] and decode_wide.fits(layer.x_proj, self.dtype):
            return self._sums(steps, layer.x_proj, u)
        mixes = self._mixes(layer, width, kernels.slices_of(layer.x_proj, kernels.PARTIAL))
        steps += linear(layer.x_proj, u, mixes, result=kernels.PARTIAL, **common)
        return mixes

    def _mixes(self, layer: Layer, width: int, slices: int) -> Tensor:
        """Room for so many slices of x_proj's sums, (slices, M, R + 2 N)."""
        return self.mixes[: slices * width * layer.x_proj.rows].view(slices, width, layer.x_proj.rows)

    def _mix(self, steps: Step, layer: Layer, mixes: Tensor, width: int, fused: bool) -> None:
        """x_proj's sums to dt's vector, B and C, with their norms. fused: the convolution's kernel left the sums."""
        eps = float(self.config.dt_bc_norm_eps or self.config.rms_norm_eps)
        args = (mixes, *layer.norms, self.mixed, self.dt, len(mixes), width, eps)
        name, block = ("decode_mix_wide", decode_wide.mix_threads(mixes.shape[2])) if fused else ("decode_mix", 256)
        steps.append(Launch(self._kernel(name), width, block, args))

    def _scan(
        self, steps: Step, layer: Layer, mixes: Tensor, states: tuple[Tensor, Tensor], width: int
    ) -> tuple[Tensor, bool]:
        """dt_proj, the scan's step and the gate, of a narrow batch with what `_mix` does: y, and whether it is arranged
        for out_proj (decode_stream.py). states: this step's and the next."""
        wide, c = width > self.narrow, self.config
        u, z, y = self.u[:width], self.z[:width], self.y[:width]
        weights = (layer.dt_proj, layer.dt_bias, layer.A_log2, layer.D)
        if wide and (shared := decode_wide.scan_bytes(c, self.dtype, self.device)):
            how = decode_stream.arrangement_for(layer.out_proj, layer.rotation, width, self.dtype)
            y = self.y[: decode_stream.padded(width)] if how[0] else y
            moves = (self.mixed, self.dt, *weights, u, z, *states, y, width, c.inner_size, *how)
            kernel = self._kernel("decode_scan_wide", MIXED=1, FLOW=decode_wide.FLOW)
            steps.append(Launch(kernel, -(-c.inner_size // 32), 512, moves, shared))
            return y, how[0] > 0
        eps = float(c.dt_bc_norm_eps or c.rms_norm_eps)
        args = (
            self.mixed if wide else mixes, *layer.norms, *weights, u, z, *states, y, len(mixes), width, c.inner_size,
            eps,
        )  # fmt: skip
        rows = kernels.SCAN_ROWS
        grid = (-(-c.inner_size // 32), -(-width // rows), 1)
        shared = rows * (c.time_step_rank + 2 * c.state_size) * 4
        steps.append(Launch(self._kernel("decode_scan", MIXED=int(wide)), grid, 256, args, shared))
        return y, False

    def _ffn(self, steps: Step, layer: Layer, width: int, pending: Tensor | None) -> Tensor | None:
        assert layer.gate is not None and layer.down is not None and layer.ffn_norm is not None
        common: dict[str, Any] = {"dtype": self.dtype, "batch": width, "wide": width > self.narrow}
        streams = common["wide"] and decode_stream.takes(layer.gate, self.dtype)
        x = self._norm(steps, layer.ffn_norm, width, pending, layer.gate if streams else None)
        product, how = self.product[:width], (0, 0)
        if x is not None and layer.up is not None and streams:
            how = decode_stream.arrangement_for(layer.down, layer.down_rotation, width, self.dtype)
            product = self.product[: decode_stream.padded(width)] if how[0] else product
            steps.append(decode_stream.gates(layer.gate, layer.up, x, product, width, how))
        elif x is not None and decode_wide.fits(layer.gate, self.dtype):
            sums, size = self._sums(steps, layer.gate, x, second=layer.up), self.config.intermediate_size
            grid = (-(-size // (256 * (16 // self.dtype.itemsize))), width, 1)
            steps.append(Launch(self._kernel("decode_gate"), grid, 256, (sums, product, len(sums), size)))
        else:
            steps += linear(
                layer.gate, x, product, result=kernels.SWIGLU, up=layer.up, **common,
                **self._stream_of(layer.ffn_norm, width),
            )  # fmt: skip
        self._rotate(steps, layer.down_rotation, product)
        return self._add(steps, layer.down, product, common, how[0] > 0)

    def _rotate(self, steps: Step, rotation: Rotation | None, x: Tensor) -> None:
        if rotation is not None:
            args = (x, rotation.mix, rotation.size, rotation.odd, rotation.scale)
            steps.append(Launch(self._kernel("decode_rotate"), x.shape[0], 1024, args, 4 * rotation.size))

    def _add(self, steps: Step, m: Matrix, x: Tensor, common: dict[str, Any], arranged: bool = False) -> Tensor | None:
        """A product that is added to the residual stream: at once, or (wide) by the next norm, which gets its sums."""
        width = common["batch"]
        if arranged:
            slices = decode_stream.slices_of(m)
            sums = self.sums[: slices * width * m.rows].view(slices, width, m.rows)
            steps.append(decode_stream.sums(m, x, sums))
            return sums
        if common["wide"] and decode_wide.fits(m, self.dtype):
            return self._sums(steps, m, x)
        slices = kernels.slices_of(m, kernels.RESIDUAL)
        partial = self.sums[: slices * width * m.rows].view(slices, width, m.rows) if common["wide"] else None
        steps += linear(m, x, partial, result=kernels.RESIDUAL, residual=self.residual[:width], **common)
        return partial

    def _sums(self, steps: Step, m: Matrix, x: Tensor, *, second: Matrix | None = None) -> Tensor:
        """A wide product's sums, (slices, M, O)."""
        copies = 1 if second is None else 2
        slices, rows = decode_wide.slices_of(m, copies), m.rows * copies
        sums = self.sums[: slices * x.shape[0] * rows].view(slices, x.shape[0], rows)
        steps.append(decode_wide.product(m, x, sums, second=second))
        return sums

    def _embed(self, width: int) -> Launch:
        m, hidden = self.embedding, self.config.hidden_size
        scale = torch.float32 if m.scales is None else m.scales.dtype
        groups = 1 if m.scales is None else m.scales.shape[1]
        args = (
            self.counts[0], m.weight, m.scales, m.zeros, self.residual, m.row_bytes, hidden, m.group or hidden, groups
        )  # fmt: skip
        kernel = self._kernel("decode_embed", FORMAT=m.format, S=cuda.TYPES[scale])
        return Launch(kernel, width, 256, args)

    def _kernel(self, name: str, **macros: str | int) -> cuda.Kernel:
        c = self.config
        chosen: dict[str, str | int] = {
            "T": cuda.TYPES[self.dtype], "R": cuda.TYPES[self.stream], "FORMAT": "Plain", "S": "float",
            "N": c.state_size, "RANK": c.time_step_rank, "NORMS": int(c.dt_bc_norm), "MIXED": 0,
            "KC": c.conv_kernel_size,
        }  # fmt: skip
        return cuda.kernel("decode_step.cu", name, self.device, **chosen | macros)

    # ---- recording ------------------------------------------------------------------------------------------------

    def _record(self, width: int, turn: int) -> Callable[[], object]:
        """A step as one call: a CUDA graph; on other devices its launches one by one."""
        steps = self.launches(width, turn)
        if self.device.type != "cuda":
            return lambda: run(steps)
        try:
            return self._capture(steps)
        except RuntimeError:
            if not self.overlap:
                raise
            # A driver that can't record launches that overlap.
            self.overlap = False
            return self._capture(steps)

    def _capture(self, steps: Step) -> Callable[[], object]:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            run(steps, overlap=self.overlap)
        return graph.replay


def run(steps: Step, *, overlap: bool = False) -> None:
    """Launch them on torch's current stream. overlap: a kernel may begin before the one in front of it has ended; the
    first never does."""
    options: dict[str, Any] = {}
    for one in steps:
        if isinstance(one, Product):
            torch.mm(one.x, one.weight.t(), out=one.out)
        else:
            how = {"cooperative": True} if one.cooperative else options
            one.kernel(one.grid, one.block, *one.args, shared=one.shared, **how)
        options = {"overlap": True} if overlap else {}


# ---- which engine ---------------------------------------------------------------------------------------------------

_known: WeakKeyDictionary[Any, tuple[Any, Decoder]] = WeakKeyDictionary()


def decoder(model: Any, known: int) -> Decoder:
    """The model's decoder, made at the first call and again when its weights are others. The model isn't refused."""
    tensors = [*model.parameters(), *model.buffers()]
    mark = (known, *((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors))
    found = _known.get(model)
    if found is None or found[0] != mark:
        found = _known[model] = (mark, Decoder(model, known))
    return found[1]
