"""Needles: prompts of exact length, answers judged like a whole recomputation, a model that copies and one that can't."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, config
from moai_core.bench import needle, samples, twin_llama
from moai_core.bench.needle_prompts import LANGUAGES, Haystacks
from moai_core.data.tokenize import load_tokenizer
from moai_core.errors import UsageError

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("moai_tiny")


@pytest.fixture(scope="module")
def stacks(tokenizer):
    return {name: Haystacks(name, tokenizer) for name in LANGUAGES}


@pytest.mark.parametrize("name", LANGUAGES)
def test_prompts_are_exact_and_hold_the_fact_where_it_belongs(name, stacks, tokenizer):
    language = LANGUAGES[name]
    for length, depth, pairs in ((200, 0.0, 1), (333, 0.5, 4), (600, 1.0, 1), (600, 0.25, 2)):
        make = {"pairs": pairs, "candidates": 6, "digits": 5}
        one = stacks[name].make(length, depth, random.Random("a"), **make)
        assert len(one.ids) == length and one == stacks[name].make(length, depth, random.Random("a"), **make)
        text = tokenizer.decode(one.ids)
        key = next(key for key in language.keys if text.endswith(language.question.format(key=key).strip()))
        fact = language.fact.format(key=key, value=one.value)
        before = text.removesuffix(language.question.format(key=key).strip())
        assert before.count(fact + "\n") == before.count(language.fact.split("{value}")[0].format(key=key)) == 1
        others = [k for k in language.keys if k != key and language.fact.split("{value}")[0].format(key=k) in text]
        assert len(others) == pairs - 1
        # Lines are whole, so the fact stands at the border nearest to its depth.
        at = len(tokenizer(text[: text.index(fact)])["input_ids"]) / length
        assert abs(at - depth) < 0.35 and (depth > 0 or at < 0.05) and (depth < 1 or at > 0.8)
        assert len(set(map(tuple, one.candidates))) == 6
        whole = [tokenizer.decode([*one.ids, *ids]) for ids in one.candidates]
        assert whole[0].endswith(language.question.format(key=key) + one.value)
        assert sum(candidate.split()[-1][-5:] in text for candidate in whole) == pairs


def test_a_prompt_that_is_too_short_is_refused(stacks):
    with pytest.raises(UsageError, match="don't hold"):
        stacks["en"].make(20, 0.5, random.Random(0), pairs=4, candidates=10, digits=5)


class Copier:
    """A model that says what followed the longest repetition of its last tokens: it finds every needle."""

    training = False

    class State:
        def __init__(self, rows):
            self.rows = rows

        def select(self, at):
            return Copier.State([self.rows[i] for i in at.tolist()])

    def __init__(self, vocabulary: int, blind: bool = False) -> None:
        self.vocabulary, self.blind = vocabulary, blind
        self.model = SimpleNamespace(scan_backend="none")
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def parameters(self):
        return iter([self.weight])

    def __call__(self, input_ids, state=None, use_cache=True, logits_to_keep=0):
        rows = [[] for _ in input_ids] if state is None else [list(row) for row in state.rows]
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for column, token in enumerate(ids):
                rows[row].append(token)
                if not self.blind and not (logits_to_keep and column < len(ids) - 1):
                    logits[row, column, self.next(rows[row])] = 20.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], state=Copier.State(rows))

    @staticmethod
    def next(seen):
        best, found = 0, seen[-1]
        for at in range(len(seen) - 1):
            size = 0
            while size <= at and seen[at - size] == seen[len(seen) - 1 - size]:
                size += 1
            if size >= best and size:
                best, found = size, seen[at + 1]
        return found


def test_who_copies_finds_all_and_who_is_blind_finds_none(tokenizer):
    grid = {"lengths": [120, 160], "depths": [0, 60, 100], "trials": 1, "pairs": 2, "device": torch.device("cpu")}
    models = {"copier": Copier(len(tokenizer)), "blind": Copier(len(tokenizer), blind=True)}
    found = json.loads(json.dumps(needle.measure(models, tokenizer, **grid)))
    assert len(found["results"]) == 2 * 4 * 2 * 3
    for one in found["results"]:
        wanted = (1, 1, 1) if one["model"] == "copier" else (0, 0, 10)
        assert (one["exact"], one["top1"], one["rank"]) == wanted, one
    assert found["chance"] == {"exact": 1e-5, "top1": 0.1, "rank": 5.5}
    first, _ = needle.tables(found)
    assert first.rows[-2][0] == "chance" and first.rows[-4][2:] == ("100% (100%)", "100% (100%)")


@pytest.mark.parametrize("kind", ["moai", "llama"])
def test_ranks_are_those_of_a_whole_recomputation(kind, stacks, tokenizer, monkeypatch):
    monkeypatch.setattr(needle, "CHUNK", 33)
    numbers = config.fields(**SIZE, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers)) if kind == "moai" else None
    model = (model or twin_llama.make(twin_llama.shape(numbers), 0)).eval()
    made = [stacks["ko"].make(90, 0.5, random.Random(n), pairs=1, candidates=5, digits=4) for n in range(3)]
    found = needle.answer(model, made, tokenizer)
    for one, (exact, rank) in zip(made, found, strict=True):
        costs = []
        for ids in one.candidates:
            with torch.no_grad():
                logits = model(torch.tensor([[*one.ids, *ids]])).logits[0].double().log_softmax(-1)
            costs.append(-sum(float(logits[len(one.ids) - 1 + n, token]) for n, token in enumerate(ids)))
        assert rank == sum(cost <= costs[0] for cost in costs)
        seen = list(one.ids)
        for _ in range(max(map(len, one.candidates))):
            with torch.no_grad():
                seen.append(int(model(torch.tensor([seen])).logits[0, -1].argmax()))
        assert exact == tokenizer.decode(seen[len(one.ids) :]).strip().startswith(one.value)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    MoaiMambaForCausalLM(MoaiMambaConfig(**SIZE, vocab_size=len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_report_and_the_picture(folder, tmp_path):
    call = {"models": [folder], "lengths": [64], "depths": [0, 100], "trials": 1, "device": "cpu"}
    events = []
    found = json.loads(json.dumps(needle.run(**call, plot=tmp_path / "n.png", on_event=events.append)))
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")
    assert needle.run(**call)["results"] == found["results"] and events[0]["total"] == 4
    for flags, words in (
        ({"trials": 0}, "--trials"), ({"depths": [101]}, "--depths"), ({"candidates": 2, "pairs": 3}, "--candidates"),
        ({"digits": 2}, "--digits"), ({"pairs": 11}, "--pairs"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            needle.run(**{**call, **flags})


# ---- samples


def test_samples_are_ten_and_the_same_each_time(folder):
    assert len(samples.PROMPTS) == 10 and {p.language for p in samples.PROMPTS} >= {"en", "ko", "ja", "zh"}
    found = samples.run(model=folder, tokens=3, device="cpu")
    again = samples.run(model=folder, tokens=3, device="cpu")
    assert found["samples"] == again["samples"] and len(found["samples"]) == 10
    assert any(one["chat"] for one in found["samples"]) and all(one["tokens"] <= 3 for one in found["samples"])
    other = samples.run(model=folder, tokens=3, seed=1, device="cpu")
    assert other["samples"] != found["samples"]
    text = samples.markdown(found["samples"])
    assert text.count("~~~~text") == 10 and all(prompt.text in text for prompt in samples.PROMPTS)
    assert len(samples.tables(found)[0].rows) == 10


def test_a_sample_is_what_generation_gives_alone(folder, tokenizer):
    from moai_core import checkpoint
    from moai_core.generation.engine import generate
    from moai_core.generation.sampling import Settings

    model = checkpoint.load_model(folder)
    found = samples.samples(model, tokenizer, tokens=4, seed=5)
    settings = Settings(max_new_tokens=4, temperature=0.8, top_p=0.95, seed=5)
    alone = generate(model, tokenizer, [samples.PROMPTS[0].text], settings)[0]
    assert found[0]["text"] == alone.text
    plain = load_tokenizer("moai_tiny")
    plain.chat_template = None
    assert not any(one["chat"] for one in samples.samples(model, plain, tokens=1))
