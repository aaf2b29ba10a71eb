"""Offline segments of one run: whatever order they are synced in, and however often, the server shows the same in the end."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.examples import examples

import wbdist
from wbdist.core.position import CONSOLE, HISTORY
from wbdist.run import lifecycle
from wbdist.run.handle import Run
from wbdist.run.init import make_spec
from wbdist.run.journal import JournalReader, Kind, find_journals
from wbdist.run.shipper.oneshot import ship
from wbdist.run.shipper.remote import Answer, Remote
from wbdist.server.app import create_app
from wbdist.server.auth import Auth
from wbdist.server.context import AppContext
from wbdist.server.files import FileStore
from wbdist.server.keys import open_key_ring
from wbdist.server.settings import ServerSettings
from wbdist.server.store import open_store
from wbdist.settings import resolve

log = logging.getLogger("test.segments")


class Segment(msgspec.Struct, frozen=True):
    """One offline run of the same id."""

    how: Literal["resume", "rewind"]
    at: float
    """Where a rewind goes back to, as a part of what there is."""
    rows: int
    facts: dict[str, Any]
    config: dict[str, int]
    end: Literal["exit 0", "exit 1", "killed", "preempted"]


segments = st.lists(
    st.builds(
        Segment,
        how=st.sampled_from(["resume", "resume", "rewind"]),
        at=st.floats(0, 1),
        rows=st.integers(0, 4),
        facts=st.fixed_dictionaries(
            {},
            optional={
                "name": st.sampled_from("AB"),
                "notes": st.sampled_from("xy"),
                "tags": st.sampled_from([["t"], ["u", "v"]]),
                "group": st.sampled_from("gh"),
            },
        ),
        config=st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), max_size=2),
        end=st.sampled_from(["exit 0", "exit 1", "killed", "preempted"]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(autouse=True, scope="module")
def _no_files_of_its_own() -> Iterator[None]:
    """Lines are what is proven here; config.yaml and the like would only be uploaded, again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_keep_own_files", lambda *_: None)
        yield


class InProcess(Remote):
    """The real server's app, without sockets."""

    def __init__(self, client: TestClient, key: str) -> None:
        super().__init__("http://testserver", key)
        self._client = client

    def post(self, path: str, body: bytes) -> Answer:
        answer = self._client.post(path, content=body, headers={"Content-Type": "application/json"}, auth=("api", self.api_key))
        return Answer(answer.status_code, answer.content, None, self.api_key)

    def close(self) -> None:
        """Keeps the app: the next journal wants it, too."""


class Server:
    """One empty server."""

    def __init__(self, directory: Path) -> None:
        options = ServerSettings()
        self.store = open_store(f"sqlite:///{directory / 'runs.db'}")
        clock = itertools.count(1000.0).__next__
        context = AppContext(
            store=self.store,
            auth=Auth(open_key_ring(directory, options.entity), options, clock),
            files=FileStore(directory / "files"),
            settings=options,
            clock=clock,
            base_url="http://testserver",
        )
        self.remote = InProcess(TestClient(create_app(context)), (directory / "admin.key").read_text().strip())

    def sync(self, *paths: Path) -> None:
        for result in ship(paths, lambda _: self.remote, 30.0, log):
            assert result.outcome in {"complete", "fenced", "current"}, result

    def shows(self) -> dict[str, Any]:
        run = self.store.get_run("local", "p", "x")
        assert run is not None
        kept = ("display_name", "state", "config", "summary", "group", "notes", "tags", "attempt", "line_counts", "last_step")
        attempts = [
            {key: value for key, value in msgspec.structs.asdict(entry).items() if key not in {"started_at", "ended_at"}}
            for entry in self.store.attempts(run.pk)
        ]
        return {
            **{key: getattr(run, key) for key in kept},
            "rows": self.store.history(run.pk),
            "console": self.store.console(run.pk),
            "attempts": attempts,
            "archive": [self.store.history(run.pk, attempt=entry["attempt"]) for entry in attempts],
        }

    def close(self) -> None:
        self.store.close()


@contextmanager
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as directory:
        made = Server(Path(directory))
        try:
            yield made
        finally:
            made.close()


def write(root: Path, plan: list[Segment]) -> list[Path]:
    """Makes the segments with our own client; one journal each, in the order they were made."""
    reached = -1
    for number, segment in enumerate(plan):
        rewinds = segment.how == "rewind" and reached >= 0
        where = {"resume_from": f"x?_step={int(segment.at * reached)}"} if rewinds else {"id": "x", "resume": "allow"}
        run = wbdist.init(
            project="p",
            entity="local",
            dir=root,
            mode="offline",
            config={**segment.config, "n": number},
            settings={"silent": True, "console": "off"},
            **where,
            **segment.facts,
        )
        for row in range(segment.rows):
            run.log({"segment": number, "row": row, f"only_{number}": row})
            run._keep_line(f"line {row} of {number}", "stdout")
        if number % 2:
            run.summary["by_hand"] = number
        reached = run.step - 1
        if segment.end == "preempted":
            run.mark_preempting()
        run.finish({"exit 0": 0, "exit 1": 1, "killed": 0, "preempted": 75}[segment.end])
        if segment.end == "killed":
            forget_the_end(run.journal_path)
    return sorted(find_journals(root / "wandb"), key=lambda path: int(path.stem.rpartition(".a")[2]))


def forget_the_end(path: Path | None) -> None:
    """Makes a journal what SIGKILL leaves: one that ends without END."""
    assert path is not None
    with JournalReader.open(path) as reader:
        data, size = reader.frames(max_bytes=1 << 26)
        assert reader.read(1 << 26)[-1].kind is Kind.END
        length = 8
        at = 0
        while True:
            length = 8 + int.from_bytes(data[at : at + 4], "little")
            if at + length == len(data):
                break
            at += length
    assert size == path.stat().st_size
    os.truncate(path, size - length)


@settings(max_examples=examples(5, 40), deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=segments, data=st.data())
def test_the_order_of_segments_makes_no_difference(plan: list[Segment], data: st.DataObject) -> None:
    """Proves that random segments (resumed, rewound, killed, preempted), synced in random order with repetitions, one by one
    or together, leave the server with exactly what syncing them in order does; and that syncing all once more changes nothing.
    """
    root = Path(tempfile.mkdtemp())
    try:
        paths = write(root, plan)
        with server() as reference, server() as other:
            reference.sync(*paths)
            expected = reference.shows()
            reference.sync(*paths)
            assert reference.shows() == expected
            order = data.draw(st.permutations([*paths, *data.draw(st.lists(st.sampled_from(paths), max_size=3))]))
            for path in order:
                other.sync(path)
            assert other.shows() == expected
            assert len(expected["rows"]) == expected["line_counts"].get(HISTORY, 0)
            assert len(expected["console"]) == expected["line_counts"].get(CONSOLE, 0)
    finally:
        assert lifecycle.active_runs() == []
        shutil.rmtree(root)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_of_a_plain_line_of_resumes_is_lost(seed: int, tmp_path: Path) -> None:
    """Proves what the segments' own arithmetic says: every row of every resumed segment, once, in order, whoever died."""
    ends: list[Any] = ["killed", "exit 0", "preempted", "exit 1"]
    plan = [Segment("resume", 0, rows, {}, {}, ends[(rows + seed) % 4]) for rows in (3, 1, 2, 4)]
    paths = write(tmp_path, plan)
    with server() as one:
        for path in [*paths[::-1], paths[seed]]:
            one.sync(path)
        rows = one.shows()["rows"]
    assert [row["_step"] for row in rows] == list(range(10))
    assert [(row["segment"], row["row"]) for row in rows] == [(i, row) for i, n in enumerate((3, 1, 2, 4)) for row in range(n)]


@pytest.mark.parametrize("order", ["12", "21", "1212", "2112"])
def test_a_second_writer_of_an_attempt(order: str, tmp_path: Path) -> None:
    """Proves the same for an attempt that a second writer took over from a first one, which was killed (an aggregator)."""
    spec = make_spec(resolve({"silent": True, "mode": "offline", "project": "p", "run_id": "x", "root_dir": str(tmp_path)}))
    spec = msgspec.structs.replace(spec, nonce="n", entity="local", capture_console=False, config={"a": 1})
    first = lifecycle.open_run(spec)
    for row in range(3):
        first.log({"row": row, "only_first": row})
    first.summary["by_hand"] = 1
    first.finish(0)
    forget_the_end(first.journal_path)
    second = lifecycle.open_run(msgspec.structs.replace(spec, writer="rank0.1", base=None))
    for row in range(3, 6):
        second.log({"row": row}, step=row)
    second.finish(0)
    paths = {"1": first.journal_path, "2": second.journal_path}
    with server() as one, server() as other:
        one.sync(*(path for path in paths.values() if path is not None))
        for name in order:
            path = paths[name]
            assert path is not None
            other.sync(path)
        assert other.shows() == one.shows()
        assert (one.shows()["state"], [row["_step"] for row in one.shows()["rows"]]) == ("finished", list(range(6)))
