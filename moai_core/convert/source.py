"""What every format is read into and written from: moai's field names, moai's tensor names, one tensor at a time.

Hub and spokes: a format knows moai and itself, never another format. A format is a module with

    FORMATS: tuple[str, ...]                what `--to` calls what it writes
    detect(path) -> str | None              its name for a folder or file of this format, else None; cheap, never raises
    read(path) -> Source                    config and headers checked, no weight read yet; raises CheckpointError
    write(source, target, options, on_event=None)
                                            target: a `storage.FolderWriter` under way, or, where `FILE` is true, the
                                            path of a file that doesn't exist yet (it is flushed, checked and renamed by
                                            the caller). Raises Refused, before any byte is written, for what the format
                                            can't express, naming the one that can
    open_runtime(path, format) -> Runtime   the other people's runtime on what was written; raises Unavailable

and, where they differ from the common ones, `FILE = True` and `judge(parity, options) -> str | None`, the reason why a
comparison with its runtime, the second of the two, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from moai_core.errors import CheckpointError
from moai_core.quant.formats import Spec

OnEvent = Callable[[dict[str, Any]], None]


class Refused(CheckpointError):
    """The model can't be expressed in the format asked for; the hint names one that can hold it."""


class Unavailable(Exception):
    """A runtime can't run here; the text says why (`llama-cpp-python isn't installed`)."""


@dataclass(frozen=True)
class Packed:
    """A matrix as a format of moai's stores it (moai_core/quant/formats.py): its tensors by their last names. method:
    how the numbers were chosen, as far as that is known."""

    spec: Spec
    tensors: Mapping[str, Lazy]
    method: str


@dataclass(frozen=True)
class Lazy:
    """A tensor that is not read yet. `load` gives it in `shape` and `dtype`, in memory that nothing else keeps."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    origin: str = ""  # "model.safetensors: backbone.embeddings.weight", for error messages
    quantized: bool = False  # the numbers are of a quantized matrix, which `load` decodes
    packed: Packed | None = None  # the same numbers, quantized as they came, where moai has such a format

    @property
    def nbytes(self) -> int:
        """Bytes it takes once read."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None) -> Lazy:
        """The same tensor with `change` done to it after reading; `shape` where that changes it."""
        load = self.load
        return replace(self, shape=self.shape if shape is None else shape, load=lambda: change(load()), packed=None)

    def cast(self, dtype: torch.dtype) -> Lazy:
        """The same tensor in another dtype."""
        return replace(self.map(lambda tensor: tensor.to(dtype)), dtype=dtype)


@dataclass
class Source:
    """A model that was found: its numbers, its tensors under moai's names, and the files around it."""

    path: Path
    format: str  # "moai", "transformers-mamba", "falcon-mamba", "jamba", "mamba-ssm", "gguf" or "moai-transformer"
    # moai_core.config.fields(...), complete; of a "moai-transformer" its own config.json
    config: dict[str, Any]
    # moai's state dict: `lm_head.weight` is absent where the config ties it. In the order they are best read.
    tensors: dict[str, Lazy]
    # tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja, generation_config.json,
    # README.md ..., by file name; what a reader rebuilds (a GGUF's tokenizer) has the same names
    files: dict[str, bytes] = field(default_factory=dict)
    # Entries of the vocabulary in use, where that is known to be fewer than the embedding's rows (--trim-vocab)
    used_vocab: int | None = None
    # What the user should know: "the null attention layer 4 was dropped"
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How to write: `format` is one of the module's FORMATS; `outtype` None keeps the stored dtypes (for folders the
    caller has cast the tensors already; q8_0 and q4_0 are GGUF's alone).
    """

    format: str
    outtype: str | None = None


class Runtime(Protocol):
    """A model that runs: `name` as shown ("transformers 5.23.0"), and logits in fp32."""

    name: str

    def logits(self, ids: list[int]) -> torch.Tensor:
        """(L, V) fp32 of the whole sequence `ids` from a zero state."""
        ...

    def close(self) -> None:
        """Gives the memory back."""
        ...


@dataclass(frozen=True)
class Parity:
    """What two runtimes said to the same ids: a prompt of random ids, then 64 greedy tokens."""

    runtimes: tuple[str, str]
    positions: int
    max_delta: float  # over all logits of the common vocabulary
    spread: float  # standard deviation of the logits
    largest: float  # largest magnitude of the logits
    argmax: int  # positions whose likeliest token agrees
    greedy: int  # of the `tokens` greedy tokens, those that the other runtime would have taken too
    tokens: int


def emit(on_event: OnEvent | None, name: str, done: int, total: int, size: int = 0) -> None:
    """A tensor was written: `{"event": "tensor", "name", "done", "total", "bytes"}`, done and total count tensors."""
    if on_event is not None:
        on_event({"event": "tensor", "name": name, "done": done, "total": total, "bytes": size})


def holders(config: Mapping[str, Any], *, weightless: bool = True) -> str:
    """A hint: the formats that can hold a model with these fields. weightless: norms on dt, B and C may have weights of
    one, so that Falcon-Mamba is among them.
    """
    norms, ffn = config["dt_bc_norm"], config["ffn"] != "none"
    if norms and ffn:
        fitting = ["jamba", "gguf"]
    elif norms:
        fitting = ["falcon-mamba", "jamba", "gguf"] if weightless else ["jamba", "gguf"]
    elif ffn:
        fitting = ["mamba-ssm"]
    else:
        fitting = ["transformers-mamba", "mamba-ssm", "gguf"]
    what = f"Mamba {'with' if ffn else 'without'} a feed-forward, {'with' if norms else 'without'} norms on dt, B and C"
    return f"{what}, fits: {', '.join(['moai', *fitting])}"
