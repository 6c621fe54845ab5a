"""How the tests of the command line run it, and what they expect of its errors."""

from typer.testing import CliRunner

from torchlamp.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def error_line(result) -> str:
    """The one line of an error of ours."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("torchlamp: error: ")
    return lines[0]
