"""Supervised fine-tuning on the data's own texts: -1/P sum_q mean_t log pi(c_q,t | q)."""

from typing import Any

from expo_fast.algorithms.explanations import sft_samples
from expo_fast.algorithms.rollout import said
from expo_fast.algorithms.trainer import Learner
from expo_fast.reporting.timing import Phases


class Sft(Learner):
    """sft: nothing is sampled but for evaluations."""

    def learn(self, step: int, phases: Phases) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        questions, c = self.batch(step), self.config
        targets = [(p, [self.prompter.target(p)]) for p in questions]
        samples = sft_samples(
            targets,
            self.prompter,
            coef=1.0,
            n_questions=len(questions),
            reduction=c.exp_sft_reduction,
        )
        self.read += sum(len(s.prompt_ids + s.completion_ids) for s in samples)
        with phases.phase("forward_backward"):
            result = self.policy_backward(samples)
        row = {"loss": result["loss"], "expert/nll": result["nll"]} | self.apply(step, phases)
        return row, [said(p, "expert", self.prompter.text(ids)) for p, (ids,) in targets]
