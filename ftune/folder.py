"""The run folder: the names of its files, atomic writes, checksums and the lock that keeps two runs apart."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ftune.errors import RunError, UserError
from ftune.stored import REPAIR, is_inside, read_object
from ftune.stored import read_json as read_json
from ftune.stored import read_json_lines as read_json_lines

FORMAT_VERSION = 1
LOCK = "lock.json"
IN_PROGRESS = ".tmp-"
"""In the cache followed by the number of the process that writes there."""


class RunFolder:
    """Where each part of a run lies (DESIGN.md, section 4)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.manifest = path / "manifest.json"
        self.plan = path / "plan.json"
        self.metrics = path / "metrics.jsonl"
        self.adapter = path / "adapter"
        self.merged = path / "merged"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples.jsonl"
        self.probe = path / "probe.jsonl"
        self.twins = path / "twins.jsonl"
        self.probe = path / "probe.jsonl"
        self.report = path / "report.json"
        self.review = path / "review.html"
        self.verdicts = path / "review.json"

    @property
    def is_run(self) -> bool:
        return self.recipe.is_file()

    @property
    def is_complete(self) -> bool:
        """The manifest's list of checksums is the last thing a run writes."""
        return self.manifest.is_file() and "files" in read_object(self.manifest)

    @property
    def recorded(self) -> dict[str, str]:
        """The manifest's checksums by file; raises UserError where they are none."""
        found = read_object(self.manifest).get("files")
        if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
            raise UserError('"files" is no list of checksums', str(self.manifest), REPAIR)
        return found


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, synced, then renamed.

    A link at either name is replaced, never followed.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"could not write: {error.strerror or error}", str(path), "free space, check rights") from error


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """Strict JSON (no NaN), keys in the order given, one line break at the end."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all: filled under a temporary name, synced, then renamed.

    An existing target is replaced only after the new folder is whole. Left-overs of killed writes are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        sync_folder(temporary)
        if target.exists():
            old = temporary.with_name(f".tmp-old-{target.name}")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise RunError(
            f"could not write: {error.strerror or error}", str(target), "free space, check rights"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder(kind: str) -> Path:
    """Where results of one kind are kept for other runs: below $FTUNE_CACHE, else below ~/.cache/ftune."""
    return Path(os.environ.get("FTUNE_CACHE") or Path.home() / ".cache" / "ftune") / kind


@contextmanager
def new_in_cache(path: Path) -> Iterator[Path]:
    """A folder of the cache to be filled: it appears complete or not at all, and two runs may fill it at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{IN_PROGRESS}*"):  # of killed runs; never what another run is writing
            owner = leftover.name.removeprefix(IN_PROGRESS).partition("-")[0]
            if not owner.isdecimal() or not is_alive(int(owner)):
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{IN_PROGRESS}{os.getpid()}-", dir=path.parent))
        try:
            yield temporary
            for file in temporary.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            shutil.rmtree(path, ignore_errors=True)
            with suppress(FileExistsError):
                temporary.rename(path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        hint = "free space there, or name another folder with FTUNE_CACHE"
        raise RunError(f"could not write: {error.strerror or error}", str(path.parent), hint) from error


def remove_leftovers(parent: Path) -> None:
    for leftover in parent.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def checksums(folder: Path, exclude: Iterable[str] = ()) -> dict[str, str]:
    """sha256 of every file below a folder, by its path relative to it; hidden files and `exclude` left out."""
    skip = set(exclude)
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in skip and not any(part.startswith(".") for part in Path(name).parts):
            found[name] = sha256_file(file)
    return found


def changed_files(folder: Path, expected: dict[str, str]) -> list[str]:
    """The files whose bytes are no longer those that were recorded, or that are gone; and names that lead elsewhere."""
    return [
        name
        for name, digest in expected.items()
        if not is_inside(name) or not (folder / name).is_file() or sha256_file(folder / name) != digest
    ]


def is_alive(pid: int) -> bool:
    if not 0 < pid < 2**31:  # a damaged lock: kill() would take it for a group of processes, or not at all
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep a second run out of this folder; the lock of a dead process is taken over."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock_file = path / LOCK
        if lock_file.exists():
            owner = read_object(lock_file).get("pid")
            if isinstance(owner, int) and owner != os.getpid() and is_alive(owner):
                raise UserError(f"in use by pid {owner}", str(path), "wait for that run, or choose another output.dir")
            lock_file.unlink()
        with lock_file.open("x") as file:
            json.dump({"pid": os.getpid()}, file)
    except OSError as error:
        raise UserError(
            f"cannot write here: {error.strerror or error}", str(path), "choose another output.dir"
        ) from error
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
