"""Time the generator on a GPU, at batch 256 and with random weights of Qwen2.5's shapes.

A model's row gives the tokens per second of `Generator.sample`, and their share of the limit of
`benchmarks.decode`. `decoding` gives the same figures without the prompts and the first tokens: the
time of a call that samples one token for each sequence is subtracted. The attention of a layer is
timed alone too.
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

from benchmarks import decode as decode_benchmark
from benchmarks.decode import Comparison, limit
from benchmarks.measure import Ceilings, Stopwatch, brief, reason
from benchmarks.samplers import OURS, PEERS, Load, Subject, ours, requests
from expo_fast.generate import Generator
from expo_fast.inference.cuda_engine import CudaEngine, uncollected
from expo_fast.modeling.decoder import Decoder

LOAD = Load(prompts=32, samples=8, prompt_tokens=512, new_tokens=128)
SMOKE = Load(prompts=2, samples=2, prompt_tokens=40, new_tokens=4)  # for a CPU
PEER = "transformers generate_batch"
REPEATS = 3
LAYERS = 8  # enough for their keys and values to exceed L2


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model."""

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
    """Return the config of transformers, or an object like it where transformers is missing."""
    fields = {
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
        return SimpleNamespace(**fields, model_type="qwen2", hidden_act="silu")
    return Qwen2Config(**fields)


def random_model(sizes: Sizes, device: str) -> Decoder:
    """Return a bf16 model with random weights."""
    with torch.device(device):
        model = Decoder(config_of(sizes)).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, 0.02)
    return model.to(device)


def measure(name: str, device: str, best: Ceilings, peer: bool) -> dict[str, Any]:
    """Time the generator and, if `peer`, that of transformers. Return plain data.

    Raise WrongResult if our log-probs differ from those of a full forward.
    """
    gpu = device != "cpu"
    model = random_model(MODELS[name] if gpu else TINY, device)
    load = LOAD if gpu else SMOKE
    with TemporaryDirectory() as folder:
        subject = Subject(model, Path(folder), load, device)
        comparison = warm_up(subject, best, peer)
        for _ in range(REPEATS):
            comparison.run_round()
    times = [first_token_seconds(subject) for _ in range(REPEATS)]
    comparison.first_token = statistics.median(times)
    result = comparison.result() | {"model": name, "decoding": decoding(comparison)}
    decode_benchmark.show(name, result)
    print(*(f"decoding: {what} {x:.3g}" for what, x in result["decoding"].items()), sep="\n")
    return result


def warm_up(subject: Subject, best: Ceilings, peer: bool) -> Comparison:
    """Run and check ours and, if `peer`, the generator of transformers."""
    load = subject.load
    expected = decode_benchmark.truth(subject)
    comparison = Comparison(
        subject=subject,
        samplers={OURS: ours(subject)},
        left_out={},
        mean_logp={OURS: expected.mean},
        first_token=0.0,
        ceilings=best,
    )
    comparison.run(OURS)  # captures its graphs
    if not peer:
        return comparison
    try:
        from expo_fast.weights import save_model

        save_model(subject.model, None, subject.folder)
        sampler = PEERS[PEER](subject)
        prompts = load.ids(subject.model.shape.vocabulary)
        completions = sampler(prompts, load.samples, load.new_tokens)
        comparison.mean_logp[PEER] = decode_benchmark.judge(subject, completions, expected)
        comparison.samplers[PEER] = sampler
    except Exception as e:  # it may not be installed, or not run on this device
        comparison.left_out[PEER] = reason(e)
    return comparison


def first_token_seconds(subject: Subject) -> float:
    """Return the seconds until each sequence has its first token."""
    load = subject.load
    stopwatch = Stopwatch(subject.device)
    one_token_each = requests(load.ids(subject.model.shape.vocabulary), load.samples, 1)
    generator = Generator(subject.model)
    stopwatch.start()
    generator.sample(one_token_each)
    seconds, _ = stopwatch.stop()
    return seconds


def decoding(comparison: Comparison) -> dict[str, float]:
    """Return the figures of ours without the prompts and the first tokens."""
    model = comparison.subject.model
    load = comparison.subject.load
    seconds = statistics.median(comparison.seconds[OURS]) - comparison.first_token
    prompts = limit(model, replace(load, new_tokens=1), comparison.ceilings)
    tokens = load.tokens - load.prompts * load.samples
    least = limit(model, load, comparison.ceilings) - prompts
    return {"tokens/s": tokens / seconds, "of limit": least / seconds}


class AttentionCase:
    """The attention of a layer when half of the new tokens are sampled.

    Samples of a prompt share its pages.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, load: Load, device: str):
        from expo_fast.kernels import cascade, decode

        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        page = CudaEngine.page
        rows = load.prompts * load.samples
        self.tables = shared_tables(load)
        size = (1 + int(self.tables.max()), LAYERS, 2, page, kv_heads, head_dim)
        self.slab = torch.randn(size, device=device).bfloat16()
        address = torch.tensor([self.slab.data_ptr()], device=device)
        self.cache = decode.Paged(address, LAYERS, page, kv_heads, head_dim)
        self.sizes = cascade.Sizes(rows, self.tables.shape[1])
        self.work = decode.Work.allocate(self.sizes, heads, head_dim, torch.device(device))
        self.q = torch.randn(rows, heads, head_dim, device=device).bfloat16()
        seen = load.prompt_tokens + load.new_tokens // 2
        positions = torch.full((rows,), seen - 1, device=device)
        self.where = self.tables.to(device), positions
        tokens = load.prompts * load.prompt_tokens + rows * load.new_tokens // 2
        token_bytes = self.slab[0, 0, :, 0].nbytes
        self.moved = tokens * token_bytes + 2 * self.q.nbytes  # the least bytes to move

    def plan(self, together: int) -> None:
        """Plan the work items. At most `together` rows with a common prefix share an item."""
        from expo_fast.kernels import cascade

        self.work.load(*cascade.plan(self.tables, self.sizes, together))

    def run(self, layer: int, tile: Any = None) -> None:
        """Launch the attention of a layer; with the default tile if `tile` is None."""
        from expo_fast.kernels import decode

        scale = self.head_dim**-0.5
        decode.attend(self.cache, layer, self.q, *self.where, self.work, scale, None, tile)


def shared_tables(load: Load) -> torch.Tensor:
    """Return the pages (rows, W) int32 of the rows of a load.

    The pages of a prompt are shared by all of its samples. Each row's own pages follow.
    """
    page = CudaEngine.page
    rows = load.prompts * load.samples
    prompt_pages = load.prompt_tokens // page
    own_pages = -(-load.new_tokens // page)
    first_own = 1 + load.prompts * prompt_pages
    prompts = torch.arange(1, first_own).view(load.prompts, prompt_pages)
    own = first_own + torch.arange(rows * own_pages).view(rows, own_pages)
    return torch.cat([prompts.repeat_interleave(load.samples, 0), own], 1).int()


@torch.no_grad()
def attention(model: Decoder, load: Load, best: Ceilings) -> dict[str, Any]:
    """Time the attention of a layer in several configurations. Return plain data."""
    from expo_fast.kernels import decode

    shape = model.shape
    device = str(model.device)
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
    # (whether rows share what they have in common, tile)
    todo = [(True, shipped), (False, shipped)]
    todo += [(True, tile) for tile in others if tile != shipped]
    for shares, tile in todo:
        case.plan(together if shares else 1)
        sizes = (tile.tokens, tile.warps, tile.stages)
        name = f"{'' if shares else 'no cascade, '}{sizes}"
        try:
            found[name] = replayed(partial(each_layer, tile), device) / LAYERS
        except Exception as e:  # such as a tile that does not fit into shared memory
            found[name] = reason(e)
    floor = case.moved / best.bytes
    print(f"attention of a layer: floor {floor * 1e6:.1f} us; tokens, warps, stages:")
    for name, result in found.items():
        if isinstance(result, str):
            shown = brief(result)
        else:
            shown = f"{result * 1e6:.1f} us, {floor / result:.0%} of the floor's rate"
        print(f"    {name}: {shown}")
    return {"floor_seconds": floor, "bytes": case.moved, "seconds": found}


def replayed(work: Callable[[], None], device: str) -> float:
    """Return the seconds of the work in a CUDA graph, or of the work itself on a CPU.

    The kernels are shorter than the time in which the host launches them one by one.
    """
    work()  # compiles
    run = work
    stopwatch = Stopwatch(device)
    seconds = []
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
