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

from expo_fast.config import Train
from expo_fast.diagnose import Subject, mean
from expo_fast.explain import Explanations
from expo_fast.generate import Completion
from expo_fast.learner import Learner, Metrics, summed
from expo_fast.log import Phases
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
from expo_fast.pack import Sample, pack
from expo_fast.pairs import Pair, PairStore, pair_up
from expo_fast.rollout import Rollout, explained_metrics, said, sampled_metrics
from expo_fast.tasks import Problem, fingerprint, last_question

Objective = Dpo | Ipo | Hinge | SimPo | Cpo | Orpo | DpoPositive


class Preference(Learner):
    """expo-dpo, expert-dpo and dpo."""

    store: PairStore

    def begin(self, run_dir: Path, start: int) -> None:
        c = self.config
        self.store = PairStore(
            run_dir / "pairs",
            {
                "method": c.method,
                "model": c.model,
                "data": fingerprint(self.problems),
                "template": self.prompter.template_hash,
                "seed": c.seed,
                "pairs_every": c.pairs_every,
            },
        )
        self.store.begin(start)
        if start and not c.pairs_every and not self.store.count():
            raise ValueError(
                f"{run_dir / 'pairs'} holds no pairs: step {start} of an offline run needs those "
                "sampled before its first; resume it in its own --output-dir"
            )

    def learn(self, step: int, phases: Phases) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The step's pairs, made now where it begins a round; one update on them."""
        head, pairs = self.store.read(self.make_round(step, phases))
        measured = self.diagnose(self.subjects(pairs), phases)
        with phases.phase("forward_backward"):
            row = self.backward(pairs)
        return head | measured | row | self.apply(step, phases), self.rows(pairs)

    def make_round(self, step: int, phases: Phases) -> int:
        """Make what is missing of the step's round; the step whose pairs are to be taken.

        That is another one in an offline run prolonged beyond its round, which begins it again.
        """
        every, last = self.config.pairs_every, self.config.steps
        if not every and step:
            return step % self.store.count()
        first = step - step % every if every else 0
        for each in range(step, min(last, first + every) if every else last):
            if not self.store.has(each):
                self.make_pairs(each, policy_step=step, phases=phases)
            elif step == first:  # made before this process was stopped and started again
                self.sampler.n_tokens += self.store.read(each)[0]["tokens"]
        return step

    def make_pairs(self, step: int, *, policy_step: int, phases: Phases) -> None:
        """Sample or read the pairs of one step, score them by the reference and keep them."""
        questions, before = self.batch(step), self.sampler.n_tokens
        head: dict[str, Any] = {"policy_step": policy_step}
        if self.config.method == "dpo":
            pairs = [self.given(p) for p in questions]
        else:
            rollouts = self.sampler.rollouts(questions, step, phases)
            with phases.phase("explain"):
                found = self.positives([r.problem for r in rollouts if r.failed], step)
            pairs = self.paired(rollouts, found)
            head |= sampled_metrics(rollouts) | explained_metrics(found)
        head["tokens"] = self.sampler.n_tokens - before
        with phases.phase("reference"):
            pairs = self.with_reference(pairs, policy_step)
        texts = {p.id: {"prompt": last_question(p), "answer": p.answer} for p in questions}
        shown = [
            texts[p.problem_id]
            | {"chosen": self.prompter.text(p.chosen_ids)}
            | {"rejected": self.prompter.text(p.rejected_ids)}
            for p in pairs
        ]
        self.store.write(step, head, pairs, shown)

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
            rejected = [tuple(done.token_ids) for done in r.failed]
            n = self.config.pairs_per_question
            pairs += pair_up(r.problem, self.prompter, chosen, rejected, n)
        return pairs

    def with_reference(self, pairs: list[Pair], policy_step: int) -> list[Pair]:
        """The pairs with the reference's log-probs; the initial policy is its own reference."""
        if self.config.preference in ("simpo", "cpo", "orpo"):  # they have none
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
        for p in pack(samples, c.pack_tokens, together=2):
            p = p.to(self.model.device)
            ref = ref_logp[list(p.members)].to(self.model.device)
            hidden = self.model.hidden(p.tokens, p.positions, p.cu_seqlens, p.parents)[p.rows]
            result = linear_preference_loss(
                hidden,
                self.model.head_weight,
                p.targets,
                p.sequence_ids,
                objective=preference_objective(c),
                ref_logp=ref,
                pair_weight=torch.full((len(ref) // 2,), 1 / len(pairs), device=ref.device),
                temperature=c.temperature,
            )
            result.loss.backward()
            found.append(PreferenceLoss(*(x.detach().cpu() for x in result)))
            refs.append(ref.cpu())
            lengths.append(torch.bincount(p.sequence_ids, minlength=len(ref)).cpu())
        return pair_metrics(found, refs, c.dpo_beta) | self.nll(found, lengths)

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
        problems = {p.id: p for p in self.problems}
        by_problem: dict[str, list[Pair]] = {}
        for pair in pairs if self.config.method != "dpo" else ():
            by_problem.setdefault(pair.problem_id, []).append(pair)
        none = torch.empty(0)
        return [
            Subject(
                problems[key],
                [Completion(list(p.rejected_ids), none, "stop") for p in group],
                group[0].chosen_ids if self.config.explains else None,
            )
            for key, group in by_problem.items()
        ]

    def rows(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        """What was compared, for completions/step-N.jsonl."""
        problems = {p.id: p for p in self.problems}
        return [
            said(problems[pair.problem_id], kind, self.prompter.text(ids))
            for pair in pairs
            for kind, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids))
        ]


def preference_objective(config: Train) -> Objective:
    beta = config.dpo_beta
    return {
        "dpo": lambda: Dpo(beta, config.label_smoothing),
        "ipo": lambda: Ipo(beta),
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
    found: Sequence[PreferenceLoss], refs: Sequence[torch.Tensor], beta: float
) -> Metrics:
    """Means over the pairs, named as TRL's: rewards are beta times log-ratios."""
    chosen, rejected, ref = (
        torch.cat([torch.empty(0), *parts])
        for parts in ([r.chosen_logp for r in found], [r.rejected_logp for r in found], refs)
    )
    reward = beta * (torch.stack([chosen, rejected], 1) - ref.view(-1, 2))
    margins = reward[:, 0] - reward[:, 1]
    return {
        "loss": float(sum(r.loss for r in found)) if found else None,
        "pairs": len(margins),
        "rewards/chosen": mean(reward[:, 0].tolist()),
        "rewards/rejected": mean(reward[:, 1].tolist()),
        "rewards/margins": mean(margins.tolist()),
        "rewards/accuracies": mean((margins > 0).tolist()),
        "logps/chosen": mean(chosen.tolist()),
        "logps/rejected": mean(rejected.tolist()),
    }
