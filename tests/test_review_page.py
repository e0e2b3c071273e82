"""The pages in a real browser: judged by keyboard, at home on a phone, and never asking for anything outside."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ftune
from sample_run import sample_report, sample_row, varied_rows, write_run

from ftune import folder
from ftune.report import render

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
LONG_WORD = "unbreakable" * 40


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium here: the pages are not driven")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = write_run(tmp_path / "run", sample_report(), varied_rows())
    render(path)
    return path


class Watched:
    """A page of its own browser profile; what it asked for and what went wrong in it."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page = browser.new_context(accept_downloads=True, **options).new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        self.page.goto(path.as_uri())

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).first.inner_text())

    def names(self) -> list[str]:
        """Over the answers of the item that is shown."""
        return list(self.page.locator(".item.current .who").all_inner_texts())

    def download(self, path: Path) -> dict[str, Any]:
        with self.page.expect_download() as started:
            self.page.locator("#download").click()
        assert started.value.suggested_filename == "verdicts.json"
        started.value.save_as(path)
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document

    def assert_nothing_left(self) -> None:
        assert self.requests
        assert not [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]
        assert self.errors == []


def test_a_sheet_is_judged_by_keyboard_and_taken_into_the_report(browser: Any, run: Path, tmp_path: Path) -> None:
    sheet = Watched(browser, run / "review.html", viewport=DESKTOP)
    assert sheet.names() == ["base, zero-shot", "base, few-shot", "tuned"]
    assert sheet.text("#count") == "0 of 50 judged"
    first = sheet.text(".item.current header .quiet")
    sheet.press("2", "b")
    assert sheet.text(".item.current .given") == "base, few-shot best, tuned bad"
    sheet.press("j", "3", "g", "ArrowRight", "0", "j", "1", "u")
    assert sheet.text("#count") == "3 of 50 judged", "the last verdict is undone"
    assert sheet.text("#status") == "Undone."
    sheet.press("k", "ArrowLeft", "k")
    assert sheet.text(".item.current header .quiet") == first
    sheet.press("k")
    assert sheet.text("#status") == "This is the first item."

    sheet.page.reload()
    assert sheet.text("#count") == "3 of 50 judged", "kept over a reload"
    assert sheet.text(".item.current .given") == "base, few-shot best, tuned bad"
    document = sheet.download(tmp_path / "verdicts.json")
    assert [(one["best"], one["tuned"]) for one in document["verdicts"]] == [
        ("few_shot", "bad"),
        ("tuned", "good"),
        ("none", None),
    ]
    assert document["verdicts"][0]["row_id"] == first
    done = ftune("report", run, "--review", tmp_path / "verdicts.json")
    assert done.returncode == 0, done.stderr
    review = folder.read_json(run / "report.json")["review"]
    assert review["preferred"] == {"zero_shot": 0, "few_shot": 1, "tuned": 1, "none": 1}
    assert (review["n"], review["good"], review["bad"], review["blind"]) == (3, 1, 1, 0)
    sheet.assert_nothing_left()


def test_a_blind_item_tells_nothing_before_it_is_judged(browser: Any, run: Path, tmp_path: Path) -> None:
    sheet = Watched(browser, run / "review.html", viewport=DESKTOP)
    sheet.page.locator("#blind").check()
    orders = set()
    for number in range(1, 7):
        assert sheet.text(".item.current h2") == f"Item {number} of 50"
        assert sheet.names() == ["Answer 1", "Answer 2", "Answer 3"]
        for hidden in (".why", ".score", ".given"):
            assert not sheet.page.locator(f".item.current {hidden}").first.is_visible()
        sheet.press("g")
        assert sheet.text("#status").startswith("First choose the best answer")
        sheet.press("1")
        orders.add(tuple(sheet.names()))
        assert set(sheet.names()) == {"base, zero-shot", "base, few-shot", "tuned"}
        assert sheet.page.locator(".item.current .why").is_visible()
        sheet.press("g", "j")
    assert len(orders) > 1, "answers are shuffled"
    document = sheet.download(tmp_path / "verdicts.json")
    assert all(one["blind"] and one["tuned"] == "good" for one in document["verdicts"])
    sheet.press("k", "u", "u")
    assert sheet.names() != ["Answer 1", "Answer 2", "Answer 3"], "an undo cannot make known names unknown"
    sheet.press("2")
    assert [one["blind"] for one in sheet.download(tmp_path / "again.json")["verdicts"]] == [True] * 5 + [False]
    sheet.assert_nothing_left()


def test_keys_do_not_fight_with_the_browser(browser: Any, run: Path) -> None:
    sheet = Watched(browser, run / "review.html", viewport=DESKTOP)
    sheet.press("Control+b", "Alt+1")
    assert sheet.text("#count") == "0 of 50 judged"
    sheet.press("?")
    assert sheet.page.locator("#keys").is_visible()
    sheet.press("1", "j")
    assert sheet.text("#count") == "0 of 50 judged", "the help takes no verdicts"
    sheet.press("Escape")
    assert not sheet.page.locator("#keys").is_visible()
    sheet.page.locator(".item.current .best").nth(1).focus()
    sheet.press("Enter")
    assert sheet.text(".item.current .given") == "base, few-shot best", "buttons work from the keyboard too"
    sheet.press("j")
    assert sheet.page.evaluate("document.activeElement.classList.contains('current')"), "focus follows the item"
    sheet.assert_nothing_left()


def test_verdicts_are_loaded_only_into_their_own_sheet(browser: Any, run: Path, tmp_path: Path) -> None:
    first = Watched(browser, run / "review.html", viewport=DESKTOP)
    first.press("3", "g", "j", "1")
    document = first.download(tmp_path / "verdicts.json")
    other = Watched(browser, run / "review.html", viewport=DESKTOP)
    other.page.locator("#file").set_input_files(tmp_path / "verdicts.json")
    other.page.get_by_text("Loaded 2 verdicts.").wait_for()
    assert other.text("#count") == "2 of 50 judged"
    for changes, told in (
        ({"run": "0" * 16}, "These verdicts are about another run"),
        ({"format": "x"}, "This is not a file of verdicts."),
        ({"verdicts": [{"row_id": "gone", "best": "tuned", "tuned": None}]}, "1 left out that do not fit"),
    ):
        folder.write_json(tmp_path / "wrong.json", document | changes)
        other.page.locator("#file").set_input_files(tmp_path / "wrong.json")
        other.page.get_by_text(told).wait_for()
        assert other.text("#count") == "2 of 50 judged"
    folder.write_text(tmp_path / "wrong.json", "{")
    other.page.locator("#file").set_input_files(tmp_path / "wrong.json")
    other.page.get_by_text("This file is not JSON.").wait_for()
    other.assert_nothing_left()


def test_two_runs_do_not_mix(browser: Any, run: Path, tmp_path: Path) -> None:
    second = write_run(tmp_path / "second", sample_report(), varied_rows()[:-1])
    render(second)
    sheet = Watched(browser, run / "review.html", viewport=DESKTOP)
    sheet.press("3")
    sheet.page.goto((second / "review.html").as_uri())
    assert sheet.text("#count") == "0 of 50 judged"
    sheet.press("1")
    sheet.page.goto((run / "review.html").as_uri())
    assert sheet.text(".item.current .given") == "tuned best"
    sheet.assert_nothing_left()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["report.html", "review.html"])
def test_the_pages_fit_their_screen(browser: Any, tmp_path: Path, name: str, viewport: Any, scheme: str) -> None:
    hostile = "</script><img src=x onerror=alert(1)>" + LONG_WORD
    texts = dict.fromkeys(("base", "few_shot", "tuned", "expected", "row_id"), hostile)
    worst = [{**sample_row(1, 0, 1, 0, prompt=hostile), **texts}]
    path = write_run(tmp_path / "run", {**sample_report(), "name": LONG_WORD}, [*worst, *varied_rows()])
    render(path)
    shown = Watched(browser, path / name, viewport=viewport, color_scheme=scheme)
    for step in range(6):
        width, room = shown.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= room, f"item {step + 1} is wider than the screen"
        shown.press("j")
    for selector in ("body", "h1", ".quiet"):
        assert contrast(shown.page, selector) >= 4.5, f"{selector} is hard to read"
    shown.assert_nothing_left()


CONTRAST = """selector => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = numbers(color).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ink = luminance(getComputedStyle(document.querySelector(selector)).color);
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}"""
"""The contrast ratio of WCAG 2.2, against the page's background."""


def contrast(page: Any, selector: str) -> float:
    return float(page.evaluate(CONTRAST, selector))


def test_on_paper_every_item_is_there(browser: Any, run: Path) -> None:
    sheet = Watched(browser, run / "review.html", viewport=DESKTOP)
    visible = "[...document.querySelectorAll('.item')].filter((item) => item.offsetHeight > 0).length"
    assert sheet.page.evaluate(visible) == 1
    sheet.page.emulate_media(media="print")
    assert sheet.page.evaluate(visible) == 50
    assert not sheet.page.locator(".move").is_visible()
    sheet.assert_nothing_left()


def test_the_sheet_can_be_read_without_scripts(browser: Any, run: Path) -> None:
    sheet = Watched(browser, run / "review.html", viewport=DESKTOP, java_script_enabled=False)
    assert sheet.page.locator(".item").nth(49).is_visible()
    assert not sheet.page.locator("#download").is_visible()
