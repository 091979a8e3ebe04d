"""llama.cpp in a process of its own: `python gguf_llama.py FILE`, which answers lines of JSON on standard input.

Why its own: llama.cpp stops the whole process on a file it can't run (GGML_ASSERT), and a crash in it would take the
conversion along. Only gguf_runtime.py starts this; it imports nothing of moai, so that it starts fast.

    {"ids": [...], "room": 96}           -> {"rows": L, "columns": V} and L x V floats, from a zero state
    {"ids": [...], "room": null}         -> the same, but the sequence goes on; room is how long it may become
    {"text": "...", "special": false}    -> {"ids": [...]}
Any failure that llama.cpp reports -> {"error": "..."}.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any


class Model:
    """A GGUF file loaded on the CPU, and one sequence in it."""

    def __init__(self, path: str) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        # Weights as they lie in the file. Repacked for AMX, version 0.25.3 of ggml crashes on quantized Mamba.
        settings.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise ValueError("llama.cpp doesn't load the file")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.columns = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.context: Any = None
        self.room = self.past = 0

    def logits(self, ids: list[int], room: int | None) -> Any:
        """(L, V) fp32 for `ids`, from a zero state with `room` tokens at most, or (None) after what came before."""
        if room is not None:
            self.past = 0
            if self.context is None or room > self.room:
                self._open(-(-room // 256) * 256)
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place], batch.logits[place] = token, self.past + place, 1
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            code = self.api.llama_decode(self.context, batch)
        finally:
            self.api.llama_batch_free(batch)
        if code:
            raise ValueError(f"llama_decode returned {code}")
        self.past += len(ids)
        return ctypes.string_at(self.api.llama_get_logits(self.context), 4 * len(ids) * self.columns)

    def _open(self, room: int) -> None:
        if self.context is not None:
            self.api.llama_free(self.context)
        settings = self.api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = room
        settings.n_threads = settings.n_threads_batch = min(16, len(os.sched_getaffinity(0)))
        self.context, self.room = self.api.llama_init_from_model(self.model, settings), room
        if not self.context:
            raise ValueError("llama.cpp makes no context for the file")

    def tokenize(self, text: str, special: bool) -> list[int]:
        """The ids of `text`, nothing put around it."""
        raw = text.encode()
        ids = (self.api.llama_token * (len(raw) + 8))()
        count = self.api.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), False, special)
        if count < 0:
            raise ValueError(f"llama_tokenize returned {count}")
        return list(ids[:count])


def main() -> None:
    """Answers until standard input ends."""
    sys.path.pop(0)  # this folder, in which `gguf` isn't the package of that name
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(head: dict[str, Any], body: bytes = b"") -> None:
        out.write(json.dumps(head).encode() + b"\n" + body)
        out.flush()

    try:
        model = Model(sys.argv[1])
        answer({"columns": model.columns})
    except Exception as exc:
        return answer({"error": f"{type(exc).__name__}: {exc}"})
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        try:
            if "text" in asked:
                answer({"ids": model.tokenize(asked["text"], asked["special"])})
            else:
                body = model.logits(asked["ids"], asked["room"])
                answer({"rows": len(asked["ids"]), "columns": model.columns}, body)
        except Exception as exc:
            answer({"error": f"{type(exc).__name__}: {exc}"})


if __name__ == "__main__":
    main()
