"""The items of `check` and of `time`, in their order."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from benchmarks.lease import switches
from benchmarks.lease.report import Report


@dataclass(frozen=True)
class Item:
    """One thing to check or to time. It runs in a process of its own."""

    name: str
    work: str  # MODULE:FUNCTION in benchmarks.lease; the function takes (Report, **given)
    seconds: float  # time limit
    given: dict[str, Any] = field(default_factory=dict)
    switch: str | None = None  # the switch that the timings need if the item fails
    alone: bool = False  # whether no other item may use the device at the same time
    sanitized: bool = False  # whether to run it again under compute-sanitizer if it fails

    def run(self, report: Report) -> None:
        """Run the work in this process."""
        module, function = self.work.split(":")
        work = getattr(import_module(f"benchmarks.lease.{module}"), function)
        work(report, **self.given)


def kernel(name: str, work: str, switch: str | None, **given: Any) -> Item:
    """Return an item that checks one kernel."""
    return Item(name, work, 45, given, switch, sanitized=True)


# N, D and V. No size of the second shape is a multiple of a tile.
SHAPES = {"small": (300, 64, 509), "ragged": (1023, 72, 50257), "large": (1024, 896, 151936)}
HEAD = [
    kernel(f"{name}-{size}", "heads:forward", switches.ROWS, shape=shape, store=store)
    for size, shape in SHAPES.items()
    for name, store in (("softmax-sums", False), ("softmax-sums-e", True))
]
CHECK = [
    Item("versions", "machine:versions", 30, alone=True),
    kernel("addmm-fp32-out", "heads:products", None),
    kernel("row-kernels", "heads:row_kernels", None),
    kernel("target-logits", "heads:target_logits", switches.ROWS),
    *HEAD,
    kernel("logit-gradients", "heads:logit_gradients", switches.ROWS),
    kernel("scale-stored", "heads:scale_stored", switches.ROWS),
    kernel("varlen", "packs:varlen", switches.SDPA),
    kernel("train-swiglu", "layers:train_swiglu", switches.PLAIN_LAYER),
    kernel("train-rope", "layers:train_rope", switches.PLAIN_LAYER),
    kernel("train-keys", "layers:train_keys", switches.PLAIN_LAYER),
    kernel("train-decoder", "layers:train_decoder", switches.PLAIN_LAYER),
    kernel("append", "decoding:append", switches.TORCH_ENGINE),
    kernel("attend", "decoding:attend", switches.TORCH_ENGINE, dims=(64, 128)),
    kernel("attend-other", "decoding:attend", None, dims=(96, 256)),
    kernel("attend-fp32", "decoding:attend", None, dims=(64, 128), dtype="float32"),
    kernel("layer", "decoding:layers", switches.TORCH_ENGINE),
    kernel("blocks", "decoding:draws", switches.TORCH_ENGINE),
    kernel("truncate", "decoding:truncated", switches.TORCH_ENGINE),
    kernel("capture", "decoding:capture", switches.NO_GRAPHS),
    kernel("generator", "decoding:generator", switches.TORCH_ENGINE),
    Item("ceilings", "machine:ceilings", 30, alone=True),
    Item("tests", "suites:tests", 120, alone=True),
]
MODELS = {"135m": "smollm2-135m"} | {size: f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "3b")}


def timing(name: str, work: str, seconds: float, **given: Any) -> Item:
    """Return an item that times something. No other item uses the device meanwhile."""
    return Item(name, work, seconds, given, alone=True)


# The most important items come first, because the time may run out.
TIME = [
    timing("compile", "variants:compiled", 40),
    timing("parts-3b", "variants:timed", 45, model=MODELS["3b"]),
    timing("ops-3b", "ops:timed", 40, model=MODELS["3b"]),
    timing("ops-0.5b", "ops:timed", 40, model=MODELS["0.5b"]),
    timing("decode-0.5b", "sampling:timed", 45, model=MODELS["0.5b"], truncated=True),
    timing("decode-3b", "sampling:timed", 45, model=MODELS["3b"], truncated=False),
    timing("train-0.5b", "training:timed", 90, model=MODELS["0.5b"]),
    timing("parts-0.5b", "variants:timed", 45, model=MODELS["0.5b"]),
    timing("liger", "ops:beside_liger", 45, models=[MODELS["3b"], MODELS["0.5b"]]),
    timing("decode-peer", "sampling:beside_peer", 60, model=MODELS["0.5b"]),
    timing("train-135m", "training:timed", 60, model=MODELS["135m"]),
    timing("train-1.5b", "training:timed", 90, model=MODELS["1.5b"]),
    *(
        timing(f"ncu-{kernel_name}", "profiles:counters", 20, kernel=kernel_name)
        for kernel_name in ("softmax_sums", "attend_items", "draw_allowed")
    ),
    timing("ops-135m", "ops:timed", 40, model=MODELS["135m"]),
    timing("repeats", "ops:repeated", 30),
    timing("step-products", "experiments:step_products", 30),
    timing("overlap", "experiments:overlapped", 30),
    timing("prefetch", "experiments:prefetched", 30),
    timing("gate-up", "experiments:gate_up", 30),
    timing("split-k", "experiments:split_k", 30),
    timing("head-sums", "experiments:head_sums", 40),
    timing(
        "attention-forms",
        "experiments:attention_forms",
        60,
        models=[MODELS["0.5b"], MODELS["135m"], MODELS["3b"]],
    ),
    timing("first-tokens", "step_profiles:first_tokens", 40, model=MODELS["0.5b"]),
    *(
        timing(f"train-phases-{size}", "step_profiles:train_phases", 75, model=MODELS[size])
        for size in ("0.5b", "135m")
    ),
]
PLANS = {"check": CHECK, "time": TIME}
ITEMS = {item.name: item for plan in PLANS.values() for item in plan}
