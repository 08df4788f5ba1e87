"""Writers of the real encodings, independent of the code under test."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def _paeth(a: int, b: int, c: int) -> int:
    p = a + b - c
    distances = (abs(p - a), abs(p - b), abs(p - c))
    return (a, b, c)[distances.index(min(distances))]


def write_rgb16(path: Path, pixels: np.ndarray, filters: tuple[int, ...] = (0,)) -> None:
    """A 16-bit RGB PNG, row i with filter filters[i % len], byte by byte as the PNG specification says."""
    height, width, _ = pixels.shape
    rows = [b"".join(struct.pack(">3H", *map(int, p)) for p in row) for row in pixels]
    out = bytearray()
    above = bytes(width * 6)
    for y, row in enumerate(rows):
        kind = filters[y % len(filters)]
        out.append(kind)
        for i, value in enumerate(row):
            a = row[i - 6] if i >= 6 else 0
            b, c = above[i], (above[i - 6] if i >= 6 else 0)
            predicted = (0, a, b, (a + b) // 2, _paeth(a, b, c))[kind]
            out.append((value - predicted) & 255)
        above = row
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(out))), (b"IEND", b"")):
            file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))


def write_image(path: Path, width: int = 8, height: int = 6) -> np.ndarray:
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_palette(path: Path, ids: np.ndarray) -> None:
    """An 8-bit palette PNG whose colours say nothing about the ids."""
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette([(7 * i + 3) % 256 for i in range(768)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_gray(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint8)).save(path)


def write_rgba(path: Path, ids: np.ndarray) -> None:
    """An RGBA PNG with the id in the first channel only."""
    pixels = np.full((*ids.shape, 4), 99, np.uint8)
    pixels[:, :, 0] = ids
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
