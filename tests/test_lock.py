"""Trust case 86: two processes never work in one folder, and no dead one keeps it."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from kill_kit import in_child

from ftune import lock
from ftune.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
HOLD = "import sys, time; from pathlib import Path; from ftune import lock\n"
HOLD += "with lock.hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def holder(tmp_path):
    """Another process that is in the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def record(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text if isinstance(text, str) else json.dumps(text))


def take(tmp_path):
    with lock.hold(tmp_path):
        return json.loads((tmp_path / lock.NAME).read_text())


def test_a_living_process_keeps_others_out_and_a_killed_one_does_not(tmp_path, holder, capsys):
    before = (tmp_path / lock.NAME).read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match=f"in use by pid {holder.pid}\\n") as caught:
            take(tmp_path)
        assert caught.value.exit_code == 2
    assert (tmp_path / lock.NAME).read_bytes() == before
    holder.kill()
    holder.wait()
    assert take(tmp_path)["pid"] == os.getpid()
    assert f"taking over the lock of pid {holder.pid}, which is gone" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / lock.NAME).exists()


def test_a_dead_process_that_nobody_buried_is_dead(tmp_path, holder):
    """A container without an init process keeps its zombies."""
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    os.kill(holder.pid, 0)  # it is still there, in a way
    assert take(tmp_path)["pid"] == os.getpid()


def test_a_folder_is_held_once_even_by_one_process(tmp_path):
    with lock.hold(tmp_path), pytest.raises(UserError, match=f"in use by pid {os.getpid()}"):
        take(tmp_path)
    take(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"pid": 12', "[1]", "null", '{"pid": "1"}', "\0" * 40])
def test_a_lock_that_was_half_written_is_taken_over(tmp_path, capsys, text):
    record(tmp_path, text)
    assert take(tmp_path)["pid"] == os.getpid()
    assert "taking over the lock of a process that left no name" in " ".join(capsys.readouterr().err.split())


def test_a_pid_that_is_used_again_by_another_program_does_not_count(tmp_path, capsys):
    record(tmp_path, {"pid": os.getppid(), "host": socket.gethostname(), "started": lock.started(1)})
    take(tmp_path)
    assert f"taking over the lock of pid {os.getppid()}" in " ".join(capsys.readouterr().err.split())
    record(tmp_path, {"pid": os.getppid(), "host": socket.gethostname(), "started": lock.started(os.getppid())})
    with pytest.raises(UserError, match=f"in use by pid {os.getppid()}"):
        take(tmp_path)


def test_locks_of_the_first_version_had_a_pid_alone(tmp_path, dead_pid):
    record(tmp_path, {"pid": os.getppid()})
    with pytest.raises(UserError, match=f"in use by pid {os.getppid()}"):
        take(tmp_path)
    record(tmp_path, {"pid": dead_pid})
    take(tmp_path)


def test_another_host_is_alive_while_it_touches_the_lock(tmp_path, dead_pid, capsys):
    """Its pid means nothing here, whoever has that number."""
    for pid in (os.getppid(), dead_pid):
        record(tmp_path, {"pid": pid, "host": "elsewhere", "started": "boot:1"})
        with pytest.raises(UserError, match=f"in use by pid {pid} on elsewhere") as caught:
            take(tmp_path)
        assert "if its host is gone, try again in 60 seconds" in str(caught.value)
    old = time.time() - lock.LOST - 1
    os.utime(tmp_path / lock.NAME, (old, old))
    assert take(tmp_path)["host"] == socket.gethostname()
    assert f"taking over the lock of pid {dead_pid} on elsewhere" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with lock.hold(tmp_path):
        os.utime(tmp_path / lock.NAME, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / lock.NAME).stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / lock.NAME).stat().st_mtime > 2


def test_without_locks_of_the_file_system_the_record_decides(tmp_path, monkeypatch, dead_pid):
    def unsupported(descriptor, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    record(tmp_path, {"pid": os.getppid(), "host": socket.gethostname(), "started": lock.started(os.getppid())})
    with pytest.raises(UserError, match="in use by"):
        take(tmp_path)
    record(tmp_path, {"pid": dead_pid, "host": socket.gethostname(), "started": "boot:1"})
    take(tmp_path)


def test_of_many_that_take_over_a_dead_one_s_lock_at_once_one_gets_it(tmp_path, dead_pid):
    """Processes start together and hold the folder until all have tried: exactly one may have it."""
    for _ in range(8):
        record(tmp_path, {"pid": dead_pid})
        start, done = os.pipe(), os.pipe()

        def try_it(start=start, done=done):
            os.close(start[1])
            os.close(done[1])
            os.read(start[0], 1)  # until the parent closes its end
            with lock.hold(tmp_path):
                os.read(done[0], 1)

        pids = []
        for _ in range(6):
            if (pid := os.fork()) == 0:
                os._exit(in_child_code(try_it))
            pids.append(pid)
        os.close(start[1])
        refused = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(5)]
        os.close(done[1])
        assert sorted([*refused, os.waitstatus_to_exitcode(os.wait()[1])]) == [0, 2, 2, 2, 2, 2]
        os.close(start[0])
        os.close(done[0])
        assert not (tmp_path / lock.NAME).exists()


def in_child_code(work):
    try:
        work()
    except UserError:
        return 2
    except BaseException:
        return 9
    return 0


def test_a_forked_process_neither_keeps_nor_ends_the_lock(tmp_path, holder):
    """Workers that a killed run left behind."""
    with lock.hold(tmp_path / "mine"):
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
    try:
        take(tmp_path / "mine")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with lock.hold(tmp_path / "mine"):
        assert in_child(lambda: None) == 0
        with pytest.raises(UserError, match="in use"):
            take(tmp_path / "mine")


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(lock.os, "open", refused)
    with pytest.raises(UserError, match="cannot write here: Permission denied"):
        take(tmp_path)


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / lock.NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot write here"):
        take(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"
