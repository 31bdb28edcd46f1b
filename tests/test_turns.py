"""Training texts agree with the rendered template, the sampled tokens and the judged texts."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import families
from expo_fast.algorithms.diagnostics import DiagnosedQuestion, diagnostic_samples
from expo_fast.algorithms.dpo import pairs_of_groups
from expo_fast.algorithms.explanations import accept_explanations, answer_after
from expo_fast.algorithms.grpo import policy_samples, with_advantages
from expo_fast.algorithms.rollout import judge_attempts
from expo_fast.config import Train
from expo_fast.data.problems import Problem, load_problems, worked_examples
from expo_fast.data.prompts import Prompter
from expo_fast.evaluate import evaluate
from expo_fast.generate import Completion, Generator, Request
from expo_fast.reward import boxed_answer_reward, score_answers
from expo_fast.storage.default_model import DEFAULT_MODEL
from expo_fast.weights import find_model, load_model, save_model
from families import family
from tiny import tiny_model, transformers_copy

SOLUTION = "3 + 4 = 7.\nThe answer is \\boxed{7}."
PROBLEM = Problem("a", "3 + 4?", "7", solution=SOLUTION)
BLANKS = Problem("a", "3 + 4?", "7", pair=("  It is 7. \n", "It is 8."))

CHATS = ["chatml", "chatml-base", "llama3", "mistral", "mistral-first", "llama2", "zephyr", "gemma"]
CHATS += ["qwen3", "r1-closed", "phi3", "no-generation-prompt", "two-ends"]
PLAIN = ["none", "none-pieces", "none-pieces-first", "none-unigram", "none-prefix-space"]
SHOT = Problem("s", "1 + 1?", "2", solution="1 + 1 = 2.")


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's use of transformers


# Given completions are rendered by the template, as in TRL


def rows_of_trl(kind: Any, config: Any, tokenizer: Any, row: dict[str, Any], folder: Path) -> Any:
    """Return the only row as TRL's trainer tokenises it."""
    arguments = config(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None
    )
    reference = {"ref_model": transformers_copy(tiny_model())} if kind is DPOTrainer else {}
    trainer = kind(
        model=transformers_copy(tiny_model()),
        args=arguments,
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
        **reference,
    )
    return trainer.train_dataset[0]


def sft_of_trl(prompter: Prompter, problem: Problem, text: str, folder: Path) -> tuple[Any, Any]:
    """Return the prompt's and the completion's ids of TRL's SFTTrainer."""
    row = {"prompt": conversation(prompter, problem), "completion": reply(prompter, text)}
    made = rows_of_trl(SFTTrainer, SFTConfig, prompter.tokenizer, row, folder)
    n_prompt = made["labels"].count(-100)
    return made["input_ids"][:n_prompt], made["input_ids"][n_prompt:]


def conversation(prompter: Prompter, problem: Problem) -> Any:
    """Return the prompt for TRL: messages, or a text for a tokenizer without a template."""
    if prompter.tokenizer.chat_template:
        return prompter._turns(problem, explain=False)
    return prompter._prompt_text(problem, explain=False)


def reply(prompter: Prompter, text: str) -> Any:
    if prompter.tokenizer.chat_template:
        return [{"role": "assistant", "content": text}]
    return " " + text


def same_up_to_the_end(prompter: Prompter, theirs: list[int], ours: tuple[int, ...]) -> None:
    """Check that TRL's ids begin with ours, and that no ordinary text follows.

    TRL also trains on the text after the end, which is never sampled.
    """
    assert tuple(theirs[: len(ours)]) == ours
    after = prompter.tokenizer.decode(theirs[len(ours) :], skip_special_tokens=True)
    assert after.strip() == ""


@pytest.mark.parametrize("name", [*CHATS, *PLAIN])
@pytest.mark.parametrize("shots", [(), (SHOT,)], ids=["alone", "shots"])
def test_token_ids_of_sft_are_those_of_trl(name: str, shots: Any, tmp_path: Path):
    prompter = Prompter(family(name).tokenizer, shots)
    prompt, completion = sft_of_trl(prompter, PROBLEM, SOLUTION, tmp_path)
    assert tuple(prompt) == prompter.solve(PROBLEM)
    same_up_to_the_end(prompter, completion, prompter.expert(PROBLEM))


@pytest.mark.parametrize("name", [*CHATS, *PLAIN])
def test_token_ids_of_dpo_are_those_of_trl(name: str, tmp_path: Path):
    prompter = Prompter(family(name).tokenizer)
    assert BLANKS.pair is not None
    chosen, rejected = BLANKS.pair
    row = {
        "prompt": conversation(prompter, BLANKS),
        "chosen": reply(prompter, chosen),
        "rejected": reply(prompter, rejected),
    }
    made = rows_of_trl(DPOTrainer, DPOConfig, prompter.tokenizer, row, tmp_path)
    assert tuple(made["prompt_ids"]) == prompter.solve(BLANKS)
    same_up_to_the_end(prompter, made["chosen_ids"], prompter.target(BLANKS))
    same_up_to_the_end(prompter, made["rejected_ids"], prompter.completion(BLANKS, rejected))


def test_trl_shortens_a_prompt_whose_last_token_would_merge_with_the_answer(tmp_path: Path):
    """expo_fast keeps the prompt that is sampled from. Two newlines are one token of Qwen."""
    prompter = Prompter(family("qwen3-open").tokenizer)
    prompt, _ = sft_of_trl(prompter, PROBLEM, SOLUTION, tmp_path)
    solve = prompter.solve(PROBLEM)
    assert tuple(prompt) == solve[:-1]
    text = prompter.tokenizer.decode([*solve, *prompter.expert(PROBLEM)])
    assert text.endswith(f"assistant\n<think>\n\n</think>\n\n{SOLUTION}<|im_end|>")


def test_trl_drops_opened_reasoning_from_the_prompt(tmp_path: Path):
    """expo_fast refuses an answer without reasoning. With reasoning, it keeps the prompt."""
    prompter = Prompter(family("r1").tokenizer)
    reasoned = f"<think>\nI add.\n</think>\n\n{SOLUTION}"
    prompt, completion = sft_of_trl(prompter, PROBLEM, reasoned, tmp_path)
    decode = prompter.tokenizer.decode
    assert decode(prompt).endswith("<|Assistant|>")
    assert "I add" not in decode(completion)
    problem = Problem("p1", "3 + 4?", "7", solution=reasoned)
    text = decode([*prompter.solve(problem), *prompter.expert(problem)])
    assert text.endswith(f"<|Assistant|>{reasoned}<|end|>")
    with pytest.raises(
        ValueError, match=r"^problem a: the chat template ends a prompt with '.*<th"
    ):
        prompter.expert(PROBLEM)


def test_trl_drops_the_reasoning_that_a_template_removes(tmp_path: Path):
    prompter = Prompter(family("r1-closed").tokenizer)
    reasoned = f"<think>\nI add.\n</think>\n\n{SOLUTION}"
    _, completion = sft_of_trl(prompter, PROBLEM, reasoned, tmp_path)
    assert "I add" not in prompter.tokenizer.decode(completion)
    problem = Problem("a", "3 + 4?", "7", solution=reasoned)
    assert prompter.tokenizer.decode(prompter.expert(problem)) == f"{reasoned}<|end|>"


@pytest.mark.parametrize("name", ["no-end", "end-in-the-middle"])
def test_trl_trains_on_no_end_if_a_template_renders_none(name: str, tmp_path: Path):
    made = family(name)
    prompter = Prompter(made.tokenizer)
    _, completion = sft_of_trl(prompter, PROBLEM, SOLUTION, tmp_path)
    assert made.tokenizer.eos_token_id not in completion
    assert prompter.tokenizer.decode(prompter.expert(PROBLEM)) == SOLUTION + made.end


def test_reasoning_is_rendered_by_a_template_that_supports_it():
    problem = Problem("a", "?", "7", solution=f"<think>\nI add.\n</think>\n\n{SOLUTION}")
    for name in ("qwen3", "qwen3-open"):
        prompter = Prompter(family(name).tokenizer)
        text = prompter.tokenizer.decode([*prompter.solve(problem), *prompter.expert(problem)])
        assert text.endswith(f"assistant\n{problem.solution}<|im_end|>")


def test_the_likelihood_of_a_refused_answer_is_not_measured():
    prompter = Prompter(family("r1").tokenizer)
    samples = diagnostic_samples([DiagnosedQuestion(PROBLEM, [], None)], prompter)
    assert samples == []


def test_a_template_that_renders_no_question_is_refused():
    tokenizer = family("chatml").tokenizer
    parts = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    tokenizer.chat_template = families.CHATML.replace("{{ m.content }}", parts)
    with pytest.raises(ValueError, match="does not render a question that is a plain text"):
        Prompter(tokenizer)


# The end of a turn


@pytest.mark.parametrize("name", [*CHATS, *PLAIN, "no-end", "end-in-the-middle", "end-is-text"])
def test_every_assembled_text_ends_as_the_template_ends_a_turn(name: str):
    made = family(name)
    prompter = Prompter(made.tokenizer)
    decode = made.tokenizer.decode
    ids = prompter.expert(PROBLEM)
    blank = " " if name == "llama2" else ""  # its template renders a space before the end
    assert decode(ids).endswith(SOLUTION + blank + made.end)
    longer = prompter.longer(prompter.codec.encode("It is 7."), " So \\boxed{7}.")
    assert decode(longer).lstrip() == f"It is 7. So \\boxed{{7}}.{blank}{made.end}"
    assert prompter.text(ids).strip() in (SOLUTION, f"assistant\n{SOLUTION}", f"{THINK}{SOLUTION}")
    assert prompter.ended(ids, "stop") == ids


THINK = "<think>\n\n</think>\n\n"


def test_an_end_that_is_not_marked_as_special_is_not_judged():
    prompter = Prompter(family("gemma").tokenizer)
    (end,) = prompter.turn.end_ids
    assert end not in prompter.tokenizer.all_special_ids
    ids = [*prompter.codec.encode("It is 7."), end]
    assert prompter.text(ids) == "It is 7."
    assert prompter.longer(ids, " So.").count(end) == 1


def test_a_template_may_end_the_last_turn_with_another_token():
    tokenizer = family("chatml-base").tokenizer  # its eos_token is not the one in the middle
    tokenizer.chat_template = families.CHATML.replace(
        "<|im_end|>", "{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}"
    )
    turn = Prompter(tokenizer).turn
    assert tokenizer.decode(turn.end_ids) == "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(turn.stop_ids) == ["<|endoftext|>", "<|im_end|>"]


def test_without_an_end_sampling_stops_where_the_next_turn_begins():
    text = Prompter(family("no-end").tokenizer)
    assert text.turn.stop_strings == ("\n### Instruction:",)
    token = family("glm").tokenizer
    prompter = Prompter(token)
    user = token.convert_tokens_to_ids("<|user|>")
    assert user in prompter.turn.stop_ids
    sampled = [*prompter.codec.encode("It is 7.\n"), user]
    for each in (prompter, Prompter(token, ends=prompter.turn.stop_ids)):
        assert token.decode(each.ended(sampled, "stop")) == "It is 7.<|endoftext|>"
        assert each.text(sampled) == "It is 7."


def test_an_end_of_several_ordinary_tokens_is_a_stop_string_and_is_kept_as_sampled():
    prompter = Prompter(family("end-is-text").tokenizer)
    assert prompter.stop_strings == ("<|im_end|>",)
    sampled = prompter.codec.encode("It is 7.<|im_end|>")
    assert prompter.ended(sampled, "stop") == tuple(sampled)
    assert prompter.text(sampled) == "It is 7."
    template = families.CHATML.replace("<|im_end|>", "[The]")
    prompter = Prompter(families.byte_level(("<pad>",), template, eos="<pad>"))
    vocabulary = prompter.tokenizer.get_vocab()
    letters = [*prompter.codec.encode("It is 7."), *(vocabulary[letter] for letter in "[The]")]
    assert "The" in vocabulary  # so the text alone is encoded otherwise
    assert prompter.ended(letters, "stop") == tuple(letters)


def test_sampling_stops_at_the_first_of_two_end_tokens_and_both_are_trained_on():
    prompter = Prompter(family("two-ends").tokenizer)
    first, second = prompter.turn.end_ids
    assert first in prompter.turn.stop_ids
    assert prompter.ended([50, 51, first], "stop") == (50, 51, first, second)
    assert prompter.written([50, 51, first, second]) == [50, 51]


def test_a_plain_completion_that_ends_by_itself_gets_no_second_end():
    prompter = Prompter(family("none").tokenizer)
    ids = [*prompter.codec.encode(" It is 7."), *prompter.turn.end_ids]
    assert prompter.ended(ids, "stop") == tuple(ids)
    named = Prompter(family("none").tokenizer, ends=(9,))  # an end of the checkpoint alone
    assert named.ended([50, 51, 9], "stop") == (50, 51, 9)


def test_a_tokenizer_without_any_end_is_refused_in_one_sentence():
    for template in (None, families.ALPACA):
        tokenizer = families.byte_level(("<pad>",), template, eos=None)
        with pytest.raises(ValueError, match=r"no eos_token: name one in tokenizer_config.json$"):
            Prompter(tokenizer)
    ended = families.byte_level(("<pad>", "<|im_end|>"), families.CHATML, eos=None)
    assert Prompter(ended).turn.end_ids == (1,)  # the template names one


def saved(folder: Path, tokenizer: Any, **config: Any) -> Path:
    """Save a tiny model that has the tokenizer's vocabulary, and the tokenizer."""
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": None}
    model = tiny_model("qwen2", **(sizes | config))
    save_model(model, tokenizer, folder)
    return folder


def test_a_base_model_stops_at_the_templates_end_with_a_warning(tmp_path: Path):
    """The tokenizer and the configs of Qwen's base models name only the end of a document."""
    tokenizer = family("chatml-base").tokenizer
    folder = saved(tmp_path / "base", tokenizer, eos_token_id=1)
    with pytest.warns(
        UserWarning, match=r"<\|endoftext\|> \(1\).* to end with <\|im_end\|> \(3\)$"
    ):
        model, tokenizer = load_model(folder)
    assert model.eos_ids == (1, 3)
    save_model(model, tokenizer, tmp_path / "again")  # other programs stop there too
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["eos_token_id"] == [1, 3]


def test_the_sampler_stops_at_the_end_that_is_trained_on(tmp_path: Path):
    folder = saved(tmp_path, family("chatml-base").tokenizer, eos_token_id=1)
    with pytest.warns(UserWarning, match="sampling stops at"):
        model, tokenizer = load_model(folder, dtype=torch.float32)
    prompter = Prompter(tokenizer)
    with torch.no_grad():
        model.head_weight.zero_()
        model.head_weight[3] = 1
    prompt = prompter.solve(PROBLEM)
    completions = Generator(model).sample([Request(prompt, 9, seed=seed) for seed in range(40)])
    assert all(done.finish_reason == "stop" for done in completions if 3 in done.token_ids)
    assert any(3 in done.token_ids for done in completions)


def test_sampling_stops_at_the_tokenizers_end_if_the_checkpoint_names_another(tmp_path: Path):
    folder = saved(tmp_path, family("none").tokenizer, eos_token_id=0)
    config = GenerationConfig(eos_token_id=[0]).to_json_string()
    (folder / "generation_config.json").write_text(config)
    with pytest.warns(UserWarning, match=r"the checkpoint ends a text with <pad> \(0\)"):
        model, _ = load_model(folder)
    assert model.eos_ids == (0, 1)
    assert model.generation_config.eos_token_id == [0, 1]


@pytest.mark.parametrize(
    ("name", "eos", "reason"),
    [("no-end", 1, "renders no end"), ("end-is-text", 1, "is no token of the tokenizer")],
)
def test_a_template_without_an_end_token_is_reported(tmp_path, name, eos, reason):
    folder = saved(tmp_path, family(name).tokenizer, eos_token_id=eos)
    with pytest.warns(UserWarning, match=reason):
        load_model(folder)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "eos"), [("chatml", 3), ("llama3", [2, 5]), ("none", [0, 1])])
def test_there_is_no_warning_if_the_three_sources_agree(name: str, eos: Any, tmp_path: Path):
    model, _ = load_model(saved(tmp_path, family(name).tokenizer, eos_token_id=eos))
    assert model.config.eos_token_id == eos


def test_an_end_outside_the_models_vocabulary_is_refused(tmp_path: Path):
    folder = saved(tmp_path, family("gemma").tokenizer, vocab_size=200, eos_token_id=3)
    with pytest.raises(
        ValueError, match=r"<end_of_turn> \(\d+\), but the model's vocabulary has 2"
    ):
        load_model(folder)


# A stop string that begins inside a token


def brace_and_newline(prompter: Prompter, before: str, token: str) -> list[int]:
    """Return a sampled answer with a stop string that begins inside `token`."""
    vocabulary = prompter.tokenizer.get_vocab()
    rest = prompter.codec.encode("Question: Who is")
    return [*prompter.codec.encode(before), vocabulary[token], *rest]


def completed(ids: list[int]) -> Completion:
    return Completion(ids, torch.zeros(len(ids)), "stop")


@pytest.mark.parametrize(("token", "kept"), [("}Ċ", "}"), ("}.Ċ", "}.")])
def test_a_box_keeps_its_brace_if_a_stop_string_begins_inside_the_token(token: str, kept: str):
    prompter = Prompter(family("none").tokenizer)
    reasoning = " 3 + 4 = 7, so \\boxed{7"
    ids = brace_and_newline(prompter, reasoning, token)
    ended = prompter.ended(ids, "stop")
    assert prompter.tokenizer.decode(ended) == f"{reasoning}{kept}<|end|>"
    before = prompter.codec.encode(reasoning)
    assert ended[: len(before)] == tuple(before)  # as they were sampled
    assert prompter.text(ids) == prompter.text(ended) == reasoning + kept


def test_explanations_are_judged_as_they_are_trained_on():
    prompter = Prompter(family("none").tokenizer)
    reasoning = " We add both of them: 3 + 4 = 7. So it is \\boxed{"
    ids = brace_and_newline(prompter, reasoning + "7", "}Ċ")
    cut_off = prompter.codec.encode(reasoning + "\nQuestion: 7}")
    seen = []

    def verify(answers: list[str], texts: list[str]) -> list[float | None]:
        seen.extend(texts)
        return score_answers(answers, texts)

    completions = [completed(ids), completed(cut_off)]
    found = accept_explanations([PROBLEM], completions, prompter, verify, append_answer=False)
    (accepted,) = found.texts["a"]
    assert seen == [prompter.text(accepted), reasoning]
    assert score_answers(["7"], [prompter.text(accepted)]) == [1.0]


def test_an_appended_answer_is_judged_too():
    prompter = Prompter(family("none").tokenizer)
    ids = [*prompter.codec.encode(" 3 + 4 = 7."), *prompter.turn.end_ids]
    seen = []

    def verify(answers: list[str], texts: list[str]) -> list[float | None]:
        seen.extend(texts)
        return [1.0] * len(texts)

    found = accept_explanations([PROBLEM], [completed(ids)], prompter, verify, append_answer=True)
    assert seen == [" 3 + 4 = 7.\nThe answer is \\boxed{7}."]
    assert [prompter.text(ids) for ids in found.texts["a"]] == seen


def test_attempts_and_pairs_are_judged_as_they_are_trained_on():
    prompter = Prompter(family("none").tokenizer)
    right = brace_and_newline(prompter, " It is \\boxed{7", "}Ċ")
    wrong = brace_and_newline(prompter, " It is \\boxed{8", "}.Ċ")
    config = Train(method="grpo", num_generations=2)
    completions = [completed(right), completed(wrong)]
    groups = judge_attempts([PROBLEM], completions, prompter, boxed_answer_reward, config)
    assert groups[0].texts == [" It is \\boxed{7}", " It is \\boxed{8}."]
    assert groups[0].rewards == [1.0, 0.0]
    # GRPO trains on the sampled tokens. Their text begins with the judged text.
    samples = policy_samples(with_advantages(groups, config), config)
    assert [list(sample.completion_ids) for sample in samples] == [right, wrong]
    # DPO trains on the judged text.
    trainer: Any = type("T", (), {"prompter": prompter, "config": Train(method="expert-dpo")})
    chosen: Any = type("E", (), {"texts": {"a": [prompter.expert(PROBLEM)]}})
    (pair,) = pairs_of_groups(trainer, groups, chosen)
    assert prompter.text(pair.rejected_ids) == groups[0].texts[1]
    assert prompter.tokenizer.decode(pair.rejected_ids) == " It is \\boxed{8}.<|end|>"


def test_an_evaluation_grades_the_text_before_the_stop_string():
    prompter = Prompter(family("none").tokenizer)
    ids = brace_and_newline(prompter, " It is \\boxed{7", "}Ċ")
    ids += prompter.codec.encode(" \\boxed{8}")
    generator: Any = type("G", (), {"sample": lambda self, requests: [completed(ids)]})()
    result = evaluate(
        generator,
        prompter,
        [PROBLEM],
        score_answers,
        samples=1,
        temperature=1.0,
        max_new_tokens=9,
        seed=0,
    )
    (graded,) = result.graded
    assert (graded.completion, graded.verdict) == (" It is \\boxed{7}", 1.0)


def test_a_claim_that_begins_inside_a_token_is_cut_there():
    prompter = Prompter(family("chatml").tokenizer)
    text = "3 + 4 = 7.\nThe answer is 7."
    ids = prompter.codec.encode(text)
    assert prompter.tokenizer.get_vocab()[".Ċ"] in ids
    kept = prompter.cut(ids, "3 + 4 = 7.")
    assert prompter.tokenizer.decode(kept) == "3 + 4 = 7."


# Tokenizers that put a space before a text

BLANK_PUTTING = ["mistral", "mistral-first", "zephyr", "gemma", *PLAIN[1:]]


@pytest.mark.parametrize("name", BLANK_PUTTING)
def test_a_text_after_other_text_gets_no_space(name: str):
    prompter = Prompter(family(name).tokenizer)
    codec = prompter.codec
    decode = prompter.tokenizer.decode
    for text in ("7", "\\boxed{7}.", " 7", "\nThe answer", "\n\nx", "aa", "((", "11", ""):
        ids = codec.encode(text)
        assert codec.decode(ids) == text
        before = prompter.solve(PROBLEM)
        assert decode([*before, *ids]) == decode(before) + text


@pytest.mark.parametrize("name", BLANK_PUTTING)
def test_an_expert_text_begins_with_one_space_and_an_appended_box_with_none(name: str):
    prompter = Prompter(family(name).tokenizer)
    prompt = prompter.solve(PROBLEM)
    decode = prompter.tokenizer.decode
    header = decode(prompt, skip_special_tokens=True)
    text = decode([*prompt, *prompter.expert(PROBLEM)], skip_special_tokens=True)
    blank = "" if name in ("zephyr", "gemma") else " "
    assert text.removeprefix(header).removesuffix("<end_of_turn>") == blank + SOLUTION
    ids = [*prompter.codec.encode(" So: "), *prompter.turn.end_ids]
    longer = decode([*prompt, *prompter.longer(ids, "\\boxed{7}")], skip_special_tokens=True)
    assert longer.removesuffix("<end_of_turn>").endswith(" So: \\boxed{7}")


@pytest.mark.parametrize("name", BLANK_PUTTING)
@pytest.mark.parametrize("mask", [False, True])
def test_the_scored_answer_is_the_token_after_a_brace(name: str, mask: bool):
    prompter = Prompter(family(name).tokenizer)
    ids = [*prompter.codec.encode(" 3 + 4 = 7. So \\boxed{7}."), *prompter.turn.end_ids]
    sample = answer_after(PROBLEM, ids, prompter, mask=mask)
    assert prompter.tokenizer.convert_ids_to_tokens(sample.completion_ids) == ["7"]
    text = prompter.tokenizer.decode([*sample.prompt_ids, *sample.completion_ids])
    value = "?" if mask else "7"
    assert text.endswith(f" 3 + 4 = {value}. So \\boxed{{7")
    before = prompter.tokenizer.decode(prompter.solve(PROBLEM))
    assert text.removeprefix(before).startswith(" 3")


def test_text_after_a_stop_string_is_not_scored():
    prompter = Prompter(family("none").tokenizer)
    ids = prompter.codec.encode(" So 7.\nQuestion: Who")
    sample = answer_after(PROBLEM, ids, prompter, mask=False)
    assert prompter.tokenizer.decode(sample.prompt_ids).endswith("Answer: So 7. \\boxed{")


# The default model


def test_the_token_ids_of_the_default_model_do_not_change():
    _, tokenizer = load_model(find_model(DEFAULT_MODEL))
    problems = load_problems("builtin:arithmetic:train", limit=40)
    shots, problems = worked_examples(problems, 2)
    digest = hashlib.sha256()
    for shown in ((), shots):
        prompter = Prompter(tokenizer, shown)
        for problem in problems:
            expert = prompter.expert(problem)
            longer = prompter.longer(expert[:9], "\nThe answer is \\boxed{7}.")
            answer = answer_after(problem, expert, prompter, mask=True)
            rows = [prompter.solve(problem), prompter.explain(problem), expert, longer]
            rows += [prompter.ended(expert, "stop"), answer.prompt_ids, answer.completion_ids]
            digest.update(json.dumps(rows).encode())
    assert digest.hexdigest()[:16] == "6ec4148d579a7d43"
