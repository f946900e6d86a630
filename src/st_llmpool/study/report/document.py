"""What a report is made of, and how it becomes files: one HTML page, and each table and picture on its own."""

from __future__ import annotations

import base64
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from jinja2 import Environment, StrictUndefined

from ...stats.tables import Sheet, file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("template.html")
_NUMBER = re.compile(r"[-+<\[]*\d|-?$")
_DPI = 140
_LONG = 30  # characters, from which a column needs room
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out."""

    kind: ClassVar[str] = "text"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences, each with the words in bold before it, if any."""

    kind: ClassVar[str] = "bullets"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Heading:
    """The title of a part of a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Code:
    """A command, as typed."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Table:
    """A table, also written as CSV and Markdown; long ones only there.

    Args:
        sheet: What it holds.
        shown: Whether the page has it.
        marked: Whether marks follow the numbers, which then stand at the left edge.
    """

    kind: ClassVar[str] = "table"
    sheet: Sheet
    shown: bool = True
    marked: bool = False

    @property
    def styles(self) -> tuple[str, ...]:
        """How each column is set: ``number``, at the right edge, ``long``, with room, or nothing."""
        columns = zip(*(self.sheet.rows or (("",) * len(self.sheet.columns),)), strict=True)
        return tuple(self._style(cells, first=place == 0) for place, cells in enumerate(columns))

    def _style(self, cells: Sequence[str], *, first: bool) -> str:
        if max(len(line) for cell in cells for line in cell.split("\n")) >= _LONG:
            return "long"
        numeric = all(_NUMBER.match(cell) and not _WORD.search(cell) for cell in cells)
        if first or not numeric:
            return ""
        return "whole" if self.marked else "number"


@dataclass(frozen=True)
class Picture:
    """A picture that is already drawn.

    Args:
        file: The PNG.
        alt: What it shows, for who does not see it.
        caption: What is to be read from it.
    """

    kind: ClassVar[str] = "picture"
    file: Path
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The picture itself, as an address."""
        return "data:image/png;base64," + base64.b64encode(self.file.read_bytes()).decode()


Block = Text | Bullets | Heading | Code | Table | Picture


@dataclass(frozen=True)
class Section:
    """A part of the report with a title; one without blocks is left out."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its name in addresses."""
        return file_name(self.title).lower()


def blocks_of(sections: Sequence[Section], kind: type) -> Iterator[Block]:
    """Yields all blocks of a kind."""
    return (block for section in sections for block in section.blocks if isinstance(block, kind))


def save_picture(figure: Figure, file: Path, *, alt: str, caption: str) -> Picture:
    """Saves a drawing and returns it as a block."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=_DPI, facecolor="white")
    return Picture(file, alt, caption)


def write_page(title: str, subtitle: str, head: Sequence[Block], sections: Sequence[Section], file: Path) -> None:
    """Writes the page, which needs no other file to be read.

    Args:
        title: What it is called.
        subtitle: One line on when and of what it was made.
        head: What stands before the first section.
        sections: The others, in order.
        file: Where the page goes.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    sections = [section for section in sections if section.blocks]
    page = template.render(title=title, subtitle=subtitle, head=head, sections=sections)
    file.write_text(page, encoding="utf-8")


def write_tables(sections: Sequence[Section], folder: Path) -> None:
    """Writes every table as CSV and Markdown, named after its title."""
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks_of(sections, Table):
        assert isinstance(block, Table)
        sheet, path = block.sheet, folder / file_name(block.sheet.title)
        path.with_name(f"{path.name}.md").write_text(sheet.to_markdown(), encoding="utf-8")
        with path.with_name(f"{path.name}.csv").open("w", newline="", encoding="utf-8") as file:
            for row in (sheet.columns, *sheet.rows):
                csv.writer(file).writerow(cell.replace("\n", " ") for cell in row)
