"""Rows that hold media -> rows of records, with the files written. For the calls of `log` that need it, and only these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wbdist.run.media.base import Media, Place
from wbdist.run.media.image import Image
from wbdist.run.media.table import Table
from wbdist.run.values import is_foreign_media


def converted(data: Mapping[Any, Any], step: int | str, files: Path) -> tuple[dict[Any, Any], dict[str, Path]]:
    """`data` with records in place of media, and the files written below `files`: name -> path. Figures, PIL images and data
    frames become media first. Raises OSError, and what the media raise."""
    written: dict[str, Path] = {}
    return _converted(data, "", lambda key: Place(files, key, step, written)), written


def _converted(data: Mapping[Any, Any], prefix: str, place_of: Callable[[str], Place]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key, value in data.items():
        path = f"{prefix}{key}"
        place = place_of(path)
        if isinstance(value, Mapping) and "_type" not in value:
            made[key] = _converted(value, f"{path}.", place_of)
        elif isinstance(value, list | tuple) and value and all(_is_media(item) for item in value):
            items = [_as_media(item) for item in value]
            kind = type(items[0])
            alike = all(type(item) is kind for item in items)
            made[key] = kind.records(items, place) if alike else [item.record(place) for item in items]
        elif _is_media(value):
            made[key] = _as_media(value).record(place)
        else:
            made[key] = value
    return made


def _is_media(value: Any) -> bool:
    return isinstance(value, Media) or is_foreign_media(value)


def _as_media(value: Any) -> Media:
    if isinstance(value, Media):
        return value
    return Table(dataframe=value) if hasattr(value, "itertuples") else Image(value)
