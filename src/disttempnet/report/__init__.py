"""Reports about runs.

write.py       the report that a file's ending asks for
read.py        run folders
compact.py     compact results: one JSON line a run
bins.py        τ against another number of the items, in bins
accuracy_by_tau.py   zero-shot accuracy in bins of τ
items.py       pairs, images and captions whose τ is computed
page.py        shared parts of pages: templates, provenance, differences
runs/          the page about single runs
seeds/         tables and the page over groups of seeds
evaluations/   tables and the page over the 38 tasks, beside published rows
templates/     HTML and CSS
"""

from disttempnet.report.read import RunRecord, read_run
from disttempnet.report.runs.page import build_report
from disttempnet.report.write import write_report

__all__ = ["RunRecord", "build_report", "read_run", "write_report"]
