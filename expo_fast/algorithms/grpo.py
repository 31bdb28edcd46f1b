"""GRPO, and GRPO with an SFT term on explanations (ExP-GRPO, arXiv:2507.02834, section 4.2).

    loss = -1/N sum_i 1/T_i sum_t min(r_it A_i, clip(r_it) A_i)
           - exp_sft_coef / P sum_q 1/K_q sum_k mean_t log pi(c_qk,t | q)

N = P G attempts at the P plain questions have the advantages A_i = (R_i - mean R) / std R over the
G attempts of a question. r_it = pi / pi_old is the ratio of a token. c_qk are the K_q accepted
explanations of question q: they have no advantage, ratio, clip or KL.

`--method expert-grpo` uses the data's solutions in place of explanations. `grpo` has no SFT term,
and `star` has only the SFT term. All normalisers are part of the row weights, which are fixed
before the first backward pass, so the packing of the samples does not change the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from expo_fast.algorithms.diagnostics import (
    DiagnosedQuestion,
    diagnostic_metrics,
    diagnostic_samples,
)
from expo_fast.algorithms.explanations import (
    Positives,
    keep_best,
    questions_to_sample,
    ranking_samples,
    sample_explanations,
    select_explanations,
)
from expo_fast.algorithms.logprobs import (
    ForwardOptions,
    completion_logprobs,
    logprobs_of_all_ranks,
    reference_logprobs,
)
from expo_fast.algorithms.metrics import Metrics, mean
from expo_fast.algorithms.rollout import (
    Group,
    attempt_metrics,
    completion_rows,
    overlong_punishment,
    reward_function_metrics,
)
from expo_fast.algorithms.sft import sft_backward, sft_samples
from expo_fast.algorithms.trainer import (
    StepResult,
    Trainer,
    batch_of_step,
    optimizer_step,
    sample_and_judge,
)
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import request_seed
from expo_fast.kernels.objectives import PolicyObjective
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.packing import Sample
from expo_fast.objectives import POLICY_OBJECTIVES
from expo_fast.ops import group_advantage, linear_policy_loss
from expo_fast.reporting.timing import Phases


def run_step(trainer: Trainer, step: int, phases: Phases) -> StepResult:
    """Run one step: sample, judge, explain, and update the weights `updates_per_batch` times."""
    config = trainer.config

    # Sample G attempts at each question, judge them, and compute advantages within each group.
    sampled = sample_groups(trainer, step, phases)
    sampled = with_advantages(sampled, config)
    groups = groups_to_learn_from(sampled, config)

    # Sample explanations of the known answers, or take the data's solutions.
    with phases.phase("explain"):
        questions = questions_with_sft_term(groups, config)
        if config.samples_explanations:
            positives = explain(trainer, questions, step)
        else:
            positives = solutions(trainer, questions)
    with phases.phase("diagnose"):
        diagnosed = diagnose(trainer, groups, positives, step)

    # Each update trains on its own mini-batch of the questions.
    mini_batches = split_evenly(groups, config.updates_per_batch)
    with phases.phase("forward_backward"):
        attempts = attempts_of_updates(trainer, mini_batches)
    updates = []
    for i, mini_batch in enumerate(mini_batches):
        update = step * config.updates_per_batch + i
        metrics = update_weights(trainer, mini_batch, attempts[i], positives, update, phases)
        updates.append(metrics)

    metrics = attempt_metrics(sampled) | positives.counts.metrics()
    metrics |= diagnosed | mean_metrics(updates) | reward_function_metrics(sampled)
    kind = "expert" if config.spec.sft_source == "solutions" else "explanation"
    return metrics, completion_rows(groups, positives.texts, trainer.prompter, kind)


def sample_groups(trainer: Trainer, step: int, phases: Phases) -> list[Group]:
    """Sample and judge the groups of a step.

    Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2) samples up to `dynamic_sampling` further
    batches, until `prompts_per_step` groups have unequal rewards.
    """
    config = trainer.config
    size = config.prompts_per_step
    questions = batch_of_step(trainer, step, config.seed)
    groups = sample_and_judge(trainer, questions, step, phases)
    for refill in range(config.dynamic_sampling):
        if sum(group.has_unequal_rewards for group in groups) >= size:
            break
        sampled = {group.problem.id for group in groups}
        seed = request_seed(config.seed, "refill", refill)
        more = batch_of_step(trainer, step, seed)
        new = [question for question in more if question.id not in sampled]
        if new:
            groups += sample_and_judge(trainer, new, step, phases)
    return groups


def with_advantages(groups: Sequence[Group], config: Train) -> list[Group]:
    """Return the groups with the advantage of each attempt within its group."""
    rewards = []
    for group in groups:
        for completion, reward in zip(group.completions, group.rewards, strict=True):
            if reward is None:
                rewards.append(math.nan)
            else:
                rewards.append(reward - overlong_punishment(completion, config))
    group_ids = torch.arange(len(groups)).repeat_interleave(config.group_size)
    advantages = group_advantage(
        torch.tensor(rewards), group_ids, scale=config.advantage_scale
    ).tolist()
    size = config.group_size
    return [
        replace(group, advantages=advantages[i * size : (i + 1) * size])
        for i, group in enumerate(groups)
    ]


def groups_to_learn_from(groups: Sequence[Group], config: Train) -> list[Group]:
    """Return the groups to train on, at most `prompts_per_step`.

    Dynamic sampling keeps only groups with unequal rewards, if there are any.
    """
    chosen = list(groups)
    if config.dynamic_sampling:
        chosen = [group for group in groups if group.has_unequal_rewards] or chosen
    return chosen[: config.prompts_per_step]


def questions_with_sft_term(groups: Sequence[Group], config: Train) -> list[Problem]:
    """Return the questions whose accuracy is at most `exp_sft_max_accuracy`.

    A limit of 1 keeps all questions, also those without a judged attempt.
    """
    limit = config.exp_sft_max_accuracy
    questions = []
    for group in groups:
        accuracy = group.accuracy
        if limit == 1 or (accuracy is not None and accuracy <= limit):
            questions.append(group.problem)
    return questions


def explain(trainer: Trainer, questions: Sequence[Problem], step: int) -> Positives:
    """Sample explanations of the questions' answers and keep the best that are accepted."""
    config = trainer.config
    prompter = trainer.prompter
    cache = trainer.explanations
    new = questions_to_sample(questions, cache, config, step)
    own = trainer.deal_questions(new).own(new)
    with trainer.world.agreed():
        accepted = sample_explanations(
            own, trainer.generator, prompter, trainer.verify, config, step
        )
        samples = ranking_samples(accepted.texts, own, prompter, config.choose_explanations)
        logprobs = completion_logprobs(trainer.model, samples, ForwardOptions.of(config))
        best = keep_best(accepted, logprobs, config)
        if config.n_diagnosed(step):
            best.known.add(samples, logprobs)
    positives = select_explanations(trainer.world, best, questions, cache, config, step)
    trainer.sampled_tokens += positives.counts.n_tokens
    return positives


def solutions(trainer: Trainer, questions: Sequence[Problem]) -> Positives:
    """Return the data's solutions, if the method trains on them."""
    config = trainer.config
    if config.spec.sft_source != "solutions" or config.exp_sft_coef == 0:
        return Positives()
    return Positives({question.id: [trainer.prompter.expert(question)] for question in questions})


def diagnose(trainer: Trainer, groups: Sequence[Group], positives: Positives, step: int) -> Metrics:
    """Measure the two properties of a good positive sample on a few questions."""
    config = trainer.config
    questions = []
    for group in groups[: config.n_diagnosed(step)]:
        explanation = None
        if config.samples_explanations and group.problem.id in positives.texts:
            explanation = positives.texts[group.problem.id][0]
        questions.append(DiagnosedQuestion(group.problem, group.judged, explanation))
    samples = diagnostic_samples(questions, trainer.prompter)
    scored = [each.sample for each in samples]
    known = positives.known
    missing = known.missing(scored)
    options = ForwardOptions.of(config)
    known.add(missing, logprobs_of_all_ranks(trainer.world, trainer.model, missing, options))
    return diagnostic_metrics(questions, samples, known.of(scored))


def attempts_of_updates(
    trainer: Trainer, mini_batches: Sequence[Sequence[Group]]
) -> list[list[Sample]]:
    """Return the samples of the policy term of each update that this rank computes.

    Updates after the first need log-probs under the policy that sampled. They are recomputed in the
    packs of the update: in bf16 the generator's log-probs differ by more than GSPO's clip range.
    """
    config = trainer.config
    if not config.spec.policy_term:
        return [[] for _ in mini_batches]
    first, *later = [
        trainer.own_samples(policy_samples(mini_batch, config)) for mini_batch in mini_batches
    ]
    attempts = [first]
    for samples in later:
        old = completion_logprobs(trainer.model, samples, ForwardOptions.of(config))
        attempts.append(
            [replace(sample, old_logp=logp) for sample, logp in zip(samples, old, strict=True)]
        )
    return attempts


def policy_samples(groups: Sequence[Group], config: Train) -> list[Sample]:
    """Return the attempts with the normaliser of `config.loss` as the weight of each token.

    grpo: 1/(N T_i); dapo: 1/T; dr-grpo: 1/(N L_max). N and T count the attempts with a reward and
    their tokens. An attempt that cannot have a gradient is not returned, but N and T include it.
    """
    # The tokens are those that were sampled, up to the one that completes a stop string. The text
    # that was judged is a function of them (`Prompter.text`), and the stop string is how the policy
    # ended it, as an end token is. A cut would be wrong here: of a re-encoded part of a token the
    # sampler has no log-prob, and a ratio to a policy that did not choose it means nothing. Where
    # an attempt is trained on as a given text, as in DPO, `Prompter.ended` cuts it.
    judged = []
    for group in groups:
        for completion, reward, advantage in zip(
            group.completions, group.rewards, group.advantages, strict=True
        ):
            if reward is not None:
                judged.append((group.prompt_ids, completion, advantage))
    n_attempts = len(judged)
    n_tokens = sum(len(completion.token_ids) for _, completion, _ in judged)
    always_has_gradient = bool(config.kl_coef or config.entropy_coef)
    samples = []
    for prompt_ids, completion, advantage in judged:
        if advantage == 0 and not always_has_gradient:
            continue
        normaliser = {
            "grpo": n_attempts * len(completion.token_ids),
            "dapo": n_tokens,
            "dr-grpo": n_attempts * config.max_new_tokens,
        }[config.loss]
        sample = Sample(
            prompt_ids=prompt_ids,
            completion_ids=tuple(completion.token_ids),
            advantage=advantage,
            row_weight=1 / normaliser,
        )
        samples.append(sample)
    return samples


def update_weights(
    trainer: Trainer,
    groups: Sequence[Group],
    attempts: Sequence[Sample],
    positives: Positives,
    update: int,
    phases: Phases,
) -> Metrics:
    """Run forward and backward passes on a mini-batch, then one optimizer step.

    update: number of the update in the run, from 0.
    """
    config = trainer.config
    layout = trainer.layout
    grad_sums = trainer.optimizer.grad_sums  # each loss.backward() adds its gradients to them
    coef = exp_sft_coef(config, update // config.updates_per_batch)
    with phases.phase("forward_backward"):
        attempts = with_reference_logprobs(trainer, attempts)
        policy = policy_backward(layout, attempts, PolicyLossConfig.of(config))
        grad_sums.start_new_term()

        questions = [g.problem for g in groups if g.problem.id in positives.texts]
        positive_samples = sft_samples(
            [(question, positives.texts[question.id]) for question in questions],
            trainer.prompter,
            coef=coef,
            n_questions=len(groups),
            reduction=config.exp_sft_reduction,
        )
        sft = sft_backward(layout, trainer.own_samples(positive_samples), ForwardOptions.of(config))
        policy_norm, sft_norm = grad_sums.term_norms()
    metrics: Metrics = {
        "loss": policy.loss + sft.loss,
        "kl": policy.kl if config.kl_coef else None,
        "clip_ratio/low": policy.clip_low,
        "clip_ratio/high": policy.clip_high,
        "grad_norm/policy": policy_norm,
        "grad_norm/exp_sft": sft_norm,
        "exp_sft_coef": coef if config.spec.sft_term else None,
        "exp/nll": sft.nll if positive_samples and config.samples_explanations else None,
    }
    return metrics | optimizer_step(trainer, update, phases)


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of the policy loss."""

    objective: PolicyObjective
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    forward: ForwardOptions = field(default_factory=ForwardOptions)

    @classmethod
    def of(cls, config: Train) -> "PolicyLossConfig":
        return cls(
            objective=POLICY_OBJECTIVES[config.objective].build(config),
            kl_coef=config.kl_coef,
            entropy_coef=config.entropy_coef,
            forward=ForwardOptions.of(config),
        )


@dataclass(frozen=True)
class PolicyResult:
    """The policy loss, its mean KL in nats, and the fractions of rows clipped below and above."""

    loss: float = 0.0
    kl: float = 0.0
    clip_low: float = 0.0
    clip_high: float = 0.0


def policy_backward(
    layout: Layout, samples: Sequence[Sample], config: PolicyLossConfig
) -> PolicyResult:
    """Add the gradients of the policy loss of the samples, pack by pack.

    samples: those of this rank. The result is that of all ranks.
    """
    model = layout.model
    world = layout.world
    total_weight, n_rows = world.sums(
        sum(sample.row_weight * len(sample.completion_ids) for sample in samples),
        sum(len(sample.completion_ids) for sample in samples),
    )
    sums = []
    for pack, hidden in layout.passes(samples, config.forward.max_tokens):
        result = linear_policy_loss(
            hidden,
            model.head_weight,
            pack.targets,
            pack.advantage,
            pack.row_weight,
            objective=config.objective,
            old_logp=pack.old_logp,
            ref_logp=pack.ref_logp,
            on_policy=pack.on_policy,
            kl_coef=config.kl_coef if pack.ref_logp is not None else 0.0,
            entropy_coef=config.entropy_coef,
            temperature=config.forward.temperature,
            sequence_ids=pack.sequence_ids,
            complete=pack.is_complete(len(model.head_weight)),
        )
        result.loss.backward()
        fraction = len(pack.rows) / n_rows
        kl = result.kl * pack.row_weight.sum() / total_weight
        sums.append(
            torch.stack(
                [result.loss.detach(), kl, result.clip_low * fraction, result.clip_high * fraction]
            )
        )
    own = [0.0, 0.0, 0.0, 0.0]
    if sums:
        # Copy to the CPU once, after the work of all packs is queued.
        own = torch.stack(sums).double().sum(0).tolist()
    return PolicyResult(*world.sums(*own))


def with_reference_logprobs(trainer: Trainer, samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with their log-probs under the initial policy, if there is a KL term."""
    config = trainer.config
    if not config.kl_coef:
        return list(samples)
    logprobs = reference_logprobs(
        trainer.model, trainer.reference, samples, ForwardOptions.of(config)
    )
    return [replace(sample, ref_logp=logp) for sample, logp in zip(samples, logprobs, strict=True)]


def exp_sft_coef(config: Train, step: int) -> float:
    """Return the coefficient of the SFT term at step `step` (from 0)."""
    progress = min(1.0, step / config.steps)
    remaining = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return config.exp_sft_coef * remaining[config.exp_sft_schedule]


def split_evenly(groups: Sequence[Group], n: int) -> list[list[Group]]:
    """Split into n mini-batches whose sizes differ by at most one. Empty ones are left out."""
    mini_batches = []
    for i in range(n):
        mini_batch = groups[i * len(groups) // n : (i + 1) * len(groups) // n]
        if mini_batch:
            mini_batches.append(list(mini_batch))
    return mini_batches


def mean_metrics(updates: Sequence[Metrics]) -> Metrics:
    """Return the mean of each metric over the updates of a step. None values are left out."""
    means: Metrics = {}
    for name in updates[0]:
        values = [update[name] for update in updates]
        means[name] = mean([value for value in values if value is not None])
    return means
