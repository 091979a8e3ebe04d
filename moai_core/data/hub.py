"""`hf://name[:config][/split]`: datasets of the Hugging Face hub, or a local folder laid out like one, streamed
through the datasets library.

The name is `dataset`, `user/dataset` or an absolute folder (`hf:///data/my set`); the split is train unless named. A
second component that is a usual split's name is the split (`hf://squad/validation`); `hf://name:/split` says it for
any name. Datasets that need code of their own are refused by the library itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from moai_core.errors import DataError, StorageError, shell

TIMEOUT = 10.0  # seconds
_SPLITS = ("train", "validation", "valid", "test", "dev")


def parse_hub(path: str) -> tuple[str, str | None, str]:
    """(name, config or None, split) of an `hf://` path. Raises DataError."""
    body = path.removeprefix("hf://").rstrip("/")
    if body.startswith("/"):
        name, colon, tail = body.rpartition(":") if ":" in body else (body, "", "")
    else:
        name, colon, tail = body.partition(":")
    config, _, split = tail.partition("/")
    if not colon and not name.startswith("/"):
        pieces = name.split("/")
        if len(pieces) == 3 or (len(pieces) == 2 and pieces[1] in _SPLITS):
            name, split = "/".join(pieces[:-1]), pieces[-1]
    if not name or (not name.startswith("/") and (name.count("/") > 1 or "" in name.split("/"))):
        raise DataError(
            f"{path}: expected hf://name[:config][/split]",
            hint="for example hf://wikimedia/wikipedia:20231101.ko/train",
        )
    return name, config or None, split or "train"


def open_hub(path: str) -> Any:
    """The `datasets.IterableDataset` behind an `hf://` path; nothing is downloaded ahead. Without a connection, what
    the library's cache holds. Raises DataError with the library's reason, StorageError where the hub can't be reached.
    """
    import datasets

    name, config, split = parse_hub(path)
    if name.startswith("/") and not Path(name).is_dir():
        raise DataError(f"{path}: no such folder: {name}")
    datasets.disable_progress_bars()
    silent = None if name.startswith("/") else unreachable(name, "dataset")
    try:
        with nullcontext() if silent is None else _offline():
            return datasets.load_dataset(name, config, split=split, streaming=True)
    except (
        Exception
    ) as exc:  # the library raises some twenty kinds here, from ConnectionError to ValueError; each carries its reason
        if silent is None:
            raise hub_error(path, exc) from exc
        raise StorageError(
            f"{path}: not in the cache, and the hub can't be reached ({reason(silent)})",
            hint="go online; or give a folder, as "
            f"`hf download --repo-type dataset {shell(name)} --local-dir DIR` fetches one where there is a connection",
        ) from silent


def unreachable(name: str, kind: str) -> Exception | None:
    """Why the hub doesn't answer when asked for a "dataset" or "model"; None where it does. One request: the library's
    own would be tried again for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
    except HfHubHTTPError:
        return None  # it does; what it says is the library's to tell
    except Exception as exc:  # httpx, requests and the library's own offline mode each raise their own
        return exc
    return None


@contextmanager
def _offline() -> Iterator[None]:
    """The datasets library looks into its cache alone."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def reason(exc: Exception) -> str:
    """Why the hub can't be reached, in one line."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(exc, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:160]


def hub_error(path: str, exc: Exception) -> DataError:
    """The DataError for what the datasets library raised."""
    lines = str(exc).splitlines() or [""]
    hint = "check name, config, split and the connection; a gated dataset needs `hf auth login`"
    return DataError(f"{path}: {type(exc).__name__}: {lines[0][:200]}", hint=hint)
