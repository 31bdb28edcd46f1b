"""The generator on a GPU: batch 256, random weights of Qwen2.5's shapes, and its attention alone.

A model's row says how many tokens a second `Generator.sample` gives and what share that is of the
limit of `benchmarks.decode`; `decoding` is the same without the prompts and the first tokens, from
the difference to a call that samples one token each.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import decode as racing
from benchmarks.decode import Race, limit
from benchmarks.measure import Ceilings, Stopwatch, brief, reason
from benchmarks.samplers import OURS, PEERS, Load, Subject, ours, requests
from expo_fast.generate import Generator
from expo_fast.inference.cuda_engine import CudaEngine, uncollected
from expo_fast.modeling.decoder import Decoder

LOAD = Load(prompts=32, samples=8, prompt_tokens=512, new_tokens=128)
SMOKE = Load(prompts=2, samples=2, prompt_tokens=40, new_tokens=4)  # on a CPU
PEER = "transformers generate_batch"
REPEATS = 3
LAYERS = 8  # of keys and values, so that none of them is in L2 when its turn comes


@dataclass(frozen=True)
class Sizes:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 151936


MODELS = {
    "qwen2.5-0.5b": Sizes(24, 896, 4864, 14, 2),
    "qwen2.5-3b": Sizes(36, 2048, 11008, 16, 2),
    "qwen2.5-1.5b": Sizes(28, 1536, 8960, 12, 2),
}
TINY = Sizes(2, 64, 96, 4, 2, 500)


def config_of(sizes: Sizes) -> Any:
    """Return transformers' config where it is installed; ours reads the same names of anything."""
    known = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "layer_types": ["full_attention"] * sizes.layers,
    }
    try:
        from transformers import Qwen2Config
    except ImportError:
        return SimpleNamespace(**known, model_type="qwen2", hidden_act="silu")
    return Qwen2Config(**known)


def random_model(sizes: Sizes, device: str) -> Decoder:
    with torch.device(device):
        model = Decoder(config_of(sizes)).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, 0.02)
    return model.to(device)


def measure(name: str, device: str, best: Ceilings, peer: bool) -> dict[str, Any]:
    """Plain data. Raises Wrong where our log-probs are not those of a full forward."""
    gpu = device != "cpu"
    model, load = random_model(MODELS[name] if gpu else TINY, device), LOAD if gpu else SMOKE
    with TemporaryDirectory() as folder:
        subject = Subject(model, Path(folder), load, device)
        race = contest(subject, best, peer)
        for _ in range(REPEATS):
            race.lap()
    race.first_token = statistics.median(first_tokens(subject) for _ in range(REPEATS))
    result = race.result() | {"model": name, "decoding": decoding(race)}
    racing.show(name, result)
    print(*(f"decoding: {what} {x:.3g}" for what, x in result["decoding"].items()), sep="\n")
    return result


def contest(subject: Subject, best: Ceilings, peer: bool) -> Race:
    """Ours and, if asked for, transformers' own, both judged."""
    load, expected = subject.load, racing.truth(subject)
    race = Race(subject, {OURS: ours(subject)}, {}, {OURS: expected.mean}, 0.0, best)
    race.work(OURS)  # its graphs are made
    if not peer:
        return race
    try:
        from expo_fast.weights import save_model

        save_model(subject.model, None, subject.folder)
        sampler = PEERS[PEER](subject)
        prompts = load.ids(subject.model.shape.vocabulary)
        completions = sampler(prompts, load.samples, load.new_tokens)
        race.mean_logp[PEER] = racing.judge(subject, completions, expected)
        race.samplers[PEER] = sampler
    except Exception as e:  # it may not be installed, or not run here
        race.left_out[PEER] = reason(e)
    return race


def first_tokens(subject: Subject) -> float:
    """Seconds until each sequence has its first token."""
    load, stopwatch = subject.load, Stopwatch(subject.device)
    asked = requests(load.ids(subject.model.shape.vocabulary), load.samples, 1)
    generator = Generator(subject.model)
    stopwatch.start()
    generator.sample(asked)
    return stopwatch.stop()[0]


def decoding(race: Race) -> dict[str, float]:
    s, load = race.subject, race.subject.load
    seconds = statistics.median(race.seconds[OURS]) - race.first_token
    prompts = limit(s.model, replace(load, new_tokens=1), race.ceilings)
    tokens = load.tokens - load.prompts * load.samples
    least = limit(s.model, load, race.ceilings) - prompts
    return {"tokens/s": tokens / seconds, "of limit": least / seconds}


class AttentionCase:
    """A layer's attention in the middle of a load: queries, and pages that samples share."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, load: Load, device: str):
        from expo_fast.kernels import cascade, decode

        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        page, rows = CudaEngine.page, load.prompts * load.samples
        self.tables = shared_tables(load)
        size = (1 + int(self.tables.max()), LAYERS, 2, page, kv_heads, head_dim)
        self.slab = torch.randn(size, device=device).bfloat16()
        address = torch.tensor([self.slab.data_ptr()], device=device)
        self.cache = decode.Paged(address, LAYERS, page, kv_heads, head_dim)
        self.sizes = cascade.Sizes(rows, self.tables.shape[1])
        self.work = decode.Work.allocate(self.sizes, heads, head_dim, torch.device(device))
        self.q = torch.randn(rows, heads, head_dim, device=device).bfloat16()
        seen = load.prompt_tokens + load.new_tokens // 2
        self.given = self.tables.to(device), torch.full((rows,), seen - 1, device=device)
        tokens = load.prompts * load.prompt_tokens + rows * load.new_tokens // 2
        self.moved = tokens * self.slab[0, 0, :, 0].nbytes + 2 * self.q.nbytes  # bytes, at least

    def plan(self, together: int) -> None:
        """Share what rows have in common among that many."""
        from expo_fast.kernels import cascade

        self.work.load(*cascade.plan(self.tables, self.sizes, together))

    def run(self, layer: int, tile: Any = None) -> None:
        from expo_fast.kernels import decode

        scale = self.head_dim**-0.5
        decode.attend(self.cache, layer, self.q, *self.given, self.work, scale, None, tile)


def shared_tables(load: Load) -> torch.Tensor:  # (rows, W) int32
    """Pages of a load's rows: those of a prompt for all its samples, then each row's own."""
    page, rows = CudaEngine.page, load.prompts * load.samples
    whole, own = load.prompt_tokens // page, -(-load.new_tokens // page)
    prompts = 1 + torch.arange(load.prompts * whole).view(load.prompts, whole)
    tails = 1 + load.prompts * whole + torch.arange(rows * own).view(rows, own)
    return torch.cat([prompts.repeat_interleave(load.samples, 0), tails], 1).int()


@torch.no_grad()
def attention(model: Decoder, load: Load, best: Ceilings) -> dict[str, Any]:
    """Time a layer's attention in the middle of the load, in some configurations."""
    from expo_fast.kernels import decode

    shape, device = model.shape, str(model.device)
    case = AttentionCase(shape.heads, shape.kv_heads, shape.head_dim, load, device)
    found = {}

    def each_layer(tile: decode.Tile) -> None:
        for layer in range(LAYERS):
            case.run(layer, tile)

    shipped = decode.tile_for(case.q.dtype, shape.head_dim)
    together = decode.rows_together(shape.heads, shape.kv_heads)
    others = [
        decode.Tile(64, 4, 2),
        decode.Tile(32, 4, 4),
        decode.Tile(128, 4, 2),
        decode.Tile(64, 8, 3),
    ]
    todo = [(False, shipped), (True, shipped)]
    todo += [(False, tile) for tile in others if tile != shipped]
    for alone, tile in todo:
        case.plan(1 if alone else together)
        sizes = (tile.tokens, tile.warps, tile.stages)
        name = f"{'no cascade, ' if alone else ''}{sizes}"
        try:
            found[name] = replayed(partial(each_layer, tile), device) / LAYERS
        except Exception as e:  # too large for shared memory
            found[name] = reason(e)
    floor = case.moved / best.bytes
    print(f"attention of a layer: floor {floor * 1e6:.1f} us; tokens, warps, stages:")
    for name, s in found.items():
        rate = (
            "" if isinstance(s, str) else f"{s * 1e6:.1f} us, {floor / s:.0%} of the floor's rate"
        )
        print(f"    {name}: {rate or brief(str(s))}")
    return {"floor_seconds": floor, "bytes": case.moved, "seconds": found}


def replayed(work: Callable[[], None], device: str) -> float:
    """Seconds of the work as a CUDA graph: to launch its kernels one by one takes the host longer
    than they run. On a CPU: of the work itself.
    """
    work()  # compiles
    run, stopwatch, seconds = work, Stopwatch(device), []
    if device != "cpu":
        graph = torch.cuda.CUDAGraph()
        with uncollected(), torch.cuda.graph(graph):
            work()
        run = graph.replay
    for _ in range(5):
        stopwatch.start()
        run()
        seconds.append(stopwatch.stop()[0])
    return min(seconds)
