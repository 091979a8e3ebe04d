"""`owner/name`: a model of the Hugging Face hub, of which only the files that a conversion reads are fetched.

What the library's cache holds is used without a connection. `owner/name/file.gguf` names one file of a repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from moai_core.convert.folder import FILES
from moai_core.convert.source import OnEvent
from moai_core.data.hub import TIMEOUT, reason
from moai_core.errors import StorageError, UsageError

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[\w.-]+\.gguf))?")
_ALWAYS = ("config.json", *FILES)
_KINDS = (".safetensors", ".bin", ".gguf")


def is_name(text: str) -> bool:
    """Whether `text` looks like a name of the hub."""
    return _NAME.fullmatch(text) is not None and not text.startswith((".", "/"))


def fetch(name: str, on_event: OnEvent | None = None) -> Path:
    """The folder (or .gguf file) with the files of `name`. Raises UsageError: no such model, or several GGUF files;
    StorageError: not in the cache, and the hub can't be reached.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    match = _NAME.fullmatch(name)
    assert match
    repo, file = match["repo"], match["file"]
    try:
        # One request without retries: where there is no connection, that is said at once.
        there = [file.rfilename for file in hub.HfApi().model_info(repo, timeout=TIMEOUT).siblings or []]
    except RepositoryNotFoundError as exc:
        gated = isinstance(exc, GatedRepoError)
        raise UsageError(
            f"{name}: {'its owner must let you in first' if gated else 'neither a path here nor a model of the hub'}",
            hint="`hf auth login` for a private or gated model",
        ) from exc
    except Exception as exc:  # no connection: httpx, requests and the library's own offline mode each raise their own
        return _cached(name, repo, file, exc)
    if on_event is not None:
        on_event({"event": "fetch", "name": name})
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=_needed(name, there, file))) / (file or "")
    except (LocalEntryNotFoundError, OSError, RuntimeError) as exc:
        raise StorageError(
            f"{name}: fetching failed ({reason(exc)})", hint="run the same command again: what was fetched is kept"
        ) from exc


def _cached(name: str, repo: str, file: str | None, cause: Exception) -> Path:
    import huggingface_hub as hub

    try:
        folder = Path(hub.snapshot_download(repo, local_files_only=True))
    except Exception as exc:
        raise StorageError(
            f"{name}: no such path, and the hub can't be reached ({reason(cause)})",
            hint="go online, or give a folder that is here",
        ) from exc
    if file and not (folder / file).is_file():
        raise StorageError(f"{name}: not in the cache, and the hub can't be reached ({reason(cause)})")
    return folder / (file or "")


def _needed(name: str, there: list[str], file: str | None) -> list[str]:
    """Of a repository's files, those to fetch: the weights in one kind, and what lies around them."""
    top = [entry for entry in there if "/" not in entry]
    if file:
        if file not in top:
            raise UsageError(f"{name}: the repository has no such file")
        return [file]
    around = [entry for entry in top if entry in _ALWAYS]
    for kind in _KINDS:
        if kind == ".gguf":
            found = [entry for entry in top if entry.endswith(kind)]
            if len(found) > 1:
                raise UsageError(f"{name}: has {len(found)} GGUF files", hint=f"name one: {name}/{sorted(found)[0]}")
        else:
            stem = "model" if kind == ".safetensors" else "pytorch_model"
            found = [e for e in top if e.startswith(stem) and e.endswith((kind, f"{kind}.index.json"))]
        if found:
            return around + found
    raise UsageError(f"{name}: has no weights at its top level ({', '.join(_KINDS)})")
