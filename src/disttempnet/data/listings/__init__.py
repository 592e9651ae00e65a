"""Data that is no tar: rows that name images.

readers.py   JSON, CSV, folders of images with captions beside them
parquet.py   images inside Parquet files
index.py     the rows, validated and copied into one file that is mapped into memory
open.py      a listing as a source of samples
"""
