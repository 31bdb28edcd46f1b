"""Which explanations are kept, and which tokens are trained on."""

from typing import Any

import pytest
import torch

from expo_fast.algorithms.explanations import (
    Positives,
    accept_explanations,
    explanation_requests,
    keep_best,
    ranking_samples,
    shuffled,
)
from expo_fast.algorithms.logprobs import ForwardOptions, completion_logprobs
from expo_fast.algorithms.sft import sft_samples
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.generate import Completion, Request
from expo_fast.modeling.packing import Sample
from expo_fast.reward import score_answers
from judges import completion_logps
from tiny import tiny_model, tiny_tokenizer

ANSWER = "7319"
PROBLEM = Problem(id="a", prompt="How many?", answer=ANSWER, solution="1 + 1 = 2.")
GOOD = rf"First 7000 + 319 = {ANSWER}. The answer is \boxed{{{ANSWER}}}."


PROBLEMS = [PROBLEM, Problem(id="b", prompt="And?", answer="1")]


class Scripted:
    """A generator that returns the given completions."""

    def __init__(self, texts: list[tuple[str, str]]):
        self.texts = texts
        self.requests: list[Request] = []

    def sample(self, requests: list[Request]) -> list[Completion]:
        self.requests = list(requests)
        assert len(requests) == len(self.texts)
        ids = [[*tiny_tokenizer()(text).input_ids, 1] for text, _ in self.texts]
        reasons = [reason for _, reason in self.texts]
        return [
            Completion(i, torch.zeros(len(i)), reason)
            for i, reason in zip(ids, reasons, strict=True)
        ]


def run(texts: list[tuple[str, str]], problems: list[Problem], n: int, *, append: bool = False):
    generator = Scripted(texts)
    prompter = Prompter(tiny_tokenizer())
    requests = explanation_requests(problems, prompter, Train(explanations_per_question=n), 0)
    found = accept_explanations(
        problems, generator.sample(requests), prompter, score_answers, append_answer=append
    )
    return found, generator.requests


def test_only_right_complete_and_clean_explanations_are_kept():
    texts = [
        (GOOD, "stop"),
        (GOOD, "length"),  # cut off
        (GOOD.replace(r"\boxed{" + ANSWER, r"\boxed{12"), "stop"),  # wrong
        (f"We know the answer is {ANSWER}.", "stop"),  # no box
        (rf"Since the given answer is {ANSWER}: \boxed{{{ANSWER}}}", "stop"),  # leaks
        (rf"There are 7000 and 319, so \boxed{{{ANSWER}}}", "stop"),  # copied
        (rf"{ANSWER} it is, since 7000 + 319 = {ANSWER}. \boxed{{{ANSWER}}}", "stop"),  # first
        (GOOD.replace("First", "First 2 + 2 = 5, then"), "stop"),  # miscalculates
        (GOOD.replace("First", "The answer is 12. No, first"), "stop"),  # names another
        (GOOD + rf" \boxed{{{ANSWER}}}", "stop"),  # boxes twice
    ]
    found, _ = run(texts, [PROBLEM], len(texts))
    assert found.texts == {"a": [(*tiny_tokenizer()(GOOD).input_ids, 1)]}
    counts = found.counts
    assert (counts.n_sampled, counts.n_right, counts.n_leaked, counts.n_unfit) == (10, 7, 1, 6)
    metrics = counts.metrics()
    assert metrics["exp/rate"] == 1.0
    assert metrics["exp/leak_rate"] == pytest.approx(1 / 7)
    assert metrics["exp/unfit_rate"] == pytest.approx(6 / 7)


def test_an_answer_is_appended_to_unboxed_explanations_that_reach_it():
    reached, claimed = f"First 7000 + 319 = {ANSWER}.", f"Well. The answer is {ANSWER}."
    texts = [
        (f"{reached} So the answer is {ANSWER}. Indeed.", "stop"),  # a box replaces the claim
        (claimed, "stop"),  # reaches nothing
        (reached, "length"),  # cut off
        ("7000 + 319 makes 12.", "stop"),  # another answer
        (rf"{reached} \boxed{{12}}", "stop"),  # boxes another
        (GOOD, "stop"),
    ]
    found, _ = run(texts, [PROBLEM], len(texts), append=True)
    appended = f"{reached}\nThe answer is \\boxed{{{ANSWER}}}."
    expected = [(*tiny_tokenizer()(text).input_ids, 1) for text in (appended, GOOD)]
    # the sampled tokens are unchanged, and the answer's tokens follow
    sampled = tuple(tiny_tokenizer()(reached).input_ids)
    assert found.texts["a"][0][: len(sampled)] == sampled
    texts_of = [tiny_tokenizer().decode(ids) for ids in found.texts["a"]]
    assert texts_of == [tiny_tokenizer().decode(ids) for ids in expected]
    assert all(ids.count(1) == 1 and ids[-1] == 1 for ids in found.texts["a"])
    without, _ = run(texts, [PROBLEM], len(texts))
    assert len(without.texts["a"]) == 1


def test_an_answer_that_is_no_number_is_appended_only_where_it_is_stated():
    problem = Problem(id="a", prompt="How much?", answer="x+1", solution="S")
    derived = "There are 2x + 2 in all, and two share them: each of the two gets x+1"
    texts = [("I can't say how much it is.", "stop"), (derived, "stop")]
    found, _ = run(texts, [problem], len(texts), append=True)
    (ids,) = found.texts["a"]
    assert tiny_tokenizer().decode(ids).startswith(derived)
    assert found.counts.n_right == 1


def test_the_rate_counts_questions_and_not_samples():
    other = Problem(id="b", prompt="And how many?", answer="1")
    found, _ = run([(GOOD, "stop")] * 4, [PROBLEM, other], 2)
    assert len(found.texts["a"]) == 2
    assert found.counts.metrics()["exp/rate"] == 0.5


def test_the_answer_is_in_the_explain_prompt_and_not_in_the_trained_prompt():
    found, requests = run([(GOOD, "stop")], [PROBLEM], 1)
    tokenizer = tiny_tokenizer()
    assert ANSWER in tokenizer.decode(requests[0].prompt_ids)
    prompter = Prompter(tokenizer)
    (sample,) = sft_samples(
        [(PROBLEM, found.texts["a"])],
        prompter,
        coef=1.0,
        n_questions=1,
        reduction="token_mean",
    )
    assert ANSWER not in tokenizer.decode(sample.prompt_ids)
    assert "The answer is" not in tokenizer.decode(sample.prompt_ids)
    assert sample.completion_ids == found.texts["a"][0]  # the sampled ids, not tokenized again
    assert sample.on_policy


def test_the_likeliest_explanations_under_the_plain_question_are_kept():
    model = tiny_model(dtype=torch.float64)
    prompter = plain_prompter()
    accepted: Any = {"a": [(9, 10, 11), (12, 13), (14,), (15, 16)], "b": [(17, 18)]}

    def score(samples: list[Sample]) -> list[torch.Tensor]:
        return completion_logprobs(model, samples, ForwardOptions(1.0, 1000))

    samples = ranking_samples(accepted, PROBLEMS, prompter, "likelihood")
    kept = best_of(accepted, score(samples), "likelihood", 2)
    prompt = prompter.solve(PROBLEM)
    means = {ids: float(score([Sample(prompt, ids)])[0].mean()) for ids in accepted["a"]}
    assert kept["a"] == sorted(means, key=lambda ids: -means[ids])[:2]
    assert kept["b"] == [(17, 18)]


def test_the_lift_ranks_explanations_with_the_answer_masked():
    prompter = plain_prompter()
    copied = encode("It is 7319.")
    derived = encode("7000 + 319 gives it.")
    accepted: Any = {"a": [copied, derived]}
    samples = ranking_samples(accepted, PROBLEMS, prompter, "lift")
    asked = [prompter.tokenizer.decode(s.prompt_ids) for s in samples]
    assert {prompter.tokenizer.decode(s.completion_ids) for s in samples} == {ANSWER}
    logprobs = [torch.tensor([-1.0 if "7000" in text else -5.0]) for text in asked]
    kept = best_of(accepted, logprobs, "lift", 1)
    assert kept == {"a": [derived]}
    assert all(ANSWER not in text for text in asked)
    assert asked[0].endswith("It is ?. \\boxed{")


def test_the_first_explanations_are_kept_as_sampled():
    accepted: Any = {"a": [(9,), (10,), (11,)], "b": [(12,)]}
    assert ranking_samples(accepted, PROBLEMS, plain_prompter(), "first") == []
    two = best_of(accepted, [], "first", 2)
    assert two == {"a": [(9,), (10,)], "b": [(12,)]}
    assert best_of(accepted, [], "first", 0) == accepted


def best_of(accepted: Any, logprobs: list[torch.Tensor], choose: Any, keep: int) -> Any:
    config = Train(choose_explanations=choose, keep_explanations=keep)
    return keep_best(Positives(accepted), logprobs, config).texts


def plain_prompter() -> Prompter:
    return Prompter(tiny_tokenizer())


def encode(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text).input_ids)


def test_shuffled_explanations_belong_to_other_questions():
    accepted = {key: [(n,)] for n, key in enumerate("abcdef")}
    for seed in range(20):
        got = shuffled(accepted, {}, seed)
        assert sorted(got.values()) == sorted(accepted.values())
        assert all(got[key] != accepted[key] for key in accepted)
    assert shuffled(accepted, {}, 1) == shuffled(dict(reversed(accepted.items())), {}, 1)
    assert shuffled({"a": [(1,)]}, {"a": [(1,)]}, 0) == {}
    earlier = {
        "a": [(1,)],
        "b": [(2,)],
        "c": [(3,), (4,)],
    }  # a step with one explanation draws from earlier ones
    drawn = [shuffled({"a": [(1,)]}, earlier, seed)["a"] for seed in range(20)]
    assert {tuple(each) for each in drawn} == {((2,),), ((3,), (4,))}


def test_completion_logprobs_equal_a_full_forward_of_each_sample():
    model = tiny_model(dtype=torch.float64)
    samples = [
        Sample((5, 6, 7, 8), (9, 10, 11)),
        Sample((5, 6, 7), (12,)),
        Sample((5, 6, 7, 8), (13, 14)),
    ]
    scored = completion_logprobs(model, samples, ForwardOptions(0.6, 9))
    for sample, got in zip(samples, scored, strict=True):
        truth = completion_logps(model, sample.prompt_ids, sample.completion_ids, 0.6)
        torch.testing.assert_close(got.double(), truth.detach(), rtol=1e-6, atol=1e-6)
