"""An independent float64 forward pass of the whole model, written token by token from the papers' equations with numpy.

It shares nothing with moai but the names of the tensors, so that the tests in this folder compare two readings of the
same mathematics.
"""

from __future__ import annotations

import numpy as np


def _rms(x, weight, eps):
    return weight * x / np.sqrt(np.mean(x * x) + eps)


def _silu(x):
    return x / (1 + np.exp(-x))


def _softplus(x):
    return np.logaddexp(0.0, x)


def logits(weights, config, ids, mask=None):
    """Logits (L, V) in float64 of one row of token ids; positions with mask 0 are skipped entirely (their logits are
    NaN).
    """
    w = {name: value.double().numpy() for name, value in weights.items()}
    inner, state, kernel = config.expand_factor * config.hidden_size, config.state_size, config.conv_kernel_size
    rank = config.time_step_rank
    memory = [(np.zeros((kernel, inner)), np.zeros((inner, state))) for _ in range(config.num_hidden_layers)]
    out = []
    for position, token in enumerate(ids):
        if mask is not None and not mask[position]:
            out.append(np.full(config.vocab_size, np.nan))
            continue
        x = w["model.embed_tokens.weight"][token]
        for index in range(config.num_hidden_layers):
            p = f"model.layers.{index}."
            window, h = memory[index]
            normed = _rms(x, w[p + "input_layernorm.weight"], config.rms_norm_eps)
            u, z = np.split(w[p + "mamba.in_proj.weight"] @ normed, 2)
            window = np.vstack([window[1:], u])
            taps = w[p + "mamba.conv1d.weight"][:, 0, :].T
            u = _silu((window * taps).sum(0) + w[p + "mamba.conv1d.bias"])
            dt, B, C = np.split(w[p + "mamba.x_proj.weight"] @ u, [rank, rank + state])
            if config.dt_bc_norm:
                dt = _rms(dt, w[p + "mamba.dt_layernorm.weight"], config.dt_bc_norm_eps)
                B = _rms(B, w[p + "mamba.b_layernorm.weight"], config.dt_bc_norm_eps)
                C = _rms(C, w[p + "mamba.c_layernorm.weight"], config.dt_bc_norm_eps)
            dt = _softplus(w[p + "mamba.dt_proj.weight"] @ dt + w[p + "mamba.dt_bias"])
            A = -np.exp(w[p + "mamba.A_log"])
            h = np.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B[None, :]
            y = (h @ C + w[p + "mamba.D"] * u) * _silu(z)
            x = x + w[p + "mamba.out_proj.weight"] @ y
            memory[index] = (window, h)
            if config.ffn == "swiglu":
                normed = _rms(x, w[p + "pre_ff_layernorm.weight"], config.rms_norm_eps)
                gate, up = (
                    w[p + "feed_forward.gate_proj.weight"] @ normed,
                    w[p + "feed_forward.up_proj.weight"] @ normed,
                )
                x = x + w[p + "feed_forward.down_proj.weight"] @ (_silu(gate) * up)
        out.append(w["lm_head.weight"] @ _rms(x, w["model.final_layernorm.weight"], config.rms_norm_eps))
    return np.stack(out)
