"""Batches for training and validation: packed rows, mixtures, shards, and a position small enough for a checkpoint.

Every source is an endless sequence of rows: its rows once, permuted by (seed, epoch), then again with the next
epoch's permutation. The loader is one global sequence of rows over all sources; mixtures take turns by a fixed
pattern with exact proportions (a weight is a share of the rows, hence of the tokens up to padding). Rank r of W takes
the rows g·W + r, so the sequence doesn't depend on the number of ranks, workers or batches, and the position of a
cached source is ONE number, the rows consumed: resuming is exact and O(1). A last batch that an epoch can't fill goes
on with the next.

Streams (`hf://`, or `streaming: true`) are packed a window of documents at a time; their position is the reader's
position at the start of the window and the row inside it. Each rank reads the whole stream and builds its own rows,
which keeps the sequence the same at any world size. Left out: shuffling of streams beyond a window; several worker
processes for one stream (one prefetches)."""

from __future__ import annotations

import atexit
import hashlib
import itertools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moai_core.data.cache import Tokens, tokenized
from moai_core.data.pack import held_out, split_documents
from moai_core.data.rows import CachedRows, Collate, Row, Turns, permutation
from moai_core.data.stream import StreamRows
from moai_core.data.tokenize import token_bytes
from moai_core.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OnEvent = Callable[[dict[str, Any]], None]
_VALID_SEED = 0x5EED


class _Batches(torch.utils.data.Dataset):
    """Batch k counted from `begin`: a pure function of k, so any worker may make it."""

    def __init__(self, loader: Loader, begin: int) -> None:
        self.sources, self.turns, self.collate = loader.cached, loader.turns, loader.collate
        self.batch_size, self.rank, self.world_size = loader.batch_size, loader.rank, loader.world_size
        self.begin = begin

    def __getitem__(self, k: int) -> dict[str, Any]:
        first = self.begin + k * self.batch_size * self.world_size + self.rank
        picked = [self.turns.pick(first + j * self.world_size) for j in range(self.batch_size)]
        return self.collate([self.sources[source].row(row) for source, row in picked])


class _Streamed(torch.utils.data.IterableDataset):
    """Batches of a mixture with streams, each with the state after it."""

    def __init__(self, loader: Loader, state: dict[str, Any]) -> None:
        self.sources, self.turns, self.collate = loader.sources, loader.turns, loader.collate
        self.batch_size, self.rank, self.world_size = loader.batch_size, loader.rank, loader.world_size
        self.state = state

    def __iter__(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        streams = {i: source for i, source in enumerate(self.sources) if isinstance(source, StreamRows)}
        for index, stream in streams.items():
            stream.restore(self.state.get("streams", {}).get(str(index)))
        n = self.state["rows"]
        while True:
            rows: list[Row] = []
            # All ranks' rows pass by, so that the state after a batch is the same on every rank.
            for step in range(self.batch_size * self.world_size):
                source, index = self.turns.pick(n)
                place = self.sources[source]
                mine = step % self.world_size == self.rank
                if isinstance(place, StreamRows):
                    row = place.next()
                    rows += [row] if mine else []
                elif mine:
                    rows.append(place.row(index))
                n += 1
            state = {"rows": n, "streams": {str(i): stream.state() for i, stream in streams.items()}}
            yield self.collate(rows), state


def _quiet_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; only the trainer decides what it means. A worker whose parent died
    # leaves by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Loader:
    """Iterating yields batches without end; `state_dict` tells what was consumed, and `once` makes one pass
    (validation).

    `len_rows`: rows an epoch, over all ranks (None with streams). `epoch`: epochs begun and finished so far, counted
    in rows. `account`: exact counts of one epoch of the cached sources and of what was read of streams."""

    def __init__(
        self, sources: list[CachedRows | StreamRows], weights: list[float], collate: Collate, *,
        batch_size: int, rank: int, world_size: int, workers: int, key: str,
    ) -> None:  # fmt: skip
        self.sources, self.collate, self.workers = sources, collate, workers
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.turns = Turns(weights)
        self.streaming = any(isinstance(source, StreamRows) for source in sources)
        self.cached = [source for source in sources if isinstance(source, CachedRows)]
        self.len_rows = None if self.streaming else sum(source.rows for source in self.cached)
        self._key = key
        self._state: dict[str, Any] = {"rows": 0}

    @property
    def epoch(self) -> int:
        """Whole epochs consumed; with streams, of the first stream."""
        if self.len_rows is not None:
            return int(self._state["rows"] // self.len_rows)
        states = list(self._state.get("streams", {}).values())
        return int(states[0]["epoch"]) if states else 0

    @property
    def account(self) -> dict[str, int]:
        """Counts by name, summed over the sources."""
        total: dict[str, int] = {}
        states = self._state.get("streams", {})
        for index, source in enumerate(self.sources):
            counts = (
                source.account() if isinstance(source, CachedRows) else states.get(str(index), {}).get("account", {})
            )
            for name, value in counts.items():
                total[name] = total.get(name, 0) + value
        return total

    def state_dict(self) -> dict[str, Any]:
        """What has been consumed, as JSON; what workers prefetched doesn't count."""
        return json.loads(json.dumps(self._state | {"version": 1, "key": self._key}))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state`. Raises DataError when it belongs to other data or another way of packing it."""
        if state.get("version") != 1 or state.get("key") != self._key:
            raise DataError(
                "the data, its order or max_length differ from the checkpoint's, so its position means nothing",
                hint="restore the files and the recipe's data section, or start a new run from the weights (--model)",
            )
        rows = state.get("rows")
        if (
            not isinstance(rows, int)
            or rows < 0
            or (self.streaming and rows and not isinstance(state.get("streams"), dict))
        ):
            raise DataError(
                f"the stored position of the data is damaged (rows: {rows!r})", hint="resume from another checkpoint"
            )
        self._state = {"rows": rows, "streams": state["streams"]} if self.streaming and rows else {"rows": rows}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.streaming:
            dataset = _Streamed(self, self._state)
            for batch, after in iter(dataset) if not self.workers else self._worker(dataset, 1):
                self._state = after
                yield batch
            return
        batches = _Batches(self, self._state["rows"])
        for batch in (
            (batches[k] for k in itertools.count()) if not self.workers else self._worker(batches, self.workers)
        ):
            self._state = {"rows": self._state["rows"] + self.batch_size * self.world_size}
            yield batch

    def _worker(self, dataset: Any, workers: int) -> Iterator[Any]:
        """What worker processes make of `dataset`; they end with this generator, however it ends.

        Left to torch, a worker that is still there when the interpreter exits is sent SIGTERM, which ours ignore, and
        waited for: the process would hang.
        """
        options: dict[str, Any] = {} if self.streaming else {"sampler": _Count()}
        # A generator of its own: DataLoader would otherwise draw from torch's global one and change what a resumed
        # run draws.
        batches: Any = iter(
            torch.utils.data.DataLoader(
                dataset,
                batch_size=None,
                num_workers=workers,
                worker_init_fn=_quiet_worker,
                generator=torch.Generator(),
                **options,
            )
        )
        atexit.register(batches._shutdown_workers)
        try:
            yield from batches
        finally:
            atexit.unregister(batches._shutdown_workers)
            batches._shutdown_workers()

    def once(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """One pass over this rank's rows from the start, at most `limit` batches; the position is not touched.

        Cached sources: every row exactly once over all ranks, in an order that mixes them; the last batch is filled
        with empty rows and all ranks get as many batches. Streams: the first `limit` batches (which must be given).
        """
        if self.streaming:
            if limit is None:
                raise UsageError(
                    "a stream has no end to wait for", hint="give a number of batches (train.eval_batches)"
                )
            yield from (batch for batch, _ in itertools.islice(iter(_Streamed(self, {"rows": 0})), limit))
            return
        every = [(source, row) for source, rows in enumerate(self.cached) for row in range(rows.rows)]
        if len(self.sources) > 1:
            every = [every[i] for i in permutation(len(every), _VALID_SEED, 0)]
        step = self.batch_size * self.world_size
        for first in itertools.islice(range(0, len(every), step), limit):
            mine = every[first : first + step][self.rank :: self.world_size]
            rows = [self.cached[source].row(row) for source, row in mine]
            yield self.collate(rows + [[] for _ in range(self.batch_size - len(rows))])


class _Count(torch.utils.data.Sampler):
    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


# ---- from a recipe -------------------------------------------------------------------------------------------------


def make_loader(
    data: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    split: str = "train",
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_event: OnEvent | None = None,
) -> Loader | None:
    """The loader for `split` ("train" or "valid") of a recipe's data section.

    valid comes from data.valid, else the share data.valid_fraction of train's pieces, which train then leaves out.
    None: there is no validation data (fraction 0, or, with a warning, too little text to hold any out). Raises
    DataError, UsageError, StorageError."""
    tell = on_event or (lambda event: None)
    own = bool(data.valid)
    fraction = 0.0 if own else float(data.valid_fraction)
    if split == "valid" and not own and fraction <= 0:
        return None
    listed = _sources(data.valid if split == "valid" and own else data.train, split)
    part = None if own or fraction <= 0 else split
    sources: list[CachedRows | StreamRows] = []
    source: CachedRows | StreamRows | None
    weights, keys = [], []
    shuffle, seed = (bool(data.shuffle), seed) if split == "train" else (True, _VALID_SEED)
    for path, weight, format, train_on in listed:
        options: dict[str, Any] = {"format": format or data.format, "on_error": data.on_error}
        drawn: dict[str, Any] = {"all_turns": (train_on or data.train_on) == "all", "seed": seed, "shuffle": shuffle}
        if path.startswith("hf://") or data.streaming is True:
            source, key = _streamed(path, tokenizer, data, part=part, fraction=fraction, **drawn, **options)
        else:
            tokens = tokenized(path, tokenizer, cache=data.cache, on_event=tell, **options)
            source, key = _cached(tokens, data.max_length, part, fraction, drawn), [tokens.key]
        if source is not None:
            sources.append(source)
            keys.append(key)
            weights.append(weight)
    if not sources:
        tell({"event": "warning", "message": "too little text to hold any out for validation; give data.valid"})
        return None
    turns = [str(train_on or data.train_on) for _, _, _, train_on in listed]
    order = [data.max_length, seed, shuffle, part, fraction, weights, turns, keys]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    loader = Loader(
        sources,
        weights,
        Collate(data.max_length, pad, token_bytes(tokenizer)),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        workers=int(data.workers) if split == "train" else 0,
        key=hashlib.sha256(json.dumps(order).encode()).hexdigest()[:32],
    )
    if split == "train" and not loader.streaming and not loader.account["trained"]:
        raise DataError(
            "the training data has no token that the loss counts",
            hint="one-token documents, or chats cut so that no answer is left; see data.train_on",
        )
    return loader


def _streamed(path: str, tokenizer: Any, data: Any, **settings: Any) -> tuple[StreamRows, list[Any]]:
    """Rows made as the text is read, and what names them. Raises UsageError where the recipe forbids that."""
    if path.startswith("hf://") and data.streaming is False:
        raise UsageError(
            f"{path}: hf:// is always streamed",
            hint="set data.streaming=auto, or download the files and name their folder",
        )
    stream = StreamRows(path, tokenizer, data.max_length, **settings)
    return stream, [path, stream.key()]


def _cached(tokens: Tokens, length: int, part: str | None, fraction: float, drawn: dict[str, Any]) -> CachedRows | None:
    """Rows of tokens on the disk: of all pieces, or of those that `part` ("train", "valid") has; None without any."""
    pieces = split_documents(tokens.ends, tokens.hashes, length)
    if part is not None:
        chosen = held_out(pieces.hashes, fraction)
        pieces = pieces.take(chosen if part == "valid" else ~chosen)
    return CachedRows(tokens, pieces, length, **drawn) if len(pieces.lengths) else None


def _sources(value: Any, split: str) -> list[tuple[str, float, str | None, str | None]]:
    """[(path, weight, format, train_on)] from a path, a mapping, a recipe's source, or a list of them."""
    if not value:
        raise UsageError(f"data.{split} is not set", hint="give a file, a folder, a glob or hf://dataset")
    listed = [value] if isinstance(value, (str, Path, dict)) or hasattr(value, "path") else list(value)
    made = []
    for item in listed:
        if isinstance(item, (str, Path)):
            item = {"path": str(item)}
        get = item.get if isinstance(item, dict) else lambda name, default=None, of=item: getattr(of, name, default)
        made.append((str(get("path")), float(get("weight", 1.0) or 1.0), get("format"), get("train_on")))
    return made
