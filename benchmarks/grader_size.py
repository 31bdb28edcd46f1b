"""Does the size check of the grader refuse answers that math-verify can judge?

    python -m benchmarks.grader_size RUN...

Reads the completions of run folders. Each different answer that the size check finds too large is
given to math-verify alone, with 10 seconds. Prints one line of JSON: the numbers of completions, of
different answers, of those that are too large, and of those of them that math-verify calls right
(false positives), with their texts.
"""

import json
import sys
from pathlib import Path
from unittest import mock

from expo_fast.answers.magnitude import is_too_large
from expo_fast.data import grader_pool
from expo_fast.data.workers import Comparison
from expo_fast.reporting.jsonl import read_rows

TIMEOUT_S = 10.0


def answers_of(runs: list[Path]) -> list[Comparison]:
    """Return what is compared for each completion of these runs."""
    found = []
    for run in runs:
        for file in sorted((run / "completions").glob("step-*.jsonl")):
            for row in read_rows(file):
                found.append(grader_pool.comparison_of(str(row["answer"]), row["completion"]))
    return found


def false_positives(answers: list[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Return the answers that are too large, and those of them that math-verify calls right."""
    large = [each for each in answers if is_too_large(each.reference) or is_too_large(each.answer)]
    boxes = [rf"\boxed{{{each.answer}}}" for each in large]
    with (
        mock.patch.object(grader_pool, "is_too_large", lambda text: False),
        grader_pool.GraderPool(timeout_s=TIMEOUT_S) as pool,
    ):
        verdicts = pool.verdicts([each.reference for each in large], boxes)
    wrongly = [each for each, verdict in zip(large, verdicts, strict=True) if verdict == 1.0]
    return large, wrongly


def main(folders: list[str]) -> None:
    answers = answers_of([Path(folder) for folder in folders])
    different = list(dict.fromkeys(answers))
    large, wrongly = false_positives(different)
    result = {
        "completions": len(answers),
        "with_an_answer": sum(bool(each.answer) for each in answers),
        "different": len(different),
        "too_large": len(large),
        "false_positives": len(wrongly),
        "texts": [each.answer for each in large],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
