"""Prompts that ask the model to solve a question, or to explain its known answer.

Both prompts have the same system prompt, worked examples, wording and output format, and differ in
one short remark. So an explanation is text that the model could have written as a solution (the
in-distribution property of arXiv:2507.02834, section 3). The wording is not the paper's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from expo_fast.config import INSTRUCTION, Evaluate, Train
from expo_fast.data.chat_template import AnswerTurn, TokenIds, answer_turn, fill
from expo_fast.data.columns import Message
from expo_fast.data.control_tokens import control_tokens, escaped, without_control_tokens
from expo_fast.data.problems import Problem
from expo_fast.data.text_codec import TextCodec

EXPLAIN = "{question} (The answer is {answer}.)"  # in place of the question
PLAIN_TURN = "Question: {question}\nAnswer:"  # for a tokenizer without a chat template


@dataclass(frozen=True)
class Prompter:
    """Render problems as token ids for one tokenizer.

    Raise ValueError if there is no tokenizer, or if no source names the end of a turn.
    """

    tokenizer: Any
    shots: tuple[Problem, ...] = ()  # worked examples, shown as earlier turns
    system: str | None = None  # system prompt; None: the chat template's default
    instruction: str = INSTRUCTION  # appended to each question; "": none
    ends: TokenIds = ()  # ids that end a completion, named by the checkpoint (Decoder.eos_ids)
    escape: bool = False  # write control tokens in the text of questions as plain text

    @classmethod
    def of(
        cls,
        config: Train | Evaluate,
        tokenizer: Any,
        shots: tuple[Problem, ...],
        *,
        ends: TokenIds,
    ) -> "Prompter":
        """Return the prompter of a training run or an evaluation."""
        return cls(
            tokenizer=tokenizer,
            shots=shots,
            system=config.system_prompt,
            instruction=INSTRUCTION if config.instruction is None else config.instruction,
            ends=ends,
            escape=config.escape_special_tokens,
        )

    def __post_init__(self):
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: put its tokenizer.json beside the weights"
            )
        _ = self.turn  # raises ValueError

    @cached_property
    def turn(self) -> AnswerTurn:
        """The text that the chat template puts around an answer, and the ends of a turn."""
        return answer_turn(self.tokenizer)

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts of the tokenizer's control tokens."""
        return control_tokens(self.tokenizer)

    @cached_property
    def codec(self) -> TextCodec:
        """The codec for texts that continue a completion."""
        return TextCodec(self.tokenizer)

    # Prompts

    def solve(self, problem: Problem) -> TokenIds:
        """Return the token ids of the plain question, up to the start of the answer.

        Of plain text, return its first token, because nothing predicts it.
        """
        if problem.is_text:
            return self._plain_text(problem)[:1]
        return self._render(problem, explain=False)

    def explain(self, problem: Problem) -> TokenIds:
        """Return `solve` with the answers of the problem and of the worked examples stated."""
        return self._render(problem, explain=True)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end a completion, or () if the end is a token."""
        return self.turn.stop_strings

    @property
    def template_hash(self) -> str:
        """A hash that changes with everything that changes a prompt."""
        probe = Problem(id="probe", prompt="Q?", answer="A", solution="S")
        rendered = (self.solve(probe), self.explain(probe))
        digest = hashlib.sha256(repr(rendered).encode())
        return digest.hexdigest()[:16]

    @property
    def ends_hash(self) -> str:
        """A hash that changes with everything that ends a completion.

        It is no part of `template_hash`, so that this stays that of earlier runs.
        """
        turn = self.turn
        trained_on = (turn.end_text, turn.end_ids)
        stopped_at = (turn.stop_ids, turn.stop_strings, sorted(self.ends))
        digest = hashlib.sha256(repr((trained_on, stopped_at)).encode())
        return digest.hexdigest()[:16]

    # Completions

    def expert(self, problem: Problem) -> TokenIds:
        """Return the completion ids of the expert's solution, with its answer boxed."""
        return self.completion(problem, expert_text(problem))

    def target(self, problem: Problem) -> TokenIds:
        """Return the completion ids that the data prefer: a pair's chosen text, or the solution.

        Of plain text, return all tokens but the first, with the end of a text.
        """
        if problem.is_text:
            return self._plain_text(problem)[1:]
        if problem.pair is not None:
            chosen, _ = problem.pair
            return self.completion(problem, chosen)
        return self.expert(problem)

    def completion(self, problem: Problem, text: str) -> TokenIds:
        """Return the ids of a given text as an answer to the problem, with the end of a turn.

        They are the ids after the prompt in the rendered prompt and answer. So they include the
        space or the header that a template puts before an answer, and lack the whitespace that it
        removes. Text after the end, such as a newline, is left out, because sampling stops before
        it.

        Raise ValueError if the template does not render the prompt before the answer.
        """
        prompt = self._prompt_text(problem, explain=False)
        after = self._after_prompt(problem, prompt, text)
        prompt_ids = self._encode_from_start(prompt)
        together = self._encode_from_start(prompt + after)
        if together[: len(prompt_ids)] == prompt_ids:
            ids = together[len(prompt_ids) :]
        else:
            # The last token of the prompt would merge with this text. The prompt that is trained on
            # must be the one that is sampled from.
            ids = self.codec.encode(after)
        return (*ids, *self.turn.end_ids)

    def ended(self, token_ids: Sequence[int], finish_reason: str) -> TokenIds:
        """Return the ids of a sampled completion with the end of a turn.

        If the completion stopped at the template's end, add the other tokens of that end. If it
        stopped at another end of the tokenizer or the model, return it as it was sampled. If it
        stopped at a stop string or at the next turn, cut it there and add the end of a turn. If it
        reached the limit of its length, return it as it was sampled.
        """
        ids = list(token_ids)
        turn = self.turn
        if finish_reason != "stop":
            return tuple(ids)
        if ids[-1:] == list(turn.end_ids[:1]):
            return (*ids, *turn.end_ids[1:])
        if ids and ids[-1] in self._ends:
            return tuple(ids)
        written = self.written(ids)
        if written == ids and not turn.stop_strings:
            return tuple(ids)
        kept = self.codec.decode(written).rstrip()
        if not turn.end_ids and self.codec.decode(ids) == kept + turn.end_text:
            return tuple(ids)  # the end of several tokens, as the model wrote it
        end_text = self.codec.encode(turn.end_text) if turn.end_text else []
        return (*self.cut(written, kept), *end_text, *turn.end_ids)

    def written(self, completion_ids: Sequence[int]) -> list[int]:
        """Return the ids of the text that the model wrote, without its end.

        Cut the ids before a stop string or the beginning of another turn, and before the whitespace
        that precedes it.
        """
        ids = list(completion_ids)
        turn = self.turn
        next_turn = False
        n_end = len(turn.end_ids)
        if n_end > 1 and ids[-n_end:] == list(turn.end_ids):
            del ids[-n_end:]
        elif ids and ids[-1] in (*turn.stop_ids, *self.ends):
            last = ids.pop()
            next_turn = last not in self._ends
        if not next_turn and not turn.stop_strings:
            return ids
        text = self.codec.decode(ids)
        end = len(text)
        for stop in turn.stop_strings:
            if stop in text:
                end = min(end, text.find(stop))
        if end == len(text) and not next_turn:
            return ids
        return self.cut(ids, text[:end].rstrip())

    def cut(self, ids: Sequence[int], kept: str) -> list[int]:
        """Return the ids of `kept`, which is a prefix of the text of `ids`.

        The sampled tokens are not changed, except the token in which `kept` ends. This token is
        replaced by the ids of the part that is kept. For example, `}\\n` is one token of many
        vocabularies, and a box must keep its brace.
        """
        n = len(ids)
        while n and not kept.startswith(self.codec.decode(ids[:n])):
            n -= 1
        rest = kept.removeprefix(self.codec.decode(ids[:n]))
        if not rest.strip():
            return list(ids[:n])
        return [*ids[:n], *self.codec.encode(rest)]

    def longer(self, ids: Sequence[int], more: str) -> TokenIds:
        """Return a completion with a text inserted before its end.

        The sampled tokens are not changed.
        """
        special = set(self.tokenizer.all_special_ids)
        written = [token for token in self.written(ids) if token not in special]
        return (*written, *self.codec.encode(more + self.turn.end_text), *self.turn.end_ids)

    def text(self, completion_ids: Sequence[int]) -> str:
        """Return the text that the model wrote, without the end and without special tokens.

        This text is judged. The text that is trained on is the same: `ended` and `longer` only add
        an end to it.
        """
        return self.codec.decode(self.written(completion_ids))

    @property
    def _ends(self) -> TokenIds:
        """The ids that end an answer, without those that begin the next turn."""
        of_checkpoint = (token for token in self.ends if token not in self.turn.stop_ids)
        return (*self.turn.ends, *of_checkpoint)

    @property
    def _has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def _render(self, problem: Problem, *, explain: bool) -> TokenIds:
        return tuple(self._encode_from_start(self._prompt_text(problem, explain=explain)))

    def _plain_text(self, problem: Problem) -> TokenIds:
        """Return the token ids of plain text and the end, without a template, as TRL has them."""
        text = problem.solution or ""
        end = self.tokenizer.eos_token or ""
        return tuple(self.tokenizer(text if text.endswith(end) else text + end).input_ids)

    def _prompt_text(self, problem: Problem, *, explain: bool) -> str:
        turns = self._turns(problem, explain)
        return fill(self.tokenizer, turns) if self._has_chat_template else _plain(turns)

    def _encode_from_start(self, text: str) -> list[int]:
        """Return the ids of a text at the beginning of a sequence."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if self._has_chat_template or self.tokenizer.bos_token_id is None:
            return ids
        # Add the id, not its text, because some tokenizers put a space before the first word only.
        return [self.tokenizer.bos_token_id, *ids]

    def _after_prompt(self, problem: Problem, prompt: str, text: str) -> str:
        """Return the rendered text of an answer after the prompt, up to the end of the turn."""
        turn = self.turn
        if not self._has_chat_template:
            return text if problem.prefill else " " + text
        turns = self._turns(problem, explain=False)
        if problem.prefill:
            turns.pop()
        answer: Message = {"role": "assistant", "content": problem.prefill + text}
        answered = fill(self.tokenizer, [*turns, answer], for_answer=False)
        complete = answered.startswith(prompt) and answered.endswith(turn.tail)
        if complete and holds(answered, text):
            return answered.removeprefix(prompt).removesuffix(turn.tail) + turn.end_text
        if complete and problem.prefill:
            return text + turn.end_text
        # A template may remove the reasoning of an answer, and a prompt may begin the reasoning
        # (DeepSeek-R1). The model writes the rest after the prompt, so the text is used unchanged.
        begun = turn.opened.strip()
        if begun and text.lstrip().startswith(begun):
            return text.lstrip().removeprefix(begun).removeprefix("\n") + turn.end_text
        if complete:
            return turn.lead + text + turn.end_text
        advice = f"begin the text with {begun!r}, or " if begun else ""
        raise ValueError(
            f"problem {problem.id}: the chat template ends a prompt with {prompt[-24:]!r} and does "
            f"not render that before a given answer: {advice}choose a method that trains on "
            "sampled texts only"
        )

    def _turns(self, problem: Problem, explain: bool) -> list[Message]:
        """Return the conversation: system messages, then worked examples, then the question."""
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
        """Return the messages of a problem, with the instruction in the last user message."""
        prompt = problem.prompt
        if isinstance(prompt, str):
            prompt = ({"role": "user", "content": prompt},)
        answer = problem.answer
        if self.escape:
            prompt = tuple(without_control_tokens(turn, self.control_tokens) for turn in prompt)
            answer = escaped(answer, self.control_tokens)
        asked = len(prompt) - 1 if problem.prefill else len(prompt)
        *earlier, last = prompt[:asked]
        content = last["content"]
        if explain:
            content = EXPLAIN.format(question=content, answer=answer)
        if self.instruction:
            content = f"{content}\n\n{self.instruction}"
        return [*earlier, {**last, "content": content}, *prompt[asked:]]


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
            f", but the model's context holds {context}: shorten it, show fewer --shots or lower "
            "--max-completion-length"
        )


def expert_text(problem: Problem) -> str:
    """Return the expert's solution with its answer in a box. Add the box if it is missing.

    A solution without a known answer is returned as it is.

    Raise ValueError if the problem has no solution.
    """
    if problem.solution is None:
        raise ValueError(
            f"problem {problem.id} has no expert solution: worked examples (--shots) and "
            "the methods expert-grpo, expert-dpo and sft need one, in a column 'solution', "
            "'completion' or 'output', or as the last of 'messages'"
        )
    if "\\boxed" in problem.solution or not problem.answer:
        return problem.solution
    return problem.solution + boxed(problem.answer)


def holds(rendered: str, text: str) -> bool:
    """Return whether a rendered text contains the text. Ignore whitespace."""
    return "".join(text.split()) in "".join(rendered.split())


def boxed(answer: str) -> str:
    """Return the sentence that is appended to reasoning without a box."""
    return f"\nThe answer is \\boxed{{{answer}}}."


def request_seed(*key: int | str) -> int:
    """Return the 63-bit seed of one request from the names (run seed, purpose, step, problem, k).

    The samples of a run do not depend on earlier samples. So a resumed run continues bit for bit
    without a saved random state.
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
