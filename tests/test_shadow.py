import math

import pytest
import torch
from tapped_model import Branches, batch

from tune_ssim.base.errors import UserError
from tune_ssim.probes import GradientTaps, shadow_terms

METRICS = {"dbg/grad_flow": torch.tensor(2.5), "kl_raw": 7.25, "bad": math.nan, "worse": torch.tensor(math.inf)}


def test_a_term_shows_its_metric():
    terms = shadow_terms(METRICS)
    assert set(terms) == {"loss_dbg_grad_flow", "loss_kl_raw", "loss_bad", "loss_worse"}
    term = terms["loss_dbg_grad_flow"]
    assert term.item() == float(term) == float(f"{term:.3f}") == term.mean().item() == term.detach().cpu().item() == 2.5
    assert terms["loss_kl_raw"].item() == 7.25 and math.isnan(terms["loss_bad"].mean().item())
    assert repr(term) == "tensor(2.5000)" and terms["loss_worse"].isinf()


@pytest.mark.parametrize(
    "total",
    [
        lambda losses: sum(losses.values()),
        lambda losses: torch.stack(list(losses.values())).sum(),
        lambda losses: torch.stack([value.mean() for value in losses.values()]).sum(),
        lambda losses: sum(0.5 * value for value in losses.values()) * 2,
        lambda losses: sum(value.mean() for key, value in losses.items() if "loss" in key),  # as a well-known trainer does it
    ],
)
def test_no_bit_of_the_loss_and_of_its_gradient_changes(total):
    model, twin = Branches(), Branches()
    plain = total(twin(batch(0)))
    shadowed = total({**model(batch(0)), **shadow_terms(METRICS)})
    assert type(shadowed) is torch.Tensor and torch.equal(plain, shadowed)
    plain.backward()
    shadowed.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_arithmetic_in_place_and_from_both_sides(first):
    term, loss = shadow_terms(METRICS)["loss_bad"], torch.tensor(3.0)
    assert (term + loss if first else loss + term).item() == 3
    loss += term
    loss.add_(term, alpha=2)
    assert loss.item() == 3 and (2 * term).item() == 0 and torch.maximum(loss, term).item() == 3


def test_only_shadows_add_up_to_zero():
    total = sum(shadow_terms(METRICS).values())
    assert total.item() == 0 and not total.requires_grad


def test_taps_behind_a_logger_of_losses():
    model = Branches()
    taps = GradientTaps(model.tags())
    losses = model(batch(0))
    sum(losses.values()).backward()
    reading = taps.read()
    shown = {**losses, **shadow_terms(reading)}
    assert {name for name in shown if not name.startswith("loss_")} == set()
    assert float(shown["loss_dbg_grad_flow"]) == float(reading["dbg/grad_flow"]) > 0


def test_what_is_shown_already_is_left_out():
    assert set(shadow_terms({"loss_flow": 1.0, "psnr": 2.0})) == {"loss_psnr"}
    assert set(shadow_terms({"psnr": 2.0}, prefix="train/loss.")) == {"train/loss.psnr"}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"a/b": 1.0, "a_b": 2.0}, "'a_b' and another metric both become 'loss_a_b'"),
        ({"a": torch.ones(2)}, r"'a' has shape \(2,\)"),
    ],
)
def test_mistakes(metrics, message):
    with pytest.raises(UserError, match=message):
        shadow_terms(metrics)
