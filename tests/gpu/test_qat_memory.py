"""What `moai qat` holds in a GPU's memory at full size, against its plan and what was promised: `pytest -m gpu -s
tests/gpu/test_qat_memory.py` prints the table.

Modules, kernels, loss, checkpointing and optimizer are those of the command; the codes are random, made on the GPU.
Weights, gradients and moments are what is allocated after a step whose gradients are still there; what the next step
takes beside them are activations and working memory.
"""

from __future__ import annotations

import gc

import pytest
import torch

from moai_core import cuda

pytestmark = pytest.mark.gpu

# (size, mode, method of the base): bytes of weights, gradients and optimizer that were promised.
PROMISED = {"2b": 4e9, "8b": 16e9}
CASES = [("2b", "scales", "int4"), ("2b", "qlora", "int4"), ("2b", "qlora", "bnb4")]
CASES += [("8b", "scales", "int4"), ("8b", "qlora", "int4")]
ROWS, LENGTH, STEPS = 1, 512, 3


def asked(preset, mode, method, *overrides):
    """The recipe and the options of `moai qat -r base/PRESET --mode MODE --method METHOD`."""
    from moai_core import recipe as recipes
    from moai_core.quantize import qat
    from moai_core.quantize.plan import Settings

    words = ["hardware.gpu=null", "train.precision=bf16", "train.checkpointing=full", f"train.batch_size={ROWS}"]
    recipe = recipes.load(f"base/{preset}", [*words, f"data.max_length={LENGTH}", *overrides])
    return recipe, qat.Options(mode, Settings(method))


def random_model(recipe, options, device):
    """What `moai quantize` would have made, without the model that it reads: random codes on the device."""
    from moai_core import plan as sizes
    from moai_core.bench.quantized import fill
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM
    from moai_core.quant.linear import quantized
    from moai_core.quantize import plan, qat

    numbers = sizes.numbers(recipe)
    with torch.device("meta"):
        plain = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers))
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    wanted = plan.quantization(qat._settings(options), shapes, tied=plain.config.tie_word_embeddings)
    with torch.device(device):
        model = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers, quantization=wanted))
    for layer in quantized(model).values():
        fill(layer)
    return model.to(torch.bfloat16)


def allocated(device):
    """Bytes of tensors on a GPU, without what cuBLAS took for itself."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def train(recipe, options, device):
    """Some steps; bytes held after one, by kind, bytes at the peak of another, and the losses."""
    from moai_core.quantize import qat
    from moai_core.training import optim

    torch.manual_seed(0)
    before = allocated(device)
    model = qat.prepare(random_model(recipe, options, device), options)
    qat._ready(model, recipe, torch.bfloat16, None)
    gc.collect()
    empty = torch.cuda.empty_cache if device.type == "cuda" else lambda: None
    empty()
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = optim.make_optimizer(model, recipe.optim, lr=1e-4, seed=0)
    found, losses, peaks = {}, [], []
    vocabulary, length = model.config.vocab_size, recipe.data.max_length
    for _ in range(STEPS):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(vocabulary, (ROWS, length), device=device)
        seq_idx = torch.zeros_like(ids, dtype=torch.int32)
        loss = model(ids, labels=ids, seq_idx=seq_idx, num_items=ids.numel(), seq_idx_in_order=True).loss
        loss.backward()
        optim.clip_and_step(made, parameters, optim.grad_norm(parameters), recipe.optim.clip)
        losses.append(float(loss.detach()))
        del loss
        peaks.append(torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0)
        found["together"] = allocated(device) - before
        found["gradients"] = sum(p.grad.numel() * p.grad.element_size() for p in parameters)
        states = [v for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        found["optimizer"] = sum(t.numel() * t.element_size() for t in states if t.numel() > 1)
        made.zero_grad(set_to_none=True)
    found["weights"] = found["together"] - found["gradients"] - found["optimizer"]
    return found | {"peak": peaks[-1]}, losses


@pytest.mark.parametrize(("mode", "method"), sorted({case[1:] for case in CASES}))
def test_a_small_model_trains(device, mode, method):
    """On the same way, with a quantized head where the method has one."""
    if reason := cuda.why_not(device):
        pytest.skip(reason)
    if mode == "qlora":
        pytest.importorskip("peft")
    small = ["model.num_hidden_layers=1", "model.hidden_size=128", "model.intermediate_size=256"]
    small += ["model.vocab_size=512", "model.time_step_rank=16", "data.max_length=24"]
    recipe, options = asked("2b", mode, method, *small)
    found, losses = train(recipe, options, device)
    assert found["gradients"] > 0 and all(0 < loss < 100 for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "mode", "method"), CASES)
def test_what_a_run_holds_is_what_was_planned_and_promised(device, preset, mode, method):
    from moai_core.quantize import qat

    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    if mode == "qlora":
        pytest.importorskip("peft")
    recipe, options = asked(preset, mode, method)
    planned = qat.memory(recipe, options)
    if torch.cuda.get_device_properties(0).total_memory < 10 * sum(planned.values()):
        pytest.skip("this GPU is too small to make the model's first weights")
    found, losses = train(recipe, options, device)
    gc.collect()
    torch.cuda.empty_cache()
    want = sum(planned.values())
    cells = ", ".join(f"{kind} {found[kind] / 1e9:.3f} ({planned[kind] / 1e9:.3f})" for kind in planned)
    print(
        f"\n{preset} {mode} {method}: GB measured (planned): {cells}, together {found['together'] / 1e9:.2f} "
        f"({want / 1e9:.2f}: {want / found['together']:.3f} times); peak {found['peak'] / 1e9:.2f}; losses {losses}"
    )
    assert all(loss == loss and loss < 1e4 for loss in losses)
    assert found["together"] <= PROMISED[preset]
    assert want == pytest.approx(found["together"], rel=0.05)
