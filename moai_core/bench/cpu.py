"""moai's Mamba against transformers' `MambaForCausalLM` on a processor: a training step and the reading of a prompt.

    python -m moai_core.bench.cpu [--hidden 256 768] [--layers 2] [--batch 2] [--length 256] [--threads 2] [--json]

Both models have the same shape (`ffn: none, dt_bc_norm: false`) and the same weights, and see the same tokens. They
take turns in one process, so that whatever else the machine does falls on both alike; what counts is the ratio of the
medians. The training step is forward, backward and a fused AdamW step in float32 (the default of both trainers); the
prompt is read without gradients and leaves a cache behind. Before anything is timed the two losses and logits are
compared. transformers' loop differentiates through one slice a token, each with a gradient as large as the sequence:
its training step grows with the square of the length, and a short length favours it. Leaves out GPUs, generation, and
the feed-forward layers of the presets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

GOALS = {256: 5.0, 768: 3.0}


def measure(
    hidden: int,
    *,
    layers: int = 2,
    batch: int = 2,
    length: int = 256,
    vocab: int = 8192,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Times both models at one width.

    Returns {"hidden", ..., "agreement": {"loss", "logits"}, "training": timing, "prefill": timing}, where a timing is
    {"moai": seconds of each turn, "transformers": the same, "moai_median", "transformers_median", "ratio",
    "ratio_low", "ratio_high"}; low and high are the quartiles of the ratios turn by turn.
    """
    import torch

    torch.manual_seed(seed)
    ours, theirs = build(hidden, layers=layers, vocab=vocab)
    tokens = torch.randint(0, vocab, (batch, length))

    with torch.no_grad():
        logits, reference = ours(tokens).logits, theirs(tokens).logits
        agreement = {
            "loss": abs(ours(tokens, labels=tokens).loss.item() - theirs(tokens, labels=tokens).loss.item()),
            "logits": ((logits - reference).norm() / reference.norm()).item(),
        }
    del logits, reference

    ours.eval(), theirs.eval()
    prefill = take_turns(reading(ours, tokens), reading(theirs, tokens), repeats)
    ours.train(), theirs.train()
    training = take_turns(training_step(ours, tokens), training_step(theirs, tokens), repeats)
    return {
        "hidden": hidden, "layers": layers, "batch": batch, "length": length, "vocab": vocab,
        "threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in ours.parameters()),
        "agreement": agreement, "training": training, "prefill": prefill,
    }  # fmt: skip


def build(hidden: int, *, layers: int, vocab: int) -> tuple[Any, Any]:
    """(moai's model, transformers' model), random, with equal weights."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    config = MoaiMambaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, ffn="none", dt_bc_norm=False
    )
    ours = MoaiMambaForCausalLM(config)
    theirs = MambaForCausalLM(
        MambaConfig(
            vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, state_size=config.state_size,
            expand=config.expand_factor, conv_kernel=config.conv_kernel_size, time_step_rank=config.time_step_rank or 1,
            layer_norm_epsilon=config.rms_norm_eps, tie_word_embeddings=False, use_mambapy=False,
        )
    )  # fmt: skip
    names = {
        "model.embed_tokens.weight": "backbone.embeddings.weight",
        "model.final_layernorm.weight": "backbone.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
    inner = {"input_layernorm": "norm", "mamba": "mixer"}
    target = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if name.startswith("model.layers."):
                _, _, index, part, rest = name.split(".", 4)
                rest = "dt_proj.bias" if rest == "dt_bias" else rest
                name = f"backbone.layers.{index}.{inner[part]}.{rest}"
            else:
                name = names[name]
            target.pop(name).copy_(value)
    assert not target, f"weights without a counterpart: {sorted(target)}"
    return ours, theirs


def training_step(model: Any, tokens: Any) -> Callable[[], None]:
    """Forward, backward, AdamW."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def reading(model: Any, tokens: Any) -> Callable[[], None]:
    """A prompt is read: the cache for what follows and the logits of the last token."""
    import torch

    def read() -> None:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=True, logits_to_keep=1)

    return read


def take_turns(ours: Callable[[], None], theirs: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Seconds of each, in turns, after one unmeasured turn."""
    import torch

    from moai_core.bench import timing

    clock = timing.Clock(torch.device("cpu"))
    calls = timing.take_turns({"moai": ours, "transformers": theirs}, clock, repeats=repeats)
    seconds = {name: [one for one, _ in found] for name, found in calls.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["moai"], seconds["transformers"], strict=True)]
    low, _, high = timing.quartiles(ratios)
    return {
        **seconds,
        "moai_median": medians["moai"],
        "transformers_median": medians["transformers"],
        "ratio": medians["transformers"] / medians["moai"],
        "ratio_low": low,
        "ratio_high": high,
    }


def show(environment: dict[str, Any]) -> None:
    """Prints what the figures depend on and the table's head."""
    from moai_core.bench import report

    print(report.headline(environment))
    for text in report.warnings(environment):
        print(f"warning: {text}", file=sys.stderr)
    print(
        "MambaForCausalLM of transformers against moai: same weights, taking turns; medians, quartiles of the ratio\n"
    )
    columns = f"{'width, work':24}{'layers, rows x tokens':>24}{'transformers':>14}{'moai':>10}{'ratio':>8}"
    print(f"{columns}  {'quartiles':15}goal")


def show_result(result: dict[str, Any]) -> None:
    """Prints the lines of one shape, as soon as it is measured."""
    shape = f"{result['layers']}, {result['batch']} x {result['length']}"
    for what in ("training", "prefill"):
        timing = result[what]
        goal = f">= {GOALS[result['hidden']]:g}" if result["hidden"] in GOALS else ""
        seconds = f"{timing['transformers_median']:>12.3f} s{timing['moai_median']:>8.3f} s"
        quartiles = f"{timing['ratio_low']:.2f} - {timing['ratio_high']:.2f}"
        name = f"{result['hidden']}, {what}"
        print(f"{name:24}{shape:>24}{seconds}{timing['ratio']:>8.2f}  {quartiles:15}{goal}")
    agreement = result["agreement"]
    print(f"  agreement: loss {agreement['loss']:.1e}, logits {agreement['logits']:.1e} relative\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 768], help="widths (default: 256 768)")
    parser.add_argument("--layers", type=int, default=2, help="default: 2")
    parser.add_argument("--batch", type=int, default=2, help="rows (default: 2)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default: 256)")
    parser.add_argument("--vocab", type=int, default=8192, help="default: 8192")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns of each model (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the scan (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(argv)

    import torch
    from transformers.utils import logging

    from moai_core.bench.report import environment, typed

    logging.set_verbosity_error()  # it would name the kernels that it misses, one after the other
    torch.set_num_threads(options.threads)
    command = typed(parser.prog, sys.argv[1:] if argv is None else argv)
    shape = {name: getattr(options, name) for name in ("layers", "batch", "length", "vocab", "repeats")}
    report: dict[str, Any] = {"environment": environment(torch.device("cpu"), command), "results": []}
    if not options.json:
        show(report["environment"])
    for hidden in options.hidden:
        report["results"].append(measure(hidden, **shape))
        if not options.json:
            show_result(report["results"][-1])
    if options.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
