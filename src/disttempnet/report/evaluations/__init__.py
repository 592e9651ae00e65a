"""Evaluations on many tasks: compare.py reads and compares them, page.py writes the report, plots.py its charts."""
