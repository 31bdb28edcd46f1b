"""Decoding on a GPU: the attention kernel against fp64, and the engine against the other two."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from expo_fast.kernels import decode
from expo_fast.kernels.cascade import Sizes, plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 32


def by_definition(q, keys, values, positions, scale, window) -> Tensor:
    """q (B, H, Dh); keys and values (B, tokens, Hkv, Dh), each row's own; in their dtype."""
    group = q.shape[1] // keys.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (keys, values))
    scores = torch.einsum("bhd,bthd->bht", q, k) * scale
    ahead = positions[:, None] - torch.arange(keys.shape[1], device=q.device)
    seen = (ahead >= 0) & (ahead < (window or len(ahead[0])))
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bht,bthd->bhd", weights, v.masked_fill(~seen[:, :, None, None], 0))


class Scene:
    """Rows in groups that begin alike, on shuffled pages of a slab that is NaN where unwritten."""

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

    def ours(self, window=None, layer=1, sizes=None) -> Tensor:
        sizes = sizes or Sizes(len(self.q), self.width)
        work = decode.Work.room(sizes, self.heads, self.dim, self.q.device)
        for x in (work.top, work.total, work.values):
            x.fill_(math.nan)  # of whoever ran before
        work.load(*plan(self.tables, sizes, decode.rows_together(self.heads, self.kv_heads)))
        given = self.tables.to(DEVICE), self.positions.to(DEVICE)
        return decode.attend(self.cache, layer, self.q, *given, work, self.scale, window)

    def theirs(self, dtype, window=None, layer=1) -> Tensor:
        own = self.slab[self.tables.long().to(DEVICE), layer].transpose(2, 3)  # B, W, page, 2, ...
        keys, values = own.flatten(1, 2).to(dtype).unbind(2)
        positions = self.positions.to(DEVICE)
        return by_definition(self.q.to(dtype), keys, values, positions, self.scale, window)

    def check(self, window=None, **how) -> None:
        truth, got = self.theirs(torch.float64, window), self.ours(window, **how)
        plain = self.theirs(torch.float32, window).to(self.q.dtype)
        assert got.dtype == self.q.dtype
        worst, allowed = ((x.double() - truth).abs().max().item() for x in (got, plain))
        off, plain_off = ((x.double() - truth).norm().item() for x in (got, plain))
        assert off <= 2 * plain_off + 1e-6 and worst <= 2 * allowed + 1e-6


LENGTHS = [33, 40, 64, 65, 1, 32, 31, 97, 200, 190, 170, 180, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, window):
    Scene(LENGTHS, 64, 4, dtype=dtype).check(window)


@pytest.mark.parametrize(
    "heads", [(2, 2), (4, 2), (3, 1), (8, 2), (14, 2), (8, 1), (20, 1)], ids=str
)
def test_any_number_of_heads_shares_a_key(heads):
    Scene(LENGTHS[:-4], 32, 4, heads=heads, dim=16).check()


@pytest.mark.parametrize("dim", [8, 80, 96, 128])
def test_any_head_size(dim):
    Scene(LENGTHS, 64, 4, dim=dim).check(50)


@pytest.mark.parametrize("rows", [1, 2, 66])
def test_long_prompts_are_read_once_for_many_rows(rows):
    scene = Scene([300 + 3 * i for i in range(rows)], 290, 33, heads=(4, 2), dim=16)
    scene.check(200)


def test_rows_without_pages_get_zeros_and_a_larger_batch_changes_nothing():
    scene = Scene(LENGTHS, 64, 4)
    alone = scene.ours()
    wide = Scene(LENGTHS, 64, 4)
    idle = len(LENGTHS), 3
    wide.tables = torch.cat([scene.tables, scene.tables.new_zeros(idle[1], scene.width)])
    wide.positions = torch.cat([scene.positions, scene.positions.new_zeros(idle[1])])
    wide.q = torch.cat([scene.q, scene.q[: idle[1]]])
    assert torch.equal(wide.ours()[: idle[0]], alone)
    assert (wide.ours()[idle[0] :] == 0).all()


def test_equal_calls_give_equal_bits_wherever_the_slab_lies():
    scene = Scene(LENGTHS, 64, 4)
    first, again = scene.ours(), scene.ours()
    scene.slab = scene.slab.clone()
    assert torch.equal(first, again) and torch.equal(first, scene.ours())


def test_a_nan_of_one_row_spares_the_others():
    scene = Scene(LENGTHS, 64, 4)
    clean, row = scene.ours(), LENGTHS.index(190)
    scene.slab[int(scene.tables[row, 4])] = math.nan  # that page is the row's alone
    got = scene.ours()
    assert got[row].isnan().all()
    rest = torch.arange(len(LENGTHS)) != row
    assert torch.equal(got[rest], clean[rest])


def test_new_keys_and_values_land_on_their_pages():
    scene, g = Scene(LENGTHS, 64, 4), torch.Generator().manual_seed(1)
    k, v = torch.randn(2, len(LENGTHS), 2, 64, generator=g).bfloat16()
    expected = scene.slab.clone()
    for row, position in enumerate(scene.positions.tolist()):
        page = int(scene.tables[row, position // PAGE])
        expected[page, 1, :, position % PAGE] = torch.stack([k[row], v[row]]).to(DEVICE)
    given = scene.tables.to(DEVICE), scene.positions.to(DEVICE)
    decode.append(scene.cache, 1, k.to(DEVICE), v.to(DEVICE), *given)
    assert torch.equal(scene.slab.nan_to_num(), expected.nan_to_num())


def pages_read(tables: Tensor, sizes: Sizes, together: int) -> int:
    """Pages of all items; each row's slots together cover its pages once and in order."""
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
    ]  # two pages are everyone's
    rows = [[*prompts[i // 8], 1000 + i, 0] for i in range(32)]
    tables = torch.tensor(rows, dtype=torch.int32)
    assert pages_read(tables, Sizes(32, 10), 8) == 4 * 2 + 4 * 6 + 32
    assert pages_read(tables, Sizes(32, 10), 32) == 2 + 4 * 6 + 32
    assert pages_read(tables[:, :8], Sizes(32, 8), 32) == 2 + 4 * 6
    assert pages_read(torch.zeros(3, 5, dtype=torch.int32), Sizes(3, 5), 4) == 0


def test_any_tables_fit_the_plan():
    random = torch.Generator().manual_seed(0)
    for width in (1, 2, 9, 40, 300):
        tables = torch.randint(1, 3, (70, width), generator=random, dtype=torch.int32).sort(0)[0]
        ends = torch.randint(width + 1, (70, 1), generator=random)
        tables[torch.arange(width) >= ends] = 0
        tables[:, : width // 2] = 7
        pages_read(tables, Sizes(70, width), 5)
    stairs = torch.ones(40, 40, dtype=torch.int32).tril(-1) + torch.arange(1, 41)[:, None].int()
    pages_read(stairs.int(), Sizes(40, 40), 8)
