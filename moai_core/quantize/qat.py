"""Training a quantized model: `moai qat`, the loop of `moai train` over matrices that are trained as they are stored.

| mode | trained | memory of weights, gradients and Adam, against a bf16 model with fp32 Adam |
|---|---|---|
| full | every weight, behind fake quantization, and the scales | more: the weights stay, and the scales come on top |
| scales | scales and zeros of constant int4 codes | about a tenth |
| qlora | LoRA adapters beside constant int4 or nf4 matrices | about a tenth |

Fake quantization does not save memory while training: it saves quality afterwards. What a run's folder holds at every
step is the quantized model itself; full weights are training state and lie with the optimizer's. `distill` adds the KL
divergence to a teacher's predictions (arXiv 1503.02531), which recovers most of what rounding cost. Data, resuming,
metrics and signals are the loop's (moai_core/training).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from moai_core import checkpoint, weights
from moai_core import plan as memory_plan
from moai_core.errors import CheckpointError, UsageError
from moai_core.footprint import UPDATED_ALONE, UPDATES_WAITING
from moai_core.model.loss import IGNORED
from moai_core.quant import fake, linear, lora
from moai_core.quant.formats import FORMATS
from moai_core.quantize import plan
from moai_core.quantize.memory import quantize, weights_of
from moai_core.recipe import Recipe
from moai_core.training import setup
from moai_core.training.loop import train
from moai_core.training.run import Result

MODES = ("full", "scales", "qlora")
# Peak learning rates: of full by size (hidden width), as MOAI's specification has them; scales and adapters bear more.
FULL_RATES = {2048: 1e-5, 4096: 5e-6, 5120: 3e-6}
RATES = {"scales": 1e-4, "qlora": 2e-4}
# Logits that exist at once while distilling, student's and teacher's.
_CHUNK = 1 << 26


@dataclass(frozen=True)
class Options:
    """How to train. settings: how a model that isn't quantized yet is. teacher: a model folder to distill from, with
    `weight` between 0 (cross-entropy alone) and 1 (the teacher alone) and a softmax temperature. rank, alpha, dropout:
    of the adapters."""

    mode: str = "full"
    settings: plan.Settings = dataclasses.field(default_factory=lambda: plan.Settings("int4"))
    teacher: Path | None = None
    weight: float = 0.5
    temperature: float = 1.0
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    @property
    def label(self) -> str:
        """What a resumed run must agree in."""
        one = self.settings
        words = [f"qat {self.mode}", one.method, f"{one.width} bits", f"group {one.group}"]
        words += [f"rank {self.rank}", f"alpha {self.alpha:g}"] if self.mode == "qlora" else []
        words += [f"teacher's weight {self.weight:g}, temperature {self.temperature:g}"] if self.teacher else []
        return ", ".join(words)

    def check(self) -> None:
        """Raises UsageError for values that can't be."""
        if self.mode not in MODES:
            raise UsageError(f"--mode can't be {self.mode!r}", hint=f"modes: {', '.join(MODES)}")
        if not 0 <= self.weight <= 1:
            raise UsageError(
                f"--distill-weight must lie between 0 and 1 (got {self.weight})", hint="1 learns from the teacher alone"
            )
        if not 0 < self.temperature < math.inf:
            raise UsageError(
                f"--temperature must be a number > 0 (got {self.temperature})", hint="1 takes predictions as they are"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout must be at least 0 and below 1 (got {self.dropout})", hint="0 drops nothing")
        if not math.isfinite(self.alpha):
            raise UsageError(f"--alpha must be a number (got {self.alpha})", hint="twice the rank is usual")
        if self.rank < 1:
            raise UsageError(f"--rank must be >= 1 (got {self.rank})", hint="16 is usual")
        if self.mode == "qlora":
            lora.require()
        elif self.settings.spec().format not in ("int4", "int8"):
            raise UsageError(
                f"--mode {self.mode} trains int4 and int8 (got --method {self.settings.method})", hint="--method int4"
            )
        if self.mode == "scales" and self.settings.width != 4:
            raise UsageError("--mode scales trains the scales of 4-bit codes", hint="--bits 4, or --mode full")


def qat(
    recipe: Recipe,
    options: Options,
    *,
    model_path: Path | None = None,
    resume: str = "auto",
    output: Path | None = None,
    **more: Any,
) -> Result:
    """Trains `model_path` (quantized already, or quantized first by round-to-nearest), or a model from scratch in mode
    full, as `training.train` does, with the learning rate of the mode unless the recipe's is the user's own. Raises
    what that raises, and UsageError for options that don't fit.
    """
    options.check()
    if model_path is None and options.mode != "full" and resume in ("auto", "never"):
        _needs_model(recipe, options, output, resume)
    teacher = Teacher(options) if options.teacher is not None else None
    kind = dataclasses.replace(
        setup.MAMBA,
        new=lambda recipe, tokenizer: prepare(setup.new_model(recipe, tokenizer), options, recipe.train.seed),
        load=lambda folder, recipe, tokenizer, dtype, on_event: _load(
            folder, recipe, tokenizer, dtype, on_event, options
        ),
        ready=lambda model, recipe, dtype: _ready(model, recipe, dtype, teacher),
        label=options.label,
    )
    return train(recipe, model_path=model_path, resume=resume, output=output, kind=kind, **more)


def _needs_model(recipe: Recipe, options: Options, output: Path | None, resume: str) -> None:
    folder = Path(output or recipe.output or f"runs/{recipe.name}")
    if resume == "never" or not folder.is_dir() or checkpoint.latest(folder) is None:
        raise UsageError(
            f"--mode {options.mode} trains a model that is there already: --model is missing",
            hint="--model runs/mine; --mode full can start from scratch",
        )


def learning_rate(mode: str, hidden: int) -> float:
    """The peak learning rate that suits the mode; of full, that of the nearest of the three sizes, and for narrower
    models the more the narrower they are, as between 2b and 8b."""
    if mode == "full" and hidden < min(FULL_RATES):
        return FULL_RATES[min(FULL_RATES)] * min(FULL_RATES) / hidden
    return RATES.get(mode) or FULL_RATES[min(FULL_RATES, key=lambda size: abs(size - hidden))]


def prepare(model: Any, options: Options, seed: int = 0) -> Any:
    """The model in the form that is trained, in place: quantized by rounding where it isn't yet, then with trained
    weights, scales, or adapters that begin as `seed` says."""
    masters = None
    if model.config.quantization is None:
        if options.mode == "full":
            masters = weights_of(model)
        quantize(model, _settings(options))
    if options.mode == "qlora":
        if not lora.adapted(model):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                lora.attach(model, rank=options.rank, alpha=options.alpha, dropout=options.dropout)
        return model
    fake.trainable(model, options.mode, masters)
    return model


def _settings(options: Options) -> plan.Settings:
    if options.mode == "scales" and options.settings.symmetric is None:
        return dataclasses.replace(options.settings, symmetric=False)  # zeros can be trained too
    return options.settings


def _load(folder: Path, recipe: Recipe, tokenizer: Any, dtype: torch.dtype, on_event: Any, options: Options) -> Any:
    model = setup.load_model(folder, recipe, tokenizer, dtype, on_event)
    if lora.adapted(model) and options.mode != "qlora":
        raise CheckpointError(f"{folder}: has adapters, which --mode {options.mode} doesn't train", hint="merge them")
    return prepare(model, options, recipe.train.seed)


def _ready(model: Any, recipe: Recipe, dtype: torch.dtype, teacher: Teacher | None) -> None:
    setup.make_ready(model, recipe, dtype)
    linear.set_kernel(model, "dequantize" if dtype == torch.float32 else "auto")
    if teacher is not None:
        model.objective = teacher.objective(model)


# ---- before a run ------------------------------------------------------------------------------------------------


def memory(recipe: Recipe, options: Options) -> dict[str, int]:
    """Bytes of what stays over a whole step, {"weights", "gradients", "optimizer"}, counted matrix by matrix, for a
    model of the recipe's size; activations are as in `moai train`. The teacher of a distillation is not among them.
    With optim.in_backward gradients are what there is of them at once. Raises UsageError where a matrix doesn't fit its
    format."""
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    with torch.device("meta"):
        model = MoaiMambaForCausalLM(MoaiMambaConfig(**memory_plan.numbers(recipe)))
    dtype, _ = setup.precision(recipe)
    settings = _settings(options)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = plan.modules(settings, shapes, tied=model.config.tie_word_embeddings)
    specs = linear.plan({"modules": modules}, list(linear.matrices(model)))
    matrices: dict[str, Any] = linear.matrices(model)
    held, twice = 0, 0
    trained: list[tuple[int, int]] = []
    for name, matrix in matrices.items():
        if name == "lm_head" and model.config.tie_word_embeddings:
            continue
        plain, more = _bytes(matrix.weight.shape, specs.get(name), options, dtype, name)
        held += plain
        trained += more
        if "embed" in name and model.config.tie_word_embeddings:
            twice = sum(width * numbers for width, numbers in more)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in matrices:
            width = 4 if name.rpartition(".")[2] in weights.KEEP_FP32 else dtype.itemsize
            held += parameter.numel() * width
            trained += [(width, parameter.numel())] if options.mode == "full" else []
    return {"weights": held, "gradients": _gradients(recipe, trained, twice), "optimizer": _moments(recipe, trained)}


def _bytes(shape: Any, spec: Any, options: Options, dtype: torch.dtype, name: str) -> tuple[int, list[tuple[int, int]]]:
    """One matrix: (bytes of its weights, [(bytes of a number, numbers) of each parameter that is trained])."""
    out, columns = shape
    stored = FORMATS[spec.format].tensors(spec, out, columns) if spec is not None else {}
    parts = [(4, torch.Size(size).numel()) for part, (size, _) in stored.items() if part in ("scales", "zeros")]
    scales = sum(numbers for _, numbers in parts)
    packed = sum(torch.Size(size).numel() * kind.itemsize for size, kind in stored.values())
    numbers = out * columns
    if options.mode == "full":
        return numbers * dtype.itemsize + 4 * scales, [(dtype.itemsize, numbers), *parts]
    if options.mode == "scales":
        trained = spec is not None and spec.format == "int4" and "embed" not in name
        return (packed + 2 * scales, parts) if trained else (packed or numbers * dtype.itemsize, [])
    sides = (out, columns) if name.rpartition(".")[2] in lora.TARGETS else ()
    width, adapters = dtype.itemsize, [(dtype.itemsize, options.rank * side) for side in sides]
    return (packed or numbers * width) + sum(width * size for _, size in adapters), adapters


def _gradients(recipe: Recipe, trained: list[tuple[int, int]], twice: int) -> int:
    """Bytes, in the weights' types. Updated inside of the backward pass: of the small parameters, the largest of the
    others and, on a GPU, those that wait for their updates; `twice` are of what has its gradient from the head until
    the embedding's comes."""
    every = sum(width * numbers for width, numbers in trained)
    if not recipe.optim.in_backward:
        return every
    large = [width * numbers for width, numbers in trained if numbers >= UPDATED_ALONE]
    waiting = UPDATES_WAITING if recipe.hardware.gpu != "cpu" else 0
    return min(every, every - sum(large) + max(large, default=0) + twice + waiting)


def _moments(recipe: Recipe, trained: list[tuple[int, int]]) -> int:
    """Bytes: two moments in the weights' types, but for what keeps fp32 weights beside bf16 ones, and moments of a
    byte."""
    total = 0
    for width, numbers in trained:
        total += {"adamw_8bit": 2, "adamw": 12 if width == 2 else 8}.get(recipe.optim.name, 2 * width) * numbers
    return total


# ---- distillation ------------------------------------------------------------------------------------------------


class Teacher:
    """The model whose predictions a student learns; its weights take memory, its gradients none."""

    def __init__(self, options: Options) -> None:
        assert options.teacher is not None
        checkpoint.find(options.teacher)  # a wrong path is told before a run begins
        self.options, self.path = options, options.teacher
        self._model: Any = None

    def objective(self, student: Any) -> Any:
        """The training loss of `student`, as MoaiMambaForCausalLM.objective is called."""

        def loss(hidden: Tensor, targets: Tensor, num_items: Any, inputs: dict[str, Any]) -> Tensor:
            teacher = self._ready(student)
            with torch.no_grad():
                wanted = teacher.model(**inputs, use_cache=False).last_hidden_state
            count = (targets != IGNORED).sum().clamp(min=1) if num_items is None else num_items
            return self._sum(hidden, wanted, targets, student.lm_head, teacher.lm_head) / count

        return loss

    def _ready(self, student: Any) -> Any:
        if self._model is None:
            found = checkpoint.load_model(self.path, device=student.device, dtype=student.dtype)
            if found.config.vocab_size != student.config.vocab_size:
                raise UsageError(
                    f"--distill {self.path}: its vocabulary has {found.config.vocab_size} entries, the "
                    f"student's {student.config.vocab_size}",
                    hint="the teacher must have the student's tokenizer",
                )
            self._model = found.requires_grad_(False)
        return self._model

    def _sum(self, hidden: Tensor, wanted: Tensor, targets: Tensor, head: Any, other: Any) -> Tensor:
        """Weighted cross-entropy and KL divergence, summed over the counted targets, a chunk of logits at a time."""
        keep = targets.reshape(-1) != IGNORED
        rows = [t.reshape(-1, t.shape[-1])[keep] for t in (hidden, wanted)]
        labels = targets.reshape(-1)[keep]
        total = hidden.sum() * 0.0
        size = max(16, _CHUNK // head.out_features)
        for student, teacher, label in zip(rows[0].split(size), rows[1].split(size), labels.split(size), strict=True):
            total = total + recompute(self._chunk, student, teacher, label, head, other, use_reentrant=False)
        return total

    def _chunk(self, student: Tensor, teacher: Tensor, labels: Tensor, head: Any, other: Any) -> Tensor:
        weight, heat = self.options.weight, self.options.temperature
        logits = head(student).float()
        with torch.no_grad():
            likely = F.log_softmax(other(teacher).float() / heat, dim=-1)
        # Times the square of the temperature, so that its gradients keep their size (arXiv 1503.02531, section 2).
        divergence = F.kl_div(F.log_softmax(logits / heat, dim=-1), likely, reduction="sum", log_target=True) * heat**2
        return weight * divergence + (1 - weight) * F.cross_entropy(logits, labels, reduction="sum")


# ---- afterwards --------------------------------------------------------------------------------------------------


def merge(run: Path, target: Path, *, dtype: torch.dtype | None, tokenizer: Any = None) -> Path:
    """Writes the model of a qlora run with its adapters merged: dtype None rounds to the base's format again, another
    stores plain weights of that type. Raises CheckpointError for a model without adapters."""
    model = checkpoint.load_model(run)
    if not lora.adapted(model):
        raise CheckpointError(f"{run}: has no adapters to merge")
    lora.merge(model, dtype=dtype)
    if dtype is not None:
        _plain(model, dtype)
    return checkpoint.save_model(target, model, tokenizer)


def _plain(model: Any, dtype: torch.dtype) -> None:
    """Nothing quantized is left: embedding and head as plain modules too."""
    for name, layer in linear.quantized(model).items():
        weight = torch.nn.Parameter(lora.plain_weight(layer).to(dtype))
        if isinstance(layer, linear.QuantEmbedding):
            new: Any = torch.nn.Embedding(layer.out_features, layer.in_features, device="meta")
        else:
            new = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        new.weight = weight
        linear.replace(model, name, new)
    for layer in model.model.layers:
        if (scale := layer.mamba.conv_scale) is not None:
            # AWQ's vector goes back into the columns of the two that read what it scales.
            for reader in (layer.mamba.x_proj, layer.mamba.out_proj):
                reader.weight = torch.nn.Parameter((reader.weight.float() * scale).to(dtype))
            layer.mamba.conv_scale = None
    if isinstance(model.lm_head, linear.TiedHead):
        head = model.lm_head
        model.lm_head = torch.nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config.quantization, model.config.use_quantization = None, False
    model.to(dtype)
