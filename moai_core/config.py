"""The numbers that define a model: field names, defaults, presets and their checks. Plain Python, free of torch and
transformers.
 `MoaiMambaConfig` (moai_core/model/configuration.py) is the transformers face of these fields; recipes and the planner
use them directly. Field names are those of MOAI's JSON files, so that JSON written for it loads unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from moai_core.errors import UsageError

MODEL_TYPE = "mamba_moai"

# One entry a field: its default. time_step_rank None means hidden_size // 16 and dt_bc_norm_eps None means
# rms_norm_eps.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 128000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "state_size": 16,
    "conv_kernel_size": 4,
    "expand_factor": 2,
    "time_step_rank": None,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "use_fast_scan": True,
    "use_checkpoint": False,
    "quantization_bits": 4,
    "use_quantization": False,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mixer": "mamba",
    "ffn": "swiglu",
    "dt_bc_norm": True,
    "dt_bc_norm_eps": None,
    "residual_in_fp32": False,
    "tie_word_embeddings": False,
}

MIXERS = ("mamba",)
FFNS = ("swiglu", "none")

# The widths of 8b and 16b are chosen to meet ~8.2 B and ~16.4 B parameters and to be multiples of 128, the usual
# quantization group.
PRESETS: dict[str, dict[str, Any]] = {
    "2b": {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632, "use_checkpoint": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 40, "intermediate_size": 6016, "use_checkpoint": True},
    "16b": {"hidden_size": 5120, "num_hidden_layers": 48, "intermediate_size": 9728, "use_checkpoint": True},
}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "state_size",
    "conv_kernel_size",
    "expand_factor",
    "time_step_rank",
    "max_position_embeddings",
)


def fields(preset: str | None = None, /, **overrides: Any) -> dict[str, Any]:
    """All model fields with derived ones filled in: the defaults, then the preset's, then `overrides`.

    Raises UsageError for an unknown preset or field (naming the nearest) and for values no model can have.
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"unknown model size {preset!r}", hint=f"sizes: {', '.join(PRESETS)}")
    for name in overrides:
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, DEFAULTS, 1)
            raise UsageError(
                f"unknown model field {name!r}",
                hint=f"did you mean {near[0]}?" if near else f"fields: {', '.join(DEFAULTS)}",
            )
    values = {**DEFAULTS, **(PRESETS[preset] if preset else {}), **overrides}
    if values["time_step_rank"] is None:
        values["time_step_rank"] = (
            max(1, values["hidden_size"] // 16) if isinstance(values["hidden_size"], int) else None
        )
    if values["dt_bc_norm_eps"] is None:
        values["dt_bc_norm_eps"] = values["rms_norm_eps"]
    check(values)
    return values


def check(values: Mapping[str, Any]) -> None:
    """Raises UsageError naming the first field whose value no model can have."""
    for name in _POSITIVE:
        value = values[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"model field {name} must be an integer >= 1 (got {value!r})")
    if values["ffn"] != "none" and (
        not isinstance(values["intermediate_size"], int) or values["intermediate_size"] < 1
    ):
        raise UsageError(f"model field intermediate_size must be an integer >= 1 (got {values['intermediate_size']!r})")
    if values["conv_kernel_size"] < 2:
        raise UsageError(f"model field conv_kernel_size must be >= 2 (got {values['conv_kernel_size']})")
    for name in ("rms_norm_eps", "dt_bc_norm_eps", "initializer_range"):
        value = values[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
            raise UsageError(f"model field {name} must be a number between 0 and 1 (got {value!r})")
    for name, known in (("mixer", MIXERS), ("ffn", FFNS)):
        if values[name] not in known:
            raise UsageError(f"model field {name} must be one of {', '.join(known)} (got {values[name]!r})")
    for name in (
        "use_fast_scan",
        "use_checkpoint",
        "use_quantization",
        "dt_bc_norm",
        "residual_in_fp32",
        "tie_word_embeddings",
    ):
        if not isinstance(values[name], bool):
            raise UsageError(f"model field {name} must be true or false (got {values[name]!r})")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = values[name]
        ids = value if isinstance(value, list) else [value]
        if any(i is not None and (not isinstance(i, int) or not 0 <= i < values["vocab_size"]) for i in ids):
            raise UsageError(
                f"model field {name} must lie between 0 and vocab_size - 1 = {values['vocab_size'] - 1} (got {value!r})"
            )
