"""transformers' DeepSeek-V3 as the makers of goldens use it: in float32 as it is, and truly in float64.

Its router, norms, softmax and rotary tables ask for float32 whatever the weights are. Under `Float64` every
such request is answered with float64, so the same modules run in double precision from end to end.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter


class Float64(TorchFunctionMode):
    """While active, torch.float32 as an argument means torch.float64, and x.float() means x.double()."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        args = tuple(widen(a) for a in args)
        kwargs = {name: widen(value) for name, value in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def hf_config(cfg):
    """The released config.json (a dict) as transformers' own, with plain loops for attention and experts."""
    config = DeepseekV3Config(**cfg)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def load(folder):
    """(model, context to run it in): float32, by from_pretrained, which must find every tensor."""
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    if any(info.values()):
        raise RuntimeError(f"{folder}: transformers loaded it with {info}")
    return model, contextlib.nullcontext()


def build(cfg, state=None):
    """(model, context to run it in): float64, with the state dict `state` or weights of its own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            model = DeepseekV3ForCausalLM(hf_config(cfg))
    finally:
        torch.set_default_dtype(before)
    if state is not None:
        model.load_state_dict({name: value.double() for name, value in state.items()}, strict=True)
    wrong = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.dtype != torch.float64]
    if wrong:
        raise RuntimeError(f"not in float64: {wrong}")
    return model, Float64()


@contextlib.contextmanager
def capture_routing(*modules):
    """A list that gets (logits [tokens, E], weights, indices [tokens, K], bias [E]) at every router call."""
    calls = []

    def note(router, _, out):
        calls.append((*out, router.e_score_correction_bias.detach().clone()))

    routers = [m for root in modules for m in root.modules() if isinstance(m, DeepseekV3TopkRouter)]
    handles = [router.register_forward_hook(note) for router in routers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def gap(values, k):
    """The least difference between the k-th and the next value of any row; inf when there is no next."""
    if values.shape[-1] <= k:
        return float("inf")
    top = values.sort(dim=-1, descending=True).values
    return float((top[..., k - 1] - top[..., k]).min())


def choices(logits, bias, config, fill):
    """(group scores [tokens, G], biased scores [tokens, E] with `fill` in the groups that are out)."""
    choice = (torch.sigmoid(logits.detach().double()) + bias.double()).unflatten(-1, (config.n_group, -1))
    groups = choice.topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(-1, groups.topk(config.topk_group, dim=-1).indices, True)
    return groups, torch.where(kept[..., None], choice, fill).flatten(-2)


def min_margin(logits, bias, config):
    """The closest choice: of groups, of experts, or of the unbiased K experts of the balance loss."""
    groups, choice = choices(logits, bias, config, float("-inf"))
    unbiased = torch.sigmoid(logits.detach().double())
    k = config.num_experts_per_tok
    return min(gap(groups, config.topk_group), gap(choice, k), gap(unbiased, k))


def masked_with_zero(logits, bias, indices, config):
    """Tokens that would choose other experts if the groups that are out were given 0 instead of -inf."""
    _, choice = choices(logits, bias, config, 0.0)
    other = choice.topk(config.num_experts_per_tok, dim=-1).indices.sort(dim=-1).values
    return int((other != indices.sort(dim=-1).values).any(dim=-1).sum())


def by_published_name(tensors):
    """transformers' names -> published ones: experts unstacked, gate and up apart. Values become NumPy."""
    out = {}
    for name, value in tensors.items():
        value = value.detach().numpy()
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                stem, half = f"{name.removesuffix('gate_up_proj')}{expert}", len(both) // 2
                out[f"{stem}.gate_proj.weight"], out[f"{stem}.up_proj.weight"] = (
                    both[:half].copy(),
                    both[half:].copy(),
                )
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                out[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down.copy()
        else:
            out[name] = value.copy()
    return out


def grads_by_published_name(model):
    """The gradient of every parameter (zero where the loss does not reach it) under the published names."""
    return by_published_name(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    )
