"""Every format with good and bad input; a bad line names file, line and reason, and nothing else ever escapes the
reader.
"""

import gzip
import json
import os
import sys

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moai_core.data import formats
from moai_core.data.read import Problems, find_files, read_documents
from moai_core.errors import DataError, UsageError

LINES = [{"text": "첫째 줄"}, {"text": "二行目"}, {"text": "third"}]
JSONL = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()


def write(folder, name, data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def load(path, **options):
    problems = Problems(options.pop("on_error", "stop"))
    return list(read_documents(find_files(path)[0], problems=problems, **options)), problems


def texts(path, **options):
    """The text of each document, its parts joined."""
    made = []
    for document in load(path, **options)[0]:
        text = "".join(segment.text for segment in document.segments)
        if document.first:
            made.append(text)
        else:
            made[-1] += text
    return made


def refuses(path, *words, **options):
    with pytest.raises(DataError) as caught:
        load(path, **options)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message


# ---- good input ----------------------------------------------------------------------------------------------------


def zst(data):
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", JSONL),
        ("a b 글.JSONL", JSONL),
        ("a.jsonl.gz", gzip.compress(JSONL)),
        ("two members.jsonl.gz", gzip.compress(JSONL[:20]) + gzip.compress(JSONL[20:])),
        ("a.jsonl.zst", zst(JSONL)),
        ("two frames.jsonl.zst", zst(JSONL[:20]) + zst(JSONL[20:])),
        ("bom.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("crlf.jsonl", JSONL.replace(b"\n", b"\r\n")),
        ("blank lines.jsonl", JSONL.replace(b"\n", b"\n\n  \n")),
        ("no last newline.jsonl", JSONL.rstrip()),
        ("lines.json", JSONL),
        ("array.json", json.dumps(LINES, ensure_ascii=False).encode()),
        ("pretty.json", json.dumps(LINES, indent=2).encode()),
        ("array.json.gz", gzip.compress(json.dumps(LINES).encode())),
        ("spaced.json", b"\xef\xbb\xbf \n\t" + json.dumps(LINES).encode() + b"\n\n"),
    ],
)
def test_records(tmp_path, name, data):
    assert texts(write(tmp_path, name, data)) == [line["text"] for line in LINES]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [line["text"] for line in LINES], "other": [1, 2, 3]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == [line["text"] for line in LINES]
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "b.parquet")
    assert [s.role for s in load(tmp_path / "b.parquet")[0][0].segments] == ["user", "assistant"]


@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.txt.gz", "d.md.zst"])
def test_a_text_file_is_one_document(tmp_path, name):
    text = "첫 문단.\n\n둘째 문단.\n\n\n# 제목\n끝"
    data = text.encode()
    data = gzip.compress(data) if name.endswith("gz") else zst(data) if name.endswith("zst") else data
    assert texts(write(tmp_path, name, data)) == [text]


def test_endoftext_lines_separate_text_documents(tmp_path):
    path = write(
        tmp_path, "a.txt", "one\ntwo\n<|endoftext|>\r\nthree <|endoftext|> inline\n<|endoftext|>\n\n<|endoftext|>\nfour"
    )
    assert texts(path) == ["one\ntwo\n", "three <|endoftext|> inline\n", "four"]
    assert [d.line for d in load(path)[0]] == [1, 4, 8]


def test_long_texts_come_in_parts_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "TEXT_PART", 1000)
    lines = [f"{i} 문장입니다. 吾輩は猫。\n" + "\n" * (i % 5) for i in range(3000)]
    text = "".join(lines) + "x" * 100_000 + "가" * 30_000
    documents = load(write(tmp_path, "long.txt", text))[0]
    assert len(documents) > 50
    assert [d.first for d in documents] == [True] + [False] * (len(documents) - 1)
    assert [d.last for d in documents] == [False] * (len(documents) - 1) + [True]
    assert "".join(d.segments[0].text for d in documents) == text


def test_cutting_a_text_does_not_change_its_tokens(tmp_path, monkeypatch, tokenizer):
    from moai_core.data.tokenize import Encoder

    text = "".join(f"line {i}: 상태는\n" + "\n" * (i % 3) + "  indented 吾輩は\n" for i in range(800))
    path = write(tmp_path, "a.txt", text)
    encoder = Encoder(tokenizer)
    whole = [int(i) for e in encoder.encode(load(path)[0]) for i in e.ids]
    monkeypatch.setattr(formats, "TEXT_PART", 500)
    parts = load(path)[0]
    assert len(parts) > 20
    assert [int(i) for e in encoder.encode(parts) for i in e.ids] == whole


def test_folders_globs_and_what_is_passed_over(tmp_path):
    write(tmp_path, "d/b.jsonl", JSONL)
    write(tmp_path, "d/a.txt", "alpha")
    write(tmp_path, "d/deep er/c.md", "gamma")
    write(tmp_path, "d/.hidden/x.txt", "no")
    write(tmp_path, "d/photo.png", b"\x89PNG")
    files, passed = find_files(tmp_path / "d")
    assert [f.name for f in files] == ["a.txt", "b.jsonl", "c.md"]
    assert [f.name for f in passed] == ["photo.png"]
    assert [f.name for f in find_files(f"{tmp_path}/d/**/*.md")[0]] == ["c.md"]
    assert [f.name for f in find_files(f"{tmp_path}/d/*.[jt]*")[0]] == ["a.txt", "b.jsonl"]
    assert [f.name for f in find_files(f"{tmp_path}/d/**/*")[0]] == ["a.txt", "b.jsonl", "c.md"]


def test_links_are_followed_and_loops_cut(tmp_path):
    write(tmp_path, "d/a.txt", "alpha")
    write(tmp_path, "elsewhere/b.txt", "beta")
    os.symlink(tmp_path / "elsewhere", tmp_path / "d" / "link")
    os.symlink(tmp_path / "d", tmp_path / "d" / "loop")
    assert [f.name for f in find_files(tmp_path / "d")[0]] == ["a.txt", "b.txt"]
    assert [f.name for f in find_files(f"{tmp_path}/d/**/*.txt")[0]] == ["a.txt", "b.txt"]


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_missing_empty_and_foreign(tmp_path):
    refuses(tmp_path / "missing.jsonl", "missing.jsonl", "no such file")
    refuses(tmp_path / "no" / "*.txt", "no such folder")
    refuses(write(tmp_path, "a.docx", b"PK"), "ending '.docx'")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "no files")
    write(tmp_path, "pictures/a.png", b"x")
    refuses(tmp_path / "pictures", "1 file, none of them readable")
    refuses(f"{tmp_path}/*.nothing", "no files")
    with pytest.raises(UsageError, match="unknown kind of records 'csv'"):
        load(write(tmp_path, "a.jsonl", JSONL), format="csv")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "a"', "not valid JSON: Expecting ',' delimiter (column 13)"),
        (b"{'text': 1}", "not valid JSON"),
        (b"hello", "not valid JSON: Expecting value (column 1)"),
        (b"[1, 2]", "expected a JSON object, got an array"),
        (b"3", "expected a JSON object, got a number"),
        (b"null", "expected a JSON object, got null"),
        (b'{"text": 3}', "'text' must be a string, got a number"),
        (b'{"text": null}', "'text' must be a string, got null"),
        (b'{"txet": "a"}', "key 'text' is missing"),
        (b'{"text": "\xff"}', "byte 33 (0xff) is not valid UTF-8"),
        (b'{"text": "a\x00"}', "byte 34 is NUL: a binary file?"),
        (b'{"text": "\\ud800"}', "half a surrogate pair (\\ud800)"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not usable JSON"),
    ],
)
def test_a_bad_line(tmp_path, line, why):
    path = write(tmp_path, "data.jsonl", JSONL.split(b"\n")[0] + b"\n" + line + b"\n" + JSONL)
    refuses(path, f"{path}:2: ", why)
    documents, problems = load(path, on_error="skip")
    assert len(documents) == 4
    assert problems.skipped == 1
    assert problems.examples[0].startswith(f"{path}:2: ")


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": []}, "'messages' must be a list of messages, got an empty list"),
        ({"messages": "hi"}, "must be a list of messages, got a string"),
        ({"messages": [1]}, "messages[1] must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[1] has no 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "must be a string, got null"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[1] has an unknown role 'king'"),
        ({"messages": [{"role": 7, "content": "x"}]}, "unknown role a number"),
        ({"messages": [CHAT[0], CHAT[0], CHAT[1]]}, "messages[2] is a second 'user' message in a row"),
        ({"messages": [*CHAT, CHAT[1]]}, "messages[3] is a second 'assistant' message in a row"),
        ({"messages": [*CHAT, {"role": "system", "content": "x"}]}, "messages[3] is a system message; only the first"),
        ({"messages": [CHAT[0]]}, "no assistant message"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "messages[2] (assistant) is empty"),
        ({"messages": [CHAT[0], {"role": "tool", "content": "x"}]}, "follows no assistant message"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [1]}]}, "tool calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part that is not text (image_url)"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role 'alien'"),
        ({"instruction": 1, "output": "x"}, "'instruction' must be a string"),
        ({"instruction": "", "output": "x"}, "(user) is empty"),
        ({"instruction": "x", "input": 0, "output": "x"}, "'input' must be a string"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        ({"prompt": "x", "completion": ["y"]}, "'completion' must be a string, got an array"),
        ({"question": "x", "answer": "y"}, "unknown kind of record (keys: 'question', 'answer')"),
        ({}, "unknown kind of record (keys: no keys)"),
    ],
)
def test_a_bad_record(tmp_path, record, why):
    path = write(tmp_path, "data.jsonl", json.dumps(record))
    refuses(path, f"{path}:1: ", why)


@pytest.mark.parametrize(
    ("record", "segments"),
    [
        ({"messages": CHAT}, [("q", False, "user"), ("a", True, "assistant")]),
        (
            {"messages": [{"role": "system", "content": "s"}, *CHAT]},
            [("s", False, "system"), ("q", False, "user"), ("a", True, "assistant")],
        ),
        ({"messages": [{"role": "system", "content": ""}, *CHAT]}, [("q", False, "user"), ("a", True, "assistant")]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, CHAT[1]]},
            [("q", False, "user"), ("a", True, "assistant")],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [("q", False, "user"), ("a", True, "assistant")],
        ),
        ({"instruction": "i", "input": "x", "output": "o"}, [("i\n\nx", False, "user"), ("o", True, "assistant")]),
        ({"instruction": "i", "input": None, "output": "o"}, [("i", False, "user"), ("o", True, "assistant")]),
        ({"prompt": "p", "completion": "c"}, [("p", False, None), ("c", True, None)]),
        ({"prompt": [CHAT[0]], "completion": [CHAT[1]]}, [("q", False, "user"), ("a", True, "assistant")]),
        ({"text": "t", "messages": CHAT}, [("q", False, "user"), ("a", True, "assistant")]),
        ({"text": "t", "id": 3}, [("t", True, None)]),
    ],
)
def test_a_good_record(tmp_path, record, segments):
    path = write(tmp_path, "data.jsonl", json.dumps(record))
    assert [tuple(s) for s in load(path)[0][0].segments] == segments


def test_format_overrides_detection(tmp_path):
    path = write(tmp_path, "data.jsonl", json.dumps({"text": "t", "messages": CHAT}))
    assert load(path, format="text")[0][0].segments[0].text == "t"
    assert load(path, format="openai")[0][0].segments[0].role == "user"
    refuses(path, "key 'instruction' is missing", format="alpaca")


def test_empty_texts_are_counted_not_errors(tmp_path):
    documents, problems = load(write(tmp_path, "a.jsonl", '{"text": ""}\n{"text": "x"}\n'))
    assert len(documents) == 1
    assert (problems.empty, problems.skipped) == (1, 0)


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.jsonl.gz", gzip.compress(JSONL)[:-9], "truncated gzip file"),
        ("b.jsonl.gz", b"not gzip at all", "damaged gzip file"),
        ("c.jsonl.zst", zst(JSONL)[:-3], "truncated zstd file"),
        ("d.jsonl.zst", b"not zstd at all.", "damaged zstd file"),
        ("e.parquet", b"PAR1 nonsense PAR1", "damaged parquet file"),
        ("f.parquet", b"", "damaged parquet file"),
        ("g.json", b'[{"text": "a"},\n {"text": "b"}', "g.json:2: the array ends early"),
        ("h.json", b'[{"text": "a"},\n\n {"text": b}]', "h.json:3: not valid JSON"),
        ("i.json", b'[{"text": "a"}\n {"text": "b"}]', "i.json:2: expected a comma or ]"),
        ("j.json", b'[{"text": "a"}] more', "j.json:1: text after the end"),
        ("k.json", b'[\n{"text": "\xff"}]', "k.json:2: byte 0xff is not valid UTF-8"),
        ("l.json", b"[" * 100_000, "l.json:1: not valid JSON: nested too deep"),
        ("m.json", b'{"text":\n "pretty printed"}', "m.json:1: not valid JSON"),
        ("n.jsonl", "한글".encode("utf-16"), "UTF-16 byte order mark"),
        ("o.txt", b"good\nbad \xff line", "o.txt:2: byte 9 (0xff) is not valid UTF-8"),
        ("bom.txt", b"\xef\xbb\xbfgood\nbad \xff", "bom.txt:2: byte 12 (0xff)"),
        ("p.txt", b"good\n\nb\x00", "p.txt:3: byte 7 is NUL: a binary file?"),
        ("q.txt", "한글".encode("cp949"), "q.txt:1: byte 0"),
    ],
)
def test_damage(tmp_path, name, data, why):
    refuses(write(tmp_path, name, data), name, why)


def test_damage_of_a_container_is_no_bad_line(tmp_path):
    refuses(write(tmp_path, "a.jsonl.gz", gzip.compress(JSONL)[:-9]), "truncated", on_error="skip")


def test_a_bad_line_of_text_can_be_skipped(tmp_path):
    documents, problems = load(write(tmp_path, "a.txt", b"one\nb\xff\ntwo\n"), on_error="skip")
    assert documents[0].segments[0].text == "one\ntwo\n"
    assert problems.skipped == 1


def test_a_parquet_without_a_known_column(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    refuses(tmp_path / "a.parquet", "columns: body")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    refuses(tmp_path / "b.parquet", "b.parquet:2: 'text' must be a string, got null")


def test_huge_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_RECORD", 1 << 20)
    refuses(
        write(tmp_path, "a.jsonl", JSONL + b'{"text": "' + b"x" * (3 << 20)), "a.jsonl:4: the line is longer than 1 MiB"
    )
    assert len(texts(write(tmp_path, "a.txt", b"x" * (9 << 20)))[0]) == 9 << 20
    refuses(write(tmp_path, "a.json", b'[{"text": "' + b"x" * (4 << 20)), "not valid JSON")


def test_a_skipped_array_element_is_counted(tmp_path):
    documents, problems = load(
        write(tmp_path, "a.json", '[{"text": "a"},\n{"text": 3},\n{"text": "c"}]'), on_error="skip"
    )
    assert (len(documents), problems.skipped) == (2, 1)
    assert "a.json:2: " in problems.examples[0]


def test_no_permission(tmp_path):
    from moai_core.errors import StorageError

    path = write(tmp_path, "a.txt", "x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("running as root: permissions don't bind")
    with pytest.raises(StorageError):
        load(path)


# ---- fuzz ----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=8), c, max_size=4),
    max_leaves=12,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "x"]) | JSON
TURN = st.fixed_dictionaries(
    {},
    optional={"role": ROLES, "content": st.text(max_size=9) | JSON, "from": ROLES, "value": st.text(max_size=9) | JSON},
)
KEYS = ["text", "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system"]
RECORD = st.dictionaries(st.sampled_from(KEYS), st.text(max_size=9) | st.lists(TURN, max_size=4) | JSON, max_size=5)
LINE = st.one_of(
    (RECORD | JSON).map(lambda v: json.dumps(v, ensure_ascii=True).encode()),
    st.tuples(RECORD.map(lambda v: json.dumps(v).encode()), st.integers(0, 60), st.binary(max_size=3)).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]
    ),
    st.binary(max_size=40),
)


def fuzz(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "f.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        documents, _ = load(path)
        for document in documents:
            assert all(isinstance(s.text, str) and s.text.encode() for s in document.segments)
    except DataError as exc:
        assert exc.message.startswith(f"{path}:")
        assert exc.message[len(str(path)) + 1 :].split(":")[0].isdigit()
    documents, problems = (
        load(path, on_error="skip")
        if not b"\n".join(lines).startswith((b"\xff\xfe", b"\xfe\xff"))
        else ([], Problems())
    )
    assert len(documents) + problems.skipped + problems.empty <= b"\n".join(lines).count(b"\n") + 1
    path.unlink()


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(LINE, min_size=1, max_size=4))
def test_fuzzed_jsonl_is_valid_or_names_its_line(tmp_path_factory, lines):
    fuzz(tmp_path_factory, lines)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False)
@given(st.lists(LINE, min_size=1, max_size=6))
def test_fuzzed_jsonl_is_valid_or_names_its_line_slow(tmp_path_factory, lines):
    fuzz(tmp_path_factory, lines)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.binary(max_size=200), st.sampled_from(["f.json", "f.jsonl.gz", "f.jsonl.zst", "f.parquet", "f.txt", "f.json.gz"])
)
def test_fuzzed_bytes_never_escape_as_anything_else(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(data)
    try:
        load(path)
    except DataError as exc:
        assert str(path) in exc.message
    path.unlink()


def test_reading_does_not_import_torch():
    import subprocess

    code = "import sys, moai_core.data.read; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
