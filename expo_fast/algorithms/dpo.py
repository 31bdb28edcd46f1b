"""DPO on self-explanations (ExP-DPO, arXiv:2507.02834, section 4.1), on expert solutions, on data.

    L = -1/n sum log sigmoid(beta [log pi(w|q) / pi_ref(w|q) - log pi(l|q) / pi_ref(l|q)])

over the n pairs of a step; w an explanation sampled with the answer shown, an expert's solution or
the data's chosen text; l an own attempt known to be wrong, or the data's rejected text. Both are
scored behind the plain question. Attempts that are right never stand on the rejected side.

Offline all pairs are sampled before the first step, by the initial policy, which is the reference.
Online they are sampled anew every `pairs_every` steps, a round, by the policy of that moment, while
the reference stays or, with `refresh_reference`, is that policy.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from expo_fast.algorithms.diagnostics import Subject, mean
from expo_fast.algorithms.explanations import Explanations
from expo_fast.algorithms.pairs import Pair, PairStore, pair_up
from expo_fast.algorithms.rollout import Rollout, explained_metrics, said, sampled_metrics
from expo_fast.algorithms.trainer import Learner, Metrics, summed
from expo_fast.config import REFERENCE_FREE, Train
from expo_fast.data.problems import Problem, fingerprint
from expo_fast.generate import Completion
from expo_fast.modeling.packing import Sample, forward
from expo_fast.ops import (
    Cpo,
    Dpo,
    DpoPositive,
    Hinge,
    Ipo,
    Orpo,
    PreferenceLoss,
    SimPo,
    linear_preference_loss,
)
from expo_fast.reporting.run_log import Phases
from expo_fast.reward import grader_hash

Objective = Dpo | Ipo | Hinge | SimPo | Cpo | Orpo | DpoPositive


class Preference(Learner):
    """expo-dpo, expert-dpo and dpo."""

    store: PairStore
    by_id: dict[str, Problem]

    def check(self, run_dir: Path, start: int) -> None:
        c, store = self.config, PairStore(run_dir / "pairs", self.provenance())
        amid = start % c.pairs_every if c.pairs_every else start
        if amid and not store.has(start if c.pairs_every else 0):
            raise ValueError(
                f"{store.folder} does not hold the pairs of step {start + 1}, which were sampled "
                "before it with other weights: resume the run in its own --output-dir"
            )
        store.check()

    def begin(self, run_dir: Path, start: int) -> None:
        self.by_id = {p.id: p for p in self.problems}
        self.store = PairStore(run_dir / "pairs", self.provenance())
        self.store.begin(start)

    def provenance(self) -> dict[str, Any]:
        """What the pairs were made from: JSON values."""
        c = self.config
        sampled = ("temperature", "top_p", "top_k", "min_p", "max_completion_length", "group_size")
        sampled += (
            "n_explanations",
            "keep_explanations",
            "choose_explanations",
            "explain_temperature",
            "append_answer",
        )
        sampled += ("shuffle_explanations", "pairs_every", "pairs_per_question", "seed", "method")
        made = {name: getattr(c, name) for name in (*sampled, "model", "dtype", "lora_rank")}
        made |= {"weights": self.origin, "data": fingerprint(self.problems)}
        return made | {"template": self.prompter.template_hash, "grader": grader_hash()}

    def learn(self, step: int, phases: Phases) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The step's pairs, made now where it begins a round; one update on them."""
        head, pairs = self.store.read(self.make_round(step, phases))
        if self.config.method == "dpo":
            self.read += sum(len(p.prompt_ids + p.chosen_ids + p.rejected_ids) for p in pairs)
        measured = self.diagnose(self.subjects(pairs), phases)
        with phases.phase("forward_backward"):
            row = self.backward(pairs)
        return head | measured | row | self.apply(step, phases), self.rows(pairs)

    def make_round(self, step: int, phases: Phases) -> int:
        """Make what is missing of the step's round; the step whose pairs are to be taken.

        That is another one in an offline run prolonged beyond its round, which begins it again.
        """
        every = self.config.pairs_every
        if not every and step:
            return step % self.store.count()
        first = step - step % every if every else 0
        for each in range(step, first + (every or self.config.steps)):
            if not self.store.has(each):
                self.make_pairs(each, policy_step=step, phases=phases)
            elif step == first:  # made before this process was stopped and started again
                self.sampler.n_tokens += self.store.read(each)[0]["pairs/tokens"]
        return step

    def make_pairs(self, step: int, *, policy_step: int, phases: Phases) -> None:
        """Sample or read the pairs of one step, score them by the reference and keep them."""
        questions, before = self.batch(step), self.sampler.n_tokens
        head: dict[str, Any] = {"pairs/policy_step": policy_step}
        if self.config.method == "dpo":
            pairs = [self.given(p) for p in questions]
        else:
            rollouts = self.sampler.rollouts(questions, step, phases)
            self.sampler.earlier.clear()  # a round that was stopped could not know them
            with phases.phase("explain"):
                found = self.positives([r.problem for r in rollouts if r.failed], step)
            pairs = self.paired(rollouts, found)
            if self.config.explains:
                head |= explained_metrics(found)
            if policy_step == step:  # of older weights these would say nothing of the step's
                head |= sampled_metrics(rollouts)
        head["pairs/tokens"] = self.sampler.n_tokens - before
        with phases.phase("reference"):
            pairs = self.with_reference(pairs, policy_step)
        self.store.write(step, head, pairs, [self.shown(pair) for pair in pairs])

    def shown(self, pair: Pair) -> dict[str, Any]:
        """What a reader of the pair wants to see."""
        problem, text = self.by_id[pair.problem_id], self.prompter.text
        both = {
            "chosen": text(pair.chosen_ids).strip(),
            "rejected": text(pair.rejected_ids).strip(),
        }
        return {"prompt": problem.prompt, "answer": problem.answer} | both

    def given(self, problem: Problem) -> Pair:
        """The data's own pair."""
        chosen, rejected = (self.prompter.completion(text) for text in problem.pair or ())
        return Pair(problem.id, self.prompter.solve(problem), chosen, rejected)

    def positives(self, questions: Sequence[Problem], step: int) -> Explanations:
        if self.config.method == "expo-dpo":
            return self.sampler.explanations(questions, step)
        expert = {p.id: [self.prompter.expert(p)] for p in questions}
        return Explanations(expert, n_questions=len(questions))

    def paired(self, rollouts: Sequence[Rollout], found: Explanations) -> list[Pair]:
        pairs = []
        for r in rollouts:
            chosen = found.accepted.get(r.problem.id, [])
            ended = self.prompter.ended
            rejected = [ended(done.token_ids, done.finish_reason) for done in r.failed]
            n = self.config.pairs_per_question
            pairs += pair_up(r.problem, self.prompter, chosen, rejected, n)
        return pairs

    def with_reference(self, pairs: list[Pair], policy_step: int) -> list[Pair]:
        """The pairs with the reference's log-probs; the initial policy is its own reference."""
        if self.config.preference in REFERENCE_FREE:
            return pairs
        own = policy_step == 0 or self.config.refresh_reference
        score = self.score if own else self.reference_score
        logps = summed(score(pair_samples(pairs))).view(-1, 2).tolist() if pairs else []
        scored = zip(pairs, logps, strict=True)
        return [replace(pair, ref_logp=(chosen, rejected)) for pair, (chosen, rejected) in scored]

    def backward(self, pairs: Sequence[Pair]) -> Metrics:
        """Add the pairs' gradients, pack after pack; the loss and its statistics over the pairs."""
        found: list[PreferenceLoss] = []
        refs: list[torch.Tensor] = []
        lengths: list[torch.Tensor] = []  # tokens of each sequence
        samples, c = pair_samples(pairs), self.config
        ref_logp = torch.tensor([logp for pair in pairs for logp in pair.ref_logp])
        for p, hidden in forward(self.model, samples, c.pack_tokens, together=2):
            ref = ref_logp[list(p.members)]
            result = linear_preference_loss(
                hidden,
                self.model.head_weight,
                p.targets,
                p.sequence_ids,
                objective=preference_objective(c),
                ref_logp=ref.to(self.model.device),
                pair_weight=torch.full((len(ref) // 2,), 1 / len(pairs), device=self.model.device),
                temperature=c.temperature,
            )
            result.loss.backward()
            found.append(PreferenceLoss(*(x.detach() for x in result)))
            refs.append(ref)
            lengths.append(torch.tensor(p.lengths))
        found = [PreferenceLoss(*(x.cpu() for x in result)) for result in found]
        averaged = c.preference in ("ipo", "simpo", "orpo")
        scale = [c.dpo_beta / n if averaged else c.dpo_beta for n in lengths]
        return pair_metrics(found, refs, scale) | self.nll(found, lengths)

    def nll(self, found: Sequence[PreferenceLoss], lengths: Sequence[torch.Tensor]) -> Metrics:
        """Of either side, mean over its sequences of the mean over tokens, nats; names as ever."""
        method = self.config.method
        sides = ["exp/nll" if self.config.explains else "expert/nll", "own/nll"]
        logps = [torch.stack([r.chosen_logp, r.rejected_logp], 1) for r in found]
        pairs = [logp / n.view(-1, 2) for logp, n in zip(logps, lengths, strict=True)]
        if method == "dpo" or not pairs:
            return {}
        return dict(zip(sides, (-torch.cat(pairs).mean(0)).tolist(), strict=True))

    def subjects(self, pairs: Sequence[Pair]) -> list[Subject]:
        """What is compared: the chosen explanation, if it is one, and the rejected attempts."""
        by_problem: dict[str, list[Pair]] = {}
        for pair in pairs if self.config.method != "dpo" else ():
            by_problem.setdefault(pair.problem_id, []).append(pair)
        none = torch.empty(0)
        return [
            Subject(
                self.by_id[key],
                [Completion(list(p.rejected_ids), none, "stop") for p in group],
                group[0].chosen_ids if self.config.explains else None,
            )
            for key, group in by_problem.items()
        ]

    def rows(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        """What was compared, for completions/step-N.jsonl."""
        return [
            said(self.by_id[pair.problem_id], kind, self.prompter.text(ids))
            for pair in pairs
            for kind, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids))
        ]


def preference_objective(config: Train) -> Objective:
    beta = config.dpo_beta
    return {
        "dpo": lambda: Dpo(beta, config.label_smoothing),
        "ipo": lambda: Ipo(beta, average=True),
        "hinge": lambda: Hinge(beta),
        "simpo": lambda: SimPo(beta),
        "cpo": lambda: Cpo(beta),
        "orpo": lambda: Orpo(beta),
        "dpop": lambda: DpoPositive(beta),
    }[config.preference]()


def pair_samples(pairs: Sequence[Pair]) -> list[Sample]:
    """Sample 2p is the chosen completion of pair p, 2p + 1 the rejected one."""
    return [
        Sample(p.prompt_ids, ids, row_weight=1.0)
        for p in pairs
        for ids in (p.chosen_ids, p.rejected_ids)
    ]


def pair_metrics(
    found: Sequence[PreferenceLoss],
    refs: Sequence[torch.Tensor],  # (2P,) each: the reference's log-probs
    scales: Sequence[torch.Tensor | float],  # what turns log-ratios into rewards; a tensor: (2P,)
) -> Metrics:
    """Means over the pairs, named as TRL's: rewards are beta times log-ratios or averages."""
    logp = [torch.stack([r.chosen_logp, r.rejected_logp], 1).view(-1) for r in found]
    rewards = [s * (x - ref) for x, ref, s in zip(logp, refs, scales, strict=True)]
    reward, both = (torch.cat([torch.empty(0), *x]).view(-1, 2) for x in (rewards, logp))
    margins = reward[:, 0] - reward[:, 1]
    return {
        "loss": float(sum(r.loss for r in found)) if found else None,
        "pairs": len(margins),
        "rewards/chosen": mean(reward[:, 0].tolist()),
        "rewards/rejected": mean(reward[:, 1].tolist()),
        "rewards/margins": mean(margins.tolist()),
        "rewards/accuracies": mean((margins > 0).tolist()),
        "logps/chosen": mean(both[:, 0].tolist()),
        "logps/rejected": mean(both[:, 1].tolist()),
    }
