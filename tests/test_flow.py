import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_ssim.losses.flow import (
    TimeLaw,
    euler_sample,
    noisy_latent,
    velocity_target,
    z0_from_velocity,
)

UNIFORM = TimeLaw("uniform")
BAGEL = TimeLaw("shifted_sigmoid_normal")
BAGEL_SHIFT_3 = TimeLaw("shifted_sigmoid_normal", shift=3.0)


def latents(batch=4):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 2, 3, 5)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_zero_is_clean_and_one_is_noise():
    z0, noise = latents(2)
    z_t = noisy_latent(z0, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(z_t[0], z0[0])
    assert torch.equal(z_t[1], noise[1])


def test_velocity_is_the_derivative_and_gives_z0_back():
    z0, noise = (t.double() for t in latents())
    t = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    slope = (noisy_latent(z0, noise, t + 1e-3) - noisy_latent(z0, noise, t - 1e-3)) / 2e-3
    torch.testing.assert_close(slope, velocity_target(z0, noise))
    torch.testing.assert_close(z0_from_velocity(noisy_latent(z0, noise, t), velocity_target(z0, noise), t), z0)


def test_gradient_to_the_velocity_is_minus_t():
    z_t, velocity = latents()
    velocity.requires_grad_()
    t = torch.tensor([0.0, 0.1, 0.3, 1.0])
    z0_from_velocity(z_t, velocity, t).sum().backward()
    assert torch.equal(velocity.grad, (-t).view(-1, 1, 1, 1).expand_as(velocity))


@pytest.mark.parametrize(
    ("law", "max_t", "fraction", "digits"),
    [  # FACTS §1: what BAGEL's laws leave of an auxiliary loss
        (UNIFORM, 0.1, 0.10, 1e-12),
        (UNIFORM, 0.3, 0.30, 1e-12),
        (BAGEL, 0.1, 0.014, 5e-4),
        (BAGEL, 0.3, 0.198, 5e-4),
        (BAGEL_SHIFT_3, 0.1, 0.0005, 5e-5),
        (BAGEL_SHIFT_3, 0.3, 0.026, 5e-4),
        (BAGEL_SHIFT_3, 1.0, 1.0, 0),
        (BAGEL, 0.0, 0.0, 0),
    ],
)
def test_expected_active_fraction(law, max_t, fraction, digits):
    assert law.active_fraction(max_t) == pytest.approx(fraction, abs=digits)


@pytest.mark.parametrize("law", [UNIFORM, TimeLaw("uniform", shift=3.0), BAGEL, BAGEL_SHIFT_3])
@pytest.mark.parametrize("max_t", [0.1, 0.3, 0.7])
def test_samples_follow_the_closed_form(law, max_t):
    n = 200_000
    t = law.sample(n, torch.Generator().manual_seed(7))
    assert t.shape == (n,)
    assert t.min() >= 0
    assert t.max() <= 1
    p = law.active_fraction(max_t)
    seen = ((t > 0) & (t <= max_t)).double().mean().item()
    assert abs(seen - p) < 4.5 * math.sqrt(p * (1 - p) / n)


def test_sampling_is_reproducible_and_needs_no_global_state():
    before = torch.get_rng_state()
    a, b = (BAGEL.sample(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())


@settings(deadline=None)
@given(st.floats(0.05, 20), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_fraction_grows_with_max_t_and_falls_with_shift(shift, a, b):
    low, high = sorted((a, b))
    for name in ("uniform", "shifted_sigmoid_normal"):
        law = TimeLaw(name, shift)
        assert 0 <= law.active_fraction(low) <= law.active_fraction(high) <= 1
        assert TimeLaw(name, shift * 2).active_fraction(high) <= law.active_fraction(high)


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_euler_is_exact_on_straight_paths(steps):
    z0, noise = (t.double() for t in latents())
    seen = []

    def velocity(z, t):
        seen.append(t[0].item())
        assert t.shape == (4,)
        torch.testing.assert_close(z, noisy_latent(z0, noise, t))
        return velocity_target(z0, noise)

    torch.testing.assert_close(euler_sample(velocity, noise, steps), z0)
    assert seen == pytest.approx([1 - i / steps for i in range(steps)])  # starts at noise, never evaluates at t = 0


def test_euler_converges_at_first_order_and_keeps_no_graph():
    noise = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    errors = [abs(euler_sample(lambda z, t: z, noise, n).item() - math.exp(-1)) for n in (50, 100)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    assert not euler_sample(lambda z, t: z, noise, 2).requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noisy_latent(*latents(), torch.zeros(3)), r"t has shape \(3,\); expected \[4\]"),
        (lambda: noisy_latent(*latents(), torch.tensor(0.5)), r"t has shape \(\)"),
        (lambda: velocity_target(latents(2)[0], latents(1)[0]), "velocity_target: shapes differ"),
        (lambda: TimeLaw("lognormal"), "'lognormal'; expected 'uniform'"),
        (lambda: TimeLaw("uniform", shift=0.0), "shift=0.0"),
        (lambda: TimeLaw("uniform", shift=math.inf), "shift=inf"),
        (lambda: UNIFORM.active_fraction(1.5), "max_t=1.5"),
        (lambda: UNIFORM.active_fraction(math.nan), "max_t=nan"),
        (lambda: euler_sample(lambda z, t: z, torch.zeros(1, 1), 0), "steps=0"),
    ],
)
def test_errors_say_what_was_got(call, message):
    with pytest.raises(ValueError, match=message):
        call()
