"""The table over seeds for a terminal, and as Markdown, LaTeX (booktabs) and CSV; per cent, in CSV raw shares."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from disttempnet.evaluation.scores import percent
from disttempnet.evaluation.tasks import task_title
from disttempnet.report.seeds.groups import HEAD_TO_TAIL, MARK_RULE, Cell, Column, GroupComparison
from disttempnet.report.seeds.tau_tables import TauTable, groups_with_tau, tau_cells, tau_tables
from disttempnet.sanitize import csv_cell, markdown_cell, one_line

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "→": r"$\rightarrow$", "γ": r"$\gamma$", "τ": r"$\tau$",
    "ρ": r"$\rho$", "±": r"$\pm$", "–": "--",
}  # fmt: skip
_DAGGER = {"near": "†"}


def cell_text(cell: Cell | None, seeds: int, digits: int = 1) -> str:
    """Return mean and standard deviation in per cent, `33.5 (1.2)`; at least two decimals for a mean below 1 %.

    If fewer than `seeds` runs have measured it, their number is added: `33.5 (1.2) n=2`.
    """
    if cell is None:
        return "–"
    digits = max(digits, 2 if cell.mean < 0.01 else 1)
    spread = "" if cell.std is None else f" ({100 * cell.std:.{digits}f})"
    return f"{100 * cell.mean:.{digits}f}{spread}" + (f" n={cell.n}" if cell.n < seeds else "")


def legend(comparison: GroupComparison) -> str:
    """Return the caption: what numbers and marks mean."""
    if not comparison.columns:
        return "no task was evaluated: set eval.tasks"
    counts = sorted({len(group.results) for group in comparison.groups})
    words = f"mean (sample standard deviation) over the seeds; {MARK_RULE}"
    if counts == [1]:
        words = "one seed each" + ("; best in bold" if len(comparison.groups) > 1 else "")
    return f"per cent, {words}" + ("; published rows are not marked" if comparison.published else "")


def published_cells(
    comparison: GroupComparison, escape: Callable[[str], str] = str
) -> list[tuple[str, list[Cell | None]]]:
    """Return the escaped title, with the numbers of its notes, and the cells of each published row."""
    notes = comparison.notes
    return [
        (
            f"{escape(row.title)} [{', '.join(str(notes.index(note) + 1) for note in row.notes)}]",
            [row.values.get(column) for column in comparison.columns],
        )
        for row in comparison.published
    ]


def text_table(comparison: GroupComparison) -> Table:
    """Return a table for a terminal: a row for each group, chance last. Head, middle and tail are only on the page."""
    columns = comparison.columns
    shown = [i for i, column in enumerate(columns) if column.metric not in HEAD_TO_TAIL] or list(range(len(columns)))[
        :1
    ]
    table = Table(caption=legend(comparison), caption_justify="left")
    table.add_column("", min_width=16, overflow="fold")
    table.add_column("seeds", justify="right", style="dim")
    for column in (columns[i] for i in shown):
        table.add_column(Text(f"{task_title(column.task)}\n{column.head}"), justify="right")
    for group, cells in comparison.rows:
        n = len(group.results)
        table.add_row(Text(group.title), str(n), *(_styled(cells[i], n, comparison.digits) for i in shown))
    if comparison.has_chance:
        table.add_section()
        table.add_row("chance", "", *(percent(comparison.chance[i]) for i in shown), style="dim")
    return table


class _Style(NamedTuple):
    """A text format: how text is escaped, and how a marked score and the word "published" are written."""

    escape: Callable[[str], str]
    score: Callable[[Cell | None, int, int], str]
    published: str


def _sections(comparison: GroupComparison, style: _Style) -> list[list[list[str]]]:
    """Return the rows of the table as escaped text: groups, published rows, chance; without empty sections."""
    escape, digits = style.escape, comparison.digits
    groups = [
        [escape(group.title), str(len(group.results)), *(style.score(c, len(group.results), digits) for c in cells)]
        for group, cells in comparison.rows
    ]
    published = [
        [title, style.published, *(escape(cell_text(c, 0, digits)) for c in cells)]
        for title, cells in published_cells(comparison, escape)
    ]
    chance = [["chance", "", *(escape(percent(value)) for value in comparison.chance)]]
    return [rows for rows in (groups, published, chance if comparison.has_chance else []) if rows]


def markdown_table(comparison: GroupComparison) -> str:
    """Return a pipe table, the best in bold, near ones with a dagger; below it notes of published rows, and τ."""
    head = ["", "seeds", *(markdown_cell(column.title) for column in comparison.columns)]
    sections = _sections(comparison, _Style(markdown_cell, markdown_score, "published"))
    notes = "".join(f"\n[{number}] {note}\n" for number, note in enumerate(comparison.notes, 1))
    tau = "".join(_tau_markdown(table) for table in tau_tables(comparison))
    return f"{pipes(head, chain(*sections))}\n{legend(comparison)}\n{notes}{tau}"


def markdown_score(cell: Cell | None, seeds: int, digits: int) -> str:
    """Return a cell with its mark, as Markdown."""
    text = cell_text(cell, seeds, digits)
    return f"**{text}**" if cell and cell.mark == "best" else text + _dagger(cell)


def pipes(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Return a Markdown table of escaped cells; the first `texts` columns are left-aligned, the others right."""
    rules = ["---"] * texts + ["--:"] * (len(head) - texts)
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rules, *rows))


def _tau_markdown(table: TauTable) -> str:
    head, *rows = ([markdown_cell(word) for word in row] for row in (table.head, *table.rows))
    return f"\n{pipes(head, rows)}\n{table.note}\n"


def latex_table(comparison: GroupComparison) -> str:
    """Return a booktabs tabular, and one for each table of τ; needs \\usepackage{booktabs}."""
    # head: titles of tasks with rules below them, then headings of columns
    head = [_tex_row(["", "seeds", *(_tex(column.head) for column in comparison.columns)])]
    if comparison.has_heads:
        titles = [f"\\multicolumn{{{n}}}{{c}}{{{_tex(title)}}}" for title, n in comparison.heads]
        ends = list(accumulate((n for _, n in comparison.heads), initial=2))
        rules = [f"\\cmidrule(lr){{{first + 1}-{last}}}" for first, last in pairwise(ends)]
        head = [_tex_row(["", "", *titles]), " ".join(rules), *head]

    lines = [
        f"% {legend(comparison)}".replace("†", "dagger"),
        *(f"% [{number}] {one_line(note)}" for number, note in enumerate(comparison.notes, 1)),
        *_tabular(head, _sections(comparison, _Style(_tex, _tex_score, "pub.")), 1 + len(comparison.columns)),
    ]
    for table in tau_tables(comparison):
        first, *rows = ([_tex(word) for word in row] for row in (table.head, *table.rows))
        lines += ["", f"% {table.note}", *_tabular([_tex_row(first)], [rows], len(first) - 1)]
    return "\n".join(lines) + "\n"


def _tabular(head: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], numbers: int) -> list[str]:
    """Return the lines of a booktabs tabular: a column of text and `numbers` right-aligned ones, a rule a section."""
    lines = [f"\\begin{{tabular}}{{l{'r' * numbers}}}", "\\toprule", *head]
    for rows in sections:
        lines += ["\\midrule", *(_tex_row(row) for row in rows)]
    return [*lines, "\\bottomrule", "\\end{tabular}"]


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + " \\\\"


def csv_table(comparison: GroupComparison) -> str:
    """Return a CSV line for each group and metric: raw shares in [0, 1], std empty for one seed.

    Published rows have n = 0 and the mark `published`. Lines of τ follow, where it differs between pairs: four digits,
    task and chance empty.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["group", "task", "metric", "mean", "std", "n", "chance", "mark"])
    for group, cells in comparison.rows:
        for column, cell, chance in zip(comparison.columns, cells, comparison.chance, strict=True):
            if cell is not None:
                writer.writerow(_csv_row(group.title, column, cell, chance))
    for row in comparison.published:
        for column in comparison.columns:
            if column in row.values:
                writer.writerow(_csv_row(row.title, column, row.values[column]._replace(mark="published"), None))
    for group in groups_with_tau(comparison):
        for name, cell in tau_cells(group):
            std = "" if cell.std is None else f"{cell.std:.4g}"
            writer.writerow([csv_cell(group.title), "", name, f"{cell.mean:.4g}", std, cell.n, "", ""])
    return buffer.getvalue()


def _csv_row(title: str, column: Column, cell: Cell, chance: float | None) -> Sequence[object]:
    std = "" if cell.std is None else repr(cell.std)
    known = "" if chance is None else repr(chance)
    return [
        csv_cell(title),
        csv_cell(column.task),
        csv_cell(column.metric),
        repr(cell.mean),
        std,
        cell.n,
        known,
        cell.mark,
    ]


def _styled(cell: Cell | None, seeds: int, digits: int) -> Text:
    return Text(cell_text(cell, seeds, digits) + _dagger(cell), "bold" if cell and cell.mark == "best" else "")


def _dagger(cell: Cell | None) -> str:
    return _DAGGER.get(cell.mark, "") if cell else ""


def _tex_score(cell: Cell | None, seeds: int, digits: int) -> str:
    text = _tex(cell_text(cell, seeds, digits))
    if cell and cell.mark == "best":
        return f"\\textbf{{{text}}}"
    return f"{text}$^\\dagger$" if cell and cell.mark == "near" else text


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in one_line(text))
