"""Encoded images to arrays of uint8, (C, H, W).

Data sets that fit into the cache are decoded once: a PNG of 28 x 28 takes as long to decode as 100 such arrays to copy.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Pixels = npt.NDArray[np.uint8]

CACHE_BYTES = 1 << 28


@dataclass(slots=True)
class Stored:
    """An image as it is stored: encoded, (bytes,), or an array (H, W), (H, W, C) or (C, H, W)."""

    data: Pixels
    label: int
    where: tuple[Any, int]
    """The table's place and the row in it."""
    path: str | None

    def __len__(self) -> int:
        return self.data.size

    def __str__(self) -> str:
        place, row = self.where
        return self.path if self.path and "/" in self.path else place.row(row)


class Unreadable(ValueError):
    """An image that cannot be decoded."""


class Decoder:
    """Images of `channels`, scaled and cut to `size` where it is given. Raises Unreadable, which names the image."""

    def __init__(self, channels: int, size: int | None) -> None:
        self._channels = channels
        self._size = size
        self._cache: dict[int, Pixels] = {}
        self._room = CACHE_BYTES

    def decode(self, image: Stored) -> Pixels:
        """(C, H, W)."""
        if image.data.ndim > 1:
            return self._fitted(image)
        key = xxhash.xxh3_128_intdigest(image.data.data)
        pixels = self._cache.get(key)
        if pixels is None:
            pixels = self._decoded(image)
            if pixels.nbytes <= self._room:  # never emptied: the next epoch comes in another order
                self._room -= pixels.nbytes
                self._cache[key] = pixels
        return pixels

    def _decoded(self, image: Stored) -> Pixels:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(image.data.data)) as opened:
                return self._scaled(opened)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's PNG reader raises SyntaxError
            said = "in no known format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            said = said if image.data.size else "no such file, or no bytes in it"
            fix = "mend it, take it out of the source, or set data.on_unreadable to skip"
            raise Unreadable(f"data.source: {image}: no image that can be read ({said}); {fix}") from error

    def _fitted(self, image: Stored) -> Pixels:
        """An array, its channels first and as many as asked for."""
        pixels = image.data
        if pixels.ndim == 2:
            pixels = pixels[None]
        elif pixels.shape[0] not in (1, 3) and pixels.shape[2] in (1, 3):
            pixels = pixels.transpose(2, 0, 1)
        if pixels.shape[0] == self._channels and (self._size is None or pixels.shape[1:] == (self._size, self._size)):
            return pixels
        if pixels.shape[0] not in (1, 3):
            raise ValueError(f"data.source: {image}: an array of {image.data.shape}; it must be (H, W), or have 1 or 3 channels first or last")
        from PIL import Image

        return self._scaled(Image.fromarray(pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)))

    def _scaled(self, image: Any) -> Pixels:
        """A PIL image in the wanted channels and size: the shorter side is scaled to it, the middle cut out."""
        from PIL import Image

        image = image.convert("L" if self._channels == 1 else "RGB")
        if self._size is not None and image.size != (self._size, self._size):
            side = min(image.size)
            left, top = ((length - side) / 2 for length in image.size)
            box = (left, top, left + side, top + side)
            image = image.resize((self._size, self._size), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image)
        return pixels[None] if self._channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
