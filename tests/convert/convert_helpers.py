"""What the conversions' tests share: shapes, random models whose every part shows in the logits, ways to run them."""

from __future__ import annotations

import torch

# Odd sizes, a rank that isn't H / 16, other widths of the convolution and of the expansion.
SHAPES = [
    {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5},
    {
        "vocab_size": 211,
        "hidden_size": 33,
        "num_hidden_layers": 3,
        "state_size": 16,
        "conv_kernel_size": 3,
        "time_step_rank": 7,
    },
    {
        "vocab_size": 64,
        "hidden_size": 70,
        "num_hidden_layers": 1,
        "state_size": 9,
        "expand_factor": 3,
        "conv_kernel_size": 2,
    },
]


def shake(model):
    """Moves weights that start at one or zero, so that a mapping that forgets or swaps them shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith((".D", "_f.weight")):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("A_log"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def ours(model, ids):
    """moai's logits (B, L, V) of the whole sequence."""
    return model(ids, use_cache=False).logits


@torch.no_grad()
def whole(model, ids):
    """transformers' logits of the whole sequence, without a cache."""
    return model(ids, use_cache=False).logits


@torch.no_grad()
def step_by_step(model, ids):
    """transformers' logits a token at a time, through its cache (which restarts when it gets several)."""
    cache, steps = None, []
    for token in ids.T:
        name = "cache_params" if "mamba" in model.config.model_type else "past_key_values"
        out = model(token[:, None], use_cache=True, **{name: cache})
        cache = getattr(out, name)
        steps.append(out.logits)
    return torch.cat(steps, 1)
