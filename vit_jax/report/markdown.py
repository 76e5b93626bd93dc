"""A table of published numbers with ours beside them, as markdown and as CSV."""

import csv
import dataclasses
import io
from collections.abc import Sequence

from vit_jax.console import show_name
from vit_jax.paper.tables import Score
from vit_jax.report.seeds import Ours

_NAMED = 6  # cells that a note names


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is published and what we have; `digits` after the point are shown."""

    paper: Score | None = None
    ours: Ours | None = None
    digits: int = 2

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.paper is None or self.ours is None else self.ours.mean - self.paper.mean


@dataclasses.dataclass
class Table:
    """A table in the paper's form.

    Attributes:
      name: of its file, such as "table_5".
      title: what it shows, with the unit.
      headings: of the columns that name a row.
      column_heading: what the other columns are.
      columns: their names.
      rows: names of the rows, as many parts each as there are headings.
      cells: by row and column; missing ones are empty.
      remarks: on all of it.
      publisher: whose numbers ours stand beside.
    """

    name: str
    title: str
    headings: tuple[str, ...]
    column_heading: str
    columns: list[str]
    rows: list[tuple[str, ...]]
    cells: dict[tuple[tuple[str, ...], str], Cell] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)
    publisher: str = "paper"

    @property
    def has_ours(self) -> bool:
        """Whether there is a number of ours in it."""
        return any(cell.ours for cell in self.cells.values())

    def set(self, row: tuple[str, ...], column: str, cell: Cell) -> None:
        """Fills a cell, in a row and a column that come last if they are new."""
        if row not in self.rows:
            self.rows.append(row)
        if column not in self.columns:
            self.columns.append(column)
        self.cells[row, column] = cell

    def to_markdown(self) -> str:
        """The table with its notes. Each row is up to three lines: the paper's numbers, ours, and the difference."""
        lines = []
        for row in self.rows:
            cells = [self.cells.get((row, column), Cell()) for column in self.columns]
            label: Sequence[str] = row
            for who, texts in (
                (self.publisher, [_show(cell.paper, cell.digits) for cell in cells]),
                ("ours", [_show(cell.ours, cell.digits) for cell in cells]),
                ("difference", [_show_difference(cell) for cell in cells]),
            ):
                if any(texts):
                    lines.append([*label, who, *texts])
                    label = [""] * len(row)
        parts = [
            f"## {self.title}",
            "",
            *format_table([*self.headings, "", *self.columns], lines, len(self.headings) + 1),
        ]
        notes = [*self._notes(), *self.remarks]
        return "\n".join([*parts, "", *(f"- {show_name(note)}" for note in notes), *([""] if notes else [])])

    def _notes(self) -> list[str]:
        """Notes of the cells, each told once, with the cells it is of."""
        where: dict[str, list[str]] = {}
        filled = 0
        for row in self.rows:
            for column in self.columns:
                ours = self.cells.get((row, column), Cell()).ours
                if ours is None:
                    continue
                filled += 1
                for note in ours.notes:
                    where.setdefault(note, []).append(f"{', '.join(row)} ({column})")
        told = []
        for note, cells in where.items():
            named = "; ".join(cells[:_NAMED])
            more = f"; and {len(cells) - _NAMED} more" if len(cells) > _NAMED else ""
            told.append(f"{note}: {'all of ours' if len(cells) == filled > 1 else named + more}.")
        return told

    def to_csv(self) -> str:
        """A line for each cell, for programs."""
        rows: list[list[object]] = []
        for row in self.rows:
            for column in self.columns:
                cell = self.cells.get((row, column))
                if cell is None or (cell.paper is None and cell.ours is None):
                    continue
                paper, ours = cell.paper, cell.ours
                rows.append(
                    [
                        *row,
                        column,
                        *((paper.mean, paper.std) if paper else (None, None)),
                        *((ours.mean, ours.std, ours.seeds) if ours else (None, None, None)),
                        cell.difference,
                        *(("; ".join(ours.notes), " ".join(ours.sources)) if ours else ("", "")),
                    ]
                )
        measured = ("paper", "paper_std", "ours", "ours_std", "seeds", "difference", "notes", "folders")
        return format_csv([*self.headings, self.column_heading, *measured], rows)


@dataclasses.dataclass
class Listing:
    """A plain table of text: what was found, a line each.

    Attributes:
      name: of its file.
      title: what it shows.
      headings: of its columns.
      rows: as they are shown.
      value_headings: of the columns of `values`.
      values: the same for programs: numbers as they are.
      remarks: on all of it.
    """

    name: str
    title: str
    headings: list[str]
    rows: list[list[str]]
    value_headings: list[str]
    values: list[list[object]]
    remarks: list[str] = dataclasses.field(default_factory=list)

    def to_markdown(self) -> str:
        """The table and its remarks."""
        parts = [f"## {self.title}", "", *format_table(self.headings, self.rows, 0), ""]
        return "\n".join(parts + [f"- {show_name(remark)}" for remark in self.remarks] + [""] * bool(self.remarks))

    def to_csv(self) -> str:
        """The same for programs."""
        return format_csv(self.value_headings, self.values)


def format_table(headings: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Lines of a markdown table that also reads well in a terminal.

    Args:
      headings: of the columns.
      rows: as many cells each.
      num_left: columns that are aligned to the left; the others are to the right. 0: all to the left.
    """
    headings, *rows = ([show_name(cell) for cell in row] for row in (headings, *rows))
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    left = [num_left == 0 or column < num_left for column in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(cells, widths, left, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 2) if is_left else "-" * (width + 1) + ":" for width, is_left in zip(widths, left, strict=True)
    )
    return [line(headings), f"|{rule}|", *map(line, rows)]


def format_csv(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values with a line of headings."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([show_name(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue()


def _show(score: Score | Ours | None, digits: int) -> str:
    if score is None:
        return ""
    spread = "" if score.std is None else f" ± {score.std:,.{digits}f}"
    also = f"/{score.also:,.{digits}f}" if isinstance(score, Score) and score.also is not None else ""
    return f"{score.mean:,.{digits}f}{also}{spread}"


def _show_difference(cell: Cell) -> str:
    if cell.difference is None:
        return ""
    return f"{round(cell.difference, cell.digits) + 0.0:+,.{cell.digits}f}"  # + 0.0: no "-0.00"
