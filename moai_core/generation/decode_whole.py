"""A step for one row in one launch: which models `cuda/decode_whole.cu` takes, and how it is launched.

The kernel keeps memory busy across all products of a step, so it is what makes a single answer fast. It multiplies
with the products of decode_kernels.py, cut and summed alike, and leaves the same bits as they do for up to 8 rows; but
where two rows go another way (decode_stream.py), it takes int4 by products of integers (cuda/digits.cuh). It leaves out
fp32, zero points, groups of other than 128, 256, ... columns, rotations, and rows of a weight that are no whole number
of 64 bytes: there the other kernels take a single row too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.generation import decode_kernels as kernels
from moai_core.generation.decode_kernels import Launch, Matrix
from moai_core.generation.decode_weights import Layer

# As decode_whole.cu has them.
_THREADS, _KINDS, _SHAPE, _RECORD = 352, 6, 10, 24
_STATIC = 13 << 10
# Chunks of 64 bytes of each of 16 rows in a stage: the copy engine is slow with less than 1 KB at once, but a small
# ring holds more stages of half of it. Stages of the ring: what still hides a wait. Of these on their way at most:
# memory is busy with them, and what blocks send each other would wait behind more; layers in groups of codes, which
# take less time to come than to multiply, need fewer than what has more bits, the head among it.
SPANS, WISHED_DEPTH, LEAST_DEPTH = (16, 8), 8, 4
FLIGHT, CODED_FLIGHT, CODED_FLIGHT_HEAD = 3, 1, 4


def _how(m: Matrix) -> tuple[str, int, torch.dtype]:
    """How a weight is stored: format, columns that share a scale, type of the scales."""
    return m.format, m.group, torch.float32 if m.scales is None else m.scales.dtype


def _copied(m: Matrix) -> bool:
    """Whether the copy engine, which takes 16 bytes at least, can bring rows and the scales of 8 rows."""
    scales = m.scales if m.group else None
    return m.weight.data_ptr() % 16 == 0 and (scales is None or (m.rows % 8 == 0 and scales.data_ptr() % 16 == 0))


class Whole:
    """The kernel for one row of a model, with the tables that it reads. `Whole.of` says None for a model it doesn't
    take."""

    def __init__(
        self,
        layers: Sequence[Layer],
        head: Matrix,
        final: Tensor,
        embedding: Matrix,
        config: Any,
        dtype: Any,
        digits: bool,
    ):
        self.layers, self.head, self.final, self.embedding, self.config = layers, head, final, embedding, config
        self.stream = torch.float32 if config.residual_in_fp32 else dtype
        one, self.device = layers[0], final.device
        self.kinds = [one.in_proj, one.x_proj, one.out_proj, one.gate, one.down, head]
        results = (kernels.STORE, kernels.PARTIAL, kernels.RESIDUAL, kernels.SWIGLU, kernels.RESIDUAL, kernels.STORE)
        slices = kernels.slices_of
        self.slices = [0 if m is None else slices(m, r, few=True) for m, r in zip(self.kinds, results, strict=True)]
        self.mix = config.time_step_rank + 2 * config.state_size
        self.digits = digits
        most = max(m.columns * (4 if self._in_digits(m) else 2) for m in self.kinds if m is not None)
        self.room = -(-most // 512) * 512
        self.groups = max(0 if m is None or not m.group or m.scales is None else m.scales.shape[1] for m in self.kinds)
        free = kernels.shared_memory(self.device) - _STATIC - self._fixed()
        depths = [(free // self._stage(span), span) for span in SPANS]
        self.depth, self.span = next((d for d in depths if d[0] >= WISHED_DEPTH), depths[-1])
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None
        self._macros: dict[str, str | int] = {
            "T": cuda.TYPES[dtype], "R": cuda.TYPES[self.stream], "N": config.state_size, "RANK": config.time_step_rank,
            "NORMS": int(config.dt_bc_norm), "KC": config.conv_kernel_size, "SLICES": self.slices[1],
            "FFN": int(one.gate is not None), "DEPTH": self.depth, "FLIGHT": CODED_FLIGHT if self.groups else FLIGHT,
            "FLIGHT_HEAD": CODED_FLIGHT_HEAD if self.groups else FLIGHT, "SPAN": self.span, "GROUPS": self.groups,
        }  # fmt: skip
        for name, m in zip(("IN", "X", "OUT", "UP", "DOWN", "HEAD", "EMBED"), (*self.kinds, embedding), strict=True):
            how = ("Plain", 0, torch.float32) if m is None else _how(m)
            how = ("Digits", *how[1:]) if m is not None and self._in_digits(m) else how
            self._macros[f"W_{name}"] = f"{how[0]},{cuda.TYPES[how[2]]},{how[1]}"

    @classmethod
    def of(
        cls,
        layers: Sequence[Layer],
        head: Matrix,
        final: Tensor,
        embedding: Matrix,
        config: Any,
        *,
        digits: bool = False,
    ) -> Whole | None:
        """The kernel for these weights, or None where it can't take them. digits: codes in groups by products of
        integers: faster, but with other bits than decode_kernels.py's products."""
        dtype = final.dtype
        if not (kernels.in_whole_chunks(head, dtype) and _copied(head)) or embedding.format == "Fp8":
            return None
        if config.state_size > 64 or config.hidden_size % 8:
            return None
        names = ("in_proj", "x_proj", "out_proj", "gate", "up", "down")
        for one in layers:
            if one.rotation is not None or one.down_rotation is not None:
                return None
            for name in names:
                m, first = getattr(one, name), getattr(layers[0], name)
                if (m is None) != (first is None):
                    return None
                if m is None:
                    continue
                if _how(m) != _how(first) or not (kernels.in_whole_chunks(m, dtype) and _copied(m)):
                    return None
        made = cls(layers, head, final, embedding, config, dtype, digits)
        return made if made.depth >= LEAST_DEPTH else None

    def _in_digits(self, m: Matrix) -> bool:
        """Whether x of this weight is made digits of, 4 bytes a number."""
        return self.digits and m.group > 0

    # ---- sizes ----------------------------------------------------------------------------------------------------

    def _stage(self, span: int) -> int:
        """Bytes of a stage: 16 rows of so many chunks, each with 64 bytes behind it, and the tile's scales."""
        return 16 * (span * kernels.CHUNK_BYTES + 64) + 32 * self.groups

    def _fixed(self) -> int:
        """Bytes of shared memory beside the ring."""
        stream = -(-self.config.hidden_size // 8) * 8 * self.stream.itemsize
        return self.room + self.room // 32 + stream + (len(self.layers) + 1) * _RECORD * 8

    def _words(self) -> int:
        """Words of 4 bytes that blocks give each other, of all layers."""
        c = self.config
        stream = c.hidden_size if self.stream.itemsize == 4 else c.hidden_size // 2
        parts = [c.inner_size // 2] * 3 + [self.slices[1] * self.mix, stream]
        parts += [] if self.kinds[3] is None else [c.intermediate_size // 2, stream]
        return len(self.layers) * sum(-(-part // 4) * 4 for part in parts)

    # ---- tables ---------------------------------------------------------------------------------------------------

    def _shapes(self) -> list[int]:
        """The kinds of products as the kernel's `Shape` has them."""
        parts = [s if kind == 1 else 1 for kind, s in enumerate(self.slices)]
        tiles = [0 if m is None else -(-m.rows // (8 if kind == 3 else 16)) for kind, m in enumerate(self.kinds)]
        units = [t * p for t, p in zip(tiles, parts, strict=True)]
        blocks = kernels.multiprocessors(self.device)
        found: list[int] = []
        for kind, m in enumerate(self.kinds):
            if m is None:
                found += [0] * _SHAPE
                continue
            slice_ = -(-m.chunks // self.slices[kind])
            groups = 1 if m.scales is None else m.scales.shape[1]
            shift = (m.group // 128).bit_length() - 1 if m.group else -1
            found += [m.row_bytes, m.rows, m.chunks, slice_, parts[kind], *divmod(units[kind], blocks), groups, shift]
            found += [-(-slice_ // self.span)]
        return found

    def _record(self, one: Layer) -> list[Tensor | None]:
        weights = (one.in_proj, one.x_proj, one.out_proj, one.gate, one.down, one.up)
        pairs = [t for m in weights for t in ((None, None) if m is None else (m.weight, m.scales))]
        rest = (*one.conv, *one.norms, one.dt_proj, one.dt_bias, one.A_log2, one.D, one.ffn_norm)
        return [*pairs, one.norm, *rest]

    def _make(self) -> tuple[Tensor, Tensor, Tensor]:
        """(table, two sets of words, clock)."""
        last: list[Tensor | None] = [None] * _RECORD
        last[10:13] = [self.head.weight, self.head.scales, self.final]
        rows = [*map(self._record, self.layers), last]
        numbers = [0 if t is None else t.data_ptr() for row in rows for t in row]
        table = torch.tensor(numbers + self._shapes(), dtype=torch.int64, device=self.device)
        words = torch.full((2, self._words()), -1, dtype=torch.int32, device=self.device)  # VOID
        return table, words, torch.zeros(2, dtype=torch.int64, device=self.device)

    # ---- the launch -----------------------------------------------------------------------------------------------

    def launch(self, token: Tensor, conv: tuple[Tensor, Tensor], ssm: tuple[Tensor, Tensor], logits: Tensor) -> Launch:
        """From the token (1) to the logits (1, V). conv, ssm: the states (layers, rows, ...) before and after, of which
        it takes the first row."""
        if self._tables is None:
            self._tables = self._make()
        c, m, (table, words, clock) = self.config, self.embedding, self._tables
        groups = 1 if m.scales is None else m.scales.shape[1]
        args = (
            table, words, clock, token, m.weight, m.scales, m.zeros, *conv, *ssm, logits, len(self.layers),
            c.hidden_size, c.inner_size, c.intermediate_size, c.vocab_size, self.room, m.row_bytes,
            m.group or c.hidden_size, groups, ssm[0].shape[1], float(c.rms_norm_eps),
            float(c.dt_bc_norm_eps or c.rms_norm_eps),
        )  # fmt: skip
        kernel = cuda.kernel("decode_whole.cu", "decode_whole", self.device, **self._macros)
        shared = self._fixed() + self.depth * self._stage(self.span)
        return Launch(kernel, kernels.multiprocessors(self.device), _THREADS, args, shared, cooperative=True)
