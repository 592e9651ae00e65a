"""Objectives outside the family, one a file: siglip, cyclip, vicreg, onlineclr, amorlip.

siglip.py      binary classification of every pair
cyclip.py      CLIP with consistent similarities
vicreg.py      variance, invariance, covariance
onlineclr.py   two means, each tracked by one number
amorlip.py     amortised partition functions
"""
