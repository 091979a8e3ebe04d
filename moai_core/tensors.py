"""Tensors to and from safetensors files, and nested dicts of tensors and plain values as one such file plus JSON.

Why a writer of our own: it streams (a tensor at a time from the GPU, no second copy in memory), is hashed in the same
pass, and a full disk reaches the caller as an OSError. Why a check of our own before the library opens a file: a
hostile or damaged header is refused with one line, before anything is allocated. Loading itself is the library's.
Format: https://github.com/huggingface/safetensors#format. Left out: complex and sub-byte types.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moai_core.errors import CheckpointError
from moai_core.storage import parse_json

DAMAGED = "copy the file again from where it came, or take another checkpoint"
# 4 MB describe some 40 000 tensors; parsing a hostile header of that size stays below 256 MB.
HEADER_LIMIT = 4 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The bytes of a safetensors file in pieces: the header, then each tensor (of any device), widest types first."""
    infos = {name: TensorInfo(t.dtype, tuple(t.shape), t.numel() * t.element_size()) for name, t in tensors.items()}
    return stream(infos, tensors.__getitem__, metadata)


def stream(
    infos: Mapping[str, TensorInfo], load: Callable[[str], torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """As `encode`, of tensors that `load` gives by name when their turn comes: one at a time is in memory."""
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape, nbytes = infos[name]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > HEADER_LIMIT:
        raise ValueError(
            f"{len(infos)} tensors need a header of {len(raw)} bytes, more than {HEADER_LIMIT}: use several files"
        )
    yield struct.pack("<Q", len(raw)) + raw
    for name in order:
        tensor = load(name)
        assert (tensor.dtype, tuple(tensor.shape)) == infos[name][:2], f"{name}: not what was announced"
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        del tensor


def inspect(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Type and shape of every tensor of a safetensors file by name; its header is checked in full, no data is read.

    Raises CheckpointError: truncated, header too long or broken, a tensor outside the file, overlapping another, or of
    another size than its shape.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or length > size - 8:
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)", hint=DAMAGED)
            if length > HEADER_LIMIT:
                raise CheckpointError(
                    f"{path}: header of {length} bytes, at most {HEADER_LIMIT} are read", hint=DAMAGED
                )
            header = parse_json(file.read(length), f"{path}: header")
    except OSError as exc:
        raise CheckpointError(f"{path}: can't be read ({exc.strerror})") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is not a JSON object", hint=DAMAGED)
    header.pop("__metadata__", None)
    spans, found = [], {}
    for name, entry in header.items():
        begin, found[name] = _entry(path, name, entry)
        spans.append((begin, begin + found[name].nbytes, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise CheckpointError(
                f"{path}: tensor {name!r} {'overlaps another' if begin < expected else 'leaves a gap before it'}",
                hint=DAMAGED,
            )
        expected = end
    if expected != size - 8 - length:
        raise CheckpointError(
            f"{path}: {size - 8 - length} bytes of data, the header describes {expected} (truncated or appended to)",
            hint=DAMAGED,
        )
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[int, TensorInfo]:
    def count(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 48

    valid = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    shape, offsets = (entry["shape"], entry["data_offsets"]) if valid else ([], [])
    valid = valid and isinstance(shape, list) and len(shape) <= 16 and all(map(count, shape))
    valid = valid and isinstance(offsets, list) and len(offsets) == 2 and all(map(count, offsets))
    if not valid:
        raise CheckpointError(f"{path}: the header's entry for {name[:80]!r} is malformed", hint=DAMAGED)
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name[:80]!r} has the unsupported type {str(entry['dtype'])[:20]!r}")
    dtype = DTYPES[entry["dtype"]]
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name[:80]!r} of shape {shape} needs {nbytes} bytes, not {offsets[1] - offsets[0]}",
            hint=DAMAGED,
        )
    return offsets[0], TensorInfo(dtype, tuple(shape), nbytes)


def read(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, checked by `inspect` first, in memory of their own. Raises CheckpointError."""
    return dict(iterate(path, device=device))


def iterate(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """`(name, tensor)` one at a time, so that a large file never needs twice its size. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    names = inspect(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in names:
                tensor = file.get_tensor(name)
                # A tensor of the library lies in the mapped file: a copy survives the file's end.
                yield name, tensor.clone() if torch.device(device).type == "cpu" else tensor.to(device)
    except (SafetensorError, OSError, RuntimeError) as exc:  # RuntimeError: torch, of a file that vanished
        raise CheckpointError(f"{path}: can't be read ({exc})") from exc


# ---- nested dicts --------------------------------------------------------------------------------


def flatten(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a tree of dicts (string keys), lists, tuples, tensors and JSON values into a JSON tree and named tensors.

    In the JSON tree a tensor is `{"$tensor": name}` and a tuple `{"$tuple": [...]}`; `unflatten` gives the exact tree
    back. Raises TypeError for anything else: there is no pickle.
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, torch.Tensor):
            while path in tensors:  # {"a/b": t} beside {"a": {"b": t}}
                path += "'"
            tensors[path] = node
            return {"$tensor": path}
        if isinstance(node, Mapping):
            if bad := [key for key in node if not isinstance(key, str) or key.startswith("$")]:
                raise TypeError(f"{path or 'the top level'}: key {bad[0]!r} must be a string without a leading '$'")
            return {key: walk(value, f"{path}/{key}" if path else key) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            items = [walk(value, f"{path}/{index}") for index, value in enumerate(node)]
            return {"$tuple": items} if isinstance(node, tuple) else items
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"{path}: a {type(node).__name__} can't be stored, only tensors and JSON values")

    return walk(tree, ""), tensors


def unflatten(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree that `flatten` took apart. Raises CheckpointError for a tensor that is missing."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tuple" in tree:
        return tuple(unflatten(tree["$tuple"], tensors))
    if "$tensor" in tree:
        if tree["$tensor"] not in tensors:
            raise CheckpointError(f"tensor {tree['$tensor']!r} is missing")
        return tensors[tree["$tensor"]]
    return {key: unflatten(value, tensors) for key, value in tree.items()}
