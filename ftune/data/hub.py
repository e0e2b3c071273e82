"""Datasets of the hub -> the files they consist of -> rows, by the readers of any other file.

`datasets.load_dataset` is only asked which files a split has. Its own reading changes rows: over JSON in which a field
is a number here and a text there, the text "2" comes back as the number 2 and "null" as nothing (datasets 5.2).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ftune.data.rows import READERS
from ftune.data.streams import kind_of
from ftune.errors import UserError

SCHEME = "hf://datasets/"
HARMLESS = {"name", "version", "data_dir", "data_files", "description", "features", "chunksize", "block_size"}
"""Options of a dataset's configuration that do not change how its files are to be read."""


@dataclass(frozen=True)
class HubFiles:
    """The files of one split on this machine, and the commit they are of (null for a local folder)."""

    paths: tuple[Path, ...]
    commit: str | None


def hub_files(name: str, split: str, revision: str | None = None, configuration: str | None = None) -> HubFiles:
    """The files of a split, fetched into the hub's cache where they are not there yet. `name` may be a local folder.

    Without a network, what is in the cache is taken. Code that comes with a dataset is never run.
    """
    where = f"the dataset {name}" + (f" at {revision}" if revision else "")
    if not name.strip("/ "):
        raise UserError("no dataset is named", where, "write OWNER/NAME")
    with _told_to_users(where):
        folder, commit = _cached_folder(name, revision) if _is_offline() and not Path(name).exists() else (name, None)
        builder = _builder(folder, configuration, None if commit else revision)
    found = {str(known): list(files) for known, files in (builder.config.data_files or {}).items()}
    if split not in found:
        raise UserError(f"no split {split!r}", where, f"splits are {', '.join(found) or 'none'}")
    for file in found[split]:
        if kind_of(Path(file)) not in READERS:
            raise UserError(f"{file} is of no kind that can be read", where, f"kinds are {', '.join(READERS)}")
        if not file.startswith(SCHEME) and not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):
            raise UserError(f"its card names {file}, which lies elsewhere", where, "name that file in data.train")
    _check_options(builder.config, found[split], where)
    with _told_to_users(where):
        paths = tuple(_fetch(file) for file in found[split])
    return HubFiles(paths, commit or _commit_of(found[split][0]))


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _cached_folder(name: str, revision: str | None) -> tuple[str, str]:
    """The folder of the hub's cache that holds this dataset, and its commit, which is the folder's name."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    return str(folder), folder.name


def _builder(folder: str, configuration: str | None, revision: str | None) -> Any:
    import datasets

    return datasets.load_dataset_builder(folder, configuration, revision=revision)


def _fetch(file: str) -> Path:
    """A file of the builder's list: a local path, or hf://datasets/OWNER/NAME@COMMIT/PATH."""
    if not file.startswith(SCHEME):
        return Path(file)
    from huggingface_hub import hf_hub_download

    repository, _, rest = file.removeprefix(SCHEME).partition("@")
    commit, _, path = rest.partition("/")
    return Path(hf_hub_download(repository, path, repo_type="dataset", revision=commit))


def _commit_of(file: str) -> str | None:
    return file.partition("@")[2].partition("/")[0] if file.startswith(SCHEME) else None


def _check_options(config: Any, files: list[str], where: str) -> None:
    """Refuse a configuration that asks for its files to be read in a way of its own, such as another delimiter."""
    is_tsv = all(kind_of(Path(file)) == ".tsv" for file in files)
    for option in fields(config):
        value = getattr(config, option.name)
        is_ours = option.name in HARMLESS or value == option.default or (is_tsv and value == "\t")
        if not is_ours and value is not None:
            hint = "download the files and convert them, e.g. to .jsonl"
            raise UserError(f"its files are to be read with {option.name}={value!r}, which is not built", where, hint)


@contextmanager
def _told_to_users(where: str) -> Iterator[None]:
    """What `datasets` and the hub raise, as UserError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except (LocalEntryNotFoundError, ConnectionError) as error:
        hint = "connect, or unset HF_HUB_OFFLINE; or download the files and name them in data.train"
        raise UserError("neither in the cache nor to be reached", where, hint) from error
    except (DatasetsError, HfHubHTTPError, FileNotFoundError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot be loaded: {first_line}", where, "check its name; is it private or gated?") from error
    except Exception as error:  # also of a card that is no YAML
        raise UserError(
            f"cannot be loaded: {type(error).__name__}: {error}", where, "see its page on the hub"
        ) from error
