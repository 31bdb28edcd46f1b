"""The problems of a training run, and the checks that they fit the method and the model."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from expo_fast.algorithms.diagnostics import expert_ids
from expo_fast.algorithms.explanations import answer_after
from expo_fast.config import Train
from expo_fast.data.answer_grading import decide, last_boxed, tidy
from expo_fast.data.control_tokens import found_in_prompts
from expo_fast.data.problem_table import ProblemTable
from expo_fast.data.problems import (
    Problem,
    hold_out,
    join_sources,
    load_problems,
    overlap,
    subset,
    without,
    worked_examples,
)
from expo_fast.data.prompts import Prompter, boxed, check_length, expert_text
from expo_fast.data.row_blocks import (
    HAS_ANSWER,
    HAS_BOX,
    HAS_PAIR,
    HAS_SOLUTION,
    IS_TEXT,
    MAY_DIFFER,
)
from expo_fast.reward_functions import ARGUMENTS, check_reward_columns

MARGIN = 64  # tokens by which a prompt may be longer than the sum of its parts


@dataclass(frozen=True)
class TrainingData:
    """The problems, worked examples and held-out problems of a run."""

    sources: Sequence[Sequence[Problem]]
    """The problems to train on, by source of the data."""
    shots: tuple[Problem, ...]
    """Worked examples, none of which is among the problems."""
    held_out: Sequence[Problem]
    """Problems of the evaluations; empty if the run has no evaluations."""
    notes: tuple[str, ...] = ()
    """What the user should know of the choice of these problems."""

    @cached_property
    def problems(self) -> ProblemTable:
        """The problems to train on, of all sources."""
        return ProblemTable.joined([ProblemTable.of(source) for source in self.sources])


def load_training_data(config: Train) -> TrainingData:
    """Load the problems of a run and check them.

    Raise ValueError if they do not fit the configuration. Warn if training and evaluation data
    overlap.
    """
    data = select_problems(config)
    check_numbers(config, data)
    check_columns(config, data.problems)
    if asks_in_vain(config, data.problems):
        warnings.warn(
            f"no text of {in_words(config.data_sources)} has a box, but the instruction after each "
            'question asks for one: --instruction "" leaves it out',
            stacklevel=2,
        )
    trained = ProblemTable.joined([ProblemTable.of(data.shots), data.problems])
    both = overlap(trained, data.held_out)
    if both:
        warnings.warn(
            f"{len(both)} problems of {in_words(config.eval_sources)} are also in "
            f"{in_words(config.data_sources)}, the first is {both[0].id}: the evaluation is not "
            "held out",
            stacklevel=2,
        )
    return data


def select_problems(config: Train) -> TrainingData:
    """Load the data of a run, and divide it into worked examples, problems and held-out problems.

    Raise ValueError for data that cannot be read.
    """
    sources = load_sources(config, config.data_sources, answers=needs_answers(config))
    held_out: Sequence[Problem] = []
    notes: list[str] = []
    if config.eval_every and config.eval_sources:
        held_out = load_held_out(config)
    elif config.eval_every:
        problems = ProblemTable.joined(sources)
        held_out = share_of(config, problems)
        sources = [without(source, held_out) for source in sources]
        notes.append(note_of_share(config, problems, held_out))
    if config.shots_data:
        candidates = load_problems(
            config.shots_data,
            levels=config.levels,
            columns=config.columns,
            all_columns=False,
        )
    else:
        candidates = ProblemTable.joined(sources)
    shots, _ = worked_examples(candidates, config.n_shots)
    sources = [without(source, shots) for source in sources]
    return TrainingData(sources, shots, held_out, tuple(notes))


def load_sources(
    config: Train,
    sources: Sequence[str],
    *,
    answers: bool,
    all_columns: bool = True,
    limit: int | None = None,
) -> list[ProblemTable]:
    """Return the problems of each source, with distinct ids.

    answers, all_columns, limit: as for `load_problems`.
    """
    parts = []
    for source in sources:
        part = load_problems(
            source,
            levels=config.levels,
            limit=limit,
            columns=config.columns,
            all_columns=all_columns,
            answers=answers,
        )
        parts.append(part)
    return join_sources(parts)


def load_held_out(config: Train) -> ProblemTable:
    """Return the problems of `eval_data`, at most `eval_limit` of them."""
    limit = config.eval_limit
    parts = load_sources(
        config,
        config.eval_sources,
        answers=True,
        all_columns=False,
        limit=limit,
    )
    held_out = subset(ProblemTable.joined(parts), limit, seed=0)
    check_answers(in_words(config.eval_sources), held_out)
    return held_out


def share_of(config: Train, problems: ProblemTable) -> Sequence[Problem]:
    """Return the part of the training data that is held out; empty if no problem has an answer."""
    judged = problems.select(problems.has(HAS_ANSWER))
    if not judged:
        return []
    return hold_out(judged, config.eval_fraction, config.eval_limit)


def note_of_share(config: Train, problems: Sequence[Problem], held_out: Sequence[Problem]) -> str:
    """Return a line about the part of the training data that is held out."""
    source = in_words(config.data_sources)
    if not held_out:
        return (
            f"no evaluation: no row of {source} has an answer to judge attempts by; --eval-data "
            "names data with answers"
        )
    return (
        f"held out {len(held_out)} of {len(problems)} problems of {source} for evaluation, chosen "
        f"by a hash of the question (--eval-fraction {config.eval_fraction:g}, at most "
        f"--eval-limit {config.eval_limit}); --eval-data names other data"
    )


def in_words(sources: Sequence[str]) -> str:
    """Return the names of sources for a message."""
    return ", ".join(sources)


def check_numbers(config: Train, data: TrainingData) -> None:
    """Raise ValueError if there are fewer problems than a batch has."""
    if config.data_weights:
        wanted = config.questions_of_sources
        for name, problems, n in zip(config.data_sources, data.sources, wanted, strict=True):
            if len(problems) < n:
                raise ValueError(
                    f"{name} has {len(problems)} problems: data_weights={config.data_weights} "
                    f"needs {n} of the prompts_per_step={config.prompts_per_step} of a batch"
                )
    n_problems = len(data.problems)
    if n_problems < config.prompts_per_step:
        n_held_out = len(data.held_out) if data.notes else 0  # of these problems
        without = f" without {config.n_shots} worked examples" if config.n_shots else ""
        beside = f" beside the {n_held_out} that are held out" if n_held_out else ""
        advice = "; --eval-every 0 holds out none, as does --eval-data" if n_held_out else ""
        raise ValueError(
            f"{in_words(config.data_sources)} has {n_problems} problems{without}: need at least "
            f"prompts_per_step={config.prompts_per_step}{beside}{advice}"
        )


def check_answers(source: str, problems: Sequence[Problem]) -> None:
    """Raise ValueError if a problem has no answer, which is needed to judge attempts."""
    table = ProblemTable.of(problems)
    for problem in table.select(~table.has(HAS_ANSWER)):
        raise ValueError(f"{source}: problem {problem.id} has no 'answer' to judge attempts by")


def check_columns(config: Train, problems: Sequence[Problem]) -> None:
    """Raise ValueError if a problem lacks a column that the method needs.

    Warn if the method trains on solutions that contradict their row's answer.
    """
    table = ProblemTable.of(problems)
    for problem in table.select(may_be_unfit(config, table)):
        check_problem(config, problem)
    contradicting = []
    for problem in table.select(trained_solutions(config, table) & table.has(MAY_DIFFER)):
        if boxes_another_answer(expert_text(problem), problem.answer):
            contradicting.append(problem)
    if contradicting:
        warnings.warn(
            f"{len(contradicting)} solutions of {in_words(config.data_sources)} box an answer that "
            f"differs from their row's 'answer', the first is {contradicting[0].id}: the run "
            "trains on them unchanged",
            stacklevel=2,
        )


def trained_solutions(config: Train, table: ProblemTable) -> np.ndarray:
    """Return whether the method trains on the solution of each problem: (n,) bool."""
    spec = config.spec
    if spec.needs_solutions:
        return np.ones(len(table), dtype=bool)
    if spec.sft_source == "data":
        return ~table.has(HAS_PAIR)
    return np.zeros(len(table), dtype=bool)


def may_be_unfit(config: Train, table: ProblemTable) -> np.ndarray:
    """Return whether `check_problem` may refuse each problem: (n,) bool."""
    spec = config.spec
    unfit = trained_solutions(config, table) & ~table.has(HAS_SOLUTION)
    if spec.sft_source != "data":
        unfit |= table.has(IS_TEXT)
    if spec.chosen_source == "data":
        unfit |= ~table.has(HAS_PAIR)
    if needs_answers(config):
        unfit |= ~table.has(HAS_ANSWER)
    if config.reward and not table.names.isdisjoint(ARGUMENTS):
        unfit[:] = True
    return unfit


def check_problem(config: Train, problem: Problem) -> None:
    """Raise ValueError if a problem lacks a column that the method needs."""
    spec = config.spec
    if problem.is_text and spec.sft_source != "data":
        raise ValueError(
            f"problem {problem.id} is plain text (a row with 'text' and no question): only "
            f"--method sft trains on it, not {config.method}"
        )
    if spec.needs_solutions or (spec.sft_source == "data" and problem.pair is None):
        expert_text(problem)  # raises ValueError if there is no solution
    if spec.chosen_source == "data" and problem.pair is None:
        raise ValueError(
            f"problem {problem.id} has no 'chosen' and 'rejected' columns: "
            f"--method {config.method} needs both; expo-dpo and expert-dpo make pairs from "
            "attempts"
        )
    if needs_answers(config) and not problem.answer:
        raise ValueError(missing_answer(config, problem))
    if config.reward:
        check_reward_columns(in_words(config.data_sources), problem)


def asks_in_vain(config: Train, problems: Sequence[Problem]) -> bool:
    """Return whether the instruction asks for a box, which no text of the data has."""
    sources = (config.spec.sft_source, config.spec.chosen_source)
    if "data" not in sources or "\\boxed" not in config.instruction:
        return False
    table = ProblemTable.of(problems)
    asked = ~table.has(IS_TEXT)
    # A solution without a box gets one with its answer.
    gets_box = ~table.has(HAS_PAIR) & table.has(HAS_ANSWER)
    has_box = table.has(HAS_BOX) | gets_box
    return bool(asked.any()) and not bool((asked & has_box).any())


def needs_answers(config: Train) -> bool:
    """Return whether the run needs the answers of its problems: to judge attempts, or to explain.

    A user's reward function judges attempts by what it likes.
    """
    if not config.spec.samples_attempts:
        return False
    return config.samples_explanations or not config.reward_functions


def missing_answer(config: Train, problem: Problem) -> str:
    """Return a sentence about a problem without the answer that the run needs."""
    has = ""
    if problem.pair:
        has = "a preference pair and "
    elif problem.solution:
        has = "a solution without a box and "
    use = "explain" if config.samples_explanations else "judge attempts"
    return (
        f"problem {problem.id} has {has}no 'answer': --method {config.method} needs one to {use}; "
        "--method dpo trains on pairs without answers, sft on solutions"
    )


def boxes_another_answer(solution: str, answer: str) -> bool:
    """Return whether the last box of a solution differs from the answer, False if unknown."""
    theirs = last_boxed(solution) or ""
    return decide(tidy(answer), tidy(theirs)) is False


def check_lengths(
    config: Train,
    prompter: Prompter,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    context: int,
) -> None:
    """Raise ValueError if a problem does not fit the model's context.

    Only problems that may not fit by the number of their characters are rendered.
    """
    table = ProblemTable.of(problems)
    for problem in table.select(may_be_long(config, prompter, table, context)):
        sampled = config.max_new_tokens if config.spec.samples_attempts else 0
        prompt = longest_prompt(config, prompter, problem)
        check_length(problem, prompt, new=sampled, context=context)
        for text in texts_trained_on(config, prompter, problem):
            check_length(problem, prompter.solve(problem) + text, new=0, context=context)
    for problem in held_out:
        prompt = prompter.solve(problem)
        check_length(problem, prompt, new=config.max_new_tokens, context=context)


def may_be_long(config: Train, prompter: Prompter, table: ProblemTable, context: int) -> np.ndarray:
    """Return whether each problem may not fit the context, by the lengths of its texts: (n,) bool.

    Prompts with the same roles differ only in their texts. So none is longer than the first one of
    its form and the most tokens that its own texts can have.
    """
    trains_on_texts = trains_on_data(config)
    if trains_on_texts and prompter.turn.opened:
        # The template may refuse a text, depending on how it begins.
        return np.ones(len(table), dtype=bool)
    _, first, form = np.unique(table.numbers("form"), return_index=True, return_inverse=True)
    first_lengths = [length_of(config, prompter, table[int(i)]) for i in first]
    longest = np.array(first_lengths, dtype=np.int64)[form] + MARGIN
    longest += table.numbers("asked")
    if trains_on_texts:
        longest += table.numbers("trained")
    return longest > context


def longest_prompt(config: Train, prompter: Prompter, problem: Problem) -> tuple[int, ...]:
    """Return the prompt of a problem, with its answer if the run samples explanations."""
    if config.samples_explanations:
        return prompter.explain(problem)
    return prompter.solve(problem)


def length_of(config: Train, prompter: Prompter, problem: Problem) -> int:
    """Return the tokens of a problem's longest sequence in the run."""
    prompt = longest_prompt(config, prompter, problem)
    sampled = config.max_new_tokens if config.spec.samples_attempts else 0
    lengths = [len(prompt) + sampled]
    for text in texts_trained_on(config, prompter, problem):
        lengths.append(len(prompter.solve(problem)) + len(text))
    return max(lengths)


def trains_on_data(config: Train) -> bool:
    """Return whether `texts_trained_on` yields a text for a problem."""
    spec = config.spec
    return spec.needs_solutions or "data" in (spec.sft_source, spec.chosen_source)


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


def warn_of_control_tokens(prompter: Prompter, problems: Sequence[Problem]) -> None:
    """Warn if questions have control tokens, unless the prompts have them as plain text."""
    if prompter.escape:
        return
    table = ProblemTable.of(problems)
    tokens = []
    for token in prompter.control_tokens:
        # A search in the bytes is fast, and nearly all data have none.
        if any(token.encode() in store.content for store in table.stores):
            tokens.append(token)
    found = found_in_prompts(table, tokens) if tokens else []
    if found:
        problem_id, token = found[0]
        warnings.warn(
            f"the questions of {len(found)} of {len(problems)} problems have control tokens of the "
            f"tokenizer, the first is {token!r} in problem {problem_id}: --escape-special-tokens "
            "writes them as plain text",
            stacklevel=2,
        )


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
    if config.samples_explanations:
        yield prompter.explain(problem)
        answer = answer_after(problem, (), prompter, mask=False)
        yield (*answer.prompt_ids, *answer.completion_ids)
    if config.append_answer:
        yield prompter.longer((), boxed(problem.answer))
    samples_text = config.samples_explanations or config.spec.samples_pairs
    if samples_text and prompter.stop_strings:
        yield prompter.longer((), "")  # the end of a turn, which replaces the stop string
    if config.spec.samples_attempts and config.diagnose:
        expert = expert_ids(problem, prompter)
        if expert is not None:
            yield expert
