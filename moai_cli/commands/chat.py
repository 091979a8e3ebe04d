"""`moai chat`: talk to a model; each turn reads only its own new tokens."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from moai_cli import console, options


def chat(
    model: options.Model = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    session: Annotated[
        Path | None,
        typer.Option("--session", help="Conversation file: continued if it exists, and saved there at the end."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Repetition = None,
    stop: options.Stop = None,
    seed: options.SeedOrNone = None,
    tokenizer: options.Tokenizer = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    scan: options.Scan = "auto",
    engine: options.Engine = "auto",
) -> None:
    """Talk to a model.

    Examples:

    - `moai chat` (with the model that comes with moai)

    - `moai chat --model runs/cpu-tiny --system "Answer in Korean." --session friday.session --temperature 0.5`

    - `printf 'Hello\\n/save hello.session\\n' | moai chat --model runs/cpu-tiny --seed 1`

    A line that ends with a backslash goes on; so does text between triple quotes. Ctrl-C stops an answer, Ctrl-D
    leaves. `/help` lists the commands. Without a terminal each line of stdin is a message.
    """
    flags = locals()
    path = options.required_model(model)
    with options.loading(path, device):
        given = options.sampling(flags)
        from moai_cli.talk import Talk
        from moai_core import checkpoint
        from moai_core.generation import Session, Settings, files
        from moai_core.locks import lock_file

    if session is not None:
        files.check_output(session, "--session", force=True)
    with nullcontext() if session is None else lock_file(session):
        network, words, folder = files.open_model(
            path, tokenizer=tokenizer, device=device, dtype=dtype, scan=scan, on_event=console.on_event
        )
        about = {"fingerprint": checkpoint.fingerprint(folder), "engine": engine}
        talk = Talk(network, words, about, session)
        if session is not None and session.exists():
            talk.load(session)
            talk.session.configure(**given)
            if system is not None and system != talk.session.system:
                talk.session.set_system(system)
        else:
            talk.session = Session(network, words, Settings(**given), system=system, on_event=talk.on_event, **about)
            if session is not None:
                console.note(f"a new conversation; it will be saved to {session}")
        talk.run()
