"""Folders that are either whole or not there: atomic writing with a manifest, verification, purging.

Why: training is killed at any moment, disks fill up and bits flip (safetensors alone notices almost none of them). A
folder is written as `NAME.tmp-PID`: every file is flushed to the disk, `manifest.json` (size and SHA-256 of each file,
and of itself) comes last, all of it is read back and compared, and only then it is renamed to NAME. So a folder under
its final name was whole once, and damage that comes later shows. Other temporary names: `NAME.old-PID` is being
replaced, `NAME.del-PID` is being deleted. What the files mean is left to the callers (checkpoint.py, weights.py).
POSIX only (fsync of folders).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from moai_core import paths
from moai_core.errors import CheckpointError, LockedError, StorageError, storage_error
from moai_core.locks import is_locked_here, lock

MANIFEST = "manifest.json"
_DAMAGED = "copy the folder again from where it came, or take another checkpoint"
_CHUNK = 16 << 20
_MANIFEST_LIMIT = 8 << 20
_STEP = re.compile(r"step-(0|[1-9]\d{0,15})")
_TEMPORARY = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old|del)-(?P<pid>[1-9]\d{0,9})")

# The temporary folders that this process has under way.
_writing: set[Path] = set()
os.register_at_fork(after_in_child=_writing.clear)


# ---- writing -------------------------------------------------------------------------------------


def _write(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Create `path` from bytes-like chunks, flush it, drop it from the cache; returns its manifest entry."""
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            size += len(view)
            while len(view):
                view = view[os.write(fd, view[:_CHUNK]) :]
        _flush(fd)
    finally:
        os.close(fd)
    return {"size": size, "sha256": digest.hexdigest()}


def _flush(fd: int) -> None:
    os.fsync(fd)
    if hasattr(os, "posix_fadvise"):  # what is read back afterwards then comes from the disk, not from memory
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FolderWriter:
    """The folder under way in `new_folder`. It lies at `path` for now; other libraries may write files there too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, chunks: Iterable[Any] | bytes) -> None:
        """Write one file from bytes or an iterable of bytes-like chunks; it is hashed on the way, then flushed."""
        self.files[name] = _write(self.path / name, [chunks] if isinstance(chunks, bytes) else chunks)

    def _adopt(self) -> None:
        """Flush and hash what others wrote here."""
        for path in sorted(self.path.iterdir()):
            if path.name not in self.files:
                with open(path, "rb") as file:
                    _flush(file.fileno())
                self.files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}


@contextmanager
def new_folder(final: Path, *, replace: bool = True) -> Iterator[FolderWriter]:
    """Write a folder that appears as `final` complete, flushed and verified, or not at all; replaces one of that name,
    or with replace=False only an empty one.

    Raises StorageError (disk full, no permission, what was written reads back damaged, `final` made by somebody else
    meanwhile); nothing temporary is left then and an older `final` is intact.
    """
    final = Path(os.path.abspath(final))
    tmp = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    writer = FolderWriter(tmp)
    _writing.add(tmp)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if tmp.exists():  # left by a killed process that had our number
            shutil.rmtree(tmp)
        os.mkdir(tmp)
        yield writer
        writer._adopt()
        _write(tmp / MANIFEST, [_manifest_bytes(writer.files)])
        _sync_folder(tmp)
        try:
            verify(tmp)
        except CheckpointError as exc:
            raise StorageError(f"{final}: what was written reads back damaged ({exc})", hint="check the disk") from exc
        if not replace:
            check_free(final)
        _replace(tmp, final)
    except BaseException as exc:
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(exc, OSError):
            raise storage_error(exc, final) from exc
        raise
    finally:
        _writing.discard(tmp)


def check_free(final: Path) -> None:
    """Raises StorageError where `final` has come to exist since the work on it began, unless as an empty folder."""
    if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        raise StorageError(
            f"{final}: another process has made it meanwhile",
            hint="its result is kept; choose another name, or --force",
        )


def _replace(tmp: Path, final: Path) -> None:
    old = None
    if os.path.lexists(final):
        old = final.with_name(f"{final.name}.old-{os.getpid()}")
        os.rename(final, old)
    try:
        os.rename(tmp, final)
    except OSError:
        if old:
            os.rename(old, final)
        raise
    _sync_folder(final.parent)
    if old:  # a failure here costs space, not data: `tidy` tries again later
        shutil.rmtree(old, ignore_errors=True)


def write_file(path: str | os.PathLike[str], chunks: Iterable[Any] | bytes) -> None:
    """Write one file atomically (temporary name, flush, rename); a link's target is written, and the link stays.
    Raises StorageError, also for a device, pipe or folder, which is never replaced; nothing temporary is left."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise StorageError(f"{path}: is not a regular file", hint="give the name of a file")
    tmp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        tmp.unlink(missing_ok=True)
        _write(tmp, [chunks] if isinstance(chunks, bytes) else chunks)
        os.replace(tmp, path)
        _sync_folder(path.parent)
    except BaseException as exc:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise storage_error(exc, path) from exc
        raise


# ---- the manifest --------------------------------------------------------------------------------


def _manifest_bytes(files: dict[str, Any]) -> bytes:
    body: dict[str, Any] = {"format": 1, "files": dict(sorted(files.items()))}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def json_bytes(value: Any) -> bytes:
    """`value` as the bytes of a JSON file."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, *, limit: int = _MANIFEST_LIMIT) -> Any:
    """JSON from a file that nobody vouches for: at most `limit` bytes, UTF-8, no key twice. Raises CheckpointError."""
    return parse_json(read_limited(path, limit), str(path))


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a file that nobody vouches for, at most `limit` of them. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as exc:
        raise CheckpointError(f"{path}: can't be read ({exc.strerror})") from exc
    if len(raw) > limit:
        raise CheckpointError(f"{path}: larger than the {limit >> 20} MiB such a file may have")
    return raw


def parse_json(raw: bytes, where: str) -> Any:
    """The value in `raw`; broken, too deep or ambiguous (a key twice) JSON raises CheckpointError naming `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key appears twice")
        return made

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{where}: not valid JSON ({str(exc).splitlines()[0][:100]})") from exc


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """`{file: {"size", "sha256"}}` of a folder written by `new_folder`.

    Raises CheckpointError if the manifest is missing or not, byte for byte, as it was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: incomplete ({MANIFEST} is missing)", hint=_DAMAGED)
    raw = read_limited(path, _MANIFEST_LIMIT)
    body = parse_json(raw, str(path))
    files = body.get("files") if isinstance(body, dict) else None
    if not isinstance(files, dict) or raw != _manifest_bytes(files):
        raise CheckpointError(f"{path}: damaged (it doesn't match its own checksum)", hint=_DAMAGED)
    for name, entry in files.items():
        if not plain_name(name) or not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise CheckpointError(f"{path}: the entry {name[:80]!r} is malformed", hint=_DAMAGED)
    return files


def plain_name(name: object) -> bool:
    """Whether `name` is a bare file name: no folder, no `..`, no control character."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & {"/", "\\"}


def verify(folder: str | os.PathLike[str], *, only: Callable[[str], bool] | None = None) -> None:
    """Compare every file (or those whose name `only` accepts) with the manifest, sizes first.

    Raises CheckpointError naming the file and the reason.
    """
    folder = Path(folder)
    files = {name: entry for name, entry in read_manifest(folder).items() if only is None or only(name)}
    check_sizes(folder, files)

    def check(name: str) -> str | None:
        try:
            same = sha256(folder / name) == files[name]["sha256"]
            return None if same else "damaged (SHA-256 differs from the manifest's)"
        except OSError as exc:
            return f"can't be read ({exc.strerror})"

    with ThreadPoolExecutor(min(4, len(files) or 1)) as pool:
        for name, why in zip(files, pool.map(check, files), strict=True):
            if why:
                raise CheckpointError(f"{folder / name}: {why}", hint=_DAMAGED)


def check_sizes(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """The cheap half of `verify`: every file is there with the size of the manifest. Raises CheckpointError."""
    for name, entry in files.items():
        try:
            found = os.stat(folder / name)
        except OSError as exc:
            raise CheckpointError(f"{folder / name}: missing or can't be read ({exc.strerror})", hint=_DAMAGED) from exc
        if not stat.S_ISREG(found.st_mode) or found.st_size != entry["size"]:
            raise CheckpointError(
                f"{folder / name}: damaged ({found.st_size} bytes, the manifest says {entry['size']})",
                hint=_DAMAGED,
            )


# ---- the steps of a run --------------------------------------------------------------------------


def steps(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """`(N, run_dir/step-N)` for each such folder, ascending; complete or not."""
    try:
        names = os.listdir(run_dir)
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise storage_error(exc, run_dir) from exc
    found = [(int(match[1]), Path(run_dir) / name) for name in names if (match := _STEP.fullmatch(name))]
    return sorted((step, path) for step, path in found if path.is_dir())


def tokenizer_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder that a tokenizer's name stands for: a folder itself, of a run folder its newest step with a tokenizer,
    or, by name, a tokenizer or a model that comes with moai. None where there is no such folder.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        own = paths.TOKENIZERS / path
        return (own if own.is_dir() else paths.pretrained(path.name)) if len(path.parts) == 1 else None
    if not (path / "tokenizer.json").exists():
        held = [step for _, step in steps(path) if (step / "tokenizer.json").exists()]
        path = held[-1] if held else path
    return path


def purge(run_dir: Path, *, newest: int, keep_last: int, spare: int | None = None) -> None:
    """Delete the oldest complete steps up to `newest`, which the caller has verified, until `keep_last` of them remain;
    the step `spare` stays in any case.

    Complete means that the manifest is intact and the sizes agree; others don't count and are not touched. Raises
    StorageError.
    """
    complete = []
    for step, path in steps(run_dir):
        if step <= newest:
            with suppress(CheckpointError):
                check_sizes(path, read_manifest(path))
                complete.append((step, path))
    try:
        for path in (path for step, path in complete[: -max(1, keep_last)] if step != spare):
            trash = path.with_name(f"{path.name}.del-{os.getpid()}")
            os.rename(path, trash)
            shutil.rmtree(trash)
    except OSError as exc:
        raise storage_error(exc, run_dir) from exc


def tidy(run_dir: Path) -> list[Path]:
    """Remove what dead processes left half done in `run_dir`; returns the paths.

    What a live process is writing is left alone, and so is all of a run that another process has locked or that is
    read-only.
    """
    try:
        names = os.listdir(run_dir)
    except OSError:
        return []
    named = [(run_dir / name, match) for name in names if (match := _TEMPORARY.fullmatch(name))]
    stale = [(path, match) for path, match in named if _is_stale(path, int(match["pid"]))]
    if not stale:
        return []
    try:
        # The lock's holder may write from another machine, where its PID means something: nobody cleans without it.
        with nullcontext() if is_locked_here(run_dir) else lock(run_dir):
            for path, match in stale:
                final = run_dir / match["name"]
                if match["kind"] == "old" and not final.exists():  # killed between the two renames of a replacement
                    os.rename(path, final)
                elif path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
    except (LockedError, StorageError, OSError):
        return []
    return [path for path, _ in stale]


def sweep(final: Path) -> list[Path]:
    """Remove what dead processes of this machine left half done of `final` (`NAME.tmp-PID` beside it); returns the
    paths. For a name that no run's lock guards. Never raises.
    """
    try:
        names = os.listdir(final.parent)
    except OSError:
        return []
    swept = []
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        path = final.parent / name
        if match and match["name"] == final.name and match["kind"] == "tmp" and _is_stale(path, int(match["pid"])):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                swept.append(path)
    return swept


def _is_stale(path: Path, pid: int) -> bool:
    if pid == os.getpid():
        return Path(os.path.abspath(path)) not in _writing
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False
