"""Refuses chat templates that would run without end or fill the memory.

Why: a chat template is a program (Jinja) that comes with a downloaded tokenizer. transformers' sandbox keeps it from
the machine but not from time: two nested loops over `range(100000)` hang the program, `'x' * 10**10` fills the memory.
So every template that doesn't come with moai is tried first, in a process of its own with limits, on chats of all
usual lengths. Left out: proof; a template may wait for a role or a length that the trial lacks.
Source: Jinja, Sandbox, Security considerations.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from moai_core.errors import CheckpointError
from moai_core.paths import TOKENIZERS

_SECONDS = 3
_MEGABYTES = 256
# Jinja as transformers sets it up, without its import; an error that the template raises is told when it is used.
_TRY = """
import json, resource, sys
given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"]))
resource.setrlimit(resource.RLIMIT_AS, (given["megabytes"] << 20, given["megabytes"] << 20))
from jinja2 import ext, sandbox

class Generation(ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def stop(message):
    raise ValueError(message)

try:
    jinja = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    jinja.globals.update(raise_exception=stop, strftime_now=lambda form: form)
    template = jinja.from_string(given["template"])
except MemoryError:
    sys.exit(1)
except Exception:
    sys.exit(0)
for system in (0, 1):
    for turns in range(1, 33):
        roles = ["system"] * system + ["user", "assistant"] * turns
        for end in (len(roles), len(roles) - 1):
            chat = [{"role": role, "content": "text"} for role in roles[:end]]
            try:
                text = template.render(messages=chat, tools=None, documents=None,
                                       add_generation_prompt=chat[-1]["role"] == "user", **given["special"])
            except MemoryError:
                sys.exit(1)
            except Exception:
                continue
            if len(text) > 1 << 20:
                sys.exit(1)
"""


def check_template(template: str, special: dict[str, str], path: Path) -> None:
    """Raises CheckpointError naming `path` where the template needs too much time or memory for a chat of at most 65
    short messages. `special` are the special tokens that it may name (`bos_token` ...).
    """
    if template in _shipped():
        return
    given = {"template": template, "special": special, "seconds": _SECONDS, "megabytes": _MEGABYTES}
    text = json.dumps(given).encode()
    key = hashlib.sha256(text).hexdigest()
    if key not in _tried:
        done = subprocess.run([sys.executable, "-I", "-c", _TRY], input=text, capture_output=True)
        _tried[key] = done.returncode == 0
    if not _tried[key]:
        raise CheckpointError(
            f"{path}: the chat template needs more than {_SECONDS} s or {_MEGABYTES} MB for a short chat",
            hint="get the tokenizer from its maker again, or put a template that you trust in its place",
        )


def _shipped() -> set[str]:
    return {file.read_text(encoding="utf-8") for file in TOKENIZERS.glob("*/chat_template.jinja")}


_tried: dict[str, bool] = {}
