"""What the command line says beside its results."""

from __future__ import annotations

import logging


def test_work_that_happens_once_is_a_line_on_stderr(moai, capsys):
    """A first use of GPU kernels compiles them; the core logs it, and a second command doesn't say it twice."""
    assert moai("recipes", "ls")[0] == moai("recipes", "ls")[0] == 0
    for name in ("conv", "[norm]", "conv"):
        logging.getLogger("moai.cuda").info("compiling GPU kernels for sm_%d (once): %s", 90, name)
    logging.getLogger("moai.cuda").debug("nobody asked")
    out, err = capsys.readouterr()
    want = [f"compiling GPU kernels for sm_90 (once): {name}" for name in ("conv", "[norm]")]
    assert out == "" and err.splitlines() == want


def test_one_process_of_a_distributed_run_speaks(moai, capsys, monkeypatch):
    log = logging.getLogger("moai")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setenv("RANK", "1")
    assert moai("recipes", "ls")[0] == 0 and log.handlers == []
