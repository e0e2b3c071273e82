"""Chat templates of published models, rewritten from how they behave, with small tokenizers of their special tokens."""

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QWEN = (*CHATML, "<tool_call>", "</tool_call>", "<think>", "</think>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI3 = ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
NOT_SPECIAL = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Added tokens that are not special: rows may hold them."""

# name: tokens, bos, eos, what ends an assistant's turn
FAMILIES: dict[str, tuple[tuple[str, ...], str | None, str, str]] = {
    "chatml": (CHATML, None, "<|endoftext|>", "<|im_end|>"),
    "marked": (CHATML, None, "<|endoftext|>", "<|im_end|>"),
    "qwen2.5": (QWEN, None, "<|im_end|>", "<|im_end|>"),
    "qwen3": (QWEN, None, "<|im_end|>", "<|im_end|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "mistral1": (("<s>", "</s>"), "<s>", "</s>", "</s>"),
    "mistral3": (MISTRAL, "<s>", "</s>", "</s>"),
    "gemma": (GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "gemma3": (GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "phi3": (PHI3, "<s>", "<|endoftext|>", "<|end|>"),
    "phi4": ((*CHATML, "<|im_sep|>"), None, "<|im_end|>", "<|im_end|>"),
    "zephyr": (("<s>", "</s>"), "<s>", "</s>", "</s>"),
    "llama2": (("<s>", "</s>"), "<s>", "</s>", "</s>"),
}
NAMES = tuple(FAMILIES)


def template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_with(tokens: tuple[str, ...], bos: str | None, eos: str, source: str | None) -> PreTrainedTokenizerFast:
    """One token per character, whatever it is, beside the special ones: decoding gives back the text."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", *dict.fromkeys((*tokens, eos))])}
    for character in map(
        chr, [9, 10, 13, *range(32, 127), *range(160, 0x250), *map(ord, "日本語语🙂はい\u0301\u200b\u2028")]
    ):
        vocabulary.setdefault(character, len(vocabulary))
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    special = [token for token in dict.fromkeys((*tokens, eos)) if token not in NOT_SPECIAL]
    raw.add_special_tokens(special)
    raw.add_tokens([token for token in tokens if token in NOT_SPECIAL])
    named: dict[str, Any] = {"eos_token": eos, "pad_token": eos, "unk_token": "<unk>"}
    if bos is not None:
        named["bos_token"] = bos
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **named)
    tokenizer.chat_template = source
    return tokenizer


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Shared between tests: nobody may change it."""
    tokens, bos, eos, _ = FAMILIES[name]
    return tokenizer_with(tokens, bos, eos, template(name))


def fresh(name: str, source: str | None = None) -> PreTrainedTokenizerFast:
    """One to change, or one of the family's tokens with another template."""
    tokens, bos, eos, _ = FAMILIES[name]
    return tokenizer_with(tokens, bos, eos, template(name) if source is None else source)


def message(role: str, content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any, number: str = "call00001") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": "Look it up.", "parameters": parameters}}
