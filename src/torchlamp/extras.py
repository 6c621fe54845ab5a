"""Packages that only some of torchlamp needs: imported when they are used, one line with the command if missing."""

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any


def import_extra(module: str, extra: str, what: str) -> Any:
    """The module, which the extra named `extra` installs; `what` says in the message what needs it.

    Raises
    ------
    ImportError
        It isn't installed.
    """
    need_extra([module], extra, what)
    return importlib.import_module(module)


def need_extra(modules: Sequence[str], extra: str, what: str) -> None:
    """ImportError, one line with the command that mends it, if one of the modules isn't installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(f"{what} needs {', '.join(missing)}: run pip install 'torchlamp[{extra}]'")
