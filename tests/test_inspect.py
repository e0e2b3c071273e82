"""`ftune inspect` shows the tokens that training sees, all of them or how many not, wherever it is looked at."""

import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from audit_kit import UNHURRIED, audit_of, good
from conftest import CHAT_ROWS, chat, ftune, make_tokenizer, write_recipe, write_rows
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from sample_run import sample_report, write_run
from transformers import AutoTokenizer

from ftune import chat as chats
from ftune.console.inspection import FIRST, LAST, print_inspection
from ftune.console.visible import visible, visible_lines
from ftune.data import findings
from ftune.recipe import load
from ftune.report import render
from ftune.report.inspection import MOST_TOKENS, inspection_page
from ftune.run import preview
from ftune.run.pieces import pieces

HOSTILE = "</span><script>alert('x')</script> & \"quotes\" \x1b[2J\x07 [bold]b[/bold] {{ 1 }} \u202e"
WIDE = "日本語のテキスト 👩‍👩‍👧 สวัสดี é"


def make_row(texts: list[str], supervised: int, row_id: str = "train.jsonl:1", **changes: Any) -> dict[str, Any]:
    """The last `supervised` tokens are trained on."""
    count = len(texts)
    labels = [-100] * (count - supervised) + list(range(1000 + count - supervised, 1000 + count))
    row = {"row_id": row_id, "input_ids": list(range(1000, 1000 + count)), "labels": labels, "tokens": texts}
    return row | {"position_ids": list(range(count)), "segment_ids": [0] * count, "text": "".join(texts)} | changes


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"rows": list(rows), "data": findings.document(audit_of([good(number=n) for n in range(len(rows))]))}


def printed(found: dict[str, Any], **options: Any) -> str:
    stream = StringIO()
    print_inspection(found, Console(file=stream, width=80, highlight=False, emoji=False, **options))
    return stream.getvalue()


def body(text: str) -> str:
    """The tokens of the first row: what stands between its borders."""
    return text.partition("╭")[2].partition("\n")[2].partition("╰")[0]


def uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def unmarked(text: str) -> str:
    return re.sub("[⟦⟧]", "", text).replace("⏎\n", "\n").replace("␣", " ")


@pytest.fixture(params=["gpt2-tokenizer", "qwen2.5-tokenizer", "stories260K"])
def real_tokenizer(request: pytest.FixtureRequest, real_data: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_data / "models" / request.param)


def test_pieces_of_real_tokens_join_to_their_text(real_tokenizer: Any) -> None:
    for text in (WIDE, HOSTILE, "a\n\n  b\tc ", " lead", "𓀀𓀁", "\N{REPLACEMENT CHARACTER}", "<|im_start|>user\nhi"):
        ids = real_tokenizer(text)["input_ids"]
        found = pieces(real_tokenizer, ids)
        assert len(found) == len(ids)
        assert "".join(found) == real_tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert "\N{REPLACEMENT CHARACTER}" not in "".join(found), "half a character is shown with its other half"


def test_a_character_that_was_cut_in_two_is_not_lost(real_tokenizer: Any) -> None:
    ids = real_tokenizer("ok 👧")["input_ids"][:-1]
    found = pieces(real_tokenizer, ids)
    assert "".join(found) == real_tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert found[-1].endswith("\N{REPLACEMENT CHARACTER}")
    noise = random.Random(0)
    for _ in range(20):  # among them bytes that are no text in any order
        nonsense = [noise.randrange(len(real_tokenizer)) for _ in range(30)]
        assert len(pieces(real_tokenizer, nonsense)) == len(nonsense)


def test_pieces_of_no_tokens_are_none() -> None:
    assert pieces(make_tokenizer(), []) == []


SIGNS = "⟦⟧⏎␣⍽╭╰\xa0"
CHARACTERS = st.characters(exclude_categories=("Cs", "Cc", "Cf", "Zl", "Zp"), exclude_characters=SIGNS)
TEXTS = st.text(CHARACTERS | st.just("\n"))


@UNHURRIED
@given(st.lists(TEXTS, min_size=1, max_size=12), st.integers(0, 12))
@example(["wider than any terminal " * 9], 1)
def test_a_pipe_gets_the_text_with_signs_for_what_is_supervised(texts: list[str], supervised: int) -> None:
    supervised = min(supervised, len(texts))
    shown = body(printed(document(make_row(texts, supervised))))
    assert unmarked(shown).rstrip() == "".join(texts).rstrip()
    assert "".join(re.findall("⟦(.*?)⟧", shown, re.DOTALL)).replace("⏎\n", "\n").replace("␣", " ").rstrip() == (
        "".join(texts[len(texts) - supervised :]).rstrip()
    )


def test_white_space_that_an_eye_would_miss_is_signed() -> None:
    assert visible_lines(" a  b c \n d\t\n") == "␣a␣␣b c␣⏎\n␣d⇥ ⏎\n"
    assert visible_lines("a\xa0b\u200b") == "a⍽b⟨200b⟩"
    assert visible("a\nb\x00") == "a⏎b␀"
    shown = body(printed(document(make_row(["<user>", "Hi", " ", "\n", " Hello", "<end>"], 2))))
    assert shown == "<user>Hi␣⏎\n⟦␣Hello<end>⟧\n"


@UNHURRIED
@given(st.text())
def test_nothing_in_the_data_reaches_the_terminal_as_a_command(text: str) -> None:
    row = make_row([text, "\x1b]0;title\x07", "\x9b2J"], 1, row_id=f"{text}:1")
    shown = printed(document(row))
    assert all(sign == "\n" or not (ord(sign) < 32 or 0x7F <= ord(sign) < 0xA0) for sign in shown)
    assert "\u202e" not in shown


def test_a_terminal_gets_colours_and_no_line_too_wide() -> None:
    row = make_row(
        [WIDE * 4, "<user>", HOSTILE * 3, "x" * 300, WIDE, "<end>"], 2, special_tokens_mask=[0, 1, 0, 0, 0, 1]
    )
    shown = printed(document(row), force_terminal=True, color_system="standard")
    assert "⟦" not in shown
    plain = uncoloured(shown)
    assert "\x1b" not in plain
    assert max(cell_len(line) for line in plain.splitlines()) <= 80
    assert "\x1b[1;32m日本語" in shown, "supervised: bold green"
    assert "\x1b[36m<user>" in shown, "special: cyan"
    assert "\x1b[1;30;42m<end>" in shown, "special and supervised"
    without = printed(document(row), force_terminal=True, no_color=True)
    joined = re.sub(r"\s", "", body(uncoloured(without)))
    assert joined.endswith("⟦" + re.sub(r"\s", "", WIDE) + "<end>⟧"), "where colours were refused, signs stand for them"


def test_what_is_not_shown_is_counted() -> None:
    row = make_row(["a"] * (FIRST + 100) + ["b"] * (LAST + 23), 400, tokens_truncated=77)
    found = document(row)
    found["data"]["rows_used"] = 5
    shown = printed(found)
    assert shown.count("a") >= FIRST
    assert "+123 more tokens, 100 supervised" in shown
    assert "+77 more tokens were cut off by data.max_length" in shown
    assert "+4 more rows" in shown
    before, _, after = body(shown).split("…")
    assert (before.count("a"), after.count("b")) == (FIRST, LAST)
    assert "more" not in body(printed(document(make_row(["a"] * (FIRST + LAST), 1))))


def test_an_ascii_terminal_still_tells_what_is_supervised() -> None:
    code = "import json, sys; from ftune.console import inspection as i; i.print_inspection(json.load(sys.stdin))"
    found = json.dumps(document(make_row(["Q\n", "A 日"], 1)))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, input=found, check=True
    )
    assert "Q\n[[A ?]]\n" in done.stdout


class Page(HTMLParser):
    """The tokens of a page, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        self.targets += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []
        self.inside = tag == "span" and "data-t" in found
        if self.inside:
            self.tokens.append({"kind": found.get("class", ""), "told": found["data-t"], "text": ""})

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tokens[-1]["text"] += data


def test_the_page_has_every_token_with_its_label() -> None:
    row = make_row(["<user>", HOSTILE, "", "é", "\n", "ok", "<end>"], 2, special_tokens_mask=[1, 0, 0, 0, 0, 0, 1])
    page = Page(inspection_page(document(row), "recipe"))
    assert [token["kind"] for token in page.tokens] == ["x", "", "", "", "s", "s x"]
    assert page.tokens[1]["text"] == HOSTILE.replace("\x1b", "␛").replace("\x07", "␇").replace("\u202e", "⟨202e⟩")
    assert page.tokens[2] == {
        "kind": "",
        "text": "é",
        "told": "position 2 · id 1002 · read only\nposition 3 · id 1003 · read only",
    }
    assert page.tokens[3]["text"] == "⏎\n"
    assert page.tokens[-1]["told"] == "position 6 · id 1006 · label 1006"


def test_the_page_is_safe_and_needs_nothing_from_outside() -> None:
    found = document(make_row([HOSTILE], 1, row_id=HOSTILE), make_row(["a"], 1))
    found["data"]["sources"][HOSTILE] = found["data"]["sources"].pop("a.jsonl")
    found["data"]["longest"][0]["row_id"] = HOSTILE
    text = inspection_page(found, HOSTILE)
    page = Page(text)
    assert "default-src 'none'" in text
    assert not {"script", "link", "img", "iframe", "b", "object"} & set(page.tags)
    assert not re.search(r"https?://|\bsrc=|url\(|@import|<[^>]*\son\w+=", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert {target.removeprefix("#") for target in page.targets} <= set(page.ids)
    assert [target for target in page.targets if target.startswith("#row")] == ["#row-1", "#row-2", "#row-2", "#row-1"]
    assert "None" not in text


def test_the_page_is_bounded_and_says_so() -> None:
    long = make_row(["a"] * 5000, 10, tokens_truncated=7)
    text = inspection_page(document(*[long] * 20), "recipe")
    page = Page(text)
    assert text.count("<article") == MOST_TOKENS // 5000
    assert len(page.tokens) == MOST_TOKENS // 5000 * 3000
    assert "+2,000 more tokens" in text
    assert "+7 more tokens were cut off" in text
    assert "14 more were asked for" in text
    assert len(text) < 5_000_000
    assert "more were asked for" not in inspection_page(document(long), "recipe")


def test_the_page_draws_the_histogram_of_the_audit() -> None:
    found = document(make_row(["a"], 1))
    found["data"]["histogram"] = {"edges": [0, 10, 20, 30], "counts": [4, 0, 2]}
    text = inspection_page(found, "recipe")
    heights = re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', text)
    assert list(map(float, heights)) == [1000, 0, 500]
    assert "10 to 19 tokens: 0 rows" in text


def test_a_runs_report_has_the_audit_too(tmp_path: Path) -> None:
    rows = [good(HOSTILE, truncated={"user": 3}), *[good("b.jsonl", n) for n in range(4)]]
    report = sample_report() | {"data": findings.document(audit_of(rows))}
    render(write_run(tmp_path, report))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("<rect x=") == len(report["data"]["histogram"]["counts"])
    assert "script" not in page.tags
    assert "550 in = 200 supervised + 347 read only + 3 cut off + 0 dropped" in text
    cells = re.findall(r"<tr><td>(.*?)</td>((?:<td>.*?</td>)+)</tr>", text)
    numbers = {name: re.findall(r"<td>(.*?)</td>", rest) for name, rest in cells}
    assert numbers["b.jsonl"] == ["4", "4", "440", "160", "0", "0", "none"]
    assert numbers["user"] == ["5", "300", "0", "3", "0"]
    assert "None" not in text


def test_rows_come_from_the_collator_with_their_pieces(workspace: Path) -> None:
    """Counted again from the rows themselves: one character is one token."""
    found = preview.inspect(load(write_recipe(workspace)), None)
    tokenizer = make_tokenizer()
    for row, source in zip(found["rows"], CHAT_ROWS, strict=True):
        question, answer = (message["content"] for message in source["messages"])
        text = chats.render_template(tokenizer, source["messages"])
        assert "".join(row["tokens"]) == row["text"] == text
        supervised = [token for token, label in zip(row["tokens"], row["labels"], strict=True) if label != -100]
        assert supervised == [*answer, "<|im_end|>"]
        assert len(row["tokens"]) == len("<user\n" + question + ">\n" + "<assistant\n" + answer + ">\n")
        specials = [t for t, mark in zip(row["tokens"], row["special_tokens_mask"], strict=True) if mark]
        assert specials == ["<|im_start|>", "<|im_end|>"] * 2
        assert row["tokens_truncated"] == 0


def test_a_row_that_was_cut_says_by_how_much(workspace: Path) -> None:
    write_rows(workspace / "train.jsonl", [chat("ab", "c" * 60), chat("a", "b")])
    recipe = load(write_recipe(workspace, data={"max_length": 40, "too_long": "truncate"}))
    whole = preview.inspect(load(write_recipe(workspace)), None)["rows"]
    cut = preview.inspect(recipe, None)["rows"]
    for one, other in zip(cut, whole, strict=True):
        assert len(one["tokens"]) == min(40, len(other["tokens"]))
        assert one["tokens_truncated"] == len(other["tokens"]) - len(one["tokens"])


def test_inspect_writes_a_page_and_prints_rows(workspace: Path) -> None:
    recipe, path = write_recipe(workspace), workspace / "rows.html"
    done = ftune("inspect", recipe, "--html", path, "--rows", 4)
    assert (done.returncode, done.stdout.strip()) == (0, str(path)), done.stderr
    assert path.read_text(encoding="utf-8").count("<article") == 4
    done = ftune("inspect", recipe)
    assert "⟦bb<|im_end|>⟧" in done.stdout
    assert "+21 more rows" in done.stdout
    assert ftune("inspect", recipe, "--rows", 0).returncode == 2
