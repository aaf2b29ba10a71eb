"""`Html`: a page of HTML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wbdist.errors import UsageError
from wbdist.run.media.base import Media, Place


class Html(Media):
    """A page. `data`: its text, an open file, or the path of an `.html` file. `inject` (W&B's style) has no effect."""

    many = "html"

    def __init__(self, data: Any, inject: bool = True, data_is_not_path: bool = False) -> None:
        del inject
        may_be_path = isinstance(data, str | os.PathLike) and not data_is_not_path
        if may_be_path and os.fspath(data).endswith(".html") and Path(data).is_file():
            self.html = Path(data).read_text(encoding="utf-8")
        elif hasattr(data, "read"):
            self.html = str(data.read())
        elif isinstance(data, str):
            self.html = data
        else:
            raise UsageError(f"Html() takes text, an open file or the path of an .html file, not {type(data).__name__}")

    def record(self, place: Place) -> dict[str, Any]:
        return {"_type": "html-file", **place.put("html", ".html", self.html.encode())}

    @classmethod
    def records(cls, values: list[Any], place: Place) -> Any:
        return {"_type": cls.many, "count": len(values), "html": [value.record(place) for value in values]}
