"""Decoding on a GPU: compare the kernels with fp64, and the engine with the other two engines.

Without a GPU, the kernels run in Triton's interpreter.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface

from expo_fast import generate
from expo_fast.generate import Completion, Generator, Request
from expo_fast.inference import cuda_engine, paged_attention, sampling
from expo_fast.inference.cuda_engine import CudaEngine
from expo_fast.inference.decode_step import DecodeStep, StepKey
from expo_fast.inference.joined_weights import JoinedWeights
from expo_fast.inference.prefill import Segment, prefill_batches
from expo_fast.inference.sampling import Truncation
from expo_fast.kernels import blocks, decode, draw, layer, truncate
from expo_fast.kernels.cascade import Sizes, plan
from expo_fast.kernels.products import widened
from expo_fast.modeling.attention import causal_attention
from expo_fast.modeling.modules import RMSNorm
from expo_fast.modeling.rope import rotate
from judges import completion_logps, error_norm, max_error
from tiny import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 32


def by_definition(q, keys, values, positions, scale, window) -> Tensor:
    """Return attention (B, H, Dh) of q (B, H, Dh) to each row's keys and values (B, T, Hkv, Dh)."""
    group = q.shape[1] // keys.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (keys, values))
    scores = torch.einsum("bhd,bthd->bht", q, k) * scale
    ahead = positions[:, None] - torch.arange(keys.shape[1], device=q.device)
    seen = (ahead >= 0) & (ahead < (window or len(ahead[0])))
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bht,bthd->bhd", weights, v.masked_fill(~seen[:, :, None, None], 0))


class Scene:
    """Rows in groups with common prefixes, on shuffled pages of a slab that is NaN if unwritten."""

    def __init__(self, lengths, shared, group, *, heads=(6, 2), dim=64, dtype=torch.bfloat16):
        g = torch.Generator().manual_seed(len(lengths) + dim)
        n_pages = [-(-n // PAGE) + 1 for n in lengths]  # one more than they need now
        free = (torch.randperm(sum(n_pages) + 1, generator=g) + 1).tolist()
        self.width = max(n_pages) + 1
        self.tables = torch.zeros(len(lengths), self.width, dtype=torch.int32)
        for row, n in enumerate(n_pages):
            common = min(shared // PAGE, lengths[row] // PAGE) if row % group else 0
            table = self.tables[row - 1, :common].tolist() if common else []
            table += [free.pop() for _ in range(n - len(table))]
            self.tables[row, :n] = torch.tensor(table)
        self.positions = torch.tensor(lengths) - 1
        self.dim, (self.heads, self.kv_heads) = dim, heads
        slab = torch.randn(sum(n_pages) + 2, 2, 2, PAGE, heads[1], dim, generator=g).to(dtype)
        written = torch.zeros(len(slab), PAGE, dtype=torch.bool)
        for row, n in enumerate(lengths):
            for t in range(n):
                written[self.tables[row, t // PAGE], t % PAGE] = True
        slab.permute(0, 3, 1, 2, 4, 5)[~written] = math.nan
        self.slab = slab.to(DEVICE)
        self.q = torch.randn(len(lengths), heads[0], dim, generator=g).to(dtype).to(DEVICE)
        self.scale = dim**-0.5

    @property
    def cache(self) -> decode.Paged:
        address = torch.tensor([self.slab.data_ptr()], device=DEVICE)
        return decode.Paged(address, 2, PAGE, self.kv_heads, self.dim)

    def ours(self, window=None, layer=1, sizes=None, tile=None, before=None) -> Tensor:
        """Return what the kernels compute; `before` holds the tables of an earlier load."""
        sizes = sizes or Sizes(len(self.q), self.width)
        work = decode.Work.allocate(sizes, self.heads, self.dim, self.q.device)
        for x in (work.top, work.total, work.values):
            x.fill_(math.nan)  # as if an earlier call had left them
        together = decode.rows_together(self.heads, self.kv_heads)
        if before is not None:
            work.load(*plan(before, sizes, 1))
        work.load(*plan(self.tables, sizes, together))
        given = self.tables.to(DEVICE), self.positions.to(DEVICE)
        return decode.attend(self.cache, layer, self.q, *given, work, self.scale, window, tile)

    def theirs(self, dtype, window=None, layer=1) -> Tensor:
        own = self.slab[self.tables.long().to(DEVICE), layer].transpose(2, 3)  # B, W, page, 2, ...
        keys, values = own.flatten(1, 2).to(dtype).unbind(2)
        positions = self.positions.to(DEVICE)
        return by_definition(self.q.to(dtype), keys, values, positions, self.scale, window)

    def check(self, window=None, **how) -> None:
        truth = self.theirs(torch.float64, window)
        got = self.ours(window, **how)
        plain = self.theirs(torch.float32, window).to(self.q.dtype)
        assert got.dtype == self.q.dtype
        for error in (error_norm, max_error):
            assert error(got, truth) <= 2 * error(plain, truth) + 1e-6


LENGTHS = [33, 40, 64, 65, 1, 32, 31, 97, 200, 190, 170, 180, 2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, window):
    Scene(LENGTHS, 64, 4, dtype=dtype).check(window)


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads", [(2, 2), (4, 2), (3, 1), (8, 2), (14, 2), (8, 1), (20, 1)], ids=str
)
def test_any_number_of_heads_may_share_a_key(heads):
    Scene(LENGTHS[:-4], 32, 4, heads=heads, dim=16).check()


@pytest.mark.slow
@pytest.mark.parametrize("dim", [8, 80, 96, 128])
def test_any_head_size_is_computed(dim):
    Scene(LENGTHS, 64, 4, dim=dim).check(50)


def test_heads_that_are_too_wide_are_refused():
    with pytest.raises(ValueError, match="head_dim=512: decode attention needs at most 256"):
        Scene([3], 0, 1, dim=512).ours()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 66])
def test_long_shared_prompts_are_right_for_many_rows(rows):
    scene = Scene([300 + 3 * i for i in range(rows)], 290, 33, heads=(4, 2), dim=16)
    scene.check(200)


@pytest.mark.slow
def test_rows_without_pages_get_zeros_and_change_no_other_row():
    scene = Scene(LENGTHS, 64, 4)
    alone = scene.ours()
    wide = Scene(LENGTHS, 64, 4)
    n = len(LENGTHS)
    n_idle = 3
    wide.tables = torch.cat([scene.tables, scene.tables.new_zeros(n_idle, scene.width)])
    wide.positions = torch.cat([scene.positions, scene.positions.new_zeros(n_idle)])
    wide.q = torch.cat([scene.q, scene.q[:n_idle]])
    assert torch.equal(wide.ours()[:n], alone)
    assert (wide.ours()[n:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(6, 2), (14, 1)], ids=str)
def test_items_of_an_earlier_load_change_no_bit(heads):
    scene = Scene(LENGTHS, 64, 4, heads=heads)
    earlier = scene.tables.clamp_min(1)  # has more items
    assert torch.equal(scene.ours(48, before=earlier), scene.ours(48))


def test_a_batch_of_idle_rows_reads_no_page():
    scene = Scene([3, 40], 0, 1)
    scene.tables[:] = 0
    scene.slab[:] = math.nan
    assert (scene.ours() == 0).all()


def test_rows_of_many_slots_are_summed_in_rounds():
    """Other rows have no slots. Unused slots hold NaN, which would show in the result."""
    scene = Scene([32 * 30 + 5, 7, 32 * 12], 64, 2, heads=(4, 2), dim=16)
    sizes = Sizes(3, scene.width)
    _, used = plan(scene.tables, sizes, decode.rows_together(4, 2))
    assert used.max() > 4 and used.min() < 2
    scene.check()
    scene.check(40)


@pytest.mark.slow
def test_equal_calls_give_equal_bits_for_any_address_of_the_slab():
    scene = Scene(LENGTHS, 64, 4)
    first = scene.ours()
    again = scene.ours()
    scene.slab = scene.slab.clone()
    assert torch.equal(first, again) and torch.equal(first, scene.ours())


@pytest.mark.slow
def test_a_nan_of_one_row_leaves_the_others_unchanged():
    scene = Scene(LENGTHS, 64, 4)
    clean = scene.ours()
    row = LENGTHS.index(190)
    scene.slab[int(scene.tables[row, 4])] = math.nan  # a page of this row only
    got = scene.ours()
    assert got[row].isnan().all()
    rest = torch.arange(len(LENGTHS)) != row
    assert torch.equal(got[rest], clean[rest])


def test_new_keys_and_values_are_written_to_their_pages():
    scene = Scene(LENGTHS, 64, 4)
    g = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, len(LENGTHS), 2, 64, generator=g).bfloat16()
    expected = scene.slab.clone()
    for row, position in enumerate(scene.positions.tolist()):
        page = int(scene.tables[row, position // PAGE])
        expected[page, 1, :, position % PAGE] = torch.stack([k[row], v[row]]).to(DEVICE)
    given = scene.tables.to(DEVICE), scene.positions.to(DEVICE)
    decode.append(scene.cache, 1, k.to(DEVICE), v.to(DEVICE), *given)
    assert torch.equal(scene.slab.nan_to_num(), expected.nan_to_num())


def test_fused_kernels_equal_the_modules_of_the_model():
    norm = RMSNorm(48, 1e-6).bfloat16().to(DEVICE)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x, d, gate, up = torch.randn(4, 5, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    x, d, gate, up = (y.to(DEVICE) for y in (x, d, gate, up))
    for other in (None, d):
        total, normed = layer.add_norm(x, other, norm.weight.detach(), norm.eps)
        assert torch.equal(total, x if other is None else x + d)
        torch.testing.assert_close(normed, norm(total).detach(), rtol=2**-7, atol=0)
    expected = torch.nn.functional.silu(gate) * up
    got = layer.swiglu(gate, up)
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=0)
    together = torch.cat([gate, up], 1)
    assert torch.equal(layer.swiglu(*together.chunk(2, 1)), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 1500])
def test_swiglu_takes_columns_of_one_product(dtype, width):
    both = torch.randn(3, 2 * width + 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    gate, up = both.to(DEVICE)[:, 5:].chunk(2, -1)
    got = layer.swiglu(gate, up)
    assert got.is_contiguous() and torch.equal(got, layer.swiglu(gate.clone(), up.clone()))
    truth = torch.nn.functional.silu(gate.double()) * up.double()
    info = torch.finfo(dtype)
    atol = 4 * info.smallest_normal * info.eps
    torch.testing.assert_close(got.double(), truth, rtol=2 * info.eps, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rotations_are_those_of_the_model(dtype):
    positions = torch.cat([torch.arange(40), torch.tensor([8191, 131071, 2**20])]).to(DEVICE)
    inv_freq = 10000.0 ** (-torch.arange(40, device=DEVICE) / 40)
    angles = (positions[:, None].float() * inv_freq).double()
    for got, truth in zip(
        layer.rotation(positions, inv_freq, 1.19, dtype), (angles.cos(), angles.sin()), strict=True
    ):
        assert got.dtype == dtype and got.shape == (43, 1, 40)
        off = (got[:, 0].double() - 1.19 * truth).abs()
        assert (off <= 1.3 * torch.finfo(dtype).eps * truth.abs() / 2 * 1.19 + 1e-7).all()


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_heads_are_normed_rotated_and_placed(norm: bool, rope: bool, together: bool):
    """q, k and v are separate tensors, or columns of one product."""
    scene = Scene(LENGTHS, 64, 4, dim=80)
    g = torch.Generator().manual_seed(1)
    n = len(LENGTHS)
    q, k, v = (torch.randn(n, h, 80, generator=g).bfloat16().to(DEVICE) for h in (6, 2, 2))
    if together:
        qkv = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
        q, k, v = (x.view(n, -1, 80) for x in qkv.split([480, 160, 160], 1))
    norms = [RMSNorm(80, 1e-6).bfloat16().to(DEVICE) for _ in range(2)]
    for each in norms:
        torch.nn.init.normal_(each.weight, 1, 0.3, generator=g if DEVICE == "cpu" else None)
    angles = torch.rand(n, 1, 40, generator=g).to(DEVICE) * 6
    rotation = angles.cos().bfloat16(), angles.sin().bfloat16()
    head_norms = layer.HeadNorms(norms[0].weight.detach(), norms[1].weight.detach(), 1e-6)
    got = layer.place(
        scene.cache,
        1,
        q,
        k,
        v,
        norms=head_norms if norm else None,
        rotation=rotation if rope else None,
        tables=scene.tables.to(DEVICE),
        positions=scene.positions.to(DEVICE),
    )
    if norm:
        q, k = norms[0](q), norms[1](k)
    if rope:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    torch.testing.assert_close(got, q, rtol=2**-6, atol=2**-6)
    for row, position in enumerate(scene.positions.tolist()):
        kept = scene.slab[int(scene.tables[row, position // PAGE]), 1, :, position % PAGE]
        torch.testing.assert_close(kept[0], k[row], rtol=2**-6, atol=2**-6)
        assert torch.equal(kept[1], v[row])


class Drawing:
    """Logits of 40 rows in ragged blocks, with greedy rows, and with rows that are not finite."""

    n, columns, burst = 40, 700, 3
    alive = torch.arange(40) != 4  # rows that have a log-prob
    alive[5] = False

    def __init__(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.logits = 3 * torch.randn(self.n, self.columns, generator=g)
        self.logits[3, 500:] = -math.inf
        self.logits[4] = -math.inf
        self.logits[5, 600] = math.nan
        self.logits[8, [300, 400, 699]] = 20.0  # a tie of the likeliest
        self.temperature = torch.linspace(0.4, 1.6, self.n)
        self.temperature[7:10] = 0
        self.seeds = torch.randint(-(2**63), 2**63 - 1, (self.n,), generator=g)
        self.positions = torch.randint(0, 2**40, (self.n,), generator=g)
        self.u = sampling.uniform(self.seeds, self.positions + 1)
        cut = Truncation(torch.zeros(40).long(), torch.ones(40), torch.zeros(40))
        self.tokens, self.logps = sampling.draw_from_logits(
            self.logits.clone(), self.temperature, cut, self.u
        )

    def progress(self) -> draw.Progress:
        last = torch.zeros_like(self.seeds).to(DEVICE)
        return draw.Progress.start(last, self.positions.clone().to(DEVICE), self.burst)

    def by_kernel(self, progress: draw.Progress, record: bool = True) -> draw.SampledRows:
        given = self.logits, self.temperature, self.seeds
        logits, temperature, seeds = (x.to(DEVICE) for x in given)
        found = blocks.blocks_of(logits, temperature, sampling.BLOCK)
        return draw.sample_rows(
            logits, *found, sampling.BLOCK, temperature, seeds, progress, record=record
        )

    def check(self, tokens: Tensor, logps: Tensor) -> None:
        assert (tokens >= 0).all() and (tokens < self.columns).all()
        assert torch.equal(tokens.cpu()[self.alive], self.tokens[self.alive])
        assert torch.equal(~self.logps.isnan(), self.alive)
        torch.testing.assert_close(logps.cpu(), self.logps, rtol=0, atol=2e-6, equal_nan=True)


def test_draws_from_blocks_equal_draws_from_logits():
    case = Drawing()
    logits, temperature, u = (x.to(DEVICE) for x in (case.logits, case.temperature, case.u))
    found = blocks.blocks_of(logits, temperature, sampling.BLOCK)
    case.check(*sampling.draw_from_blocks(logits, *found, temperature, u))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_one_kernel_draws_the_tokens_of_pytorch(seed: int):
    case = Drawing(seed)
    progress = case.progress()
    sampled = case.by_kernel(progress)
    assert torch.equal(sampled.u.cpu(), case.u)
    case.check(sampled.tokens, sampled.logps)
    again = case.by_kernel(case.progress())
    for one, other in zip(sampled, again, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_number_beyond_the_last_sum_draws_the_last_possible_token():
    """Rounding can cause this. Here the sum of a block is too large for its columns."""
    case = Drawing()
    case.logits[:] = 3.0
    case.logits[1::2, 690:] = -math.inf
    logits, temperature = case.logits.to(DEVICE), torch.ones(40, device=DEVICE)
    block_max, block_sum = blocks.blocks_of(logits, temperature, sampling.BLOCK)
    block_sum[:, -1] *= 1e9
    given = sampling.BLOCK, temperature, case.seeds.to(DEVICE), case.progress()
    tokens = draw.sample_rows(logits, block_max, block_sum, *given, record=False).tokens
    assert (tokens[::2] == 699).all() and (tokens[1::2] == 689).all()


def test_a_draw_records_tokens_for_the_host_and_for_the_next_step():
    """Each row has its own index in the burst, which wraps around."""
    case = Drawing()
    progress = case.progress()
    progress.history.fill_(math.nan)
    progress.index[::2] = 2
    last = progress.last_tokens
    sampled = case.by_kernel(progress)
    place = torch.where(torch.arange(40) % 2 == 0, 2, 0).to(DEVICE)
    rows = torch.arange(40, device=DEVICE)
    for kept, drawn in zip(progress.history[place, :, rows].T, sampled[:2], strict=True):
        torch.testing.assert_close(kept, drawn.double(), rtol=0, atol=0, equal_nan=True)
    assert int(progress.history[:, 0].isnan().sum()) == 80
    assert torch.equal(progress.index, (place + 1) % 3)
    assert progress.last_tokens is last and torch.equal(last, sampled.tokens)
    assert torch.equal(progress.positions.cpu(), case.positions + 1)


def test_recording_a_draw_later_gives_the_same_state():
    case = Drawing()
    at_once, later = case.progress(), case.progress()
    for progress in (at_once, later):
        progress.history.fill_(math.nan)
        progress.index[::2] = 2
    case.by_kernel(at_once)
    sampled = case.by_kernel(later, record=False)
    assert torch.equal(later.positions.cpu(), case.positions)
    assert later.history.isnan().all() and not later.last_tokens.any()
    draw.record(sampled, later)
    for one, other in zip(vars(at_once).values(), vars(later).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "block"), [(700, 256), (300, 16)])  # of more blocks than 16
def test_truncated_draws_are_those_of_the_sorted_weights(columns: int, block: int, monkeypatch):
    """Blocks are ragged, logits have ties, and rows have one rule, several or none."""
    monkeypatch.setattr(sampling, "BLOCK", block)
    g = torch.Generator().manual_seed(2)
    rules = [
        *((k, 1.0, 0.0) for k in (1, 2, 7, 200, 5000)),
        *((0, p, 0.0) for p in (1e-6, 0.3, 0.7, 0.95, 0.999)),
        *((0, 1.0, m) for m in (1e-3, 0.05, 0.5, 1.0)),
        *((20, 0.8, 0.01), (3, 0.99, 0.2), (200, 0.999, 1e-4), (7, 1.0, 1.0)),
        (0, 1.0, 0.0),
    ]
    if DEVICE == "cpu":  # the interpreter is slow: each block size gets every second rule
        rules = rules[block == 16 :: 2]
    n_kinds = 6  # of rows; each rule has a row of each
    tied, few, equal, tied_at_top, _plain, greedy = range(n_kinds)
    n = n_kinds * len(rules)
    kind = torch.arange(n) % n_kinds
    has_ties = (kind == tied) | (kind == tied_at_top)
    logits = 3 * torch.randn(n, columns, generator=g)
    logits[has_ties] = (2 * logits[has_ties]).round() / 2  # ties, also at the borders
    logits[kind == few, 100:] = -math.inf
    logits[kind == equal] = 0.25
    logits[kind == tied_at_top, 10:13] = 15
    top_k, top_p, min_p = zip(*rules, strict=True)
    truncation = Truncation(
        top_k=torch.tensor(top_k).repeat_interleave(n_kinds),
        top_p=torch.tensor(top_p).repeat_interleave(n_kinds),
        min_p=torch.tensor(min_p).repeat_interleave(n_kinds),
    )
    temperature = torch.linspace(0.4, 1.6, n)
    temperature[kind == greedy] = 0
    u = torch.rand(n, dtype=torch.float64, generator=g)
    u[kind == tied] = 0
    u[kind == few] = 1 - 2.0**-53
    u[kind == tied_at_top] = 0.9
    tokens, logps = sampling.draw_from_logits(logits.clone(), temperature, truncation, u)
    logits, temperature, u = (x.to(DEVICE) for x in (logits, temperature, u))
    found = blocks.blocks_of(logits, temperature, block)
    got, logp = sampling.draw_from_blocks(logits, *found, temperature, u)
    there = vars(truncation.to(torch.device(DEVICE)))
    truncate.redraw(logits, *found, block, temperature, u, **there, tokens=got, logps=logp)
    assert torch.equal(got.cpu(), tokens)
    torch.testing.assert_close(logp.cpu(), logps, rtol=0, atol=2e-6)


def test_a_truncated_row_with_a_nan_has_a_token_and_no_log_prob():
    logits = torch.randn(2, 700, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, 600] = math.nan
    temperature = torch.ones(2, device=DEVICE)
    u = torch.full((2,), 0.5, device=DEVICE).double()
    found = blocks.blocks_of(logits, temperature, sampling.BLOCK)
    token, logp = sampling.draw_from_blocks(logits, *found, temperature, u)
    k, p, m = (torch.full((2,), x, device=DEVICE) for x in (5, 0.9, 0.01))
    rules = {"top_k": k, "top_p": p, "min_p": m}
    block = sampling.BLOCK
    truncate.redraw(logits, *found, block, temperature, u, **rules, tokens=token, logps=logp)
    assert logp.isnan().tolist() == [True, False]
    assert ((token >= 0) & (token < 700)).all()


def pages_read(tables: Tensor, sizes: Sizes, together: int) -> int:
    """Return the pages of all items; assert that each row's slots cover its pages in order."""
    items, used = plan(tables, sizes, together)
    assert len(items) <= sizes.items and used.max() <= sizes.slots
    for row, table in enumerate(tables.tolist()):
        own = sorted([i for i in items.tolist() if i[0] <= row < i[0] + i[1]], key=lambda i: i[4])
        assert [i[4] for i in own] == list(range(used[row]))
        for first, n, begin, end, _ in own:
            assert 1 <= n <= together and 0 < end - begin <= sizes.piece
            assert tables[first, begin:end].tolist() == table[begin:end]
        covered = [page for i in own for page in range(i[2], i[3])]
        assert covered == list(range(sum(page > 0 for page in table)))
    return sum(end - begin for _, _, begin, end, _ in items.tolist())


def test_shared_pages_are_planned_once():
    prompts = [
        [1, 2, *range(100 * p, 100 * p + 6)] for p in range(1, 5)
    ]  # two pages are shared by all
    rows = [[*prompts[i // 8], 1000 + i, 0] for i in range(32)]
    tables = torch.tensor(rows, dtype=torch.int32)
    assert pages_read(tables, Sizes(32, 10), 8) == 4 * 2 + 4 * 6 + 32
    assert pages_read(tables, Sizes(32, 10), 32) == 2 + 4 * 6 + 32
    assert pages_read(tables[:, :8], Sizes(32, 8), 32) == 2 + 4 * 6
    assert pages_read(torch.zeros(3, 5, dtype=torch.int32), Sizes(3, 5), 4) == 0


def test_plans_of_any_tables_keep_within_their_sizes():
    random = torch.Generator().manual_seed(0)
    for width in (1, 2, 9, 40, 300):
        tables = torch.randint(1, 3, (70, width), generator=random, dtype=torch.int32).sort(0)[0]
        ends = torch.randint(width + 1, (70, 1), generator=random)
        tables[torch.arange(width) >= ends] = 0
        tables[:, : width // 2] = 7
        pages_read(tables, Sizes(70, width), 5)
    stairs = torch.ones(40, 40, dtype=torch.int32).tril(-1) + torch.arange(1, 41)[:, None].int()
    pages_read(stairs.int(), Sizes(40, 40), 8)


# The engine runs in Triton's interpreter without CUDA graphs, or on a GPU with them.

SHARED = tuple(20 + i % 60 for i in range(70))  # more than two pages


def requests(**changes) -> list[Request]:
    """Return two prompts with a common prefix, with two samples each that end inside a burst."""
    prompts = (*SHARED, 80), (*SHARED, *range(81, 99))
    asked = [
        Request(prompts[i // 2], 3 + 2 * i % 5, temperature=0.8, seed=i, stop_ids=())
        for i in range(4)
    ]
    return [replace(request, **changes) for request in asked]


def assert_same(ours: list[Completion], theirs: list[Completion]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make sizes small, because the interpreter runs programs one after another."""
    monkeypatch.setattr(cuda_engine, "ROW_BUCKETS", (4, 8))
    monkeypatch.setattr(cuda_engine, "MIN_TABLE_WIDTH", 4)
    monkeypatch.setattr(CudaEngine, "burst", 4)


def sample(model, asked, backend, rows=64) -> list[Completion]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MAX_ROWS", "CUDA_MAX_ROWS"):
            patch.setattr(generate, name, rows)
        return Generator(model, backend=backend).sample(asked)


class Launches(TorchDispatchMode):
    """Counts operators that launch kernels, and our kernels, which are not run."""

    FREE = (
        *("alias", "detach", "select", "slice", "split", "split_with_sizes", "t"),
        *("unsqueeze", "view"),
        *("empty", "empty_like", "new_empty", "promote_types"),
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.names: list[str] = []
        monkeypatch.setattr(KernelInterface, "__getitem__", lambda *_: self.launched)

    def launched(self, *args: Any, **kwargs: Any) -> None:
        self.names.append("ours")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.FREE:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("truncated", [False, True])
def test_a_step_makes_few_launches(truncated: bool, monkeypatch):
    """Each takes at least 2 us, also in a graph, and a step of a small model takes 2 ms."""
    counts = []
    for n_layers in (1, 2):
        model = tiny_model("qwen3", num_hidden_layers=n_layers, dtype=torch.bfloat16).to(DEVICE)
        head = widened(model.head_weight.detach().T)
        cache = CudaEngine(model).cache
        key = StepKey(4, 4, truncated)
        joined = JoinedWeights(model)
        step = DecodeStep(key, model, head, cache, burst=4, joined=joined)
        with monkeypatch.context() as patch, torch.no_grad(), Launches(patch) as launches:
            step.launch()
        counts.append(len(launches.names))
    each_layer = counts[1] - counts[0]
    assert 0 < each_layer <= 10
    # the embedding, a rotation, the last norm, logits, block sums, a draw
    once = 6 + 2 * truncated  # a redraw, and its record
    once += DEVICE == "cpu"  # a CPU widens bf16 for its product
    assert 0 < counts[0] - each_layer <= once


TWO_LAYERS: dict[str, dict[str, Any]] = {  # one of them has a window
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen2-windows": {"max_window_layers": 1},
    "smollm3-windows": {"no_rope_layers": [0, 1]},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *("llama-biases", "mistral-window", "qwen2-windows", "qwen3", "smollm3-windows"),
        "gemma3",  # not with fused kernels
    ],
)
@pytest.mark.filterwarnings("ignore:decoding .* with PyTorch's operations")
def test_the_engine_samples_the_tokens_of_the_other_engines(kind):
    model = tiny_model(kind, num_hidden_layers=2, **TWO_LAYERS.get(kind, {})).to(DEVICE)
    asked = requests()
    assert kind not in TWO_LAYERS or len(set(model.shape.windows)) == 2
    assert set(model.shape.windows) != {None} or "window" not in kind
    ours = sample(model, asked, "triton")
    assert_same(ours, sample(model, asked, "torch"))
    assert_same(ours, sample(model.cpu(), asked, "native"))


def test_a_warning_of_the_engine_names_the_call_of_the_generator():
    generator = Generator(tiny_model("gemma3").to(DEVICE), backend="triton")
    with pytest.warns(UserWarning, match="with PyTorch's operations") as caught:
        generator.sample([Request([9], max_new_tokens=1)])
    assert caught[0].filename == __file__


@pytest.mark.slow
def test_rows_that_end_inside_a_burst_are_refilled():
    model = shallow()
    asked = requests(max_new_tokens=7)
    free = sample(model, asked, "torch")
    asked = [replace(r, stop_ids=(d.token_ids[3],)) for r, d in zip(asked, free, strict=True)]
    done = sample(model, asked, "triton", rows=3)
    assert_same(done, sample(model, asked, "torch"))
    assert {d.finish_reason for d in done} == {"stop"}


@pytest.mark.slow
def test_truncated_and_greedy_rows_may_share_a_batch():
    rules = [{"top_p": 0.7}, {"top_k": 3, "min_p": 0.1}, {"temperature": 0.0}, {}]
    asked = [replace(r, **rule) for r, rule in zip(requests(), rules, strict=True)]
    model = shallow()
    assert_same(sample(model, asked, "triton"), sample(model, asked, "torch"))


@pytest.mark.slow
def test_the_default_dtype_of_torch_changes_nothing():
    model = shallow()
    asked = requests()[:2]
    expected = sample(model, asked, "triton")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = sample(model, asked, "triton")
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids
        assert torch.equal(a.logp, b.logp)


@pytest.mark.slow
def test_bf16_log_probs_are_right_and_a_nan_ends_only_its_requests():
    model = shallow(dtype=torch.bfloat16)
    asked = requests()
    clean = sample(model, asked, "triton")
    for request, done in zip(asked, clean, strict=True):
        with torch.no_grad():
            expected = completion_logps(
                model, request.prompt_ids, done.token_ids, request.temperature
            )
        torch.testing.assert_close(done.logp, expected.cpu(), rtol=0, atol=0.1)
    with torch.no_grad():
        model.model.embed_tokens.weight[85] = math.nan  # in one of the prompts
    got = sample(model, asked, "triton")
    assert [d.finish_reason for d in got] == ["length"] * 2 + ["error"] * 2
    assert_same(got[:2], clean[:2])


@pytest.mark.slow
def test_steps_are_kept_for_a_new_slab_but_not_for_a_changed_model():
    model = tiny_model(num_hidden_layers=2).to(DEVICE)
    asked = requests()[:2]
    generator = Generator(model, backend="triton")
    generator.sample(asked)
    engine = generator.engine()
    assert isinstance(engine, CudaEngine) and not engine.slab.numel()
    kept = dict(engine.steps)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert_same(generator.sample(asked), sample(model, asked, "torch"))
    assert kept and engine.steps == kept
    for change in (rebound, hooked, replaced):
        undo = change(model)
        assert_same(generator.sample(asked), sample(model, asked, "torch"))
        assert not set(engine.steps.values()) & set(kept.values())
        kept = dict(engine.steps)
        # a hook may behave differently in the next call
        assert bool(kept) == (change is rebound)
        undo()


@pytest.mark.slow
def test_rows_are_loaded_again_only_after_many_have_ended(monkeypatch):
    loads: list[int] = []
    load = CudaEngine.load

    def counted(self, rows):
        loads.append(len(rows.last_tokens))
        load(self, rows)

    monkeypatch.setattr(CudaEngine, "load", counted)
    monkeypatch.setattr(CudaEngine, "burst", 2)
    model = tiny_model(num_hidden_layers=1).to(DEVICE)
    lengths = (12, 4, 8, 12, 12, 12, 12, 12, 3)
    asked = [Request((5, 6, 7), n, seed=i, stop_ids=()) for i, n in enumerate(lengths)]
    assert_same(sample(model, asked, "triton", rows=8), sample(model, asked, "torch"))
    assert loads == [8, 8, 6]  # the last is replaced by the first; then two end


@pytest.mark.slow
def test_a_burst_is_started_before_the_one_before_it_is_read(monkeypatch):
    events: list[str] = []
    start = CudaEngine._start_burst
    read = cuda_engine.Burst.result

    def started(self):
        events.append("start")
        return start(self)

    def was_read(self):
        events.append("read")
        return read(self)

    monkeypatch.setattr(CudaEngine, "_start_burst", started)
    monkeypatch.setattr(cuda_engine.Burst, "result", was_read)
    model = shallow()
    asked = requests(max_new_tokens=13)  # three bursts of 4 after the first token
    expected = sample(model, asked, "torch")
    assert_same(sample(model, asked, "triton"), expected)
    assert events == [
        "start",
        "start",
        "read",
        "start",
        "read",
        "read",
    ]  # and no burst without need
    # All end in the first burst, which is not known when the second is started.
    events.clear()
    asked = [replace(r, stop_ids=(d.token_ids[2],)) for r, d in zip(asked, expected, strict=True)]
    generator = Generator(model, backend="triton")
    assert_same(generator.sample(asked), sample(model, asked, "torch"))
    assert events == ["start", "start", "read"]
    engine = generator.engine()
    assert not engine.runs_ahead  # the second is discarded
    assert_same(generator.sample(asked[:1]), sample(model, asked[:1], "torch"))


@pytest.mark.slow
def test_a_free_row_is_refilled_at_once(monkeypatch):
    bursts: list[int] = []
    start = CudaEngine._start_burst

    def started(self):
        bursts.append(self.n_rows)
        return start(self)

    monkeypatch.setattr(CudaEngine, "_start_burst", started)
    monkeypatch.setattr(CudaEngine, "burst", 2)
    model = tiny_model(num_hidden_layers=1).to(DEVICE)
    asked = [Request((5, 6, 7), 13, seed=i, stop_ids=()) for i in range(9)]
    free = sample(model, asked, "torch")
    asked[8] = replace(asked[8], stop_ids=(free[8].token_ids[2],))  # the first one to be served
    assert_same(sample(model, asked, "triton", rows=8), sample(model, asked, "torch"))
    # Six bursts serve seven of the first eight, and two or three of them serve the ninth too, which
    # then runs alone. If it waited for the others, there would be twelve.
    assert len(bursts) <= 9


@pytest.mark.slow
def test_two_streams_of_a_generator_have_separate_slabs():
    model = shallow()
    asked = requests()
    generator = Generator(model, backend="triton")
    found = {}
    for i, done in generator.stream(asked[2:]):  # which do not end in the same burst
        found[i] = done
        if len(found) == 1:
            assert_same(generator.sample(asked[:2]), sample(model, asked[:2], "torch"))
    assert_same([found[0], found[1]], sample(model, asked[2:], "torch"))


def shallow(**changes):
    return tiny_model(num_hidden_layers=1, **changes).to(DEVICE)


def test_the_triton_backend_is_refused_where_triton_cannot_run(monkeypatch):
    monkeypatch.setattr(cuda_engine, "has_triton", lambda device: False)
    with pytest.raises(ValueError, match=r"backend='triton' does not run on c"):
        Generator(shallow(), backend="triton").sample(requests())


def rebound(model) -> Callable[[], None]:
    projection = model.model.layers[0].mlp.up_proj
    weight = projection.weight
    projection.weight = torch.nn.Parameter(weight.detach() * 1.1)
    return partial(setattr, projection, "weight", weight)


def replaced(model) -> Callable[[], None]:
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * 0.8
    return partial(delattr, norm, "forward")


def hooked(model) -> Callable[[], None]:
    layer = model.model.layers[1]
    return layer.register_forward_hook(lambda module, args, out: out * 0.9).remove


def test_a_gpu_computes_prompts_in_one_call_per_layer(monkeypatch):
    """torch's varlen attention has no CPU kernel, so a call for each sequence replaces it."""

    def varlen(layer, q, k, v, cu_queries, cu_keys, max_queries, max_keys):
        queries, keys, values = (
            x.split(borders.diff().tolist())
            for x, borders in ((q, cu_queries), (k, cu_keys), (v, cu_keys))
        )
        assert (max(map(len, queries)), max(map(len, keys))) == (max_queries, max_keys)
        each = zip(queries, keys, values, strict=True)
        return torch.cat([causal_attention(layer, *of_one) for of_one in each])

    monkeypatch.setattr(paged_attention, "varlen_attention", varlen)
    monkeypatch.setattr(CudaEngine, "attention", paged_attention.VarlenPagedAttention)
    model = tiny_model("mistral-window").to(DEVICE)
    asked = requests(max_new_tokens=1)
    assert_same(sample(model, asked, "triton"), sample(model, asked, "torch"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistral-window", "qwen3", "qwen2"])
def test_a_gpu_computes_prompts_with_the_kernels_of_a_step(kind, monkeypatch):
    """The interpreter runs them slowly, so that only this test selects them on a CPU."""
    model = tiny_model(kind, num_hidden_layers=2).to(DEVICE)
    generator = Generator(model, backend="triton")
    engine = generator.engine()
    assert isinstance(engine, CudaEngine)
    engine.fuses_prompts = True
    runs = []
    monkeypatch.setattr(type(model), "run", lambda *args: runs.append(args))
    asked = requests(max_new_tokens=3)
    by_kernels = generator.sample(asked)
    assert not runs
    monkeypatch.undo()
    assert_same(by_kernels, sample(model, asked, "torch"))


def test_a_call_in_inference_mode_does_not_break_later_calls():
    """The engine is kept. Tensors made in inference mode cannot be written outside it."""
    generator = Generator(tiny_model(dtype=torch.bfloat16).to(DEVICE), backend="triton")
    asked = [Request((20, 21, 22), 4, seed=seed) for seed in range(3)]
    with torch.inference_mode():
        first = generator.sample(asked)
    second = generator.sample(asked)
    assert [done.token_ids for done in first] == [done.token_ids for done in second]


def test_the_default_device_changes_nothing():
    model = tiny_model(dtype=torch.bfloat16).to(DEVICE)
    asked = [Request(tuple(range(20, 24 + seed)), 4, seed=seed) for seed in range(3)]
    expected = Generator(model, backend="triton").sample(asked)
    with torch.device("meta"):
        found = Generator(model, backend="triton").sample(asked)
    assert [done.token_ids for done in found] == [done.token_ids for done in expected]


def test_prompts_that_see_many_keys_are_run_in_several_batches():
    """A GPU copies the keys that each prompt sees, also if prompts share them."""
    segments = [Segment(torch.arange(n), start=90, table=[1, 2]) for n in (5, 5, 5, 200)]
    batches = prefill_batches(segments, 1000, max_keys=200)
    assert [batch.lengths for batch in batches] == [[5, 5], [5], [200]]
    batches = prefill_batches(segments, 1000)
    assert [batch.lengths for batch in batches] == [[5, 5, 5, 200]]
