"""One self-contained page about one or several runs."""

from disttempnet.report.page import build_report
from disttempnet.report.runs import RunRecord, read_run

__all__ = ["RunRecord", "build_report", "read_run"]
