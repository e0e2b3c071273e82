"""Rows of every shape that people have become what they mean, or are refused by name. Numbers: trust cases."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_kit import ANSWERED, ASKED, TOOL, refusal, said, sharegpt, turn

from ftune.data.detection import NEEDED, detect, unused_columns
from ftune.data.examples import fields_of
from ftune.data.fields import BadRow, renamed
from ftune.data.shapes import (
    Completion,
    Conversation,
    Labelled,
    PlainPreference,
    Preference,
    Text,
    has_signal,
    normalize,
)
from ftune.data.texts import full_text, question_and_answer
from ftune.errors import UserError


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
    call = '{"arguments": {}, "name": "f"}'
    assert question_and_answer(fields_of(row)) == ("q\nr", f"{call}\na")
    tool = json.dumps({"function": TOOL, "type": "function"})
    assert full_text(fields_of(row)) == "\n".join(["s", "q", call, "r", "a", tool])
    rows = [Completion("p", "c"), PlainPreference("p", "c", "d"), Text("t"), Labelled("t", 3)]
    found = [question_and_answer(fields_of(row)) for row in rows]
    assert found == [("p", "c"), ("p", "c"), ("", "t"), ("t", "3")]
    assert [full_text(fields_of(row)) for row in rows] == ["p\nc", "p\nc\nd", "t", "t\n3"]
    pair = Preference((turn("system", "s"), ASKED), (BETTER,), (WORSE,))
    assert question_and_answer(fields_of(pair)) == ("q", "a")
    assert full_text(fields_of(pair)) == "s\nq\na\nb"


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
        assert isinstance(full_text(fields_of(row)), str)
    except (UserError, BadRow):
        pass
    assert repr(fields) == repr(before)
    assert set(unused_columns(fields, requested if requested != "auto" else "text", {})) <= set(fields)
