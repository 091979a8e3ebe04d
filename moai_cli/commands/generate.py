"""`moai generate`: complete prompts from the command line, a file or a pipe."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moai_cli import console, options
from moai_core.errors import UsageError

if TYPE_CHECKING:
    from moai_core.generation import Settings
    from moai_core.generation.files import Request
    from moai_core.training.stop import StopFlag


def generate(
    text: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text to continue.", show_default=False)] = None,
    model: options.Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The same as a flag.")] = None,
    input_file: Annotated[
        str | None,
        typer.Option(
            "--input-file", "-i", help="Prompts: .jsonl (an object a line), else a prompt a line; - is stdin."
        ),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option("--output-file", "-o", help="Completions: .jsonl, .json, else a line of text each."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message; implies --chat.")] = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Repetition = None,
    stop: options.Stop = None,
    seed: options.SeedOrNone = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="With --json or a .json(l) file: log-probabilities, and so many others."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at a time; no row depends on it.")] = 16,
    tokenizer: options.Tokenizer = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    scan: options.Scan = "auto",
    engine: options.Engine = "auto",
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Continue a prompt, or a file of them.

    Examples:

    - `moai generate "옛날 옛적에" -n 64 --seed 1` (with the model that comes with moai)

    - `echo "Once upon a time" | moai generate --model runs/cpu-tiny --temperature 0`

    - `moai generate --model runs/cpu-tiny --input-file prompts.jsonl --output-file answers.jsonl`

    A line of prompts.jsonl: `{"prompt": "Hello", "temperature": 0, "max_new_tokens": 20, "stop": ["\\n"], "seed":
    7}`; `messages` in place of `prompt` asks in the chat template. Each row gets what it would get alone.
    """
    flags = locals()
    if text is not None and prompt is not None:
        raise UsageError(
            f"two prompts: {text[:40]!r} and --prompt {prompt[:40]!r}", hint="quote a prompt of many words"
        )
    if text == "":
        raise UsageError("the prompt is empty", hint='--prompt "" begins a text from nothing')
    lines = output_file is None and input_file is not None and input_file.endswith(".jsonl")
    if logprobs is not None and not (as_json or lines or (output_file and output_file.suffix in (".json", ".jsonl"))):
        raise UsageError("--logprobs: plain text has no place for them", hint="add --json, or -o FILE.jsonl")
    path = options.required_model(model)
    with options.loading(path, device):
        given = options.sampling(flags)
        if batch_size < 1:
            raise UsageError(f"--batch-size must be a whole number >= 1 (got {batch_size})")
        from moai_core.generation import Settings, decode_batch, files
        from moai_core.training.stop import StopFlag

    if output_file is not None:
        files.check_output(output_file, "--output-file", force=force)
    requests = _requests(text if prompt is None else prompt, input_file, Settings(**given))
    if chat or system is not None:
        requests = [_as_chat(request, system) for request in requests]
    network, words, folder = files.open_model(
        path, tokenizer=tokenizer, device=device, dtype=dtype, scan=scan, on_event=console.on_event
    )
    decode_batch.pick(network, engine)
    flag = StopFlag()
    stream = input_file is None and not (as_json or output_file)
    with flag.catching():
        records = _run(network, words, requests, batch_size, flag, stream=stream, decoder=engine)
    if output_file is not None:
        flag.check()
        files.write_completions(output_file, records)
        engine, many = decode_batch.pick(network, engine), "s" * (len(records) != 1)
        console.note(f"{len(records)} completion{many} in {output_file}, engine {engine}")
    if as_json:
        sys.stdout.write(files.dumps({"model": str(folder), "results": records}, indent=2) + "\n")
    elif output_file is None and input_file is not None:
        for one in records:
            sys.stdout.write((files.dumps(one) if lines else files.one_line(one["text"])) + "\n")
    flag.check()


def _requests(prompt: str | None, input_file: str | None, settings: Settings) -> list[Request]:
    """The prompts: --prompt, --input-file, or what comes from a pipe as one prompt."""
    from moai_core.generation import files

    if prompt is not None and input_file is not None:
        raise UsageError("give a prompt or --input-file, not both", hint="a file holds a prompt a line")
    if prompt is not None:
        return [files.Request(prompt, settings)]
    if input_file == "-":
        return files.read_prompts("stdin", settings, raw=sys.stdin.buffer.read())
    if input_file is not None:
        return files.read_prompts(input_file, settings)
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "no prompt given", hint='moai generate "Once upon a time", --input-file prompts.txt, or a pipe'
        )
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as exc:
        raise UsageError(f"stdin: not valid UTF-8 (byte {exc.start + 1})") from exc
    if not text:
        raise UsageError("stdin: no prompt in it", hint='--prompt "" begins a text from nothing')
    return [files.Request(text, settings)]


def _as_chat(request: Request, system: str | None) -> Request:
    """The prompt as a user's message, unless it has messages of its own."""
    from moai_core.generation import files

    if isinstance(request.prompt, list):
        return request
    head = [] if system is None else [{"role": "system", "content": system}]
    return files.Request([*head, {"role": "user", "content": request.prompt}], request.settings, request.id)


def _run(
    model: Any,
    tokenizer: Any,
    requests: list[Request],
    batch_size: int,
    flag: StopFlag,
    *,
    stream: bool,
    decoder: str,
) -> list[dict]:
    """Generate with a progress bar, or, for a single prompt, with the text as it comes."""
    from moai_core.generation import decode_batch, engine, files

    reading = console.ReadingBar()
    rows = console.progress()
    task = rows.add_task("generating", total=len(requests))
    many, tell = len(requests) > 1, console.NowAndThen()

    def report(event: dict[str, Any]) -> None:
        if not many:
            reading(event)
        elif event["event"] == "row":
            rows.update(task, completed=event["done"])
            tell(f"generating {event['done']}/{event['total']}")

    with rows if many else nullcontext():
        try:
            answers = engine.generate(
                model,
                tokenizer,
                [request.prompt for request in requests],
                [request.settings for request in requests],
                batch_size=batch_size,
                engine=decoder,
                on_text=(lambda row, text: console.show(text)) if stream else None,
                on_event=report,
                stop=lambda: bool(flag),
            )
        finally:
            reading.close()
    if stream:
        console.show("\n")
        console.note(f"{answers[0].summary()}, engine {decode_batch.pick(model, decoder)}")
    return [files.record(request, answer) for request, answer in zip(requests, answers, strict=True)]
