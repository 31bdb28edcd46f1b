"""Prompts that solve and prompts that explain differ only in the stated answers."""

import pytest

from expo_fast.data.chat_template import fill
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter, expert_text, request_seed
from tiny import tiny_tokenizer

SHOT = Problem(id="s", prompt="2 and 3?", answer="5", solution="2 + 3 = 5.")
ASKED = Problem(id="a", prompt="4 and {4}?", answer="8", solution=r"4 + 4 = 8. \boxed{8}")


def test_solve_and_explain_prompts_differ_only_in_the_stated_answers():
    tokenizer = tiny_tokenizer()
    prompter = Prompter(tokenizer, (SHOT,))
    solve = tokenizer.decode(prompter.solve(ASKED))
    explain = tokenizer.decode(prompter.explain(ASKED))
    assert explain.replace(" (The answer is 5.)", "").replace(" (The answer is 8.)", "") == solve
    assert explain.count("(The answer is 8.)") == 1
    assert explain.count("(The answer is 5.)") == 1
    assert "8" not in solve
    assert solve.endswith("<|im_start|>assistant\n")
    assert "4 and {4}?" in solve


def test_a_template_with_the_date_gives_the_same_prompt_on_each_day():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    assert tokenizer.decode(Prompter(tokenizer).solve(ASKED)).startswith("01 Jan 2026 ")


@pytest.mark.parametrize("beginning", ["\n", "  ", "\n  {% if true %}\n{% endif %}x"])
def test_the_fixed_date_changes_no_other_part_of_a_template(beginning: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = beginning + tokenizer.chat_template
    turns = [{"role": "user", "content": "hi"}]
    theirs = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert fill(tokenizer, turns) == theirs


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ raise_exception('no\n such role') }}", "TemplateError: no such role"),
        ("{% if %}", "TemplateSyntaxError: Expected an expression"),
    ],
)
def test_a_failing_template_is_refused_in_one_sentence(template: str, message: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"^the chat template refuses .*\(user\): {message}.*$"):
        Prompter(tokenizer).solve(ASKED)


def test_worked_examples_are_earlier_turns_with_the_answer_boxed():
    text = tiny_tokenizer().decode(Prompter(tiny_tokenizer(), (SHOT,), "Be brief.").solve(ASKED))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "2 + 3 = 5.\nThe answer is \\boxed{5}.<|im_end|>" in text


def test_the_turns_of_a_chat_are_kept():
    turns = (
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "1 and 1?"},
    )
    problem = Problem(id="c", prompt=turns, answer="2")
    text = tiny_tokenizer().decode(Prompter(tiny_tokenizer()).explain(problem))
    assert text.startswith("<|im_start|>system\nYou count.<|im_end|>\n<|im_start|>user\n1 and 1? (")


BEGUN = Problem(
    id="b",
    prompt=({"role": "user", "content": "1 and 1?"}, {"role": "assistant", "content": "Let me"}),
    answer="2",
    solution="1 + 1 = 2.",
)


def test_a_prompt_that_begins_the_answer_is_continued():
    tokenizer = tiny_tokenizer()
    prompter = Prompter(tokenizer, (SHOT,), "Be brief.", instruction="")
    text = tokenizer.decode(prompter.solve(BEGUN))
    assert text.endswith("user\n1 and 1?<|im_end|>\n<|im_start|>assistant\nLet me")
    explained = tokenizer.decode(prompter.explain(BEGUN))
    assert explained.endswith(
        "1 and 1? (The answer is 2.)<|im_end|>\n<|im_start|>assistant\nLet me"
    )
    asked = tokenizer.decode(Prompter(tokenizer, instruction="Think!").solve(BEGUN))
    assert "1 and 1?\n\nThink!<|im_end|>" in asked and asked.endswith("Let me")


def test_a_prompt_that_begins_the_answer_is_rendered_as_trl_renders_it():
    data_utils = pytest.importorskip("trl.data_utils")
    tokenizer = tiny_tokenizer()
    theirs = data_utils.apply_chat_template({"prompt": [*BEGUN.prompt]}, tokenizer)["prompt"]
    assert tokenizer.decode(Prompter(tokenizer, instruction="").solve(BEGUN)) == theirs


@pytest.mark.parametrize("chat", [True, False])
def test_a_given_answer_follows_the_beginning_that_the_prompt_has(chat):
    tokenizer = tiny_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    prompter = Prompter(tokenizer, instruction="")
    ids = [*prompter.solve(BEGUN), *prompter.completion(BEGUN, " see: 1 + 1 = 2.")]
    text = tokenizer.decode(ids[:-1])
    assert text.endswith("Let me see: 1 + 1 = 2.") and text.count("Let me") == 1
    assert ids[-1] == tokenizer.eos_token_id


def test_a_base_model_continues_the_beginning_of_an_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    text = tokenizer.decode(Prompter(tokenizer, (SHOT,)).solve(BEGUN))
    assert text.endswith("\nAnswer: Let me")


def test_a_worked_example_may_have_the_beginning_of_its_answer():
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(Prompter(tokenizer, (BEGUN,)).solve(ASKED))
    assert text.count("<|im_start|>assistant\n") == 2
    assert "assistant\nLet me1 + 1 = 2.\nThe answer is \\boxed{2}.<|im_end|>" in text


def test_an_expert_completion_has_one_box_and_the_end_token():
    tokenizer = tiny_tokenizer()
    ids = Prompter(tokenizer).expert(ASKED)
    assert tokenizer.decode(ids[:-1]) == r"4 + 4 = 8. \boxed{8}"
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="problem n has no expert solution"):
        expert_text(Problem(id="n", prompt="?", answer="1"))


def test_a_base_model_is_asked_through_a_plain_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    prompter = Prompter(tokenizer, (SHOT,))
    text = tokenizer.decode(prompter.solve(ASKED))
    assert text.count("Question: ") == 2
    assert text.endswith("Answer:")
    assert "Answer: 2 + 3 = 5." in text
    assert prompter.stop_strings == ("\nQuestion:",)
    assert Prompter(tiny_tokenizer()).stop_strings == ()


def test_the_template_hash_changes_with_the_prompt():
    hashes = {
        Prompter(tiny_tokenizer(), shots, system).template_hash
        for shots in ((), (SHOT,))
        for system in (None, "Be brief.")
    }
    assert len(hashes) == 4


def test_the_hash_of_the_ends_changes_with_each_end_and_the_templates_hash_does_not():
    later = tiny_tokenizer()
    later.chat_template = later.chat_template.replace("<|im_end|>", "!<|im_end|>", 1)
    prompters = [Prompter(tiny_tokenizer()), Prompter(tiny_tokenizer(), ends=(1, 2))]
    prompters += [Prompter(later)]
    assert len({prompter.ends_hash for prompter in prompters}) == 3
    assert prompters[0].template_hash == prompters[1].template_hash == "3f7026087f5c7f59"
    assert Prompter(tiny_tokenizer(), ends=(2, 1)).ends_hash == prompters[1].ends_hash


def test_request_seeds_depend_on_each_part_of_the_key():
    keys = [(0, "solve", 1, "a", 0), (1, "solve", 1, "a", 0), (0, "explain", 1, "a", 0)]
    keys += [(0, "solve", 2, "a", 0), (0, "solve", 1, "b", 0), (0, "solve", 1, "a", 1)]
    seeds = {request_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, "solve") == request_seed(0, "solve")


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("It is 7.\n\nQuestion: Wh", "stop", "It is 7."),
        ("It is 7.\nQuestion:", "stop", "It is 7."),
        ("It is 7. \n", "stop", "It is 7."),
        (
            "It is 7.\n\nQuest",
            "length",
            None,
        ),  # cut at the limit of tokens, so no end token is added
    ],
)
def test_a_completion_ended_by_a_stop_string_gets_the_end_token(text, reason, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    ids = tokenizer(text).input_ids
    got = Prompter(tokenizer).ended(ids, reason)
    complete = ids if expected is None else [*tokenizer(expected).input_ids, tokenizer.eos_token_id]
    assert got == tuple(complete)


def test_with_a_chat_template_completions_are_not_changed():
    assert Prompter(tiny_tokenizer()).ended([50, 51, 1], "stop") == (50, 51, 1)


def test_the_instruction_is_appended_to_each_question():
    problem = Problem("a", "How many?", "7")
    for instruction in ("Think.", ""):
        prompter = Prompter(tiny_tokenizer(), instruction=instruction)
        end = f"How many?\n\n{instruction}" if instruction else "How many?"
        assert f"\n{end}<|im_end|>" in prompter.tokenizer.decode(prompter.solve(problem))
