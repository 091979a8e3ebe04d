"""A tokenizer.json, its chat template and generation settings as keys of a GGUF, and back.

llama.cpp knows two kinds that a tokenizer.json can hold: byte-level BPE (`gpt2`), with one of llama.cpp's own
pre-tokenizers (gguf_pre.py), and SentencePiece BPE (`llama`), which merges whatever makes a better scored token. It has
no normalizer for them, so text that isn't NFC may differ where the tokenizer has one. What differs is told.
The whole tokenizer.json travels along in `tokenizer.huggingface.json`, so what moai wrote is read back unchanged.
`{% generation %}`, which only transformers knows, is taken out of chat templates; `moai.chat_template` keeps it.
Left out: Unigram, WordPiece. Sources: llama.cpp's src/llama-vocab.cpp; ggml's docs/gguf.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moai_core.convert.gguf_pre import ALIASES, ORIGINS, PRE, differing, nearest, samples, split_by
from moai_core.convert.source import Refused
from moai_core.data.regexes import check_patterns
from moai_core.errors import CheckpointError
from moai_core.storage import json_bytes, parse_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
_SETTINGS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


# ---- to GGUF -------------------------------------------------------------------------------------


def to_keys(files: Mapping[str, bytes], rows: int, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys of the tokenizer and its chat template for an embedding of `rows` rows, and what to tell the user.

    Raises Refused where llama.cpp has no such tokenizer, CheckpointError where the files are damaged.
    """
    from tokenizers import Tokenizer

    if "tokenizer.json" not in files:
        raise Refused(
            f"{path}: has no tokenizer.json, and llama.cpp stops on a GGUF without a tokenizer",
            hint="put the model's tokenizer.json and tokenizer_config.json into the folder",
        )
    raw = files["tokenizer.json"]
    state = parse_json(raw, f"{path}: tokenizer.json")
    check_patterns(state, path / "tokenizer.json")
    try:
        backend = Tokenizer.from_str(raw.decode())
    except Exception as exc:  # the Rust side raises bare Exception
        raise CheckpointError(f"{path}: tokenizer.json is not a usable tokenizer ({_line(exc)})") from exc
    model, config = state["model"], _object(files, "tokenizer_config.json", path)
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Refused(
            f"{path}: llama.cpp has no tokenizer of this kind ({model.get('type')})",
            hint="it has byte-level BPE and SentencePiece BPE",
        )
    kind = "gpt2" if '"ByteLevel"' in json.dumps(state.get("pre_tokenizer")) else "llama"
    if kind == "llama" and not model.get("byte_fallback"):
        raise Refused(f"{path}: llama.cpp has no BPE that is neither byte-level nor falls back to bytes")
    tokens, types = _tokens(state, rows, kind, path)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    if kind == "gpt2":
        keys["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
        keys["tokenizer.ggml.pre"], differences = nearest(state, backend)
    else:
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault("".join(merge), rank)
        # What no merge makes is worth less than what the last one makes.
        keys["tokenizer.ggml.scores"] = [-float(ranks.get(token, len(merges))) for token in tokens]
        keys |= {
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": backend.encode("a", add_special_tokens=False).tokens[:1] != ["a"],
        }
        differences = differing(backend, Tokenizer.from_str(json.dumps(_sentencepiece(keys))))
    keys |= _special_keys(files, config, backend, tokens) | _template_keys(files, config)
    keys["tokenizer.huggingface.json"] = raw.decode()
    return keys, _told(keys, differences)


def _told(keys: Mapping[str, Any], differences: list[str]) -> list[str]:
    notes = []
    if differences:
        notes.append(
            f"llama.cpp's nearest tokenizer is {keys['tokenizer.ggml.model']} with {keys['tokenizer.ggml.pre']!r}: of "
            f"{len(samples())} short strings made to tell them apart it splits {len(differences)} otherwise, such as "
            f"{differences[0]!r}"
        )
    if "moai.chat_template" in keys:
        notes.append("the chat template's {% generation %} marks, which llama.cpp doesn't need, were taken out")
    return notes


def _tokens(state: dict[str, Any], rows: int, kind: str, path: Path) -> tuple[list[str], list[int]]:
    """Every row's token and its type; rows beyond the vocabulary are `[PADn]`, unused."""
    vocab = {index: token for token, index in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state.get("added_tokens") or []}
    vocab |= {index: token["content"] for index, token in added.items()}
    if max(vocab) >= rows:
        raise CheckpointError(
            f"{path}: the tokenizer has ids up to {max(vocab)}, the model's embedding has {rows} rows",
            hint="put the model's own tokenizer.json into the folder",
        )
    tokens, types = [], []
    for index in range(rows):
        token = vocab.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(UNUSED)
            continue
        tokens.append(token)
        if kind == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types.append(BYTE)
        elif kind == "llama" and token == state["model"].get("unk_token"):
            types.append(UNKNOWN)
        elif index in added:
            control = added[index]["special"] or (token[:1] in "<[" and token[-1:] in ">]")
            types.append(CONTROL if control else USER_DEFINED)
        else:
            types.append(NORMAL)
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{path}: the tokenizer has two ids for one token, which llama.cpp doesn't take")
    return tokens, types


def _special_keys(
    files: Mapping[str, bytes], config: dict[str, Any], backend: Any, tokens: list[str]
) -> dict[str, Any]:
    ids = {token: index for index, token in enumerate(tokens)}
    keys: dict[str, Any] = {}
    for ours, theirs in _SPECIAL.items():
        token = config.get(f"{ours}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            keys[f"tokenizer.ggml.{theirs}_token_id"] = ids[token]
    bos, eos = keys.get("tokenizer.ggml.bos_token_id"), keys.get("tokenizer.ggml.eos_token_id")
    around = backend.encode("").ids
    keys["tokenizer.ggml.add_bos_token"] = bos is not None and around[:1] == [bos]
    keys["tokenizer.ggml.add_eos_token"] = eos is not None and around[-1:] == [eos] and (len(around) > 1 or bos != eos)
    template = _template(files, config) or ""
    if ends := [token for token in _TURN_ENDS if token in ids and token in template]:
        keys["tokenizer.ggml.eot_token_id"] = ids[ends[0]]
    return keys


def _template(files: Mapping[str, bytes], config: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode(errors="replace")
    given = config.get("chat_template")
    if isinstance(given, list):  # several by name
        given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def plain_template(template: str) -> str:
    """The chat template without `{% generation %}`: a comment in its place trims spaces as it did."""
    return re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{#\1 \2#}", template)


def _template_keys(files: Mapping[str, bytes], config: dict[str, Any]) -> dict[str, Any]:
    template = _template(files, config)
    if not template:
        return {}
    plain = plain_template(template)
    return {"tokenizer.chat_template": plain, **({"moai.chat_template": template} if plain != template else {})}


def settings_to_keys(files: Mapping[str, bytes], path: Path) -> dict[str, Any]:
    """Sampling settings of generation_config.json, where it asks for sampling."""
    given = _object(files, "generation_config.json", path)
    keys = {}
    for ours, theirs in _SETTINGS.items():
        value = given.get(ours)
        if given.get("do_sample") and isinstance(value, (int, float)) and not isinstance(value, bool):
            keys[f"general.sampling.{theirs}"] = int(value) if ours == "top_k" else float(value)
    return keys


def _object(files: Mapping[str, bytes], name: str, path: Path) -> dict[str, Any]:
    value = parse_json(files[name], f"{path}: {name}") if name in files else {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} is not a JSON object")
    return value


def _line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0][:160]


# ---- from GGUF -----------------------------------------------------------------------------------


def special_ids(keys: Mapping[str, Any], rows: int) -> dict[str, int | None]:
    """bos, eos and pad ids under the names of config.json; None where a GGUF names none."""
    found: dict[str, int | None] = {}
    for ours in ("pad", "bos", "eos"):
        value = keys.get(f"tokenizer.ggml.{_SPECIAL[ours]}_token_id")
        found[f"{ours}_token_id"] = value if type(value) is int and 0 <= value < rows else None
    return found


def from_keys(keys: Mapping[str, Any], rows: int, path: Path) -> tuple[dict[str, bytes], int | None, list[str]]:
    """The tokenizer's files, how many rows it uses, and what to tell the user. Raises CheckpointError.

    No files where the GGUF has no tokenizer, or one of a kind that a tokenizer.json can't hold.
    """
    kind, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or kind not in ("gpt2", "llama"):
        what = f"a tokenizer of the kind {str(kind)[:40]!r}" if isinstance(kind, str) else "no tokenizer"
        return {}, None, [f"the file has {what}: put the model's tokenizer.json into the folder"]
    types = _numbers(keys, "tokenizer.ggml.token_type", tokens, path)
    if len(tokens) > rows or not all(isinstance(token, str) for token in tokens) or len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens is damaged ({len(tokens)} entries, {rows} rows)")
    used = len(tokens)
    while used > 1 and types is not None and types[used - 1] == UNUSED:
        used -= 1
    notes: list[str] = []
    raw = _carried(keys, tokens[:used])
    if raw is None:
        made = {**keys, "tokenizer.ggml.tokens": tokens[:used], "tokenizer.ggml.token_type": types}
        state, notes = _rebuilt(made, path)
        raw = json_bytes(state)
        if why := _unusable(raw):
            raise CheckpointError(f"{path}: its tokenizer is damaged ({why})")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in _SPECIAL.items():
        index = keys.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(index) is int and 0 <= index < used:
            config[f"{ours}_token"] = tokens[index]
    config |= {"model_max_length": 1000000000, "padding_side": "left"}
    files = {"tokenizer.json": raw, "tokenizer_config.json": json_bytes(config)}
    if template := _original_template(keys):
        files["chat_template.jinja"] = template.encode()
    return files, used, notes


def settings_from_keys(keys: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, bytes]:
    """generation_config.json: the ids of moai's config, the end of a turn, and sampling settings if there are any."""
    made: dict[str, Any] = {name: value for name, value in ids.items() if value is not None}
    turn = keys.get("tokenizer.ggml.eot_token_id")
    ends = made.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    if type(turn) is int and turn not in ends:
        made["eos_token_id"] = [*ends, turn]
    for ours, theirs in _SETTINGS.items():
        value = keys.get(f"general.sampling.{theirs}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            made |= {"do_sample": True, ours: value if isinstance(value, int) else round(value, 6)}
    return {"generation_config.json": json_bytes(made)} if made else {}


def _numbers(keys: Mapping[str, Any], name: str, tokens: list[Any], path: Path) -> list[Any] | None:
    values = keys.get(name)
    if values is None:
        return None
    if isinstance(values, (str, list, int, float)) or len(values) != len(tokens):
        raise CheckpointError(f"{path}: {name} is damaged (there are {len(tokens)} tokens)")
    return values.tolist()


def _carried(keys: Mapping[str, Any], tokens: list[str]) -> bytes | None:
    """The tokenizer.json in the file, if it can be used and has the same tokens as the keys that llama.cpp reads."""
    raw = keys.get("tokenizer.huggingface.json")
    if not isinstance(raw, str):
        return None
    try:
        state = json.loads(raw)
        vocab = {index: token for token, index in state["model"]["vocab"].items()}
        vocab |= {token["id"]: token["content"] for token in state.get("added_tokens") or []}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    filled = {index: token for index, token in enumerate(tokens) if token != f"[PAD{index}]" or index in vocab}
    return raw.encode() if vocab == filled and not _unusable(raw.encode()) else None


def _original_template(keys: Mapping[str, Any]) -> str | None:
    """moai's own form of the chat template where the file's other one is made of it."""
    plain, own = keys.get("tokenizer.chat_template"), keys.get("moai.chat_template")
    if isinstance(own, str) and plain_template(own) == plain:
        return own
    return plain if isinstance(plain, str) else None


def _rebuilt(keys: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """A tokenizer.json made of what llama.cpp knows."""
    if keys["tokenizer.ggml.model"] == "llama":
        return _sentencepiece(keys, path), ["the tokenizer was rebuilt from the tokens' scores"]
    name = keys.get("tokenizer.ggml.pre", "default")
    known = ALIASES.get(name, name) if isinstance(name, str) else ""
    if known not in PRE:
        raise CheckpointError(
            f"{path}: the pre-tokenizer {str(name)[:40]!r} is none that moai knows",
            hint=f"known are {', '.join(PRE)} and their aliases",
        )
    patterns, whole = ORIGINS.get(known, PRE[known][0]), PRE[known][1]
    merges = keys.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in merges):
        raise CheckpointError(f"{path}: tokenizer.ggml.merges is missing or damaged")
    # A space inside a token is written Ġ, so the first one parts the two.
    pairs = [list(_parted(merge)) for merge in merges]
    model = {"type": "BPE", "vocab": _plain_vocab(keys), "merges": pairs, "ignore_merges": whole}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {**_frame(keys), "normalizer": None, **split_by(patterns), "decoder": decoder, "model": model}, []


def _parted(merge: str) -> tuple[str, str]:
    at = merge.index(" ", 1)
    return merge[:at], merge[at + 1 :]


def _plain_vocab(keys: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(keys["tokenizer.ggml.tokens"])}


def _frame(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What both kinds have in common: the added tokens and what is put around a text."""
    tokens, types = keys["tokenizer.ggml.tokens"], keys.get("tokenizer.ggml.token_type")
    added = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": types[index] in (CONTROL, UNKNOWN)}
        for index, token in enumerate(tokens)
        if types is not None and types[index] in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    around: dict[str, list[int]] = {}
    defaults = {"bos": keys["tokenizer.ggml.model"] == "llama", "eos": False}
    for name, default in defaults.items():
        index = keys.get(f"tokenizer.ggml.{name}_token_id")
        wanted = keys.get(f"tokenizer.ggml.add_{name}_token", default)
        around[name] = [index] if wanted is True and type(index) is int and 0 <= index < len(tokens) else []
    post = None
    if any(around.values()):
        ends = {name: [{"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in ids] for name, ids in around.items()}
        single = [*ends["bos"], {"Sequence": {"id": "A", "type_id": 0}}, *ends["eos"]]
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, *ends["eos"]]
        special = {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for ids in around.values() for i in ids
        }
        post = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": post}


def _sentencepiece(keys: Mapping[str, Any], path: Path = Path()) -> dict[str, Any]:
    """SentencePiece's rule, that the best scored token that two neighbours make is made first, as a list of merges."""
    tokens = keys["tokenizer.ggml.tokens"]
    scores = keys.get("tokenizer.ggml.scores")
    if scores is None or isinstance(scores, (str, int, float)) or len(scores) < len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.scores is missing or damaged")
    vocab, types = _plain_vocab(keys), keys["tokenizer.ggml.token_type"]
    made = [
        (-float(scores[index]), index, token[:at], token[at:])
        for token, index in vocab.items()
        if types is None or types[index] == NORMAL
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    unknown = keys.get("tokenizer.ggml.unknown_token_id")
    model = {
        "type": "BPE", "vocab": vocab, "merges": [[left, right] for _, _, left, right in sorted(made)],
        "byte_fallback": True, "fuse_unk": True, "ignore_merges": False,
        "unk_token": tokens[unknown] if type(unknown) is int and 0 <= unknown < len(tokens) else None,
    }  # fmt: skip
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    first = [{"type": "Prepend", "prepend": "▁"}] if keys.get("tokenizer.ggml.add_space_prefix", True) else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []),
    ]  # fmt: skip
    return {
        **_frame(keys),
        "normalizer": {"type": "Sequence", "normalizers": [*first, *spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _unusable(raw: bytes) -> str | None:
    """Why the tokenizers library doesn't take this tokenizer.json, or None."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(raw.decode())
    except Exception as exc:  # the Rust side raises bare Exception
        return _line(exc)
    return None
