"""`moai eval`: the table, the JSON, and one line with an exit code for what goes wrong."""

import json
import math
import re
import shutil

import pytest
import torch

from moai_cli.main import run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM
    from moai_core.data.tokenize import load_tokenizer

    folder = tmp_path_factory.mktemp("작은 모델")
    tokenizer = load_tokenizer("moai_tiny")
    torch.manual_seed(0)
    size = max(tokenizer.get_vocab().values()) + 1
    config = MoaiMambaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, state_size=8, time_step_rank=4
    )
    MoaiMambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "책 한 권.txt"
    path.write_text("상태는 커지지 않는다. 吾輩は猫である。床前明月光。 The state is small.\n" * 40, encoding="utf-8")
    return path


def test_json_and_table(model, data, capsys):
    assert run(["eval", "--model", str(model), "--data", str(data), "--json", "--scan", "reference"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["loss"] == pytest.approx(math.log(found["perplexity"]))
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2) / found["bytes"])
    assert found["documents"] == 1
    assert 0 <= len(data.read_bytes()) - found["bytes"] < 10  # all but the first token's
    assert {"seconds", "tokens", "model", "data"} <= set(found)
    assert shown.err == ""  # calm without a terminal
    short = [
        "eval",
        "-m",
        str(model),
        "-d",
        str(data),
        "--max-length",
        "64",
        "--batch-size",
        "2",
        "--scan",
        "reference",
    ]
    assert run([*short, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert run(short) == 0
    out = capsys.readouterr().out
    for word in ("bits per byte", f"{found['loss']:.3f}", f"{found['tokens']:,}", "책 한 권.txt"):
        assert word in out


def test_skipped_lines_are_told(model, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "hello there"}\nbroken\n')
    common = ["eval", "-m", str(model), "-d", str(path), "--scan", "reference"]
    assert run(common) == 2
    shown = capsys.readouterr()
    assert "a.jsonl:2: not valid JSON" in shown.err
    assert "count them: data.on_error=skip in a recipe, --on-error skip as a flag\n" in shown.err
    assert shown.out == ""
    assert run([*common, "--on-error", "skip"]) == 0
    assert "1 bad line left out" in capsys.readouterr().err


def test_text_of_which_no_byte_is_scored(model, tmp_path, capsys):
    """The first token has nothing before it, the end no bytes: there are no bits per byte."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    command = ["eval", "-m", str(model), "-d", str(tmp_path / "a.jsonl"), "--scan", "reference"]
    assert run(command) == 0 and re.search(r"bits per byte +-\n", capsys.readouterr().out)
    assert run([*command, "--json"]) == 0 and json.loads(capsys.readouterr().out)["bits_per_byte"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "MODEL"], 2, "--data is missing"),
        (["--model", "MODEL", "--data", "missing.txt"], 2, "missing.txt: no such file or folder"),
        (["--model", "nowhere", "--data", "DATA"], 3, "nowhere"),
        (["--model", "MODEL", "--data", "DATA", "--batch-size", "0"], 2, "--batch-size must be at least 1 (got 0)"),
        (["--model", "MODEL", "--data", "DATA", "--max-length", "0"], 2, "--max-length must be at least 1 (got 0)"),
        (["--model", "MODEL", "--data", "DATA", "--limit", "-5"], 2, "--limit must be at least 1 (got -5)"),
        *(
            (
                ["--model", "MODEL", "--data", "DATA", "--device", one],
                2,
                f"--device must be auto, cpu, cuda or cuda:N (got '{one}')",
            )
            for one in ("abacus", "meta", "mps", "xla", "cpu:7")
        ),
        (
            ["--model", "MODEL", "--data", "DATA", "--train-on", "user"],
            2,
            "--train-on must be assistant or all (got 'user')",
        ),
        (["--model", "MODEL", "--data", "DATA", "--format", "csv"], 2, "unknown kind of records 'csv'"),
        (["--model", "MODEL", "--data", "DATA", "--tokenizer", "nonesuch"], 2, "'nonesuch': no such folder or name"),
    ],
)
def test_refusals(model, data, capsys, arguments, code, words):
    named = {"MODEL": str(model), "DATA": str(data)}
    assert run(["eval", *(named.get(word, word) for word in arguments)]) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_model_that_computes_nan_is_no_result(model, data, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path / "nan")
    file = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.final_layernorm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert run(["eval", "--model", str(tmp_path / "nan"), "--data", str(data), "--json"]) == 5
    shown = capsys.readouterr()
    assert shown.out == "" and re.search(r"error: the model's loss on .* is not finite \(nan\)\nhint: ", shown.err)


def test_a_tokenizer_of_another_model(model, data, tmp_path, capsys):
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(100_000)} | {"</s>": 100_000}, unk_token="0"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert run(["eval", "-m", str(model), "-d", str(data), "--tokenizer", str(tmp_path), "--scan", "reference"]) == 2
    assert "has ids up to 100000, but the model's vocab_size is" in capsys.readouterr().err


def test_escapes_in_a_name_never_reach_the_terminal(model, tmp_path, capsys):
    path = tmp_path / "a\x1b]0;owned\x07.txt"
    path.write_text("text of some length")
    assert run(["eval", "-m", str(model), "-d", str(path), "--scan", "reference"]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert run(["eval", "-m", str(model), "-d", str(path) + "x"]) == 2
    assert "\x1b]" not in capsys.readouterr().err
