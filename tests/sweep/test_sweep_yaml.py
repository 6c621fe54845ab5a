import pytest

from torchlamp.sweep.yaml_tree import Node, read_yaml


def read(tmp_path, text: str | bytes) -> Node:
    path = tmp_path / "s.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_yaml(path)


def test_values_and_lines(tmp_path):
    root = read(tmp_path, "a: 1\nb:\n  - x\n  - {c: null}\nd: *n\n".replace("*n", "2.5"))
    assert root.plain() == {"a": 1, "b": ["x", {"c": None}], "d": 2.5}
    assert [node.line for node in root.value["b"].value] == [3, 4]
    assert root.value["d"].line == 5


def test_anchors_are_followed(tmp_path):
    assert read(tmp_path, "a: &x [1, 2]\nb: *x\n").plain() == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2\nb: 3\n", "line 2, column 2: this is no YAML"),
        ("a: 1\n\tb: 2\n", "line 2, column 1: this is no YAML"),
        ("a: 'x\n", "line 1, column 4: this is no YAML"),
        ("a: *nothing\n", "line 1, column 4: this is no YAML (found undefined alias"),
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' appears twice, first in line 1"),
        ("", "line 1: the file is empty"),
        ("# nothing\n", "line 1: the file is empty"),
        (b"a: \xff\n", "line 1: this is no YAML"),
        ("a: \x07\n", "line 1: this is no YAML"),
        ("? [a, b]\n: 1\n", "line 1: a key must be a word"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: this is no YAML"),
        ("\n\na: &x [*x]\n", "line 3: nested more than 20 deep"),
        ("a: 2026-13-40\n", "line 1: '2026-13-40' can't be read"),
        ("a: !!python/object:os.system x\n", "line 1"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path, text, said):
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    assert f"s.yaml, {said}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_no_file(tmp_path):
    with pytest.raises(OSError, match=r"configuration '.*none\.yaml' can't be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(OSError, match="can't be read: Is a directory"):
        read_yaml(tmp_path)


def test_checks_of_values(tmp_path):
    root = read(tmp_path, "a: 1\nb: x\nc: []\nd: yes\ne: 1e-3\n").value
    assert root["a"].integer("a", 1) == 1
    assert root["e"].number("e", 0, 1) == 0.001
    assert [n.value for n in root["a"].items()] == [1]
    for name, check in (
        ("a", lambda n: n.string("a")),
        ("b", lambda n: n.integer("b", 0)),
        ("a", lambda n: n.integer("a", 2)),
        ("b", lambda n: n.number("b", 0, 1)),
        ("a", lambda n: n.number("a", 0, 1)),
        ("c", lambda n: n.items()),
        ("d", lambda n: n.integer("d", 0)),
        ("d", lambda n: n.number("d", 0, 2)),
        ("a", lambda n: n.mapping(["k"], "it")),
    ):
        with pytest.raises(ValueError, match=rf"line {'abcd'.index(name) + 1}: .*"):
            check(root[name])


def test_the_nearest_key_is_suggested(tmp_path):
    root = read(tmp_path, "rules: 1\nmodel: x\n")
    with pytest.raises(ValueError, match="line 2: unknown key 'model' in it: did you mean 'models'"):
        root.mapping(["rules", "models"], "it")


def test_aliases_are_not_written_out_without_end(tmp_path):
    """Nine levels of nine aliases each would be 387 million values."""
    path = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path.write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=r"bomb.yaml, line \d+: more than 100000 values, aliases written out"
    ):
        read_yaml(path)


@pytest.mark.parametrize("depth", [30, 100_000])
def test_nesting_ends_somewhere(tmp_path, depth):
    path = tmp_path / "deep.yaml"
    path.write_text("a: " + "[" * depth + "]" * depth)
    with pytest.raises(ValueError, match=r"deep.yaml.*: nested more than 20 deep"):
        read_yaml(path)
