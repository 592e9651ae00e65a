"""Listings: rows that name images.

readers.py   JSON, CSV, folders of images with captions beside them
parquet.py   images inside Parquet files
index.py     rows, validated and copied into one memory-mapped file
open.py      a listing as a source of samples
"""
