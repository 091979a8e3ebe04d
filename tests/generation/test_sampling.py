"""Filters against transformers' logits processors, the draw against its probabilities, every setting's limits."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moai_core.errors import NonFiniteError, UsageError
from moai_core.generation.sampling import Sampler, Settings, check_settings, distribution, log_probabilities, uniform


def theirs(logits, settings, seen):
    """The distribution that transformers samples from, (V,) float64."""
    steps = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature != 1:
        steps.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        steps.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        steps.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        steps.append(MinPLogitsWarper(settings.min_p))
    return steps(torch.tensor([seen]), logits[None].double())[0].softmax(-1)


@pytest.mark.parametrize("vocab", [50, 5000])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.3, "top_p": 1.0},
        {"top_k": 7, "top_p": 1.0},
        {"top_k": 10**6, "top_p": 1.0},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 0.999, "temperature": 3.0},
        {"min_p": 0.2, "top_p": 1.0},
        {"repetition_penalty": 1.7, "top_p": 1.0},
        {"repetition_penalty": 0.6, "temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.5},
    ],
)
def test_filters_are_those_of_transformers(settings, vocab):
    settings = Settings(**settings)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(vocab, generator=generator) * (1 + seed)
        seen = torch.randint(0, vocab, (30,), generator=generator).tolist()
        mask = torch.zeros(vocab, dtype=torch.bool).index_fill(0, torch.tensor(seen), True)
        ids, probs = distribution(logits, settings, mask)
        ours = torch.full((vocab,), math.nan, dtype=torch.float64).fill_(0).index_put((ids,), probs)
        wanted = theirs(logits, settings, seen)
        assert set(ids.tolist()) == set(wanted.nonzero().flatten().tolist())
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_ties_at_the_kth_place_stay_as_in_transformers():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    ids, _ = distribution(logits, Settings(top_k=2, top_p=1.0))
    assert sorted(ids.tolist()) == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_and_nearly_zero_take_the_likeliest(dtype):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype) * 1e4
    for temperature in (0, 1e-30, 1e-300):
        assert Sampler(Settings(temperature=temperature, top_p=1.0, seed=0), 1000).pick(logits) == int(logits.argmax())


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, 1.5, -1.0, 0.0, 2.0])
    sampler = Sampler(Settings(temperature=1.3, top_k=4, top_p=1.0, seed=11), 5)
    ids, probs = distribution(logits, sampler.settings)
    counts = torch.zeros(5)
    for _ in range(8000):
        counts[sampler.pick(logits)] += 1
    expected = torch.zeros(5).index_put((ids,), probs.float()) * 8000
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # Pearson's chi-squared with 3 degrees of freedom: above 16.3 once in a thousand seeds, and this seed is fixed.
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 16.3


def test_random_numbers_depend_on_seed_and_number_alone():
    numbers = [uniform(2**64 - 1, n) for n in range(2000)]
    assert numbers == [uniform(2**64 - 1, n) for n in range(2000)]
    assert all(0 <= number < 1 for number in numbers) and len(set(numbers)) == 2000
    assert abs(sum(numbers) / 2000 - 0.5) < 0.03
    assert uniform(1, 0) != uniform(2, 0)
    logits = torch.randn(100)
    whole, late = (Sampler(Settings(temperature=2.0, seed=5), 100, draws=draws) for draws in (0, 3))
    first = [whole.pick(logits) for _ in range(8)]
    assert first[3:] == [late.pick(logits) for _ in range(5)]


def test_repetition_penalty_counts_what_was_generated():
    logits = torch.tensor([1.0, 0.9, 0.8])
    sampler = Sampler(Settings(temperature=0, repetition_penalty=2.0), 3, prompt=[2])
    assert [sampler.pick(logits) for _ in range(3)] == [0, 1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite_are_an_error(bad, temperature):
    logits = torch.randn(10)
    logits[3] = bad
    with pytest.raises(NonFiniteError, match="not finite") as info:
        Sampler(Settings(temperature=temperature), 10).pick(logits)
    assert info.value.exit_code == 5


def test_a_vocabulary_shut_by_minus_infinity_still_gives_its_only_token():
    logits = torch.full((10,), -math.inf).index_fill(0, torch.tensor(4), 0.0)
    assert Sampler(Settings(top_k=3, min_p=0.1), 10).pick(logits) == 4


def test_log_probabilities_are_the_models_own():
    logits = torch.randn(20)
    logprob, top = log_probabilities(logits, 3, 2)
    wanted = logits.double().log_softmax(0)
    assert logprob == pytest.approx(float(wanted[3])) and [id for id, _ in top] == wanted.topk(2).indices.tolist()
    assert log_probabilities(logits, 3, 0)[1] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", [""]),
        ("stop", ""),
        ("stop", [1]),
        ("stop", ["x"] * 65),
        ("stop", "x" * 1001),
        ("logprobs", -1),
        ("logprobs", 101),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(name, value):
    with pytest.raises(UsageError, match=f"^{name} must be .* \\(got "):
        Settings(**{name: value})
    with pytest.raises(UsageError, match=r"^file\.jsonl:3: "):
        check_settings({name: value}, lambda key: f"file.jsonl:3: {key}")


def test_one_stop_string_needs_no_list():
    assert Settings(stop="END").stop == ("END",) and Settings(stop=["a", "b"]).stop == ("a", "b")
