"""The decode engine on a GPU against the model itself: numbers, states and tokens; rows that don't depend on their
company; sampling as generation/sampling.py defines it.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from functools import partial
from pathlib import Path

import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM
from moai_core.generation import (
    Settings,
    decode,
    decode_batch,
    decode_choice,
    decode_kernels,
    engine,
    generate,
)
from moai_core.generation.sampling import Sampler
from moai_core.quant.formats import FORMATS, Spec

pytestmark = pytest.mark.gpu

_spec = importlib.util.spec_from_file_location("h", Path(__file__).parents[1] / "generation" / "generation_helpers.py")
assert _spec is not None and _spec.loader is not None
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)

INT4 = {"format": "int4", "group_size": 128, "symmetric": True}
INT8 = {"format": "int8", "group_size": 0, "symmetric": True}
SHAPES = {
    "jamba-like": {},
    "mamba": {"ffn": "none", "dt_bc_norm": False, "state_size": 8, "conv_kernel_size": 3, "tie_word_embeddings": True},
    "odd sizes": {"hidden_size": 72, "intermediate_size": 104, "time_step_rank": 5, "residual_in_fp32": True},
}
QUANTIZED = {
    "int4": {"in_proj": INT4, "out_proj": INT4, "gate_proj": INT4, "up_proj": INT4, "down_proj": INT4, "lm_head": INT8},
    "mixed": {
        "in_proj": {**INT4, "group_size": 64, "symmetric": False},
        "x_proj": INT8,
        "dt_proj": INT8,
        "out_proj": {**INT4, "group_size": 32},
        "down_proj": {**INT4, "group_size": 0, "symmetric": False},
        "gate_proj": {"format": "fp8", "group_size": 0, "symmetric": True},
        "up_proj": {"format": "fp8", "group_size": 0, "symmetric": True},
        "embed_tokens": {**INT4, "group_size": 32},
    },
}

FP8 = {"format": "fp8", "group_size": 0, "symmetric": True}
WHOLE = {
    "bf16": {},
    "fp16": {"dtype": torch.float16, "residual_in_fp32": True},
    "mamba": SHAPES["mamba"],
    "int4": {"quantization": QUANTIZED["int4"]},
    # A stage of the ring holds a whole tile of in_proj, gate and up; x_proj has slices of groups.
    "tiles of a stage": {
        "quantization": {**QUANTIZED["int4"], "x_proj": INT4},
        **{"hidden_size": 2048, "expand_factor": 1, "intermediate_size": 256, "num_hidden_layers": 1},
    },
    "bytes": {
        "quantization": {
            **{"in_proj": INT8, "x_proj": FP8, "dt_proj": INT8, "out_proj": FP8, "gate_proj": INT8, "up_proj": INT8},
            **{"down_proj": {**INT4, "group_size": 256}, "lm_head": FP8, "embed_tokens": {**INT4, "group_size": 64}},
        },
        "residual_in_fp32": True,
    },
}

# 192 columns are no multiple of 128.
ROTATED = {"out_proj": {**INT4, "group_size": 64}, "in_proj": {**INT4, "group_size": 64}}


def make(device, dtype=torch.float32, *, quantization=None, extras=None, seed=0, **fields):
    shape = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "state_size": 16,
        "time_step_rank": 8,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    if quantization is not None:
        fields["quantization"] = {"method": "rtn", "modules": quantization, **(extras or {})}
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**{**shape, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".D")):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if hasattr(module, "stored"):
                weight = 0.2 * torch.randn(module.out_features, module.in_features)
                for name, tensor in FORMATS[module.spec.format].encode(module.spec, weight).items():
                    getattr(module, name).copy_(tensor)
        for name, buffer in model.named_buffers():
            if name.endswith("conv_scale"):
                buffer.copy_(1 + 0.3 * torch.rand_like(buffer))
    return model.to(dtype).to(device)


def ids_of(model, *shape, seed=1):
    made = torch.randint(5, 390, shape, generator=torch.Generator().manual_seed(seed))
    return made.to(model.device)


@torch.no_grad()
def follow(model, ids, prompt, rows):
    """Logits (tokens, rows, V) and the state of the decoder that reads ids (rows, L), the first `prompt` by the model."""
    made = decode.Decoder(model, model.config.vocab_size)
    made.reserve(rows)
    for row in range(rows):
        state = model(ids[row : row + 1, :prompt], use_cache=True).state
        made.put(row, state, int(ids[row, prompt]), Settings(temperature=0), 1, 0)
    found = []
    for at in range(prompt + 1, ids.shape[1] + 1):
        made.step(rows)
        found.append(made.logits[:rows].clone())
        if at < ids.shape[1]:
            made.counts[0, :rows] = ids[:rows, at]
    return torch.stack(found), [made.state(row, 0, made.turn) for row in range(rows)]


@torch.no_grad()
def plain(model, ids, prompt):
    """The same by the model itself, in float64 where it isn't quantized."""
    state, found = model(ids[:, :prompt], use_cache=True).state, []
    for at in range(prompt, ids.shape[1]):
        out = model(ids[:, at : at + 1], state=state, use_cache=True)
        state = out.state
        found.append(out.logits[:, -1])
    return torch.stack(found), state


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# ---- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_in_fp32_equals_the_model(device, shape):
    model = make(device, **shape)
    assert decode.why_not(model) is None
    ids = ids_of(model, 3, 9)
    got, states = follow(model, ids, 5, 3)
    want, state = plain(model, ids, 5)
    assert relative(got, want) < 1e-5
    for row, mine in enumerate(states):
        for (conv, ssm), (conv_want, ssm_want) in zip(mine.layers, state.layers, strict=True):
            assert relative(conv, conv_want[row : row + 1]) < 1e-5 and relative(ssm, ssm_want[row : row + 1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_in_16_bits_is_as_exact_as_the_model(device, shape, dtype):
    """Errors against the same weights in fp32: no larger than the model's own."""
    model = make(device, dtype, **shape)
    exact = make(device, dtype, **shape).float()
    ids = ids_of(model, 2, 9)
    want = plain(exact, ids, 5)[0]
    got, theirs = follow(model, ids, 5, 2)[0], plain(model, ids, 5)[0]
    assert relative(got, want) < 1.2 * relative(theirs, want) + 1e-4


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_step_is_as_exact_as_the_stored_numbers(device, name):
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    model = make(device, torch.bfloat16, quantization=QUANTIZED[name], **sizes)
    exact = make(device, torch.bfloat16, quantization=QUANTIZED[name], **sizes).float()
    assert decode.why_not(model) is None
    ids = ids_of(model, 2, 8)
    want = plain(exact, ids, 5)[0]
    got, theirs = follow(model, ids, 5, 2)[0], plain(model, ids, 5)[0]
    assert relative(got, want) < 1.2 * relative(theirs, want) + 1e-4


@pytest.mark.parametrize("hidden", [128, 192])
def test_rotations_and_the_scale_behind_the_convolution(device, hidden):
    """Of GPTQ with a rotation and of AWQ, of 2^8 and 3 * 2^7 channels; a row's bits stay its own."""
    extras = {"rotate": ["out_proj"], "conv_scale": True}
    sizes = {"hidden_size": hidden, "intermediate_size": 256, "num_hidden_layers": 1}
    model = make(device, torch.bfloat16, quantization=ROTATED, extras=extras, **sizes)
    exact = make(device, torch.bfloat16, quantization=ROTATED, extras=extras, **sizes).float()
    assert model.model.layers[0].mamba.out_proj.rotation is not None
    ids = ids_of(model, 10, 7)
    want = plain(exact, ids[:2], 5)[0]
    got, theirs = follow(model, ids[:2], 5, 2)[0], plain(model, ids[:2], 5)[0]
    assert relative(got, want) < 1.2 * relative(theirs, want) + 1e-4
    assert relative(follow(model, ids, 5, 10)[0][:, :2], want) < 1.2 * relative(theirs, want) + 1e-4


# Ranks for which the convolution is one kernel with x_proj, and the scan has tensor cores for dt.
WIDE = {
    **{kind: WHOLE[kind] for kind in ("bf16", "int4", "bytes")},
    "rank 32": {"time_step_rank": 32},
    "rank 64": {"time_step_rank": 64, "dt_bc_norm": False, "state_size": 64, "conv_kernel_size": 3, "ffn": "none"},
    "rank 96": {"time_step_rank": 96, "quantization": QUANTIZED["int4"]},
}


@pytest.mark.parametrize("width", [9, 33])
@pytest.mark.parametrize("kind", WIDE)
def test_a_wide_batch_is_as_exact_as_the_model(device, kind, width):
    """K of several slices; a vocabulary of no multiple of 16 beside it."""
    fields = {"hidden_size": 1152, "intermediate_size": 1280, "num_hidden_layers": 2, "vocab_size": 401, **WIDE[kind]}
    model = make(device, torch.bfloat16, **fields)
    exact = make(device, torch.bfloat16, **fields).float()
    ids = ids_of(model, width, 6)
    want = plain(exact, ids, 4)[0]
    got, theirs = follow(model, ids, 4, width)[0], plain(model, ids, 4)[0]
    assert relative(got, want) < 1.2 * relative(theirs, want) + 1e-4


def every(spec):
    return dict.fromkeys(("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"), spec)


# Matrices of 2b's sizes, whose products begin and end in other kernels than small ones'.
LARGE = {
    "fp16": {"dtype": torch.float16},
    "int8": {"quantization": every(INT8)},
    "fp8": {"quantization": every(FP8)},
    "int4 of 64": {"quantization": every({**INT4, "group_size": 64, "symmetric": False})},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_a_wide_batch_of_large_matrices(device, kind):
    fields = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1, "time_step_rank": 128}
    fields |= {"dtype": torch.bfloat16, "initializer_range": 0.02, **LARGE[kind]}
    model, exact = make(device, **fields), make(device, **fields).float()
    ids = ids_of(model, 40, 5)
    want = plain(exact, ids, 3)[0]
    got, theirs = follow(model, ids, 3, 40)[0], plain(model, ids, 3)[0]
    assert relative(got, want) < 1.2 * relative(theirs, want) + 1e-4


# x of very different sizes, and K of whole and half stages of the one launch; groups of several chunks.
ONE_ROW = {
    "int4": {},
    "rows of one stage": {"hidden_size": 2048, "intermediate_size": 1280, "num_hidden_layers": 1},
    "groups of 256": {"quantization": every({**INT4, "group_size": 256}), "intermediate_size": 1280},
    "fp16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("outliers", [1, 256], ids=["even", "outliers"])
@pytest.mark.parametrize("kind", ONE_ROW)
def test_one_row_of_codes_by_integers_is_as_exact_as_the_model(device, kind, outliers):
    fields = {"hidden_size": 1024, "intermediate_size": 1408, "num_hidden_layers": 2, "time_step_rank": 32}
    fields |= {"quantization": every(INT4), "dtype": torch.bfloat16, **ONE_ROW[kind]}
    model, exact = make(device, **fields), make(device, **fields).float()
    if fields["dtype"] == torch.float16:
        outliers = min(outliers, 8)
    for one in (model, exact):
        for name, parameter in one.named_parameters():
            if name.endswith("norm.weight") and parameter.shape[0] > 512:
                parameter.data[::97] *= outliers
    whole = decode.Decoder(model, 400).whole
    assert whole is not None and whole.digits == (torch.cuda.get_device_capability(device) == (9, 0))
    ids = ids_of(model, 1, 7)
    want = plain(exact, ids, 3)[0]
    got, theirs = follow(model, ids, 3, 1)[0], plain(model, ids, 3)[0]
    assert relative(got, want) < 1.2 * relative(theirs, want) + 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_through_products_of_integers(device, bad):
    fields = {"hidden_size": 1024, "intermediate_size": 1408, "num_hidden_layers": 1, "time_step_rank": 32}
    model = make(device, torch.bfloat16, quantization=every(INT4), **fields)
    made = decode.Decoder(model, 400)
    made.reserve(1)
    with torch.no_grad():
        state = model(ids_of(model, 1, 3), use_cache=True).state
    state.layers[0][1][0, 5] = bad
    made.put(0, state, 7, Settings(temperature=0), 1, 0)
    made.step(1)
    assert not made.logits[0].isfinite().any()
    torch.cuda.synchronize(device)
    assert made.host[0, 0] == -1


# ---- company ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 8, 11, 40])
@pytest.mark.parametrize("kind", ["bf16", "int4", "fp32", "stream"])
def test_a_row_has_the_same_bits_at_every_width(device, kind, width):
    """K is so long that its sums are cut into slices; of "stream" weights are so large that Hopper takes other products."""
    sizes = {"hidden_size": 256, "intermediate_size": 1088, "num_hidden_layers": 1}
    if kind == "stream":
        sizes = {"hidden_size": 1024, "intermediate_size": 1088, "num_hidden_layers": 2, "time_step_rank": 32}
    if kind == "int4":
        model = make(device, torch.bfloat16, quantization=QUANTIZED["int4"], **{**sizes, "intermediate_size": 4224})
    else:
        model = make(device, torch.float32 if kind == "fp32" else torch.bfloat16, **sizes)
    made = decode.Decoder(model, 400)
    if width > made.most:
        return
    ids = ids_of(model, width, 5)
    got, states = follow(model, ids, 3, width)
    # Wide batches sum in another order: there a row is the same in any other wide batch.
    others = [] if width <= made.narrow else list(range(max(1, made.narrow)))
    for row in (0, width - 1):
        alone, state = follow(model, ids[[row, *others]], 3, 1 + len(others))
        assert torch.equal(alone[:, 0], got[:, row])
        for one, other in zip(state[0].layers, states[row].layers, strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", WHOLE)
def test_a_step_in_one_launch_leaves_the_bits_of_many(device, name, monkeypatch):
    """K is so long that out_proj and down are summed in slices that warps don't share evenly."""
    fields = {"dtype": torch.bfloat16, **WHOLE[name]}
    model = make(device, **{"hidden_size": 128, "intermediate_size": 1280, **fields})
    assert decode.Decoder(model, 400).whole is not None
    ids = ids_of(model, 1, 7)
    got, states = follow(model, ids, 3, 1)
    monkeypatch.setattr(decode.Whole, "of", lambda *_, **__: None)
    want, wanted = follow(model, ids, 3, 1)
    assert torch.equal(got, want)
    for one, other in zip(states[0].layers, wanted[0].layers, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_what_one_launch_does_not_take(device):
    """Zero points, groups of 32, rows that are no whole number of 64 bytes, fp32, rotations."""
    refused = [
        make(device),
        make(device, torch.bfloat16, **SHAPES["odd sizes"]),
        make(device, torch.bfloat16, quantization=QUANTIZED["mixed"], hidden_size=128, intermediate_size=256),
        make(device, torch.bfloat16, quantization=ROTATED, extras={"rotate": ["out_proj"]}, hidden_size=128),
    ]
    assert all(decode.Decoder(model, 400).whole is None for model in refused)


# ---- sampling ---------------------------------------------------------------------------------------------------------


def choose(logits, samplers, known):
    """The tokens that the kernels choose for rows of logits, and what they leave: (tokens, draws, seen)."""
    rows, size = logits.shape
    device = logits.device
    made = object.__new__(decode.Decoder)
    made.device, made.dtype, made.known, made.logits = device, logits.dtype, known, logits
    made.config = type("Config", (), {"vocab_size": size})

    def column(name, dtype):
        return torch.tensor([getattr(s.settings, name) for s in samplers], dtype=dtype)

    names = ("temperature", "top_p", "min_p", "repetition_penalty")
    made.numbers = torch.stack([column(name, torch.float64) for name in names]).to(device)
    seeds = torch.tensor([s.seed for s in samplers], dtype=torch.uint64).view(torch.int64)
    rest = [column("top_k", torch.int64), seeds, torch.tensor([s.draws for s in samplers])]
    made.counts = torch.stack([torch.full((rows,), -9), *rest]).to(device)
    made.seen = torch.zeros(rows, size, dtype=torch.uint8, device=device)
    for row, s in enumerate(samplers):
        if s.seen is not None:
            made.seen[row, :known] = s.seen
    made.found = decode_choice.Found.make(partial(torch.zeros, device=device), rows, known)
    made.found.best.fill_(float("nan")), made.found.best_id.fill_(-7)
    decode.run(decode_choice.launches(made, rows))
    assert not made.found.bins.any() and not made.found.masses.any()
    return made.counts[0].tolist(), made.counts[3].tolist(), made.seen


@pytest.mark.parametrize("case", range(10))
def test_sampling_gives_the_tokens_of_the_definition(device, case):
    draw = random.Random(case)
    size, rows = draw.choice([97, 400, 3001, 9000]), 3
    known = size - draw.choice([0, 5])
    scale = draw.choice([0.01, 1.0, 4.0, 20.0])
    dtype = draw.choice([torch.float32, torch.bfloat16])
    # No two scores are equal: whose turn comes first among equal ones the definition doesn't say.
    spread = torch.randn(rows, size, generator=torch.Generator().manual_seed(case)) * scale
    logits = spread.to(dtype).to(device)
    samplers = []
    for row in range(rows):
        settings = Settings(
            temperature=draw.choice([0, 0.3, 0.8, 1.0, 5.0]),
            top_k=draw.choice([0, 0, 1, 5, 50, 2000]),
            top_p=draw.choice([1.0, 0.95, 0.5, 0.01]),
            min_p=draw.choice([0, 0, 0.05, 1.0]),
            repetition_penalty=draw.choice([1, 1.3]),
            seed=draw.randrange(2**64),
        )
        prompt = [1, 2, 5, int(logits[row, :known].argmax())]
        samplers.append(Sampler(settings, known, prompt, draws=draw.choice([0, 3, 2**40]), device=device))
    tokens, draws, seen = choose(logits, samplers, known)
    for row, sampler in enumerate(samplers):
        want = sampler.pick(logits[row, :known])
        same_score = float(logits[row, want]) == float(logits[row, tokens[row]])
        assert tokens[row] == want or (dtype == torch.bfloat16 and same_score), (sampler.settings, tokens[row], want)
        assert draws[row] == sampler.draws
        if sampler.seen is not None and tokens[row] == want:
            assert torch.equal(seen[row, :known].bool(), sampler.seen)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_a_row(device, bad):
    logits = torch.randn(3, 400, device=device)
    logits[1, 7] = bad
    settings = [Settings(temperature=0.8, seed=1), Settings(temperature=0.8, seed=1), Settings(temperature=0)]
    tokens, _, _ = choose(logits, [Sampler(s, 400, device=device) for s in settings], 400)
    assert tokens[1] == -1 and tokens[0] >= 0 and tokens[2] == int(logits[2].argmax())
    assert choose(torch.full((1, 50), -float("inf"), device=device), [Sampler(settings[0], 50, device=device)], 50)[
        0
    ] == [-1]


def test_a_row_that_is_not_finite_does_no_harm_a_step_later(device):
    """The GPU is a step ahead when the host learns of it."""
    model = make(device, torch.bfloat16)
    made = decode.Decoder(model, 400)
    made.reserve(2)
    with torch.no_grad():
        state = model(ids_of(model, 1, 4), use_cache=True).state
    for row in range(2):
        made.put(row, state, 7, Settings(temperature=0), 1, 0)
    made.ssm[made.turn, :, 1] = float("nan")
    turns = [made.step(2), made.step(2)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert [made.host[turn, 1].item() for turn in turns] == [-1, -1]
    assert all(made.host[turn, 0].item() >= 0 for turn in turns)


# ---- whole answers ----------------------------------------------------------------------------------------------------

PROMPTS = ["hello", "The quick brown fox jumps", "", "한국어 문장은 여러", "素早い茶"]


def settings_of(seed, count, most):
    draw = random.Random(seed)
    return [
        Settings(
            max_new_tokens=draw.randint(1, most),
            temperature=draw.choice([0, 0.5, 1.0, 1.8]),
            top_k=draw.choice([0, 5, 50]),
            top_p=draw.choice([1.0, 0.9, 0.5]),
            repetition_penalty=draw.choice([1.0, 1.3]),
            stop=draw.choice([(), ("e", "한")]),
            seed=draw.randrange(2**64),
            logprobs=draw.choice([None, None, 2]),
        )
        for _ in range(count)
    ]


def test_answers_equal_the_plain_engine_in_fp32_and_rows_their_own(device):
    """Rows of different lengths, settings and endings, which join and leave: each as by the model itself, and as alone."""
    model, tokenizer = make(device, seed=3), helpers.make_tokenizer()
    settings = settings_of(1, len(PROMPTS), 7)
    want = generate(model, tokenizer, PROMPTS, settings, engine="plain")
    for batch_size in (3, 5):
        got = generate(model, tokenizer, PROMPTS, settings, batch_size=batch_size, engine="graph")
        for one, other in zip(got, want, strict=True):
            assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
    alone = generate(model, tokenizer, PROMPTS[:1], settings[:1], engine="graph")[0]
    assert alone.tokens == want[0].tokens


def test_the_state_of_a_row_is_that_of_all_its_tokens_but_the_last(device):
    """However far ahead the GPU is when the row ends: by its length, by a token, by the user."""
    model, tokenizer = make(device, seed=3), helpers.make_tokenizer()
    words = engine.Vocabulary(tokenizer, vocab_size=400)
    for ending in ("length", "stop", "close"):
        batch = decode_batch.make(model, words.size, "graph", rows=2)
        rows = []
        for seed, most in ((1, 6), (2, 4)):
            prompt = words.prompt(PROMPTS[seed])
            row = engine.Row(words, Settings(max_new_tokens=most, temperature=0, seed=seed), prompt, device=device)
            rows.append((row, prompt))
            batch.add(row, *engine.prefill(model, prompt))
        while len(batch):
            if ending == "stop":
                # The token that comes next ends the row.
                rows[0][0].vocabulary = type("V", (), {"eos": range(400), "special": {}})
            if ending == "close" and len(rows[0][0].answer.tokens) == 3:
                batch.close()
            else:
                batch.step()
        for row, prompt in rows:
            read = prompt + row.answer.tokens[:-1]
            with torch.no_grad():
                want = model(torch.tensor([read], device=device), use_cache=True).state
            assert row.state.seen.tolist() == [len(read)]
            for (conv, ssm), (conv_want, ssm_want) in zip(row.state.layers, want.layers, strict=True):
                assert relative(conv, conv_want) < 1e-4 and relative(ssm, ssm_want) < 1e-4


def test_room_grows_and_rows_stay(device):
    model = make(device, torch.bfloat16)
    made = decode.Decoder(model, 400)
    made.reserve(1)
    ids = ids_of(model, 1, 4)
    with torch.no_grad():
        made.put(0, model(ids, use_cache=True).state, 7, Settings(temperature=0), 1, 0)
        twin = decode.Decoder(model, 400)
        twin.reserve(4)
        twin.put(3, model(ids, use_cache=True).state, 7, Settings(temperature=0), 1, 0)
    made.step(1), twin.step(4)
    made.reserve(3)
    assert made.capacity == 4
    twin.move(3, 0)
    made.step(1), twin.step(1)
    assert torch.equal(made.logits[0], twin.logits[0])
    assert torch.equal(made.ssm[made.turn, :, 0], twin.ssm[twin.turn, :, 0])


def test_other_weights_make_another_decoder(device):
    model = make(device, torch.bfloat16)
    first = decode.decoder(model, 400)
    assert decode.decoder(model, 400) is first
    with torch.no_grad():
        model.model.layers[0].mamba.A_log.add_(0.1)
    assert decode.decoder(model, 400) is not first


# ---- long: on a real GPU ----------------------------------------------------------------------------------------------


def trained_like(device, dtype, **fields):
    """A model whose logits are spread as a trained one's: some tokens are far likelier than the others."""
    model = make(device, dtype, num_hidden_layers=4, hidden_size=256, intermediate_size=512, vocab_size=4096, **fields)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@pytest.mark.slow
def test_greedy_tokens_equal_the_plain_path_in_fp32(device):
    if device.type != "cuda":
        pytest.skip("hundreds of steps: a GPU only")
    model, tokenizer = trained_like(device, torch.float32), helpers.make_tokenizer()
    settings = Settings(temperature=0, max_new_tokens=256)
    prompts = [[1, 2, 3, 4], [9, 8, 7]]
    got, want = (generate(model, tokenizer, prompts, settings, engine=name) for name in ("graph", "plain"))
    assert [one.tokens for one in got] == [one.tokens for one in want]


def source_bytes():
    """The package's own source: text that is there wherever it is tested."""
    folder = Path(decode.__file__).parents[1]
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))


def learnt(device, steps=300):
    """A model that has read Python for some seconds, and bytes that it hasn't read. Of random weights a tenth of all
    likeliest tokens are within one rounding of the second, and no two orders of sums agree on those."""
    text = torch.frombuffer(bytearray(source_bytes()), dtype=torch.uint8).long().to(device)
    train, rest = text[:-4096], text[-4096:]
    fields = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    model = make(device, **fields, initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    random_places = torch.Generator().manual_seed(0)
    for _ in range(steps):
        begins = torch.randint(len(train) - 256, (32,), generator=random_places).tolist()
        batch = torch.stack([train[at : at + 256] for at in begins])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().to(torch.bfloat16), rest[None, :1025]


@pytest.mark.slow
def test_teacher_forced_tokens_agree_in_bf16(device):
    """The likeliest token after each of 1024 given ones, by the engine and by the model; and neither is further from
    the same weights in fp32."""
    if device.type != "cuda":
        pytest.skip("a thousand steps: a GPU only")
    model, ids = learnt(device)
    got, want = follow(model, ids, 1, 1)[0], plain(model, ids, 1)[0]
    exact = plain(copy.deepcopy(model).float(), ids, 1)[0]
    assert float((got.argmax(-1) == want.argmax(-1)).float().mean()) >= 0.99
    assert relative(got, exact) < 1.05 * relative(want, exact)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 8, 16, 64])
def test_graphs_equal_single_launches(device, width):
    if device.type != "cuda":
        pytest.skip("records CUDA graphs")
    model = trained_like(device, torch.bfloat16)
    ids = ids_of(model, width, 8)
    got = follow(model, ids, 4, width)
    capture = decode.Decoder._capture
    try:
        decode.Decoder._capture = lambda self, steps: lambda: decode.run(steps)  # type: ignore[method-assign]
        want = follow(model, ids, 4, width)
    finally:
        decode.Decoder._capture = capture  # type: ignore[method-assign]
    assert torch.equal(got[0], want[0])
    assert all(
        torch.equal(a, b)
        for one, other in zip(got[1], want[1], strict=True)
        for x, y in zip(one.layers, other.layers, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_most_rows_beside_a_long_weight(device):
    """8b and 16b: shared memory holds fewer than 8 rows in fp32, and at least 4 in 16 bits."""
    weight = torch.empty(16, 10240, dtype=torch.bfloat16, device=device)
    assert decode_kernels.most_rows([decode_kernels.Matrix("Plain", 0, 16, 10240, weight)], torch.bfloat16) >= 4
    assert Spec("int4").group_size == 128
