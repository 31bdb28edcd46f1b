"""Sampling requests, their validation, and their completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from expo_fast.modeling.shape import Shape

FinishReason = Literal["stop", "length", "error"]

MIN_TEMPERATURE = 1e-30  # at lower values, logits / temperature may overflow in fp32
MAX_TEMPERATURE = 1e30  # at higher values, logits / temperature may all underflow to 0 in fp32


@dataclass(frozen=True)
class Request:
    """A completion to sample. Its random numbers depend only on (seed, position)."""

    prompt_ids: Sequence[int]  # token ids, at least one
    max_new_tokens: int  # at least 1
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # nucleus sampling (arXiv:1904.09751); 1: all tokens
    top_k: int = 0  # number of likeliest tokens to draw from; 0: all tokens
    min_p: float = 0.0  # least probability relative to the likeliest token's (arXiv:2407.01082)
    seed: int = 0  # a 64-bit integer; use different seeds for the samples of a prompt
    stop_ids: Sequence[int] | None = None  # token ids that end it; None: the model's EOS ids
    stop_strings: Sequence[str] = ()  # texts that end it


@dataclass(frozen=True)
class Completion:
    """The tokens sampled for a request."""

    token_ids: list[int]  # including the stop token, if there is one
    logp: Tensor  # (len(token_ids),) fp32, nats, at the temperature and before any truncation
    finish_reason: str  # "stop", "length", or "error" if the model's logits were not finite


def check_requests(requests: Sequence[Request], shape: Shape, *, has_tokenizer: bool) -> None:
    """Raise ValueError if a model of this shape cannot serve one of the requests.

    has_tokenizer: whether stop strings are supported.
    """
    checked: dict[int, Sequence[int]] = {}  # prompts by id(), because requests may share a prompt
    for index, request in enumerate(requests):
        if not isinstance(request, Request):
            raise ValueError(f"request {index} is a {type(request).__name__}: must be a Request")
        prompt_ids = request.prompt_ids
        if id(prompt_ids) not in checked:
            _check_prompt(index, prompt_ids, shape)
            checked[id(prompt_ids)] = prompt_ids
        _check_integers(index, request)
        _check_stop_ids(index, request, shape)
        _check_length(index, request, shape)
        _check_sampling(index, request)
        _check_stop_strings(index, request, has_tokenizer)


def _check_prompt(index: int, ids: Sequence[int], shape: Shape) -> None:
    if getattr(ids, "ndim", 1) != 1:
        raise ValueError(
            f"request {index} has prompt_ids of {ids.ndim} dimensions: need those of one prompt"  # pyright: ignore[reportAttributeAccessIssue]
        )
    if not _are_integers(ids):
        raise ValueError(f"request {index} has prompt_ids={ids!r}: need a sequence of integers")
    if not len(ids):
        raise ValueError(f"request {index} has an empty prompt, need at least one token")
    _check_vocabulary(f"request {index} has the token id", ids, shape)


def _check_integers(index: int, request: Request) -> None:
    for name in ("max_new_tokens", "top_k", "seed"):
        value = getattr(request, name)
        if not _is_integer(value) or not -(2**63) <= value < 2**63:
            raise ValueError(f"request {index} has {name}={value!r}: need an integer of 64 bits")


def _check_stop_ids(index: int, request: Request, shape: Shape) -> None:
    ids = request.stop_ids
    if ids is None:
        return
    if not _are_integers(ids):
        raise ValueError(f"request {index} has stop_ids={ids!r}: need a sequence of integers")
    if len(ids):
        _check_vocabulary(f"request {index} has the stop id", ids, shape)


def _check_vocabulary(what: str, ids: Sequence[int], shape: Shape) -> None:
    for token in (min(ids), max(ids)):
        if not 0 <= token < shape.vocabulary:
            raise ValueError(
                f"{what} {token} outside [0, {shape.vocabulary}), the model's vocabulary"
            )


def _check_length(index: int, request: Request, shape: Shape) -> None:
    n_prompt = len(request.prompt_ids)
    n_new = request.max_new_tokens
    if n_new < 1:
        raise ValueError(f"request {index} has max_new_tokens={n_new}, need at least 1")
    if n_prompt + n_new > shape.context:
        raise ValueError(
            f"request {index} needs {n_prompt} prompt + {n_new} new tokens, "
            f"the model's context holds {shape.context}"
        )


def _check_sampling(index: int, request: Request) -> None:
    temperature = request.temperature
    if temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"request {index} has temperature={temperature}: need 0, or from 1e-30 to 1e30"
        )
    valid_p = 0 < request.top_p <= 1 and 0 <= request.min_p <= 1
    if not valid_p or request.top_k < 0:
        raise ValueError(
            f"request {index} has top_p={request.top_p}, top_k={request.top_k}, "
            f"min_p={request.min_p}: need 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1"
        )


def _check_stop_strings(index: int, request: Request, has_tokenizer: bool) -> None:
    strings = request.stop_strings
    valid = all(isinstance(string, str) and string for string in strings)
    if isinstance(strings, str) or not valid:
        raise ValueError(f"request {index} has stop_strings={strings!r}: need non-empty strings")
    if strings and not has_tokenizer:
        raise ValueError(f"request {index} has stop strings: give Generator a tokenizer for them")


def _are_integers(x: Any) -> bool:
    is_sequence = hasattr(x, "__len__") and hasattr(x, "__iter__")
    # Checking each distinct type is faster than checking each of thousands of tokens.
    return is_sequence and all(map(_is_integer, set(map(type, x))))


def _is_integer(x: Any) -> bool:
    # Float tensors and arrays have __index__ too, but `operator.index` rejects them later.
    return hasattr(x, "__index__")
