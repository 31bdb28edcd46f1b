"""Every knob of a run, in one place, with its unit and where its default comes from.

Flags and TOML keys derive from the fields; what can be computed is not a knob. The defaults are the
default job: SmolLM2-135M on built-in arithmetic, sized for two CPU cores.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

# what may differ between a run and its resume
ADJUSTABLE = ("output_dir", "resume", "dry_run", "steps", "eval_every", "checkpoint_every")
ADJUSTABLE += ("keep_checkpoints", "diagnose")

Method = Literal["expo-grpo", "grpo", "expert-grpo"]


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """What is asked of which model."""

    model: str = "smollm2-135m"
    """Folder, .gguf file, hub id, or smollm2-135m."""
    shots: int = 2
    """Worked examples shown as earlier turns of every prompt."""
    system_prompt: str | None = None
    """None: what the chat template does by itself."""
    levels: tuple[int, ...] = ()
    """Use only problems of these levels; empty: all."""
    max_completion_length: int = 64
    """Tokens sampled for one completion at most."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            _require(self, f.name, finite or f.name == "max_grad_norm", "a finite number")
        _require(self, "model", bool(self.model), "a folder, .gguf file, hub id or smollm2-135m")
        _require(self, "shots", self.shots >= 0, "at least 0")
        _require(self, "max_completion_length", self.max_completion_length >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Train(Prompting):
    """Train a model with GRPO, ExP-GRPO (arXiv:2507.02834) or expert-GRPO."""

    method: Method = "expo-grpo"
    """GRPO alone, or with SFT on self-explanations (expo) or the data's solutions (expert)."""
    train_data: str = "builtin:arithmetic-2:train"
    """JSONL path, hub:ORG/NAME[:SPLIT] or builtin:NAME[:SPLIT]."""
    eval_data: str = "builtin:arithmetic-2:eval"
    output_dir: str | None = None
    """Run directory; None: runs/METHOD-HASH, one for each configuration."""
    steps: int = 16
    prompts_per_step: int = 16
    """P, questions in a batch."""
    num_generations: int = 4
    """G, completions of a question: the group whose mean is the baseline."""
    updates_per_batch: int = 1
    """Optimizer steps on one batch, each on its own share of the questions (PPO's mini-batches)."""
    dry_run: bool = False
    """Check everything, print the resolved configuration and stop before the first step."""
    resume: str = "auto"
    """auto: from the newest valid checkpoint in output_dir, if any; never; or a path."""

    temperature: float = 1.0
    """Of the G samples, and so of the policy whose log-probs the loss takes."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    reward: str | None = None
    """Dotted path of f(prompts, completions, completion_ids, **columns); None: the boxed answer."""

    loss: Literal["grpo", "dapo", "dr-grpo"] = "grpo"
    """Divides the sum by N T_i (arXiv:2402.03300), T (2503.14476) or N L_max (2503.20783)."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Standard deviation that divides the advantages; none is Dr.GRPO's."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """The ratio may move within [1 - clip_low, 1 + clip_high] (DAPO: 0.2, 0.28)."""
    kl_coef: float = 0.0
    """Of the k3 penalty towards the initial model; positive keeps a frozen copy of it."""
    entropy_coef: float = 0.0
    mask_truncated: bool = False
    """Completions cut at the length limit: out of loss, normalisers and group statistics."""

    exp_sft_coef: float = 0.04
    """Weight of the SFT term on explanations (best of the paper's Table 5)."""
    exp_sft_reduction: Literal["token_mean", "seq_sum"] = "token_mean"
    exp_sft_on: Literal["all", "all-fail"] = "all"
    """Questions that get the term: all (the paper's formula), or those whose G samples all fail."""
    explanations_per_question: int = 8
    keep_explanations: int = 2
    """Of the accepted ones of a question, the likeliest under the plain question; 0: all."""
    explain_every: int = 1
    """Steps for which a question's accepted explanations are reused; 0: for the whole run."""
    explain_temperature: float = 0.8

    learning_rate: float = 5e-5
    warmup_steps: int = 2
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    pack_tokens: int = 4096
    """Tokens in one forward and backward at most: the memory knob. It never changes the result."""
    gradient_checkpointing: bool = False
    batch_invariant: bool = False
    """Sampled and recomputed log-probs agree to the bit, for one forward more; on a CPU."""

    eval_every: int = 100
    """Evaluate before the first step, after every N and after the last; 0: never."""
    eval_limit: int = 64
    """Held-out questions."""
    eval_samples: int = 4
    """K samples of each, for pass@1 and pass@K."""
    eval_temperature: float = 0.7
    """As in the paper's evaluation."""
    checkpoint_every: int = 8
    """Save after every N steps and after the last; 0: never."""
    keep_checkpoints: int = 2
    diagnose: int = 4
    """Questions whose likelihoods are compared each step (nll, lift, logp_gap); 0: none."""

    def __post_init__(self):
        super().__post_init__()
        positive = ("steps", "prompts_per_step", "updates_per_batch", "pack_tokens", "eval_limit")
        positive += ("eval_samples", "keep_checkpoints", "explanations_per_question", "top_p")
        positive += ("learning_rate", "temperature", "eps", "max_grad_norm", "clip_low")
        for name in (*positive, "clip_high"):
            _require(self, name, getattr(self, name) > 0, "more than 0")
        natural = ("kl_coef", "exp_sft_coef", "eval_every", "checkpoint_every", "diagnose")
        natural += ("explain_every", "keep_explanations", "warmup_steps", "weight_decay")
        for name in (*natural, "top_k", "min_p", "explain_temperature", "eval_temperature"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("top_p", "min_p", "clip_low"):
            _require(self, name, getattr(self, name) <= 1, "at most 1")
        _require(self, "betas", all(0 <= b < 1 for b in self.betas), "each at least 0 and below 1")
        _require(self, "output_dir", self.output_dir != "", "a folder, or to be left out")
        _require(self, "resume", self.resume != "", "auto, never or a checkpoint's folder")
        need = "at least 2: a group of one has no baseline"
        _require(self, "num_generations", self.num_generations >= 2, need)
        if self.prompts_per_step % self.updates_per_batch:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} does not divide into "
                f"updates_per_batch={self.updates_per_batch} equal parts"
            )

    @property
    def run_dir(self) -> Path:
        """output_dir, or a folder of its own for whatever differs from other runs."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        values = dataclasses.asdict(self).items()
        identity = sorted((k, v) for k, v in values if k not in ADJUSTABLE)
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()
        return Path("runs") / f"{self.method}-{digest[:8]}"


@dataclass(frozen=True, kw_only=True)
class Evaluate(Prompting):
    """Measure pass@1 and pass@K of a model on a set of problems."""

    data: str = "builtin:arithmetic-2:eval"
    """JSONL path, hub:ORG/NAME[:SPLIT] or builtin:NAME[:SPLIT]."""
    shots_data: str | None = None
    """Where the worked examples come from; None: the data itself (its train split if built in)."""
    limit: int | None = None
    """Use only the first N problems."""
    samples: int = 4
    """K samples of each problem."""
    temperature: float = 0.7

    def __post_init__(self):
        super().__post_init__()
        _require(self, "samples", self.samples >= 1, "at least 1")
        _require(self, "temperature", self.temperature >= 0, "at least 0")
        _require(self, "limit", self.limit is None or self.limit >= 1, "at least 1")


def _require(config: Any, name: str, ok: bool, need: str) -> None:
    if not ok:
        raise ValueError(f"{name}={getattr(config, name)!r}: need {need}")


C = TypeVar("C", Train, Evaluate)


def parse(kind: type[C], argv: Sequence[str]) -> C:
    """`--config FILE.toml`, overridden by flags. ValueError on an unknown key or a bad value."""
    import tyro

    argv = [word for given in argv for word in _separate(given)]
    default = kind()
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs a TOML file behind it")
        default = from_toml(kind, Path(argv[at + 1]))
        del argv[at : at + 2]
    about = f"{kind.__doc__} --config FILE.toml gives defaults, which flags override."
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=argv, default=default, description=about)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ValueError(_sentence(said.getvalue())) from None


def _sentence(box: str) -> str:
    """What tyro says inside the frame that it draws: no colours, title or advice."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [re.sub(r"[^ -~]|--+$", "", line).strip() for line in plain.splitlines()]
    _, *said = filter(None, lines)
    advice = ("Argument helptext", "Perhaps", "For full helptext", "Similar arguments")
    end = next((i for i, line in enumerate(said) if line.startswith(advice)), len(said))
    return " ".join(said[:end]) + "; see --help"


def _separate(word: str) -> list[str]:
    return ["--config", word[9:]] if word.startswith("--config=") else [word]


def from_toml(kind: type[C], path: Path) -> C:
    """A config from a TOML file of its fields."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --config needs a TOML file")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    types, fields = get_type_hints(kind), {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in types:
            raise ValueError(f"{path} has an unknown key {name!r}; known: {', '.join(types)}")
        if name in fields:
            raise ValueError(f"{path} has {name} twice, spelt with - and with _: keep one")
        try:
            fields[name] = _typed(value, types[name])
        except (TypeError, OverflowError):
            raise ValueError(f"{path}: {name}={value!r}: need {_named(types[name])}") from None
    return kind(**fields)


def _typed(value: Any, wanted: Any) -> Any:
    """The TOML value as a field's type; TypeError where it is none."""
    arguments = get_args(wanted)
    if get_origin(wanted) is Literal:
        fits = value in arguments
    elif get_origin(wanted) is tuple:
        fits = isinstance(value, list) and (... in arguments or len(value) == len(arguments))
        value = tuple(_typed(x, arguments[0]) for x in value) if fits else value
    elif wanted is float:
        fits = type(value) in (int, float)
        value = float(value) if fits else value
    else:
        fits = type(value) in (arguments or (wanted,))  # not isinstance: true is no 1
    if not fits:
        raise TypeError
    return value


def _named(wanted: Any) -> str:
    """A field's type in plain words."""
    plain = [t for t in get_args(wanted) or (wanted,) if t is not type(None)]
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(repr, plain))}"
    if get_origin(wanted) is tuple:
        count = "" if ... in plain else f"{len(plain)} "
        return f"a list of {count}{plain[0].__name__}"
    return f"the type {plain[0].__name__}"


def dump_toml(config: Train | Evaluate) -> str:
    """The TOML that `from_toml` reads back; what is None is left out."""
    values = dataclasses.asdict(config).items()
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values if value is not None)


def _toml(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
