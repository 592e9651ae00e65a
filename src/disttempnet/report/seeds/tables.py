"""The table over seeds for a terminal, and as Markdown, LaTeX (booktabs) and CSV; per cent, in CSV raw shares.

Beside a metric stands its difference to the baseline with a confidence interval, where seeds are shared.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from disttempnet.evaluation.scores import percent
from disttempnet.evaluation.tasks import task_title
from disttempnet.report.page import signed
from disttempnet.report.seeds.comparison import GroupComparison
from disttempnet.report.seeds.groups import HEAD_TO_TAIL, Cell, Column, SeedGroup
from disttempnet.report.seeds.intervals import CONFIDENCE, PairedDifference, mean_interval
from disttempnet.report.seeds.normaliser_table import normaliser_table
from disttempnet.report.seeds.tau_tables import NotedTable, groups_with_tau, tau_cells, tau_tables
from disttempnet.report.seeds.tuned_table import tuned_table
from disttempnet.sanitize import csv_cell, markdown_cell, one_line

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "→": r"$\rightarrow$", "γ": r"$\gamma$", "τ": r"$\tau$",
    "ρ": r"$\rho$", "±": r"$\pm$", "–": "--", "−": "$-$",
}  # fmt: skip
CSV_COLUMNS = (
    "group", "task", "metric", "mean", "std", "low", "high", "n", "chance", "mark", "baseline", "difference",
    "difference_low", "difference_high", "pairs",
)  # fmt: skip


def cell_text(cell: Cell | None, seeds: int, digits: int = 1) -> str:
    """Return mean and standard deviation in per cent, `33.5 (1.2)`; at least two decimals for a mean below 1 %.

    If fewer than `seeds` runs have measured it, their number is added: `33.5 (1.2) n=2`.
    """
    if cell is None:
        return "–"
    digits = cell_digits(cell, digits)
    spread = "" if cell.std is None else f" ({100 * cell.std:.{digits}f})"
    return f"{100 * cell.mean:.{digits}f}{spread}" + (f" n={cell.n}" if cell.n < seeds else "")


def cell_digits(cell: Cell, digits: int) -> int:
    """Return the decimals of a cell: at least two for a mean below 1 %."""
    return max(digits, 2 if cell.mean < 0.01 else 1)


class DifferenceText(NamedTuple):
    """A difference as text; `sign` is ±1 where its interval excludes zero."""

    text: str
    sign: int


def difference_text(one: PairedDifference, seeds: int, digits: int = 1) -> str:
    """Return a difference and its interval in percentage points, `+1.1 [0.7, 1.5]`.

    If fewer than `seeds` runs are paired, their number is added: `n=2`, or `unpaired` for none. A bound that would
    round to zero, which the interval excludes, has more decimals.
    """
    few = "" if one.n == seeds else f" n={one.n}" if one.n else " unpaired"
    if one.interval is None:
        return signed(one.mean, digits) + few
    nearest = min(map(abs, one.interval))
    while one.sign and round(100 * nearest, digits) == 0:
        digits += 1
    low, high = (signed(bound, digits, plus="") for bound in one.interval)
    return f"{signed(one.mean, digits)} [{low}, {high}]{few}"


def difference_row(comparison: GroupComparison, group: SeedGroup) -> list[DifferenceText]:
    """Return the differences of a group to its baseline, one a column."""
    g = comparison.groups.index(group)
    base = comparison.baselines[g]
    if base is None:
        return [DifferenceText("baseline" if comparison.is_baseline(group) else "–", 0)] * len(comparison.columns)
    seeds = max(len(group.results), len(base.results))
    return [
        DifferenceText("–", 0)
        if one is None or cell is None
        else DifferenceText(difference_text(one, seeds, cell_digits(cell, comparison.digits)), one.sign)
        for one, cell in zip(comparison.differences[g], comparison.cells[g], strict=True)
    ]


def legend(comparison: GroupComparison) -> str:
    """Return the caption: what numbers and marks mean."""
    if not comparison.columns:
        return "no task was evaluated: set eval.tasks"
    parts = ["mean (sample standard deviation) over the seeds"]
    if {len(group.results) for group in comparison.groups} == {1}:
        parts = ["one seed each, so no intervals"]
    if len(comparison.groups) > 1:
        parts.append("highest in bold")
    if comparison.published:
        parts.append("published rows are not marked")
    return "; ".join(
        [f"per cent, {parts[0]}", *parts[1:], *_about_differences(comparison), *_about_networks(comparison)]
    )


def _about_networks(comparison: GroupComparison) -> list[str]:
    """Return which groups have temperature networks that waited to the end; nothing where all started."""
    waited = {group.title: sum(one.tau_started is False for one in group.results) for group in comparison.groups}
    found = [
        f"{group.title} ({waited[group.title]} of {len(group.results)} seeds)"
        for group in comparison.groups
        if waited[group.title]
    ]
    return [f"the temperature network never started in {', '.join(found)}: τ stayed where it began"] if found else []


def _about_differences(comparison: GroupComparison) -> list[str]:
    """Return the parts of the legend about differences; none for one group or one seed."""
    seeds = max(len(group.results) for group in comparison.groups)
    if len(comparison.groups) == 1 or seeds == 1:
        return []
    if not comparison.intervals:
        return ["no differences: two seeds in common, on the same data, are needed"]
    own = " at the same varied keys" if len(comparison.baseline_titles) > 1 else ""
    excluded, n = sum(one.sign != 0 for one in comparison.intervals), len(comparison.intervals)
    expected = (1 - CONFIDENCE) * n
    return [
        f"difference in points, paired by seed{own}, with its {100 * CONFIDENCE:g} % confidence interval (Student's t)",
        f"bold where that excludes zero: {excluded} of {n} (about {expected:.2g} would if nothing differed)",
    ]


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


def text_table(comparison: GroupComparison) -> Group:
    """Return a table for each task, for a terminal: a row for each group, chance last; differences below the scores.

    Head, middle and tail are only on the page.
    """
    shown = comparison.only([c for c in comparison.columns if c.metric not in HEAD_TO_TAIL] or comparison.columns[:1])
    tasks = dict.fromkeys(column.task for column in shown.columns)
    tables = [_task_table(shown.only([c for c in shown.columns if c.task == task]), task) for task in tasks]
    more = "; head, middle and tail are on the page" if len(shown.columns) < len(comparison.columns) else ""
    return Group(*(tables or [_task_table(shown, "")]), Text(legend(shown) + more, "dim italic"))


def _task_table(comparison: GroupComparison, task: str) -> Table:
    """Return the table of one task; narrow, so that nothing is cut off in a narrow terminal."""
    table = Table(title=Text(task_title(task), "bold") if task else None, title_justify="left")
    table.add_column("", min_width=16, overflow="fold")
    table.add_column("seeds", justify="right", style="dim")
    for column, has in zip(comparison.columns, comparison.with_difference, strict=True):
        below = f"\n{comparison.difference_head}" if has else ""
        table.add_column(Text(column.head + below), justify="right", overflow="fold")
    for group, cells in comparison.rows:
        n = len(group.results)
        texts = [_styled(cell, n, comparison.digits) for cell in cells]
        differences = zip(texts, difference_row(comparison, group), comparison.with_difference, strict=True)
        for text, one, has in differences:
            if has:
                text.append("\n").append(one.text, {1: "bold green", -1: "bold red"}.get(one.sign, "dim"))
        table.add_row(Text(group.title), str(n), *texts)
    if comparison.has_chance:
        table.add_section()
        table.add_row("chance", "", *map(percent, comparison.chance), style="dim")
    return table


class _Style(NamedTuple):
    """A text format: how text is escaped, and how scores, differences and the word "published" are written."""

    escape: Callable[[str], str]
    score: Callable[[Cell | None, int, int], str]
    difference: Callable[[DifferenceText], str]
    published: str


def _sections(comparison: GroupComparison, style: _Style) -> list[list[list[str]]]:
    """Return the rows of the table as escaped text: groups, published rows, chance; without empty sections."""
    escape, digits = style.escape, comparison.digits

    none = [""] * len(comparison.columns)
    groups = []
    for group, cells in comparison.rows:
        scores = [style.score(cell, len(group.results), digits) for cell in cells]
        differences = [style.difference(one) for one in difference_row(comparison, group)]
        groups.append([escape(group.title), str(len(group.results)), *_side_by_side(comparison, scores, differences)])
    published = []
    for title, values in published_cells(comparison, escape):
        scores = [escape(cell_text(cell, 0, digits)) for cell in values]
        published.append([title, style.published, *_side_by_side(comparison, scores, none)])
    shares = [escape(percent(value)) for value in comparison.chance]
    chance = [["chance", "", *_side_by_side(comparison, shares, none)]]
    return [rows for rows in (groups, published, chance if comparison.has_chance else []) if rows]


def markdown_table(comparison: GroupComparison) -> str:
    """Return a pipe table, a difference beside each score; below it notes, chosen settings, errors, τ."""
    titles = [column.title for column in comparison.columns]
    titles = _side_by_side(comparison, titles, [comparison.difference_head] * len(titles))
    head = ["", "seeds", *map(markdown_cell, titles)]
    sections = _sections(comparison, _Style(markdown_cell, markdown_score, markdown_difference, "published"))
    notes = "".join(f"\n[{number}] {note}\n" for number, note in enumerate(comparison.notes, 1))
    more = "".join(map(_noted_markdown, _noted_tables(comparison)))
    return f"{pipes(head, chain(*sections))}\n{legend(comparison)}\n{notes}{more}"


def _noted_tables(comparison: GroupComparison) -> list[NotedTable]:
    """Return the tables below the main one: chosen settings, errors of normalisers, τ."""
    one_each = [tuned_table(comparison), normaliser_table(comparison)]
    return [*(table for table in one_each if table), *tau_tables(comparison)]


def markdown_score(cell: Cell | None, seeds: int, digits: int) -> str:
    """Return a cell with its mark, as Markdown."""
    text = cell_text(cell, seeds, digits)
    return f"**{text}**" if cell and cell.mark == "best" else text


def markdown_difference(one: DifferenceText) -> str:
    """Return a difference as Markdown, in bold where its interval excludes zero."""
    return f"**{one.text}**" if one.sign else one.text


def _side_by_side(comparison: GroupComparison, cells: Sequence[str], differences: Sequence[str]) -> list[str]:
    """Return the cells of a row, each with its difference behind it where the column has any."""
    pairs = zip(cells, differences, comparison.with_difference, strict=True)
    return [word for cell, difference, has in pairs for word in ((cell, difference) if has else (cell,))]


def pipes(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Return a Markdown table of escaped cells; the first `texts` columns are left-aligned, the others right."""
    rules = ["---"] * texts + ["--:"] * (len(head) - texts)
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rules, *rows))


def _noted_markdown(table: NotedTable) -> str:
    head, *rows = ([markdown_cell(word) for word in row] for row in (table.head, *table.rows))
    return f"\n{pipes(head, rows)}\n{table.note}\n"


def latex_table(comparison: GroupComparison) -> str:
    """Return a booktabs tabular, and one for the chosen settings and each table of τ; needs \\usepackage{booktabs}."""
    # head: titles of tasks with rules below them, then headings of columns
    columns = [column.head for column in comparison.columns]
    short = f"difference, {100 * CONFIDENCE:g} %"  # a row says which is the baseline
    columns = _side_by_side(comparison, columns, [short] * len(columns))
    head = [_tex_row(["", "seeds", *map(_tex, columns)])]
    if comparison.has_heads:
        titles = [f"\\multicolumn{{{n}}}{{c}}{{{_tex(title)}}}" for title, n in comparison.heads]
        ends = list(accumulate((n for _, n in comparison.heads), initial=2))
        rules = [f"\\cmidrule(lr){{{first + 1}-{last}}}" for first, last in pairwise(ends)]
        head = [_tex_row(["", "", *titles]), " ".join(rules), *head]

    lines = [
        f"% {legend(comparison)}",
        *(f"% [{number}] {one_line(note)}" for number, note in enumerate(comparison.notes, 1)),
        *_tabular(head, _sections(comparison, _Style(_tex, _tex_score, _tex_difference, "pub.")), 1 + len(columns)),
    ]
    for table in _noted_tables(comparison):
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
    """Return a CSV line for each group and metric: raw shares in [0, 1]; no std and no intervals for one seed.

    `low` and `high` bound the confidence interval of the mean, `difference_low` and `difference_high` that of the
    difference to the baseline over `pairs` seeds. Published rows have n = 0 and the mark `published`. Lines of τ
    follow, where it differs between pairs: four digits, task and chance empty.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for g, (group, cells) in enumerate(comparison.rows):
        base, differences = comparison.baselines[g], comparison.differences[g]
        rows = zip(comparison.columns, cells, comparison.chance, differences, strict=True)
        for column, cell, chance, difference in rows:
            if cell is not None:
                line = _csv_line(group.title, column, cell) | {"chance": _exact(chance)}
                interval = mean_interval(group.values(column))
                if interval is not None:
                    line |= {"low": repr(interval.low), "high": repr(interval.high)}
                if base is not None and difference is not None:
                    line |= _csv_difference(base, difference)
                writer.writerow(line)
    for row in comparison.published:
        for column in comparison.columns:
            if column in row.values:
                writer.writerow(_csv_line(row.title, column, row.values[column]._replace(mark="published")))
    for group in groups_with_tau(comparison):
        for name, cell in tau_cells(group):
            std = "" if cell.std is None else f"{cell.std:.4g}"
            writer.writerow(
                {"group": csv_cell(group.title), "metric": name, "mean": f"{cell.mean:.4g}", "std": std, "n": cell.n}
            )
    return buffer.getvalue()


def _csv_line(title: str, column: Column, cell: Cell) -> dict[str, object]:
    words = {"group": csv_cell(title), "task": csv_cell(column.task), "metric": csv_cell(column.metric)}
    return {**words, "mean": repr(cell.mean), "std": _exact(cell.std), "n": cell.n, "mark": cell.mark}


def _csv_difference(base: SeedGroup, one: PairedDifference) -> dict[str, object]:
    low, high = one.interval or (None, None)
    return {
        "baseline": csv_cell(base.title),
        "difference": repr(one.mean),
        "difference_low": _exact(low),
        "difference_high": _exact(high),
        "pairs": one.n,
    }


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def _styled(cell: Cell | None, seeds: int, digits: int) -> Text:
    return Text(cell_text(cell, seeds, digits), "bold" if cell and cell.mark == "best" else "")


def _tex_score(cell: Cell | None, seeds: int, digits: int) -> str:
    text = _tex(cell_text(cell, seeds, digits))
    return f"\\textbf{{{text}}}" if cell and cell.mark == "best" else text


def _tex_difference(one: DifferenceText) -> str:
    return f"\\textbf{{{_tex(one.text)}}}" if one.sign else _tex(one.text)


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in one_line(text))
