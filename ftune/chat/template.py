"""A tokenizer's chat template, ready to render: messages are put into the form it reads, its failures into words."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from ftune.chat import safety
from ftune.chat.rows import WHERE, Message, Span, TemplateRowError
from ftune.errors import UserError

PROBES = ("Kzq", "Wvj")
"""Texts that no template holds. Templates trim white space and look for tags, so they are plain letters."""
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\b")

_TEMPLATES: WeakKeyDictionary[Any, tuple[Any, "Template"]] = WeakKeyDictionary()


def template_of(tokenizer: Any) -> "Template":
    """The tokenizer's template, prepared once and again whenever its text or the special tokens change."""
    state = (str(tokenizer.chat_template), tokenizer.special_tokens_map, len(tokenizer))
    known = _TEMPLATES.get(tokenizer)
    if known is None or known[0] != state:
        known = (state, Template(tokenizer))
        _TEMPLATES[tokenizer] = known
    return known[1]


class Template:
    """Renders through transformers, in jinja2's sandbox. Raises UserError where the template itself is wrong."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template", WHERE, "name a Jinja file there")
        self._variables = dict(tokenizer.special_tokens_map)
        self._plain = tokenizer.get_chat_template()
        self._with_tools = tokenizer.get_chat_template(tools=[{}])
        self.control_tokens = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        """The tokens beside the learnt vocabulary, by id; end-of-turn tokens are among them."""
        self.end_tokens = tuple(token for token in self.control_tokens.values() if token.strip())
        """Those that can end a turn: some tokenizers have runs of white space among their added tokens."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens = frozenset(special | set(tokenizer.all_special_tokens))
        """Those that steer a model: in a message's text they would be taken for the template's own."""
        self.prefixes: dict[Any, str | None] = {}
        """A first message rendered alone, kept by whoever needs it for many rows."""
        self.sources = tuple(dict.fromkeys((self._plain, self._with_tools)))
        for source in self.sources:
            safety.check_source(source)
        self.has_generation_marks = any(GENERATION_MARK.search(source) for source in self.sources)
        question = {"role": "user", "content": PROBES[0]}
        safety.within_budget(lambda: self._first_rendering([question]))
        safety.within_budget(
            lambda: self._first_rendering([question, {"role": "assistant", "content": PROBES[1]}, question])
        )

    def _first_rendering(self, messages: list[Message]) -> None:
        try:
            self.render(messages)
        except TemplateRowError:
            return  # It may want another order of roles; safety errors are no row errors and go on.

    def render(self, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text of prepared messages."""
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, list[Span]]:
        """The text and the character spans inside its `{% generation %}` marks.

        The mask of tokens that transformers makes of them has mistakes at its ends, so only its characters are used.
        """
        return self._render(messages, tools, return_assistant_tokens_mask=True)

    def _render(self, messages: Sequence[Message], tools: Any, **options: bool) -> tuple[str, list[Span]]:
        from jinja2.exceptions import SecurityError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._with_tools if tools else self._plain,
                **options,
                **self._variables,
            )
        except (SecurityError, OverflowError, MemoryError) as error:
            raise UserError(
                f"the chat template is refused, it does what the sandbox forbids: {error}",
                WHERE,
                "give another one with model.chat_template",
            ) from error
        except safety.TooLong:
            raise
        except Exception as error:  # whatever foreign code may raise: no type is known beforehand
            told = str(error) or type(error).__name__
            raise TemplateRowError(
                f"the chat template cannot render these messages: {told}",
                "check the roles and their order against what the template allows",
            ) from error
        return str(texts[0]), spans[0] if spans else []

    @cached_property
    def takes_text_arguments(self) -> bool:
        """Whether a call's arguments go in as JSON text; most templates want the object and write the JSON themselves.

        Found by trying: an object that comes out as Python writes it, or not at all, where the text comes out whole.
        """
        as_object = self._try_arguments({PROBES[0]: PROBES[1]})
        if PROBES[0] in as_object and PROBES[1] in as_object and f"'{PROBES[0]}'" not in as_object:
            return False
        as_text = json.dumps({PROBES[0]: PROBES[1]})
        return as_text in self._try_arguments(as_text)

    @cached_property
    def needs_content(self) -> bool:
        """Whether a turn of calls alone must have an empty content; as a rule an absent one will do."""
        return not self._try_call({}, {}) and bool(self._try_call({}, {"content": ""}))

    def _try_arguments(self, arguments: Any) -> str:
        return self._try_call(arguments, {}) or self._try_call(arguments, {"content": ""})

    def _try_call(self, arguments: Any, content: Message) -> str:
        """A conversation that ends with a call of a tool, or nothing if the template cannot render it."""
        call = {"id": "call12345", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        asked = {"role": "user", "content": "a"}
        try:
            return self.render([asked, {"role": "assistant", "tool_calls": [call], **content}])
        except TemplateRowError:
            return ""

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """Messages without empty fields, thinking under the name templates read, arguments as this template reads them.

        An argument text that the template would encode a second time is decoded first.
        """
        return [self._prepared(message) for message in messages]

    def _prepared(self, message: Message) -> Message:
        prepared = {key: value for key, value in message.items() if value is not None}
        if not isinstance(prepared.get("content", ""), str) or not isinstance(prepared.get("role"), str):
            raise TemplateRowError("a message must have a text `role`, and a text or no `content`", "see data.columns")
        if "thinking" in prepared:
            thinking = prepared.pop("thinking")
            if prepared.setdefault("reasoning_content", thinking) != thinking:
                raise TemplateRowError("a message has both `thinking` and another `reasoning_content`", "keep one")
        if not prepared.get("tool_calls"):
            prepared.pop("tool_calls", None)
        else:
            prepared["tool_calls"] = [self._prepared_call(call) for call in prepared["tool_calls"]]
            if "content" not in prepared and self.needs_content:
                prepared["content"] = ""
        return prepared

    def _prepared_call(self, call: Any) -> Any:
        if not isinstance(call, Mapping):
            raise TemplateRowError("a tool call must be an object with a `function`")
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TemplateRowError("a tool call must have a `function` with a text `name`")
        arguments = function.get("arguments")
        arguments = {} if arguments is None else arguments
        if isinstance(arguments, str) and not self.takes_text_arguments:
            arguments = _decoded(arguments, function["name"])
        elif not isinstance(arguments, str) and self.takes_text_arguments:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted((token for token in self.special_tokens if token.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def check_contents(self, messages: Sequence[Message], tools: Any) -> None:
        """Refuse texts that hold special tokens: they would be taken for the template's own."""
        places: list[tuple[str, Any]] = [(f"messages[{i}] ({m['role']})", m) for i, m in enumerate(messages)]
        for place, value in [*places, ("tools", tools)]:
            for text in texts_of(value):
                if found := self._special_pattern.search(text):
                    raise TemplateRowError(
                        f"{place} holds the text {found.group()!r}, which this tokenizer "
                        "reads as a special token: it would start or end a turn inside the message",
                        "clean the text, or take the row out",
                    )


def _decoded(arguments: str, name: str) -> Any:
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except json.JSONDecodeError as error:
        raise TemplateRowError(
            f"the arguments of the call of {name!r} are not JSON: {error}", "correct them"
        ) from error


def texts_of(value: Any) -> Iterator[str]:
    """Every text inside messages or tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)
