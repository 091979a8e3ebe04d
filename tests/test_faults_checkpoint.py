"""Faults while a checkpoint is written, kept or read: kill, full disk, failing disk, flipped bits, two at once.

What must hold: `latest` gives the old or the new checkpoint, complete, never less; damage never passes; nothing
temporary stays.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from moai_core import checkpoint, locks, storage, tensors
from moai_core.errors import CheckpointError, StorageError

# Everything through which a save touches the disk. `shutil.rmtree` and `pathlib` go through these as well.
CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "replace")


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "말": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture
def run_path():
    """A temporary folder, in memory where possible: these tests write thousands of checkpoints and cut no power."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None, prefix="moai-") as folder:
        yield Path(folder)


@pytest.fixture
def save(tiny_model, tokenizer):
    """Write `run/step-N` with weights, moments and tokenizer that N determines."""

    def write(run: Path, step: int, **options) -> Path:
        model = tiny_model(seed=step, hidden_size=16, num_hidden_layers=1)
        moments = {name: {"m": parameter.detach() * step} for name, parameter in model.named_parameters()}
        return checkpoint.save(
            run,
            step,
            model=model,
            tokenizer=tokenizer,
            optimizer_state={"state": moments},
            trainer={"tokens": step},
            **options,
        )

    return write


def whole(step_dir: Path) -> bool:
    """Model, optimizer and trainer of a step all load and belong together."""
    model = checkpoint.load_model(step_dir)
    state, trainer = checkpoint.load_training(step_dir)
    number = int(step_dir.name.removeprefix("step-"))
    moments = tensors.flatten(state)[1]
    agree = all(torch.equal(moments[f"state/{name}/m"], p.detach() * number) for name, p in model.named_parameters())
    return agree and trainer["step"] == trainer["tokens"] == number


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name != ".lock") if run.exists() else []


def in_fork(work) -> int:
    """Run `work` in a forked child; its exit status, or minus the signal. 99: it raised."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_call(monkeypatch, number: int, act) -> Counter:
    """From now on the `number`-th call of CALLS in this process runs `act(name)` first; the counter counts calls."""
    seen: Counter = Counter()

    def wrap(name: str, original):
        def call(*args, **kwargs):
            seen[name] += 1
            if seen.total() == number:
                act(name)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return seen


def prepare(save, run: Path, scenario: str) -> int:
    """A run before the save under test; returns the step that this save writes (with keep_last=1)."""
    for step in {"first": (), "next": (1, 2), "again": (1,)}[scenario]:
        save(run, step)
    return {"first": 1, "next": 3, "again": 1}[scenario]


def calls_of_a_save(save, run: Path, scenario: str) -> Counter:
    save(run.with_name("warm"), 1)  # what is imported or opened once must not be counted
    step = prepare(save, run, scenario)
    with pytest.MonkeyPatch.context() as patch:
        seen = at_call(patch, 0, None)
        save(run, step, keep_last=1)
    return seen


# ---- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["first", "next", "again"])
def test_killed_at_every_call_of_a_save(save, run_path, scenario):
    seen = calls_of_a_save(save, run_path / "count", scenario)
    assert seen["rename"] >= 1 and seen["fsync"] >= 8 and seen["write"] >= 8 and seen["open"] >= 8
    outcomes = Counter()
    for number in range(1, seen.total() + 1):
        run = run_path / f"kill-{number}"
        step = prepare(save, run, scenario)

        def killed(number=number, run=run, step=step):
            with pytest.MonkeyPatch.context() as patch:
                at_call(patch, number, lambda name: os.kill(os.getpid(), signal.SIGKILL))
                save(run, step, keep_last=1)

        assert in_fork(killed) == -signal.SIGKILL
        warnings: list[dict] = []
        found = checkpoint.latest(run, on_event=warnings.append)
        assert not warnings, warnings
        if found is None:
            assert scenario == "first" and not names(run)
        else:
            assert whole(found)
            outcomes[found.name] += 1
            left = {"first": [["step-1"]], "again": [["step-1"]]}.get(scenario, [["step-1", "step-2"], ["step-3"]])
            assert names(run) in [*left, ["step-1", "step-2", "step-3"], ["step-2", "step-3"]]
        assert whole(save(run, step, keep_last=1))
    assert outcomes[f"step-{step}"], "some kill after the rename must leave the new one"
    assert scenario != "next" or outcomes["step-2"] > outcomes["step-3"] > 0


@pytest.mark.slow
def test_killed_at_random_moments(save, run_path):
    """SIGKILL from outside, at any machine instruction of 200 series of saves."""
    dice = random.Random(0)
    for trial in range(200):
        run = run_path / f"{trial}"
        save(run, 1)
        pid = os.fork()
        if pid == 0:
            for step in range(2, 10_000):
                save(run, step, keep_last=2)
        threading.Event().wait(dice.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        warnings: list[dict] = []
        found = checkpoint.latest(run, on_event=warnings.append)
        assert found is not None and whole(found) and not warnings
        assert all(name.startswith("step-") and "." not in name for name in names(run))
        whole(save(run, 10_000))


# ---- the disk fails or is full -------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["first", "next", "again"])
@pytest.mark.parametrize(
    "code", [errno.ENOSPC, *(pytest.param(e, marks=pytest.mark.slow) for e in (errno.EIO, errno.EPERM))]
)
def test_an_error_at_every_call_of_a_save(save, run_path, monkeypatch, scenario, code):
    seen = calls_of_a_save(save, run_path / "count", scenario)
    failed = 0
    for number in range(1, seen.total() + 1):
        run = run_path / f"error-{number}"
        step = prepare(save, run, scenario)
        before = names(run)

        def fail(name):
            raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, number, fail)
            try:
                save(run, step, keep_last=1)
            except StorageError as exc:
                failed += 1
                assert exc.exit_code == 4 and "\n" not in str(exc) and str(run) in str(exc)
                assert ("disk full" in str(exc)) == (code == errno.ENOSPC)
        found = checkpoint.latest(run)
        assert (found is None and scenario == "first") or whole(found)
        left = set(names(run))
        assert not any(".tmp-" in name or ".old-" in name for name in left), left
        # an old checkpoint that can't be deleted is no failure of the save; what is left of it goes with the next one
        assert left <= {*before, f"step-{step}"} | {name for name in left if ".del-" in name}
        assert whole(save(run, step, keep_last=1)) and names(run) == [f"step-{step}"]
    assert failed > 20


def full_after(size: int):
    """os.write of a disk that has `size` bytes left, written short first as real ones do."""
    left, original = [size], os.write

    def write(fd: int, data) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = original(fd, data[: left[0]])
        left[0] -= written
        return written

    return write


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_disk_full_at_20_sizes(save, run_path, monkeypatch):
    size = size_of(save(run_path, 1))
    for number in range(20):
        monkeypatch.setattr(os, "write", full_after(size * number // 21))
        with pytest.raises(StorageError, match="disk full") as caught:
            save(run_path, 2)
        monkeypatch.undo()
        assert caught.value.exit_code == 4 and "free some space" in caught.value.hint
        assert names(run_path) == ["step-1"] and whole(checkpoint.latest(run_path))
    assert whole(save(run_path, 2))


def test_file_size_limit_of_the_system(save, run_path):
    """A real refusal by the kernel (EFBIG), also inside the tokenizer library, which writes its own file."""
    step = save(run_path, 1)
    sizes = sorted({path.stat().st_size for path in step.iterdir()})

    def limited(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(StorageError, match="disk full"):
            save(run_path, 2)

    for size in sizes:
        assert in_fork(lambda size=size: limited(size - 1)) == 0
        assert names(run_path) == ["step-1"] and whole(checkpoint.latest(run_path))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["next", "again"])
def test_disk_full_on_a_real_file_system(save, tmp_path, scenario):
    """A tmpfs of 20 sizes between one checkpoint and two, and one that is large enough; needs the right to mount."""
    page = os.sysconf("SC_PAGE_SIZE")
    need = sum(-(-path.stat().st_size // page) * page for path in save(tmp_path, 1).iterdir())
    step = 2 if scenario == "next" else 1
    for number in range(21):
        disk = tmp_path / f"disk-{number}"
        disk.mkdir()
        size = f"size={int(need * (1.02 + 0.045 * number)) if number < 20 else 3 * need}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        try:
            save(disk / "run", 1)
            if number < 20:
                with pytest.raises(StorageError, match="disk full"):
                    save(disk / "run", step)
                assert names(disk / "run") == ["step-1"]
            else:
                save(disk / "run", step)
            assert whole(checkpoint.latest(disk / "run"))
        finally:
            subprocess.run(["umount", disk], check=True)


def test_what_reads_back_damaged_is_never_kept(save, run_path, monkeypatch):
    """A disk that says 'written' and stores something else."""
    save(run_path, 1)
    original = os.write

    def liar(fd: int, data) -> int:
        data = bytearray(data)
        if len(data) > 2000:
            data[1000] ^= 4
        return original(fd, data)

    monkeypatch.setattr(os, "write", liar)
    with pytest.raises(StorageError, match=r"reads back damaged .*SHA-256"):
        save(run_path, 2, keep_last=1)
    assert names(run_path) == ["step-1"] and whole(run_path / "step-1")


def test_an_old_one_that_cannot_be_deleted_is_only_a_warning(save, run_path, monkeypatch):
    save(run_path, 1)
    original = os.rename

    def rename(source, target, **options):
        if ".del-" in str(target):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return original(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    events: list[dict] = []
    save(run_path, 2, keep_last=1, on_event=events.append)
    assert [event["event"] for event in events] == ["warning", "checkpoint"]
    assert "could not be deleted" in events[0]["message"] and names(run_path) == ["step-1", "step-2"]


def test_one_file_is_written_whole_or_not(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    storage.write_file(path, b"old")
    monkeypatch.setattr(os, "write", full_after(100))
    with pytest.raises(StorageError, match=r"loss\.png: disk full"):
        storage.write_file(path, [b"x" * 60, b"y" * 60])
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["loss.png"]
    storage.write_file(path, [b"new", b"er"])
    assert path.read_bytes() == b"newer"
    with pytest.raises(StorageError, match="nowhere"):
        storage.write_file(tmp_path / "nowhere" / "x", b"")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="pipe: is not a regular file"):
        storage.write_file(tmp_path / "pipe", b"")
    (tmp_path / "link").symlink_to(path)
    storage.write_file(tmp_path / "link", b"through")
    assert (tmp_path / "link").is_symlink() and path.read_bytes() == b"through"


# ---- damage --------------------------------------------------------------------------------------


def damage(path: Path, dice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = dice.choice(["flip", "flip", "truncate", "append", "empty", "zeros", "remove"])
    if kind == "flip":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    elif kind == "truncate":
        del content[dice.randrange(len(content)) :]
    elif kind == "append":
        content += dice.choice([b"\0", b"\n", b" ", bytes(content[:100])])
    elif kind == "empty":
        content.clear()
    elif kind == "zeros":
        begin = dice.randrange(len(content))
        if not any(content[begin : begin + 512]):
            content[begin] = 1
        else:
            content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))
    path.unlink()
    if kind != "remove":
        path.write_bytes(content)
    return kind


@pytest.mark.parametrize("trials", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_damage_is_noticed_and_the_previous_one_taken(save, run_path, trials):
    save(run_path, 1)
    step = save(run_path, 2, max_shard_size="8KB")
    files = sorted(step.iterdir())
    assert len(files) > 9
    dice, done = random.Random(5), Counter()
    for trial in range(trials):
        path = files[trial % len(files)]
        intact = path.read_bytes()
        kind = damage(path, dice)
        done[kind] += 1
        with pytest.raises(CheckpointError) as caught:
            checkpoint.verify(step)
        expected = str(step) if (path.name, kind) == ("manifest.json", "remove") else str(path)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
        events: list[dict] = []
        assert checkpoint.latest(run_path, on_event=events.append) == run_path / "step-1"
        assert len(events) == 1 and events[0]["event"] == "warning" and expected in events[0]["message"]
        with pytest.raises(CheckpointError):
            checkpoint.load_training(step)
        if not path.name.startswith("optimizer"):
            with pytest.raises(CheckpointError):
                checkpoint.load_model(step)
        path.write_bytes(intact)
    assert len(done) == 6 and whole(checkpoint.latest(run_path)) and checkpoint.latest(run_path) == step


def test_purge_after_damage_keeps_the_good_ones(save, run_path):
    """The newest is damaged, the run resumes from the one before: neither disappears before a newer good one exists."""
    for step in (1, 2, 3):
        save(run_path, step, keep_last=2)
    weights = run_path / "step-3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert checkpoint.latest(run_path).name == "step-2"
    again = save(run_path, 3, keep_last=2)
    assert names(run_path) == ["step-2", "step-3"] and whole(again)


# ---- two at once ---------------------------------------------------------------------------------


def test_readers_while_steps_are_written_and_purged(save, tmp_path):
    save(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        with checkpoint.lock(tmp_path):
            for step in range(2, 40):
                save(tmp_path, step, keep_last=1)
        os._exit(0)
    loads, seen = 0, set()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        model = checkpoint.load_model(tmp_path)
        seen.add(model.lm_head.weight.sum().item())
        loads += 1
    assert loads >= 5 and len(seen) >= 2
    assert names(tmp_path) == ["step-39"] and whole(checkpoint.latest(tmp_path))


@pytest.mark.slow
def test_soak_of_2000_saves(save, run_path):
    """File descriptors stay flat and memory grows by at most 1 MB in 1000 saves."""

    def used() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")

    with checkpoint.lock(run_path):
        for step in range(1, 2501):
            save(run_path, step, keep_last=2)
            if step == 500:
                before = used()
        after = used()
    assert after[0] == before[0] and after[1] - before[1] <= 2 << 20
    assert names(run_path) == ["step-2499", "step-2500"] and not storage._writing and not locks._held
