"""`pytorch_model.bin`, the way weights travelled before safetensors: a zip archive with a pickle in it.

A pickle can run code when it is opened. Here torch's restricted unpickler reads it (`weights_only`: tensors and plain
containers, anything else is refused), and before that the archive's own claims are checked: nothing compressed, nothing
larger than the file. Storages stay on the disk (`mmap`) until their tensor is read. Source: torch.load's documentation,
and torch/serialization.py for the archive's layout. Left out: the format of torch before 1.6, which is no archive.
"""

from __future__ import annotations

import errno
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moai_core import storage
from moai_core.convert.source import Lazy
from moai_core.errors import CheckpointError

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PICKLE_LIMIT = 32 << 20
_DESCRIPTOR = b"PK\x07\x08"
HINT = "only a plain dict of tensors is read; ask for a safetensors file, or open it where you trust it and save one"


def files(path: Path) -> list[str]:
    """The .bin files of a folder, by its index where there is one. Raises CheckpointError for a broken index."""
    if not (path / INDEX).is_file():
        return [SINGLE] if (path / SINGLE).is_file() else []
    content = storage.read_json(path / INDEX)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path / INDEX}: has no weight_map")
    for name, file in places.items():
        if not storage.plain_name(file) or not file.endswith(".bin"):
            raise CheckpointError(
                f"{path / INDEX}: {name[:80]!r} points to {str(file)[:80]!r}, which is not a .bin file of this folder"
            )
        if not (path / file).is_file():
            raise CheckpointError(f"{path / file}: missing, though {INDEX} names it")
    return sorted(set(places.values()))


def read(path: Path) -> dict[str, Lazy]:
    """The tensors of a folder's .bin files by name. Raises CheckpointError: unsafe, truncated, not tensors."""
    found: dict[str, Lazy] = {}
    for file in files(path):
        for name, tensor in _open(path / file).items():
            if name in found:
                raise CheckpointError(f"{path / file}: tensor {name[:80]!r} is in another file too")
            found[name] = Lazy(
                tensor.dtype, tuple(tensor.shape), _reader(path / file, name), f"{path / file}: tensor {name[:80]}"
            )
    return found


def _reader(file: Path, name: str) -> Callable[[], torch.Tensor]:
    # Opened anew for each tensor: a mapping that lives on keeps every page that was touched.
    return lambda: _open(file)[name].contiguous()


def _open(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of the file, mapped. Raises CheckpointError."""
    size = _check_archive(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as exc:  # a hostile pickle can make the unpickler raise nearly anything
        reason = " ".join(str(exc).split())
        if "weights_only" in reason.lower() or "unsupported" in reason.lower():
            named = reason.split("GLOBAL ")[1].split(" ")[0] if "GLOBAL " in reason else "something other than tensors"
            raise CheckpointError(f"{file}: refused as unsafe, its pickle asks for {named[:80]}", hint=HINT) from exc
        raise CheckpointError(f"{file}: can't be read ({reason[:160]})", hint=HINT) from exc
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected a dict of tensors", hint=HINT)
    for name, tensor in content.items():
        _check_tensor(file, name, tensor, size)
    return dict(content)


def _check_tensor(file: Path, name: Any, tensor: Any, size: int) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{file}: {str(name)[:80]!r} is a {type(tensor).__name__}, expected a tensor", hint=HINT)
    # A view can claim terabytes of a few bytes (stride 0): the elements must fit into the file.
    if (
        tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or tensor.is_quantized
        or tensor.is_complex()
        or tensor.numel() * tensor.element_size() > size
    ):
        raise CheckpointError(f"{file}: tensor {name[:80]!r} is not a plain dense tensor", hint=HINT)


def _check_archive(file: Path) -> int:
    """The file's size, after its archive was found plausible. Raises CheckpointError."""
    try:
        size = os.path.getsize(file)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except OSError as exc:
        raise CheckpointError(f"{file}: can't be read ({exc.strerror})") from exc
    except Exception as exc:  # zipfile raises half a dozen kinds for a damaged directory
        raise CheckpointError(f"{file}: truncated, or not a file of torch.save ({exc})", hint=HINT) from exc
    if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
        raise CheckpointError(f"{file}: compressed entries, which torch never writes", hint=HINT)
    if sum(e.file_size for e in entries) > size or any(
        e.filename.endswith(".pkl") and e.file_size > _PICKLE_LIMIT for e in entries
    ):
        raise CheckpointError(f"{file}: its entries claim more than the file holds", hint=HINT)
    return size


# ---- writing -------------------------------------------------------------------------------------


def write(folder: storage.FolderWriter, found: dict[str, Lazy], tell: Callable[[str, int], None]) -> None:
    """pytorch_model.bin with `found`, a tensor at a time. Entries that are the same `Lazy` (a tied head) share their
    storage.

    torch.save lays the archive out for tensors whose memory was never touched, and leaves holes for their data
    (`skip_data`); each is then filled, and its CRC-32 entered where a zip archive has it.
    """
    path = folder.path / SINGLE
    distinct = {id(lazy): lazy for lazy in found.values()}
    outlines = {key: torch.empty(lazy.shape, dtype=lazy.dtype) for key, lazy in distinct.items()}
    try:
        with torch.serialization.skip_data():
            torch.save({name: outlines[id(lazy)] for name, lazy in found.items()}, path)
    except RuntimeError as exc:  # torch's writer keeps the system's reason to itself
        raise OSError(errno.EIO, f"{SINGLE} can't be written, the disk may be full") from exc
    del outlines
    names = {id(lazy): name for name, lazy in reversed(found.items())}
    with open(path, "r+b", buffering=0) as file:
        entries, directory = _records(path)
        sums = {}
        # torch numbers the storages in the order in which the dict has them
        for number, (key, lazy) in enumerate(distinct.items()):
            entry = entries[number]
            assert entry.file_size == lazy.nbytes, "not the archive that was laid out"
            data: Any = lazy.load().contiguous().reshape(-1).view(torch.uint8).numpy()
            begin = _data_offset(file, entry)
            _write_at(file, begin, data)
            sums[entry.filename] = zlib.crc32(data)
            assert os.pread(file.fileno(), 4, begin + lazy.nbytes) == _DESCRIPTOR
            _write_at(file, begin + lazy.nbytes + 4, struct.pack("<L", sums[entry.filename]))
            del data
            tell(names[key], lazy.nbytes)
        for name, offset in directory.items():
            if name in sums:
                _write_at(file, offset + 16, struct.pack("<L", sums[name]))
    for name in list(found)[len(distinct) :]:
        tell(name, 0)


def _records(path: Path) -> tuple[dict[int, zipfile.ZipInfo], dict[str, int]]:
    """The archive's storages by number, and where the central directory describes each entry."""
    with zipfile.ZipFile(path) as archive:
        entries, offset = archive.infolist(), archive.start_dir
    directory = {}
    with open(path, "rb") as file:
        for entry in entries:
            file.seek(offset)
            head = struct.unpack("<4s6H3L5H2L", file.read(46))
            assert head[0] == b"PK\x01\x02"
            directory[entry.filename] = offset
            offset += 46 + head[10] + head[11] + head[12]
    found = {int(e.filename.rsplit("/", 1)[1]): e for e in entries if e.filename.split("/")[1:2] == ["data"]}
    return found, directory


def _data_offset(file: Any, entry: zipfile.ZipInfo) -> int:
    name, extra = struct.unpack("<2H", os.pread(file.fileno(), 4, entry.header_offset + 26))
    return entry.header_offset + 30 + name + extra


def _write_at(file: Any, offset: int, data: Any) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        done = os.pwrite(file.fileno(), view[: 16 << 20], offset)
        view, offset = view[done:], offset + done
