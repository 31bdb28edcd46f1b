"""PyTorch decode engine: the reference of the other engines.

It also runs without a compiler, with other dtypes, and with adapters and hooks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expo_fast.inference.engine import Tokens, cpu_int64
from expo_fast.inference.kv_pages import PageCopy
from expo_fast.inference.paged_attention import PagedAttention
from expo_fast.inference.sampling import SampledTokens, Sampling, draw_from_logits, uniform
from expo_fast.inference.stepwise_engine import StepwiseEngine
from expo_fast.kernels.integers import round_up
from expo_fast.kernels.products import wide_product, widened
from expo_fast.modeling.decoder import Decoder

COPIES_AT_ONCE = 16  # pages per copy, which needs temporary memory for them
ROW_MULTIPLE = 16  # rows are padded to a multiple: oneDNN compiles each new GEMM size for 30 ms


class TorchEngine(StepwiseEngine):
    """Run any `Decoder` on any device. `model.run` computes prompts and new tokens."""

    page = 32
    attention: type[PagedAttention] = PagedAttention

    def __init__(self, model: Decoder):
        self.model = model
        self._set_empty()

    def _set_empty(self) -> None:
        self.slab = torch.empty(0)  # (layers, 2, pages, page, Hkv, Dh)
        self.head = torch.empty(0)  # (D, V)

    def page_bytes(self) -> int:
        shape = self.model.shape
        per_layer = 2 * self.page * shape.kv_heads * shape.head_dim
        return len(shape.windows) * per_layer * self.model.dtype.itemsize

    def open(self, n_pages: int, n_positions: int) -> None:
        model = self.model
        shape = model.shape
        self.slab = torch.empty(
            (len(shape.windows), 2, n_pages, self.page, shape.kv_heads, shape.head_dim),
            dtype=model.dtype,
            device=model.device,
        )
        self.head = self.widened_head()

    def widened_head(self) -> Tensor:
        """Return the (D, V) LM head in the layout that `wide_product` needs, a view on a GPU."""
        return widened(self.model.head_weight.detach()).T

    def close(self) -> None:
        self._set_empty()

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        for first in range(0, len(copies), COPIES_AT_ONCE):
            pages = cpu_int64(copies[first : first + COPIES_AT_ONCE])
            sources, targets = pages.to(self.slab.device).unbind(1)
            self.slab[:, :, targets] = self.slab[:, :, sources]

    @torch.no_grad()
    def run(self, tokens: Tokens) -> Tensor:
        n = len(tokens.ids)
        if len(tokens.lengths) == n:
            tokens = _padded(tokens, round_up(n, ROW_MULTIPLE))
        device = self.model.device
        ids = tokens.ids.to(device)
        positions = tokens.positions.to(device)
        hidden = self.model.run(ids, positions, self.attention(self.slab, tokens))
        return hidden[:n]

    @torch.no_grad()
    def draw(self, hidden: Tensor, positions: Tensor, sampling: Sampling) -> SampledTokens:
        logits = wide_product(hidden, self.head)
        sampling = sampling.to(logits.device)
        u = uniform(sampling.seeds, positions.to(logits.device))
        return draw_from_logits(logits, sampling.temperature, sampling.truncation, u)


def _padded(tokens: Tokens, n: int) -> Tokens:
    """Add idle rows up to n rows. They write to page 0, and their results are not used."""
    n_idle = n - len(tokens.ids)

    def padded(x: Tensor) -> Tensor:
        idle = x.new_zeros(n_idle, *x.shape[1:])
        return torch.cat([x, idle])

    return Tokens(
        ids=padded(tokens.ids),
        positions=padded(tokens.positions),
        tables=padded(tokens.tables),
        lengths=[1] * n,
    )
