"""A run before its first step: the folder taken, the weights made or loaded, the data opened, a checkpoint's state put
back. And what a run holds on the way (Progress, Fetched) and reports at its end (Result).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moai_core import checkpoint, storage
from moai_core.data.loader import make_loader
from moai_core.errors import UsageError
from moai_core.recipe import Recipe
from moai_core.training import in_backward, metrics, optim, setup, track
from moai_core.training import resume as resuming
from moai_core.training.parallel import Ranks
from moai_core.training.stop import StopFlag

OnEvent = Callable[[dict[str, Any]], None]


@dataclass
class Progress:
    """The part of a run's state that is neither tensors nor the loader's; all of it goes into trainer.json."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: int = 0
    sampled: int = 0
    skipped: int = 0
    nonfinite: int = 0
    recent: list[float] = field(default_factory=list)
    valid: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    sample: dict[str, Any] | None = None


@dataclass
class Result:
    """What a finished run reports. loss: mean of the last ten steps; valid, best and sample are None where the recipe
    asks for none.
    """

    run_dir: Path
    checkpoint: Path | None
    step: int
    tokens: int
    loss: float | None
    valid: dict[str, Any] | None
    best: dict[str, Any] | None
    sample: dict[str, Any] | None
    tokens_per_s: float | None
    seconds: float
    skipped: int
    resumed_from: int | None
    plot: Path | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


@dataclass
class Fetched:
    """The micro-batches of one step, what was counted and checked while they were on the CPU, and the loader's state
    once they are consumed."""

    batches: list[dict[str, Any]]
    labels: int
    real: int
    in_order: bool
    state: dict[str, Any]
    epoch: int


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """The tensors in memory that a GPU reads by itself: copies from other memory wait for the work queued before."""
    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


class Run:
    """What one training run holds on this process, from its first state or a checkpoint's."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        ranks: Ranks,
        stop: StopFlag,
        on_event: OnEvent,
        stack: ExitStack,
        kind: setup.Kind = setup.MAMBA,
    ) -> None:
        self.recipe, self.run_dir, self.ranks, self.stop, self.stack = recipe, run_dir, ranks, stop, stack
        self.kind = kind
        self.on_event: OnEvent = on_event if ranks.main else lambda event: None
        self.accumulation = ranks.main_first(lambda: recipe.accumulation(ranks.world))
        self.rows = recipe.train.batch_size * self.accumulation * ranks.world
        self.progress = Progress()
        self.saved: Path | None = None
        self.resumed_from: int | None = None
        self.trackers: list[track.Tracker] = []
        self.timed = [0.0, 0.0]

    def open(self, resume: str, model_path: Path | None, dtype: torch.dtype) -> None:
        """Takes the run folder, then builds or restores everything. Rank 0 goes first, so that what is wrong for all is
        said once.
        """
        ranks, recipe = self.ranks, self.recipe
        ranks.on_main(lambda: self._take_folder(resume))
        start = ranks.main_first(lambda: resuming.find_start(self.run_dir, resume, self.on_event))
        saved = ranks.main_first(lambda: self._open_model(start.step_dir, model_path, dtype, resume))
        self.loader = ranks.main_first(lambda: self._loader("train"))
        self.valid_loaders = self._valid_loaders() if recipe.train.eval_every else {}
        self.steps = ranks.main_first(lambda: setup.total_steps(recipe, self.loader.len_rows, self.rows))
        self.parallel = ranks.prepare(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        tuned = self.model_path is not None and recipe.optim.finetune_lr is not None
        self.peak_lr = recipe.optim.finetune_lr if tuned and recipe.optim.finetune_lr else recipe.optim.lr
        self.optimizer = ranks.main_first(
            lambda: optim.make_optimizer(self.model, recipe.optim, lr=self.peak_lr, seed=recipe.train.seed)
        )
        if saved is not None:
            ranks.main_first(lambda: self._restore(*saved))
        count = {"accumulation": self.accumulation, "ranks": ranks.world}
        self.early = ranks.main_first(lambda: in_backward.begin(recipe, self.optimizer, **count, stack=self.stack))
        self.consumed = self.loader.state_dict()
        batches = iter(self.loader)
        self.batches = map(_pinned, batches) if ranks.device.type == "cuda" else batches
        self.ahead: Fetched | None = None
        ranks.on_main(lambda: self._open_files(start.step_dir))
        # Known to every rank: they must agree on whether a checkpoint is due.
        if start.step_dir is not None and start.step_dir.parent.resolve() == self.run_dir.resolve():
            self.saved = start.step_dir
            ranks.on_main(self._purge)

    def _purge(self) -> None:
        """A run killed between a save and the purge that follows it left one checkpoint too many."""
        keep, newest = self.recipe.train.keep_last, self.progress.step
        checkpoint.purge(self.run_dir, newest=newest, keep_last=keep, spare=self._spared(), on_event=self.on_event)

    def _saved_step(self) -> int:
        return -1 if self.saved is None else int(self.saved.name.removeprefix("step-"))

    def _spared(self) -> int | None:
        """The step whose checkpoint is kept whatever its age."""
        best = self.progress.best
        return best["step"] if best and self.recipe.train.keep_best else None

    def _open_model(
        self, step_dir: Path | None, model_path: Path | None, dtype: torch.dtype, resume: str
    ) -> tuple[dict[str, Any] | None, dict[str, Any]] | None:
        """Tokenizer and model, checked against the recipe and each other; the other state of a checkpoint."""
        recipe, saved = self.recipe, None
        self.model_path = None if model_path is None else str(model_path.resolve())
        if step_dir is not None:
            saved = checkpoint.load_training(step_dir, verified=True)
            self._agree(saved[1], step_dir, explicit=resume not in ("auto", "never"))
            self.model_path = saved[1].get("model_path")
        source = step_dir or (None if model_path is None else setup.model_folder(model_path, self.on_event))
        self.tokenizer = setup.load_tokenizer(recipe, source)
        if source is None:
            self.model = self.kind.new(recipe, self.tokenizer)
        else:
            self.model = self.kind.load(source, recipe, self.tokenizer, dtype, self.on_event)
        self.kind.ready(self.model, recipe, dtype)
        return saved

    def _take_folder(self, resume: str) -> None:
        resuming.check_output(self.run_dir, resume)
        self.stack.callback(self._leave_nothing)
        self.stack.enter_context(checkpoint.lock(self.run_dir))

    def _leave_nothing(self) -> None:
        """A run that ended before its first record or checkpoint leaves no folder."""
        inside = list(self.run_dir.iterdir()) if self.run_dir.is_dir() else []
        names = {".lock", resuming.RECIPE, metrics.METRICS, metrics.SAMPLES}
        if all(path.name in names and (path.name == resuming.RECIPE or not path.stat().st_size) for path in inside):
            for path in sorted(inside, reverse=True):
                path.unlink()
            if self.run_dir.is_dir():
                self.run_dir.rmdir()

    def _agree(self, trainer: dict[str, Any], step_dir: Path, *, explicit: bool) -> None:
        if (before := trainer.get("kind", "")) != self.kind.label:
            raise UsageError(
                f"{step_dir} was trained as {before or 'a plain model'}, not as {self.kind.label or 'one'}",
                hint="train in another folder with --output",
            )
        differ = resuming.check_agreement(
            self.recipe, trainer, step_dir=step_dir, explicit=explicit, rows=self.rows, model_path=self.model_path
        )
        if differ:
            self.on_event({"event": "note", "message": f"resuming with other values of {', '.join(differ)}"})

    def _valid_loaders(self) -> dict[str | None, Any]:
        """A loader for each name in data.valid, None for what has no name."""
        data = self.recipe.data
        made = {}
        for name in dict.fromkeys(source.name for source in data.valid or ()) or [None]:
            chosen = data.valid and tuple(source for source in data.valid if source.name == name)
            part = dataclasses.replace(data, valid=chosen)
            loader = self.ranks.main_first(functools.partial(self._loader, "valid", part))
            if loader is not None:
                made[name] = loader
        return made

    def _loader(self, split: str, data: Any = None) -> Any:
        train = self.recipe.train
        return make_loader(
            self.recipe.data if data is None else data,
            self.tokenizer,
            split=split,
            batch_size=train.batch_size,
            seed=train.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world,
            on_event=self.on_event,
        )

    def _restore(self, optimizer_state: dict[str, Any] | None, trainer: dict[str, Any]) -> None:
        # The recipe's settings (weight decay, betas) hold, not the stored ones: where they may differ, the user said
        # so.
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        if optimizer_state is not None:
            checkpoint.load_optimizer_state(self.model, self.optimizer, optimizer_state)
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)
        self.loader.load_state_dict(trainer["loader"])
        self.progress = Progress(**{k: v for k, v in trainer["progress"].items() if k in Progress.__dataclass_fields__})
        self.resumed_from = self.progress.step
        checkpoint.set_rng_state(trainer["rng"])

    def _open_files(self, step_dir: Path | None) -> None:
        """recipe.yaml, and the records cut back to the step that the run goes on from."""
        source = self.run_dir if step_dir is None else step_dir.parent
        known = {"train": self.progress.step, "valid": self.progress.evaluated, "sample": self.progress.sampled}
        for name in (metrics.METRICS, metrics.SAMPLES):
            metrics.truncate(self.run_dir / name, known, source=source / name)
        storage.write_file(self.run_dir / resuming.RECIPE, self.recipe.to_yaml().encode())
        self.metrics = self.stack.enter_context(closing(metrics.Lines(self.run_dir / metrics.METRICS)))
        self.samples = self.stack.enter_context(closing(metrics.Lines(self.run_dir / metrics.SAMPLES)))
        for name in self.recipe.track:
            self.trackers.append(track.Tracker(name, self.run_dir, self.recipe.to_dict(), self.on_event))
            self.stack.callback(self.trackers[-1].close)
