"""The container of GGUF files: header, keys, and tensors read a block of rows at a time.

Why a reader of our own: a file from elsewhere may be truncated or hostile, and the gguf package's reader takes its
counts and lengths at their word (and maps the whole file, which then counts as memory). Here every number is checked
against the file's size before anything is allocated. Blocks of quantized numbers are decoded by the gguf package.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Left out: version 1, big-endian and split files.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from moai_core.errors import CheckpointError, UsageError

MAGIC = b"GGUF"
# The keys hold the vocabulary: 10 MB for 128 000 tokens and their merges. Tensor names have at most 63 bytes.
HEADER_LIMIT, KEY_LIMIT, TENSOR_LIMIT = 256 << 20, 1 << 16, 1 << 16
# Numbers worked on at a time: small enough for the processor's cache, so large tensors need no second copy.
BLOCK = 1 << 20

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
F32, F16, BF16 = 0, 1, 30
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


def library() -> Any:
    """The gguf package. Raises UsageError that says how to install it."""
    try:
        import gguf
    except ImportError as exc:
        raise UsageError(
            "GGUF files need the gguf package, which isn't installed", hint="pip install 'moai[gguf]'"
        ) from exc
    return gguf


class Entry(NamedTuple):
    """A tensor as the header describes it: `shape` as numpy has it (rows first), `offset` from the file's start."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data."""

    path: Path
    keys: dict[str, Any]  # arrays of numbers are numpy arrays, arrays of strings are lists
    tensors: dict[str, Entry]

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's rows in order, a block at a time, each (rows, columns) in fp32, or in its own 16-bit type.

        Raises CheckpointError where the file ends early."""
        entry = self.tensors[name]
        columns = entry.shape[-1]
        rows = math.prod(entry.shape) // columns
        width = entry.nbytes // rows
        step = max(1, BLOCK // columns)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(entry.offset)
                for start in range(0, rows, step):
                    count = min(step, rows - start)
                    raw = bytearray(count * width)
                    if _fill(file, raw) != len(raw):
                        raise CheckpointError(f"{self.path}: truncated inside tensor {name!r}")
                    yield _decode(raw, entry.kind, (count, columns))
        except OSError as exc:
            raise CheckpointError(f"{self.path}: can't be read ({exc.strerror})") from exc

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor in its shape, cast to `dtype`; needs no more memory than that and one block."""
        entry = self.tensors[name]
        out = torch.empty(entry.shape, dtype=dtype)
        flat, at = out.view(-1, entry.shape[-1]), 0
        for block in self.blocks(name):
            flat[at : at + len(block)] = block
            at += len(block)
        return out

    def is_zero(self, name: str) -> bool:
        """Whether every number of the tensor is zero; stops at the first that isn't."""
        return all(not block.any() for block in self.blocks(name))

    def fits(self, name: str, dtype: torch.dtype) -> bool:
        """Whether casting the tensor to `dtype` changes none of its numbers."""
        return PLAIN.get(self.tensors[name].kind) == dtype or all(
            torch.equal(block.float(), block.to(dtype).float()) for block in self.blocks(name)
        )


def _fill(file: Any, raw: bytearray) -> int:
    view, done = memoryview(raw), 0
    while done < len(raw) and (count := file.readinto(view[done:])):
        done += count
    return done


def _decode(raw: bytearray, kind: int, shape: tuple[int, int]) -> torch.Tensor:
    if kind in PLAIN:
        return torch.frombuffer(raw, dtype=PLAIN[kind]).view(shape)
    gguf = library()
    bytes_ = np.frombuffer(raw, dtype=np.uint8).reshape(shape[0], -1)
    return torch.from_numpy(gguf.dequantize(bytes_, gguf.GGMLQuantizationType(kind))).view(shape)


class _Reader:
    """Numbers and strings from the header, never beyond the file's end or HEADER_LIMIT."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.left = min(self.size, HEADER_LIMIT)

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}")

    def take(self, count: int) -> bytes:
        if count > self.left:
            if self.size > HEADER_LIMIT:
                raise self.fail(f"damaged header (longer than the {HEADER_LIMIT >> 20} MB that are read)")
            raise self.fail(f"truncated or damaged header ({self.size} bytes)")
        self.left -= count
        raw = self.file.read(count)
        if len(raw) != count:
            raise self.fail("truncated while it was read")
        return raw

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as exc:
            raise self.fail(f"damaged header ({raw[:40]!r} is not valid UTF-8)") from exc

    def value(self) -> Any:
        kind = self.number("I")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.fail(f"damaged header (a value of the unknown type {kind})")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            code = "<" + _SCALARS[inner]
            return np.frombuffer(self.take(count * struct.calcsize(code)), dtype=np.dtype(code))
        if inner != _STRING:
            raise self.fail(f"damaged header (an array of the unknown type {inner})")
        if count * 8 > self.left:
            raise self.fail(f"truncated or damaged header (a list of {count} strings)")
        return [self.text() for _ in range(count)]


def inspect(path: str | os.PathLike[str]) -> Header:
    """The keys and tensors of a GGUF file, every claim checked against the file's size; no tensor is read.

    Raises CheckpointError: not a GGUF file, another version, truncated, a tensor outside the file or overlapping
    another, or of a type that can't be decoded."""
    path = Path(path)
    gguf = library()
    try:
        with open(path, "rb") as file:
            reader = _Reader(file, path)
            if reader.size < 24 or reader.take(4) != MAGIC:
                raise reader.fail(f"truncated or not a GGUF file ({reader.size} bytes)")
            version = reader.number("I")
            if version not in (2, 3):
                big = version in (2 << 24, 3 << 24)
                raise reader.fail(f"GGUF {'of a big-endian machine' if big else f'version {version}'} can't be read")
            tensors, keys = reader.number("Q"), reader.number("Q")
            if tensors > TENSOR_LIMIT or keys > KEY_LIMIT:
                raise reader.fail(f"damaged header (it claims {tensors} tensors and {keys} keys)")
            found: dict[str, Any] = {}
            for _ in range(keys):
                name = reader.text()
                if name in found:
                    raise reader.fail(f"damaged header (the key {name[:80]!r} appears twice)")
                found[name] = reader.value()
            entries = [_entry(reader, gguf) for _ in range(tensors)]
            start = file.tell()
    except OSError as exc:
        raise CheckpointError(f"{path}: can't be read ({exc.strerror})") from exc
    return Header(path, found, _placed(reader, entries, start, found.get("general.alignment", 32)))


def _entry(reader: _Reader, gguf: Any) -> tuple[str, Entry]:
    name = reader.text()
    if not re.fullmatch(r"[\w./-]{1,63}", name, re.ASCII):
        raise reader.fail(f"damaged header (a tensor is called {name[:80]!r})")
    dims = reader.number("I")
    if not 1 <= dims <= 4:
        raise reader.fail(f"damaged header (tensor {name!r} has {dims} dimensions)")
    shape = tuple(reversed([reader.number("Q") for _ in range(dims)]))
    kind, offset = reader.number("I"), reader.number("Q")
    if not all(1 <= size < 1 << 40 for size in shape) or math.prod(shape) >= 1 << 48:
        raise reader.fail(f"damaged header (tensor {name!r} has the shape {list(shape)})")
    try:
        known = gguf.GGMLQuantizationType(kind)
        if kind not in PLAIN:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[known][1]), np.uint8), known)
    except (ValueError, NotImplementedError) as exc:
        title = known.name if kind in gguf.GGMLQuantizationType._value2member_map_ else str(kind)
        raise reader.fail(f"tensor {name!r} has the type {title}, which can't be decoded") from exc
    group, size = gguf.GGML_QUANT_SIZES[known]
    if shape[-1] % group:
        raise reader.fail(f"damaged header (tensor {name!r} of shape {list(shape)} can't be {known.name})")
    return name, Entry(shape, kind, offset, math.prod(shape) // group * size)


def _placed(reader: _Reader, entries: list[tuple[str, Entry]], start: int, alignment: Any) -> dict[str, Entry]:
    """The entries with offsets from the file's start, in the header's order."""
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise reader.fail(f"damaged header (general.alignment is {str(alignment)[:40]})")
    start = -(-start // alignment) * alignment
    placed: dict[str, Entry] = {}
    for name, entry in entries:
        if name in placed:
            raise reader.fail(f"damaged header (tensor {name!r} appears twice)")
        placed[name] = entry._replace(offset=start + entry.offset)
    end, last = start, ""
    for name, entry in sorted(placed.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            raise reader.fail(f"damaged header (tensors {last!r} and {name!r} overlap)")
        end, last = entry.offset + entry.nbytes, name
    if end > reader.size:
        raise reader.fail(f"truncated ({reader.size} bytes, its tensors need {end})")
    return placed
