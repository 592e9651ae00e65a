"""Temperatures: τ of every anchor, constant or learned.

scalar.py    constant · one, learnable · per sample
network.py   predicted from the anchor's feature by a network (icml24, dist, mlp)
lead.py      the measure that tells when a network may start
"""
