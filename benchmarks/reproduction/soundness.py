"""Measure which ranking puts sound explanations above those that only end in the right box.

    python -m benchmarks.reproduction.soundness --data runs/reproduction/tiny/train.jsonl

An explanation is sound if it has an equation of two numbers, if none of its equations is false, and
if the last one gives the answer. The figure of a ranking is its AUC: the share of pairs of a sound
and an unsound explanation in which it ranks the sound one higher. Soundness can be checked in this
way for arithmetic only. In training nothing checks it, so the choice of explanations relies on a
ranking.
"""

import argparse
import re
from collections.abc import Sequence

from expo_fast.algorithms.explanation_filter import miscalculates
from expo_fast.algorithms.explanations import accept_explanations, ranking_samples, ranks_of
from expo_fast.algorithms.logprobs import ForwardOptions, completion_logprobs
from expo_fast.data.problems import load_problems, worked_examples
from expo_fast.data.prompts import Prompter, request_seed
from expo_fast.generate import Generator, Request
from expo_fast.reward import score_answers
from expo_fast.weights import load_model

RESULT = re.compile(r"=\s?\$?(\d+)")


def main() -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    flags.add_argument("--model", default="smollm2-135m")
    flags.add_argument("--data", default="builtin:arithmetic-1:train")
    flags.add_argument("--shots-data", default="builtin:arithmetic-1:train")
    flags.add_argument("--limit", type=int, default=64)
    flags.add_argument("--samples", type=int, default=8)
    flags.add_argument("--shots", type=int, default=2)
    flags.add_argument("--length", type=int, default=64)
    flags.add_argument("--append-answer", action="store_true")
    given = flags.parse_args()
    model, tokenizer = load_model(given.model)
    shots, _ = worked_examples(load_problems(given.shots_data), given.shots)
    problems = load_problems(given.data, limit=given.limit)
    prompter = Prompter(tokenizer, shots, ends=model.eos_ids)

    requests = []
    for p in problems:
        prompt_ids = prompter.explain(p)
        for k in range(given.samples):
            seed = request_seed(0, p.id, k)
            requests.append(Request(prompt_ids, given.length, temperature=0.8, seed=seed))
    completions = Generator(model, tokenizer=tokenizer).sample(requests)
    found = accept_explanations(
        problems, completions, prompter, score_answers, append_answer=given.append_answer
    )
    by_id = {p.id: p for p in problems}
    sound = []
    for problem_id, explanations in found.texts.items():
        answer = by_id[problem_id].answer
        sound += [is_sound(prompter.text(ids), answer) for ids in explanations]
    n = found.counts
    print(f"{len(problems)} questions, {n.n_sampled} explanations, right box: {n.n_right}")
    print(f"accepted: {len(sound)} for {len(found.texts)} questions; sound: {sum(sound)}")
    for name in ("likelihood", "lift"):
        samples = ranking_samples(found.texts, problems, prompter, name)
        logprobs = completion_logprobs(model, samples, ForwardOptions(1.0, 4096))
        print(f"AUC of {name}: {auc(ranks_of(logprobs, name), sound):.2f}")


def is_sound(text: str, answer: str) -> bool:
    """Return whether an explanation is sound."""
    results = RESULT.findall(text)
    return bool(results) and results[-1] == answer and not miscalculates(text)


def auc(ranks: Sequence[float], right: Sequence[bool]) -> float:
    """Return the share of pairs that are ranked right. Ties count half.

    Return NaN if there is no pair.
    """
    good = [rank for rank, is_right in zip(ranks, right, strict=True) if is_right]
    bad = [rank for rank, is_right in zip(ranks, right, strict=True) if not is_right]
    if not good or not bad:
        return float("nan")
    scores = [(x > y) + (x == y) / 2 for x in good for y in bad]
    return sum(scores) / len(scores)


if __name__ == "__main__":
    main()
