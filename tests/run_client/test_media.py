"""What rows hold beside numbers: arrays, histograms, images, tables, pages; the files they leave and the records of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from support.journals import read_all

import wbdist
from wbdist.run.journal import Kind, Record

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def run() -> wbdist.Run:
    return wbdist.init(project="p", settings={"quiet": True})


def records(run: wbdist.Run, *kinds: Kind) -> list[Record]:
    assert run.journal_path is not None
    return [record for record in read_all(run.journal_path) if record.kind in kinds]


def last_row(run: wbdist.Run) -> dict[str, Any]:
    return records(run, Kind.ROW)[-1].data


def content(run: wbdist.Run, record: dict[str, Any]) -> bytes:
    """The record's file; proves that size and digest are the file's, and that it is in the journal to be uploaded."""
    path = Path(run.dir) / record["path"]
    data = path.read_bytes()
    assert (record["size"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    journaled = [(r.data["path"], r.data["name"], r.data["policy"]) for r in records(run, Kind.FILE)]
    assert (str(path), record["path"], "now") in journaled
    return data


def test_arrays_of_any_library(run: wbdist.Run) -> None:
    """Proves W&B's forms: one element a number, up to 32 a list, more a histogram of 32 bins without what is not finite."""
    values = np.append(np.arange(100.0), [np.nan, np.inf])
    run.log(
        {
            "one": torch.ones(1, requires_grad=True),
            "few": torch.arange(4).reshape(2, 2),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "many": values,
            "grad": torch.zeros(5, 7, requires_grad=True),
            "list": list(range(40)),
            "set": {1},
            "bytes": b"x",
            "texts": np.array(["a"] * 40),
        }
    )
    row = last_row(run)
    assert (row["one"], row["few"], row["half"], row["set"], row["bytes"]) == (1.0, [[0, 1], [2, 3]], [1.0, 1.0, 1.0], [1], "x")
    assert (row["list"], row["texts"]) == (list(range(40)), ["a"] * 40)
    assert row["many"]["_type"] == "histogram"
    assert (sum(row["many"]["values"]), len(row["many"]["values"]), len(row["many"]["bins"])) == (100, 32, 33)
    assert sum(row["grad"]["values"]) == 35


def test_histogram(run: wbdist.Run) -> None:
    """Proves its defaults, numpy's form, and what is refused."""
    run.log({"h": wbdist.Histogram([1, 2, 2, 3], num_bins=2), "n": wbdist.Histogram(np_histogram=np.histogram([1, 2], bins=3))})
    assert last_row(run)["h"] == {"_type": "histogram", "values": [1, 3], "bins": [1.0, 2.0, 3.0]}
    assert len(last_row(run)["n"]["bins"]) == 4
    assert len(wbdist.Histogram(torch.rand(1000)).histogram) == 64
    for arguments in ({"num_bins": 513}, {}, {"np_histogram": ([1, 2], [0, 1])}, {"sequence": ["a", "b"]}):
        with pytest.raises(wbdist.UsageError):
            wbdist.Histogram(**{"sequence": None, **arguments})


def test_images(run: wbdist.Run, tmp_path: Path) -> None:
    """Proves pixels, tensors, PIL images and files as images, their records, and that the pixels are those given."""
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    run.log({"val/a": wbdist.Image(pixels, caption="c")}, step=7)
    record = last_row(run)["val/a"]
    assert {key: record[key] for key in ("_type", "format", "width", "height", "caption")} == {
        "_type": "image-file", "format": "png", "width": 3, "height": 2, "caption": "c",
    }  # fmt: skip
    assert record["path"] == f"media/images/val/a_7_{record['sha256'][:20]}.png"
    content(run, record)
    assert (np.asarray(PIL.Image.open(Path(run.dir) / record["path"])) == pixels).all()

    saved = tmp_path / "given.jpg"
    PIL.Image.new("RGB", (5, 4)).save(saved)
    run.log(
        {
            "tensor": wbdist.Image(torch.full((1, 4, 6), 300.0)),
            "pil": PIL.Image.new("RGBA", (2, 2)),
            "jpg": wbdist.Image(PIL.Image.new("RGBA", (2, 2)), file_type="jpg"),
            "file": wbdist.Image(saved),
            "nested": {"x": [wbdist.Image(pixels, caption="1"), wbdist.Image(pixels[:, :, 0])]},
        }
    )
    row = last_row(run)
    assert np.asarray(PIL.Image.open(Path(run.dir) / row["tensor"]["path"])).tolist() == [[255] * 6] * 4
    assert PIL.Image.open(Path(run.dir) / row["jpg"]["path"]).format == "JPEG"
    assert (row["file"]["width"], row["file"]["height"], content(run, row["file"])) == (5, 4, saved.read_bytes())
    many = row["nested.x"]
    assert (many["_type"], many["count"], many["width"], many["height"], many["captions"]) == (
        "images/separated", 2, 3, 2, ["1", None],
    )  # fmt: skip
    assert all((Path(run.dir) / name).is_file() for name in many["filenames"])
    assert many["filenames"][0].startswith("media/images/nested.x_7_")


class Figure:
    """As matplotlib's, as far as it matters."""

    def savefig(self, target: Any, format: str) -> None:
        PIL.Image.new("RGB", (8, 9)).save(target, format=format)


Figure.__module__ = "matplotlib.figure"


def test_figures(run: wbdist.Run) -> None:
    """Proves that a figure is drawn, given as an image or just logged."""
    run.log({"a": wbdist.Image(Figure()), "b": Figure()})
    assert [(last_row(run)[key]["width"], last_row(run)[key]["height"]) for key in "ab"] == [(8, 9), (8, 9)]


def test_tables_and_pages(run: wbdist.Run) -> None:
    """Proves a table's file and record from every source, media in its cells, and HTML."""
    table = wbdist.Table(columns=["n", "x"])
    table.add_data(1, float("nan"))
    table.add_data(2, wbdist.Image(np.zeros((2, 2))))
    frame = pd.DataFrame({"a": [1, 2], "when": pd.to_datetime(["2026-01-01", "2026-01-02"])})
    run.log({"t": table, "frame": frame, "html": wbdist.Html("<b>x</b>"), "array": wbdist.Table(data=np.eye(2))})
    row = last_row(run)
    assert (row["t"]["_type"], row["t"]["ncols"], row["t"]["nrows"]) == ("table-file", 2, 2)
    assert row["t"]["path"] == f"media/table/t_0_{row['t']['sha256'][:20]}.table.json"
    cells = json.loads(content(run, row["t"]))["data"]
    assert repr(cells[0]) == "[1, nan]"
    assert cells[1][1]["_type"] == "image-file"
    content(run, cells[1][1])
    assert json.loads(content(run, row["frame"])) == {
        "columns": ["a", "when"],
        "data": [[1, "2026-01-01 00:00:00"], [2, "2026-01-02 00:00:00"]],
    }
    assert (row["html"]["_type"], content(run, row["html"])) == ("html-file", b"<b>x</b>")
    assert json.loads(content(run, row["array"])) == {"columns": ["col_0", "col_1"], "data": [[1.0, 0.0], [0.0, 1.0]]}
    with pytest.raises(wbdist.UsageError, match="2 columns"):
        table.add_data(1)


def test_a_bad_value_beside_media_keeps_nothing(run: wbdist.Run) -> None:
    """Proves that neither row nor file is journaled when another value of the call cannot be logged, or its step has passed;
    and that a key cannot lead out of the run's files."""
    picture = wbdist.Image(np.zeros((2, 2)))
    with pytest.raises(TypeError, match="bad"):
        run.log({"picture": picture, "bad": object()})
    run.log({"a": 1}, step=3)
    run.log({"picture": picture}, step=1)
    assert records(run, Kind.FILE) == []
    assert (run.step, run.dropped_rows) == (3, 1)
    run.log({"../../etc/x": picture})
    assert last_row(run)["../../etc/x"]["path"].startswith("media/images/etc/x_3_")


def test_summary_and_config(run: wbdist.Run) -> None:
    """Proves that the summary takes media by hand, and that a config refuses them."""
    run.summary["best"] = wbdist.Image(np.zeros((2, 2)))
    assert content(run, run.summary["best"])
    run.summary["weights"] = np.arange(50)
    assert run.summary["weights"]["_type"] == "histogram"
    with pytest.raises(TypeError, match="media"):
        run.config["h"] = wbdist.Histogram([1])


def test_a_disabled_run_takes_media() -> None:
    """Proves that media need no run that keeps them."""
    with wbdist.init(mode="disabled") as off:
        off.log({"a": wbdist.Image(np.zeros((2, 2)))})
        off.summary["b"] = wbdist.Image(np.zeros((2, 2)))


class OnDevice:
    """A scalar on an accelerator: each `item()` waits for what is queued there."""

    waits = 0

    def numel(self) -> int:
        return 1

    def item(self) -> float:
        type(self).waits += 1
        return 0.5


def test_a_value_on_a_device_is_read_once(run: wbdist.Run) -> None:
    """Proves that one logged value costs one transfer, and none when the call is dropped."""
    run.log({"loss": OnDevice(), "step": 3}, step=5)
    assert OnDevice.waits == 1
    run.log({"loss": OnDevice()}, step=2)
    assert OnDevice.waits == 1
