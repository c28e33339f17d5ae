"""Formats a page of findings for a terminal or as JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

RowState = Literal["ok", "note", "warn", "bad"]
"""Fine; worth knowing; probably unintended; would stop a run."""

_SIGNS: dict[RowState, tuple[str, str, str]] = {
    "ok": ("✓", "+", "green"),
    "note": ("·", ".", "dim"),
    "warn": ("!", "!", "yellow"),
    "bad": ("✗", "x", "bold red"),
}
_PIPED_WIDTH = 120
_NAME_WIDTH, _VALUE_WIDTH = 24, 26


@dataclass(frozen=True, kw_only=True)
class Row:
    """Holds the result of one check."""

    name: str
    """What was checked."""
    value: str
    """What was found."""
    state: RowState = "ok"
    """Severity."""
    detail: str = ""
    """Reason and remedy; a full sentence for `warn` and `bad`."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Groups related rows."""

    key: str
    """Key in JSON."""
    title: str
    """Heading in the terminal."""
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """Holds all sections."""

    sections: tuple[Section, ...]

    def messages(self, state: RowState) -> list[str]:
        """Format the rows of a state, one sentence each."""
        return [
            f"{row.name}: {row.detail or row.value}"
            for section in self.sections
            for row in section.rows
            if row.state == state
        ]

    @property
    def status(self) -> int:
        """Return the exit status: 1 if something would stop a run."""
        return 1 if self.messages("bad") else 0

    def to_json(self) -> str:
        """Format the page as JSON, as described in docs/doctor.md."""
        document = {
            "status": self.status,
            "problems": self.messages("bad"),
            "warnings": self.messages("warn"),
            "sections": {
                section.key: [asdict(row) for row in section.rows] for section in self.sections
            },
        }
        return json.dumps(document, indent=2, ensure_ascii=False)


def show(page: Page) -> None:
    """Print the page to standard output, in colours where that is a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPED_WIDTH)
    has_signs = console.encoding.lower().startswith("utf")
    rows = [row for section in page.sections for row in section.rows]
    names, values = max(len(row.name) for row in rows), max(len(row.value) for row in rows)
    for section in page.sections:
        console.print(f"\n[bold cyan]{escape(section.title)}[/]")
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=3, justify="right")
        table.add_column(width=min(names, _NAME_WIDTH))
        table.add_column(width=min(values, _VALUE_WIDTH))
        table.add_column()
        for row in section.rows:
            sign, plain, style = _SIGNS[row.state]
            table.add_row(
                f"[{style}]{sign if has_signs else plain}[/]",
                escape(row.name),
                f"[dim]{escape(row.value)}[/]" if row.state == "note" else escape(row.value),
                f"[{'dim' if row.state in ('ok', 'note') else style}]{escape(row.detail)}[/]",
            )
        console.print(table)
    problems, warnings = page.messages("bad"), page.messages("warn")
    console.print()
    for title, style, found in (
        ("would stop a run", "bold red", problems),
        ("probably unintended", "yellow", warnings),
    ):
        if found:
            console.print(
                f"[{style}]{len(found)} {'thing' if len(found) == 1 else 'things'} {title}:[/]"
            )
            for each in found:
                console.print(f"  {escape(each)}")
    if not problems:
        console.print("[bold green]Nothing here would stop a run.[/]")
