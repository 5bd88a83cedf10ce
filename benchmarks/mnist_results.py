"""How the results of `mnist.py` are shown: panels of images, and the tables of its parts."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import common
from common import table
from gibbsian.diagnostics.estimate import Estimate


def tiles(x: Tensor, columns: int) -> Any:
    """Images ``(n, 1, h, w)`` side by side, with a grey line between, as an array."""
    x = nn.functional.pad(x[: len(x) // columns * columns, 0].clamp(0, 255), (0, 1, 0, 1), value=128.0)
    n, height, width = x.shape
    grid = x.view(n // columns, columns, height, width).permute(0, 2, 1, 3)
    return grid.reshape(n // columns * height, columns * width).numpy()


def draw_panels(name: str, panels: Mapping[str, Any], across: int) -> None:
    """Write panels of tiles beside the results."""
    save_panels(common.RESULTS / f"mnist-{name}.png", panels, across)


def save_panels(path: Path, panels: Mapping[str, Any], across: int) -> None:
    """Write panels of tiles with titles, as a small grey PNG."""
    from matplotlib.figure import Figure
    from PIL import Image

    down = -(-len(panels) // across)
    height, width = next(iter(panels.values())).shape
    figure = Figure(figsize=(9.0, 9.0 / across * height / width * down + 0.3 * down), layout="constrained")
    spaces = figure.subplots(down, across, squeeze=False).ravel()
    for space in spaces:
        space.set_axis_off()
    for space, (title, picture) in zip(spaces, panels.items()):
        space.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        space.set_title(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("L").quantize(16).save(path, optimize=True)


def main_section(part: Mapping[str, Any]) -> str:
    """Tables of the first part."""
    seconds = part["seconds"]
    rows = []
    for name, distance in part["quality"].items():
        every = part["quality_all"].get(name)
        spent = f"{seconds[name] / 60:.1f}" if name in seconds else ""
        rows.append([name, Estimate(*distance), Estimate(*every) if every else "", spent])
    header = ["draws", f"FD, {part['chains']} draws", f"FD, {part['draws']} draws", "minutes"]
    told = (
        f"Training: {part['steps']} steps, {seconds['training'] / 60:.1f} minutes; {part['parameters']} parameters. "
        f"In all {sum(seconds.values()) / 60:.1f} minutes. The classifier is right on {part['accuracy']:.2%} of the "
        f"test rows. Annealed draws lie {part['nearest'][0]:.0f} grey levels from the nearest training row, test rows "
        f"{part['nearest'][1]:.0f}."
    )
    shown = ("![draws](mnist-draws.png)", "![chains](mnist-ages.png)")
    return "\n\n".join(("## Draws", told, table(header, rows), chain_table(part["chains at rest"]), *shown))


def chain_table(runs: Mapping[str, Any]) -> str:
    """What became of long-run chains with age."""
    rows = []
    for name, run in runs.items():
        for age, found in run["ages"].items():
            distance, shares = Estimate(*found["distance"]), (found["moved"], found["commonest"])
            rows.append([name, age, distance, *(f"{share:.0%}" for share in shares), f"{run['acceptance']:.2f}"])
    header = ["chains", "steps", "FD", "another digit than at first", "share of the commonest digit", "acceptance"]
    return table(header, rows)


def ood_section(part: Mapping[str, Any]) -> str:
    """AUROC of every score."""
    names = list(next(iter(part["pairs"].values())))
    rows = [[pair, *(Estimate(*found[k]) for k in names)] for pair, found in part["pairs"].items()]
    return "## Another data set\n\n" + table(["trained on", *(f"AUROC, {k}" for k in names)], rows) + minutes(part)


def heldout_section(part: Mapping[str, Any]) -> str:
    """AUPRC of every score and digit."""
    names = list(next(iter(part["digits"].values())))
    rows = [[digit, *(f"{found[k]:.3f}" for k in names)] for digit, found in part["digits"].items()]
    means = [sum(found[k] for found in part["digits"].values()) / len(rows) for k in names]
    rows.append(["mean", *(f"{m:.3f}" for m in means)])
    return "## A digit left out\n\n" + table(["digit", *(f"AUPRC, {k}" for k in names)], rows) + minutes(part)


def minutes(part: Mapping[str, Any]) -> str:
    """What a part took."""
    told = ", ".join(f"{k} {v / 60:.1f}" for k, v in part["seconds"].items())
    return f"\n\n{part['on']}. Minutes: {told}."
