"""Trust case 85: SIGINT and SIGTERM at any moment, twice too, end a run with its exit code and without a traceback."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_recipe, write_rows
from kill_kit import in_child, make_run, run_to_end, whole_outcome
from resume_kit import ASKED, Stage, make_place, outcome, sections_of

from ftune import process, recipe, signals, train
from ftune.console.progress import task_progress
from ftune.errors import Interrupted, RunError
from ftune.folder import RunFolder
from ftune.run import fitting, resuming, watching
from ftune.signals import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", CODES)
def test_a_signal_that_is_held_waits_and_is_raised_behind(number):
    before = signal.getsignal(number)
    steps = []
    with pytest.raises(Stopped) as caught, signals.held() as stop:  # noqa: PT012
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        steps.append(stop.signal)
        with pytest.raises(Stopped):
            signals.check()
    assert steps == [number]
    assert caught.value.number == number
    assert signal.getsignal(number) == before
    signals.check()  # it is over
    with signals.held() as stop:
        assert stop.signal is None


def test_long_work_stops_between_its_parts():
    done = 0
    with pytest.raises(Stopped), signals.held(), task_progress("counting", 5) as progress:  # noqa: PT012
        for _ in range(5):
            progress.advance()
            done += 1
            os.kill(os.getpid(), signal.SIGINT)
    assert done == 1


def test_where_others_must_be_waited_for_nothing_is_left_in_the_middle():
    """Of several processes, all evaluate to the end."""
    with pytest.raises(Stopped), signals.held(may_interrupt=False), task_progress("counting", 2) as progress:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        progress.advance()
        progress.advance()
        assert progress.clock.done == 2


def test_an_error_of_the_run_is_told_before_a_signal_that_came_meanwhile():
    with pytest.raises(RunError), signals.held():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        raise RunError("disk full")


def stopping(number, times=2):
    for _ in range(times):
        os.kill(os.getpid(), number)


SWALLOWING = {
    "at once": lambda number: stopping(number),
    "in a handler of failures": lambda number: swallow(number),
    "in a finalizer": lambda number: Dying(number),
    "while cleaning up": lambda number: clean_up(number),
    "while an error is told": lambda number: fail(number),
}


def swallow(number):
    try:
        stopping(number)
    except Exception:
        raise AssertionError("a signal is no failure") from None


def clean_up(number):
    try:
        raise RunError("failed")
    finally:
        stopping(number)


def fail(number):
    from ftune.console import streams

    streams.print_error = lambda error: stopping(number)
    raise RunError("failed")


class Dying:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        stopping(self.number)


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("where", SWALLOWING)
def test_a_command_ends_with_the_signal_s_code_wherever_it_comes(tmp_path, where, number):
    def command():
        SWALLOWING[where](number)
        signals.check()

    log = tmp_path / "log"
    assert in_child(lambda: process.run(command), log=log) == CODES[number], log.read_text()
    assert "Traceback" not in log.read_text()
    assert "Exception ignored" not in log.read_text()


def test_a_signal_after_the_end_changes_nothing(tmp_path):
    def command():
        process.run(lambda: None)
        stopping(signal.SIGTERM)

    assert in_child(command) == 0


def test_a_signal_while_it_starts_is_heard(tmp_path):
    """Before anything that takes time is imported."""
    child = subprocess.Popen([sys.executable, "-v", "-m", "ftune", "--help"], stderr=subprocess.PIPE, text=True)
    for line in child.stderr:
        if "import 'ftune.cli'" in line or "import 'typer'" in line or ("matches" in line and "typer/__init__" in line):
            break
    child.send_signal(signal.SIGINT)
    told = child.communicate()[1]
    assert child.returncode in (130, 0)
    assert "Traceback" not in told


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = make_place(tmp_path_factory.mktemp("signals"))
    write_rows(path / "validation.jsonl", ASKED[:4])
    return path


def test_an_evaluation_is_left_in_the_middle_and_made_again(place, tmp_path, monkeypatch):
    """Its step's checkpoint is there before it begins, or is saved then; nothing of it is written twice, or missing."""
    sections = sections_of("lora", max_steps=4, evaluate_every=1, checkpoint_every=3)
    sections["data"] |= {"validation": "validation.jsonl", "decontaminate": False}
    stage = Stage(place, sections | {"evaluation": {"max_new_tokens": 3}})
    watch = watching.begin(stage.settings, stage.inputs, stage.base)
    stage.train(tmp_path / "clean", watch)
    clean = outcome(tmp_path / "clean", 4), evaluations(tmp_path / "clean")
    assert [line["step"] for line in clean[1]] == [0, 1, 2, 3, 4]
    for step in (1, 3, 4):
        run = tmp_path / f"stopped-{step}"
        whole_loss, seen = train.mean_loss, []

        def mean_loss(*arguments, whole_loss=whole_loss, seen=seen, step=step):
            seen.append(1)
            if len(seen) == step:
                stopping(signal.SIGTERM)
            return whole_loss(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(watching.train, "mean_loss", mean_loss)
            with pytest.raises(Interrupted, match=f"after step {step} of 4; checkpoint saved") as caught:
                stage.train(run, watch)
        assert caught.value.exit_code == 143
        assert [line["step"] for line in evaluations(run)] == list(range(step)), "the answers were not waited for"
        stage.train(run, watch)
        assert (outcome(run, 4), evaluations(run)) == clean


def evaluations(run):
    return [line for line in fitting.folder.read_json_lines(run / "metrics.jsonl") if "validation_loss" in line]


def test_a_run_that_is_stopped_before_training_says_how_to_go_on(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(Interrupted, match="run the command again"), resuming.telling_how_to_resume(run):
        raise Stopped(signal.SIGINT)
    run.recipe.write_text("model: x")
    with (
        pytest.raises(Interrupted, match="go on with ftune train RECIPE --resume"),
        resuming.telling_how_to_resume(run),
    ):
        raise Stopped(signal.SIGINT)


def test_stopped_at_random_moments_a_run_ends_with_the_same_bytes(tmp_path):
    """Sent from outside, twice within 50 ms, over the whole run; many more in scripts/random_kills."""
    settings, log, moments = make_run(tmp_path), tmp_path / "log", random.Random(5)
    began = time.monotonic()
    assert in_child(lambda: run_to_end(settings)) == 0
    seconds, clean = time.monotonic() - began, whole_outcome(settings.output.dir)
    shutil.rmtree(settings.output.dir)
    ended = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        log.unlink(missing_ok=True)
        shutil.rmtree(settings.output.dir, ignore_errors=True)
        ended.append(in_child(lambda: run_to_end(settings), log=log, after=moments.uniform(0, seconds), send=number))
        assert ended[-1] in (CODES[number], 0)
        assert "Traceback" not in log.read_text()
        assert in_child(lambda: run_to_end(settings), log=log) == 0, log.read_text()
        assert whole_outcome(settings.output.dir) == clean
    assert set(ended) & set(CODES.values())


def test_killed_processes_go_on_to_the_bytes_of_a_clean_run():
    """The short form of `scripts/random_kills 100`."""
    root = Path(__file__).parents[1]
    command = [sys.executable, root / "scripts" / "random_kills.py", "3", "--steps", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every one ends with the bytes of the clean run" in done.stdout


def test_workers_end_with_the_process_they_work_for(tmp_path):
    """Rows are prepared on all cores; a kill must not leave the others waiting for work for ever."""
    code = (
        "import os, sys, time; from ftune.data.workers import ordered\n"
        "def work(i): os.write(1, b'%d\\n' % os.getpid()); time.sleep(0.05); return i\n"
        "for i in ordered(work, range(1000), 2): pass"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        workers = {int(parent.stdout.readline()) for _ in range(6)}
        parent.kill()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(workers) == 2
    assert not any(is_running(pid) for pid in workers)


def is_running(pid):
    from ftune import lock

    return lock.started(pid) is not None


def test_a_signal_while_rows_are_prepared_ends_without_a_word_of_the_workers(tmp_path):
    """Ctrl-C reaches them too, from the terminal."""
    settings = recipe.load(write_recipe(make_place(tmp_path / "place"), **sections_of("lora")))

    def command():
        from ftune.data import preparing

        preparing.FEW_CHUNKS, preparing.CHUNK_ROWS, preparing.num_workers = 0, 1, lambda: 2
        whole = preparing.prepare_chunk

        def slow(*arguments):
            time.sleep(0.1)
            return whole(*arguments)

        preparing.prepare_chunk = slow
        os.setpgid(0, 0)
        process.run(lambda: fitting_inputs(settings))

    log = tmp_path / "log"
    code = in_child(command, log=log, after=0.6, send=signal.SIGINT, to_group=True)
    assert code == 130, log.read_text()
    assert "Traceback" not in log.read_text()


def fitting_inputs(settings):
    from ftune.run.inputs import require

    require(settings)
