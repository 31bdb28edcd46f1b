"""The problems of a training run, and the checks that they fit the method and the model."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from expo_fast.algorithms.diagnostics import expert_ids
from expo_fast.algorithms.explanations import answer_after
from expo_fast.config import Train
from expo_fast.data.answer_grading import decide, last_boxed, tidy
from expo_fast.data.problems import Problem, load_problems, overlap, split_examples
from expo_fast.data.prompts import Prompter, boxed, check_length, expert_text
from expo_fast.reward_functions import check_reward_columns


@dataclass(frozen=True)
class TrainingData:
    """The problems, worked examples and held-out problems of a run."""

    problems: list[Problem]
    shots: tuple[Problem, ...]
    """Worked examples, none of which is among the problems."""
    held_out: list[Problem]
    """Problems of the evaluations; empty if the run has no evaluations."""


def load_training_data(config: Train) -> TrainingData:
    """Load the problems of a run.

    Raise ValueError if they do not fit the configuration. Warn if training and evaluation data
    overlap.
    """
    problems = load_problems(config.train_data, levels=config.levels)
    shots_source = problems
    if config.shots_data:
        shots_source = load_problems(config.shots_data, levels=config.levels)
    shots, problems = split_examples(shots_source, config.shots, problems)
    held_out = []
    if config.eval_every:
        held_out = load_problems(config.eval_data, levels=config.levels, limit=config.eval_limit)
        check_answers(config.eval_data, held_out)
    if len(problems) < config.prompts_per_step:
        raise ValueError(
            f"{config.train_data} has {len(problems)} problems without {config.shots} worked "
            f"examples: need at least prompts_per_step={config.prompts_per_step}"
        )
    check_columns(config, problems)
    both = overlap([*shots, *problems], held_out)
    if both:
        warnings.warn(
            f"{len(both)} problems of {config.eval_data} are also in {config.train_data}, "
            f"the first is {both[0].id}: the evaluation is not held out",
            stacklevel=2,
        )
    return TrainingData(problems, shots, held_out)


def check_answers(source: str, problems: Sequence[Problem]) -> None:
    """Raise ValueError if a problem has no answer, which is needed to judge attempts."""
    for problem in problems:
        if not problem.answer:
            raise ValueError(f"{source}: problem {problem.id} has no 'answer' to judge attempts by")


def check_columns(config: Train, problems: Sequence[Problem]) -> None:
    """Raise ValueError if a problem lacks a column that the method needs.

    Warn if the method trains on solutions that contradict their row's answer.
    """
    spec = config.spec
    contradicting = []
    for problem in problems:
        trains_on_solution = spec.needs_solutions or (
            spec.sft_source == "data" and problem.pair is None
        )
        if trains_on_solution:
            solution = expert_text(problem)  # raises ValueError if there is none
            if problem.answer and boxes_another_answer(solution, problem.answer):
                contradicting.append(problem)
        if spec.chosen_source == "data" and problem.pair is None:
            raise ValueError(
                f"problem {problem.id} has no 'chosen' and 'rejected' columns: "
                f"--method {config.method} needs both; expo-dpo and expert-dpo make pairs from "
                "attempts"
            )
        if needs_answer(config, problem) and not problem.answer:
            has = "a preference pair" if problem.pair else "a solution without a box"
            raise ValueError(
                f"problem {problem.id} has {has} and no 'answer': "
                f"--method {config.method} needs one to judge attempts; --method dpo trains on "
                "pairs without answers"
            )
        if config.reward:
            check_reward_columns(config.train_data, problem)
    if contradicting:
        warnings.warn(
            f"{len(contradicting)} solutions of {config.train_data} box an answer that differs "
            f"from their row's 'answer', the first is {contradicting[0].id}: the run trains on "
            "them unchanged",
            stacklevel=2,
        )


def needs_answer(config: Train, problem: Problem) -> bool:
    """Return whether the run needs the answer: to judge attempts, or to explain it.

    A user's reward function may judge by the solution.
    """
    if not config.spec.needs_answers:
        return False
    judged_by_solution = bool(config.reward_functions and problem.solution)
    return config.explains or not judged_by_solution


def boxes_another_answer(solution: str, answer: str) -> bool:
    """Return whether the last box of a solution differs from the answer, False if unknown."""
    boxed = last_boxed(solution) or ""
    return decide(tidy(answer), tidy(boxed)) is False


def check_lengths(
    config: Train,
    prompter: Prompter,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    context: int,
) -> None:
    """Raise ValueError if a problem does not fit the model's context."""
    new = config.max_completion_length
    for problem in problems:
        prompt = prompter.explain(problem) if config.explains else prompter.solve(problem)
        check_length(problem, prompt, new=new, context=context)
        for text in texts_trained_on(config, prompter, problem):
            check_length(problem, prompter.solve(problem) + text, new=0, context=context)
    for problem in held_out:
        check_length(problem, prompter.solve(problem), new=new, context=context)


def texts_trained_on(
    config: Train, prompter: Prompter, problem: Problem
) -> Iterator[tuple[int, ...]]:
    """Yield the token ids of the data's texts that the method trains on."""
    spec = config.spec
    if spec.needs_solutions:
        yield prompter.expert(problem)
    if spec.sft_source == "data":
        yield prompter.target(problem)
    if spec.chosen_source == "data" and problem.pair:
        for text in problem.pair:
            yield prompter.completion(problem, text)


def check_token_ids(
    config: Train,
    prompter: Prompter,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    vocabulary: int,
) -> None:
    """Raise ValueError if a text of the run has a token that the model's embedding lacks.

    vocabulary: the number of rows of the embedding. A tokenizer may have more tokens, if no text
        contains them.
    """
    if fits_embedding(prompter, vocabulary):
        return
    for problem in problems:
        for ids in (
            *texts_trained_on(config, prompter, problem),
            *run_texts(config, prompter, problem),
        ):
            check_ids(problem, ids, prompter, vocabulary)
    for problem in held_out:
        check_ids(problem, prompter.solve(problem), prompter, vocabulary)


def fits_embedding(prompter: Prompter, vocabulary: int) -> bool:
    """Return whether every token of the tokenizer has a row in the embedding."""
    return max(prompter.tokenizer.get_vocab().values()) < vocabulary


def check_ids(problem: Problem, ids: Sequence[int], prompter: Prompter, vocabulary: int) -> None:
    """Raise ValueError if a text of a problem has a token that the embedding lacks."""
    token = max(ids, default=0)
    if token >= vocabulary:
        text = prompter.tokenizer.convert_ids_to_tokens(token)
        raise ValueError(
            f"problem {problem.id}: its texts have the token {text!r} with the id {token}, but the "
            f"model's embedding has {vocabulary} rows: use the model's own tokenizer, or a model "
            "with an embedding for each of its tokens"
        )


def run_texts(config: Train, prompter: Prompter, problem: Problem) -> Iterator[tuple[int, ...]]:
    """Yield the token ids of the texts that the run makes from a problem, such as prompts."""
    yield prompter.solve(problem)
    if config.explains:
        yield prompter.explain(problem)
        answer = answer_after(problem, (), prompter, mask=False)
        yield (*answer.prompt_ids, *answer.completion_ids)
    if config.append_answer:
        yield prompter.longer((), boxed(problem.answer))
    samples_text = config.explains or config.spec.samples_pairs
    if samples_text and prompter.stop_strings:
        yield prompter.longer((), "")  # the end of a turn, which replaces the stop string
    if config.spec.samples_attempts and config.diagnose:
        expert = expert_ids(problem, prompter)
        if expert is not None:
            yield expert
