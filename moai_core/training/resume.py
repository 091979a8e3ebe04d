"""Where a run starts: its folder, the checkpoint it goes on from, and whether that belongs to the recipe at hand.

`--resume auto` goes on from the newest good checkpoint of the output folder, or starts when there is none; the recipe
may then differ from the stored one only in keys that leave the steps taken so far as they are (`MAY_CHANGE`). `--resume
PATH` goes on from that checkpoint, in its own run or branching off into a new folder, and takes the new recipe's word
for everything but the shape of the state (`MUST_AGREE`). `--resume never` starts, and refuses a folder that holds a
run: nothing is ever overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai_core import checkpoint, storage
from moai_core.errors import CheckpointError, UsageError, shell, storage_error
from moai_core.recipe import Recipe
from moai_core.training import metrics

# Keys (or sections) that may differ when a run goes on by itself: how long, how often to look, where it runs. The
# schedule is a function of train.steps, so a longer run changes the learning rates that are still to come, not those
# already used.
MAY_CHANGE = (
    "name", "description", "track", "hardware", "output", "data.workers", "data.cache", "model.scan", "train.steps",
    "train.epochs", "train.save_every", "train.keep_last", "train.keep_best", "train.eval_every",
    "train.eval_batches", "train.log_every", "train.sample_every",
    "train.sample_prompts", "train.sample_tokens", "train.max_nonfinite", "train.threads", "train.checkpointing",
    "train.checkpointing_layers", "optim.in_backward",
    "train.batch_size", "train.accumulation", "train.effective_batch",
)  # fmt: skip
# Keys that must agree even where the user names the checkpoint: weights, optimizer state and the loader's place in the
# data mean nothing else.
MUST_AGREE = ("model", "tokenizer", "data", "optim.name", "train.seed")

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Start:
    """`run_dir` and the checkpoint to go on from (None: from scratch or from --model)."""

    run_dir: Path
    step_dir: Path | None


def holds_run(folder: Path) -> bool:
    """Whether a training run was written here."""
    return (folder / RECIPE).is_file() or (folder / metrics.METRICS).is_file() or bool(storage.steps(folder))


def check_output(run_dir: Path, resume: str) -> None:
    """UsageError for an output folder that can't take the run: a file, a folder of something else, a run where `resume`
    is never.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"output {run_dir} is a file, not a folder", hint="choose another folder with --output")
    try:
        inside = sorted(p.name for p in run_dir.iterdir() if not p.name.startswith(".")) if run_dir.is_dir() else []
    except OSError as exc:
        raise storage_error(exc, run_dir) from exc
    if inside and not holds_run(run_dir):
        raise UsageError(
            f"output {run_dir} exists and is no run folder (it holds {inside[0]})",
            hint="choose another folder with --output",
        )
    if inside and resume == "never":
        raise UsageError(
            f"output {run_dir} already holds a run",
            hint="choose another folder with --output, or go on with --resume auto",
        )


def find_start(run_dir: Path, resume: str, on_event: Any) -> Start:
    """Which checkpoint to go on from. UsageError, CheckpointError as the module's docstring says."""
    if resume == "never":
        return Start(run_dir, None)
    newest = checkpoint.latest(run_dir, on_event=on_event) if run_dir.is_dir() else None
    if resume == "auto":
        if newest is None and storage.steps(run_dir):
            hint = "start anew in another folder with --output"
            raise CheckpointError(f"{run_dir}: none of its checkpoints is complete and undamaged", hint=hint)
        return Start(run_dir, newest)
    given = Path(resume).expanduser()
    if not given.is_dir():
        raise CheckpointError(
            f"--resume {given}: no such folder", hint="give a run folder, a step-N folder, auto or never"
        )
    step_dir = (
        given
        if (given / "trainer.json").is_file() or not storage.steps(given)
        else checkpoint.latest(given, on_event=on_event)
    )
    if step_dir is None:
        raise CheckpointError(f"--resume {given}: none of its checkpoints is complete and undamaged")
    checkpoint.verify(step_dir)
    if newest is not None and newest.resolve() != step_dir.resolve():
        why = "has newer checkpoints" if step_dir.parent.resolve() == run_dir.resolve() else "holds another run"
        raise UsageError(
            f"--resume {given}: the output {run_dir} {why} ({newest.name})",
            hint="branch off into a new folder with --output",
        )
    return Start(run_dir, step_dir)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; lists stay values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _covers(keys: tuple[str, ...], key: str) -> bool:
    return any(key == one or key.startswith(one + ".") for one in keys)


def check_agreement(
    recipe: Recipe, trainer: dict[str, Any], *, step_dir: Path, explicit: bool, rows: int, model_path: str | None
) -> list[str]:
    """Compares the recipe with the one stored in a checkpoint; the keys that differ and may. UsageError naming those
    that must not.

    rows: rows a step over all devices. The loader counts rows, so batch size and accumulation may trade places, but not
    their product.
    """
    old, new = flat(trainer.get("recipe") or {}), flat(recipe.to_dict())
    differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    wrong = [k for k in differ if (_covers(MUST_AGREE, k) if explicit else True) and not _covers(MAY_CHANGE, k)]
    shown = [f"{k} {old.get(k)} -> {new.get(k)}" for k in wrong]
    if trainer.get("rows") != rows:
        shown.append(f"rows a step {trainer.get('rows')} -> {rows}")
    if model_path is not None and trainer.get("model_path") != model_path:
        shown.append(f"--model {trainer.get('model_path') or '(from scratch)'} -> {model_path}")
    if shown:
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        hint = "train the new recipe in another folder with --output"
        if not explicit and not any(_covers(MUST_AGREE, k) for k in wrong) and len(shown) == len(wrong):
            hint += f", or take the new values from here on with --resume {shell(step_dir)}"
        raise UsageError(f"{step_dir} was trained with another recipe: {', '.join(shown[:3])}{more}", hint=hint)
    return differ
