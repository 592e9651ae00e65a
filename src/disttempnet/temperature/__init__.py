"""Temperatures as a tool: τ of every sample of a data set as a table, and a page about them.

items.py      what τ is asked of: pairs, images, captions
measure.py    items → features → τ and log u, in chunks
table.py      rows → CSV or Parquet
statistics.py     what the page remembers of a data set
analysis.py   what τ goes with: frequency, ambiguity, clusters, the network
plots.py      charts
page.py       the page
command.py    all of it, for the command line
"""
