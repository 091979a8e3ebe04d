"""`moai convert`: a model from one format into another, compared with the original at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moai_cli import console
from moai_cli.options import Force, Json, by_name


def convert(
    src: Annotated[str, typer.Argument(help="Folder, run, .gguf file, moai-30m, or a name of the Hugging Face hub.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write; for gguf a file.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="moai, transformers-mamba, falcon-mamba, jamba, mamba-ssm, gguf, qwen3; of a quantized model also "
            "gptq, awq, compressed-tensors.",
            show_default=False,
        ),
    ],
    outtype: Annotated[
        str | None,
        typer.Option("--outtype", help="f32, f16, bf16; for gguf also q8_0, q4_0.", show_default="as stored"),
    ] = None,
    trim_vocab: Annotated[
        bool, typer.Option("--trim-vocab", help="Drop the rows that only pad the vocabulary.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Compare the result with the original in fp32.")] = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Convert a model between formats; the source's format is found out.

    Examples:

    - `moai convert runs/cpu-tiny tiny-jamba --to jamba` (transformers)

    - `moai convert moai-30m moai-30m.gguf --to gguf` (the model that comes with moai, for llama.cpp)

    - `moai convert runs/cpu-tiny tiny.gguf --to gguf --outtype q8_0` (llama.cpp)

    - `moai convert state-spaces/mamba-130m mamba-130m --to moai --trim-vocab`

    - `moai convert runs/cpu-tiny-gptq tiny-gptq --to gptq` (GPTQModel, transformers)

    The result appears complete, with tokenizer and card, or not at all. At the end the same token ids run through the
    runtimes of both formats: logits further apart than 1e-4 (relative to the largest, where that is above 1; with f16
    and bf16 less than three quarters of the likeliest tokens alike), and the result is deleted, exit code 3. What a
    format can't express is refused, with those that can. qwen3 is for MOAI-LLM's old transformer. Quantized matrices,
    also those of GPTQ, AWQ and compressed-tensors, stay as they are in moai's format (without --outtype) and in gptq,
    awq and compressed-tensors; every other format gets them decoded, and so are those behind a rotation or AWQ's
    vector.
    """
    from moai_core.convert import convert as run
    from moai_core.training.stop import StopFlag

    flag = StopFlag()
    bar = console.progress()
    task = bar.add_task("reading", total=None)

    def on_event(event: dict[str, Any]) -> None:
        flag.check()  # a signal inside a library that swallows every exception
        if event["event"] == "tensor":
            bar.update(task, description="tensors", completed=event["done"], total=event["total"])
        elif event["event"] == "fetch":
            bar.update(task, description=f"fetching {event['name']}")
        elif event["event"] == "check":
            bar.update(task, visible=False)  # a task that had a total can't lose it
            bar.add_task("comparing", total=None)
        else:
            console.on_event(event)

    # Nothing is worth saving half-way: a signal ends it at once, and what is half written goes.
    with flag.catching(), flag.at_once(), bar:
        report = run(
            by_name(src), dst, to, outtype=outtype, trim_vocab=trim_vocab, check=check, force=force, on_event=on_event
        )
    if json:
        console.print_json(report)
        return
    parity = report["parity"]
    rows = [
        ("source", f"{report['source']['name']} ({report['source']['format']})"),
        ("result", f"{report['target']['path']} ({report['target']['format']})"),
        ("parameters", f"{report['parameters']:,}"),
        ("stored as", f"{report['dtype']}, {report['bytes']:,} bytes"),
        ("vocabulary", f"{report['vocab_size']:,}"),
    ]
    if "skipped" in parity:
        rows.append(("comparison", f"skipped: {parity['skipped']}"))
    else:
        rows += [
            ("compared in fp32", " and ".join(parity["runtimes"])),
            ("largest difference", f"{parity['max_delta']:.2e} of logits up to {parity['largest']:.2f}"),
            ("likeliest token", f"the same at {parity['argmax']} of {parity['positions']} positions"),
            ("next token", f"the same in {parity['greedy']} of {parity['tokens']} greedy steps"),
        ]
    console.table(("what", "value"), rows)
    for note in report["notes"]:
        console.note(note)
