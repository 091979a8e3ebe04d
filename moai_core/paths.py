"""Where the data that travels with moai lies: recipes, tokenizers and a trained model, from a checkout or an installed
wheel; and the cache.

An editable install runs from the checkout, where `recipes/` and `tokenizers/` stand beside the packages; a wheel
carries them inside `moai_core/_share` (an installed top-level `tokenizers/` would shadow the library of that name).
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _share(kind: str) -> Path:
    inside = _PACKAGE / "_share" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


RECIPES = _share("recipes")
TOKENIZERS = _share("tokenizers")
# Folders of models, by name; the first is what commands use that are given none.
PRETRAINED = _PACKAGE / "pretrained"
MODELS = ("moai-30m",)


def pretrained(name: str = MODELS[0]) -> Path | None:
    """The folder of a model that comes with moai, or None where there is none of that name."""
    folder = PRETRAINED / name
    return folder if name in MODELS and (folder / "config.json").is_file() else None


def cache_dir() -> Path:
    """Folder for what can be made again (tokenized text, compiled kernels): $MOAI_CACHE, else $XDG_CACHE_HOME/moai,
    else ~/.cache/moai.
    """
    if chosen := os.environ.get("MOAI_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moai"
