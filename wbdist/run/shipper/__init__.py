"""The shipper: one process a host and journal root that brings journals to servers (docs/architecture.md, "Shipper").

Training processes talk to it through `client` only; `python -m wbdist.run.shipper` runs it.
"""
