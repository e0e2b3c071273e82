"""Small models, tokenizers, recipes and runs that the tests share; the real ones come from FTUNE_REAL_DATA."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ftune import data
from ftune import folder as folders
from ftune.artifacts import files
from ftune.errors import ExitCode, Problem, UserError
from ftune.recipe import load
from ftune.run.training import train_run

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<unk>"]


def make_tokenizer(
    template: str | None = CHATML, pad: str = "<pad>", eos: str = "<eos>", add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token per printable character, so that every expectation can be written down."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for character in map(chr, [10, *range(32, 127)]):
        vocabulary.setdefault(character, len(vocabulary))
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(SPECIAL)
    if add_bos:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, eos_token=eos, bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "num_key_value_heads": 4},
}
"""The architectures that the contract runs over; layers are not square on purpose."""
KINDS = ["llama", "llama tied", "qwen2", "qwen2 tied", "gpt2", "gpt2 untied"]
"""With the output head on a weight of its own, or on that of the embeddings."""


def make_model(kind: str = "llama", seed: int = 0, scale: float = 1.0, **changes: Any) -> PreTrainedModel:
    """A random model of an architecture, 2 layers of width 64, with biases; `scale` multiplies its matrices."""
    torch.manual_seed(seed)
    kind, _, tie = kind.partition(" ")
    if tie:
        changes = {"tie_word_embeddings": tie == "tied", **changes}
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(SPECIAL) + 96,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **(shape | SHAPES.get(kind, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at 0, where a forgotten one does not show
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1 and scale != 1.0:
                parameter.mul_(scale)
    return model.eval()


def save_base(path: Path, kind: str = "llama", seed: int = 0, tokenizer: Any = None, **changes: Any) -> Path:
    """A model folder as a user has it."""
    tokenizer = tokenizer or make_tokenizer()
    make_model(kind, seed, **({"eos_token_id": tokenizer.eos_token_id} | changes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CHAT_ROWS = [chat(f"say {'abcdefghij'[i % 10] * (1 + i % 7)}", "abcdefghij"[i % 10] * (1 + i % 5)) for i in range(24)]
"""Rows of unequal length."""


def write_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe beside `base` and `train.jsonl`; sections are merged over small, deterministic defaults."""
    recipe: dict[str, dict[str, Any]] = {
        "model": {"base": "base"},
        "method": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.0},
        # The rows of tests are few, and are often trained on and measured on at once.
        "data": {"train": "train.jsonl", "deduplicate": "off", "decontaminate": False},
        "training": {"learning_rate": 0.01, "max_steps": 4, "batch_size": 4, "warmup": 0.0, "schedule": "constant"},
        "evaluation": {"max_new_tokens": 8, "few_shot": 0},
        "output": {"dir": "run"},
    }
    for name, values in sections.items():
        recipe[name] = values if "name" in values else {**recipe.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


MINIMAL = "model: ./base\nmethod: lora\ndata: {train: train.jsonl}\n"
"""The text of a whole recipe."""


def one_a_line(text: str) -> list[str]:
    """A table of overrides: one or, with | between them, several on a line."""
    return [item.strip() for line in text.strip().splitlines() for item in line.split(" | ")]


def problems_of(path: Path, overrides: Sequence[str] = ()) -> tuple[Problem, ...]:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == ExitCode.USER_ERROR
    assert sorted(path.parent.rglob("*")) == before, "a refused recipe wrote something"
    return caught.value.problems


def the_problem(path: Path, overrides: Sequence[str] = ()) -> Problem:
    (problem,) = problems_of(path, overrides)
    return problem


DROPOUT = {"name": "lora", "rank": 4, "dropout": 0.1}


def run(workspace: Path, resume: bool = False, overwrite: bool = False, **sections: Any) -> tuple[dict[str, Any], Path]:
    """A run in this process: its report and its folder."""
    loaded = load(write_recipe(workspace, **sections))
    return train_run(loaded, resume, overwrite), loaded.output.dir


def adapter_bytes(path: Path) -> bytes:
    return (path / "adapter" / files.ADAPTER_WEIGHTS).read_bytes()


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of its training steps."""
    return [line for line in folders.read_json_lines(path / "metrics.jsonl") if "loss" in line]


def ftune(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own."""
    command = [sys.executable, "-m", "ftune", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with a Llama base and 24 chat rows."""
    save_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", CHAT_ROWS)
    return tmp_path


@pytest.fixture(scope="session")
def built_lab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import hostile_kit

    home = tmp_path_factory.mktemp("hostile")
    lab = hostile_kit.build(home / "lab")
    shutil.copytree(lab.root, home / "kept")
    return lab, home / "kept"


@pytest.fixture
def lab(built_lab: Any) -> Any:
    """A base, rows, recipes and runs, to be made hostile: fresh for each test."""
    import hostile_kit

    return hostile_kit.fresh(*built_lab)


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    """CHAT_ROWS as examples."""
    path = write_rows(tmp_path / "rows.jsonl", CHAT_ROWS)
    return data.load(make_tokenizer(), [data.Source(path)], data.Rules()).examples


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_recipe(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real models and data sets; tests that need it skip without it."""
    folder = os.environ.get("FTUNE_REAL_DATA")
    if not folder:
        pytest.skip("FTUNE_REAL_DATA is not set: no real models and data here")
    return Path(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the golden losses anew")
