"""The command ``torchlamp``. Heavy imports stay inside the commands, so that help comes at once."""

# Each module adds its commands to the application, in this order of the help.
from torchlamp.cli import measure as _measure  # isort: skip
from torchlamp.cli import about as _about  # isort: skip
from torchlamp.cli.common import app, main

__all__ = ["app", "main"]
