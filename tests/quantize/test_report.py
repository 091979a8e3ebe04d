"""The figures of the report, against the same in float64 written out."""

from __future__ import annotations

import numpy as np
import torch

from moai_core.quantize import report


def test_divergence_and_drift(tiny_model):
    one, two = tiny_model(0).eval(), tiny_model(0).eval()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids = np.arange(600) * 7 % 97
    whole = torch.from_numpy(ids)[None]
    p, q = (m(whole).logits.double().log_softmax(-1).detach() for m in (one, two))
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert abs(report.divergence(one, two, ids) - want) < 1e-4 * want
    assert report.divergence(one, one, ids) == 0
    states = [report.states_after(m, ids, (5, 600, 9000)) for m in (one, two)]
    assert states[0].keys() == {5, 600}
    found = report.drift(states[0][600], states[1][600])
    each = []
    for layer in range(2):
        h, k = (m.model(whole, use_cache=True).state.layers[layer][1][0].detach().double() for m in (one, two))
        each.append(float((h - k).norm() / h.norm()))
    assert abs(found["mean"] - sum(each) / 2) < 1e-3 and abs(found["max"] - max(each)) < 1e-3
