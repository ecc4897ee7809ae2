"""Measurements, runnable as ``python -m dsv3.bench NAME``: train, peer, depth, kernels, data."""
