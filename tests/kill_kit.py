"""A process that is killed, stopped or refused at its n-th file operation, and what a run must end with all the same.

A child is forked from this process, which has imported and warmed up everything. There each operation that changes a
file below a folder is counted: open for writing, write (killed in its middle, half of it done), fsync, rename, unlink,
mkdir, rmdir, chmod. safetensors writes outside of Python: of it the beginning, a half written file and the end count.
"""

import builtins
import errno
import io
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
from accelerate.state import AcceleratorState
from conftest import write_recipe, write_rows
from resume_kit import ASKED, make_place, sections_of
from safetensors import SafetensorError

from ftune import folder, process, recipe
from ftune.errors import FtuneError
from ftune.recipe import Recipe
from ftune.run.training import train_run

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
KILLED, FULL, STOPPED = "killed", "refused: the disk is full", "stopped by SIGTERM, twice"
TIMES = {"seconds", "training_seconds", "tokens_per_second", "peak_memory_bytes"}


class Operations:
    """What this process does to files below a folder; at the n-th something happens to it."""

    def __init__(self, below: Path, end_at: int | None, how: str = KILLED, log: Path | None = None) -> None:
        self.below, self.end_at, self.how, self.log = f"{below}{os.sep}", end_at, how, log
        self.count = 0
        self.write, self.pwrite, self.fsync = os.write, os.pwrite, os.fsync
        self.open, self.serialize_file = io.open, safetensors.torch.serialize_file

    def is_ours(self, path: object) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return isinstance(path, str | os.PathLike) and f"{os.path.abspath(path)}".startswith(self.below)

    def is_last(self, what: str, path: object) -> bool:
        """Count an operation; whether it is the one to end at."""
        if self.count == self.end_at or not self.is_ours(path):
            return False
        self.count += 1
        if self.log is not None:
            place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
            with self.open(self.log, "a") as log:
                log.write(f"{what} {place.removeprefix(self.below)}\n")
        if self.count == self.end_at and self.how == STOPPED:
            for _ in range(2):  # as somebody does who is in a hurry
                os.kill(os.getpid(), signal.SIGTERM)
            return False
        return self.count == self.end_at

    def die(self) -> None:
        if self.how == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL)

    def before(self, what: str, path: object) -> None:
        if self.is_last(what, path):
            self.die()

    def install(self) -> None:
        def audit(event: str, arguments: tuple) -> None:
            if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
                self.before("open", arguments[0])
            elif event in EVENTS:
                # With the folder's descriptor, as rmtree has it, the name is relative to that.
                dir_fd = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}.get(event)
                around = (
                    "" if dir_fd is None or arguments[dir_fd] < 0 else os.readlink(f"/proc/self/fd/{arguments[dir_fd]}")
                )
                path = arguments[0] if isinstance(arguments[0], int) else os.path.join(around, arguments[0])
                self.before(event.removeprefix("os."), path)

        sys.addaudithook(audit)
        os.fsync = lambda descriptor: (self.before("fsync", descriptor), self.fsync(descriptor))[1]
        os.write = lambda descriptor, data: self.torn(self.write, descriptor, data)
        os.pwrite = lambda descriptor, data, offset: self.torn(self.pwrite, descriptor, data, offset)
        io.open = builtins.open = self.opened
        safetensors.torch.serialize_file = self.serialized

    def torn(self, write: Callable, descriptor: int, data: bytes, *more: int) -> int:
        if self.is_last("write", descriptor):
            write(descriptor, data[: len(data) // 2], *more)
            self.die()
        return write(descriptor, data, *more)

    def opened(self, file, mode="r", *arguments, **options):
        found = self.open(file, mode, *arguments, **options)
        if set(mode) & set("wax+") and self.is_ours(file):
            return Torn(found, self, file)
        return found

    def serialized(self, tensors, filename, *arguments, **options) -> None:
        try:
            self.before("write", filename)
            self.serialize_file(tensors, filename, *arguments, **options)
            if self.is_last("write", filename):
                os.truncate(filename, os.path.getsize(filename) // 2)
                self.die()
            self.before("write", filename)
        except OSError as error:
            raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error 28)") from error


class Torn:
    """An open file; killed at a write, it has half of that."""

    def __init__(self, file, operations: Operations, path: object) -> None:
        self.file, self.operations, self.path = file, operations, path

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __iter__(self):
        return iter(self.file)

    def write(self, data):
        if self.operations.is_last("write", self.path):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            self.operations.die()
        return self.file.write(data)


def fork(
    work: Callable[[], object],
    operations: Operations | None = None,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Do something in a forked process: its number. It ends with the exit code that a command would have."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(log or os.devnull, "a", encoding="utf-8")  # noqa: SIM115
        os.environ |= environment or {}
        if operations is not None:
            operations.install()
        work()
        code = 0
    except FtuneError as error:
        print(error)
        code = error.exit_code
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code of a forked process, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(
    work: Callable[[], object],
    operations: Operations | None = None,
    log: Path | None = None,
    after: float | None = None,
    send: int = signal.SIGTERM,
    to_group: bool = False,
) -> int:
    """Do something in a forked process, to its end.

    after: seconds until it is sent a signal, and again within 50 ms; or its whole group is, as a terminal does it.
    """
    pid = fork(work, operations, log)
    for seconds in () if after is None else (after, 0.04):
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.killpg(pid, send) if to_group else os.kill(pid, send)
    return ended(pid)


def in_two(work: Callable[[], object], operations: Operations | None = None, log: Path | None = None) -> list[int]:
    """Do something in two processes of one run, as torchrun starts them; the operations are the first one's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def one_of_them() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # what this process had found: itself alone
        work()

    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    first = fork(one_of_them, operations, log, ranks[0])
    second = fork(one_of_them, None, log, ranks[1])
    return [ended(first), ended(second)]


def operations_of(
    work: Callable[[], object], below: Path, log: Path, launch: Callable[..., object] = in_child
) -> list[str]:
    """All the operations of some work that is not killed."""
    log.unlink(missing_ok=True)
    assert launch(work, Operations(below, None, log=log)) in (0, [0, 0])
    return log.read_text().splitlines()


def whole_outcome(path: Path) -> dict:
    """What a finished run must end with, whatever happened on the way: bytes, and numbers without times."""
    run = folder.RunFolder(path)
    assert run.is_complete
    assert folder.changed_files(path, folder.read_json(run.manifest)["files"]) == []
    assert not [file for file in path.rglob("*") if file.name.startswith(".tmp-") or file.name == "lock.json"]
    lines = [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "memory")}
        for line in folder.read_json_lines(run.metrics)
    ]
    report = folder.read_json(run.report)
    report["cost"] = {key: value for key, value in report["cost"].items() if key not in TIMES}
    files = {
        part: folder.checksums(path / part) for part in ("adapter", "merged", "checkpoints") if (path / part).is_dir()
    }
    texts = {file.name: file.read_bytes() for file in (run.samples, run.probe, run.twins) if file.is_file()}
    return {"metrics": lines, "report": report, **files, **texts}


def make_run(place: Path) -> Recipe:
    """A run of two steps with an evaluation after each, an adapter, a merged model, a test set and a probe."""
    make_place(place)
    for name, rows in {"validation": ASKED[:3], "test": ASKED[3:6], "probe": ASKED[6:9]}.items():
        write_rows(place / f"{name}.jsonl", rows)
    sections = sections_of("lora", max_steps=2, evaluate_every=1, checkpoint_every=1, keep_checkpoints=1, select="best")
    files = {"validation": "validation.jsonl", "test": "test.jsonl", "decontaminate": False, "deduplicate": "off"}
    sections["data"] |= files
    sections |= {
        "evaluation": {"probe": "probe.jsonl", "max_new_tokens": 4, "few_shot": 1},
        "output": {"save": "both", "dir": "run"},
    }
    return recipe.load(write_recipe(place, **sections))


def run_to_end(settings: Recipe) -> None:
    """As a user would: anew, or with --resume where there is something of it."""
    process.run(lambda: train_run(settings, resume=folder.RunFolder(settings.output.dir).is_run))


def check_ended(settings: Recipe, operations: Operations, clean: dict, log: Path, what: str) -> None:
    """A run that is ended so, and gone on with, ends as the clean one; and says what happened without a traceback."""
    shutil.rmtree(settings.output.dir, ignore_errors=True)
    log.unlink(missing_ok=True)
    code = in_child(lambda: run_to_end(settings), operations, log)
    assert code in {KILLED: {-signal.SIGKILL}, STOPPED: {143}, FULL: {0, 2, 3}}[operations.how], what
    assert "Traceback" not in log.read_text(), f"{what}: {log.read_text()}"
    log.unlink()
    assert in_child(lambda: run_to_end(settings), log=log) == 0, f"{what}: {log.read_text()}"
    assert whole_outcome(settings.output.dir) == clean, what


def make_shared_run(place: Path, parallel: str) -> Recipe:
    """A run of two steps and two saves, for two processes."""
    make_place(place)
    sections = sections_of("lora", max_steps=2, checkpoint_every=1, keep_checkpoints=1, parallel=parallel)
    sections["output"] = {"dir": "run"}
    return recipe.load(write_recipe(place, **sections))


def saves_of_two(settings: Recipe, place: Path) -> tuple[dict, list[tuple[int, str]]]:
    """What the run ends with when it is left alone, and its file operations that belong to checkpoints, by number."""
    run = settings.output.dir
    assert in_two(lambda: run_to_end(settings), log=place / "clean.log") == [0, 0], (place / "clean.log").read_text()
    clean = whole_outcome(run)
    shutil.rmtree(run)
    names = operations_of(lambda: run_to_end(settings), run, place / "operations.log", in_two)
    return clean, [(number, name) for number, name in enumerate(names, 1) if " checkpoints" in name]


def check_two_ended(settings: Recipe, number: int, clean: dict, log: Path, what: str) -> None:
    """The first of two processes is killed there: the other one ends by itself, and both go on to the clean end."""
    shutil.rmtree(settings.output.dir, ignore_errors=True)
    log.unlink(missing_ok=True)
    codes = in_two(lambda: run_to_end(settings), Operations(settings.output.dir, number), log)
    assert codes == [-signal.SIGKILL, 3], f"{what}: {codes}, {log.read_text()}"
    assert "another process of this run has ended" in log.read_text(), what
    assert "Traceback" not in log.read_text(), f"{what}: {log.read_text()}"
    log.unlink()
    assert in_two(lambda: run_to_end(settings), log=log) == [0, 0], f"{what}: {log.read_text()}"
    assert whole_outcome(settings.output.dir) == clean, what
