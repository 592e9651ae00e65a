"""The command line; heavy imports only inside a command.

main.py        demo, train, objectives, compare, report, temperature
data.py        data index, shard, verify, preview, download
task.py        data task
evaluate.py    evaluate
embed.py       embed
search.py      search, classify
export.py      export
push.py        push
migrate.py     migrate, import
environment.py env
completion.py  completion
launch.py      launch
slurm.py       the batch script of launch, from slurm.sbatch
model.py       flags that name a model
source.py      flags that name a data set
"""

import sys

if sys.platform == "win32":  # before the first import of what only POSIX has
    raise SystemExit("disttempnet: Windows is not supported; use WSL (Ubuntu) or Linux (macOS should work, not tested)")
