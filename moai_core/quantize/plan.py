"""What `moai quantize` is asked for, as a table of modules and formats, checked before anything is read.

A method chooses the numbers (round to nearest, GPTQ, AWQ), a format stores them (moai_core/quant/formats.py). Which
matrices are quantized is the same for all: those of the mixer's and the feed-forward's large products; the embedding
and the head by `embeddings`; x_proj and dt_proj, 2 % of the numbers and sensitive, only on request; convolution, A_log,
D, dt_bias, norms and the state never (Quamba2, arXiv 2503.22879; MambaQuant, arXiv 2501.13484).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moai_core.errors import UsageError
from moai_core.quant.formats import FORMATS, GROUPS, Spec
from moai_core.quantize import layouts
from moai_core.quantize.layerwise import Options

LARGE = ("mamba.in_proj", "mamba.out_proj", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")
SMALL = ("mamba.x_proj", "mamba.dt_proj")
EMBEDDINGS = ("bf16", "int8", "int4")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Method:
    """How numbers are chosen. formats: by bits; calibrated: whether it looks at data."""

    formats: Mapping[int, str]
    layer: str = "rtn"  # what layerwise.quantize_layer is asked for
    calibrated: bool = False
    symmetric: bool = True
    grouped: bool = True
    embeddings: str = "int8"
    what: str = ""


METHODS: dict[str, Method] = {
    "int4": Method({4: "int4", 8: "int8"}, what="round to nearest, group-wise, with a searched clip"),
    "gptq": Method({4: "int4", 8: "int8"}, "gptq", calibrated=True, what="GPTQ (arXiv 2210.17323)"),
    "awq": Method({4: "int4"}, "awq", calibrated=True, symmetric=False, what="AWQ (arXiv 2306.00978)"),
    "fp8": Method({8: "fp8"}, grouped=False, what="e4m3 by row"),
    "fp4": Method({4: "nvfp4"}, grouped=False, what="e2m1: NVFP4 with blocks of 16, MXFP4 of 32"),
    "bnb4": Method({4: "nf4"}, grouped=False, embeddings="bf16", what="bitsandbytes' NF4"),
    "bnb8": Method({8: "bnb8"}, grouped=False, embeddings="bf16", what="bitsandbytes' LLM.int8"),
}
# The two kinds of fp4 by the columns that share a scale.
FP4 = {16: "nvfp4", 32: "mxfp4"}


@dataclass(frozen=True)
class Settings:
    """What the user asked for. None: the method's own choice."""

    method: str = "int4"
    bits: int | None = None
    group_size: int | None = None  # 128, of formats that have groups; of fp4 16 or 32
    symmetric: bool | None = None
    embeddings: str | None = None
    small: bool = False  # x_proj and dt_proj in int8
    rotate: bool = False
    layout: str = "moai"  # or one of layouts.LAYOUTS

    @property
    def kind(self) -> Method:
        """The method's entry. Raises UsageError for an unknown one."""
        if self.method not in METHODS:
            raise UsageError(f"--method can't be {self.method!r}", hint=f"methods: {', '.join(METHODS)}")
        return METHODS[self.method]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return 128 if self.group_size is None else self.group_size

    @property
    def width(self) -> int:
        """Bits of a number. Raises UsageError for a width that the method doesn't have."""
        known = list(self.kind.formats)
        bits = known[0] if self.bits is None else self.bits
        if bits not in known:
            raise UsageError(
                f"--bits {bits}: {self.method} has {' and '.join(map(str, known))}",
                hint="int4 and gptq have 8 bits, too" if bits == 8 else "leave it out for the method's own",
            )
        return bits

    def spec(self) -> Spec:
        """Of the large matrices. Raises UsageError."""
        kind = self.kind
        name = self._fp4() if self.method == "fp4" else kind.formats[self.width]
        if name not in FORMATS:
            raise UsageError(f"--method {self.method}: the format {name} isn't there")
        symmetric = (kind.symmetric if self.symmetric is None else self.symmetric) or name != "int4"
        if self.symmetric is not None and name != "int4":
            raise UsageError(
                f"--symmetric and --asymmetric are for 4-bit integers, not for {name}", hint="leave it out"
            )
        if self.group_size is not None and not kind.grouped and self.method != "fp4":
            raise UsageError(f"--group-size: {self.method} has no groups to choose", hint="leave it out")
        if kind.grouped and self.group not in (0, *GROUPS):
            sizes = ", ".join(map(str, GROUPS))
            raise UsageError(f"--group-size must be 0 or one of {sizes} (got {self.group})", hint="0: the whole row")
        spec = Spec(name, self.group if kind.grouped else 0, symmetric)
        layouts.check(self.layout, spec, rotate=self.rotate, embeddings=self.embeddings)
        return spec

    def _fp4(self) -> str:
        if (size := 16 if self.group_size is None else self.group_size) not in FP4:
            raise UsageError(f"--group-size {size}: fp4 has 16 (NVFP4) and 32 (MXFP4)", hint="leave it out for NVFP4")
        return FP4[size]


def modules(settings: Settings, shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> dict[str, Any]:
    """`quantization.modules` of config.json for a model whose weights have these shapes ({"model.embed_tokens.weight":
    (V, H), …}).

    Raises UsageError where a matrix doesn't fit the format, naming it, and for settings that contradict one another.
    """
    spec = settings.spec()
    if settings.rotate and not settings.kind.grouped:
        raise UsageError(f"--rotate is for int4, gptq and awq (got --method {settings.method})", hint="leave it out")
    chosen: dict[str, Spec] = {name.rpartition(".")[2]: spec for name in LARGE if _there(shapes, name)}
    if settings.small:
        chosen |= {name.rpartition(".")[2]: Spec("int8", 0) for name in SMALL}
    embeddings = settings.embeddings or (settings.kind.embeddings if settings.layout == layouts.MOAI else "bf16")
    if embeddings not in EMBEDDINGS:
        raise UsageError(f"--embeddings can't be {embeddings!r}", hint=f"choose one of: {', '.join(EMBEDDINGS)}")
    if embeddings != "bf16":
        rows = Spec("int8", 0) if embeddings == "int8" else Spec("int4", settings.group)
        chosen |= {name: rows for name in (["embed_tokens"] if tied else ["embed_tokens", "lm_head"])}
    for name, (out, columns) in ((n, s) for n, s in shapes.items() if len(s) == 2):
        key = name.removesuffix(".weight").rpartition(".")[2]
        if key in chosen:
            try:
                FORMATS[chosen[key].format].check(chosen[key], out, columns)
            except UsageError as exc:
                raise UsageError(f"{name}: {exc.message}", hint=exc.hint) from exc
    return {name: one.to_dict() for name, one in chosen.items()}


def _there(shapes: Mapping[str, Any], name: str) -> bool:
    return f"model.layers.0.{name}.weight" in shapes


def quantization(settings: Settings, shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> dict[str, Any]:
    """The whole `quantization` of config.json; raises as `modules`."""
    return {"method": settings.method, "modules": modules(settings, shapes, tied=tied), **extras(settings)}


def extras(settings: Settings) -> dict[str, Any]:
    """What config.json's `quantization` says beside the formats: an online rotation of out_proj's input, a vector
    between convolution and scan (AWQ's scale for out_proj)."""
    rotate = {"rotate": ["out_proj"]} if settings.rotate else {}
    return rotate | ({"conv_scale": True} if settings.kind.layer == "awq" and settings.layout == layouts.MOAI else {})


def layer_options(settings: Settings, stored: torch.dtype) -> Options:
    """How a layer is quantized; stored: the type of what isn't."""
    own = settings.layout == layouts.MOAI  # of other layouts none has a place for that scale
    # AWQ without it has nothing for out_proj that GPTQ doesn't do better.
    other = {"mamba.out_proj": "gptq"} if settings.kind.layer == "awq" and not own else {}
    rotate = ("mamba.out_proj",) if settings.rotate else ()
    return Options(rotate=rotate, stored=stored, conv_scale=own, overrides=other)
