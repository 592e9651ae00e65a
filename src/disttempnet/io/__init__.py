"""Files, processes and the terminal.

files.py      small files replaced atomically; whether a path can be written
jobs.py       jobs over worker processes
progress.py   how far a long command is: a bar, or a line from time to time
machine.py    how many cores there are
"""
