"""Messages or a prompt and its completion -> text, token ids and the mask of supervised tokens."""

from ftune.chat.checks import TemplateCheck, check_template
from ftune.chat.rendering import (
    render_completion,
    render_messages,
    render_prompt,
    render_template,
    render_text,
)
from ftune.chat.rows import (
    ROLES,
    LabelledTokens,
    Message,
    Rendered,
    Span,
    TemplateRowError,
    TextTokens,
    Tokens,
    Turn,
)
from ftune.chat.tokens import end_of_turn_ids, tokenize

__all__ = [
    "ROLES",
    "LabelledTokens",
    "Message",
    "Rendered",
    "Span",
    "TemplateCheck",
    "TemplateRowError",
    "TextTokens",
    "Tokens",
    "Turn",
    "check_template",
    "end_of_turn_ids",
    "render_completion",
    "render_messages",
    "render_prompt",
    "render_template",
    "render_text",
    "tokenize",
]
