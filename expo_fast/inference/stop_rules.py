"""Rules that end a completion."""

from collections.abc import Sequence
from typing import Any

from expo_fast.inference.requests import FinishReason, Request


class StopRules:
    """Decide after each sampled token whether its completion is finished.

    To add a rule, add a condition to `finish_reason`, and a field to `Request` if callers set it.

    eos_ids: token ids that end a completion whose request has no stop ids.
    tokenizer: needed for stop strings only.
    """

    def __init__(self, eos_ids: Sequence[int], tokenizer: Any):
        self.eos_ids = eos_ids
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # of single tokens

    def finish_reason(self, request: Request, token_ids: Sequence[int]) -> FinishReason | None:
        """Return the reason why the last token ends the completion, or None if it does not."""
        if self._is_stop_token(request, token_ids[-1]):
            return "stop"
        if self._has_stop_string(request, token_ids):
            return "stop"
        if len(token_ids) == request.max_new_tokens:
            return "length"
        return None

    def _is_stop_token(self, request: Request, token: int) -> bool:
        stop_ids = self.eos_ids if request.stop_ids is None else request.stop_ids
        return token in stop_ids

    def _has_stop_string(self, request: Request, token_ids: Sequence[int]) -> bool:
        strings = request.stop_strings
        if not any(self._may_end(string, token_ids[-1]) for string in strings):
            return False
        n_tokens = 4 * max(map(len, strings)) + 4  # a UTF-8 character may be four tokens
        tail = self.tokenizer.decode(token_ids[-n_tokens:])
        return any(string in tail for string in strings)

    def _may_end(self, string: str, token: int) -> bool:
        """Return whether the token may complete the string, judged by the token's text.

        This avoids decoding the last tokens at every step, which would cost more than sampling.
        """
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.tokenizer.decode([token])
        if not text.strip() or string[-1].isspace():
            return True  # some tokenizers drop spaces at the beginning of a text
        if "\ufffd" in text:
            return True  # the token is a part of a character
        return string[-1] in text
