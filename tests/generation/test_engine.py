"""Rows that don't depend on their company, transformers' greedy tokens, endings, long prompts."""

import random
import resource

import pytest
import torch
from generation_helpers import make_model, make_tokenizer

from moai_core.errors import NonFiniteError, UsageError
from moai_core.generation import Settings, engine, generate
from moai_core.generation.engine import Widths

PROMPTS = [
    "hello",
    "The quick brown fox jumps",
    "",
    "한국어 문장은 여러",
    "素早い茶",
    "x" * 70,
    "user",
    "dog " * 9,
    "여우",
]
SHAPES = [
    {},
    {"hidden_size": 96, "state_size": 8},
    {"hidden_size": 256, "intermediate_size": 320},
    {"ffn": "none", "dt_bc_norm": False},
]


def mixed_settings(seed, count):
    draw = random.Random(seed)
    return [
        Settings(
            max_new_tokens=draw.randint(1, 30),
            temperature=draw.choice([0, 0.5, 1.0, 1.8]),
            top_k=draw.choice([0, 5, 50]),
            top_p=draw.choice([1.0, 0.9, 0.5]),
            min_p=draw.choice([0, 0.05]),
            repetition_penalty=draw.choice([1.0, 1.3]),
            stop=draw.choice([(), ("e", "한")]),
            seed=draw.randrange(2**64),
        )
        for _ in range(count)
    ]


# ---- every row as if it were alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_each_row_of_a_batch_is_bit_for_bit_the_row_alone(shape, seed, tokenizer, monkeypatch):
    model = make_model(seed, **shape)
    prompts = PROMPTS * 2
    settings = mixed_settings(seed, len(prompts))
    seen: list[list[torch.Tensor]] = []

    def watched(row, logits):
        seen[-1].append((id(row), logits.clone()))
        return take(row, logits)

    take = engine.Row.take
    monkeypatch.setattr(engine.Row, "take", watched)
    results = {}
    for batch_size in (1, 3, 16):
        seen.append([])
        results[batch_size] = generate(model, tokenizer, prompts, settings, batch_size=batch_size)
    seen.append([])
    alone = [generate(model, tokenizer, [prompt], one)[0] for prompt, one in zip(prompts, settings, strict=True)]
    for batch in results.values():
        for one, other in zip(alone, batch, strict=True):
            assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
    # Not only the tokens: the multiset of all logits, to the last bit.
    bits = [sorted(logits.numpy().tobytes() for _, logits in run) for run in seen]
    assert bits[0] == bits[1] == bits[2] == bits[3]


def test_equal_rows_with_equal_seeds_are_equal(model, tokenizer):
    answers = generate(model, tokenizer, ["hello"] * 5, Settings(seed=3, max_new_tokens=12, temperature=2.0))
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    others = generate(model, tokenizer, ["hello"] * 5, Settings(max_new_tokens=12, temperature=2.0))
    assert len({answer.seed for answer in others}) == 5
    again = generate(model, tokenizer, ["hello"], Settings(max_new_tokens=12, temperature=2.0, seed=others[4].seed))
    assert again[0].tokens == others[4].tokens


def test_a_width_that_rounds_differently_is_not_used(tokenizer, monkeypatch):
    """A model whose results depend on the number of rows decodes them one by one, and is still exact."""
    model = make_model(5)
    honest = model.forward

    def depends_on_rows(ids, **kwargs):
        out = honest(ids, **kwargs)
        # Different at every width, and from place to place.
        out.logits = out.logits * (1 + 1e-3 * ids.shape[0]) + 1e-3 * torch.arange(ids.shape[0])[:, None, None]
        return out

    monkeypatch.setattr(model, "forward", depends_on_rows)
    widths = Widths(model)
    assert not any(widths.same(width) for width in Widths.TRIED)
    assert widths.split(3) == [(1, 2)] * 3
    settings = mixed_settings(0, 4)
    batch = generate(model, tokenizer, PROMPTS[:4], settings)
    assert [b.tokens for b in batch] == [
        generate(model, tokenizer, [p], s)[0].tokens for p, s in zip(PROMPTS, settings, strict=False)
    ]


def test_widths_cover_any_number_of_rows(model):
    widths = Widths(model)
    for allowed in ((2,), (2, 3, 4, 8), Widths.TRIED, (3, 16), ()):
        widths.same = lambda width, allowed=allowed: width in allowed
        for rows in range(1, 40):
            steps = widths.split(rows)
            assert sum(count for count, _ in steps) == rows
            for count, width in steps:
                assert 1 <= count <= width and (width in allowed or (count, width) == (1, 2))


# ---- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_tokens_are_those_of_transformers(shape, tokenizer):
    model = make_model(7, **shape)
    for penalty in (1.0, 1.4):
        prompts = [prompt for prompt in PROMPTS if prompt]
        ours = generate(
            model, tokenizer, prompts, Settings(temperature=0, max_new_tokens=24, repetition_penalty=penalty)
        )
        for prompt, answer in zip(prompts, ours, strict=True):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            theirs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=24,
                repetition_penalty=penalty,
                eos_token_id=[2, 4, 6],
                suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)),
            )
            assert answer.tokens == theirs[0, ids.shape[1] :].tolist()


# ---- endings --------------------------------------------------------------------------------------------------------


def scripted(model, monkeypatch, tokenizer, text, ids=()):
    """Make the model's head say `text` (then `ids`) whatever it is asked: the position in the text is the tokens
    read."""
    says = [*tokenizer(text)["input_ids"], *ids]
    honest = model.forward

    def forward(input_ids, state=None, **kwargs):
        before = 0 if state is None else state.seen.clone()
        out = honest(input_ids, state=state, **kwargs)
        at = before + input_ids.shape[1] - forward.prompt
        out.logits = torch.full_like(out.logits, -10.0)
        for row in range(len(out.logits)):
            place = int(at if isinstance(at, int) else at[row])
            out.logits[row, :, says[min(max(place, 0), len(says) - 1)]] = 10.0
        return out

    forward.prompt = 1
    monkeypatch.setattr(model, "forward", forward)
    return says


def test_stop_strings_span_tokens_and_stay_out_of_text_and_stream(tokenizer, monkeypatch):
    model = make_model(1)
    says = scripted(model, monkeypatch, tokenizer, "The dog sleeps. 한국어 문장 END the fox", [2])
    prompt = [tokenizer.bos_token_id]
    for stop, text in (
        ("dog sl", "The "),
        ("국어 문", "The dog sleeps. 한"),
        ("END", "The dog sleeps. 한국어 문장 "),
        ("never", "The dog sleeps. 한국어 문장 END the fox"),
        ("fox!", "The dog sleeps. 한국어 문장 END the fox"),
    ):
        pieces = []
        settings = Settings(temperature=0, max_new_tokens=len(says), stop=["zzz", stop])
        answer = generate(
            model, tokenizer, [prompt], settings, on_text=lambda row, piece, pieces=pieces: pieces.append(piece)
        )[0]
        assert answer.text == "".join(pieces) == text
        assert answer.finish_reason == ("eos" if "fox" in text else "stop")
        assert all(text.startswith("".join(pieces[:n])) for n in range(len(pieces)))


@pytest.mark.parametrize(
    ("ending", "reason"), [("</s>", "eos"), ("<|im_end|>", "eos"), ("<|endoftext|>", "eos"), ("<s>", "stop")]
)
def test_special_tokens_end_an_answer(ending, reason, tokenizer, monkeypatch):
    model = make_model(1)
    scripted(model, monkeypatch, tokenizer, "hello", [tokenizer.convert_tokens_to_ids(ending)])
    answer = generate(model, tokenizer, [[1]], Settings(temperature=0, max_new_tokens=20, stop="<s>"))[0]
    assert (answer.text, answer.finish_reason) == ("hello", reason)
    assert answer.tokens[-1] == tokenizer.convert_tokens_to_ids(ending)


def test_an_unfinished_character_at_the_end_is_not_shown(tokenizer, monkeypatch):
    model = make_model(1)
    scripted(model, monkeypatch, tokenizer, "a👩b")
    texts = [generate(model, tokenizer, [[1]], Settings(temperature=0, max_new_tokens=n))[0].text for n in range(1, 7)]
    assert texts == ["a", "a", "a", "a", "a👩", "a👩b"]


def test_ids_without_a_token_are_never_chosen(tokenizer):
    model = make_model(2, vocab_size=4096)
    answers = generate(
        model,
        tokenizer,
        ["a"] * 4,
        [Settings(temperature=50.0, top_p=1.0, seed=n, max_new_tokens=50) for n in range(4)],
    )
    assert max(max(answer.tokens) for answer in answers) < len(tokenizer)


def test_logprobs_are_those_of_the_whole_sequence(model, tokenizer):
    answer = generate(model, tokenizer, ["hello world"], Settings(seed=1, max_new_tokens=10, logprobs=3, top_k=2))[0]
    ids = tokenizer("hello world")["input_ids"] + answer.tokens
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, :, : len(tokenizer)].double().log_softmax(-1)
    assert len(answer.logprobs) == len(answer.tokens)
    for place, entry in enumerate(answer.logprobs):
        row = wanted[len(ids) - len(answer.tokens) + place - 1]
        assert entry["logprob"] == pytest.approx(float(row[entry["token"]]), abs=1e-4)
        assert len(entry["top"]) == 3 and entry["top"][0]["logprob"] == pytest.approx(float(row.max()), abs=1e-4)


def test_stop_callback_keeps_what_was_said(model, tokenizer):
    steps = iter(range(100))
    answers = generate(
        model,
        tokenizer,
        ["hello", "dog", "fox"],
        Settings(seed=1, max_new_tokens=90),
        batch_size=2,
        stop=lambda: next(steps) > 6,
    )
    assert [answer.finish_reason for answer in answers] == ["interrupted"] * 3
    whole = generate(model, tokenizer, ["hello", "dog"], Settings(seed=1, max_new_tokens=90))
    for part, full in zip(answers, whole, strict=False):
        assert 0 < len(part.tokens) < 90 and full.tokens[: len(part.tokens)] == part.tokens
    assert answers[2].tokens == []


def test_nan_weights_are_an_error_not_a_text(tokenizer):
    model = make_model(1)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError):
        generate(model, tokenizer, ["hello"])


def test_misuse_is_refused_before_anything_is_generated(model, tokenizer):
    with pytest.raises(UsageError, match="2 prompts need as many settings"):
        generate(model, tokenizer, ["a", "b"], [Settings()])
    with pytest.raises(UsageError, match="batch_size"):
        generate(model, tokenizer, ["a"], batch_size=0)
    with pytest.raises(UsageError, match="not valid UTF-8"):
        generate(model, tokenizer, ["a", "\udc80"])
    assert generate(model, tokenizer, []) == []


def test_training_mode_is_left_as_it_was(tokenizer):
    model = make_model(1).train()
    generate(model, tokenizer, ["a"], Settings(max_new_tokens=2))
    assert model.training


# ---- long prompts ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_read_in_chunks(tokenizer, monkeypatch):
    model = make_model(3)
    monkeypatch.setattr(engine, "CHUNK", 7)
    lengths, events = [], []
    hook = model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    answer = generate(
        model, tokenizer, [list(range(10, 40))], Settings(temperature=0, max_new_tokens=3), on_event=events.append
    )[0]
    hook.remove()
    assert lengths == [7, 7, 7, 7, 2, 1, 1] and answer.prompt_tokens == 30
    assert [e["done"] for e in events if e["event"] == "prefill"] == [7, 14, 21, 28, 30]
    monkeypatch.setattr(engine, "CHUNK", 2048)
    assert (
        generate(model, tokenizer, [list(range(10, 40))], Settings(temperature=0, max_new_tokens=3))[0].tokens
        == answer.tokens
    )


def test_a_million_characters_in_constant_memory():
    tokenizer = make_tokenizer()
    model = make_model(4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, state_size=4)
    text = ("The quick brown fox. 빠른 갈색 여우가 " * 40_000)[:1_000_000]
    generate(model, tokenizer, [text[:20_000]], Settings(max_new_tokens=1))
    ids = tokenizer(text)["input_ids"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = generate(model, tokenizer, [ids], Settings(temperature=0, max_new_tokens=2))[0]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert answer.prompt_tokens == len(ids) > 100_000 and len(answer.tokens) == 2
    assert grown < 64 * 1024, f"{grown} KiB more for {len(ids)} tokens"
