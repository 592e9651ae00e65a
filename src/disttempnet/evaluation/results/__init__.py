"""Results of an evaluation.

scores.py     scores with chance levels, compared over runs
records.py    a line a finished task
averages.py   averages over groups of tasks, with their coverage
summary.py    summary.json: what was evaluated, with what
tables.py     tables for the terminal
export.py     CLIP_benchmark's JSON, open_clip's CSV
file.py       results.json: scores of one checkpoint
"""
