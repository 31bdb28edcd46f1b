"""The logged properties of explanations equal those of a full forward under the plain question."""

import math

import pytest
import torch

from expo_fast.algorithms import grpo, logprobs
from expo_fast.algorithms.diagnostics import (
    DiagnosedQuestion,
    diagnostic_metrics,
    diagnostic_samples,
)
from expo_fast.algorithms.explanations import Positives, ranking_samples
from expo_fast.algorithms.logprobs import ForwardOptions, KnownLogprobs, completion_logprobs
from expo_fast.algorithms.rollout import Group
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.generate import Completion
from expo_fast.modeling import packing
from expo_fast.modeling.packing import Sample
from jobs import trainer_of
from judges import completion_logps
from tiny import tiny_model, tiny_tokenizer

PROBLEM = Problem(id="a", prompt="3 + 4?", answer="7", solution="3 + 4 = 7.")
OTHER = Problem(id="b", prompt="2 + 2?", answer="4")
EXPLANATION = "3 + 4 = 7. The answer is \\boxed{7}."
ATTEMPTS = ["It is 9, so \\boxed{9}.", "7 or 8"]


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text).input_ids


def attempt(text: str, drift: float = 0.0) -> Completion:
    """Return an attempt with the log-probs of a sampler whose error is `drift`."""
    tokens = [*ids(text), 1]
    prompter, model = Prompter(tiny_tokenizer()), tiny_model(dtype=torch.float64)
    own = torch.empty(0)
    if drift:
        own = completion_logps(model, prompter.solve(PROBLEM), tokens).detach()
    return Completion(tokens, (own + drift).float(), "stop")


def measured(questions: list[DiagnosedQuestion]) -> dict[str, float | None]:
    model = tiny_model(dtype=torch.float64)
    samples = diagnostic_samples(questions, Prompter(tiny_tokenizer()))
    scored = [each.sample for each in samples]
    logprobs = completion_logprobs(model, scored, ForwardOptions(1.0, 10_000))
    return diagnostic_metrics(questions, samples, logprobs)


def answer_logp(chain: str) -> float:
    """Return log pi(7 | question, chain, box), summed over the answer's tokens."""
    model, prompter = tiny_model(dtype=torch.float64), Prompter(tiny_tokenizer())
    prompt = [*prompter.solve(PROBLEM), *ids(chain), *ids(" \\boxed{")]
    return completion_logps(model, prompt, ids("7")).sum().item()


def test_lift_compares_the_answer_after_the_explanation_and_after_attempts():
    # after the second one the answer is likelier by 0.4 nats, so a mean of logs would differ
    texts = [ATTEMPTS[0], "7 ((((("]
    subject = DiagnosedQuestion(PROBLEM, [attempt(text) for text in texts], [*ids(EXPLANATION), 1])
    row = measured([subject])
    # the text before the box, with stated answers masked, or not
    masked = ("3 + 4 = ?. The answer is ", "It is 9, so ", "? (((((")
    stated = ("3 + 4 = 7. The answer is ", "It is 9, so ", "7 (((((")
    for key, (explained, *own) in (("exp/lift", masked), ("exp/lift_stated", stated)):
        expected = answer_logp(explained) - math.log(
            sum(math.exp(answer_logp(o)) for o in own) / len(own)
        )
        assert row[key] == pytest.approx(expected, abs=1e-4)
    assert row["exp/lift"] != pytest.approx(row["exp/lift_stated"], abs=1e-2)


def test_the_experts_nll_is_a_mean_over_its_tokens():
    model, prompter = tiny_model(dtype=torch.float64), Prompter(tiny_tokenizer())
    expected = (
        -completion_logps(model, prompter.solve(PROBLEM), prompter.expert(PROBLEM)).mean().item()
    )
    row = measured(
        [DiagnosedQuestion(PROBLEM, [], None), DiagnosedQuestion(OTHER, [], None)]
    )  # one has no solution
    assert row["expert/nll"] == pytest.approx(expected, rel=1e-5)
    assert row["exp/lift"] is row["logp_gap/max"] is None


def test_explanation_and_expert_are_compared_on_the_same_questions():
    model, prompter = tiny_model(dtype=torch.float64), Prompter(tiny_tokenizer())
    prompt, text = prompter.solve(PROBLEM), [*ids(EXPLANATION), 1]
    expected = [
        -completion_logps(model, prompt, each).mean().item()
        for each in (text, prompter.expert(PROBLEM))
    ]
    unexplained, unsolved = DiagnosedQuestion(PROBLEM, [], None), DiagnosedQuestion(OTHER, [], text)
    row = measured([unexplained, DiagnosedQuestion(PROBLEM, [], text), unsolved])
    assert row["exp/nll_over_expert"] == pytest.approx(expected[0] - expected[1], rel=1e-4)
    assert measured([unexplained, unsolved])["exp/nll_over_expert"] is None


def test_the_log_prob_gap_is_that_of_the_samplers_log_probs():
    row = measured([DiagnosedQuestion(PROBLEM, [attempt("1", 0.25), attempt("22", -0.5)], None)])
    assert row["logp_gap/max"] == pytest.approx(0.5, abs=1e-5)
    assert row["logp_gap/mean"] == pytest.approx((2 * 0.25 + 3 * 0.5) / 5, abs=1e-5)
    assert measured([DiagnosedQuestion(PROBLEM, [attempt("1")], None)])["logp_gap/max"] is None


@pytest.mark.parametrize("choose", ["likelihood", "lift", "first"])
def test_what_ranking_has_scored_is_not_scored_again(monkeypatch, choose):
    """Count the tokens that the model computes for diagnostics, and compare the metrics."""
    tokens = []

    def counted(model, samples, max_tokens):
        for pack, hidden in packing.forward(model, samples, max_tokens):
            tokens.append(len(pack.tokens))
            yield pack, hidden

    monkeypatch.setattr(logprobs, "forward", counted)
    prompter = Prompter(tiny_tokenizer())
    trainer = trainer_of(Train(temperature=1.0), tiny_model(dtype=torch.float64), prompter)
    explanation = (*ids(EXPLANATION), 1)
    attempts = [attempt(text) for text in ATTEMPTS]
    group = Group(PROBLEM, prompter.solve(PROBLEM), attempts, ATTEMPTS, rewards=[0.0, 0.0])
    accepted = {PROBLEM.id: [explanation, (*ids("It is 7."), 1)]}
    grpo.diagnose(trainer, [group], Positives(accepted), step=0)
    before = sum(tokens)
    expected = measured([DiagnosedQuestion(PROBLEM, attempts, explanation)])

    found = Positives(accepted)
    samples = ranking_samples(accepted, [PROBLEM], prompter, choose)
    ranked = completion_logprobs(trainer.model, samples, ForwardOptions(1.0, 4096))
    found.known.add(samples, ranked)
    tokens.clear()
    row = grpo.diagnose(trainer, [group], found, step=0)
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, abs=1e-6), key
    # The last token of a text is not computed, and the tokens before the prompt's last are shared.
    saved = 0
    if samples:
        saved = len(samples[0].prompt_ids) + len(samples[0].completion_ids) - 1
        saved -= len(group.prompt_ids) - (choose == "lift")
    assert before - sum(tokens) == saved
    tokens.clear()
    assert grpo.diagnose(trainer, [group], found, step=0) == row
    assert not tokens


def test_a_text_is_scored_once():
    """An attempt without the answer is the same text with the answer masked."""
    model = tiny_model(dtype=torch.float64)
    prompter = Prompter(tiny_tokenizer())
    twice = [Sample(prompter.solve(PROBLEM), tuple(ids("a b"))) for _ in range(2)]
    known = KnownLogprobs()
    missing = known.missing(twice)
    assert missing == twice[:1]
    known.add(missing, completion_logprobs(model, missing, ForwardOptions(1.0, 4096)))
    assert known.missing(twice) == []
    assert torch.equal(*known.of(twice))


def test_every_nth_step_is_diagnosed_from_the_first_one_on():
    config = Train(diagnose=2, diagnose_every=3)
    assert [config.n_diagnosed(step) for step in range(7)] == [2, 0, 0, 2, 0, 0, 2]
