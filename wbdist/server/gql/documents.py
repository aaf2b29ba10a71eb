"""Parsed and validated documents, kept: clients send the same few texts for ever.

Measured on this stack with UpsertBucket: parse and validate 2.9 ms, execute alone 0.1 ms.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from graphql import DocumentNode, GraphQLError, GraphQLSchema, parse, validate

MAX_DOCUMENT = 64 * 2**10
"""Characters; W&B's largest is about 8 000."""
_MAX_TOKENS = 4000
"""Validation compares fields pairwise; this bounds its time whatever the text."""


class DocumentCache:
    """Thread-safe LRU of valid documents, keyed by the SHA-256 of their text."""

    def __init__(self, schema: GraphQLSchema, size: int = 256) -> None:
        self._schema = schema
        self._size = size
        self._documents: OrderedDict[bytes, DocumentNode] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> DocumentNode | list[GraphQLError]:
        """The document, or what is wrong with it. Errors are not kept: they would push out good documents."""
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            found = self._documents.get(key)
            if found is not None:
                self._documents.move_to_end(key)
                return found
        if len(text) > MAX_DOCUMENT:
            return [GraphQLError(f"the query has {len(text)} characters; at most {MAX_DOCUMENT} are allowed")]
        try:
            document = parse(text, no_location=False, max_tokens=_MAX_TOKENS)
            errors = validate(self._schema, document)
        except GraphQLError as error:
            return [error]
        except RecursionError:
            return [GraphQLError("the query is nested too deeply")]
        if errors:
            return errors
        with self._lock:
            self._documents[key] = document
            while len(self._documents) > self._size:
                self._documents.popitem(last=False)
        return document
