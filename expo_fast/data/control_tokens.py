"""Control tokens in the text of a prompt: they are counted, and may be written as plain text.

A tokenizer turns `<|im_end|>` in the text of a question into the token that ends a turn. Text from
elsewhere can so end the question and begin an answer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from expo_fast.data.columns import Message
from expo_fast.data.problems import Problem


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the tokens that the tokenizer marks as special, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {str(token) for token in added if token.special}
    wide = [text for text in texts if len(text.strip()) > 1]
    return tuple(sorted(wide, key=lambda text: (-len(text), text)))


def escaped(text: str, tokens: Sequence[str]) -> str:
    """Return a text with a space after the first character of each control token.

    `<|im_end|>` becomes `< |im_end|>`, which a tokenizer reads as plain text.
    """
    for token in tokens:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def without_control_tokens(message: Message, tokens: Sequence[str]) -> Message:
    """Return a message with escaped control tokens.

    Messages of the assistant are not changed, because a thinking block is made of such tokens.
    """
    if message["role"] == "assistant":
        return message
    return {**message, "content": escaped(message["content"], tokens)}


def found_in_prompts(problems: Sequence[Problem], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Return (id, control token) of each problem whose question has a control token."""
    found = []
    for problem in problems:
        texts = list(_texts_asked(problem))
        for token in tokens:
            if any(token in text for text in texts):
                found.append((problem.id, token))
                break
    return found


def _texts_asked(problem: Problem) -> Iterator[str]:
    if isinstance(problem.prompt, str):
        yield problem.prompt
        return
    for message in problem.prompt:
        if message["role"] != "assistant":
            yield message["content"]
