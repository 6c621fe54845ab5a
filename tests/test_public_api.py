"""A change of a public signature is said in the changelog."""

from public_api import LISTING, ROOT, listing, unsaid

OLD = ["evaluate(model, windows, policy, *, seed=0)", "Result", "Result.kl_mean", "Rule.parse(spelling)"]


def check(new: list[str], section: str) -> list[str]:
    return unsaid(
        OLD, new, f"# Changelog\n\n## Unreleased\n\n{section}\n\n## 0.1.0\n\n- layers, to_pandas, kl_mean\n"
    )


def test_what_changed_is_in_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    missing = unsaid(LISTING.read_text(encoding="utf-8").splitlines(), listing(), changelog)
    assert not missing, f"public names or parameters changed: say so in CHANGELOG.md, Unreleased: {missing}"


def test_the_listing_knows_every_kind_of_name():
    lines = listing()
    for start in (
        "evaluate(model, windows, policy, ",
        "Result.kl_mean",
        "Result.to_json(self, indent=2)",
        "round_to(",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_changes_must_be_said():
    assert check(OLD, "") == []
    assert check(["evaluate(model, windows, policy, *, seed=0, layers=None)", *OLD[1:]], "") == ["layers"]
    assert check(["evaluate(model, windows, policy, *, seed=0, layers=None)", *OLD[1:]], "- `layers`") == []
    assert check(["evaluate(model, windows, policy, *, seed=1)", *OLD[1:]], "") == ["evaluate"]
    assert check([*OLD, "Result.to_pandas(self)"], "") == ["to_pandas"]
    assert check([OLD[0], OLD[1], OLD[3]], "") == ["kl_mean"]
    assert check([*OLD[:3], "Rule.parse(text)"], "- `text`") == ["spelling"]
