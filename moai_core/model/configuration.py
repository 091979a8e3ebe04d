"""`MoaiMambaConfig`: the model fields as a transformers configuration, and the two ways to make one by name.

Fields, defaults and presets live in moai_core/config.py; this file only gives them the `PreTrainedConfig` face that
`from_pretrained`, `AutoConfig` and `generate` expect.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from moai_core import config as numbers
from moai_core.errors import CheckpointError, UsageError, storage_error


class MoaiMambaConfig(PreTrainedConfig):
    """Configuration of a `MoaiMambaForCausalLM`; every argument is optional and defaults to moai_core.config.DEFAULTS.

    Letters used across the code: H hidden_size, I = expand_factor * H inner width, N state_size, K conv_kernel_size, R
    time_step_rank (default H // 16), V vocab_size. `max_position_embeddings` is a training length, not a limit.
    `use_fast_scan: false` selects the reference scan. `use_checkpoint` recomputes layers in the backward pass.
    `dt_bc_norm` adds RMSNorms on dt, B and C (Jamba, arXiv 2403.19887). `quantization_bits` and `use_quantization` are
    kept true by the quantizers; `quantization` says which modules are stored in which
    format (moai_core/quant/linear.py, `plan`).

    Raises UsageError for a value that no model can have.
    """

    model_type = numbers.MODEL_TYPE

    vocab_size: int = numbers.DEFAULTS["vocab_size"]
    hidden_size: int = numbers.DEFAULTS["hidden_size"]
    intermediate_size: int = numbers.DEFAULTS["intermediate_size"]
    num_hidden_layers: int = numbers.DEFAULTS["num_hidden_layers"]
    state_size: int = numbers.DEFAULTS["state_size"]
    conv_kernel_size: int = numbers.DEFAULTS["conv_kernel_size"]
    expand_factor: int = numbers.DEFAULTS["expand_factor"]
    time_step_rank: int | None = numbers.DEFAULTS["time_step_rank"]
    max_position_embeddings: int = numbers.DEFAULTS["max_position_embeddings"]
    rms_norm_eps: float = numbers.DEFAULTS["rms_norm_eps"]
    use_fast_scan: bool = numbers.DEFAULTS["use_fast_scan"]
    use_checkpoint: bool = numbers.DEFAULTS["use_checkpoint"]
    quantization_bits: int = numbers.DEFAULTS["quantization_bits"]
    use_quantization: bool = numbers.DEFAULTS["use_quantization"]
    initializer_range: float = numbers.DEFAULTS["initializer_range"]
    pad_token_id: int | None = numbers.DEFAULTS["pad_token_id"]
    bos_token_id: int | None = numbers.DEFAULTS["bos_token_id"]
    eos_token_id: int | list[int] | None = numbers.DEFAULTS["eos_token_id"]
    mixer: str = numbers.DEFAULTS["mixer"]
    ffn: str = numbers.DEFAULTS["ffn"]
    dt_bc_norm: bool = numbers.DEFAULTS["dt_bc_norm"]
    dt_bc_norm_eps: float | None = numbers.DEFAULTS["dt_bc_norm_eps"]
    residual_in_fp32: bool = numbers.DEFAULTS["residual_in_fp32"]
    tie_word_embeddings: bool = numbers.DEFAULTS["tie_word_embeddings"]
    use_cache: bool = True
    quantization: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        values = numbers.fields(**{name: getattr(self, name) for name in numbers.DEFAULTS})
        self.time_step_rank = values["time_step_rank"]
        self.dt_bc_norm_eps = values["dt_bc_norm_eps"]
        super().__post_init__(**kwargs)

    @property
    def inner_size(self) -> int:
        """I, the width of the scan: expand_factor * hidden_size."""
        return self.expand_factor * self.hidden_size

    def numbers(self) -> dict[str, Any]:
        """The model fields as plain numbers, as moai_core.config.fields gives them."""
        return {name: getattr(self, name) for name in numbers.DEFAULTS}


def get_mamba_config(size: str = "2b", **overrides: Any) -> MoaiMambaConfig:
    """The preset configuration `2b`, `8b` or `16b`, with any field overridden.

    Raises UsageError for an unknown size or field.
    """
    return MoaiMambaConfig(**numbers.fields(size, **overrides))


def load_mamba_config(path: str | Path) -> MoaiMambaConfig:
    """Reads a configuration from a JSON file (or a folder that holds config.json).

    Raises UsageError where the file is no JSON object or a value is impossible, CheckpointError for another model type,
    StorageError if it can't be read.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise storage_error(exc, file) from exc
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
        line = f"{exc.lineno}: " if isinstance(exc, json.JSONDecodeError) else " "
        raise UsageError(f"{file}:{line}not valid JSON ({exc})") from exc
    if not isinstance(values, dict):
        raise UsageError(f"{file}: expected a JSON object with model fields, got {type(values).__name__}")
    kind = values.pop("model_type", numbers.MODEL_TYPE)
    if kind != numbers.MODEL_TYPE:
        raise CheckpointError(f"{file}: model_type is {kind!r}, expected {numbers.MODEL_TYPE!r}")
    known = {f.name for f in dataclasses.fields(MoaiMambaConfig)}
    for name in values:
        if name not in known and not name.startswith("_") and name != "torch_dtype":
            raise UsageError(f"{file}: unknown model field {name!r}", hint="moai_core.config.DEFAULTS lists the fields")
    try:
        return MoaiMambaConfig(**values)
    except UsageError as exc:
        raise UsageError(f"{file}: {exc.message}", hint=exc.hint) from exc
    except Exception as exc:
        # transformers' strict dataclasses raise their own family of errors for a value of the wrong type
        raise UsageError(f"{file}: {' '.join(str(exc).split())}") from exc
