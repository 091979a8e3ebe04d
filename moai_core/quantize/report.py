"""What quantizing cost and saved: bytes by part, output error by layer, loss on held-out text, drift of the state.

A state is a sum over all tokens read, so errors of a recurrence can add up with the length: `drift` compares the states
of the two models after the same 1k, 4k, 16k and 32k tokens. Left out: speed, which is `moai bench`'s.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moai_core import __version__, checkpoint, device, storage, weights
from moai_core.convert.folder import CARD
from moai_core.convert.source import Lazy, OnEvent, Source
from moai_core.quant import fp4, kernels
from moai_core.quant.formats import Spec

JSON, PNG = "quantization.json", "quantization.png"
LENGTHS = (1024, 4096, 16384, 32768)
CHUNK = 2048
# Tokens over which predictions are compared.
COMPARED = 8192
# A model's activations, its reader and the rest, over its weights.
_FACTOR, _REST = 1.3, 1 << 30


@dataclass(frozen=True)
class Evaluation:
    """Text to measure on: a path as for `moai eval`; at most `limit` documents of it."""

    data: str
    tokenizer: str | None = None
    limit: int | None = None
    lengths: tuple[int, ...] = LENGTHS
    _opened: dict[Path, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def words(self, source: Source) -> Any:
        """The tokenizer, read once. Raises UsageError where there is none, or not one for this model."""
        from moai_core.data.tokenize import check_tokenizer, load_tokenizer

        if source.path not in self._opened:
            found = load_tokenizer(self.tokenizer or source.path)
            check_tokenizer(found, source.config["vocab_size"])
            self._opened[source.path] = found
        return self._opened[source.path]


def build(job: Any, found: Mapping[str, Lazy], layers: list[dict[str, Any]], data: Any) -> dict[str, Any]:
    """The report but for what is measured: settings, sizes, errors by layer, kernels."""
    # A source that was quantized is decoded in `job.source`, and larger there than in its files.
    before = {name: info for file in weights.shards(job.source.path).values() for name, info in file.items()}
    after = found
    spec = job.settings.spec()
    return {
        "source": str(job.source.path),
        "method": job.settings.method,
        "layout": job.settings.layout,
        "quantization": job.quantization,
        "parameters": sum(torch.Size(lazy.shape).numel() for lazy in job.source.tensors.values()),
        "bytes_before": sum(lazy.nbytes for lazy in before.values()),
        "bytes_after": sum(lazy.nbytes for lazy in after.values()),
        "parts": {part: [_bytes(before, part), _bytes(after, part)] for part in PARTS},
        "bits_per_weight": spec_bits(after, job.specs),
        "layers": layers,
        "calibration": None if data is None else {"sequences": len(data.ids), "length": data.ids.shape[1]},
        "kernel": kernels.describe(spec, job.device, getattr(torch, job.config_json()["dtype"])),
        "quality": None,
        "drift": None,
        "notes": [*job.source.notes, *([fp4.note(job.device)] if spec.format in fp4.NAMES else [])],
    }


PARTS = {"embedding and head": ("embed_tokens", "lm_head"), "mixer": (".mamba.",), "feed-forward": (".feed_forward.",)}


def _bytes(tensors: Mapping[str, Any], part: str) -> int:
    return sum(tensor.nbytes for name, tensor in tensors.items() if any(piece in name for piece in PARTS[part]))


def spec_bits(found: Mapping[str, Lazy], specs: Mapping[str, Spec]) -> float:
    """Bits a quantized number takes, scales included."""
    size = numbers = 0
    for module in specs:
        stored = {name: lazy for name, lazy in found.items() if name.startswith(f"{module}.")}
        size += sum(lazy.nbytes for lazy in stored.values())
        shape = stored[f"{module}.qweight"].shape
        numbers += torch.Size(shape).numel() * (2 if stored[f"{module}.qweight"].dtype == torch.uint8 else 1)
    return 8 * size / max(numbers, 1)


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure(
    report: dict[str, Any],
    source: Source,
    written: Path,
    evaluation: Evaluation | None,
    where: torch.device,
    on_event: OnEvent | None,
) -> None:
    """Adds `quality` ({"before", "after"}: figures as of evaluate_file; after: `kl`, where both models fit in memory)
    and `drift` to the report; a note where not even one does. Raises DataError for the text."""
    if evaluation is None:
        return
    from moai_core.evaluate import evaluate_file

    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else device.memory()[1]
    need = int(report["bytes_before"] * _FACTOR) + _REST
    if need > free:
        report["notes"].append(
            f"not measured: the model needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        )
        return
    both = need + int(report["bytes_after"] * _FACTOR) <= free
    words = evaluation.words(source)
    ids = _stream(words, evaluation.data, max(evaluation.lengths, default=0))
    found, kept = [], None
    for what, folder in (("before", source.path), ("after", written)):
        if on_event is not None:
            on_event({"event": "evaluate", "what": what})
        model = checkpoint.load_model(folder, device=where)
        figures = evaluate_file(model, words, evaluation.data, limit=evaluation.limit, on_event=on_event)
        found.append((figures, states_after(model, ids, evaluation.lengths)))
        if both and kept is not None:
            figures["kl"] = divergence(kept, model, ids[:COMPARED])
        kept = model if both else None
        del model
    (before, states), (after, others) = found
    report["quality"] = {"data": evaluation.data, "before": before, "after": after}
    report["drift"] = [
        {"tokens": length, **drift(states[length], others[length])} for length in states if length in others
    ]


@torch.no_grad()
def divergence(before: Any, after: Any, ids: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence, nats a token, of the predictions of `after` from those of `before` over ids
    (T,), read as one document. It tells methods apart where their perplexities differ by chance."""
    state = other = None
    total = torch.zeros((), dtype=torch.float64, device=before.device)
    for begin in range(0, len(ids), CHUNK // 8):
        chunk = torch.from_numpy(ids[None, begin : begin + CHUNK // 8]).to(before.device)
        one, two = before(chunk, state=state, use_cache=True), after(chunk, state=other, use_cache=True)
        state, other = one.state, two.state
        wanted, got = one.logits.float().log_softmax(-1), two.logits.float().log_softmax(-1)
        total += (wanted.exp() * (wanted - got)).sum(dtype=torch.float64)
    return float(total) / max(len(ids), 1)


def _stream(tokenizer: Any, data: str, length: int) -> np.ndarray:
    """At most so many tokens of the text, documents one after the other."""
    from moai_core.data.read import find_files, read_documents
    from moai_core.data.tokenize import Encoder

    encoder, ids, size = Encoder(tokenizer), [], 0
    for document in read_documents(find_files(data)[0]):
        if size >= length:
            break
        ids.append(encoder.encode([document])[0].ids)
        size += len(ids[-1])
    return np.concatenate(ids)[:length].astype(np.int64) if ids else np.zeros(0, dtype=np.int64)


@torch.no_grad()
def states_after(model: Any, ids: np.ndarray, lengths: tuple[int, ...]) -> dict[int, list[torch.Tensor]]:
    """The SSM states (I, N) of every layer after the first so many tokens, read as one document."""
    found: dict[int, list[torch.Tensor]] = {}
    state = None
    stops = sorted(length for length in lengths if length <= len(ids))
    cuts = sorted({*stops, *range(CHUNK, stops[-1], CHUNK)}) if stops else []
    for begin, end in zip([0, *cuts], cuts, strict=False):
        chunk = torch.from_numpy(ids[None, begin:end]).to(model.device)
        state = model.model(chunk, state=state, use_cache=True).state
        if end in stops:
            found[end] = [
                _comparable(layer, ssm[0]) for layer, (_, ssm) in zip(model.model.layers, state.layers, strict=True)
            ]
    return found


def _comparable(layer: Any, ssm: torch.Tensor) -> torch.Tensor:
    """AWQ's vector before the scan makes each channel's state larger or smaller; taken out again."""
    scale = getattr(layer.mamba, "conv_scale", None)
    return (ssm if scale is None else ssm / scale[:, None]).float().cpu()


def drift(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """Relative distance of the states of two models, ||h' - h|| / ||h||: over the layers the mean, and the largest."""
    each = [
        float((b - a).double().norm() / a.double().norm().clamp(min=1e-30)) for a, b in zip(before, after, strict=True)
    ]
    return {"mean": sum(each) / len(each), "max": max(each)}


# ---- files -------------------------------------------------------------------------------------------------------


def write(folder: storage.FolderWriter, report: dict[str, Any], source: Source) -> None:
    """quantization.json, quantization.png and the card, into the folder under way."""
    folder.write(JSON, storage.json_bytes(report))
    if picture := plot(report["layers"]):
        folder.write(PNG, picture)
    folder.write(CARD, card(source.files.get(CARD), report))


def plot(layers: list[dict[str, Any]]) -> bytes | None:
    """The output error of each quantized matrix over the layers, as PNG; None where there are no layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name, entry in (layers[0] if layers else {}).items() if "error" in entry]
    if not names:
        return None
    figure = Figure(figsize=(9, 5))
    canvas, axes = FigureCanvasAgg(figure), figure.add_axes((0.08, 0.11, 0.88, 0.82))
    for name in names:
        axes.plot([layer[name]["error"] for layer in layers], marker="o", markersize=3, label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative output error")
    if any(layer[name]["error"] > 0 for layer in layers for name in names):
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def card(old: bytes | None, report: Mapping[str, Any]) -> bytes:
    """The source's model card, and below it what was done."""
    text = old.decode("utf-8", errors="replace").rstrip() if old else f"# {Path(report['source']).name}"
    lines = [
        text,
        "",
        "## Quantization",
        "",
        f"Quantized with moai {__version__}, method {report['method']}, in {report['layout']}'s format: "
        f"{report['bytes_before']:,} bytes of weights became {report['bytes_after']:,}.",
    ]
    if quality := report["quality"]:
        before, after = quality["before"], quality["after"]
        lines.append(
            f"Perplexity on {Path(quality['data']).name}: {before['perplexity']:.3f} before, "
            f"{after['perplexity']:.3f} after ({before['bits_per_byte']:.4f} and {after['bits_per_byte']:.4f} bits per "
            "byte)."
        )
    lines.append(f"Everything measured is in `{JSON}`.")
    return ("\n".join(lines) + "\n").encode()
