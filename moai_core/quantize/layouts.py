"""The result of a quantization in the layout of another tool: `moai quantize --format gptq`.

What is quantized, measured and reported is a moai folder; at the end its config.json and weights give way to those of
the layout (moai_core/convert/interchange.py), in the same folder under way. A layout holds less than moai's own format:
no rotation, no scale after the convolution, no quantized embedding. Settings that ask for one are refused here.
"""

from __future__ import annotations

import shutil
from typing import Any

from moai_core import storage, weights
from moai_core.convert import interchange, jamba, moai
from moai_core.convert.source import OnEvent, Options, Source
from moai_core.errors import UsageError
from moai_core.quant.formats import Spec

MOAI = "moai"
LAYOUTS = (MOAI, *interchange.FORMATS)
_WEIGHTS = ".safetensors"


def check(layout: str, spec: Spec, *, rotate: bool, embeddings: str | None) -> None:
    """Raises UsageError for an unknown layout, and for settings whose result it can't hold."""
    if layout not in LAYOUTS:
        raise UsageError(f"--format can't be {layout!r}", hint=f"formats: {', '.join(LAYOUTS)}")
    if layout == MOAI:
        return
    own = f"only moai's own format has it, --format {layout} doesn't"
    if rotate:
        raise UsageError(f"--rotate: {own}", hint="leave one of them out")
    if embeddings not in (None, "bf16"):
        raise UsageError(f"--embeddings {embeddings}: {own}", hint="leave one of them out")
    held = ("int4",) if layout == "awq" else ("int4", "int8")
    if spec.format not in held:
        raise UsageError(
            f"--format {layout} holds {' and '.join(held)}, not {spec.format}",
            hint="--method int4, gptq and awq make int4",
        )


def fits(source: Source, layout: str) -> None:
    """Raises Refused where a model of this shape can't be written so; cheap, for before the work."""
    if layout != MOAI:
        jamba.shaped(source)


def rewrite(folder: storage.FolderWriter, layout: str, on_event: OnEvent | None = None) -> dict[str, Any]:
    """Turns the quantized moai model in a folder under way into `layout`. Returns {"layout", "notes"}; raises Refused
    where no matrix of it can be held so."""
    source = moai.read(folder.path)
    source.files = {}  # they stay where they are
    made = storage.FolderWriter(folder.path / "layout")
    made.path.mkdir()
    interchange.write(source, made, Options(layout), on_event)
    for name in [name for name in folder.files if name in ("config.json", weights.INDEX) or name.endswith(_WEIGHTS)]:
        del folder.files[name]
        (folder.path / name).unlink()
    for name in made.files:
        (made.path / name).rename(folder.path / name)
    shutil.rmtree(made.path)
    folder.files |= made.files
    return {"layout": layout, "notes": source.notes}
