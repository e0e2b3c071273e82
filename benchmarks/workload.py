"""What peers are compared on: shapes with random weights, rows of realistic lengths, and how adapters start.

Rows are token ids: log-normal lengths of median 142 and mean 180, at most 998; the last quarter of each is supervised.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

MEDIAN, MEAN, LONGEST, SHORTEST = 142, 180, 998, 16
SUPERVISED = 4
"""One token in so many."""
RANK, ALPHA = 16, 32.0
VIRTUAL_TOKENS = 20
CLASSES = 7
LEARNING_RATE = 1e-3
VOCABULARY = 32000
SHAPES: dict[str, dict[str, Any]] = {
    # 41.7 million weights.
    "llama": {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "n_inner": 2048, "attn_pdrop": 0.0,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    labels: list[int]
    """As long; -100 where nothing is supervised."""


def model_of(shape: str, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """The shape with random weights, the same for the same shape; layers: None for the shape's own."""
    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": 1024, **SHAPES[shape]}
    if layers is not None:
        settings["n_layer" if shape == "gpt2" else "num_hidden_layers"] = layers
    config = AutoConfig.for_model(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    model.config.use_cache = False
    return model


def rows_of(count: int, vocabulary: int, length: int | None = None) -> list[Row]:
    """length: of all rows, instead of realistic ones."""
    rng = random.Random(0)
    spread = math.sqrt(2 * math.log(MEAN / MEDIAN))
    rows = []
    for _ in range(count):
        drawn = length or round(rng.lognormvariate(math.log(MEDIAN), spread))
        size = min(max(drawn, SHORTEST), LONGEST)
        ids = [rng.randrange(3, vocabulary) for _ in range(size)]
        answer = max(1, size // SUPERVISED)
        rows.append(Row(ids, [-100] * (size - answer) + ids[size - answer :]))
    return rows


@torch.no_grad()
def start(model: torch.nn.Module) -> None:
    """Give LoRA's A matrices and prompts the same random values, whatever their parameters are called; B stays zero."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    drawn = [(name, p) for name, p in named if "lora_A" in name or "prompt" in name]
    for _, parameter in sorted(drawn, key=lambda pair: pair[0].replace(".default", "")):
        generator = torch.Generator().manual_seed(parameter.numel())
        values = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1])
        parameter.copy_(values)
