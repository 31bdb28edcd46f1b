"""csrc's decoder: prompts, new tokens and draws on a CPU, straight from the model's parameters.

Its numbers depend on a sequence alone: not on its companions, nor on how its tokens came into the
cache. What it computes for a token is the same, bit for bit, in sampling and in scoring.
"""

import ctypes
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as anywhere

from expo_fast.inference.engine import Engine, Sampling, Segment, Tokens, prefill
from expo_fast.inference.kv_pages import Pages, Table
from expo_fast.inference.sampling import draw, uniform
from expo_fast.modeling.decoder import MLP, Attention, Block, Body, Decoder, Exact, RMSNorm
from expo_fast.op_backends import cpu
from expo_fast.ops import linear_logprob

PLAIN = (Decoder, Body, Block, Attention, MLP, RMSNorm)
PLAIN += (nn.Linear, nn.Embedding, nn.ModuleList, nn.Identity)
ROTATIONS = 1024  # positions whose cos and sin are computed at once: always the same bits


def supports(model: Decoder) -> bool:
    """Plain modules alone: what adapters and hooks compute is not known to csrc."""
    if model.dtype not in (torch.float32, torch.bfloat16):
        return False
    if any(type(m) not in PLAIN for m in model.modules()) or has_hooks(model):
        return False
    for p in model.parameters():
        plain = type(p) is nn.Parameter and p.device.type == "cpu" and p.is_contiguous()
        if not plain or p.dtype != model.dtype:
            return False
    shape = model.shape
    return shape.hidden % 2 == 0 and shape.intermediate % 2 == 0  # bf16 is multiplied in pairs


def has_hooks(model: Decoder) -> bool:
    """Does a call run Python that the modules' classes do not tell of?"""
    if anywhere._global_forward_hooks or anywhere._global_forward_pre_hooks:
        return True
    own = ("_forward_hooks", "_forward_pre_hooks", "forward")
    return any(vars(m).get(name) for m in model.modules() for name in own)


class NativeEngine(Engine):
    """Of a model that `supports` accepts; ValueError for another.

    exact: log-probs are those of `linear_logprob`, bit for bit.
    """

    page = 32  # csrc's kPage

    def __init__(self, model: Decoder, *, exact: bool = False):
        if not supports(model):
            raise ValueError(
                "the native engine runs plain fp32 and bf16 decoders on a CPU, without adapters or "
                f"hooks, not this one of {model.dtype} on {model.device}"
            )
        self.model, self.exact = model, exact
        self.csrc = cpu.library(cpu.isa(), "engine")
        for name in ("page", "workspace", "draw"):
            getattr(self.csrc, f"expo_fast_{name}_bytes").restype = ctypes.c_int64
        self.pages = self.workspace = room(0, dtype=torch.uint8)

    def page_bytes(self) -> int:
        return self.csrc.expo_fast_page_bytes(ctypes.byref(self._decoder()))

    def open(self, n_pages: int, n_positions: int) -> None:
        self.decoder, self.places = self._decoder(), self._places()
        self.pages = room(n_pages, self.page_bytes(), dtype=torch.uint8)
        self.cos, self.sin = self._rotations(n_positions)

    def close(self) -> None:
        self.pages = self.workspace = room(0, dtype=torch.uint8)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.pages[target] = self.pages[source]

    def run(self, tokens: Tokens) -> Tensor:
        if self._places() != self.places:
            raise RuntimeError("the model's parameters were moved while it sampled: start again")
        n, threads = len(tokens.ids), torch.get_num_threads()
        decoder = ctypes.byref(self.decoder)
        size = self.csrc.expo_fast_workspace_bytes(decoder, ctypes.c_int64(n), threads)
        hidden = room(n, self.model.shape.hidden, dtype=self.model.dtype)
        rows = _Rows(
            *map(_pointer, (tokens.ids, tokens.positions, tokens.tables, self.cos, self.sin)),
            *map(_pointer, (self.pages, self._workspace(size), hidden)),
            *(n, tokens.tables.stride(0), threads),
        )
        self.csrc.expo_fast_decoder(decoder, ctypes.byref(rows))
        return hidden

    def draw(self, hidden: Tensor, positions: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        cut = sampling.truncation.active() & (sampling.temperature > 0)
        truncated = bool(cut.any())
        tokens, logp, logits = self._draw(hidden, positions, sampling, truncated)
        if truncated:
            rows = sampling[cut]
            u = uniform(rows.seeds, positions[cut])
            found = draw(logits[cut], rows.temperature, rows.truncation, u)
            tokens[cut], logp[cut] = found
        if self.exact:
            t, weight = sampling.temperature, self.model.head_weight.detach()
            t = torch.where(t > 0, t, 1.0)
            scored = linear_logprob(hidden, weight, tokens, temperature=t, backend="native")
            logp = torch.where(logp.isnan(), logp, scored.logp)
        return tokens, logp

    def _draw(
        self, hidden: Tensor, positions: Tensor, sampling: Sampling, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.model.head_weight
        (n, D), V = hidden.shape, len(weight)
        tokens, logp = room(n, dtype=torch.int64), room(n, dtype=torch.float32)
        logits = room(n if keep else 0, V, dtype=torch.float32)
        given = _Draw(
            *map(_pointer, (hidden, weight, sampling.temperature, sampling.seeds, positions)),
            *map(_pointer, (tokens, logp)),
            *(_pointer(logits) if keep else None, None),
            *(n, V, D, cpu.DTYPES[weight.dtype], torch.get_num_threads()),
        )
        size = self.csrc.expo_fast_draw_bytes(ctypes.byref(given))
        given.workspace = _pointer(self._workspace(size))
        self.csrc.expo_fast_draw(ctypes.byref(given))
        return tokens, logp, logits

    def _workspace(self, size: int) -> Tensor:
        if self.workspace.numel() < size:
            self.workspace = room(size, dtype=torch.uint8)
        return self.workspace

    def _places(self) -> list[int]:
        return [p.data_ptr() for p in self.model.parameters()]

    def _decoder(self) -> "_Decoder":
        model, shape = self.model, self.model.shape
        layers = (_Layer * len(shape.windows))(*map(_layer, model.model.layers))
        sizes = (len(layers), shape.hidden, shape.intermediate)
        sizes += (shape.heads, shape.kv_heads, shape.head_dim)
        embedding, norm = model.model.embed_tokens.weight, model.model.norm.weight
        return _Decoder(
            *(layers, _pointer(embedding), _pointer(norm)),
            *(*sizes, shape.norm_eps, shape.head_dim**-0.5, cpu.DTYPES[model.dtype]),
        )

    def _rotations(self, n: int) -> tuple[Tensor, Tensor]:
        """cos and sin (at least n, Dh/2) fp32, rounded as the model rounds them."""
        parts = torch.arange(-(-n // ROTATIONS) * ROTATIONS, device="cpu").split(ROTATIONS)
        pairs = [self.model.rotation(part) for part in parts]
        cos, sin = (torch.cat(x).squeeze(1).float() for x in zip(*pairs, strict=True))
        return cos, sin


def exact_hidden(model: Decoder) -> Exact:
    """For `model.exact`: hidden states as sampling computes them. ValueError where csrc can't."""
    NativeEngine(model)
    return hidden


@torch.no_grad()
def hidden(
    model: Decoder, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, parents: Tensor | None
) -> Tensor:
    """`Decoder.hidden` with the bits of sampling: what a token sees is all that it depends on."""
    tokens, borders = tokens.long(), cu_seqlens.tolist()
    above = [-1] * (len(borders) - 1) if parents is None else parents.tolist()
    starts = [int(positions[at]) for at in borders[:-1]]
    ends = [start + b - a for start, (a, b) in zip(starts, pairwise(borders), strict=True)]
    pages = Pages(1 + sum(-(-end // NativeEngine.page) for end in ends), NativeEngine.page)
    engine = NativeEngine(model)
    engine.open(len(pages), max(ends))
    depths: list[int] = []
    waves: dict[int, list[int]] = {}
    for s, parent in enumerate(above):
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
        waves.setdefault(depths[s], []).append(s)
    tables: dict[int, Table] = {-1: []}
    found: dict[int, Tensor] = {}
    for wave in waves.values():  # a level of the tree after another
        for s in wave:
            tables[s], copies = pages.fork(tables[above[s]], starts[s], ends[s])
            engine.copy_pages(copies)
        own = [tokens[borders[s] : borders[s + 1]] for s in wave]
        segments = [Segment(x, starts[s], tables[s]) for s, x in zip(wave, own, strict=True)]
        found |= zip(wave, prefill(engine, segments), strict=True)
    return torch.cat([found[s] for s in range(len(above))])


def _layer(block: Any) -> "_Layer":
    a, mlp = block.self_attn, block.mlp
    norms = (block.input_layernorm, block.post_attention_layernorm, a.q_norm, a.k_norm)
    projections = (a.q_proj, a.k_proj, a.v_proj, a.o_proj)
    projections += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return _Layer(
        *(_pointer(getattr(norm, "weight", None)) for norm in norms),
        *(_pointer(p.weight) for p in projections),
        *(_pointer(p.bias) for p in projections),
        *(a.layer.window or 0, a.rope),
    )


room = partial(torch.empty, device="cpu")  # whatever torch's default device is


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _fields(kind: type, names: str) -> Iterable[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Layer(ctypes.Structure):
    _fields_: Sequence = [
        *_fields(ctypes.c_void_p, "input_norm post_norm q_norm k_norm"),
        *_fields(ctypes.c_void_p, "q k v o gate up down"),
        *_fields(ctypes.c_void_p, "q_bias k_bias v_bias o_bias gate_bias up_bias down_bias"),
        *(("window", ctypes.c_int64), ("rope", ctypes.c_int32)),
    ]


class _Decoder(ctypes.Structure):
    _fields_: Sequence = [
        ("layers", ctypes.POINTER(_Layer)),
        *_fields(ctypes.c_void_p, "embedding norm"),
        *_fields(ctypes.c_int64, "n_layers hidden intermediate heads kv_heads head_dim"),
        *_fields(ctypes.c_float, "eps scale"),
        ("dtype", ctypes.c_int32),
    ]


class _Rows(ctypes.Structure):
    _fields_: Sequence = [
        *_fields(ctypes.c_void_p, "tokens positions tables cos sin pages workspace out"),
        *_fields(ctypes.c_int64, "n table_stride"),
        ("threads", ctypes.c_int32),
    ]


class _Draw(ctypes.Structure):
    _fields_: Sequence = [
        *_fields(ctypes.c_void_p, "hidden weight temperature seeds positions"),
        *_fields(ctypes.c_void_p, "token logp logits workspace"),
        *_fields(ctypes.c_int64, "n v d"),
        *_fields(ctypes.c_int32, "dtype threads"),
    ]
