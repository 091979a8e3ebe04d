"""The model card (README.md) of what was converted: the source's own, and below it what was done."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from moai_core import __version__


def card(old: bytes | None, report: dict[str, Any]) -> bytes:
    """The card as bytes of Markdown, from the source's card (None: there was none) and the conversion's report."""
    source, target, parity = report["source"], report["target"], report["parity"]
    text = old.decode("utf-8", errors="replace").rstrip() if old else f"# {source['name']}"
    lines = [
        f"{text}\n",
        "## Conversion\n",
        f"Converted from `{source['name']}` ({source['format']}) to {target['format']} with moai {__version__} on "
        f"{datetime.now(timezone.utc).date()}.\n",
        f"- {report['parameters']:,} parameters in {report['tensors']} tensors, stored as {report['dtype']}",
        f"- vocabulary: {report['vocab_size']:,}",
        *(f"- {note}" for note in report["notes"]),
    ]
    if "skipped" in parity:
        lines.append(f"- not compared with the original: {parity['skipped']}")
    else:
        lines.append(
            f"- compared in fp32 ({' and '.join(parity['runtimes'])}): largest difference of a logit "
            f"{parity['max_delta']:.2e}, likeliest token the same at {parity['argmax']} of {parity['positions']} "
            f"positions and in {parity['greedy']} of {parity['tokens']} greedy steps"
        )
    return ("\n".join(lines) + "\n").encode()
