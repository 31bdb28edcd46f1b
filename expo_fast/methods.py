"""The training methods: one `MethodSpec` for each value of `--method`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """What one method samples, and what it trains on.

    To add a method, add an entry to `METHODS`. The loops read these fields and no method's name.
    """

    loop: Literal["grpo", "dpo", "sft"]
    """Module of `expo_fast.algorithms` whose `run_step` runs a step of the method."""
    policy_term: bool = False
    """Whether the loss has a policy-gradient term on the model's own attempts."""
    sft_source: Literal["explanations", "solutions", "data"] | None = None
    """Positive samples of the SFT term: self-explanations, the data's solutions, or the data's own
    texts (a pair's chosen text, else the solution). None: the loss has no SFT term."""
    chosen_source: Literal["explanations", "solutions", "data"] | None = None
    """Chosen side of the pairs. `data` takes both sides from the data. None: there are no pairs."""

    @property
    def samples_attempts(self) -> bool:
        """Whether the model attempts the plain questions in training."""
        return self.loop == "grpo" or self.samples_pairs

    @property
    def samples_pairs(self) -> bool:
        """Whether failed attempts are the rejected side of the pairs."""
        return self.chosen_source in ("explanations", "solutions")

    @property
    def trains_on_pairs(self) -> bool:
        return self.chosen_source is not None

    @property
    def explains(self) -> bool:
        """Whether the model samples explanations with the answer shown."""
        return "explanations" in (self.sft_source, self.chosen_source)

    @property
    def explains_every_step(self) -> bool:
        """Whether explanations are sampled in each step, and not in rounds of pairs."""
        return self.sft_source == "explanations"

    @property
    def needs_solutions(self) -> bool:
        """Whether each problem needs a solution in the data."""
        return "solutions" in (self.sft_source, self.chosen_source)

    @property
    def groups(self) -> bool:
        """Whether attempts are compared within groups, so that each needs at least two."""
        return self.loop == "grpo"

    @property
    def sft_term(self) -> bool:
        return self.sft_source is not None

    @property
    def exp_sft_term(self) -> bool:
        """Whether the GRPO loop runs an SFT term. The options exp_sft_* belong to it."""
        return self.loop == "grpo" and self.sft_term

    @property
    def resamples_questions(self) -> bool:
        """Whether dynamic sampling may replace questions: only the policy term uses them."""
        return self.policy_term and not self.sft_term


METHODS: dict[str, MethodSpec] = {
    "expo-grpo": MethodSpec(loop="grpo", policy_term=True, sft_source="explanations"),
    "grpo": MethodSpec(loop="grpo", policy_term=True),
    "expert-grpo": MethodSpec(loop="grpo", policy_term=True, sft_source="solutions"),
    "star": MethodSpec(loop="grpo", sft_source="explanations"),
    "expo-dpo": MethodSpec(loop="dpo", chosen_source="explanations"),
    "expert-dpo": MethodSpec(loop="dpo", chosen_source="solutions"),
    "dpo": MethodSpec(loop="dpo", chosen_source="data"),
    "sft": MethodSpec(loop="sft", sft_source="data"),
}

# Options that only some methods read, by the property of MethodSpec that is true for those methods.
# The others refuse these options, because they would ignore them silently.
OPTIONS: dict[str, tuple[str, ...]] = {
    "samples_attempts": (
        "top_p",
        "top_k",
        "min_p",
        "reward",
        "reward_weights",
        "reward_timeout",
        "right_above",
        "num_generations",
        "generation_budget",
        "mask_truncated",
    ),
    "policy_term": (
        "kl_coef",
        "entropy_coef",
        "objective",
        "loss",
        "advantage_scale",
        "clip_low",
        "clip_high",
        "overlong_buffer",
    ),
    "groups": ("updates_per_batch",),
    "resamples_questions": ("dynamic_sampling",),
    "exp_sft_term": ("exp_sft_coef", "exp_sft_schedule", "exp_sft_max_accuracy"),
    "sft_term": ("exp_sft_reduction",),
    "explains": (
        "explanations_per_question",
        "keep_explanations",
        "choose_explanations",
        "shuffle_explanations",
        "explain_temperature",
        "append_answer",
    ),
    "explains_every_step": ("explain_every",),
    "samples_pairs": ("pairs_every", "refresh_reference", "pairs_per_question"),
    "trains_on_pairs": ("preference", "dpo_beta", "label_smoothing", "rdpo_alpha"),
}


def methods_that_read(option: str) -> list[str]:
    """Return the methods that read an option, in the order of `METHODS`."""
    for capability, options in OPTIONS.items():
        if option in options:
            return [name for name, spec in METHODS.items() if getattr(spec, capability)]
    return list(METHODS)
