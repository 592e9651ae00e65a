"""Evaluation data in the layouts that people have.

open.py             which layout lies below a data root
classification.py   labelled images
retrieval.py        images with captions
image_folder.py     a folder a class, CIFAR's files
convert.py          a raw folder → tars
"""
