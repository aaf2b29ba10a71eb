"""W&B's scalars: JSONString is text that holds JSON, JSON is plain JSON, DateTime ISO 8601 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from graphql import ConstValueNode, GraphQLError, GraphQLScalarType, GraphQLSchema, StringValueNode

from wbdist.protocol import jsonvalues


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise GraphQLError(f"a JSONString is a string that holds JSON, not {type(value).__name__}")
    return value


def _text_literal(node: ConstValueNode) -> str:
    if not isinstance(node, StringValueNode):
        raise GraphQLError("a JSONString is a string that holds JSON")
    return node.value


def _int64(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or abs(value) >= 2**63:
        raise GraphQLError(f"Int64 cannot represent {value!r}")
    return int(value)


def _duration(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise GraphQLError(f"a Duration is a number of milliseconds, not {value!r}")
    return int(value)


def iso(seconds: float) -> str:
    """A Unix time as W&B writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def install(schema: GraphQLSchema) -> None:
    """Gives the scalars of the SDL their behaviour."""

    def scalar(name: str) -> GraphQLScalarType:
        found = schema.type_map[name]
        assert isinstance(found, GraphQLScalarType)
        return found

    text = scalar("JSONString")
    text.coerce_input_value = _text
    text.coerce_input_literal = _text_literal
    scalar("JSON").coerce_output_value = jsonvalues.plain
    number = scalar("Int64")
    number.coerce_input_value = number.coerce_output_value = _int64
    scalar("Duration").coerce_input_value = _duration
    scalar("DateTime").coerce_output_value = iso
