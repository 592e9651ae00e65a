"""Tables and the page over groups of seeds.

intervals.py          confidence intervals of means and of paired differences
groups.py             groups of runs that differ only in the seed: mean, standard deviation
comparison.py         groups × metrics, and differences to a baseline
tables.py             the table as text, Markdown, LaTeX and CSV
tau_tables.py         tables of τ
tuned_table.py        the table of settings that were chosen by trials
normaliser_table.py   the table of normaliser errors
figure.py             a figure of one metric, as an SVG file
page.py               the page
plots.py              its charts
"""
