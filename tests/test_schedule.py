"""The learning rate and the number of steps. Numbers: trust cases."""

import pytest

from ftune import schedule


def rates(total, name, warmup):
    return [schedule.learning_rate(step, total, 1.0, name, warmup) for step in range(1, total + 1)]


def test_linear_decay_goes_by_optimizer_steps():
    """Case 41."""
    assert rates(8, "linear", 0.0) == pytest.approx([1 - k / 8 for k in range(8)])


def test_warmup_rises_to_the_peak_and_never_trains_at_zero():
    assert rates(8, "constant", 0.25) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1])
    assert rates(8, "cosine", 0.25)[:3] == pytest.approx([0.5, 1, 1])
    assert min(rates(8, "cosine", 0.25)) > 0


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "steps"), [(3, 8, 1, 1), (10, 4, 3, 9), (5, 2, 1, 3), (10, 4, 0.1, 1), (12, 4, 1.5, 5)]
)
def test_steps_count_the_last_smaller_batch(count, batch, epochs, steps):
    """Case 30."""
    assert schedule.total_steps(count, batch, epochs, None) == steps


def test_max_steps_wins_over_nothing_else():
    assert schedule.total_steps(100, 4, None, 7) == 7


def test_evaluation_is_due_at_the_end_of_each_epoch_by_default():
    assert [s for s in range(1, 11) if schedule.is_due(s, 10, None, 4)] == [4, 8, 10]
    assert [s for s in range(1, 11) if schedule.is_due(s, 10, 3, 4)] == [3, 6, 9, 10]
