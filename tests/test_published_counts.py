"""Trainable parameters of configurations in the methods' papers: ours must round to the published figure.

The papers' GPT-3 and RoBERTa are stated as a Llama of their width and depth: the adapted projections have the same
shapes. IA3's paper tunes encoder-decoder models only, no causal language models: its figures cannot be stated here.
"""

import json

import pytest
import torch
from conftest import ftune
from transformers import AutoConfig, AutoModelForCausalLM

from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.settings import DoraSettings, LoraSettings, PrefixTuningSettings, VeraSettings

QV = ["q_proj", "v_proj"]
QKV_UP_DOWN = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def llama(width, layers, intermediate, vocabulary=32000, kv_heads=None):
    heads = width // 128
    return AutoConfig.for_model(
        "llama", hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate,
        num_key_value_heads=kv_heads or heads, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip


ROBERTA_BASE, ROBERTA_LARGE = llama(768, 12, 3072), llama(1024, 24, 4096)
GPT3 = llama(12288, 96, 49152)
LLAMA_7B, LLAMA_13B = llama(4096, 32, 11008), llama(5120, 40, 13824)
LLAMA3_8B = llama(4096, 32, 14336, vocabulary=128256, kv_heads=8)
GPT2_MEDIUM = AutoConfig.for_model("gpt2", n_embd=1024, n_layer=24, n_head=16)

# Paper and table, model, settings, the published figure, its unit (% is of all parameters, the new ones among them).
ROWS = [
    ("LoRA table 2, RoBERTa base", ROBERTA_BASE, LoraSettings(rank=8, target_modules=QV), 0.3, "M"),
    ("LoRA table 2, RoBERTa large", ROBERTA_LARGE, LoraSettings(rank=8, target_modules=QV), 0.8, "M"),
    ("LoRA table 4, GPT-3, r_v = 2", GPT3, LoraSettings(rank=2, target_modules=["v_proj"]), 4.7, "M"),
    ("LoRA table 4, GPT-3, r_q = r_v = 8", GPT3, LoraSettings(rank=8, target_modules=QV), 37.7, "M"),
    ("VeRA table 1, RoBERTa base, rank 1", ROBERTA_BASE, VeraSettings(rank=1, target_modules=QV), 18.4, "K"),
    ("VeRA table 1, RoBERTa base, rank 16", ROBERTA_BASE, VeraSettings(rank=16, target_modules=QV), 18.8, "K"),
    ("VeRA table 1, RoBERTa base, rank 256", ROBERTA_BASE, VeraSettings(rank=256, target_modules=QV), 24.5, "K"),
    ("VeRA table 1, RoBERTa large, rank 1", ROBERTA_LARGE, VeraSettings(rank=1, target_modules=QV), 49.2, "K"),
    ("VeRA table 1, GPT-3, rank 1", GPT3, VeraSettings(rank=1, target_modules=QV), 2.4, "M"),
    ("VeRA table 4, Llama 2 7B, LoRA", LLAMA_7B, LoraSettings(rank=64), 159.9, "M"),
    ("VeRA table 4, Llama 2 7B, VeRA", LLAMA_7B, VeraSettings(rank=256), 1.4, "M"),
    ("VeRA table 4, Llama 2 13B, LoRA", LLAMA_13B, LoraSettings(rank=64), 250.3, "M"),
    ("DoRA table 1, LLaMA 7B, LoRA", LLAMA_7B, LoraSettings(rank=32, target_modules=QKV_UP_DOWN), 0.83, "%"),
    ("DoRA table 1, LLaMA 7B, DoRA", LLAMA_7B, DoraSettings(rank=32, target_modules=QKV_UP_DOWN), 0.84, "%"),
    ("DoRA table 1, LLaMA 7B, half the rank", LLAMA_7B, DoraSettings(rank=16, target_modules=QKV_UP_DOWN), 0.43, "%"),
    ("DoRA table 1, LLaMA 3 8B, LoRA", LLAMA3_8B, LoraSettings(rank=32, target_modules=QKV_UP_DOWN), 0.70, "%"),
    ("DoRA table 1, LLaMA 3 8B, DoRA", LLAMA3_8B, DoraSettings(rank=32, target_modules=QKV_UP_DOWN), 0.71, "%"),
    ("Prefix-tuning table 1, GPT-2 medium", GPT2_MEDIUM, PrefixTuningSettings(virtual_tokens=10), 0.1, "%"),
]


@pytest.mark.parametrize(("row", "config", "settings", "published", "unit"), ROWS, ids=[row[0] for row in ROWS])
def test_trainable_parameters_are_the_papers(row, config, settings, published, unit):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    METHODS[settings.name].attach(model, settings)
    count = sum(parameter.numel() for parameter in trainable(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    ours = {"K": count / 1e3, "M": count / 1e6, "%": 100 * count / total}[unit]
    last_digit = 10.0 ** -len(str(published).split(".")[1])
    assert ours == pytest.approx(published, abs=last_digit), "the papers round and cut off"


def test_plan_prints_them_from_config_json_alone(tmp_path):
    """LoRA's 0.8 million of table 2, by the command line, without any weights."""
    (tmp_path / "base").mkdir()
    ROBERTA_LARGE.to_json_file(tmp_path / "base" / "config.json", use_diff=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: ./base\nmethod: {name: lora, rank: 8, target_modules: [q_proj, v_proj]}\ndata: {train: none.jsonl}\n"
    )
    result = ftune("plan", recipe, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parameters"]["trainable"] == 786_432
