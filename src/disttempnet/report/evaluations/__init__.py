"""Reports over evaluations on many tasks.

compare.py   reading, tables, pairwise differences
page.py      the report in every format
plots.py     its charts
"""
