"""`moai quantize`: a smaller model out of a trained one, with a report of what that cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moai_cli import console
from moai_cli.options import Device, Embeddings, Force, GroupSize, Json, Model, loading, required_model

if TYPE_CHECKING:
    from rich.progress import Progress

    from moai_core.quantize.calibrate import Calibration
    from moai_core.quantize.report import Evaluation
    from moai_core.training.stop import StopFlag


def quantize(
    model: Model = None,
    method: Annotated[str, typer.Option("--method", help="int4, gptq, awq, fp8, fp4, bnb4, bnb8.")] = "int4",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default="runs/MODEL-METHOD")
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="4 or 8, for int4 and gptq.", show_default="4")] = None,
    group_size: GroupSize = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Zero in the middle, or where it fits.", show_default="awq: no"),
    ] = None,
    embeddings: Embeddings = None,
    small: Annotated[bool, typer.Option("--small-int8", help="x_proj and dt_proj in int8, too.")] = False,
    rotate: Annotated[bool, typer.Option("--rotate", help="Hadamard rotation of out_proj's input.")] = False,
    calib: Annotated[
        str | None,
        typer.Option("--calib", help="Text to calibrate on, for gptq and awq.", show_default="the packaged corpus"),
    ] = None,
    sequences: Annotated[int, typer.Option("--calib-sequences", help="How many sequences.")] = 512,
    length: Annotated[int, typer.Option("--calib-length", help="Tokens of a sequence.")] = 2048,
    evaluate: Annotated[
        str,
        typer.Option("--eval", help="Text to measure on; 'none' measures nothing.", show_default="the packaged corpus"),
    ] = "",
    limit: Annotated[int | None, typer.Option("--eval-limit", help="At most so many documents of it.")] = None,
    layout: Annotated[
        str, typer.Option("--format", help="moai, or for other tools gptq, awq, compressed-tensors.")
    ] = "moai",
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder or name; default: the model's own.", show_default=False)
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Decode a model that is quantized already, whatever that lost."),
    ] = False,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Quantize a model to 4 or 8 bits; every command reads the result.

    Examples:

    - `moai quantize --model runs/cpu-tiny --method int4 --group-size 64`

    - `moai quantize -m runs/mine --method gptq --calib mytext/ -o mine-gptq`

    - `moai quantize -m runs/mine --method awq --eval heldout.txt --json`

    - `moai quantize -m runs/mine --method gptq --format gptq -o mine-for-gptqmodel`

    Without --model: the model that comes with moai, which is int4 already and is decoded first.

    The report compares sizes, the output error of every matrix, loss on text that wasn't calibrated on, and the drift
    of the state over up to 32k tokens; it lies in the folder as quantization.json and quantization.png. An interrupted
    run goes on where it was when started again.
    """
    source = required_model(model)
    with loading(source, device):
        from moai_core.checkpoint import find
        from moai_core.device import place
        from moai_core.errors import UsageError, at_least
        from moai_core.quantize.disk import quantize_folder
        from moai_core.quantize.plan import Settings
        from moai_core.training.stop import StopFlag

    target = output or Path("runs") / f"{source.resolve().name}-{method}"
    settings = Settings(method, bits, group_size, symmetric, embeddings, small, rotate, layout)
    settings.spec()  # a wrong flag is told before anything is read
    if calib is not None and not settings.kind.calibrated:
        raise UsageError(f"--calib: --method {method} looks at no text", hint="gptq and awq do")
    for flag_name, value, usual in (("--calib-sequences", sequences, 512), ("--calib-length", length, 2048)):
        at_least((flag_name, value, 1), hint=f"without the flag: {usual}")
    held_out = _evaluation(evaluate, tokenizer, limit)
    flag, where = StopFlag(), place(device)
    bar = console.progress()
    on_event = _events(bar, flag)

    def calibration() -> Any:
        words = tokenizer or find(source)
        found = _calibration(calib, words, held_out, sequences=sequences, length=length, on_event=on_event)
        if where.type == "cpu" and (sequences, length) == (512, 2048):
            text = "512 sequences of 2,048 tokens take a processor many minutes"
            console.note(f"{text}; --calib-sequences 64 takes an eighth of them")
        return found

    with flag.catching(), flag.at_once(), bar:
        report = quantize_folder(
            source, target, settings, calibration=calibration, evaluation=held_out,
            device=where, requantize=requantize or model is None, force=force, on_event=on_event,
        )  # fmt: skip
    if json:
        console.print_json(report)
    else:
        _show(report)


def _events(bar: Progress, flag: StopFlag) -> Callable[[dict[str, Any]], None]:
    """What shows how far the work is, and ends it where a signal came."""
    task = bar.add_task("reading", total=None)
    bar.speed_estimate_period = 3600  # of all of it: a layer's parts take unlike times
    tell = console.NowAndThen()
    counted = {"layer": "layers", "calibrating": "layers", "tensor": "writing", "calibration": "reading text"}

    def on_event(event: dict[str, Any]) -> None:
        flag.check()
        kind = event["event"]
        if kind in counted:
            bar.update(task, description=counted[kind], completed=event["done"], total=event["total"])
            tell(f"{counted[kind]} {event['done']:.3g}/{event['total']}")
        elif kind == "evaluate":
            bar.update(task, description=f"measuring {event['what']}")
        elif kind == "note":
            console.note(event["message"])
        elif kind != "progress":
            console.on_event(event)

    return on_event


def _calibration(calib: str | None, tokenizer: str | Path, held_out: Evaluation | None, **how: Any) -> Calibration:
    """Sequences of the text to calibrate on, without what the model is measured on."""
    from moai_core.data.tokenize import load_tokenizer
    from moai_core.paths import RECIPES
    from moai_core.quantize import calibrate

    if calib is None:
        console.note("calibrating on the packaged corpus; --calib FILE takes your own text")
    avoid = [held_out.data] if held_out else []
    return calibrate.from_text(
        calib or str(RECIPES / "corpus" / "train"), load_tokenizer(tokenizer), avoid=avoid, **how
    )


def _evaluation(data: str, tokenizer: str | None, limit: int | None) -> Evaluation | None:
    from moai_core.data.read import find_files, read_documents
    from moai_core.errors import at_least
    from moai_core.paths import RECIPES
    from moai_core.quantize.report import Evaluation

    at_least(("--eval-limit", limit, 1), hint="leave it out to measure on all")
    if data == "none":
        return None
    chosen = data or str(RECIPES / "corpus" / "valid")
    files, _ = find_files(chosen)
    next(iter(read_documents(files)), None)  # what can't be read is told before the work
    return Evaluation(chosen, tokenizer, limit)


def _show(report: dict[str, Any]) -> None:
    mega = 1e6
    rows = [
        (part, f"{before / mega:,.2f} MB", f"{after / mega:,.2f} MB", f"{before / max(after, 1):.2f} x")
        for part, (before, after) in [
            *report["parts"].items(),
            ("all weights", (report["bytes_before"], report["bytes_after"])),
        ]
    ]
    if report["quality"]:
        before, after = report["quality"]["before"], report["quality"]["after"]
        rows += [
            (name, f"{before[key]:.4f}", f"{after[key]:.4f}", f"{after[key] / before[key] - 1:+.2%}")
            for name, key in (("loss", "loss"), ("perplexity", "perplexity"), ("bits per byte", "bits_per_byte"))
        ]
        if "kl" in after:
            rows.append(("predictions", "", f"{after['kl']:.2e} nats", "KL divergence a token"))
    rows += [
        (f"state after {entry['tokens']:,} tokens", "", f"{entry['mean']:.4f} off", f"at most {entry['max']:.4f}")
        for entry in report["drift"] or []
    ]
    console.table(("what", "before", "after", "change"), rows, title=f"{report['method']}: {report['path']}")
    worst = sorted(
        ((entry["error"], f"layer {number} {name}") for number, layer in enumerate(report["layers"])
         for name, entry in layer.items() if "error" in entry), reverse=True,
    )[:3]  # fmt: skip
    if worst:
        console.note("largest output errors: " + ", ".join(f"{name} {error:.4f}" for error, name in worst))
    console.note(f"{report['bits_per_weight']:.2f} bits a quantized number; multiplied by {report['kernel']}")
    for text in report["notes"]:
        console.note(text)
