import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_ssim.losses import DecodedLoss, clamp_gradient, scale_gradient, ssim_loss

T = [0.0, 0.05, 0.1, 0.1000001, 0.25, 0.3, 0.9, 1.0]


class Decoder(torch.nn.Module):
    """Upsamples 2 latent channels by 4 to 3 image channels in about [-1, 1], and counts what it decodes."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(2, 3, 3, padding=1)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            self.mix.weight.copy_(0.15 * torch.randn(self.mix.weight.shape, generator=generator))
            self.mix.bias.zero_()
        self.requires_grad_(False)
        self.calls = []

    def forward(self, latent):
        self.calls.append(len(latent))
        return self.mix(torch.nn.functional.interpolate(latent, scale_factor=4))


def batch(size=8, height=16, width=20):
    generator = torch.Generator().manual_seed(1)
    z0 = torch.randn(size, 2, height // 4, width // 4, generator=generator).requires_grad_()
    targets = torch.rand(size, 3, height, width, generator=generator)
    return z0, torch.tensor(T[:size]), targets


def unit(images):
    return (images * 0.5 + 0.5).clamp(0, 1)


# -- gradient scaling and clamping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attenuate", [lambda x: scale_gradient(x, 0.01), lambda x: clamp_gradient(x, 0.01)])
def test_attenuation_leaves_every_bit_of_the_value(attenuate):
    x = torch.tensor([0.1, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4e38], requires_grad=True)
    for value in (x, x.detach().half().requires_grad_()):
        bits = torch.int32 if value.dtype == torch.float32 else torch.int16
        assert torch.equal(attenuate(value).detach().view(bits), value.detach().view(bits))


@settings(deadline=None)
@given(st.floats(0, 1e6))
def test_scale_multiplies_the_gradient(scale):
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    incoming = torch.tensor([1.0, -2.5, math.inf], dtype=torch.float64)
    (grad,) = torch.autograd.grad(scale_gradient(x, scale), x, incoming)
    torch.testing.assert_close(grad, incoming * scale, equal_nan=True)


def test_clamp_bounds_each_element_and_keeps_nan():
    x = torch.ones(6, requires_grad=True)
    incoming = torch.tensor([0.1, -0.1, 7.0, -7.0, -math.inf, math.nan])
    (grad,) = torch.autograd.grad(clamp_gradient(x, 0.5), x, incoming)
    torch.testing.assert_close(grad, torch.tensor([0.1, -0.1, 0.5, -0.5, -0.5, math.nan]), equal_nan=True)


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf])
def test_scale_rejects(scale):
    with pytest.raises(ValueError, match="scale="):
        scale_gradient(torch.ones(1), scale)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_clamp_rejects(limit):
    with pytest.raises(ValueError, match="limit="):
        clamp_gradient(torch.ones(1), limit)


# -- the gate --------------------------------------------------------------------------------------------------------


def test_gate_is_open_above_zero_up_to_max_t():
    z0, t, targets = batch()
    result = DecodedLoss(1.0, 0.1)(z0, t, targets, Decoder())
    assert result.decoded_index == (1, 2)  # not t = 0, and max_t itself takes part although float32(0.1) > 0.1
    assert (result.ssim_active_count, result.ssim_active_fraction) == (2, 0.25)
    result.total.backward()
    touched = z0.grad.flatten(1).abs().sum(1) > 0
    assert touched.tolist() == [False, True, True, False, False, False, False, False]


def test_conditioning_images_do_not_take_part():
    z0, t, targets = batch()
    is_target = torch.tensor([True, False, True, True, True, True, True, True])
    assert DecodedLoss(1.0, 0.1)(z0, t, targets, Decoder(), is_target=is_target).decoded_index == (2,)


def test_gate_comes_before_decoding_and_both_losses_share_one_decode():
    z0, t, targets = batch()
    decoder = Decoder()
    result = DecodedLoss(1.0, 0.1, pixel_loss_weight=1.0, pixel_loss_max_t=0.3, chunk_size=2)(z0, t, targets, decoder)
    assert decoder.calls == [2, 2, 1]
    assert result.decoded_index == (1, 2, 3, 4, 5)
    assert (result.ssim_active_count, result.pixel_active_count) == (2, 5)


@settings(max_examples=25, deadline=None)
@given(
    t=st.lists(st.sampled_from(T), min_size=1, max_size=6),
    ssim_max=st.sampled_from([0.1, 0.3, 1.0]),
    pixel_max=st.sampled_from([0.1, 0.3, 1.0]),
    weights=st.tuples(st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 2.0])),
    chunk_size=st.integers(1, 7),
    targets_only=st.integers(0, 63),
)
def test_equals_the_losses_of_the_samples_one_by_one(t, ssim_max, pixel_max, weights, chunk_size, targets_only):
    z0, _, targets = batch(len(t))
    t = torch.tensor(t)
    is_target = torch.tensor([bool(targets_only >> i & 1) for i in range(len(t))])
    decoder = Decoder()
    loss = DecodedLoss(weights[0], ssim_max, 1.0, None, weights[1], pixel_max, chunk_size)
    result = loss(z0, t, targets, decoder, is_target=is_target)

    def taking_part(max_t):
        return [i for i in range(len(t)) if is_target[i] and 0 < t[i] <= torch.tensor(max_t)]

    want = {"ssim": [], "pixel": []}
    twin = z0.detach().clone().requires_grad_()
    for i in taking_part(ssim_max) if weights[0] else []:
        want["ssim"].append(ssim_loss(unit(decoder(twin[i : i + 1])), targets[i : i + 1])[0])
    for i in taking_part(pixel_max) if weights[1] else []:
        want["pixel"].append((unit(decoder(twin[i : i + 1])) - targets[i : i + 1]).square().mean())
    total = twin.sum() * 0
    for name, got, weight in (("ssim", result.loss_ssim, weights[0]), ("pixel", result.loss_pixel, weights[1])):
        if want[name]:
            mean = torch.stack(want[name]).mean()
            torch.testing.assert_close(got, mean)
            total = total + weight * mean
        else:
            assert got is None
            assert f"loss_{name}" not in result.metrics()
    torch.testing.assert_close(result.total, total)
    result.total.backward()
    total.backward()
    torch.testing.assert_close(z0.grad, twin.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_nothing_active_is_a_connected_zero_even_beside_nan(weight):
    z0, _, targets = batch(2)
    with torch.no_grad():
        z0[0] = math.nan
    decoder = Decoder()
    result = DecodedLoss(weight, 0.1)(z0, torch.tensor([0.0, 0.5]), targets, decoder)
    assert decoder.calls == []
    assert result.total.item() == 0
    assert result.loss_ssim is None
    assert result.decoded is None
    assert result.metrics() == {"ssim_active_fraction": 0.0, "pixel_active_fraction": 0.0}
    result.total.backward()
    assert torch.equal(z0.grad, torch.zeros_like(z0))


def test_weight_zero_needs_no_decoder_and_computes_nothing():
    z0, t, targets = batch()
    result = DecodedLoss(0.0, 1.0)(z0, t, targets, None)
    assert result.ssim_active_count == 0
    assert result.total.item() == 0
    decoder = Decoder()
    result = DecodedLoss(0.0, 1.0, pixel_loss_weight=1.0, pixel_loss_max_t=0.1)(z0, t, targets, decoder)
    assert decoder.calls == [2]
    assert "loss_ssim" not in result.metrics()


# -- attenuation ---------------------------------------------------------------------------------------------------


def gradient(loss, **options):
    z0, t, targets = batch()
    result = loss(z0, t, targets, Decoder(), **options)
    entering = torch.autograd.grad(result.total, result.decoded, retain_graph=True)[0]
    result.total.backward()
    return result, entering, z0.grad


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 3.0])
def test_grad_scale_scales_the_ssim_gradient_and_no_value(scale):
    plain, _, want = gradient(DecodedLoss(0.5, 0.3))
    scaled, _, got = gradient(DecodedLoss(0.5, 0.3, ssim_grad_scale=scale))
    assert torch.equal(plain.total, scaled.total)
    assert torch.equal(plain.loss_ssim, scaled.loss_ssim)
    torch.testing.assert_close(got, want * scale, atol=1e-9, rtol=1e-5)


def test_grad_scale_and_clamp_leave_the_pixel_branch_alone():
    _, _, want = gradient(DecodedLoss(0.0, 0.3, pixel_loss_weight=2.0))
    _, _, got = gradient(DecodedLoss(1.0, 0.3, ssim_grad_scale=0.0, ssim_grad_clamp=1e-9, pixel_loss_weight=2.0))
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-5)
    assert want.abs().max() > 0


def test_weight_times_scale_is_one_degree_of_freedom():
    grads = [gradient(DecodedLoss(w, 0.3, s))[2] for w, s in ((10.0, 0.1), (1.0, 1.0), (0.01, 100.0))]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-9, rtol=1e-5)
    torch.testing.assert_close(grads[2], grads[1], atol=1e-9, rtol=1e-5)


def test_clamp_bounds_what_enters_the_decoder_after_scaling():
    _, free, _ = gradient(DecodedLoss(1.0, 0.3, ssim_grad_scale=0.1))
    limit = free.abs().max().item() / 4
    _, clamped, _ = gradient(DecodedLoss(1.0, 0.3, ssim_grad_scale=0.1, ssim_grad_clamp=limit))
    torch.testing.assert_close(clamped, free.clamp(-limit, limit))
    assert (clamped.abs() == torch.tensor(limit)).any()


# -- sizes, ranges, precision --------------------------------------------------------------------------------------


def test_each_image_is_cropped_to_its_own_size():
    z0, t, targets = batch(6)
    sizes = [(16, 20), (11, 13), (12, 20), (11, 13), (16, 11), (16, 20)]
    decoder = Decoder()
    loss = DecodedLoss(1.0, 0.3, pixel_loss_weight=1.0, pixel_loss_max_t=0.3)
    result = loss(z0, t, targets, decoder, sizes=sizes)
    with torch.no_grad():
        images = unit(decoder(z0))
    pairs = [(images[i : i + 1, :, :h, :w], targets[i : i + 1, :, :h, :w]) for i, (h, w) in enumerate(sizes) if i > 0]
    torch.testing.assert_close(result.loss_ssim, torch.stack([ssim_loss(x, y)[0] for x, y in pairs]).mean())
    torch.testing.assert_close(result.loss_pixel, torch.stack([(x - y).square().mean() for x, y in pairs]).mean())
    padded = targets.clone()
    for i, (h, w) in enumerate(sizes):
        padded[i, :, h:] = math.nan
        padded[i, :, :, w:] = math.nan
    assert torch.equal(loss(z0, t, padded, decoder, sizes=sizes).total, result.total)
    result.total.backward()
    assert z0.grad[1, :, :, 4:].eq(0).all()  # no gradient from outside the 13 columns and the convolution's reach


def test_image_range_is_mapped_to_the_unit_interval():
    z0, t, targets = batch()
    decoder = Decoder()
    signed = DecodedLoss(1.0, 0.3, pixel_loss_weight=1.0)(z0, t, targets, decoder)
    halved = DecodedLoss(1.0, 0.3, pixel_loss_weight=1.0, image_range="[0,1]")(z0, t, targets, lambda z: decoder(z) * 0.5 + 0.5)
    assert torch.equal(signed.total, halved.total)


def test_ssim_is_float32_under_autocast():
    z0, t, targets = batch()
    decoder = Decoder()
    seen = []

    def decode(latent):
        seen.append(decoder(latent))
        return seen[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = DecodedLoss(1.0, 0.3)(z0, t, targets, decode)
    assert seen[0].dtype == torch.bfloat16  # the decoder runs as the caller wants it
    assert result.loss_ssim.dtype == torch.float32
    index = list(result.decoded_index)
    torch.testing.assert_close(result.loss_ssim, ssim_loss(unit(seen[0].float()), targets[index]).mean())


def test_non_finite_predictions_are_reported():
    z0, t, targets = batch()
    with torch.no_grad():
        z0[1, 0, 0, 0] = math.nan
    result = DecodedLoss(1.0, 0.3, pixel_loss_weight=1.0)(z0, t, targets, Decoder())
    assert result.loss_ssim.isnan()
    assert result.loss_pixel.isnan()
    assert result.total.isnan()


def test_gradient_at_the_decoder_output_can_be_hooked():
    z0, t, targets = batch()
    result = DecodedLoss(1.0, 0.3)(z0, t, targets, Decoder())
    seen = []
    result.decoded.register_hook(seen.append)
    result.total.backward()
    assert seen[0].shape == (5, 3, 16, 20)
    assert seen[0].abs().max() > 0


# -- configuration and errors --------------------------------------------------------------------------------------


def test_effective_names_every_parameter_and_is_frozen():
    loss = DecodedLoss(1, 0.3, 0.01)  # what note 001 found in force, against (0.1, 0.1, 0.1) in the comments
    effective = loss.effective()
    assert set(effective) == {field.name for field in dataclasses.fields(DecodedLoss)}
    assert (effective["ssim_loss_weight"], effective["ssim_loss_max_t"], effective["ssim_grad_scale"]) == (1, 0.3, 0.01)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.ssim_loss_weight = 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssim_loss_weight": -0.1}, r"ssim_loss_weight=-0\.1; expected a finite number >= 0"),
        ({"ssim_loss_weight": math.nan}, "ssim_loss_weight=nan"),
        ({"pixel_loss_weight": math.inf}, "pixel_loss_weight=inf"),
        ({"ssim_grad_scale": -1.0}, "ssim_grad_scale=-1"),
        ({"ssim_loss_max_t": 0.0}, r"ssim_loss_max_t=0.0; expected a number in \(0, 1\]"),
        ({"ssim_loss_max_t": math.nan}, "ssim_loss_max_t=nan"),
        ({"pixel_loss_max_t": 1.5}, "pixel_loss_max_t=1.5"),
        ({"ssim_grad_clamp": 0.0}, "ssim_grad_clamp=0.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"image_range": "[0,255]"}, r"image_range='\[0,255\]'"),
    ],
)
def test_configuration_is_checked_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        DecodedLoss(**{"ssim_loss_weight": 0.1, "ssim_loss_max_t": 0.1, **options})


def call(decode="decoder", t=None, targets=None, size=8, **options):
    z0, times, images = batch(size)
    return DecodedLoss(1.0, 1.0)(
        z0,
        times if t is None else t,
        images if targets is None else targets,
        Decoder() if decode == "decoder" else decode,
        **options,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": None}, "decode is None with ssim_loss_weight=1.0"),
        ({"t": torch.full((8, 1), 0.1)}, r"t has shape \(8, 1\); expected \[8\]"),
        ({"t": torch.full((8,), math.nan)}, r"expected times in \[0, 1\]"),
        ({"t": torch.full((8,), 500.0)}, r"expected times in \[0, 1\]"),
        ({"is_target": torch.ones(8)}, "is_target is torch.float32"),
        ({"is_target": torch.ones(7, dtype=torch.bool)}, r"\(7,\); expected torch.bool \[8\]"),
        ({"targets": torch.rand(7, 3, 16, 20)}, r"target_images is \(7, 3, 16, 20\)"),
        ({"targets": torch.rand(8, 3, 16, 16)}, r"\(3, 16, 20\).*\(3, 16, 16\).*sizes"),
        ({"targets": torch.rand(8, 1, 16, 20), "sizes": [(16, 20)] * 8}, "3 channels, target_images has 1"),
        ({"sizes": [(16, 20)] * 7}, "7 sizes for a batch of 8"),
        ({"sizes": [(16, 21)] * 8}, r"sizes\[1\]=\(16, 21\) does not fit the decoded image of 16×20"),
        ({"sizes": [(10, 20)] * 8}, "10×20 are smaller than the window"),
        ({"decode": lambda z: z[0]}, r"decode turned \(7, 2, 4, 5\) into \(2, 4, 5\)"),
    ],
)
def test_call_errors_say_what_was_got(options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_missing_decoder_is_an_error_even_when_no_sample_is_active():
    with pytest.raises(ValueError, match="decode is None"):
        call(decode=None, t=torch.zeros(8))


# -- schedules and an adaptive weight ------------------------------------------------------------------------------


def norm_of(loss, at):
    return torch.autograd.grad(loss, at, retain_graph=True)[0].norm().item()


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("pixel_weight", [0.0, 5.0])
def test_an_adaptive_weight_holds_the_ratio_of_the_gradients(scale, pixel_weight):
    z0, t, targets = batch()
    main, shares = z0.pow(3).mean(), {"ssim_grad_scale": scale, "pixel_loss_weight": pixel_weight, "pixel_loss_max_t": 1.0}
    rest = DecodedLoss(0.0, 0.3, **shares)(z0, t, targets, Decoder()).total + main
    result = DecodedLoss({"adaptive": {"target_ratio": 2}}, 0.3, **shares)(
        z0, t, targets, Decoder(), step=1, main=main, parameters=[z0]
    )
    both = torch.autograd.grad(main + result.total, z0, retain_graph=True)[0] - torch.autograd.grad(rest, z0, retain_graph=True)[0]
    assert both.norm().item() / norm_of(rest, z0) == pytest.approx(2, rel=1e-4)
    weight = result.metrics()["ssim_loss_weight"]
    assert weight.item() == pytest.approx(2 * norm_of(rest, z0) / norm_of(result.loss_ssim, z0), rel=1e-4)
    assert not weight.requires_grad and z0.grad is None


def test_an_adaptive_weight_is_limited_and_warmed_up():
    z0, t, targets = batch()
    rule = {"adaptive": {"target_ratio": 2, "max_weight": 1e-3}}
    loss = DecodedLoss(rule, 0.3, ssim_warmup_steps=4)
    weights = [
        loss(z0, t, targets, Decoder(), step=step, main=z0.mean(), parameters=[z0]).metrics()["ssim_loss_weight"].item()
        for step in (1, 4, 9)
    ]
    assert weights == pytest.approx([0.25e-3, 1e-3, 1e-3])
    assert loss.effective()["ssim_loss_weight"] == rule


def test_without_an_active_sample_nothing_is_balanced():
    z0, t, targets = batch()
    loss = DecodedLoss({"adaptive": {"target_ratio": 2}}, 0.01)
    result = loss(z0, t, targets, Decoder(), step=1, main=z0.mean(), parameters=[z0])
    assert result.total == 0 and result.ssim_active_count == 0 and "ssim_loss_weight" not in result.metrics()


def test_without_a_gradient_of_its_own_the_adaptive_weight_is_its_limit():
    z0, t, targets = batch()
    loss = DecodedLoss({"adaptive": {"target_ratio": 2}}, 0.3)
    saturated = loss(z0, t, targets, lambda z: Decoder()(z) + 100, step=1, main=z0.mean(), parameters=[z0])
    assert saturated.metrics()["ssim_loss_weight"] == 1e4 and norm_of(saturated.total, z0) == 0
    broken = loss(z0, t, targets, lambda z: Decoder()(z) * math.nan, step=1, main=z0.mean(), parameters=[z0])
    assert math.isnan(broken.total.item())  # reported, not hidden


def test_a_schedule_gives_the_weight_of_the_step():
    z0, t, targets = batch()
    loss = DecodedLoss({"warm_up": {"value": 8, "steps": 4}}, 0.3)
    first, later = (loss(z0, t, targets, Decoder(), step=step) for step in (1, 40))
    assert (first.metrics()["ssim_loss_weight"], later.metrics()["ssim_loss_weight"]) == (2, 8)
    torch.testing.assert_close(4 * first.total, later.total)
    off = DecodedLoss(0.0, 0.3, ssim_warmup_steps=9)(z0, t, targets, None)  # nothing to warm up, so no step is needed
    assert off.total == 0
    ended = DecodedLoss({"linear": {"start": 1, "end": 0, "steps": 2}}, 0.3)(z0, t, targets, None, step=2)
    assert ended.total == 0 and ended.ssim_active_count == 0


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"ssim_loss_weight": {"linear": {"start": -1, "end": 1, "steps": 2}}}, {}, "ssim_loss_weight=-1"),
        ({"ssim_loss_weight": {"cosin": {}}}, {}, "ssim_loss_weight: unknown schedule 'cosin'; did you mean 'cosine'?"),
        ({"ssim_loss_weight": {"adaptive": {"target_ratio": 2}}, "ssim_grad_clamp": 0.1}, {}, "cannot be combined"),
        ({"ssim_loss_weight": 1.0, "ssim_warmup_steps": 2}, {}, "pass step="),
        ({"ssim_loss_weight": 1.0, "target": "roundtrip"}, {}, "needs clean="),
        ({"ssim_loss_weight": 1.0, "target": "round"}, {}, "expected 'raw' or 'roundtrip'"),
        ({"ssim_loss_weight": {"adaptive": {"target_ratio": 2}}}, {"step": 1}, "pass main="),
        (
            {"ssim_loss_weight": {"adaptive": {"target_ratio": 2}}},
            {"step": 1, "main": torch.ones(())},
            "depend on the given tensors",
        ),
    ],
)
def test_what_a_changing_weight_needs(options, given, message):
    z0, t, targets = batch()
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        DecodedLoss(ssim_loss_max_t=0.3, **options)(z0, t, targets, Decoder(), **given)
