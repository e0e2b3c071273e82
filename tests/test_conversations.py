"""Turns in all their spellings and orders: taken for what they mean, or refused by name. Numbers: trust cases."""

import json

import pytest
from shape_kit import ANSWERED, ASKED, CALL, TOOL, messages, refusal, said, sharegpt, turn

from ftune.data.detection import detect, unused_columns
from ftune.data.messages import OTHER_ALIASES, USUAL_ALIASES
from ftune.data.shapes import Conversation, normalize


def test_messages_are_taken_as_they_are():
    row = messages(turn("system", ""), ASKED, ANSWERED, turn("user", "r"), turn("assistant", "b"))
    assert row == Conversation((turn("system", ""), ASKED, ANSWERED, turn("user", "r"), turn("assistant", "b")))
    assert row.notes == ()


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "dialog", "dialogue"])
def test_both_spellings_of_turns_stand_in_any_of_their_columns_and_as_json(column):
    for turns in ([ASKED, ANSWERED], [said("human", "q"), said("gpt", "a")]):
        for value in (turns, json.dumps(turns)):
            fields = {"id": 7, column: value, "tools": None, "system": None}
            shape = detect(fields, "auto", "here").shape
            assert shape == ("sharegpt" if "from" in turns[0] else "messages")
            assert normalize(fields, shape, {}) == Conversation((ASKED, ANSWERED))
            assert unused_columns(fields, shape, {}) == ("id",)


@pytest.mark.parametrize(("alias", "role"), [*USUAL_ALIASES.items(), *OTHER_ALIASES.items()])
def test_an_alias_of_a_role_is_taken_as_it_and_told_where_it_is_unusual(alias, role):
    before = {"system": [], "user": [], "assistant": [ASKED], "tool": [ASKED, turn("assistant", "", tool_calls=[CALL])]}
    after = {"system": [ASKED, ANSWERED], "user": [ANSWERED], "assistant": [], "tool": [ANSWERED]}
    row = messages(*before[role], turn(alias, "t"), *after[role])
    assert row.messages[len(before[role])] == turn(role, "t")
    assert row.notes == (() if alias in USUAL_ALIASES else (f"the role {alias!r} is taken as {role!r}",))


def test_sharegpt_calls_become_calls_of_the_assistant():
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    as_text = json.dumps({"name": "f", "arguments": json.dumps({"x": 1})})
    row = sharegpt(said("human", "q"), said("function_call", call), said("observation", "r"), said("gpt", "a"))
    assert row.messages == (ASKED, {"role": "assistant", "tool_calls": [CALL]}, turn("tool", "r"), ANSWERED)
    together = sharegpt(
        said("human", "q"), said("gpt", "a"), said("function_call", f"[{call}, {as_text}]"), said("tool", "")
    )
    text_call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert together.messages == (ASKED, turn("assistant", "a", tool_calls=[CALL, text_call]), turn("tool", ""))
    two = sharegpt(said("human", "q"), said("function_call", call), said("function_call", call))
    assert two.messages[1:] == ({"role": "assistant", "tool_calls": [CALL, CALL]},)
    assert "different weights" in refusal(
        {"conversations": [said("human", "q"), said("gpt", "a", weight=0), said("function_call", call)]}, "sharegpt"
    )


def test_every_way_to_write_a_call_is_one():
    for calls in (
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL["function"]]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": CALL["function"]},
    ):
        row = messages(ASKED, turn("assistant", None, **calls), turn("tool", "r"), ANSWERED)
        assert row.messages[1] == {"role": "assistant", "tool_calls": [CALL]}
    with_id = messages(
        ASKED, {"role": "assistant", "tool_calls": [{"id": "1", **CALL}]}, turn("tool", "r", tool_call_id="1")
    )
    assert (with_id.messages[1]["tool_calls"][0]["id"], with_id.messages[2]["tool_call_id"]) == ("1", "1")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("f(1)", "not JSON"),
        ("{}", "must be {name, arguments}"),
        ('{"name": "f", "arguments": [1]}', "must be an object"),
        ('{"name": "f", "arguments": "x"}', "`arguments` is text that is not JSON"),
        ('{"name": "f", "arguments": {"x": 1, "x": 2}}', "stands twice"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', "half of a character"),
        (None, "must be {name, arguments}"),
    ],
)
def test_a_call_that_is_none_is_refused(call, told):
    assert told in refusal({"conversations": [said("human", "q"), said("function_call", call)]}, "sharegpt")


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}]])
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_come_in_one_form(tools, column):
    assert messages(ASKED, ANSWERED, **{column: tools}).tools == ({"type": "function", "function": TOOL},)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_no_tools(tools):
    assert messages(ASKED, ANSWERED, tools=tools).tools is None


@pytest.mark.parametrize("tools", ["f", [1], [{}], {"name": "f"}, '{"name": "f"}', [{"function": {}}]])
def test_tools_that_are_none_are_refused(tools):
    assert "tools" in refusal({"messages": [ASKED, ANSWERED], "tools": tools}, "messages")


def test_the_system_column_comes_first():
    assert messages(ASKED, ANSWERED, system="s").messages[0] == turn("system", "s")
    assert messages(ASKED, ANSWERED, system=" ").messages == (ASKED, ANSWERED)
    assert messages(turn("system", "s"), ASKED, ANSWERED, system="s").messages == (turn("system", "s"), ASKED, ANSWERED)
    assert "two different" in refusal({"messages": [turn("system", "t"), ASKED, ANSWERED], "system": "s"}, "messages")


def test_text_parts_are_put_together_and_other_parts_refused_by_name():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    assert messages(turn("user", parts), ANSWERED).messages[0] == turn("user", "a b")
    for part in ({"type": "image_url", "image_url": "x"}, {"type": "input_audio"}):
        assert part["type"] in refusal({"messages": [turn("user", [*parts, part]), ANSWERED]}, "messages")
    assert "content" in refusal({"messages": [turn("user", ["a"]), ANSWERED]}, "messages")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name(key):
    assert messages(ASKED, turn("assistant", "a", **{key: "t"})).messages[1] == turn(
        "assistant", "a", reasoning_content="t"
    )
    assert messages(ASKED, turn("assistant", "a", **{key: ""})).messages[1] == ANSWERED
    both = turn("assistant", "a", thinking="t", reasoning="u")
    assert "two different texts" in refusal({"messages": [ASKED, both]}, "messages")


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "training", "loss"])
def test_an_answer_of_weight_0_is_kept_but_not_learned(key):
    turns = [
        ASKED,
        turn("assistant", "a", **{key: 0}),
        turn("user", "r", **{key: False}),
        turn("assistant", "b", **{key: 1}),
    ]
    row = messages(*turns)
    assert row.messages == (ASKED, turn("assistant", "a", weight=0), turn("user", "r"), turn("assistant", "b"))
    assert "must be 0 or 1" in refusal({"messages": [ASKED, turn("assistant", "a", **{key: 0.5})]}, "messages")
    assert "only assistant turns" in refusal({"messages": [turn("user", "q", **{key: 1}), ANSWERED]}, "messages")
    assert "every assistant turn" in refusal({"messages": turns[:2]}, "messages")


def test_null_keys_are_absent_and_unread_keys_are_told_or_refused():
    """Case 25: nothing that a table filled up with null reaches a template."""
    nulls = {
        "name": None,
        "tool_calls": None,
        "tool_call_id": None,
        "weight": None,
        "reasoning_content": None,
        "images": [],
    }
    row = messages(turn("user", "q", **nulls, timestamp=3), turn("assistant", "a", **nulls))
    assert row.messages == (ASKED, ANSWERED)
    assert row.notes == ("the key 'timestamp' of messages is not used",)
    assert "did you mean 'tool_calls'" in refusal(
        {"messages": [ASKED, turn("assistant", "a", tool_cals=[1])]}, "messages"
    )
    assert "'images'" in refusal({"messages": [turn("user", "q", images=["x"]), ANSWERED]}, "messages")
    refers = [turn("user", "what is <image>?"), ANSWERED]
    assert "<image>" in refusal({"messages": refers, "images": ["x.png"]}, "messages")
    assert messages(*refers).messages == tuple(refers)


# Orders and contents, each on its own (case 28)


def told_of(*turns):
    return refusal({"messages": list(turns)}, "messages")


def test_an_unknown_role_is_refused_with_its_number_and_the_nearest():
    told = told_of(ASKED, turn("asistant", "a"))
    assert "messages[1] has the unknown role 'asistant'; did you mean 'assistant'?" in told


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_answer_is_refused(content):
    assert "messages[1]: the assistant's answer is empty" in told_of(ASKED, turn("assistant", content))
    assert "is empty" in told_of(ASKED, turn("assistant", content, thinking="only"))


def test_an_empty_question_is_refused():
    assert "messages[0]: the user's turn is empty" in told_of(turn("user", " "), ANSWERED)


@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system"])
def test_a_missing_content_is_refused(role):
    assert f"messages[0]: the {role} turn has no `content`" in told_of(turn(role, None), ANSWERED)


def test_two_user_turns_in_a_row_are_refused():
    assert "messages[1]: two user turns in a row" in told_of(ASKED, turn("user", "r"), ANSWERED)


def test_two_assistant_turns_in_a_row_are_refused():
    assert "messages[2]: two assistant turns in a row" in told_of(ASKED, ANSWERED, ANSWERED)


def test_a_conversation_may_begin_with_the_assistant():
    """Case 12."""
    assert messages(ANSWERED, ASKED, turn("assistant", "b")).messages[0] == ANSWERED


def test_a_conversation_may_end_with_the_user():
    """Case 12: the last turn is read, and nothing is learned from it."""
    assert messages(ASKED, ANSWERED, turn("user", "r")).messages[-1] == turn("user", "r")


def test_a_system_message_in_the_middle_is_refused():
    assert "messages[2]: a system message after the first turn" in told_of(ASKED, ANSWERED, turn("system", "s"))
    assert "messages[1]: a system message" in told_of(turn("system", "s"), turn("developer", "t"), ASKED, ANSWERED)


def test_a_tools_result_without_a_call_is_refused():
    assert "messages[1]: a tool's result without a call" in told_of(ASKED, turn("tool", "r"), ANSWERED)
    assert "messages[0]: a tool's result without a call" in told_of(turn("tool", "r"), ANSWERED)


def test_a_tools_result_may_answer_a_call_that_is_written_in_the_text():
    row = messages(ASKED, turn("assistant", '<tool_call>{"name": "f"}</tool_call>'), turn("tool", "r"), ANSWERED)
    assert len(row.messages) == 4


def test_a_tools_result_of_another_call_is_refused():
    calls = {"role": "assistant", "tool_calls": [{"id": "1", **CALL}]}
    assert "no call has the id '2'" in told_of(ASKED, calls, turn("tool", "r", tool_call_id="2"))


def test_a_call_by_anybody_else_is_refused():
    assert "a user turn cannot call tools" in told_of(turn("user", "q", tool_calls=[CALL]), ANSWERED)


def test_a_conversation_without_an_answer_is_refused():
    assert "no assistant turn" in told_of(ASKED)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "a list that is not empty"),
        (None, 'missing "messages"'),
        ({"role": "user"}, "must be a list"),
        ("hello", "not JSON"),
        (["hello"], "a text `role`"),
        ([None], "a text `role`"),
        ([{"content": "a"}], "a text `role`"),
        ([{"role": 1, "content": "a"}], "role must be text"),
        ([{"role": "user", "content": 3}], "`content` must be text"),
        ([{"role": "user", "from": "gpt", "content": "x"}], "has both `role` and another `from`"),
    ],
)
def test_turns_that_are_none_are_refused(value, told):
    assert told in refusal({"messages": value}, "messages")
