"""Steps of a run in one process as K ranks would take them: how long each rank waits.

A recorded run gives the lengths of its texts and the seconds of its phases. The questions and the
samples of its steps are dealt to K ranks by the code of the trainer. The time of a rank is then

    sampling    A per position of the longest sequence + C per token of its prompts and completions
    a pass      F per token of its pack
    an update   the measured time divided by K

A step of decoding reads all weights, for one sequence as for many. Therefore A + C is the time of a
token of a single sequence, which is measured. C and F follow from the seconds of the recorded run.
All ranks wait for the slowest one after sampling, after the explanations and in every backward
pass. The seconds of communication are left out.

Only the explanations that were accepted are in the files of a run. The lengths of all explanations
of a question are taken to be those of its attempts.
"""

import heapq
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean

from expo_fast.algorithms.dealing import expected_lengths, units_by_prompt
from expo_fast.algorithms.training_data import load_training_data
from expo_fast.cli.flags import from_toml
from expo_fast.config import Train
from expo_fast.data.prompts import Prompter
from expo_fast.distributed.world import shares
from expo_fast.generate import MAX_ROWS, Generator, Request
from expo_fast.modeling.packing import Sample, common_prefix, pack
from expo_fast.reporting.jsonl import read_rows
from expo_fast.weights import load_model, load_structure

RANKS = tuple(2**n for n in range(1, 11))
TOKENS_TO_TIME = 64
DRAWS = 64  # ranks whose steps are drawn for a row of the table of larger steps


@dataclass(frozen=True)
class Question:
    """A question in a recorded step."""

    id: str
    prompt_ids: tuple[int, ...]
    lengths: list[int]
    """Number of tokens of each attempt."""
    policy: list[Sample] = field(default_factory=list)
    """The attempts that have a gradient."""
    positives: list[Sample] = field(default_factory=list)
    """The explanations or solutions that are trained on."""

    @property
    def mean_length(self) -> float:
        return fmean(self.lengths)


@dataclass(frozen=True)
class Recorded:
    """The steps of a run."""

    config: Train
    steps: list[list[Question]]
    metrics: list[dict[str, float]]

    def seconds(self, phase: str) -> float:
        """Return the seconds of all steps in a phase."""
        return sum(row.get(f"time/{phase}") or 0.0 for row in self.metrics)


@dataclass(frozen=True)
class Costs:
    """Seconds of one rank."""

    position: float
    generated: float
    """Of a token in sampling attempts."""
    explained: float
    """Of a token in sampling explanations."""
    trained: float
    """Of a token in a forward and backward pass."""
    update: float
    """Of all updates of a step, in one process."""


@dataclass(frozen=True)
class Simulated:
    """One step."""

    seconds: float
    idle: list[float]
    """The share of the step that each rank waits after sampling, as in `rank/RANK/idle`."""
    in_passes: list[float]
    """The share that it waits in backward passes."""
    is_known: bool
    """Whether all of the questions had been attempted before."""


def read(folder: Path) -> Recorded:
    """Read the steps of a run of a method that samples.

    Raise ValueError if it has none, or was written by several processes.
    """
    config = from_toml(Train, folder / "config.toml")
    model, tokenizer = load_structure(config.model)
    data = load_training_data(config)
    prompter = Prompter(
        tokenizer,
        data.shots,
        config.system_prompt,
        config.instruction,
        ends=model.eos_ids,
        escape=config.escape_special_tokens,
    )
    prompts = {problem.id: tuple(prompter.solve(problem)) for problem in data.problems}
    metrics = list(read_rows(folder / "metrics.jsonl"))
    steps = []
    for row in metrics:
        texts = folder / f"completions/step-{row['step']}.jsonl"
        step = questions_of(list(read_rows(texts)), prompts, tokenizer)
        if not step:
            raise ValueError(f"{texts} has no attempt: name a run of a method that samples")
        steps.append(step)
    return Recorded(config, steps, metrics)


def questions_of(
    rows: Sequence[Mapping], prompts: Mapping[str, tuple[int, ...]], tokenizer
) -> list[Question]:
    """Return the questions of the rows of completions/step-N.jsonl, in their order."""
    found: dict[str, Question] = {}
    for row in rows:
        ids = tuple(tokenizer(row["completion"], add_special_tokens=False)["input_ids"])
        if row.get("finish_reason", "stop") == "stop":
            ids = (*ids, 0)  # the end token
        prompt_ids = prompts[row["id"]]
        question = found.setdefault(row["id"], Question(row["id"], prompt_ids, []))
        sample = Sample(prompt_ids, ids or (0,))
        if row["kind"] != "own":
            question.positives.append(sample)
            continue
        question.lengths.append(len(ids))
        if row["advantage"]:
            question.policy.append(sample)
    return [question for question in found.values() if question.lengths]


def rate_of_one_sequence(config: Train, prompt_ids: Sequence[int]) -> float:
    """Return the tokens per second of sampling one sequence, without its prompt."""
    model, _ = load_model(config.model)
    generator = Generator(model)

    def seconds(n_tokens: int) -> float:
        request = Request(prompt_ids, n_tokens, stop_ids=())
        start = time.perf_counter()
        generator.sample([request])
        return time.perf_counter() - start

    seconds(TOKENS_TO_TIME)
    return TOKENS_TO_TIME / (seconds(TOKENS_TO_TIME + 1) - seconds(1))


def costs_of(run: Recorded, rate: float) -> Costs:
    """Return the costs that explain the phases of a run in one process.

    rate: tokens per second of one sequence.
    """
    positions = 0
    tokens = 0
    explained_positions = 0
    explained = 0
    trained = 0
    for step in run.steps:
        positions += n_positions(attempts(step))
        tokens += n_sampled(step, attempts(step))
        explanations = explanations_of(step, run.config)
        explained_positions += n_positions(explanations)
        explained += n_sampled(step, explanations)
        for samples in terms(step):
            trained += sum(pack_sizes(samples, run.config.pack_tokens))
    generate = run.seconds("generate")
    position = max(0.0, (tokens / rate - generate) / max(1, tokens - positions))
    per_token = max(0.0, generate - position * positions) / tokens
    explain = max(0.0, run.seconds("explain") - position * explained_positions)
    return Costs(
        position=position,
        generated=per_token,
        explained=explain / max(1, explained),
        trained=run.seconds("forward_backward") / max(1, trained),
        update=run.seconds("optimizer") / len(run.steps),
    )


def attempts(questions: Sequence[Question]) -> list[int]:
    """Return the lengths of all attempts."""
    return [length for question in questions for length in question.lengths]


def explanations_of(questions: Sequence[Question], config: Train) -> list[int]:
    """Return the lengths of all sampled explanations, as this module takes them to be."""
    if not config.samples_explanations:
        return []
    each = config.explanations_per_question
    return [x for question in questions for x in islice(cycle(question.lengths), each)]


def n_positions(lengths: Sequence[int], max_rows: int = MAX_ROWS) -> int:
    """Return the number of decode steps, if a sequence that ends makes way for the next one."""
    rows = [0] * max_rows
    for length in lengths:
        heapq.heappush(rows, heapq.heappop(rows) + length)
    return max(rows)


def n_sampled(questions: Sequence[Question], lengths: Sequence[int]) -> int:
    """Return the tokens that are computed: of the completions, and once of each prompt."""
    if not lengths:
        return 0
    prompts = [question.prompt_ids for question in questions]
    n_shared = common_prefix(prompts)
    return n_shared + sum(len(prompt) - n_shared for prompt in prompts) + sum(lengths)


def terms(questions: Sequence[Question]) -> Iterator[list[Sample]]:
    """Yield the samples of each term of the loss, which have passes of their own."""
    yield [sample for question in questions for sample in question.policy]
    yield [sample for question in questions for sample in question.positives]


def pack_sizes(samples: Sequence[Sample], max_tokens: int) -> list[int]:
    """Return the number of tokens of each forward and backward pass."""
    return [each.tokens.numel() for each in pack(samples, max_tokens)]


def simulate(
    questions: Sequence[Question],
    lengths: Mapping[str, float],
    config: Train,
    costs: Costs,
    n_ranks: int,
) -> Simulated:
    """Return a step as `n_ranks` ranks would take it.

    lengths: the mean lengths of the last attempts before the step, by question.
    """
    ids = [question.id for question in questions]
    means = {question.id: question.mean_length for question in questions}
    limit = config.max_new_tokens
    generate = []
    for own in dealt(questions, expected_lengths(ids, lengths, limit), n_ranks):
        sampled = attempts(own)
        seconds = costs.position * n_positions(sampled)
        generate.append(seconds + costs.generated * n_sampled(own, sampled))
    explain = []
    for own in dealt(questions, expected_lengths(ids, means, limit), n_ranks):
        sampled = explanations_of(own, config)
        seconds = costs.position * n_positions(sampled)
        explain.append(seconds + costs.explained * n_sampled(own, sampled))
    passes = 0.0
    busy = [0.0] * n_ranks
    for samples in terms(questions):
        units, tokens = units_by_prompt(samples)
        of_ranks = []
        for own in dealt(units, tokens, n_ranks):
            of_rank = [sample for unit in own for sample in unit]
            of_ranks.append(pack_sizes(of_rank, config.pack_tokens))
        for i in range(max(map(len, of_ranks))):
            sizes = [sizes[i] if i < len(sizes) else 0 for sizes in of_ranks]
            passes += costs.trained * max(sizes)
            busy = [each + costs.trained * n for each, n in zip(busy, sizes, strict=True)]
    seconds = max(generate) + max(explain) + passes + costs.update / n_ranks
    idle = []
    for first, second in zip(generate, explain, strict=True):
        idle.append((max(generate) - first + max(explain) - second) / seconds)
    return Simulated(
        seconds=seconds,
        idle=idle,
        in_passes=[(passes - each) / seconds for each in busy],
        is_known=all(each in lengths for each in ids),
    )


def dealt(items: Sequence, costs: Sequence[float], n_ranks: int) -> list[list]:
    """Return the items of each rank."""
    return [[items[i] for i in indices] for indices in shares(costs, n_ranks)]


def recorded_steps(run: Recorded, costs: Costs, n_ranks: int) -> list[Simulated]:
    """Return the steps of a run as `n_ranks` ranks would take them."""
    lengths: dict[str, float] = {}
    found = []
    for questions in run.steps:
        found.append(simulate(questions, lengths, run.config, costs, n_ranks))
        lengths |= {question.id: question.mean_length for question in questions}
    return found


def larger_steps(
    run: Recorded, costs: Costs, n_ranks: int, per_rank: int, known: bool
) -> list[Simulated]:
    """Return steps of `per_rank` questions per rank, which are drawn from those of the run.

    known: whether the lengths of earlier attempts are known. The questions are then those that the
    run attempted more than once.
    """
    pool: list[tuple[Question, float | None]] = []
    lengths: dict[str, float] = {}
    for question in (each for step in run.steps for each in step):
        if not known or question.id in lengths:
            pool.append((question, lengths.get(question.id)))
        lengths[question.id] = question.mean_length
    rng = random.Random(0)
    steps = []
    for _ in range(max(1, DRAWS // n_ranks)):
        drawn = []
        expected = {}
        for number, (question, length) in enumerate(rng.choices(pool, k=per_rank * n_ranks)):
            drawn.append(as_another(question, number))
            if known and length is not None:
                expected[drawn[-1].id] = length
        steps.append(simulate(drawn, expected, run.config, costs, n_ranks))
    return steps


def as_another(question: Question, number: int) -> Question:
    """Return a question with a name and a prompt of its own, of the same lengths."""
    prompt_ids = (*question.prompt_ids[:-1], number)

    def moved(samples: list[Sample]) -> list[Sample]:
        return [replace(sample, prompt_ids=prompt_ids) for sample in samples]

    return replace(
        question,
        id=str(number),
        prompt_ids=prompt_ids,
        policy=moved(question.policy),
        positives=moved(question.positives),
    )


def has_known(run: Recorded) -> bool:
    """Return whether a question was attempted more than once."""
    ids = [question.id for step in run.steps for question in step]
    return len(set(ids)) < len(ids)


def lines(
    run: Recorded,
    costs: Costs,
    *,
    ranks: Sequence[int] = RANKS,
    per_rank: int = 0,
    measured: Recorded | None = None,
) -> Iterator[str]:
    """Yield the lines of the tables.

    per_rank: number of questions of a rank; 0: that of a step of the run.
    measured: a run on several ranks, whose steps are simulated too.
    """
    config = run.config
    yield (
        f"costs: {1000 * costs.position:.2f} ms per position, {1000 * costs.generated:.3f} ms per "
        f"token (explanations {1000 * costs.explained:.3f}), {1000 * costs.trained:.2f} ms per "
        f"trained token, {costs.update:.2f} s for the updates of a step"
    )
    if measured is not None:
        yield from measured_lines(measured, costs)
    n_questions = len(run.steps[0])
    yield f"the steps of the run, {n_questions} questions each"
    yield "| ranks | lengths | idle | of each rank | waiting in passes | s/step | efficiency |"
    yield "|--:|---|--:|---|--:|--:|--:|"
    alone = fmean(step.seconds for step in recorded_steps(run, costs, 1))
    for n_ranks in (n for n in ranks if n <= n_questions):
        steps = recorded_steps(run, costs, n_ranks)
        for known in (False, True):
            chosen = [step for step in steps if step.is_known == known]
            if chosen:
                yield row(chosen, n_ranks, alone)
    per_rank = per_rank or config.prompts_per_step
    yield f"{per_rank} questions for each rank, drawn from those of the run"
    yield "| ranks | lengths | idle | least and most | waiting in passes | s/step | efficiency |"
    yield "|--:|---|--:|---|--:|--:|--:|"
    for known in (False, True) if has_known(run) else (False,):
        alone = fmean(step.seconds for step in larger_steps(run, costs, 1, per_rank, known))
        for n_ranks in ranks:
            steps = larger_steps(run, costs, n_ranks, per_rank, known)
            yield row(steps, n_ranks, alone * n_ranks)


def row(steps: Sequence[Simulated], n_ranks: int, alone: float) -> str:
    """Return a row of a table. alone: the seconds of such a step in one process."""
    by_rank = [fmean(each) for each in zip(*(step.idle for step in steps), strict=True)]
    shown = by_rank if n_ranks <= 4 else [min(by_rank), max(by_rank)]
    seconds = fmean(step.seconds for step in steps)
    waiting = fmean(fmean(step.in_passes) for step in steps)
    known = "known" if steps[0].is_known else "new"
    return (
        f"| {n_ranks} | {known} | {fmean(by_rank):.1%} | "
        f"{', '.join(f'{each:.1%}' for each in shown)} | {waiting:.1%} | {seconds:.2f} | "
        f"{alone / seconds / n_ranks:.0%} |"
    )


def measured_lines(run: Recorded, costs: Costs) -> Iterator[str]:
    """Yield what a run on several ranks measured, and its simulation, for each step."""
    n_ranks = sum(name.startswith("rank/") and name.endswith("/idle") for name in run.metrics[0])
    yield f"a measured run of {n_ranks} ranks"
    yield "| step | lengths | measured s | simulated s | measured idle | simulated idle |"
    yield "|--:|---|--:|--:|---|---|"
    steps = recorded_steps(run, costs, n_ranks)
    for number, (step, found) in enumerate(zip(steps, run.metrics, strict=True), start=1):
        idle = [found[f"rank/{rank}/idle"] for rank in range(n_ranks)]
        seconds = found["rank/0/busy"] / (1 - found["rank/0/idle"])
        yield (
            f"| {number} | {'known' if step.is_known else 'new'} | {seconds:.1f} | "
            f"{step.seconds:.1f} | {', '.join(f'{each:.1%}' for each in idle)} | "
            f"{', '.join(f'{each:.1%}' for each in step.idle)} |"
        )
