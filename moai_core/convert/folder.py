"""A model as a folder of the Hugging Face layout, whatever its model type: read with every claim checked, and written.

    config.json                                what the format makes of it
    model*.safetensors and its index           or, of old, pytorch_model*.bin and its index (torch_bin.py)
    tokenizer, generation_config.json, card    carried along as they are

Nothing of a folder runs: `auto_map` is ignored, because no class of it is ever asked for. Sizes are believed only as
far as the tensors agree. A tensor is read when it is written, and forgotten then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moai_core import config as numbers
from moai_core import storage, tensors, weights
from moai_core.convert import packed, torch_bin
from moai_core.convert.source import Lazy, OnEvent, emit
from moai_core.errors import CheckpointError, MoaiError, UsageError

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
CARD = "README.md"
FILES = (*TOKENIZER, "generation_config.json", CARD, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_FILE_LIMIT = 64 << 20
_CONFIG_LIMIT = 1 << 20
_INTEGER_LIMIT = 1 << 31


# ---- config.json ---------------------------------------------------------------------------------


class Fields:
    """The values of a foreign config.json, taken one by one with their types checked."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file = file
        self.values = values

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def wrong(self, name: str, expected: str) -> CheckpointError:
        """The error for a value that can't be used."""
        return CheckpointError(f"{self.file}: {name} must be {expected} (got {str(self.values.get(name))[:60]!r})")

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number >= 0. Raises CheckpointError where it is missing without a default, or no such number."""
        value = self.values.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _INTEGER_LIMIT:
            raise self.wrong(name, "a whole number")
        return value

    def number(self, name: str, default: float) -> float:
        """A number. Raises CheckpointError."""
        value = self.values.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.wrong(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false. Raises CheckpointError."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def rank(self, name: str, hidden: int) -> int:
        """The time-step rank, of which "auto" means ceil(H / 16)."""
        return -(-hidden // 16) if self.values.get(name, "auto") == "auto" else self.integer(name)

    def tokens(self, pad: int | None, bos: int | None, eos: int | None) -> dict[str, Any]:
        """pad_token_id, bos_token_id and eos_token_id (an id, a list of ids, or None) with the format's defaults."""
        found: dict[str, Any] = {}
        for name, default in (("pad_token_id", pad), ("bos_token_id", bos), ("eos_token_id", eos)):
            value = self.values.get(name, default)
            ids = value if isinstance(value, list) else [value]
            # transformers writes -1 (and older files anything) for "there is none"
            known = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
            found[name] = known if isinstance(value, list) and known else (known[0] if known else None)
        return found

    def must(self, name: str, default: Any, *allowed: Any, why: str) -> None:
        """Raises CheckpointError unless the value is one that moai can express."""
        value = self.values.get(name, default)
        if value not in allowed:
            raise CheckpointError(f"{self.file}: {name} is {str(value)[:60]}, {why}")

    def model(self, **values: Any) -> dict[str, Any]:
        """All fields of a moai model. Raises CheckpointError where no model has them."""
        try:
            return numbers.fields(**values)
        except UsageError as exc:
            raise CheckpointError(f"{self.file}: {exc.message}") from exc


def read_config(path: Path) -> Fields:
    """config.json of a folder. Raises CheckpointError."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no config.json", hint=weights.EXPECTED)
    values = storage.read_json(file, limit=_CONFIG_LIMIT)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return Fields(file, values)


def model_type(path: Path) -> str | None:
    """`model_type` of the config.json in the folder `path` ("" where the file has none), or None. Never raises."""
    try:
        return str(read_config(path).values.get("model_type") or "")
    except MoaiError:
        return None


# ---- tensors -------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Lazy]:
    """The folder's tensors by their own names, headers checked, none read. Quantized matrices are decoded when they
    are (packed.py). Raises CheckpointError.
    """
    values = read_config(path).values
    if any((path / name).exists() for name in (weights.SINGLE, weights.INDEX)):
        files = weights.shards(path)
    elif (old := packed.files(path)) is not None:
        files = old
    elif torch_bin.files(path):
        return packed.unpack(path, values, torch_bin.read(path))
    else:
        files = weights.shards(path)
    found = {
        name: Lazy(info.dtype, info.shape, reader(path / file, name), f"{path / file}: tensor {name}")
        for file, infos in files.items()
        for name, info in infos.items()
    }
    return packed.unpack(path, values, found)


def reader(file: Path, name: str) -> Callable[[], torch.Tensor]:
    """Loads the tensor `name` of a safetensors file when called."""

    def load() -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        # Opened anew for each tensor, so that the pages of the others don't stay mapped.
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as exc:
            raise CheckpointError(f"{file}: tensor {name} can't be read ({str(exc).splitlines()[0][:200]})") from exc

    return load


def layers(found: Mapping[str, Any], pattern: str = r"\.layers\.(\d{1,9})\.") -> int:
    """How many layers the tensors' names speak of."""
    return len({match[1] for name in found if (match := re.search(pattern, name))})


def check_layers(file: Path, name: str, claimed: int, found: Mapping[str, Any]) -> None:
    """Raises CheckpointError where config.json claims another number of layers than there are."""
    if claimed != (there := layers(found)):
        raise CheckpointError(f"{file}: {name} is {claimed}, the weights have {there} layers")


def adopt(
    path: Path, found: Mapping[str, Lazy], wanted: Mapping[str, tuple[str, tuple[int, ...]]], spare: set[str]
) -> dict[str, Lazy]:
    """`{moai's name: tensor}` for `wanted`, `{moai's name: (their name, shape)}`. Every tensor found must be wanted or
    in `spare`.

    Raises CheckpointError naming the tensor that is missing, of another shape (both shapes), or unknown.
    """
    taken = {}
    for name, (theirs, shape) in wanted.items():
        if theirs not in found:
            raise CheckpointError(f"{path}: tensor {theirs} is missing (shape {list(shape)})")
        if found[theirs].shape != shape:
            raise CheckpointError(
                f"{found[theirs].origin} has the shape {list(found[theirs].shape)}, config.json makes it {list(shape)}"
            )
        if not found[theirs].dtype.is_floating_point or found[theirs].dtype.itemsize < 2:
            raise CheckpointError(
                f"{found[theirs].origin} holds {str(found[theirs].dtype).removeprefix('torch.')}, only unquantized "
                "models can be converted"
            )
        taken[name] = found[theirs]
    known = {theirs for theirs, _ in wanted.values()} | spare
    if unknown := [name for name in found if name not in known]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(f"{found[unknown[0]].origin}{more}: config.json has no place for it")
    return taken


def shapes(values: Mapping[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a moai model with these fields (a tied head is left out). Raises CheckpointError.

    Compare the layers' number with what is there before: a model with that many is described.
    """
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    try:
        with torch.device("meta"):
            model = MoaiMambaForCausalLM(MoaiMambaConfig(**values))
    except (RuntimeError, ValueError, OverflowError, UsageError) as exc:
        raise CheckpointError(f"{where}: no model has these sizes ({str(exc).splitlines()[0][:200]})") from exc
    made = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if values["tie_word_embeddings"]:
        del made["lm_head.weight"]
    return made


def untie(path: Path, found: Mapping[str, Lazy], embedding: str, head: str, tied: bool) -> bool:
    """Whether the head is tied in truth: config.json says so (`tied`), or there is no head.

    Raises CheckpointError where a head that config.json ties differs from the embedding.
    """
    if not tied or head not in found:
        return tied
    if embedding in found and not torch.equal(found[head].load(), found[embedding].load()):
        raise CheckpointError(f"{path}: config.json ties {head} to {embedding}, but the two differ")
    return True


def zeros(like: Lazy, shape: tuple[int, ...]) -> Lazy:
    """A tensor of zeros in the dtype of `like`."""
    return Lazy(like.dtype, shape, lambda: torch.zeros(shape, dtype=like.dtype), "zeros")


def ones(like: Lazy, shape: tuple[int, ...]) -> Lazy:
    """A tensor of ones in the dtype of `like`."""
    return Lazy(like.dtype, shape, lambda: torch.ones(shape, dtype=like.dtype), "ones")


# ---- the other files -----------------------------------------------------------------------------


def read_files(path: Path) -> dict[str, bytes]:
    """Tokenizer, generation config, card and licence of a folder. Raises CheckpointError."""
    found = {}
    for name in FILES:
        file = path / name
        if file.is_file():
            found[name] = storage.read_limited(file, _FILE_LIMIT)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if name in found:
            _json(found[name], path / name)
    return found


def _json(raw: bytes, file: Path) -> Any:
    """JSON that is carried along and may be as its owner left it (a key twice). Raises CheckpointError if broken."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file}: not valid JSON ({str(exc).splitlines()[0][:100]})") from exc


def tokenizer_size(files: Mapping[str, bytes]) -> int | None:
    """The highest token id of tokenizer.json (or vocab.json) plus one, or None where neither is there."""
    if "tokenizer.json" in files:
        content = _json(files["tokenizer.json"], Path("tokenizer.json"))
        model = content.get("model") if isinstance(content, dict) else None
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        if isinstance(vocabulary, list):  # Unigram: a list of pieces with scores
            ids = [len(vocabulary) - 1]
        added = content.get("added_tokens") if isinstance(content, dict) else None
        ids += [token.get("id") for token in added or [] if isinstance(token, dict)]
    elif "vocab.json" in files:
        vocabulary = _json(files["vocab.json"], Path("vocab.json"))
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    else:
        return None
    known = [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]
    return max(known) + 1 if known else None


# ---- writing -------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Counts tensors for the caller's bar."""

    on_event: OnEvent | None
    total: int
    done: int = 0

    def tell(self, name: str, size: int) -> None:
        """One more was written."""
        self.done += 1
        emit(self.on_event, name, self.done, self.total, size)


def write(
    folder: storage.FolderWriter,
    values: Mapping[str, Any],
    found: Mapping[str, Lazy],
    files: Mapping[str, bytes],
    on_event: OnEvent | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """config.json from `values` (its dtype, where they have none, is that of most numbers), the tensors in shards, and
    `files` (the card comes from the caller, last)."""
    from huggingface_hub import split_state_dict_into_shards_factory

    folder.write("config.json", storage.json_bytes({**values, "dtype": values.get("dtype") or dtype(found)}))
    split = split_state_dict_into_shards_factory(
        dict(found),
        get_storage_size=lambda lazy: lazy.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    progress = Progress(on_event, len(found))
    for file, names in split.filename_to_tensors.items():
        infos = {name: tensors.TensorInfo(found[name].dtype, found[name].shape, found[name].nbytes) for name in names}

        def load(name: str) -> torch.Tensor:
            tensor = found[name].load()
            progress.tell(name, found[name].nbytes)
            return tensor

        folder.write(file, tensors.stream(infos, load, {"format": "pt"}))
    if split.is_sharded:
        folder.write(
            weights.INDEX, storage.json_bytes({"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        )
    for name, content in files.items():
        if name != CARD:
            folder.write(name, content)


def dtype(found: Mapping[str, Lazy]) -> str:
    """The dtype of the largest tensor by its name in config.json: "bfloat16"."""
    return str(max(found.values(), key=lambda lazy: lazy.nbytes).dtype).removeprefix("torch.")
