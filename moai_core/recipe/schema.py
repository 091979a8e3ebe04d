"""What a recipe may say: one dataclass a section; type, default, range and a line of help a field.

The dataclasses are the schema, the value types of `Recipe`, and the source of `moai recipes show --schema`. Reading
and merging are elsewhere.
"""

# ruff: noqa: RUF009 (a helper that calls dataclasses.field is as good as the original)

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moai_core import config


def _f(default: Any, help: str, **limits: Any) -> Any:
    """A schema field. limits: min, max (inclusive), above, below (exclusive); path=True for what is relative to the
    recipe's folder; named=True for sources that may come as
    a mapping of names; brief=True for what is left out of stored recipes while it is null."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Model:
    """The network: a preset size and any field of `MoaiMambaConfig`; null means the preset's value, else the config's
    default."""

    preset: Literal["2b", "8b", "16b"] | None = _f(None, "size to start from")
    scan: str = _f("auto", "scan backend; a backend named here never falls back to another")
    vocab_size: int | None = _f(
        None, "rows of the embedding; null: the tokenizer's size, without tokenizer the preset's", min=1
    )
    hidden_size: int | None = _f(None, "width H of the residual stream", min=1)
    intermediate_size: int | None = _f(None, "width of the SwiGLU feed-forward", min=1)
    num_hidden_layers: int | None = _f(None, "number of layers", min=1)
    state_size: int | None = _f(None, "state N a channel", min=1)
    conv_kernel_size: int | None = _f(None, "width K of the causal convolution", min=2)
    expand_factor: int | None = _f(None, "inner width I = expand_factor * H", min=1)
    time_step_rank: int | None = _f(None, "rank R of the time-step projection; null: H // 16", min=1)
    max_position_embeddings: int | None = _f(None, "longest length seen in training; not a limit", min=1)
    rms_norm_eps: float | None = _f(None, "epsilon of the RMS norms", above=0, below=1)
    use_fast_scan: bool | None = _f(None, "false asks for the reference scan")
    use_checkpoint: bool | None = _f(
        None, "gradient checkpointing stored in the model's config; train.checkpointing decides a run"
    )
    quantization_bits: int | None = _f(None, "bits used when use_quantization is true", min=2, max=8)
    use_quantization: bool | None = _f(None, "stored for the specification's JSON files")
    initializer_range: float | None = _f(None, "standard deviation of the initial weights", above=0, below=1)
    pad_token_id: int | None = _f(None, "id of <pad>", min=0)
    bos_token_id: int | None = _f(None, "id of <s>", min=0)
    eos_token_id: int | None = _f(None, "id of </s>, which ends a document", min=0)
    mixer: str | None = _f(None, "sequence mixer")
    ffn: str | None = _f(None, "feed-forward")
    dt_bc_norm: bool | None = _f(None, "RMS norms on dt, B and C")
    dt_bc_norm_eps: float | None = _f(None, "epsilon of those norms; null: rms_norm_eps", above=0, below=1)
    residual_in_fp32: bool | None = _f(None, "keep the residual stream in fp32")
    tie_word_embeddings: bool | None = _f(None, "share the embedding with the head")

    def overrides(self) -> dict[str, Any]:
        """The config fields this recipe sets, ready for `config.fields(preset, **overrides)` or `get_mamba_config`."""
        return {k: v for k, v in items(self) if k not in ("preset", "scan") and v is not None}

    def numbers(self) -> dict[str, Any]:
        """All config fields with the preset's and default values filled in."""
        return config.fields(self.preset, **self.overrides())


# The kinds of records of moai_core/data/records.py and their aliases; this layer can't import them, so a test holds
# the two together.
Format = Literal[
    "auto", "text", "messages", "conversations", "instruction", "prompt",
    "chat", "openai", "chatml", "sharegpt", "alpaca", "completion",
]  # fmt: skip
TrainOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class Source:
    """One part of a mixture."""

    path: str = _f(dataclasses.MISSING, "file, folder, glob or hf://dataset", path=True)
    weight: float = _f(1.0, "share of the mixture, relative to the other parts", above=0)
    format: Format | None = _f(None, "record format; null: data.format")
    train_on: TrainOn | None = _f(None, "null: data.train_on")
    name: str | None = _f(None, "of data.valid: figures of the parts with this name are told apart", brief=True)


Sources = tuple[Source, ...]


@dataclass(frozen=True)
class Data:
    """Text to train and validate on."""

    train: Sources | None = _f(
        None, "path (file, folder, glob, hf://dataset), or a list of {path, weight, format, train_on}"
    )
    valid: Sources | None = _f(
        None, "the same for validation, or a mapping of names to these; null: a share of train is held out", named=True
    )
    valid_fraction: float = _f(0.01, "share of the documents held out when valid is null", min=0, below=1)
    max_length: int = _f(2048, "tokens a row", min=8)
    format: Format = _f("auto", "record format; auto: detected per file")
    on_error: Literal["stop", "skip"] = _f("stop", "a bad line stops with file:line, or is skipped and counted")
    train_on: TrainOn = _f("assistant", "which turns of a chat record carry loss")
    streaming: bool | Literal["auto"] = _f("auto", "read while training instead of tokenizing into the cache first")
    shuffle: bool = _f(True, "shuffle rows, from train.seed")
    workers: int = _f(0, "loader processes a rank", min=0, max=256)
    cache: str | None = _f(None, "folder of tokenized text; null: moai's cache folder", path=True)


@dataclass(frozen=True)
class Optim:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adamw_bf16", "adamw_8bit"] = _f(
        "adamw", "adamw: fp32 states; adamw_bf16: bf16 states, stochastic rounding; adamw_8bit: bitsandbytes"
    )
    lr: float = _f(1e-4, "peak learning rate", above=0, max=10)
    finetune_lr: float | None = _f(
        None, "peak learning rate when training starts from --model; null: lr", above=0, max=10
    )
    betas: tuple[float, float] = _f((0.9, 0.95), "decay of the first and second moment", min=0, below=1)
    eps: float = _f(1e-8, "added to the root of the second moment", above=0, max=1)
    weight_decay: float = _f(0.01, "decoupled weight decay; never on A_log, D, dt_bias and norms", min=0, max=1)
    clip: float | None = _f(1.0, "largest gradient norm; null: no clipping", above=0)
    in_backward: bool = _f(
        False,
        "update each large parameter inside of the backward pass, as soon as its gradient is complete, and free the "
        "gradient; needs clip null, one micro-batch a step, one device, and moai's own optimizer (bf16 weights or "
        "adamw_bf16)",
    )
    schedule: Literal["cosine", "wsd", "constant"] = _f(
        "cosine", "after the warm-up: cosine decay, warmup-stable-decay, or constant"
    )
    warmup_steps: int = _f(0, "steps of linear warm-up", min=0)
    decay_fraction: float = _f(0.1, "share of the steps that wsd spends decaying", min=0, max=1)
    min_lr_ratio: float = _f(0.1, "learning rate at the end, relative to lr", min=0, max=1)


@dataclass(frozen=True)
class Train:
    """The loop: length, batch, precision, what happens every so often. A step is an optimizer step; 0 means never."""

    steps: int | None = _f(None, "optimizer steps; exactly one of steps and epochs", min=1)
    epochs: float | None = _f(None, "passes over the data; exactly one of steps and epochs", above=0)
    batch_size: int = _f(1, "rows a device a micro-batch", min=1)
    accumulation: int = _f(1, "micro-batches a step", min=1)
    effective_batch: int | None = _f(
        None, "rows a step over all devices; sets accumulation to effective_batch / (batch_size * devices)", min=1
    )
    precision: Literal["auto", "fp32", "bf16", "bf16-mixed"] = _f(
        "auto",
        "bf16: bf16 weights; bf16-mixed: fp32 weights, bf16 products; auto: bf16-mixed where the GPU has it, else fp32",
    )
    checkpointing: Literal["none", "selective", "full"] = _f(
        "none",
        "what the backward pass computes again instead of finding it in memory; selective: norms, convolution, time "
        "steps, SwiGLU's product (a few percent of the time); full: all but the input of each layer",
    )
    checkpointing_layers: int | None = _f(
        None, "layers, from the first, that checkpointing applies to, the others keep everything; null: all", min=1
    )
    seed: int = _f(0, "seed of initial weights, data order and samples", min=0, max=2**63 - 1)
    save_every: int = _f(1000, "steps between checkpoints (the last step is always saved)", min=0)
    keep_last: int = _f(3, "checkpoints kept", min=1)
    keep_best: bool = _f(False, "save at every new lowest validation loss too, and keep that checkpoint")
    eval_every: int = _f(500, "steps between validations", min=0)
    eval_batches: int = _f(50, "micro-batches of a validation", min=1)
    log_every: int = _f(10, "steps between log lines and records of trackers; metrics.jsonl has every step", min=1)
    sample_every: int = _f(0, "steps between samples", min=0)
    sample_prompts: tuple[str, ...] = _f((), "prompts of these samples")
    sample_tokens: int = _f(64, "tokens a sample", min=1)
    max_nonfinite: int = _f(3, "NaN or infinite steps in a row that stop the run", min=1)
    threads: int | None = _f(None, "CPU threads; null: all, or 4 beside a GPU", min=1, max=1024)


@dataclass(frozen=True)
class Hardware:
    """The machine the figures are made for; checked before training starts."""

    gpu: Literal["a100", "h100", "a40", "rtx4090", "cpu"] | None = _f(None, "GPU class; null: any device")
    memory_gb: float | None = _f(None, "memory of one device; null: the class's", above=0)
    count: int = _f(1, "devices", min=1)


def items(section: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields of a section."""
    return ((spec.name, getattr(section, spec.name)) for spec in dataclasses.fields(section))


def fields(section: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """name -> (field, resolved type) of a section."""
    hints = typing.get_type_hints(section)
    return {spec.name: (spec, hints[spec.name]) for spec in dataclasses.fields(section)}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union; (kind,) for anything else."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def describe(kind: Any, limits: Any = types.MappingProxyType({})) -> str:
    """A type and its range in words: `a number > 0`, `one of none, full`."""
    words = []
    for one in alternatives(kind):
        inner = typing.get_args(one)
        if one is type(None):
            words.append("null")
        elif typing.get_origin(one) is Literal:
            words.append(repr(inner[0]) if len(inner) == 1 else "one of " + ", ".join(inner))
        elif one == Sources:
            names = ", or a mapping of names to these" if limits.get("named") else ""
            words.append(f"a path, or a list of {{path, weight, format, train_on}}{names}")
        elif typing.get_origin(one) is tuple:
            count = "a list of" if inner[-1] is Ellipsis else f"a list of {len(inner)}:"
            words.append(f"{count} {describe(inner[0], limits)}")
        else:
            words.append(
                {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[one] + _range(limits)
            )
    return " or ".join(words)


def _range(limits: Any) -> str:
    signs = {"above": ">", "min": ">=", "below": "<", "max": "<="}
    return "".join(
        f"{' and' * bool(n)} {sign} {limits[key]:g}"
        for n, (key, sign) in enumerate((k, s) for k, s in signs.items() if k in limits)
    )


def plain(value: Any) -> Any:
    """A section or value as JSON-able dicts, lists and scalars; `brief` fields only where they are set."""
    if dataclasses.is_dataclass(value):
        brief = {spec.name for spec in dataclasses.fields(value) if spec.metadata.get("brief")}
        return {name: plain(inner) for name, inner in items(value) if name not in brief or inner is not None}
    return [plain(inner) for inner in value] if isinstance(value, tuple) else value
