"""YAML trees: numbers, lines, merging, --set paths, and text that reads back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.config.emit import yaml_inline
from sdxl_training.config.tree import DEFAULT, Origin, TreeError, merge, parse_yaml, put, tree_of, without

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]))
)
KEYS = st.text(alphabet="abcdefgh_", min_size=1, max_size=6)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3), max_leaves=8
    ),
    max_size=4,
)


def plain(text):
    return parse_yaml(text, "f").plain()


@given(TREES)
def test_emitted_yaml_reads_back_to_equal_values_of_equal_types(value):
    read = plain(yaml_inline(value))
    assert read == value
    assert repr(read) == repr(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("010", 10),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("off", "off"),
        ("2026-11-23", "2026-11-23"),
        ("true", True),
        ("~", None),
        ("", {}),
    ],
)
def test_scalars_mean_what_people_write(text, value):
    read = plain(text)
    assert (read, type(read)) == (value, type(value))


def test_every_value_knows_its_line():
    tree = parse_yaml("a: 1\nb:\n  c: [x,\n    y]\n  d:\n    - e: 2\n      f: 3\n", "my.yaml")
    lines = {path: tree.get(path.split(".")).origin.line for path in ("a", "b", "b.c", "b.c.1", "b.d.0", "b.d.0.f")}
    assert lines == {"a": 1, "b": 2, "b.c": 3, "b.c.1": 4, "b.d.0": 6, "b.d.0.f": 7}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3", 3, "a is given twice, first on line 1"),
        ("a:\n\tb: 1", 2, "not tabs"),
        ("a: [1,\nb: 2", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2", 2, "not valid YAML"),
        ("a: &x [*x]", 1, "contains itself"),
        ("a: *nothing", 1, "nothing"),
    ],
)
def test_broken_yaml_names_its_line(text, line, words):
    with pytest.raises(TreeError, match=words) as caught:
        parse_yaml(text, "f")
    assert caught.value.line == line


@given(TREES, TREES)
def test_merging_plain_mappings_is_a_recursive_update(base, over):
    def updated(below, above):
        if not isinstance(below, dict) or not isinstance(above, dict):
            return above
        return {**below, **{key: updated(below[key], value) if key in below else value for key, value in above.items()}}

    assert merge(tree_of(base, DEFAULT), tree_of(over, DEFAULT)).plain() == updated(base, over)


def test_another_type_replaces_the_family_and_the_same_type_does_not():
    base = tree_of({"family": {"type": "a", "x": 1}, "list": [1, 2]}, DEFAULT)
    over = Origin("over", 3)
    assert merge(base, tree_of({"family": {"type": "b"}}, over)).plain()["family"] == {"type": "b"}
    assert merge(base, tree_of({"family": {"type": "a", "y": 2}}, over)).plain()["family"] == {
        "type": "a",
        "x": 1,
        "y": 2,
    }
    merged = merge(base, tree_of({"family": {"x": 5}, "list": [3]}, over))
    assert merged.plain() == {"family": {"type": "a", "x": 5}, "list": [3]}
    assert merged.get(("family", "x")).origin == over
    assert merged.get(("family", "type")).origin == DEFAULT


def test_put_reaches_list_items_appends_and_refuses_gaps():
    tree = tree_of({"sources": [{"path": "a"}]}, DEFAULT)
    value = tree_of("b", Origin("--set"))
    assert put(tree, ("sources", "0", "path"), value).plain() == {"sources": [{"path": "b"}]}
    assert put(tree, ("sources", "1", "path"), value).plain() == {"sources": [{"path": "a"}, {"path": "b"}]}
    assert put(tree_of({}, DEFAULT), ("sources", "0", "path"), value).plain() == {"sources": [{"path": "b"}]}
    with pytest.raises(TreeError, match="no item 2"):
        put(tree, ("sources", "2", "path"), value)
    assert tree.plain() == {"sources": [{"path": "a"}]}, "trees are never changed in place"


def test_without_removes_only_what_is_named():
    tree = tree_of({"a": {"b": 1, "c": 2}, "d": [1, 2, 3]}, DEFAULT)
    assert without(tree, [("a", "b"), ("d", "1"), ("x",)]).plain() == {"a": {"c": 2}, "d": [1, 3]}
