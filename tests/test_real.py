"""Real models and data, from FTUNE_REAL_DATA: a Llama without a template, transposed layers, real tokenizers.

Their logits reach 18, where float32 is exact to 2e-5: merged models are held to the bound that follows from it.
"""

import csv
import json

import pytest
import torch
from conftest import chat
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftune import chat as chats
from ftune import comparing, folder, recipe
from ftune.artifacts import files
from ftune.run.training import train_run

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own


def run(folder_, **sections):
    path = folder_ / "recipe.yaml"
    path.write_text(json.dumps({"output": {"dir": "run"}, **sections}))
    loaded = recipe.load(path)
    return train_run(loaded), loaded.output.dir


@pytest.fixture
def restaurant_rows(real_data, tmp_path):
    """Meaning representation -> sentence, as CSV: 400 rows to train on and 50 to measure on."""
    with (real_data / "data" / "e2e_nlg" / "dev.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))[:450]
    for name, part in (("train.csv", rows[50:]), ("test.csv", rows[:50])):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["mr", "ref"])
            writer.writeheader()
            writer.writerows(part)
    return tmp_path


@pytest.mark.parametrize(("method", "rate", "below"), [("full", 0.003, 2.0), ("lora", 0.01, 2.0)])
def test_llama_without_template_learns_sentences(real_data, restaurant_rows, method, rate, below):
    report, path = run(
        restaurant_rows,
        model={"base": str(real_data / "models" / "stories260K")},
        method={"name": method},
        data={
            "train": "train.csv",
            "test": "test.csv",
            "columns": {"prompt": "mr", "completion": "ref"},
            "max_length": 512,
        },
        training={"max_steps": 20, "learning_rate": rate},
        evaluation={"metric": "loss"},
    )
    task = report["task"]
    assert task["zero_shot"] > 4.0
    assert task["tuned"] < below
    assert report["artefact"]["merged_max_diff"] <= report["artefact"]["tolerance"]
    assert folder.read_json(path / "manifest.json")["changed"]


def test_transposed_tied_gpt2_is_tuned_merged_and_read_by_peft(real_data, tmp_path):
    base = real_data / "models" / "slm4096-gpt2-char"
    rows = [
        {"prompt": f"Q: What is {name}?\nA:", "completion": f" {name} is a thing.\n"} for name in ("tea", "ice", "rain")
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, path = run(
        tmp_path,
        model={"base": str(base)},
        method={"name": "lora", "rank": 4},
        data={"train": "train.jsonl", "max_length": 128},
        training={"max_steps": 10, "learning_rate": 0.01, "batch_size": 3},
        evaluation={"few_shot": 0},
    )
    assert report["artefact"]["adapter_live"] is True
    assert report["artefact"]["merged_max_diff"] <= report["artefact"]["tolerance"]
    ours = AutoModelForCausalLM.from_pretrained(base)
    files.load_adapter(ours, path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path / "adapter").eval()
    probe = comparing.proof_rows_for(ours)
    assert comparing.max_difference(comparing.logits_of(theirs, probe), comparing.logits_of(ours, probe)) <= 1e-5


def test_adapter_that_peft_trained_on_a_real_model_gives_the_same_logits(real_data, tmp_path):
    base = real_data / "models" / "stories260K"
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(base)
    files.load_adapter(ours, tmp_path / "adapter")
    probe = comparing.proof_rows_for(ours)
    assert comparing.max_difference(comparing.logits_of(ours, probe), comparing.logits_of(theirs, probe)) <= 1e-5


def test_real_chat_template_gives_exact_spans(real_data):
    """Cases 10, 13: Qwen's template writes a system turn of its own and has no generation marks."""
    tokenizer = AutoTokenizer.from_pretrained(real_data / "models" / "qwen2.5-tokenizer")
    messages = [*chat("naïve 日本?", "はい, 42.")["messages"], *chat("And?", "No")["messages"]]
    tokens = chats.tokenize(tokenizer, chats.render_messages(tokenizer, messages))
    taught = tokenizer.decode([label for label in tokens.labels if label != -100])
    assert taught == "はい, 42.<|im_end|>No<|im_end|>"
    assert tokens.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in chats.end_of_turn_ids(tokenizer)


@pytest.mark.parametrize("name", ["stories260K", "slm4096-gpt2-char", "sort-gpt2-nano"])
def test_real_models_can_be_packed(real_data, name):
    loaded = AutoModelForCausalLM.from_pretrained(real_data / "models" / name, dtype=torch.float32)
    assert comparing.prove_packing(loaded, "auto") < 1e-4
