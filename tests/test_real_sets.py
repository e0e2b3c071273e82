"""Real sets, with nothing but a `columns` map, against the count of another reader."""

import csv
import json
from pathlib import Path

import pytest

from ftune.data.detection import detect, unused_columns
from ftune.data.examples import fields_of
from ftune.data.rows import SourceRow, read_rows
from ftune.data.shapes import Completion, Conversation, Labelled, PlainPreference, Preference, Text, normalize
from ftune.data.texts import full_text, question_and_answer


def count_of(path: Path) -> int:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return sum(1 for _ in csv.reader(file)) - 1
        return len(json.load(file)) if path.suffix == ".json" else sum(1 for line in file if line.strip())


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
def test_a_real_set_is_read_to_its_last_row(real_data, file, shape, columns, kind, unused):
    path = real_data / "data" / file
    rows = list(read_rows(path))
    assert all(isinstance(row, SourceRow) for row in rows)
    requested = shape if shape == "labelled" else "auto"
    found = detect(rows[0].fields, requested, rows[0].place, columns).shape
    shaped = [normalize(row.fields, found, columns) for row in rows]
    assert (found, len(shaped)) == (shape, count_of(path))
    assert all(isinstance(row, kind) for row in shaped)
    assert unused is None or unused_columns(rows[0].fields, shape, columns) == unused
    for fields in map(fields_of, shaped):
        texts, parts = full_text(fields).split("\n"), question_and_answer(fields)
        assert all(set(part.split("\n")) <= set(texts) for part in parts if part)
        assert all(part.strip() for part in parts) or kind is Text
    assert not any(getattr(row, "notes", ()) for row in shaped)


def test_real_calls_and_texts_arrive_whole(real_data):
    raw = json.loads((real_data / "data" / "toolcall_glaive/toolcall.json").read_text(encoding="utf-8"))
    rows = [normalize(fields, "sharegpt", {}) for fields in raw]
    for fields, row in zip(raw, rows, strict=True):
        assert [t["function"] for t in row.tools or ()] == json.loads(fields["tools"])
        expected = [
            json.loads(t["value"]) if t["from"] == "function_call" else t["value"] for t in fields["conversations"]
        ]
        found = [m["tool_calls"][0]["function"] if "tool_calls" in m else m["content"] for m in row.messages]
        assert found == expected
    assert sum("tool_calls" in m for row in rows for m in row.messages) == 108
