"""Files -> bytes and lines, unpacked and decoded on the way, in bounded memory. Called by the readers of rows."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ftune.errors import Problem, UserError

LONGEST_ROW = 64 * 2**20
"""Bytes (of a list in a .json file: characters) that one row may have; more is a file without line breaks."""


def _open_zstandard(path: Path) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


UNPACKERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def kind_of(path: Path) -> str:
    """The suffix that tells the format, without that of the compression: `.jsonl` for `rows.jsonl.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in UNPACKERS else suffix


@contextmanager
def unreadable_as_user_error(path: Path) -> Iterator[None]:
    """Turns what goes wrong between the disk and the parser into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError("no such file", str(path), "relative paths are relative to the recipe") from error
    except EOFError as error:
        raise UserError("the compressed file is cut off", str(path), "fetch or write it again") from error
    except (zlib.error, lzma.LZMAError) as error:
        raise UserError(f"cannot be unpacked: {error}", str(path), "fetch or write it again") from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", str(path)) from error


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The unpacked bytes of a file behind its byte order mark, and how long that was (0 or 3 bytes).

    UserError where they cannot be had, or are UTF-16.
    """
    with unreadable_as_user_error(path), closing(UNPACKERS.get(path.suffix.lower(), _open_plain)(path)) as stream:
        start = stream.peek(4)[:4]
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"not UTF-8: byte 0 is {start[0]:#04x}, as in UTF-16", str(path), "save it as UTF-8")
        if start.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
            yield stream, len(codecs.BOM_UTF8)
        else:
            yield stream, 0


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb", buffering=2**20)


def not_utf8(error: UnicodeDecodeError, offset: int, place: str) -> Problem:
    """`offset` is that of the error's first byte in the unpacked file."""
    return Problem(f"not UTF-8: byte {offset} is {error.object[error.start]:#04x}", place, "save it as UTF-8")


def read_lines(path: Path) -> Iterator[tuple[int, str | Problem]]:
    r"""Each line with its number from 1 and its line break, which is \n or \r\n and nothing else.

    A Problem stands in the place of a line that is not UTF-8 or longer than LONGEST_ROW.
    """
    with open_bytes(path) as (stream, start):
        number = 0
        while line := stream.readline(LONGEST_ROW + 1):
            number += 1
            length = len(line)
            if length > LONGEST_ROW:
                while not line.endswith(b"\n") and (line := stream.readline(LONGEST_ROW)):
                    length += len(line)
                what = f"a line of {length:,} bytes, more than {LONGEST_ROW:,}"
                yield number, Problem(what, f"{path}, line {number}", "put each row on a line of its own")
            else:
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    yield number, not_utf8(error, start + error.start, f"{path}, line {number}")
            start += length
