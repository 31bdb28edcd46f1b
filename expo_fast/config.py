"""Options of training and evaluation, with their units and the sources of their defaults.

Flags and TOML keys are the fields of these dataclasses. What can be computed from other options is
a property and not a field. The defaults are those of the default job: SmolLM2-135M on built-in
arithmetic, sized for two CPU cores.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expo_fast.methods import METHODS, OPTIONS, MethodSpec, methods_that_read
from expo_fast.objectives import POLICY_OBJECTIVES, PREFERENCE_OBJECTIVES, ignored_options

# Options that may differ between a run and its resume.
ADJUSTABLE = (
    "output_dir",
    "resume",
    "dry_run",
    "steps",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "diagnose",
)
# Options that older runs do not have. At their defaults they do not count in the hash of run_dir,
# so that a run without --output-dir is found again.
ADDED_LATER = ("rdpo_alpha", "reward_weights")

if TYPE_CHECKING:
    Method = str
    Objective = str
    Preference = str
else:  # the choices of --method, --objective and --preference
    Method = Literal[tuple(METHODS)]
    Objective = Literal[tuple(POLICY_OBJECTIVES)]
    Preference = Literal[tuple(PREFERENCE_OBJECTIVES)]

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """Options of prompts and sampling that training and evaluation share."""

    model: str = "smollm2-135m"
    """Folder, .gguf file, hub id, or smollm2-135m."""
    shots: int = 2
    """Worked examples shown as earlier turns of every prompt."""
    shots_data: str | None = None
    """Source of the worked examples; None: the data (of built-in data, their train split)."""
    system_prompt: str | None = None
    """None: the chat template's own."""
    instruction: str = INSTRUCTION
    """Text after each question; empty: none."""
    levels: tuple[int, ...] = ()
    """Use only problems of these levels; empty: all."""
    max_completion_length: int = 64
    """Most tokens sampled for one completion."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""

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
    """Train a model with ExP-GRPO or ExP-DPO (arXiv:2507.02834), or with one of their controls."""

    method: Method = "expo-grpo"
    """grpo alone; with SFT on self-explanations (expo-grpo), or on the data's solutions
    (expert-grpo); that SFT on self-explanations alone (star). Pairs of an own failed attempt below
    a self-explanation (expo-dpo), below the data's solution (expert-dpo), or as the data have them
    (dpo). sft on the data's solutions."""
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
    """Of the G attempts, and of the policy whose log-probs the loss uses."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    reward: str | tuple[str, ...] | None = None
    """One or more functions with TRL's signature (prompts, completions, completion_ids, **columns):
    module.f, module:f or file.py:f. None: the boxed answer."""
    reward_weights: tuple[float, ...] = ()
    """Of the functions in the sum of their rewards; empty: all 1."""
    right_above: float = 0.0
    """An attempt with a higher reward is right: it counts in accuracies and is never rejected."""

    generation_budget: int = 0
    """Completions sampled for a question in a step, explanations among them, whatever the method;
    0: num_generations, and explanations_per_question more where the method explains."""
    dynamic_sampling: int = 0
    """Further batches, at most, to replace questions whose rewards are all equal (DAPO); grpo's."""
    overlong_buffer: int = 0
    """Tokens before the length limit over which the reward falls by 1 (DAPO, eq. 13); 0: none."""

    objective: Objective = "clipped"
    """clipped: PPO's; gspo: the same on a sequence's ratio (arXiv:2507.18071); cispo: ratio capped
    at 1 + clip_high (2506.13585); sapo: a soft gate in place of the clip (2511.20347)."""
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
    exp_sft_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the coefficient; linear and cosine fall to 0 at the end of the run."""
    exp_sft_max_accuracy: float = 1.0
    """Questions get the term up to this share of right samples: 1 all (the paper's formula), 0
    those whose samples all fail."""
    explanations_per_question: int = 8
    """K, explanations sampled with the answer shown."""
    keep_explanations: int = 2
    """Explanations of a question that are trained on: the best accepted ones; 0: all."""
    choose_explanations: Literal["likelihood", "lift", "first"] = "likelihood"
    """Which explanations are best. likelihood: the likeliest under the plain question. lift: those
    that make the answer likeliest, with their statements of it masked. first: as sampled."""
    append_answer: bool = False
    """Append the boxed answer to an explanation that reaches it and has no box."""
    shuffle_explanations: bool = False
    """A control: each question gets another question's explanations."""
    explain_every: int = 1
    """Steps for which a question's accepted explanations are reused; 0: for the whole run."""
    explain_temperature: float = 0.8

    pairs_every: int = 0
    """Steps after which pairs are sampled anew (online); 0: once, before the first (offline)."""
    refresh_reference: bool = False
    """Online: the model that sampled a round of pairs is their reference, not the initial one."""
    pairs_per_question: int = 2
    """Failed attempts of a question that get a pair, at most."""
    preference: Preference = "dpo"
    """Loss of a pair (arXiv:2305.18290, 2310.12036, 2305.10425, 2405.14734, 2401.08417, 2403.07691,
    2402.13228, 2403.19159)."""
    dpo_beta: float = 0.1
    """Per nat. SimPO needs about 2."""
    label_smoothing: float = 0.0
    """Of dpo: the probability that the two sides of a pair are swapped."""
    rdpo_alpha: float = 0.0
    """Of rdpo: weight of the difference in length between chosen and rejected text, per token."""

    lora_rank: int = 0
    """Train adapters of this rank on all projections, by PEFT, in place of the weights; 0: none."""
    lora_alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""

    learning_rate: float = 5e-5
    warmup_steps: int = 2
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    pack_tokens: int = 4096
    """Most tokens in one forward and backward pass: bounds memory, does not change the loss."""
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
        for name in MORE_THAN_0:
            _require(self, name, getattr(self, name) > 0, "more than 0")
        for name in AT_LEAST_0:
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in AT_MOST_1:
            _require(self, name, getattr(self, name) <= 1, "at most 1")
        _require(self, "betas", all(0 <= b < 1 for b in self.betas), "each at least 0 and below 1")
        _require(self, "output_dir", self.output_dir != "", "a folder, or to be left out")
        _require(self, "resume", self.resume != "", "auto, never or a checkpoint's folder")
        self._check_sampling()
        self._check_rewards()
        self._check_options_of_the_method()
        self._check_objective()
        self._check_preference()
        if self.lora_rank and self.batch_invariant:
            raise ValueError(
                f"lora_rank={self.lora_rank}: batch_invariant needs plain weights, choose one"
            )

    def _check_sampling(self) -> None:
        least = 2 if self.spec.groups else 1  # a group of one has no baseline
        _require(self, "num_generations", self.num_generations >= least, f"at least {least}")
        fits = self.overlong_buffer < self.max_completion_length
        _require(self, "overlong_buffer", fits, "less than max_completion_length")
        if self.generation_budget:
            self._check_generation_budget(least)
        size = self.prompts_per_step
        divides = size % self.updates_per_batch == 0
        _require(self, "updates_per_batch", divides, f"a divisor of prompts_per_step={size}")

    def _check_rewards(self) -> None:
        functions = self.reward_functions
        named = self.reward is None or (functions and all(functions))
        _require(self, "reward", bool(named), "one or more functions, or to be left out")
        finite = all(map(math.isfinite, self.reward_weights))
        _require(self, "reward_weights", finite, "finite numbers")
        need = f"one for each function of reward={self.reward!r}"
        fits = len(self.reward_weights) in (0, len(functions))
        _require(self, "reward_weights", fits, need)

    def _check_generation_budget(self, least_attempts: int) -> None:
        least = least_attempts + self.n_explanations
        need = f"at least {least}, {self.n_explanations} of them explanations"
        _require(self, "generation_budget", self.generation_budget >= least, need)
        spent = self.explain_every == 1 and self.exp_sft_max_accuracy == 1
        need = "0 with explain_every or exp_sft_max_accuracy, which leave some of it unspent"
        _require(self, "generation_budget", spent, need)
        need = "0 with dynamic_sampling, which spends more"
        _require(self, "generation_budget", not self.dynamic_sampling, need)

    def _check_options_of_the_method(self) -> None:
        """Refuse an option that the method would ignore."""
        for capability, options in OPTIONS.items():
            if getattr(self.spec, capability):
                continue
            for name in options:
                if getattr(self, name) != _default_of(self, name):
                    readers = ", ".join(methods_that_read(name))
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} means nothing to "
                        f"method={self.method}: it is for {readers}"
                    )
        if not self.spec.policy_term and self.spec.exp_sft_term:
            need = f"more than 0: {self.method} has no more"
            _require(self, "exp_sft_coef", self.exp_sft_coef > 0, need)

    def _check_objective(self) -> None:
        for name in ignored_options(POLICY_OBJECTIVES, self.objective):
            unset = getattr(self, name) == _default_of(self, name)
            need = f"the default: objective={self.objective} does not read it"
            _require(self, name, unset, need)
        if self.dynamic_sampling:
            need = "group or none with dynamic_sampling, which has no complete batch"
            _require(self, "advantage_scale", self.advantage_scale != "batch", need)

    def _check_preference(self) -> None:
        if self.refresh_reference:
            _require(self, "pairs_every", self.pairs_every > 0, "more than 0 to refresh_reference")
            need = f"False: preference={self.preference} has no reference"
            needs_reference = PREFERENCE_OBJECTIVES[self.preference].needs_reference
            _require(self, "refresh_reference", needs_reference, need)
        _require(self, "label_smoothing", self.label_smoothing < 0.5, "less than 0.5")
        if self.preference == "rdpo":
            _require(self, "rdpo_alpha", self.rdpo_alpha > 0, "more than 0: at 0 rdpo is dpo")
        for name in ignored_options(PREFERENCE_OBJECTIVES, self.preference):
            unset = getattr(self, name) == _default_of(self, name)
            need = f"the default: preference={self.preference} does not read it"
            _require(self, name, unset, need)

    @property
    def spec(self) -> MethodSpec:
        return METHODS[self.method]

    @property
    def reward_functions(self) -> tuple[str, ...]:
        """The user's reward functions; empty: the reward is the boxed answer."""
        if self.reward is None:
            return ()
        return (self.reward,) if isinstance(self.reward, str) else self.reward

    @property
    def explains(self) -> bool:
        """Whether the run samples explanations with the answer shown."""
        if self.spec.exp_sft_term and self.exp_sft_coef == 0:
            return False
        return self.spec.explains

    @property
    def n_explanations(self) -> int:
        """Explanations sampled for a question in a step."""
        return self.explanations_per_question if self.explains else 0

    @property
    def group_size(self) -> int:
        """G, attempts at a question in a step."""
        if not self.generation_budget:
            return self.num_generations
        return self.generation_budget - self.n_explanations

    @property
    def run_dir(self) -> Path:
        """Return output_dir, or runs/METHOD-HASH, a folder of its own for each configuration."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        identity = []
        for name, value in sorted(dataclasses.asdict(self).items()):
            added = name in ADDED_LATER and value == _default_of(self, name)
            if name not in ADJUSTABLE and not added:
                identity.append((name, value))
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()
        return Path("runs") / f"{self.method}-{digest[:8]}"


MORE_THAN_0 = (
    "steps",
    "prompts_per_step",
    "updates_per_batch",
    "pack_tokens",
    "eval_limit",
    "eval_samples",
    "keep_checkpoints",
    "explanations_per_question",
    "top_p",
    "learning_rate",
    "temperature",
    "eps",
    "max_grad_norm",
    "clip_low",
    "clip_high",
    "pairs_per_question",
    "dpo_beta",
    "lora_alpha",
)
AT_LEAST_0 = (
    "kl_coef",
    "exp_sft_coef",
    "eval_every",
    "checkpoint_every",
    "diagnose",
    "generation_budget",
    "dynamic_sampling",
    "overlong_buffer",
    "pairs_every",
    "label_smoothing",
    "rdpo_alpha",
    "exp_sft_max_accuracy",
    "lora_rank",
    "explain_every",
    "keep_explanations",
    "warmup_steps",
    "weight_decay",
    "top_k",
    "min_p",
    "explain_temperature",
    "eval_temperature",
)
AT_MOST_1 = ("top_p", "min_p", "clip_low", "exp_sft_max_accuracy")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Prompting):
    """Measure pass@k and the majority vote of a model on a set of problems."""

    data: str = "builtin:arithmetic-2:eval"
    """JSONL path, hub:ORG/NAME[:SPLIT] or builtin:NAME[:SPLIT]."""
    limit: int | None = None
    """Use only the first N problems."""
    samples: int = 4
    """K samples of each problem."""
    k: tuple[int, ...] = ()
    """k of pass@k, each at most --samples, beside 1 and --samples, which are always reported."""
    temperature: float = 0.7
    output: str | None = None
    """Write every completion and its verdict to this JSONL file."""

    def __post_init__(self):
        super().__post_init__()
        _require(self, "samples", self.samples >= 1, "at least 1")
        _require(self, "temperature", self.temperature >= 0, "at least 0")
        _require(self, "limit", self.limit is None or self.limit >= 1, "at least 1")
        fits = all(1 <= k <= self.samples for k in self.k)
        _require(self, "k", fits, f"each at least 1 and at most samples={self.samples}")


def _require(config: Any, name: str, ok: bool, need: str) -> None:
    if not ok:
        raise ValueError(f"{name}={getattr(config, name)!r}: need {need}")


def _default_of(config: Any, name: str) -> Any:
    return type(config).__dataclass_fields__[name].default
