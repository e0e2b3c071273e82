"""Templates made to deceive: what cannot be proven is refused by name, what can be is exact."""

import pytest
from chat_kit import call, fresh, message, tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat_templates import expected_turn

from ftune import chat

HEADER, PROMPT = "<|im_start|>{{ m.role }}\n", "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = [message("user", "hi"), message("assistant", "yo"), message("user", "so"), message("assistant", "no")]


def with_body(body: str, before: str = "", after: str = PROMPT):
    return fresh("qwen3", before + "{% for m in messages %}" + body + "{% endfor %}" + after)


def supervised(tokenizer, messages, tools=None):
    rendered = chat.render_messages(tokenizer, messages, tools)
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_earlier_turns_rewritten_by_their_content_are_found_by_probes():
    """Case 11, by a rule that no list of known ones has: earlier answers are cut at a mark of their own."""
    tokenizer = with_body(
        HEADER + "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('##')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    )
    messages = [PLAIN[0], message("assistant", "hidden##shown"), *PLAIN[2:]]
    assert supervised(tokenizer, messages) == ["shown<|im_end|>", "no<|im_end|>"]
    assert "the template leaves out parts of earlier answers" in chat.render_messages(tokenizer, messages).notes


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            HEADER + "{{ m.content if loop.last or m.role == 'user' else m.content | upper }}<|im_end|>\n",
            "not rendered once and alone",
        ),
        (
            HEADER + "{{ m.content if loop.last or m.role == 'user' else m.content[:1] }}<|im_end|>\n",
            "content changes what is rendered|not rendered once",
        ),
        (
            HEADER + "{{ m.content }}{{ '' if loop.last else ' ' + m.content }}<|im_end|>\n",
            "not rendered once|prompt of turn",
        ),
        (
            HEADER + "{% if m.role == 'assistant' and not loop.last %}{{ messages[loop.index].content }}"
            "{% endif %}{{ m.content }}<|im_end|>\n",
            "depends on later turns|prompt of turn",
        ),
        (HEADER + "{{ messages | length }}{{ m.content }}<|im_end|>\n", "the prompt of turn"),
        (
            HEADER + "{{ m.content }}{{ '<|im_end|>' if loop.last or m.role == 'user' else '|' }}\n",
            "its end is not written|earlier turns",
        ),
    ],
    ids=["upper", "cut", "twice", "borrows", "counts", "no end"],
)
def test_what_cannot_be_proven_is_refused(body, reason):
    with pytest.raises(chat.TemplateRowError, match=reason):
        chat.render_messages(with_body(body), PLAIN)


def test_an_earlier_answer_that_is_written_in_other_words_is_refused():
    """The probes come through unchanged; this answer does not."""
    kept = "{{ m.content if loop.last or m.role == 'user' else m.content | replace('##', '==') }}"
    messages = [PLAIN[0], message("assistant", "a##b"), *PLAIN[2:]]
    with pytest.raises(chat.TemplateRowError, match="no part of its content"):
        chat.render_messages(with_body(HEADER + kept + "<|im_end|>\n"), messages)


def test_an_earlier_answer_that_changes_its_own_end_is_refused():
    """Of the same length as the end that the probes have, so that lengths alone would not show it."""
    end = "{{ '(--------)' if '##' in m.content and not loop.last else '<|im_end|>' }}"
    messages = [PLAIN[0], message("assistant", "a##b"), *PLAIN[2:]]
    with pytest.raises(chat.TemplateRowError, match="changes what is rendered around it"):
        chat.render_messages(with_body(HEADER + "{{ m.content }}" + end + "\n"), messages)


def test_a_user_who_quotes_the_answer_is_not_taken_for_it():
    messages = [message("user", "assistant\nyo"), message("assistant", "yo"), message("user", "yo"), PLAIN[3]]
    rendered = chat.render_messages(tokenizer_of("chatml"), messages)
    assert all(rendered.text[:start].endswith("<|im_start|>assistant\n") for start, _ in rendered.spans)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["yo<|im_end|>", "no<|im_end|>"]


def test_generation_prompt_that_the_turn_does_not_begin_with_is_refused():
    """Case 11: what the model is trained after must be what it is prompted with."""
    tokenizer = with_body(HEADER + "{{ m.content }}<|im_end|>\n", after=PROMPT.replace("\n{%", "\n<think>{%"))
    with pytest.raises(chat.TemplateRowError, match="prefix-stable"):
        chat.render_messages(tokenizer, PLAIN)


def test_a_line_that_only_closes_the_conversation_is_not_supervised():
    """Case 6: both of Phi-3's end tokens are not the answer's."""
    tokenizer = tokenizer_of("phi3")
    rendered = chat.render_messages(tokenizer, PLAIN)
    assert rendered.text.endswith("<|end|>\n<|endoftext|>")
    tokens = chat.tokenize(tokenizer, rendered)
    assert tokens.labels.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 2
    assert tokenizer.eos_token_id not in tokens.labels


def test_earlier_answers_without_an_end_are_refused():
    tokenizer = fresh(
        "chatml",
        "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
        "{{ '[assistant] ' if add_generation_prompt else eos_token }}",
    )
    assert supervised(tokenizer, PLAIN[:2]) == ["yo\n<|endoftext|>"]
    with pytest.raises(chat.TemplateRowError, match="its end is not written"):
        chat.render_messages(tokenizer, PLAIN)
    assert any("only the last answer" in note for note in chat.check_template(tokenizer).notes)


def test_marks_are_cut_to_what_the_model_writes():
    """Case 12: the template's own marks, by characters; they hold the header and the next line, too."""
    tokenizer = tokenizer_of("marked")
    first = [message("assistant", "A"), message("user", "B")]
    assert supervised(tokenizer, PLAIN) == ["yo<|im_end|>", "no<|im_end|>"]
    assert supervised(tokenizer, first) == ["A<|im_end|>"]
    blank = [message("user", "q"), message("assistant", "a  "), message("user", "r")]
    assert supervised(tokenizer, blank) == ["a  <|im_end|>"]


def test_marks_that_leave_out_the_end_are_told():
    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    body = HEADER + "{% if m.role == 'assistant' %}" + marked + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    tokenizer = with_body(body)
    assert supervised(tokenizer, PLAIN) == ["yo", "no"]
    assert any("does not learn to stop" in note for note in chat.render_messages(tokenizer, PLAIN).notes)
    assert any("does not learn to stop" in problem.what for problem in chat.check_template(tokenizer).problems)


def test_marks_missing_for_a_turn_are_refused():
    """Case 10: never a mask of nothing."""
    body = HEADER + (
        "{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    )
    with pytest.raises(chat.TemplateRowError, match="1 generation marks for 2 assistant turns"):
        chat.render_messages(with_body(body), PLAIN)


def test_calls_that_the_template_leaves_out_are_refused():
    messages = [message("user", "q"), message("assistant", "Let me see.", tool_calls=[call("weather", {})])]
    with pytest.raises(chat.TemplateRowError, match="call of the tool 'weather' is not rendered"):
        chat.render_messages(tokenizer_of("chatml"), messages)


TEXT = st.text(st.sampled_from(list("ab \n<|>/_imsendtarthk日é\u0301")), max_size=12)
WORDS = st.one_of(TEXT, st.sampled_from(["<think>", "assistant", "\n\n", "</think>", "<tool_call>", "user\n"])).map(str)
ANSWER = st.lists(WORDS, min_size=1, max_size=4).map("".join).filter(str.strip)


@st.composite
def conversations(draw):
    messages = [message("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(message("user", draw(WORDS)))
        thinking = draw(st.one_of(st.none(), TEXT))
        more = {} if thinking is None else {"reasoning_content": thinking}
        messages.append(message("assistant", draw(ANSWER), **more))
    return messages


@given(conversations())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_chatml_conversation_is_supervised_exactly(messages):
    tokenizer = tokenizer_of("chatml")
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert supervised(tokenizer, messages) == answers


@given(conversations())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_thinking_conversation_is_supervised_exactly_or_refused(messages):
    tokenizer = tokenizer_of("qwen3")
    try:
        found = supervised(tokenizer, messages)
    except chat.TemplateRowError:
        # Only where a template takes an answer apart that was not written as one thought and one answer.
        if not any("think>" in m["content"] for m in messages):
            raise
        return
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    prompts = [tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True) for i in ends]
    for i, prompt, own in zip(ends, prompts, found, strict=True):
        assert text.startswith(prompt + own)
        assert own.endswith("<|im_end|>")
        assert own.count("<|im_end|>") == 1
        if "think>" not in messages[i]["content"]:
            assert own == expected_turn("qwen3", messages, i)
