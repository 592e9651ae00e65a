"""Temperatures as a tool: τ of every sample of a data set as a table, and a page about them.

items.py     what τ is asked of: pairs of a source, images in a folder, captions in a file
measure.py   items → features → τ and log u, streamed in chunks
table.py     rows → CSV or Parquet
census.py    what the page remembers of a whole data set: a few numbers a sample
analysis.py  frequency, ambiguity, clusters, prototypes, parameters
plots.py page.py page.html   the page
command.py   `disttempnet temperature`
"""
