"""Tokenizers and chat templates that behave as those of well-known model families do.

The texts of the templates are ours. What they share with a family is what they put around an answer
and what they do with blanks and reasoning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# of cl100k, Qwen2 and Llama 3: punctuation takes the newlines after it into the same word
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_TOKENS = ("}Ċ", "}.Ċ", ".Ċ", ".ĊĊ", "ĊĊ", "Question", "boxed", "Ġ\\", "Ġis", "The", "Ġ7", "Ġ8")
PIECES = ("▁The", "▁answer", "▁is", "▁7", "▁8", "▁Question", "Question", "▁\\", "boxed", "Answer")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} "
    "[/INST]{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The last answer gets a thinking block, empty if it has no reasoning. Earlier ones lose theirs.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set parts = m.content.split('</think>') %}"
    "{% set reason = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ reason }}\n</think>\n\n"
    "{{ parts[-1].lstrip('\n') }}{% elif m.role == 'assistant' %}{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_OPEN = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# The prompt opens the reasoning, and every answer is rendered without any.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
R1_CLOSED = R1.replace("<|Assistant|><think>\n", "<|Assistant|>")
NO_GENERATION_PROMPT = CHATML.partition("{% if add")[0]
PHI3 = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
TWO_ENDS = CHATML.replace("<|im_end|>", "<|im_end|><|endoftext|>")
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
END_IN_THE_MIDDLE = CHATML.replace(
    "<|im_end|>\n", "{% if m.role == 'user' or not loop.last %}<|im_end|>\n{% endif %}"
)


def byte_level(
    special: Sequence[str],
    template: str | None,
    *,
    eos: str | None,
    bos: str | None = None,
    plain: Sequence[str] = (),  # added tokens that are not marked as special
    prefix_space: bool = False,
) -> Any:
    """Return a byte-level BPE tokenizer with a few tokens of several bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(_bpe([*special, *letters], BYTE_TOKENS))
    if prefix_space:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        split = pre_tokenizers.Split(Regex(WORDS), "isolated")
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    backend.decoder = decoders.ByteLevel()
    return _wrapped(backend, special, template, eos=eos, bos=bos, plain=plain)


def sentence_piece(
    special: Sequence[str],
    template: str | None,
    *,
    eos: str | None,
    bos: str | None = "<s>",
    scheme: str = "legacy",
    plain: Sequence[str] = (),
    unigram: bool = False,
) -> Any:
    """Return a tokenizer that puts a blank before a text, as SentencePiece does.

    scheme: `legacy` (Llama 2) and `always` put it before each text between added tokens, `first`
    only at the beginning.
    """
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = ["▁", *(chr(i) for i in range(33, 127))]
    if unigram:
        scores = dict.fromkeys([*special, *bytes_], 0.0)
        scores |= dict.fromkeys(letters, -6.0) | dict.fromkeys(PIECES, -7.0)
        unk = list(scores).index("<unk>")
        backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=unk, byte_fallback=True))
    else:
        backend = Tokenizer(_bpe([*special, *bytes_, *letters], PIECES, byte_fallback=True))
    end = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if scheme == "legacy":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), *end])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    return _wrapped(backend, special, template, eos=eos, bos=bos, plain=plain)


def _bpe(tokens: list[str], words: Sequence[str], **options: Any) -> models.BPE:
    """Return a BPE model that also has the words, each merged from left to right."""
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    parts = [first + second for first, second in merges]
    names = list(dict.fromkeys([*tokens, *parts]))
    vocabulary = {name: i for i, name in enumerate(names)}
    unk = "<unk>" if "<unk>" in vocabulary else None
    return models.BPE(
        vocab=vocabulary, merges=list(dict.fromkeys(merges)), unk_token=unk, **options
    )


def _wrapped(
    backend: Tokenizer,
    special: Sequence[str],
    template: str | None,
    *,
    eos: str | None,
    bos: str | None,
    plain: Sequence[str],
) -> Any:
    backend.add_tokens(list(plain))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        bos_token=bos,
        pad_token=special[0],
        unk_token="<unk>" if "<unk>" in special else None,
        additional_special_tokens=[name for name in special if name not in plain],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Family:
    """A tokenizer, and the end that its template gives a turn."""

    tokenizer: Any
    end: str


def family(name: str) -> Family:
    """Return a family of FAMILIES."""
    pad = "<pad>"
    chatml = (pad, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    llama3 = (pad, "<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
    llama3 += ("<|eot_id|>",)
    pieces = (pad, "<unk>", "<s>", "</s>")
    gemma = (pad, "<unk>", "<bos>", "<eos>")
    turns = ("<start_of_turn>", "<end_of_turn>")
    r1 = (pad, "<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>")
    thinking = ("<think>", "</think>")
    made = {
        "chatml": lambda: (byte_level(chatml, CHATML, eos="<|im_end|>"), "<|im_end|>"),
        "chatml-base": lambda: (byte_level(chatml, CHATML, eos="<|endoftext|>"), "<|im_end|>"),
        "llama3": lambda: (
            byte_level(llama3, LLAMA3, eos="<|end_of_text|>", bos="<|begin|>"),
            "<|eot_id|>",
        ),
        "mistral": lambda: (sentence_piece(pieces, MISTRAL, eos="</s>"), "</s>"),
        "mistral-first": lambda: (
            sentence_piece(pieces, MISTRAL, eos="</s>", scheme="first"),
            "</s>",
        ),
        "llama2": lambda: (sentence_piece(pieces, LLAMA2, eos="</s>"), "</s>"),
        "zephyr": lambda: (sentence_piece(pieces, ZEPHYR, eos="</s>", bos=None), "</s>"),
        "gemma": lambda: (
            sentence_piece(
                gemma,
                GEMMA,
                eos="<eos>",
                bos="<bos>",
                plain=turns,
                scheme="first",
                unigram=True,
            ),
            "<end_of_turn>",
        ),
        "qwen3": lambda: (
            byte_level(chatml, QWEN3, eos="<|im_end|>", plain=thinking),
            "<|im_end|>",
        ),
        "qwen3-open": lambda: (
            byte_level(chatml, QWEN3_OPEN, eos="<|im_end|>", plain=thinking),
            "<|im_end|>",
        ),
        "r1": lambda: (
            byte_level(r1, R1, eos="<|end|>", bos="<|begin|>", plain=thinking),
            "<|end|>",
        ),
        "r1-closed": lambda: (
            byte_level(r1, R1_CLOSED, eos="<|end|>", bos="<|begin|>", plain=thinking),
            "<|end|>",
        ),
        "phi3": lambda: (byte_level(chatml, PHI3, eos="<|endoftext|>"), "<|im_end|>"),
        "two-ends": lambda: (
            byte_level(chatml, TWO_ENDS, eos="<|endoftext|>"),
            "<|im_end|><|endoftext|>",
        ),
        "no-end": lambda: (byte_level(chatml, ALPACA, eos="<|endoftext|>"), "<|endoftext|>"),
        "glm": lambda: (
            byte_level((*chatml, "<|user|>", "<|assistant|>"), GLM, eos="<|endoftext|>"),
            "<|endoftext|>",
        ),
        "end-in-the-middle": lambda: (
            byte_level(chatml, END_IN_THE_MIDDLE, eos="<|im_end|>"),
            "<|im_end|>",
        ),
        "end-is-text": lambda: (
            byte_level((pad, "<|endoftext|>"), CHATML, eos="<|endoftext|>"),
            "<|im_end|>",
        ),
        "no-generation-prompt": lambda: (
            byte_level(chatml, NO_GENERATION_PROMPT, eos="<|im_end|>"),
            "<|im_end|>",
        ),
        "none": lambda: (byte_level((pad, "<|end|>"), None, eos="<|end|>"), "<|end|>"),
        "none-pieces": lambda: (sentence_piece(pieces, None, eos="</s>"), "</s>"),
        "none-pieces-first": lambda: (
            sentence_piece(pieces, None, eos="</s>", scheme="first"),
            "</s>",
        ),
        "none-unigram": lambda: (
            sentence_piece(pieces, None, eos="</s>", scheme="always", unigram=True),
            "</s>",
        ),
        "none-prefix-space": lambda: (
            byte_level((pad, "<|end|>"), None, eos="<|end|>", prefix_space=True),
            "<|end|>",
        ),
    }
    return Family(*made[name]())
