"""The run folder: the names of its files, atomic writes, checksums."""

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ftune.errors import RunError, UserError
from ftune.stored import REPAIR, is_inside, read_object
from ftune.stored import read_json as read_json
from ftune.stored import read_json_lines as read_json_lines

FORMAT_VERSION = 1
IN_PROGRESS = ".tmp-"
"""What is being written; in the cache, and of folders, the number of the process that writes there follows."""
OLD = ".tmp-old-"
"""A folder that is being replaced: it is put back where its successor did not appear."""
GONE = ".tmp-gone-"
"""A folder that is being removed."""


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
        self.replay = path / "replay"
        self.samples = path / "samples.jsonl"
        self.probe = path / "probe.jsonl"
        self.twins = path / "twins.jsonl"
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


def sync_tree(path: Path) -> None:
    """Flush every file and every folder below a folder, and itself."""
    for entry in path.rglob("*"):
        if entry.is_dir() and not entry.is_symlink():
            sync_folder(entry)
        elif entry.is_file():
            with entry.open("rb") as opened:
                os.fsync(opened.fileno())
    sync_folder(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, synced, then renamed.

    A link at either name is replaced, never followed.
    """
    temporary = path.with_name(f"{IN_PROGRESS}{path.name}")
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
        raise not_written(error, path) from error


def not_written(error: Exception, path: Path) -> RunError:
    """What a user is told where the file system refused: the reason it gave."""
    reason = getattr(error, "strerror", None) or error
    return RunError(f"could not write: {reason}", str(path), "free space, check rights")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """Strict JSON (no NaN), keys in the order given, one line break at the end."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Lines:
    """A file that documents are appended to, one a line. Killed in between, its last line may be torn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "Lines":
        with self._telling():
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            sync_folder(self.path.parent)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def write(self, document: Any) -> None:
        rest = (json.dumps(document) + "\n").encode()
        with self._telling():
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def sync(self) -> None:
        with self._telling():
            os.fsync(self._descriptor)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise not_written(error, self.path) from error


@contextmanager
def atomic_folder(target: Path, prove: Callable[[Path], None] = lambda path: None) -> Iterator[Path]:
    """A folder that appears complete or not at all: filled under a temporary name beside it, synced, then renamed.

    prove: what must hold of it once it is synced, or it does not appear.
    An existing target is replaced only after the new folder is whole; killed in between, `settle` puts it back.
    """
    temporary, old = None, target.with_name(OLD + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _settle_target(target)
        prefix = f"{IN_PROGRESS}{target.name}-{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        temporary.chmod(0o755)
        yield temporary
        sync_tree(temporary)
        prove(temporary)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        sync_folder(target.parent)
        if old.exists():
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise not_written(error, target) from error
    finally:
        with suppress(OSError):
            _put_back(old, target)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is there whole or not at all."""
    gone = path.with_name(GONE + path.name)
    try:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise RunError(f"could not remove: {error.strerror or error}", str(path), "check rights") from error


def settle(parent: Path) -> None:
    """Clear away what killed processes left in a folder that is ours alone; what was being replaced is put back."""
    for leftover in parent.glob(f"{IN_PROGRESS}*"):
        if leftover.name.startswith(OLD):
            _put_back(leftover, leftover.with_name(leftover.name.removeprefix(OLD)))
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _settle_target(target: Path) -> None:
    """The same beside one target, in a folder that others use too."""
    _put_back(target.with_name(OLD + target.name), target)
    for leftover in target.parent.glob(glob.escape(f"{IN_PROGRESS}{target.name}-") + "*"):
        if _is_abandoned(leftover, f"{IN_PROGRESS}{target.name}-"):
            shutil.rmtree(leftover, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    if old.is_dir() and not target.exists():
        old.rename(target)
    elif old.is_dir():
        shutil.rmtree(old)


def _is_abandoned(leftover: Path, prefix: str) -> bool:
    """Whether the process that was writing there, whose number follows the prefix, has ended."""
    pid = re.match(r"(\d{1,9})-", leftover.name.removeprefix(prefix))
    return pid is not None and not is_alive(int(pid[1]))


def cache_folder(kind: str) -> Path:
    """Where results of one kind are kept for other runs: below $FTUNE_CACHE, else below ~/.cache/ftune."""
    return Path(os.environ.get("FTUNE_CACHE") or Path.home() / ".cache" / "ftune") / kind


@contextmanager
def new_in_cache(path: Path) -> Iterator[Path]:
    """A folder of the cache to be filled: it appears complete or not at all, and two runs may fill it at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{IN_PROGRESS}*"):  # of killed runs; never what another run is writing
            if _is_abandoned(leftover, IN_PROGRESS):
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
