"""Images in a folder or a zip laid out `split/class/image`, decoded to one array. Nothing is extracted or executed."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "test", "val", "valid")
MAX_FILE_BYTES = 1 << 28
"""A single image file larger than this is refused before it is read."""

_GREY, _COLOUR = {"1", "L", "LA", "La"}, {"RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}
# by contents, not by suffix; not all that Pillow knows: it has Ghostscript run what an EPS says
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

Image = NDArray[np.uint8]  # [channels, height, width]


@dataclass(frozen=True)
class Files:
    """The images of a data set in order (training images first, then by class and name), not read yet.

    entries: names as the folder or zip has them; labels [n], the first num_train of them training images.
    """

    place: Path
    entries: list[str]
    labels: NDArray[np.int64]
    num_train: int
    classes: tuple[str, ...]

    def decode(self, size: int | None, channels: int | None, key: str) -> Image:
        """Decode all: uint8 [n, channels, height, width]; ValueError names the first image that does not fit.

        size: height and width after bilinear resizing (None: all must have the same); channels: None keeps grey
        images grey unless others have colour.
        """
        # one after the other: threads take turns with the interpreter more than they decode, and at 32x32 pixels
        # two of them took twice as long as one
        with _Reader(self.place, key) as read:
            out: Image | None = None
            for row, entry in enumerate(self.entries):
                image = _decode(read(entry), size, channels, f"{key}: {self.place}: {entry}")
                out = self._fitting(out, image, entry, key)
                out[row] = image
        assert out is not None
        return out

    def _fitting(self, out: Image | None, image: Image, entry: str, key: str) -> Image:
        """The array that all images go to: made for the first, widened for the first with colour."""
        if out is None:
            try:
                return np.empty((len(self.entries), *image.shape), dtype=np.uint8)
            except MemoryError:
                raise ValueError(
                    f"{key}: {self.place}: {len(self.entries)} images of {image.shape} do not fit into memory; "
                    "set task.data.size"
                ) from None
        (h0, w0), (h, w) = out.shape[2:], image.shape[1:]
        if (h, w) != (h0, w0):
            raise ValueError(
                f"{key}: {self.place}: images differ in size: {self.entries[0]} is {w0}x{h0} and {entry} is "
                f"{w}x{h}; set task.data.size (e.g. task.data.size={min(h0, w0, h, w)}) to bring all to one"
            )
        if len(image) > out.shape[1]:  # grey is the same in three channels
            return np.broadcast_to(out, (len(out), len(image), h, w)).copy()
        return out


def find(place: Path, key: str) -> Files:
    """List the images below a folder or in a zip; ValueError says how the layout differs from `split/class/image`."""
    with _Reader(place, key) as read:
        parts = {entry: entry.split("/") for entry in read.names() if _is_image(entry)}
    tops = {p[0] for p in parts.values()}
    if len(tops) == 1 and not tops & set(SPLITS):
        parts = {entry: p[1:] for entry, p in parts.items()}
    found = sorted({p[0] for p in parts.values() if len(p) > 1})
    test = next((s for s in SPLITS[1:] if s in found), None)
    if "train" not in found or test is None:
        raise ValueError(
            f"{key}: {place} must be laid out split/class/image with the splits train and test (or val, valid); "
            f"its folders with images are: {', '.join(found[:8]) or 'none'}"
        )
    for entry, p in parts.items():
        if p[0] in ("train", test) and len(p) != 3:
            raise ValueError(f"{key}: {place}: {entry} does not lie in split/class/image; move it")
    names: dict[str, dict[str, list[str]]] = {"train": {}, test: {}}
    for entry in sorted(parts):
        split = names.get(parts[entry][0])
        if split is not None:
            split.setdefault(parts[entry][1], []).append(entry)
    classes = tuple(sorted(names["train"]))
    strange = sorted(set(names[test]) - set(classes))
    if strange:
        raise ValueError(
            f"{key}: {place}: class {strange[0]!r} is in {test} and not in train; add training images or remove it"
        )
    rows = [
        (entry, label)
        for split in ("train", test)
        for label, name in enumerate(classes)
        for entry in names[split].get(name, [])
    ]
    labels = np.array([label for _, label in rows], dtype=np.int64)
    entries = [entry for entry, _ in rows]
    return Files(place, entries, labels, sum(map(len, names["train"].values())), classes)


def stats(place: Path, key: str) -> list[tuple[str, os.stat_result]]:
    """Name and state of every file that decoding depends on: the zip, or all images below the folder."""
    try:
        if not place.is_dir():
            return [(place.name, place.stat())]
        files = ((path.relative_to(place).as_posix(), path) for path in _files_below(place))
        return [(entry, path.stat()) for entry, path in files if _is_image(entry)]
    except OSError as error:
        raise ValueError(f"{key}: {error.filename} cannot be read ({error.strerror}); correct or remove it") from None


def _files_below(folder: Path) -> list[Path]:
    return sorted(Path(at, name) for at, _, names in os.walk(folder) for name in names)


def _is_image(entry: str) -> bool:
    *folders, name = entry.split("/")
    hidden = name.startswith(".") or "__MACOSX" in folders
    return not hidden and os.path.splitext(name)[1].lower() in SUFFIXES


class _Reader:
    """A folder or a zip: names of its files, with /, and the bytes of one."""

    def __init__(self, place: Path, key: str) -> None:
        self._place, self._key = place, key
        self._zip: zipfile.ZipFile | None = None

    def __enter__(self) -> _Reader:
        if not self._place.is_dir():
            try:
                self._zip = zipfile.ZipFile(self._place)
            except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
                raise ValueError(
                    f"{self._key}: {self._place} cannot be read as a zip ({error}); get it again, or name a folder"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def names(self) -> list[str]:
        """All files, in no particular order."""
        if self._zip is not None:
            return [info.filename for info in self._zip.infolist() if not info.is_dir()]
        return [path.relative_to(self._place).as_posix() for path in _files_below(self._place)]

    def __call__(self, entry: str) -> bytes:
        try:
            # never more than the bound, whatever the zip claims of its entries
            with self._zip.open(entry) if self._zip else (self._place / entry).open("rb") as file:
                data: bytes = file.read(MAX_FILE_BYTES + 1)
        except Exception as error:  # zipfile: BadZipFile, zlib.error, NotImplementedError, RuntimeError ...
            raise ValueError(
                f"{self._key}: {self._place}: {entry} cannot be read ({error}); get the data again"
            ) from None
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"{self._key}: {self._place}: {entry} is larger than {MAX_FILE_BYTES} bytes; remove it")
        return data


def _decode(data: bytes, size: int | None, channels: int | None, where: str) -> Image:
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with Pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
            most = Pillow.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:  # Pillow itself refuses at twice as many
                raise ValueError(f"{image.width}x{image.height} pixels are more than {most}")
            if image.mode not in _GREY | _COLOUR:
                raise ValueError(f"mode {image.mode} has more than 8 bits; convert it to 8 bits a channel")
            grey = channels == 1 or (channels is None and image.mode in _GREY)
            pixels: Any = image.convert("L" if grey else "RGB")
            if size is not None and pixels.size != (size, size):
                pixels = pixels.resize((size, size), Pillow.Resampling.BILINEAR)
            array = np.asarray(pixels, dtype=np.uint8)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError ...
        said = f"it is no {', '.join(_FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{where} cannot be decoded ({said}); replace it, or remove it") from None
    return array[None] if grey else array.transpose(2, 0, 1)
