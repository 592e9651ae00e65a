"""Normalisers that are predicted from an anchor's feature, in place of a table.

prototypes.py   by two matrices of prototypes that stand for the data (NeuCLIP)
"""
