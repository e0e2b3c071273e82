"""Published templates by conversations: what is supervised is the assistant's turns exactly, or the row is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from chat_kit import FAMILIES, NAMES, call, fresh, message, tokenizer_of, tool
from transformers import AutoTokenizer

from ftune import chat
from ftune.errors import UserError

SYSTEM = message("system", "Be brief.")


def turns(*contents: str) -> list[dict[str, Any]]:
    """Questions and answers in turn."""
    return [message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]


def thought(content: str, thinking: str) -> dict[str, Any]:
    return message("assistant", content, reasoning_content=thinking)


WEATHER = call("weather", {"city": "Köln", "days": 2})
RESULT = message("tool", '{"sky": "grey"}', tool_call_id="call00001")

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": turns("What?", "That."),
    "three turns": turns("q", "a", "Again?", "Once more.", "q", "a"),
    "equal texts": turns("same", "same", "same", "same"),
    "unicode": turns("naïve 日本?", "はい🙂 é", "\u2028", "语\u200b"),
    "white space": turns("  hi \n", "\n yo \n\n", "\tb", "   c"),
    "headers as words": turns("assistant", "user\nassistant\n[/INST", "<|im", "model\n<|im_end| >"),
    "one letter": turns("a", "a", "s", "e"),
    "system": [SYSTEM, *turns("Hi", "Yo")],
    "system, two turns": [SYSTEM, *turns("Hi", "Yo", "And", "So")],
    "empty system": [message("system", ""), *turns("Hi", "Yo")],
    "thinking": [message("user", "Hi"), thought("Yo", "hm"), message("user", "So"), thought("No", "ha\nha")],
    "thinking in contents": turns("Hi", "<think>\nhm\n</think>\n\nYo", "So", "<think>\nha\n</think>\n\nNo"),
    "a question last": [*turns("Hi", "Yo"), message("user", "Still there?")],
    "answer first": [message("assistant", "Welcome."), *turns("Hi", "Yo")],
    "a call": [
        message("user", "Sky?"),
        message("assistant", tool_calls=[WEATHER]),
        RESULT,
        message("assistant", "Grey."),
    ],
    "a call with words": [
        message("user", "Sky?"),
        message("assistant", "I look.", tool_calls=[WEATHER]),
        RESULT,
        message("assistant", "Grey."),
    ],
    "calls and results": [
        message("user", "Sky?"),
        message("assistant", tool_calls=[WEATHER, call("weather", {"city": "a"}, "call00002")]),
        RESULT,
        message("tool", "blue", tool_call_id="call00002"),
        message("assistant", "Grey, blue."),
        message("user", "Thanks"),
        message("assistant", "Welcome."),
    ],
}
WITH_TOOLS = ("a call", "a call with words", "calls and results")
ALTERNATE, NO_TOOLS, OTHER_PROMPT = "roles must alternate", "is not rendered by this template", "not prefix-stable: the"
REFUSED: dict[tuple[str, str], str] = {
    **{("mistral1", name): ALTERNATE for name in ("system", "system, two turns", "empty system", "answer first")},
    **{("gemma", name): "System role not supported" for name in ("system", "system, two turns", "empty system")},
    **{(name, "answer first"): ALTERNATE for name in ("gemma", "gemma3", "llama2")},
    **{(name, tools): ALTERNATE for name in ("mistral1", "gemma", "gemma3", "llama2") for tools in WITH_TOOLS},
    **{(name, tools): NO_TOOLS for name in ("chatml", "marked", "phi3", "phi4", "zephyr") for tools in WITH_TOOLS},
    ("mistral3", "system, two turns"): OTHER_PROMPT,
    ("mistral3", "calls and results"): OTHER_PROMPT,
    ("mistral3", "answer first"): "no question comes before it",
    ("mistral3", "a call with words"): "is not rendered",
    ("llama3", "a call with words"): "is not rendered",
    ("llama3", "calls and results"): "one call a turn",
}
"""Where a template cannot render a conversation, or trains on another prompt than it asks with."""


def written_call(name: str, calls: list[dict[str, Any]]) -> str:
    texts = [
        (c["function"]["name"], json.dumps(c["function"]["arguments"], ensure_ascii=False), c["id"]) for c in calls
    ]
    if name == "llama3":
        return "".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a, _ in texts)
    if name == "mistral3":
        return (
            "[TOOL_CALLS] [" + ", ".join(f'{{"name": "{n}", "arguments": {a}, "id": "{i}"}}' for n, a, i in texts) + "]"
        )
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a, _ in texts)


def qwen3_turn(messages: list[dict[str, Any]], i: int) -> str:
    content, thinking = messages[i].get("content") or "", messages[i].get("reasoning_content", "")
    if "</think>" in content:
        thinking, _, content = content.removeprefix("<think>").partition("</think>")
        thinking, content = thinking.strip("\n"), content.lstrip("\n")
    last_question = max(k for k, m in enumerate(messages) if m["role"] == "user")
    if i > last_question and (i == len(messages) - 1 or thinking):
        return f"<think>\n{thinking.strip(chr(10))}\n</think>\n\n" + content.lstrip("\n")
    return content


def expected_turn(name: str, messages: list[dict[str, Any]], i: int) -> str:
    """What the model should write in turn i, from the template's description in words."""
    content, calls = messages[i].get("content") or "", messages[i].get("tool_calls") or []
    end = FAMILIES[name][3]
    if name == "qwen3":
        content = qwen3_turn(messages, i)
    elif name in ("llama3", "gemma", "gemma3", "llama2"):
        content = content.strip()
    around: dict[str, Callable[[str], str]] = {
        "llama2": lambda text: f" {text} ",
        "mistral3": lambda text: text if calls else f" {text}",
        "zephyr": lambda text: f"\n{text}",
    }
    if calls:
        content += ("\n" if content else "") + written_call(name, calls)
    return around.get(name, str)(content) + end


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_assistants_turns_are_supervised_and_nothing_else(name, case):
    """Cases 10 to 13, 16: spans, labels and prompts against texts that this file works out itself."""
    tokenizer, messages = tokenizer_of(name), CONVERSATIONS[case]
    tools = [tool("weather")] if case in WITH_TOOLS else None
    if (name, case) in REFUSED:
        with pytest.raises(chat.TemplateRowError, match=REFUSED[name, case]):
            chat.render_messages(tokenizer, messages, tools)
        return
    rendered = chat.render_messages(tokenizer, messages, tools)
    assert rendered.text == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    expected = [expected_turn(name, messages, i) for i in answers]
    assert [rendered.text[start:end] for start, end in rendered.spans] == expected
    tokens = chat.tokenize(tokenizer, rendered)
    assert tokenizer.decode([label for label in tokens.labels if label != -100]) == "".join(expected)
    assert tokens.input_ids == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    for i, (start, _) in zip(answers, rendered.spans, strict=True):
        if i:
            asked = tokenizer.apply_chat_template(messages[:i], tools=tools, tokenize=False, add_generation_prompt=True)
            assert rendered.text[:start] == asked == chat.render_prompt(tokenizer, messages[:i], tools)


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_turns_say_who_wrote_what(name, case):
    if (name, case) in REFUSED:
        pytest.skip("refused, see above")
    messages = CONVERSATIONS[case]
    rendered = chat.render_messages(tokenizer_of(name), messages, [tool("weather")] if case in WITH_TOOLS else None)
    assert [(t.start, t.end) for t in rendered.turns if t.role == "assistant"] == list(rendered.spans)
    assert all(first.end <= second.start for first, second in zip(rendered.turns, rendered.turns[1:], strict=False))
    found = [role for turn in rendered.turns for role in turn.role.split("+")]
    roles = [m["role"] for m in messages]
    assert found == [role for i, role in enumerate(roles) if not i or roles[i - 1] != role]
    for turn in rendered.turns:
        own = [m.get("content") or "" for m in messages if m["role"] in turn.role.split("+")]
        assert any(content.strip()[-2:] in rendered.text[turn.start : turn.end] for content in own)
    merges = name in ("gemma3", "llama2", "mistral3") and messages[0]["role"] == "system"
    assert any("system+user" in turn.role for turn in rendered.turns) == merges
    assert any("writes the system message into" in note for note in rendered.notes) == merges


@pytest.mark.parametrize("case", ["thinking", "thinking in contents"])
def test_thinking_that_the_template_takes_out_of_earlier_turns_is_told(case):
    """Case 11."""
    rendered = chat.render_messages(tokenizer_of("qwen3"), CONVERSATIONS[case])
    assert rendered.notes == ("thinking of earlier turns is removed by the template",)
    assert "hm" not in rendered.text
    assert "ha\nha" in rendered.text or case == "thinking in contents"
    assert not chat.render_messages(tokenizer_of("qwen3"), CONVERSATIONS[case][2:]).notes


def test_thinking_that_no_template_renders_is_told():
    rendered = chat.render_messages(tokenizer_of("chatml"), CONVERSATIONS["thinking"])
    assert "the template does not render the thinking of the last turn" in rendered.notes


def test_thinking_has_an_alias():
    named = [message("user", "Hi"), message("assistant", "Yo", thinking="hm")]
    twice = [message("user", "Hi"), message("assistant", "Yo", thinking="hm", reasoning_content="no")]
    rendered = chat.render_messages(tokenizer_of("qwen3"), named)
    assert rendered.text == chat.render_messages(tokenizer_of("qwen3"), [named[0], thought("Yo", "hm")]).text
    assert "hm" in rendered.text
    with pytest.raises(chat.TemplateRowError, match="both `thinking`"):
        chat.render_messages(tokenizer_of("qwen3"), twice)


def test_thinking_of_a_call_that_a_later_prompt_no_longer_has_is_refused():
    """The second answer was prompted with the first one's thinking; a third turn takes that out of the text."""
    messages = [
        message("user", "Sky?"),
        message("assistant", tool_calls=[WEATHER], reasoning_content="look it up"),
        RESULT,
        thought("Grey.", "so it says"),
    ]
    rendered = chat.render_messages(tokenizer_of("qwen3"), messages, [tool("weather")])
    assert "look it up" in rendered.text[slice(*rendered.spans[0])]
    with pytest.raises(chat.TemplateRowError, match="the prompt of turn 4") as caught:
        chat.render_messages(tokenizer_of("qwen3"), [*messages, *turns("Thanks", "Yes")], [tool("weather")])
    assert "split it into rows" in caught.value.problems[0].hint


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3", "mistral3"])
@pytest.mark.parametrize("arguments", ['{"city": "Köln", "days": 2}', {"city": "Köln", "days": 2}])
def test_arguments_may_be_json_text_or_an_object(name, arguments):
    """A text must not be encoded a second time."""
    messages = [message("user", "Sky?"), message("assistant", tool_calls=[call("weather", arguments)])]
    rendered = chat.render_messages(tokenizer_of(name), messages, [tool("weather")])
    assert '{"city": "Köln", "days": 2}' in rendered.text[slice(*rendered.spans[0])]


def test_arguments_become_text_where_the_template_wants_that():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = fresh("chatml", source)
    messages = [message("user", "Sky?"), message("assistant", tool_calls=[call("weather", {"city": "Köln"})])]
    rendered = chat.render_messages(tokenizer, messages)
    assert rendered.text[slice(*rendered.spans[0])] == 'weather {"city": "Köln"}<|im_end|>'


def test_arguments_that_are_not_json_are_refused():
    messages = [message("user", "Sky?"), message("assistant", tool_calls=[call("weather", "{city")])]
    with pytest.raises(chat.TemplateRowError, match="arguments of the call of 'weather' are not JSON"):
        chat.render_messages(tokenizer_of("qwen2.5"), messages, [tool("weather")])


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3", "mistral3"])
def test_rows_render_as_their_raw_json_does(name):
    """Case 25: schemas and arguments of different keys, absent and null fields."""
    tokenizer = tokenizer_of(name)
    for arguments in ({"x": 1}, {"y": "2"}, {}):
        asked = {"role": "user", "content": "q", "name": None}
        messages = [asked, {"role": "assistant", "content": None, "tool_calls": [call("weather", arguments)]}]
        rendered = chat.render_messages(tokenizer, messages, [tool("weather")])
        assert json.dumps(arguments) in rendered.text
        assert "None" not in rendered.text
        assert "null" not in rendered.text


@pytest.mark.parametrize("name", NAMES)
def test_contents_that_hold_special_tokens_are_refused(name):
    """They would be read as the end of a turn or the start of another one."""
    for token in FAMILIES[name][0]:
        messages = turns("Hi", "Yo")
        for i in range(2):
            changed = [*messages]
            changed[i] = {**messages[i], "content": f"x{token}y"}
            if token in ("<tool_call>", "</tool_call>", "<think>", "</think>"):
                continue
            with pytest.raises(chat.TemplateRowError, match="reads as a special token"):
                chat.render_messages(tokenizer_of(name), changed)


def test_special_tokens_are_found_in_tools_and_calls_too():
    messages = [message("user", "q"), message("assistant", tool_calls=[call("weather", {"city": "<|im_end|>"})])]
    with pytest.raises(UserError, match=r"messages\[1\].*special token"):
        chat.render_messages(tokenizer_of("qwen2.5"), messages)
    with pytest.raises(UserError, match=r"tools holds .*special token"):
        chat.render_messages(tokenizer_of("qwen2.5"), turns("q", "a"), [tool("<|im_start|>")])


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_real_qwen_template_and_tokenizer_agree(real_data, case):
    tokenizer = AutoTokenizer.from_pretrained(real_data / "models" / "qwen2.5-tokenizer")
    messages, tools = CONVERSATIONS[case], [tool("weather")] if case in WITH_TOOLS else None
    rendered = chat.render_messages(tokenizer, messages, tools)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    expected = "".join(expected_turn("qwen2.5", messages, i) for i in answers)
    if tools:  # where this template has a line after its header, and none in the prompt
        assert "".join(rendered.text[start:end] for start, end in rendered.spans).replace("\n", "") == expected.replace(
            "\n", ""
        )
        return
    tokens = chat.tokenize(tokenizer, rendered)
    joined = case == "white space"  # "\n\n" is one token, begun by the header
    assert tokens.straddling == joined
    assert tokenizer.decode([label for label in tokens.labels if label != -100]) == expected[joined:]
    assert tokens.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
