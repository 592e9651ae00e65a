"""Listings: rows that name images.

readers.py      JSON, CSV, folders of images with captions beside them
parquet.py      images inside Parquet files
index.py        rows, validated and copied into one memory-mapped file
open.py         a listing as a source of samples
delimited.py    CSV, TSV and other tables as text
encodings.py    the encoding of a text file
fields.py       which fields of a row hold image and captions
json_kinds.py   JSON files that are one object: COCO, Karpathy, pandas
listed.py       images of a listing with all their fields, for evaluation
"""
