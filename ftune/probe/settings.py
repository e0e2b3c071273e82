"""How a probe was asked: what another program would have to do the same to get the same numbers."""

import hashlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftune import chat, model
from ftune.probe.choices import DELIMITER, starts_with_bos
from ftune.probe.items import Answers, Probe


def describe(tokenizer: PreTrainedTokenizerBase, probe: Probe, answers: Answers) -> dict[str, Any]:
    """The `settings` of report.json's forgetting: template, beginning of sequence, shots, hashes and versions."""
    template = tokenizer.chat_template
    versions = model.versions()
    if probe.tasks is not None:
        versions["lm_eval"] = probe.tasks.version
    return {
        "items_sha256": probe.digest,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
        "bos": bos_rule(tokenizer),
        "delimiter": "" if template else DELIMITER,
        "few_shot": 0,
        "choices": "sum of the log-probabilities of a choice's tokens; acc_norm divides it by the choice's characters",
        "tasks": answers.tasks,
        "versions": versions,
    }


def bos_rule(tokenizer: PreTrainedTokenizerBase) -> str:
    """Who writes the beginning-of-sequence token in front of a prompt: the template, the tokenizer, or nobody."""
    text = "a"
    if tokenizer.chat_template:
        text = chat.render_prompt(tokenizer, [{"role": "user", "content": text}])
        if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
            return "written by the chat template"
    ids = tokenizer(text, add_special_tokens=not starts_with_bos(tokenizer, text))["input_ids"]
    return "added by the tokenizer" if ids[:1] == [tokenizer.bos_token_id] else "none"
