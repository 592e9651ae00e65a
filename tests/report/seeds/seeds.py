"""Invented results of three objectives over seeds."""

from __future__ import annotations

import csv
import io

from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.tables import csv_table
from tests.report.invented import result

TASK = "emoji-concepts"

CLIP = (0.20, 0.22, 0.24)

TEMPNET = (0.23, 0.25, 0.27)  # ± 0.02

OTHER = (0.004, 0.006)


def runs() -> list:
    made = [result("clip", s, {TASK: {"acc1": v, "acc1_head": 0.5, "acc1_tail": 0.1}}) for s, v in enumerate(CLIP)]
    made += [result("x", s, {TASK: {"acc1": v}}, title="A_B & τ|<b>") for s, v in enumerate(TEMPNET)]
    return made + [result("sogclr", s, {TASK: {"acc1": v}}) for s, v in enumerate(OTHER)]


def csv_rows(results: list) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_table(compare_groups(results, [f"{TASK}/acc1"])))))
