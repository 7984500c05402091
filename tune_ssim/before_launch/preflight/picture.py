"""What preflight looked at, as one picture: images, samples, the fit of the targets, the flow loss by t, gradients."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tune_ssim.before_launch.preflight.images import Seen
from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.targets import fit_of_shifts
from tune_ssim.trials.training import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, GAP, SIDE = 6, 2, 48  # images in a row; pixels between them; fewest pixels of one
INK, LINE, BAD = "#1d2733", "#2a78c8", "#c8323c"  # as in the other pictures


@dataclass
class Album:
    """What the checks look at before the first step. training_images: of step 1, for the targets of the same step."""

    sample: Sample | None = None
    seen: Seen | None = None
    training_images: Tensor | None = None


def draw(album: Album, checks: Sequence[Check]) -> bytes:
    """PNG; empty if there is nothing to show."""
    from matplotlib.figure import Figure

    rows = rows_of(album)
    if not rows:
        return b""
    figure = Figure(figsize=(11.5, 0.6 + 0.98 * max(len(rows), 5)), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(1.45, 1))
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    for axes, (title, images) in zip(left.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes.imshow(_strip(images), interpolation="nearest", aspect="equal")
        axes.set_axis_off()
        axes.set_title(title, loc="left", fontsize=8.5, color=INK, pad=2)
    shifts, flow, gradients = right.subplots(3, 1)
    _draw_shifts(shifts, album)
    _draw_flow(flow, album.seen)
    _draw_gradients(gradients, checks)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def rows_of(album: Album) -> list[tuple[str, Tensor]]:
    """Titles and images `[n, 3, H, W]`, of those that there are. The first two show the same crops, as do all of inference."""
    seen, sample = album.seen, album.sample
    found: list[tuple[str, Tensor | None]] = [("training images of step 1", album.training_images)]
    if seen is not None:
        found += [
            ("targets of the image losses, same step", seen.all_targets),
            ("targets at low t", seen.targets),
            ("their predictions, decoded", seen.decoded),
        ]
    if sample is not None:
        found += [
            ("held out: inputs", sample.inputs),
            ("held out: truth", sample.references),
            ("held out: the truth through the autoencoder", sample.reconstructions),
            ("held out: samples of step 0", sample.images),
        ]
    return [(title, images) for title, images in found if images is not None and len(images)]


def _strip(images: Tensor) -> Any:
    """`[H, W, 3]`: the first images side by side. Pixels that are not finite are magenta."""
    shown = images[:COLUMNS].detach().float().cpu()
    magenta = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    shown = torch.where(torch.isfinite(shown).all(dim=1, keepdim=True), shown.nan_to_num().clamp(0, 1), magenta)
    if shown.shape[-1] < SIDE:  # so that low-resolution inputs are drawn as large as the others
        shown = functional.interpolate(shown, scale_factor=math.ceil(SIDE / shown.shape[-1]), mode="nearest")
    padded = functional.pad(shown, (0, GAP, 0, 0), value=1.0)
    padded = functional.pad(padded, (0, 0, 0, 0, 0, 0, 0, COLUMNS - len(padded)), value=1.0)
    return torch.cat(list(padded), dim=2).permute(1, 2, 0).numpy()


def _draw_shifts(axes: Axes, album: Album) -> None:
    seen, images = album.seen, album.training_images
    if seen is None or (images is None and not len(seen.targets)):
        _say(axes, "fit of the targets: not known")
        return
    what, x, y = "predictions at low t", seen.decoded, seen.targets
    if images is not None and images.shape[1:] == seen.all_targets.shape[1:]:
        what, x, y = "training images", images.float().cpu(), seen.all_targets[: len(images)]
    fits = fit_of_shifts(x, y).cpu().numpy()
    down, right = (size // 2 for size in fits.shape)
    axes.imshow(fits, extent=(-right - 0.5, right + 0.5, down + 0.5, -down - 0.5), cmap="Blues", vmin=0, vmax=1)
    best = divmod(int(fits.argmax()), fits.shape[1])
    dy, dx = best[0] - down, best[1] - right
    colour = LINE if (dy, dx) == (0, 0) else BAD
    axes.plot(0, 0, "+", color=INK, ms=14)
    axes.plot(dx, dy, "o", color=colour, mfc="none", ms=12, mew=2)
    said = "best without a shift" if (dy, dx) == (0, 0) else f"shifted: {dx:+d} right, {dy:+d} down"
    axes.set_anchor("W")
    _titled(axes, f"targets against\n{what}:\n{said}", colour)
    axes.set_xlabel("pixels right", fontsize=8, color=INK)
    axes.set_ylabel("pixels down", fontsize=8, color=INK)


def _draw_flow(axes: Axes, seen: Seen | None) -> None:
    if seen is None or not len(seen.flow):
        _say(axes, "flow loss by t: the clean latent is not shown")
        return
    t, errors = seen.flow.T.numpy()
    axes.plot(t, errors, "o", color=LINE, ms=3.5, alpha=0.7)
    axes.set(xlim=(0, 1), yscale="log")
    axes.set_xlabel("t (0 clean, 1 noise)", fontsize=8, color=INK)
    _titled(axes, "flow loss of each sample")


def _draw_gradients(axes: Axes, checks: Sequence[Check]) -> None:
    names = ("ssim/precision", "gradient/main", "gradient/ssim", "gradient/pixel", "update/descent", "update/fresh")
    chosen = [check for name in names for check in checks if check.name == name and "cosine" in check.evidence]
    if not chosen:
        _say(axes, "directions of gradients: not known")
        return
    colours = [BAD if check.status == "bad_setup" else LINE for check in chosen]
    axes.barh([check.name for check in chosen], [check.evidence["cosine"] for check in chosen], color=colours, height=0.6)
    axes.axvline(0, color=INK, lw=0.8)
    axes.invert_yaxis()
    axes.set(xlim=(-1.05, 1.05))
    _titled(axes, "direction: cosine to what is expected")


def _titled(axes: Axes, title: str, colour: str = INK) -> None:
    axes.set_title(title, loc="left", fontsize=8.5, color=colour)
    axes.tick_params(labelsize=7.5, colors=INK)


def _say(axes: Axes, words: str) -> None:
    axes.set_axis_off()
    axes.text(0, 0.5, words, fontsize=8.5, color=INK, transform=axes.transAxes)
