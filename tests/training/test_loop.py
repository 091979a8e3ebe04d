"""The loop on a tiny model: it learns, accumulates exactly, resumes bit for bit, and says what is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import signal

import pytest
import torch

from moai_core import checkpoint, scan, storage
from moai_core.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    LockedError,
    NonFiniteError,
    RecipeError,
    StorageError,
    UsageError,
)
from moai_core.model import MoaiMambaForCausalLM
from moai_core.training import StopFlag, loop, train


def weights(path):
    return checkpoint.load_model(path).state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def steps(run_dir):
    return [step for step, _ in storage.steps(run_dir)]


def stop_at(flag, kind, step):
    """An on_event that asks to stop at the first event of this kind and step."""

    def on_event(event):
        if event["event"] == kind and event.get("step") == step:
            flag.request(signal.SIGINT)

    return on_event


# ---- learning


def test_a_gpu_without_moais_kernels_is_a_warning(tiny, tmp_path, monkeypatch):
    """Once, before the first step; not where the recipe itself chose another scan."""
    asked = []

    def fallback(device, dtype, **sizes):
        asked.append(sizes)
        return "the scan falls back"

    monkeypatch.setattr(scan, "fallback", fallback)
    for chosen, expected in (("auto", 1), ("reference", 0)):
        events = []
        train(tiny("train.steps=2", f"model.scan={chosen}"), output=tmp_path / chosen, on_event=events.append)
        warnings = [e for e in events[: [e["event"] for e in events].index("start")] if e["event"] == "warning"]
        assert [e["message"] for e in warnings] == ["the scan falls back"] * expected
    assert asked == [{"I": 64, "N": 4, "K": 4}]


def test_training_lowers_the_loss_and_writes_a_run(tiny, tmp_path):
    run = tmp_path / "run"
    events = []
    result = train(
        tiny("train.steps=40", "train.eval_every=20", "train.sample_every=20"), output=run, on_event=events.append
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[0] > 8 and result.loss < losses[0] - 2
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 41))
    valid = [row for row in rows if row["kind"] == "valid"]
    assert [row["step"] for row in valid] == [20, 40] and valid[1]["valid_loss"] < valid[0]["valid_loss"]
    assert valid[1]["perplexity"] == pytest.approx(math.exp(valid[1]["valid_loss"]))
    assert valid[1]["bits_per_byte"] == pytest.approx(
        valid[1]["valid_loss"] * valid[1]["tokens"] / math.log(2) / valid[1]["bytes"]
    )
    assert result.best["step"] == 40 and result.valid["loss"] == valid[1]["valid_loss"]
    assert steps(run) == [33, 36, 39, 40][-3:] and result.checkpoint == run / "step-40"
    assert result.plot.read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(20, "the"), (40, "the")] and result.sample["text"]
    assert (run / "recipe.yaml").is_file() and not list(run.glob("*.tmp-*"))
    kinds = {event["event"] for event in events}
    assert {"start", "step", "valid", "sample", "checkpoint"} <= kinds
    json.dumps(result.to_dict())


def gradients(recipe, monkeypatch, tmp_path, name):
    """The gradients of the first step, taken where the loop clips them."""
    found = {}

    def catch(parameters):
        norm = original(parameters)
        found["all"] = [p.grad.clone() for p in parameters]
        return norm

    original = loop.optim.grad_norm
    with monkeypatch.context() as patch:
        patch.setattr(loop.optim, "grad_norm", catch)
        result = train(recipe, output=tmp_path / name)
    return found["all"], result


def test_accumulation_is_one_large_batch(tiny, monkeypatch, tmp_path):
    base = ["train.steps=1", "train.eval_every=0", "optim.clip=null", "data.max_length=48"]
    large, first = gradients(tiny(*base, "train.batch_size=4"), monkeypatch, tmp_path, "large")
    split = tiny(*base, "train.batch_size=1", "train.accumulation=4")
    small, second = gradients(split, monkeypatch, tmp_path, "small")
    counts = [row["trained"] for row in label_counts(split)]
    assert len(set(counts)) > 1, "the rows must have different numbers of label tokens, or this tests nothing"
    assert first.loss == pytest.approx(second.loss, rel=1e-6) and first.tokens == second.tokens == sum(counts)
    scale = torch.cat([g.flatten() for g in large]).norm()
    for a, b in zip(large, small, strict=True):
        assert (a - b).norm() <= 1e-6 * scale


def label_counts(recipe):
    from moai_core.data.loader import make_loader
    from moai_core.data.tokenize import load_tokenizer

    loader = make_loader(recipe.data, load_tokenizer("moai_tiny"), batch_size=1, seed=recipe.train.seed)
    return [{"trained": int((next(it)["labels"] >= 0).sum())} for it in [iter(loader)] for _ in range(4)]


def test_effective_batch_sets_the_accumulation(tiny, tmp_path):
    events = []
    train(
        tiny("train.effective_batch=8", "train.steps=1", "train.eval_every=0"), output=tmp_path, on_event=events.append
    )
    assert next(e for e in events if e["event"] == "start")["rows"] == 8
    with pytest.raises(RecipeError, match="effective_batch must be a multiple of"):
        train(tiny("train.effective_batch=7"), output=tmp_path / "b")


def test_packed_documents_don_t_leak_into_each_other(tiny):
    """The loss of a packed batch of the loader is that of each document alone, by their tokens."""
    from moai_core.data.loader import make_loader
    from moai_core.data.tokenize import load_tokenizer
    from moai_core.training import setup

    recipe, tokenizer = tiny("data.max_length=128"), load_tokenizer("moai_tiny")
    model = setup.new_model(recipe, tokenizer)
    batch = next(iter(make_loader(recipe.data, tokenizer, batch_size=2, seed=0)))
    assert int(batch["seq_idx"].max()) >= 2
    packed = model(input_ids=batch["input_ids"], labels=batch["labels"], seq_idx=batch["seq_idx"], num_items=1).loss
    alone = 0.0
    for row in range(2):
        for number in range(int(batch["seq_idx"][row].max()) + 1):
            ids = batch["input_ids"][row][batch["seq_idx"][row] == number][None]
            alone += model(input_ids=ids, labels=ids, num_items=1).loss.item()
    assert packed.item() == pytest.approx(alone, rel=1e-5)


def test_epochs_become_steps(tiny, tmp_path):
    result = train(
        tiny("~train.steps", "train.epochs=1.5", "train.eval_every=0", "train.batch_size=4"), output=tmp_path
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.step == len(rows) and rows[-1]["epoch"] == 1


def test_checkpointing_may_change_on_the_way_and_changes_no_bit(tiny, train_rows, tmp_path):
    """What the backward pass computes again has no part in the result: three modes in one run, against one."""
    settings = ["train.eval_every=0", "optim.schedule=constant"]
    whole = train(tiny("train.steps=6", *settings), output=tmp_path / "whole")
    for steps, mode in ((2, "selective"), (4, "full"), (6, "selective")):
        last = train(tiny(f"train.steps={steps}", f"train.checkpointing={mode}", *settings), output=tmp_path / "cut")
    assert last.resumed_from == 4
    losses = [[row["loss"] for row in train_rows(tmp_path / name)] for name in ("whole", "cut")]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    one, other = weights(whole.checkpoint), weights(last.checkpoint)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name,precision", [("adamw_bf16", "bf16"), ("adamw", "bf16"), ("adamw", "bf16-mixed"),
                                            ("adamw_8bit", "fp32")])  # fmt: skip
def test_other_optimizers_and_precisions_learn_and_resume_exactly(tiny, train_rows, tmp_path, name, precision):
    extra = [f"optim.name={name}", f"train.precision={precision}", "train.eval_every=0", "train.checkpointing=full"]
    whole = train(tiny("train.steps=8", *extra), output=tmp_path / "whole")
    train(tiny("train.steps=8", *extra), output=tmp_path / "again")
    assert train_rows(tmp_path / "whole")[-1]["loss"] < train_rows(tmp_path / "whole")[0]["loss"]
    flag = StopFlag()
    with pytest.raises(Interrupted):
        train(tiny("train.steps=8", *extra), output=tmp_path / "cut", stop=flag, on_event=stop_at(flag, "step", 4))
    resumed = train(tiny("train.steps=8", *extra), output=tmp_path / "cut")
    assert resumed.resumed_from == 4
    assert train_rows(tmp_path / "whole") == train_rows(tmp_path / "cut")
    assert same(weights(whole.checkpoint), weights(resumed.checkpoint))
    stored = weights(whole.checkpoint)["model.layers.0.mamba.in_proj.weight"].dtype
    assert stored == (torch.bfloat16 if precision == "bf16" else torch.float32)


# ---- resuming


@pytest.mark.parametrize("kind,step", [("step", 1), ("step", 4), ("valid", 3), ("checkpoint", 3), ("sample", 3)])
def test_an_interrupted_run_resumes_bit_for_bit(tiny, train_rows, tmp_path, kind, step):
    recipe = tiny("train.accumulation=2", "train.sample_every=3")
    whole = train(recipe, output=tmp_path / "whole")
    flag, run = StopFlag(), tmp_path / "cut"
    with pytest.raises(Interrupted) as caught:
        train(recipe, output=run, stop=flag, on_event=stop_at(flag, kind, step))
    assert caught.value.exit_code == 130 and f"saved {run}/step-{step}" in caught.value.message
    assert (run / "loss.png").is_file()
    resumed = train(recipe, output=run)
    assert resumed.resumed_from == step
    assert train_rows(run) == train_rows(tmp_path / "whole")
    assert (run / "samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()
    assert same(weights(run), weights(tmp_path / "whole"))
    assert resumed.valid == whole.valid and resumed.best == whole.best


def test_a_stop_inside_a_step_or_a_validation_is_heard_there(tiny, train_rows, tmp_path, monkeypatch):
    recipe = tiny("train.accumulation=2")
    train(recipe, output=tmp_path / "whole")
    # Calls of the model: two a step; the validation after step 3 makes calls 7 and 8, that after step 6 calls 15 and 16.
    for name, call in (("micro", 9), ("valid", 15)):
        flag, count = StopFlag(), [0]
        original = MoaiMambaForCausalLM.forward

        def forward(self, *args, _flag=flag, _count=count, _call=call, _forward=original, **kwargs):
            _count[0] += 1
            if _count[0] == _call:
                _flag.request(signal.SIGTERM)
            return _forward(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(MoaiMambaForCausalLM, "forward", forward)
            with pytest.raises(Interrupted) as caught:
                train(recipe, output=tmp_path / name, stop=flag)
        assert caught.value.exit_code == 143
        assert f"step-{3 if name == 'micro' else 6}" in caught.value.message
        train(recipe, output=tmp_path / name)
        assert train_rows(tmp_path / name) == train_rows(tmp_path / "whole")
        assert same(weights(tmp_path / name), weights(tmp_path / "whole"))


def test_a_stop_before_the_first_step_leaves_nothing(tiny, tmp_path):
    flag = StopFlag()
    flag.request(signal.SIGINT)
    with pytest.raises(Interrupted):
        train(tiny(), output=tmp_path / "run", stop=flag)
    assert not (tmp_path / "run").exists()


def test_metrics_of_lost_steps_are_cut_back(tiny, train_rows, tmp_path):
    """As after a kill: checkpoints up to 3, metrics up to 5 and half a line."""
    recipe = tiny()
    train(recipe, output=tmp_path / "whole")
    run = tmp_path / "run"
    train(recipe, output=run)
    import shutil

    shutil.rmtree(run / "step-6")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 7, "lo')
    train(recipe, output=run)
    assert train_rows(run) == train_rows(tmp_path / "whole")
    assert same(weights(run), weights(tmp_path / "whole"))


def test_sampling_and_validating_don_t_change_the_steps(tiny, train_rows, tmp_path):
    train(tiny("train.sample_every=1", "train.eval_every=1"), output=tmp_path / "often")
    train(tiny("train.sample_every=0", "train.eval_every=0"), output=tmp_path / "never")
    only = [row for row in train_rows(tmp_path / "often") if row["kind"] == "train"]
    assert only == train_rows(tmp_path / "never")


def test_a_finished_run_is_left_as_it_is_and_can_be_made_longer(tiny, tmp_path):
    recipe, run = tiny("train.steps=3", "optim.schedule=constant"), tmp_path / "run"
    train(recipe, output=run)
    before = (run / "metrics.jsonl").read_bytes()
    again = train(recipe, output=run)
    assert again.step == again.resumed_from == 3 and (run / "metrics.jsonl").read_bytes() == before
    notes = []
    longer = train(tiny("train.steps=5", "optim.schedule=constant"), output=run, on_event=notes.append)
    assert longer.step == 5 and longer.resumed_from == 3
    assert any("other values of train.steps" in e.get("message", "") for e in notes)
    train(tiny("train.steps=5", "optim.schedule=constant"), output=tmp_path / "whole")
    assert same(weights(run), weights(tmp_path / "whole"))


def test_another_recipe_is_refused_by_its_keys(tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny("train.steps=3"), output=run)
    with pytest.raises(UsageError) as caught:
        train(tiny("train.steps=3", "optim.lr=5e-3"), output=run)
    assert caught.value.exit_code == 2 and "optim.lr 0.01 -> 0.005" in caught.value.message
    assert f"--resume {run / 'step-3'}" in caught.value.hint
    taken = train(tiny("train.steps=5", "optim.lr=5e-3"), output=run, resume=str(run / "step-3"))
    assert taken.step == 5
    with pytest.raises(UsageError, match=r"model\.num_hidden_layers 2 -> 3"):
        train(tiny("train.steps=6", "model.num_hidden_layers=3"), output=run, resume=str(run))
    with pytest.raises(UsageError, match="rows a step 2 -> 6"):
        train(tiny("train.steps=6", "optim.lr=5e-3", "train.accumulation=3"), output=run)


def test_rows_may_be_split_otherwise(tiny, tmp_path):
    """batch_size and accumulation may trade places: the loader's position counts rows."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(tiny("train.steps=3", "train.batch_size=4", "optim.schedule=constant"), output=run)
    train(tiny("train.batch_size=2", "train.accumulation=2", "optim.schedule=constant"), output=run)
    train(tiny("train.batch_size=4", "optim.schedule=constant"), output=whole)
    rows = [[json.loads(x)["loss"] for x in (d / "metrics.jsonl").open() if '"train"' in x] for d in (run, whole)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_resume_path_branches_off_and_never_overwrites(tiny, train_rows, tmp_path):
    run, branch = tmp_path / "run", tmp_path / "branch"
    train(tiny(), output=run)
    with pytest.raises(UsageError, match="has newer checkpoints"):
        train(tiny(), output=run, resume=str(run / "step-3"))
    train(tiny(), output=branch, resume=str(run / "step-3"))
    assert train_rows(branch) == train_rows(run) and same(weights(branch), weights(run))
    assert steps(branch) == steps(run) == [3, 6]
    with pytest.raises(UsageError, match="already holds a run"):
        train(tiny(), output=run, resume="never")
    with pytest.raises(CheckpointError, match="no such folder"):
        train(tiny(), output=branch, resume=str(tmp_path / "nope"))


def test_a_damaged_checkpoint_falls_back_with_a_warning(tiny, train_rows, tmp_path):
    run = tmp_path / "run"
    train(tiny(), output=run)
    train(tiny(), output=tmp_path / "whole")
    with open(run / "step-6/model.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x55")
    events = []
    result = train(tiny(), output=run, on_event=events.append)
    assert result.resumed_from == 3
    assert any(e["event"] == "warning" and "step-6" in e["message"] for e in events)
    assert train_rows(run) == train_rows(tmp_path / "whole") and same(weights(run), weights(tmp_path / "whole"))
    for step in (3, 6):
        (run / f"step-{step}/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of its checkpoints") as caught:
        train(tiny(), output=run)
    assert caught.value.exit_code == 3


# ---- fine-tuning


def test_fine_tuning_starts_from_weights_with_its_own_rate(tiny, tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    train(tiny(), output=base)
    recipe = tiny("optim.finetune_lr=1e-9", "optim.warmup_steps=0", "optim.schedule=constant", "train.steps=2")
    result = train(recipe, output=tuned, model_path=base)
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert result.resumed_from is None and rows[0]["lr"] == 1e-9
    before, after = weights(base), weights(tuned)
    assert all(torch.allclose(before[k], after[k], atol=1e-7) for k in before)
    # Resumed without --model, it is still a fine-tuning run.
    longer = tiny("optim.finetune_lr=1e-9", "optim.warmup_steps=0", "optim.schedule=constant", "train.steps=3")
    train(longer, output=tuned)
    lines = (tuned / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert [(row["step"], row["lr"]) for row in rows] == [(1, 1e-9), (2, 1e-9), (3, 1e-9)]
    with pytest.raises(UsageError, match=r"--model \(from scratch\) ->"):
        train(tiny(), output=base, model_path=tuned)


def test_another_tokenizer_is_refused(tiny, tmp_path):
    from moai_core.data.tokenize import load_tokenizer

    train(tiny("train.steps=1", "train.eval_every=0"), output=tmp_path / "base")
    other = load_tokenizer("moai_tiny")
    other.add_tokens(["one_more_token"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(RecipeError, match="is not the tokenizer that") as caught:
        train(tiny(f"tokenizer={tmp_path / 'other'}"), output=tmp_path / "tuned", model_path=tmp_path / "base")
    assert "tokenizer=" in caught.value.hint and not (tmp_path / "tuned").exists()
    with pytest.raises(UsageError, match="vocab_size is 50"):
        train(tiny("model.vocab_size=50"), output=tmp_path / "small")
    # Without tokenizer files beside the weights, the sizes must still agree.
    folder = tmp_path / "bare"
    checkpoint.load_model(tmp_path / "base").save_pretrained(folder)
    with pytest.raises(UsageError, match="has ids up to"):
        train(tiny(f"tokenizer={tmp_path / 'other'}"), output=tmp_path / "tuned", model_path=folder)


# ---- what goes wrong


def poison(monkeypatch, when, what="loss"):
    """Makes the loss of the given calls NaN, or (what="grad") only a gradient."""
    original, calls = MoaiMambaForCausalLM.forward, [0]

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        if self.training:
            calls[0] += 1
            if calls[0] in when:
                if what == "loss":
                    out.loss = out.loss * math.nan
                else:
                    out.loss.register_hook(lambda grad: grad * math.inf)
        return out

    monkeypatch.setattr(MoaiMambaForCausalLM, "forward", forward)


@pytest.mark.parametrize("what", ["loss", "grad"])
def test_a_step_that_is_not_finite_is_skipped(tiny, tmp_path, monkeypatch, what):
    poison(monkeypatch, {3}, what)
    events = []
    recipe = tiny("train.save_every=1", "train.keep_last=9", "train.eval_every=0")
    result = train(recipe, output=tmp_path, on_event=events.append)
    assert result.skipped == 1 and result.step == 6
    before, after = (checkpoint.load_training(tmp_path / f"step-{n}") for n in (2, 3))
    assert same(weights(tmp_path / "step-2"), weights(tmp_path / "step-3"))
    for name, state in before[0]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(after[0]["state"][name][k])) for k, v in state.items()
        )
    assert not same(weights(tmp_path / "step-3"), weights(tmp_path / "step-4"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("skipped")] == [3]
    assert rows[2]["loss"] is None if what == "loss" else rows[2]["grad_norm"] is None
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert len(warnings) == 1 and warnings[0].startswith(
        f"step 3: the {'loss' if what == 'loss' else 'gradient'} is not"
    )


def test_three_in_a_row_stop_the_run(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4, 5, 6})
    with pytest.raises(NonFiniteError) as caught:
        train(tiny("train.steps=9", "train.eval_every=0"), output=tmp_path)
    assert caught.value.exit_code == 5 and "3 steps in a row (up to step 6)" in caught.value.message
    assert f"last good checkpoint: {tmp_path}/step-3" in caught.value.message
    assert (tmp_path / "loss.png").is_file()


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny, train_rows, tmp_path, monkeypatch):
    recipe, run = tiny(), tmp_path / "run"
    train(recipe, output=tmp_path / "whole")
    real, armed = os.write, [False]

    def write(fd, data):
        if armed[0] and len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    def on_event(event):
        armed[0] = armed[0] or (event["event"] == "checkpoint" and event["step"] == 3)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(StorageError) as caught:
            train(recipe, output=run, on_event=on_event)
    assert caught.value.exit_code == 4 and "disk full" in caught.value.message
    assert f"last good checkpoint: {run}/step-3" in caught.value.message
    assert steps(run) == [3] and not list(run.glob("*.tmp-*"))
    train(recipe, output=run)
    assert train_rows(run) == train_rows(tmp_path / "whole") and same(weights(run), weights(tmp_path / "whole"))


def test_a_full_disk_under_the_metrics(tiny, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples.jsonl").symlink_to("/dev/full")
    (tmp_path / "run/recipe.yaml").write_text("")
    with pytest.raises(StorageError, match="disk full"):
        train(tiny("train.sample_every=1", "train.eval_every=0"), output=tmp_path / "run")


def test_two_writers(tiny, tmp_path):
    with checkpoint.lock(tmp_path / "run"), pytest.raises(LockedError) as caught:
        train(tiny(), output=tmp_path / "run")
    assert caught.value.exit_code == 6 and str(os.getpid()) in caught.value.message


def test_output_folders_that_are_no_runs(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"exists and is no run folder \(it holds notes.txt\)"):
        train(tiny(), output=tmp_path)
    with pytest.raises(UsageError, match="is a file, not a folder"):
        train(tiny(), output=tmp_path / "notes.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


def test_bad_combinations(tiny, tmp_path):
    cases = [
        (
            tiny("optim.name=adamw_8bit", "train.precision=bf16"),
            {},
            RecipeError,
            "train.precision bf16 doesn't go with",
        ),
        (tiny(), {"model_path": tmp_path, "resume": str(tmp_path)}, UsageError, "--model starts a new run"),
        (tiny(f"data.train={tmp_path}/none.jsonl"), {}, DataError, "none.jsonl"),
        (tiny(), {"model_path": tmp_path / "nope"}, CheckpointError, "doesn't exist"),
    ]
    for recipe, arguments, error, message in cases:
        with pytest.raises(error, match=message):
            train(recipe, output=tmp_path / "run", **arguments)
        assert not (tmp_path / "run").exists()


def test_runs_in_a_forked_child(tiny, tmp_path):
    """The fault tests fork a child a trial from one process that has imported everything."""
    recipe = tiny("train.steps=2", "train.eval_every=0")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            code = 0 if train(recipe, output=tmp_path / "run").step == 2 else 1
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0 and steps(tmp_path / "run") == [2]
