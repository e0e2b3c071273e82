"""Rows -> probe: the user's own file, or the general suites that ftune brings along."""

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftune import chat, data
from ftune.data import BadRow, Example, SourceRow
from ftune.data.examples import TooLong
from ftune.data.fields import as_list, filled_text, optional_text, required
from ftune.data.messages import messages_of
from ftune.errors import Problem, UserError
from ftune.evaluate import expected, has_answer, question
from ftune.probe.choices import DELIMITER, encode_pair
from ftune.probe.items import Choice, Item, Probe, Question

DEFAULT_SUITE = "probe"
ANSWER_METRICS = ("exact_match", "contains", "json_match")
"""How an answer may be scored; the first unless the row says otherwise."""
CHOICE_METRIC = "acc_norm"
GENERAL = "general"
"""The folder beside this module that holds the suites that come with ftune."""
ROWS = "give rows of prompt and completion, prompt and choices and answer, or text"


class Reader:
    """Makes items of rows, for one tokenizer and one model's room."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.rules = data.Rules(max_length=max_length)
        self.vocab_size = vocab_size

    def read(self, row: SourceRow) -> Question | Choice | Example:
        """One row; a text is an Example of its own. Raises BadRow."""
        fields = row.fields
        suite = optional_text(fields, "suite") or DEFAULT_SUITE
        row_id = str(fields["id"]) if fields.get("id") is not None else row.row_id
        row = SourceRow(row_id, row.place, fields)
        if "choices" in fields:
            return self._choice(row, suite)
        shape = data.detect(fields, "auto", row.place).shape
        example = data.make_example(self.tokenizer, row, shape, self.rules, self.vocab_size)
        metric = optional_text(fields, "metric") or ANSWER_METRICS[0]
        if shape == "text":
            return example
        if not has_answer(example):
            raise BadRow("no answer to compare with", "end the messages with an answer of the assistant")
        if metric not in ANSWER_METRICS:
            raise BadRow(f"unknown metric {metric!r}", f"use one of {', '.join(ANSWER_METRICS)}")
        prompt = shown(question(example))
        return Question(Item(suite, row_id, "answer", metric, prompt, expected(example)), example)

    def _choice(self, row: SourceRow, suite: str) -> Choice:
        fields = row.fields
        if (metric := fields.get("metric")) not in (None, CHOICE_METRIC):
            raise BadRow(f"choices are scored by {CHOICE_METRIC}, not by {metric!r}", "leave `metric` out")
        choices = as_list(required(fields, "choices"), '"choices"')
        if len(choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise BadRow('"choices" must be two texts or more, none of them empty')
        answer = required(fields, "answer")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise BadRow(f'"answer" must be the number of the right choice, 0 to {len(choices) - 1}')
        if choices.count(choices[answer]) > 1:
            raise BadRow("the right choice stands twice", "take one of them out")
        asked, context = self._context(fields)
        candidates = tuple(self._candidate(row.row_id, asked, context, choice) for choice in choices)
        item = Item(suite, row.row_id, "choice", CHOICE_METRIC, shown(asked), choices[answer], tuple(choices))
        return Choice(item, answer, candidates)

    def _context(self, fields: dict[str, Any]) -> tuple[list[chat.Message], str]:
        """What is asked, as turns and as the text before a choice."""
        turns = next((fields[key] for key in ("messages", "prompt") if isinstance(fields.get(key), list)), None)
        if turns is not None:
            messages = messages_of(turns, "messages", [])
            if messages[-1]["role"] == "assistant":
                raise BadRow("the turns end with an answer; the choices are what may answer them")
            if not self.tokenizer.chat_template:
                raise BadRow("turns, but the tokenizer has no chat template", "give a text as prompt")
        else:
            messages = [{"role": "user", "content": filled_text(fields, "prompt")}]
        if self.tokenizer.chat_template:
            return messages, chat.render_prompt(self.tokenizer, messages)
        return messages, str(messages[0]["content"])

    def _candidate(self, row_id: str, asked: list[chat.Message], context: str, choice: str) -> Example:
        has_template = bool(self.tokenizer.chat_template)
        delimiter = "" if has_template else DELIMITER
        tokens = encode_pair(self.tokenizer, context, delimiter + choice)
        if len(tokens) > self.rules.max_length:
            raise TooLong(len(tokens), self.rules.max_length)
        if max(tokens.input_ids) >= self.vocab_size:
            raise BadRow(f"token id {max(tokens.input_ids)} is outside the model's {self.vocab_size} embeddings")
        answer = {"role": "assistant", "content": choice}
        fields = {"messages": [*asked, answer]} if has_template else {"prompt": context, "completion": choice}
        return Example(row_id, context + delimiter + choice, tokens, fields)


def shown(messages: Sequence[chat.Message]) -> str:
    """Turns as people read them; a single question is its own text."""
    if len(messages) == 1:
        return str(messages[0].get("content") or "")
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)


def load(tokenizer: PreTrainedTokenizerBase, path: Path, max_length: int, vocab_size: int) -> Probe:
    """The user's own probe file. `max_length`: the longest row the model has room for. Raises UserError."""
    return _probe(Reader(tokenizer, max_length, vocab_size), data.read_rows(path), str(path), False)


def load_general(tokenizer: PreTrainedTokenizerBase, max_length: int, vocab_size: int) -> Probe:
    """The suites that come with ftune. Those of its items that do not fit a small model's context are left out."""
    with resources.as_file(resources.files("ftune.probe")) as package:
        rows = [row for path in sorted((package / GENERAL).glob("*.jsonl")) for row in data.read_rows(path)]
    if not rows:
        raise UserError("the general probe is not part of this installation", "evaluation.probe", "install ftune anew")
    return _probe(Reader(tokenizer, max_length, vocab_size), rows, "the general probe", True)


def _probe(reader: Reader, rows: Iterable[SourceRow | Problem], where: str, may_skip: bool) -> Probe:
    problems: list[Problem] = []
    items: list[Question | Choice] = []
    texts: list[Example] = []
    skipped = 0
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            made = reader.read(row)
        except TooLong as error:
            skipped += 1
            if not may_skip:
                what = f"{error.length} tokens, and the model has room for {error.limit}"
                problems.append(Problem(what, row.place, "shorten this row"))
            continue
        except BadRow as error:
            problems.append(Problem(str(error), row.place, error.hint))
            continue
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        if isinstance(made, Example):
            texts.append(made)
        elif (key := (made.item.suite, made.item.row_id)) in seen:
            problems.append(Problem(f"the id {made.item.row_id!r} stands twice", row.place, "give each item its own"))
        else:
            seen.add(key)
            items.append(made)
    if problems:
        raise UserError.collect(problems[: data.MAX_SHOWN])
    if not items and not texts:
        raise UserError("0 usable items in the probe", where, ROWS)
    notes = (f"{where}: {skipped} items are longer than the model's context and are left out",) if skipped else ()
    return Probe(items, texts, notes=notes)
