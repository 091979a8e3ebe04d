"""Environment, tables and pictures of the benchmarks."""

from __future__ import annotations

import json

import pytest
import torch

from moai_core.bench import report
from moai_core.bench.report import Curve, Table
from moai_core.device import place
from moai_core.errors import StorageError, UsageError

CPU = torch.device("cpu")


def png_size(path):
    """(width, height) from the header; PNG specification, section 11.2.2."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_the_environment_says_what_figures_depend_on():
    found = report.environment(CPU, "moai bench")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["command"] == "moai bench" and found["processor"] and "UTC" in found["date"]
    line = report.headline(json.loads(json.dumps(found)))
    assert found["processor"] in line and f"torch {torch.__version__}" in line and "\n" not in line
    gpu = {
        "gpu": "NVIDIA H100 80GB HBM3",
        "driver": "580.1",
        "cuda": "13.0",
        "clock_mhz": "1980",
        "max_clock_mhz": "1980",
    }
    assert report.headline({**found, **gpu}).startswith(
        "NVIDIA H100 80GB HBM3 (driver 580.1, CUDA 13.0, 1980 of 1980 MHz); moai"
    )


def test_a_loaded_machine_is_warned_of():
    assert report.warnings({"load": 3.0}) and not report.warnings({"load": 0.1}) and not report.warnings({"load": None})
    assert not report.warnings({"load": 3.0, "gpu": "x"})


def test_tables():
    table = Table("a title", ("name", "ms"), [("scan", "1.5"), ("attention", "20")])
    assert report.plain(table) == "a title\nname        ms\nscan       1.5\nattention   20"
    assert table.right == (1,)
    found = {**report.environment(CPU, "moai bench scan"), "date": "today"}
    text = report.markdown(found, [table], ["nothing left out"])
    assert text.split("\n\n")[1:] == [
        "    moai bench scan",
        "a title",
        "| name | ms |\n| --- | ---: |\n| scan | 1.5 |\n| attention | 20 |",
        "- nothing left out\n",
    ]


@pytest.mark.parametrize(("value", "text"), [(None, ""), (0.012341, "0.01234"), (1.5, "1.500"), (123.456, "123.5"), (1234.5, "1,234"), (999.99, "1000")])  # fmt: skip
def test_milliseconds(value, text):
    assert report.ms(value) == text


def test_lists_of_numbers_and_names():
    assert report.numbers("--dim", ["8, 16", "8", "1_024"]) == [8, 16, 1024]
    for wrong in ("0", "x", "", "1,,2", "1.5", "-3"):
        with pytest.raises(UsageError, match=r"^--dim must be whole numbers >= 1"):
            report.numbers("--dim", wrong)
    assert report.among("--against", ["a,b", "a"], ("a", "b")) == ["a", "b"]
    with pytest.raises(UsageError, match="unknown name 'c'"):
        report.among("--against", "a,c", ("a", "b"))


def test_devices_and_types():
    assert place("cpu") == CPU
    for wrong in ("abacus", "meta", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(UsageError, match="--device"):
            place(wrong)
    assert report.dtype_of("auto", CPU) == torch.float32 and report.dtype_of("bf16", CPU) == torch.bfloat16
    assert report.dtype_of("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(UsageError, match="--dtype"):
        report.dtype_of("int8", CPU)
    assert report.short(torch.float16) == "fp16"


def test_curves_become_a_picture(tmp_path):
    path = tmp_path / "길이.png"
    panels = {"forward": [Curve("scan", [(256, 1.0), (512, 2.0)]), Curve("attention", [(256, 1.0), (512, 4.0)], True)]}
    report.check_plot(path)
    report.draw(path, {**panels, "backward": []}, x="tokens", y="milliseconds", title="two panels")
    wide = png_size(path)
    report.draw(path, panels, x="tokens", y="milliseconds", title="one panel")
    assert wide[0] > png_size(path)[0] > 300 and [p.name for p in tmp_path.iterdir()] == ["길이.png"]


def test_a_picture_that_could_not_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match="PNG"):
        report.check_plot(tmp_path / "a.pdf")
    with pytest.raises(StorageError, match="no such folder"):
        report.check_plot(tmp_path / "none" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StorageError, match="not a regular file"):
        report.check_plot(tmp_path / "folder.png")


def test_progress_is_silent_where_nobody_looks(capsys):
    progress = report.Progress()
    for done in range(3):
        progress({"event": "progress", "task": "scan", "done": done, "total": 2})
    progress({"event": "other"})
    assert capsys.readouterr() == ("", "")
