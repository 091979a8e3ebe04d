"""Recipes: what they say resolves as written, and whatever is wrong is refused with file and line, cheaply."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moai_core import config, paths
from moai_core import recipe as recipes
from moai_core.errors import RecipeError
from moai_core.recipe import Recipe, Source, load

MINIMAL = "train: {steps: 10}\n"


@pytest.fixture
def write(tmp_path):
    def make(text: str | bytes, name: str = "r.yaml") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return make


def errors(file: Path, *overrides: str) -> list[str]:
    found = recipes.check(file, overrides)[1]
    assert all("\n" not in e.message for e in found)
    return [e.message.replace(f"{file.parent}/", "") for e in found]


# ---- what is right


def test_without_torch():
    code = (
        "import sys, moai_core.recipe, moai_core.plan; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_and_types(write):
    text = (
        MINIMAL
        + "optim: {lr: 1e-4, betas: [0.9, 0.99], eps: .5e-8}\ndata: {train: a.txt, shuffle: false}\ntrack: wandb\n"
    )
    r = load(write(text))
    assert r.optim.lr == 1e-4 and isinstance(r.optim.lr, float), "YAML 1.1 reads 1e-4 as text"
    assert r.optim.betas == (0.9, 0.99) and r.optim.eps == 5e-9
    assert r.data.shuffle is False and r.track == ("wandb",)
    assert r.train.steps == 10 and r.train.epochs is None and r.output == "runs/r" and r.name == "r"


def test_words_stay_words(write):
    r = load(write(MINIMAL + "description: no\nname: 12:30\noutput: 2024\n"))
    assert (r.description, r.name, r.output) == ("no", "12:30", "2024")


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", ".0001", "+1E-4", "1_0e-5"])
def test_numbers(write, text):
    assert load(write(MINIMAL + f"optim: {{lr: {text}}}")).optim.lr == pytest.approx(1e-4, rel=1e-12)


def test_extends_later_wins_and_lists_are_replaced(write):
    write(
        "train: {steps: 5, batch_size: 2}\noptim: {lr: 1, betas: [0.1, 0.2]}\ntrack: [wandb, trackio]\n", "base/a.yaml"
    )
    write("optim: {lr: 2}\n", "base/b.yaml")
    r = load(write("extends: [base/a, base/b]\ntrain: {batch_size: 3}\ntrack: [tensorboard]\n"))
    assert (r.optim.lr, r.optim.betas, r.train.batch_size, r.train.steps) == (2.0, (0.1, 0.2), 3, 5)
    assert r.track == ("tensorboard",)
    assert str(r.origin("optim.lr")).endswith("b.yaml:1") and str(r.origin("train.batch_size")).endswith("r.yaml:2")
    assert r.origin("optim.eps") is None


def test_extends_finds_packaged_bases_from_any_folder(write):
    r = load(write("extends: [base/2b, base/a100]\n"))
    assert r.model.preset == "2b" and r.hardware.gpu == "a100"


def test_setting_one_of_a_pair_takes_the_inherited_other_away(write):
    base = write("train: {steps: 5, effective_batch: 8}\n", "b.yaml")
    r = load(write("extends: b\ntrain: {epochs: 2, accumulation: 3}\n"))
    assert (r.train.steps, r.train.epochs) == (None, 2.0) and (r.train.accumulation, r.train.effective_batch) == (
        3,
        None,
    )
    assert load(base, ["train.epochs=0.5"]).train.steps is None
    assert errors(write("train: {steps: 5, epochs: 2}")) == [
        "r.yaml:1: train.epochs and train.steps are both set; keep one"
    ]
    assert errors(write("train:\n  batch_size: 3\n")) == ["r.yaml:2: train.steps or train.epochs must be set"]
    both = "r.yaml:1: train.accumulation and train.effective_batch are both set; keep one"
    assert errors(write("train: {steps: 5, accumulation: 2, effective_batch: 8}")) == [both]


def test_overrides(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write("train: {steps: 5}\noptim: {lr: 1, clip: 0.5}\ndata: {train: a.txt}\n", "sub/r.yaml")
    r = load(
        file,
        [
            "optim.lr=8e-5",
            "~optim.clip",
            "data.valid=v.txt",
            'train.sample_prompts=["a, b", c]',
            "description=x: y # z",
        ],
    )
    assert r.optim.lr == 8e-5 and r.optim.clip == 1.0
    assert r.data.train == (Source(str(tmp_path / "sub/a.txt")),), "a path in a file starts from its folder"
    assert r.data.valid == (Source(str(tmp_path / "v.txt")),), (
        "a path on the command line starts from the current folder"
    )
    assert r.train.sample_prompts == ("a, b", "c") and r.description == "x: y # z"
    assert str(r.origin("optim.lr")) == "override 'optim.lr=8e-5'"
    assert load(file, ["optim.clip=null"]).optim.clip is None
    assert load(file, ["~optim"]).optim == recipes.Optim()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "override 'optim.lrr=1': unknown key 'optim.lrr'; did you mean optim.lr?"),
        ("lr=1", "override 'lr=1': unknown key 'lr'; did you mean optim.lr?"),
        ("~optim.lrr", "override '~optim.lrr': unknown key 'optim.lrr'; did you mean optim.lr?"),
        ("optim.lr", "override 'optim.lr': write key=value or ~key"),
        ("~optim.lr=3", "override '~optim.lr=3': write key=value or ~key"),
        ("a.b.c=3", "override 'a.b.c=3': write key=value or ~key"),
        ("=3", "override '=3': write key=value or ~key"),
        ("optim.lr=", "override 'optim.lr=': optim.lr must be a number > 0 and <= 10 (got null)"),
        ("optim.lr=-1", "override 'optim.lr=-1': optim.lr must be a number > 0 and <= 10 (got -1)"),
        ("optim=3", "override 'optim=3': optim must be a section of keys (got 3)"),
        ("extends=base/2b", "override 'extends=base/2b': unknown key 'extends'"),
    ],
)
def test_a_wrong_override_names_itself(write, override, message):
    assert message in errors(write(MINIMAL), override)


def test_relative_paths(write, tmp_path, monkeypatch):
    data = "data: {train: [{path: a.txt, weight: 2}, {path: ~/b}, {path: hf://x/y}], valid: /abs, cache: c}\n"
    data += "tokenizer: ./tok\n"
    r = load(write(MINIMAL + data, "sub/r.yaml"))
    home = Path.home()
    assert r.data.train == (Source(f"{tmp_path}/sub/a.txt", weight=2.0), Source(f"{home}/b"), Source("hf://x/y"))
    assert (
        r.data.valid == (Source("/abs"),)
        and r.data.cache == f"{tmp_path}/sub/c"
        and r.tokenizer == f"{tmp_path}/sub/tok"
    )
    assert load(write(MINIMAL + "tokenizer: moai_tiny\n")).tokenizer == "moai_tiny"
    assert load(write(MINIMAL + "tokenizer: null\n")).tokenizer is None
    # What isn't beside the recipe is looked for among the packaged recipes, as `extends` does: a copied recipe still
    # finds its corpus.
    assert load(write(MINIMAL + "data: {train: sample/train}\n")).data.train == (
        Source(str(paths.RECIPES / "sample/train")),
    )
    (tmp_path / "sample/train").mkdir(parents=True)
    assert load(write(MINIMAL + "data: {train: sample/train}\n")).data.train == (Source(f"{tmp_path}/sample/train"),)
    with pytest.raises(RecipeError, match=r"data\.train is not set"):
        load("a100-2b").require("data.train")


def test_round_trips(write):
    r = load(
        "cpu-tiny", ["description='null'", "train.sample_prompts=['1e-4', '~', 오늘]", "optim.lr=3e-4", "name=123"]
    )
    again = load(write(r.to_yaml()))
    assert again == r and hash(again) == hash(r) and Recipe.from_dict(r.to_dict()) == r
    assert (
        load(write("\n".join(recipes.annotate(r)))) == r
        and load(write("\n".join(recipes.annotate(r, everything=True)))) == r
    )
    assert r != load("cpu-tiny") and again.to_dict() == yaml.safe_load(again.to_yaml())
    with pytest.raises(RecipeError, match=r"stored recipe: unknown key 'optim\.lrr'"):
        Recipe.from_dict({**r.to_dict(), "optim": {"lrr": 1}})


def test_every_packaged_recipe_resolves():
    assert {"a100-2b", "h100-2b", "a40-2b", "rtx4090-2b", "cpu-tiny"} <= set(recipes.names())
    for name in recipes.names():
        assert load(name).description, name


def test_the_2b_recipes_carry_the_specified_figures():
    for name, rows, accumulation in (("a100-2b", 16, 4), ("a40-2b", 8, 8), ("rtx4090-2b", 4, 16), ("h100-2b", 8, 8)):
        r = load(name)
        assert r.train.batch_size == rows and r.accumulation(4) == accumulation and r.accumulation(1) == 256 // rows
        assert (r.optim.lr, r.optim.warmup_steps, r.optim.weight_decay, r.data.max_length) == (1e-4, 2000, 0.01, 2048)
    with pytest.raises(RecipeError, match=r"base/2b\.yaml:\d+: train\.effective_batch must be a multiple of .* = 48"):
        load("a100-2b").accumulation(3)


def test_the_schema_covers_the_model_and_the_data(write):
    keys = [key for key, *_ in recipes.schema()]
    assert {f"model.{name}" for name in config.DEFAULTS} <= set(keys)
    assert all(help for *_, help in recipes.schema())
    assert len(keys) == len(set(keys))
    from moai_core.data.records import ALIASES, KINDS

    for kind in ("auto", *KINDS, *ALIASES):
        assert load(write(MINIMAL + f"data: {{format: {kind}}}")).data.format == kind


def test_model_numbers(write):
    r = load(write(MINIMAL + "model: {preset: 8b, num_hidden_layers: 3}\n"))
    assert r.model.numbers() == config.fields("8b", num_hidden_layers=3)
    assert errors(write(MINIMAL + "model:\n  vocab_size: 9\n  eos_token_id: 30\n")) == [
        "r.yaml:4: model.eos_token_id must lie between 0 and vocab_size - 1 = 8 (got 30)"
    ]


# ---- what is wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1: the recipe is empty"),
        ("# nothing\n", "r.yaml:1: the recipe is empty"),
        ("- a\n- b\n", "r.yaml:1: a recipe is a mapping of keys to values (got a list)"),
        ("hello\n", "r.yaml:1: a recipe is a mapping of keys to values (got 'hello')"),
        (MINIMAL + "optim:\n  lr: 1e-4x\n", "r.yaml:3: optim.lr must be a number > 0 and <= 10 (got '1e-4x')"),
        (MINIMAL + "optim:\n  lr: '1e-4'\n", "r.yaml:3: optim.lr must be a number > 0 and <= 10 (got '1e-4')"),
        (MINIMAL + "optim:\n  lr: .inf\n", "r.yaml:3: optim.lr must be a number > 0 and <= 10 (got '.inf')"),
        (MINIMAL + "optim:\n  lr: 1e999\n", "r.yaml:3: optim.lr must be a number > 0 and <= 10 (got 1e999)"),
        (MINIMAL + "optim:\n\n  lrr: 1\n", "r.yaml:4: unknown key 'optim.lrr'; did you mean optim.lr?"),
        (MINIMAL + "batch_size: 1\n", "r.yaml:2: unknown key 'batch_size'; did you mean train.batch_size?"),
        (MINIMAL + "optim: 3\n", "r.yaml:2: optim must be a section of keys (got 3)"),
        (MINIMAL + "data: {shuffle: yes}\n", "r.yaml:2: data.shuffle must be true or false (got 'yes')"),
        (MINIMAL + "data: {streaming: on}\n", "r.yaml:2: data.streaming must be true or false or 'auto' (got 'on')"),
        (
            MINIMAL + "optim: {name: adam}\n",
            "r.yaml:2: optim.name must be one of adamw, adamw_bf16, adamw_8bit (got 'adam')",
        ),
        (
            MINIMAL + "optim: {betas: [0.9]}\n",
            "r.yaml:2: optim.betas must be a list of 2: a number >= 0 and < 1 (got a list)",
        ),
        (MINIMAL + "optim: {betas: [0.9, 1]}\n", "r.yaml:2: optim.betas[1] must be a number >= 0 and < 1 (got 1)"),
        (
            MINIMAL + "track: [tensorbord]\n",
            "r.yaml:2: track[0] must be one of tensorboard, wandb, trackio (got 'tensorbord')",
        ),
        (MINIMAL + "train: {steps: 3}\n", "r.yaml:2: duplicate key 'train' (first at r.yaml:1)"),
        ("train:\n  steps: 3\n  steps: 3\n", "r.yaml:3: duplicate key 'steps' (first at r.yaml:2)"),
        ("train: {steps: 1.5}\n", "r.yaml:1: train.steps must be a whole number >= 1 or null (got 1.5)"),
        ("train: {steps: 0}\n", "r.yaml:1: train.steps must be a whole number >= 1 or null (got 0)"),
        (
            f"train: {{steps: {'9' * 40}}}\n",
            f"r.yaml:1: train.steps must be a whole number >= 1 or null (got {'9' * 40})",
        ),
        ("train:\n\tsteps: 3\n", "r.yaml:2: a tab can't stand here; indent with spaces"),
        ("train: {steps: 3\n", "r.yaml:2: expected ',' or '}', but got '<stream end>'"),
        (MINIMAL + "description: \x07\n", "r.yaml:2: character U+0007 isn't allowed in YAML"),
        (MINIMAL + 'description: "\\ud800"\n', "r.yaml:2: half a surrogate pair is no character"),
        (MINIMAL.encode() + b"description: \xb0\xa1\n", "r.yaml:2: not UTF-8 (byte 0xb0)"),
        (MINIMAL.encode("utf-16"), "r.yaml:1: not UTF-8 (byte 0xff)"),
        (MINIMAL + "---\na: 1\n", "r.yaml:2: but found another document"),
        (MINIMAL + "a: &a 1\n<<: *a\n", "r.yaml:3: merge keys (<<) aren't supported"),
        (MINIMAL + "? [a]\n: 1\n", "r.yaml:2: a key must be a word (got a list)"),
        (
            MINIMAL + "a: !!python/object/apply:os.system [x]\n",
            "r.yaml:2: tag 'tag:yaml.org,2002:python/object/apply:os.system' isn't",
        ),
        (MINIMAL + "extends: base/2c\n", "r.yaml:2: extends 'base/2c': no such recipe; did you mean base/2b?"),
        (MINIMAL + "extends: [1, [2]]\n", "r.yaml:2: extends 1: no such recipe"),
        (MINIMAL + "extends: {a: b}\n", "r.yaml:2: extends must be a name or a list of names (got a mapping)"),
        (MINIMAL + "extends: r\n", "r.yaml:2: extends goes in a circle: "),
        (
            MINIMAL + "data: {train: []}\n",
            "r.yaml:2: data.train must be a path, or a list of {path, weight, format, train_on}",
        ),
        (
            MINIMAL + "data:\n  train:\n    - path: a\n      weight: 0\n",
            "r.yaml:5: data.train[0].weight must be a number > 0 (got 0)",
        ),
        (
            MINIMAL + "data:\n  train:\n    - paht: a\n",
            "r.yaml:4: unknown key 'data.train[0].paht'; did you mean path?",
        ),
        (MINIMAL + "data:\n  train:\n    - weight: 1\n", "r.yaml:4: data.train[0] has no path"),
        (MINIMAL + "data: {train: ''}\n", "r.yaml:2: data.train.path must be text (got '')"),
        (MINIMAL + "name: a/b\n", "r.yaml:2: name must be usable as a folder's name (got 'a/b')"),
        (MINIMAL + 'output: "a\\0"\n', "r.yaml:2: output must not contain a NUL character"),
        (MINIMAL + "model: {ffn: moo}\n", "r.yaml:2: model.ffn must be one of swiglu, none (got 'moo')"),
    ],
)
def test_wrong_files_name_file_and_line(write, text, message):
    file = write(text)
    found = errors(file)
    assert found and found[0].startswith(message), found
    with pytest.raises(RecipeError) as caught:
        load(file)
    assert caught.value.exit_code == 2


def test_all_errors_at_once(write):
    found = errors(write("train: {steps: 0}\noptim:\n  lr: x\n  lrr: 1\nfoo: 1\n"))
    assert {re.match(r"r\.yaml:(\d+): ", m)[1] for m in found} == {"1", "3", "4", "5"}
    with pytest.raises(RecipeError) as caught:
        load(write("train: {steps: 0}\nfoo: 1\n"))
    assert "1 more" in caught.value.hint


def test_an_error_later_on_names_the_key(write):
    r = load(write("train: {steps: 1}\noptim:\n  lr: 1\n"))
    assert re.search(r"r\.yaml:3: optim\.lr is odd", r.error("optim.lr", "is odd").message)
    assert r.error("optim.eps", "is odd").message == "optim.eps is odd"


def test_korean_bom_and_crlf(write):
    r = load(write("\ufeffdescription: 한국어 조리법\r\ntrain: {steps: 1}\r\n".encode(), "조리법.yaml"))
    assert r.description == "한국어 조리법" and r.output == "runs/조리법"


def test_names_and_files(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(MINIMAL, "proj/recipe.yaml")
    assert load(file).name == "proj", "a file called recipe.yaml is named by its folder"
    for name, message, hint in (
        ("a100-2c", "no recipe 'a100-2c'", "did you mean a100-2b"),
        ("proj", "proj: is a folder, not a recipe", "try proj/recipe.yaml"),
        ("nothing.yaml", "no recipe 'nothing.yaml'", "recipes: "),
        ("x" * 5000, "no recipe 'xxxx", None),
        ("a\0b", "no recipe ", None),
    ):
        with pytest.raises(RecipeError) as caught:
            load(name)
        assert caught.value.message.startswith(message)
        assert hint is None or hint in caught.value.hint
    write(MINIMAL, "cpu-tiny.yaml")
    assert load("cpu-tiny").model.hidden_size, "a packaged name is the packaged recipe whatever lies about"
    assert load("cpu-tiny.yaml").model.hidden_size is None


def _bombs() -> dict[str, str]:
    nine = "\n".join(
        f"{c}: &{c} [{', '.join('*' + p for _ in range(9))}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    )
    return {
        "aliases": "a: &a [lol, lol]\n" + nine,
        "self": "a: &a [*a]\n",
        "self mapping": "a: &a {b: *a}\n",
        "deep": "[" * 200_000,
        "deep block": "".join(" " * n + "- \n" for n in range(300)),
        "long": "a: " + "x" * 300_000,
        "anchors": "\n".join(f"k{n}: &a{n} {{}}" for n in range(9000))
        + "\n"
        + "z: ["
        + ", ".join(["*a1"] * 9000)
        + "]",
        "wide": "\n".join(f"k{n}: {n}" for n in range(19_000)),
        "keys": "{" + ",".join(f"? {n}" for n in range(20_000)) + "}",
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize("kind", _bombs())
def test_bombs_are_refused_in_5_seconds_and_256_mb(write, kind):
    file = write(_bombs()[kind])
    # VmHWM and not ru_maxrss: a child begins with the peak of the process that forked it.
    code = """
import sys, time
from moai_core.recipe import check
began = time.perf_counter()
recipe, errors = check(sys.argv[1])
seconds = time.perf_counter() - began
assert recipe is None and errors and all(len(e.message) < 5000 for e in errors)
print(seconds, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seconds, kilobytes = (float(x) for x in done.stdout.split())
    assert seconds <= 5 and kilobytes <= 256 * 1024


def test_extends_bombs(write):
    for n in range(9):
        write(f"extends: [{', '.join([f'b{n + 1}'] * 9)}]\n", f"b{n}.yaml")
    file = write("train: {steps: 1}\n", "b9.yaml")
    began = time.perf_counter()
    assert re.search(r"b\d\.yaml:1: extends reaches more than 64 files", errors(file.parent / "b0.yaml")[0])
    assert time.perf_counter() - began < 5


# ---- fuzzing

_SCALARS = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=12),
    st.sampled_from(
        [
            "1e-4",
            "~",
            "auto",
            "adamw",
            "hf://a",
            "",
            "0x1F",
            "1:30",
            "!!int x",
            "*a",
            "&a b",
            "%",
            "\t",
            "'",
            '"',
            "{",
            "[",
        ]
    ),
)
_KEYS = st.one_of(
    st.sampled_from([key.rpartition(".")[2] for key, *_ in recipes.schema()] + ["extends", "path", "weight"]),
    st.text(max_size=6),
)
_TREES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_KEYS, inner, max_size=4)),
    max_leaves=12,
)


def _survives(file: Path, data: bytes, *overrides: str) -> bool:
    """Valid, or only RecipeErrors that name the file (with a line) or the override; True when valid."""
    file.write_bytes(data)
    recipe, found = recipes.check(file, overrides)
    assert (recipe is None) == bool(found)
    for error in found:
        assert type(error) is RecipeError
        named = re.match(rf"{re.escape(str(file))}:\d+: |recipes/[\w/-]+\.yaml:\d+: |override '", error.message)
        assert named or error.message.startswith("override "), error.message
        error.message.encode()
    if recipe is not None:
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load(file) == recipe
    return recipe is not None


def _mutated(seed: int) -> bytes:
    """A packaged recipe with a few bytes or lines changed: mostly still YAML, so that deep code is reached."""
    rng = random.Random(seed)
    sources = sorted(paths.RECIPES.glob("*.yaml")) + sorted(paths.RECIPES.glob("base/*.yaml"))
    data = bytearray(rng.choice(sources).read_bytes())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            data[at:at] = bytes([rng.randrange(256)])
        elif kind == 1 and at < len(data):
            data[at] = rng.choice(b" :,-[]{}#&*!|>'\"%@`\t\n0123456789eE.~_x\x00\x80\xff")
        elif kind == 2:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 3:
            lines = data.split(b"\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            data = bytearray(b"\n".join(lines))
        else:
            data[at:at] = rng.choice(
                [b"\n", b": ", b" - ", b"extends: base/cpu\n", b"&a ", b"*a ", b"!!x ", b"\xed\x95\x9c", b"? ", b"<<: "]
            )
    return bytes(data)


def _fuzz_trees(examples: int, folder: Path, **more) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, **more)
    @given(tree=st.dictionaries(_KEYS, _TREES, max_size=6), flow=st.booleans())
    def run(tree, flow):
        text = yaml.safe_dump({"train": {"steps": 3}, **tree}, allow_unicode=True, default_flow_style=flow)
        _survives(folder / "f.yaml", text.encode("utf-8", "surrogatepass"))

    run()


def _fuzz_overrides(examples: int, folder: Path, **more) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, **more)
    @given(key=st.sampled_from([key for key, *_ in recipes.schema()]), value=_SCALARS, text=st.text(max_size=20))
    def run(key, value, text):
        _survives(folder / "f.yaml", MINIMAL.encode(), f"{key}={value}", text)

    run()


def test_a_file_of_empty_sections_is_named_with_its_line(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("\ntrain: {}\n")
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(file))}:2: train.steps or train.epochs must be set$"):
        load(file)


def test_a_name_with_a_nul_is_named_at_its_own_place():
    with pytest.raises(RecipeError, match=r"^override 'name=.*name must be usable as a folder's name"):
        load("cpu-tiny", ["name=\0"])


def test_fuzz(tmp_path):
    """About 700 hostile recipes: valid, or RecipeError with file:line."""
    _fuzz_trees(200, tmp_path)
    _fuzz_overrides(200, tmp_path)
    valid = sum(_survives(tmp_path / "f.yaml", _mutated(seed)) for seed in range(300))
    assert 10 < valid < 290, "the mutations should leave some recipes valid and break others"


@pytest.mark.slow
def test_fuzz_2000(tmp_path):
    _fuzz_trees(2000, tmp_path, derandomize=False)
    _fuzz_overrides(2000, tmp_path, derandomize=False)
    start = random.SystemRandom().randrange(1 << 40)
    for seed in range(start, start + 2000):
        try:
            _survives(tmp_path / "f.yaml", _mutated(seed))
        except BaseException as exc:
            raise AssertionError(f"mutation seed {seed}") from exc


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("cpu-tiny").optim.lr = 3
