"""`moai generate`: complete prompts from the command line, a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moai_cli import console, options
from moai_core.errors import UsageError

if TYPE_CHECKING:
    from moai_core.generation import Completion, Settings
    from moai_core.generation.files import Request
    from moai_core.training.stop import StopFlag

# ---- options that `chat` shares -------------------------------------------------------------------------------------

Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer folder or name, if the model has none of its own.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", help="End after so many tokens.", show_default="256")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.", show_default="0.8")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Choose among the K likeliest tokens; 0: all.", show_default="0")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Choose among the likeliest tokens that hold this probability.", show_default="0.95"),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Drop tokens below this fraction of the likeliest's probability.", show_default="0"),
]
Repetition = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1, tokens that occurred become less likely.", show_default="1"),
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End at this text; may be repeated.")]
SeedOrNone = Annotated[int | None, typer.Option("--seed", help="Seed of the random numbers.", show_default="a new one")]


def settings_from(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings among the flags given, checked; an error names the flag."""
    from moai_core.generation.sampling import SETTINGS, check_settings

    values = {name: flags[name] for name in SETTINGS if flags.get(name) is not None}
    check_settings(values, lambda name: "--" + name.replace("_", "-"))
    return values


def required_model(path: Path | None) -> Path:
    """The model named; if none was, an error that says how to get one."""
    if path is not None:
        return path
    runs = sorted(Path("runs").glob("*/step-*/manifest.json"), key=lambda file: file.stat().st_mtime)
    if runs:
        raise UsageError("no model given", hint=f"the newest one here: --model {runs[-1].parent.parent}")
    raise UsageError("no model given", hint="train one with `moai train --recipe cpu-tiny`, then --model runs/cpu-tiny")


def show(text: str) -> None:
    """Generated text on stdout at once, without what could steer a terminal."""
    sys.stdout.write(console.clean(text))
    sys.stdout.flush()


def on_event(event: dict[str, Any]) -> None:
    """Warnings of the core, on stderr."""
    if event.get("event") == "warning":
        console.warn(str(event.get("message")))


class ReadingBar:
    """A bar on stderr while a long prompt is read; gone before the first word of the answer."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        from moai_core.generation.engine import CHUNK

        if event["event"] != "prefill" or event["total"] <= CHUNK:
            return
        if self._bar is None:
            self._bar = console.progress()
            self._task = self._bar.add_task("reading the prompt", total=event["total"])
            self._bar.start()
        self._bar.update(self._task, completed=event["done"])
        if event["done"] >= event["total"]:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


# ---- the command ----------------------------------------------------------------------------------------------------


def generate(
    model: options.Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue.")] = None,
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
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
    stop: Stop = None,
    seed: SeedOrNone = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="With --json or a .json(l) file: log-probabilities, and so many others."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at a time; no row depends on it.")] = 16,
    tokenizer: Tokenizer = None,
    device: options.Device = "auto",
    dtype: Dtype = "auto",
    scan: options.Scan = "auto",
    as_json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Continue a prompt, or a file of them.

    Examples:

    - `moai generate --model runs/cpu-tiny --prompt "옛날 옛적에" -n 64 --seed 1`

    - `echo "Once upon a time" | moai generate --model runs/cpu-tiny --temperature 0`

    - `moai generate --model runs/cpu-tiny --input-file prompts.jsonl --output-file answers.jsonl`

    A line of prompts.jsonl: `{"prompt": "Hello", "temperature": 0, "max_new_tokens": 20, "stop": ["\\n"], "seed":
    7}`; `messages` in place of `prompt` asks in the chat template. Each row gets what it would get alone.
    """
    flags = locals()
    path = required_model(model)
    given = settings_from(flags)
    if batch_size < 1:
        raise UsageError(f"--batch-size must be a whole number >= 1 (got {batch_size})")
    from moai_core.generation import Settings, files
    from moai_core.training.stop import StopFlag

    if output_file is not None:
        files.check_output(output_file, force=force)
    requests = _requests(prompt, input_file, Settings(**given))
    if chat or system is not None:
        head = [] if system is None else [{"role": "system", "content": system}]
        requests = [
            r
            if isinstance(r.prompt, list)
            else files.Request([*head, {"role": "user", "content": r.prompt}], r.settings, r.id)
            for r in requests
        ]
    network, words, folder = files.open_model(
        path, tokenizer=tokenizer, device=device, dtype=dtype, scan=scan, on_event=on_event
    )
    flag = StopFlag()
    with flag.catching():
        records = _run(
            network, words, requests, batch_size, flag, stream=input_file is None and not (as_json or output_file)
        )
    if output_file is not None:
        flag.check()
        files.write_completions(output_file, records)
        console.note(f"{len(records)} completions in {output_file}")
    if as_json:
        sys.stdout.write(files.dumps({"model": str(folder), "results": records}, indent=2) + "\n")
    elif output_file is None and input_file is not None:
        for one in records:
            sys.stdout.write(
                (files.dumps(one) if input_file.endswith(".jsonl") else files.one_line(one["text"])) + "\n"
            )
    flag.check()


def _requests(prompt: str | None, input_file: str | None, settings: Settings) -> list[Request]:
    """The prompts: --prompt, --input-file, or what comes from a pipe as one prompt."""
    from moai_core.generation import files

    if prompt is not None and input_file is not None:
        raise UsageError("give --prompt or --input-file, not both")
    if prompt is not None:
        return [files.Request(prompt, settings)]
    if input_file == "-":
        return files.read_prompts("stdin", settings, raw=sys.stdin.buffer.read())
    if input_file is not None:
        return files.read_prompts(input_file, settings)
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no prompt given", hint='--prompt "Once upon a time", --input-file prompts.txt, or a pipe')
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as exc:
        raise UsageError(f"stdin: not valid UTF-8 (byte {exc.start + 1})") from exc
    if not text:
        raise UsageError("stdin: no prompt in it", hint='--prompt "" begins a text from nothing')
    return [files.Request(text, settings)]


def _run(
    model: Any, tokenizer: Any, requests: list[Request], batch_size: int, flag: StopFlag, *, stream: bool
) -> list[dict]:
    """Generate with a progress bar, or, for a single prompt, with the text as it comes."""
    from moai_core.generation import engine, files

    reading = ReadingBar()
    rows = console.progress()
    task = rows.add_task("generating", total=len(requests))
    many = len(requests) > 1

    def report(event: dict[str, Any]) -> None:
        if not many:
            reading(event)
        elif event["event"] == "row":
            rows.update(task, completed=event["done"])

    with rows if many else nullcontext():
        try:
            answers = engine.generate(
                model,
                tokenizer,
                [request.prompt for request in requests],
                [request.settings for request in requests],
                batch_size=batch_size,
                on_text=(lambda row, text: show(text)) if stream else None,
                on_event=report,
                stop=lambda: bool(flag),
            )
        finally:
            reading.close()
    if stream:
        show("\n")
        console.note(summary(answers[0]))
    return [files.record(request, answer) for request, answer in zip(requests, answers, strict=True)]


def summary(answer: Completion) -> str:
    """Counts, speed, how the answer ended and its seed, in one line."""
    speed = f"{len(answer.tokens) / answer.decode_seconds:.0f} tokens/s, " if answer.decode_seconds else ""
    counts = f"{answer.prompt_tokens} + {len(answer.tokens)} tokens"
    return f"{counts}, {speed}ended by {answer.finish_reason}, seed {answer.seed}"
