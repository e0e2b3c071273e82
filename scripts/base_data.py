"""The base model's tokenizer, its held-out items and its training rows; used by pretrain_base.py."""

import json
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from base_skills import SKILLS, Turns, drill, made_up_story
from base_words import ALL_WORDS, COLORS, MONTHS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PAD, BOS, SYSTEM, USER, ASSISTANT, END = range(len(SPECIALS))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 1280
HELD_OUT = 200  # prompts of each skill
HELD_OUT_PROSE = 30  # of the real and of the made-up stories each
PROSE_TOKENS = 200  # longest held-out text, and the usual training text
LONGEST_ROW = 480  # tokens
# How often a skill is drawn, 1.0 where nothing is said.
SKILL_WEIGHTS = {"facts": 1.5, "arithmetic": 1.5, "sort": 1.5, "largest": 1.5, "pick": 1.5, "copy": 2.0, "record": 2.0}
REAL_STORIES = 0.06  # of the prose; there are few, and often repeated they are learned by heart


class Mix(NamedTuple):
    """The shares of the kinds of rows; the rest are conversations of one turn."""

    prose: float
    drill: float
    pattern: float
    several_turns: float


FIRST_PHASE = Mix(prose=0.08, drill=0.05, pattern=0.03, several_turns=0.08)
SECOND_PHASE = Mix(prose=0.08, drill=0.04, pattern=0.06, several_turns=0.1)


class Row(NamedTuple):
    tokens: list[int]
    graded: list[bool]  # graded[i]: token i counts in the loss
    is_prose: bool = False


class HeldOut(NamedTuple):
    turns: dict[str, list[Turns]]  # by skill
    prompts: set[str]  # last requests, of `pattern` the whole conversation
    prose: list[str]
    stories: list[str]  # the real stories left for training


def train_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits apart, on the kinds of text that the model will see."""
    rng = random.Random(1)
    texts = list(stories)
    for _ in range(3000):
        for skill in SKILLS.values():
            texts.extend(text for turn in skill(rng) for text in turn)
    texts.extend(made_up_story(rng) for _ in range(1000))
    # Each word with and without the space before it, so that both forms become one token.
    texts.extend(f"{word} {word}" for word in [*ALL_WORDS, *COLORS, *MONTHS] for _ in range(300))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B:1", special_tokens=[("<|bos|>", BOS)]
        ),
    ])  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# --- rows ------------------------------------------------------------------------------------------


def prompt_of(name: str, turns: Turns) -> str:
    """What training must not hold: a request; of `pattern` the whole conversation."""
    return json.dumps(turns) if name == "pattern" else turns[-1][0]


def hold_out(stories: list[str], tokenizer: PreTrainedTokenizerFast) -> HeldOut:
    rng = random.Random(2)
    turns: dict[str, list[Turns]] = {}
    prompts: set[str] = set()
    for name, skill in SKILLS.items():
        turns[name] = []
        while len(turns[name]) < HELD_OUT:
            candidate = skill(rng)
            if (prompt := prompt_of(name, candidate)) not in prompts:
                prompts.add(prompt)
                turns[name].append(candidate)
    real = [next(pieces(story, tokenizer, rng, 0)) for story in stories[:HELD_OUT_PROSE]]
    made = [made_up_story(rng) for _ in range(HELD_OUT_PROSE)]
    prompts.update(made)
    return HeldOut(turns, prompts, real + made, stories[HELD_OUT_PROSE:])


def pieces(text: str, tokenizer: PreTrainedTokenizerFast, rng: random.Random, skip: int) -> Iterator[str]:
    """Cuts a story at sentence ends into texts of PROSE_TOKENS, after leaving out up to `skip` sentences."""
    sentences = re.findall(r"\S.*?(?:[.!?]\"?(?=\s)|$)\s*", text, flags=re.DOTALL)
    piece, size = "", 0
    for sentence in sentences[rng.randint(0, skip) if skip else 0 :]:
        length = len(tokenizer.encode(sentence, add_special_tokens=False))
        if piece and size + length > PROSE_TOKENS - 2:
            yield piece.strip()
            piece, size = "", 0
        if length <= PROSE_TOKENS - 2:
            piece, size = piece + sentence, size + length
    if piece:
        yield piece.strip()


class Rows:
    """An endless, seeded supply of training rows without the held-out prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, held_out: HeldOut, mix: Mix, seed: int) -> None:
        self.tokenizer, self.held_out, self.mix, self.rng = tokenizer, held_out, mix, random.Random(seed)
        self.names = [name for name in SKILLS if name != "pattern"]
        self.weights = [SKILL_WEIGHTS.get(name, 1.0) for name in self.names]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def fresh(self, name: str) -> Turns:
        while True:
            turns = SKILLS[name](self.rng)
            if prompt_of(name, turns) not in self.held_out.prompts:
                return turns

    def some_skill(self) -> str:
        return self.rng.choices(self.names, self.weights)[0]

    def conversation(self, turns: Turns, ungraded: int = 0) -> Row:
        """The chat template's tokens; the answers after the first `ungraded` ones count in the loss."""
        tokens, graded = [BOS], [False]
        for index, (request, answer) in enumerate(turns):
            prompt = [USER, *self.ids(request), END, ASSISTANT]
            reply = [*self.ids(answer), END]
            tokens += prompt + reply
            graded += [False] * len(prompt) + [index >= ungraded] * len(reply)
        return Row(tokens, graded)

    def prose(self) -> list[Row]:
        if self.rng.random() < REAL_STORIES:
            texts = list(pieces(self.rng.choice(self.held_out.stories), self.tokenizer, self.rng, 3))[:1]
        else:
            texts = [made_up_story(self.rng)]
        rows = [[BOS, *self.ids(text), END] for text in texts if text not in self.held_out.prompts]
        return [Row(tokens, [False] + [True] * (len(tokens) - 1), is_prose=True) for tokens in rows]

    def drill(self) -> Row:
        first, *copies = [self.ids(text) for text in drill(self.rng)]
        rest = [token for ids in copies for token in ids]
        return Row([BOS, *first, *rest], [False] * (len(first) + 1) + [True] * len(rest))

    def draw(self) -> list[Row]:
        kind = self.rng.choices([*Mix._fields, "one_turn"], [*self.mix, 1 - sum(self.mix)])[0]
        if kind == "prose":
            return self.prose()
        if kind == "drill":
            return [self.drill()]
        if kind == "pattern":
            return [self.conversation(self.fresh("pattern"), ungraded=1)]
        if kind == "several_turns":
            # Half the time of one skill, as few-shot prompting shows them, half of any.
            name = self.some_skill() if self.rng.random() < 0.5 else None
            count = self.rng.randint(2, self.rng.choice([6, 8, 14]))
            return [self.conversation([self.fresh(name or self.some_skill())[0] for _ in range(count)])]
        return [self.conversation(self.fresh(self.some_skill()))]

    def batches(self, tokens_per_batch: int, pool: int = 8000) -> Iterator[list[Row]]:
        """Batches of rows of like length, so that padding is rare, in mixed order."""
        while True:
            rows = [row for _ in range(pool) for row in self.draw() if len(row.tokens) <= LONGEST_ROW]
            rows.sort(key=lambda row: len(row.tokens))
            batches: list[list[Row]] = [[]]
            for row in rows:
                if (len(batches[-1]) + 1) * len(row.tokens) > tokens_per_batch:
                    batches.append([])
                batches[-1].append(row)
            self.rng.shuffle(batches)
            yield from batches


def collate(rows: list[Row], prose_weight: float) -> tuple[Tensor, Tensor]:
    """Tokens and their weights in the loss, both (batch, length).

    Padded on the right, where causal attention needs no mask.
    """
    width = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), width), PAD)
    weights = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        weights[index, : len(row.tokens)] = torch.tensor(row.graded) * (prose_weight if row.is_prose else 1.0)
    return tokens, weights
