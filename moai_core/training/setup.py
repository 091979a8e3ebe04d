"""What a run is made of: device, precision, model, tokenizer, number of steps; everything that can be wrong before the
first step.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moai_core import checkpoint, plan, scan
from moai_core.data import tokenize
from moai_core.errors import UsageError, shell
from moai_core.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from moai_core.model import MoaiMambaForCausalLM


def on_cpu(recipe: Recipe) -> bool:
    """Whether the run computes on the CPU: by the recipe's word, or for want of CUDA."""
    return recipe.hardware.gpu == "cpu" or not torch.cuda.is_available()


def precision(recipe: Recipe) -> tuple[torch.dtype, bool]:
    """(type of the weights, whether products run under bf16 autocast). RecipeError where the device can't do what the
    recipe asks.
    """
    asked = recipe.train.precision
    bf16 = not on_cpu(recipe) and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        asked = "bf16-mixed" if bf16 else "fp32"
    if asked != "fp32" and not on_cpu(recipe) and not bf16:
        raise recipe.error(
            "train.precision",
            f"{asked} needs a GPU of compute capability 8.0 or newer",
            hint="use train.precision=fp32",
        )
    if asked == "bf16" and recipe.optim.name == "adamw_8bit":
        why = "bf16 doesn't go with optim.name=adamw_8bit: it rounds bf16 weights to the nearest, losing small updates"
        raise recipe.error("train.precision", why, hint="use train.precision=bf16-mixed, or optim.name=adamw_bf16")
    return (torch.bfloat16 if asked == "bf16" else torch.float32), asked == "bf16-mixed"


def precision_name(recipe: Recipe) -> str:
    """fp32, bf16 or bf16-mixed: what `auto` came to."""
    dtype, mixed = precision(recipe)
    return "bf16-mixed" if mixed else "fp32" if dtype == torch.float32 else "bf16"


def device_name(device: torch.device) -> str:
    """The product name of a GPU, else the device's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# Dense bf16 FLOPs a second with fp32 accumulation, from the data sheets; the first name found in the device's name
# counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
    "A40": 149.7e12, "RTX 4090": 165.2e12,
}  # fmt: skip


def peak_flops(recipe: Recipe) -> float | None:
    """What one device could do in bf16; None where it isn't known, or where the run doesn't compute in bf16."""
    if on_cpu(recipe) or precision_name(recipe) == "fp32":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def load_tokenizer(recipe: Recipe, folder: Path | None) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer. RecipeError when the weights in `folder` bring another one, which their embeddings were
    trained with.
    """
    recipe.require("tokenizer")
    tokenizer = tokenize.load_tokenizer(str(recipe.tokenizer))
    if folder is not None and (folder / "tokenizer.json").is_file():
        trained_with = tokenize.load_tokenizer(folder)
        if tokenize.fingerprint(trained_with) != tokenize.fingerprint(tokenizer):
            why = f"{recipe.tokenizer} is not the tokenizer that {folder} was trained with"
            raise recipe.error("tokenizer", why, hint=shell(f"tokenizer={folder}"))
    return tokenizer


def model_folder(path: Path, on_event: Any) -> Path:
    """The folder that holds the model: `path` itself, or the newest good step of a run folder."""
    if not path.is_dir() or (path / "config.json").is_file():
        return path
    return checkpoint.latest(path, on_event=on_event) or path


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> MoaiMambaForCausalLM:
    """The recipe's model with initial weights from train.seed, fp32 on the CPU, whatever the device and its random
    numbers.
    """
    from accelerate.utils import set_seed

    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    values = numbers(recipe, tokenizer)
    set_seed(recipe.train.seed % 2**32)
    return MoaiMambaForCausalLM(MoaiMambaConfig(**values))


def numbers(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The model's fields, vocabulary and special ids taken from the tokenizer where the recipe leaves them open.
    UsageError where the tokenizer has more ids.
    """
    values = recipe.model.numbers()
    if recipe.model.vocab_size is None:
        values["vocab_size"] = max(tokenizer.get_vocab().values()) + 1
    for key, value in (
        ("pad", tokenizer.pad_token_id),
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
    ):
        if getattr(recipe.model, f"{key}_token_id") is None and value is not None:
            values[f"{key}_token_id"] = value
    tokenize.check_tokenizer(tokenizer, values["vocab_size"])
    return values


def load_model(
    path: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, on_event: Any
) -> MoaiMambaForCausalLM:
    """Weights of a checkpoint or any folder of a moai model, checked against the tokenizer. CheckpointError,
    UsageError.
    """
    model = checkpoint.load_model(path, dtype=dtype, on_event=on_event)
    tokenize.check_tokenizer(tokenizer, model.config.vocab_size)
    derived = {key for key in ("vocab_size", "time_step_rank") if getattr(recipe.model, key) is None}
    derived |= {"use_quantization", "quantization_bits"}  # how weights are stored is no size
    wanted = {key: value for key, value in recipe.model.numbers().items() if key not in derived}
    if own := [key for key, value in wanted.items() if getattr(model.config, key, value) != value]:
        message = f"{path} keeps its own {', '.join(own)}: weights come with their sizes, not the recipe's"
        on_event({"event": "note", "message": message})
    return model


def _load_plain(
    path: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, on_event: Any
) -> MoaiMambaForCausalLM:
    """As load_model; UsageError for a quantized one, most of which would stand still."""
    model = load_model(path, recipe, tokenizer, dtype, on_event)
    if model.config.quantization is not None:
        decode = f"moai convert {shell(path)} PLAIN --to moai --outtype bf16"
        raise UsageError(
            f"{path}: is quantized, and what is quantized can't be trained here",
            hint=f"`moai qat` trains it, and `{decode}` decodes it before",
        )
    return model


def make_ready(model: MoaiMambaForCausalLM, recipe: Recipe, dtype: torch.dtype) -> None:
    """Type, scan backend and checkpointing of the recipe; training mode."""
    model.to(dtype=dtype)  # type: ignore[call-arg]
    model.set_scan_backend(recipe.model.scan if recipe.model.use_fast_scan is not False else "reference")
    model.set_checkpointing(recipe.train.checkpointing, recipe.train.checkpointing_layers)
    model.train()


def warn_of_fallback(model: Any, device: torch.device, on_event: Any) -> None:
    """A warning where a GPU has to train without moai's kernels, and nobody chose another scan."""
    config = model.config
    if getattr(model.model, "scan_backend", None) == "auto":
        sizes = {"I": config.expand_factor * config.hidden_size, "N": config.state_size, "K": config.conv_kernel_size}
        line = scan.fallback(device, torch.bfloat16, **sizes)
        if line is not None:
            on_event({"event": "warning", "message": line})


@dataclass(frozen=True)
class Kind:
    """The class of model that a run trains. Recipes speak of pure-Mamba models; a benchmark gives another kind, to
    train what it compares with by the same loop.

    new(recipe, tokenizer): initial weights from train.seed, on the CPU. load(folder, recipe, tokenizer, dtype,
    on_event): the weights of a checkpoint or model folder. ready(model, recipe, dtype): type of the weights and modes
    of the recipe, in place. flops(model): of training on one token. A model takes (input_ids, labels, seq_idx,
    num_items, seq_idx_in_order, use_cache) as MoaiMambaForCausalLM does and returns something with `loss`; it has
    `generate`.
    """

    new: Callable[[Recipe, Any], Any]
    load: Callable[[Path, Recipe, Any, torch.dtype, Any], Any]
    ready: Callable[[Any, Recipe, torch.dtype], None]
    flops: Callable[[Any], int]
    # What the recipe doesn't say of the run, for people: a run goes on only under the same.
    label: str = ""


MAMBA = Kind(new_model, _load_plain, make_ready, lambda model: plan.flops_per_token(model.config.numbers())["training"])


def total_steps(recipe: Recipe, rows_in_epoch: int | None, rows_in_step: int) -> int:
    """Optimizer steps of the run: train.steps, or what train.epochs makes of the data. RecipeError for epochs of a
    stream.
    """
    if recipe.train.steps is not None:
        return recipe.train.steps
    if recipe.train.epochs is None:
        raise UsageError("the recipe sets neither train.steps nor train.epochs", hint="add train.steps=N")
    if rows_in_epoch is None:
        raise recipe.error(
            "train.epochs", "needs data of known length, and a stream has none", hint="set train.steps=N instead"
        )
    return max(1, math.ceil(recipe.train.epochs * rows_in_epoch / rows_in_step))


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of what torch allocated on a GPU, the resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if os.uname().sysname == "Darwin" else peak * 1024
