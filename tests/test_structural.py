import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_msssim import ssim as msssim_ssim
from references import ssim_reference
from skimage.metrics import structural_similarity

import tune_ssim.losses.structural as structural
from tune_ssim.losses.structural import ssim, ssim_loss


def images(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=dtype)
    y = (0.6 * x + 0.4 * torch.rand(shape, generator=generator, dtype=dtype)).clamp(0, 1)
    return x, y


@pytest.fixture(params=["blocks", "shifts"])
def route(request, monkeypatch):
    """Both ways of filtering: the CPU's matrix products and the one every other device takes."""
    if request.param == "shifts":
        monkeypatch.setattr(structural, "_matmul_is_exact", lambda maps: False)
    return request.param


@pytest.mark.parametrize("shape", [(2, 1, 11, 11), (1, 3, 13, 29), (2, 3, 47, 31), (1, 1, 65, 139), (3, 3, 64, 76)])
def test_agrees_with_scikit_image_on_valid_windows(shape, route):
    x, y = images(*shape)
    got = ssim(x, y)
    assert got.shape == (shape[0],)
    for value, a, b in zip(got, x, y, strict=True):
        maps = structural_similarity(
            a.double().numpy(),
            b.double().numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            full=True,
        )[1]
        assert value.item() == pytest.approx(maps[:, 5:-5, 5:-5].mean(), abs=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 33, 21), (1, 1, 130, 70)])
def test_agrees_with_pytorch_msssim_in_value_and_gradient(shape, route):
    x, y = images(*shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.arange(1.0, shape[0] + 1)  # samples must not be mixed up
    a, b = ssim(ours, y), msssim_ssim(theirs, y, data_range=1.0, size_average=False)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6 * theirs.grad.abs().max().item() + 1e-8, rtol=1e-3)


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(5, 14),
    width=st.integers(5, 14),
    channels=st.integers(1, 3),
    window_size=st.sampled_from([3, 5]),
    sigma=st.floats(0.5, 3),
    data_range=st.sampled_from([1.0, 255.0]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_definition(height, width, channels, window_size, sigma, data_range, seed):
    x, y = images(1, channels, height, width, seed=seed, dtype=torch.float64)
    x, y = x * data_range, y * data_range
    got = ssim(x, y, window_size=window_size, sigma=sigma, data_range=data_range)
    want = ssim_reference(x[0].numpy(), y[0].numpy(), window_size, sigma, data_range)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("size", [11, 64, 75])
def test_identical_images_score_exactly_one(size, route):
    x, _ = images(2, 3, size, size)
    assert (ssim(x, x.clone()) == 1).all()
    assert (ssim_loss(x, x.clone()) == 0).all()


def test_flat_patches_reduce_to_the_luminance_term():
    x, y = torch.full((1, 1, 16, 16), 0.3), torch.full((1, 1, 16, 16), 0.8)
    assert ssim(x, y).item() == pytest.approx((2 * 0.3 * 0.8 + 1e-4) / (0.3**2 + 0.8**2 + 1e-4), abs=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.5, 0.98])
def test_flat_bright_patches_keep_float32_accuracy(level):
    # Moments about zero instead of about the mean miss both bounds by far: 3e-5 and 3e-4 at level 0.98.
    generator = torch.Generator().manual_seed(0)
    x = level + 1e-3 * torch.rand((1, 3, 48, 48), generator=generator, dtype=torch.float64)
    y = level + 1e-3 * torch.rand((1, 3, 48, 48), generator=generator, dtype=torch.float64)
    x, y = x.float().double(), y.float().double()
    exact, single = x.clone().requires_grad_(), x.float().requires_grad_()
    a, b = ssim(exact, y), ssim(single, y.float())
    a.sum().backward()
    b.sum().backward()
    assert abs(a.item() - b.item()) < 2e-7
    assert (exact.grad - single.grad).norm() < 1e-6 * exact.grad.norm()


def test_value_stays_in_range_where_rounding_exceeds_the_variance():
    # Flat halves 1000 apart with data_range=1: float32 cannot hold these variances; unclamped the mean is −14.
    generator = torch.Generator().manual_seed(0)
    x = 10 + 1e-3 * torch.rand(1, 1, 32, 32, generator=generator)
    x[..., 16:] -= 1000
    y = x + 1e-3 * torch.rand(1, 1, 32, 32, generator=generator)
    assert -1 <= ssim(x, y).item() <= 1


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_gradcheck(needs, route):
    x, y = images(2, 2, 9, 8, dtype=torch.float64)
    x.requires_grad_(needs[0])
    y.requires_grad_(needs[1])
    assert torch.autograd.gradcheck(lambda a, b: ssim(a, b, window_size=5), (x, y))


@pytest.mark.parametrize("case", ["flat", "identical", "anti-correlated"])
def test_gradcheck_in_special_places(case):
    x, _ = images(1, 1, 12, 12, dtype=torch.float64)
    x = torch.full_like(x, 0.4) if case == "flat" else x
    y = 1 - x if case == "anti-correlated" else x.clone()
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: ssim(a, y), (x,))


def test_gradcheck_across_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(structural, "_BLOCK", 3)
    monkeypatch.setattr(structural, "_CPU_PIXELS", 6 * 8)
    x, y = images(2, 2, 6, 8, dtype=torch.float64)
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ssim(a, b, window_size=3), (x, y))


def test_samples_do_not_depend_on_their_batch():
    x, y = images(5, 3, 24, 20)
    alone = torch.cat([ssim(a[None], b[None]) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(ssim(x, y), alone, atol=1e-6, rtol=0)
    assert ssim(x[:0], y[:0]).shape == (0,)


def test_is_symmetric():
    x, y = images(2, 3, 20, 20)
    torch.testing.assert_close(ssim(x, y), ssim(y, x), atol=1e-6, rtol=0)


def test_double_backward_raises():
    x, y = images(1, 1, 12, 12)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"differentiable once.*create_graph"):
        torch.autograd.grad(ssim(x, y).sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    x, y = images(2, 3, 24, 24)
    x, y = x.to(dtype), y.to(dtype)
    x.requires_grad_()
    value = ssim(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ssim(x.detach().float(), y.float()), atol=0, rtol=0)
    value.sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


def test_autocast_changes_nothing():
    x, y = images(2, 3, 40, 40)
    outside, inside = x.clone().requires_grad_(), x.clone().requires_grad_()
    a = ssim_loss(outside, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        b = ssim_loss(inside, y)
        b.sum().backward()
    a.sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(outside.grad, inside.grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_does_not_reach_the_moments(precision):
    # With plain matrix products "medium" gives bfloat16 accuracy on CPUs with AMX, and "high" TF32 on CUDA.
    x, y = images(2, 3, 96, 96)
    want = ssim(x.double(), y.double()).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = ssim(x, y)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_pixels_are_never_hidden(bad, route):
    x, y = images(2, 3, 80, 20)
    x[1, 2, 0, 0] = bad  # a corner: in one window only
    x.requires_grad_()
    loss = ssim_loss(x, y)
    assert loss[0].isfinite()
    assert loss[1].isnan()
    loss.sum().backward()
    assert x.grad[0].isfinite().all()
    assert not x.grad[1].isfinite().all()


def test_loss_clamps_the_value_and_keeps_the_gradient():
    x, _ = images(2, 1, 16, 16)
    y = 1 - x  # anti-correlated: SSIM < 0, so 1 − SSIM > 1
    x.requires_grad_()
    assert (ssim(x, y) < 0).all()
    loss = ssim_loss(x, y)
    assert (loss == 1).all()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    (unclamped,) = torch.autograd.grad((1 - ssim(x, y)).sum(), x)
    assert torch.equal(grad, unclamped)
    assert (grad != 0).all()
    step = x.detach() - 10 * grad  # and it points the right way
    assert (ssim(step, y) > ssim(x, y)).all()


def test_loss_is_one_minus_ssim():
    x, y = images(3, 3, 20, 20)
    assert torch.equal(ssim_loss(x, y), 1 - ssim(x, y))


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.rand(1, 3, 10, 40), torch.rand(1, 3, 10, 40), {}, r"10×40.*at least 11×11"),
        (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 17), {}, r"\(1, 3, 16, 16\).*\(1, 3, 16, 17\)"),
        (torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16), {}, "shapes differ"),
        (torch.rand(3, 16, 16), torch.rand(3, 16, 16), {}, r"3 dimensions.*\[batch, channel, height, width\]"),
        (torch.ones(1, 3, 16, 16, dtype=torch.uint8), torch.rand(1, 3, 16, 16), {}, "uint8.*floating"),
        (torch.rand(1, 3, 16, 16), torch.ones(1, 3, 16, 16, dtype=torch.int64), {}, "y has dtype torch.int64"),
        (torch.rand(1, 0, 16, 16), torch.rand(1, 0, 16, 16), {}, "no channel"),
        (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16), {"window_size": 4}, "window_size=4.*odd"),
        (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16), {"sigma": 0.0}, "sigma=0.0"),
        (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16), {"data_range": math.nan}, "data_range=nan"),
        (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16), {"k2": -0.03}, "k2=-0.03"),
    ],
)
def test_errors_say_what_was_got_and_what_is_valid(x, y, options, message):
    for function in (ssim, ssim_loss):
        with pytest.raises(ValueError, match=message):
            function(x, y, **options)


def test_reference_agrees_with_scikit_image():
    x, y = (t[0].double().numpy() for t in images(1, 2, 14, 12))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    maps = structural_similarity(x, y, channel_axis=0, full=True, **options)[1]
    assert ssim_reference(x, y) == pytest.approx(np.mean(maps[:, 5:-5, 5:-5]), abs=1e-12)
