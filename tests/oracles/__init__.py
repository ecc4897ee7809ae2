"""Float64 NumPy references written from the papers' equations: no MindSpore, no dsv3, no torch.

Parameters are a flat dict of published Hugging Face names to float64 arrays (weights are [out, in]);
configurations are the released config.json as a dict. Dims: B batch, T query tokens, S key tokens, D hidden,
H heads, N qk_nope, R qk_rope, V v_head, Q q_lora, C kv_lora, F ffn, E experts, G groups, K top-k, W
vocabulary.
"""
