"""C++ decode engine for CPUs: prefill, decoding and draws on the model's own parameters.

The results of a sequence are bit-identical for any other sequences in the batch, and for any split
of its tokens into forward passes. They are the same in sampling and in `exact_hidden`.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from expo_fast.inference.engine import Tokens
from expo_fast.inference.kv_pages import PageCopy
from expo_fast.inference.native_structs import (
    STRUCTS,
    DecoderStruct,
    DrawStruct,
    LayerStruct,
    RowsStruct,
)
from expo_fast.inference.plain_model import is_plain
from expo_fast.inference.sampling import SampledTokens, Sampling, draw_from_logits, uniform
from expo_fast.inference.stepwise_engine import StepwiseEngine
from expo_fast.kernels.integers import round_up
from expo_fast.modeling.decoder import Block, Decoder
from expo_fast.modeling.shape import ACTIVATIONS
from expo_fast.op_backends.native_library import DTYPE_CODES, Part, address
from expo_fast.ops import linear_logprob

ROTATIONS_AT_ONCE = 1024  # positions; a fixed number, so that results are bit-identical

cpu_buffer = partial(torch.empty, device="cpu")  # independent of torch's default device


def supports(model: Decoder) -> bool:
    """Return whether the C++ engine runs the model: plain modules in fp32 or bf16 on a CPU."""
    if model.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not is_plain(list(model.modules())):
        return False
    for p in model.parameters():
        if type(p) is not nn.Parameter or p.dtype != model.dtype:
            return False
        if p.device.type != "cpu" or not p.is_contiguous():
            return False
    shape = model.shape
    return shape.hidden % 2 == 0 and shape.intermediate % 2 == 0  # bf16 is multiplied in pairs


ENGINE = Part("engine", STRUCTS)


def _library() -> ctypes.CDLL:
    library = ENGINE.library()
    for name in ("page_bytes", "workspace_bytes", "draw_bytes"):
        getattr(library, f"expo_fast_{name}").restype = ctypes.c_int64
    return library


@dataclass(frozen=True)
class _Opened:
    """The model as `open` found it, and the memory that one call of the generator uses."""

    decoder: DecoderStruct
    parameter_addresses: list[int]
    pages: Tensor  # (pages, bytes of a page) uint8
    cos: Tensor  # (sets, positions, R/2) fp32
    sin: Tensor  # (sets, positions, R/2) fp32


class NativeEngine(StepwiseEngine):
    """Run a model on csrc. Raise ValueError for a model that `supports` rejects.

    exact: return log-probs that are bit-identical to those of `linear_logprob`.
    """

    page = 32  # kPage of csrc

    def __init__(self, model: Decoder, *, exact: bool = False):
        if not supports(model):
            raise ValueError(
                f"the C++ engine does not run this model of {model.dtype} on {model.device}: it "
                "needs a plain fp32 or bf16 decoder on a CPU, without adapters or hooks"
            )
        self.model = model
        self.exact = exact
        self.library = _library()
        self.workspace = cpu_buffer(0, dtype=torch.uint8)
        self._opened: _Opened | None = None  # None: no call of the generator is running

    @property
    def opened(self) -> "_Opened":
        assert self._opened is not None, "the engine is not open"
        return self._opened

    def page_bytes(self) -> int:
        decoder = _decoder_struct(self.model)
        return self.library.expo_fast_page_bytes(ctypes.byref(decoder))

    def open(self, n_pages: int, n_positions: int) -> None:
        cos, sin = self._rotations(n_positions)
        self._opened = _Opened(
            decoder=_decoder_struct(self.model),
            parameter_addresses=self._parameter_addresses(),
            pages=cpu_buffer(n_pages, self.page_bytes(), dtype=torch.uint8),
            cos=cos,
            sin=sin,
        )

    def close(self) -> None:
        self._opened = None
        self.workspace = cpu_buffer(0, dtype=torch.uint8)

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        pages = self.opened.pages
        for copy in copies:
            pages[copy.target] = pages[copy.source]

    def run(self, tokens: Tokens) -> Tensor:
        opened = self.opened
        if self._parameter_addresses() != opened.parameter_addresses:
            raise RuntimeError("the model's parameters were moved during sampling: sample again")
        n = len(tokens.ids)
        threads = torch.get_num_threads()
        decoder = ctypes.byref(opened.decoder)
        workspace = self._workspace(
            self.library.expo_fast_workspace_bytes(decoder, ctypes.c_int64(n), threads)
        )
        width = self.model.shape.hidden
        hidden = cpu_buffer(n, width, dtype=self.model.dtype)
        rows = RowsStruct(
            tokens=address(tokens.ids),
            positions=address(tokens.positions),
            tables=address(tokens.tables),
            cos=address(opened.cos),
            sin=address(opened.sin),
            pages=address(opened.pages),
            workspace=address(workspace),
            out=address(hidden),
            n=n,
            table_stride=tokens.tables.stride(0),
            n_positions=opened.cos.shape[1],
            threads=threads,
        )
        self.library.expo_fast_decoder(decoder, ctypes.byref(rows))
        return hidden

    def draw(self, hidden: Tensor, positions: Tensor, sampling: Sampling) -> SampledTokens:
        truncated = sampling.truncated()
        any_truncated = bool(truncated.any())
        tokens, logps, logits = self._draw(hidden, positions, sampling, keep_logits=any_truncated)
        if any_truncated:
            rows = sampling[truncated]
            u = uniform(rows.seeds, positions[truncated])
            sampled = draw_from_logits(logits[truncated], rows.temperature, rows.truncation, u)
            tokens[truncated] = sampled.tokens
            logps[truncated] = sampled.logps
        if self.exact:
            temperature = torch.where(sampling.temperature > 0, sampling.temperature, 1.0)
            head = self.model.head_weight.detach()
            exact = linear_logprob(hidden, head, tokens, temperature=temperature, backend="native")
            logps = torch.where(logps.isnan(), logps, exact.logp)
        return SampledTokens(tokens, logps)

    def _draw(
        self, hidden: Tensor, positions: Tensor, sampling: Sampling, *, keep_logits: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw without truncation. Return tokens, log-probs and, if kept, logits (B, V) fp32."""
        head = self.model.head_weight
        n, width = hidden.shape
        vocabulary = len(head)
        tokens = cpu_buffer(n, dtype=torch.int64)
        logps = cpu_buffer(n, dtype=torch.float32)
        logits = cpu_buffer(n if keep_logits else 0, vocabulary, dtype=torch.float32)
        request = DrawStruct(
            hidden=address(hidden),
            weight=address(head),
            temperature=address(sampling.temperature),
            seeds=address(sampling.seeds),
            positions=address(positions),
            token=address(tokens),
            logp=address(logps),
            logits=address(logits if keep_logits else None),
            n=n,
            v=vocabulary,
            d=width,
            dtype=DTYPE_CODES[head.dtype],
            threads=torch.get_num_threads(),
        )
        size = self.library.expo_fast_draw_bytes(ctypes.byref(request))
        request.workspace = address(self._workspace(size))
        self.library.expo_fast_draw(ctypes.byref(request))
        return tokens, logps, logits

    def _workspace(self, size: int) -> Tensor:
        if self.workspace.numel() < size:
            self.workspace = cpu_buffer(size, dtype=torch.uint8)
        return self.workspace

    def _parameter_addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.model.parameters()]

    def _rotations(self, n: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin for at least positions 0 to n - 1: (sets, positions, R/2) each.

        They are fp32, but their values are rounded to the model's dtype as in the model.
        """
        positions = torch.arange(round_up(n, ROTATIONS_AT_ONCE), device="cpu")
        cos: list[Tensor] = []
        sin: list[Tensor] = []
        for chunk in positions.split(ROTATIONS_AT_ONCE):
            rotations = self.model.rotations(chunk)
            cos.append(torch.stack([cos_of_set.squeeze(1) for cos_of_set, _ in rotations]))
            sin.append(torch.stack([sin_of_set.squeeze(1) for _, sin_of_set in rotations]))
        all_cos = torch.cat(cos, 1)
        all_sin = torch.cat(sin, 1)
        return all_cos.float(), all_sin.float()


def _decoder_struct(model: Decoder) -> DecoderStruct:
    shape = model.shape
    n_layers = len(shape.windows)
    layers = (LayerStruct * n_layers)(*map(_layer_struct, model.model.layers))
    return DecoderStruct(
        layers=layers,
        embedding=address(model.model.embed_tokens.weight),
        norm=address(model.model.norm.weight),
        n_layers=n_layers,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rotary_dim=shape.rotary_dim,
        rope_sets=len(shape.rope_sets),
        eps=shape.norm_eps,
        norm_offset=shape.norm_offset,
        attention_scale=shape.attention_scale,
        embedding_scale=model.embedding_scale.item(),
        residual_scale=shape.residual_scale,
        logit_scale=shape.logit_scale,
        activation=ACTIVATIONS.index(shape.activation),
        norms_all_heads=shape.qk_norm == "all heads",
        dtype=DTYPE_CODES[model.dtype],
    )


def _layer_struct(block: nn.Module) -> LayerStruct:
    assert isinstance(block, Block)
    attention = block.self_attn
    mlp = block.mlp
    norms = block.norms
    return LayerStruct(
        before_attention=_norm_weight(block, norms.before_attention),
        after_attention=_norm_weight(block, norms.after_attention),
        before_mlp=_norm_weight(block, norms.before_mlp),
        after_mlp=_norm_weight(block, norms.after_mlp),
        q_norm=address(getattr(attention.q_norm, "weight", None)),  # nn.Identity has no weight
        k_norm=address(getattr(attention.k_norm, "weight", None)),
        q=address(attention.q_proj.weight),
        k=address(attention.k_proj.weight),
        v=address(attention.v_proj.weight),
        o=address(attention.o_proj.weight),
        gate=address(mlp.gate_proj.weight),
        up=address(mlp.up_proj.weight),
        down=address(mlp.down_proj.weight),
        q_bias=address(attention.q_proj.bias),
        k_bias=address(attention.k_proj.bias),
        v_bias=address(attention.v_proj.bias),
        o_bias=address(attention.o_proj.bias),
        gate_bias=address(mlp.gate_proj.bias),
        up_bias=address(mlp.up_proj.bias),
        down_bias=address(mlp.down_proj.bias),
        window=attention.layer.window or 0,
        rope=-1 if attention.rope is None else attention.rope,
    )


def _norm_weight(block: Block, name: str | None) -> int | None:
    """Return the address of a norm's weight; None if the layer has no such norm."""
    return None if name is None else address(block.get_parameter(f"{name}.weight"))
