"""Which ranking tells explanations that are sound from those that only end in the right box?

    python -m benchmarks.reproduction.soundness --data runs/reproduction/tiny/train.jsonl

Sound: some equation of two numbers, none of them false, and the last one gives the answer. The
figure for a ranking is its AUC: the share of (sound, unsound) pairs that it puts in this order.
Arithmetic alone can be judged so; a trainer has no such judge, which is why rankings matter.
"""

import argparse
import re
from collections.abc import Sequence

from expo_fast.algorithms.explanation_filter import miscalculates
from expo_fast.algorithms.explanations import accept_explanations, ranking_samples, ranks_of
from expo_fast.algorithms.logprobs import completion_logprobs
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
    candidates = [(by_id[key], ids) for key, each in found.accepted.items() for ids in each]
    sound = [is_sound(prompter.text(ids), p.answer) for p, ids in candidates]
    print(f"{len(problems)} questions, {found.n_sampled} explanations, right box: {found.n_right}")
    print(f"accepted: {len(candidates)} for {len(found.accepted)} questions; sound: {sum(sound)}")
    for name in ("likelihood", "lift"):
        samples = ranking_samples(found, problems, prompter, name)
        logprobs = completion_logprobs(model, samples, temperature=1.0, max_tokens=4096)
        print(f"AUC of {name}: {auc(ranks_of(logprobs, name), sound):.2f}")


def is_sound(text: str, answer: str) -> bool:
    results = RESULT.findall(text)
    return bool(results) and results[-1] == answer and not miscalculates(text)


def auc(ranks: Sequence[float], right: Sequence[bool]) -> float:
    """Ties count half; NaN where there is no pair."""
    good = [x for x, ok in zip(ranks, right, strict=True) if ok]
    bad = [x for x, ok in zip(ranks, right, strict=True) if not ok]
    pairs = [(x > y) + (x == y) / 2 for x in good for y in bad]
    return sum(pairs) / len(pairs) if pairs else float("nan")


if __name__ == "__main__":
    main()
