"""The table of metrics: what each one means, its unit, and how to read it.

`python -m expo_fast.reporting.metric_table > docs/metrics.md` writes the page of the documentation.
A part of a name in capitals stands for any text: `rewards/NAME/mean`, `pass@K`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of metrics, of metrics.jsonl or evaluations.jsonl."""

    name: str
    unit: str
    meaning: str
    reading: str
    trl: str = ""
    """TRL's name of a metric with the same meaning; empty: TRL has none."""


@dataclass(frozen=True)
class Section:
    """Metrics that belong together."""

    title: str
    text: str
    metrics: tuple[Metric, ...]


ATTEMPTS = Section(
    "Attempts",
    "Of the attempts at the plain questions: every method but `sft` and `dpo`. `expo-dpo` and "
    "`expert-dpo` log them on steps whose own weights sampled the pairs.",
    (
        Metric(
            "reward",
            "reward",
            "Mean over the questions of the mean reward of their attempts.",
            "It rises in a working run. With the default reward it is the accuracy on the training "
            "questions, which differ from step to step, so read a trend of many steps.",
            trl="reward",
        ),
        Metric(
            "reward_std",
            "reward",
            "Mean over the questions of the standard deviation of their rewards.",
            "0 means that no question has a right and a wrong attempt, so that GRPO has nothing to "
            "learn from. TRL 1.16 logs the standard deviation over all attempts under this name.",
        ),
        Metric(
            "rewards/NAME/mean",
            "reward",
            "Mean of the values of the reward function NAME, without its weight.",
            "Compare the functions: one that rises while the others fall is exploited.",
            trl="rewards/NAME/mean",
        ),
        Metric(
            "rewards/NAME/std",
            "reward",
            "Standard deviation of the values of the reward function NAME.",
            "0 means that the function gives the same value to all attempts of a step.",
            trl="rewards/NAME/std",
        ),
        Metric(
            "frac_reward_zero_std",
            "fraction",
            "Questions whose attempts all have the same reward.",
            "These questions have no policy gradient. Near 1, use more attempts, easier questions "
            "or a method that explains; near 1 with a reward near 1, use harder questions.",
            trl="frac_reward_zero_std",
        ),
        Metric(
            "frac_all_fail",
            "fraction",
            "Questions whose attempts all fail.",
            "The questions for which ExPO exists. It falls in a working run.",
        ),
        Metric(
            "entropy",
            "nats per token",
            "Mean negative log-prob of the sampled tokens, an unbiased estimate of the entropy.",
            "A fall to 0 means that the attempts become equal. Raise `--entropy-coef`, "
            "`--clip-high` or `--temperature`.",
            trl="entropy",
        ),
        Metric(
            "own/nll",
            "nats per token",
            "NLL of the attempts: the mean over attempts of the mean over their tokens. For pairs, "
            "that of the rejected texts under the trained model.",
            "The level to compare `exp/nll` and `expert/nll` with.",
        ),
        Metric(
            "own/leak_rate",
            "fraction",
            "Attempts that say that an answer was given.",
            "A rise means that the model has learned from explanations that mention the given "
            "answer.",
        ),
        Metric(
            "completions/mean_length",
            "tokens",
            "Mean length of the attempts.",
            "A jump, or a steady rise to the limit, is often a model that no longer ends its text.",
            trl="completions/mean_length",
        ),
        Metric(
            "completions/clipped_ratio",
            "fraction",
            "Attempts that were cut at `max_completion_length`.",
            "Near 1, almost no attempt reaches an answer: raise `--max-completion-length`.",
            trl="completions/clipped_ratio",
        ),
        Metric(
            "completions/error_ratio",
            "fraction",
            "Attempts that ended because the logits were not finite.",
            "It must be 0. Otherwise lower `--learning-rate`, or use `--dtype float32`.",
        ),
        Metric(
            "verdicts/undecided",
            "fraction",
            "Attempts without a verdict of the built-in reward. They have no reward.",
            "Near 0. From 0.1 the run warns: the model writes answers that are too large or too "
            "slow to compute.",
        ),
        Metric(
            "verdicts/REASON",
            "fraction",
            "Attempts with this verdict of the built-in reward: `exact` and `symbolic` are right, "
            "by the exact rules and by math-verify; `wrong`, `no_answer` and `unparsable` are "
            "wrong; `too_large`, `timeout`, `memory`, `crash` and `no_reference` are undecided.",
            "A rise of `no_answer` means that attempts lose their box, often at the length limit.",
        ),
    ),
)
EXPLANATIONS = Section(
    "Explanations",
    "Of the methods that explain: `expo-grpo`, `star` and `expo-dpo`.",
    (
        Metric(
            "exp/rate",
            "fraction",
            "Questions with at least one accepted explanation.",
            "At 0 the run is plain GRPO. Raise `--explanations-per-question` or the length limit.",
        ),
        Metric(
            "exp/accepted",
            "explanations",
            "Number of explanations that are trained on.",
            "At most `keep_explanations` for each question, if that is not 0.",
        ),
        Metric(
            "exp/right_ratio",
            "fraction",
            "Sampled explanations that end with the right answer in a box.",
            "Low values mean that the model cannot follow the request to explain.",
        ),
        Metric(
            "exp/leak_rate",
            "fraction",
            "Right explanations that say that an answer was given.",
            "They are rejected. A high value means that few samples are of use.",
        ),
        Metric(
            "exp/unfit_rate",
            "fraction",
            "Right explanations that were rejected, for any reason.",
            "Read the rejected texts if it is high: the filter may not fit your data.",
        ),
        Metric(
            "exp/mean_length",
            "tokens",
            "Mean length of the accepted explanations.",
            "Much shorter than the attempts: the explanation states the answer only.",
        ),
    ),
)
PROPERTIES = Section(
    "The two properties of a good positive sample",
    "The first property (in-distribution) compares negative log-likelihoods (NLL) under the plain "
    "question, the second one (learning signal) is the lift (arXiv:2507.02834, section 3). They "
    "are measured on `diagnose` questions of every `diagnose_every`-th step; `exp/nll` is of all "
    "texts that are trained on.",
    (
        Metric(
            "exp/nll",
            "nats per token",
            "NLL of the explanations that are trained on. For pairs, of the chosen texts.",
            "Below `expert/nll`, the explanation is closer to what the model says by itself.",
        ),
        Metric(
            "expert/nll",
            "nats per token",
            "NLL of the data's solutions. With `--method sft`, of the texts that are trained on.",
            "With `sft` it falls in a working run, as the loss does.",
        ),
        Metric(
            "exp/nll_over_expert",
            "nats per token",
            "NLL of the explanation minus NLL of the data's solution, on questions with both.",
            "Below 0, the first property holds.",
        ),
        Metric(
            "exp/lift",
            "nats",
            "log-prob of the right answer after the explanation, minus that after own attempts, "
            "with the answer masked in both texts.",
            "Above 0, the second property holds.",
        ),
        Metric(
            "exp/lift_stated",
            "nats",
            "The lift with the answer not masked.",
            "Mostly copying: use `exp/lift`.",
        ),
        Metric(
            "logp_gap/max",
            "nats",
            "Largest absolute difference between the log-probs of the sampler and those of the "
            "trainer, over tokens of the measured attempts.",
            "With bfloat16 a few tenths on single tokens. `--batch-invariant` makes it 0 on a CPU.",
        ),
        Metric(
            "logp_gap/mean",
            "nats",
            "Mean absolute difference of the same log-probs.",
            "About 0.02 with bfloat16. A rise points to a fault of the sampler or of the trainer.",
        ),
    ),
)
PAIRS = Section(
    "Pairs",
    "Of the DPO methods. The implicit reward of a text is beta times its log-ratio to the "
    "reference.",
    (
        Metric(
            "pairs",
            "pairs",
            "Number of pairs of the step.",
            "0: no question had a failed attempt and a chosen text, and the weights do not change.",
        ),
        Metric(
            "pairs/policy_step",
            "steps",
            "Step whose weights sampled the pairs, from 0.",
            "The distance to the step says how old the pairs are.",
        ),
        Metric(
            "pairs/tokens",
            "tokens",
            "Tokens of prompts and completions that were sampled for the pairs.",
            "The cost of the pairs. 0 for `--method dpo`.",
        ),
        Metric(
            "rewards/chosen",
            "nats",
            "Mean implicit reward of the chosen texts.",
            "If it falls together with the rejected one, the model unlearns both: lower "
            "`--learning-rate`, or use `--preference dpop`.",
            trl="rewards/chosen",
        ),
        Metric(
            "rewards/rejected",
            "nats",
            "Mean implicit reward of the rejected texts.",
            "It falls in a working run.",
            trl="rewards/rejected",
        ),
        Metric(
            "rewards/margins",
            "nats",
            "Mean difference of both implicit rewards.",
            "0 at the first step with the initial model as reference. It rises in a working run.",
            trl="rewards/margins",
        ),
        Metric(
            "rewards/accuracies",
            "fraction",
            "Pairs whose chosen text has the higher implicit reward.",
            "It rises above 0.5. At 1 from early on, the pairs are too easy.",
            trl="rewards/accuracies",
        ),
        Metric(
            "logps/chosen",
            "nats",
            "Mean log-prob of the chosen texts, summed over their tokens.",
            "It is lower for longer texts. Compare it with its own earlier values only.",
            trl="logps/chosen",
        ),
        Metric(
            "logps/rejected",
            "nats",
            "Mean log-prob of the rejected texts, summed over their tokens.",
            "As for the chosen ones.",
            trl="logps/rejected",
        ),
    ),
)
UPDATES = Section(
    "Updates",
    "Of every method, where the loss has the term. Means over the updates of a step.",
    (
        Metric(
            "loss",
            "nats",
            "The value of the loss.",
            "With `sft` and DPO it falls. With GRPO it does not measure progress: read the reward.",
            trl="loss",
        ),
        Metric(
            "kl",
            "nats per token",
            "k3 estimate of the KL divergence to the initial model, weighted as in the loss. Only "
            "with `--kl-coef`.",
            "It grows slowly. A jump means that the policy broke.",
            trl="kl",
        ),
        Metric(
            "clip_ratio/low",
            "fraction",
            "Tokens whose ratio is clipped from below.",
            "0 with one update per batch. If it grows step by step, lower `--learning-rate`.",
            trl="clip_ratio/low_mean",
        ),
        Metric(
            "clip_ratio/high",
            "fraction",
            "Tokens whose ratio is clipped from above.",
            "As for the lower side.",
            trl="clip_ratio/high_mean",
        ),
        Metric(
            "exp_sft_coef",
            "1",
            "Coefficient of the SFT term at this step.",
            "It follows `--exp-sft-schedule`.",
        ),
        Metric(
            "grad_norm",
            "1",
            "L2 norm of the gradient before it is clipped.",
            "Compare with `--max-grad-norm`. Peaks that grow come before a run diverges.",
            trl="grad_norm",
        ),
        Metric(
            "grad_norm/policy",
            "1",
            "L2 norm of the gradient of the policy term.",
            "0 on a step without unequal rewards.",
        ),
        Metric(
            "grad_norm/exp_sft",
            "1",
            "L2 norm of the gradient of the SFT term.",
            "Far above the policy's norm, the SFT term decides the update: lower `--exp-sft-coef`.",
        ),
        Metric(
            "update_norm",
            "1",
            "L2 norm of the change of the weights.",
            "It follows the learning rate. 0: the step changed nothing.",
        ),
        Metric(
            "learning_rate",
            "1",
            "Learning rate of the last update.",
            "It follows `--schedule` and `--warmup-steps`.",
            trl="learning_rate",
        ),
        Metric(
            "skipped_steps",
            "updates",
            "Updates so far that were skipped because the gradient was not finite.",
            "It must stay 0. The texts of such steps are in RUN/skipped.",
        ),
    ),
)
COST = Section(
    "Cost",
    "Of every method.",
    (
        Metric(
            "num_tokens",
            "tokens",
            "Tokens so far: prompts and completions that were sampled, and texts of the data.",
            "The axis on which to compare methods of different cost.",
            trl="num_tokens",
        ),
        Metric(
            "time/PHASE",
            "seconds",
            "Host time of a phase of the step: `generate`, `reward`, `explain`, `diagnose`, "
            "`reference`, `forward_backward`, `optimizer`.",
            "The work of a GPU counts in the phase that waits for it. The report has their shares.",
        ),
        Metric(
            "idle",
            "fraction",
            "With `torchrun`: mean over the ranks of `rank/RANK/idle`.",
            "Lower it with more questions per step, or with lengths that differ less.",
        ),
        Metric(
            "rank/RANK/idle",
            "fraction",
            "The part of the step in which this rank waited for others to finish sampling, judging "
            "or scoring. Waiting inside a backward pass is not counted.",
            "A rank that is always near 0 while others are not is slower than they are.",
        ),
        Metric(
            "rank/RANK/busy",
            "seconds",
            "The rest of the rank's step.",
            "The largest one is the time of a step that no deal of the work can avoid.",
        ),
        Metric(
            "rank/RANK/memory",
            "GB",
            "Peak memory of the rank so far: of its GPU, or of the process on a CPU.",
            "Compare it with the estimate of `--dry-run`.",
        ),
    ),
)
ALARMS = Section(
    "Alarms",
    "Of every method. Their reasons are in the log of the run. "
    "[Reliability](reliability.md#alarms) lists them.",
    (
        Metric(
            "alarms",
            "alarms",
            "Number of alarms at this step.",
            "It must stay 0. `--stop-on-collapse` ends a run at an alarm that lasts.",
        ),
        Metric(
            "alarm/NAME",
            "1",
            "1 on the steps of the alarm NAME.",
            "Other steps do not have it.",
        ),
        Metric(
            "inexact",
            "changes",
            "Number of changes at the resumes so far, of a run with `--inexact-resume`.",
            "Other runs do not have it. The reasons are in `config.toml` and in the report.",
        ),
    ),
)
STEP_SECTIONS = (ATTEMPTS, EXPLANATIONS, PROPERTIES, PAIRS, UPDATES, COST, ALARMS)
EVALUATIONS = Section(
    "Evaluations",
    "Of the held-out problems, in evaluations.jsonl and in the result of `expo_fast.evaluate`. "
    "Trackers have them with `eval/` before the name. `levels` holds the accuracies of each level, "
    "and `template` and `grader` are hashes: results with different ones are not comparable.",
    (
        Metric(
            "problems",
            "problems",
            "Number of problems.",
            "With 64 problems, the interval of an accuracy of 0.5 is about 0.24 wide.",
        ),
        Metric("samples", "samples", "Number of samples of each problem.", "The largest K."),
        Metric(
            "pass@K",
            "fraction",
            "Probability that at least one of K samples is right (arXiv:2107.03374, eq. 1).",
            "pass@1 is the mean accuracy. `pass@K/interval` is its 95% bootstrap interval over "
            "problems: a difference inside it may be chance.",
        ),
        Metric(
            "majority",
            "fraction",
            "Problems whose most common answer is right, with `majority/interval`.",
            "Above pass@1 if the right answer is more common than any single wrong answer.",
        ),
        Metric(
            "maj@K",
            "fraction",
            "The same for votes of K samples: with `--k K`, the mean over disjoint groups.",
            "How the vote gains from more samples. `majority` is that of all samples.",
        ),
        Metric(
            "all_fail",
            "fraction",
            "Problems without a right sample.",
            "1 minus pass@K for the largest K.",
        ),
        Metric(
            "undecided",
            "samples",
            "Samples that the grader could not judge. They count as wrong.",
            "More than a few: the answers of your data may not be what the grader reads.",
        ),
        Metric(
            "verdicts",
            "samples",
            "Number of samples with each reason of a verdict, those of `verdicts/REASON` above.",
            "Many `no_answer`: the samples have no box. Many `unparsable`: read their answers.",
        ),
        Metric(
            "boxed_ratio",
            "fraction",
            "Samples with an answer in a box.",
            "If it rises with the accuracy, a part of the gain is the format.",
        ),
        Metric(
            "leak_rate",
            "fraction",
            "Samples that say that an answer was given.",
            "It must stay near 0.",
        ),
        Metric("mean_length", "tokens", "Mean length of the samples.", "As in training."),
        Metric(
            "clipped_ratio",
            "fraction",
            "Samples that were cut at `max_completion_length`.",
            "Near 1, the accuracy measures the limit: raise `--max-completion-length`.",
        ),
        Metric("tokens", "tokens", "Number of sampled tokens.", "Divide by `seconds` for a speed."),
        Metric("seconds", "seconds", "Time of sampling and grading.", "It is not training time."),
    ),
)
SECTIONS = (*STEP_SECTIONS, EVALUATIONS)

HEADER = """# Metrics

<!-- Generated: python -m expo_fast.reporting.metric_table > docs/metrics.md -->

A run appends one JSON object per step to `RUN/metrics.jsonl`, and one per evaluation to
`RUN/evaluations.jsonl`. `step` is the number of the step, from 1. A value that was not measured or
is not finite is null. `--report-to` sends the numbers to TensorBoard (the default), to Weights &
Biases (`wandb`) or to Trackio (`trackio`), or to none of them.

In `wandb` and `trackio`, numbers have the names of this page. Those with an entry under *TRL* are
also recorded under the name that a run of TRL has there, with `train/` before it, so that panels
made for TRL show these runs. A table `completions` has the texts of each step. The tests use
modules that record the calls. wandb 0.31.0 (offline) and trackio 0.43.0 (local) were tried by hand.

Names in capitals stand for any text: `rewards/NAME/mean` is `rewards/accuracy_reward/mean` for that
function. Reward functions may add metrics of their own with `log_metric`.
"""


# Beginnings of names that only metrics of the trainer have.
FAMILIES = ("alarm/", "exp/", "expert/", "own/", "pairs/", "rank/", "time/", "verdicts/")


def page() -> str:
    """Return docs/metrics.md."""
    return HEADER + "".join(map(_section, SECTIONS))


def _section(section: Section) -> str:
    lines = [f"\n## {section.title}\n", section.text, ""]
    lines += ["| metric | unit | meaning | how to read it | TRL |", "|---|---|---|---|---|"]
    for metric in section.metrics:
        alias = f"`train/{metric.trl}`" if metric.trl else ""
        cells = (f"`{metric.name}`", metric.unit, metric.meaning, metric.reading, alias)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def find_metric(name: str, sections: Sequence[Section] = STEP_SECTIONS) -> Metric | None:
    """Return the metric of this name, or None if the table has none."""
    metrics = [metric for section in sections for metric in section.metrics]
    for metric in metrics:
        if metric.name == name:
            return metric
    for metric in metrics:
        if _pattern(metric.name).fullmatch(name):
            return metric
    return None


def is_taken(name: str) -> bool:
    """Return whether a metric of a reward function would have the name of one of the trainer's."""
    return name == "step" or name.startswith(FAMILIES) or find_metric(name) is not None


def trl_names(name: str) -> list[str]:
    """Return the names under which TRL logs the metric of this name: one, or none."""
    metric = find_metric(name)
    if metric is None or not metric.trl:
        return []
    found = _pattern(metric.name).fullmatch(name)
    alias = metric.trl
    if found is not None and found.groups():
        alias = re.sub("[A-Z]{2,}", lambda _: found.group(1), alias)
    return [alias]


def _pattern(name: str) -> re.Pattern[str]:
    """Return the pattern of a family: its part in capitals matches any text."""
    parts = re.split("[A-Z]{2,}|(?<=@)K", name)
    return re.compile("(.+)".join(map(re.escape, parts)))


if __name__ == "__main__":
    print(page(), end="")
