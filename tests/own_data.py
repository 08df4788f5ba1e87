"""Two folders of pictures and two TOML files, as a user would have them."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_own_data(
    root: Path,
    classes: int = 3,
    sizes: tuple[tuple[int, int], ...] = ((64, 48), (48, 64), (80, 40)),
    images: int = 8,
    target_labels: bool = True,
) -> tuple[str, str]:
    """Stripes of classes, dark in the source and bright in the target; sizes take turns. Returns the TOML files."""
    rng = np.random.default_rng(classes)
    for domain, brightness in (("source", 40), ("target", 90)):
        for folder in ("photos", "masks"):
            (root / domain / folder).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            width, height = sizes[number % len(sizes)]
            stripes = (np.arange(width) * 4 // width + number) % classes
            label = np.broadcast_to(stripes, (height, width)).astype(np.uint8)
            noise = rng.integers(0, 40, (height, width, 3))
            pixels = (brightness + label[..., None] * (100 // classes) + noise).astype(np.uint8)
            Image.fromarray(pixels).save(root / domain / "photos" / f"{number}.jpg")
            Image.fromarray(label).save(root / domain / "masks" / f"{number}.png")
    names = ", ".join(f'"class {index}"' for index in range(classes))
    labels = 'labels = "masks/*.png"\n'
    (root / "source" / "source.toml").write_text(f'images = "photos/*.jpg"\n{labels}classes = [{names}]\n')
    (root / "target" / "target.toml").write_text('images = "photos/*.jpg"\n' + (labels if target_labels else ""))
    return str(root / "source" / "source.toml"), str(root / "target" / "target.toml")
