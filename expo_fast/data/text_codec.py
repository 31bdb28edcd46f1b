"""Conversion between token ids and texts that follow other text."""

from collections.abc import Sequence
from typing import Any

ANCHORS = ("\n", "=", "(", "a", "1", ".")  # texts to put before a continuation


class TextCodec:
    """Encode and decode texts that follow other text.

    SentencePiece tokenizers (Llama 2, Mistral), and others with `add_prefix_space`, put a space
    before each text that they encode. Some remove it from each text that they decode. That is right
    at the beginning of a text and wrong after other tokens: an appended "\\boxed{7}" would get a
    space, and the answer "7" would become the token of " 7". For these tokenizers, a continuation
    is encoded and decoded after another text, the anchor.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        digit = self._encode("7")
        self._puts_blank = self._decode(digit + digit) != "77"
        self._anchor_ids = self._encode("a") if self._puts_blank else []
        self._anchor = self._decode(self._anchor_ids) if self._puts_blank else ""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that follows other text."""
        if not self._puts_blank:
            return self._encode(text)
        for anchor in ANCHORS:
            before = self._encode(anchor)
            together = self._encode(anchor + text)
            # Otherwise the anchor and the text have a token in common.
            if together[: len(before)] == before:
                return together[len(before) :]
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids that follow other text, without special tokens."""
        return self._decode([*self._anchor_ids, *ids]).removeprefix(self._anchor)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            list(ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
