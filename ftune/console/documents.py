"""JSON on stdout. It needs no rich, which takes longer to import than what asks for JSON takes to answer."""

import json
import sys
from collections.abc import Mapping
from typing import Any


def print_json(document: Mapping[str, Any]) -> None:
    """Exactly one JSON document on stdout. A number that JSON does not have (nan, inf) raises ValueError."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=True) + "\n")
    sys.stdout.flush()
