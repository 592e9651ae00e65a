"""The page about single runs: page.py, its charts in plots.py, its examples in examples.py."""
