"""Prompts that ask the model to solve a question, or to explain its known answer.

Both prompts have the same system prompt, worked examples, wording and output format, and differ in
one short remark. So an explanation is text that the model could have written as a solution (the
in-distribution property of arXiv:2507.02834, section 3). The wording is ours, not the paper's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from textwrap import shorten
from typing import Any

from expo_fast.config import INSTRUCTION
from expo_fast.data.columns import Message
from expo_fast.data.problems import Problem

TokenIds = tuple[int, ...]

EXPLAIN = "{question} (The answer is {answer}.)"  # in place of the question
PLAIN_TURN = "Question: {question}\nAnswer:"  # for a tokenizer without a chat template
PLAIN_STOP = "\nQuestion:"

# Templates that state the day (Llama 3, SmolLM3) get this one. Otherwise a run resumed tomorrow and
# an evaluation next week would ask something else. It is given as a macro, because newer
# transformers accept no function.
TODAY = datetime(2026, 1, 1)
DATE_CODES = [f"%{code}" for code in "aAbBdejmyYHIMSp"] + ["%-d", "%-m"]
REPLACE_DATES = "".join(f"|replace('{code}', '{TODAY.strftime(code)}')" for code in DATE_CODES)
STRFTIME_NOW = "{% macro strftime_now(format) %}{{ format" + REPLACE_DATES + " }}{% endmacro %}\n"


@dataclass(frozen=True)
class Prompter:
    """Renders problems as token ids for one tokenizer.

    Raises ValueError if there is no tokenizer, or if it has no end token.
    """

    tokenizer: Any
    shots: tuple[Problem, ...] = ()  # worked examples, shown as earlier turns
    system: str | None = None  # None: what the chat template does by itself
    instruction: str = INSTRUCTION  # appended to each question; "": none

    def __post_init__(self):
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: put its tokenizer.json beside the weights"
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token: name one in tokenizer_config.json")

    # Prompts

    def solve(self, problem: Problem) -> TokenIds:
        """Return the token ids of the plain question, up to the start of the answer."""
        return self._render(problem, explain=False)

    def explain(self, problem: Problem) -> TokenIds:
        """Return the same with the answers stated, of the problem and the worked examples."""
        return self._render(problem, explain=True)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end a completion, for a tokenizer without a chat template."""
        return () if self._has_chat_template else (PLAIN_STOP,)

    @property
    def template_hash(self) -> str:
        """A hash that changes with everything that changes a prompt."""
        probe = Problem(id="probe", prompt="Q?", answer="A", solution="S")
        rendered = (self.solve(probe), self.explain(probe))
        digest = hashlib.sha256(repr(rendered).encode())
        return digest.hexdigest()[:16]

    # Completions

    def expert(self, problem: Problem) -> TokenIds:
        """Return the completion ids of the expert's solution, with its answer boxed."""
        return self.completion(expert_text(problem))

    def target(self, problem: Problem) -> TokenIds:
        """Return the completion ids that the data prefer: a pair's chosen text, or the solution."""
        if problem.pair is not None:
            chosen, _ = problem.pair
            return self.completion(chosen)
        return self.expert(problem)

    def completion(self, text: str) -> TokenIds:
        """Return the ids of a text as a completion of the model, with the end token."""
        if not self._has_chat_template:
            text = " " + text
        return (*self._encode(text), self.tokenizer.eos_token_id)

    def ended(self, token_ids: Sequence[int], finish_reason: str) -> TokenIds:
        """Return the ids of a sampled completion that ends like all others.

        If a stop string ended it, it is cut before the string and gets the end token.
        """
        ids = list(token_ids)
        if finish_reason != "stop" or not self.stop_strings:
            return tuple(ids)
        text = self.text(ids)
        end = len(text)
        for stop in self.stop_strings:
            if stop in text:
                end = min(end, text.find(stop))
        before = text[:end].rstrip()
        kept = self.cut(ids, len(before))
        return (*kept, self.tokenizer.eos_token_id)

    def cut(self, ids: Sequence[int], length: int) -> list[int]:
        """Return the longest prefix of the tokens whose text has at most `length` characters."""
        ids = list(ids)
        while ids and len(self.text(ids)) > length:
            ids.pop()
        return ids

    def longer(self, ids: Sequence[int], more: str) -> TokenIds:
        """Return an ended completion with a text inserted before its end token.

        The sampled tokens are not changed.
        """
        special = self.tokenizer.all_special_ids
        written = [token for token in ids if token not in special]
        return (*written, *self._encode(more), self.tokenizer.eos_token_id)

    def text(self, completion_ids: Sequence[int]) -> str:
        """Return what the model wrote, without the end token."""
        return self.tokenizer.decode(completion_ids, skip_special_tokens=True)

    @property
    def _has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _render(self, problem: Problem, *, explain: bool) -> TokenIds:
        turns = self._turns(problem, explain)
        if self._has_chat_template:
            text = self._fill(turns)
        else:
            text = (self.tokenizer.bos_token or "") + _plain(turns)
        return tuple(self._encode(text))

    def _turns(self, problem: Problem, explain: bool) -> list[Message]:
        """Return the conversation: system messages first, worked examples, the question."""
        turns: list[Message] = []
        if self.system:
            turns.append({"role": "system", "content": self.system})
        asked = self._question(problem, explain)
        turns += [turn for turn in asked if turn["role"] == "system"]
        for shot in self.shots:
            question = self._question(shot, explain)
            turns += [turn for turn in question if turn["role"] != "system"]
            begun = turns.pop()["content"] if shot.prefill else ""
            turns.append({"role": "assistant", "content": begun + expert_text(shot)})
        turns += [turn for turn in asked if turn["role"] != "system"]
        return turns

    def _question(self, problem: Problem, explain: bool) -> list[Message]:
        """Return the messages of a problem, with the instruction in the user's last."""
        prompt = problem.prompt
        if isinstance(prompt, str):
            prompt = ({"role": "user", "content": prompt},)
        asked = len(prompt) - 1 if problem.prefill else len(prompt)
        *earlier, last = prompt[:asked]
        content = last["content"]
        if explain:
            content = EXPLAIN.format(question=content, answer=problem.answer)
        if self.instruction:
            content = f"{content}\n\n{self.instruction}"
        return [*earlier, {**last, "content": content}, *prompt[asked:]]

    def _fill(self, turns: list[Message]) -> str:
        begun = turns[-1]["role"] == "assistant"  # the prompt has the beginning of the answer
        try:
            template = STRFTIME_NOW + self.tokenizer.get_chat_template()
            return self.tokenizer.apply_chat_template(
                turns,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except Exception as error:  # a template is a program: it may raise anything
            roles = ", ".join(turn["role"] for turn in turns)
            reason = shorten(f"{type(error).__name__}: {error}", 300)
            raise ValueError(f"the chat template refuses the turns ({roles}): {reason}") from error


def check_length(
    problem: Problem,
    prompt: Sequence[int],
    *,
    new: int,  # tokens of the completion
    context: int,  # tokens of the model's context
) -> None:
    """Raise ValueError if a prompt and its completion do not fit the model's context."""
    if len(prompt) + new > context:
        raise ValueError(
            f"problem {problem.id} takes {len(prompt)} prompt tokens + max_completion_length={new}"
            f", the model's context holds {context}: shorten it, or show fewer --shots"
        )


def expert_text(problem: Problem) -> str:
    """Return the expert's solution with its answer in a box, which is added if it has none.

    Raises ValueError if the problem has no solution.
    """
    if problem.solution is None:
        raise ValueError(
            f"problem {problem.id} has no expert solution: worked examples (--shots) and "
            "the methods expert-grpo, expert-dpo and sft need a 'solution' column"
        )
    if "\\boxed" in problem.solution:
        return problem.solution
    return problem.solution + boxed(problem.answer)


def boxed(answer: str) -> str:
    """Return the sentence that is appended to reasoning without a box."""
    return f"\nThe answer is \\boxed{{{answer}}}."


def request_seed(*key: int | str) -> int:
    """Return the 63-bit seed of one request from the names (run seed, purpose, step, problem, k).

    What a run samples does not depend on what it sampled before. So a resumed run needs no random
    state to continue bit for bit.
    """
    name = "/".join(map(str, key))
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _plain(turns: Sequence[Message]) -> str:
    """Render turns for a tokenizer without a chat template."""
    if turns[-1]["role"] == "assistant":  # the beginning of the answer
        return f"{_plain(turns[:-1])} {turns[-1]['content']}"
    text = ""
    for turn in turns:
        content = turn["content"]
        if turn["role"] == "user":
            text += PLAIN_TURN.format(question=content)
        elif turn["role"] == "assistant":
            text += f" {content}\n\n"
        else:
            text += f"{content}\n\n"
    return text
