"""The statistics keep their promises: coverage, power and error rates by simulation, small cases by hand."""

import json
import math

import numpy as np
import pytest

from ftune.statistics import mcnemar, mean_interval, minimum_detectable, paired_difference


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


@pytest.mark.parametrize("changed", [0.0, 0.05, 0.2, 0.5])
def test_the_minimum_detectable_drop_is_detected_four_times_in_five(changed: float) -> None:
    n = 200
    observed = np.zeros(n)
    observed[: round(n * changed)] = [(-1) ** index for index in range(round(n * changed))]
    drop = minimum_detectable(observed, is_binary=True)
    rate = max(changed, drop)
    generator = np.random.default_rng(5)
    counts = generator.multinomial(n, [(rate + drop) / 2, (rate - drop) / 2, 1 - rate], size=2000)
    power = np.mean([mcnemar(int(lost), int(gained)) < 0.05 for lost, gained, _ in counts])
    assert 0.72 <= power <= 0.86


def test_the_minimum_detectable_drop_of_graded_scores() -> None:
    drops = np.random.default_rng(6).normal(0, 0.3, size=150)
    drop = minimum_detectable(drops, is_binary=False)
    repeated = np.random.default_rng(7).normal(drop, drops.std(), size=(2000, 150))
    z = repeated.mean(axis=1) / (repeated.std(axis=1, ddof=1) / math.sqrt(150))
    assert 0.76 <= np.mean(z > 1.96) <= 0.84


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
    assert result.p_value is None
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
    keys = {"n", "before", "after", "drop", "ci95", "p_value", "num_lost", "num_gained"}
    assert set(row) == keys | {"minimum_detectable", "verdict"}
