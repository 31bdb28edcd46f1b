"""Chat templates: rendering of turns, and the text that a template puts around an answer.

Three sources name the end of a turn: the text that the chat template renders after an answer, the
eos_token of the tokenizer, and the eos_token_id of the checkpoint (config.json and
generation_config.json). They differ more often than not. The template of Qwen's base models ends
turns with <|im_end|>; the tokenizer and the checkpoint name the end of a document, <|endoftext|>.
The checkpoints of Llama 3 and Gemma name both. So training texts end with the template's end, and
sampling stops at the ends of all three sources, which `expo_fast.weights.load_model` collects.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from textwrap import shorten
from typing import Any

from expo_fast.data.columns import Message
from expo_fast.data.template_probe import fault_of_template
from expo_fast.data.time_limit import time_limit

TokenIds = tuple[int, ...]

PLAIN_STOP = "\nQuestion:"  # begins the next question, for a tokenizer without a chat template

# The texts of the turns that are rendered to find out what a template does. No template changes
# them, and no system prompt contains them.
PROBE_QUESTION = "Zqx1"
PROBE_ANSWER = "Zqx2"
PROBE_NEXT = "Zqx3"

# Templates that state the date (Llama 3, SmolLM3) get this one. Otherwise the prompts would differ
# in a run resumed tomorrow and in an evaluation next week. The date is passed as a macro, because
# newer versions of transformers do not accept a function.
TODAY = datetime(2026, 1, 1)
DATE_CODES = [f"%{code}" for code in "aAbBdejmyYHIMSp"] + ["%-d", "%-m"]
REPLACE_DATES = "".join(f"|replace('{code}', '{TODAY.strftime(code)}')" for code in DATE_CODES)
RENDERING_S = 10.0  # for one conversation; a rendering takes less than a millisecond
STRFTIME_NOW = "{% macro strftime_now(format) %}{{ format" + REPLACE_DATES + " }}{% endmacro %}\n"


@dataclass(frozen=True)
class AnswerTurn:
    """The text and tokens that a tokenizer and its chat template put around an answer."""

    end_text: str
    """Text between an answer and `end_ids`. It is the end itself if the end is not a token."""
    end_ids: TokenIds
    """The token that ends training texts, and the added tokens that follow it immediately. () if
    the end is a text and not a token."""
    ends: TokenIds
    """The ids that end a turn: the first of `end_ids` and the tokenizer's eos_token."""
    stop_ids: TokenIds
    """The ids to stop sampling at: `ends`, and the token between an answer and the next turn."""
    stop_strings: tuple[str, ...] = ()
    """Texts to stop sampling at: an end of several tokens, or the beginning of the next turn."""
    tail: str = ""
    """The text after the last answer, such as the end and a newline."""
    lead: str = ""
    """The text between a prompt and a given answer, such as a space."""
    opened: str = ""
    """The end of a prompt, such as <think>, that is not rendered before a given answer."""


def fill(tokenizer: Any, turns: Sequence[Message], *, for_answer: bool = True) -> str:
    """Return the turns as the tokenizer's chat template renders them.

    for_answer: end with the text before an answer of the assistant, if the template renders one. If
        the last turn is the assistant's, it is the beginning of the answer: end with its text.

    Raise ValueError, with one sentence, if the template does not accept the turns.
    """
    prefilled = for_answer and turns[-1]["role"] == "assistant"
    try:
        with time_limit(RENDERING_S):
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
    """Return what the tokenizer's chat template puts around an answer. Render an answer to find it.

    The end is the first added token after the answer of a last turn. If there is none, the end is
    the text after the answer. If there is no text, the end is the tokenizer's eos_token.

    Raise ValueError if no source names an end, if the template fails, or if it does not render the
    text of a question.
    """
    if not tokenizer.chat_template:
        eos = _eos_ids(tokenizer, "the tokenizer has no eos_token")
        return AnswerTurn("", eos, eos, eos, stop_strings=(PLAIN_STOP,))
    question: Message = {"role": "user", "content": PROBE_QUESTION}
    answer: Message = {"role": "assistant", "content": PROBE_ANSWER}
    following: Message = {"role": "user", "content": PROBE_NEXT}
    check_limits(tokenizer, [[question], [question, answer], [question, answer, following]])
    prompt = fill(tokenizer, [question])
    if PROBE_QUESTION not in prompt:
        raise ValueError(
            "the chat template does not render a question that is a plain text: it may be for a "
            "model that also reads images"
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


def check_limits(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> None:
    """Raise ValueError if the template takes too much time or memory for short conversations."""
    template = STRFTIME_NOW + tokenizer.get_chat_template()
    names = json.dumps(tokenizer.special_tokens_map, default=str)
    fault = fault_of_template(template, json.dumps(conversations), names)
    if fault is not None:
        raise ValueError(f"the chat template {fault}: it is broken or hostile")


def _with_end(tokenizer: Any, tail: str, between: str) -> AnswerTurn:
    """Return an answer's turn with its end. `lead` and `opened` are not set.

    tail: the text after the answer of a last turn.
    between: the text between an answer and the next question.
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
    """Adjacent tokens in a text, and the index of the first character."""

    start: int
    ids: TokenIds


def _first_added_tokens(tokenizer: Any, text: str) -> _Found | None:
    """Return the first added token of a text, and the added tokens that follow it immediately.

    A token need not be marked as special: Gemma's <end_of_turn> once was not.
    """
    added = {}
    for content, token in tokenizer.get_added_vocab().items():
        if content.strip():  # the others are whitespace
            added[content] = token
    if not added:
        return None
    # Put the longest first, because a token may begin with another one.
    names = "|".join(re.escape(content) for content in sorted(added, key=len, reverse=True))
    run = re.search(f"(?:{names})+", text)
    if run is None:
        return None
    ids = [added[content] for content in re.findall(names, run[0])]
    return _Found(run.start(), tuple(ids))


def _rendered(tokenizer: Any, turns: Sequence[Message]) -> str:
    """Return the turns as rendered, or "" if the template does not accept them."""
    try:
        return fill(tokenizer, turns, for_answer=False)
    except ValueError:
        return ""


def _eos_ids(tokenizer: Any, refusal: str) -> TokenIds:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{refusal}: name one in tokenizer_config.json")
    return (tokenizer.eos_token_id,)
