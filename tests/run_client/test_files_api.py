"""Files of runs through the read API."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import wbdist
from wbdist.errors import CommError


def test_list_download_upload_delete(embedded: Path, own_directory: Path) -> None:
    """Proves W&B's names and rules: paging, names, pattern, root, replace, exist_ok, missing files, upload, delete."""
    (own_directory / "data").mkdir()
    for i in range(7):
        (own_directory / f"data/f{i}.bin").write_bytes(bytes([i]) * 10)
    with wbdist.init(project="p") as run:
        run.save("data/*")
    shutil.rmtree(own_directory / "data")
    found = wbdist.Api().run(run.path)
    listed = [file for file in found.files(per_page=3) if file.name.startswith("data/")]
    assert [(file.name, file.size) for file in listed] == [(f"data/f{i}.bin", 10) for i in range(7)]
    assert [file.name for file in found.files(pattern="data/f_.bin")] == [f"data/f{i}.bin" for i in range(7)]
    assert len(found.files(pattern="%f3%")) == 1
    assert [(file.name, file.md5 == "0") for file in found.files(["data/f1.bin", "none"])] == [
        ("data/f1.bin", False),
        ("none", True),
    ]

    file = found.file("./data/f1.bin")
    assert file.mimetype == "application/octet-stream"
    with file.download("here") as downloaded:
        assert (downloaded.name, downloaded.read()) == (str(own_directory / "here/data/f1.bin"), b"\1" * 10)
    with pytest.raises(ValueError, match="exist_ok"):
        file.download("here")
    (own_directory / "here/data/f1.bin").write_bytes(b"mine")
    assert file.download("here", exist_ok=True).read() == b"mine"
    assert file.download("here", replace=True).read() == b"\1" * 10
    with pytest.raises(CommError, match="none"):
        found.file("none").download("here")

    (own_directory / "sub").mkdir()
    (own_directory / "sub/empty.txt").touch()
    (own_directory / "sub/new.txt").write_text("uploaded later")
    assert found.upload_file("sub/empty.txt", root="sub").name == "empty.txt"
    uploaded = found.upload_file("sub/new.txt")
    assert (uploaded.name, uploaded.size) == ("sub/new.txt", 14)
    assert uploaded.download("here").read() == b"uploaded later"
    with pytest.raises(ValueError, match="name"):
        found.upload_file("sub/new.txt", root="here")
    uploaded.delete()
    assert found.file("sub/new.txt").md5 == "0"
    assert wbdist.Api().run(run.path).state == "finished"
