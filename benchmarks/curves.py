"""Measure scaling curves of expo_fast beside its peers on one device, and draw them.

    python -m benchmarks.curves --output points.json --svg curves.svg     all curves
    python -m benchmarks.curves --curves n v --no-peers                   two curves, no peers
    python -m benchmarks.curves --plot points.json --svg curves.svg       draws without measuring

    curve     what varies                 what is measured
    n         rows                        seconds of the LM head: log-probs and their gradients
    v         vocabulary, 1024 rows       the same
    g         samples of a prompt         tokens/s of sampling, and seconds of forward and backward
    length    new tokens of a sample      the same
    prompts   prompts                     the same

Each size is measured as by benchmarks.summary, benchmarks.decode and benchmarks.body: contestants
run in interleaved rounds of one process. Results of the head and sampled tokens are checked before
they are timed. expo_fast computes the prompt of several samples once, and transformers has a row
for each sample. All curves take about 11 minutes on two cores.

The last line is one JSON object with the points. --output saves it after each size.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import body, decode
from benchmarks.cases import OPS, OURS, Group
from benchmarks.curve_charts import SECONDS, TOKENS_PER_S, Measured, Panel, draw, read
from benchmarks.measure import ceilings, measure, run_rounds
from benchmarks.samplers import Load
from benchmarks.summary import default_device, machine, show
from expo_fast.modeling.shape import Shape
from expo_fast.weights import load_structure

SVG = Path("docs/assets/curves.svg")
OP = "logprob forward+backward"
ROWS = 1024  # of the curve v
LOAD = Load(prompts=1, samples=4, prompt_tokens=64, new_tokens=32)  # g, length, prompts vary it
FIELDS = {"g": "samples", "length": "new_tokens", "prompts": "prompts"}
SIZES = {
    "n": (64, 256, 1024, 4096, 16384),
    "v": (8192, 32768, 131072, 262144),
    "g": (1, 4, 16),
    "length": (8, 32, 128),
    "prompts": (1, 2, 4, 8),
}
STATIC = "... static cache"  # the faster sampler of transformers
# The first one compiles for long. The others take the time of eager PyTorch, or more on a CPU.
LEFT_OUT = (
    "eager, torch.compile",
    "TRL selective_log_softmax",
    "Liger scaled cross entropy",
    "expo_fast torch",
)
MICRO_BATCH = 8  # rows in a forward pass of transformers
ROUND_SECONDS = 10  # no round but the first of a size begins later


@dataclass(frozen=True)
class How:
    """How a size is measured."""

    device: str
    repeats: int
    peers: bool


class Work:
    """Measures the generator and the layers of a model beside transformers."""

    def __init__(self, model: str, folder: Path, how: How):
        self.how = how
        self.model = model
        self.subject = decode.make_subject(model, LOAD, folder)
        theirs = body.load_theirs(folder, how.device) if how.peers else None
        self.models = body.Models(self.subject.model, theirs)
        self.ceilings = ceilings(how.device)
        self.rate = body.highest_rate(how.device, self.ceilings)
        self.results: dict[Load, tuple[dict[str, Any], dict[str, Any]]] = {}

    def measure(self, curve: str, size: int, found: Measured) -> None:
        """Add a size of a curve. A load that several curves have is measured once."""
        load = replace(LOAD, **{FIELDS[curve]: size})
        if load not in self.results:
            self.results[load] = (self.sample(load), self.train(load))
        sampled, trained = self.results[load]
        found.add(curve, size, TOKENS_PER_S, sampled["contestants"])
        found.add(curve, size, SECONDS, trained["contestants"])
        found.leave_out(curve, size, sampled["left_out"])

    def sample(self, load: Load) -> dict[str, Any]:
        """Measure the generator."""
        names = [OURS, STATIC] if self.how.peers else [OURS]
        comparison = decode.warm_up(replace(self.subject, load=load), names, self.ceilings)
        run_rounds(comparison.run_round, self.how.repeats, ROUND_SECONDS)
        result = comparison.result()
        decode.show(self.model, result)
        return result

    def train(self, load: Load) -> dict[str, Any]:
        """Measure forward and backward of the layers."""
        job = body.Job(
            common=0,
            own=load.prompt_tokens,
            new=load.new_tokens,
            questions=load.prompts,
            group=load.samples,
            micro_batch=MICRO_BATCH,
        )
        without = [body.APART, body.PRODUCTS]
        if not self.how.peers:
            without.append(body.THEIRS)
        result = body.compare(
            self.models,
            job,
            self.rate,
            repeats=self.how.repeats,
            without=without,
            seconds=ROUND_SECONDS,
        )
        body.show(self.model, result)
        return result


def measure_head(group: Group, how: How) -> dict[str, Any]:
    """Measure the head."""
    without = set(LEFT_OUT)
    if not how.peers:
        without = {name for name, _ in OPS[OP].contestants(how.device)} - {OURS}
    result = measure(group, how.device, how.repeats, without=without, seconds=ROUND_SECONDS)
    show(result)
    return result


def measure_curves(
    curves: Sequence[str], model: str, shape: Shape, how: How, output: Path | None = None
) -> Measured:
    """Measure curves of a model of this shape.

    output: a file that is written after each size.
    """
    found = Measured(machine(), model, panels(shape))
    with tempfile.TemporaryDirectory() as folder:
        work = None
        for curve in curves:
            for size in SIZES[curve]:
                if curve in FIELDS:
                    work = work or Work(model, Path(folder), how)
                    work.measure(curve, size, found)
                else:
                    result = measure_head(head_group(curve, size, shape), how)
                    found.add(curve, size, SECONDS, result["contestants"])
                    found.leave_out(curve, size, result["left_out"])
                if output is not None:
                    found.write(output)
    return found


def head_group(curve: str, size: int, shape: Shape) -> Group:
    """Return the setting of the head at a size of a curve."""
    if curve == "n":
        return Group(OP, f"{shape.vocabulary}x{shape.hidden}", size, zeros=0)
    return Group(OP, f"{size}x{shape.hidden}", ROWS, zeros=0)


def panels(shape: Shape) -> list[Panel]:
    """Return the panels of all curves of a model of this shape."""
    v = shape.vocabulary
    d = shape.hidden
    head = "LM head, forward and backward"
    layers = "Layers, forward and backward"
    prompts = f"prompts {LOAD.prompts}"
    tokens = f"prompt tokens {LOAD.prompt_tokens}"
    new_tokens = f"new tokens {LOAD.new_tokens}"
    samples = f"G {LOAD.samples}"
    fixed = {
        "g": f"{prompts}, {tokens}, {new_tokens}",
        "length": f"{prompts}, {tokens}, {samples}",
        "prompts": f"{tokens}, {samples}, {new_tokens}",
    }
    axes = {"g": "samples of a prompt, G", "length": "new tokens of a sample", "prompts": "prompts"}
    found = [
        Panel("n", SECONDS, head, fixed=f"V {v}, D {d}", axis="rows, N"),
        Panel("v", SECONDS, head, fixed=f"{ROWS} rows, D {d}", axis="vocabulary, V"),
    ]
    for curve in FIELDS:
        found.append(Panel(curve, TOKENS_PER_S, "Sampling", fixed[curve], axis=axes[curve]))
        found.append(Panel(curve, SECONDS, layers, fixed[curve], axis=axes[curve]))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--curves", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--model", default="smollm2-135m", help="as in expo_fast.train")
    parser.add_argument("--repeats", type=int, default=3, help="the most rounds of a size")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help="save the points in this file")
    parser.add_argument("--plot", type=Path, help="draw the points of this file, and measure none")
    parser.add_argument("--svg", type=Path, help=f"draw this file; default with --plot: {SVG}")
    given = parser.parse_args(argv)
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: need at least 1")
    if given.plot is not None and given.output is not None:
        parser.error(f"--output {given.output}: --plot measures no points to save")
    svg = given.svg or (SVG if given.plot else None)
    for file in (given.output, svg):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file}: there is no folder {file.parent}")
    if given.plot is None:
        how = How(default_device(), given.repeats, given.peers)
        shape = shape_of(given.model, parser)
        found = measure_curves(
            list(dict.fromkeys(given.curves)), given.model, shape, how, given.output
        )
    else:
        found = saved(given.plot, parser)
    print(json.dumps(asdict(found)), flush=True)
    if svg is not None:
        svg.write_text(draw(found))


def shape_of(model: str, parser: argparse.ArgumentParser) -> Shape:
    """Return the shape of a model, or end the program with a message."""
    try:
        return load_structure(model)[0].shape
    except (OSError, ValueError) as e:
        parser.error(str(e))


def saved(file: Path, parser: argparse.ArgumentParser) -> Measured:
    """Return the points of a file, or end the program with a message."""
    try:
        return read(file)
    except (OSError, ValueError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
