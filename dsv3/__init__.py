"""DeepSeek-V3 as pure functions on a params pytree, compiled by MindSpore."""
from .config import SMALL, TINY, V3, V3_16EXPERTS, V3_1B, V3_4LAYER, Config
from .model import forward, init, loss_fn, param_specs
from .transform import jit, value_and_grad
