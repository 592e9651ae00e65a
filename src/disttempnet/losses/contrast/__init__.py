"""All pairs of a batch: statistics and closed-form gradients, without a B × B tensor.

backend.py   chooses the implementation: statistics, feature_gradients
blocks.py    in blocks of rows and columns, on any device
triton.py    as kernels for NVIDIA GPUs
pairs.py     what is contrasted
"""
