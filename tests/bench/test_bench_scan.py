"""The scan's benchmark compares what it says it compares. Nothing here is timed; mamba_ssm is played by the reference."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from moai_core import scan as kernels
from moai_core.bench import scan, timing, work
from moai_core.bench.work import Inputs, Shape
from moai_core.errors import UsageError
from moai_core.scan import reference

CPU = torch.device("cpu")
ARGUMENTS = ["--seq-len", "24", "--dim", "16", "--state", "8", "--repeats", "2"]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return Inputs(Shape(2, 33, 16, 8), torch.float32, timing.Clock(CPU))


@pytest.fixture
def rivals(monkeypatch):
    """mamba_ssm and causal_conv1d with their signatures and layouts, (B, I, L), computed by the reference."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert delta_softplus and all(t.is_contiguous() for t in (u, delta, B, C, z))
        turned = [t.transpose(1, 2) for t in (u, delta, B, C, z)]
        y, _ = reference.scan(turned[0], turned[1], A, turned[2], turned[3], D, turned[4], delta_bias)
        return y.transpose(1, 2)

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        assert activation == "silu" and x.is_contiguous() and weight.dim() == 2
        return F.silu(
            F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])[..., : x.shape[2]]
        )

    for path, function in (
        ("mamba_ssm.ops.selective_scan_interface", selective_scan_fn),
        ("causal_conv1d", causal_conv1d_fn),
    ):
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[path], function.__name__, function)
    monkeypatch.setattr(
        kernels.BACKENDS["mamba_ssm"], "why_not", lambda *a, seq_idx=False, **k: "no" if seq_idx else None
    )


@pytest.mark.parametrize("operation", ["scan", "conv"])
def test_a_rival_computes_the_same_function_of_the_same_values(inputs, rivals, operation):
    own = (inputs.scan if operation == "scan" else inputs.conv)(33).sets[0]
    turned = inputs.channel_first(operation, 33).sets[0]
    names = work._TENSORS if operation == "scan" else ("u", "weight", "bias")
    theirs = work._selective_scan if operation == "scan" else work._causal_conv1d

    def ours(one):
        return getattr(reference, operation)(*(one[name] for name in names))[0]

    def back(name, t):
        return t.transpose(1, 2) if t.dim() == 3 and name != "weight" else t

    y, other = work.both_ways(ours, "forward")(own), work.both_ways(theirs, "forward")(turned).transpose(1, 2)
    assert not y.requires_grad and (y - other).norm() < 1e-5 * y.norm()
    wanted = [name for name in own if name != "dy"]
    assert set(wanted) == set(names)
    for name, a, b in zip(
        wanted,
        work.both_ways(ours, "forward+backward")(own),
        work.both_ways(theirs, "forward+backward")(turned),
        strict=True,
    ):
        assert torch.equal(back(name, turned[name]), own[name]) and turned[name].is_contiguous()
        assert (a - back(name, b)).norm() < 1e-5 * a.norm(), name


@pytest.mark.parametrize("operation", ["scan", "conv"])
def test_every_case_can_be_called_at_any_length(inputs, rivals, operation):
    for direction in work.DIRECTIONS:
        found = work.cases(inputs, operation, direction, backend="reference", against=scan.RIVALS, resets=True)
        assert [case.name for case in found][:3] == ["moai", "packed", "mamba_ssm"]
        assert len(found) == (5 if operation == "scan" else 3)
        for case in found:
            for length in (1, 7):
                case.make(length)()


def test_attention_is_causal_attention_at_the_model_width(inputs):
    one = inputs.attention(33).sets[0]
    assert one["q"].shape == (2, 1, 33, 8) and work.heads_of(2048) == (16, 128) and work.heads_of(192) == (2, 96)
    q, k, v = (one[name].detach().double() for name in "qkv")
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(33, 33).triu(1).bool(), -torch.inf)
    want = scores.softmax(-1) @ v
    assert (work.attend(one).detach() - want).norm() < 1e-5 * want.norm()


def test_documents_have_the_promised_mean_and_never_decrease():
    torch.manual_seed(0)
    found = work.documents(4, 1 << 16, CPU)
    assert found.dtype == torch.int32 and found.shape == (4, 1 << 16) and bool((found[:, 0] == 0).all())
    step = found.diff(dim=1)
    assert set(step.unique().tolist()) == {0, 1}, "no document is empty"
    assert (1 << 16) / (found[:, -1] + 1).float().mean().item() == pytest.approx(work.DOCUMENT, rel=0.15)


def test_a_wrong_kernel_is_told(inputs, monkeypatch):
    right = kernels.BACKENDS["reference"].scan
    assert work.agreement(inputs, "scan", "reference") < 1e-6 and work.agreement(inputs, "conv", "reference") < 1e-6
    monkeypatch.setattr(kernels.BACKENDS["cpu"], "scan", lambda *a, **k: tuple(1.01 * t for t in right(*a, **k)))
    found = scan.measure(
        [Shape(1, 24, 16)], device=CPU, dtype=torch.float32, against=["none"], backend="cpu", repeats=1
    )
    assert any(note.startswith("WRONG RESULT: scan forward") for note in found["notes"])
    assert found["results"][0]["error"] == pytest.approx(0.01, rel=1e-3)


def test_the_report(rivals, capsys):
    events = []
    found = scan.measure(
        [Shape(1, 24, 16, 8), Shape(2, 40, 16, 8)], device=CPU, dtype=torch.float32, resets=True, repeats=2, backend="reference",
        on_event=events.append,
    )  # fmt: skip
    found = json.loads(json.dumps(found))
    assert [(r["operation"], r["direction"], r["length"]) for r in found["results"]] == [
        (operation, direction, length)
        for length in (24, 40)
        for operation in ("scan", "conv")
        for direction in work.DIRECTIONS
    ]
    for row in found["results"]:
        wanted = {"moai", "packed", "mamba_ssm"} | ({"attention", "reference"} if row["operation"] == "scan" else set())
        assert set(row["timings"]) == wanted and set(row["ratios"]) == wanted - {"moai"}
        ours = row["timings"]["moai"]["median_ms"]
        assert row["ratios"]["packed"] == pytest.approx(row["timings"]["packed"]["median_ms"] / ours)
        assert row["us_per_million"] == pytest.approx(ours * 1e9 / (row["batch"] * row["length"] * row["dim"]))
        assert row["recorded_ms"] is None and (row["error"] is None) == (row["direction"] != "forward")
    assert any("reference here, for want of a kernel" in note for note in found["notes"])
    assert [e["done"] for e in events] == sorted(e["done"] for e in events) and events[-1]["done"] == events[-1][
        "total"
    ]
    (table,) = scan.tables(found)
    assert len(table.rows) == 8 and {len(row) for row in table.rows} == {len(table.columns)}
    assert table.columns[5:] == ("packed", "mamba_ssm", "attention", "reference")
    curves = scan.curves(found)
    assert [len(c.points) for c in curves["forward"] if c.label == "moai scan, 1 x L x 16"] == [1]


def test_recorded_figures_are_those_of_the_published_table():
    shapes = scan.preset("h100")
    assert (8, 2048, 4096, 16) in [tuple(vars(s).values()) for s in shapes] and len(shapes) == 5
    assert scan.figures(Shape(1, 32768, 4096), "scan", "forward+backward", torch.bfloat16) == {
        "mamba_ssm": 13.2399,
        "goal": 4.4,
    }
    assert scan.figures(Shape(1, 32768, 4096), "scan", "forward", torch.float32) is None, "measured in bf16"
    assert scan.figures(Shape(1, 32768, 4096, 8), "scan", "forward", torch.bfloat16) is None, "measured with 16 states"
    assert scan.figures(Shape(4, 2048, 8192), "conv", "forward", torch.bfloat16) == {"mamba_ssm": 0.0985}
    assert {"gpu", "source", "date"} <= set(work.recorded())


def test_rivals_that_cannot_run_are_refused_or_noted():
    names, notes = scan.check_rivals(["auto"], CPU, torch.float32)
    assert names == ["attention", "reference", "conv"] and notes == [
        "mamba_ssm left out: it runs on CUDA only, not on cpu"
    ]
    assert scan.check_rivals(["none"], CPU, torch.float32) == ([], [])
    with pytest.raises(UsageError, match="--against mamba_ssm: it runs on CUDA only") as caught:
        scan.check_rivals(["mamba_ssm", "conv"], CPU, torch.float32)
    assert "auto" in caught.value.hint
    for wrong in (["auto", "conv"], ["none", "conv"], ["tea"]):
        with pytest.raises(UsageError, match="--against"):
            scan.check_rivals(wrong, CPU, torch.float32)


def test_the_front_without_typer(capsys, tmp_path):
    assert scan.main([*ARGUMENTS, "--against", "attention,conv", "--plot", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "scan fwd+bwd" in out and "conv fwd" in out and "attention" in out and "torch" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert scan.main([*ARGUMENTS, "--against", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["backend"] == "cpu"
    assert scan.main([*ARGUMENTS, "--against", "none", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "    python -m moai_core.bench.scan --seq-len 24 --dim 16" in out and "| scan fwd |" in out
    assert scan.main(["--dim", "12"]) == 2
    assert capsys.readouterr().err == "error: --dim must be a multiple of 8 (got 12)\nhint: use 16\n"


def test_an_interrupt_ends_the_front_calmly(capsys, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "run", interrupted)
    assert scan.main([]) == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")
