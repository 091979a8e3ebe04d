"""`moai data build|show|check` from the command line."""

import json

RECIPE = """
description: two lines of each
valid: 0.3
sources:
  - {name: poems, path: poems.txt, lang: ko, split: blocks, licence: CC0-1.0, origin: "https://example.org", attribution: 누군가}
  - {name: code, path: "*.md", lang: code, licence: MIT, origin: here, weight: 2}
"""


def write(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    poems = ["하늘을 " + " ".join(chr(0xAC00 + n * 700 + m * 13) * 2 for m in range(20)) for n in range(12)]
    (tmp_path / "poems.txt").write_text("\n\n".join(poems), encoding="utf-8")
    (tmp_path / "a.md").write_text("# A heading\n\nand a text\x1b[31m below it\n")


def test_a_mix_is_built_shown_and_checked(moai, tmp_path):
    write(tmp_path)
    code, out, err = moai("data", "check", "r.yaml")
    assert code == 0 and "sources 2" in out and not err
    code, out, err = moai("data", "build", "r.yaml", "-o", "mix", "--json")
    made = json.loads(out)
    assert code == 0 and made["totals"]["kept"]["train"]["records"] + made["totals"]["kept"]["valid"]["records"] > 3
    assert json.loads(moai("data", "show", "mix", "--json")[1]) == made

    code, out, _ = moai("data", "show", "mix", "--tokenizer", "moai_tiny")
    assert code == 0 and "poems" in out and "tokens" in out and "valid" in out
    code, out, _ = moai("data", "show", "mix", "--samples", "1")
    assert code == 0 and "하늘을" in out and "A heading" in out
    assert set(json.loads(moai("data", "show", "mix", "--samples", "2", "--json")[1])) == {"poems", "code"}
    counted = json.loads(moai("data", "show", "mix", "--json", "--tokenizer", "moai_tiny")[1])["sources"]
    assert all(source["tokens"] > 10 for source in counted)

    code, out, err = moai("data", "check", "mix", "--json")
    assert code == 0 and json.loads(out)["valid"] and json.loads(out)["lines in training"] > 3
    code, _, err = moai("data", "build", "r.yaml", "-o", "mix")
    assert code == 2 and "mix: exists" in err and "--force" in err
    assert moai("data", "build", "r.yaml", "-o", "mix", "--force")[0] == 0


def test_what_is_wrong_is_one_line(moai, tmp_path):
    write(tmp_path)
    (tmp_path / "poems.txt").unlink()
    code, _, err = moai("data", "build", "r.yaml")
    assert code == 2 and "poems.txt: no such file" in err and not (tmp_path / "mix").exists()
    code, out, _ = moai("data", "check", "r.yaml", "--json")
    assert code == 2 and "r.yaml:5" in json.loads(out)["errors"][0]["message"]
    (tmp_path / "r.yaml").write_text(RECIPE.replace("licence: MIT", "license: MIT").replace("0.3", "3"))
    code, _, err = moai("data", "check", "r.yaml")
    assert code == 2 and "r.yaml:3: valid must be a number >= 0 and <= 1" in err and "did you mean licence?" in err
    for arguments, why in (
        (("build", "nowhere"), "no data recipe 'nowhere'"),
        (("show", "."), "no mix there"),
        (("show", "."), "mix.json is missing"),
        (("check", "."), "no mix there (mix.json is missing)"),
    ):
        code, _, err = moai("data", *arguments)
        assert code == 2 and why in err
    assert moai("data", "build", "r.yaml", "--level", "20")[0] == 2


def test_the_packaged_recipe_is_listed(moai):
    code, out, _ = moai("data", "show", "moai-30m")
    assert code == 0 and "tatoeba-en" in out and "CC-BY" in out
    assert len(json.loads(moai("data", "show", "moai-30m", "--json")[1])["sources"]) > 50
