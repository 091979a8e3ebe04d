"""A quantized model on a processor: tokens a second when decoding and when a prompt is read, beside llama.cpp.

    python -m moai_core.bench.cpu_quant [--preset 2b] [--gguf FILE] [--prompt 512] [--tokens 32] [--rounds 5]

The model has random weights, which cost what trained ones cost: int4 in groups of 128, the head, the embedding and the
two small projections int8. --gguf: a Q4_0 file of the same shape, made by `moai convert MODEL FILE --to gguf --outtype
q4_0`; llama.cpp (llama-cpp-python) runs it in a process of its own. Both take turns, so that whatever else the machine
does falls on both alike; what counts is the ratio of a turn, its median and quartiles. In every turn the rate at which
the same threads read memory is measured too: a matrix of 1 GB that is multiplied with one row.

Leaves out the quality of what is generated (moai quantize reports it) and sampling.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moai_core import cpu
from moai_core.bench import report, timing
from moai_core.errors import UsageError

_INT4 = {"format": "int4", "group_size": 128}
_INT8 = {"format": "int8", "group_size": 0}
FOUR = ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
_LAYOUTS = {
    "amx": "weights repacked as it likes",
    "repacked": "weights repacked for vector instructions; with AMX's layout it crashes on this file",
    "plain": "weights as they lie in the file; repacked, it crashes on this file",
}
EIGHT = ("x_proj", "dt_proj", "embed_tokens", "lm_head")


def build(preset: str, layers: int | None = None) -> Any:
    """A model of random int4 and int8 numbers, the stored tensors given up for the kernels' own."""
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM
    from moai_core.model.configuration import get_mamba_config
    from moai_core.quant import linear

    modules = {**dict.fromkeys(FOUR, _INT4), **dict.fromkeys(EIGHT, _INT8)}
    fields: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    numbers = get_mamba_config(preset, **fields).numbers()
    config = MoaiMambaConfig(**numbers, quantization={"method": "rtn", "modules": modules})
    with torch.device("meta"):
        model = MoaiMambaForCausalLM(config)
    model.to_empty(device="cpu").eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("qweight"):
            # A block of random bytes, again and again.
            flat = tensor.data.view(torch.uint8).flatten()
            block = torch.randint(1, 255, (min(len(flat), 1 << 20),), dtype=torch.uint8)
            for begin in range(0, len(flat), len(block)):
                flat[begin : begin + len(block)] = block[: len(flat) - begin]
        elif name.endswith("scales"):
            tensor.data.fill_(2e-3 if tensor.shape[1] > 1 else 2e-4)
        elif name.endswith("A_log"):
            tensor.data.copy_(torch.arange(1, tensor.shape[1] + 1).log().expand_as(tensor))
        elif name.endswith("dt_bias"):
            tensor.data.fill_(-4.0)
        elif name.endswith("conv1d.weight"):
            tensor.data.uniform_(-0.5, 0.5)
        else:
            tensor.data.fill_(0.0 if name.endswith("bias") else 1.0)
    linear.release(model, torch.float32)
    return model


def read_by_a_token(model: Any) -> int:
    """Bytes of weights that a token's step reads, scales included, the embedding left out."""
    from moai_core.quant.linear import QuantEmbedding, QuantLinear

    total = 0
    for module in model.modules():
        if isinstance(module, QuantLinear) and not isinstance(module, QuantEmbedding):
            sizes = {name: shape for name, (shape, _) in module.stored.items()}
            kinds = {name: dtype for name, (_, dtype) in module.stored.items()}
            total += sum(torch.Size(shape).numel() * kinds[name].itemsize for name, shape in sizes.items())
    return total + sum(p.numel() * p.element_size() for p in model.model.layers.parameters())


class Moai:
    """The model as llama.cpp's process answers: `timed`."""

    def __init__(self, model: Any) -> None:
        self.model, self.state = model, None

    @torch.inference_mode()
    def timed(self, prompt: int, decoded: int) -> float:
        """Seconds for reading so many tokens from a zero state, or for decoding so many more."""
        begin = time.perf_counter()
        if prompt:
            self.state = self.model(torch.arange(100, 100 + prompt)[None], use_cache=True, logits_to_keep=1).state
        for i in range(decoded):
            out = self.model(torch.tensor([[100 + i]]), state=self.state, use_cache=True, logits_to_keep=1)
            self.state = out.state
        return time.perf_counter() - begin


class Llama:
    """llama.cpp on a GGUF file, in the fastest of its layouts that works."""

    def __init__(self, path: Path, threads: int) -> None:
        """Raises UsageError where it can't run the file."""
        for self.layout in ("amx", "repacked", "plain"):
            program = str(Path(__file__).with_name("cpu_llama.py"))
            command = [sys.executable, program, str(path), str(threads), self.layout]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            try:
                self.timed(40, 2)
            except (BrokenPipeError, ValueError):
                self.close()
            else:
                return
        raise UsageError(
            f"{path}: llama.cpp doesn't run it", hint="pip install 'moai[llama]'; --gguf needs a GGUF file"
        )

    def timed(self, prompt: int, decoded: int) -> float:
        """Seconds; see cpu_llama.py. Raises ValueError where the process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{prompt} {decoded}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


class Memory:
    """The rate at which torch's threads read."""

    def __init__(self, size: int = 1 << 30) -> None:
        self.matrix, self.x = torch.ones(size // 4 // 4096, 4096), torch.ones(1, 4096)
        self.y = torch.empty(1, self.matrix.shape[0])

    def rate(self) -> float:
        """Bytes a second, the best of three."""
        rows, columns = self.matrix.shape
        slots = (1, rows, columns, 64, self.matrix.data_ptr(), self.x.data_ptr(), 0, self.y.data_ptr(), 0)
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            cpu.run("moai_core.model.step_kernels", "dense", -(-rows // 64), self.matrix.numel(), *slots)
            seconds.append(time.perf_counter() - begin)
        return self.matrix.numel() * 4 / min(seconds)


def run(options: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
    """Measures; the report of `tables`."""
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"environment": report.environment(torch.device("cpu"), command), "notes": []}
    on_event({"event": "progress", "done": 0, "total": options.rounds, "task": "building"})
    model = build(options.preset, options.layers)
    theirs = None if options.gguf is None else Llama(options.gguf, options.threads)
    runners: dict[str, Any] = {"moai": Moai(model), **({} if theirs is None else {"llama.cpp": theirs})}
    memory = Memory()
    seconds: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "decode": []} for name in runners}
    rates = []
    try:
        for turn in range(options.rounds + 1):
            on_event({"event": "progress", "done": turn, "total": options.rounds + 1, "task": f"round {turn}"})
            rates.append(memory.rate())
            for name, runner in sorted(runners.items(), reverse=bool(turn % 2)):
                seconds[name]["prompt"].append(runner.timed(options.prompt, 0))
                seconds[name]["decode"].append(runner.timed(0, options.tokens))
    finally:
        if theirs is not None:
            theirs.close()
    on_event({"event": "progress", "done": 1, "total": 1, "task": "done"})
    bytes_ = {"moai": read_by_a_token(model)}
    work = {"prompt": options.prompt, "decode": options.tokens}
    found["read_rate"] = statistics.median(rates[1:])
    found["results"] = [
        _result(name, what, seconds, work[what], bytes_.get(name), rates) for what in work for name in runners
    ]
    found["notes"].append(f"the threads read {found['read_rate'] / 1e9:.1f} GB/s (median of the rounds)")
    found["notes"].append(f"a token of moai's reads {bytes_['moai'] / 1e9:.2f} GB")
    if theirs is not None:
        found["notes"].append(f"llama.cpp: {_LAYOUTS[theirs.layout]}")
    return found


def _result(
    name: str, what: str, seconds: dict[str, dict[str, list[float]]], count: int, read: int | None, rates: list[float]
) -> dict[str, Any]:
    """Rates and, of the turns, the ratio to llama.cpp's; the first turn doesn't count."""
    mine = seconds[name][what][1:]
    low, median, high = timing.quartiles([count / one for one in mine])
    found: dict[str, Any] = {"name": name, "what": what, "rate": median, "low": low, "high": high}
    if "llama.cpp" in seconds and name == "moai":
        ratios = [theirs / ours for ours, theirs in zip(mine, seconds["llama.cpp"][what][1:], strict=True)]
        found["ratio_low"], found["ratio"], found["ratio_high"] = timing.quartiles(ratios)
    if read is not None and what == "decode":
        shares = [read * count / one / rate for one, rate in zip(mine, rates[1:], strict=True)]
        found["share"] = statistics.median(shares)
    return found


def tables(found: dict[str, Any]) -> list[report.Table]:
    """One line a runner and work."""
    rows: list[tuple[str, ...]] = []
    for one in found["results"]:
        ratio = f"{one['ratio']:.2f} ({one['ratio_low']:.2f} - {one['ratio_high']:.2f})" if "ratio" in one else ""
        share = f"{one['share']:.0%}" if "share" in one else ""
        work = "reading a prompt" if one["what"] == "prompt" else "decoding"
        rows.append((work, one["name"], f"{one['rate']:.1f}", f"{one['low']:.1f} - {one['high']:.1f}", ratio, share))
    columns = ("work", "by", "tokens/s", "quartiles", "times llama.cpp", "of read rate")
    return [report.Table("", columns, rows, left=2)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moai_core.bench.cpu_quant", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--preset", default="2b", help="2b (default), 8b, 16b")
    parser.add_argument("--layers", type=int, help="fewer layers, to measure a part")
    parser.add_argument("--gguf", type=Path, help="a Q4_0 file of the same shape for llama.cpp")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: 512)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded a turn (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    group.add_argument("--markdown", action="store_true", help="print Markdown, with machine and command")
    return report.front(parser, argv, run, tables)


if __name__ == "__main__":
    sys.exit(main())
