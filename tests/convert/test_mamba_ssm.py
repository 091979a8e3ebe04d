"""mamba_ssm's checkpoints: read safely, written as its loader wants them, against a float64 loop written from its code."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from convert_helpers import SHAPES, ours
from torch.nn import functional as F

from moai_core import checkpoint
from moai_core.convert import convert
from moai_core.errors import CheckpointError, StorageError

PLAIN = {"ffn": "none", "dt_bc_norm": False}
GATED = {"ffn": "swiglu", "dt_bc_norm": False, "intermediate_size": 128}
# The fields of mamba_ssm's MambaConfig: its loader passes config.json to it, and anything else is an error there.
KNOWN = {
    "d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm",
    "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings",
}  # fmt: skip


def reference(config, state, ids):
    """Logits (L, V) in float64: mixer_seq_simple, block, mamba_simple (d_conv, dt_rank, d_state) and mlp, one step at a
    time."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, weight):
        return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    x = state["backbone.embedding.weight"][ids]
    for number in range(config["n_layer"]):
        w = {k.removeprefix(f"backbone.layers.{number}."): v for k, v in state.items() if f"layers.{number}." in k}
        u, z = F.linear(norm(x, w["norm.weight"]), w["mixer.in_proj.weight"]).chunk(2, -1)
        kernel = w["mixer.conv1d.weight"][:, 0]
        width = kernel.shape[1]
        past = torch.cat([torch.zeros(width - 1, u.shape[1], dtype=u.dtype), u])
        u = torch.stack([(past[t : t + width].T * kernel).sum(1) for t in range(len(ids))])
        u = F.silu(u + w["mixer.conv1d.bias"])
        A = -torch.exp(w["mixer.A_log"])
        rank = w["mixer.dt_proj.weight"].shape[1]
        h, y = torch.zeros_like(A), []
        for t in range(len(ids)):
            dt, B, C = (w["mixer.x_proj.weight"] @ u[t]).split([rank, A.shape[1], A.shape[1]])
            dt = F.softplus(w["mixer.dt_proj.weight"] @ dt + w["mixer.dt_proj.bias"])
            h = torch.exp(dt[:, None] * A) * h + (dt * u[t])[:, None] * B
            y.append(h @ C + w["mixer.D"] * u[t])
        x = x + F.linear(torch.stack(y) * F.silu(z), w["mixer.out_proj.weight"])
        if config["d_intermediate"]:
            up, gate = F.linear(norm(x, w["norm2.weight"]), w["mlp.fc1.weight"]).chunk(2, -1)
            x = x + F.linear(up * F.silu(gate), w["mlp.fc2.weight"])
    return F.linear(norm(x, state["backbone.norm_f.weight"]), state["lm_head.weight"])


@pytest.mark.parametrize("shape", SHAPES, ids=["even", "odd", "expand3"])
@pytest.mark.parametrize("kind", [PLAIN, GATED], ids=["plain", "feed-forward"])
def test_written_as_its_loader_expects_with_the_same_logits(kind, shape, make, tmp_path):
    folder, model = make(**{**shape, **kind, "tie_word_embeddings": shape is not SHAPES[1]})
    convert(folder, tmp_path / "out", "mamba-ssm", check=kind is PLAIN)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert set(config) <= KNOWN and "lm_head.weight" in state
    with zipfile.ZipFile(tmp_path / "out" / "pytorch_model.bin") as archive:
        assert archive.testzip() is None
    vocabulary, multiple = config["vocab_size"], config["pad_vocab_size_multiple"]
    assert -(-vocabulary // multiple) * multiple == len(state["backbone.embedding.weight"])
    if config["tie_embeddings"]:
        assert state["lm_head.weight"].data_ptr() == state["backbone.embedding.weight"].data_ptr()
    ids = torch.randint(shape["vocab_size"], (19,), generator=torch.Generator().manual_seed(1))
    mine = ours(model, ids[None])[0]
    assert mine.std() > 0.3 and (reference(config, state, ids) - mine).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [PLAIN, GATED], ids=["plain", "feed-forward"])
def test_there_and_back_is_bit_exact(kind, tied, dtype, make, stored, same, tmp_path):
    folder, _ = make(**kind, tie_word_embeddings=tied, dtype=dtype)
    convert(folder, tmp_path / "there", "mamba-ssm", check=False)
    convert(tmp_path / "there", tmp_path / "back", "moai", check=False)
    assert same(stored(folder), stored(tmp_path / "back"))
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "time_step_rank", "dtype"):
        assert before[name] == after[name], name


def released(folder, *, vocab=50, multiple=8, **config):
    """A folder as state-spaces released them: config.json without model_type, .bin with padded rows and a tied head."""
    generator = torch.Generator().manual_seed(2)
    rows, H, I, N, R = -(-vocab // multiple) * multiple, 16, 32, 16, 1

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    state = {"backbone.embedding.weight": random(rows, H) * 4}
    for number in range(2):
        one = {
            "norm.weight": 1 + random(H), "mixer.in_proj.weight": random(2 * I, H), "mixer.conv1d.weight": random(I, 1, 4),
            "mixer.conv1d.bias": random(I), "mixer.x_proj.weight": random(R + 2 * N, I),
            "mixer.dt_proj.weight": random(I, R), "mixer.dt_proj.bias": random(I), "mixer.A_log": random(I, N),
            "mixer.D": 1 + random(I), "mixer.out_proj.weight": random(H, I),
        }  # fmt: skip
        state |= {f"backbone.layers.{number}.{name}": tensor for name, tensor in one.items()}
    state |= {"backbone.norm_f.weight": 1 + random(H), "lm_head.weight": state["backbone.embedding.weight"]}
    folder.mkdir()
    values = {
        "d_model": H, "n_layer": 2, "vocab_size": vocab, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": multiple, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    torch.save(state, folder / "pytorch_model.bin")
    return {**values, "d_intermediate": 0}, state


def test_a_released_checkpoint_reads_with_its_logits(tmp_path):
    config, state = released(tmp_path / "mamba-tiny")
    report = convert(tmp_path / "mamba-tiny", tmp_path / "moai", "moai")
    assert report["vocab_size"] == 56 and "the vocabulary of 50 is padded to 56" in report["notes"]
    assert "mamba_ssm itself needs a GPU" in " ".join(report["parity"]["runtimes"]) or torch.cuda.is_available()
    model = checkpoint.load_model(tmp_path / "moai")
    ids = torch.arange(40)
    assert (reference(config, state, ids) - ours(model, ids[None])[0]).abs().max() < 1e-4


def test_trim_vocab_drops_the_padding_and_it_comes_back(tmp_path):
    config, state = released(tmp_path / "mamba-tiny")
    report = convert(tmp_path / "mamba-tiny", tmp_path / "moai", "moai", trim_vocab=True)
    assert report["vocab_size"] == 50 and report["parity"]["greedy"] == 64
    model = checkpoint.load_model(tmp_path / "moai")
    assert model.get_input_embeddings().weight.shape == (50, 16)
    ids = torch.arange(40)
    assert (reference(config, state, ids)[:, :50] - ours(model, ids[None])[0]).abs().max() < 1e-4
    convert(tmp_path / "mamba-tiny", tmp_path / "padded", "mamba-ssm")
    again = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert (again["vocab_size"], again["pad_vocab_size_multiple"]) == (50, 8)


def test_it_goes_on_to_transformers_and_back_bit_exact(tmp_path):
    _, state = released(tmp_path / "mamba-tiny")
    convert(tmp_path / "mamba-tiny", tmp_path / "hf", "transformers-mamba")
    convert(tmp_path / "hf", tmp_path / "again", "mamba-ssm", check=False)
    after = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)


class Evil:
    ran = False

    def __reduce__(self):
        return (Evil.run, ())

    @staticmethod
    def run():
        Evil.ran = True


def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path):
    _, state = released(tmp_path / "mamba-tiny")
    torch.save({**state, "x": Evil()}, tmp_path / "mamba-tiny" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused as unsafe") as caught:
        convert(tmp_path / "mamba-tiny", tmp_path / "moai", "moai")
    assert caught.value.exit_code == 3 and "\n" not in caught.value.message and not Evil.ran
    assert not (tmp_path / "moai").exists()


def bad_bin(name, file, state):
    raw = file.read_bytes()
    if name == "truncated":
        file.write_bytes(raw[: len(raw) * 2 // 3])
    elif name == "empty":
        file.write_bytes(b"")
    elif name == "garbage":
        file.write_bytes(b"\x80\x02garbage" * 100)
    elif name == "old format":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif name == "a list":
        torch.save([1, 2], file)
    elif name == "a number":
        torch.save({**state, "step": 3}, file)
    elif name == "a huge view":
        torch.save({**state, "backbone.norm_f.weight": torch.zeros(1).expand(1 << 40)}, file)
    elif name == "sparse":
        torch.save({**state, "backbone.norm_f.weight": torch.eye(4).to_sparse()}, file)
    elif name == "compressed":
        with zipfile.ZipFile(file) as old:
            entries = [(info.filename, old.read(info)) for info in old.infolist()]
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for entry, content in entries:
                new.writestr(entry, content)


@pytest.mark.parametrize(
    "name",
    ["truncated", "empty", "garbage", "old format", "a list", "a number", "a huge view", "sparse", "compressed"],
)
def test_a_bad_bin_file_is_one_clear_line(name, tmp_path):
    _, state = released(tmp_path / "mamba-tiny")
    bad_bin(name, tmp_path / "mamba-tiny" / "pytorch_model.bin", state)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "mamba-tiny", tmp_path / "moai", "moai")
    assert "pytorch_model.bin" in caught.value.message and "\n" not in caught.value.message
    assert caught.value.exit_code == 3 and not (tmp_path / "moai").exists()


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layer is Mamba2"),
        ({"ssm_cfg": 3}, "ssm_cfg must be an object"),
        ({"rms_norm": False}, "no LayerNorm"),
        ({"attn_layer_idx": [1]}, "no attention"),
        ({"n_layer": 3}, "n_layer is 3, the weights have 2"),
        ({"n_layer": "many"}, "n_layer must be a whole number"),
        ({"d_model": 17}, r"shape \[56, 16\], config.json makes it \[56, 17\]"),
        ({"vocab_size": 57}, r"backbone.embedding.weight has the shape \[56, 16\], config.json makes it \[64, 16\]"),
        ({"d_intermediate": 100}, "norm2.weight is missing"),
    ],
)
def test_a_config_that_does_not_fit(config, what, tmp_path):
    released(tmp_path / "mamba-tiny", **config)
    with pytest.raises(CheckpointError, match=what) as caught:
        convert(tmp_path / "mamba-tiny", tmp_path / "moai", "moai")
    assert "\n" not in caught.value.message and not (tmp_path / "moai").exists()


def test_a_file_that_cannot_grow_is_one_clear_line(tmp_path):
    """torch's own writer of archives reports a position where the system refuses a write."""
    resource = pytest.importorskip("resource")
    released(tmp_path / "mamba-tiny")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError, match=r"out: (pytorch_model.bin can't be written|disk full)") as caught:
            convert(tmp_path / "mamba-tiny", tmp_path / "out", "mamba-ssm", check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in caught.value.message and [path.name for path in tmp_path.iterdir()] == ["mamba-tiny"]
