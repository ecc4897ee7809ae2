"""Checkpoints: our own format, those of a training run, and Hugging Face's."""

from .hf import from_hf, to_hf
from .own import load, save
from .training import latest_training, load_training, save_training
