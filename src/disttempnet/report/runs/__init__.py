"""The page about single runs.

page.py       the page
plots.py      its charts, and the style of all charts
examples.py   predictions, retrievals and extremes of τ
"""
