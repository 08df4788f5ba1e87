"""One share of a miniature, rendered in a process of its own (see `write.write_miniature`)."""

import sys
from pathlib import Path

from pipelines.datasets.miniature.write import render_share

if __name__ == "__main__":
    name, size, seed, root, share, shares = sys.argv[1:]
    render_share(name, size, int(seed), Path(root), int(share), int(shares))
