"""What training and evaluation show while they run: two live lines on a terminal, plain lines in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ftune import signals
from ftune.console.streams import is_live, messages
from ftune.quantities import format_bytes, format_duration, format_rate, sparkline

LOG_SECONDS = 10.0  # without a terminal: a line this often, given progress ...
LOG_SHARE = 0.05  # ... or after this share of the whole, if that is not a flood
SMOOTHING = 0.9  # of the exponential mean of the loss


@dataclass
class _Clock:
    """How far it is and how long it takes. A resumed run starts at its own first step."""

    total: int
    first: int = 0
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    logged_at: float = field(default_factory=time.monotonic)
    logged_done: int = -1

    def __post_init__(self) -> None:
        self.done = self.first

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def share(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """None until something was done."""
        advanced = self.done - self.first
        return self.elapsed / advanced * max(self.total - self.done, 0) if advanced else None

    def is_due(self) -> bool:
        """Whether a log without a terminal gets a line now: the last, and a few before it."""
        now = time.monotonic()
        waited = now - self.logged_at
        advanced = self.done - max(self.logged_done, self.first)
        is_last = self.done >= self.total > self.logged_done
        is_further = advanced >= self.total * LOG_SHARE and waited >= LOG_SECONDS / 5
        if is_last or is_further or (waited >= LOG_SECONDS and advanced > 0):
            self.logged_at, self.logged_done = now, self.done
            return True
        return False

    def times(self) -> str:
        left = self.seconds_left
        if self.done >= self.total:
            return format_duration(self.elapsed)
        remaining = "--:--" if left is None else format_duration(left)
        return f"{format_duration(self.elapsed)} · {remaining} left"


class TrainingProgress:
    """Fed once per optimizer step with `update`."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock
        self.losses: list[float] = []
        self.smooth_loss: float | None = None
        self.figures: list[str] = []

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        memory_bytes: int | None,
        learning_rate: float,
        epoch: float,
    ) -> None:
        """`step` counts from 1 and is done; `epoch` is fractional."""
        self.clock.done = step
        weight = min(SMOOTHING, 1 - 1 / (len(self.losses) + 1))  # a plain mean while young
        self.smooth_loss = weight * (self.smooth_loss or 0.0) + (1 - weight) * loss
        self.losses.append(self.smooth_loss)
        memory = [format_bytes(memory_bytes)] if memory_bytes is not None else []
        rates = [f"epoch {epoch:.2f}", f"learning rate {learning_rate:.1e}"]
        self.figures = [format_rate(tokens_per_second), *memory, *rates]
        if not is_live() and (len(self.losses) == 1 or self.clock.is_due()):
            line = f"step {step}/{self.clock.total}  loss {self.smooth_loss:.4f}  " + "  ".join(self.figures)
            _log(f"{line}  {self.clock.times()}")

    def __rich__(self) -> Group:
        return Group(_bar_line("training", self.clock), self._figures_line(messages().width))

    def _figures_line(self, width: int) -> Text:
        """As many figures as the terminal has room for; the loss always."""
        line = Text("  ", no_wrap=True, overflow="ellipsis")
        if self.smooth_loss is None:
            return line.append("waiting for the first step", style="dim")
        line.append("loss ", style="dim").append(f"{self.smooth_loss:.4f} ", style="bold")
        line.append(sparkline(self.losses, 16 if width < 100 else 32), style="cyan")
        for figure in self.figures:
            if line.cell_len + len(figure) + 3 <= width:
                line.append(" · ", style="dim").append(figure)
        return line


class TaskProgress:
    """Fed with `advance(n)` as items are done; there a command may be stopped, as all long work passes there."""

    def __init__(self, description: str, clock: _Clock) -> None:
        self.description = description
        self.clock = clock

    def advance(self, count: int = 1) -> None:
        signals.check()
        self.clock.done += count
        if not is_live() and self.clock.is_due():
            _log(f"{self.description}  {self.clock.done}/{self.clock.total}  {self.clock.times()}")

    def __rich__(self) -> Table:
        return _bar_line(self.description, self.clock)


@contextmanager
def training_progress(total_steps: int, first_step: int = 0) -> Iterator[TrainingProgress]:
    """`first_step` is the number of steps that a resumed run already has."""
    progress = TrainingProgress(_Clock(total_steps, first_step))
    with _shown(progress):
        yield progress


@contextmanager
def task_progress(description: str, total: int) -> Iterator[TaskProgress]:
    progress = TaskProgress(description, _Clock(total))
    with _shown(progress):
        yield progress


@contextmanager
def _shown(progress: TrainingProgress | TaskProgress) -> Iterator[None]:
    if not is_live():
        yield
        return
    # stdout stays untouched: results written during a run must not end up on stderr.
    with Live(progress, console=messages(), refresh_per_second=4, redirect_stdout=False):
        yield


def _bar_line(description: str, clock: _Clock) -> Table:
    is_done = clock.done >= clock.total
    line = Table.grid(expand=True, padding=(0, 1, 0, 0))
    line.add_column(no_wrap=True, overflow="ellipsis", min_width=14, max_width=28)
    line.add_column(no_wrap=True, min_width=9, justify="right")
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    mark = Text("✓ ", style="green") if is_done else Text("  ")
    bar = ProgressBar(1.0, clock.share, complete_style="cyan", finished_style="green")
    times = Text(clock.times(), style="dim")
    line.add_row(mark + Text(description, style="bold"), f"{clock.done}/{clock.total}", bar, times)
    return line


def _log(line: str) -> None:
    messages().print(Text(line), soft_wrap=True)
