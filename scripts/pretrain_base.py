"""Makes recipes/quickstart/base/, the quickstart's small instruct model, from nothing on two CPU cores.

Run `python scripts/pretrain_base.py --stories stories.jsonl`; it takes under an hour. Trains a byte-level
BPE tokenizer and a Llama of 1.8 million weights on the skills of base_skills.py, on conversations made of
them and on simple stories. Seeds, steps and threads are fixed. It ends by grading every skill on held-out
prompts, which it also writes to probe.jsonl.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from base_data import (
    BOS,
    END,
    FIRST_PHASE,
    HELD_OUT,
    HELD_OUT_PROSE,
    PAD,
    SECOND_PHASE,
    VOCABULARY,
    HeldOut,
    Rows,
    collate,
    hold_out,
    train_tokenizer,
)
from base_skills import PRACTISED, Turns
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart"
WARMUP = 100  # steps
FIRST_STEPS = 300  # of the first phase, with many drills
HOLD_STEPS = 2400  # at the peak learning rates, which then fall to 0
PROSE_WEIGHT = 0.3  # of a story's token in the loss: they are many and would outvote the short answers

# --- training -------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan 2024).

    In float32 throughout: torch.optim.Muon computes in bfloat16, for which most CPUs have no fast path.
    """

    def __init__(self, weights: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})
        self.pool = ThreadPoolExecutor(2)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for (rows, columns), weights in by_shape.items():
                updates = []
                for weight in weights:
                    state = self.state[weight]
                    average = state.setdefault("momentum", torch.zeros_like(weight))
                    average.lerp_(weight.grad, 1 - group["momentum"])
                    updates.append(weight.grad.lerp(average, group["momentum"]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                halves = self.pool.map(orthogonal, torch.stack(updates).chunk(2))
                for weight, update in zip(weights, chain.from_iterable(halves), strict=True):
                    weight.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices of a stack (n, rows, columns), by five Newton-Schulz steps."""
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        intermediate_size=options.intermediate,
        max_position_embeddings=1024,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD)
    return model


def learning_rate_share(step: int, steps: int) -> float:
    """Warm up, hold, go down to nothing."""
    return min(1.0, step / WARMUP, (steps - step + 1) / max(1, steps - HOLD_STEPS))


class Trainer:
    """The model with its two optimizers and its rows; can be saved between steps and continued."""

    def __init__(self, model: LlamaForCausalLM, phases: tuple[Rows, Rows], options: argparse.Namespace) -> None:
        self.model, self.options, self.step = model, options, 0
        self.first, self.second = (rows.batches(options.batch_tokens // 2) for rows in phases)
        self.pool = ThreadPoolExecutor(2)
        matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
        self.others = [w for name, w in model.named_parameters() if w.ndim < 2 or "embed" in name]
        self.peaks = [options.muon_lr, options.adam_lr]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=options.muon_lr),
            torch.optim.AdamW(self.others, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def take_step(self) -> tuple[float, int]:
        """The step's loss and number of tokens."""
        self.step += 1
        share = learning_rate_share(self.step, self.options.steps)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
        # Two batches of different lengths make one step: the gradient of one length only is a biased one.
        supply = self.first if self.step <= FIRST_STEPS else self.second
        parts = [collate(next(supply), PROSE_WEIGHT) for _ in range(2)]
        whole = sum(float(weights.sum()) for _, weights in parts)
        # One batch a core: small layers gain less from two threads at one operation.
        results = list(self.pool.map(lambda part: self.gradients(*part, whole), parts))
        for weight, *gradients in zip(self.model.parameters(), *(part for _, part in results), strict=True):
            weight.grad = gradients[0] + gradients[1]
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return sum(loss for loss, _ in results), sum(int((tokens != PAD).sum()) for tokens, _ in parts)

    def gradients(self, tokens: Tensor, weights: Tensor, whole: float) -> tuple[float, tuple[Tensor, ...]]:
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        wanted = weights[:, 1:] > 0
        logits = self.model.lm_head(hidden[wanted])
        losses = nn.functional.cross_entropy(logits, tokens[:, 1:][wanted], reduction="none")
        loss = (losses * weights[:, 1:][wanted]).sum() / whole
        return loss.item(), torch.autograd.grad(loss, list(self.model.parameters()))

    def save(self, path: Path) -> None:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        partial = path.with_suffix(".partial")
        torch.save({"model": self.model.state_dict(), "optimizers": states, "step": self.step}, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        done = self.step - FIRST_STEPS
        supply, batches = (self.second, 2 * done) if done >= 0 else (self.first, 2 * self.step)
        for _ in range(batches):  # the rows go on where they stopped
            next(supply)


# --- grading and saving ---------------------------------------------------------------------------


@torch.inference_mode()
def grade(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Turns]) -> float:
    """The share of items whose last answer is generated exactly, greedily, with its end token."""
    rows = []
    for turns in items:
        messages = [m for request, answer in turns for m in chat(request, answer)]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        rows.append((prompt, turns[-1][1]))
    rows.sort(key=lambda row: len(row[0]))
    right = 0
    for at in range(0, len(rows), 50):
        prompts, answers = zip(*rows[at : at + 50], strict=True)
        inputs = tokenizer(
            list(prompts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=64)
        for reply, answer in zip(output[:, ids.size(1) :].tolist(), answers, strict=True):
            right += END in reply and tokenizer.decode(reply[: reply.index(END)]) == answer
    return right / len(items)


@torch.inference_mode()
def prose_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Mean loss of a token in nats."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.size(1) - 1)
        count += ids.size(1) - 1
    return total / count


def table(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: HeldOut, items: int) -> str:
    model.eval()
    lines = ["| skill | exact match |", "|---|---|"]
    for name, turns in held_out.turns.items():
        score = grade(model, tokenizer, turns[:items])
        lines.append(f"| {name} | {score:.3f} |")
    real, made = held_out.prose[:HELD_OUT_PROSE], held_out.prose[HELD_OUT_PROSE:]
    lines.append(f"| prose, real stories (nats a token) | {prose_loss(model, tokenizer, real):.3f} |")
    lines.append(f"| prose, made-up stories (nats a token) | {prose_loss(model, tokenizer, made):.3f} |")
    model.train()
    return "\n".join(lines)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def chat(request: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def write_probe(held_out: HeldOut, path: Path) -> None:
    rows: list[dict[str, object]] = []
    for name, items in held_out.turns.items():
        if name in PRACTISED:
            continue
        rows += [{"suite": name, "messages": [m for turn in turns for m in chat(*turn)]} for turns in items]
    rows += [{"suite": "prose", "text": text} for text in held_out.prose]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# The quickstart's base model

A Llama of {weights:,} weights (width {hidden}, {layers} layers, vocabulary {vocabulary}, float32) that
follows simple requests in a chat format of its own: `<|bos|><|user|>...<|end|><|assistant|>...<|end|>`. It is
here so that ftune can be tried and tested without a model hub: small enough to be tuned on a laptop CPU in
minutes, able enough that forgetting shows.

`scripts/pretrain_base.py` makes it from nothing, with fixed seeds and steps: a byte-level BPE tokenizer with
single digits, requests and answers that `scripts/base_skills.py` generates (ours, Apache-2.0), made-up
stories from a grammar of ours, and the stories in TinyStories (Eldan and Li 2023, CDLA-Sharing-1.0; 103 rows
of its train split). The tool calls of `recipes/quickstart/` are not in the training data.

Exact match of greedy answers on 200 held-out requests a skill, which never occur in training, as the script
printed it:

{table}

`following` (the next or previous day, month, letter or number), `compare` (is a bigger than b), `record` (write
named values as JSON) and `pattern` (continue a made-up format from earlier turns) are practised but not mastered,
and are not in the forgetting probe `recipes/quickstart/probe.jsonl`. Names, towns and facts are invented. It knows
a few hundred words, and is of no use beyond this quickstart.
"""


def write_card(folder: Path, model: LlamaForCausalLM, graded: str) -> None:
    config = model.config
    card = CARD.format(
        weights=model.num_parameters(), hidden=config.hidden_size, layers=config.num_hidden_layers,
        vocabulary=config.vocab_size, table=graded,
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")


def options_of_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    data = os.environ.get("FTUNE_REAL_DATA")
    stories = Path(data, "data/tinystories/stories.jsonl") if data else None
    parser.add_argument(
        "--stories", type=Path, default=stories, required=stories is None, help="TinyStories, as JSON lines"
    )
    parser.add_argument("--output", type=Path, default=RECIPE / "base")
    parser.add_argument("--probe", type=Path, default=RECIPE / "probe.jsonl")
    parser.add_argument("--steps", type=int, default=6000, help="of both phases")
    parser.add_argument("--batch-tokens", type=int, default=2500)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.005)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--intermediate", type=int, default=432)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interim", type=Path, help="folder for unfinished models and state")
    parser.add_argument("--interim-every", type=int, default=1000, help="steps")
    parser.add_argument("--resume", action="store_true", help="continue from the state in --interim")
    return parser.parse_args()


def main() -> None:
    options = options_of_command_line()
    torch.set_num_threads(1)  # two Python threads use the two cores
    texts = [json.loads(line)["text"] for line in options.stories.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts)
    held_out = hold_out(texts, tokenizer)
    write_probe(held_out, options.probe)

    model = build(options)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights", flush=True)
    phases = (Rows(tokenizer, held_out, FIRST_PHASE, seed=3), Rows(tokenizer, held_out, SECOND_PHASE, seed=4))
    trainer = Trainer(model, phases, options)
    if options.resume:
        trainer.load(options.interim / "state.pt")
    start, seen, losses = time.time(), 0, []
    while trainer.step < options.steps:
        loss, tokens = trainer.take_step()
        losses.append(loss)
        seen += tokens
        if trainer.step % 25 == 0:
            seconds, mean = time.time() - start, sum(losses) / len(losses)
            rate = f"{seconds:.0f} s  {seen / 1e6:.2f}M tokens  {seen / seconds:.0f} tokens/s"
            print(f"step {trainer.step}/{options.steps}  loss {mean:.3f}  {rate}", flush=True)
            losses = []
        if options.interim and trainer.step % options.interim_every == 0:
            save(model, tokenizer, options.interim / "model")
            trainer.save(options.interim / "state.pt")
            print(table(model, tokenizer, held_out, 40), flush=True)

    save(model, tokenizer, options.output)
    model = AutoModelForCausalLM.from_pretrained(options.output)
    graded = table(model, AutoTokenizer.from_pretrained(options.output), held_out, HELD_OUT)
    write_card(options.output, model, graded)
    print(graded)


if __name__ == "__main__":
    main()
