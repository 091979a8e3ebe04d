"""llama.cpp in a process of its own, for cpu_quant.py: `python cpu_llama.py FILE THREADS LAYOUT` answers lines.

    "512 0"  reads 512 tokens from a zero state;  "0 32"  decodes 32 more, one at a time
and answers the seconds that it took. Only the last token's logits are asked for. LAYOUT: `amx` lets llama.cpp repack
the weights as it likes, `repacked` for vector instructions only, `plain` leaves them as they lie in the file. On
processors with AMX some versions crash with `amx`: then the process ends, and the caller starts another. It imports
nothing of moai.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any


class _Stack(ctypes.Structure):
    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def without_amx() -> None:
    """Linux gives a process AMX's registers only if its signal stack has room for them: this one hasn't."""
    stack = _Stack(ctypes.cast(ctypes.create_string_buffer(8192), ctypes.c_void_p), 0, 8192)
    without_amx.kept = stack  # type: ignore[attr-defined]
    if ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None):
        raise OSError("sigaltstack failed")


class Model:
    """A GGUF file loaded on the CPU, and one sequence in it."""

    def __init__(self, path: str, threads: int, layout: str) -> None:
        import llama_cpp

        if layout == "repacked":
            without_amx()
        self.api: Any = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers, model.use_extra_bufts = 0, layout != "plain"
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            raise ValueError("llama.cpp doesn't load the file")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 8192, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        self.context: Any = llama_cpp.llama_init_from_model(self.model, settings)
        self.past = 0

    def read(self, tokens: int) -> None:
        """So many tokens at once, after those before."""
        batch = self.api.llama_batch_init(tokens, 0, 1)
        batch.n_tokens = tokens
        for i in range(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = 100 + (self.past + i) % 1000, self.past + i, i == tokens - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        code = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if code:
            raise ValueError(f"llama_decode returned {code}")
        self.past += tokens
        self.api.llama_get_logits(self.context)[0]

    def timed(self, prompt: int, decoded: int) -> float:
        """Seconds."""
        if prompt:
            self.past = 0
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        begin = time.perf_counter()
        if prompt:
            self.read(prompt)
        for _ in range(decoded):
            self.read(1)
        return time.perf_counter() - begin


def main() -> None:
    """Answers until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    model = Model(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    for line in sys.stdin:
        prompt, decoded = map(int, line.split())
        print(model.timed(prompt, decoded), file=out, flush=True)


if __name__ == "__main__":
    main()
