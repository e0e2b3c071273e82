"""The metrics of answers: as named, in every script, and as the libraries that define them have it on English."""

import json
import random

import pytest
from rouge_score import rouge_scorer
from sacrebleu import corpus_bleu as judge_corpus
from sacrebleu import sentence_bleu as judge_sentence

from ftune.evaluate import METRICS, metrics
from ftune.evaluate.words import bleu_tokenizer, words

ENGLISH = [
    ("The quick brown fox jumps over the lazy dog.", "The quick brown dog jumps on the log."),
    ("It costs $5.20, i.e. five-point-two dollars!", "it costs 5.20 dollars"),
    ("snake_case and CamelCase, don't they?", "don't use snake_case"),
    ("a b c d e f g h", "a c e g b d f h"),
    ("Nothing in common", "zzz"),
    ("short", "a very long answer that has the word short somewhere near its end, and goes on"),
]


@pytest.mark.parametrize(
    ("metric", "wanted", "answer", "score"),
    [
        ("exact_match", "ab", " ab\n", 1.0),
        ("exact_match", "ab", "abc", 0.0),
        ("contains", "ab", "xaby", 1.0),
        ("contains", "ab", "ba", 0.0),
        ("json_match", '{"a": 1, "b": 2}', '{"b":2,"a":1}', 1.0),
        ("json_match", '{"a": 1}', '{"a": "1"}', 0.0),
        ("json_match", '{"a": 1}', "{a: 1", 0.0),
        ("json_match", '{"a": true}', '{"a": 1}', 0.0),
        ("json_match", "[1, [0]]", "[true, [false]]", 0.0),
        ("json_match", "[1]", "[1.0]", 1.0),
        ("json_match", "[1, 2]", "[1]", 0.0),
        ("json_match", "not json", "not json", 0.0),
        ("json_match", "[]", "[" * 200_000, 0.0),
        ("json_match", "1", "1" * 5_000, 0.0),
        ("rouge_l", "the cat sat", "the cat", 0.8),
        ("rouge_l", "the cat sat", "", 0.0),
        ("rouge_l", "!?", " !? ", 1.0),
        ("rouge_l", "!?", "?!", 0.0),
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("bleu", "the cat sat", "", 0.0),
        ("bleu", "yes", "yes", 1.0),
    ],
)
def test_metrics_score_as_named(metric, wanted, answer, score):
    assert METRICS[metric](wanted, answer) == pytest.approx(score)
    assert 0 <= METRICS[metric](wanted, answer) <= 1


def test_fields_are_counted_over_the_items_that_have_them():
    """By hand: `city` is right in 2 of 3, `date` in 1 of 2; the list and the broken answer count as they must."""
    pairs = [
        ('{"city": "Rome", "date": 1}', '{"date": 1, "city": "Rome"}'),
        ('{"city": "Oslo", "date": null}', '{"city": "Oslo", "note": ""}'),
        ('{"city": "Bern"}', "no json"),
        ("[1]", "[1]"),
    ]
    assert metrics.field_shares(pairs) == {"city": 2 / 3, "date": 1 / 2}
    assert metrics.unexpected_share(pairs) == 1 / 3
    assert metrics.field_shares([("[1]", "{}")]) == {}
    assert metrics.field_shares([('{"a": {"b": true}}', '{"a": {"b": 1}}')]) == {"a": 0.0}


# ROUGE-L


@pytest.mark.parametrize(("wanted", "answer"), ENGLISH)
def test_rouge_is_the_judges_on_english(wanted, answer):
    judge = rouge_scorer.RougeScorer(["rougeL"]).score(wanted, answer)["rougeL"].fmeasure
    assert METRICS["rouge_l"](wanted, answer) == pytest.approx(judge, abs=1e-12)


def test_rouge_is_the_judges_on_any_ascii():
    generator, judge = random.Random(0), rouge_scorer.RougeScorer(["rougeL"])
    for _ in range(100):
        first, second = ("".join(generator.choices("abC1_- .,'\"$%\n\t", k=30)) + "x" for _ in range(2))
        assert METRICS["rouge_l"](first, second) == judge.score(first, second)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Don't stop_now 42", ["don", "t", "stop", "now", "42"]),
        ("我喜欢 tea!", ["我", "喜", "欢", "tea"]),
        ("東京へ行く", ["東", "京", "へ", "行", "く"]),
        ("Привет, мир", ["привет", "мир"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("cafe\u0301 ＡＢＣ", ["café", "abc"]),
        ("ok❤\ufe0fyes 🙂🙂", ["ok", "❤", "yes", "🙂", "🙂"]),
        ("co\u00adop", ["coop"]),
        ("\u0301 - ", []),
    ],
)
def test_words_of_every_script(text, found):
    assert words(text) == found


@pytest.mark.parametrize("text", ["我喜欢吃苹果", "Это предложение", "これはペンです", "यह वाक्य है", "ประโยคนี้"])
def test_no_script_is_lost(text):
    """Where the library's own tokenizer finds nothing to compare."""
    half = text[: len(text) // 2]
    assert METRICS["rouge_l"](text, text) == 1.0
    assert METRICS["bleu"](text, text) == 1.0
    assert 0 < METRICS["rouge_l"](text, half) < 1
    assert rouge_scorer.RougeScorer(["rougeL"]).score(text, text)["rougeL"].fmeasure == 0.0


def test_rouge_of_chinese_is_that_of_its_characters():
    """By hand: 4 of 6 characters in order, precision 1."""
    assert METRICS["rouge_l"]("我喜欢吃苹果", "我喜欢吃") == pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6))


# BLEU


@pytest.mark.parametrize(("wanted", "answer"), ENGLISH)
def test_bleu_is_the_judges_on_english(wanted, answer):
    judge = judge_sentence(answer, [wanted], use_effective_order=True).score
    assert METRICS["bleu"](wanted, answer) == pytest.approx(judge / 100, abs=1e-12)


def test_bleu_of_all_items_is_the_judges_and_not_a_mean():
    pairs = [*ENGLISH, ("a whole sentence that is right from end to end",) * 2]
    wanted, answers = zip(*pairs, strict=True)
    found, signature = metrics.corpus_bleu(wanted, answers)
    assert found == pytest.approx(judge_corpus(list(answers), [list(wanted)]).score / 100)
    assert "tok:13a" in signature
    mean = sum(METRICS["bleu"](*pair) for pair in pairs) / len(pairs)
    assert abs(found - mean) > 0.01


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("An English sentence.", "13a"),
        ("Привет, мир", "13a"),
        ("한국어 문장", "13a"),
        ("", "13a"),
        ("42", "13a"),
        ("the character 我 in an English sentence", "13a"),
        ("我喜欢吃苹果", "zh"),
        ("我用 Python 写代码，很喜欢", "zh"),
        ("これはペンです", "char"),
        ("สวัสดีครับ", "char"),
    ],
)
def test_tokenizer_follows_the_script(text, tokenizer):
    assert bleu_tokenizer(text) == tokenizer


def test_bleu_of_chinese_sees_its_characters():
    """13a, which takes the sentence for one word, gives 0."""
    wanted, answer = "我喜欢吃苹果和梨", "我喜欢吃苹果"
    assert METRICS["bleu"](wanted, answer) == pytest.approx(
        judge_sentence(answer, [wanted], tokenize="zh", use_effective_order=True).score / 100
    )
    assert METRICS["bleu"](wanted, answer) > 0.5
    assert judge_sentence(answer, [wanted], use_effective_order=True).score == 0.0
    assert "tok:zh" in metrics.corpus_bleu([wanted], [answer])[1]


def test_json_shaped_like_an_answer_is_read_whole():
    assert metrics.read_json(json.dumps({"a": [1, None]})) == {"a": [1, None]}
    assert metrics.read_json("```json\n{}\n```") is metrics.NO_JSON
    assert metrics.read_json("null") is None
