"""What kernels are made of: numba's function kinds, raw memory, and vector instructions that numba has no words for.

A vector is 64 bytes: `Bytes` (64 x 8 bits), `Ints` (16 x 32) or `Floats` (16 x fp32). LLVM cuts it to what the
processor has. One instruction differs from processor to processor, the sum of four products of 8-bit numbers that
integer matrix products live on; `DOT` names the one taken here:

    avx512vnni, avxvnni (vpdpbusd), avx2 (vpmaddubsw, vpmaddwd), dotprod (Arm's sdot), generic (multiplications)

Assembly and not LLVM's intrinsics for it: their types changed between LLVM's versions. AMX, Intel's 16 x 16 matrix
unit, is reached by instruction as well: its tiles are numbered registers, configured by `tile_config`.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.core import codegen, config
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import models, register_model

intrinsic: Any = numba_intrinsic  # its type says nothing about the call from compiled code
_options: Any = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
tiny = njit(fastmath={"contract"}, forceinline=True, **_options)
plain = njit(fastmath={"contract"}, **_options)
summing = njit(fastmath={"contract", "reassoc"}, **_options)

i8, i32, i64, f16, f32 = *(ir.IntType(bits) for bits in (8, 32, 64)), ir.HalfType(), ir.FloatType()


def kernel(function: Any) -> Any:
    """A function that returns the C function `void f(int64_t *slots)`: compiled, or read from disk, at first use."""

    @functools.cache
    def compiled() -> Any:
        return cfunc(types.void(types.CPointer(types.int64)), cache=bool(getattr(config, "CACHE_DIR", "")))(function)

    return compiled


# ---- what the processor has -----------------------------------------------------------------------------------------

binding.initialize_native_asmparser()  # or LLVM aborts at the first line of assembly

X86 = platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def features() -> frozenset[str]:
    """The names of the processor's extensions as LLVM has them, among them what numba was told to use."""
    given = getattr(config, "CPU_FEATURES", None)
    words = (codegen.get_host_cpu_features() if given is None else given).split(",")
    return frozenset(word[1:] for word in words if word.startswith("+"))


def _dot() -> str:
    has = features()
    if X86:
        for name, needed in (("avx512vnni", {"avx512f", "avx512vnni"}), ("avxvnni", {"avxvnni"}), ("avx2", {"avx2"})):
            if needed <= has:
                return name
    return "dotprod" if platform.machine().lower() in ("aarch64", "arm64") and "dotprod" in has else "generic"


DOT = _dot()
# Whether `dot4` takes its first operand as signed: sdot does.
SIGNED = DOT == "dotprod"


@functools.cache
def amx() -> str | None:
    """Why the matrix unit can't be used; None where it can. A process must ask the system for its registers first."""
    if not {"amx-tile", "amx-int8", "avx512f"} <= features():
        return "the processor has no AMX"
    if sys.platform != "linux":
        return f"AMX isn't used on {sys.platform}"
    permission, tiles = 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    refused = ctypes.CDLL(None).syscall(158, permission, tiles)
    return "the system doesn't give AMX's registers to this process" if refused else None


# ---- memory ---------------------------------------------------------------------------------------------------------


@intrinsic
def bits_of(typing: Any, x: Any) -> Any:
    return types.int32(types.float32), lambda ctx, builder, sig, args: builder.bitcast(args[0], i32)


@intrinsic
def float_of(typing: Any, x: Any) -> Any:
    return types.float32(types.int32), lambda ctx, builder, sig, args: builder.bitcast(args[0], f32)


@intrinsic
def floats_at(typing: Any, address: Any) -> Any:
    pointer = types.CPointer(types.float32)
    return pointer(types.int64), lambda ctx, builder, sig, args: builder.inttoptr(args[0], ctx.get_value_type(pointer))


@intrinsic
def ints_at(typing: Any, address: Any) -> Any:
    pointer = types.CPointer(types.int32)
    return pointer(types.int64), lambda ctx, builder, sig, args: builder.inttoptr(args[0], ctx.get_value_type(pointer))


@intrinsic
def bytes_at(typing: Any, address: Any) -> Any:
    pointer = types.CPointer(types.int8)
    return pointer(types.int64), lambda ctx, builder, sig, args: builder.inttoptr(args[0], ctx.get_value_type(pointer))


@intrinsic
def take(typing: Any, slots: Any) -> Any:
    """The next work item: slots[0]++, atomically."""

    def code(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.Constant(i64, 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), code


# ---- vectors --------------------------------------------------------------------------------------------------------


class Vector(types.Type):
    """A vector as a type of numba's variables."""

    def __init__(self, element: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name=f"Vector({self.llvm})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


Bytes, Ints, Floats = Vector(i8, 64), Vector(i32, 16), Vector(f32, 16)


def operation(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Makes an instruction of kernels out of a function (builder, values) -> value that writes its LLVM code."""

    def make(emit: Callable[..., Any]) -> Any:
        def code(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
            made = emit(builder, *args)
            return ctx.get_dummy_value() if result is types.none else made

        # numba counts the parameters of the function that it is given.
        names = ", ".join(f"a{i}" for i in range(len(arguments)))
        made = eval(f"lambda typing, {names}: answer", {"answer": (result(*arguments), code)})
        made.__name__ = emit.__name__
        return intrinsic(made)

    return make


def constant(kind: ir.VectorType, value: Any) -> Any:
    """The same number in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def splat(builder: Any, value: Any, lanes: int = 16) -> Any:
    """A value in every lane."""
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(i32, 0))
    zeros = ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def read(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def write(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def fetch(builder: Any, address: Any, locality: int) -> None:
    """Ask for a cache line: 3 into the first level, 2 into the second."""
    pointer = i8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
    line = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
    builder.call(line, [builder.inttoptr(address, pointer), *(ir.Constant(i32, n) for n in (0, locality, 1))])


def dot4(builder: Any, total: Any, u: Any, s: Any, *, nibbles: bool) -> Any:
    """total[i] += sum over j < 4 of u[4 i + j] s[4 i + j]: u unsigned unless SIGNED, s signed 8-bit numbers.

    nibbles: u is at most 15.
    """
    u, s = (builder.bitcast(x, Ints.llvm) for x in (u, s))
    if DOT == "generic":
        for j in range(4):
            up, down = (constant(Ints.llvm, bits) for bits in (24 - 8 * j, 24))
            a = builder.lshr(builder.shl(u, up), down)
            total = builder.add(total, builder.mul(a, builder.ashr(builder.shl(s, up), down)))
        return total
    if DOT == "avx512vnni":
        return _assembly(builder, "vpdpbusd $3, $2, $0", "=v,0,v,v", total, u, s)
    lanes = 4 if DOT == "dotprod" else 8
    parts = []
    for at in range(0, 16, lanes):
        place = ir.Constant(ir.VectorType(i32, lanes), list(range(at, at + lanes)))
        t, a, b = (builder.shuffle_vector(x, x, place) for x in (total, u, s))
        if DOT == "dotprod":
            parts.append(_assembly(builder, "sdot $0.4s, $2.16b, $3.16b", "=w,0,w,w", t, a, b))
        elif DOT == "avxvnni":
            parts.append(_assembly(builder, "{vex} vpdpbusd $3, $2, $0", "=x,0,x,x", t, a, b))
        else:
            parts.append(_dot_avx2(builder, t, a, b, nibbles))
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        whole = ir.Constant(ir.VectorType(i32, count), list(range(count)))
        parts = [builder.shuffle_vector(a, b, whole) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _dot_avx2(builder: Any, total: Any, u: Any, s: Any, nibbles: bool) -> Any:
    """Sums of two products must fit 16 bits, so larger numbers are taken in halves."""
    mask = constant(u.type, 0x0F0F0F0F)
    halves = [(u, 0x00010001)]
    if not nibbles:
        halves = [(builder.and_(u, mask), 0x00010001)]
        halves += [(builder.and_(builder.lshr(u, constant(u.type, 4)), mask), 0x00100010)]
    for half, weight in halves:
        pairs = _assembly(builder, "vpmaddubsw $2, $1, $0", "=x,x,x", half, s)
        sums = _assembly(builder, "vpmaddwd $2, $1, $0", "=x,x,x", pairs, constant(u.type, weight))
        total = builder.add(total, sums)
    return total


def _assembly(builder: Any, text: str, constraints: str, *values: Any) -> Any:
    """An instruction without side effects whose result has the type of its first operand."""
    kind = ir.FunctionType(values[0].type, [value.type for value in values])
    return builder.asm(kind, text, constraints, list(values), False)


@operation(Ints, types.int64)
def load_ints(builder, address):
    return read(builder, address, Ints.llvm)


@operation(types.int32, types.int64)
def load_int(builder, address):
    return read(builder, address, i32)


@operation(types.float32, types.int64)
def load_float(builder, address):
    return read(builder, address, f32)


@operation(Floats, types.int64)
def load_floats(builder, address):
    return read(builder, address, Floats.llvm)


@operation(Floats, types.int64)
def load_halves(builder, address):
    """16 fp16 numbers as fp32."""
    return builder.fpext(read(builder, address, ir.VectorType(f16, 16)), Floats.llvm)


@operation(types.none, types.int64, Floats)
def store_floats(builder, address, x):
    write(builder, x, address)


@operation(Ints, types.int32)
def ints(builder, x):
    return splat(builder, x)


@operation(Floats, types.float32)
def floats(builder, x):
    return splat(builder, x)


@operation(Ints, Ints, Ints)
def add(builder, x, y):
    return builder.add(x, y)


@operation(Ints, Ints)
def times256(builder, x):
    return builder.shl(x, constant(Ints.llvm, 8))


@operation(Floats, Ints)
def to_floats(builder, x):
    return builder.sitofp(x, Floats.llvm)


@operation(Floats, Floats, Floats)
def mul(builder, x, y):
    return builder.fmul(x, y)


@operation(Floats, Floats, Floats, Floats)
def fma(builder, x, y, z):
    """x y + z, rounded once."""
    kind = ir.FunctionType(Floats.llvm, [Floats.llvm] * 3)
    return builder.call(builder.module.declare_intrinsic("llvm.fma.v16f32", (), kind), [x, y, z])


# ---- AMX ------------------------------------------------------------------------------------------------------------


def tile_operation(name: str, *kinds: Any) -> Callable[..., None]:
    """An LLVM intrinsic of AMX as a function (builder, values); plain integers are the numbers of tiles."""

    def emit(builder: Any, *values: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), list(kinds))
        made = builder.module.declare_intrinsic(f"llvm.x86.{name}", (), kind)
        builder.call(made, [ir.Constant(i8, value) if isinstance(value, int) else value for value in values])

    return emit


_pointer = i8.as_pointer()
tile_zero = tile_operation("tilezero", i8)
tile_load = tile_operation("tileloadd64", i8, _pointer, i64)
tile_store = tile_operation("tilestored64", i8, _pointer, i64)
# tile += signed bytes of the second times unsigned bytes of the third
tile_dot = tile_operation("tdpbsud", i8, i8, i8)
_configure = tile_operation("ldtilecfg", _pointer)
_release = tile_operation("tilerelease")


@operation(types.none, types.int64)
def tile_config(builder, address):
    """Takes the 64 bytes that describe the eight tiles: palette 1, then their widths in bytes and their rows."""
    _configure(builder, builder.inttoptr(address, _pointer))


@operation(types.none, types.int64)
def tile_release(builder, unused):
    """Gives the tiles back to the system, whose task switches are faster without them."""
    _release(builder)
