"""DPO with self-explanations (ExP-DPO, arXiv:2507.02834, section 4.1), solutions, or data's pairs.

    loss = -1/n sum log sigmoid(beta [log pi(w|q) / pi_ref(w|q) - log pi(l|q) / pi_ref(l|q)])

The sum is over the n pairs of a step. The chosen text w is an explanation sampled with the answer
shown, the data's solution, or the data's chosen text. The rejected text l is an attempt that is
known to be wrong, or the data's rejected text. The log-probs of both are under the plain question.
Right attempts are never rejected.

Offline, all pairs are sampled before the first step by the initial policy, which is the reference.
Online, a round of pairs is sampled every `pairs_every` steps by the current policy. The reference
is the initial policy or, with `refresh_reference`, the policy that sampled the round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo_fast.algorithms.diagnostics import (
    DiagnosedQuestion,
    diagnostic_metrics,
    diagnostic_samples,
)
from expo_fast.algorithms.explanations import (
    ExplanationCache,
    Positives,
    keep_best,
    ranking_samples,
    sample_explanations,
    select_explanations,
)
from expo_fast.algorithms.logprobs import (
    ForwardOptions,
    completion_logprobs,
    deal_samples,
    logprobs_of_all_ranks,
    reference_logprobs,
    sequence_logprobs,
)
from expo_fast.algorithms.metrics import Metrics, mean
from expo_fast.algorithms.pairs import Pair, PairStore, pair_up
from expo_fast.algorithms.rollout import (
    Group,
    attempt_metrics,
    completion_row,
    reward_function_metrics,
)
from expo_fast.algorithms.trainer import (
    StepResult,
    Trainer,
    batch_of_step,
    optimizer_step,
    sample_and_judge,
)
from expo_fast.config import Train
from expo_fast.data.problem_table import ProblemTable
from expo_fast.data.problems import Problem, fingerprint, same_fingerprint
from expo_fast.data.prompts import Prompter
from expo_fast.distributed.world import World
from expo_fast.generate import Completion
from expo_fast.kernels.preferences import PreferenceObjective
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.packing import Sample
from expo_fast.objectives import PREFERENCE_OBJECTIVES
from expo_fast.ops import linear_preference_loss
from expo_fast.reporting.timing import Phases
from expo_fast.reward import grader_hash
from expo_fast.runtime.endings import Collapsed


def run_step(trainer: Trainer, step: int, phases: Phases) -> StepResult:
    """Run one step: make a round of pairs, if one begins here, and update the weights once."""
    config = trainer.config
    store = trainer.pair_store
    assert store is not None, "call open_pair_store before the first step"
    source = make_round(trainer, store, step, phases)
    metrics, pairs = read_pairs(trainer, store, source)
    if config.spec.chosen_source == "data":
        for pair in pairs:
            trainer.data_tokens += len(pair.prompt_ids)
            trainer.data_tokens += len(pair.chosen_ids) + len(pair.rejected_ids)
    by_id = ProblemTable.of(trainer.problems).by_id([pair.problem_id for pair in pairs])
    with phases.phase("diagnose"):
        trained = diagnose(trainer, pairs, by_id, step)
    with phases.phase("forward_backward"):
        own = pairs_of_rank(trainer, pairs)
        result = preference_backward(trainer.layout, own, PreferenceLossConfig.of(config))
    trained |= pair_metrics(result)
    trained |= nll_metrics(result, config)
    trained |= optimizer_step(trainer, step, phases)
    metrics |= trained
    rows = []
    for pair in pairs:
        problem = by_id[pair.problem_id]
        for kind, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            rows.append(completion_row(problem, kind, trainer.prompter.text(ids)))
    return metrics, rows


def make_round(trainer: Trainer, store: PairStore, step: int, phases: Phases) -> int:
    """Make the missing pairs of the round that step `step` belongs to.

    Return the step whose pairs are trained on. It is `step`, except in an offline run that was
    extended beyond the steps with pairs: that run uses its pairs again. Raise Collapsed if no
    question of an offline run gave a pair.
    """
    config = trainer.config
    every = config.pairs_every
    world = trainer.world
    if not every and step:
        return step % world.broadcast(store.count())
    first = step - step % every if every else 0
    # A round is complete even if the run ends in it, so that an extended run has the same pairs.
    last = first + (every or config.steps)
    for each in range(step, last):
        if not world.broadcast(store.has(each)):
            make_pairs(trainer, store, each, policy_step=step, phases=phases)
        elif step == first:
            # An earlier process of this run made these pairs.
            earlier, _ = read_pairs(trainer, store, each)
            trainer.sampled_tokens += earlier["pairs/tokens"]
    if not every:
        check_pairs_of_steps(trainer, store, last)
    return step


def check_pairs_of_steps(trainer: Trainer, store: PairStore, n_steps: int) -> None:
    """Raise Collapsed if no step of an offline run has a pair."""
    for step in range(n_steps):
        _, pairs = read_pairs(trainer, store, step)
        if pairs:
            return
    with trainer.world.agreed():
        if trainer.world.is_main:
            raise Collapsed(no_pair(trainer.config))


def no_pair(config: Train) -> str:
    """Return why an offline run whose questions gave no pair cannot train."""
    chosen = "an accepted explanation" if config.samples_explanations else "a solution"
    more = "--num-generations"
    if config.samples_explanations:
        more += " or --explanations-per-question"
    return (
        f"--method {config.method} made no pair for the questions of its {config.steps} steps: a "
        f"question needs a wrong attempt and {chosen}; increase {more}, or change the questions"
    )


def read_pairs(trainer: Trainer, store: PairStore, step: int) -> tuple[dict[str, Any], list[Pair]]:
    """Return the metrics and pairs of a step, as rank 0 reads them."""
    found: tuple[dict[str, Any], list[Pair]] = ({}, [])
    with trainer.world.agreed():
        if trainer.world.is_main:
            found = store.read(step)
    return trainer.world.broadcast(found)


def pairs_of_rank(trainer: Trainer, pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that this rank computes. Pairs of one question have the same rank."""
    by_question: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_question.setdefault(pair.problem_id, []).append(pair)
    costs = []
    for members in by_question.values():
        costs.append(sum(len(each.chosen_ids) + len(each.rejected_ids) for each in members))
    units = trainer.world.deal(costs).own(list(by_question.values()))
    return [pair for unit in units for pair in unit]


def make_pairs(
    trainer: Trainer, store: PairStore, step: int, *, policy_step: int, phases: Phases
) -> None:
    """Sample or read the pairs of one step, add the reference's log-probs, and store them.

    policy_step: step whose weights sample the pairs.
    """
    config = trainer.config
    prompter = trainer.prompter
    questions = batch_of_step(trainer, step, config.seed)
    tokens_before = trainer.sampled_tokens
    metrics: dict[str, Any] = {"pairs/policy_step": policy_step}
    if config.spec.chosen_source == "data":
        pairs = [pair_of_data(trainer, question) for question in questions]
    else:
        groups = sample_and_judge(trainer, questions, step, phases)
        # Find a chosen text for each question with a failed attempt.
        with phases.phase("explain"):
            failed = [group.problem for group in groups if group.failed]
            if config.samples_explanations:
                chosen = explain(trainer, failed, step)
            else:
                chosen = Positives({q.id: [prompter.expert(q)] for q in failed})
        pairs = pairs_of_groups(trainer, groups, chosen)
        if config.samples_explanations:
            metrics |= chosen.counts.metrics()
        if policy_step == step:
            # Attempts sampled by the weights of an earlier step do not measure this step's weights.
            metrics |= attempt_metrics(groups)
            metrics |= reward_function_metrics(groups)
    metrics["pairs/tokens"] = trainer.sampled_tokens - tokens_before
    with phases.phase("reference"):
        pairs = with_reference_logprobs(trainer, pairs, policy_step)
    by_id = {problem.id: problem for problem in questions}
    texts = [pair_texts(trainer.prompter, by_id[pair.problem_id], pair) for pair in pairs]
    with trainer.world.agreed():
        if trainer.world.is_main:
            store.write(step, metrics, pairs, texts)


def explain(trainer: Trainer, questions: Sequence[Problem], step: int) -> Positives:
    """Sample explanations of the questions' answers and keep the best that are accepted."""
    config = trainer.config
    prompter = trainer.prompter
    # The cache starts empty, because a resumed round could not restore its earlier explanations.
    cache = ExplanationCache()
    own = trainer.deal_questions(questions).own(questions)
    with trainer.world.agreed():
        accepted = sample_explanations(
            own, trainer.generator, prompter, trainer.verify, config, step
        )
        samples = ranking_samples(accepted.texts, own, prompter, config.choose_explanations)
        logprobs = completion_logprobs(trainer.model, samples, ForwardOptions.of(config))
        best = keep_best(accepted, logprobs, config)
    positives = select_explanations(trainer.world, best, questions, cache, config, step)
    trainer.sampled_tokens += positives.counts.n_tokens
    return positives


def pair_of_data(trainer: Trainer, problem: Problem) -> Pair:
    """Return the tokenised pair of a problem whose data row has one."""
    assert problem.pair is not None
    chosen, rejected = problem.pair
    prompter = trainer.prompter
    return Pair(
        problem_id=problem.id,
        prompt_ids=prompter.solve(problem),
        chosen_ids=prompter.completion(problem, chosen),
        rejected_ids=prompter.completion(problem, rejected),
    )


def pairs_of_groups(trainer: Trainer, groups: Sequence[Group], chosen: Positives) -> list[Pair]:
    """Return up to `pairs_per_question` pairs of each group: a chosen text and a failed attempt."""
    prompter = trainer.prompter
    pairs = []
    for group in groups:
        pairs += pair_up(
            group.problem,
            prompter,
            chosen.texts.get(group.problem.id, []),
            [prompter.ended(done.token_ids, done.finish_reason) for done in group.failed],
            trainer.config.pairs_per_question,
        )
    return pairs


def pair_texts(prompter: Prompter, problem: Problem, pair: Pair) -> dict[str, Any]:
    """Return a pair as text, in the format of data rows of `--method dpo`."""
    return {
        "prompt": problem.prompt,
        "answer": problem.answer,
        "chosen": prompter.text(pair.chosen_ids).strip(),
        "rejected": prompter.text(pair.rejected_ids).strip(),
    }


def with_reference_logprobs(
    trainer: Trainer, pairs: Sequence[Pair], policy_step: int
) -> list[Pair]:
    """Return the pairs with the reference's log-probs.

    The trained model itself is the reference at step 0 and with `refresh_reference`.
    """
    config = trainer.config
    if not PREFERENCE_OBJECTIVES[config.preference].needs_reference or not pairs:
        return list(pairs)
    every_sample = pair_samples(pairs)
    deal = deal_samples(trainer.world, every_sample)
    samples = deal.own(every_sample)
    with trainer.world.agreed():
        if policy_step == 0 or config.refresh_reference:
            logprobs = completion_logprobs(trainer.model, samples, ForwardOptions.of(config))
        else:
            logprobs = reference_logprobs(
                trainer.model, trainer.reference, samples, ForwardOptions.of(config)
            )
    sums = sequence_logprobs(deal.collect(logprobs)).view(-1, 2).tolist()
    return [
        replace(pair, ref_logp=(chosen, rejected))
        for pair, (chosen, rejected) in zip(pairs, sums, strict=True)
    ]


def diagnose(
    trainer: Trainer, pairs: Sequence[Pair], by_id: dict[str, Problem], step: int
) -> Metrics:
    """Measure the two properties of a good positive sample on a few questions."""
    config = trainer.config
    questions = diagnosed_questions(pairs, by_id, config)[: config.n_diagnosed(step)]
    samples = diagnostic_samples(questions, trainer.prompter)
    logprobs = logprobs_of_all_ranks(
        trainer.world,
        trainer.model,
        [each.sample for each in samples],
        ForwardOptions.of(config),
    )
    return diagnostic_metrics(questions, samples, logprobs)


def diagnosed_questions(
    pairs: Sequence[Pair], by_id: dict[str, Problem], config: Train
) -> list[DiagnosedQuestion]:
    """Return each question with its rejected attempts and, if it has one, its explanation."""
    if config.spec.chosen_source == "data":
        return []
    by_question: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_question.setdefault(pair.problem_id, []).append(pair)
    no_logprobs = torch.empty(0)
    questions = []
    for problem_id, group in by_question.items():
        attempts = [Completion(list(pair.rejected_ids), no_logprobs, "stop") for pair in group]
        explanation = group[0].chosen_ids if config.samples_explanations else None
        questions.append(DiagnosedQuestion(by_id[problem_id], attempts, explanation))
    return questions


@dataclass(frozen=True)
class PreferenceLossConfig:
    """Options of the preference loss."""

    objective: PreferenceObjective
    beta: float
    """Implicit rewards are beta times log-ratios."""
    averages_tokens: bool = False
    """Whether implicit rewards use the mean log-ratio per token, and not the sum."""
    forward: ForwardOptions = field(default_factory=ForwardOptions)

    @classmethod
    def of(cls, config: Train) -> "PreferenceLossConfig":
        entry = PREFERENCE_OBJECTIVES[config.preference]
        return cls(
            objective=entry.build(config),
            beta=config.dpo_beta,
            averages_tokens=entry.averages,
            forward=ForwardOptions.of(config),
        )


@dataclass(frozen=True)
class PreferenceResult:
    """The loss of P pairs and the tensors of its metrics. Columns: chosen, rejected."""

    loss: float | None
    """None if there is no pair."""
    logp: Tensor  # (P, 2) summed over a sequence, in nats
    lengths: Tensor  # (P, 2) tokens
    rewards: Tensor  # (P, 2) implicit rewards


def preference_backward(
    layout: Layout, pairs: Sequence[Pair], config: PreferenceLossConfig
) -> PreferenceResult:
    """Add the gradients of the preference loss of the pairs, pack by pack.

    pairs: those of this rank. The result is that of all ranks.
    """
    model = layout.model
    (n_all_pairs,) = layout.world.sums(len(pairs))
    ref_logp = torch.tensor([logp for pair in pairs for logp in pair.ref_logp])
    samples = pair_samples(pairs)
    losses = []
    pair_logps = []  # (P, 2) of each pack
    lengths = []  # (2P,)
    members = []  # (2P,) indices of the packs' samples
    for pack, hidden in layout.passes(samples, config.forward.max_tokens, together=2):
        n_pairs = len(pack.members) // 2
        weight = torch.full((n_pairs,), 1 / n_all_pairs, device=model.device)
        result = linear_preference_loss(
            hidden,
            model.head_weight,
            pack.targets,
            pack.sequence_ids,
            objective=config.objective,
            ref_logp=ref_logp[list(pack.members)].to(model.device),
            pair_weight=weight,
            temperature=config.forward.temperature,
        )
        result.loss.backward()
        losses.append(result.loss.detach())
        pair_logps.append(torch.stack([result.chosen_logp, result.rejected_logp], 1))
        lengths += pack.lengths
        members += pack.members
    if not losses:
        none = torch.empty(0, 2)
        own = PreferenceResult(loss=None, logp=none, lengths=none, rewards=none)
        return result_of_all_ranks(layout.world, own)
    # Copy to the CPU once, after the work of all packs is queued.
    logp = torch.cat(pair_logps).cpu()
    n_tokens = torch.tensor(lengths).view(-1, 2)
    log_ratio = logp - ref_logp[members].view(-1, 2)
    scale = config.beta / n_tokens if config.averages_tokens else config.beta
    own = PreferenceResult(
        loss=float(sum(loss.cpu() for loss in losses)),
        logp=logp,
        lengths=n_tokens,
        rewards=scale * log_ratio,
    )
    return result_of_all_ranks(layout.world, own)


def result_of_all_ranks(world: World, own: PreferenceResult) -> PreferenceResult:
    """Return the result for the pairs of all ranks."""
    if world.size == 1:
        return own
    parts = [part for part in world.exchange(own) if part.loss is not None]
    if not parts:
        return own
    return PreferenceResult(
        loss=sum(part.loss or 0.0 for part in parts),
        logp=torch.cat([part.logp for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
    )


def pair_samples(pairs: Sequence[Pair]) -> list[Sample]:
    """Return sample 2p, the chosen text of pair p, and sample 2p + 1, the rejected one."""
    samples = []
    for pair in pairs:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            samples.append(Sample(pair.prompt_ids, ids))
    return samples


def pair_metrics(result: PreferenceResult) -> Metrics:
    """Return means over the pairs. Their names are TRL's."""
    chosen_rewards = result.rewards[:, 0]
    rejected_rewards = result.rewards[:, 1]
    margins = chosen_rewards - rejected_rewards
    return {
        "loss": result.loss,
        "pairs": len(margins),
        "rewards/chosen": mean(chosen_rewards.tolist()),
        "rewards/rejected": mean(rejected_rewards.tolist()),
        "rewards/margins": mean(margins.tolist()),
        "rewards/accuracies": mean((margins > 0).tolist()),
        "logps/chosen": mean(result.logp[:, 0].tolist()),
        "logps/rejected": mean(result.logp[:, 1].tolist()),
    }


def nll_metrics(result: PreferenceResult, config: Train) -> Metrics:
    """Return the NLL of the chosen and of the rejected texts, in nats.

    Each is the mean over texts of the mean over a text's tokens.
    """
    if config.spec.chosen_source == "data" or not len(result.logp):
        return {}
    chosen, rejected = (-(result.logp / result.lengths).mean(0)).tolist()
    name = "exp/nll" if config.samples_explanations else "expert/nll"
    return {name: chosen, "own/nll": rejected}


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Return JSON values that identify what the pairs are made from."""
    config = trainer.config
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_completion_length",
        "group_size",
        "n_explanations",
        "keep_explanations",
        "choose_explanations",
        "explain_temperature",
        "append_answer",
        "shuffle_explanations",
        "pairs_every",
        "pairs_per_question",
        "seed",
        "method",
        "dtype",
        "lora_rank",
    )
    resolved = config.resolved()
    made_from = {name: getattr(resolved, name) for name in names}
    made_from["weights"] = trainer.initial_weights_hash
    made_from["data"] = fingerprint(trainer.problems)
    made_from["template"] = trainer.prompter.template_hash
    made_from["grader"] = grader_hash()
    if trainer.reward_source is not None:
        made_from["reward"] = trainer.reward_source
    return made_from


def pair_store(trainer: Trainer, run_dir: Path) -> PairStore:
    """Return the store of the pairs of a run. It keeps the record of earlier versions."""
    store = PairStore(run_dir / "pairs", provenance(trainer))
    recorded = store.recorded()
    kept = {}
    if "data" in recorded and same_fingerprint(trainer.problems, recorded["data"]):
        kept["data"] = recorded["data"]
    provenance_of_run = {**store.provenance, **kept}
    if recorded.get("reward") is None:  # earlier versions did not record it
        provenance_of_run.pop("reward", None)
    elif trainer.inexact:
        provenance_of_run["reward"] = recorded["reward"]
    return replace(store, provenance=provenance_of_run)


def check_pairs(trainer: Trainer, run_dir: Path, start: int) -> None:
    """Raise ValueError if the run cannot continue from step `start` (from 0) in `run_dir`."""
    store = pair_store(trainer, run_dir)
    every = trainer.config.pairs_every
    inside_a_round = start % every if every else start
    if inside_a_round and not store.has(start if every else 0):
        raise ValueError(
            f"{store.folder} does not hold the pairs of step {start + 1}, which the weights of an "
            "earlier step sampled: resume the run in its own --output-dir"
        )
    store.check()


def open_pair_store(trainer: Trainer, run_dir: Path, start: int) -> None:
    """Set the trainer's pair store.

    Pairs that the weights of a step after `start` sampled are removed, and sampled again later.
    """
    trainer.pair_store = pair_store(trainer, run_dir)
    with trainer.world.agreed():
        if trainer.world.is_main:
            trainer.pair_store.begin(start)
