"""Tables and the page over groups of seeds.

groups.py       runs that differ only in their seed: mean (std), what is marked
tables.py       as text, Markdown, LaTeX, CSV;  tau_tables.py: τ
page.py         the page, and which report a file's ending asks for
plots.py        its charts
"""
