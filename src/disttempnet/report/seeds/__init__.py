"""Tables and the page over groups of seeds.

groups.py       groups of runs that differ only in the seed: mean, standard deviation, marks
tables.py       the table as text, Markdown, LaTeX and CSV
tau_tables.py   tables of τ
page.py         the page
plots.py        its charts
"""
