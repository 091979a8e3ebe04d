"""The training loop: a recipe in, a run folder out.

    recipe.yaml      the resolved recipe
    metrics.jsonl    a line a step and a line a validation (metrics.py)
    samples.jsonl    text the model wrote along the way
    loss.png         the curves, drawn when the run ends or is interrupted
    step-N/          checkpoints (moai_core/checkpoint.py)

One step: fetch all micro-batches, count their label tokens over all ranks, divide each micro-batch's summed loss by
that count (so that accumulation and ranks change nothing but the order of a sum), clip, update. A step whose loss or
gradient is not finite is skipped on every rank. All state is in the checkpoint: a run resumed on a CPU takes the same
steps, bit for bit, as one that never stopped. What comes before the first step is run.py's; signals, collectives and
trackers are in stop.py, parallel.py and track.py. Left out: sharded models, multimodal data, early stopping.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

import torch

from moai_core import checkpoint
from moai_core.errors import Interrupted, NonFiniteError, StorageError, UsageError
from moai_core.model.loss import IGNORED, shift_labels
from moai_core.model.padding import in_order
from moai_core.recipe import Recipe
from moai_core.training import metrics, optim, setup, track
from moai_core.training.parallel import Ranks
from moai_core.training.run import Fetched, OnEvent, Result, Run
from moai_core.training.sample import sample
from moai_core.training.stop import StopFlag
from moai_core.training.validate import validate

# Threads of torch's products on the processor while a GPU trains: what is left to them is small, and a team of one
# thread a core waits for each other. On 64 cores that took a GPU from 980 to 360 thousand tokens/s.
GPU_THREADS = 4
# Train losses that the mean in `Result.loss` is taken over.
RECENT = 10


def train(
    recipe: Recipe,
    *,
    model_path: str | Path | None = None,
    resume: str = "auto",
    output: str | Path | None = None,
    on_event: OnEvent = lambda event: None,
    stop: StopFlag | None = None,
    kind: setup.Kind = setup.MAMBA,
) -> Result:
    """Trains until the recipe's steps are done.

    model_path: weights to start from (run, step or Hugging Face folder), with a fresh optimizer and optim.finetune_lr.
    resume: auto, never or a checkpoint's path (resume.py). output: the run folder (default: the recipe's). Under
    torchrun every process calls this; rank 0 writes. kind: the class of model, for benchmarks that train another one.

    Events (`{"event": ...}`): start, step, valid, sample, checkpoint, warning, note, and those of the data pipeline; on
    rank 0 only. Raises UsageError, RecipeError, DataError (2), CheckpointError (3), StorageError (4), NonFiniteError
    (5), LockedError (6), RankError (7) and Interrupted once `stop` was asked for and the state is saved. On ranks other
    than 0, SystemExit for an error that rank 0 reports.
    """
    stop = StopFlag() if stop is None else stop
    if model_path is not None and resume not in ("auto", "never"):
        raise UsageError("--model starts a new run, --resume PATH continues one: give one of them")
    track.require(recipe.track)
    dtype, mixed = setup.precision(recipe)
    threads = recipe.train.threads
    if threads is None and not setup.on_cpu(recipe):
        threads = min(torch.get_num_threads(), GPU_THREADS)
    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        with stop.at_once():
            ranks = Ranks(cpu=setup.on_cpu(recipe), mixed=mixed)
            folder = Path(output or recipe.output or f"runs/{recipe.name}")
            loop = Loop(recipe, folder, ranks, stop, on_event, stack, kind)
            loop.open(resume, None if model_path is None else Path(model_path), dtype)
        with ranks.guard():
            result = loop.go()
        ranks.close()
    return result


class Loop(Run):
    """The steps of a run and what happens around them."""

    def go(self) -> Result:
        """Steps until done. Whatever ends the run, what it recorded is drawn; a wish to stop is heard after saving."""
        progress = self.progress
        began = time.perf_counter() - progress.seconds
        self.flops = self.kind.flops(self.model)
        self.peak_flops = setup.peak_flops(self.recipe)
        self._announce()
        try:
            self._after_step()
            while progress.step < self.steps:
                self._step()
                progress.seconds = time.perf_counter() - began
                self._after_step()
        except Interrupted as exc:
            raise self._interrupted(exc) from None
        except NonFiniteError:
            self._draw()
            raise
        except StorageError as exc:
            raise StorageError(f"{exc.message}; {self._last_good()}", hint=exc.hint) from exc
        return self._result()

    def _announce(self) -> None:
        setup.warn_of_fallback(self.model, self.ranks.device, self.on_event)
        self.on_event(
            {
                "event": "start",
                "run_dir": str(self.run_dir),
                "step": self.progress.step,
                "steps": self.steps,
                "resumed_from": self.resumed_from,
                "parameters": sum(p.numel() for p in self.parameters),
                "device": setup.device_name(self.ranks.device),
                "ranks": self.ranks.world,
                "precision": setup.precision_name(self.recipe),
                "rows": self.rows,
                "log_every": self.recipe.train.log_every,
            }
        )

    def _fetch(self) -> Fetched:
        """The micro-batches of one step, with counts of label tokens and of real tokens, and the loader's state behind
        them.
        """
        batches = [next(self.batches) for _ in range(self.accumulation)]
        labels = sum(int((shift_labels(b["labels"], b["seq_idx"]) != IGNORED).sum()) for b in batches)
        real = sum(int((b["seq_idx"] >= 0).sum()) for b in batches)
        tidy = all(in_order(b["seq_idx"]) for b in batches)
        return Fetched(batches, labels, real, tidy, self.loader.state_dict(), self.loader.epoch)

    def _step(self) -> None:
        """One optimizer step. Raises Interrupted between micro-batches; what they left is thrown away and done again
        after resuming.
        """
        began, ranks, progress = time.perf_counter(), self.ranks, self.progress
        now, self.ahead = self.ahead or self._fetch(), None
        labels, real = self._agree_to_go_on(now.labels, now.real)
        # Data parallelism averages gradients over the ranks: the count is divided as well, and the sum comes out.
        items = max(1.0, labels) / ranks.world
        lr = self._set_learning_rate(progress.step + 1)
        total = torch.zeros((), device=ranks.device)
        for index, batch in enumerate(now.batches):
            if ranks.world == 1:
                self.stop.check()
            last = index == len(now.batches) - 1
            with nullcontext() if last else ranks.unsynchronised(self.parallel):
                inputs = {k: batch[k].to(ranks.device, non_blocking=True) for k in ("input_ids", "labels", "seq_idx")}
                loss = self.parallel(**inputs, num_items=items, seq_idx_in_order=now.in_order).loss
                loss.backward()
            total += loss.detach()
        norm = optim.grad_norm(self.parameters) if self.early is None else self.early.norm(self.parameters)
        if progress.step + 1 < self.steps:
            # While a GPU still computes; on a CPU it makes no difference.
            self.ahead = self._fetch()
        local, size = torch.stack([total, norm]).tolist()
        loss_value = ranks.sum(local)[0] / ranks.world
        finite = math.isfinite(loss_value) and math.isfinite(size)
        if finite:
            optim.clip_and_step(self.optimizer, self.parameters, norm, self.recipe.optim.clip)
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += int(labels)
        self.consumed = now.state
        seconds = time.perf_counter() - began
        self._record(loss_value, lr, size, finite, real, seconds, now.epoch)
        self._guard_finite(finite, loss_value)

    def _agree_to_go_on(self, labels: int, real: int) -> tuple[float, float]:
        """Label and real tokens summed over the ranks; Interrupted on all of them when one was asked to stop."""
        asked = self.stop.signum
        labels_all, real_all, interrupts, terms = self.ranks.sum(
            labels, real, asked == SIGINT, asked not in (0, SIGINT)
        )
        if interrupts or terms:
            raise Interrupted(SIGTERM if terms else SIGINT)
        return labels_all, real_all

    def _set_learning_rate(self, step: int) -> float:
        o = self.recipe.optim
        lr = optim.learning_rate(
            step,
            total=self.steps,
            peak=self.peak_lr,
            schedule=o.schedule,
            warmup=o.warmup_steps,
            min_ratio=o.min_lr_ratio,
            decay_fraction=o.decay_fraction,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _record(
        self, loss: float, lr: float, norm: float, finite: bool, real: float, seconds: float, epoch: int
    ) -> None:
        progress = self.progress
        progress.recent = [*progress.recent[1 - RECENT :], loss] if finite else progress.recent
        self.timed = [self.timed[0] + real, self.timed[1] + seconds]
        if not self.ranks.main:
            return
        row: dict[str, Any] = {"kind": "train", "step": progress.step, "loss": loss, "lr": lr, "grad_norm": norm}
        row |= {"tokens": progress.tokens, "epoch": epoch, "tokens_per_s": round(real / seconds, 1)}
        row["memory_mb"] = round(setup.memory_in_use(self.ranks.device) / 1e6, 1)
        if self.peak_flops:
            mfu = self.flops * real / seconds / (self.peak_flops * self.ranks.world)
            row["mfu"] = float(f"{mfu:.3g}")
        if not finite:
            row["skipped"] = True
        self.metrics.write(row)
        self.on_event({"event": "step", "steps": self.steps, **row})
        if progress.step % self.recipe.train.log_every == 0:
            self._track(
                {k: row[k] for k in ("loss", "lr", "grad_norm", "tokens_per_s", "memory_mb", "mfu") if k in row}
            )

    def _track(self, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(values, self.progress.step)

    def _guard_finite(self, finite: bool, loss: float) -> None:
        progress, limit = self.progress, self.recipe.train.max_nonfinite
        if finite:
            progress.nonfinite = 0
            return
        progress.nonfinite += 1
        progress.skipped += 1
        what = "the gradient" if math.isfinite(loss) else "the loss"
        count = f"{progress.nonfinite} in a row, {limit} stop the run"
        skipped = "the step is skipped" if self.early is None else "what of it wasn't changed nothing"
        message = f"step {progress.step}: {what} is not finite; {skipped} ({count})"
        self.on_event({"event": "warning", "message": message})
        if progress.nonfinite >= limit:
            raise NonFiniteError(
                f"{what} was not finite in {limit} steps in a row (up to step {progress.step}); {self._last_good()}",
                hint="lower optim.lr, lengthen optim.warmup_steps, or look at the data of these steps",
            )

    # ---- what happens every so often

    def _after_step(self) -> None:
        """Validation, samples and checkpoints that are due and not done yet (a run stopped between them catches up when
        it resumes).
        """
        progress, t = self.progress, self.recipe.train
        done = progress.step >= self.steps

        def due(every: int) -> bool:
            return bool(every and progress.step and (done or progress.step % every == 0))

        late = False
        if due(t.eval_every) and progress.evaluated != progress.step:
            self._evaluate()
            late = True
        if due(t.sample_every) and progress.sampled != progress.step:
            if self.ranks.main:
                self._sample()
            self._agree_to_go_on(0, 0)
            progress.sampled, late = progress.step, True
        wanted = due(t.save_every) or done or self._spared() == progress.step
        # Saved again where a run stopped after its last step catches up, or the next start would do it once more.
        if wanted and progress.step and (late or self._saved_step() != progress.step):
            self._save()

    def _evaluate(self) -> None:
        if not self.valid_loaders:
            return
        progress = self.progress
        valid = validate(
            self.model,
            self.valid_loaders,
            self.ranks,
            batches=self.recipe.train.eval_batches,
            stop=self.stop,
            agree=lambda: self._agree_to_go_on(0, 0),
            on_event=self.on_event,
        )
        progress.evaluated, progress.valid = progress.step, {"step": progress.step, **valid}
        if math.isfinite(valid["loss"]) and (progress.best is None or valid["loss"] < progress.best["loss"]):
            progress.best = progress.valid
        if self.ranks.main:
            row = {"kind": "valid", "step": progress.step, "valid_loss": valid["loss"]}
            row |= {k: v for k, v in valid.items() if k != "loss"}
            self.metrics.write(row)
            self.on_event({"event": "valid", **row})
            sets = {f"bits_per_byte/{name}": one["bits_per_byte"] for name, one in valid.get("sets", {}).items()}
            self._track({k: row[k] for k in ("valid_loss", "perplexity", "bits_per_byte")} | sets)

    def _sample(self) -> None:
        progress, t = self.progress, self.recipe.train
        seed = (t.seed * 1_000_003 + progress.step) % 2**63
        made = sample(
            self.model,
            self.tokenizer,
            t.sample_prompts,
            tokens=t.sample_tokens,
            seed=seed,
            autocast=self.ranks.autocast(),
            stop=self.stop,
        )
        if not made:
            return
        for one in made:
            row = {"kind": "sample", "step": progress.step, **one}
            self.samples.write(row)
            self.on_event({"event": "sample", **row})
        progress.sampled, progress.sample = progress.step, {"step": progress.step, **made[0]}

    def _save(self) -> None:
        self.ranks.on_main(self._write_checkpoint)
        self.saved = self.run_dir / f"step-{self.progress.step}"

    def _write_checkpoint(self) -> None:
        # A checkpoint promises the lines up to its step.
        self.metrics.sync()
        self.samples.sync()
        trainer = {
            "progress": asdict(self.progress),
            "loader": self.consumed,
            "rng": checkpoint.rng_state(),
            "rows": self.rows,
            "model_path": self.model_path,
            "kind": self.kind.label,
        }
        checkpoint.save(
            self.run_dir,
            self.progress.step,
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer_state=checkpoint.optimizer_state(self.model, self.optimizer),
            trainer=trainer,
            recipe=self.recipe.to_dict(),
            keep_last=self.recipe.train.keep_last,
            spare=self._spared(),
            on_event=self.on_event,
        )

    # ---- the end

    def _last_good(self) -> str:
        return f"last good checkpoint: {self.saved}" if self.saved is not None else "no checkpoint was saved yet"

    def _interrupted(self, exc: Interrupted) -> Interrupted:
        """Saves the last complete step and draws the curves; the exception to raise."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.progress.step and self._saved_step() != self.progress.step:
            self._save()
        self._draw()
        signum = exc.exit_code - 128
        name = Signals(signum).name
        if self.saved is None:
            return Interrupted(signum, f"stopped by {name} before the first step: nothing to save")
        return Interrupted(
            signum,
            f"stopped by {name} after step {self.progress.step}, saved {self.saved}",
            hint="the same command resumes",
        )

    def _draw(self) -> Path | None:
        if not self.ranks.main:
            return None
        try:
            return metrics.plot(self.run_dir, title=self.recipe.name)
        except StorageError as exc:
            self.on_event({"event": "warning", "message": f"no picture of the losses: {exc.message}"})
            return None

    def _result(self) -> Result:
        progress = self.progress
        return Result(
            run_dir=self.run_dir,
            checkpoint=self.saved,
            step=progress.step,
            tokens=progress.tokens,
            loss=sum(progress.recent) / len(progress.recent) if progress.recent else None,
            valid=progress.valid,
            best=progress.best,
            sample=progress.sample,
            tokens_per_s=self.timed[0] / self.timed[1] if self.timed[1] else None,
            seconds=progress.seconds,
            skipped=progress.skipped,
            resumed_from=self.resumed_from,
            plot=self._draw(),
        )
