"""Check the kernels of a decode step against fp64, and the generator against the torch engine."""

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
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.modules import RMSNorm
from expo_fast.modeling.rope import rotate
from expo_fast.ops import linear_logprob

PAGE = 32
LENGTHS = (33, 40, 64, 65, 1, 32, 31, 97, 200, 190, 170, 180, 2)
GROUP = 4  # neighbouring rows that have a prefix in common
SHARED = 64  # tokens of the common prefix, at most
HEADS = {64: (14, 2), 128: (16, 2), 96: (32, 32), 256: (8, 4)}  # heads and kv heads by head size
ERROR = {torch.bfloat16: 1e-2, torch.float32: 5e-6}  # relative to a norm
# Rows that may draw another token, because rounding moves a token's border across their uniform
# number.
OTHER_TOKENS = 1
LOGP_GAP = 0.05  # nats: the largest mean difference of sampling and a full forward, in bf16
VOCABULARY = 151936


class PagedRows:
    """Rows of a batch with queries, and keys and values on shuffled pages.

    Memory of the pages that no token has written contains NaN.
    """

    def __init__(self, report: Report, heads: tuple[int, int], dim: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(dim)
        self.device = report.device
        self.dim = dim
        self.heads, self.kv_heads = heads
        n_pages = [-(-n // PAGE) + 1 for n in LENGTHS]
        free = (torch.randperm(sum(n_pages) + 1, generator=g) + 1).tolist()
        self.width = max(n_pages) + 1
        self.tables = torch.zeros(len(LENGTHS), self.width, dtype=torch.int32)
        for row, n in enumerate(n_pages):
            shared = min(SHARED, LENGTHS[row]) // PAGE if row % GROUP else 0
            table = self.tables[row - 1, :shared].tolist()
            table += [free.pop() for _ in range(n - len(table))]
            self.tables[row, :n] = torch.tensor(table)
        size = (sum(n_pages) + 2, 2, 2, PAGE, self.kv_heads, dim)
        slab = torch.randn(size, generator=g).to(dtype)
        written = torch.zeros(len(slab), PAGE, dtype=torch.bool)
        for row, n in enumerate(LENGTHS):
            position = torch.arange(n)
            page = self.tables[row].long()[position // PAGE]
            written[page, position % PAGE] = True
        slab.permute(0, 3, 1, 2, 4, 5)[~written] = math.nan
        self.slab = slab.to(self.device)
        q = torch.randn(len(LENGTHS), self.heads, dim, generator=g)
        self.q = q.to(dtype).to(self.device)
        self.positions = torch.tensor(LENGTHS, device=self.device) - 1
        address = torch.tensor([self.slab.data_ptr()], device=self.device)
        self.cache = decode.Paged(address, 2, PAGE, self.kv_heads, dim)

    @property
    def where(self) -> tuple[Tensor, Tensor]:
        """Return the page tables and the positions, on the device."""
        return self.tables.to(self.device), self.positions

    def attended(self, window: int | None) -> Tensor:
        """Return the attention by the kernel, with a workspace full of NaN."""
        sizes = Sizes(len(self.q), self.width)
        work = decode.Work.allocate(sizes, self.heads, self.dim, self.q.device)
        for x in (work.top, work.total, work.values):
            x.fill_(math.nan)
        together = decode.rows_together(self.heads, self.kv_heads)
        work.load(*plan(self.tables, sizes, together))
        scale = self.dim**-0.5
        return decode.attend(self.cache, 1, self.q, *self.where, work, scale, window)

    def truth(self, window: int | None) -> Tensor:
        """Return the attention by its formula, in fp64."""
        pages = self.slab[self.tables.long().to(self.device), 1].transpose(2, 3)
        keys, values = pages.flatten(1, 2).double().unbind(2)
        group = self.heads // self.kv_heads
        keys, values = (x.repeat_interleave(group, 2) for x in (keys, values))
        scores = torch.einsum("bhd,bthd->bht", self.q.double(), keys) * self.dim**-0.5
        distance = self.positions[:, None] - torch.arange(keys.shape[1], device=self.device)
        seen = (distance >= 0) & (distance < (window or keys.shape[1]))
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        seen_values = values.masked_fill(~seen[..., None, None], 0)
        return torch.einsum("bht,bthd->bhd", weights, seen_values)


def attend(report: Report, dims: Sequence[int], dtype: str = "bfloat16") -> None:
    """Check the attention of one new token in each row."""
    kind = getattr(torch, dtype)
    for dim in dims:
        heads = HEADS[dim]
        paged = PagedRows(report, heads, dim, kind)
        for window in (None, 48):
            what = f"heads {heads}, dim {dim}, window {window}"
            got = paged.attended(window)
            report.compare(what, got, paged.truth(window), ERROR[kind])
            report.require_equal(what, got, paged.attended(window))


def append(report: Report) -> None:
    """Check that new keys and values are written to their pages, and nothing else is changed."""
    paged = PagedRows(report, (14, 2), 64, torch.bfloat16)
    k, v = torch.randn(2, len(LENGTHS), 2, 64, device=report.device).bfloat16()
    expected = paged.slab.clone()
    for row, position in enumerate(paged.positions.tolist()):
        page = int(paged.tables[row, position // PAGE])
        expected[page, 1, :, position % PAGE] = torch.stack([k[row], v[row]])
    decode.append(paged.cache, 1, k, v, *paged.where)
    report.require_equal("slab", paged.slab.nan_to_num(), expected.nan_to_num())


def layers(report: Report) -> None:
    """Check the kernels between the products of a layer."""
    tolerance = ERROR[torch.bfloat16]
    g = torch.Generator(report.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=report.device).bfloat16()

    norm = RMSNorm(896, 1e-6).bfloat16().to(report.device)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x = normal(64, 896)
    d = normal(64, 896)
    gate, up = normal(64, 2 * 896).chunk(2, 1)
    total, normed = layer.add_norm(x, d, norm.weight.detach(), norm.eps)
    report.require_equal("x + d", total, x + d)
    report.compare("norm", normed, norm((x + d).double()).detach(), tolerance)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    report.compare("swiglu", layer.swiglu(gate, up), expected, tolerance)
    paged = PagedRows(report, (14, 2), 64, torch.bfloat16)
    n = len(LENGTHS)
    qkv = normal(n, 18 * 64).split([14 * 64, 2 * 64, 2 * 64], 1)
    q, k, v = (x.view(n, -1, 64) for x in qkv)
    rope_positions = torch.randint(0, 2**17, (n,), generator=g, device=report.device)
    inv_freq = 1e6 ** (-torch.arange(32, device=report.device) / 32)
    cos, sin = layer.rotation(rope_positions, inv_freq, 1.0, torch.bfloat16)
    angles = (rope_positions[:, None, None].float() * inv_freq).double()
    report.compare("cos", cos, angles.cos(), tolerance)
    report.compare("sin", sin, angles.sin(), tolerance)
    rotation = angles.cos().bfloat16(), angles.sin().bfloat16()
    q_norm, k_norm = (RMSNorm(64, 1e-6).bfloat16().to(report.device) for _ in range(2))
    tables, positions = paged.where
    weights = layer.HeadNorms(q_norm.weight.detach(), k_norm.weight.detach(), 1e-6)
    for head_norms in (None, weights):
        got = layer.place(
            paged.cache,
            1,
            q,
            k,
            v,
            norms=head_norms,
            rotation=rotation,
            tables=tables,
            positions=positions,
        )
        q_in = q_norm(q) if head_norms else q
        k_in = k_norm(k) if head_norms else k
        what = "with norms" if head_norms else "without norms"
        report.compare(f"q, {what}", got, rotate(q_in, *rotation).detach(), tolerance)
        pages = paged.tables.long().gather(1, paged.positions.cpu()[:, None] // PAGE)[:, 0]
        in_cache = paged.slab[pages.to(report.device), 1, :, paged.positions % PAGE]
        placed_k = in_cache[:, 0].nan_to_num() if report.dry else in_cache[:, 0]
        report.compare(f"k, {what}", placed_k, rotate(k_in, *rotation).detach(), tolerance)
        report.require_equal(f"v, {what}", in_cache[:, 1].contiguous(), v)


@dataclass(frozen=True)
class DrawCase:
    """Logits, temperatures, and the keys of the rows' uniform numbers."""

    logits: Tensor  # (B, V) fp32
    temperature: Tensor  # (B,) fp32
    seeds: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64, of the last tokens

    @classmethod
    def make(cls, report: Report, n: int) -> "DrawCase":
        """Return n random rows."""
        g = torch.Generator(report.device).manual_seed(0)
        v = 4096 if report.dry else VOCABULARY
        integers = partial(torch.randint, size=(n,), generator=g, device=report.device)
        return cls(
            logits=3 * torch.randn(n, v, generator=g, device=report.device),
            temperature=torch.linspace(0.4, 1.6, n, device=report.device),
            seeds=integers(-(2**62), 2**62),
            positions=integers(0, 2**20),
        )

    @property
    def u(self) -> Tensor:
        """Return the uniform numbers (B,) of the rows."""
        return sampling.uniform(self.seeds.cpu(), self.positions.cpu() + 1)

    def truth(self, rules: Truncation) -> sampling.SampledTokens:
        """Return the tokens and log-probs that PyTorch draws on the CPU from all logits."""
        return sampling.draw_from_logits(self.logits.cpu(), self.temperature.cpu(), rules, self.u)

    def drawn(
        self, *, record: bool = True
    ) -> tuple[tuple[Tensor, Tensor], draw.Progress, draw.SampledRows]:
        """Return the block statistics, the progress after the draw, and what the kernel draws."""
        statistics = blocks.blocks_of(self.logits, self.temperature, sampling.BLOCK)
        last_tokens = torch.zeros_like(self.seeds)
        progress = draw.Progress.start(last_tokens, self.positions.clone(), 3)
        progress.history.fill_(math.nan)
        sampled = draw.sample_rows(
            self.logits,
            *statistics,
            sampling.BLOCK,
            self.temperature,
            self.seeds,
            progress,
            record=record,
        )
        return statistics, progress, sampled


def draws(report: Report) -> None:
    """Check draws in one pass over the logits against draws by PyTorch."""
    case = DrawCase.make(report, 40)
    case.temperature[7:10] = 0
    case.logits[3, 500:] = -math.inf
    no_truncation = Truncation(torch.zeros(40).long(), torch.ones(40), torch.zeros(40))
    truth = case.truth(no_truncation)
    statistics, progress, sampled = case.drawn()
    report.require_equal("u", sampled.u.cpu(), case.u)
    compare_draws(report, sampled[:2], truth)
    u = case.u.to(report.device)
    by_torch = sampling.draw_from_blocks(case.logits, *statistics, case.temperature, u)
    compare_draws(report, by_torch, truth)
    temperature = torch.where(case.temperature == 0, 1, case.temperature)
    scaled = case.logits / temperature[:, None]
    tokens = sampled.tokens.clamp(0, scaled.shape[1] - 1)  # a dry run draws no tokens
    exact = scaled.double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    report.compare("logp of the drawn tokens", sampled.logps, exact, 1e-6)
    report.require_equal("what the host reads", progress.history[0, 0], sampled.tokens.double())
    report.require_equal("its log-probs", progress.history[0, 1], sampled.logps.double())
    report.require_equal("last tokens", progress.last_tokens, sampled.tokens)
    report.require_equal("positions", progress.positions, case.positions + 1)
    report.require_equal("the next place", progress.index, torch.ones_like(progress.index))
    for name, again in zip(sampled._fields, case.drawn()[2], strict=True):
        report.require_equal(f"{name} again", getattr(sampled, name), again)
    _, later, sampled = case.drawn(record=False)
    draw.record(sampled, later)
    for name, expected in vars(progress).items():
        got = getattr(later, name).nan_to_num()
        report.require_equal(f"{name} recorded later", got, expected.nan_to_num())


def truncated(report: Report) -> None:
    """Check draws with top-k, top-p and min-p, each alone and all together."""
    rules = [
        *((k, 1.0, 0.0) for k in (1, 7, 200, 5000)),
        *((0, p, 0.0) for p in (1e-6, 0.3, 0.95, 0.999)),
        *((0, 1.0, m) for m in (1e-3, 0.5, 1.0)),
        *((20, 0.8, 0.01), (200, 0.999, 1e-4), (0, 1.0, 0.0)),
    ]
    case = DrawCase.make(report, len(rules))
    case.logits[::3] = (2 * case.logits[::3]).round() / 2  # makes ties
    truncation = Truncation(*(torch.tensor(column) for column in zip(*rules, strict=True)))
    statistics, _, drawn = case.drawn(record=False)
    on_device = truncation.to(torch.device(report.device))
    truncate.redraw(
        case.logits,
        *statistics,
        sampling.BLOCK,
        case.temperature,
        drawn.u,
        top_k=on_device.top_k,
        top_p=on_device.top_p,
        min_p=on_device.min_p,
        tokens=drawn.tokens,
        logps=drawn.logps,
    )
    compare_draws(report, drawn[:2], case.truth(truncation))


def compare_draws(
    report: Report, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> None:
    """Compare tokens and log-probs. At most OTHER_TOKENS rows may have another token.

    Log-probs are compared in the rows with the same token.
    """
    tokens, logps = got
    expected_tokens, expected_logps = expected
    same = tokens.cpu() == expected_tokens
    n_others = int((~same).sum())
    report.add(other_tokens=n_others)
    if not report.dry and n_others > OTHER_TOKENS:
        raise Mismatch(
            f"{n_others} rows draw another token: at most {OTHER_TOKENS} may",
            {"got": tokens, "expected": expected_tokens},
        )
    if report.dry:
        same = torch.ones_like(same)
    report.compare("logp", logps.cpu()[same], expected_logps[same], 1e-5, worst=True)


def small_model(report: Report, layers: int) -> Decoder:
    """Return Qwen2.5-0.5B with random weights and fewer layers."""
    sizes = TINY if report.dry else MODELS["qwen2.5-0.5b"]
    return random_model(replace(sizes, layers=layers), report.device)


def make_requests(model: Decoder, n: int = 12, **rules: Any) -> list[Request]:
    """Return requests for three prompts with a common prefix."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.shape.vocabulary, (3, 70), generator=g).tolist()
    shared = ids[0][:40]
    prompts = [(*shared, *own[40:]) for own in ids]
    requests = []
    for i in range(n):
        prompt = prompts[i % 3]
        requests.append(Request(prompt, 12 + i, temperature=1.0, seed=i, stop_ids=(), **rules))
    return requests


def all_tokens(completions: Sequence[Completion]) -> Tensor:
    """Return the tokens of all completions, one after the other."""
    return torch.tensor([token for done in completions for token in done.token_ids])


def capture(report: Report) -> None:
    """Check that a captured step gives what the same launches give without a graph."""
    model = small_model(report, 1)
    rule_sets: tuple[dict[str, Any], ...] = ({}, {"top_p": 0.9})
    for rules in rule_sets:
        engine = CudaEngine(model)
        generator = Generator(model, backend="triton")
        generator._cuda = engine
        captured = generator.sample(make_requests(model, **rules))
        graphs = [step.graph for step in engine.steps.values()]
        report.add(graphs=len(graphs) - graphs.count(None))
        if not report.dry and (not graphs or None in graphs):
            raise Mismatch("a step was not captured as a graph: the warnings say why", {})
        plain = Generator(model, backend="triton")
        plain._cuda = CudaEngine(model, graphs=False)
        expected = plain.sample(make_requests(model, **rules))
        report.require_equal(f"tokens {rules}", all_tokens(captured), all_tokens(expected))


def generator(report: Report) -> None:
    """Check the generator on the Triton engine.

    In fp32 its tokens must be those of the torch engine. In bf16 its log-probs must be close to
    those of a full forward.
    """
    model = random_model(TINY, report.device).float()
    requests = make_requests(model)
    by_triton = Generator(model, backend="triton").sample(requests)
    by_torch = Generator(model, backend="torch").sample(requests)
    report.require_equal("tokens", all_tokens(by_triton), all_tokens(by_torch))
    model = small_model(report, 2)
    requests = make_requests(model)
    done = Generator(model, backend="triton").sample(requests)
    gaps = []
    for request, completion in zip(requests, done, strict=True):
        exact = full_forward(model, request, completion)
        gaps.append((completion.logp - exact).abs())
    gap = float(torch.cat(gaps).mean())
    report.show(logp_gap=round(gap, 5))
    if not report.dry and not gap <= LOGP_GAP:
        raise Mismatch(
            f"log-probs are {gap:.3f} nats off a full forward: at most {LOGP_GAP} is allowed",
            {},
        )


@torch.no_grad()
def full_forward(model: Decoder, request: Request, completion: Completion) -> Tensor:
    """Return the log-probs of a completion's tokens, computed in one forward by PyTorch."""
    tokens = torch.tensor([*request.prompt_ids, *completion.token_ids], device=model.device)
    positions = torch.arange(len(tokens), device=model.device)
    borders = torch.tensor([0, len(tokens)], dtype=torch.int32, device=model.device)
    hidden = model.hidden(tokens, positions, borders)
    n = len(completion.token_ids)
    rows = hidden[-n - 1 : -1]
    targets = tokens[-n:]
    return linear_logprob(rows, model.head_weight, targets, backend="torch").logp.cpu()
