"""Files, processes and progress.

files.py      atomic writing, locks, checked reading
jobs.py       a pool of worker processes
machine.py    cores, open files, memory
paths.py      paths with `~`
progress.py   the progress display: a bar, or a line from time to time
ranges.py     ranges of config keys, flags and arguments
columns.py    memory-mapped columns in one file
"""
