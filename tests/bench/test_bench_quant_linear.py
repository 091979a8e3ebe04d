"""What needs no GPU of the benchmark of integer matrices: its matrices, its tables, its refusals."""

from __future__ import annotations

import pytest
import torch

from moai_core.bench import quant_linear, report
from moai_core.errors import UsageError
from moai_core.quant.formats import FORMATS


def test_the_matrices_are_those_of_the_models():
    found = {(c.preset, c.name): (c.out, c.columns) for name in ("2b", "8b") for c in quant_linear.cases(name)}
    assert found["2b", "in_proj"] == (8192, 2048) and found["2b", "gate_up"] == (11264, 2048)
    assert found["2b", "down"] == (2048, 5632) and found["8b", "out_proj"] == (4096, 8192)


def test_random_weights_are_what_the_format_stores():
    for case in quant_linear.cases("2b"):
        small = case._replace(out=6)
        stored = quant_linear.stored(small, torch.device("cpu"))
        layout = FORMATS[case.spec.format].tensors(case.spec, 6, case.columns)
        assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == layout


def test_tables_show_times_ratios_and_the_fastest_divisions():
    plan = [1, 1, 2, 8, 8, 4, 1, [512, 1, 1], 22000]
    other = {"plan": [2, *plan[1:]], "us": 4.0}
    one = {"preset": "2b", "name": "in_proj", "format": "int4", "rows": 1, "plan": plan, "share": 0.61,
           "us": {"moai": 5.0, "alone": 7.5, "cublas": 14.0}, "variants": [other, {"plan": plan, "us": 5.0}]}  # fmt: skip
    part = {"what": "gate_up decoded", "us": 20.0, "share": 0.9}
    text = "\n".join(
        report.plain(table)
        for table in quant_linear.tables({"copy_TBps": 3.0, "results": [one, {**one, "plan": None}], "parts": [part]})
    )
    assert "14.0 (2.80x)" in text and "61%" in text and "taken" in text and "7.5" in text and "90%" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UsageError, match="CUDA"):
        quant_linear.run()
    with pytest.raises(UsageError, match="--only"):
        quant_linear.run(only=["x_proj"])
