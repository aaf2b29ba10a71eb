"""The wire between client and server as values: messages in, messages out; no sockets, no clock.

W&B's own wire, plus our optional fields (docs/architecture.md, "One wire").
"""
