"""`save`: names, policies, snapshots, and files that reach the real server whatever is killed."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from support.lingering import kill_all, shippers_of
from support.waiting import until

import wbdist
from wbdist.protocol import files
from wbdist.protocol.files import RemoteFile
from wbdist.run.journal import Kind, Record

ROOT = Path(__file__).resolve().parents[2]
Journals = Callable[[], list[list[Record]]]


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def remote_files(run_id: str, project: str) -> dict[str, RemoteFile]:
    """What the server of the test has, by name."""
    api = wbdist.Api()
    page = files.read_run_files(api.execute(files.run_files(api.default_entity, project, run_id, limit=1000)))
    return {} if page is None else {file.name: file for file in page.files}


def file_records(records: list[Record]) -> list[dict[str, object]]:
    """Of what `save` was given."""
    return [record.data for record in records if record.kind is Kind.FILE and "source" in record.data]


@pytest.mark.usefixtures("offline")
def test_names_places_and_refusals(own_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves W&B's layout: relative structure, one directory of an absolute path, base_path, globs, ValueErrors."""
    (own_directory / "these/are").mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        (own_directory / "these/are" / name).write_text(name)
    (own_directory / "odd[1].bin").write_bytes(b"\0\xff")
    with wbdist.init(project="p") as run:
        place = Path(run.dir)
        assert run.save() is True
        assert run.save("these/are/*") == [str(place / "these/are/a.txt"), str(place / "these/are/b.txt")]
        assert run.save(b"./these/are/a.txt", base_path="these") == [str(place / "are/a.txt")]
        capsys.readouterr()
        assert run.save(own_directory / "these/are/b.txt") == [str(place / "are/b.txt")]
        assert "base_path" in capsys.readouterr().err
        assert run.save("odd[1].bin") == []
        assert run.save("odd[1].bin", glob=False) == [str(place / "odd[1].bin")]
        assert wbdist.save("nothing*") == []
        assert run.save("s3://bucket/x") == []
        (place / "own.txt").write_text("written into dir")
        assert run.save(str(place / "own.txt")) == [str(place / "own.txt")]
        assert (place / "are/a.txt").read_text() == "a.txt"
        for given, said in (
            ({"policy": "sometimes"}, "live, now, end"),
            ({"base_path": "elsewhere"}, "above"),
            ({"base_path": "these/are/a.txt"}, "not be the very path"),
        ):
            with pytest.raises(ValueError, match=said):
                run.save("these/are/a.txt", **given)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"begin with '\*'"):
            run.save("these/*/a.txt", base_path="these")
        with pytest.raises(ValueError, match="above"):
            run.save("../outside")
    with pytest.raises(wbdist.ShutdownError):
        run.save("these/are/a.txt")
    with wbdist.init(mode="disabled") as run:
        assert run.save("these/are/a.txt") is False


@pytest.mark.usefixtures("offline")
def test_what_a_call_saved_is_set_aside(own_directory: Path, journals: Journals) -> None:
    """Proves that a version outlives what the script does to its file, is not kept twice, and `end` is taken at the end."""
    path = own_directory / "state.bin"
    with wbdist.init(project="p") as run:
        path.write_bytes(b"first")
        run.save("state.bin")
        run.save("state.bin")
        path.write_bytes(b"second, longer")
        run.save("state.bin", policy="now")
        path.write_bytes(b"not saved")
        (own_directory / "last.txt").write_text("early")
        run.save("last.txt", policy="end")
        (own_directory / "last.txt").write_text("at the end")
        (own_directory / "live.txt").write_text("x")
        run.save("live.txt")
        (own_directory / "live.txt").write_text("changed")
        assert run.position().watermark.counts["files"] == {"rank0": 4}
    for name in ("state.bin", "last.txt", "live.txt"):
        (own_directory / name).unlink()
    (records,) = journals()
    kept = [(record["name"], Path(str(record["path"]))) for record in file_records(records)]
    contents = [(name, path.read_bytes() if path.exists() else None) for name, path in kept]
    assert contents == [
        ("state.bin", b"first"),
        ("state.bin", b"second, longer"),
        ("last.txt", None),
        ("live.txt", b"x"),
        ("last.txt", b"at the end"),
        ("live.txt", b"changed"),
    ]


def test_files_reach_the_server(embedded: Path, own_directory: Path) -> None:
    """Proves that finish leaves all of them there: empty, binary, larger than a block, changed by the script after `save`."""
    contents = {"empty": b"", "dir/a b%ü.bin": bytes(range(256)), "large": os.urandom(3 << 20)}
    for name, data in contents.items():
        (own_directory / name).parent.mkdir(exist_ok=True)
        (own_directory / name).write_bytes(data)
    run = wbdist.init(project="p")
    run.save("empty")
    run.save("dir/*", policy="now")
    run.save("large", policy="end")
    (own_directory / "log").write_text("one\n")
    run.save("log")
    until(lambda: "log" in remote_files(run.id, "p"), "the live file")
    (own_directory / "log").write_text("one\ntwo\n")  # and no other call of `save`
    until(lambda: remote_files(run.id, "p")["log"].md5 == md5(b"one\ntwo\n"), "the change")
    with (own_directory / "log").open("a") as log:
        log.write("three\n")
    run.finish()
    found = remote_files(run.id, "p")
    contents["log"] = b"one\ntwo\nthree\n"
    assert {name: found[name].md5 for name in contents} == {name: md5(data) for name, data in contents.items()}


def test_one_bad_file_fails_no_other(embedded: Path, own_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a file nobody can read is said, and that rows and the other files arrive all the same."""
    (own_directory / "good").write_text("good")
    (own_directory / "gone").write_text("gone")
    with wbdist.init(project="p") as run:
        run.log({"x": 1})
        run.save("gone", policy="end")
        run.save("good")
        (own_directory / "gone").unlink()
    assert "gone" in capsys.readouterr().err
    assert remote_files(run.id, "p")["good"].exists
    assert wbdist.Api().run(run.path).lastHistoryStep == 0


VICTIM = """
    import os, signal, sys, time
    import wbdist
    run = wbdist.init(project="p", id="victim")
    for i in range(int(sys.argv[1])):
        open("ck.bin", "wb").write(b"%d" % i * 1000)
        run.save("ck.bin")
        run.log({"i": i})
    open("late", "w").write("for the end")
    run.save("late", policy="end")
    open("ck.bin", "wb").write(b"half a fi")  # killed in the middle of writing the next one
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_a_killed_job_leaves_its_last_saved_version(embedded: Path, own_directory: Path, offline: bool) -> None:
    """Proves that after SIGKILL in the middle of writing, shipper dead too, `wbdist sync` brings what was saved last."""
    (own_directory / "victim.py").write_text(textwrap.dedent(VICTIM))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"WBDIST_MODE": "offline"} if offline else {})}
    with subprocess.Popen([sys.executable, "victim.py", "20"], cwd=own_directory, env=environment) as process:
        if not offline:
            until(lambda: shippers_of(own_directory / "wandb") or process.poll() is not None, "the shipper")
            kill_all(shippers_of(own_directory / "wandb"))
        assert process.wait(30) == -signal.SIGKILL
    command = [sys.executable, "-m", "wbdist", "sync", "wandb"]
    for _ in range(2):
        synced = subprocess.run(
            command, cwd=own_directory, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert synced.returncode == 0, synced.stdout + synced.stderr
    found = remote_files("victim", "p")
    assert found["ck.bin"].md5 == md5(b"19" * 1000)
    assert found["late"].md5 == md5(b"for the end")


def test_a_file_is_never_seen_half(embedded: Path, own_directory: Path) -> None:
    """Proves that versions saved in quick succession arrive whole and in order: the last one is what is there in the end."""
    with wbdist.init(project="p") as run:
        for i in range(30):
            (own_directory / "ck").write_bytes(b"%d" % i * 50_000)
            run.save("ck")
            run.log({"i": i})
    found = remote_files(run.id, "p")["ck"]
    assert (found.size, found.md5) == (100_000, md5(b"29" * 50_000))
