"""Checkpoints: our own safetensors folders, those of training runs, and the released Hugging Face layout, FP8 included."""

from .hf import from_hf as from_hf
from .hf import to_hf as to_hf
from .own import load as load
from .own import save as save
from .training import latest_training as latest_training
from .training import load_training as load_training
from .training import save_training as save_training
