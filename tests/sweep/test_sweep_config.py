import itertools
from pathlib import Path

import pytest

from torchlamp.sweep.config import read_config
from torchlamp.sweep.points import Calibration, Point, in_order


@pytest.fixture
def read(tmp_path, tiny_folder, monkeypatch):
    """Read a configuration; MODEL stands for a tiny model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text("the quick brown fox")

    def reader(text: str):
        (tmp_path / "s.yaml").write_text(text.replace("MODEL", str(tiny_folder)))
        return read_config(tmp_path / "s.yaml")

    return reader


START = "models: MODEL\n"


def policies(config) -> list[str]:
    return [point.policy for point in config.points]


def test_the_product_of_the_axes(read, tiny_folder):
    config = read(
        START
        + "texts: [prose, fox.txt]\ntokens: [real, shuffled]\nwindows: 2\nwindow_length: [16, 32]\n"
        + "accumulate: [ps2, ps4]\nrules: [none, {name: strict, thresholds: [0.1, 1e-3]}]\n"
    )
    assert len(config.points) == 2 * 2 * 2 * 2 * 3
    assert {p.text for p in config.points} == {"prose", "fox.txt"}
    assert {p.policy for p in config.points} == {
        f"ps{mu}+{rule}" for mu in (2, 4) for rule in ("none", "strict:0.1", "strict:0.001")
    }
    first = config.points[0]
    assert first == Point(str(tiny_folder), "prose", "real", 2, 16, "ps2+none", None, 0)
    assert first.to_dict().keys() == {
        *("model", "text", "tokens", "windows", "window_length", "policy", "layers", "seed", "target_rate"),
        "calibration",
    }
    assert Point.from_dict(first.to_dict()) == first


def test_defaults(read):
    (point,) = read(START + "policies: ps4+none").points
    assert (point.text, point.tokens, point.windows, point.window_length) == ("prose", "real", 8, 512)
    assert (point.layers, point.seed, point.target_rate, point.calibration) == (None, 0, None, None)


def test_grids_and_their_defaults(read):
    config = read(
        START
        + "windows: 3\naccumulate: ps4\nrules: [none]\nthreads: 2\nreference_memory_gb: 0.5\n"
        + "grids:\n- name: wide\n  accumulate: [ps7, ps10]\n- windows: 5\n- policies: [ps3+all]\n"
    )
    assert [(g.name, [(p.policy, p.windows) for p in g.points]) for g in config.grids] == [
        ("wide", [("ps7+none", 3), ("ps10+none", 3)]),
        ("grid 2", [("ps4+none", 5)]),
        ("grid 3", [("ps3+all", 3)]),
    ]
    assert (config.threads, config.reference_memory) == (2, 500_000_000)
    assert [g["points"] for g in config.to_dict()["grids"]] == [
        [p.key for p in g.points] for g in config.grids
    ]


def test_sites_singly_and_together(read):
    config = read(START + 'accumulate: ps4\nrules: none\nsites: [scores, mlp_up, "mlp_down & mlp_up"]\n')
    assert policies(config) == ["ps4+none", "mlp_up=ps4+none", "mlp_up=ps4+none, mlp_down=ps4+none"]


def test_operands_and_transforms_stand_where_accumulators_do(read):
    config = read(
        START + "accumulate: [ps4.sort.center, int8/32.center, mxfp4@ps7, int12]\n"
        "rules: [none, {name: running, thresholds: [0.1]}, {name: running, target_rates: [0.01]}]\n"
    )
    assert policies(config) == [
        f"{spelling}{rule}"
        for spelling, none in (
            ("ps4.center.sort", "+none"), ("int8.center", ""), ("mxfp4@ps7", "+none"), ("int12", ""),
        )
        for rule in (none, "+running:0.1", "+running:{}")
    ]  # fmt: skip


def test_policies_with_thresholds(read):
    config = read(
        START + 'policies: ["scores=ps4+none", {policy: "ps4/block8+strict:{}", thresholds: [1, 0.5]}]'
    )
    assert policies(config) == ["ps4+none", "ps4/block8+strict:1", "ps4/block8+strict:0.5"]


def test_duplicates_are_computed_once(read):
    config = read(
        START
        + "windows: 1\ngrids:\n- {policies: [ps4+none, scores=ps4+none]}\n- {accumulate: ps4, rules: [none]}\n"
    )
    assert [len(g.points) for g in config.grids] == [1, 1]
    assert len(config.points) == 1


def test_seeds_only_where_something_is_random(read):
    config = read(
        START + "seeds: [3, 4]\npolicies: [ps4+strict:1, ps4+random:0.1, ps4+random-like:strict:1]\n"
        "tokens: [real, shuffled]\n"
    )
    found = [(p.tokens, p.policy, p.seed) for p in config.points]
    assert ("real", "ps4+strict:1", 3) in found
    assert ("real", "ps4+strict:1", 4) not in found
    assert len(found) == 1 + 2 + 2 + 6


def test_layers(read):
    config = read(START + "policies: ps4+none\nlayers: [null, each, [0, 1]]")
    assert [p.layers for p in config.points] == [None, (0,), (1,), (0, 1)]
    assert [p.layers for p in read(START + "policies: ps4+none\nlayers: each").points] == [(0,), (1,)]
    assert [p.layers for p in read(START + "policies: ps4+none\nlayers: 1").points] == [(1,)]


def test_target_rates(read):
    rules = "accumulate: ps4\nrules: [{name: strict, target_rates: [0.01]}]\nwindows: 4\n"
    (point,) = read(START + rules).points
    assert (point.policy, point.target_rate) == ("ps4+strict:{}", 0.01)
    # The window after those that are evaluated.
    assert point.calibration == Calibration("prose", 4, 1, 0.02)
    (point,) = read(START + rules + "calibration: {text: code, windows: 2, tolerance: 0.1}").points
    assert point.calibration == Calibration("code", 0, 2, 0.1)
    config = read(
        START
        + 'policies: [{policy: "scores=ps4+random-like:strict:{}, mlp_up=ps4+none", target_rates: [0.5]}]'
    )
    assert policies(config) == ["scores=ps4+random-like:strict:{}, mlp_up=ps4+none"]


def test_points_are_in_groups(read):
    config = read(
        START + "texts: [prose, code]\ntokens: [real, shuffled]\nseeds: [0, 1]\npolicies: [ps4+none, ps3+all]"
    )
    groups = [p.group for p in config.points]
    assert len(set(groups)) == 6
    changes = sum(a != b for a, b in itertools.pairwise(groups))
    assert changes == 5
    a, b = (Point(m, "prose", "real", 1, 8, "ps4+none", None, 0) for m in "ab")
    c = Point("a", "code", "real", 1, 8, "ps4+none", None, 0)
    assert in_order([a, b, c, a]) == [a, c, b]


def test_the_key_depends_on_everything():
    point = Point("m", "prose", "real", 1, 8, "ps4+strict:{}", None, 0, 0.1, Calibration("prose", 1, 1, 0.02))
    keys = {point.key}
    for change in (
        {"model": "n"}, {"text": "code"}, {"tokens": "shuffled"}, {"windows": 2}, {"window_length": 9},
        {"policy": "ps3+strict:{}"}, {"layers": [0]}, {"seed": 1}, {"target_rate": 0.2},
        {"calibration": {"text": "prose", "start": 2, "windows": 1, "tolerance": 0.02}},
    ):  # fmt: skip
        keys.add(Point.from_dict(point.to_dict() | change).key)
    assert len(keys) == 11
    assert all(len(key) == 16 for key in keys)


POLICY = "policies: ps4+none\n"
BAD = {
    "unknown key": ("model: x\n" + POLICY, 1, "unknown key 'model' in the configuration: did you mean 'models'?"),
    "unknown key of a grid": (START + "grids:\n- polices: ps4+none\n", 3, "did you mean 'policies'?"),
    "unknown key of a rule": (START + "accumulate: ps4\nrules:\n- name: strict\n  treshold: 1", 5, "'thresholds'"),
    "no models": (POLICY, 1, "models are missing"),
    "nothing to run": (START, 1, "there is nothing to run"),
    "rules alone": (START + "rules: none", 2, "rules need accumulators"),
    "unknown model": ("models:\n- smollm2-135\n" + POLICY, 2, "did you mean 'smollm2-135m'?"),
    "no such folder": ("models: [./nothing]\n" + POLICY, 1, "no model folder or .gguf file './nothing'"),
    "no such gguf": ("models: a.gguf\n" + POLICY, 1, "no file 'a.gguf'"),
    "no such text": (START + "texts: [none.txt]\n" + POLICY, 2, "'none.txt' can't be read: No such file"),
    "almost a text": (START + "texts: pross\n" + POLICY, 2, "did you mean 'prose'?"),
    "text is no name": (START + "texts: 3\n" + POLICY, 2, "text is 3: a name is expected"),
    "tokens": (START + "tokens: shufled\n" + POLICY, 2, "did you mean 'shuffled'?"),
    "windows": (START + "windows: 0\n" + POLICY, 2, "windows is 0: a whole number of 1 or more"),
    "window length": (START + "window_length: 1\n" + POLICY, 2, "window_length is 1: a whole number of 2 or more"),
    "seed": (START + "seeds: [0, -1]\n" + POLICY, 2, "seed is -1"),
    "transform": (START + "accumulate: ps4.centre\nrules: none", 2, "did you mean 'center'?"),
    "stored sums": (START + "accumulate: int8.sort\nsites: norm\nrules: none", 3, "operand 'int8' can't be used"),
    "accumulator": (START + "accumulate: ps99\nrules: none", 2, "ps99"),
    "site": (START + "accumulate: ps4\nsites: mlpup\nrules: none", 3, "did you mean 'mlp_up'?"),
    "site twice": (START + 'accumulate: ps4\nsites: "scores & scores"\nrules: none', 3, "appears twice"),
    "rule": (START + "accumulate: ps4\nrules: [strikt:1]", 3, "unknown rule 'strikt'"),
    "rule without a threshold": (START + "accumulate: ps4\nrules:\n- strict", 4, "rule 'strict' lacks its number"),
    "rule without a list": (START + "accumulate: ps4\nrules:\n- name: strict", 4, "either thresholds or target_rates"),
    "rule with both": (
        START + "accumulate: ps4\nrules: [{name: strict, thresholds: 1, target_rates: 0.1}]", 3, "either thresholds or"
    ),
    "rule without a name": (START + "accumulate: ps4\nrules: [{thresholds: 1}]", 3, "'name' is missing"),
    "threshold out of range": (START + "accumulate: ps4\nrules:\n- {name: mass, thresholds: [2]}", 4, "mass:2"),
    "threshold": (START + "accumulate: ps4\nrules:\n- {name: strict, thresholds: [yes]}", 4, "a number is expected"),
    "target rate": (START + "accumulate: ps4\nrules:\n- {name: strict, target_rates: [1]}", 4, "target rate is 1"),
    "target rate 0": (START + "accumulate: ps4\nrules:\n- {name: strict, target_rates: 0}", 4, "greater than 0"),
    "target of no number": (START + "accumulate: ps4\nrules:\n- {name: all, target_rates: 0.1}", 4, "no single number"),
    "hole without a list": (START + 'policies: "ps4+strict:{}"', 2, "give thresholds or target_rates beside it"),
    "hole in no rule": (START + 'policies: {policy: "ps{}+none", target_rates: 0.1}', 2, "must follow a rule's name"),
    "rule at a site that doesn't show what it needs": (
        START + "accumulate: ps4\nsites: mlp_up\nrules:\n- mass:0.5", 5, "can't run at the site mlp_up"
    ),
    "no hole": (START + "policies: {policy: ps4+none, thresholds: 1}", 2, "write {} in the place"),
    "layers": (START + POLICY + "layers: [2]", 3, "numbers from 0 to 1, the last layer"),
    "layer word": (START + POLICY + "layers: every", 3, "give null (all), each, or numbers"),
    "calibration": (
        START + "calibration: {tolerance: 2}\naccumulate: ps4\nrules: {name: strict, target_rates: 0.1}", 2, "tolerance"
    ),
    "empty list": (START + "texts: []\n" + POLICY, 2, "the list is empty"),
    "grids with one name": (START + POLICY + "grids:\n- name: a\n- name: a\n", 5, "two grids are called 'a'"),
    "a list at the top": ("- a\n", 1, "keys with values are expected"),
    "threads": (START + POLICY + "threads: 0\n", 3, "threads is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations_name_the_line(read, case):
    text, line, said = BAD[case]
    with pytest.raises((ValueError, OSError)) as error:
        read(text)
    message = str(error.value)
    assert f"s.yaml, line {line}: " in message
    assert said in message
    assert len(message.splitlines()) == 1


def test_the_example_of_the_documentation(read):
    page = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    example = example.replace("smollm2-135m, gemma3-270m", "MODEL").replace("smollm2-135m", "MODEL")
    config = read(example.replace("window_length: 512", "window_length: 128"))
    assert [(g.name, len(g.points)) for g in config.grids] == [
        ("rules", 2 * 2 * 7),
        ("order", 2 * (1 + 1) + 2 * 3 * 2),
        ("sites", 2 * 4 * 2),
        ("layers", 2 * 2),
        ("mixed", 2 * 3),
    ]


def test_a_window_fits_the_contexts_of_the_models(read):
    assert read(START + "window_length: [16, 128]\naccumulate: ps2\nrules: none\n").points
    with pytest.raises(
        ValueError, match=r"line 2: window_length 99999999 is longer than the context of .*at most 128"
    ):
        read(START + "window_length: [16, 99999999]\naccumulate: ps2\nrules: none\n")


def test_a_window_fits_the_context_of_a_model_that_was_never_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("torchlamp.sweep.config.check_name", lambda name: None)
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "models: [gemma3-270m, smollm2-135m]\nwindow_length: 99999999\naccumulate: ps2\nrules: none\n"
    )
    said = r"line 2: window_length 99999999 is longer than the context of gemma3-270m: give at most 32768"
    with pytest.raises(ValueError, match=said):
        read_config(path)
    assert not (tmp_path / "empty").exists()
