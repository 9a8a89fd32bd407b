"""Draw what least-squares quantization does to values: where the levels go, and what is lost.

python examples/levels.py docs/levels.png
"""

import sys

import torch
from matplotlib import pyplot

import foldbit as fb

torch.manual_seed(0)
x = torch.randn(1_000_000)
figure, grid = pyplot.subplots(1, 3, figsize=(11, 3.2), sharey=True, layout="constrained")
titles = {"ls-1": "1 bit: ±v", "ls-T": "ternary: −2v, 0, 2v", "ls-2": "2 bits: ±v1 ± v2"}
for axes, (scheme, title) in zip(grid, titles.items(), strict=True):
    q = fb.quantize(x, scheme)
    axes.hist(x.numpy(), bins=200, range=(-4, 4), density=True, color="#c8d6e5")
    for level in q.values().unique().tolist():
        axes.axvline(level, ymax=0.9, color="#d55e00", linewidth=2)
        axes.annotate(f"{level:.2f}", (level, 0.42), ha="center", fontsize=9, color="#a04000")
    axes.set_title(f"{title}\nrelative squared error {q.error(x):.3f}", fontsize=11)
    axes.set_xlabel("value")
    axes.set_ylim(0, 0.46)
grid[0].set_ylabel("density")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "levels.png", dpi=110)
