"""GGUF, the format of llama.cpp: architectures `mamba` and `jamba`, written and read back.

    ffn none, no dt/B/C norms                   mamba
    ffn none, dt/B/C norms with weights of one  mamba with ssm.dt_b_c_rms (Falcon-Mamba)
    ffn none, dt/B/C norms with other weights   jamba whose FFN is zero
    ffn swiglu, dt/B/C norms                    jamba

Without any attention layer llama.cpp loads a jamba and aborts at the first token, so one null attention layer comes
last: its projections and its FFN are zero, so it adds nothing (the residual passes). Reading drops it again.
llama.cpp wants norms, biases, the convolution, A and D in F32 whatever the rest is. A is stored as -exp(A_log); read
back, A agrees to 1 ulp. Besides the standard keys `moai.config` holds the fields that GGUF has no key for.
q8_0 and q4_0 are rounded to nearest, without calibration; q4_0 keeps the head (or the embedding that is one), x_proj
and dt_proj in Q8_0: together a few percent of the bytes and the most sensitive to rounding. What has rows that
no group of 32 divides stays F16. Left out: experts, K-quants (read only), split files.
Sources: llama.cpp's src/models/{mamba,jamba}.cpp and conversion/{mamba,jamba}.py; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path

from moai_core.convert.gguf_file import MAGIC
from moai_core.convert.gguf_read import read
from moai_core.convert.gguf_runtime import judge, open_runtime
from moai_core.convert.gguf_write import write

__all__ = ["FILE", "FORMATS", "detect", "judge", "open_runtime", "read", "write"]

FORMATS = ("gguf",)
FILE = True


def detect(path: Path) -> str | None:
    """See source.py: a file that begins like a GGUF, or is called so."""
    try:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            return "gguf" if file.read(4) == MAGIC or path.suffix == ".gguf" else None
    except OSError:
        return None
