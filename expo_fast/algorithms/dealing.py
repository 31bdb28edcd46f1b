"""The expected costs by which `World.deal` gives the work of a step to the ranks."""

from collections.abc import Iterable, Mapping, Sequence

from expo_fast.modeling.packing import Sample


def expected_lengths(ids: Iterable[str], lengths: Mapping[str, float], limit: int) -> list[float]:
    """Return the number of tokens to expect of an attempt at each question.

    lengths: the mean lengths of the last attempts, by question.
    limit: what a question without attempts is expected to need.
    """
    return [lengths.get(each, limit) for each in ids]


def units_by_prompt(samples: Sequence[Sample]) -> tuple[list[list[Sample]], list[int]]:
    """Return the samples of each prompt, which one rank computes, and the tokens of each unit.

    The prompt of a unit is computed once.
    """
    by_prompt: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt_ids, []).append(sample)
    costs = []
    for prompt, members in by_prompt.items():
        costs.append(len(prompt) + sum(len(each.completion_ids) for each in members))
    return list(by_prompt.values()), costs
