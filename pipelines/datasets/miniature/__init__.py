"""The miniature: rendered pairs of domains in the real datasets' layouts and encodings.

Deterministic by seed; every picture depends on (seed, domain, part, index) alone. The pair of domains was
calibrated on source-only, AdaBN and oracle runs and then frozen: whoever changes a picture must raise
`MINIATURE_VERSION`.
"""

from pipelines.datasets.miniature.write import MINIATURE_VERSION, SIZES, miniature_folder, write_miniature

__all__ = ["MINIATURE_VERSION", "SIZES", "miniature_folder", "write_miniature"]
