"""Normalisers that are predicted from an anchor's feature, in place of a table.

amortised.py    by two small networks that are fitted anew every epoch (AmorLIP)
prototypes.py   by two matrices of prototypes that stand for the data (NeuCLIP)
"""
