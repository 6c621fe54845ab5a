"""The command ``torchlamp``. Heavy imports stay inside the commands, so that help comes at once."""

# Each module adds its commands to the application, in the order of the help.
# isort: off
from torchlamp.cli.common import app, main
from torchlamp.cli import evaluate, generate, chat, bench, about, catalogue, cache
from torchlamp.cli import tasks
from torchlamp.cli import sweep
from torchlamp.cli import report
from torchlamp.cli import compare
from torchlamp.cli.help import show_all

__all__ = [
    "about",
    "app",
    "bench",
    "cache",
    "catalogue",
    "chat",
    "compare",
    "evaluate",
    "generate",
    "main",
    "report",
    "sweep",
    "tasks",
]

show_all(app)
