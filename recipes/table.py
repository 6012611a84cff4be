"""One table, shown in three places.

    table = Table(("phase", "seconds"), [("forward", "16.6")])
    console.print(table.terminal())      page: table.html()      card: table.markdown()

Cells are plain text: each rendering escapes them for its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from rich import table as rich_table

from recipes import escape


@dataclass(frozen=True)
class Table:
    """A header and rows with as many cells. numbers: the columns after the first are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numbers: bool = True

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"rows: {len(row)} cells under {len(self.header)} headings in {tuple(row)!r}"
                )

    def terminal(self) -> rich_table.Table:
        """The table for a rich console."""
        shown = rich_table.Table(
            title=escape.terminal(self.title) if self.title else None, title_justify="left"
        )
        for column, heading in enumerate(self.header):
            shown.add_column(escape.terminal(heading), justify="right" if self._right(column) else "left")
        for row in self.rows:
            shown.add_row(*(escape.terminal(cell) for cell in row))
        return shown

    def html(self) -> Markup:
        """The table as HTML: class "n" marks numbers, a caption has the title. It may be wider than a narrow screen."""
        caption = f"<caption>{escape.html(self.title)}</caption>" if self.title else ""
        head = f"<thead>{self._html_row('th', self.header)}</thead>" if any(self.header) else ""
        body = "".join(self._html_row("td", row) for row in self.rows)
        return Markup(f'<div class="wide"><table>{caption}{head}<tbody>{body}</tbody></table></div>')

    def markdown(self) -> str:
        """The table as GitHub's Markdown; the title stands in bold above it."""
        rule = ["---:" if self._right(column) else "---" for column in range(len(self.header))]
        rows = [self._cells(self.header), rule, *(self._cells(row) for row in self.rows)]
        title = [f"**{escape.markdown(self.title)}**", ""] if self.title else []
        return "\n".join([*title, *(f"| {' | '.join(row)} |" for row in rows)])

    def _right(self, column: int) -> bool:
        return self.numbers and column > 0

    def _html_row(self, tag: str, cells: Iterable[str]) -> str:
        marks = (' class="n"' if self._right(column) else "" for column in range(len(self.header)))
        shown = (
            escape.html("\u00a0" * (len(cell) - len(cell.lstrip(" "))) + cell.lstrip(" ")) for cell in cells
        )
        return f"<tr>{''.join(f'<{tag}{mark}>{cell}</{tag}>' for mark, cell in zip(marks, shown))}</tr>"

    @staticmethod
    def _cells(cells: Iterable[str]) -> list[str]:
        return [escape.markdown(cell) for cell in cells]
