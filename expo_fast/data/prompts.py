"""What the model is asked: to solve a question, or to explain its known answer.

Both prompts share system prompt, worked examples, wording and output format and differ in one short
remark, so that an explanation is text that the model could have written as a solution (the
in-distribution property of arXiv:2507.02834, section 3). The wording is ours, not the paper's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from textwrap import shorten
from typing import Any

from expo_fast.config import INSTRUCTION
from expo_fast.data.problems import Problem
from expo_fast.generate import Completion

EXPLAIN = "{question} (The answer is {answer}.)"  # stands where the question does
PLAIN_TURN = "Question: {question}\nAnswer:"  # for a tokenizer without a chat template
PLAIN_STOP = "\nQuestion:"
# Templates that state the day (Llama 3, SmolLM3) state this one, or a run resumed tomorrow and an
# evaluation next week would ask something else. A macro, as newer transformers let no function in.
TODAY = datetime(2026, 1, 1)
DATE_CODES = [f"%{code}" for code in "aAbBdejmyYHIMSp"] + ["%-d", "%-m"]
STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{code}', '{TODAY.strftime(code)}')" for code in DATE_CODES)
    + " }}{% endmacro %}\n"
)


@dataclass(frozen=True)
class Prompter:
    """Renders problems for one tokenizer; `shots` are worked examples shown as earlier turns."""

    tokenizer: Any
    shots: tuple[Problem, ...] = ()
    system: str | None = None  # None: what the chat template does by itself
    instruction: str = INSTRUCTION  # behind each question; "": none

    def __post_init__(self):
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: put its tokenizer.json beside the weights"
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token: name one in tokenizer_config.json")

    def solve(self, problem: Problem) -> tuple[int, ...]:
        """Token ids of the plain question, ready for the answer."""
        return self._render(problem, explain=False)

    def explain(self, problem: Problem) -> tuple[int, ...]:
        """The same with the answers stated: the problem's and the worked examples'."""
        return self._render(problem, explain=True)

    def expert(self, problem: Problem) -> tuple[int, ...]:
        """Completion ids of the expert's solution, its answer boxed."""
        return self.completion(expert_text(problem))

    def target(self, problem: Problem) -> tuple[int, ...]:
        """Completion ids of what the data prefer: a pair's chosen text, else the solution."""
        return self.completion(problem.pair[0]) if problem.pair else self.expert(problem)

    def completion(self, text: str) -> tuple[int, ...]:
        """Token ids of a text in the place of the model's own, ended as the model ends."""
        text = " " * (not self._chats) + text
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return (*ids, self.tokenizer.eos_token_id)

    def ended(self, done: Completion) -> tuple[int, ...]:
        """Token ids of a sampled completion; one that a stop string ended is cut before it, and
        ends as all others do."""
        ids = list(done.token_ids)
        if done.finish_reason != "stop" or not self.stop_strings:
            return tuple(ids)
        text = self.text(ids)
        cut = min(
            [text.find(stop) for stop in self.stop_strings if stop in text], default=len(text)
        )
        return (*self.cut(ids, len(text[:cut].rstrip())), self.tokenizer.eos_token_id)

    def cut(self, ids: Sequence[int], length: int) -> list[int]:
        """The first of the tokens, with `length` characters of text at most."""
        ids = list(ids)
        while ids and len(self.text(ids)) > length:
            ids.pop()
        return ids

    def longer(self, ids: Sequence[int], more: str) -> tuple[int, ...]:
        """An ended completion with a text before its end; the sampled tokens stay as they were."""
        special = self.tokenizer.all_special_ids
        added = self.tokenizer(more, add_special_tokens=False).input_ids
        return (*(t for t in ids if t not in special), *added, self.tokenizer.eos_token_id)

    def text(self, completion_ids: Sequence[int]) -> str:
        """What the model wrote, without its end token."""
        return self.tokenizer.decode(completion_ids, skip_special_tokens=True)

    def _fill(self, turns: list[dict[str, str]]) -> str:
        try:
            template = STRFTIME_NOW + self.tokenizer.get_chat_template()
            return self.tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program: it may raise anything
            roles = ", ".join(turn["role"] for turn in turns)
            reason = shorten(f"{type(error).__name__}: {error}", 300)
            raise ValueError(f"the chat template refuses the turns ({roles}): {reason}") from error

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return () if self._chats else (PLAIN_STOP,)

    @property
    def template_hash(self) -> str:
        """Changes with anything that changes a prompt."""
        probe = Problem(id="probe", prompt="Q?", answer="A", solution="S")
        rendered = repr((self.solve(probe), self.explain(probe)))
        return hashlib.sha256(rendered.encode()).hexdigest()[:16]

    @property
    def _chats(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def _render(self, problem: Problem, *, explain: bool) -> tuple[int, ...]:
        turns = [{"role": "system", "content": self.system}] if self.system else []
        asked = self._question(problem, explain)
        turns += [turn for turn in asked if turn["role"] == "system"]
        for shot in self.shots:
            turns += [turn for turn in self._question(shot, explain) if turn["role"] != "system"]
            turns.append({"role": "assistant", "content": expert_text(shot)})
        turns += [turn for turn in asked if turn["role"] != "system"]
        if self._chats:
            text = self._fill(turns)
        else:
            text = (self.tokenizer.bos_token or "") + _plain(turns)
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _question(self, problem: Problem, explain: bool) -> list[dict[str, str]]:
        *earlier, last = (
            [{"role": "user", "content": problem.prompt}]
            if isinstance(problem.prompt, str)
            else list(problem.prompt)
        )
        question = last["content"]
        if explain:
            question = EXPLAIN.format(question=question, answer=problem.answer)
        parts = [question, self.instruction] if self.instruction else [question]
        return [*earlier, {**last, "content": "\n\n".join(parts)}]


def check_length(problem: Problem, prompt: Sequence[int], *, new: int, context: int) -> None:
    """ValueError where a prompt and its completion do not fit the model's context."""
    if len(prompt) + new > context:
        raise ValueError(
            f"problem {problem.id} takes {len(prompt)} prompt tokens + max_completion_length={new}"
            f", the model's context holds {context}: shorten it, or show fewer --shots"
        )


def expert_text(problem: Problem) -> str:
    """The expert's solution with its answer in a box: data sets differ in whether they have one."""
    if problem.solution is None:
        raise ValueError(
            f"problem {problem.id} has no expert solution: worked examples (--shots) and "
            "the methods expert-grpo, expert-dpo and sft need a 'solution' column"
        )
    if "\\boxed" in problem.solution:
        return problem.solution
    return problem.solution + boxed(problem.answer)


def boxed(answer: str) -> str:
    """What is put behind reasoning that has no box of its own."""
    return f"\nThe answer is \\boxed{{{answer}}}."


def request_seed(*key: int | str) -> int:
    """The 63-bit seed of one request, from what names it: (run seed, purpose, step, problem, k).

    Nothing that a run samples depends on what it sampled before, so a resumed run needs no
    generator's state to go on bit for bit.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _plain(turns: Sequence[dict[str, str]]) -> str:
    parts = []
    for turn in turns:
        if turn["role"] == "user":
            parts.append(PLAIN_TURN.format(question=turn["content"]))
        else:
            parts.append(f"{' ' * (turn['role'] == 'assistant')}{turn['content']}\n\n")
    return "".join(parts)
