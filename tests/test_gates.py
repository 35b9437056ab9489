"""The distribution, the penalty, the four methods, and the hardening."""

import math

import pytest
import torch
from conftest import CONSTRAINED, TINY, tiny

import sslprune
from flops import BASE, SAMPLES, SMALL, UserError, cost
from gates import KINDS, METHODS, HardConcrete, Lagrangian, check_budget, harden
from transformer import Wav2Vec2


def test_gates_are_open_as_often_as_they_say():
    torch.manual_seed(0)
    gate = HardConcrete(6)
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-4.0, -1.6, -0.5, 0.0, 1.0, 3.0]))
        z = torch.stack([gate() for _ in range(20_000)])
    probability = gate.open_probability()
    standard_error = (probability * (1 - probability) / len(z)).sqrt()
    assert ((z > 0).double().mean(0) - probability).abs().lt(4 * standard_error).all()
    assert z.min() == 0
    assert z.max() == 1
    # As printed in the paper, with beta = 2/3, gamma = -0.1, zeta = 1.1.
    assert probability[3].item() == pytest.approx(1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1))), rel=1e-6)


def test_samples_follow_the_equation():
    torch.manual_seed(1)
    u = torch.rand(4)
    torch.manual_seed(1)
    gate = HardConcrete(4)
    log_alpha = gate.log_alpha.detach()
    expected = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) * 3 / 2) * 1.2 - 0.1
    assert torch.allclose(gate(), expected.clamp(0, 1), atol=1e-6)


def test_gates_start_open_and_are_deterministic_at_evaluation():
    gate = HardConcrete(5)
    assert torch.allclose(
        gate.log_alpha.exp(), torch.tensor(99.0)
    )  # as in flop and DPHuBERT, at their drop rate of 0.01
    assert torch.allclose(1 - gate.open_probability(), torch.tensor(0.002038, dtype=torch.float64), atol=1e-6)
    gate.eval()
    assert (gate() == 1).all()
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0]))
    expected = [0, 1.2 / (1 + math.e) - 0.1, 0.5, 1.2 * math.e / (1 + math.e) - 0.1, 1]
    assert gate().tolist() == pytest.approx(expected, abs=1e-6)
    assert gate.kept().tolist() == [1, 2, 3, 4]


def test_a_gate_is_trained_towards_what_the_loss_wants():
    torch.manual_seed(0)
    gate = HardConcrete(2)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        z = gate()
        (z[0] - z[1]).backward()
        optimizer.step()
    gate.eval()
    assert gate().tolist() == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_the_penalty_is_the_augmented_lagrangian(method):
    model = tiny(KINDS[method])
    lagrangian = Lagrangian(TINY, method, 0.6)
    dense = cost(TINY, 160_000)
    expected = cost(TINY.with_counts({p: g.open_probability().sum().item() for p, g in model.gates.items()}), 160_000)
    gaps = [1 - measure(expected) / measure(dense) - 0.4 * 0.25 for measure in CONSTRAINED[method]]
    assert lagrangian(model.gates, 0.25).item() == 0  # multipliers start at 0
    with torch.no_grad():
        lagrangian.multipliers.copy_(torch.tensor([[1.5, -2.0], [0.5, 3.0]])[: len(gaps)])
    by_hand = sum(a * gap + b * gap**2 for (a, b), gap in zip(lagrangian.multipliers.tolist(), gaps))
    assert lagrangian(model.gates, 0.25).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_constraint_alone_brings_the_expected_cost_to_the_budget(method):
    torch.manual_seed(0)
    model, budget = tiny(), 0.7
    model.add_gates(KINDS[method])
    lagrangian = Lagrangian(TINY, method, budget)
    gates = [gate.log_alpha for gate in model.gates.values()]
    groups = [{"params": gates}, {"params": [lagrangian.multipliers], "maximize": True}]
    optimizer = torch.optim.Adam(groups, lr=0.05)
    for step in range(800):
        optimizer.zero_grad()
        lagrangian(model.gates, min(1, step / 80)).backward()
        optimizer.step()
    assert (1 - lagrangian.sparsity(model.gates)).tolist() == pytest.approx([budget] * len(METHODS[method]), abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_the_expected_cost_does_not_swing_about_the_budget(method):
    """In few updates at a high rate, against a noisy task that wants some units more than others."""
    model, budget, updates = sslprune.SpeechModel(tiny(), "slu", ["a"]), 0.5, 300
    model.train().encoder.add_gates(KINDS[method])
    gates, lagrangian = model.encoder.gates, Lagrangian(TINY, method, budget)
    optimizer, off = sslprune.make_optimizer(model, lagrangian, 0.2), []
    wanted = [10 ** (torch.rand(len(gate.log_alpha)) * 3 - 4.5) for gate in gates.values()]
    for step in range(updates):
        optimizer.zero_grad()
        task = sum(
            (want * (1 + 3 * torch.randn_like(want)) * (1 - gate()) ** 2).sum()
            for want, gate in zip(wanted, gates.values())
        )
        (task + lagrangian(gates, min(1, 2 * step / updates))).backward()
        optimizer.step()
        off.append((1 - lagrangian.sparsity(gates) - budget).abs().max().item())
    assert max(off[-updates // 5 :]) < sslprune.CONVERGED


@pytest.mark.parametrize("budget", [0.45, 0.5, 0.83])
@pytest.mark.parametrize("method", METHODS)
def test_hardening_keeps_the_best_units_that_the_budget_allows(method, budget):
    for seed in range(4):
        model = tiny(KINDS[method], seed)
        scores = {place: gate.log_alpha.detach().clone() for place, gate in model.gates.items()}
        harden(model.gates, TINY, method, budget, ragged=True)
        kept, dense = model.shape, cost(TINY, SAMPLES)
        limits = [budget * measure(dense) for measure in CONSTRAINED[method]]

        def fits(shape, constraints=CONSTRAINED[method], limits=limits):
            return all(measure(cost(shape, SAMPLES)) <= limit for measure, limit in zip(constraints, limits))

        assert fits(kept)
        assert min(kept.channels) >= 1
        for (kind, layer), gate in model.gates.items():
            count = getattr(kept, kind)[layer]
            if count < len(gate.log_alpha):  # no further unit fits
                assert not fits(kept.with_counts({(kind, layer): count + 1}))
            if 0 < count < len(gate.log_alpha):  # the kept ones are the most probable ones
                is_kept = gate.log_alpha > -math.inf
                assert scores[kind, layer][is_kept].min() >= scores[kind, layer][~is_kept].max()
            assert set(gate.open_probability().round().tolist()) <= {0.0, 1.0}
            assert (gate()[gate.kept()] >= 0.5).all()


def test_hardening_has_one_threshold_over_all_layers():
    model = tiny(("units",))
    with torch.no_grad():
        for (
            _,
            layer,
        ), gate in model.gates.items():  # layer 1 all low, layer 2 all high; units cost the same everywhere
            gate.log_alpha.copy_(torch.randn_like(gate.log_alpha) * 0.1 + [0.0, -3.0, 3.0][layer])
    whole = cost(TINY, SAMPLES).macs
    units_16 = whole - cost(TINY.with_counts({("units", 0): 4}), SAMPLES).macs
    harden(model.gates, TINY, "transformer", (whole - units_16) / whole, ragged=True)
    assert model.shape.units == (16, 0, 16)


@pytest.mark.parametrize("good", [1, 2, 5])
def test_single_channels_are_kept_as_many_as_are_good(good):
    """The one that stays in any case is the first of them, and not one more."""
    model = tiny(KINDS["mac"])
    with torch.no_grad():
        for (kind, layer), gate in model.gates.items():
            gate.log_alpha.fill_(-50 if (kind, layer) == ("channels", 3) else 5)
        model.gates["channels", 3].log_alpha[:good] = 9
    whole = cost(TINY, SAMPLES).macs
    harden(model.gates, TINY, "mac", cost(TINY.with_counts({("channels", 3): good}), SAMPLES).macs / whole, ragged=True)
    assert model.shape == TINY.with_counts({("channels", 3): good})


@pytest.mark.parametrize("shape", [BASE, SMALL])
@pytest.mark.parametrize("method", METHODS)
def test_hardening_meets_every_budget_within_its_tolerance_and_keeps_whole_groups(method, shape):
    torch.manual_seed(0)
    sizes = {(kind, layer): n for kind in KINDS[method] for layer, n in enumerate(getattr(shape, kind))}
    gates, dense = {place: HardConcrete(n).eval() for place, n in sizes.items()}, cost(shape, SAMPLES)
    for budget in (0.995, 0.99, 0.9, 0.71, 0.5, 0.31):
        try:
            check_budget(shape, method, budget)
        except UserError:  # the lowest, for transformer
            assert budget < 0.4
            continue
        for gate in gates.values():
            torch.nn.init.normal_(gate.log_alpha, mean=torch.randn(()).item(), std=2)
        harden(gates, shape, method, budget)
        kept = shape.with_counts({place: len(gate.kept()) for place, gate in gates.items()})
        tolerance = 0.004 if method == "sepsize" else 0.002  # a channel is a larger part of a frontend alone
        for measure in CONSTRAINED[method]:
            assert budget - tolerance < measure(cost(kept, SAMPLES)) / measure(dense) <= budget
        grain = {"channels": 32 if shape is BASE else 16, "units": 16}
        ragged = [count for kind in grain for count in getattr(kept, kind) if count % grain[kind] and count != 1]
        # A group is a larger part of a budget of parameters; single units fill one layer, or two of a frontend alone.
        assert len(ragged) <= {"mac": 0, "transformer": 0, "size": 1, "sepsize": 3}[method]


def test_a_group_that_does_not_fit_gives_way_to_worse_ones_that_do():
    """One head of the small model is 1.4 % of its MACs: of a budget of 0.99 it would take more than is left."""
    torch.manual_seed(0)
    model = Wav2Vec2(SMALL)
    model.add_gates(KINDS["transformer"])
    with torch.no_grad():
        for (kind, layer), gate in model.gates.items():
            gate.log_alpha.copy_(torch.randn_like(gate.log_alpha) + 5 * (kind == "units"))
        model.gates["heads", 2].log_alpha[3] = -8
        model.gates["units", 1].log_alpha[:16] = -9  # worse, and smaller
    scores = {place: gate.log_alpha.clone() for place, gate in model.gates.items()}
    dense = cost(SMALL, SAMPLES).macs
    head = 1 - cost(SMALL.with_counts({("heads", 2): 5}), SAMPLES).macs / dense
    harden(model.gates, SMALL, "transformer", 1 - head + 0.0005)
    assert model.shape.heads == (6, 6, 5, 6) and model.shape.units == SMALL.units
    with torch.no_grad():
        for place, gate in model.gates.items():
            gate.log_alpha.copy_(scores[place])
    harden(model.gates, SMALL, "transformer", 0.99)  # without the head, 0.4 % were unused: it takes the units' room
    assert model.shape.heads == SMALL.heads and model.shape.units[1] < 800
    assert 0.988 < cost(model.shape, SAMPLES).macs / dense <= 0.99


def test_single_units_are_of_the_finest_kind_first(monkeypatch):
    monkeypatch.setattr("gates.groups", lambda *arguments: [])  # so that all are single
    model = Wav2Vec2(SMALL)
    model.add_gates(KINDS["mac"])
    harden(model.gates, SMALL, "mac", 0.7)
    assert model.shape.units == SMALL.units and model.shape.heads == SMALL.heads
    assert min(model.shape.channels) == 1


def test_a_group_is_as_good_as_its_middle_unit():
    gates = {("units", layer): HardConcrete(32) for layer in range(3)}
    with torch.no_grad():
        for (_, layer), gate in gates.items():
            gate.log_alpha.fill_(2.0)
            gate.log_alpha[16:] = [-3.0, 0.0, 1.0][layer]
        gates["units", 0].log_alpha[16] = 1.9  # the best of a bad group
        gates["units", 2].log_alpha[31] = -9.0  # the worst of a good one
    shape = SMALL.with_counts({place: 32 for place in gates})
    budget = cost(shape.with_counts({("units", 0): 16}), SAMPLES).macs / cost(shape, SAMPLES).macs
    harden(gates, shape, "transformer", budget)
    assert [len(gate.kept()) for gate in gates.values()] == [16, 32, 32]


def test_a_method_gates_what_it_says():
    places = {method: {kind for kind, _ in tiny(KINDS[method]).gates} for method in METHODS}
    everything = {"channels", "heads", "units"}
    assert places == {"mac": everything, "size": everything, "sepsize": everything, "transformer": {"heads", "units"}}


def test_an_unreachable_budget_is_refused_with_the_floor():
    with pytest.raises(UserError, match=r"transformer.*0\.36"):
        check_budget(BASE, "transformer", 0.36)
    check_budget(BASE, "transformer", 0.367)
    for method in METHODS:
        check_budget(BASE, method, 0.5)
        with pytest.raises(UserError, match="budget"):
            check_budget(BASE, method, 0.001)


@pytest.mark.parametrize("method", METHODS)
def test_the_floor_is_the_smallest_model_that_the_method_can_make(method):
    low, high = 0.0, 1.0
    for _ in range(40):  # the floor, from outside
        middle = (low + high) / 2
        try:
            check_budget(TINY, method, middle)
            high = middle
        except UserError:
            low = middle
    model = tiny(KINDS[method])
    harden(model.gates, TINY, method, high)
    assert (
        max(measure(cost(model.shape, SAMPLES)) / measure(cost(TINY, SAMPLES)) for measure in CONSTRAINED[method])
        <= high
    )
    if method != "sepsize":  # whose two parts have two floors
        assert set(model.shape.heads + model.shape.units) == {0}
        assert set(model.shape.channels) == ({1} if method != "transformer" else set(TINY.channels))
