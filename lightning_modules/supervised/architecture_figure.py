"""A drawing of an architecture: blocks from left to right, scales from top to bottom, a line for each path."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_modules.networks.topology import OPERATIONS, PRUNED, paths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#999999", "#D55E00", "#0072B2", "#009E73", "#CC79A7")  # of Okabe and Ito's colors, by the number of the operation


def architecture_figure(architecture: Sequence[str], dimensions: int) -> "Figure":
    """Nodes are scales before and after a block; a kept path has the color and the number of its operation, others are dotted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks, depths = len(architecture), (len(architecture[0]) + 2) // 3
    figure = Figure(figsize=(2.5 + 1.1 * blocks, 1.5 + 0.8 * depths), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for block, row in enumerate(architecture):
        for (source, to), character in zip(paths(depths), row, strict=True):
            if character == PRUNED:
                ax.plot([block, block + 1], [source, to], color="#dddddd", linestyle=":", linewidth=1, zorder=0)
                continue
            color = COLORS[int(character)]
            ax.plot([block, block + 1], [source, to], color=color, linewidth=2, zorder=1)
            at = 0.3 if to == source else 0.22  # crossing lines have their numbers apart
            ax.text(block + at, source + at * (to - source), character, color=color, fontsize=8, ha="center", va="center", zorder=3,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    for number, name in enumerate(OPERATIONS[dimensions]):
        ax.plot([], [], color=COLORS[number], linewidth=2, label=f"{number}: {name}")
    ax.scatter(
        *zip(*((block, scale) for block in range(blocks + 1) for scale in range(depths)), strict=True), s=40, color="black", zorder=2
    )
    ax.set(xlabel="after block", ylabel="scale", xticks=range(blocks + 1), yticks=range(depths), ylim=(depths - 0.6, -0.4))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
