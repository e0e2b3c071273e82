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
from dataclasses import asdict, dataclass
from typing import Any

import torch
from workload import ALPHA, LEARNING_RATE, RANK, SHAPES, VOCABULARY, Row, model_of, rows_of, start_lora


@dataclass(frozen=True)
class Case:
    side: str
    shape: str = "llama"
    method: str = "lora"
    dtype: str = "float32"
    steps: int = 8
    batch_size: int = 8
    length: int | None = None


@dataclass
class Timer:
    """When each step ended."""

    ends: list[float]
    losses: list[float]

    def step(self, loss: float) -> None:
        self.ends.append(time.perf_counter())
        self.losses.append(loss)


def ftune(case: Case, rows: list[Row], timer: Timer) -> None:
    from ftune import train
    from ftune.chat import Tokens
    from ftune.data import Example
    from ftune.engine import Engine
    from ftune.methods import METHODS
    from ftune.objectives import sft
    from ftune.optimizers import make_optimizer
    from ftune.recipe import TrainingSection
    from ftune.settings import METHOD_NAMES

    model = model_of(case.shape, getattr(torch, case.dtype))
    settings = METHOD_NAMES[case.method].settings
    assert settings is not None
    chosen = settings(rank=RANK, alpha=ALPHA, dropout=0.0) if case.method == "lora" else settings()
    METHODS[case.method].attach(model, chosen)
    start_lora(model)
    section = TrainingSection(
        batch_size=case.batch_size, max_steps=case.steps, epochs=None, learning_rate=LEARNING_RATE,
        schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0, optimizer="adamw",
    )  # fmt: skip
    plan = train.TrainingPlan(section, case.steps, True, "auto", 0)
    job = train.Job(model, METHODS[case.method], sft, make_optimizer(model, section), Engine())
    told = [[label != -100 for label in row.labels] for row in rows]
    tokens = [Tokens(row.input_ids, marks) for row, marks in zip(rows, told, strict=True)]
    examples = [Example(str(i), "", row, {}) for i, row in enumerate(tokens)]
    for step in train.train(job, examples, plan):
        timer.step(step.loss)


def order(case: Case, count: int) -> list[int]:
    """The rows in the order in which ftune takes them."""
    from ftune import batches
    from ftune.data import Mixture

    mixture = Mixture.of([count], [1.0])
    return [i for step in range(1, case.steps + 1) for i in batches.step_indices(step, mixture, case.batch_size, 0)]


def trl(case: Case, rows: list[Row], timer: Timer, **options: Any) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                timer.step(logs["loss"])

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>",
        eos_token="<eos>", bos_token="<bos>",
    )  # fmt: skip
    model = model_of(case.shape, getattr(torch, case.dtype))
    targets = "all-linear"
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    chosen = [rows[i] for i in order(case, len(rows))]
    data = Dataset.from_list([asdict(row) for row in chosen])
    with tempfile.TemporaryDirectory() as place:
        arguments = SFTConfig(
            output_dir=place, per_device_train_batch_size=case.batch_size, max_steps=case.steps, max_length=None,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", logging_steps=1, report_to="none",
            save_strategy="no", use_cpu=True, bf16=case.dtype == "bfloat16", gradient_checkpointing=False,
            disable_tqdm=True, loss_type="nll", **options,
        )  # fmt: skip
        peft_config = config if case.method == "lora" else None
        trainer = InOrder(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
        start_lora(trainer.model)
        trainer.add_callback(Told())
        trainer.train()


SIDES: dict[str, Callable[..., None]] = {
    "ftune": ftune,
    "trl, padded": trl,
    "trl, padding-free": lambda *given: trl(*given, padding_free=True),
}


def measure(case: Case) -> dict[str, Any]:
    vocabulary = int(SHAPES[case.shape].get("vocab_size", VOCABULARY))
    rows = rows_of(case.steps * case.batch_size, vocabulary, case.length)
    timer = Timer([], [])
    SIDES[case.side](case, rows, timer)
    lengths = [len(rows[i].input_ids) for i in order(case, len(rows))]
    timed = sum(lengths[case.batch_size :])
    return {
        **asdict(case),
        "losses": timer.losses,
        "tokens": timed,
        "tokens_per_second": timed / (timer.ends[-1] - timer.ends[0]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print("\n" + json.dumps(measure(Case(**json.loads(sys.argv[1])))))
