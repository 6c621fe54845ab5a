"""Reading a file that ``torchlamp evaluate --json`` wrote."""

from pathlib import Path

from torchlamp.results.result import Result


def read_result(path: Path) -> Result:
    """The result in a file.

    Raises
    ------
    OSError
        It can't be read.
    ValueError
        It is no result of an evaluation.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise OSError(f"can't read {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no result of torchlamp evaluate --json: not UTF-8") from error
    try:
        return Result.from_json(text)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no result of torchlamp evaluate --json: {error}") from error
