"""The two properties as they are logged are those of full forwards under the plain question."""

import math
from collections.abc import Sequence

import pytest
import torch

from expo_fast.algorithms.diagnostics import (
    DiagnosedQuestion,
    diagnostic_metrics,
    diagnostic_samples,
)
from expo_fast.algorithms.logprobs import completion_logprobs
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.generate import Completion
from expo_fast.modeling.decoder import Decoder
from tiny import tiny_model, tiny_tokenizer

PROBLEM = Problem(id="a", prompt="3 + 4?", answer="7", solution="3 + 4 = 7.")
OTHER = Problem(id="b", prompt="2 + 2?", answer="4")
EXPLANATION = "3 + 4 = 7. The answer is \\boxed{7}."
ATTEMPTS = ["It is 9, so \\boxed{9}.", "7 or 8"]


def logp(model: Decoder, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    whole = torch.tensor([*prompt, *ids])
    borders = torch.tensor([0, len(whole)], dtype=torch.int32)
    hidden = model.hidden(whole, torch.arange(len(whole)), borders)
    logits = (hidden @ model.head_weight.T)[len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1).detach()


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text).input_ids


def attempt(text: str, drift: float = 0.0) -> Completion:
    """With the log-probs of a sampler that is `drift` off."""
    tokens = [*ids(text), 1]
    prompter, model = Prompter(tiny_tokenizer()), tiny_model(dtype=torch.float64)
    own = logp(model, prompter.solve(PROBLEM), tokens) if drift else torch.empty(0)
    return Completion(tokens, (own + drift).float(), "stop")


def measured(questions: list[DiagnosedQuestion]) -> dict[str, float | None]:
    model = tiny_model(dtype=torch.float64)
    samples = diagnostic_samples(questions, Prompter(tiny_tokenizer()))
    scored = [each.sample for each in samples]
    logprobs = completion_logprobs(model, scored, temperature=1.0, max_tokens=10_000)
    return diagnostic_metrics(questions, samples, logprobs)


def behind(chain: str) -> float:
    """log pi(7 | question, chain, box), summed over the answer's tokens."""
    model, prompter = tiny_model(dtype=torch.float64), Prompter(tiny_tokenizer())
    prompt = [*prompter.solve(PROBLEM), *ids(chain), *ids(" \\boxed{")]
    return float(logp(model, prompt, ids("7")).sum())


def test_lift_compares_the_answer_behind_explanation_and_attempts():
    # behind the second the answer is likelier by 0.4 nats: a mean of logs would be another number
    texts = [ATTEMPTS[0], "7 ((((("]
    subject = DiagnosedQuestion(PROBLEM, [attempt(text) for text in texts], [*ids(EXPLANATION), 1])
    row = measured([subject])
    # what stands before the box; an answer that is stated is masked there
    masked = ("3 + 4 = ?. The answer is ", "It is 9, so ", "? (((((")
    stated = ("3 + 4 = 7. The answer is ", "It is 9, so ", "7 (((((")
    for key, (explained, *own) in (("exp/lift", masked), ("exp/lift_stated", stated)):
        expected = behind(explained) - math.log(sum(math.exp(behind(o)) for o in own) / len(own))
        assert row[key] == pytest.approx(expected, abs=1e-4)
    assert row["exp/lift"] != pytest.approx(row["exp/lift_stated"], abs=1e-2)


def test_the_experts_likelihood_is_a_mean_over_its_tokens():
    model, prompter = tiny_model(dtype=torch.float64), Prompter(tiny_tokenizer())
    expected = -logp(model, prompter.solve(PROBLEM), prompter.expert(PROBLEM)).mean().item()
    row = measured(
        [DiagnosedQuestion(PROBLEM, [], None), DiagnosedQuestion(OTHER, [], None)]
    )  # one has no solution
    assert row["expert/nll"] == pytest.approx(expected, rel=1e-5)
    assert row["exp/lift"] is row["logp_gap/max"] is None


def test_explanation_and_expert_are_compared_on_the_same_questions():
    model, prompter = tiny_model(dtype=torch.float64), Prompter(tiny_tokenizer())
    prompt, text = prompter.solve(PROBLEM), [*ids(EXPLANATION), 1]
    expected = [-logp(model, prompt, t).mean().item() for t in (text, prompter.expert(PROBLEM))]
    unexplained, unsolved = DiagnosedQuestion(PROBLEM, [], None), DiagnosedQuestion(OTHER, [], text)
    row = measured([unexplained, DiagnosedQuestion(PROBLEM, [], text), unsolved])
    assert row["exp/nll_over_expert"] == pytest.approx(expected[0] - expected[1], rel=1e-4)
    assert measured([unexplained, unsolved])["exp/nll_over_expert"] is None


def test_the_gap_is_that_of_the_samplers_log_probs():
    row = measured([DiagnosedQuestion(PROBLEM, [attempt("1", 0.25), attempt("22", -0.5)], None)])
    assert row["logp_gap/max"] == pytest.approx(0.5, abs=1e-5)
    assert row["logp_gap/mean"] == pytest.approx((2 * 0.25 + 3 * 0.5) / 5, abs=1e-5)
    assert measured([DiagnosedQuestion(PROBLEM, [attempt("1")], None)])["logp_gap/max"] is None
