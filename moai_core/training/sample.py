"""Text that the model writes while it is trained: transformers' `generate`, with random numbers of its own.

The generators that training uses are put back afterwards, so that a run takes the same steps whether it samples or not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from moai_core.training.stop import StopFlag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPERATURE, TOP_P = 0.8, 0.95


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: tuple[str, ...],
    *,
    tokens: int,
    seed: int,
    autocast: AbstractContextManager[Any],
    stop: StopFlag,
) -> list[dict[str, str]]:
    """[{prompt, text}] for each prompt (a lone empty one when there is none); temperature 0.8, top-p 0.95. Empty when
    `stop` was asked for.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Asked(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), bool(stop), device=input_ids.device)

    device = next(model.parameters()).device
    written = []
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), autocast:
            torch.manual_seed(seed)
            for prompt in prompts or ("",):
                ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
                given = torch.tensor([ids], device=device)
                made = model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=tokens,
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_p=TOP_P,
                    top_k=0,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id
                    if tokenizer.pad_token_id is not None
                    else tokenizer.eos_token_id,
                    stopping_criteria=StoppingCriteriaList([Asked()]),
                )
                if stop:
                    return []
                text = str(tokenizer.decode(made[0, len(ids) :].tolist(), skip_special_tokens=True))
                written.append({"prompt": prompt, "text": text})
    finally:
        model.train(was_training)
    return written
