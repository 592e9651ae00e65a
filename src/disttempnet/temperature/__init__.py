"""Temperatures as a tool: τ of every sample of a data set as a table, and a page about them.

measure.py    items → features → τ and log u, in chunks
table.py      rows → CSV or Parquet
statistics.py statistics of a data set for the page
analysis.py   correlations of τ with frequency and ambiguity; clusters; the network
plots.py      charts
page.py       the page
command.py    all of it, for the command line
"""
