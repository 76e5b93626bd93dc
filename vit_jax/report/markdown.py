"""Tables as markdown and as CSV."""

import csv
import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.console import format_table, show_name
from vit_jax.paper.tables import Score
from vit_jax.report.seeds import SeedMean

_NAMED = 6  # cells that a note names

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A published number and ours, shown with `digits` decimals."""

    paper: Score | None = None
    ours: SeedMean | None = None
    digits: int = 2

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.paper is None or self.ours is None else self.ours.mean - self.paper.mean


@dataclasses.dataclass
class Table:
    """A table in the paper's form.

    Attributes:
      name: name of its file, such as "table_5".
      title: title, with the unit.
      headings: headings of the columns that name a row.
      column_heading: heading over the other columns.
      columns: their names.
      cells: by row and column; missing ones are empty.
      remarks: lines below the table.
      publisher: source of the numbers beside ours.
    """

    name: str
    title: str
    headings: Row
    column_heading: str
    columns: list[str] = dataclasses.field(default_factory=list)
    cells: dict[tuple[Row, str], Cell] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)
    publisher: str = "paper"

    @property
    def rows(self) -> list[Row]:
        """The names of the rows, each with one part per heading."""
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def has_ours(self) -> bool:
        """Whether there is a number of ours."""
        return any(cell.ours for cell in self.cells.values())

    def publish(self, scores: Mapping[Any, Score | float], *, digits: int = 2) -> None:
        """Fills in published numbers by row and column."""
        for (row, column), score in scores.items():
            self._add(row, column, Cell(Score(score) if isinstance(score, int | float) else score, digits=digits))

    def add_ours(self, row: Row, column: str, ours: SeedMean | None, *, digits: int = 2) -> None:
        """Fills in a number of ours, if there is one; a new row or column comes last."""
        if ours is not None:
            cell = self.cells.get((row, column), Cell(digits=digits))
            self._add(row, column, dataclasses.replace(cell, ours=ours, digits=digits))

    def _add(self, row: Row, column: str, cell: Cell) -> None:
        if column not in self.columns:
            self.columns.append(column)
        self.cells[row, column] = cell

    def to_markdown(self) -> str:
        """Formats the table and its notes. A row has up to three lines: the paper's numbers, ours, the difference."""
        lines = []
        for row in self.rows:
            cells = [self.cells.get((row, column), Cell()) for column in self.columns]
            label = row
            for who, texts in (
                (self.publisher, [_show(cell.paper, cell.digits) for cell in cells]),
                ("ours", [_show(cell.ours, cell.digits) for cell in cells]),
                ("difference", [_show_difference(cell) for cell in cells]),
            ):
                if any(texts):
                    lines.append([*label, who, *texts])
                    label = ("",) * len(row)
        headings = [*self.headings, "", *self.columns]
        remarks = [*self._notes(), *self.remarks]
        return _section(self.title, format_table(headings, lines, num_left=len(self.headings) + 1), remarks)

    def _notes(self) -> list[str]:
        """The notes of the cells, each once, with its cells."""
        cells_by_note: dict[str, list[str]] = {}
        num_ours = 0
        for row, column in itertools.product(self.rows, self.columns):
            if ours := self.cells.get((row, column), Cell()).ours:
                num_ours += 1
                for note in ours.notes:
                    cells_by_note.setdefault(note, []).append(f"{', '.join(row)} ({column})")
        notes = []
        for note, cells in cells_by_note.items():
            named = "; ".join(cells[:_NAMED]) + (f"; and {len(cells) - _NAMED} more" if len(cells) > _NAMED else "")
            notes.append(f"{note}: {'all of ours' if len(cells) == num_ours > 1 else named}.")
        return notes

    def to_csv(self) -> str:
        """Formats a line for each cell, with unrounded numbers."""
        lines = []
        for row, column in itertools.product(self.rows, self.columns):
            cell = self.cells.get((row, column), Cell())
            paper, ours = cell.paper, cell.ours
            published = (paper.mean, paper.std) if paper else (None, None)
            mean = (ours.mean, ours.std, ours.seeds) if ours else (None, None, None)
            texts = ("; ".join(ours.notes), " ".join(ours.sources)) if ours else ("", "")
            if paper or ours:
                lines.append([*row, column, *published, *mean, cell.difference, *texts])
        numbers = ("paper", "paper_std", "ours", "ours_std", "seeds", "difference", "notes", "folders")
        return _format_csv([*self.headings, self.column_heading, *numbers], lines)


@dataclasses.dataclass
class Listing:
    """A list of runs or settings, for display (`headings`, `rows`) and for programs (`value_headings`, `values`).

    `name` is the name of its file, and `remarks` are lines below it.
    """

    name: str
    title: str
    headings: list[str]
    rows: list[list[str]]
    value_headings: list[str]
    values: list[list[object]]
    remarks: list[str] = dataclasses.field(default_factory=list)

    def to_markdown(self) -> str:
        """Formats the list and its remarks."""
        return _section(self.title, format_table(self.headings, self.rows, num_left=len(self.headings)), self.remarks)

    def to_csv(self) -> str:
        """Formats `values`, for programs."""
        return _format_csv(self.value_headings, self.values)


def _section(title: str, table: str, remarks: Sequence[str]) -> str:
    lines = [f"## {title}", "", table, "", *(f"- {show_name(remark)}" for remark in remarks)]
    return "\n".join([*lines, *([""] if remarks else [])])


def _format_csv(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([show_name(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue()


def _show(score: Score | SeedMean | None, digits: int) -> str:
    if score is None:
        return ""
    spread = "" if score.std is None else f" ± {score.std:,.{digits}f}"
    also = f"/{score.also:,.{digits}f}" if isinstance(score, Score) and score.also is not None else ""
    return f"{score.mean:,.{digits}f}{also}{spread}"


def _show_difference(cell: Cell) -> str:
    if cell.difference is None:
        return ""
    return f"{round(cell.difference, cell.digits) + 0.0:+,.{cell.digits}f}"  # + 0.0: no "-0.00"
