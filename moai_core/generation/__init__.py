"""Generation: `generate` for prompts, `Session` for chats, `Settings` for how. Names load on first use: wrong settings
are told before transformers is loaded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moai_core.generation.engine import generate
    from moai_core.generation.row import Completion
    from moai_core.generation.sampling import Settings
    from moai_core.generation.session import Session

_HOME = {"Completion": "row", "Session": "session", "Settings": "sampling", "generate": "engine"}
__all__ = ["Completion", "Session", "Settings", "generate"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
