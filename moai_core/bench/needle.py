"""Needle in a haystack: is a number that was said once, so many tokens ago, still there when it is asked for?

    python -m moai_core.bench.needle --model runs/NAME [--lengths 512,2048,8192] [--depths 0,25,50,75,100] [--json]

A prompt of exactly so many tokens is filler in one of four languages with a sentence "The secret number of KEY is
VALUE." at some depth (0 % the beginning), and ends with "The secret number of KEY is". With `pairs` above 1 other keys
have numbers too, at random depths. Judged twice: `exact`, the likeliest continuation spells the number, for which a
small model is mostly too weak; and `top-1`, the number is the likeliest among `candidates` (the others of the text
first, then numbers that stand nowhere), with the mean rank beside it. Values are drawn at random, so chance is exact:
1 / candidates, and 10^-digits. Everything is a function of the seed. Filler comes from the packaged corpus. Sources:
passkey retrieval (arXiv 2305.16300), RULER's key-value needles (arXiv 2404.06654).
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moai_core.bench import report, score
from moai_core.bench.needle_prompts import LANGUAGES, Haystacks, Needle
from moai_core.bench.pictures import heatmaps
from moai_core.bench.report import Table
from moai_core.device import place
from moai_core.errors import UsageError

CHUNK = 2048
_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 18}


# ---- reading and answering


@torch.no_grad()
def answer(model: Any, needles: Sequence[Needle], tokenizer: Any) -> list[tuple[bool, int]]:
    """(whether the likeliest continuation spells the value, the value's rank among the candidates, from 1) for each of
    some prompts of equal length.
    """
    device = next(model.parameters()).device
    logits, state = _read(model, torch.tensor([needle.ids for needle in needles], device=device))
    ranks = []
    for row, needle in enumerate(needles):
        costs = _costs(model, needle.candidates, logits[row], state, row)
        # A tie counts against the model: one that says the same of everything has found nothing.
        ranks.append(int((costs <= costs[0]).sum()))
    longest = max(len(ids) for needle in needles for ids in needle.candidates)
    chosen = [logits.argmax(-1)]
    for _ in range(longest - 1):
        after, state = _extend(model, chosen[-1][:, None], state)
        chosen.append(after[:, -1].argmax(-1))
    written = torch.stack(chosen, 1).tolist()
    spelled = [tokenizer.decode(ids).strip().startswith(n.value) for ids, n in zip(written, needles, strict=True)]
    return list(zip(spelled, ranks, strict=True))


def _read(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    """Logits (B, V) after prompts (B, L), and the state or cache behind them."""
    state, out = None, None
    if not score.has_state(model):
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float(), out.past_key_values
    for part in ids.split(CHUNK, 1):
        out = model(input_ids=part, state=state, use_cache=True, logits_to_keep=1)
        state = out.state
    assert out is not None
    return out.logits[:, -1].float(), state


def _extend(model: Any, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
    if score.has_state(model):
        out = model(input_ids=ids, state=state, use_cache=True)
        return out.logits.float(), out.state
    out = model(input_ids=ids, past_key_values=state, use_cache=True)
    return out.logits.float(), out.past_key_values


def _costs(model: Any, candidates: Sequence[list[int]], logits: Tensor, state: Any, row: int) -> Tensor:
    """(K,) nats of each candidate after the prompt of a row."""
    width = max(map(len, candidates))
    ids = torch.tensor([one + [0] * (width - len(one)) for one in candidates], device=logits.device)
    real = torch.tensor([[n < len(one) for n in range(width)] for one in candidates], device=logits.device)
    nats = -logits.log_softmax(-1)[ids[:, 0]]
    if width > 1:
        at = torch.full((len(candidates),), row, device=logits.device)
        if score.has_state(model):
            forked = state.select(at)
        else:
            forked = copy.deepcopy(state)
            forked.batch_select_indices(at)
        after, _ = _extend(model, ids[:, :-1], forked)
        rest = -after.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        nats = nats + (rest * real[:, 1:]).sum(1)
    return nats


# ---- the grid


def measure(
    models: dict[str, Any],
    tokenizer: Any,
    *,
    languages: Sequence[str] = tuple(LANGUAGES),
    lengths: Sequence[int] = (512, 2048, 8192),
    depths: Sequence[int] = (0, 25, 50, 75, 100),
    trials: int = 4,
    pairs: int = 1,
    candidates: int = 10,
    digits: int = 5,
    seed: int = 0,
    filler: str | None = None,
    device: torch.device,
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """{"benchmark", "environment", "chance", "settings", "results", "notes"}, JSON-able; a result is {"model",
    "language", "length", "depth" (percent), "trials", "exact", "top1" (shares), "rank" (mean, from 1)}.
    """
    stacks = {name: Haystacks(name, tokenizer, filler) for name in languages}
    results: list[dict[str, Any]] = []
    cells = [(name, length) for length in lengths for name in languages]
    total, done = len(models) * len(cells), 0
    for model_name, model in models.items():
        for name, length in cells:
            on_event({"event": "progress", "task": f"{model_name}, {name}, {length:,}", "done": done, "total": total})
            asked = [
                (depth, stacks[name].make(
                    length, depth / 100, random.Random(f"{seed}/{name}/{length}/{depth}/{trial}"),
                    pairs=pairs, candidates=candidates, digits=digits,
                ))
                for depth in depths for trial in range(trials)
            ]  # fmt: skip
            found: dict[int, list[tuple[bool, int]]] = {depth: [] for depth in depths}
            for part in _parts(asked, max(1, _TOKENS[device.type] // length)):
                for (depth, _), one in zip(part, answer(model, [n for _, n in part], tokenizer), strict=True):
                    found[depth].append(one)
            results += [
                {"model": model_name, "language": name, "length": length, "depth": depth, **_shares(found[depth])}
                for depth in depths
            ]
            done += 1
    notes = [f"{trials} prompts a cell; a tie for the first place is not the first place"]
    if pairs > 1:
        notes.append(f"a model that knows which numbers occurred, not whose they are, comes to {1 / pairs:.0%} top-1")
    return {
        "benchmark": "needle",
        "environment": report.environment(device, command),
        "models": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "chance": {"exact": 10.0**-digits, "top1": 1 / candidates, "rank": (candidates + 1) / 2},
        "settings": {"trials": trials, "pairs": pairs, "candidates": candidates, "digits": digits, "seed": seed},
        "results": results,
        "notes": notes,
    }


def _parts(values: list[Any], size: int) -> Iterator[list[Any]]:
    return (values[at : at + size] for at in range(0, len(values), size))


def _shares(found: list[tuple[bool, int]]) -> dict[str, Any]:
    count = len(found)
    return {
        "trials": count,
        "exact": sum(exact for exact, _ in found) / count,
        "top1": sum(rank == 1 for _, rank in found) / count,
        "rank": sum(rank for _, rank in found) / count,
    }


# ---- what is shown


def tables(found: dict[str, Any]) -> list[Table]:
    """One table a model: top-1 (exact) by language and depth, a column a length; the last line is chance."""
    result = []
    chance, settings = found["chance"], found["settings"]
    by_chance = f"{chance['top1']:.0%} ({chance['exact']:.3%})"
    for model in found["models"]:
        mine = [one for one in found["results"] if one["model"] == model]
        lengths = sorted({one["length"] for one in mine})
        rows: list[tuple[str, ...]] = []
        for language in dict.fromkeys(one["language"] for one in mine):
            for depth in dict.fromkeys(one["depth"] for one in mine):
                cells = {o["length"]: o for o in mine if o["language"] == language and o["depth"] == depth}
                rows.append((language, f"{depth} %", *(_share(cells[length]) for length in lengths)))
        means = [_mean([one for one in mine if one["length"] == length]) for length in lengths]
        rows.append(("all", "", *(_share(mean) for mean in means)))
        rows.append(("mean rank", "", *(f"{mean['rank']:.1f}" for mean in means)))
        rows.append(("chance", "", *(by_chance for _ in lengths)))
        rows.append(("chance rank", "", *(f"{chance['rank']:.1f}" for _ in lengths)))
        title = (
            f"{model}: top-1 among {settings['candidates']} numbers (exact continuation), "
            f"{settings['pairs']} pair{'s' * (settings['pairs'] > 1)}"
        )
        names = (f"{length:,}" for length in lengths)
        result.append(Table(title, ("language", "depth", *names), rows, left=2))
    return result


def _mean(found: list[dict[str, Any]]) -> dict[str, float]:
    return {key: sum(one[key] for one in found) / len(found) for key in ("top1", "exact", "rank")}


def _share(one: dict[str, Any]) -> str:
    return f"{one['top1']:.0%} ({one['exact']:.0%})"


def picture(found: dict[str, Any], path: Path) -> None:
    """Maps of top-1 over length and depth, one a model and language. StorageError."""
    panels = {}
    lengths = sorted({one["length"] for one in found["results"]})
    depths = sorted({one["depth"] for one in found["results"]})
    cells = {(o["model"], o["language"], o["length"], o["depth"]): o["top1"] for o in found["results"]}
    for model, language in dict.fromkeys((one["model"], one["language"]) for one in found["results"]):
        name = f"{language}, {model}" if len(found["models"]) > 1 else language
        panels[name] = [[cells[model, language, length, depth] for length in lengths] for depth in depths]
    chance = f"top-1 among {found['settings']['candidates']} numbers, chance {found['chance']['top1']:.0%}"
    names = [f"{length:,}" for length in lengths], [f"{depth} %" for depth in depths]
    title = f"{chance}; {report.headline(found['environment'])}"
    heatmaps(path, panels, x=names[0], y=names[1], labels=("tokens", "depth"), title=title)


def run(
    *,
    models: Sequence[Path],
    lengths: Sequence[int] = (512, 2048, 8192),
    depths: Sequence[int] = (0, 25, 50, 75, 100),
    languages: Sequence[str] = tuple(LANGUAGES),
    trials: int = 4,
    pairs: int = 1,
    candidates: int = 10,
    digits: int = 5,
    seed: int = 0,
    filler: str | None = None,
    tokenizer: str | None = None,
    scan: str = "auto",
    plot: Path | None = None,
    device: str = "auto",
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """`measure` with the words of flags, and the picture."""
    most = len(LANGUAGES["en"].keys)
    limits = (("--trials", trials, 1, 10_000), ("--pairs", pairs, 1, most), ("--candidates", candidates, 2, 1000),
              ("--digits", digits, 3, 12))  # fmt: skip
    for flag, value, least, greatest in limits:
        if not least <= value <= greatest:
            raise UsageError(f"{flag} must be {least} to {greatest} (got {value})")
    if wrong := [depth for depth in depths if not 0 <= depth <= 100]:
        raise UsageError(f"--depths must be percentages from 0 to 100 (got {wrong[0]})")
    if candidates < pairs:
        raise UsageError(f"--candidates must be at least --pairs ({pairs}; got {candidates})")
    report.check_plot(plot)
    where = place(device)
    loaded = score.load_all(models, where, scan=scan, on_event=on_event)
    words = score.tokenizer_of(models[0], tokenizer, next(iter(loaded.values())))
    found = measure(
        loaded, words, languages=languages, lengths=lengths, depths=depths, trials=trials, pairs=pairs,
        candidates=candidates, digits=digits, seed=seed, filler=filler, device=where, command=command,
        on_event=on_event,
    )  # fmt: skip
    return report.with_picture(found, plot, picture)


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.needle", description=about)
    parser.add_argument("--model", action="append", type=Path, required=True, help="model folder; may be repeated")
    parser.add_argument("--lengths", default="512,2048,8192", help="tokens of a prompt")
    parser.add_argument("--depths", default="0,25,50,75,100", help="percent of the prompt before the needle")
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    parser.add_argument("--trials", type=int, default=4, help="prompts a cell")
    parser.add_argument("--pairs", type=int, default=1, help="keys with numbers in each prompt")
    parser.add_argument("--candidates", type=int, default=10, help="numbers to choose among")
    parser.add_argument("--digits", type=int, default=5, help="of each number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the maps")
    report.flags(parser)

    def go(o: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        return run(
            models=o.model, lengths=report.numbers("--lengths", o.lengths, least=32),
            depths=report.numbers("--depths", o.depths, least=0),
            languages=report.among("--languages", o.languages, tuple(LANGUAGES)), trials=o.trials, pairs=o.pairs,
            candidates=o.candidates, digits=o.digits, seed=o.seed, plot=o.plot, device=o.device, command=command,
            on_event=on_event,
        )  # fmt: skip

    return report.front(parser, argv, go, tables)


if __name__ == "__main__":
    sys.exit(main())
