"""What a model writes, as it is: ten fixed prompts, seed 0, nothing picked.

    python -m moai_core.bench.samples --model runs/NAME [--tokens 64] [--seed 0] [--json]

Two prompts each in English, Korean, Japanese and Chinese, one each of finance and code. The first of a pair is an
opening that the model goes on with, the second is asked as a chat where the tokenizer has a chat template (else it is
an opening as well). The list does not change between models, so that cards can be laid side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moai_core.bench import report, score
from moai_core.bench.report import Table
from moai_core.device import place
from moai_core.generation.engine import generate
from moai_core.generation.sampling import Settings, check_settings


class Prompt(NamedTuple):
    """Language or domain, whether it is asked as a chat, and the text."""

    language: str
    chat: bool
    text: str


PROMPTS = (
    Prompt("en", False, "One day, a girl found an old map in the garden. She"),
    Prompt("en", True, "What do you like to do on a rainy day?"),
    Prompt("ko", False, "어느 날 아침, 아이는 창밖을 보고"),
    Prompt("ko", True, "오늘 기분이 안 좋아. 어떻게 하면 좋을까?"),
    Prompt("ja", False, "ある日、小さな村に"),
    Prompt("ja", True, "好きな食べ物は何ですか。"),
    Prompt("zh", False, "从前，山里有一个"),
    Prompt("zh", True, "今天的天气怎么样？"),
    Prompt("finance", True, "What is a bank?"),
    Prompt("code", False, "def add(a, b):\n    "),
)


def samples(
    model: Any,
    tokenizer: Any,
    *,
    seed: int = 0,
    tokens: int = 64,
    temperature: float = 0.8,
    prompts: Sequence[Prompt] = PROMPTS,
    on_event: report.OnEvent = lambda event: None,
) -> list[dict[str, Any]]:
    """[{"language", "prompt", "chat", "text", "tokens", "finish_reason"}], one a prompt, in their order; each is what
    the prompt gives alone. top-p is 0.95; temperature 0 takes the likeliest. Raises UsageError as the engine does.
    """
    asked = [prompt.chat and bool(tokenizer.chat_template) for prompt in prompts]
    given: list[Any] = [
        [{"role": "user", "content": prompt.text}] if chat else prompt.text
        for prompt, chat in zip(prompts, asked, strict=True)
    ]
    settings = Settings(max_new_tokens=tokens, temperature=temperature, top_p=0.95, seed=seed)

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "row":
            on_event({"event": "progress", "task": "writing", "done": event["done"], "total": event["total"]})

    written = generate(model, tokenizer, given, settings, on_event=tell)
    return [
        {
            "language": prompt.language,
            "prompt": prompt.text,
            "chat": chat,
            "text": answer.text,
            "tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
        }
        for prompt, chat, answer in zip(prompts, asked, written, strict=True)
    ]


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The samples as they stand in a card: quoted, nothing escaped away."""
    parts = []
    for one in found:
        kind = "asked" if one["chat"] else "opening"
        end = "" if one["finish_reason"] == "eos" else f" *({one['finish_reason']})*"
        fence = "~~~~"
        while fence in one["prompt"] + one["text"]:
            fence += "~"
        text = f"{one['prompt']}\n→ {one['text']}" if one["chat"] else f"{one['prompt']}⟶{one['text']}"
        parts.append(f"**{one['language']}**, {kind}{end}\n\n{fence}text\n{text}\n{fence}")
    return "\n\n".join(parts) + "\n"


def run(
    *,
    model: Path,
    tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.8,
    tokenizer: str | None = None,
    scan: str = "auto",
    device: str = "auto",
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Loads and writes: {"benchmark", "environment", "model", "settings", "samples", "notes"}, JSON-able."""
    settings = {"seed": seed, "max_new_tokens": tokens, "temperature": temperature, "top_p": 0.95}
    check_settings(settings, lambda name: "--" + name.replace("_", "-"))
    where = place(device)
    loaded = score.load(model, where, scan=scan, on_event=on_event)
    words = score.tokenizer_of(model, tokenizer, loaded)
    made = samples(loaded, words, seed=seed, tokens=tokens, temperature=temperature, on_event=on_event)
    return {
        "benchmark": "samples",
        "environment": report.environment(where, command),
        "model": score.name_of(model),
        "settings": settings,
        "samples": made,
        "notes": ["fixed prompts, nothing picked; ⟶ is where the model goes on"],
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """One line a sample, line ends as ⏎."""
    rows: list[tuple[str, ...]] = [
        (one["language"], "chat" if one["chat"] else "", _line(one["prompt"]), _line(one["text"]))
        for one in found["samples"]
    ]
    settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items())
    return [Table(f"{found['model']}: {settings}", ("language", "as", "prompt", "the model"), rows, left=4)]


def _line(text: str) -> str:
    return text.replace("\n", "⏎")


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.samples", description=about)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--tokens", type=int, default=64, help="at most so many a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.8)
    report.flags(parser)

    def go(o: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        return run(
            model=o.model, tokens=o.tokens, seed=o.seed, temperature=o.temperature, device=o.device, command=command,
            on_event=on_event,
        )  # fmt: skip

    return report.front(parser, argv, go, tables)


if __name__ == "__main__":
    sys.exit(main())
