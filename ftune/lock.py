"""The lock that keeps two processes out of one folder. The kernel holds it, so it ends with its process.

`lock.json` says who holds it: host, pid and when that process started, because pids are used again. Where a file system
has no locks, and for other hosts, which some file systems do not tell of each other's locks, that record alone decides;
its file is touched while the run lives.
"""

import errno
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ftune import folder
from ftune.console.streams import note
from ftune.errors import UserError

NAME = "lock.json"
BEAT = 10.0
"""Seconds after which the holder touches the file again."""
LOST = 60.0
"""Seconds without a touch after which another host's process counts as dead."""
UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}

_held: set[int] = set()


def _let_go() -> None:
    """A forked process does not keep the folder of its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keep other processes out of this folder. Raises UserError where one is in it, or where nothing can be written."""
    file = path / NAME
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except OSError as error:
        what = f"cannot write here: {error.strerror or error}"
        raise UserError(what, str(path), "choose another output.dir") from error
    _held.add(descriptor)
    done = threading.Event()
    threading.Thread(target=_beat, args=(descriptor, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        with suppress(OSError):  # the kernel's lock ends all the same, and a record of the dead is taken over
            if _is_at(descriptor, file):
                file.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """The open, locked file with our record in it."""
    file = path / NAME
    was_there = file.exists()
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            is_free = _try_lock(descriptor)
            if not _is_at(descriptor, file):  # its holder removed it meanwhile: what is locked lies nowhere
                os.close(descriptor)
                was_there = False
                continue
            record = _read(descriptor)
            if not is_free or _is_alive(record, file):
                raise _in_use(path, record)
            if was_there:
                note(f"taking over the lock of {_owner(record)}, which is gone")
            _write(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _try_lock(descriptor: int) -> bool:
    """False where another process holds it; where the file system has no locks, only the record can tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether this open file is the one that has the name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False))
    return False


def _read(descriptor: int) -> dict[str, Any]:
    """The record; empty where it was half written, or is none."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("pid"), int) else {}


def _write(descriptor: int) -> None:
    record = {"pid": os.getpid(), "host": socket.gethostname(), "started": started(os.getpid())}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(record) + "\n").encode(), 0)
    os.fsync(descriptor)


def _is_alive(record: dict[str, Any], file: Path) -> bool:
    """Whether the process of a record lives, as far as the record tells."""
    if not record:
        return False
    if record.get("host", socket.gethostname()) != socket.gethostname():
        return _age(file) < LOST
    return folder.is_alive(record["pid"]) and record.get("started") in (None, started(record["pid"]))


def _age(file: Path) -> float:
    """Seconds since a file was touched, by the clock of the file system that holds it."""
    probe = file.with_name(f".tmp-{NAME}-{os.getpid()}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - file.stat().st_mtime


def started(pid: int) -> str | None:
    """Which boot of this machine and which moment of it a process started in.

    None where nobody tells, and of a process that has ended, whether or not its parent has noticed.
    """
    try:
        # The second field, the program's name, may hold anything, blanks and brackets too.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return f"{boot}:{int(fields[19])}"


def _owner(record: dict[str, Any]) -> str:
    if not record:
        return "a process that left no name"
    host = record.get("host")
    return f"pid {record['pid']}" + (f" on {host}" if host and host != socket.gethostname() else "")


def _in_use(path: Path, record: dict[str, Any]) -> UserError:
    hint = "wait for that run, or choose another output.dir"
    if record.get("host", socket.gethostname()) != socket.gethostname():
        hint = f"wait for that run; if its host is gone, try again in {LOST:.0f} seconds"
    return UserError(f"in use by {_owner(record)}", str(path), hint)


def _beat(descriptor: int, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):
            os.utime(descriptor)
