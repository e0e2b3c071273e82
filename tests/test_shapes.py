"""Rows of every shape that people have become what they mean, or are refused by name. Numbers: trust cases."""

import copy
import csv
import json
import os
from pathlib import Path

import pytest
from ftune.data.shape_texts import full_text, question_text
from hypothesis import given, settings
from hypothesis import strategies as st

from ftune.data.detection import NEEDED
from ftune.data.fields import renamed
from ftune.data.messages import OTHER_ALIASES, USUAL_ALIASES
from ftune.data.rows import SourceRow, read_rows
from ftune.data.shapes import (
    BadRow,
    Completion,
    Conversation,
    Labelled,
    PlainPreference,
    Preference,
    Text,
    detect,
    has_signal,
    normalize,
    unused_columns,
)
from ftune.errors import UserError

REAL = Path(os.environ.get("FTUNE_REAL_DATA", "/nonexistent")) / "data"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"name": "f", "parameters": {"type": "object"}}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def said(speaker, value, **more):
    return {"from": speaker, "value": value, **more}


ASKED, ANSWERED = turn("user", "q"), turn("assistant", "a")


def messages(*turns, **columns):
    return normalize({"messages": list(turns), **columns}, "messages", {})


def sharegpt(*turns, **columns):
    return normalize({"conversations": list(turns), **columns}, "sharegpt", {})


def refusal(fields, shape, columns=None):
    """What a refused row is told; the row is not refused by changing it."""
    before = copy.deepcopy(fields)
    with pytest.raises(BadRow) as caught:
        normalize(fields, shape, columns or {})
    assert fields == before
    return f"{caught.value} {caught.value.hint}"


# Conversations


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


# The other shapes


def test_a_prompt_and_its_completion():
    assert normalize({"prompt": "", "completion": " c"}, "prompt_completion", {}) == Completion("", " c")
    assert "completion is empty" in refusal({"prompt": "p", "completion": " "}, "prompt_completion")
    assert 'missing "completion": it is null' in refusal({"prompt": "p", "completion": None}, "prompt_completion")
    assert '"prompt" must be text, this is 3' in refusal({"prompt": 3, "completion": "c"}, "prompt_completion")


def test_a_prompt_and_completion_of_messages_teach_the_completion_alone():
    asked = [ASKED, turn("assistant", "a"), turn("user", "r")]
    row = normalize({"prompt": asked, "completion": [turn("assistant", "b")], "tools": [TOOL]}, "prompt_completion", {})
    assert row.messages == (ASKED, turn("assistant", "a", weight=0), turn("user", "r"), turn("assistant", "b"))
    assert row.tools
    for prompt, completion in (("q", [ANSWERED]), ([ASKED], "a")):
        assert normalize({"prompt": prompt, "completion": completion}, "prompt_completion", {}).messages == (
            ASKED,
            ANSWERED,
        )


def test_a_completion_that_begins_with_the_user_is_refused():
    told = refusal({"prompt": [ASKED, ANSWERED], "completion": [ASKED, ANSWERED]}, "prompt_completion")
    assert "the completion begins with a turn of the user" in told


def test_alpaca_rows_are_conversations():
    fields = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]]}
    row = normalize(fields, "alpaca", {})
    assert row == Conversation((turn("system", "s"), ASKED, ANSWERED, turn("user", "i\n\nx"), turn("assistant", "o")))
    for empty in ({}, {"input": ""}, {"input": None, "history": [], "system": ""}):
        plain = normalize({"instruction": "i", "output": "o", **empty}, "alpaca", {})
        assert plain == Conversation((turn("user", "i"), turn("assistant", "o")))
    assert normalize({"instruction": "", "input": "x", "output": "o"}, "alpaca", {}).messages[0] == turn("user", "x")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"instruction": " "}, "the instruction is empty"),
        ({"instruction": None}, 'missing "instruction"'),
        ({"output": ""}, "the output is empty"),
        ({"input": ["x"]}, '"input" must be text'),
        ({"history": [["q"]]}, "history[0] must be a question and its answer"),
        ({"history": [["q", ""]]}, "history[0] must be a question and its answer"),
        ({"history": "x"}, '"history" is text that is not JSON'),
    ],
)
def test_alpaca_rows_that_ask_or_answer_nothing_are_refused(change, told):
    assert told in refusal({"instruction": "i", "output": "o", **change}, "alpaca")


def test_texts_and_labels():
    assert normalize({"text": " t "}, "text", {}) == Text(" t ")
    assert normalize({"text": "t", "label": 3}, "labelled", {}) == Labelled("t", 3)
    assert normalize({"text": "t", "label": "no"}, "labelled", {}) == Labelled("t", "no")
    assert "text is empty" in refusal({"text": "\n"}, "text")
    assert 'missing "label": it is null' in refusal({"text": "t", "label": None}, "labelled")
    assert "label is empty" in refusal({"text": "t", "label": ""}, "labelled")


@pytest.mark.parametrize("label", [1.0, True, ["a"], {"a": 1}])
def test_a_label_that_is_neither_text_nor_a_whole_number_is_refused(label):
    assert "must be text or a whole number" in refusal({"text": "t", "label": label}, "labelled")


BETTER, WORSE = turn("assistant", "a"), turn("assistant", "b")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [ASKED], "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": "q", "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": [ASKED], "chosen": "a", "rejected": "b"},
        {"chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"prompt": "q", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE], "messages": [ASKED, BETTER]},
        {"prompt": [ASKED], "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
        {"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
        {"conversations": [said("human", "q")], "chosen": "a", "rejected": "b"},
    ],
)
def test_every_way_to_write_a_preference_is_one(fields):
    assert detect(fields, "auto", "here").shape == "preference"
    row = normalize(fields, "preference", {})
    assert row == Preference((ASKED,), (BETTER,), (WORSE,))
    assert has_signal(row)


def test_a_preference_of_texts_stays_plain():
    row = normalize({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference", {})
    assert row == PlainPreference("p", "a", "b")


def test_answers_that_do_not_differ_are_told():
    """Case 34."""
    assert not has_signal(normalize({"prompt": "p", "chosen": "a", "rejected": "a"}, "preference", {}))
    both = [ASKED, turn("assistant", "x"), turn("user", "r"), BETTER]
    row = normalize({"chosen": both, "rejected": both}, "preference", {})
    assert (row.messages, row.chosen, has_signal(row)) == (tuple(both[:3]), (BETTER,), False)


def test_conversations_share_all_turns_before_they_part():
    start = [turn("system", "s"), ASKED, turn("assistant", "x"), turn("user", "r")]
    row = normalize({"chosen": [*start, BETTER], "rejected": [*start, WORSE, ASKED, ANSWERED]}, "preference", {})
    assert row == Preference(tuple(start), (BETTER,), (WORSE, ASKED, ANSWERED))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"chosen": "a", "rejected": "b"}, 'missing "prompt"'),
        ({"chosen": [BETTER], "rejected": [WORSE]}, 'missing "prompt"'),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, 'missing "rejected": it is null'),
        ({"prompt": "p", "chosen": "a"}, 'missing "rejected"'),
        ({"chosen": [ASKED, BETTER], "rejected": [turn("user", "other"), WORSE]}, "messages[0]"),
        ({"chosen": [ASKED, BETTER], "rejected": [ASKED]}, "messages[1]"),
        ({"chosen": [ASKED], "rejected": [ASKED]}, "do not part at an answer"),
        ({"prompt": "x", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]}, "the prompt is not what"),
        (
            {"prompt": [turn("user", "x")], "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
            "the prompt is not what",
        ),
        ({"prompt": [ASKED, BETTER], "chosen": [BETTER], "rejected": [WORSE]}, "two assistant turns"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "chosen[0]"),
        ({"prompt": "p", "chosen": [], "rejected": []}, "not empty"),
    ],
)
def test_preferences_that_are_none_are_refused(fields, told):
    assert told in refusal(fields, "preference")


# Which shape, and which columns


@pytest.mark.parametrize(
    ("fields", "shape", "told"),
    [
        (
            {"prompt": "", "completion": ""},
            "prompt_completion",
            "prompt_completion, by the columns 'prompt' and 'completion'",
        ),
        ({"text": "", "label": ""}, "text", "text, by the column 'text'"),
        ({"instruction": "", "output": "", "text": ""}, "alpaca", "'instruction' and 'output'; text would fit too"),
        ({"messages": [ASKED], "prompt": "", "completion": ""}, "messages", "prompt_completion would fit too"),
        ({"prompt": "", "messages": [ASKED], "chosen": [], "rejected": []}, "preference", "messages would fit too"),
        ({"dialogue": "a text", "text": ""}, "text", "text, by the column 'text'"),
        (
            {"messages": None, "conversations": [said("human", "")]},
            "sharegpt",
            "sharegpt, by the column 'conversations'",
        ),
    ],
)
def test_the_most_specific_shape_is_taken_and_told(fields, shape, told):
    found = detect(fields, "auto", "here")
    assert found.shape == shape
    assert told in found.told


def test_a_shape_that_was_asked_for_is_taken():
    assert detect({}, "labelled", "here").told == "labelled, as data.format says"


def test_no_shape_lists_the_columns_the_nearest_and_a_way_out():
    """Case 27."""
    with pytest.raises(
        UserError, match=r"(?s)here: no known shape.*'prompt', 'complet1on'.*'completion' by 'complet1on'"
    ):
        detect({"prompt": 1, "complet1on": 2}, "auto", "here")
    with pytest.raises(UserError, match=r"columns: {prompt: query, completion: response}"):
        detect({"query": 1, "response": 2}, "auto", "here")
    with pytest.raises(UserError, match="the row has no columns"):
        detect({}, "auto", "here")


def test_a_misspelt_column_is_refused_with_the_nearest():
    """Cases 26, 27: a row of other columns is never taken for one of empty values."""
    told = refusal({"prompt": "p", "reponse": "r"}, "prompt_completion", {"completion": "response"})
    assert "no column 'response'; columns are 'prompt', 'reponse'; did you mean 'reponse'?" in told
    told = refusal({"prompt": "p", "compleshun": "r"}, "prompt_completion")
    assert "missing \"completion\"; columns are 'prompt', 'compleshun'; did you mean 'compleshun'?" in told
    assert "completion: turns.0.completion" in refusal(
        {"prompt": "p", "turns": [{"completion": 1}]}, "prompt_completion"
    )


@pytest.mark.parametrize("shape", list(NEEDED))
def test_a_name_of_ours_that_the_shape_does_not_read_is_an_error(shape):
    ours = "promt" if shape == "prompt_completion" else "targett"
    with pytest.raises(UserError, match=f"data.columns names '{ours}'"):
        detect({"x": 1}, shape, "here", {ours: "x"})


def test_columns_are_renamed_all_at_once():
    fields = {"a": 1, "b": 2, "c": [{"d": 3}], "e.f": 4}
    assert renamed(fields, {"b": "a", "a": "b"}) == {"b": 1, "a": 2, "c": [{"d": 3}], "e.f": 4}
    assert renamed(fields, {"x": "a", "y": "a", "z": "c.0.d", "w": "e.f"}) == {
        "b": 2, "c": [{"d": 3}], "x": 1, "y": 1, "z": 3, "w": 4,
    }  # fmt: skip
    for path in ("c.1.d", "c.0.x", "c.d", "q", "a.b"):
        with pytest.raises(BadRow, match="no column"):
            renamed(fields, {"x": path})


def test_columns_that_nothing_reads_are_named():
    """Case 27."""
    fields = {"question": 1, "answer": 2, "prompt": 3, "url": None, "meta": {"a": 1}}
    columns = {"prompt": "question", "completion": "answer"}
    assert unused_columns(fields, "prompt_completion", columns) == ("prompt", "url", "meta")
    assert unused_columns(fields, "prompt_completion", {**columns, "prompt": "meta.a"}) == ("question", "prompt", "url")
    assert unused_columns({"messages": [], "conversations": []}, "messages", {}) == ("conversations",)
    assert unused_columns({"text": "", "label": ""}, "text", {}) == ("label",)


# Texts for cleaning


def test_the_question_is_what_is_asked_and_the_full_text_is_everything():
    row = sharegpt(
        said("human", "q"), said("function_call", '{"name": "f", "arguments": {}}'), said("observation", "r"),
        said("gpt", "a"), system="s", tools=[TOOL],
    )  # fmt: skip
    assert question_text(row) == "q\nr"
    tool = json.dumps({"function": TOOL, "type": "function"})
    assert full_text(row) == "\n".join(["s", "q", '{"arguments": {}, "name": "f"}', "r", "a", tool])
    rows = [Completion("p", "c"), PlainPreference("p", "c", "d"), Text("t"), Labelled("t", 3)]
    assert [question_text(row) for row in rows] == ["p", "p", "t", "t"]
    assert [full_text(row) for row in rows] == ["p\nc", "p\nc\nd", "t", "t\n3"]
    pair = Preference((turn("system", "s"), ASKED), (BETTER,), (WORSE,))
    assert (question_text(pair), full_text(pair)) == ("q", "s\nq\na\nb")


# Real sets: nothing but a `columns` map, and the count of another reader


def count_of(path: Path) -> int:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return sum(1 for _ in csv.reader(file)) - 1
        return len(json.load(file)) if path.suffix == ".json" else sum(1 for line in file if line.strip())


@pytest.mark.skipif(not REAL.is_dir(), reason="FTUNE_REAL_DATA is not set")
@pytest.mark.parametrize(
    ("file", "shape", "columns", "kind", "unused"),
    [
        ("dolly_sample/dolly.jsonl", "alpaca", {"input": "context", "output": "response"}, Conversation, ()),
        ("toolcall_glaive/toolcall.json", "sharegpt", {}, Conversation, ()),
        ("fastchat/dummy_conversation.json", "sharegpt", {}, Conversation, ("id",)),
        ("dpo_mix/dpo_en.json", "preference", {}, Preference, ()),
        ("dpo_mix/dpo_zh.json", "preference", {}, Preference, ()),
        ("sgd_chat/train.jsonl", "messages", {}, Conversation, ("id", "services")),
        ("e2e_nlg/dev.csv", "prompt_completion", {"prompt": "mr", "completion": "ref"}, Completion, ()),
        ("gsm8k/train.jsonl", "prompt_completion", {"prompt": "question", "completion": "answer"}, Completion, ()),
        ("gsm8k/test.jsonl", "prompt_completion", {"prompt": "question", "completion": "answer"}, Completion, ()),
        ("gsm8k_pairs/pairs.jsonl", "preference", {}, PlainPreference, ("chosen_model", "rejected_model")),
        (
            "self_instruct/seed_tasks.jsonl",
            "alpaca",
            {"input": "instances.0.input", "output": "instances.0.output"},
            Conversation,
            ("id", "name", "is_classification"),
        ),
        (
            "mbpp/train.jsonl",
            "prompt_completion",
            {"prompt": "text", "completion": "code"},
            Completion,
            ("task_id", "test_setup_code", "test_list", "challenge_test_list"),
        ),
        ("bbh/bbh.jsonl", "prompt_completion", {"prompt": "input", "completion": "target"}, Completion, ("task",)),
        ("tinystories/stories.jsonl", "text", {}, Text, ()),
        ("c4_docs/c4.jsonl", "text", {}, Text, None),
        ("banking77/train.csv", "labelled", {"label": "category"}, Labelled, ()),
        ("snips/train.jsonl", "labelled", {"label": "intent"}, Labelled, ("slots",)),
    ],
)
def test_a_real_set_is_read_to_its_last_row(file, shape, columns, kind, unused):
    path = REAL / file
    rows = list(read_rows(path))
    assert all(isinstance(row, SourceRow) for row in rows)
    requested = shape if shape == "labelled" else "auto"
    found = detect(rows[0].fields, requested, rows[0].place, columns).shape
    shaped = [normalize(row.fields, found, columns) for row in rows]
    assert (found, len(shaped)) == (shape, count_of(path))
    assert all(isinstance(row, kind) for row in shaped)
    assert unused is None or unused_columns(rows[0].fields, shape, columns) == unused
    assert all(
        question_text(row).strip() and set(question_text(row).split("\n")) <= set(full_text(row).split("\n"))
        for row in shaped
    )
    assert not any(getattr(row, "notes", ()) for row in shaped)


@pytest.mark.skipif(not REAL.is_dir(), reason="FTUNE_REAL_DATA is not set")
def test_real_calls_and_texts_arrive_whole():
    raw = json.loads((REAL / "toolcall_glaive/toolcall.json").read_text(encoding="utf-8"))
    rows = [normalize(fields, "sharegpt", {}) for fields in raw]
    for fields, row in zip(raw, rows, strict=True):
        assert [t["function"] for t in row.tools or ()] == json.loads(fields["tools"])
        expected = [
            json.loads(t["value"]) if t["from"] == "function_call" else t["value"] for t in fields["conversations"]
        ]
        found = [m["tool_calls"][0]["function"] if "tool_calls" in m else m["content"] for m in row.messages]
        assert found == expected
    assert sum("tool_calls" in m for row in rows for m in row.messages) == 108


# Whatever a row holds, it is shaped or refused

NAMES = st.sampled_from(
    ["messages", "conversations", "system", "tools", "prompt", "completion", "text", "label", "chosen", "rejected",
     "instruction", "input", "output", "history", "images"]
)  # fmt: skip
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "x"])},
    optional={"content": st.sampled_from(["", "a"]), "weight": st.integers(0, 1)},
) | st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "function_call"]), "value": st.sampled_from(["a", '{"name": "f"}'])}
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "<image>", "[]", "\ud800"])
KEYS = st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "z"])
VALUE = st.recursive(
    SCALAR | TURN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(NAMES, VALUE, max_size=5), st.sampled_from(["auto", *NEEDED]))
def test_no_row_ends_in_a_traceback(fields, requested):
    before = copy.deepcopy(fields)
    try:
        shape = detect(fields, requested, "here").shape
        row = normalize(fields, shape, {})
        assert isinstance(full_text(row) + question_text(row), str)
    except (UserError, BadRow):
        pass
    assert repr(fields) == repr(before)
    assert set(unused_columns(fields, requested if requested != "auto" else "text", {})) <= set(fields)
