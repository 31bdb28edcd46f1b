"""What a generator runs on: a decoder over a paged key-value cache, in PyTorch.

The definition that the C++ engine is tested against, and what runs where that one does not:
without a compiler, in other dtypes, through adapters and hooks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expo_fast.inference.kv_pages import Table
from expo_fast.inference.sampling import Truncation, draw, uniform
from expo_fast.kernels.products import wide_product, widened
from expo_fast.modeling.attention import Layer, causal_attention
from expo_fast.modeling.decoder import Decoder

PREFILL = 512  # tokens of prompts computed together
COPIED = 16  # pages copied together, which are held twice meanwhile
ROW_BUCKET = 16  # rows decoded are rounded up: oneDNN compiles a GEMM for each new size, for 30 ms


@dataclass(frozen=True)
class Tokens:
    """N tokens of some sequences, each sequence's in order and behind what its cache holds."""

    ids: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64
    tables: Tensor  # (N, P) int32, pages of each token's sequence
    lengths: Sequence[int]  # tokens of each sequence, N in all


@dataclass(frozen=True)
class Sampling:
    """How each row draws its token. Its randomness is keyed by (seed, position)."""

    seeds: Tensor  # (B,) int64
    temperature: Tensor  # (B,) fp32, 0 = the likeliest token, scored at temperature 1
    truncation: Truncation

    def __getitem__(self, rows) -> "Sampling":
        return Sampling(self.seeds[rows], self.temperature[rows], self.truncation[rows])

    def to(self, device: torch.device) -> "Sampling":
        own = self.seeds.to(device), self.temperature.to(device)
        return Sampling(*own, self.truncation.to(device))


@dataclass
class Rows:
    """Sequences that are being sampled, those of a prompt side by side; on the CPU."""

    last: Tensor  # (B,) int64 the token sampled last, not in the cache yet
    positions: Tensor  # (B,) int64 its position
    tables: Tensor  # (B, P) int32
    sampling: Sampling


class Engine(ABC):
    """A decoder, a draw and the pages that its sequences live on."""

    page: int  # tokens
    burst = 1  # tokens that `decode` samples before anyone looks at them

    @abstractmethod
    def page_bytes(self) -> int: ...

    @abstractmethod
    def open(self, n_pages: int, n_positions: int) -> None:
        """Get ready for sequences of up to n_positions tokens on n_pages pages."""
        ...

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""
        ...

    @abstractmethod
    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """(from, to); what is copied to is not copied from."""
        ...

    def prefill_tokens(self) -> int:
        """Of prompts, computed together."""
        return PREFILL

    @abstractmethod
    def run(self, tokens: Tokens) -> Tensor:
        """(N, D) after the last norm; the tokens' keys and values go to their pages."""
        ...

    @abstractmethod
    def draw(self, hidden: Tensor, positions: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """(B, D) -> tokens (B,) int64 for these positions, and their log-probs (B,) fp32 nats.

        At the temperature, before any truncation; NaN where the logits are not finite.
        """
        ...

    def load(self, rows: Rows) -> None:
        """What `decode` goes on with, from now on."""
        self.rows = rows

    def keeps(self, n: int) -> bool:
        """Does `decode` go on with all rows that were loaded, though only n are wanted still?"""
        return n == len(self.rows.last)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The next tokens of all rows and their log-probs, (burst, B) each."""
        rows = self.rows
        tokens = Tokens(rows.last, rows.positions, rows.tables, [1] * len(rows.last))
        hidden = self.run(tokens)
        rows.positions += 1
        rows.last, logps = self.draw(hidden, rows.positions, rows.sampling)
        return rows.last[None], logps[None]


@dataclass(frozen=True)
class Segment:
    """The next tokens of a sequence whose cache holds all before them."""

    ids: Tensor  # (T,) int64
    start: int  # position of the first
    table: Table

    def split(self, size: int) -> Iterator["Segment"]:
        for i, ids in enumerate(self.ids.split(size)):
            yield Segment(ids, self.start + i * size, self.table)


def prefill(engine: Engine, segments: Sequence[Segment]) -> list[Tensor]:
    """(T, D) hidden states of each segment, so many tokens at a time as the engine likes."""
    most = engine.prefill_tokens()
    pieces = [(i, piece) for i, s in enumerate(segments) for piece in s.split(most)]
    found: list[list[Tensor]] = [[] for _ in segments]
    batch: list[tuple[int, Segment]] = []
    for n, (i, piece) in enumerate(pieces):
        batch.append((i, piece))
        following = len(pieces[n + 1][1].ids) if n + 1 < len(pieces) else most
        if sum(len(p.ids) for _, p in batch) + following > most:
            hidden = _run(engine, [p for _, p in batch])
            for (j, _), part in zip(batch, hidden, strict=True):
                found[j].append(part)
            batch = []
    return [torch.cat(parts) for parts in found]


def _run(engine: Engine, segments: list[Segment]) -> Sequence[Tensor]:
    lengths = [len(s.ids) for s in segments]
    places = [range(s.start, s.start + n) for s, n in zip(segments, lengths, strict=True)]
    tables = padded([s.table for s in segments])
    tokens = Tokens(
        torch.cat([s.ids for s in segments]),
        int64([place for each in places for place in each]),
        tables.repeat_interleave(int64(lengths), 0),
        lengths,
    )
    return engine.run(tokens).split(lengths)


def padded(tables: Sequence[Table]) -> Tensor:
    """(B, P) int32; page 0 where a table ends earlier."""
    width = max(map(len, tables))
    filled = [[*table, *[0] * (width - len(table))] for table in tables]
    return torch.tensor(filled, dtype=torch.int32, device="cpu")


def int64(values: Sequence[Any]) -> Tensor:
    """On the CPU, whatever torch's default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


class TorchEngine(Engine):
    page = 32

    def __init__(self, model: Decoder):
        self.model = model
        self.slab = self.head = torch.empty(0)

    def page_bytes(self) -> int:
        shape = self.model.shape
        numbers = 2 * len(shape.windows) * self.page * shape.kv_heads * shape.head_dim
        return numbers * self.model.dtype.itemsize

    def open(self, n_pages: int, n_positions: int) -> None:
        shape, model = self.model.shape, self.model
        size = (len(shape.windows), 2, n_pages, self.page, shape.kv_heads, shape.head_dim)
        self.slab = torch.empty(size, dtype=model.dtype, device=model.device)
        self.head = self.widened_head()

    def widened_head(self) -> Tensor:
        """(D, V), the model's own memory on a GPU."""
        return widened(self.model.head_weight.detach()).T

    def close(self) -> None:
        self.slab = self.head = torch.empty(0)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        for i in range(0, len(pairs), COPIED):
            sources, targets = int64(pairs[i : i + COPIED]).to(self.slab.device).unbind(1)
            self.slab[:, :, targets] = self.slab[:, :, sources]

    @torch.no_grad()
    def run(self, tokens: Tokens) -> Tensor:
        n = len(tokens.ids)
        if len(tokens.lengths) == n:
            tokens = _filled_up(tokens, -(-n // ROW_BUCKET) * ROW_BUCKET)
        ids, positions = (x.to(self.model.device) for x in (tokens.ids, tokens.positions))
        return self.model.run(ids, positions, self.attention(tokens))[:n]

    def attention(self, tokens: Tokens) -> "PagedAttention":
        return PagedAttention(self.slab, tokens)

    @torch.no_grad()
    def draw(self, hidden: Tensor, positions: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        logits = wide_product(hidden, self.head)
        sampling, positions = sampling.to(logits.device), positions.to(logits.device)
        u = uniform(sampling.seeds, positions)
        return draw(logits, sampling.temperature, sampling.truncation, u)


def _filled_up(tokens: Tokens, n: int) -> Tokens:
    """With rows that nobody reads, on the page that is nobody's."""
    idle = n - len(tokens.ids)

    def filled(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(idle, *x.shape[1:])])

    ids, positions, tables = filled(tokens.ids), filled(tokens.positions), filled(tokens.tables)
    return Tokens(ids, positions, tables, [1] * n)


class PagedAttention:
    """Over the pages, for one call's tokens; called once a layer."""

    def __init__(self, slab: Tensor, tokens: Tokens):
        self.slab, self.size, self.lengths = slab, slab.shape[3], tokens.lengths
        page = tokens.positions // self.size
        self.pages = tokens.tables.gather(1, page[:, None]).squeeze(1).long().to(slab.device)
        self.places = (tokens.positions % self.size).to(slab.device)
        self.positions = tokens.positions.tolist()
        self.tables = tokens.tables.long().to(slab.device)

    def __call__(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, Hkv, Dh), the latter two kept."""
        keys, values = self.slab[layer.index]
        keys[self.pages, self.places], values[self.pages, self.places] = k, v
        if len(self.lengths) == len(q):
            return self._single(layer, q, keys, values)
        return self.several(layer, q, keys, values)

    def several(self, layer: Layer, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Several tokens of some sequences."""
        out, end = [], 0
        for length in self.lengths:
            end += length
            seen = self.positions[end - 1] + 1
            pages = self.tables[end - 1, : -(-seen // self.size)]
            own = (x[pages].flatten(0, 1)[:seen] for x in (keys, values))
            out.append(causal_attention(layer, q[end - length : end], *own))
        return torch.cat(out)

    def _single(self, layer: Layer, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One token a sequence; scores and weights in fp32."""
        n, wide = len(q), torch.promote_types(q.dtype, torch.float32)
        last = torch.tensor(self.positions, device=q.device)[:, None]
        width = max(self.positions) // self.size + 1
        tables = self.tables[:, :width]
        k, v = (x[tables].flatten(1, 2).transpose(1, 2).to(wide) for x in (keys, values))
        place = torch.arange(width * self.size, device=q.device)
        seen = place <= last
        if layer.window is not None:
            seen &= place > last - layer.window
        v = v.masked_fill(~seen[:, None, :, None], 0)  # NaN, maybe, where nothing was written
        grouped = q.to(wide).view(n, k.shape[1], -1, q.shape[2])
        scores = layer.scale * grouped @ k.transpose(2, 3)
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        return (weights @ v).view(q.shape).to(q.dtype)
