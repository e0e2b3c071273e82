"""Adapters in a process of their own, where nothing is left of the one that made them: `elsewhere.py SIDE JOBS OUT`.

As `peft` it knows PEFT and transformers alone, as `ftune` only ftune; each job is an adapter (or, for PEFT, a
configuration to make one from), and OUT gets the logits of every job's rows: (all tokens, vocabulary).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TRAINED = re.compile("lora_|vera_|ia3_|prompt_encoder|modules_to_save")


@torch.no_grad()
def logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    model.eval()
    return torch.cat([model(torch.tensor([row])).logits[0].float().reshape(-1, model.shown) for row in rows])


@torch.no_grad()
def train_as_it_were(model: Any) -> None:
    """Every parameter of the adapter moves."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if TRAINED.search(name) and "ranknum" not in name:
            parameter.mul_(1.1).add_(0.02 * torch.randn_like(parameter))


def peft(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """PEFT's logits of our adapter, and those of its own, which it goes on from ours or starts afresh."""
    from peft import PeftConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    labels = job.get("labels")
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    extra = {"num_labels": labels} if labels else {}
    base = auto.from_pretrained(job["base"], **extra)
    shown = labels or base.config.vocab_size
    found = {}
    if "config" in job:
        model = get_peft_model(base, PeftConfig.from_pretrained(job["config"]))
    else:
        model = PeftModel.from_pretrained(base, job["adapter"])
        model.shown = shown
        found["ours"] = logits(model, job["rows"])
    model.shown = shown
    train_as_it_were(model)
    found["theirs"] = logits(model, job["rows"])
    model.save_pretrained(job["theirs"])
    if job.get("by transformers"):
        whole = auto.from_pretrained(job["adapter"], **extra)
        whole.shown = shown
        found["by transformers"] = logits(whole, job["rows"])
    return found


def ftune(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Ftune's logits of its own adapter, and of the one that PEFT wrote."""
    from ftune import classifier
    from ftune.artifacts import files
    from ftune.recipe import ModelSection

    found = {}
    for name in ("adapter", "theirs"):
        if name in job:
            path = Path(job[name])
            settings = ModelSection(base=Path(job["base"]))
            model = classifier.load(settings, torch.float32, torch.device("cpu"), files.read_classes(path))
            files.load_adapter(model, path)
            model.shown = job.get("labels") or model.config.vocab_size
            found["ours" if name == "adapter" else name] = logits(model, job["rows"])
    return found


def whole(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Transformers alone: a model folder's own logits, the prompt of one message, and the ids that end an answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    model.shown = model.config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    message = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    ends = model.generation_config.eos_token_id
    return {
        "whole": logits(model, job["rows"]),
        "prompt": torch.tensor(prompt),
        "ends": torch.tensor(ends if isinstance(ends, list) else [ends]),
    }


def ask(side: str, jobs: list[dict[str, Any]], place: Path) -> dict[str, torch.Tensor]:
    """What a fresh process finds, without a network: logits by "<job's name>: <what>"."""
    out = place / f"{side}.safetensors"
    (place / "jobs.json").write_text(json.dumps(jobs, default=str))
    command = [sys.executable, "-W", "ignore", __file__, side, place / "jobs.json", out]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    assert done.returncode == 0, done.stderr
    return load_file(out)


def main(side: str, jobs: str, out: str) -> None:
    torch.set_num_threads(1)
    work = {"peft": peft, "ftune": ftune, "whole": whole}[side]
    found = {
        f"{job['name']}: {what}": tensor.contiguous()
        for job in json.loads(Path(jobs).read_text())
        for what, tensor in work(job).items()
    }
    other = {"peft": "ftune", "ftune": "peft", "whole": "ftune"}[side]
    assert other not in sys.modules, f"{other} is here too"
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
