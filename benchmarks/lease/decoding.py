"""What a decode step runs, against fp64, and the generator against the torch engine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_decode import MODELS, TINY, random_model
from benchmarks.lease.report import Mismatch, Report
from expo_fast.generate import Completion, Generator, Request
from expo_fast.inference import sampling
from expo_fast.inference.cuda_engine import CudaEngine
from expo_fast.inference.sampling import Truncation
from expo_fast.kernels import blocks, decode, draw, layer, truncate
from expo_fast.kernels.cascade import Sizes, plan
from expo_fast.modeling.decoder import Decoder, RMSNorm
from expo_fast.modeling.rope import rotate
from expo_fast.ops import linear_logprob

PAGE = 32
LENGTHS = (33, 40, 64, 65, 1, 32, 31, 97, 200, 190, 170, 180, 2)
SHARED, GROUP = 64, 4  # tokens that rows of a group have in common
HEADS = {64: (14, 2), 128: (16, 2), 96: (32, 32), 256: (8, 4)}  # by their size
ERROR = {torch.bfloat16: 1e-2, torch.float32: 5e-6}  # of a norm
OTHER_TOKENS = 1  # rows whose number falls between two tokens by less than sums round
LOGP_GAP = 0.05  # nats, mean, between sampling and a full forward in bf16
VOCABULARY = 151936


class Scene:
    """Rows on shuffled pages of a slab that is NaN wherever nothing was written."""

    def __init__(self, report: Report, heads: tuple[int, int], dim: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(dim)
        self.device, self.dim, (self.heads, self.kv_heads) = report.device, dim, heads
        pages = [-(-n // PAGE) + 1 for n in LENGTHS]
        free = (torch.randperm(sum(pages) + 1, generator=g) + 1).tolist()
        self.width = max(pages) + 1
        self.tables = torch.zeros(len(LENGTHS), self.width, dtype=torch.int32)
        for row, n in enumerate(pages):
            common = min(SHARED, LENGTHS[row]) // PAGE if row % GROUP else 0
            table = self.tables[row - 1, :common].tolist()
            table += [free.pop() for _ in range(n - len(table))]
            self.tables[row, :n] = torch.tensor(table)
        size = (sum(pages) + 2, 2, 2, PAGE, self.kv_heads, dim)
        slab = torch.randn(size, generator=g).to(dtype)
        written = torch.zeros(len(slab), PAGE, dtype=torch.bool)
        for row, n in enumerate(LENGTHS):
            place = torch.arange(n)
            written[self.tables[row].long()[place // PAGE], place % PAGE] = True
        slab.permute(0, 3, 1, 2, 4, 5)[~written] = math.nan
        self.slab = slab.to(self.device)
        self.q = torch.randn(len(LENGTHS), self.heads, dim, generator=g).to(dtype).to(self.device)
        self.positions = torch.tensor(LENGTHS, device=self.device) - 1
        address = torch.tensor([self.slab.data_ptr()], device=self.device)
        self.cache = decode.Paged(address, 2, PAGE, self.kv_heads, dim)

    @property
    def where(self) -> tuple[Tensor, Tensor]:
        return self.tables.to(self.device), self.positions

    def attended(self, window: int | None) -> Tensor:
        """By the kernel, from room that holds NaN."""
        sizes = Sizes(len(self.q), self.width)
        work = decode.Work.allocate(sizes, self.heads, self.dim, self.q.device)
        for x in (work.top, work.total, work.values):
            x.fill_(math.nan)
        together = decode.rows_together(self.heads, self.kv_heads)
        work.load(*plan(self.tables, sizes, together))
        scale = self.dim**-0.5
        return decode.attend(self.cache, 1, self.q, *self.where, work, scale, window)

    def truth(self, window: int | None) -> Tensor:
        """By the definition, in fp64."""
        own = self.slab[self.tables.long().to(self.device), 1].transpose(2, 3)
        keys, values = own.flatten(1, 2).double().unbind(2)
        group = self.heads // self.kv_heads
        keys, values = (x.repeat_interleave(group, 2) for x in (keys, values))
        scores = torch.einsum("bhd,bthd->bht", self.q.double(), keys) * self.dim**-0.5
        ahead = self.positions[:, None] - torch.arange(keys.shape[1], device=self.device)
        seen = (ahead >= 0) & (ahead < (window or len(ahead[0])))
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bht,bthd->bhd", weights, values.masked_fill(~seen[..., None, None], 0))


def attend(report: Report, dims: Sequence[int], dtype: str = "bfloat16") -> None:
    """Attention of one new token a row."""
    kind = getattr(torch, dtype)
    for dim in dims:
        heads = HEADS[dim]
        scene = Scene(report, heads, dim, kind)
        for window in (None, 48):
            what = f"heads {heads}, dim {dim}, window {window}"
            got = scene.attended(window)
            report.compare(what, got, scene.truth(window), ERROR[kind])
            report.require_equal(what, got, scene.attended(window))


def append(report: Report) -> None:
    """Check that new keys and values are on their pages, and nothing anywhere else."""
    scene = Scene(report, (14, 2), 64, torch.bfloat16)
    k, v = torch.randn(2, len(LENGTHS), 2, 64, device=report.device).bfloat16()
    expected = scene.slab.clone()
    for row, position in enumerate(scene.positions.tolist()):
        page = int(scene.tables[row, position // PAGE])
        expected[page, 1, :, position % PAGE] = torch.stack([k[row], v[row]])
    decode.append(scene.cache, 1, k, v, *scene.where)
    report.require_equal("slab", scene.slab.nan_to_num(), expected.nan_to_num())


def layers(report: Report) -> None:
    """Check what lies between two products of a layer."""
    g = torch.Generator(report.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=report.device).bfloat16()

    norm = RMSNorm(896, 1e-6).bfloat16().to(report.device)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x, d = normal(64, 896), normal(64, 896)
    gate, up = normal(64, 2 * 896).chunk(2, 1)
    total, normed = layer.add_norm(x, d, norm.weight.detach(), norm.eps)
    report.require_equal("x + d", total, x + d)
    report.compare("norm", normed, norm((x + d).double()).detach(), ERROR[torch.bfloat16])
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    report.compare("swiglu", layer.swiglu(gate, up), expected, ERROR[torch.bfloat16])
    scene = Scene(report, (14, 2), 64, torch.bfloat16)
    n = len(LENGTHS)
    qkv = normal(n, 18 * 64).split([14 * 64, 2 * 64, 2 * 64], 1)
    q, k, v = (x.view(n, -1, 64) for x in qkv)
    spots = torch.randint(0, 2**17, (n,), generator=g, device=report.device)
    inv_freq = 1e6 ** (-torch.arange(32, device=report.device) / 32)
    turn = layer.rotation(spots, inv_freq, 1.0, torch.bfloat16)
    angles = (spots[:, None, None].float() * inv_freq).double()
    report.compare("cos", turn[0], angles.cos(), ERROR[torch.bfloat16])
    report.compare("sin", turn[1], angles.sin(), ERROR[torch.bfloat16])
    turn = angles.cos().bfloat16(), angles.sin().bfloat16()
    norms = [RMSNorm(64, 1e-6).bfloat16().to(report.device) for _ in range(2)]
    tables, positions = scene.where
    weights = layer.HeadNorms(norms[0].weight.detach(), norms[1].weight.detach(), 1e-6)
    for head_norms in (None, weights):
        got = layer.place(
            scene.cache,
            1,
            q,
            k,
            v,
            norms=head_norms,
            rotation=turn,
            tables=tables,
            positions=positions,
        )
        q_in, k_in = (q, k) if head_norms is None else (norms[0](q), norms[1](k))
        what = "with norms" if head_norms else "without norms"
        report.compare(f"q, {what}", got, rotate(q_in, *turn).detach(), ERROR[torch.bfloat16])
        pages = scene.tables.long().gather(1, scene.positions.cpu()[:, None] // PAGE)[:, 0]
        kept = scene.slab[pages.to(report.device), 1, :, scene.positions % PAGE]
        placed = kept[:, 0].nan_to_num() if report.dry else kept[:, 0]
        report.compare(f"k, {what}", placed, rotate(k_in, *turn).detach(), ERROR[torch.bfloat16])
        report.require_equal(f"v, {what}", kept[:, 1].contiguous(), v)


@dataclass(frozen=True)
class DrawCase:
    """Logits, temperatures and keys of rows, and the numbers that the keys give."""

    logits: Tensor  # (B, V) fp32
    temperature: Tensor  # (B,) fp32
    seeds: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64, of the last tokens

    @classmethod
    def make(cls, report: Report, n: int) -> "DrawCase":
        g = torch.Generator(report.device).manual_seed(0)
        v = 4096 if report.dry else VOCABULARY
        whole = partial(torch.randint, size=(n,), generator=g, device=report.device)
        return cls(
            logits=3 * torch.randn(n, v, generator=g, device=report.device),
            temperature=torch.linspace(0.4, 1.6, n, device=report.device),
            seeds=whole(-(2**62), 2**62),
            positions=whole(0, 2**20),
        )

    @property
    def u(self) -> Tensor:
        return sampling.uniform(self.seeds.cpu(), self.positions.cpu() + 1)

    def truth(self, rules: Truncation) -> sampling.Drawn:
        """By PyTorch on the CPU, from all logits."""
        return sampling.draw(self.logits.cpu(), self.temperature.cpu(), rules, self.u)

    def drawn(
        self, *, record: bool = True
    ) -> tuple[tuple[Tensor, Tensor], draw.Progress, draw.Draws]:
        """Return the block statistics and what the kernel draws from them."""
        found = blocks.blocks_of(self.logits, self.temperature, sampling.BLOCK)
        last_tokens = torch.zeros_like(self.seeds)
        progress = draw.Progress.start(last_tokens, self.positions.clone(), 3)
        progress.drawn.fill_(math.nan)
        draws = draw.draw(
            self.logits,
            *found,
            sampling.BLOCK,
            self.temperature,
            self.seeds,
            progress,
            record=record,
        )
        return found, progress, draws


def draws(report: Report) -> None:
    """Draws in one pass over the logits against those over all of them."""
    case = DrawCase.make(report, 40)
    case.temperature[7:10] = 0
    case.logits[3, 500:] = -math.inf
    none = Truncation(torch.zeros(40).long(), torch.ones(40), torch.zeros(40))
    truth = case.truth(none)
    found, progress, draws = case.drawn()
    report.require_equal("u", draws.u.cpu(), case.u)
    compare_draws(report, draws[:2], truth)
    u = case.u.to(report.device)
    by_torch = sampling.draw_from_blocks(case.logits, *found, case.temperature, u)
    compare_draws(report, by_torch, truth)
    scaled = case.logits / torch.where(case.temperature == 0, 1, case.temperature)[:, None]
    tokens = draws.tokens.clamp(0, scaled.shape[1] - 1)  # nothing was drawn in a dry run
    exact = scaled.double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    report.compare("logp of the drawn tokens", draws.logps, exact, 1e-6)
    report.require_equal("what the host reads", progress.drawn[0, 0], draws.tokens.double())
    report.require_equal("its log-probs", progress.drawn[0, 1], draws.logps.double())
    report.require_equal("last tokens", progress.last_tokens, draws.tokens)
    report.require_equal("positions", progress.positions, case.positions + 1)
    report.require_equal("the next place", progress.index, torch.ones_like(progress.index))
    for name, again in zip(draws._fields, case.drawn()[2], strict=True):
        report.require_equal(f"{name} again", getattr(draws, name), again)
    _, later, draws = case.drawn(record=False)
    draw.record(draws, later)
    for name, kept in vars(progress).items():
        report.require_equal(
            f"{name} recorded later", getattr(later, name).nan_to_num(), kept.nan_to_num()
        )


def truncated(report: Report) -> None:
    """Top-k, top-p and min-p, alone and together."""
    rules = [
        *((k, 1.0, 0.0) for k in (1, 7, 200, 5000)),
        *((0, p, 0.0) for p in (1e-6, 0.3, 0.95, 0.999)),
        *((0, 1.0, m) for m in (1e-3, 0.5, 1.0)),
        *((20, 0.8, 0.01), (200, 0.999, 1e-4), (0, 1.0, 0.0)),
    ]
    case = DrawCase.make(report, len(rules))
    case.logits[::3] = (2 * case.logits[::3]).round() / 2  # ties
    cut = Truncation(*(torch.tensor(x) for x in zip(*rules, strict=True)))
    found, _, drawn = case.drawn(record=False)
    on = cut.to(torch.device(report.device))
    truncate.redraw(
        case.logits,
        *found,
        sampling.BLOCK,
        case.temperature,
        drawn.u,
        top_k=on.top_k,
        top_p=on.top_p,
        min_p=on.min_p,
        tokens=drawn.tokens,
        logps=drawn.logps,
    )
    compare_draws(report, drawn[:2], case.truth(cut))


def compare_draws(
    report: Report, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> None:
    """Tokens are the same in all rows but a few, and so are their log-probs."""
    same = got[0].cpu() == expected[0]
    report.add(other_tokens=int((~same).sum()))
    if not report.dry and int((~same).sum()) > OTHER_TOKENS:
        raise Mismatch("other tokens are drawn", {"got": got[0], "expected": expected[0]})
    if report.dry:
        same = torch.ones_like(same)
    report.compare("logp", got[1].cpu()[same], expected[1][same], 1e-5, worst=True)


def small_model(report: Report, layers: int) -> Decoder:
    """Qwen2.5-0.5B with fewer layers."""
    sizes = TINY if report.dry else MODELS["qwen2.5-0.5b"]
    return random_model(replace(sizes, layers=layers), report.device)


def asked(model: Decoder, n: int = 12, **rules: Any) -> list[Request]:
    """Return requests of a few prompts with a common prefix."""
    ids = torch.randint(3, model.shape.vocabulary, (3, 70), generator=_fixed()).tolist()
    shared = ids[0][:40]
    prompts = [(*shared, *own[40:]) for own in ids]
    return [
        Request(prompts[i % 3], 12 + i, temperature=1.0, seed=i, stop_ids=(), **rules)
        for i in range(n)
    ]


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def sampled(report: Report, model: Decoder, requests: list[Request]) -> list[Completion]:
    return Generator(model, backend="triton").sample(requests)


def capture(report: Report) -> None:
    """Check that a captured step gives what the same launches give without a graph."""
    model = small_model(report, 1)
    every: tuple[dict[str, Any], ...] = ({}, {"top_p": 0.9})
    for rules in every:
        engine = CudaEngine(model)
        generator = Generator(model, backend="triton")
        generator._cuda = engine
        captured = generator.sample(asked(model, **rules))
        graphs = [step.graph for step in engine.steps.values()]
        report.add(graphs=len([g for g in graphs if g is not None]))
        if not report.dry and (not graphs or None in graphs):
            raise Mismatch("a step was not captured; see the warnings", {})
        plain = Generator(model, backend="triton")
        plain._cuda = CudaEngine(model, graphs=False)
        expected = plain.sample(asked(model, **rules))
        tokens = [
            torch.tensor([t for c in done for t in c.token_ids]) for done in (captured, expected)
        ]
        report.require_equal(f"tokens {rules}", *tokens)


def generator(report: Report) -> None:
    """fp32: the torch engine's tokens. bf16: log-probs of a full forward."""
    model = random_model(TINY, report.device).float()
    requests = asked(model)
    ours = sampled(report, model, requests)
    theirs = Generator(model, backend="torch").sample(requests)
    tokens = [torch.tensor([t for c in done for t in c.token_ids]) for done in (ours, theirs)]
    report.require_equal("tokens", *tokens)
    model = small_model(report, 2)
    requests = asked(model)
    done = sampled(report, model, requests)
    gaps = []
    for request, completion in zip(requests, done, strict=True):
        exact = full_forward(model, request, completion)
        gaps.append((completion.logp - exact).abs())
    gap = float(torch.cat(gaps).mean())
    report.show(logp_gap=round(gap, 5))
    if not report.dry and not gap <= LOGP_GAP:
        raise Mismatch(f"log-probs are {gap:.3f} nats off a full forward's", {})


@torch.no_grad()
def full_forward(model: Decoder, request: Request, completion: Completion) -> Tensor:
    """Return the log-probs of a completion's tokens, computed at once, by plain attention."""
    whole = torch.tensor([*request.prompt_ids, *completion.token_ids], device=model.device)
    borders = torch.tensor([0, len(whole)], dtype=torch.int32, device=model.device)
    hidden = model.hidden(whole, torch.arange(len(whole), device=model.device), borders)
    n = len(completion.token_ids)
    rows, targets = hidden[-n - 1 : -1], whole[-n:]
    return linear_logprob(rows, model.head_weight, targets, backend="torch").logp.cpu()
