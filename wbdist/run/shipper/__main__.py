"""`python -m wbdist.run.shipper --root DIR`: the shipper of a `wandb` directory. Started by online runs; see `service`."""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import sys
from pathlib import Path

import msgspec

import wbdist.run.shipper.without_ssl  # noqa: F401  (before what imports http.client)
from wbdist.run.shipper.control import Request, decode_request
from wbdist.run.shipper.delivery import Pace
from wbdist.run.shipper.service import Limits, Service


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: everything delivered, or another instance serves, or nothing more could be done (see the log)."""
    parser = argparse.ArgumentParser(
        prog="python -m wbdist.run.shipper",
        description="Send the journals below DIR to their servers, until nothing is left to send.",
        epilog="example: python -m wbdist.run.shipper --root ./wandb",
    )
    parser.add_argument(
        "--root", type=Path, required=True, metavar="DIR", help="the wandb directory that holds the run directories"
    )
    parser.add_argument(
        "--stdin", action="store_true", help="read one request (a JSON line, see control.py) from standard input first"
    )
    parser.add_argument(
        "--linger",
        type=float,
        default=Limits().linger,
        metavar="S",
        help="stay this long after the last delivery (%(default)s s)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=Limits().grace,
        metavar="S",
        help="try this long when no writer lives and the server is away (%(default)s s)",
    )
    parser.add_argument(
        "--heartbeat",
        type=float,
        default=Pace().heartbeat,
        metavar="S",
        help="say at least this often that a run lives (%(default)s s)",
    )
    options = parser.parse_args(argv)
    if not options.root.is_dir():
        parser.error(f"--root {options.root} is not a directory")
    first: Request | None = None
    if options.stdin:
        try:
            first = decode_request(sys.stdin.buffer.readline())
        except msgspec.DecodeError as error:
            parser.error(f"standard input is not a request: {error}")
    log = logging.getLogger("wbdist.shipper")
    directory = options.root / "logs"
    directory.mkdir(exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(directory / "shipper.log", maxBytes=1 << 20, backupCount=1, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(process)d %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    service = Service(options.root, log, Pace(heartbeat=options.heartbeat), Limits(linger=options.linger, grace=options.grace))
    try:
        return service.run(first)
    except BaseException:
        log.exception("the shipper fails")
        raise


if __name__ == "__main__":
    sys.exit(main())
