"""Rehearsing preemptions on a machine that nobody takes away: metadata services on loopback, and what schedulers send.

Each simulator answers as its original does: paths, headers that are demanded, status codes, hanging requests, payloads.
`wbdist chaos` runs a job against one; our tests do the same.
"""
