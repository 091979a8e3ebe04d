"""The card of a model: README.md from what was recorded and measured, and nothing else.

    python -m moai_core.bench.card --model FOLDER --run runs/pretrain --run runs/chat --data runs/mix/mix.json \\
        --report pair.json --report needle.json --report samples.json --title moai-30m [--licence apache-2.0]

Size and format come from the folder, training and its curves from metrics.jsonl and recipe.yaml of the runs, sources
and licences from mix.json of `moai data build`, figures and samples from the JSON of `moai eval` and `moai bench
twin|context|needle|samples`. What is missing is left out, never filled in. The card and its pictures join the folder's
manifest; sections on quantization and conversion stay. Left out: what a model is bad at beyond what every model of its
kind is (`limits`).
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moai_core import config as sizes
from moai_core import footprint, storage
from moai_core import recipe as recipes
from moai_core.bench import card_data, context, needle, samples, twin
from moai_core.bench.card_data import table
from moai_core.bench.report import Table
from moai_core.errors import CheckpointError, MoaiError, UsageError
from moai_core.paths import MODELS
from moai_core.recipe import Recipe
from moai_core.training import metrics

README = "README.md"
# What a model of a few million parameters is, whatever its data.
LIMITS = (
    "It knows next to nothing of the world, makes things up, and loses the thread after a few sentences.",
    "It can't calculate, write working code or give advice; nothing it says about health, law or money means anything.",
    "It was trained on public text that nobody has read in full: what is unfair or wrong there may come out again.",
)


def make(
    folder: str | Path,
    *,
    title: str,
    runs: Sequence[str | Path] = (),
    data: Sequence[str | Path] = (),
    reports: Sequence[dict[str, Any]] = (),
    licence: str | None = None,
    limits: Iterable[str] = LIMITS,
) -> dict[str, bytes]:
    """The files of the card: README.md, pictures of each run's losses and of its validation sets, ATTRIBUTION.md.
    Raises CheckpointError for a folder or record that can't be read, UsageError for a report of another kind.
    """
    model = _config(Path(folder))
    mixes = [card_data.read(Path(path)) for path in data]
    sources = [text for path in data if (text := card_data.attribution(Path(path)))]
    files: dict[str, bytes] = {}
    parts = [_head(title, model, mixes, licence), _use(title), _size(Path(folder), model)]
    if runs:
        text, files = _training([Path(run) for run in runs])
        parts.append(text)
    if mixes:
        parts.append(card_data.section(mixes, whole=not sources))
        parts.append(card_data.licence(mixes, licence))
    if sources:
        files[card_data.ATTRIBUTION] = ("\n\n".join(text.strip() for text in sources) + "\n").encode()
    parts += _measured(runs, reports, quantized=bool(model.get("quantization")))
    parts += _kept(Path(folder) / README)
    parts.append("## What it can't do\n\n" + "\n".join(f"- {line}" for line in limits))
    return {README: ("\n\n".join(part.strip() for part in parts if part) + "\n").encode(), **files}


def write(folder: str | Path, **about: Any) -> Path:
    """Writes the files of `make` into a model folder, whole or not at all; its manifest covers them. Raises
    StorageError besides.
    """
    place = Path(folder)
    made = make(place, **about)
    if not (place / storage.MANIFEST).exists():
        for name, content in made.items():
            storage.write_file(place / name, content)
        return place / README
    storage.verify(place)
    with storage.new_folder(place) as writer:
        for name in storage.read_manifest(place):
            if name not in made:
                shutil.copyfile(place / name, writer.path / name)
        for name, content in made.items():
            writer.write(name, content)
    return place / README


def _kept(old: Path) -> list[str]:
    """The sections that `moai quantize` and `moai convert` wrote into the card that is there."""
    text = old.read_text(encoding="utf-8", errors="replace") if old.is_file() else ""
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return [section for section in sections if section.startswith(("## Quantization", "## Conversion"))]


# ---- the model


def _config(folder: Path) -> dict[str, Any]:
    values = storage.read_json(folder / "config.json")
    if not isinstance(values, dict) or values.get("model_type") != sizes.MODEL_TYPE:
        raise CheckpointError(f"{folder / 'config.json'}: not of a moai model")
    return values


def _head(title: str, model: dict[str, Any], mixes: Sequence[dict[str, Any]], licence: str | None) -> str:
    known = {"en", "ko", "ja", "zh"}
    languages = sorted({one["lang"] for mix in mixes for one in mix["sources"]} & known)
    lines = ["---", "library_name: moai", "pipeline_tag: text-generation", "tags: [mamba, moai]"]
    lines += [f"license: {licence}"] if licence else []
    lines += [f"language: [{', '.join(languages)}]"] if languages else []
    numbers = {name: model[name] for name in sizes.DEFAULTS if name in model}
    count = footprint.parameters(sizes.fields(**numbers))["total"]
    what = f"A pure-Mamba language model of {count:,} parameters: no attention, and a state of constant size."
    return "\n".join([*lines, "---", "", f"# {title}", "", what])


def _use(title: str) -> str:
    if title in MODELS:
        return f"""## Use

It comes with moai. Commands that are given no model use it; elsewhere its name is a model: `--model {title}`.

    moai chat
    moai generate "Once upon a time"
"""
    return f"""## Use

    moai chat --model {title}
    moai generate --model {title} "Once upon a time"
"""


def _size(folder: Path, model: dict[str, Any]) -> str:
    shape = ("hidden_size", "num_hidden_layers", "intermediate_size", "state_size", "conv_kernel_size", "vocab_size")
    rows: list[tuple[str, ...]] = [(name, f"{model[name]:,}") for name in shape if name in model]
    rows.append(("tied head", "yes" if model.get("tie_word_embeddings") else "no"))
    quantized = model.get("quantization")
    if quantized:
        kinds = sorted({one["format"] for one in quantized["modules"].values()})
        rows.append(
            ("stored as", f"{', '.join(kinds)} ({quantized.get('method', '?')}), the rest {model.get('dtype')}")
        )
    else:
        rows.append(("stored as", str(model.get("dtype"))))
    weights = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    rows.append(("weights on disk", f"{weights / 1e6:,.1f} MB"))
    return "## Size\n\n" + table(Table("", ("", ""), rows))


# ---- its training


def _training(runs: Sequence[Path]) -> tuple[str, dict[str, bytes]]:
    rows: list[tuple[str, ...]] = []
    pictures: dict[str, bytes] = {}
    shown = []
    for number, run in enumerate(runs, 1):
        recipe = recipes.load(run / "recipe.yaml")
        steps = [row for row in metrics.read_rows(run / metrics.METRICS) if row.get("kind") == "train"]
        if not steps:
            raise CheckpointError(f"{run / metrics.METRICS}: records no step", hint="name the folder of a finished run")
        rows.append(_phase(run.name, recipe, steps))
        drawn = metrics.plot(run, title=recipe.name)
        assert drawn is not None
        name = f"loss-{number}.png" if len(runs) > 1 else "loss.png"
        pictures[name] = drawn.read_bytes()
        shown.append(f"![losses of {run.name}]({name})")
        if curves := _curves(run):
            pictures[name.replace("loss", "valid")] = curves
            shown.append(f"![validation sets of {run.name}]({name.replace('loss', 'valid')})")
    columns = (
        "run",
        "steps",
        "tokens",
        "tokens a step",
        "lr",
        "schedule",
        "precision",
        "tokens/s",
        "MFU",
        "train loss",
    )
    return "## Training\n\n" + table(Table("", columns, rows)) + "\n\n" + "\n\n".join(shown), pictures


def _curves(run: Path) -> bytes | None:
    """Bits per byte of each named validation set over the steps, as PNG; None where fewer than two were measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in metrics.read_rows(run / metrics.METRICS) if row.get("kind") == "valid" and row.get("sets")]
    if len(rows) < 2:
        return None
    figure = Figure(figsize=(9, 4))
    canvas, axes = FigureCanvasAgg(figure), figure.add_axes((0.08, 0.13, 0.89, 0.83))
    for name in rows[-1]["sets"]:
        curve = [(row["step"], row["sets"][name]["bits_per_byte"]) for row in rows if name in row["sets"]]
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=name if name.isascii() else None)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, ncols=2)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _phase(name: str, recipe: Recipe, steps: list[dict[str, Any]]) -> tuple[str, ...]:
    last = steps[-1]
    peak = max(row["lr"] for row in steps)
    losses = [row["loss"] for row in steps[-50:] if row.get("loss") is not None]
    loss = f"{sum(losses) / len(losses):.4f}" if losses else "-"
    gpu = recipe.hardware.gpu or ""
    speed = f"{_median(row['tokens_per_s'] for row in steps):,.0f}" + (f" ({gpu})" if gpu else "")
    shares = [row["mfu"] for row in steps if "mfu" in row]
    mfu = f"{_median(shares):.1%}" if shares else "-"
    cells = (f"{last['step']:,}", f"{last['tokens']:,}", f"{last['tokens'] / last['step']:,.0f}", f"{peak:g}")
    return (name, *cells, recipe.optim.schedule, recipe.train.precision, speed, mfu, loss)


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


# ---- its figures


def _measured(runs: Sequence[str | Path], reports: Sequence[dict[str, Any]], *, quantized: bool) -> list[str]:
    parts = []
    held_out: list[tuple[str, ...]] = []
    if runs:
        held_out += _validation(Path(runs[-1]))
    held_out += [_figures(one["data"], one) for one in reports if "benchmark" not in one and "bits_per_byte" in one]
    if held_out:
        columns = ("held-out text", "bits per byte", "perplexity", "loss", "tokens", "bytes")
        text = "## Held-out text\n\n" + table(Table("", columns, held_out))
        if runs and quantized:
            text += "\n\nFigures marked as validation are those at the end of training, before quantization."
        parts.append(text)
    for one in reports:
        if "benchmark" not in one and "bits_per_byte" in one:
            continue
        kind = one.get("benchmark")
        if kind not in _SECTIONS:
            raise UsageError(
                f"a report of {kind!r} has no place in a card", hint=f"reports: moai eval, {', '.join(_SECTIONS)}"
            )
        parts.append(_SECTIONS[str(kind)](one))
    return parts


def _validation(run: Path) -> list[tuple[str, ...]]:
    rows = [row for row in metrics.read_rows(run / metrics.METRICS) if row.get("kind") == "valid"]
    if not rows:
        return []
    last = rows[-1]
    sets = {f"{name} (validation)": one for name, one in (last.get("sets") or {}).items()}
    return [
        _figures(name, one) for name, one in {**sets, "all (validation)": {**last, "loss": last["valid_loss"]}}.items()
    ]


def _figures(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    numbers = [
        "-" if one.get(key) is None else f"{one[key]:.{digits}f}"
        for key, digits in (("bits_per_byte", 4), ("perplexity", 3), ("loss", 4))
    ]
    return (Path(name).name, *numbers, *(f"{one.get(key) or 0:,}" for key in ("tokens", "bytes")))


def _section(title: str, tables: Callable[[dict[str, Any]], list[Table]]) -> Callable[[dict[str, Any]], str]:
    def section(one: dict[str, Any]) -> str:
        parts = [f"## {title}"]
        for one_table in tables(one):
            parts += [one_table.title + ":"] if one_table.title else []
            parts.append(table(one_table))
        notes = "\n".join(f"- {note}" for note in one["notes"])
        return "\n\n".join([*parts, notes])

    return section


def _samples(one: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in one["settings"].items())
    head = f"## Samples\n\nA fixed list of prompts, every answer as it came: {settings}."
    return f"{head}\n\n{samples.markdown(one['samples'])}"


_SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "twin": _section("Beside a transformer", twin.tables),
    "context": _section("Long context", context.tables),
    "needle": _section("Needles", needle.tables),
    "samples": _samples,
}


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.card", description=about)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder, which gets the card")
    parser.add_argument("--title", help="the model's name (default: the folder's)")
    parser.add_argument("--run", action="append", type=Path, default=[], help="run folder; several in their order")
    parser.add_argument("--data", action="append", type=Path, default=[], help="mix.json of the training text")
    parser.add_argument("--report", action="append", type=Path, default=[], help="JSON of moai eval or moai bench")
    parser.add_argument("--licence", help="of the weights, as an SPDX identifier")
    parser.add_argument("--limit", action="append", default=[], help="one more thing that the model can't do")
    o = parser.parse_args(argv)
    try:
        place = write(
            o.model,
            title=o.title or o.model.resolve().name,
            runs=o.run,
            data=o.data,
            reports=[_report(path) for path in o.report],
            licence=o.licence,
            limits=[*LIMITS, *o.limit],
        )
    except MoaiError as exc:
        hint = f"\nhint: {exc.hint}" if exc.hint else ""
        print(f"error: {exc.message}{hint}", file=sys.stderr)
        return exc.exit_code
    print(place)
    return 0


def _report(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(f"{path}: not a report ({exc})", hint="give what --json printed") from exc
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a report", hint="give what --json printed")
    return value


if __name__ == "__main__":
    sys.exit(main())
