"""Image losses on the decoded z0 prediction: gate → decode → crop → attenuate → loss (notes 000 §2, 001 §7).

    z0 prediction ─gate: 0 < t ≤ max_t─► decode (once, in chunks) ─► crop ─┬─ scale, clamp ─► [0, 1] ─► 1 − SSIM
                                                                          └──────────────► [0, 1] ─► mean square

Each loss has its own gate. Both share one decoder pass, while the notes decode twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tune_ssim.losses.balance import any_rank, balanced_weight
from tune_ssim.losses.schedules import NO_CLAMP, Adaptive, Schedule, read_schedule, written_schedule
from tune_ssim.losses.structural import ssim_loss

Size = tuple[int, int]


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Identity in the forward pass; multiplies the gradient by `scale` in the backward pass (note 000 §2.4).

    `scale`: a finite number ≥ 0; values above 1 amplify. Raises ValueError otherwise.
    """
    _require_non_negative("scale_gradient: scale", scale)
    scaled: Tensor = _ScaleGradient.apply(x, float(scale))
    return scaled


def clamp_gradient(x: Tensor, limit: float) -> Tensor:
    """Identity in the forward pass; clamps every gradient element to `[−limit, limit]` in the backward pass (note 001 §7).

    Infinite gradients become ±`limit`; NaN stays NaN. Raises ValueError unless `limit` > 0.
    """
    if not limit > 0:
        raise ValueError(f"clamp_gradient: limit={limit!r}; expected a number > 0")
    clamped: Tensor = _ClampGradient.apply(x, float(limit))
    return clamped


class _ScaleGradient(torch.autograd.Function):
    # The formula of the notes, x.detach() + scale·(x − x.detach()), turns inf into NaN and adds rounding errors.
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.scale, None


class _ClampGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.clamp(-ctx.limit, ctx.limit), None


@dataclass(frozen=True)
class DecodedLossResult:
    """The result of one `DecodedLoss` call.

    A loss is None if its weight is 0 or no sample passed its gate, because a 0 would read as a perfect score. The losses are
    unweighted means over the active samples and are still attached to the graph.
    """

    total: Tensor  # weighted sum, 0-d; an exact 0 connected to the prediction if no sample is active
    loss_ssim: Tensor | None
    loss_pixel: Tensor | None
    ssim_active_count: int  # active samples; 0 if the weight is 0
    ssim_active_fraction: float  # active samples over the batch size, conditioning images included
    pixel_active_count: int
    pixel_active_fraction: float
    decoded: Tensor | None  # decoder output before cropping, on the graph; hook it to observe the gradient into the decoder
    decoded_index: tuple[int, ...]  # batch indices of the samples in `decoded`
    ssim_loss_weight: float | Tensor | None = None  # weight of this step, if it is not the same at every step

    def metrics(self) -> dict[str, float | Tensor]:
        """Metrics to log. Tensors are detached and stay on their device. A loss that is None has no key."""
        numbers: dict[str, float | Tensor] = {
            "ssim_active_fraction": self.ssim_active_fraction,
            "pixel_active_fraction": self.pixel_active_fraction,
        }
        if self.loss_ssim is not None:
            numbers["loss_ssim"] = self.loss_ssim.detach()
        if self.loss_pixel is not None:
            numbers["loss_pixel"] = self.loss_pixel.detach()
        if self.ssim_loss_weight is not None:
            numbers["ssim_loss_weight"] = self.ssim_loss_weight
        return numbers


@dataclass(frozen=True)
class DecodedLoss:
    """SSIM and pixel loss of the decoded z0 prediction, with the attenuation of note 000.

    A sample is active in a loss if it is a generation target and 0 < t ≤ that loss's max_t. Conditioning images have
    exactly t = 0 (clean). Each loss is the **mean over its active samples**, not over the batch, so the gradient of an active
    step does not depend on the number of active samples. `ssim_grad_scale` and `ssim_grad_clamp` act only on the SSIM
    branch, at the cropped decoder output: the gradient of weight · loss_ssim is scaled, then clamped, so no gradient element
    that SSIM sends into the decoder exceeds `ssim_grad_clamp`.

    The weight is a number, or a schedule: `Cosine(10, 1, 200)`, or the mapping by which a study writes it, `{"cosine": {"start":
    10, "end": 1, "steps": 200}}`. Each call then needs `step`. `Adaptive(target_ratio=2)` (`{"adaptive": {"target_ratio": 2}}`)
    chooses the weight from the gradients of the step, so each call needs `main` and `parameters`, too. The ratio includes
    `ssim_grad_scale`, which therefore has no effect then.

    `target`: `raw` compares with the target images, `roundtrip` with what the autoencoder leaves of them, `decode(clean)`. The main
    loss aims at the round trip. Raw targets also pull at what the autoencoder loses, the more the heavier the weight: colours drift
    (ResShift issue 146). Each call with `roundtrip` needs `clean`, and decodes the active samples once more.

    SSIM is computed in float32 regardless of autocast. The pixel loss is the mean squared error on [0, 1].

    The caller must freeze the decoder: gradients pass through it but must not update it. Chunking bounds only the decoder's
    working memory; wrap `decode` in `torch.utils.checkpoint` to bound its activations too. Ranks decode different numbers of
    samples, so `decode` must not communicate between ranks.
    """

    ssim_loss_weight: float | Schedule | Adaptive | Mapping[str, Any]  # (note 000 §2.2)
    ssim_loss_max_t: float  # gate, in (0, 1] (note 000 §2.3)
    ssim_grad_scale: float = 1.0  # 1 leaves the gradient unchanged, above 1 amplifies it (note 000 §2.4)
    ssim_grad_clamp: float | None = None  # largest element of the gradient at the decoder's output (note 001 §7)
    pixel_loss_weight: float = 0.0  # (note 000 §5.3 mixes 0.05 in)
    pixel_loss_max_t: float = 0.3  # gate of the pixel loss (note 000 §2.3)
    chunk_size: int = 8  # images per decoder call
    image_range: Literal["[-1,1]", "[0,1]"] = "[-1,1]"  # range of the decoder's output, which is mapped and clamped to [0, 1]
    target: Literal["raw", "roundtrip"] = "raw"  # what decoded images are compared with, see above
    ssim_warmup_steps: float = 0.0  # the weight rises linearly from 0 over so many steps

    def __post_init__(self) -> None:
        if isinstance(self.ssim_loss_weight, Mapping):
            try:
                object.__setattr__(self, "ssim_loss_weight", read_schedule(self.ssim_loss_weight))
            except ValueError as error:
                raise ValueError(f"DecodedLoss: ssim_loss_weight: {error}") from None
        for weight in self._weight.weights if isinstance(self._weight, Schedule) else ():
            _require_non_negative("DecodedLoss: ssim_loss_weight", weight)
        if isinstance(self._weight, Adaptive) and self.ssim_grad_clamp is not None:
            raise ValueError(f"DecodedLoss: ssim_grad_clamp {NO_CLAMP}")
        is_number = not isinstance(self._weight, (Schedule, Adaptive))
        numbers = ("ssim_grad_scale", "pixel_loss_weight", "ssim_warmup_steps", *(["ssim_loss_weight"] if is_number else []))
        for name in numbers:
            _require_non_negative(f"DecodedLoss: {name}", getattr(self, name))
        for name in ("ssim_loss_max_t", "pixel_loss_max_t"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"DecodedLoss: {name}={getattr(self, name)!r}; expected a number in (0, 1]")
        if self.ssim_grad_clamp is not None and not (math.isfinite(self.ssim_grad_clamp) and self.ssim_grad_clamp > 0):
            raise ValueError(f"DecodedLoss: ssim_grad_clamp={self.ssim_grad_clamp!r}; expected a number > 0, or None")
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"DecodedLoss: chunk_size={self.chunk_size!r}; expected an integer >= 1")
        if self.target not in ("raw", "roundtrip"):
            raise ValueError(f"DecodedLoss: target={self.target!r}; expected 'raw' or 'roundtrip'")
        if self.image_range not in ("[-1,1]", "[0,1]"):
            raise ValueError(f"DecodedLoss: image_range={self.image_range!r}; expected '[-1,1]' or '[0,1]'")

    def ssim_alone(self) -> DecodedLoss:
        """The same loss with nothing but SSIM, of weight 1, for all t and without changes of its gradient: to measure it."""
        neutral: dict[str, Any] = {"ssim_grad_scale": 1.0, "ssim_grad_clamp": None, "ssim_warmup_steps": 0.0}
        return replace(self, ssim_loss_weight=1.0, ssim_loss_max_t=1.0, pixel_loss_weight=0.0, **neutral)

    def effective(self) -> Mapping[str, Any]:
        """The effective parameters. A call uses exactly these fields, so this is what ran (note 001 §3)."""
        weight = self._weight
        written = written_schedule(weight) if isinstance(weight, (Schedule, Adaptive)) else weight
        return {**asdict(self), "ssim_loss_weight": written}

    def __call__(
        self,
        z0_prediction: Tensor,
        t: Tensor,
        target_images: Tensor,
        decode: Callable[[Tensor], Tensor] | None,
        *,
        is_target: Tensor | None = None,
        sizes: Sequence[Size] | None = None,
        step: int | None = None,
        main: Tensor | None = None,
        parameters: Iterable[Tensor] = (),
        clean: Tensor | None = None,
    ) -> DecodedLossResult:
        """Computes both losses.

        `z0_prediction`: `[batch, channel, h, w]` latents. `t`: `[batch]` in [0, 1]. `target_images`: `[batch, 3, H, W]` in
        [0, 1]. `decode`: latents → images in `image_range`. `is_target`: `[batch]` bool, True for generation targets
        (default: all). `sizes`: the true (height, width) of each image if images are padded at the right and bottom; decoded
        images and targets are both cropped to it. `step`: of the training, from 1, for a schedule or a warm-up. `main`: the loss
        to which `total` will be added, and `parameters`: where the gradients are compared, for an adaptive weight; see
        `balanced_weight` for what that costs. `clean`: the clean latents, for `target: roundtrip`.

        Raises ValueError for a missing decoder or step, mismatched shapes, t outside [0, 1], or images smaller than the SSIM
        window.
        """
        batch = z0_prediction.shape[0]
        gate = _Gate(batch, t, is_target)
        weight: float | Tensor = self._weight_at(step)
        for_ssim = gate.samples(self.ssim_loss_max_t) if weight > 0 else []
        for_pixel = gate.samples(self.pixel_loss_max_t) if self.pixel_loss_weight > 0 else []
        if target_images.shape[0] != batch or target_images.ndim != 4:
            raise ValueError(
                f"DecodedLoss: target_images is {tuple(target_images.shape)}; expected [{batch}, channel, height, width]"
            )
        if sizes is not None and len(sizes) != batch:
            raise ValueError(f"DecodedLoss: got {len(sizes)} sizes for a batch of {batch}")
        if decode is None and (weight > 0 or self.pixel_loss_weight > 0):
            raise ValueError(
                f"DecodedLoss: decode is None with ssim_loss_weight={self.ssim_loss_weight}, "
                f"pixel_loss_weight={self.pixel_loss_weight}; pass the VAE's decode, or set both weights to 0"
            )

        index = sorted({*for_ssim, *for_pixel})
        terms: list[Tensor] = []
        decoded = loss_ssim = loss_pixel = None
        if index:
            assert decode is not None
            decoded = self._decode(decode, z0_prediction, index)
            if self.target == "roundtrip":
                target_images = self._round_trip(decode, clean, target_images, index)
            pairs = _Pairs(decoded, target_images, index, sizes)
            if for_ssim:
                per_sample = [ssim_loss(self._unit(self._attenuate(x)), y) for x, y in pairs.of(for_ssim)]
                loss_ssim = torch.cat(per_sample).mean()
            if for_pixel:
                per_sample = [_mean_square(self._unit(x), y) for x, y in pairs.of(for_pixel)]
                loss_pixel = torch.cat(per_sample).mean()
                terms.append(self.pixel_loss_weight * loss_pixel)
        if isinstance(self._weight, Adaptive) and any_rank(bool(for_ssim), z0_prediction.device):
            weight = weight * self._balance(main, terms[0] if terms else None, loss_ssim, parameters)
        if loss_ssim is not None:
            terms.insert(0, weight * loss_ssim)
        # DDP needs the graph of every rank to reach the same parameters. An empty sum does that and cannot carry a NaN.
        total = torch.stack(terms).sum() if terms else z0_prediction[:0].sum().float()
        return DecodedLossResult(
            total=total,
            loss_ssim=loss_ssim,
            loss_pixel=loss_pixel,
            ssim_active_count=len(for_ssim),
            ssim_active_fraction=len(for_ssim) / max(batch, 1),
            pixel_active_count=len(for_pixel),
            pixel_active_fraction=len(for_pixel) / max(batch, 1),
            decoded=decoded,
            decoded_index=tuple(index),
            ssim_loss_weight=weight if self._varies and loss_ssim is not None else None,
        )

    @property
    def _weight(self) -> float | Schedule | Adaptive:
        return self.ssim_loss_weight  # type: ignore[return-value]  # a mapping was read when this was made

    @property
    def _varies(self) -> bool:
        return self.ssim_warmup_steps > 0 or isinstance(self._weight, (Schedule, Adaptive))

    def _weight_at(self, step: int | None) -> float:
        """The weight at this step; of an adaptive one the share that the warm-up leaves of it."""
        weight = self._weight
        if weight == 0 or not self._varies:
            return weight  # type: ignore[return-value]
        if step is None:
            raise ValueError("DecodedLoss: ssim_loss_weight changes from step to step; pass step=, the number of the training step")
        share = min(1.0, step / self.ssim_warmup_steps) if self.ssim_warmup_steps else 1.0
        if isinstance(weight, Adaptive):
            return share
        return share * (weight(step) if isinstance(weight, Schedule) else weight)

    def _balance(self, main: Tensor | None, pixel: Tensor | None, ssim: Tensor | None, parameters: Iterable[Tensor]) -> Tensor:
        assert isinstance(self._weight, Adaptive)
        if main is None:
            raise ValueError(
                "DecodedLoss: an adaptive ssim_loss_weight compares gradients; pass main=, the main loss of the step, and "
                "parameters=, the trained parameters"
            )
        others = main if pixel is None else main + pixel
        return balanced_weight(self._weight, others, main.new_zeros(()) if ssim is None else ssim, parameters)

    def _round_trip(
        self, decode: Callable[[Tensor], Tensor], clean: Tensor | None, target_images: Tensor, index: list[int]
    ) -> Tensor:
        """The target images with those of the active samples through the autoencoder."""
        if clean is None:
            raise ValueError("DecodedLoss: target 'roundtrip' needs clean=, the clean latents of the target images")
        with torch.no_grad():
            images = self._unit(self._decode(decode, clean, index))
            return target_images.to(images.dtype).index_copy(0, torch.tensor(index, device=images.device), images)

    def _decode(self, decode: Callable[[Tensor], Tensor], z0: Tensor, index: list[int]) -> Tensor:
        images = []
        for chunk in _take(z0, index).split(self.chunk_size):
            image = decode(chunk)
            images.append(image)
            if image.ndim != 4 or image.shape[0] != chunk.shape[0]:
                raise ValueError(
                    f"DecodedLoss: decode turned {tuple(chunk.shape)} into {tuple(image.shape)}; "
                    f"expected [{chunk.shape[0]}, channel, height, width]"
                )
        return images[0] if len(images) == 1 else torch.cat(images)

    def _attenuate(self, x: Tensor) -> Tensor:
        # Backward runs in reverse order: the SSIM gradient is scaled first, then clamped.
        if self.ssim_grad_clamp is not None:
            x = clamp_gradient(x, self.ssim_grad_clamp)
        return scale_gradient(x, self.ssim_grad_scale)

    def _unit(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x * 0.5 + 0.5 if self.image_range == "[-1,1]" else x).clamp(0, 1)


class _Gate:
    """Selects the active samples, on the host because decoding a subset needs the indices there anyway."""

    def __init__(self, batch: int, t: Tensor, is_target: Tensor | None) -> None:
        if t.shape != (batch,):
            raise ValueError(f"DecodedLoss: t has shape {tuple(t.shape)}; expected [{batch}], one time a sample")
        if is_target is not None and (is_target.shape != (batch,) or is_target.dtype != torch.bool):
            raise ValueError(f"DecodedLoss: is_target is {is_target.dtype} {tuple(is_target.shape)}; expected torch.bool [{batch}]")
        self.t = t.detach().cpu()
        self.is_target = None if is_target is None else is_target.cpu()
        if not ((self.t >= 0) & (self.t <= 1)).all():  # a NaN would close the gate silently
            raise ValueError(f"DecodedLoss: t={self.t.tolist()}; expected times in [0, 1] (0 is clean, 1 is noise)")

    def samples(self, max_t: float) -> list[int]:
        # Compared in the dtype of t, so that t = max_t is active: float32(0.1) is larger than the double 0.1.
        limit = torch.tensor(max_t, dtype=self.t.dtype)
        active = (self.t > 0) & (self.t <= limit)
        if self.is_target is not None:
            active &= self.is_target
        indices: list[int] = active.nonzero().flatten().tolist()
        return indices


class _Pairs:
    """Decoded images and targets, cropped to their true sizes."""

    def __init__(self, decoded: Tensor, targets: Tensor, index: list[int], sizes: Sequence[Size] | None) -> None:
        self.decoded, self.targets, self.sizes = decoded, targets, sizes
        self.position = {sample: i for i, sample in enumerate(index)}
        if sizes is None:
            if decoded.shape[1:] != targets.shape[1:]:
                raise ValueError(
                    f"DecodedLoss: decode gives images of {tuple(decoded.shape[1:])}, target_images has "
                    f"{tuple(targets.shape[1:])}; they must agree, or pass sizes=[(height, width), ...] to crop padding"
                )
            return
        if decoded.shape[1] != targets.shape[1]:
            raise ValueError(f"DecodedLoss: decode gives {decoded.shape[1]} channels, target_images has {targets.shape[1]}")
        for sample in index:
            height, width = sizes[sample]
            for name, image in (("decoded", decoded), ("target", targets)):
                if not (1 <= height <= image.shape[2] and 1 <= width <= image.shape[3]):
                    raise ValueError(
                        f"DecodedLoss: sizes[{sample}]=({height}, {width}) does not fit the {name} image of "
                        f"{image.shape[2]}×{image.shape[3]}"
                    )

    def of(self, samples: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """The (decoded, target) images of `samples`, as one batch per image size."""
        by_size: dict[Size, list[int]] = {}
        for sample in samples:
            size = (self.targets.shape[2], self.targets.shape[3]) if self.sizes is None else tuple(self.sizes[sample])
            by_size.setdefault((size[0], size[1]), []).append(sample)
        for (height, width), members in by_size.items():
            x = _take(self.decoded, [self.position[sample] for sample in members])
            y = _take(self.targets, members)
            yield x[..., :height, :width], y[..., :height, :width]


def _take(images: Tensor, index: list[int]) -> Tensor:
    if index == list(range(images.shape[0])):
        return images
    return images[torch.tensor(index, device=images.device)]


def _mean_square(x: Tensor, y: Tensor) -> Tensor:
    return (x - y.to(x.dtype)).square().flatten(1).mean(1)


def _require_non_negative(name: str, number: float) -> None:
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}={number!r}; expected a finite number >= 0")
