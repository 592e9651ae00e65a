"""What runs became: a page about single runs, or tables and a page about groups of seeds."""

from disttempnet.report.comparison import write_report
from disttempnet.report.page import build_report
from disttempnet.report.runs import RunRecord, read_run

__all__ = ["RunRecord", "build_report", "read_run", "write_report"]
