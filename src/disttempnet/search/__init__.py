"""A trained model on images: search by words, and classes of your own.

command.py    `disttempnet search` and `classify`
features.py   unit features of images, embedded once
nearest.py    the nearest images of a query
classes.py    classes of your own
tau.py        τ of a classification
page.py       the page
"""
