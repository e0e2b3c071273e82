"""Case 109: a chat template is code out of somebody's folder."""

import sys

import pytest
from chat_kit import fresh, message

from ftune import chat
from ftune.chat import safety
from ftune.errors import UserError

MESSAGES = [message("user", "q"), message("assistant", "a")]


@pytest.mark.parametrize(
    "attack",
    [
        "{{ self.__init__.__globals__ }}",
        "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{{ messages.append(1) }}",
        "{{ ('%s' | format).__globals__ }}",
        "{% for m in messages %}{{ m.update({'role': 'user'}) }}{% endfor %}",
    ],
)
def test_template_cannot_escape_its_sandbox(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = fresh("chatml", attack)
    with pytest.raises(UserError, match="template"):
        chat.render_messages(tokenizer, MESSAGES)
    assert not list(tmp_path.iterdir())
    assert chat.check_template(tokenizer).problems


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "raises to a power"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "holds the number 1e"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "runs over 1,000,000 lines"),
        ("{% for i in range(1500) %}{% for j in range(1000) %}{% endfor %}{% endfor %}", "runs over 1,000,000 lines"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "runs over|cannot render"),
        ("{{ 'a' * 99999 * 99999 }}", "multiplies by what is no number up to"),
        ("{{ 'a' * (9 ** 99) }}", "raises to a power"),
        ("{{ '%99999999s' | format('a') * 5 }}{{ range(100001) | list }}", "holds the number|forbids"),
        ("{{ range(99999 + 99999) | list }}", "forbids"),
    ],
)
def test_template_that_would_run_or_grow_without_end_is_refused(source, reason):
    before = sys.gettrace()
    with pytest.raises(UserError, match=reason):
        chat.render_messages(fresh("chatml", source), MESSAGES)
    assert sys.gettrace() is before


def test_ordinary_templates_are_far_from_the_budget(monkeypatch):
    monkeypatch.setattr(safety, "MAX_LINES", 2_000)
    chat.render_messages(fresh("qwen3"), MESSAGES)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endfor", 3),
        ("a\n{{ m.content | nofilter }}", 2),
        ("{% if x %}\n\n{% endwhile %}", 3),
        ("{{ 'a' ~ }}", 1),
        ("{% include 'x' %}\n{% unknown %}", 2),
    ],
)
def test_a_syntax_error_is_told_by_its_line(source, line):
    tokenizer = fresh("chatml", source)
    with pytest.raises(UserError, match=f"line {line}") as caught:
        chat.render_messages(tokenizer, MESSAGES)
    assert not isinstance(caught.value, chat.TemplateRowError)
    assert f"line {line}" in chat.check_template(tokenizer).problems[0].what


@pytest.mark.parametrize(
    "source",
    [
        "{{ nothing.at.all }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'].nope() }}",
        "{% include 'other' %}",
        "{{ raise_exception('no such role') }}",
        "{{ [1] | first(3) }}",
        "{% for a, b, c in messages %}{% endfor %}",
    ],
)
def test_what_fails_while_rendering_is_a_problem_of_the_row_without_a_traceback(source):
    with pytest.raises(chat.TemplateRowError, match="cannot render these messages") as caught:
        chat.render_messages(fresh("chatml", "{% if messages %}" + source + "{% endif %}"), MESSAGES)
    assert caught.value.problems[0].hint


def test_a_role_the_template_refuses_is_a_problem_of_its_row_alone():
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
    )
    tokenizer = fresh("chatml", source)
    with pytest.raises(chat.TemplateRowError, match="no tools here"):
        chat.render_messages(tokenizer, [*MESSAGES, message("tool", "x")])
    assert chat.render_messages(tokenizer, MESSAGES).spans
