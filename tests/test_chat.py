"""Text, tokens and the supervised mask. Numbers in docstrings are those of the trust cases."""

import pytest
from conftest import CHATML, chat, make_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ftune import chat as chats
from ftune.errors import UserError

MESSAGES = chat("hello", "xyz")["messages"]
TWO_TURNS = [*MESSAGES, *chat("more", "ab")["messages"]]


def supervised_text(tokenizer, rendered):
    tokens = chats.tokenize(tokenizer, rendered)
    return tokenizer.decode([token for token in tokens.labels if token != -100])


def test_supervised_text_is_the_answer_and_its_end_of_turn():
    """Cases 10 and 13: a template without generation marks gives exact spans."""
    tokenizer = make_tokenizer()
    assert supervised_text(tokenizer, chats.render_messages(tokenizer, MESSAGES)) == "xyz<|im_end|>"
    assert supervised_text(tokenizer, chats.render_messages(tokenizer, TWO_TURNS)) == "xyz<|im_end|>ab<|im_end|>"


def test_template_that_rewrites_history_still_gives_exact_spans():
    """Case 11: `<think>` of earlier turns disappears once a later turn follows, and that is told."""
    rewriting = (
        "{% for m in messages %}<|im_start|>{{m.role}}\n"
        "{% if loop.last or m.role != 'assistant' %}{{m.content}}"
        "{% else %}{{m.content.split('</think>')[-1]}}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(rewriting)
    thinking = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>t</think>a"},
        *TWO_TURNS[2:],
    ]
    rendered = chats.render_messages(tokenizer, thinking)
    assert supervised_text(tokenizer, rendered) == "a<|im_end|>ab<|im_end|>"
    assert rendered.notes == ("thinking of earlier turns is removed by the template",)


def test_generation_prompt_that_the_turn_does_not_begin_with_is_refused():
    """Case 11: what the model is trained after must be what it is prompted with."""
    tokenizer = make_tokenizer(CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"))
    with pytest.raises(UserError, match="prefix-stable"):
        chats.render_messages(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{m.content}}{% endfor %}",
    ],
    ids=["skips", "raises"],
)
def test_system_message_that_is_not_rendered_is_refused(template):
    """Case 16."""
    tokenizer = make_tokenizer(template)
    with pytest.raises(UserError, match="system"):
        chats.render_messages(tokenizer, [{"role": "system", "content": "be brief"}, *MESSAGES])


def test_template_and_tokenizer_give_one_bos():
    """Case 7: a template that writes BOS, and a tokenizer that would add it again."""
    tokenizer = make_tokenizer("{{bos_token}}" + CHATML, add_bos=True)
    tokens = chats.tokenize(tokenizer, chats.render_messages(tokenizer, MESSAGES))
    assert tokens.input_ids.count(1) == 1
    assert tokens.input_ids == tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert chats.tokenize(tokenizer, chats.render_text("plain")).input_ids.count(1) == 1


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_end_of_sequence_is_supervised_once(pad):
    """Cases 4 and 6: the end is learned although padding may be the same token, and it is not doubled."""
    tokenizer = make_tokenizer(None, pad=pad)
    tokens = chats.tokenize(tokenizer, chats.render_completion(tokenizer, "ab:", "cd"))
    assert tokens.labels == [-100, -100, -100, *tokenizer("cd")["input_ids"], tokenizer.eos_token_id]
    ended = make_tokenizer("{% for m in messages %}{{m.content}}<eos>{% endfor %}", pad=pad)
    tokens = chats.tokenize(ended, chats.render_messages(ended, MESSAGES))
    assert tokens.labels[-1] == ended.eos_token_id
    assert tokens.labels.count(ended.eos_token_id) == 1


def test_generation_stops_at_the_token_that_was_trained_to_end_the_turn():
    """Case 5: the template's end of turn is not the tokenizer's eos."""
    tokenizer = make_tokenizer()
    assert chats.end_of_turn_ids(tokenizer) == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_tokens_at_a_joint_are_those_of_the_whole_text():
    """Case 15: a token that straddles prompt and answer belongs to the prompt."""
    raw = Tokenizer(models.BPE({":": 0, "h": 1, "i": 2, ":h": 3, "<eos>": 4}, [(":", "h")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    tokens = chats.tokenize(tokenizer, chats.render_completion(tokenizer, "i:", "hi"))
    assert tokens.input_ids == [*tokenizer("i:hi")["input_ids"], 4]
    assert tokens.labels == [-100, -100, 2, 4]
    assert tokens.straddling == 1


def test_first_token_of_a_row_gives_no_label():
    tokenizer = make_tokenizer(None)
    assert chats.tokenize(tokenizer, chats.render_text("abc")).labels[0] == -100
