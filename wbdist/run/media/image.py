"""`Image`: a picture, from pixels or a file."""

from __future__ import annotations

import io
import logging
import os
from typing import Any, ClassVar

from wbdist.errors import UsageError
from wbdist.run.media.base import Media, Place, existing
from wbdist.run.media.histogram import as_array

logger = logging.getLogger("wbdist.run")

FORMATS = ("png", "jpg", "jpeg", "bmp")
MAX_MANY = 108
"""Pictures of one list; W&B's page shows no more."""


class Image(Media):
    """A picture. `data_or_path`: an array (height, width[, channels]) or a tensor ([channels, ]height, width) of values from 0
    to 255, a PIL image, a matplotlib figure, or the path of a file. Needs Pillow (`pip install wbdist[media]`), but for a path.

    `mode`: PIL's ("L", "RGB", "RGBA"), guessed from the channels. `file_type`: png, jpg, jpeg or bmp. The pixels are encoded at
    once, so the array may be changed afterwards. Raises UsageError for what is no picture.
    """

    many = "images/separated"
    folder: ClassVar[str] = "images"

    def __init__(
        self,
        data_or_path: Any,
        mode: str | None = None,
        caption: str | None = None,
        grouping: int | None = None,
        file_type: str | None = None,
        **unsupported: Any,
    ) -> None:
        if given := [name for name, value in unsupported.items() if value is not None]:
            raise UsageError(f"Image({given[0]}=...) is not supported: masks, boxes and classes are not drawn by wbdist")
        self.caption = caption
        self.grouping = grouping
        self.width: int | None = None
        self.height: int | None = None
        self._content: Any
        if isinstance(data_or_path, str | os.PathLike):
            self._content = existing(data_or_path, "Image()")
            self.format = (file_type or self._content.suffix.lstrip(".") or "png").lower()
            self._measure_file()
        else:
            self.format = (file_type or "png").lower()
            if self.format not in FORMATS:
                raise UsageError(f"Image(file_type={file_type!r}): choose of {', '.join(FORMATS)}")
            self._content = self._encoded(data_or_path, mode)

    def record(self, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {"_type": "image-file", **place.put(self.folder, f".{self.format}", self._content)}
        facts = {"format": self.format, "width": self.width, "height": self.height}
        facts |= {"caption": self.caption, "grouping": self.grouping}
        return found | {name: value for name, value in facts.items() if value is not None}

    @classmethod
    def records(cls, values: list[Any], place: Place) -> Any:
        if len(values) > MAX_MANY:
            logger.warning("%d images in one list: only the first %d are kept", len(values), MAX_MANY)
        kept = [value.record(place) for value in values[:MAX_MANY]]
        first = kept[0]
        found = {
            "_type": cls.many,
            "width": first.get("width"),
            "height": first.get("height"),
            "format": first["format"],
            "count": len(kept),
            "filenames": [record["path"] for record in kept],
        }
        captions = [record.get("caption") for record in kept]
        return found if captions == [None] * len(kept) else {**found, "captions": captions}

    def _encoded(self, data: Any, mode: str | None) -> bytes:
        pil = _pillow()
        buffer = io.BytesIO()
        if (figure := _figure(data)) is not None:
            figure.savefig(buffer, format=self.format)
            self.width, self.height = pil.open(io.BytesIO(buffer.getvalue())).size
            return buffer.getvalue()
        picture = data if isinstance(data, pil.Image) else _picture(pil, data, mode)
        if self.format in {"jpg", "jpeg"} and picture.mode not in {"L", "RGB"}:
            picture = picture.convert("RGB")
        self.width, self.height = picture.size
        picture.save(buffer, format="JPEG" if self.format == "jpg" else self.format.upper())
        return buffer.getvalue()

    def _measure_file(self) -> None:
        """A file is logged as it is; its measures are told when Pillow is there and knows the format."""
        try:
            import PIL.Image

            with PIL.Image.open(self._content) as picture:
                self.width, self.height = picture.size
        except (ImportError, OSError):
            return


def _figure(data: Any) -> Any:
    """matplotlib's: a figure, what is drawn in one (axes), or `pyplot`, whose current figure it is."""
    if callable(current := getattr(data, "gcf", None)):
        return current()
    candidates = (data, getattr(data, "figure", None))
    return next((found for found in candidates if callable(getattr(found, "savefig", None))), None)


def _picture(pil: Any, data: Any, mode: str | None) -> Any:
    import numpy as np

    channels_first = callable(getattr(data, "detach", None))
    try:
        pixels = as_array(data)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Image() takes an array, a tensor, a PIL image, a figure or a path: {error}") from error
    if channels_first and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim > 2:
        while pixels.ndim > 3 and pixels.shape[0] == 1:
            pixels = pixels[0]
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
    if pixels.ndim not in {2, 3} or pixels.dtype.kind not in "fiub" or (pixels.ndim == 3 and pixels.shape[-1] not in {3, 4}):
        raise UsageError(
            f"Image() cannot be made of {pixels.dtype} of shape {pixels.shape}: give (height, width), (height, width, 3 or 4), "
            "or a tensor with the channels first"
        )
    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels, nan=0.0)
    picture = pil.fromarray(np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    return picture.convert(mode) if mode and mode != picture.mode else picture


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise UsageError("Image() of pixels needs Pillow: pip install wbdist[media]") from error
    return PIL.Image
