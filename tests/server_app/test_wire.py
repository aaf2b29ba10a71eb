"""The wire's values: what goes in comes out, and what other servers say is understood."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wbdist.protocol import file_stream, jsonvalues, operations
from wbdist.protocol.attempts import Ended, StreamAnswer, StreamStamp
from wbdist.protocol.file_stream import FileChunk, StreamReply, StreamRequest

names = st.sampled_from(["wandb-history.jsonl", "output.log", "wandb-summary.json"])
text = st.text(st.characters(exclude_categories=["Cs"]))
chunks = st.builds(FileChunk, content=st.lists(text), offset=st.integers(0, 2**53))
stamps = st.builds(
    StreamStamp,
    attempt=st.integers(1, 1000),
    nonce=text,
    writer=text,
    seq=st.dictionaries(names, st.integers(0, 2**40)),
    ended=st.none() | st.builds(Ended, cause=st.sampled_from(["exit", "lost", "preempted"])),
)
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
    max_leaves=10,
)


@given(
    st.builds(
        StreamRequest,
        files=st.dictionaries(names, chunks),
        preempting=st.booleans(),
        complete=st.booleans(),
        exitcode=st.none() | st.integers(-255, 255),
        wbdist=st.none() | stamps,
    )
)
def test_a_request_survives_the_wire(request: StreamRequest) -> None:
    """Proves that encoding loses nothing, in particular `exitcode` 0 beside an absent one."""
    assert file_stream.decode_request(file_stream.encode_request(request)) == request


@given(values)
def test_plain_json_is_strict_and_lenient_json_is_exact(value: Any) -> None:
    """Proves that `plain` never leaves what a strict parser refuses, and that JSONStrings keep every float."""
    json.dumps(jsonvalues.plain(value), allow_nan=False)
    again = jsonvalues.loads(jsonvalues.dumps(value))
    assert repr(again) == repr(value)


def test_what_other_servers_answer() -> None:
    """Proves that foreign or broken answers count as empty, and that error texts are found in all their forms."""
    for body in (b"", b"<html>", b"[]", b'{"limits": {}}', b'{"stopped": "maybe"}'):
        assert file_stream.decode_reply(body) == StreamReply()
    assert file_stream.decode_reply(b'{"stopped": true, "exitcode": null}').stopped
    gap = StreamReply(error="x", wbdist=StreamAnswer(code="gap", next={"output.log": 3}))
    assert file_stream.decode_reply(file_stream.encode_reply(gap)) == gap
    for body in (b'{"errors":[{"message":"m"}]}', b'{"error":"m"}', b'{"error":{"message":"m"}}'):
        assert operations.error_message(body) == "m"
    assert operations.error_message(b"<html>") == operations.error_message(b"{}") == ""


def test_numbers_beyond_64_bits() -> None:
    """Proves that no integer of a client can break an answer."""
    assert jsonvalues.plain([2**64, -(2**63), 10**400, True]) == [float(2**64), -(2**63), "Infinity", True]


@pytest.mark.parametrize("body", [b"[]", b'{"files": []}', b'{"files": {"a": {"offset": -1}}}', b'{"exitcode": 1.5}', b"\xff"])
def test_requests_that_are_none(body: bytes) -> None:
    """Proves that a body of another shape is a ValueError that names the field."""
    with pytest.raises(ValueError, match="not a file_stream request"):
        file_stream.decode_request(body)
    assert math.isinf(jsonvalues.loads("-Infinity"))
