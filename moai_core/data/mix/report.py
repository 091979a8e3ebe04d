"""What a mix says about itself: mix.json (counts, licences, hashes of the input), ATTRIBUTION.md, and how both are read
again.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moai_core import __version__, storage
from moai_core.data.mix.ledger import Tally
from moai_core.data.mix.recipe import Mix
from moai_core.data.mix.text import Rules, plain
from moai_core.data.read import read_documents
from moai_core.errors import CheckpointError, UsageError
from moai_core.recipe.schema import plain as as_json

NAME = "mix.json"
VERSION = 1


def is_mix(folder: Path) -> bool:
    """Whether `folder` was written by `build`."""
    return (folder / NAME).is_file()


def of(
    mix: Mix, tallies: list[Tally], files: dict[str, dict[str, int]], inputs: dict[str, str], bad: str
) -> dict[str, Any]:
    """The contents of mix.json."""
    sources = []
    for source, tally in zip(mix.sources, tallies, strict=True):
        told = {
            field.name: as_json(value)
            for field in dataclasses.fields(source)
            if field.name not in ("rules", "place", "filter")
            and (value := getattr(source, field.name)) not in (None, "", (), {})
        }
        rules = {
            field.name: plain(value)
            for field in dataclasses.fields(Rules)
            if (value := getattr(source.rules, field.name)) != field.default
        }
        sources.append({**told, **({"rules": rules} if rules else {}), **tally.to_dict()})
    settings = {
        key: as_json(getattr(mix, key)) for key in ("name", "description", "seed", "near", "valid", "calib", "against")
    }
    top = {"version": VERSION, "moai": __version__, **settings, "totals": totals(sources), "files": files}
    return {**top, "inputs": inputs, "bad_lines": bad, "sources": sources}


def totals(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over sources: what was read and cut, dropped by reason, kept by part and by part and language."""
    dropped: dict[str, dict[str, int]] = {}
    kept: dict[str, dict[str, int]] = {}
    languages: dict[str, dict[str, int]] = {}
    for source in sources:
        for into, given in ((dropped, source["dropped"]), (kept, source["kept"])):
            for name, counts in given.items():
                entry = into.setdefault(name, dict.fromkeys(counts, 0))
                for key, value in counts.items():
                    entry[key] += value
        for part, counts in source["kept"].items():
            entry = languages.setdefault(part, {})
            entry[source["lang"]] = entry.get(source["lang"], 0) + counts["bytes"]
    read = {key: sum(source["read"][key] for source in sources) for key in ("units", "bytes", "bad")}
    cut = sum(source["cut"] for source in sources)
    return {"read": read, "cut": cut, "dropped": dropped, "kept": kept, "bytes_by_language": languages}


def attribution(mix: Mix, made: dict[str, Any]) -> str:
    """ATTRIBUTION.md: a row a source that is in the mix."""
    rows = ["| source | language | bytes in training | what | by | origin | licence |", "|---|---|---|---|---|---|---|"]
    for source, counted in zip(mix.sources, made["sources"], strict=True):
        kept = counted["kept"]
        if not kept:
            continue
        size = kept.get("train", {}).get("bytes", 0)
        cells = (source.name, source.lang, f"{size:,}", source.kind, source.attribution, source.origin, source.licence)
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    head = f"# {mix.name}: sources and licences\n\n{mix.description}\n" if mix.description else f"# {mix.name}\n"
    changes = (
        "Changes, for all: selection of documents and lines, duplicates taken out, Unicode NFC, control characters and "
        "white space at line ends removed; some sources were cut into sections or joined into longer records."
    )
    return "\n".join([head, *rows, "", changes, ""])


def read(folder: Path) -> dict[str, Any]:
    """mix.json of a mix. Raises UsageError where there is none, CheckpointError where it is damaged."""
    if not is_mix(folder):
        raise UsageError(f"{folder}: no mix there ({NAME} is missing)", hint="moai data build RECIPE --output FOLDER")
    made = storage.read_json(folder / NAME)
    if not isinstance(made, dict) or made.get("version") != VERSION or not isinstance(made.get("sources"), list):
        raise CheckpointError(f"{folder / NAME}: not a mix of this version of moai")
    return made


def records(folder: Path, part: str, *, between: str = "\n") -> Iterator[tuple[str, str]]:
    """(source, text) of every record of a part; a chat as `role: content`, messages parted by `between`."""
    from moai_core.data.formats import read_records
    from moai_core.data.records import Problems

    for file in sorted(folder.glob(f"{part}-*.jsonl.zst")):
        for _, _, record in read_records(file, ".jsonl", Problems()):
            turns = record.get("messages") or []
            text = record.get("text") or between.join(f"{turn['role']}: {turn['content']}" for turn in turns)
            yield record["source"], text


def samples(folder: Path, part: str, count: int, seed: int) -> dict[str, list[str]]:
    """`count` random records of each source of a part, by reservoir sampling."""
    found: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    draw = random.Random(seed)
    for source, text in records(folder, part):
        seen[source] = seen.get(source, 0) + 1
        held = found.setdefault(source, [])
        if len(held) < count:
            held.append(text)
        elif (place := draw.randrange(seen[source])) < count:
            held[place] = text
    return found


def tokens(folder: Path, part: str, tokenizer: Any) -> dict[str, int]:
    """Tokens of each source of a part, as training sees them."""
    from moai_core.data.cache import batches_of
    from moai_core.data.tokenize import Encoder

    encoder = Encoder(tokenizer)
    counts: dict[str, int] = {}
    for file in sorted(folder.glob(f"{part}-*.jsonl.zst")):
        names = (json.loads(line)["source"] for line in _raw_lines(file))
        for group in batches_of(read_documents([file])):
            for encoded in encoder.encode(group):
                name = next(names)
                counts[name] = counts.get(name, 0) + len(encoded.ids)
    return counts


def _raw_lines(file: Path) -> Iterator[bytes]:
    from moai_core.data.formats import read_blocks, split_lines
    from moai_core.data.records import Problems

    return (raw for _, _, raw in split_lines(file, read_blocks(file, Problems())))
