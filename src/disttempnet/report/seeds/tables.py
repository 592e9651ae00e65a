"""The table over seeds for a terminal, and as Markdown, LaTeX (booktabs) and CSV; per cent, in CSV raw shares."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

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


def published_cells(comparison: GroupComparison) -> list[tuple[str, list[Cell | None]]]:
    """Return title, with the numbers of its notes, and cells of each published row."""
    notes = comparison.notes
    return [
        (
            f"{row.title} [{', '.join(str(notes.index(note) + 1) for note in row.notes)}]",
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


def markdown_table(comparison: GroupComparison) -> str:
    """Return a pipe table, the best in bold, near ones with a dagger; below it notes of published rows, and τ."""
    heads = ["", "seeds", *(markdown_cell(column.title) for column in comparison.columns)]
    rows = [heads, ["---", "--:", *("--:" for _ in comparison.columns)]]
    for group, cells in comparison.rows:
        n = len(group.results)
        rows.append(
            [markdown_cell(group.title), str(n), *(markdown_score(cell, n, comparison.digits) for cell in cells)]
        )
    for title, values in published_cells(comparison):
        rows.append([title, "published", *(cell_text(cell, 0, comparison.digits) for cell in values)])
    if comparison.has_chance:
        rows.append(["chance", "", *(percent(value) for value in comparison.chance)])
    notes = "".join(f"\n[{number}] {note}\n" for number, note in enumerate(comparison.notes, 1))
    tau = "".join(_tau_markdown(table) for table in tau_tables(comparison))
    return f"{pipes(rows)}\n{legend(comparison)}\n{notes}{tau}"


def markdown_score(cell: Cell | None, seeds: int, digits: int) -> str:
    """Return a cell with its mark."""
    text = cell_text(cell, seeds, digits)
    return f"**{text}**" if cell and cell.mark == "best" else text + _dagger(cell)


def _tau_markdown(table: TauTable) -> str:
    words = [[markdown_cell(word) for word in row] for row in (table.head, *table.rows)]
    rows = [words[0], ["---", *["--:"] * (len(table.head) - 1)], *words[1:]]
    return f"\n{pipes(rows)}\n{table.note}\n"


def pipes(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of escaped cells as Markdown; a second row of dashes makes the first one the head."""
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _tex_row(*cells: str) -> str:
    return " & ".join(cells) + " \\\\"


def latex_table(comparison: GroupComparison) -> str:
    """Return a booktabs tabular, and one for each table of τ; needs \\usepackage{booktabs}."""
    spans = comparison.heads
    tasks = " & ".join(f"\\multicolumn{{{n}}}{{c}}{{{_tex(heading)}}}" for heading, n in spans)
    rules, place = [], 3
    for _, n in spans:
        rules.append(f"\\cmidrule(lr){{{place}-{place + n - 1}}}")
        place += n
    lines = [
        f"% {legend(comparison)}".replace("†", "dagger"),
        *(f"% [{number}] {one_line(note)}" for number, note in enumerate(comparison.notes, 1)),
        f"\\begin{{tabular}}{{lr{'r' * len(comparison.columns)}}}",
        "\\toprule",
        *([f" & & {tasks} \\\\", " ".join(rules)] if comparison.has_heads else []),
        _tex_row("", "seeds", *(_tex(column.head) for column in comparison.columns)),
        "\\midrule",
    ]
    for group, cells in comparison.rows:
        n = len(group.results)
        lines.append(_tex_row(_tex(group.title), str(n), *(_tex_cell(cell, n, comparison.digits) for cell in cells)))
    if comparison.published:
        lines.append("\\midrule")
    for title, values in published_cells(comparison):
        words = (_tex(cell_text(cell, 0, comparison.digits)) for cell in values)
        lines.append(_tex_row(_tex(title), "pub.", *words))
    if comparison.has_chance:
        lines += ["\\midrule", _tex_row("chance", "", *(_tex(percent(value)) for value in comparison.chance))]
    lines += ["\\bottomrule", "\\end{tabular}"]
    for table in tau_tables(comparison):
        lines += ["", *_tau_latex(table)]
    return "\n".join(lines) + "\n"


def _tau_latex(table: TauTable) -> list[str]:
    head, *rows = (" & ".join(_tex(word) for word in row) + " \\\\" for row in (table.head, *table.rows))
    return [
        f"% {table.note}",
        f"\\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        "\\toprule",
        head,
        "\\midrule",
        *rows,
        "\\bottomrule",
        "\\end{tabular}",
    ]


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


def _tex_cell(cell: Cell | None, seeds: int, digits: int) -> str:
    text = _tex(cell_text(cell, seeds, digits))
    if cell and cell.mark == "best":
        return f"\\textbf{{{text}}}"
    return f"{text}$^\\dagger$" if cell and cell.mark == "near" else text


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in one_line(text))
