from typer.testing import CliRunner

from torchlamp.cli import app

POLICY = "ps3+random-like:running:0.1"


def test_rule_names_between_colons_are_no_emoji(tiny_folder, tmp_path):
    """rich would print `:running:` as a runner."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 60)
    sizes = ["--windows", "1", "--window-length", "16", "--no-baselines", "--text", str(text)]
    shown = CliRunner().invoke(app, ["evaluate", str(tiny_folder), "--policy", POLICY, *sizes])
    assert shown.exit_code == 0, shown.output
    assert POLICY in shown.output

    study = tmp_path / "study.yaml"
    study.write_text(
        f"models: [{tiny_folder}]\ntexts: [{text}]\nwindows: 1\nwindow_length: 16\npolicies: ['{POLICY}']\n"
    )
    swept = CliRunner().invoke(app, ["sweep", str(study), "--output", str(tmp_path / "out")])
    assert swept.exit_code == 0, swept.output
    assert POLICY in swept.output
