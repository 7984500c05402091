import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tune_ssim.losses import active_units, dino_alignment, kl_to_standard_normal, marginal_kl, reparameterise


def latent(*shape, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(3)
    return tuple((spread * torch.randn(*shape, generator=generator, dtype=dtype)).requires_grad_() for _ in range(2))


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 6, 5)])
@pytest.mark.parametrize("max_variance", [None, 1e6])
def test_kl_and_its_gradient_are_those_of_torch(shape, max_variance):
    mu, log_var = latent(*shape)
    ours = kl_to_standard_normal(mu, log_var, max_variance=max_variance)
    theirs = kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(ours, theirs)
    incoming = torch.linspace(0.5, 2, shape[0], dtype=torch.float64)
    found, expected = (torch.autograd.grad(kl, (mu, log_var), incoming) for kl in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_kl_is_the_formula_of_note_004():
    mu, log_var = latent(5, 7)
    note = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1))
    torch.testing.assert_close(kl_to_standard_normal(mu, log_var).mean(), note)


def test_max_variance_bounds_the_gradient_and_keeps_its_sign():
    log_var = torch.tensor([[math.log(10) - 1e-9], [math.log(10) + 1e-9], [8.0], [80.0], [800.0]], requires_grad=True)
    kl = kl_to_standard_normal(torch.zeros_like(log_var), log_var, max_variance=10)
    (grad,) = torch.autograd.grad(kl.sum(), log_var)
    torch.testing.assert_close(grad, torch.full_like(grad, 4.5))  # ½ (10 − 1)
    assert (kl.diff() >= 0).all() and kl[0].item() == pytest.approx(kl[1].item())
    # What the note does, and why it is not done here: the larger the variance, the smaller that KL, down to minus infinity.
    clamped = -0.5 * (1 + log_var - log_var.exp().clamp(max=10))
    (theirs,) = torch.autograd.grad(clamped.sum(), log_var)
    assert (theirs[2:4] == -0.5).all() and (clamped[3:] < 0).all()
    assert theirs[4].isnan()  # 0·inf: the clamp comes after the exp


def test_max_variance_changes_nothing_below():
    mu, log_var = latent(4, 3, dtype=torch.float32)
    assert log_var.max() < math.log(10)
    assert torch.equal(kl_to_standard_normal(mu, log_var, max_variance=10), kl_to_standard_normal(mu, log_var))


def test_kl_of_half_precision_is_in_float32():
    mu, log_var = latent(2, 5000, dtype=torch.float32)
    half = kl_to_standard_normal(mu.bfloat16(), log_var.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, kl_to_standard_normal(mu.bfloat16().double(), log_var.bfloat16().double()).float())


def test_a_sample_and_its_gradient():
    mu, log_var = latent(2, 3)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(reparameterise(mu, log_var, noise), mu + (0.5 * log_var).exp() * noise)
    grad_mu, grad_log_var = torch.autograd.grad(reparameterise(mu, log_var, noise).sum(), (mu, log_var))
    torch.testing.assert_close(grad_mu, torch.ones_like(mu))
    torch.testing.assert_close(grad_log_var, 0.5 * log_var.exp().sqrt() * noise)


def test_active_units_are_those_that_move_with_the_input():
    mu = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.5, 0.01, 0.0, 0.3]) + 7
    assert active_units(mu).item() == 3 and active_units(mu, threshold=1e-6).item() == 4
    assert active_units(mu.view(64, 5, 1, 1).bfloat16() - 7).item() == 3


def test_marginal_kl_is_the_kl_of_the_moments_of_all_samples_together():
    mu, log_var = latent(500, 4)
    m, v = mu.mean(0), mu.var(0) + log_var.exp().mean(0)
    prior, moments = Normal(torch.zeros_like(m), torch.ones_like(v)), Normal(m, v.sqrt())
    torch.testing.assert_close(marginal_kl(mu, log_var), kl_divergence(moments, prior).mean(), atol=2e-3, rtol=0)
    draws = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    assert marginal_kl(0.8 * draws, torch.full_like(draws, 0.36).log()) < 1e-3  # tells samples apart, and follows the prior
    assert marginal_kl(3 * draws, torch.full_like(draws, 0.01).log()) > 2.5
    assert marginal_kl(mu.bfloat16(), log_var.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("n", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("variance", [0.01, 0.36, 0.9])
def test_marginal_kl_of_small_batches_is_not_biased(n, variance):
    """The latents of all data follow the prior; those of a few samples never do quite."""
    mu = (1 - variance) ** 0.5 * torch.randn(4000, n, 8, generator=torch.Generator().manual_seed(n))
    found = torch.stack([marginal_kl(batch, torch.full_like(batch, variance).log()) for batch in mu])
    assert abs(found.mean()) < (0.05 if n > 2 else 0.125)  # of two the delta method is no more than half right


def test_alignment():
    targets = torch.eye(3)
    features = torch.tensor([[2.0, 0, 0], [1.0, 0, 0], [0, 0, -3.0]], requires_grad=True)
    assert dino_alignment(features, targets).tolist() == [0, 1, 2]
    assert dino_alignment(torch.zeros(2, 3), targets[:2]).tolist() == [1, 1]
    patches = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    others = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    cosine = (patches * others).sum(-1) / (patches.norm(dim=-1) * others.norm(dim=-1))
    torch.testing.assert_close(dino_alignment(others, patches), (1 - cosine).mean((1, 2)))
    assert not dino_alignment(patches, others).requires_grad  # a teacher is not trained


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 1)), r"mu \(2, 3\), log_var \(2, 1\)"),
        (lambda: kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3), max_variance=1), "max_variance=1"),
        (lambda: reparameterise(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), r"noise \(3,\)"),
        (lambda: active_units(torch.zeros(1, 3)), "at least two samples"),
        (lambda: marginal_kl(torch.zeros(1, 3), torch.zeros(1, 3)), "at least two samples"),
        (lambda: marginal_kl(torch.zeros(2, 3), torch.zeros(2, 4)), r"log_var \(2, 4\)"),
        (lambda: dino_alignment(torch.zeros(2, 3), torch.zeros(3)), r"targets \(3,\)"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
