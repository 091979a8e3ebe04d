"""Ctrl-C before a command's own work begins, and after it ended."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Found by every interpreter of the test: raises the signal when the module named in AT is looked for.
_FINDER = """
import os, signal, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


def _run(tmp_path, code, **environment):
    return subprocess.run(
        [sys.executable, *code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("module", ["typer", "moai_cli.commands.train", "torch", "transformers"])
def test_while_libraries_are_imported_it_has_a_word_and_its_code(module, tmp_path, folder):
    (tmp_path / "finder").mkdir()
    (tmp_path / "finder" / "sitecustomize.py").write_text(_FINDER)
    command = ["-m", "moai_cli", "generate", "-m", str(folder), "-p", "x", "-n", "1"]
    done = _run(tmp_path, command, AT=module, PYTHONPATH=f"{tmp_path / 'finder'}{os.pathsep}{os.getcwd()}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


_CATCH = "from moai_cli import interrupt; import atexit, os, signal, time; interrupt.catch()\n"


def test_inside_text_that_is_executed_the_exit_code_stays():
    """CPython would end the process by SIGINT there, although the exception was caught."""
    code = (
        f"{_CATCH}try: exec('os.kill(os.getpid(), signal.SIGINT); time.sleep(9)')\nexcept KeyboardInterrupt: exit(130)"
    )
    assert _run(None, ["-c", code]).returncode == 130


def test_a_finished_command_keeps_its_code():
    code = (
        f"{_CATCH}class End:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 2)\nend = End(); exit(3)"
    )
    done = _run(None, ["-c", code])
    assert (done.returncode, done.stderr) == (3, "")


def test_where_it_is_ignored_it_stays_ignored():
    code = f"signal.signal(2, signal.SIG_IGN); {_CATCH}os.kill(os.getpid(), 2); time.sleep(0.1); print('on')"
    assert _run(None, ["-c", f"import signal; {code}"]).stdout == "on\n"
