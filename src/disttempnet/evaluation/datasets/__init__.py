"""Evaluation data in the layouts that people have.

open.py             which layout lies below a data root
classification.py   labelled images
retrieval.py        images with captions
image_folder.py     a folder a class, CIFAR's files
convert.py          a raw folder → tars
built.py            tasks on data that a command builds
cifar.py            CIFAR's files
class_names.py      names of classes, from files and folders
own.py              data of your own as a task
"""
