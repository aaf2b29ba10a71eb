"""What the journal says of an artifact to log."""

from __future__ import annotations

import msgspec

STAGED = "staged-artifacts"
"""Directory of contents that wait for the shipper, beside `files`."""


class ArtifactRecord(msgspec.Struct, omit_defaults=True):
    """Payload of an ARTIFACT record: one artifact to log."""

    staged: str
    """Directory that holds `manifest.json` and each file's contents, called by its number in the manifest."""
    name: str
    type: str
    client_id: str
    digest: str
    aliases: list[str] = []
    description: str | None = None
    metadata: str = "{}"
    """JSON."""
    step: int | None = None
