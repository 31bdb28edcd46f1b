"""Options of training and evaluation, with their units and the sources of their defaults.

Flags and TOML keys are the fields of these dataclasses. What can be computed from other options is
a property and not a field. The defaults are those of the default job: SmolLM2-135M on built-in
arithmetic, sized for two CPU cores.
"""

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from expo_fast.methods import METHODS, OPTIONS, MethodSpec, methods_that_read
from expo_fast.objectives import POLICY_OBJECTIVES, PREFERENCE_OBJECTIVES, ignored_options

# Options that may differ between a run and its resume.
ADJUSTABLE = (
    "output_dir",
    "resume",
    "inexact_resume",
    "dry_run",
    "steps",
    "epochs",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "save_patience",
    "stop_within",
    "alarm_steps",
    "alarm_clipped_ratio",
    "alarm_entropy",
    "alarm_kl",
    "alarm_nll",
    "alarm_grad_spike",
    "stop_on_collapse",
    "diagnose",
    "diagnose_every",
    "report_to",
    "pack_memory",
    "shard",
    "gather",
    "collective_timeout",
    "push_to_hub",
    "reward_timeout",
)
# Options that change results only by rounding errors. A resume may change them too.
ROUNDING = ("device", "pack_tokens", "gradient_checkpointing")
# Options that name files. A resume compares the contents with the hashes in its checkpoint.
COMPARED_BY_CONTENT = ("model", "train_data", "eval_data", "shots_data")
# Options that older runs do not have. At their defaults they are left out of the hash in run_dir,
# so that an older run without --output-dir keeps its folder.
ADDED_LATER = (
    "rdpo_alpha",
    "reward_weights",
    "eval_fraction",
    "data_weights",
    "columns",
    "escape_special_tokens",
)
# Options whose default depends on the data. They are None until `Train.resolved` sets them.
DEPEND_ON_DATA = ("eval_data", "shots", "max_completion_length")
DEMO_SHOTS = 2  # of built-in data, with which the default model learns to box its answers
DEMO_COMPLETION_LENGTH = 64  # enough for a built-in problem
COMPLETION_LENGTH = 512  # of other data; most solutions of GSM8K and MATH are shorter
DEMO_EVAL_DATA = "builtin:arithmetic-2:eval"

if TYPE_CHECKING:
    Method = str
    Objective = str
    Preference = str
else:  # the choices of --method, --objective and --preference
    Method = Literal[tuple(METHODS)]
    Objective = Literal[tuple(POLICY_OBJECTIVES)]
    Preference = Literal[tuple(PREFERENCE_OBJECTIVES)]

Fault = tuple[str, str]  # the option, and a sentence with its value and what is needed

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """Options of prompts and sampling that training and evaluation share."""

    model: str = "smollm2-135m"
    """Folder, .gguf file, hub id, or smollm2-135m."""
    shots: int | None = None
    """Number of worked examples, shown as earlier turns of every prompt; None: 2 for built-in data,
    0 for other data."""
    shots_data: str | None = None
    """Source of the worked examples; None: the data (for built-in data, the train split)."""
    system_prompt: str | None = None
    """System message of every prompt; None: the chat template's default."""
    instruction: str = INSTRUCTION
    """Text after each question; empty: none."""
    escape_special_tokens: bool = False
    """Write the tokenizer's control tokens in the text of questions, such as <|im_end|>, as plain
    text. Solutions, chosen and rejected texts keep theirs."""
    levels: tuple[int, ...] = ()
    """Use only problems of these levels; empty: all."""
    columns: tuple[str, ...] = ()
    """Columns of the data that have other names, as NAME=COLUMN: prompt=question answer=final."""
    max_completion_length: int | None = None
    """Maximum number of tokens sampled for one completion, in evaluations too. It does not cut the
    data's own texts. None: 64 for built-in data, 512 for other data."""
    seed: int = 0
    """Seed of all random numbers."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the model's weights."""
    device: str = "auto"
    """Device of the model; auto: cuda if there is a GPU, else cpu."""

    def __post_init__(self):
        """Raise ValueError with a line for each option that is wrong, the first fault of each."""
        for name, wanted in option_types(type(self)).items():
            object.__setattr__(self, name, _as_flags_have_it(getattr(self, name), wanted))
        faults: dict[str, str] = dict(self._faults_of_types())
        if not faults:  # the other checks need values of the right types
            for name, sentence in self._faults():
                faults.setdefault(name, sentence)
        if len(faults) == 1:
            raise ValueError(*faults.values())
        if faults:
            lines = "\n".join(f"  {sentence}" for sentence in faults.values())
            raise ValueError(f"{len(faults)} options have to change:\n{lines}")

    def _faults_of_types(self) -> Iterator[Fault]:
        for name, wanted in option_types(type(self)).items():
            fits = _has_type(getattr(self, name), wanted)
            need = type_in_words(wanted)
            if name == "reward":
                need += ": rewards.py:f, or __main__:f for a function f of this program"
            yield from _require(self, name, fits, need)

    def _faults(self) -> Iterator[Fault]:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            yield from _require(
                self, f.name, finite or f.name == "max_grad_norm", "a finite number"
            )
        model = "a folder, .gguf file, hub id or smollm2-135m"
        yield from _require(self, "model", bool(self.model), model)
        yield from _require(self, "shots", self.n_shots >= 0, "at least 0")
        new_tokens = self.max_new_tokens
        yield from _require(self, "max_completion_length", new_tokens >= 1, "at least 1")
        named = [each.partition("=") for each in self.columns]
        complete = all(name and column for name, _, column in named)
        need = "NAME=COLUMN for each, such as prompt=question"
        yield from _require(self, "columns", complete, need)

    @property
    def data_sources(self) -> tuple[str, ...]:
        """The sources of the problems that are sampled or trained on."""
        raise NotImplementedError

    @property
    def has_builtin_data(self) -> bool:
        """Whether all problems are built-in ones, which defaults are sized for."""
        return all(source.startswith("builtin:") for source in self.data_sources)

    @property
    def n_shots(self) -> int:
        """`shots`, or its default for the data."""
        if self.shots is not None:
            return self.shots
        return DEMO_SHOTS if self.has_builtin_data else 0

    @property
    def max_new_tokens(self) -> int:
        """`max_completion_length`, or its default for the data."""
        if self.max_completion_length is not None:
            return self.max_completion_length
        return DEMO_COMPLETION_LENGTH if self.has_builtin_data else COMPLETION_LENGTH


@dataclass(frozen=True, kw_only=True)
class Train(Prompting):
    """Train a model with ExP-GRPO or ExP-DPO (arXiv:2507.02834), or with one of their controls."""

    method: Method = "expo-grpo"
    """GRPO alone (grpo), with SFT on self-explanations (expo-grpo), or with SFT on the data's
    solutions (expert-grpo). SFT on self-explanations alone (star). DPO that prefers a
    self-explanation (expo-dpo) or the data's solution (expert-dpo) to a failed attempt, or DPO on
    the data's pairs (dpo). SFT on the data's solutions (sft)."""
    train_data: str | tuple[str, ...] = "builtin:arithmetic-2:train"
    """One or more sources: a file (JSONL, JSON, CSV or Parquet), a folder or pattern of files,
    hub:ORG/NAME[/CONFIG][:SPLIT] or builtin:NAME[:SPLIT]."""
    data_weights: tuple[float, ...] = ()
    """Weights of the sources: each has its share of the questions of every batch; empty: questions
    are drawn from all sources together."""
    eval_data: str | tuple[str, ...] | None = None
    """Sources of the held-out problems, as for train_data; None: the eval split of built-in data,
    or a part of other data (eval_fraction)."""
    eval_fraction: float = 0.1
    """Without eval_data: fraction of the questions of the training data that are held out, at most
    eval_limit. A hash of the question chooses them."""
    output_dir: str | None = None
    """Run directory; None: runs/METHOD-HASH, one for each configuration."""
    steps: int = 16
    """Number of training steps."""
    epochs: float | None = None
    """Number of passes over the training problems, in place of steps; None: steps."""
    prompts_per_step: int = 16
    """P, the number of questions in a batch."""
    num_generations: int = 4
    """G, the number of attempts at a question. The mean reward of this group is the baseline."""
    updates_per_batch: int = 1
    """Number of mini-batches that the questions of a batch are split into, as in PPO. Each gets
    one optimizer step."""
    dry_run: bool = False
    """Check everything, print the resolved configuration and stop before the first step."""
    resume: str = "auto"
    """auto: from the newest valid checkpoint in output_dir, if any; never; or the path of a
    checkpoint."""
    inexact_resume: bool = False
    """Resume although data, prompts, reward functions or, under a schedule, steps are not those of
    the checkpoint, or the run's log lacks rows. The run is then marked as inexact. With the
    checkpoint of another run, other options are allowed too."""

    temperature: float = 1.0
    """Temperature of the attempts, and of the log-probs in the loss."""
    top_p: float = 1.0
    """Nucleus sampling of attempts (arXiv:1904.09751); 1: all tokens."""
    top_k: int = 0
    """Number of likeliest tokens that attempts are sampled from; 0: all tokens."""
    min_p: float = 0.0
    """Minimum probability of a sampled token, relative to the likeliest token (arXiv:2407.01082);
    0: all tokens."""
    reward: str | tuple[str, ...] | None = None
    """One or more functions with TRL's signature (prompts, completions, completion_ids, **columns):
    module.f, module:f or file.py:f. None: 1 for the right boxed answer, else 0."""
    reward_weights: tuple[float, ...] = ()
    """Weights of the functions in the sum of their rewards; empty: all 1."""
    reward_timeout: float = 3600.0
    """Seconds of wall time that a reward function may take for a batch, before the run ends with an
    error; 0: no limit."""
    right_above: float = 0.0
    """An attempt with a higher reward counts as right, in accuracies and in the choice of rejected
    attempts."""

    generation_budget: int = 0
    """Number of completions sampled for a question in a step, including explanations; 0: the sum of
    num_generations and, for a method that explains, explanations_per_question."""
    dynamic_sampling: int = 0
    """Maximum number of further batches to replace questions whose rewards are all equal (DAPO)."""
    overlong_buffer: int = 0
    """Number of tokens before the length limit over which the reward falls by 1 (DAPO, eq. 13); 0:
    no punishment."""

    objective: Objective = "clipped"
    """clipped: as in PPO; gspo: clipped, with a sequence's ratio (arXiv:2507.18071); cispo: ratio
    capped at 1 + clip_high (2506.13585); sapo: a soft gate in place of the clip (2511.20347)."""
    loss: Literal["grpo", "dapo", "dr-grpo"] = "grpo"
    """Divisor of the sum over tokens. grpo: N T_i (arXiv:2402.03300), with N attempts of T_i
    tokens; dapo: T, the sum of T_i (2503.14476); dr-grpo: N max_completion_length (2503.20783)."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Standard deviation that divides the advantages; none: they are not divided (Dr.GRPO)."""
    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low (DAPO: 0.2)."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_high (DAPO: 0.28)."""
    kl_coef: float = 0.0
    """Weight of the k3 KL penalty towards the initial model. Without LoRA, a value above 0 keeps a
    frozen copy of that model."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    mask_truncated: bool = False
    """Leave completions cut at the length limit out of the loss, its normalisers and the group
    statistics."""

    exp_sft_coef: float = 0.04
    """Weight of the SFT term on positive samples (best of the paper's Table 5)."""
    exp_sft_reduction: Literal["token_mean", "seq_sum"] = "token_mean"
    """Mean or sum over the tokens of a text in the SFT term."""
    exp_sft_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the coefficient; linear and cosine fall to 0 at the end of the run."""
    exp_sft_max_accuracy: float = 1.0
    """A question has the SFT term if its fraction of right attempts is at most this; 1: every
    question (the paper's formula); 0: only questions whose attempts all fail."""
    explanations_per_question: int = 8
    """K, the number of explanations sampled with the answer shown."""
    keep_explanations: int = 2
    """Number of accepted explanations of a question to train on, the best first; 0: all."""
    choose_explanations: Literal["likelihood", "lift", "first"] = "likelihood"
    """Which explanations are best. likelihood: the likeliest under the plain question. lift: those
    that make the answer likeliest when it is masked in them. first: the first sampled."""
    append_answer: bool = False
    """Append the boxed answer to an explanation that states the answer and has no box."""
    shuffle_explanations: bool = False
    """Give each question the explanations of another question, as a control."""
    explain_every: int = 1
    """Number of steps for which a question's accepted explanations are used; 0: for all later
    steps."""
    explain_temperature: float = 0.8
    """Sampling temperature of explanations."""

    pairs_every: int = 0
    """Number of steps after which pairs are sampled again (online); 0: all are sampled before the
    first step (offline)."""
    refresh_reference: bool = False
    """Online: the reference is the model that sampled the pairs, not the initial model."""
    pairs_per_question: int = 2
    """Maximum number of failed attempts of a question that get a pair."""
    preference: Preference = "dpo"
    """Loss of a pair, in the order of the choices: arXiv:2305.18290, 2310.12036, 2305.10425,
    2405.14734, 2401.08417, 2403.07691, 2402.13228, 2403.19159."""
    dpo_beta: float = 0.1
    """Scale of the implicit rewards, per nat. SimPO needs about 2."""
    label_smoothing: float = 0.0
    """dpo only: probability that the two sides of a pair are swapped."""
    rdpo_alpha: float = 0.0
    """rdpo only: weight of the difference in length of chosen and rejected text, per token."""

    lora_rank: int = 0
    """Train LoRA adapters of this rank on all projections, with PEFT; 0: train the weights."""
    lora_alpha: float = 32.0
    """The adapters' output is scaled by lora_alpha / lora_rank."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    warmup_steps: int = 2
    """Number of optimizer steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up; linear and cosine fall to 0 at the end of the run."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's weight decay of matrices."""
    max_grad_norm: float = 1.0
    """L2 norm that the gradient is clipped to; inf: no clipping."""
    pack_tokens: int = 4096
    """Maximum number of tokens in one forward and backward pass; 0: as many as --pack-memory
    allows. It bounds memory and does not change the loss."""
    pack_memory: float = 2.0
    """With --pack-tokens 0: GB of activations that the largest pack keeps for the backward pass. A
    longer sample is a pack of its own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    batch_invariant: bool = False
    """Make sampled and recomputed log-probs bit-identical on a CPU, for one more forward pass."""
    shard: Literal["optimizer", "model"] = "optimizer"
    """With torchrun: what is sharded over the ranks. optimizer: masters, moments and gradients;
    model: the weights too, which training gathers layer by layer."""
    gather: Literal["auto", "weights", "layers"] = "auto"
    """With --shard model: what a rank gathers to sample. weights: all of them; layers: one layer
    after the other for each token, slowly, for a model that does not fit; auto: weights if they,
    a frozen reference and the optimizer's state of a rank take at most 70% of its memory, else
    layers."""
    collective_timeout: float = 1800.0
    """With torchrun: seconds after which a rank that does not answer ends the run."""

    eval_every: int = 100
    """Evaluate before the first step, after every N steps and after the last; 0: never."""
    eval_limit: int = 64
    """Number of held-out problems to evaluate."""
    eval_samples: int = 4
    """K, the number of samples of each problem, for pass@1 and pass@K."""
    eval_temperature: float = 0.7
    """Sampling temperature of evaluations, 0.7 as in the paper."""
    checkpoint_every: int = 8
    """Save after every N steps and after the last; 0: never."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 1
    """Number of best checkpoints to keep as well: by the evaluation, or without one by the mean
    reward. A run that evaluates also saves after its best evaluation."""
    save_patience: float = 600.0
    """Number of seconds to wait and retry if the checkpoint after the last step cannot be
    written."""
    stop_within: float = 25.0
    """Maximum number of seconds until a run that gets SIGINT, SIGTERM or SIGHUP has saved and
    exited; 0: no limit."""
    diagnose: int = 4
    """Number of questions whose likelihoods are compared in a step (nll, lift, logp_gap); 0:
    none."""
    diagnose_every: int = 4
    """Compare them in the first step and in every N-th one after it. In every step, this and the
    ranking of explanations take 13% of the time of the default job."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "none"], ...] = ("tensorboard",)
    """One or more tools that record the metrics beside metrics.jsonl; none: no tool."""
    push_to_hub: str | None = None
    """Upload the last checkpoint and a model card to this repository of the hub (ORG/NAME), or
    write them to a folder (./NAME or /NAME)."""

    alarm_steps: int = 5
    """Number of consecutive steps after which an alarm is raised, also that of no gradient and that
    of no reward."""
    alarm_clipped_ratio: float = 0.98
    """Alarm at this fraction of attempts cut at the length limit; 0: none."""
    alarm_entropy: float = 0.01
    """Alarm below this entropy of the attempts, in nats per token; 0: none."""
    alarm_kl: float = 5.0
    """Alarm above this KL divergence from the initial model, in nats per token; 0: none."""
    alarm_nll: float = 8.0
    """Alarm above this NLL of attempts, explanations or the data's texts, in nats per token; 0:
    none."""
    alarm_grad_spike: float = 20.0
    """Alarm at one step whose gradient norm is this many times the median of the 32 steps before;
    0: none."""
    stop_on_collapse: bool = False
    """End the run with the exit status 3 at an alarm that lasts alarm_steps steps."""

    def n_diagnosed(self, step: int) -> int:
        """Return the number of questions to diagnose in a step (from 0)."""
        return self.diagnose if step % self.diagnose_every == 0 else 0

    def _faults(self) -> Iterator[Fault]:
        yield from self._options_without_effect()
        yield from super()._faults()
        for name in MORE_THAN_0:
            yield from _require(self, name, getattr(self, name) > 0, "more than 0")
        for name in AT_LEAST_0:
            yield from _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in AT_MOST_1:
            yield from _require(self, name, getattr(self, name) <= 1, "at most 1")
        each_below_1 = all(0 <= b < 1 for b in self.betas)
        yield from _require(self, "betas", each_below_1, "each at least 0 and below 1")
        folder = "a folder, or to be left out"
        yield from _require(self, "output_dir", self.output_dir != "", folder)
        source = "auto, never or a checkpoint's folder"
        yield from _require(self, "resume", self.resume != "", source)
        yield from self._faults_of_the_data()
        distinct = len(set(self.report_to)) == len(self.report_to)
        alone = len(self.report_to) == 1 or "none" not in self.report_to
        need = "none alone, or the names of tools, each once"
        yield from _require(self, "report_to", alone and distinct, need)
        yield from self._faults_of_the_upload()
        yield from self._faults_of_the_length()
        yield from self._faults_of_sampling()
        yield from self._faults_of_rewards()
        yield from self._faults_of_the_loss()
        if self.lora_rank and self.batch_invariant:
            yield (
                "lora_rank",
                f"lora_rank={self.lora_rank}: batch_invariant needs plain weights, choose one",
            )
        if self.shard == "model":
            need = "optimizer with lora_rank or batch_invariant, which need all weights in training"
            needs_all = bool(self.lora_rank or self.batch_invariant)
            yield from _require(self, "shard", not needs_all, need)
        elif self.gather != "auto":
            yield "gather", f"gather={self.gather}: this needs shard=model"

    def _options_without_effect(self) -> Iterator[Fault]:
        ignored = options_without_effect(self.method, self.objective, self.preference)
        for name, reason in ignored.items():
            value = getattr(self, name)
            if value != default_of(type(self), name):
                yield name, f"{name}={value!r}{reason}"

    def _faults_of_the_data(self) -> Iterator[Fault]:
        for name in ("train_data", "eval_data"):
            sources = _as_tuple(getattr(self, name))
            given = name == "eval_data" or sources
            yield from _require(self, name, bool(given) and all(sources), "a source of data")
        if not self.data_weights:
            return
        need = f"one number above 0 for each source of train_data={self.train_data!r}"
        fits = len(self.data_weights) == len(self.data_sources) and min(self.data_weights) > 0
        fits = fits and all(map(math.isfinite, self.data_weights))
        yield from _require(self, "data_weights", fits, need)
        if fits:
            need = f"at least one of the prompts_per_step={self.prompts_per_step} for each source"
            yield from _require(self, "data_weights", min(self.questions_of_sources) > 0, need)

    def _faults_of_the_upload(self) -> Iterator[Fault]:
        if self.push_to_hub is None:
            return
        named = UPLOAD_TARGET.fullmatch(self.push_to_hub) is not None
        yield from _require(self, "push_to_hub", named, "ORG/NAME, or a folder: ./NAME or /NAME")
        need = "checkpoint_every above 0, because the last checkpoint is uploaded"
        yield from _require(self, "push_to_hub", self.checkpoint_every > 0, need)

    def _faults_of_the_length(self) -> Iterator[Fault]:
        if self.epochs is None:
            return
        yield from _require(self, "epochs", self.epochs > 0, "more than 0")
        only_epochs = self.steps == default_of(type(self), "steps")
        need = f"to be left out with steps={self.steps}: give one of them"
        yield from _require(self, "epochs", only_epochs, need)

    def _faults_of_sampling(self) -> Iterator[Fault]:
        least = 2 if self.spec.groups else 1  # a group of one has no baseline
        enough = self.num_generations >= least
        yield from _require(self, "num_generations", enough, f"at least {least}")
        fits = self.overlong_buffer < self.max_new_tokens
        need = f"less than max_completion_length={self.max_new_tokens}"
        yield from _require(self, "overlong_buffer", fits, need)
        if self.generation_budget:
            yield from self._faults_of_the_generation_budget(least)
        size = self.prompts_per_step
        divides = self.updates_per_batch > 0 and size % self.updates_per_batch == 0
        need = f"a divisor of prompts_per_step={size}"
        yield from _require(self, "updates_per_batch", divides, need)

    def _faults_of_the_generation_budget(self, least_attempts: int) -> Iterator[Fault]:
        least = least_attempts + self.n_explanations
        need = f"at least {least}, {self.n_explanations} of them explanations"
        yield from _require(self, "generation_budget", self.generation_budget >= least, need)
        spent = self.explain_every == 1 and self.exp_sft_max_accuracy == 1
        need = "0 with explain_every or exp_sft_max_accuracy, which do not use all of it"
        yield from _require(self, "generation_budget", spent, need)
        need = "0 with dynamic_sampling, which exceeds it"
        yield from _require(self, "generation_budget", not self.dynamic_sampling, need)

    def _faults_of_rewards(self) -> Iterator[Fault]:
        functions = self.reward_functions
        named = self.reward is None or (functions and all(functions))
        yield from _require(self, "reward", bool(named), "one or more functions, or to be left out")
        finite = all(map(math.isfinite, self.reward_weights))
        yield from _require(self, "reward_weights", finite, "finite numbers")
        need = f"one for each function of reward={self.reward!r}"
        fits = len(self.reward_weights) in (0, len(functions))
        yield from _require(self, "reward_weights", fits, need)

    def _faults_of_the_loss(self) -> Iterator[Fault]:
        if not self.spec.policy_term and self.spec.exp_sft_term:
            need = f"more than 0: the SFT term is the only loss of method={self.method}"
            yield from _require(self, "exp_sft_coef", self.exp_sft_coef > 0, need)
        if self.dynamic_sampling:
            need = "group or none with dynamic_sampling, which removes questions from the batch"
            divided = self.advantage_scale != "batch"
            yield from _require(self, "advantage_scale", divided, need)
        if self.refresh_reference:
            need = "more than 0 to refresh_reference"
            yield from _require(self, "pairs_every", self.pairs_every > 0, need)
            need = f"False: preference={self.preference} has no reference"
            needs_reference = PREFERENCE_OBJECTIVES[self.preference].needs_reference
            yield from _require(self, "refresh_reference", needs_reference, need)
        yield from _require(self, "label_smoothing", self.label_smoothing < 0.5, "less than 0.5")
        if self.spec.trains_on_pairs and self.preference == "rdpo":
            need = "more than 0: at 0 rdpo is dpo"
            yield from _require(self, "rdpo_alpha", self.rdpo_alpha > 0, need)

    def resolve_epochs(self, n_problems: int) -> "Train":
        """Return the configuration with the number of steps in place of that of epochs.

        n_problems: number of training problems. The last step may begin another epoch.
        """
        if self.epochs is None:
            return self
        exact = self.epochs * n_problems / self.prompts_per_step
        steps = math.ceil(exact - 1e-9)  # 1.1 * 10 is 11.000000000000002
        return dataclasses.replace(self, steps=max(1, steps), epochs=None)

    @property
    def spec(self) -> MethodSpec:
        return METHODS[self.method]

    @property
    def data_sources(self) -> tuple[str, ...]:
        """The sources of the training data."""
        return _as_tuple(self.train_data)

    @property
    def eval_sources(self) -> tuple[str, ...]:
        """The sources of the held-out problems; empty: a part of the training data is held out."""
        if self.eval_data is not None:
            return _as_tuple(self.eval_data)
        splits = [EVAL_SPLIT.sub(r"\1:eval", source) for source in self.data_sources]
        unchanged = set(splits) & {*self.data_sources}
        return () if unchanged else tuple(splits)

    @property
    def questions_of_sources(self) -> list[int]:
        """With data_weights: the number of questions of each source in a batch.

        The shares of prompts_per_step are rounded down, and the questions that are left go to the
        sources with the largest remainders.
        """
        total = sum(self.data_weights)
        shares = [self.prompts_per_step * weight / total for weight in self.data_weights]
        counts = [math.floor(share) for share in shares]
        left = self.prompts_per_step - sum(counts)
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for i in by_remainder[:left]:
            counts[i] += 1
        return counts

    def resolved(self) -> "Train":
        """Return the configuration with a value for each option whose default depends on the data.

        eval_data remains None if a part of the training data is held out.
        """
        sources = self.eval_sources
        return dataclasses.replace(
            self,
            eval_data=sources[0] if len(sources) == 1 else sources or None,
            shots=self.n_shots,
            max_completion_length=self.max_new_tokens,
        )

    @property
    def reward_functions(self) -> tuple[str, ...]:
        """The user's reward functions; empty: the reward is the boxed answer."""
        return _as_tuple(self.reward)

    @property
    def depends_on_steps(self) -> bool:
        """Whether a step depends on the number of all steps, by a schedule."""
        has_sft_term = self.spec.exp_sft_term and self.exp_sft_coef > 0
        return self.schedule != "constant" or (has_sft_term and self.exp_sft_schedule != "constant")

    @property
    def samples_explanations(self) -> bool:
        """Whether the run samples explanations with the answer shown."""
        if self.spec.exp_sft_term and self.exp_sft_coef == 0:
            return False
        return self.spec.explains

    @property
    def n_explanations(self) -> int:
        """Number of explanations sampled for a question in a step."""
        return self.explanations_per_question if self.samples_explanations else 0

    @property
    def group_size(self) -> int:
        """G, the number of attempts at a question in a step."""
        if not self.generation_budget:
            return self.num_generations
        return self.generation_budget - self.n_explanations

    @property
    def needs_frozen_reference(self) -> bool:
        """Whether the run needs a frozen copy of the initial policy.

        Offline pairs need none, because they get their log-probs before the first step. With LoRA,
        the initial policy is the model with its adapter switched off.
        """
        if self.lora_rank:
            return False
        if self.kl_coef > 0:
            return True
        online = self.pairs_every > 0 and not self.refresh_reference
        return online and PREFERENCE_OBJECTIVES[self.preference].needs_reference

    @property
    def run_dir(self) -> Path:
        """output_dir, or runs/METHOD-HASH, where HASH depends on the configuration."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        identity = []
        for name, value in sorted(dataclasses.asdict(self.resolved()).items()):
            added = name in ADDED_LATER and value == default_of(type(self), name)
            if name not in ADJUSTABLE and not added:
                identity.append((name, value))
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()
        return Path("runs") / f"{self.method}-{digest[:8]}"


MORE_THAN_0 = (
    "steps",
    "prompts_per_step",
    "updates_per_batch",
    "pack_memory",
    "eval_fraction",
    "eval_limit",
    "eval_samples",
    "keep_checkpoints",
    "diagnose_every",
    "alarm_steps",
    "explanations_per_question",
    "top_p",
    "temperature",
    "eps",
    "max_grad_norm",
    "clip_low",
    "clip_high",
    "pairs_per_question",
    "dpo_beta",
    "lora_alpha",
    "collective_timeout",
)
AT_LEAST_0 = (
    "learning_rate",
    "pack_tokens",
    "kl_coef",
    "exp_sft_coef",
    "eval_every",
    "checkpoint_every",
    "keep_best",
    "save_patience",
    "stop_within",
    "alarm_clipped_ratio",
    "alarm_entropy",
    "alarm_kl",
    "alarm_nll",
    "alarm_grad_spike",
    "diagnose",
    "generation_budget",
    "dynamic_sampling",
    "overlong_buffer",
    "reward_timeout",
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
AT_MOST_1 = (
    "alarm_clipped_ratio",
    "top_p",
    "min_p",
    "clip_low",
    "exp_sft_max_accuracy",
    "eval_fraction",
)
UPLOAD_TARGET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|\.{0,2}/.+")
EVAL_SPLIT = re.compile(r"^(builtin:[^:]+)(:train)?$")  # built-in data that has an eval split


@dataclass(frozen=True, kw_only=True)
class Evaluate(Prompting):
    """Measure a model's pass@k and majority-vote accuracy on a set of problems.

    The model of a run directory, or one of its checkpoints, is evaluated as it was trained: options
    of prompts that are None have the values of the run's record.
    """

    instruction: str | None = None
    """Text after each question; empty: none; None: that of the run, or the default of training."""
    levels: tuple[int, ...] | None = None
    """Use only problems of these levels; empty: all; None: those of the run, or all."""
    data: str | None = None
    """A source of problems as for training, or a benchmark: gsm8k or math-500. None: the held-out
    problems of the run, or built-in arithmetic."""
    data_dir: str | None = None
    """Folder of the benchmarks' files; None: that of EXPO_FAST_DATA. The hub is asked for what it
    lacks."""
    limit: int | None = None
    """Use only N of the problems, drawn at random, and the same in each evaluation."""
    samples: int = 4
    """K, the number of samples of each problem."""
    k: tuple[int, ...] = ()
    """Further values of k for pass@k and maj@k, each at most --samples. pass@1, pass@K and majority
    (maj@K) are always reported."""
    temperature: float = 0.7
    """Sampling temperature."""
    output: str | None = None
    """Write every completion and its verdict to this JSONL file."""
    lm_eval_output: str | None = None
    """Write the accuracies to this JSON file, in the form of lm-evaluation-harness."""

    def _faults(self) -> Iterator[Fault]:
        yield from super()._faults()
        source = "a source of data, or to be left out"
        yield from _require(self, "data", self.data != "", source)
        yield from _require(self, "samples", self.samples >= 1, "at least 1")
        yield from _require(self, "temperature", self.temperature >= 0, "at least 0")
        at_least_1 = self.limit is None or self.limit >= 1
        yield from _require(self, "limit", at_least_1, "at least 1")
        fits = all(1 <= k <= self.samples for k in self.k)
        yield from _require(self, "k", fits, f"each at least 1 and at most samples={self.samples}")

    @property
    def source(self) -> str:
        """`data`, or built-in arithmetic."""
        return DEMO_EVAL_DATA if self.data is None else self.data

    @property
    def data_sources(self) -> tuple[str, ...]:
        """The source of the problems, in a tuple."""
        return (self.source,)


def options_without_effect(method: str, objective: str, preference: str) -> dict[str, str]:
    """Return the options that these choices would ignore, each with the end of its sentence.

    A run refuses them, because it would ignore them silently.
    """
    spec = METHODS[method]
    found: dict[str, str] = {}
    for capability, options in OPTIONS.items():
        if getattr(spec, capability):
            continue
        for name in options:
            readers = ", ".join(methods_that_read(name))
            found[name] = f" has no effect with method={method}: only {readers} use it"
    if spec.policy_term:
        for name in ignored_options(POLICY_OBJECTIVES, objective):
            found[name] = f": need the default: objective={objective} does not read it"
    if spec.trains_on_pairs:
        for name in ignored_options(PREFERENCE_OBJECTIVES, preference):
            found[name] = f": need the default: preference={preference} does not read it"
    return found


def _require(config: Any, name: str, ok: bool, need: str) -> Iterator[Fault]:
    """Yield the fault of an option that is not `ok`."""
    if not ok:
        yield name, f"{name}={getattr(config, name)!r}: need {need}"


@cache
def option_types(kind: type) -> dict[str, Any]:
    """Return the type of each option of a dataclass."""
    return get_type_hints(kind)


def type_in_words(wanted: Any) -> str:
    """Return what a value of a type is, for an error."""
    types = [each for each in get_args(wanted) or (wanted,) if each is not type(None)]
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(repr, types))}"
    if get_origin(wanted) is tuple and get_origin(types[0]) is Literal:
        return f"a list of {type_in_words(types[0]).removeprefix('one of ')}"
    if get_origin(wanted) is tuple:
        count = "" if ... in types else f"{len(types)} "
        return f"a list of {count}{types[0].__name__}"
    return f"the type {types[0].__name__}"


def _as_flags_have_it(value: Any, wanted: Any) -> Any:
    """Return the value of a Python program as flags would set it.

    A path becomes text, a list a tuple, and one value of an option for several a tuple.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, list | tuple):
        return tuple(_as_flags_have_it(each, type(each)) for each in value)
    takes_several = get_origin(wanted) is tuple and ... in get_args(wanted)
    return (value,) if takes_several else value


def _has_type(value: Any, wanted: Any) -> bool:
    arguments = get_args(wanted)
    if get_origin(wanted) is Literal:
        return value in arguments
    if get_origin(wanted) is tuple:
        if not isinstance(value, tuple):
            return False
        right_length = ... in arguments or len(value) == len(arguments)
        return right_length and all(_has_type(each, arguments[0]) for each in value)
    if arguments:  # of a union
        return any(_has_type(value, each) for each in arguments)
    if wanted is float:
        return type(value) in (int, float)
    return type(value) is wanted  # not isinstance, for which True is an integer


def default_of(kind: type, name: str) -> Any:
    """Return the default of a field of a dataclass."""
    return kind.__dataclass_fields__[name].default


def _as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the values of an option that takes one or several; () for None."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value
