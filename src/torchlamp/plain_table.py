"""A small table as text, for a REPL, and as HTML, for a notebook; nothing but strings."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class PlainTable:
    """Strings in rows under a heading; the first column is a name, the others are figures."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    #: Lines under the table.
    notes: Sequence[str] = ()
    #: The row that the table is about, which HTML shows in bold.
    main: int | None = None

    def __str__(self) -> str:
        """Heading, columns, a rule and the rows, aligned by spaces; no line ends in a space."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[at]) for line in lines) for at in range(len(self.columns))]
        text = [
            "  ".join(
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        text.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join([self.heading, *text, *self.notes])

    def to_html(self) -> str:
        """The same as an HTML table; every string is escaped."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(
            f"<tr>{''.join(_cell(cell, at, number == self.main) for at, cell in enumerate(row))}</tr>"
            for number, row in enumerate(self.rows)
        )
        notes = "".join(f"<br><small>{escape(line)}</small>" for line in self.notes)
        return (
            f"<div><b>{escape(self.heading)}</b><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>{notes}</div>"
        )


def _cell(text: str, column: int, bold: bool) -> str:
    side = "left" if column == 0 else "right"
    shown = f"<b>{escape(text)}</b>" if bold else escape(text)
    return f'<td style="text-align:{side}">{shown}</td>'
