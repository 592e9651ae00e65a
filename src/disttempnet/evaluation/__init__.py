"""Zero-shot evaluation: tasks are rows of tasks.toml, protocols are code."""

from disttempnet.evaluation.runner import TaskResult, embed_captions, embed_samples, evaluate
from disttempnet.evaluation.scores import Scores, from_record, to_record
from disttempnet.evaluation.table import results_table

__all__ = [
    "Scores",
    "TaskResult",
    "embed_captions",
    "embed_samples",
    "evaluate",
    "from_record",
    "results_table",
    "to_record",
]
