"""What a byte a class costs ProDA's soft labels, which were published in four.

    python -m bench.soft_labels --run RUN        a finished run of recipe proda

Soft labels of the warm-up's weights, denoised with features and prototypes of those after denoising, as at the end of
that stage with labels made once: from float32, from float16 and from steps of 1/255. Counted is the share of points of
the grid whose label is another than from float32, over all target images, and among them those whose class wins by less
than a hundredth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.checkpoints import kept_stages
from models.networks.build import Build
from models.networks.proda import Proda
from models.networks.segmenter import upsample
from models.prototypes import class_distances, prototype_weights, rectify
from models.uncertainty import quantise
from pipelines.label_rules import PrototypeRule
from pipelines.options import read_config
from pipelines.setup import resolve
from pipelines.weights import load_initial

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/soft-labels.json"
CLOSE = 0.01
PRECISIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "float16": (2, lambda soft: soft.half().float()),
    "uint8": (1, lambda soft: quantise(soft).float() / 255),
}


@torch.no_grad()
def measure(run: str) -> dict[str, object]:
    """Shares of changed labels by precision, and bytes of a soft label."""
    setup = resolve(read_config(run), to_train=False)
    first, second = (Build(setup.preset.network)() for _ in range(2))
    assert isinstance(second, Proda)
    for (_, path), network in zip(kept_stages(setup.plan.folder), (first, second), strict=False):
        load_initial(str(path), network)
        network.eval()
    rule = setup.labels[1].rule
    assert isinstance(rule, PrototypeRule)
    schedule, reader = setup.preset.stages[1], setup.target_reader
    size = (schedule.target_size[1], schedule.target_size[0])
    changed, close, points, cells = dict.fromkeys(PRECISIONS, 0), dict.fromkeys(PRECISIONS, 0), 0, 0
    for index in range(len(reader)):
        image = torch.from_numpy(np.array(reader.read(index, schedule.target_size)))[None]
        soft, feature = first(setup.prepare(image, first)).main.softmax(1), second(setup.prepare(image, second)).feature
        cells = soft[0].numel()
        near = prototype_weights(class_distances(upsample(feature, size), second.prototypes), rule.temperature)
        product = upsample(soft, size) * near
        best, following = (product / product.sum(1, keepdim=True)).topk(2, dim=1).values.unbind(1)
        exact, _ = rectify(upsample(soft, size), near)
        points += exact.numel()
        for name, (_, rounded) in PRECISIONS.items():
            other = rectify(upsample(rounded(soft), size), near)[0] != exact
            changed[name] += int(other.sum())
            close[name] += int((other & (best - following < CLOSE)).sum())
    return {
        "images": len(reader),
        "points": points,
        "bytes": {"float32": 4 * cells, **{name: size * cells for name, (size, _) in PRECISIONS.items()}},
        "changed": {name: count / points for name, count in changed.items()},
        "of_which_close": {name: close[name] / max(1, count) for name, count in changed.items()},
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = measure(given.run)
    print(json.dumps(found, indent=1))
    given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
