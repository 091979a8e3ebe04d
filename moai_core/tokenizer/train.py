"""A new tokenizer from text: byte-level BPE, trained by the tokenizers library.

Its trainer neither reports how far its merges are nor hears of Ctrl-C, so it works in a thread of its own: the caller's
can be interrupted at any moment, and nothing is written before all is done. Left out: other kinds than BPE.
Sources: Sennrich et al., arXiv 1508.07909 (BPE); GPT-2 (bytes as the alphabet).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moai_core.errors import UsageError, at_least
from moai_core.tokenizer import health
from moai_core.tokenizer.layout import (
    LONGEST,
    SPECIAL,
    check_target,
    load_backend,
    own_files,
    pre_tokenizer,
    write_folder,
)
from moai_core.tokenizer.text import OnEvent, Source, Texts

_BYTES = 256
_MOST = 1 << 20


class _Stopped(Exception):
    """Ends the library's reading after the caller was interrupted."""


def train(
    sources: Sequence[Source],
    out: str | Path,
    *,
    vocab_size: int = 128_000,
    min_frequency: int = health.SEEN,
    seed: int = 0,
    on_error: str = "stop",
    notice: str | Path | None = None,
    force: bool = False,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Trains a tokenizer of at most `vocab_size` ids, writes its folder `out` as a whole, and returns a report.

    There are fewer ids where the text gives no more pairs that are seen `min_frequency` times. Emits `{"event": "read",
    "phase": "counting" | "health", "done", "total"}`, `{"event": "merging"}` and warnings. Raises UsageError for
    impossible sizes or a taken `out`, DataError, StorageError.
    """
    least = len(SPECIAL) + _BYTES
    if not least <= vocab_size <= _MOST:
        raise UsageError(
            f"--vocab-size must lie between {least} and {_MOST} (got {vocab_size})",
            hint=f"{least} are the bytes and the special tokens alone; usual are 8,000 to 200,000",
        )
    check_frequency(min_frequency)
    out = Path(out)
    check_target(out, force)
    files = own_files({"model": {}}, Path(notice) if notice else None)  # a missing notice is told now
    tell = on_event or (lambda event: None)
    texts, begin = Texts(sources, seed=seed, on_error=on_error, on_event=tell), time.perf_counter()
    state = learn(texts, vocab_size, min_frequency, tell)
    if not texts.bytes:
        raise UsageError("the files hold no text", hint="check the paths and weights")
    size = len(state["model"]["vocab"])
    backend = load_backend(json.dumps(state).encode(), out / "tokenizer.json")
    counts = health.count_ids(backend, texts.read("health"), size)
    made = health.merges_of(state)
    write_folder(out, files | own_files(state), force=force)
    return {
        "path": str(out),
        "vocab_size": size,
        "asked": vocab_size,
        "min_frequency": min_frequency,
        **texts.report(),
        "tokens": int(counts.sum()),
        "bytes_per_token": texts.bytes / max(1, int(counts.sum())),
        "health": health.report(made, counts),
        "file_bytes": (out / "tokenizer.json").stat().st_size,
        "seconds": time.perf_counter() - begin,
    }


def check_frequency(value: int) -> None:
    """Raises UsageError for a `--min-frequency` that is none."""
    at_least(("--min-frequency", value, 1), hint="10 keeps noise out")


def learn(texts: Texts, vocab_size: int, min_frequency: int, tell: OnEvent) -> dict[str, Any]:
    """The tokenizer.json of the vocabulary that `texts` give."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(longest=LONGEST)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    run_trainer(tokenizer, trainer, texts.read("counting"), tell)
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return json.loads(tokenizer.to_str())


def run_trainer(tokenizer: Any, trainer: Any, texts: Iterator[str], tell: OnEvent) -> None:
    """`tokenizer.train_from_iterator` in a thread, so that a signal ends the wait for it at once."""
    stopped, raised = threading.Event(), []

    def feed() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                raise _Stopped
            yield text
        tell({"event": "merging"})

    def work() -> None:
        try:
            tokenizer.train_from_iterator(feed(), trainer=trainer)
        except BaseException as exc:  # handed to the caller's thread
            raised.append(exc)

    thread = threading.Thread(target=work, name="moai-bpe", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    finally:
        stopped.set()
    if raised:
        raise raised[0]
