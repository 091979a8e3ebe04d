"""The part of `moai doctor` that works without torch: installed versions and the folders moai uses. Each finding is a
plain dict.

`ok` is True, False where moai can't work so, and None for an optional package that is absent or too old; `why` and
`hint` say what and what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moai_core import paths

_LOW_DISK = 1 << 30

Finding = dict[str, Any]


def versions() -> Iterator[Finding]:
    """Each dependency: name, version or None, `ok` (None where it is optional and absent), and how to install it."""
    from packaging.requirements import Requirement

    yield {"name": "python", "version": platform.python_version(), "ok": True, "why": None, "hint": None}
    needs: dict[str, tuple[Requirement, list[str]]] = {}
    try:
        required = importlib.metadata.requires("moai") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
        bare = "not installed: this runs from a bare checkout, whose dependencies can't be checked"
        yield {"name": "moai", "version": None, "ok": None, "why": bare, "hint": "pip install -e ."}
    for text in required:
        need = Requirement(text)
        extra = str(need.marker).partition("extra == ")[2].strip("\"'") if need.marker else ""
        if extra not in ("test", "dev") and need.name != "moai":
            needs.setdefault(need.name, (need, []))[1].append(extra)
    for name, (need, extras) in needs.items():
        extra = min(extras, key=len)
        version = _version(name)
        fine = version is not None and need.specifier.contains(version, prereleases=True)
        why = None if fine else "not installed" if version is None else f"needs {need.specifier}"
        hint = f"pip install 'moai[{extra}]'" if extra else f"pip install '{name}{need.specifier}'"
        ok = True if fine else None if extra else False
        yield {"name": name, "version": version, "ok": ok, "why": why, "hint": None if fine else hint}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def folders() -> Iterator[Finding]:
    """Packaged data, cache and current folder: where they are, free bytes, and whether they can be used."""
    for name, folder in (("recipes", paths.RECIPES), ("tokenizers", paths.TOKENIZERS)):
        ok = folder.is_dir() and any(folder.iterdir())
        hint = None if ok else "reinstall moai"
        yield {
            "name": name,
            "path": str(folder),
            "free": None,
            "ok": ok,
            "why": None if ok else "missing or empty",
            "hint": hint,
        }
    for name, folder, hint in (
        ("cache", paths.cache_dir(), "set MOAI_CACHE to a folder you may write to"),
        ("current folder", Path.cwd(), "go to a folder you may write to"),
    ):
        why = _writable(folder)
        free = None if why else shutil.disk_usage(_existing(folder)).free
        low = free is not None and free < _LOW_DISK
        yield {
            "name": name,
            "path": str(folder),
            "free": free,
            "ok": why is None,
            "why": why or (f"only {free / 1e9:.1f} GB free" if low and free is not None else None),
            "hint": hint if why else "free some space" if low else None,
        }


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.parents) if one.exists())


def _writable(folder: Path) -> str | None:
    """None when a file can be made where `folder` is or would be; else why not."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder.absolute())) as file:
            file.write(os.urandom(16))
    except OSError as exc:
        return f"not writable: {exc.strerror or exc}"
    return None
