"""Zero-shot evaluation: tasks are rows of tasks.toml, protocols are code.

tasks.py            the rows of tasks.toml, and samples
evaluator.py        towers on tasks, over ranks
outputs.py          results in files
command.py          the command
progress.py         one line about many tasks
encoder.py          images and texts → features
class_features.py   class texts, cached
loader.py           decoded ahead
cached.py           tasks on cached features of locked towers
score.py            one pass over the images
protocols.py        from features to metrics, by the kind of task
linear_probe.py     logistic regression on fixed features
probes.py           linear probes of tasks with a train split
metrics.py          ranking metrics, with chance levels
scores.py           scores as JSON, and over runs
embed.py            features of samples and captions that belong to no task
validation.py       samples of a run's own data that it was not trained on
tars.py             the walk through a task's tar
datasets/           the layouts that people have
results/            records, averages, tables, exports
"""

from disttempnet.evaluation.embed import embed_captions, embed_samples
from disttempnet.evaluation.evaluator import TaskResult, evaluate
from disttempnet.evaluation.results.tables import results_table
from disttempnet.evaluation.scores import Scores, from_record, to_record

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
