"""A folder of pictures, all of one size; folders inside it are classes."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np

from gibbsian.data.raw import Raw, count, listed
from gibbsian.errors import DataError, OptionError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")

GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def read_folder(folder: Path, choose: Any, labels: Any = None) -> Raw:
    """Read the pictures in a folder, or in the folders inside it, whose names are then the classes.

    Parameters
    ----------
    folder
        Where they are.
    choose
        A function from the number of pictures to the indices of those to read.
    labels
        One per picture, in the order of the sorted paths; or ``None``.

    Raises
    ------
    DataError
        If there are none, one cannot be read, or their sizes differ.
    """
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not _hidden(f.relative_to(folder)))
    paths = [f for f in files if f.suffix.lower() in SUFFIXES]
    others = [f.name for f in files if f.suffix.lower() not in SUFFIXES]
    if not paths:
        held = f"it holds {listed(others)}" if others else "it is empty"
        raise DataError(
            f"The folder {folder} has no pictures: {held}. Pictures end in {', '.join(SUFFIXES)}; for a table or an "
            "array give the path of the file itself."
        )
    if isinstance(labels, str):
        raise OptionError(
            f"A folder of pictures has no column {labels!r}. Put the pictures of each class into a folder of its own, "
            "or give one label per picture."
        )
    classes = _classes(folder, paths) if labels is None else labels
    if labels is not None and len(labels) != len(paths):
        raise DataError(f"The folder {folder} has {count(len(paths), 'picture')} but {count(len(labels), 'label')}.")
    chosen = choose(len(paths))
    x, notes = _stack(folder, [paths[i] for i in chosen])
    if len(chosen) < len(paths):
        notes.append(f"{len(chosen)} of the {len(paths)} pictures in {folder.name} were drawn at random.")
    if others:
        notes.append(
            f"{count(len(others), 'file')} in {folder.name} are no pictures and were passed over: {listed(others)}."
        )
    return Raw(
        name=folder.resolve().name,
        place=f"the folder {folder.name}",
        source=str(folder),
        x=x,
        labels=None if classes is None else [classes[i] for i in chosen],
        notes=tuple(notes),
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _classes(folder: Path, paths: list[Path]) -> list[str] | None:
    parts = [p.relative_to(folder).parts for p in paths]
    direct = sum(len(p) == 1 for p in parts)
    if 0 < direct < len(paths):
        raise DataError(
            f"Of the {len(paths)} pictures in {folder}, {direct} lie directly there and the others in folders inside "
            "it. Either put each class into a folder of its own, or all pictures into one."
        )
    names = [p[0] for p in parts]
    return None if direct or len(set(names)) == 1 else names


def _stack(folder: Path, paths: list[Path]) -> tuple[np.ndarray, list[str]]:
    """Read pictures into ``(n, channels, height, width)``, and notes on how."""
    pictures = [read_picture(p, _called(p, folder), folder) for p in paths]
    sizes = [p.shape[:2] for p in pictures]
    for i, size in enumerate(sizes):
        if size != sizes[0]:
            raise DataError(
                f"The pictures in {folder} are of different sizes: {_called(paths[0], folder)} is "
                f"{sizes[0][1]} x {sizes[0][0]} and {_called(paths[i], folder)} is {size[1]} x {size[0]} (width x "
                f"height); {sum(s != sizes[0] for s in sizes)} of {len(sizes)} differ from the first. Scale or crop "
                "all to one size."
            )
    depths = {p.dtype for p in pictures}
    if depths == {np.dtype(bool), np.dtype(np.uint8)}:
        # Pure black and white among greys: 1 means white.
        pictures = [p * np.uint8(255) if p.dtype == bool else p for p in pictures]
    elif len(depths) > 1:
        i = next(i for i, p in enumerate(pictures) if p.dtype != pictures[0].dtype)
        raise DataError(
            f"The pictures in {folder} are of different depths: {_called(paths[0], folder)} has "
            f"{pictures[0].dtype} pixels and {_called(paths[i], folder)} {pictures[i].dtype}. Save all alike."
        )
    notes = []
    colour = [p.shape[2] == 3 for p in pictures]
    if any(colour) and not all(colour):
        notes.append(f"{len(colour) - sum(colour)} of {len(colour)} pictures are grey; they were read as colour.")
        pictures = [p if p.shape[2] == 3 else np.repeat(p, 3, axis=2) for p in pictures]
    return np.moveaxis(np.stack(pictures), 3, 1), notes


def read_picture(path: Path | IO[bytes], called: str, folder: Path) -> np.ndarray:
    """Read one picture as ``(height, width, 1 or 3)``.

    Parameters
    ----------
    path
        The file, or its content.
    called, folder
        How messages name it, and where it is.

    Raises
    ------
    DataError
        If it cannot be read, is transparent, or is several.
    """
    from PIL import Image, ImageOps

    try:
        # Filters of warnings belong to the whole process, and pictures are also read by several threads.
        with Image.open(path) as file:
            if Image.MAX_IMAGE_PIXELS is not None and file.width * file.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{file.width} x {file.height} pixels")
            frames = getattr(file, "n_frames", 1)
            file.load()
            picture = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        empty = isinstance(path, Path) and path.exists() and path.stat().st_size == 0
        reason = "it is empty" if empty else (str(error).splitlines() or ["no reason given"])[0]
        raise DataError(
            f"The picture {called} in {folder} cannot be read ({reason}). It may be truncated or of another format "
            "than its name says; remove it or save it again."
        ) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"The picture {called} in {folder} is far too large to learn from ({error}).") from error
    if frames > 1:
        raise DataError(f"{called} in {folder} holds {frames} pictures; save each as a file of its own.")
    return _pixels(picture, called, folder)


def _pixels(picture: Any, called: str, folder: Path) -> np.ndarray:
    """Turn any of Pillow's modes into grey or colour values, without changing their scale."""
    mode = picture.mode
    if mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info:
        alpha = np.asarray(picture.convert("RGBA"))[:, :, 3]
        if alpha.min() < 255:
            raise DataError(
                f"The picture {called} in {folder} is transparent in {int((alpha < 255).sum())} of {alpha.size} "
                "pixels, which have no colour to learn. Paste it onto a background and save it without transparency."
            )
        opaque = picture.convert("L" if mode in ("1", "L", "LA", "La") else "RGB")
        return np.asarray(opaque).reshape(*alpha.shape, -1)
    if mode in ("1", "L", "F"):
        return np.asarray(picture)[:, :, None]
    if mode in GREY_16:
        values = np.asarray(picture)
        # Some releases of Pillow read 16-bit greys into 32 bits.
        fits = values.min() >= 0 and values.max() <= 65535
        return (values.astype(np.uint16) if fits else values.astype(np.float32))[:, :, None]
    return np.asarray(picture.convert("RGB"))


def _called(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))
