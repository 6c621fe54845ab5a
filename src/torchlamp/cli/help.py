"""Help that shows what there is: whole summaries of the commands, and usage lines without hidden arguments."""

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

#: Longer than any summary: a terminal's width wraps it, and nothing is cut off.
_UNCUT = 10_000


class HelpGroup(TyperGroup):
    """A group of commands whose summaries are wrapped, not cut."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the name and the summary of each command."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, command.get_short_help_str(limit=_UNCUT))
            for name, command in commands
            if command is not None and not command.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


class HelpCommand(TyperCommand):
    """A command whose usage line has its arguments as the help names them."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The options' place and each argument that isn't hidden; those that may be left out in brackets."""
        pieces = ["[OPTIONS]"]
        for parameter in self.get_params(ctx):
            if parameter.param_type_name != "argument" or getattr(parameter, "hidden", False):
                continue
            name = parameter.metavar or str(parameter.name).upper()
            if parameter.nargs == -1 and not name.endswith("..."):
                name += " ..."
            pieces.append(name if parameter.required else f"[{name}]")
        return pieces


def show_all(app: typer.Typer) -> None:
    """Have all commands of an application, and of its groups, print their help so."""
    for command in app.registered_commands:
        command.cls = HelpCommand
    for group in app.registered_groups:
        group.cls = HelpGroup
        if group.typer_instance is not None:
            show_all(group.typer_instance)
