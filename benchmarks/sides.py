"""One side of a comparison in a process of its own: `python benchmarks/sides.py '{"side": "ftune", ...}'` prints JSON.

Every side trains the same rows in the same order, from the same weights, with AdamW at a constant rate and clipping at
1, and tells the loss of each step, the seconds of each, and the peak of its memory.
"""

import json
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from workload import (
    ALPHA,
    CLASSES,
    LEARNING_RATE,
    RANK,
    SHAPES,
    VIRTUAL_TOKENS,
    VOCABULARY,
    Row,
    model_of,
    rows_of,
    start,
)


@dataclass(frozen=True)
class Case:
    side: str
    shape: str = "llama"
    method: str = "lora"
    dtype: str = "float32"
    steps: int = 8
    batch_size: int = 8
    length: int | None = None
    """Of all rows; None: realistic ones."""
    epochs: int = 1
    grouped: bool = False
    """Rows of about the same length in a step, the longest first."""
    layers: int | None = None
    """None: the shape's own."""
    rank: int = RANK
    quantization: str = "none"


@dataclass
class Timer:
    """When training began, and when each step ended."""

    losses: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    began: float = 0.0

    def begin(self) -> None:
        self.began = time.perf_counter()

    def step(self, loss: float) -> None:
        self.ends.append(time.perf_counter())
        self.losses.append(loss)


def base_of(case: Case) -> Any:
    """The base; a quantized one comes from files, as bitsandbytes wants it."""
    model = model_of(case.shape, getattr(torch, case.dtype), case.layers)
    if case.quantization == "none":
        return model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=case.quantization, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, case.dtype),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        return AutoModelForCausalLM.from_pretrained(
            place, quantization_config=quantization, dtype=getattr(torch, case.dtype)
        )


def ours_of(case: Case) -> Any:
    """The same, loaded as ftune loads it."""
    if case.quantization == "none":
        return base_of(case)
    from ftune.model import load_base
    from ftune.recipe import ModelSection

    with tempfile.TemporaryDirectory() as place:
        model_of(case.shape, getattr(torch, case.dtype), case.layers).save_pretrained(place)
        section = ModelSection(base=Path(place), quantization=case.quantization)
        return load_base(section, getattr(torch, case.dtype), torch.device("cpu"))


def ftune(case: Case, rows: list[Row], timer: Timer) -> None:
    train_ours(case, ours_of(case), rows, timer)


def train_ours(case: Case, model: Any, rows: list[Row], timer: Timer, **training: Any) -> None:
    """training: what differs from the keys of a recipe's section that every side has."""
    from ftune import classifier, comparing, features, train
    from ftune.chat.rows import LabelledTokens, Tokens
    from ftune.data import Example
    from ftune.engine import Engine
    from ftune.methods.head import method_of
    from ftune.objectives import OBJECTIVES
    from ftune.optimizers import make_optimizer
    from ftune.recipe import TrainingSection
    from ftune.settings import METHOD_NAMES

    objective = OBJECTIVES["classification" if case.method == "linear_probe" else "sft"]
    settings = METHOD_NAMES[case.method].settings
    assert settings is not None
    low_rank = {"rank": case.rank, "alpha": ALPHA, "dropout": 0.0}
    choices: dict[str, dict[str, Any]] = {
        "lora": low_rank,
        "qlora": low_rank,
        "prompt_tuning": {"virtual_tokens": VIRTUAL_TOKENS},
    }
    if case.method == "linear_probe":
        model = classifier.build(model, classifier.Classes(tuple(str(i) for i in range(CLASSES)), 0))
        start_head(model)
    method = method_of(case.method, model)
    method.attach(model, settings(**choices.get(case.method, {})))
    start(model)
    comparing.prove_packing(model, "auto")
    same = {
        "batch_size": case.batch_size, "max_steps": case.steps, "epochs": None, "learning_rate": LEARNING_RATE,
        "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "optimizer": "adamw",
    }  # fmt: skip
    section = TrainingSection(**same | training)
    plan = train.TrainingPlan(section, case.steps, True, "auto", 0)
    told = [[label != -100 for label in row.labels] for row in rows]
    tokens = [Tokens(row.input_ids, marks) for row, marks in zip(rows, told, strict=True)]
    if case.method == "linear_probe":
        tokens = [LabelledTokens(row.input_ids, row.supervised, class_id=class_of(row)) for row in tokens]
    examples = [Example(str(i), "", row, {}) for i, row in enumerate(tokens)]
    job = train.Job(model, method, objective, make_optimizer(model, section), Engine())
    timer.begin()
    if method.trains_head_alone:
        with tempfile.TemporaryDirectory() as place:
            os.environ["FTUNE_CACHE"] = place
            kept = features.features_of(features.Source(model, objective, plan, {}), examples)
            job = train.Job(model, method, objective, job.optimizer, Engine(), kept)
    for step in train.train(job, examples, plan):
        timer.step(step.loss)


def order(case: Case, count: int) -> list[int]:
    """The rows in the order in which ftune takes them."""
    from ftune import batches
    from ftune.data import Mixture

    mixture = Mixture.of([count], [1.0])
    return [i for step in range(1, case.steps + 1) for i in batches.step_indices(step, mixture, case.batch_size, 0)]


def peer_model(case: Case, peft_config: Any) -> Any:
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = base_of(case)
    if case.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model if peft_config is None else get_peft_model(model, peft_config)


def peft_config_of(case: Case) -> Any:
    from peft import LoraConfig, PromptTuningConfig

    if case.method == "lora":
        return LoraConfig(
            r=case.rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    if case.method == "prompt_tuning":
        return PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM")
    return None


def trainer(case: Case, rows: list[Row], timer: Timer, kind: str, **options: Any) -> None:
    """transformers' Trainer, or TRL's over it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import (
        DataCollatorForSeq2Seq,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from trl import SFTConfig, SFTTrainer

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                timer.step(logs["loss"])

    is_trl = kind == "trl"
    parent: Any = SFTTrainer if is_trl else Trainer

    class InOrder(parent):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>",
        eos_token="<eos>", bos_token="<bos>",
    )  # fmt: skip
    model = peer_model(case, peft_config_of(case))
    data = Dataset.from_list([asdict(rows[i]) for i in order(case, len(rows))])
    only_trl = {"max_length": None, "loss_type": "nll"} if is_trl else {}
    collator = {} if is_trl else {"data_collator": DataCollatorForSeq2Seq(tokenizer)}
    with tempfile.TemporaryDirectory() as place:
        arguments = (SFTConfig if is_trl else TrainingArguments)(
            output_dir=place, per_device_train_batch_size=case.batch_size, max_steps=case.steps,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", logging_steps=1, report_to="none",
            save_strategy="no", use_cpu=True, bf16=case.dtype == "bfloat16", gradient_checkpointing=False,
            disable_tqdm=True, **only_trl, **options,
        )  # fmt: skip
        running = InOrder(model, arguments, train_dataset=data, processing_class=tokenizer, **collator)
        start(running.model)
        running.add_callback(Told())
        timer.begin()
        running.train()


def class_of(row: Any) -> int:
    return sum(row.input_ids) % CLASSES


@torch.no_grad()
def start_head(model: Any) -> None:
    values = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(0))
    model.score.weight.copy_(0.02 * values)


def naive_probe(case: Case, rows: list[Row], timer: Timer) -> None:
    """A plain loop over transformers' classifier: padded batches through the frozen body, in every epoch again."""
    from transformers import AutoModelForSequenceClassification

    base = base_of(case)
    base.config.num_labels = CLASSES
    model = AutoModelForSequenceClassification.from_config(base.config)
    model.model = base.model
    model.requires_grad_(False)
    model.score.weight.requires_grad_(True)
    start_head(model)
    optimizer = torch.optim.AdamW([model.score.weight], LEARNING_RATE, weight_decay=0.0)
    places = order(case, len(rows))
    timer.begin()
    for begin in range(0, len(places), case.batch_size):
        batch = [rows[i] for i in places[begin : begin + case.batch_size]]
        longest = max(len(row.input_ids) for row in batch)
        ids = torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in batch])
        labels = torch.tensor([class_of(row) for row in batch])
        loss = model(input_ids=ids, attention_mask=ids != 0, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([model.score.weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        timer.step(loss.item())


SIDES: dict[str, Callable[..., None]] = {
    "ftune": ftune,
    "trl, padded": lambda *given: trainer(*given, "trl"),
    "trl, padding-free": lambda *given: trainer(*given, "trl", padding_free=True),
    "transformers": lambda *given: trainer(*given, "transformers"),
    "naive loop": naive_probe,
}


def measure(case: Case) -> dict[str, Any]:
    vocabulary = int(SHAPES[case.shape].get("vocab_size", VOCABULARY))
    rows = rows_of(case.steps * case.batch_size // case.epochs, vocabulary, case.length)
    places = order(case, len(rows))
    if case.grouped:
        longest_first = sorted(rows, key=lambda row: -len(row.input_ids))
        for place, row in zip(places, longest_first, strict=True):
            rows[place] = row
    timer = Timer()
    SIDES[case.side](case, rows, timer)
    lengths = [len(rows[i].input_ids) for i in places]
    # What comes before the first step counts where it is the work itself.
    is_whole = case.method == "linear_probe"
    timed, began = (sum(lengths), timer.began) if is_whole else (sum(lengths[case.batch_size :]), timer.ends[0])
    return {
        **asdict(case),
        "losses": timer.losses,
        "tokens": timed,
        "tokens_per_second": timed / (timer.ends[-1] - began),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print("\n" + json.dumps(measure(Case(**json.loads(sys.argv[1])))))
