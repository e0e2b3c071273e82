"""`ftune check` on real sets with a real tokenizer: its figures against a count that shares nothing with ours."""

import csv
import json
import re
import shutil

import pytest
from transformers import AutoTokenizer, LlamaConfig

from ftune import recipe
from ftune.run import preview

ROWS = 120
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
ROLES = {"system": "system", "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def asked(question, answer):
    return conversation(("user", question), ("assistant", answer))


def of_sharegpt(row):
    """Glaive's rows, with each call in OpenAI's form."""
    messages = []
    for turn in row["conversations"]:
        if turn["from"] == "function_call":
            call = {"type": "function", "function": json.loads(turn["value"])}
            messages.append({"role": "assistant", "tool_calls": [call]})
        else:
            messages.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    return messages


def of_dolly(row):
    return asked(row["instruction"] + (f"\n\n{row['context']}" if row["context"].strip() else ""), row["response"])


SETS = {
    "dolly_sample/dolly.jsonl": ({"input": "context", "output": "response"}, of_dolly),
    "sgd_chat/train.jsonl": ({}, lambda row: row["messages"]),
    "gsm8k/train.jsonl": ({"prompt": "question", "completion": "answer"}, lambda r: asked(r["question"], r["answer"])),
    "e2e_nlg/dev.csv": ({"prompt": "mr", "completion": "ref"}, lambda row: asked(row["mr"], row["ref"])),
    "toolcall_glaive/toolcall.json": ({}, of_sharegpt),
    "dpo_mix/dpo_en.json": ({}, lambda row: [*of_sharegpt(row), *of_sharegpt({"conversations": [row["chosen"]]})]),
    "gsm8k_pairs/pairs.jsonl": ({}, lambda row: asked(row["prompt"], row["chosen"])),
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, real_data):
    """A folder with Qwen 2.5's real tokenizer and a small shape; a check needs no weights."""
    folder = tmp_path_factory.mktemp("qwen") / "base"
    shutil.copytree(real_data / "models" / "qwen2.5-tokenizer", folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaConfig(vocab_size=151936, max_position_embeddings=8192, **sizes).save_pretrained(folder)
    return folder


def first_rows(path, folder):
    """The first rows of a set as a file of its own kind, and as Python values."""
    text = path.read_text(encoding="utf-8-sig")
    small = folder / path.name
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))[:ROWS]
        with small.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        return small, rows
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    rows = rows[:ROWS]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    small.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return small, rows


@pytest.mark.parametrize("name", SETS)
def test_a_checks_figures_are_those_of_an_independent_count(real_data, qwen, tmp_path, name):
    columns, messages_of = SETS[name]
    path, rows = first_rows(real_data / "data" / name, tmp_path)
    file = tmp_path / "recipe.yaml"
    data = {"train": path.name, "columns": columns, "max_length": 8192, "deduplicate": "off"}
    file.write_text(json.dumps({"model": str(qwen), "method": "lora", "data": data}))
    found = preview.check(recipe.load(file))
    assert found["problems"] == []

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    num_tokens = num_supervised = num_turns = 0
    for row in rows:
        tools = json.loads(row["tools"]) if row.get("tools") else None
        if tools:
            tools = [{"type": "function", "function": tool} for tool in tools]
        messages = messages_of(row)
        if row.get("system"):
            messages = conversation(("system", row["system"])) + messages
        text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        answers = [match.span(1) for match in ANSWER.finditer(text)]
        num_tokens += len(encoded["input_ids"])
        num_turns += len(answers)
        learned = answers[-1:] if "chosen" in row else answers
        num_supervised += sum(any(a <= start < b for a, b in learned) for start, _ in encoded["offset_mapping"])
    told = found["data"]
    assert (told["rows_in"], told["rows_used"], told["dropped"]) == (len(rows), len(rows), {})
    assert (told["tokens"], told["supervised_tokens"]) == (num_tokens, num_supervised)
    assert told["end_of_turn"]["tokens"] == num_turns
    assert told["roles"]["assistant"]["supervised"] == num_supervised
    assert sum(role["tokens_in"] for role in told["roles"].values()) == num_tokens
    assert sum(told["histogram"]["counts"]) == len(rows)


def test_a_check_of_a_labelled_set_counts_a_label_a_row(real_data, tmp_path):
    path, rows = first_rows(real_data / "data" / "banking77" / "train.csv", tmp_path)
    rows += [{"text": "another", "category": "other"}]
    with path.open("a", encoding="utf-8") as file:
        file.write("another,other\n")
    file = tmp_path / "recipe.yaml"
    base = real_data / "models" / "stories260K"
    data = {"train": path.name, "columns": {"label": "category"}, "deduplicate": "off"}
    file.write_text(json.dumps({"model": str(base), "method": "lora", "objective": "classification", "data": data}))
    found = preview.check(recipe.load(file))
    assert found["problems"] == []
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert found["data"]["tokens"] == sum(len(tokenizer(row["text"])["input_ids"]) for row in rows)
    assert found["data"]["supervised_tokens"] == found["data"]["rows_used"] == len(rows)
