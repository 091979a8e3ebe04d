"""What a card says of a model's training text: languages, sources, licences, from mix.json of `moai data build`.

Of a mix with its ATTRIBUTION.md beside it, that file travels with the model, and the card sums it up; of any other mix
the card lists the sources.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moai_core import storage
from moai_core.bench.report import Table
from moai_core.errors import CheckpointError

ATTRIBUTION = "ATTRIBUTION.md"
# Words of licences that ask for themselves; not of a package around what is in the public domain.
_SHARE_ALIKE = re.compile(r"^(?!public domain).*(GPL|GFDL|MPL|BY-SA|mixed|as each)")


def read(path: Path) -> dict[str, Any]:
    """mix.json of a mix: the file, or the folder that it is in. Raises CheckpointError."""
    values = storage.read_json(path / "mix.json" if path.is_dir() else path)
    if not isinstance(values, dict) or not isinstance(values.get("sources"), list):
        raise CheckpointError(f"{path}: not the mix.json of a mix", hint="`moai data build` writes one")
    return values


def attribution(path: Path) -> str:
    """ATTRIBUTION.md beside it; "" where there is none."""
    file = (path if path.is_dir() else path.parent) / ATTRIBUTION
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _trained_on(mix: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """The sources of which something is in training, each with its bytes."""
    sizes = [(one, one["kept"].get("train", {}).get("bytes", 0)) for one in mix["sources"]]
    return [(one, size) for one, size in sizes if size]


def section(mixes: Sequence[dict[str, Any]], *, whole: bool) -> str:
    """What the model was trained on. whole: source by source, where no ATTRIBUTION.md lists them."""
    parts = ["## Data"]
    for mix in mixes:
        used = _trained_on(mix)
        about = mix.get("description") or mix.get("name", "")
        parts.append(f"{about}: {sum(size for _, size in used):,} bytes of text from {len(used)} sources.")
        parts.append(table(_listed(used) if whole else _by_language(used)))
    if not whole:
        parts.append(f"Every source, with authors, origin and licence: [{ATTRIBUTION}]({ATTRIBUTION}).")
    return "\n\n".join(parts)


def _listed(used: list[tuple[dict[str, Any], int]]) -> Table:
    rows: list[tuple[str, ...]] = []
    for one, size in used:
        told = (one.get(key, "") for key in ("name", "lang", "kind", "attribution", "origin", "licence"))
        name, lang, kind, by, origin, licence = (str(value).replace("|", "/") for value in told)
        rows.append((name, lang, kind, by or origin, licence, f"{size:,}", f"{one.get('weight', 1):g}"))
    columns = ("source", "language", "what", "by, or from", "licence", "bytes", "weight")
    return Table("", columns, rows, left=5)


def _by_language(used: list[tuple[dict[str, Any], int]]) -> Table:
    rows: list[tuple[str, ...]] = []
    for lang in sorted({str(one["lang"]) for one, _ in used}):
        mine = [(one, size) for one, size in used if one["lang"] == lang]
        largest = sorted(mine, key=lambda pair: -pair[1])
        kinds = list(dict.fromkeys(str(one.get("kind") or one["name"]).replace("|", "/") for one, _ in largest))
        named = ", ".join(kinds[:3])
        once = sum(one["kept"].get("train with weight", one["kept"]["train"])["bytes"] for one, _ in mine)
        rows.append((lang, named, str(len(mine)), f"{sum(size for _, size in mine):,}", f"{once:,}"))
    return Table("", ("language", "most of it", "sources", "bytes", "read in one pass"), rows, left=2)


def licence(mixes: Sequence[dict[str, Any]], weights: str | None) -> str:
    """What the licences of the texts are, and that of the weights, if one is given."""
    used = [pair for mix in mixes for pair in _trained_on(mix)]
    total = sum(size for _, size in used)
    alike = sum(size for one, size in used if _SHARE_ALIKE.search(str(one.get("licence"))))
    published = f"The weights are published under {weights}, as far as there are rights in them.\n" if weights else ""
    return f"""## Licence

{published}The texts that the model was trained on keep the licences of their authors; none of them is in this folder.
{alike / max(total, 1):.0%} of their bytes stand under licences that ask for the same licence for what is adapted from
them (CC-BY-SA, GPL, LGPL, GFDL, MPL, or a mixture that may hold these), and many more ask for attribution. Whether
weights are an adaptation of the text that they were trained on is not settled: who passes them on should keep the list
of sources with them, and judge that for their own use."""


def table(one: Table) -> str:
    """A table in Markdown, without its title."""
    dashes = ["---" if i < one.left else "---:" for i in range(len(one.columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (one.columns, dashes, *one.rows))
