"""Files of rows, written and read by the tests of readers."""

import json
from pathlib import Path

from ftune.data.rows import read_rows

TEXTS = [{"prompt": 'a "b", é\u2028\n2', "completion": "x\ty"}, {"prompt": "", "completion": "  z"}]


def fields(path: Path) -> list:
    return [row.fields for row in read_rows(path)]


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_lines(rows, ending: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + ending for row in rows)
