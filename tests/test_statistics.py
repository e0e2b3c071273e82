"""The statistics keep their promises: coverage, power and error rates by simulation, small cases by hand."""

import json
import math

import numpy as np
import pytest

from ftune.statistics import (
    holm,
    judge,
    mcnemar,
    mean_interval,
    minimum_detectable,
    paired_difference,
    sign_flip,
)
from ftune.statistics.power import mcnemar_power
from ftune.statistics.quantiles import t_quantile


def pairs(n: int, lost: int, gained: int) -> tuple[list[int], list[int]]:
    """n items of which some are lost, some gained, half of the rest right both times."""
    kept = n - lost - gained
    before = [1] * lost + [0] * gained + [index % 2 for index in range(kept)]
    after = [0] * lost + [1] * gained + [index % 2 for index in range(kept)]
    return before, after


def draw_pairs(generator: np.random.Generator, n: int, lost: float, gained: float) -> tuple[list[float], list[float]]:
    kind = generator.choice(3, size=n, p=[lost, gained, 1 - lost - gained])
    return [float(k != 1) for k in kind], [float(k != 0) for k in kind]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.98])
def test_the_interval_of_a_score_covers_the_truth(share: float) -> None:
    generator = np.random.default_rng(1)
    samples = (generator.random((2000, 120)) < share).astype(float)
    intervals = [mean_interval(list(sample)) for sample in samples]
    coverage = np.mean([interval[0] <= share <= interval[1] for interval in intervals if interval])
    assert 0.92 <= coverage <= 0.99


def test_the_interval_of_a_graded_score_covers_the_truth() -> None:
    generator = np.random.default_rng(2)
    samples = generator.beta(2, 1, size=(300, 80))
    intervals = [mean_interval(list(sample), resamples=1000) for sample in samples]
    coverage = np.mean([interval[0] <= 2 / 3 <= interval[1] for interval in intervals if interval])
    assert 0.90 <= coverage <= 0.98


def test_wilson_by_hand() -> None:
    # 8 of 10: (0.8 + 3.8415/20 -+ 1.96 sqrt(0.016 + 3.8415/400)) / (1 + 0.38415)
    assert mean_interval([1] * 8 + [0] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_all_right_is_not_certain() -> None:
    assert mean_interval([1] * 300) == pytest.approx((0.98736, 1.0), abs=1e-5)
    assert mean_interval([0] * 300) == pytest.approx((0.0, 0.01264), abs=1e-5)


def test_one_value_says_little() -> None:
    interval = mean_interval([1.0])
    assert interval is not None
    assert interval[0] < 0.21
    assert mean_interval([0.5]) == pytest.approx((0.0125, 0.9875))


def test_equal_graded_scores_are_not_certain() -> None:
    share = 1 - 0.025 ** (1 / 100)
    assert mean_interval([0.4] * 100) == pytest.approx((0.4 - share * 0.4, 0.4 + share * 0.6))
    assert mean_interval([2.5] * 100) is None, "a constant loss has no bounds to argue from"


def test_no_scores_are_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
    with pytest.raises(ValueError, match="1 and 2"):
        paired_difference([1], [1, 0])


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(2, 8) == mcnemar(8, 2)
    assert mcnemar(3, 3) == 1.0
    assert 0 < mcnemar(1200, 900) < 1e-9


def test_a_clear_loss_is_forgotten() -> None:
    result = paired_difference(*pairs(200, 24, 2))
    assert (result.n, result.num_lost, result.num_gained) == (200, 24, 2)
    assert result.drop == pytest.approx(0.11)
    assert result.drop == pytest.approx(result.before - result.after)
    assert result.ci95 is not None
    assert result.ci95[0] < 0.11 < result.ci95[1]
    assert result.ci95[0] > 0
    assert result.verdict == "forgot"


def test_no_change_is_not_certain_either() -> None:
    few, many = paired_difference([1] * 20, [1] * 20), paired_difference([1] * 300, [1] * 300)
    bound = 1 - 0.025 ** (1 / 300)
    assert many.ci95 == pytest.approx((-bound, bound))
    assert (few.verdict, many.verdict) == ("cannot tell", "kept")
    assert few.minimum_detectable > many.minimum_detectable > 0
    assert few.p_value == many.p_value == 1.0


def test_a_gain_is_kept() -> None:
    result = paired_difference(*pairs(200, 1, 40))
    assert result.drop < 0
    assert result.verdict == "kept"


@pytest.mark.parametrize(("lost", "gained"), [(4, 0), (5, 0), (6, 0), (12, 4), (60, 52), (30, 10)])
def test_interval_test_and_verdict_agree(lost: int, gained: int) -> None:
    result = paired_difference(*pairs(200, lost, gained))
    assert result.p_value is not None
    assert result.ci95 is not None
    assert (result.p_value < 0.05) == (result.ci95[0] > 0) == (result.verdict == "forgot")


def test_the_margin_decides_what_counts_as_kept() -> None:
    before, after = pairs(200, 3, 2)
    assert paired_difference(before, after, margin=0.05).verdict == "kept"
    assert paired_difference(before, after, margin=0.01).verdict == "cannot tell"


@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0.0), (0.02, 0.02), (0.08, 0.02), (0.3, 0.2)])
def test_the_interval_of_a_drop_covers_the_truth(lost: float, gained: float) -> None:
    generator = np.random.default_rng(3)
    hits = []
    for _ in range(200):
        interval = paired_difference(*draw_pairs(generator, 100, lost, gained), resamples=2000).ci95
        assert interval is not None
        hits.append(interval[0] <= lost - gained <= interval[1])
    assert np.mean(hits) >= 0.92


def test_churn_without_loss_is_seldom_called_forgotten() -> None:
    generator = np.random.default_rng(4)
    draws = [draw_pairs(generator, 60, 0.1, 0.1) for _ in range(400)]
    verdicts = [paired_difference(*draw, resamples=1000).verdict for draw in draws]
    assert verdicts.count("forgot") / 400 <= 0.04  # 0.025 is meant: one side of 0.05


@pytest.mark.parametrize(
    ("n", "churn", "tests"), [(50, 0.24, 1), (50, 0.24, 9), (120, 0.0, 1), (120, 0.05, 9), (120, 0.2, 1)]
)
def test_the_minimum_detectable_drop_is_detected_four_times_in_five(n: int, churn: float, tests: int) -> None:
    """Stated after a measurement without a drop, and looked for in another one with it."""
    generator = np.random.default_rng(5)
    found = []
    for _ in range(100):
        drop = minimum_detectable(*map(np.array, draw_pairs(generator, n, churn / 2, churn / 2)), tests)
        for _ in range(10):
            before, after = map(np.array, draw_pairs(generator, n, churn / 2 + drop, churn / 2))
            lost, gained = int((before > after).sum()), int((before < after).sum())
            found.append(lost > gained and mcnemar(lost, gained) < 0.05 / tests)
    assert 0.78 <= np.mean(found) <= 0.97  # 80 % is meant; with no churn at all the one item more makes it 95


def test_the_minimum_detectable_drop_of_graded_scores() -> None:
    generator = np.random.default_rng(6)
    before = generator.uniform(0.4, 0.6, size=150)
    drop = minimum_detectable(before, before - generator.normal(0, 0.1, size=150))
    changes = generator.normal(drop, 0.1, size=(2000, 150))
    z = changes.mean(axis=1) / (changes.std(axis=1, ddof=1) / math.sqrt(150))
    assert 0.78 <= np.mean(z > 1.96) <= 0.92


def test_more_suites_ask_for_larger_drops() -> None:
    before, after = (np.array(scores, dtype=float) for scores in pairs(200, 8, 8))
    found = [minimum_detectable(before, after, tests) for tests in (1, 3, 9)]
    assert found == sorted(found)
    assert found[0] < found[2]
    assert minimum_detectable(before[:12], before[:12], 1) < 1.0
    assert minimum_detectable(before[:8], before[:8], 9) == 1.0, "9 losses are needed at 0.05 / 9"


def test_the_power_of_mcnemar_is_that_of_every_outcome_added_up() -> None:
    n, lost, gained = 20, 0.4, 0.1
    by_hand = sum(
        math.comb(n, i) * math.comb(n - i, j) * lost**i * gained**j * (1 - lost - gained) ** (n - i - j)
        for i in range(n + 1)
        for j in range(n + 1 - i)
        if i > j and mcnemar(i, j) < 0.05
    )
    assert mcnemar_power(n, lost, gained, 0.05) == pytest.approx(by_hand, abs=1e-5)


def test_holm_by_hand() -> None:
    # 0.01 * 4 = 0.04; 0.02 * 3 = 0.06; 0.03 * 2 = 0.06; 0.9
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    # 0.04 * 3 = 0.12, and the later ones may not be smaller: 0.045 * 2 = 0.09, 0.05
    assert holm([0.04, 0.045, 0.05]) == pytest.approx([0.12, 0.12, 0.12])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_suites_are_judged_together() -> None:
    clear, mild, none = pairs(200, 24, 2), pairs(200, 12, 3), pairs(200, 4, 4)
    assert [paired_difference(*one).verdict for one in (clear, mild, none)] == ["forgot", "forgot", "kept"]
    judged = judge([clear, mild, *[none] * 7])
    assert [one.verdict for one in judged[:3]] == ["forgot", "cannot tell", "kept"]
    assert judged[1].p_value < 0.05 < judged[1].p_adjusted == pytest.approx(8 * judged[1].p_value)
    assert judge([clear])[0] == paired_difference(*clear)


def test_sign_flips_by_hand() -> None:
    # of 0.5, 0.3 and -0.1 the sum is 0.7; of the 8 patterns 0.9, 0.7 and their opposites are as far from 0
    assert sign_flip(np.array([0.5, 0.0, 0.3, -0.1])) == 4 / 8
    assert sign_flip(np.zeros(5)) == 1.0
    assert sign_flip(np.full(5, 0.2)) == 2 / 32
    for lost, gained in [(6, 0), (9, 2), (3, 3)]:
        assert sign_flip(np.array([1.0] * lost + [-1.0] * gained)) == pytest.approx(mcnemar(lost, gained))


def test_many_sign_flips_are_drawn() -> None:
    drops = np.array([1.0] * 30 + [-1.0] * 14)
    assert sign_flip(drops) == pytest.approx(mcnemar(30, 14), abs=0.005)
    assert sign_flip(drops) == sign_flip(drops)
    assert sign_flip(np.ones(40)) == pytest.approx(1 / 10_001)


def test_quantiles_of_students_t() -> None:
    table = {3: 3.182, 5: 2.571, 9: 2.262, 29: 2.045, 120: 1.980}  # of 0.975, from any table
    for freedom, wanted in table.items():
        assert t_quantile(0.975, freedom) == pytest.approx(wanted, abs=0.004 if freedom > 3 else 0.02)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 30])
def test_tiny_samples_promise_nothing(n: int) -> None:
    same = paired_difference([1] * n, [1] * n)
    lost = paired_difference([1] * n, [0] * n)
    assert same.verdict == "cannot tell"
    assert same.minimum_detectable == 1.0 or n >= 6
    assert lost.verdict == ("forgot" if n >= 6 else "cannot tell")


def test_graded_scores_are_paired() -> None:
    generator = np.random.default_rng(8)
    before = generator.uniform(0.3, 0.9, size=100)
    after = before - 0.1 + generator.normal(0, 0.02, size=100)
    result = paired_difference(list(before), list(after))
    assert result.p_value < 0.001
    assert result.ci95 is not None
    assert result.ci95[1] - result.ci95[0] < 0.02, "pairing removes the spread between items"
    assert result.verdict == "forgot"


def test_losses_have_an_interval_unless_nothing_changed() -> None:
    assert paired_difference([2.0, 3.0, 2.5], [1.9, 2.8, 2.4]).ci95 is not None
    assert paired_difference([2.0, 3.0], [2.0, 3.0]).ci95 is None


def test_the_same_scores_give_the_same_numbers() -> None:
    values = list(np.random.default_rng(9).random(50))
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    before, after = pairs(150, 12, 3)
    assert paired_difference(before, after) == paired_difference(before, after)


def test_a_result_goes_into_the_report_as_it_is() -> None:
    row = paired_difference(*pairs(100, 9, 1)).as_dict()
    assert json.loads(json.dumps(row)) == row
    keys = {"n", "before", "after", "drop", "ci95", "p_value", "p_adjusted", "num_lost", "num_gained"}
    assert set(row) == keys | {"minimum_detectable", "verdict"}
