"""The numbers behind a mix against plain Python: Jaccard similarity, windows, counts of characters, cleaning."""

import random
import unicodedata

import numpy as np
import pytest

from moai_core.data.formats import read_records
from moai_core.data.mix import kernels as k
from moai_core.data.mix import text as t
from moai_core.data.mix.near import Windows, duplicates
from moai_core.data.records import Problems
from moai_core.errors import DataError


def fold(text):
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if unicodedata.category(c)[0] in "LMN")


def shingles(text, size):
    folded = fold(text)
    return {folded[i : i + size] for i in range(len(folded) - size + 1)}


def english(draw, words):
    return " ".join("".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5)) for _ in range(words))


def chinese(draw, count):
    return "".join(chr(draw.randrange(0x4E00, 0x5E00)) for _ in range(count))


@pytest.mark.parametrize(("make", "size", "unit"), [(english, 8, 5), (chinese, 4, 1)])
def test_signatures_estimate_the_jaccard_similarity(make, size, unit):
    draw = random.Random(1)
    for changed in (0.0, 0.02, 0.05, 0.2, 1.0):
        first = make(draw, 400)
        kept = int(len(first) * (1 - changed))
        second = first[:kept] + make(draw, 400)[kept:]
        a, b = shingles(first, size), shingles(second, size)
        signs, hashes, counts = t.signatures([first, second, "，" + first.upper() + "!"])
        estimate = float((signs[0] == signs[1]).mean())
        assert abs(estimate - len(a & b) / len(a | b)) < 0.13, changed
        assert (signs[0] == signs[2]).all() and hashes[0] == hashes[2]
        assert counts[0] == len(fold(first)) - size + 1
    sparse, _, counts = t.signatures(["one short line here", "one short line here!", "quite another line", "hi"])
    assert counts.tolist() == [9, 9, 9, 0]
    assert (sparse[0] == sparse[1]).all() and (sparse[0] == sparse[2]).mean() < 0.3


def test_near_duplicates_like_brute_force():
    draw = random.Random(5)
    units = [english(draw, 60) for _ in range(300)]
    for n in range(0, 100, 5):
        words = units[n].split()
        words[draw.randrange(60)] = "other"
        units[n + 150] = " ".join(words)
    signs, _, _ = t.signatures(units)
    gone = duplicates(signs, np.arange(300), np.full(300, 0.6, np.float32), lambda band: None)
    sets = [shingles(unit, 8) for unit in units]
    expected = np.zeros(300, bool)
    for later in range(300):
        for earlier in range(later):
            if not expected[earlier] and len(sets[later] & sets[earlier]) >= 0.6 * len(sets[later] | sets[earlier]):
                expected[later] = True
    assert expected.sum() == 20 and (gone == expected).all()
    strict = duplicates(signs, np.arange(300), np.ones(300, np.float32), lambda band: None)
    assert not strict.any()


def test_windows_like_brute_force():
    draw = random.Random(9)
    held = [english(draw, 12) for _ in range(50)] + ["짧은 문장", chinese(draw, 40)]
    windows = Windows([held[:30], held[30:]])
    tests = [english(draw, 12) for _ in range(20)]
    tests += [
        held[3],
        held[4].upper() + "?!",
        held[5][: len(held[5]) // 3] + english(draw, 9),
        held[51][:30],
        chinese(draw, 30),
    ]
    tests += ["짧은 문장!", "짧은 문장 뒤에 다른 말", english(draw, 300) + held[7] * 7 + english(draw, 300)]
    keys = {w for line in held for size in (12, 6) for w in shingles(line, size) if len(w) == size}
    for text, (near,) in zip(tests, (windows.near([text]) for text in tests), strict=True):
        size = 6 if any(unicodedata.category(c) == "Lo" for c in text) else 12
        every = [fold(text)[i : i + size] for i in range(len(fold(text)) - size + 1)]
        if len(every) < 8:
            expected = any(fold(text) == fold(line) for line in held)
        else:
            # A long line is judged in segments: here the copy fills one.
            expected = len(every) > 1000 or sum(w in keys for w in every) >= 0.5 * len(every)
        assert near[0] == expected, text[:60]
    marks = windows.near(["a line of its own here\n" + held[9], "", held[2]])
    assert [m.tolist() for m in marks] == [[False, True], [False], [True]]


def test_characters_are_counted_by_kind():
    lines = ["Hello, World 12.", "안녕 세상", "漢字とかな。", "", "  ", "ﬁx ①２", "…", "said “yes.”"]
    points, ends = t.points_of(["\n".join(lines)])
    counts, hashes = np.zeros((len(lines), 9), np.int32), np.zeros(len(lines), np.uint64)
    k.measure(points, *t.tables(), counts, hashes)
    assert ends.tolist() == [len("\n".join(lines)) + 1]
    for line, row in zip(lines, counts, strict=True):
        solid = [c for c in line if not c.isspace()]
        assert row[k.CHARS] == len(solid)
        assert row[k.LETTERS] == sum(c.isalpha() for c in solid)
        assert row[k.DIGITS] == sum(unicodedata.category(c)[0] == "N" for c in solid)
        assert row[k.ENDS] == (solid != [] and (solid[-1] in ".!?…。" or solid[-1] in "”"))
    assert (
        counts[1, k.HANGULS] == 4 and counts[2, k.HANS] == 2 and counts[2, k.KANAS] == 3 and counts[0, k.LATINS] == 10
    )
    assert len(set(hashes[:3].tolist())) == 3


def test_cleaning():
    assert t.clean("a\u200bb\x00c\ufeff\xad d\xa0e  \r\n\n\n\nf\t\n") == "abc d e\n\nf"
    assert t.clean(unicodedata.normalize("NFD", "한국어 café")) == "한국어 café"
    assert t.clean("１²ｶﾅ“” ½") == "１²ｶﾅ“” ½", "NFC changes no compatibility forms"
    parts = t.sections("One two three. " * 20, 100)
    assert "".join(parts).replace(" ", "") == ("One two three. " * 20).replace(" ", "")
    assert max(map(len, parts)) <= 100 and all(part.endswith(".") for part in parts)
    assert t.sections("x" * 250, 100) == ["x" * 100, "x" * 100, "x" * 50]


RULES = [
    ({"min_chars": 10}, "short", "kurz", "long enough"),
    ({"max_chars": 10}, "long", "far too long", "short"),
    ({"min_letters": 0.6}, "letters", "a ==== 1 ;;", "letters, mostly"),
    ({"max_digits": 0.2}, "digits", "12345 x", "number 1"),
    ({"min_script": 0.5}, "script", "한국어 문장 ok", "an English line"),
    ({"min_sentences": 0.5}, "sentences", "a heading\nand one more", "A sentence.\nhead"),
    ({"max_repeats": 0.3}, "repeats", "same line\nsame line\nsame line\nother", "a\nb\nc\nd"),
    ({}, "encoding", "broken \ufffd text", "fine"),
]


@pytest.mark.parametrize(("rules", "reason", "bad", "good"), RULES, ids=[rule[1] for rule in RULES])
def test_each_rule_says_why(rules, reason, bad, good):
    verdicts = t.Judge(t.Rules(**rules), "en").judge([bad, good], cut=True)
    assert [v.reason for v in verdicts] == [reason, None] and verdicts[1].text == good


def test_lines_are_cut():
    rules = t.Rules(line_min_chars=3, line_min_letters=0.5, line_sentences=True, repeated_lines=2)
    boiler = "This line stands on every page of it."
    pages = [f"{boiler}\nPage number {word} says this.\n1.\n%%%% .\nno end" for word in ("one", "two", "three")]
    judge = t.Judge(rules, "en")
    first = judge.judge(pages[:1], cut=True) + judge.judge(pages[1:], cut=True)
    assert [v.text for v in first] == [
        f"{boiler}\nPage number one says this.",
        f"{boiler}\nPage number two says this.",
        "Page number three says this.",
    ]
    assert [v.cut for v in first] == [17, 17, 17 + len(boiler) + 1]
    assert t.Judge(rules, "en").judge(pages[:1], cut=False)[0].text == pages[0]


def test_csv_rows(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('\ufefftext,n\n"two\nlines, and ""quotes""",1\n\nlast,2\n', encoding="utf-8")
    rows = list(read_records(file, ".csv", Problems()))
    assert rows == [
        (str(file), 2, {"text": 'two\nlines, and "quotes"', "n": "1"}),
        (str(file), 5, {"text": "last", "n": "2"}),
    ]
    file.write_text("text,n\nonly one\nx,2\n")
    with pytest.raises(DataError, match=r"a\.csv:2: 1 fields, the first row has 2"):
        list(read_records(file, ".csv", Problems()))
    problems = Problems("skip")
    assert [row for *_, row in read_records(file, ".csv", problems)] == [
        {"text": "x", "n": "2"}
    ] and problems.skipped == 1
    file.write_text('text\n"never closed\n')
    with pytest.raises(DataError, match=r"a\.csv:2: not valid CSV"):
        list(read_records(file, ".csv", Problems()))
    (tmp_path / "b.tsv").write_text("text\tn\na,b\t3\n")
    assert [row for *_, row in read_records(tmp_path / "b.tsv", ".tsv", Problems())] == [{"text": "a,b", "n": "3"}]
