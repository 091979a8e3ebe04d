"""The graph engine's batch, with the model itself in the decoder's place: rows that join and leave while the GPU is a
step ahead, their states, and which engine is taken. The kernels are tested in tests/gpu/test_decode.py.
"""

from __future__ import annotations

import random

import pytest
import torch
from generation_helpers import make_model, make_tokenizer

from moai_core.errors import NonFiniteError, UsageError
from moai_core.generation import Session, Settings, decode, decode_batch, engine, generate
from moai_core.generation.sampling import Sampler

PROMPTS = ["hello", "The quick brown fox jumps", "", "한국어 문장은 여러", "素早い茶", "user", "dog " * 9]


class Stand:
    """A decoder as decode.Decoder is, for at most `most` rows; it keeps its states twice and overwrites the older ones
    a step later, as the real one does."""

    def __init__(self, model, known, most=4):
        self.model, self.known, self.most = model, known, most
        self.device, self.turn, self.capacity = torch.device("cpu"), 0, most
        self.states = [[None] * most, [None] * most]
        self.rows = [None] * most
        self.host = torch.zeros(2, most, dtype=torch.int64)
        self.steps, self.widths, self.poisoned = 0, [], False

    def reserve(self, rows):
        assert rows <= self.most

    def put(self, place, state, token, settings, seed, draws):
        self.states[self.turn][place] = state.clone()
        self.rows[place] = [token, Sampler(settings, self.known, draws=draws)]
        self.rows[place][1].seed = seed

    def mark(self, place, seen):
        self.rows[place][1].seen = seen.clone()

    def move(self, source, place):
        self.states[self.turn][place] = self.states[self.turn][source]
        self.rows[place] = self.rows[source]

    def state(self, place, read, turn):
        found = self.states[turn][place].clone()
        found.seen = torch.tensor([read])
        return found

    def step(self, rows):
        turn = self.turn
        for place in range(rows):
            token, sampler = self.rows[place]
            out = self.model(torch.tensor([[token]]), state=self.states[turn][place], use_cache=True)
            self.states[1 - turn][place] = out.state
            chosen = sampler.pick(out.logits[0, -1, : self.known])
            self.rows[place] = [chosen, sampler]
            self.host[turn, place] = -1 if self.poisoned else chosen
        self.steps += 1
        self.widths.append(rows)
        self.turn = 1 - turn
        return turn


@pytest.fixture
def stand(monkeypatch):
    """Makes `graph` run on a CPU, on stand-ins; the list of them."""
    made = []

    def decoder(model, known):
        made.append(Stand(model, known))
        return made[-1]

    monkeypatch.setattr(decode, "why_not", lambda model: None)
    monkeypatch.setattr(decode, "decoder", decoder)
    return made


def mixed(seed, count):
    draw = random.Random(seed)
    return [
        Settings(
            max_new_tokens=draw.randint(1, 20),
            temperature=draw.choice([0, 0.5, 1.0, 1.8]),
            top_k=draw.choice([0, 5, 50]),
            top_p=draw.choice([1.0, 0.9, 0.5]),
            repetition_penalty=draw.choice([1.0, 1.3]),
            stop=draw.choice([(), ("e", "한")]),
            seed=draw.randrange(2**64),
            logprobs=draw.choice([None, None, None, 2]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rows_that_join_and_leave_get_what_the_plain_engine_gives(stand, seed):
    model, tokenizer = make_model(seed), make_tokenizer()
    prompts, settings = PROMPTS * 2, mixed(seed, 2 * len(PROMPTS))
    want = generate(model, tokenizer, prompts, settings, engine="plain")
    pieces = [""] * len(prompts)

    def show(row, text):
        pieces[row] += text

    for batch_size in (1, 3, 16):
        pieces[:] = [""] * len(prompts)
        got = generate(model, tokenizer, prompts, settings, engine="graph", batch_size=batch_size, on_text=show)
        for one, other, piece in zip(got, want, pieces, strict=True):
            assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
            assert one.text == piece
            assert (one.logprobs is None) == (other.logprobs is None)
    assert 2 <= max(stand[-1].widths) <= stand[-1].most


def test_no_step_is_made_for_rows_that_end_by_their_length(stand):
    model, tokenizer = make_model(1), make_tokenizer()
    generate(model, tokenizer, [[9, 8]], Settings(max_new_tokens=5, temperature=0), engine="graph")
    # The first token comes with the prompt.
    assert stand[-1].steps == 4


@pytest.mark.parametrize("ending", ["length", "eos", "close"])
def test_a_row_leaves_with_the_state_after_all_its_tokens_but_the_last(stand, ending):
    model, tokenizer = make_model(2), make_tokenizer()
    words = engine.Vocabulary(tokenizer, vocab_size=model.config.vocab_size)
    batch = decode_batch.make(model, words.size, "graph", rows=3)
    rows = []

    def join(prompt, most, seed):
        row = engine.Row(words, Settings(max_new_tokens=most, temperature=1.5, seed=seed), prompt)
        rows.append((row, prompt))
        batch.add(row, *engine.prefill(model, prompt))

    join([9, 8, 7], 9, 1)
    join([30], 3, 2)
    for step in range(12):
        if step == 4:
            join([12, 13], 6, 3)  # while a step is under way
        if step == 5 and ending == "eos":
            words.eos = frozenset(range(words.size))
        if step == 6 and ending == "close":
            batch.close()
        batch.step()
    assert not len(batch)
    for row, prompt in rows:
        read = prompt + row.answer.tokens[:-1]
        with torch.no_grad():
            want = model(torch.tensor([read]), use_cache=True).state
        assert row.state.seen.tolist() == [len(read)]
        for (conv, ssm), (conv_want, ssm_want) in zip(row.state.layers, want.layers, strict=True):
            torch.testing.assert_close(conv, conv_want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ssm, ssm_want, rtol=1e-4, atol=1e-5)


def test_a_chat_is_the_same_with_either_engine(stand):
    model, tokenizer = make_model(3), make_tokenizer()
    talks = [
        Session(model, tokenizer, Settings(max_new_tokens=8, temperature=1.2, seed=5, stop=("e",)), engine=name)
        for name in ("graph", "plain")
    ]
    for text in ("hello", "fox", "여우"):
        one, other = (talk.say(text) for talk in talks)
        assert (one.tokens, one.text) == (other.tokens, other.text)
        assert talks[0].tokens == talks[1].tokens and talks[0].draws == talks[1].draws
    for (conv, ssm), (conv_want, ssm_want) in zip(talks[0].state.layers, talks[1].state.layers, strict=True):
        torch.testing.assert_close(conv, conv_want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ssm, ssm_want, rtol=1e-4, atol=1e-5)


def test_logits_that_are_not_finite_are_an_error(stand, monkeypatch):
    model, tokenizer = make_model(1), make_tokenizer()
    monkeypatch.setattr(
        Stand,
        "__init__",
        lambda self, *args, _init=Stand.__init__: (_init(self, *args), setattr(self, "poisoned", True))[0],
    )
    with pytest.raises(NonFiniteError):
        generate(model, tokenizer, ["hello"], engine="graph")


def test_engines_are_picked_or_refused_with_a_reason():
    model, tokenizer = make_model(1), make_tokenizer()
    assert decode_batch.pick(model) == decode_batch.pick(model, "plain") == "plain"
    assert decode_batch.describe(model) == "plain: graph can't be used here, it runs on CUDA GPUs only, not on cpu"
    assert decode_batch.describe(model, "plain") == "plain: named"
    with pytest.raises(UsageError, match="'graph' can't be used here: it runs on CUDA GPUs only"):
        generate(model, tokenizer, ["a"], engine="graph")
    with pytest.raises(UsageError, match="unknown engine 'fast'"):
        Session(model, tokenizer, engine="fast")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"state_size": 12}, "state_size must be one of"),
        ({"hidden_size": 36}, "embed_tokens: rows of 36 numbers are no whole number of 16 bytes"),
    ],
)
def test_models_that_the_kernels_do_not_know(fields, reason, monkeypatch):
    monkeypatch.setattr(decode.cuda, "why_not", lambda device: None)
    model = make_model(1, **{"hidden_size": 64, "state_size": 16, **fields}).bfloat16()
    why = decode.why_not(model)
    assert why is None if reason is None else reason in why
    model.set_scan_backend("reference")
    assert "the scan backend 'reference' was named" in decode.why_not(model)
    model.set_scan_backend("auto")
    model.lm_head = torch.nn.Linear(4, 4)
    if reason is None:
        assert decode.why_not(model) == "lm_head has a bias"
