"""llama.cpp, through llama-cpp-python, for the comparison at a conversion's end.

It runs the file as it is: F32 weights in fp32, 16-bit ones with activations rounded to the same 16 bits, quantized ones
with activations in 8 bits. So only F32 is compared by its logits, everything else by the likeliest tokens. It runs in a
process of its own (gguf_llama.py). Left out: GPUs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moai_core.convert.gguf_file import inspect, library
from moai_core.convert.source import Options, Parity, Unavailable

# llama.cpp's F32 logits may differ by this part of their spread (its scan sums in another order), and one likeliest
# token of 64 may.
F32_DELTA, F32_ARGMAX = 0.01, 63 / 64
ROUNDED_ARGMAX = {"f16": 0.75, "bf16": 0.75, "q8_0": 0.75}
_QUANTIZED_ARGMAX = 0.1  # of random weights in q4_0 a third agrees; of a wrong mapping none
_NAME = "llama-cpp-python"


class LlamaCpp:
    """A GGUF file in llama.cpp on the CPU."""

    def __init__(self, path: Path) -> None:
        """Raises Unavailable without llama-cpp-python, RuntimeError where llama.cpp doesn't load the file."""
        if find_spec("llama_cpp") is None:
            raise Unavailable("llama-cpp-python isn't installed (pip install 'moai[llama]')")
        self.name = f"{_NAME} {metadata.version(_NAME)} {_file_type(path)}"
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("gguf_llama.py")), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def logits(self, ids: list[int]) -> torch.Tensor:
        """See source.Runtime."""
        return self._logits(ids, len(ids))

    def greedy(self, ids: list[int], count: int, vocab: int) -> list[int]:
        """The `count` tokens below `vocab` that follow `ids`, the likeliest each time, a token a step."""
        row, made = self._logits(ids, len(ids) + count)[-1], []
        while True:
            made.append(int(row[:vocab].argmax()))
            if len(made) == count:
                return made
            row = self._logits(made[-1:], None)[0]

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`, nothing put around it; `special`: special tokens written in it are taken as such."""
        self._ask({"text": text, "special": special})
        return self._answer()["ids"]

    def close(self) -> None:
        """See source.Runtime."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe is not None:
                pipe.close()

    def _logits(self, ids: list[int], room: int | None) -> torch.Tensor:
        self._ask({"ids": ids, "room": room})
        head = self._answer()
        raw = bytearray(self._pipe().read(4 * head["rows"] * head["columns"]))
        if len(raw) < 4 * head["rows"] * head["columns"]:
            raise self._ended()
        return torch.frombuffer(raw, dtype=torch.float32).view(head["rows"], head["columns"])

    def _pipe(self) -> Any:
        return self.process.stdout

    def _ask(self, question: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as exc:
            raise self._ended() from exc

    def _answer(self) -> dict[str, Any]:
        line = self._pipe().readline()
        if not line:
            raise self._ended()
        head = json.loads(line)
        if "error" in head:
            raise RuntimeError(head["error"])
        return head

    def _ended(self) -> RuntimeError:
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        # The assertion is the line of interest, a backtrace may follow it.
        told = next((line for line in said if "GGML_ASSERT" in line or "error" in line.lower()), "")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return RuntimeError(f"llama.cpp ended with {how}{': ' + told[:160] if told else ''}")


def _file_type(path: Path) -> str:
    value, types = inspect(path).keys.get("general.file_type"), library().LlamaFileType._value2member_map_
    return types[value].name.removeprefix("ALL_").removeprefix("MOSTLY_") if value in types else "GGUF"


def open_runtime(path: Path, format: str) -> LlamaCpp:
    """See source.py."""
    return LlamaCpp(path)


def judge(parity: Parity, options: Options) -> str | None:
    """See source.py. What a file holds its runtime's name says; of two files the one that rounds more decides."""
    kinds = {name.rsplit(" ", 1)[-1].lower() for name in parity.runtimes if name.startswith(_NAME)}
    kinds |= {options.outtype} if options.outtype else set()
    part = min(F32_ARGMAX if kind == "f32" else ROUNDED_ARGMAX.get(kind, _QUANTIZED_ARGMAX) for kind in kinds)
    if kinds == {"f32"} and not parity.max_delta <= F32_DELTA * parity.spread:
        return (
            f"logits differ by {parity.max_delta:.2e}, more than {F32_DELTA:.0%} of their spread of {parity.spread:.2e}"
        )
    if parity.argmax < part * parity.positions:
        return f"only {parity.argmax} of {parity.positions} likeliest tokens agree"
    return None
