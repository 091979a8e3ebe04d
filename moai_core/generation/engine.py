"""Generation: prompts in, completions out, many rows at once, each exactly as if it were alone.

Why so much care: a matrix product of M rows may round differently for every M (on CPUs the kernel changes at M = 2
and near 6, 11 and 16; on GPUs with the tile), the difference of 1e-7 sooner or later flips a token, and the rest of
the row goes another way. So a row's numbers must not depend on its company:
- a prompt is read alone, in chunks of `CHUNK` tokens (memory stays constant, whatever its length);
- decoding runs at widths whose results were found bit-identical to those of a row alone (`Widths`); a row alone is
decoded at width 2, beside a copy of itself, which costs a CPU no more than width 1 and agrees with more widths;
- settings, random numbers and stop strings belong to the row.
Rows join when there is room and leave when they are done. This is the plain engine; on a GPU decode_batch.py decodes
with kernels of its own, for which the same holds by the way they add. What is left out: speculative decoding, beam
search, prefix sharing.

Shapes: W width of a decoding step (rows and copies), V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moai_core.errors import UsageError
from moai_core.generation.row import Completion, Row
from moai_core.generation.sampling import Settings
from moai_core.generation.text import Vocabulary
from moai_core.model.state import MoaiState

CHUNK = 2048
BATCH_SIZE = 16

OnEvent = Callable[[dict[str, Any]], None]
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


# ---- reading a prompt -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def prefill(
    model: Any,
    tokens: Sequence[int],
    state: MoaiState | None = None,
    *,
    row: int = 0,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, MoaiState] | None:
    """Read tokens (at least one) after `state`, in chunks: the logits (V,) that follow and the new state, or None if
    `stop` said so.

    Events: {"event": "prefill", "row", "done", "total"} after each chunk.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
    out = None
    for begin in range(0, len(tokens), CHUNK):
        if stop():
            return None
        out = model(ids[:, begin : begin + CHUNK].to(model.device), state=state, use_cache=True, logits_to_keep=1)
        state = out.state
        if on_event is not None:
            on_event({"event": "prefill", "row": row, "done": min(begin + CHUNK, len(tokens)), "total": len(tokens)})
    assert out is not None, "a prompt has at least one token"
    return out.logits[0, -1], out.state


# ---- decoding -------------------------------------------------------------------------------------------------------


class Widths:
    """The widths at which this model, on this device and with these threads, decodes a row bit for bit as at width 2
    alone.

    Found by trying: copies of one row at the wider width must all give the logits and the state of the narrow one.
    Rows of a matrix product don't mix, so copies show whatever the width and a row's place in it change.
    """

    ALONE = 2
    TRIED = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    _known: ClassVar[WeakKeyDictionary[Any, dict[tuple, bool]]] = WeakKeyDictionary()

    def __init__(self, model: Any) -> None:
        self.model = model
        self.found = self._known.setdefault(model, {})

    def split(self, rows: int) -> list[tuple[int, int]]:
        """How to decode so many rows: (rows, width) of each step, width >= rows."""
        steps = []
        while rows:
            count, width = 1, self.ALONE
            if rows > 1:
                fitting = [width for width in self.TRIED if width < 2 * rows]
                narrow_last = [w for w in fitting if w >= rows] + [w for w in reversed(fitting) if w < rows]
                # Where not even width 2 treats both its rows alike, each row gets a step of its own.
                if (found := next((w for w in narrow_last if self.same(w)), None)) is not None:
                    count, width = min(rows, found), found
            steps.append((count, width))
            rows -= count
        return steps

    @torch.inference_mode()
    def same(self, width: int) -> bool:
        """Whether decoding at `width` gives each row what it gets alone."""
        model = self.model
        key = (width, torch.get_num_threads(), model.device, model.dtype, model.model.scan_backend)
        if key not in self.found:
            # Any tokens do; these are spread over the vocabulary and always the same.
            ids = torch.arange(1, 5, device=model.device)[None] * 7919 % model.config.vocab_size
            state = model(ids, use_cache=True, logits_to_keep=1).state
            alone, wide = (_step(model, ids[0, :1].expand(w), _repeat(state, w)) for w in (self.ALONE, width))
            self.found[key] = all(
                torch.equal(b, a[:1].expand_as(b)) for a, b in zip(_numbers(alone), _numbers(wide), strict=True)
            )
        return self.found[key]


def _numbers(step: tuple[Tensor, MoaiState]) -> list[Tensor]:
    return [step[0], *(tensor for layer in step[1].layers for tensor in layer)]


def _repeat(state: MoaiState, width: int) -> MoaiState:
    return state.select(torch.zeros(width, dtype=torch.int64))


def _join(states: Sequence[MoaiState]) -> MoaiState:
    """The rows of several states as one."""
    if len(states) == 1:
        return states[0]
    layers = zip(*(state.layers for state in states), strict=True)
    return MoaiState(
        [(torch.cat([conv for conv, _ in layer]), torch.cat([ssm for _, ssm in layer])) for layer in layers],
        torch.cat([state.seen for state in states]),
    )


def _step(model: Any, tokens: Tensor, state: MoaiState) -> tuple[Tensor, MoaiState]:
    """One token (W,) a row: logits (W, V) and the new state."""
    out = model(tokens[:, None], state=state, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.state


class Batch:
    """The rows being decoded, by the model itself: the plain engine (decode_batch.py has the other). A row that is done
    leaves with its state: what the model remembers after all its tokens but the last."""

    most = 1 << 30  # rows at a time

    def __init__(self, model: Any, widths: Widths | None = None) -> None:
        self.model = model
        self.widths = widths or Widths(model)
        self._groups: list[tuple[list[Row], MoaiState]] = []
        self._settled = True

    def __len__(self) -> int:
        return sum(not row.done for rows, _ in self._groups for row in rows)

    @torch.inference_mode()
    def add(self, row: Row, logits: Tensor, state: MoaiState) -> None:
        """A row whose prompt is read: logits (V,) after it, and its state."""
        row.start_decoding()
        row.take(logits)
        row.state = state
        if not row.done:
            self._groups.append(([row], state))
            self._settled = False

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row."""
        if not self._settled:
            self._regroup()
        for number, (rows, state) in enumerate(self._groups):
            tokens = [row.answer.tokens[-1] for row in rows]
            tokens += tokens[:1] * (state.batch_size - len(rows))
            logits, state = _step(self.model, torch.tensor(tokens, device=self.model.device), state)
            self._groups[number] = (rows, state)
            for place, row in enumerate(rows):
                row.take(logits[place])
                if row.done:
                    row.state = state.select(torch.tensor([place]))
                    self._settled = False

    def close(self, reason: str = "interrupted") -> None:
        """End every row that is still being decoded; its last token was not read by the model, as for any row."""
        for rows, state in self._groups:
            for place, row in enumerate(rows):
                if not row.done:
                    row.state = state.select(torch.tensor([place]))
                    row.finish(reason)
        self._groups = []

    def _regroup(self) -> None:
        """Rows that are done leave; the others are laid out anew."""
        places, start = [], 0
        for rows, state in self._groups:
            places += [(start + at, row) for at, row in enumerate(rows) if not row.done]
            start += state.batch_size
        self._settled = True
        if not places:
            self._groups = []
            return
        everything = _join([state for _, state in self._groups])
        self._groups = []
        for count, width in self.widths.split(len(places)):
            chosen, places = places[:count], places[count:]
            at = [place for place, _ in chosen]
            at += at[:1] * (width - count)
            self._groups.append(([row for _, row in chosen], everything.select(torch.tensor(at))))


# ---- many prompts ---------------------------------------------------------------------------------------------------


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings] = Settings(),
    *,
    batch_size: int = BATCH_SIZE,
    engine: str = "auto",
    on_text: Callable[[int, str], None] | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """Complete every prompt; the results are in the order of the prompts, and no row depends on the others.

    prompts: texts, lists of token ids, or lists of chat messages {"role", "content"}. settings: one for all or one a
    prompt. batch_size: rows decoded at a time (the others wait). engine: `graph` (a GPU; at most 64 rows at a time),
    `plain`, or `auto` for graph where it can. on_text(row, text) gets each row's text as it comes, in whole
    characters. on_event: {"event": "prefill", ...} and {"event": "row", "row", "tokens", "finish_reason", "done",
    "total"}. stop: asked before every step; True ends all unfinished rows with what they have (`interrupted`).

    Raises UsageError for prompts that can't be read (before anything is generated), for a tokenizer that doesn't fit
    the model and for an engine that can't run it, NonFiniteError when the model's logits hold NaN or infinity.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be >= 1 (got {batch_size})")
    each = [settings] * len(prompts) if isinstance(settings, Settings) else list(settings)
    if len(each) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts need as many settings (got {len(each)})")
    vocabulary = Vocabulary(tokenizer, vocab_size=model.config.vocab_size, extra_eos=eos_ids(model))
    waiting = deque((number, vocabulary.prompt(prompt)) for number, prompt in enumerate(prompts))
    rows: list[Row | None] = [None] * len(prompts)
    open_rows: dict[int, Row] = {}
    batch = make_batch(model, vocabulary, engine, rows=min(batch_size, len(prompts)))
    batch_size = min(batch_size, batch.most)
    was_training = model.training
    model.eval()

    def report() -> None:
        for number, row in list(open_rows.items()):
            if row.done:
                del open_rows[number]
                row.state = None
                if on_event is not None:
                    answer, done = row.answer, len(prompts) - len(waiting) - len(open_rows)
                    event = {"row": number, "tokens": len(answer.tokens), "finish_reason": answer.finish_reason}
                    on_event({"event": "row", **event, "done": done, "total": len(prompts)})

    try:
        while waiting or len(batch):
            while waiting and len(batch) < batch_size:
                number, ids = waiting.popleft()
                show = None if on_text is None else lambda text, number=number: on_text(number, text)
                row = Row(vocabulary, each[number], ids, device=model.device, on_text=show)
                rows[number] = open_rows[number] = row
                read = prefill(model, ids, row=number, on_event=on_event, stop=stop)
                if read is None:
                    row.finish("interrupted")
                else:
                    batch.add(row, *read)
                report()
            if stop():
                batch.close()
            elif len(batch):
                batch.step()
            report()
    finally:
        model.train(was_training)
    return [row.answer for row in rows if row is not None]


def make_batch(model: Any, vocabulary: Vocabulary, engine: str = "auto", *, rows: int = 1) -> Any:
    """An empty `Batch` of the engine wanted, for about so many rows. Raises UsageError where it can't run."""
    from moai_core.generation import decode_batch

    return decode_batch.make(model, vocabulary.size, engine, rows=rows)


def eos_ids(model: Any) -> list[int]:
    """The ids that end a text, by the model's configuration."""
    named = model.config.eos_token_id
    return [] if named is None else list(named) if isinstance(named, (list, tuple)) else [named]
