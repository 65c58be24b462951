"""Categories of tags: who has the last word, what a table may look like, and that no tag is judged by its letters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdxl_training.config.tags import TagCategories
from sdxl_training.data.tag_categories import categories_of, read_categories
from sdxl_training.records import UserError

PREFIXES = TagCategories().prefixes


def category(tag: str, said: dict[str, str] | None = None, table: dict[str, str] | None = None) -> str:
    (found,) = categories_of([tag], said or {}, table or {}, PREFIXES)
    return found


def table_of(tmp_path: Path, name: str, text: str) -> dict[str, str]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_categories(path)


# --- who has the last word -------------------------------------------------------------------------------------------


def test_said_before_table_before_prefix_before_general():
    tag, said, table = "artist:somebody", {"artist:somebody": "said"}, {"artist:somebody": "table"}
    assert category(tag, said, table) == "said"
    assert category(tag, None, table) == "table"
    assert category(tag) == "artist"
    assert category("somebody") == "general"


@pytest.mark.parametrize(
    "tag", ["1girl", "black", "makeup", "like", "light", "2b", ":d", "re:zero", "12:00", "artist:"]
)
def test_no_tag_is_judged_by_its_letters(tag):
    """An earlier implementation called each tag with a digit, or with a last letter k or p, technical."""
    assert category(tag) == "general"


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("artist:somebody", "artist"),
        ("style: oil paint", "style"),
        ("meta :x", "meta"),
        ("character:re:zero", "character"),
    ],
)
def test_prefixes(tag, expected):
    assert category(tag) == expected


def test_prefixes_are_the_configured_ones():
    assert categories_of(["pose:sitting", "artist:x"], {}, {}, ["Pose"]) == ["pose", "general"]


@pytest.mark.parametrize("written", ["blue sky", "blue_sky", "Blue_Sky", " BLUE SKY "])
@pytest.mark.parametrize("tag", ["blue sky", "blue_sky"])
def test_underscores_and_capitals_make_no_other_tag(tag, written):
    assert category(tag, None, {written: "scene"}) == "scene"
    assert category(tag, {written: "said"}, {written: "scene"}) == "said"


def test_what_is_said_lies_over_a_table_that_writes_the_tag_otherwise():
    assert category("blue sky", {"blue sky": "said"}, {"blue_sky": "table"}) == "said"


# --- tables ----------------------------------------------------------------------------------------------------------

EXPECTED = {"1girl": "general", "hatsune_miku": "character", "sketch": "medium"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "1girl,0\nhatsune_miku,4\nsketch,medium\n"),
        ("a.csv", '1girl,0,4225150,"1girls,sole_female"\nhatsune_miku,4,100,\nsketch,medium,1,\n'),
        ("a.csv", "tag_id,name,category,count\n1,1girl,0,9\n2,hatsune_miku,4,8\n3,sketch,medium,7\n"),
        ("a.csv", "Category,Tag\n0,1girl\n\n4,hatsune_miku\nmedium,sketch\n"),
        ("a.csv", "﻿name,type\r\n1girl,general\r\nhatsune_miku, character \r\nsketch,medium\r\n"),
        ("A.TSV", "1girl\t0\nhatsune_miku\t4\nsketch\tmedium\n"),
        ("a.tsv", "tag_name\tcategory\n1girl\t0\nhatsune_miku\t4\nsketch\tmedium"),
        ("a.json", json.dumps({"1girl": 0, "hatsune_miku": "4", "sketch": " medium "})),
    ],
)
def test_each_form_of_a_table_says_the_same(tmp_path, name, text):
    assert table_of(tmp_path, name, text) == EXPECTED


def test_all_numbers_of_a_booru(tmp_path):
    text = "".join(f"tag{number},{number}\n" for number in (0, 1, 3, 4, 5, 9, 7))
    found = list(table_of(tmp_path, "a.csv", text).values())
    assert found == ["general", "artist", "copyright", "character", "meta", "rating", "7"]


def test_a_tag_with_a_comma_or_quotes_is_one_tag(tmp_path):
    assert table_of(tmp_path, "a.csv", '"a, b",x\n"""hi""",y\n') == {"a, b": "x", '"hi"': "y"}


def test_an_empty_table_says_nothing(tmp_path):
    assert table_of(tmp_path, "a.csv", "") == {}
    assert table_of(tmp_path, "b.json", "{}") == {}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "1girl,0", "must end in .csv, .tsv or .json"),
        ("a.json", "{1girl: 0}", "is no JSON"),
        ("a.json", "[1]", "must be an object from tag to category"),
        ("a.json", '{"1girl": [0]}', "tag 1girl: has no category"),
        ("a.json", '{"1girl": " "}', "tag 1girl: has no category"),
        ("a.json", '{"1girl": true}', "tag 1girl: has no category"),
        ("a.csv", "1girl,0\nsketch\n", "line 2: lacks the tag or its category"),
        ("a.csv", "1girl,0\nsketch,  \n", "line 2: has no category"),
        ("a.csv", "category,tag\ngeneral,1girl\n\n,x\ngeneral\n", "line 4: has no category"),
        ("a.csv", "category,tag\ngeneral,1girl\n\ngeneral\n", "line 4: lacks the tag or its category"),
        ("a.csv", "name,count\n1girl,5\n", "its first line names name, count; name the columns tag and category"),
        ("a.csv", '1girl,0\n"sketch,5\nother,5\n', "line 3: cannot be read"),
        ("a.csv", '"a"b,0\n', "line 1: cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_its_line(tmp_path, name, text, words):
    with pytest.raises(UserError) as caught:
        table_of(tmp_path, name, text)
    said = str(caught.value)
    assert words in said
    assert said.startswith(f"tag_weighting.categories.file = {tmp_path / name}")


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.csv: cannot be read \(No such file"):
        read_categories(tmp_path / "missing.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_categories(tmp_path)
    (tmp_path / "latin.csv").write_bytes("naïve,0".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 2\)"):
        read_categories(tmp_path / "latin.csv")
