"""Chat templates: rendering of turns, and what a template puts around an answer.

Three parties name an end of a turn: the chat template, by what it renders after an answer; the
tokenizer, by its eos_token; and the checkpoint, by the eos_token_id of config.json and
generation_config.json. They differ more often than not. Qwen's base models have a template that
ends turns with <|im_end|>, and all else names the end of a document, <|endoftext|>. Llama 3 and
Gemma name both. So the end that texts are trained with is the template's, and sampling stops at
every end that one of the three names (`expo_fast.weights.load_model` puts them together).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from textwrap import shorten
from typing import Any

from expo_fast.data.columns import Message

TokenIds = tuple[int, ...]

PLAIN_STOP = "\nQuestion:"  # begins the next question, for a tokenizer without a chat template

# The texts of the turns that are rendered to see what a template does. No template changes them,
# and they are in no system prompt.
PROBE_QUESTION = "Zqx1"
PROBE_ANSWER = "Zqx2"
PROBE_NEXT = "Zqx3"

# Templates that state the day (Llama 3, SmolLM3) get this one. Otherwise a run resumed tomorrow and
# an evaluation next week would ask something else. It is given as a macro, because newer
# transformers accept no function.
TODAY = datetime(2026, 1, 1)
DATE_CODES = [f"%{code}" for code in "aAbBdejmyYHIMSp"] + ["%-d", "%-m"]
REPLACE_DATES = "".join(f"|replace('{code}', '{TODAY.strftime(code)}')" for code in DATE_CODES)
STRFTIME_NOW = "{% macro strftime_now(format) %}{{ format" + REPLACE_DATES + " }}{% endmacro %}\n"


@dataclass(frozen=True)
class AnswerTurn:
    """What a tokenizer and its chat template put around an answer of the assistant."""

    end_text: str
    """Text between an answer and `end_ids`. It is the end itself if that is no single token."""
    end_ids: TokenIds
    """The end token, with which texts are trained, and further ones that follow it at once. () if
    the end is no token but a text."""
    ends: TokenIds
    """The ids that end a turn: the first of `end_ids` and the tokenizer's eos_token."""
    stop_ids: TokenIds
    """The ids to stop sampling at: `ends`, and the token between an answer and the next turn."""
    stop_strings: tuple[str, ...] = ()
    """Texts to stop sampling at: an end of several tokens, or the beginning of the next turn."""
    tail: str = ""
    """All that is rendered after the last answer, such as the end and a newline."""
    lead: str = ""
    """What is rendered between a prompt and a given answer, such as a blank."""
    opened: str = ""
    """The end of a prompt that is not rendered before a given answer, such as <think>."""


def fill(tokenizer: Any, turns: Sequence[Message], *, for_answer: bool = True) -> str:
    """Return the turns as the tokenizer's chat template renders them.

    for_answer: end with what precedes an answer of the assistant, if the template renders it. If
        the last turn is the assistant's, it is the beginning of the answer: end with its text.

    Raises ValueError, with one sentence, if the template does not accept the turns.
    """
    prefilled = for_answer and turns[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            list(turns),
            chat_template=STRFTIME_NOW + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=for_answer and not prefilled,
            continue_final_message=prefilled,
        )
    except Exception as error:  # a template is a program: it may raise anything
        roles = ", ".join(turn["role"] for turn in turns)
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"the chat template refuses the turns ({roles}): {reason}") from error


def answer_turn(tokenizer: Any) -> AnswerTurn:
    """Return what the tokenizer's chat template puts around an answer, found by rendering one.

    The end is the first added token after the answer of a last turn. A template may render none
    there. If a text stands there, that is the end. Otherwise the end is the tokenizer's eos_token.

    Raises ValueError if nothing names an end, if the template fails, and if it does not render the
    text of a question.
    """
    if not tokenizer.chat_template:
        eos = _eos_ids(tokenizer, "the tokenizer has no eos_token")
        return AnswerTurn("", eos, eos, eos, stop_strings=(PLAIN_STOP,))
    question: Message = {"role": "user", "content": PROBE_QUESTION}
    answer: Message = {"role": "assistant", "content": PROBE_ANSWER}
    following: Message = {"role": "user", "content": PROBE_NEXT}
    prompt = fill(tokenizer, [question])
    if PROBE_QUESTION not in prompt:
        raise ValueError(
            "the chat template renders no question that is a plain text: it may be for a model "
            "that also reads images"
        )
    last = _rendered(tokenizer, [question, answer])
    middle = _rendered(tokenizer, [question, answer, following])
    before, _, tail = last.partition(PROBE_ANSWER)
    between = middle.partition(PROBE_ANSWER)[2].partition(PROBE_NEXT)[0]
    n_common = 0
    while prompt[: n_common + 1] == before[: n_common + 1] and n_common < len(prompt):
        n_common += 1
    return replace(
        _with_end(tokenizer, tail, between),
        lead=before[n_common:],
        opened=prompt[n_common:],
    )


def _with_end(tokenizer: Any, tail: str, between: str) -> AnswerTurn:
    """Return an answer's turn by its end.

    tail: what is rendered after the answer of a last turn.
    between: what is rendered between an answer and the next question.
    """
    end = _first_added_tokens(tokenizer, tail)
    border = _first_added_tokens(tokenizer, between)
    eos = tokenizer.eos_token_id
    own = () if eos is None else (eos,)
    stop_strings: tuple[str, ...] = ()
    if end is not None:
        end_text = tail[: end.start]
        end_ids = end.ids
    elif tail.strip():
        end_text = tail.rstrip()
        end_ids = ()
        stop_strings = (tail.strip(),)
    else:
        end_text = ""
        end_ids = _eos_ids(
            tokenizer,
            "the chat template renders no end after an answer, and the tokenizer has no eos_token",
        )
        if border is None and between.strip():
            blank = between[: len(between) - len(between.lstrip())]
            stop_strings = (blank[-1:] + between.strip(),)
    ends = tuple(dict.fromkeys((*end_ids[:1], *own)))
    borders = () if border is None else border.ids[:1]
    return AnswerTurn(
        end_text=end_text,
        end_ids=end_ids,
        ends=ends,
        stop_ids=tuple(dict.fromkeys((*ends, *borders))),
        stop_strings=stop_strings,
        tail=tail,
    )


@dataclass(frozen=True)
class _Found:
    """Tokens in a text."""

    start: int
    ids: TokenIds


def _first_added_tokens(tokenizer: Any, text: str) -> _Found | None:
    """Return the first token of the text that is no ordinary text, and those that follow at once.

    Whether the tokenizer marks a token as special is not asked: Gemma's <end_of_turn> once was not.
    """
    added = {}
    for content, token in tokenizer.get_added_vocab().items():
        if content.strip():  # others are runs of blanks
            added[content] = token
    if not added:
        return None
    # The longest first, because one may be the beginning of another.
    names = "|".join(re.escape(content) for content in sorted(added, key=len, reverse=True))
    run = re.search(f"(?:{names})+", text)
    if run is None:
        return None
    ids = [added[content] for content in re.findall(names, run[0])]
    return _Found(run.start(), tuple(ids))


def _rendered(tokenizer: Any, turns: Sequence[Message]) -> str:
    """Return the turns as rendered, "" if the template does not accept them."""
    try:
        return fill(tokenizer, turns, for_answer=False)
    except ValueError:
        return ""


def _eos_ids(tokenizer: Any, refusal: str) -> TokenIds:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{refusal}: name one in tokenizer_config.json")
    return (tokenizer.eos_token_id,)
