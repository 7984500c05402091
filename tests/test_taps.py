"""Taps against `torch.autograd.grad`, in every wrapping that a training may have."""

import gc
import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tapped_model import Branches, autograd_norms, batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tune_ssim.base.errors import UserError
from tune_ssim.probes import GradientTaps, loss_norms, total_norm, update_ratio


def norms(reading, tags):
    return {tag: float(reading[f"dbg/grad_{tag}"]) for tag in tags}


def coverage(reading, tags=("backbone", "flow", "head")):
    return {tag: reading[f"dbg/{tag}_coverage"] for tag in tags}


def close(expected):
    return pytest.approx(expected, rel=2e-6)


def compile_counter():
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    return CompileCounterWithBackend("aot_eager")


def check(model, taps, losses, tags=None, expect=1.0):
    """One optimiser step without an optimiser: backward of each loss, then the reading against autograd."""
    tags = tags or model.tags()
    expected = autograd_norms(sum(losses), tags)
    for loss in losses:
        loss.backward()
    reading = taps.read()
    assert norms(reading, tags) == close(expected)
    assert coverage(reading, tags) == dict.fromkeys(tags, expect)
    model.zero_grad()
    return reading


# ---- what is read ----


def test_three_lines_in_a_loop():
    model, accumulation = Branches(), 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    taps = GradientTaps(model.tags(), every=1, accumulation=accumulation)
    updates = {}
    for step in range(3):
        losses = [model.loss(batch(accumulation * step + k)) / accumulation for k in range(accumulation)]
        expected = autograd_norms(sum(losses), model.tags())
        for loss in losses:
            loss.backward()
        metrics = {"loss": loss.detach()}
        metrics |= taps.read()
        assert norms(metrics, model.tags()) == close(expected)
        assert coverage(metrics) == {"backbone": 1, "flow": 1, "head": 1}
        assert {key: metrics[f"dbg/flow_{key}"] for key in ("trainable", "has_grad")} == {"trainable": 4, "has_grad": 12}
        assert {tag: float(metrics[f"dbg/update_ratio/{tag}"]) for tag in updates} == close(updates)  # one step late
        assert all(value.ndim == 0 for value in metrics.values() if isinstance(value, torch.Tensor))
        before = {tag: [p.detach().clone() for p in part.parameters()] for tag, part in model.tags().items()}
        optimizer.step()
        optimizer.zero_grad()
        updates = {tag: float(update_ratio(before[tag], part.parameters())) for tag, part in model.tags().items()}
        assert all(ratio > 1e-4 for ratio in updates.values())


def test_a_step_that_is_not_read_pays_nothing():
    model = Branches()
    taps = GradientTaps(model.tags(), every=16)
    read = {}
    for step in range(1, 35):
        hooked = [bool(p._post_accumulate_grad_hooks) for p in model.parameters()]
        assert all(hooked) if taps.due else not any(hooked)
        model.loss(batch(step)).backward()
        read[step] = taps.read()
    assert [step for step, found in read.items() if "dbg/grad_flow" in found] == [1, 16, 32]
    late = [step for step, found in read.items() if found and "dbg/grad_flow" not in found]
    assert late == [2, 17, 33] and set(read[2]) == {f"dbg/update_ratio/{tag}" for tag in model.tags()}


def test_a_resumed_training_reads_the_same_steps():
    model = Branches()
    taps = GradientTaps(model.tags(), every=4)
    read = []
    for step in range(7, 14):
        model.loss(batch(step)).backward()
        if "dbg/flow_coverage" in taps.read(step):
            read.append(step)
        model.zero_grad()
    assert read == [8, 12]


def test_what_was_copied_before_a_jump_is_not_compared():
    model = Branches()
    taps = GradientTaps(model.tags(), every=4)
    taps.read(4)
    assert taps.read(9) == {}
    taps.read(12)
    assert set(taps.read(13)) == {f"dbg/update_ratio/{tag}" for tag in model.tags()}


def test_nothing_waits_for_the_device():
    """A value of a meta tensor cannot be fetched, so whatever would wait for a GPU fails here."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    taps = GradientTaps({"first": model[0], "last": model[2]}, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(2, 4, device="meta")).sum().backward()
        reading = {**taps.read(), "total": total_norm(model.parameters())}
        optimizer.step()
    tensors = {name for name, value in reading.items() if isinstance(value, torch.Tensor)}
    assert tensors == {"total", *(f"dbg/{kind}{tag}" for kind in ("grad_", "update_ratio/") for tag in ("first", "last"))}
    assert all(reading[name].is_meta for name in tensors)


# ---- branches that do not work ----


def test_a_detached_branch_has_no_gradient():
    model = Branches()
    taps = GradientTaps(model.tags())
    hidden = model.backbone(batch(0))
    (model.flow(hidden).square().mean() + model.head(hidden.detach()).mean().detach()).backward()
    reading = taps.read()
    assert coverage(reading) == {"backbone": 1, "flow": 1, "head": 0}
    assert reading["dbg/head_trainable"] == 2 and reading["dbg/grad_head"] == 0 and reading["dbg/grad_flow"] > 0


def test_a_weight_of_zero_arrives_as_a_gradient_of_zero():
    model = Branches()
    taps = GradientTaps(model.tags())
    losses = model(batch(0))
    (losses["loss_flow"] + 0 * losses["loss_head"]).backward()
    reading = taps.read()
    assert reading["dbg/head_coverage"] == 1 and reading["dbg/grad_head"] == 0


def test_a_frozen_branch():
    model = Branches()
    model.head.requires_grad_(False)
    model.flow[0].requires_grad_(False)
    taps = GradientTaps(model.tags())
    reading = check(model, taps, [model.loss(batch(0))], {"backbone": model.backbone, "flow": model.flow})
    assert reading["dbg/flow_trainable"] == 2
    assert reading["dbg/head_trainable"] == reading["dbg/head_has_grad"] == reading["dbg/head_coverage"] == 0


@pytest.mark.parametrize(("passes", "expected"), [(3, 0.75), (4, 1.0), (5, 1.25)])
def test_accumulation_that_is_not_what_was_said(passes, expected):
    model = Branches()
    taps = GradientTaps(model.tags(), accumulation=4)
    check(model, taps, [model.loss(batch(k)) for k in range(passes)], expect=expected)


# ---- wrappings ----


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    model = Branches()
    taps = GradientTaps(model.tags(), every=1, accumulation=2)

    def run(part, x):
        return checkpoint(part, x.requires_grad_() if x.is_leaf else x, use_reentrant=reentrant)

    for step in range(2):
        expected = autograd_norms(sum(model.loss(batch(2 * step + k)) for k in range(2)), model.tags())
        for k in range(2):
            model.loss(batch(2 * step + k), run=run).backward()
        reading = taps.read()
        assert norms(reading, model.tags()) == close(expected)
        assert coverage(reading) == {"backbone": 1, "flow": 1, "head": 1}
        model.zero_grad()


@pytest.mark.parametrize("outside", ["none", "first", "last"])
def test_a_layer_shared_by_re_entrant_checkpoints_counts_once_a_pass(outside):
    """Its gradient arrives in several inner passes of one backward pass (and, `outside`, in that pass itself)."""
    layer, other = nn.Linear(5, 5), nn.Linear(5, 5)
    taps = GradientTaps({"layer": layer, "other": other}, every=1, accumulation=3)

    def segment(x):
        return checkpoint(lambda x: other(layer(x)).tanh(), x, use_reentrant=True)

    def loss(k):
        x = batch(k)[:, :5].clone().requires_grad_()
        x = layer(x) if outside == "first" else x
        x = segment(segment(segment(x)))
        return (layer(x) if outside == "last" else x).square().mean()

    for _ in range(2):
        for k in range(3):
            loss(k).backward()
        reading = taps.read()
        assert coverage(reading, ("layer", "other")) == {"layer": 1, "other": 1}


def test_all_forward_passes_before_all_backward_passes():
    model = Branches()
    losses = [model.loss(batch(k), run=lambda part, x: checkpoint(part, x, use_reentrant=False)) for k in range(3)]
    taps = GradientTaps(model.tags(), accumulation=3)
    for loss in losses:
        loss.backward()
    assert coverage(taps.read()) == {"backbone": 1, "flow": 1, "head": 1}


def test_compiled():
    """Hooks come and go; the compiled graph is made once."""
    torch.compiler.reset()
    model = Branches()
    taps = GradientTaps(model.tags(), every=2)
    counter = compile_counter()
    compiled = torch.compile(lambda x: model.loss(x), backend=counter, fullgraph=True)
    for step in range(1, 6):
        compiled(batch(step)).backward()
        reading = taps.read()
        if step in (1, 2, 4):
            assert norms(reading, model.tags()) == close(autograd_norms(model.loss(batch(step)), model.tags()))
            assert coverage(reading) == {"backbone": 1, "flow": 1, "head": 1}
        model.zero_grad()
    assert counter.frame_count == 1


def test_a_compiled_module():
    torch.compiler.reset()
    model = Branches()
    counter = compile_counter()
    flow = torch.compile(model.flow, backend=counter)
    taps = GradientTaps({"flow": flow}, every=1)
    for step in range(3):
        x = batch(step)
        loss = flow(model.backbone(x)).square().mean()
        loss.backward()
        reading = taps.read()
        assert reading["dbg/flow_coverage"] == 1 and reading["dbg/grad_flow"] == total_norm(model.flow.parameters())
        model.zero_grad()
    assert counter.frame_count == 1


@pytest.mark.parametrize("unscale", [False, True])
def test_under_a_grad_scaler(unscale):
    model = Branches()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taps = GradientTaps(model.tags(), every=1, scaler=scaler)
    for step in range(2):
        loss = model.loss(batch(step))
        expected = autograd_norms(loss, model.tags())
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        assert norms(taps.read(), model.tags()) == close(expected)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_a_scaler_that_is_off():
    model = Branches()
    taps = GradientTaps(model.tags(), scaler=torch.amp.GradScaler("cpu", enabled=False))
    check(model, taps, [model.loss(batch(0))])


def test_a_step_that_the_scaler_skips_is_infinite_and_moves_nothing():
    model = Branches()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taps = GradientTaps(model.tags(), every=1, scaler=scaler)
    scaler.scale(model.loss(batch(0)) * math.inf).backward()
    scaler.unscale_(optimizer)
    assert not math.isfinite(float(taps.read()["dbg/grad_flow"]))
    scaler.step(optimizer)
    scaler.update()
    assert taps.read()["dbg/update_ratio/flow"] == 0


# ---- parameters that change ----


def test_parameters_shared_between_two_tags():
    model = Branches()
    model.head = nn.Linear(10, 10)
    model.head.weight = model.backbone[2].weight  # one parameter, two tags, two places
    taps = GradientTaps(model.tags(), every=1)
    for k in range(2):
        check(model, taps, [model.loss(batch(k))])


def test_frozen_and_thawed_in_between():
    model = Branches()
    taps = GradientTaps(model.tags(), every=1)
    check(model, taps, [model.loss(batch(0))])
    model.head.requires_grad_(False)  # after the hooks of this step were set
    reading = check(model, taps, [model.loss(batch(1))], {"backbone": model.backbone, "flow": model.flow})
    assert reading["dbg/head_trainable"] == reading["dbg/grad_head"] == reading["dbg/head_coverage"] == 0
    model.head.requires_grad_(True)
    model.loss(batch(2)).backward()
    reading = taps.read()
    assert reading["dbg/head_trainable"] == 2 and reading["dbg/grad_head"] > 0
    assert "dbg/head_coverage" not in reading and reading["dbg/flow_coverage"] == 1  # not known, so not said
    model.zero_grad()
    check(model, taps, [model.loss(batch(3))])


def test_a_layer_that_is_replaced():
    model = Branches()
    taps = GradientTaps(model.tags(), every=2)
    taps.read()  # step 1; the hooks of step 2 are set
    model.flow[2] = nn.Linear(9, 6, bias=False)
    model.loss(batch(0)).backward()
    reading = taps.read()
    assert reading["dbg/flow_trainable"] == 3 and "dbg/flow_coverage" not in reading
    assert float(reading["dbg/grad_flow"]) == close(float(total_norm(model.flow.parameters())))
    taps.read()
    model.zero_grad()
    check(model, taps, [model.loss(batch(1))])
    model.flow[2].weight.data = torch.zeros(6, 12)  # and one whose tensor is exchanged before its update is looked at
    assert set(taps.read()) == {"dbg/update_ratio/backbone", "dbg/update_ratio/head"}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model = Branches()
    taps = GradientTaps(model.tags(), every=1)
    check(model, taps, [model.loss(batch(0))])
    model.loss(batch(1)).backward()
    taps.read()
    model.zero_grad(set_to_none=set_to_none)
    model(batch(2))["loss_flow"].backward()  # the head gets nothing in this step
    reading = taps.read()
    assert reading["dbg/head_coverage"] == 0 and reading["dbg/grad_head"] == 0
    assert reading["dbg/flow_coverage"] == 1 and reading["dbg/grad_flow"] > 0


def test_a_gradient_penalty_is_one_backward_pass():
    model = Branches()
    taps = GradientTaps(model.tags(), every=1)
    x = batch(0).requires_grad_()
    (slope,) = torch.autograd.grad(model.loss(x), x, create_graph=True)
    check(model, taps, [model.loss(x) + slope.square().sum()])


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_backward_pass_through_a_backward_pass():
    model = Branches()
    taps = GradientTaps(model.tags(), accumulation=2)
    model.loss(batch(0)).backward(create_graph=True)
    total_norm(model.parameters())
    sum(p.grad.square().sum() for p in model.flow.parameters()).backward()
    reading = taps.read()
    assert norms(reading, model.tags()) == close({tag: float(total_norm(p.parameters())) for tag, p in model.tags().items()})
    assert reading["dbg/flow_coverage"] == 1
    for p in model.parameters():
        p.grad = None  # create_graph leaves a cycle


def test_a_large_parameter_is_compared_in_part():
    table, small = nn.Embedding(3000, 64), nn.Linear(4, 4)  # rows and columns share factors with any round step
    with torch.no_grad():
        table.weight *= torch.linspace(0.1, 3, 64)
    taps = GradientTaps({"all": [*table.parameters(), *small.parameters()]}, every=1, update_elements=8192)
    before = [table.weight.detach().clone(), *(p.detach().clone() for p in small.parameters())]
    (table.weight.square().sum() + small.weight.sum()).backward()
    taps.read()
    (_, copied), *more = taps._before["all"][1]
    assert 4096 < copied.numel() <= 8192 and not more
    torch.optim.Adam([*table.parameters(), *small.parameters()], lr=1e-2).step()
    exact = float(update_ratio(before, [*table.parameters(), *small.parameters()]))
    assert float(taps.read()["dbg/update_ratio/all"]) == pytest.approx(exact, rel=0.03)


def test_a_parameter_without_elements_beside_a_large_one():
    model = torch.nn.Linear(300, 300)
    model.empty = torch.nn.Parameter(torch.empty(0))
    taps = GradientTaps({"all": model}, every=1)
    model(torch.ones(1, 300)).sum().backward()
    assert taps.read()["dbg/grad_all"].item() > 0


def test_memory_formats_and_precisions_in_one_tag():
    module = nn.ModuleList(
        [nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last), nn.Linear(30, 40).bfloat16(), nn.Linear(3, 3)]
    )
    taps = GradientTaps({"all": module}, every=1, update_elements=1000)
    taps.read()
    with torch.no_grad():
        for p in module.parameters():
            p *= 1.5
    assert float(taps.read()["dbg/update_ratio/all"]) == pytest.approx(0.5, rel=1e-3)


def test_closed_taps_leave_nothing_behind():
    model = Branches()
    taps = GradientTaps(model.tags(), every=1)
    model.loss(batch(0)).backward()
    taps.read()
    taps.close()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    gone = weakref.ref(model.head)
    del model, taps
    gc.collect()
    assert gone() is None


# ---- mistakes ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: GradientTaps({}), "no modules"),
        (lambda m: GradientTaps({"flow": nn.Tanh()}), "'flow': Tanh has no parameters"),
        (lambda m: GradientTaps({"flow": []}), "'flow': no parameters"),
        (lambda m: GradientTaps({"flow": m.forward}), "'flow': got method; expected a module, or parameters"),
        (lambda m: GradientTaps({"flow": [m.flow]}), "'flow': got Sequential; expected a module, or parameters"),
        (lambda m: GradientTaps({"flow": torch.ones(3)}), "'flow': got Tensor; expected a module, or parameters"),
        (lambda m: GradientTaps({1: m.flow}), "a tag must be a name"),
        (lambda m: GradientTaps(m.tags(), every=0), "every=0; expected an integer >= 1"),
        (lambda m: GradientTaps(m.tags(), accumulation=2.0), "accumulation=2.0; expected an integer >= 1"),
        (lambda m: GradientTaps(m.tags(), update_elements=-1), "update_elements=-1"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make(Branches())


def test_read_in_the_wrong_place():
    model = Branches()
    taps = GradientTaps(model.tags(), every=1)
    model.loss(batch(0)).backward()
    model.zero_grad()
    with pytest.raises(UserError, match=r"gradients arrived at 'backbone' and are gone; call read\(\) after the last backward"):
        taps.read()


# ---- norms ----


def test_total_norm_of_any_precision():
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.zeros(n, dtype=d)) for n, d in ((70_000, torch.bfloat16), (9, torch.float64), (5, torch.float16))
    ]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).mul(300).to(p.dtype)
    expected = torch.cat([p.grad.double() for p in parameters]).norm().item()
    assert float(total_norm(parameters)) == close(expected)  # float16 would overflow, bfloat16 keep three digits
    parameters[2].grad[0] = math.inf
    assert float(total_norm(parameters)) == math.inf
    parameters[2].grad[0] = math.nan
    assert math.isnan(float(total_norm(parameters)))


def test_total_norm_without_gradients_and_of_sparse_ones():
    table = nn.Embedding(10, 3, sparse=True)
    assert float(total_norm(table.parameters())) == float(total_norm([])) == 0
    table(torch.tensor([1, 4, 1])).square().sum().backward()
    assert float(total_norm(table.parameters())) == close(table.weight.grad.to_dense().norm().item())


def test_total_norm_in_float32_is_that_of_torch_to_the_bit():
    model = Branches()
    model.loss(batch(0)).backward()
    assert total_norm(model.parameters()) == torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def test_loss_norms():
    model = Branches()
    losses = model(batch(0))
    shared = list(model.backbone.parameters())
    found = loss_norms({**losses, "elsewhere": model.flow[0].bias.sum(), "constant": torch.zeros(())}, shared)
    expected = {name: autograd_norms(loss, {"x": model.backbone})["x"] for name, loss in losses.items()}
    assert {name: float(value) for name, value in found.items()} == close(
        {f"dbg/loss_grad/{name}": value for name, value in {**expected, "elsewhere": 0.0, "constant": 0.0}.items()}
    )
    assert all(p.grad is None for p in model.parameters())
    torch.stack(list(losses.values())).sum().backward()  # the graph is still there


def test_the_loss_of_loss_norms_is_one_number():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=r"loss_norms: 'flow' has shape \(3,\).*reduce it first"):
        loss_norms({"flow": weight.square()}, [weight])


def test_a_parameter_named_twice_counts_once():
    weight = torch.nn.Parameter(torch.ones(3))
    taps = GradientTaps({"twice": [weight, weight]}, every=1)
    weight.square().sum().backward()
    found = taps.read(1)
    assert float(found["dbg/grad_twice"]) == close(math.sqrt(12)) and found["dbg/twice_trainable"] == 1


def test_loss_norms_at_an_activation():
    model = Branches()
    hidden = model.backbone(batch(0))
    flow = model.flow(hidden).square().mean()
    (expected,) = torch.autograd.grad(flow, hidden, retain_graph=True)
    assert float(loss_norms({"flow": flow}, [hidden])["dbg/loss_grad/flow"]) == close(expected.norm().item())


def test_update_ratio():
    assert float(update_ratio([torch.tensor([3.0]), torch.tensor([[4.0]])], [torch.tensor([3.0]), torch.tensor([[4.5]])])) == close(
        0.1
    )
    assert float(update_ratio([], [])) == 0
    assert float(update_ratio([torch.zeros(2)], [torch.zeros(2)])) == 0
    with pytest.raises(ValueError, match="do not have the same shapes"):
        update_ratio([torch.zeros(2)], [torch.zeros(3)])


# ---- two processes ----


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks says: see tapped_ranks.py."""
    script, meet = Path(__file__).parent / "tapped_ranks.py", tmp_path_factory.mktemp("ranks") / "meet"
    processes = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(meet)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    texts = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in texts]


@pytest.mark.parametrize("setting", ["ddp", "ddp, re-entrant checkpoints", "fully_shard", "fully_shard, reduced in every pass"])
def test_over_ranks(ranks, setting):
    for told in (rank[setting] for rank in ranks):
        for found, expected in zip(told["found"], told["norms"], strict=True):
            assert found["total"] == found["dbg/grad_all"] == pytest.approx(expected.pop("total"), rel=1e-5)
            assert norms(found, expected) == pytest.approx(expected, rel=1e-5)
            assert coverage(found, [*expected, "all"]) == dict.fromkeys([*expected, "all"], 1)
            assert found["dbg/backbone_has_grad"] == 12 and found["dbg/backbone_trainable"] == 4
        updates = {tag: told["found"][1][f"dbg/update_ratio/{tag}"] for tag in told["updates"][0]}
        assert updates == pytest.approx(told["updates"][0], rel=1e-5)


def test_shards_copies_and_plain_tensors_together(ranks):
    for found in (rank["by hand"] for rank in ranks):
        assert found["norm"] == found["missing"] == pytest.approx(found["expected"], rel=1e-6)
        assert found["update"] == pytest.approx(0.25, rel=1e-6) and found["refused"] == 1
        assert found["real pass"] == pytest.approx(1, rel=1e-6) and found["coverage"] == 1


def test_an_adaptive_weight_is_one_over_all_ranks(ranks):
    assert [found["ratio"] for rank in ranks for found in rank["adaptive"]] == pytest.approx([0.5] * 4, rel=1e-5)
    assert ranks[0]["adaptive"] == ranks[1]["adaptive"]  # so are the gradients that DDP averaged


def test_flat_parameters_are_refused(ranks):
    assert all("sharded by FullyShardedDataParallel" in rank["flat"] for rank in ranks)
