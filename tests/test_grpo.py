"""The trainer's loss and gradients equal the formulas for every packing of the batch.

`policy_term` is written from the formulas (GRPO arXiv:2402.03300, DAPO 2503.14476, Dr.GRPO
2503.20783, ExP-SFT 2507.02834), in fp64, one token at a time, through complete logits.
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from expo_fast.algorithms import grpo
from expo_fast.algorithms.explanations import ExplanationCounts, Positives
from expo_fast.algorithms.grpo import (
    PolicyLossConfig,
    exp_sft_coef,
    policy_backward,
    policy_samples,
    split_evenly,
)
from expo_fast.algorithms.logprobs import ForwardOptions
from expo_fast.algorithms.rollout import (
    Group,
    attempt_metrics,
    judge_attempts,
    overlong_punishment,
)
from expo_fast.algorithms.sft import sft_backward, sft_samples
from expo_fast.algorithms.trainer import questions_of_step
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.generate import Completion
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.optimizer import StepReport
from expo_fast.modeling.packing import Sample
from expo_fast.ops import group_advantage
from expo_fast.reporting.timing import Phases
from jobs import trainer_of
from judges import (
    assert_gradients_near,
    cispo_loss,
    clipped_loss,
    completion_logps,
    gradients_of,
    kl_estimate,
    max_error,
    sapo_loss,
)
from tiny import tiny_model

N_QUESTIONS = 3
GROUP_SIZE = 4
MAX_LENGTH = 12  # of a completion
SHOTS = (5, 6, 7)
TEMPERATURE = 0.7


def make_config(**changes: Any) -> Train:
    sizes: dict[str, Any] = {
        "num_generations": GROUP_SIZE,
        "prompts_per_step": N_QUESTIONS,
        "max_completion_length": MAX_LENGTH,
    }
    return Train(**(sizes | {"temperature": TEMPERATURE, "pack_tokens": 1000} | changes))


def problem(number: int) -> Problem:
    return Problem(id=f"q{number}", prompt=f"question {number}", answer=str(number))


def groups(rewards: list[list[float | None]]) -> list[Group]:
    """Return a group for each row of rewards, with samples of ragged lengths."""
    random = torch.Generator().manual_seed(3)
    flat = [math.nan if reward is None else reward for row in rewards for reward in row]
    group_ids = torch.arange(len(rewards)).repeat_interleave(GROUP_SIZE)
    advantages = group_advantage(torch.tensor(flat), group_ids).view(-1, GROUP_SIZE).tolist()
    made = []
    for number, row in enumerate(rewards):
        completions = []
        for _ in range(GROUP_SIZE):
            n = int(torch.randint(1, 9, (1,), generator=random))
            ids = torch.randint(8, 100, (n,), generator=random).tolist()
            completions.append(Completion(ids, torch.zeros(n), "stop"))
        group = Group(
            problem=problem(number),
            prompt_ids=(*SHOTS, *range(30, 32 + number)),
            completions=completions,
            texts=[""] * GROUP_SIZE,
            rewards=row,
            advantages=advantages[number],
        )
        made.append(group)
    return made


REWARDS: list[list[float | None]] = [[1, 0, 0, 1], [0, 0, 0, 0], [1, None, 0, 0]]


class Prompter:
    """Stands for the templates: holds the prompt ids of each question."""

    def __init__(self, made: list[Group]):
        self.prompts = {group.problem.id: group.prompt_ids for group in made}

    def solve(self, asked: Problem) -> tuple[int, ...]:
        return self.prompts[asked.id]


def logps(model: Decoder, sample: Sample) -> Tensor:
    return completion_logps(model, sample.prompt_ids, sample.completion_ids, TEMPERATURE)


def with_old_logp(model: Decoder, made: list[Group]) -> list[Group]:
    """Add old log-probs with ratios on both sides of the clip range."""
    random = torch.Generator().manual_seed(9)

    changed = []
    for group in made:
        completions = []
        for done in group.completions:
            logp = completion_logps(model, group.prompt_ids, done.token_ids, TEMPERATURE).detach()
            old_logp = logp + 0.3 * torch.randn(len(logp), generator=random)
            completions.append(replace(done, logp=old_logp.float()))
        changed.append(replace(group, completions=completions))
    return changed


def attempts(made: list[Group], config: Train) -> list[Sample]:
    """Return the trainer's samples. Later updates take the completions' log-probs as old ones."""
    samples = policy_samples(made, config)
    if config.updates_per_batch == 1:
        return samples
    old_logps: dict[tuple[Any, ...], Tensor] = {}
    for group in made:
        for done in group.completions:
            old_logps[group.prompt_ids, tuple(done.token_ids)] = done.logp
    return [
        replace(sample, old_logp=old_logps[sample.prompt_ids, sample.completion_ids])
        for sample in samples
    ]


def policy_term(
    model: Decoder, made: list[Group], config: Train, reference: Decoder | None = None
) -> Tensor:
    """Return the policy term of the loss, from the formulas."""
    scored = scored_attempts(made)
    n_tokens = sum(len(attempt.ids) for attempt in scored)
    total = torch.zeros((), dtype=torch.float64)
    for attempt in scored:
        logp = completion_logps(model, attempt.prompt_ids, attempt.ids, TEMPERATURE)
        old = attempt.old_logp.double() if config.updates_per_batch > 1 else logp.detach()
        ref_logp = None
        if reference is not None:
            ref_logp = completion_logps(reference, attempt.prompt_ids, attempt.ids, TEMPERATURE)
            ref_logp = ref_logp.detach()
        normalisers = {
            "grpo": len(scored) * len(logp),
            "dapo": n_tokens,
            "dr-grpo": len(scored) * MAX_LENGTH,
        }
        for token in range(len(logp)):
            ratio = (logp[token] - old[token]).exp()
            if config.objective == "gspo":
                ratio = (logp - old).mean().exp()
            loss = surrogate(config, ratio, attempt.advantage, logp[token])
            if ref_logp is not None:
                loss = loss + config.kl_coef * kl_estimate(logp[token], ref_logp[token])
            total = total + loss / normalisers[config.loss]
    return total


@dataclass
class Attempt:
    """A completion whose reward is known."""

    prompt_ids: tuple[int, ...]
    ids: list[int]
    old_logp: Tensor
    advantage: Tensor


def scored_attempts(made: list[Group]) -> list[Attempt]:
    """Return the completions with a reward, and their advantages in fp64."""
    scored = []
    for group in made:
        known = [reward for reward in group.rewards if reward is not None]
        rewards = torch.tensor(known, dtype=torch.float64)
        spread = rewards.std() + 1e-4 if rewards.std() > 0 else 1.0
        for done, reward in zip(group.completions, group.rewards, strict=True):
            if reward is not None:
                advantage = (reward - rewards.mean()) / spread
                attempt = Attempt(group.prompt_ids, done.token_ids, done.logp, advantage)
                scored.append(attempt)
    return scored


def surrogate(config: Train, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
    """Return the loss of one token; GSPO's is PPO's with the ratio of the sequence."""
    if config.objective == "cispo":
        return cispo_loss(ratio, advantage, logp, cap=1 + config.clip_high)
    if config.objective == "sapo":
        return sapo_loss(ratio, advantage)
    return clipped_loss(ratio, advantage, config.clip_low, config.clip_high)


def run(model: Decoder, config: Train, samples: list[Sample]) -> tuple[float, dict[str, Tensor]]:
    """Run the trainer's own backward over the packs."""
    model.zero_grad()
    result = policy_backward(Layout(model), samples, PolicyLossConfig.of(config))
    return result.loss, accumulated(model)


def accumulated(model: Decoder) -> dict[str, Tensor]:
    """Return the gradients that backward() has left."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class NoGradSums:
    """Stands for the gradient sums: leaves the gradients where autograd put them."""

    def start_new_term(self) -> None: ...

    def term_norms(self) -> tuple[float, float]:
        return 0.0, 0.0


class RecordedOptimizer:
    """Stands for the optimizer: does not move the weights."""

    skipped = 0
    grad_sums = NoGradSums()

    def step(self, lr: float, max_grad_norm: float) -> StepReport:
        return StepReport(grad_norm=0.0, update_norm=0.0)


class ScriptedGenerator:
    """Stands for the generator: completions of one to three tokens."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, ...]]] = []  # prompts of each call

    def sample(self, requests: list[Any]) -> list[Completion]:
        self.asked.append([tuple(request.prompt_ids) for request in requests])
        lengths = [1 + i % 3 for i in range(len(requests))]
        return [Completion([9] * n, torch.zeros(n), "stop") for n in lengths]


def test_later_updates_take_the_trainers_own_log_probs_as_old_ones():
    """In bf16, the generator's log-probs differ by more than GSPO's clip range."""
    model = tiny_model(dtype=torch.float64)
    # The generator's log-probs are others.
    made = with_old_logp(model, groups([[1, 0, 0, 1], [1, 0, 1, 0]]))
    config = make_config(updates_per_batch=2, prompts_per_step=2)
    first, later = grpo.attempts_of_updates(trainer_of(config, model, None), [made[:1], made[1:]])
    assert len(first) == len(later) == GROUP_SIZE
    assert all(sample.old_logp is None for sample in first)
    for sample in later:
        assert sample.old_logp is not None
        assert max_error(sample.old_logp, logps(model, sample)) <= 1e-5


# Packs hold advantages and weights in fp32, with a relative rounding of 6e-8.
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr-grpo"])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("pack_tokens", [1, 17, 1000])
def test_policy_term_equals_the_formula(loss: str, off_policy: bool, pack_tokens: int):
    model = tiny_model(dtype=torch.float64)
    updates = N_QUESTIONS if off_policy else 1
    config = make_config(loss=loss, pack_tokens=pack_tokens, updates_per_batch=updates)
    made = with_old_logp(model, groups(REWARDS))
    truth = policy_term(model, made, config)
    expected = gradients_of(model, truth)
    value, got = run(model, config, attempts(made, config))
    assert_gradients_near(got, expected, 1e-6)
    if off_policy:  # on policy, sequences of zero advantage are skipped
        assert value == pytest.approx(truth.item(), rel=1e-6)


@pytest.mark.parametrize("objective", ["gspo", "cispo", "sapo"])
@pytest.mark.parametrize("pack_tokens", [1, 1000])
def test_other_objectives_equal_their_formulas(objective: str, pack_tokens: int):
    model = tiny_model(dtype=torch.float64)
    clip = {"clip_low": 0.05, "clip_high": 0.05} if objective == "gspo" else {}
    config = make_config(
        objective=objective,
        pack_tokens=pack_tokens,
        updates_per_batch=N_QUESTIONS,
        **clip,
    )
    made = with_old_logp(model, groups(REWARDS))
    truth = policy_term(model, made, config)
    expected = gradients_of(model, truth)
    value, got = run(model, config, attempts(made, config))
    assert_gradients_near(got, expected, 1e-6)
    assert value == pytest.approx(truth.item(), rel=1e-6)


def test_the_kl_term_includes_sequences_without_advantage():
    model, reference = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64, seed=1)
    config = make_config(kl_coef=0.1)
    made = groups(REWARDS)
    truth = policy_term(model, made, config, reference)
    expected = gradients_of(model, truth)
    trainer = trainer_of(config, model, None, reference=reference)
    samples = grpo.with_reference_logprobs(trainer, policy_samples(made, config))
    assert len(samples) == N_QUESTIONS * GROUP_SIZE - 1  # the one without a reward
    value, got = run(model, config, samples)
    assert_gradients_near(got, expected, 1e-6)
    assert value == pytest.approx(truth.item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "seq_sum"])
@pytest.mark.parametrize("pack_tokens", [1, 1000])
def test_exp_sft_term_equals_the_formula(reduction: str, pack_tokens: int):
    model = tiny_model(dtype=torch.float64)
    made = groups(REWARDS)
    explained = [  # two of three questions, one of them twice
        (problem(0), [(50, 51, 52, 1), (60, 1)]),
        (problem(2), [(70, 71, 1)]),
    ]
    truth = torch.zeros((), dtype=torch.float64)
    prompter: Any = Prompter(made)
    for question, completions in explained:
        for ids in completions:
            logp = completion_logps(model, prompter.solve(question), ids, TEMPERATURE)
            each = logp.mean() if reduction == "token_mean" else logp.sum()
            truth = truth - 0.04 * each / (N_QUESTIONS * len(completions))
    expected = gradients_of(model, truth)
    samples = sft_samples(
        explained, prompter, coef=0.04, n_questions=N_QUESTIONS, reduction=reduction
    )
    model.zero_grad()
    options = ForwardOptions(TEMPERATURE, pack_tokens)
    result = sft_backward(Layout(model), samples, options)
    assert result.loss == pytest.approx(truth.item(), rel=1e-6)
    assert_gradients_near(accumulated(model), expected, 1e-6)
    means = [logps(model, sample).mean() for sample in samples]
    assert result.nll == pytest.approx(-torch.stack(means).sum().item() / 3, rel=1e-6)
    # In the policy loss, neither clip, KL nor entropy may touch these rows.
    config = make_config(pack_tokens=pack_tokens, clip_low=0.01, clip_high=0.01, entropy_coef=0.5)
    value, got = run(model, config, samples)
    assert value == pytest.approx(truth.item(), rel=1e-6)
    assert_gradients_near(got, expected, 1e-6)


EXPLAINED = {"q0": [(50, 51, 52, 1), (60, 1)], "q2": [(70, 71, 1)]}  # two of three questions


@pytest.mark.parametrize("method", ["grpo", "expo-grpo", "expert-grpo", "star"])
def test_an_update_is_the_sum_of_the_terms_of_its_method(method: str):
    model, made = tiny_model(dtype=torch.float64), groups(REWARDS)
    term = {} if method == "grpo" else {"exp_sft_coef": 0.3, "exp_sft_schedule": "linear"}
    config = make_config(method=method, steps=10, **term)
    prompter: Any = Prompter(made)
    positives = {} if method == "grpo" else EXPLAINED
    policy = policy_term(model, made, config) if method != "star" else torch.zeros(())
    sft = torch.zeros((), dtype=torch.float64)
    coef = 0.3 * 0.8  # after two of ten steps
    for question, completions in positives.items():
        for ids in completions:
            logp = completion_logps(model, prompter.prompts[question], ids, TEMPERATURE).mean()
            sft = sft - coef * logp / (N_QUESTIONS * len(completions))
    expected = gradients_of(model, policy + sft)
    model.zero_grad()
    trainer = trainer_of(config, model, prompter, make_optimizer=RecordedOptimizer)
    (mine,) = grpo.attempts_of_updates(trainer, [made])
    row = grpo.update_weights(trainer, made, mine, Positives(positives), 2, Phases())
    assert_gradients_near(accumulated(model), expected, 1e-6)
    assert row["exp_sft_coef"] == (None if method == "grpo" else pytest.approx(0.24))


def test_fp32_gradient_does_not_depend_on_the_packing():
    model = tiny_model()
    made = groups(REWARDS)
    _, one_pack = run(model, make_config(), policy_samples(made, make_config()))
    for pack_tokens in (1, 20, 33):
        config = make_config(pack_tokens=pack_tokens)
        _, split = run(model, config, policy_samples(made, config))
        assert_gradients_near(split, one_pack, 2e-6)


def test_statistics_do_not_depend_on_the_packing():
    model = tiny_model(dtype=torch.float64)
    config = make_config(updates_per_batch=N_QUESTIONS, kl_coef=0.1)
    samples = attempts(with_old_logp(model, groups(REWARDS)), config)
    likely = [logps(model, sample).detach() for sample in samples]
    samples = [
        replace(sample, ref_logp=(logp + 0.1 * i).float())
        for i, (sample, logp) in enumerate(zip(samples, likely, strict=True))
    ]

    def statistics(pack_tokens: int) -> dict[str, float]:
        loss = PolicyLossConfig.of(replace(config, pack_tokens=pack_tokens))
        return vars(policy_backward(Layout(model), samples, loss))

    one_pack = statistics(1000)
    assert one_pack["kl"] > 0 and one_pack["clip_low"] > 0 and one_pack["clip_high"] > 0
    for pack_tokens in (1, 20, 33):
        assert statistics(pack_tokens) == pytest.approx(one_pack, rel=1e-5)


def test_sequences_without_gradient_are_not_packed_but_counted():
    config = make_config()
    samples = policy_samples(groups(REWARDS), config)
    assert len(samples) == 4 + 0 + 3  # the all-fail group and the unscored sample are left out
    weights = [sample.row_weight * len(sample.completion_ids) for sample in samples]
    assert weights == pytest.approx([1 / 11] * 7)  # N = 12 - 1


def test_gradient_checkpointing_changes_no_bit():
    plain, again = tiny_model(), tiny_model()
    again.checkpointing = True
    samples = policy_samples(groups(REWARDS), make_config())
    _, stored = run(plain, make_config(), samples)
    _, recomputed = run(again, make_config(), samples)
    assert all(torch.equal(stored[name], recomputed[name]) for name in stored)


def test_each_epoch_visits_each_problem_once_in_an_order_of_the_seed():
    problems = [problem(number) for number in range(10)]
    seen = [p.id for step in range(4) for p in questions_of_step(problems, step, 5, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(p.id for p in problems)
    assert seen[:10] != seen[10:]
    assert [p.id for p in questions_of_step(problems, 2, 5, seed=1)] == seen[10:15]
    assert [p.id for p in questions_of_step(problems, 2, 5, seed=2)] != seen[10:15]
    for step in range(20):  # 4 does not divide 10, and yet no question is twice in a batch
        assert len({p.id for p in questions_of_step(problems, step, 4, seed=1)}) == 4


def test_a_batch_is_split_into_equal_parts():
    made = groups([*REWARDS, [0.0] * GROUP_SIZE])
    assert [[group.problem.id for group in part] for part in split_evenly(made, 2)] == [
        ["q0", "q1"],
        ["q2", "q3"],
    ]


def test_parts_differ_by_one_question_at_most_and_none_is_empty():
    made = groups([*REWARDS, [0.0] * GROUP_SIZE, [1.0] * GROUP_SIZE])
    assert [len(part) for part in split_evenly(made, 3)] == [1, 2, 2]
    assert [len(part) for part in split_evenly(made[:2], 3)] == [1, 1]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.1, 0.075, 0.05, 0.025, 0.0]),
        ("cosine", [0.1, 0.0853553, 0.05, 0.0146447, 0.0]),
    ],
)
def test_the_coefficient_goes_to_zero_at_the_end_of_the_run(schedule: str, expected: list[float]):
    config = make_config(exp_sft_coef=0.1, exp_sft_schedule=schedule, steps=4)
    assert [exp_sft_coef(config, step) for step in range(5)] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("most", "expected"), [(1.0, "q0 q1 q2 q3"), (0.5, "q0 q1 q2"), (0.3, "q1"), (0.0, "q1")]
)
def test_questions_are_explained_up_to_an_accuracy(most: float, expected: str):
    made = groups([*REWARDS, [None] * GROUP_SIZE])  # accuracies 1/2, 0, 1/3 and unknown
    questions = grpo.questions_with_sft_term(made, make_config(exp_sft_max_accuracy=most))
    assert " ".join(question.id for question in questions) == expected


class SamplingPrompter:
    """Stands for the templates: a prompt is the number of its question."""

    stop_strings = ()

    def solve(self, asked: Problem) -> tuple[int, ...]:
        return (int(asked.id[1:]),)

    def text(self, ids: list[int]) -> str:
        return ""


@pytest.mark.parametrize("again", [0, 1, 9])
def test_dynamic_sampling_replaces_groups_of_equal_rewards(again: int):
    problems = [problem(number) for number in range(12)]

    def reward(asked: list[Problem], texts: list[str], done: list[Completion]) -> list[float]:
        """Every fourth question has unequal rewards."""
        return [
            float(question.id in ("q0", "q4", "q8") and i % GROUP_SIZE == 0)
            for i, question in enumerate(asked)
        ]

    # The length penalty gives advantages to equal rewards; those groups are replaced too.
    config = make_config(method="grpo", dynamic_sampling=again, overlong_buffer=11)
    prompter = SamplingPrompter()
    trainer = trainer_of(
        config,
        None,
        prompter,
        problems=problems,
        reward=reward,
        generator=ScriptedGenerator(),
    )
    sampled = grpo.with_advantages(grpo.sample_groups(trainer, 0, Phases()), config)
    kept = grpo.groups_to_learn_from(sampled, config)
    asked = [group.problem.id for group in sampled]
    assert len(asked) == len(set(asked))
    first = [question.id for question in questions_of_step(problems, 0, N_QUESTIONS, config.seed)]
    assert asked[:N_QUESTIONS] == first
    assert all(len(group.completions) == len(group.advantages) == GROUP_SIZE for group in sampled)
    assert all(any(group.advantages) for group in sampled)
    if again == 0:
        assert kept == sampled
        assert len(kept) == N_QUESTIONS
    if again == 9:
        assert [group.problem.id for group in kept] == [
            name for name in asked if int(name[1:]) % 4 == 0
        ]
        assert len(kept) == N_QUESTIONS


def test_a_group_whose_rewards_differ_by_rounding_has_no_gradient_and_counts_so():
    third = 1 / 3
    rewards: list[list[float | None]] = [
        [third, 0.1 + third - 0.1, third, third],
        [1e6, 1e6 + 0.5, 1e6, 1e6 + 1],
    ]
    assert rewards[0][0] != rewards[0][1]
    constant, far_from_0 = grpo.with_advantages(groups(rewards), make_config())
    assert not any(constant.advantages) and not constant.has_unequal_rewards
    assert far_from_0.advantages == pytest.approx([-0.783, 0.261, -0.783, 1.306], abs=1e-3)
    assert far_from_0.has_unequal_rewards
    assert attempt_metrics([constant, far_from_0])["frac_reward_zero_std"] == 0.5


def test_overlong_completions_are_punished_softly():
    config = make_config(max_completion_length=12, overlong_buffer=4)
    lengths = {5: 0, 8: 0, 9: 0.25, 11: 0.75, 12: 1.0}
    for n, punishment in lengths.items():
        assert (
            overlong_punishment(Completion([9] * n, torch.zeros(n), "stop"), config) == punishment
        )
        assert overlong_punishment(Completion([9] * n, torch.zeros(n), "stop"), make_config()) == 0


def test_the_generation_budget_is_the_same_for_all_methods():
    for method in ("expo-grpo", "grpo", "expert-grpo", "star", "expo-dpo", "expert-dpo"):
        config = make_config(method=method, generation_budget=12, explanations_per_question=8)
        assert config.group_size + config.n_explanations == 12
        assert config.n_explanations == (8 if method in ("expo-grpo", "star", "expo-dpo") else 0)
    assert (
        make_config(generation_budget=12, exp_sft_coef=0.0).group_size == 12
    )  # no term needs explanations
    with pytest.raises(ValueError, match=r"generation_budget=9: need at least 10, 8 of them"):
        make_config(generation_budget=9, explanations_per_question=8)


@pytest.mark.parametrize("reason", ["stop", "length", "error"])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_an_attempt_with_an_error_has_no_reward(reason: str, mask_truncated: bool):
    """Its tokens end where the logits were not finite, so it is not trained on."""
    config = make_config(num_generations=2, mask_truncated=mask_truncated)
    completions = [Completion([9], torch.zeros(1), reason), Completion([9], torch.zeros(1), "stop")]
    texts = SimpleNamespace(text=str, solve=lambda asked: (5,))
    (group,) = judge_attempts([problem(0)], completions, texts, lambda *_: [1.0, 0.0], config)  # pyright: ignore
    masked = reason == "error" or (mask_truncated and reason == "length")
    assert group.rewards == [None if masked else 1.0, 0.0]


def test_metrics_of_attempts_are_those_computed_by_hand():
    row = attempt_metrics(groups(REWARDS))
    assert row["reward"] == pytest.approx((0.5 + 0 + 1 / 3) / 3)
    assert row["frac_all_fail"] == pytest.approx(1 / 3)
    assert row["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert row["reward_std"] == pytest.approx((3**-0.5 + 0 + 3**-0.5) / 3)
    assert row["completions/clipped_ratio"] == row["completions/error_ratio"] == 0
    assert row["own/leak_rate"] == 0
    texts = ["The given answer is 5.", "3 + 4 = 7", "", ""]
    leaky = [replace(group, texts=texts) for group in groups(REWARDS)]
    assert attempt_metrics(leaky)["own/leak_rate"] == 1 / 4


def test_metrics_of_explanations_are_null_without_explanations():
    assert set(ExplanationCounts().metrics().values()) == {None, 0}
    counts = ExplanationCounts(n_sampled=8, n_right=3, n_leaked=1, n_unfit=2)
    row = counts.with_kept({"q0": [(1, 2), (3, 4, 5, 6)]}, n_questions=4).metrics()
    assert row["exp/rate"] == 0.25
    assert row["exp/accepted"] == 2
    assert row["exp/mean_length"] == 3
    assert row["exp/leak_rate"] == pytest.approx(1 / 3)
    assert row["exp/unfit_rate"] == pytest.approx(2 / 3)
