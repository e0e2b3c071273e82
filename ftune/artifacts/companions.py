"""What lies beside weights: the tokenizer, its chat template and where generation stops; and what identifies them."""

import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ftune import chat, folder, stored
from ftune import model as models

GENERATION = "generation_config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
PROBES = (
    "Hello, world!",
    "  two spaces, a tab\t and\n\na blank line",
    "Größe 42 €, 日本語, 🙂",
    'def f(x):\n    return {"a": [x, 1.5]}',
)
"""Encoded to compare tokenizers: what their vocabulary and special tokens do not say, normalization for one."""


def save_companions(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """What serving needs beside weights: the tokenizer, its chat template, and where generation stops, if it can."""
    tokenizer.save_pretrained(path)
    if models.is_classifier(model):
        return
    stops = chat.end_of_turn_ids(tokenizer)
    generation = (
        GenerationConfig.from_dict(model.generation_config.to_dict()) if model.generation_config else GenerationConfig()
    )
    if stops:
        generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    if tokenizer.pad_token_id is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(path)


def copy_processors(base: Path | str, path: Path) -> None:
    """What prepares images or sound for a base that takes them: training has no part in it, serving needs it."""
    for name in PROCESSORS:
        if isinstance(base, Path) and (base / name).is_file() and not (path / name).exists():
            shutil.copyfile(base / name, path / name)


def stops_of(path: Path) -> list[int] | None:
    """The ids at which a folder's generation settings stop; None where it has none."""
    if not (path / GENERATION).is_file():
        return None
    found = stored.read_object(path / GENERATION).get("eos_token_id")
    return [] if found is None else found if isinstance(found, list) else [found]


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes a tokenizer turn the same messages into the same tokens, short enough for a card."""
    added = {
        str(token_id): [token.content, token.special, token.lstrip, token.rstrip, token.normalized]
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }
    special = {
        name: [str(token) for token in value] if isinstance(value, list | tuple) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
    }
    probes = [*PROBES, " a ".join(str(token) for token in tokenizer.all_special_tokens)]
    return {
        "vocabulary": folder.sha256_json([tokenizer.get_vocab(), added]),
        "special_tokens": special,
        "encodings": folder.sha256_json([tokenizer(text)["input_ids"] for text in probes]),
        "chat_template": folder.sha256_json(tokenizer.chat_template) if tokenizer.chat_template else None,
    }
