"""Decode-engine interface and the data that passes through it.

An engine runs a decoder over a paged key-value cache and draws tokens. There are three:
`cpu_engine.NativeEngine` (C++), `cuda_engine.CudaEngine` (CUDA graphs of Triton kernels) and
`torch_engine.TorchEngine` (PyTorch, the reference of the other two). The scheduler calls an engine.
An engine never calls the scheduler.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expo_fast.inference.kv_pages import PageCopy, Table
from expo_fast.inference.sampling import SampledTokens, Sampling
from expo_fast.modeling.decoder import Decoder


@dataclass(frozen=True)
class Tokens:
    """N tokens of one or more sequences, to be computed in one forward pass.

    The tokens of a sequence are adjacent, in order, and directly follow those in its cache.
    """

    ids: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, in the token's own sequence
    tables: Tensor  # (N, P) int32, the page table of the token's sequence
    lengths: Sequence[int]  # number of tokens of each sequence, N in total


@dataclass
class Rows:
    """B sequences that are being sampled, on the CPU. Sequences of one prompt are adjacent."""

    last_tokens: Tensor  # (B,) int64, not in the cache yet
    positions: Tensor  # (B,) int64, of the last tokens
    tables: Tensor  # (B, P) int32
    sampling: Sampling

    def tokens(self) -> Tokens:
        """Return the last token of every row, for the next forward pass."""
        return Tokens(
            ids=self.last_tokens,
            positions=self.positions,
            tables=self.tables,
            lengths=[1] * len(self.last_tokens),
        )


class Engine(ABC):
    """A decoder with a paged key-value cache and a draw.

    page: number of tokens of a page.
    burst: number of tokens that `decode` samples for each row before the host reads them.
    prefill_tokens: maximum number of prompt tokens in one forward pass.
    prefill_keys: maximum number of keys that a forward pass of several prompts reads. None: no
    maximum.
    """

    model: Decoder
    page: int
    burst: int = 1
    prefill_tokens: int = 512
    prefill_keys: int | None = None

    @contextmanager
    def own_modes(self) -> Iterator[None]:
        """Run without the caller's autocast and inference mode, and without gradients.

        Autocast would write keys in a dtype that is not the cache's. Tensors that were made in
        inference mode cannot be written by later calls. The scheduler calls all other methods in
        this context, and leaves it while the caller has the results.
        """
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
            for device_type in {"cpu", self.model.device.type}:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            yield

    @property
    def runs_ahead(self) -> bool:
        """Whether the next call of `decode` returns a burst that was started earlier."""
        return False

    @abstractmethod
    def page_bytes(self) -> int:
        """Return the size of one page in bytes: keys and values of `page` tokens in all layers."""

    @abstractmethod
    def open(self, n_pages: int, n_positions: int) -> None:
        """Allocate n_pages pages for sequences of at most n_positions tokens."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory that `open` and later calls allocated."""

    @abstractmethod
    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy pages. No page is both a target and a source of the same call."""

    @abstractmethod
    def run(self, tokens: Tokens) -> Tensor:
        """Append the tokens to the cache. Return their (N, D) hidden states after the last norm."""

    @abstractmethod
    def draw(self, hidden: Tensor, positions: Tensor, sampling: Sampling) -> SampledTokens:
        """Draw a token for each of B rows. Return (B,) tokens and log-probs.

        hidden: (B, D), the hidden states that predict the tokens.
        positions: (B,) int64, positions of the drawn tokens.

        The log-prob of a row is NaN if its logits are not finite.
        """

    @abstractmethod
    def load(self, rows: Rows) -> None:
        """Set the rows that `decode` continues. No burst may be running."""

    @abstractmethod
    def keeps_loaded(self, n_active: int) -> bool:
        """Return whether `decode` should continue all loaded rows if only n_active are active.

        The alternative is to load the active rows again, which also takes time.
        """

    @abstractmethod
    def decode(self, *, ahead: bool) -> SampledTokens:
        """Return the next tokens and log-probs of the loaded rows, (burst, B) each.

        ahead: whether `decode` will be called again for the same rows. If so, an asynchronous
        engine may start the next burst before it waits for this one.
        """


def padded_tables(tables: Sequence[Table]) -> Tensor:
    """Return page tables as one (B, P) int32 tensor, padded with page 0."""
    width = max(map(len, tables))
    padded = [table + [0] * (width - len(table)) for table in tables]
    return torch.tensor(padded, dtype=torch.int32, device="cpu")


def cpu_int64(values: Sequence[Any]) -> Tensor:
    """Return an int64 tensor on the CPU, independent of torch's default device."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")
