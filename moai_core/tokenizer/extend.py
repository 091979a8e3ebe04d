"""A domain's words for a tokenizer that exists: new merges behind the old ones.

What is guaranteed, because every new merge comes after all the old ones and makes a token that there was not:

- Old ids stay what they were; whatever was tokenized before still means the same text.
- The ids of any text are those of the old tokenizer, with some runs of neighbours replaced by a new id each. Put the
  old ids of its run in place of every new id (`pieces`), and the old tokenizer's ids are back, exactly.
- So a model that starts a new row from the rows of its run reads a text almost as before.

Not guaranteed: the merges that training on old and new text together would have found; nor a use for each new id in
text of another domain. Learning: the domain's text is tokenized by the old tokenizer, each old id becomes a character,
and the tokenizers library's BPE trainer learns merges of those. Left out: tokenizers that aren't BPE, or mark the
inside or end of words. Source: the same idea as in "vocabulary expansion", e.g. Cui et al., arXiv 2304.08177.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moai_core.data.tokenize import compact
from moai_core.errors import CheckpointError, UsageError
from moai_core.tokenizer import health
from moai_core.tokenizer.evaluate import find_tokenizer, open_tokenizer
from moai_core.tokenizer.layout import LONGEST, check_target, load_backend, notice_file, write_folder
from moai_core.tokenizer.text import OnEvent, Source, Texts
from moai_core.tokenizer.train import check_frequency, run_trainer

_BATCH = 256
_MOST = 1 << 20
_BESIDE = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "ATTRIBUTION.md", "LICENSE")
Pieces = dict[int, list[int]]


def extend(
    base: str,
    sources: Sequence[Source],
    out: str | Path,
    *,
    add: int,
    min_frequency: int = health.SEEN,
    model: str | Path | None = None,
    seed: int = 0,
    on_error: str = "stop",
    notice: str | Path | None = None,
    force: bool = False,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Adds at most `add` tokens, learnt on `sources`, to the tokenizer `base` and writes the new one's folder `out`.

    With `model`, a folder of a model that uses `base`, `out` is that model with rows for the new tokens (resize.py).
    Returns a report. Raises UsageError, CheckpointError, DataError, StorageError; `out` then isn't there.
    """
    if not 1 <= add <= _MOST:
        raise UsageError(f"--add must lie between 1 and {_MOST} (got {add})", hint="usual are 1,000 to 16,000")
    check_frequency(min_frequency)
    out, tell, begin = Path(out), on_event or (lambda event: None), time.perf_counter()
    check_target(out, force)
    place = find_tokenizer(base)
    backend, state = open_tokenizer(base)
    _check(state, place)
    files = {name: (place.parent / name).read_bytes() for name in _BESIDE if (place.parent / name).is_file()}
    files |= notice_file(Path(notice) if notice else None)
    grown = _grown(model, state, tell)
    texts = Texts(sources, seed=seed, on_error=on_error, on_event=tell)
    words = count_words(backend, texts.read("counting"))
    found, pieces = new_merges(words, state, add, min_frequency, tell)
    if not pieces:
        raise UsageError(
            f"{', '.join(source.path for source in sources)}: no two tokens of {base} stand side by side in a word "
            f"{min_frequency} times",
            hint="take more text, or lower --min-frequency",
        )
    before = sum(len(word) * count for word, count in words.items())
    report = {"path": str(out), "base": base, "added": len(pieces), "asked": add, "min_frequency": min_frequency}
    report |= _append(state, found, pieces, texts, before)
    files["tokenizer.json"] = compact(state)
    if grown is None:
        write_folder(out, files, force=force)
    report["model"] = grown.write(out, pieces, files, force=force) if grown else None
    return {**report, "seconds": time.perf_counter() - begin}


def _grown(model: str | Path | None, state: dict[str, Any], tell: OnEvent) -> Any:
    if model is None:
        return None
    from moai_core.tokenizer.resize import Grown  # torch and the model only where they are needed

    return Grown(Path(model), state, on_event=tell)


def _check(state: dict[str, Any], place: Path) -> None:
    model = state["model"]
    kind = model.get("type")
    if kind != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise CheckpointError(
            f"{place}: only plain BPE can be extended (its model is {kind}"
            f"{', which marks the inside or end of words' if kind == 'BPE' else ''})",
            hint="train one on the domain's text: moai tokenizer train",
        )
    if not state.get("pre_tokenizer"):
        raise CheckpointError(f"{place}: the tokenizer draws no borders of words, so its merges can't be extended")


def ids_of(state: dict[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id, added ones included."""
    return state["model"]["vocab"] | {token["content"]: token["id"] for token in state.get("added_tokens") or []}


def count_words(backend: Any, texts: Iterable[str]) -> Counter[tuple[int, ...]]:
    """How often each word of the text occurs, as the ids that it has."""
    words: Counter[tuple[int, ...]] = Counter()

    def add(batch: list[str]) -> None:
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            ids, borders = encoding.ids, encoding.word_ids
            begin = 0
            for at in range(1, len(ids) + 1):
                if at == len(ids) or borders[at] != borders[begin] or borders[at] is None:
                    words[tuple(ids[begin:at])] += 1
                    begin = at

    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            add(batch)
            batch = []
    add(batch)
    return words


def new_merges(
    words: Counter[tuple[int, ...]], state: dict[str, Any], add: int, min_frequency: int, tell: OnEvent
) -> tuple[list[tuple[str, str]], Pieces]:
    """The new merges as pairs of tokens, and the old ids that each new id stands for; at most `add` of either."""
    old = ids_of(state)
    tokens = {index: token for token, index in old.items()}
    outside = {token["id"] for token in state.get("added_tokens") or []}
    usable = {
        word: count
        for word, count in words.items()
        if len(word) > 1
        and not outside.intersection(word)
        and sum(len(tokens[index]) for index in word) <= 4 * LONGEST  # a line of dashes, a key in base64
    }
    made: dict[str, list[int]] = {}  # a new token -> its old ids
    merges: list[tuple[str, str]] = []
    for left, right in _learn(usable, add + add // 4 + 64, min_frequency, tell):
        sides = [[_id(letter) for letter in side] for side in (left, right)]
        names = ["".join(tokens[index] for index in side) for side in sides]
        known = all(len(side) == 1 or made.get(name) == side for side, name in zip(sides, names, strict=True))
        # A second way to a token that there is would break what the old ids of a new one are.
        if not known or names[0] + names[1] in old or names[0] + names[1] in made:
            continue
        merges.append((names[0], names[1]))
        made[names[0] + names[1]] = sides[0] + sides[1]
        if len(made) == add:
            break
    first = max(old.values()) + 1
    return merges, {first + number: side for number, side in enumerate(made.values())}


def _letter(index: int) -> str:
    """The character that stands for an id; none is a space or half a surrogate pair."""
    code = 0x100 + index
    return chr(code if code < 0xD800 else code + 0x800)


def _id(letter: str) -> int:
    code = ord(letter)
    return (code if code < 0xD800 else code - 0x800) - 0x100


def _learn(words: dict[tuple[int, ...], int], number: int, min_frequency: int, tell: OnEvent) -> list[list[str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    letters = {_letter(index) for word in words for index in word}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + number, min_frequency=min_frequency, show_progress=False, special_tokens=[]
    )

    def written() -> Iterator[str]:
        for word, count in words.items():
            text = "".join(map(_letter, word))
            while count > 0:  # a part at a time: the commonest word may stand there a million times
                yield " ".join([text] * min(count, 1000))
                count -= 1000

    run_trainer(tokenizer, trainer, written(), tell)
    return json.loads(tokenizer.to_str())["model"]["merges"]


def _append(
    state: dict[str, Any], merges: list[tuple[str, str]], pieces: Pieces, texts: Texts, before: int
) -> dict[str, Any]:
    """Puts merges and tokens into the tokenizer.json, and reports what that did to the text, which had `before` ids."""
    model = state["model"]
    vocab = model["vocab"]
    model["merges"] = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
    added = []
    for index, (left, right) in zip(pieces, merges, strict=True):
        vocab[left + right] = index
        model["merges"].append([left, right])
        added.append((vocab[left], vocab[right], index))
    backend = load_backend(json.dumps(state).encode(), Path("the extended tokenizer"))
    backend.encode_special_tokens = True
    counts = health.count_ids(backend, texts.read("health"), max(pieces) + 1)
    tokens = int(counts.sum())
    return {
        "vocab_size": len(ids_of(state)),
        "first_new_id": min(pieces),
        **texts.report(),
        "tokens_before": before,
        "tokens": tokens,
        "bytes_per_token_before": texts.bytes / max(1, before),
        "bytes_per_token": texts.bytes / max(1, tokens),
        "health": health.report(added, counts),
    }
