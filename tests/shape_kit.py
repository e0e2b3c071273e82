"""Turns of conversations and rows that are shaped or refused, for the tests of shapes."""

import copy

import pytest

from ftune.data.fields import BadRow
from ftune.data.shapes import normalize

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"name": "f", "parameters": {"type": "object"}}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def said(speaker, value, **more):
    return {"from": speaker, "value": value, **more}


ASKED, ANSWERED = turn("user", "q"), turn("assistant", "a")


def messages(*turns, **columns):
    return normalize({"messages": list(turns), **columns}, "messages", {})


def sharegpt(*turns, **columns):
    return normalize({"conversations": list(turns), **columns}, "sharegpt", {})


def refusal(fields, shape, columns=None):
    """What a refused row is told; the row is not refused by changing it."""
    before = copy.deepcopy(fields)
    with pytest.raises(BadRow) as caught:
        normalize(fields, shape, columns or {})
    assert fields == before
    return f"{caught.value} {caught.value.hint}"
