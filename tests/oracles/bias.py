"""Balancing without an auxiliary loss: DeepSeek-V3 report, section 2.1.2; arXiv 2408.15664, algorithm 1."""

import numpy as np


def update(bias, load, rate):
    """bias + rate * sign(mean load - load): mean over the experts (last dim), load of a whole step."""
    load = np.asarray(load, np.float64)
    return bias + rate * np.sign(load.mean(axis=-1, keepdims=True) - load)
