"""Text tables for the terminal and for Markdown."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from vix.reporting.console import console


class Table(NamedTuple):
    """A table of strings.

    heads: column headings.
    lines: rows of cells.
    words: the first ``words`` columns contain text and are left-aligned; the others contain numbers.
    """

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    words: int

    def print(self) -> None:
        """Print the table, without trailing spaces."""
        table = RichTable(box=box.SIMPLE_HEAD)
        least = 2  # minimum width in characters, beginning with the frame's
        for i, texts in enumerate(zip(self.heads, *self.lines, strict=True)):
            word = i < self.words
            longest = max(len(line) for text in texts for line in text.split("\n"))
            width = min(longest, 30) if word else longest
            table.add_column(texts[0], justify="left" if word else "right", overflow="fold", no_wrap=not word, min_width=width)
            least += width + 3
        for line in self.lines:
            table.add_row(*line)
        output = console()
        # In a file or a pipe no line is wrapped, for grep and less -S; on a terminal text is wrapped, but numbers are not.
        output.width = max(least, output.width) if output.is_terminal else 10_000
        with output.capture() as capture:
            output.print(Text(self.title, style="bold"))
            output.print(table)
        print("\n".join(line.rstrip() for line in capture.get().splitlines()))

    def markdown(self) -> str:
        """The table in Markdown, under a heading of level 2."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(re.sub(r"[|\\[\]`*<]", r"\\\g<0>", " ".join(c.split())) for c in cells) + " |"

        rule = ["---" if i < self.words else "---:" for i in range(len(self.heads))]
        return "\n".join([f"## {self.title}", "", line(self.heads), line(rule), *map(line, self.lines), ""])
