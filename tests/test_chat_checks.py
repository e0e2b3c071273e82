"""What `check` says of a template and its tokenizer, one defect at a time."""

import pytest
from chat_kit import NAMES, fresh, message, template, tokenizer_of
from conftest import CHATML, make_tokenizer

from ftune import chat

BODY = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + END }}{% endfor %}"
PROMPT = "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"


def problems_of(tokenizer, samples=()):
    return [problem.what for problem in chat.check_template(tokenizer, samples).problems]


def notes_of(tokenizer):
    return " | ".join(chat.check_template(tokenizer).notes)


@pytest.mark.parametrize("name", NAMES)
def test_published_templates_have_no_problems(name):
    check = chat.check_template(tokenizer_of(name))
    assert not check.problems
    assert check.stop_ids[-1] == tokenizer_of(name).convert_tokens_to_ids(check.end_of_turn.strip())


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (BODY.replace("END", "'\n'") + PROMPT, "with no special token: the model would never learn to stop"),
        (BODY.replace("END", "'</s>'") + PROMPT, "</s> is not a token of this tokenizer"),
        (BODY.replace("END", "'<|im_end|>'"), "has no generation prompt"),
        (BODY.replace("END", "'<|im_end|>'") + "<|im_start|>assistant\n", "even where none is asked for|no generation"),
        (BODY.replace("END", "'<|endoftext|><|endoftext|>'") + PROMPT, "two end-of-sequence tokens"),
        ("{{ messages[0].content }}", "does not render a plain question and its answer"),
    ],
    ids=["no end", "another model's end", "no prompt", "prompt always", "two eos", "one message"],
)
def test_defects_are_problems(source, problem):
    """Cases 5 and 6."""
    found = problems_of(fresh("chatml", source))
    assert any(part in what for what in found for part in problem.split("|")), found


def test_two_beginnings_are_a_problem():
    """Case 7."""
    assert any(
        "begins with two beginning-of-sequence" in what
        for what in problems_of(
            fresh("llama3", "{{ bos_token + bos_token }}" + template("llama3").replace("bos_token +", ""))
        )
    )


def test_one_beginning_of_template_and_tokenizer_is_a_note():
    """Case 7: rows have one, because a template's text is tokenized without adding any."""
    tokenizer = make_tokenizer("{{bos_token}}" + CHATML, add_bos=True)
    assert not problems_of(tokenizer)
    assert "template and tokenizer both write a beginning" in notes_of(tokenizer)
    assert "writes no beginning-of-sequence token" in notes_of(make_tokenizer(CHATML, add_bos=True))
    assert "beginning" not in notes_of(make_tokenizer(CHATML))


def test_a_tokenizer_that_splits_special_tokens_is_a_problem():
    tokenizer = fresh("chatml")
    tokenizer.split_special_tokens = True
    assert any("split_special_tokens" in what for what in problems_of(tokenizer))


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("phi3", "after the last turn the template writes '<|endoftext|>'"),
        ("llama3", "adds text of its own before the first message"),
        ("qwen2.5", "adds a system message of its own"),
        ("qwen3", "thinking of earlier turns is removed"),
        ("gemma", "rows with a system message are refused"),
        ("mistral1", "rows with a system message are refused"),
        ("gemma3", "writes the system message into the user's turn"),
        ("zephyr", "<|assistant|> is several tokens to this tokenizer"),
    ],
)
def test_what_is_worth_knowing_is_a_note(name, note):
    """Case 16, and the rest of what a template does on its own."""
    assert note in notes_of(tokenizer_of(name))
    assert note not in notes_of(tokenizer_of("chatml"))


def test_a_system_message_that_is_left_out_is_told():
    """Case 16."""
    tokenizer = fresh("chatml", template("chatml").replace("in messages", "in messages if message.role != 'system'"))
    assert "rows with a system message are refused: system message is not rendered" in notes_of(tokenizer)


def test_todays_date_is_told():
    source = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>' }}" + template("chatml")
    assert "writes today's date" in notes_of(fresh("chatml", source))


def test_samples_of_the_users_are_checked_too():
    samples = [
        [message("user", "q"), message("assistant", "x<|im_end|>")],
        [message("user", "a"), message("assistant", "b")],
    ]
    (what,) = problems_of(tokenizer_of("chatml"), samples)
    assert "special token" in what


def test_no_template_is_a_problem():
    assert problems_of(make_tokenizer(None)) == ["the tokenizer has no chat template"]
