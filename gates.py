"""Which units to keep: hard-concrete gates, the constraint that trains them, and the hardening that ends it.

A unit is an output channel of a convolution, an attention head or a feed-forward unit. Each has a gate z in [0, 1]:

    s = sigmoid((log u - log(1 - u) + log alpha) / beta),  u ~ U(0, 1)
    z = clamp(s (zeta - gamma) + gamma, 0, 1)
    P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta))

(Louizos, Welling, Kingma 2018, arXiv 1712.01312, eq. 10 to 13.) Weights and gates minimise, and multipliers maximise,

    L_task + lambda_1 (S - t) + lambda_2 (S - t)^2,  S = 1 - E[cost] / dense cost

with the target sparsity t warmed up linearly from 0 (Wang, Wohlwend, Lei 2020, arXiv 1910.04732, section 3.2).
lambda_2 ascends by (S - t)^2, so it only grows (by Adam some 0.1 an update of the demo, to 34). That does no harm: its
force on the gates is 2 lambda_2 (S - t), so the larger it is, the closer it holds S to t, where it has none. lambda_1
falls, to below 0, while S is short of t, which rewards sparsity, and rises again where S exceeds t.

S counts P(z != 0), which has a gradient, while the deterministic z at evaluation is 0 or not: z > 0 means log alpha >
-2.40, and a gate there still has P = 0.31. So the two counts differ by the gates that are neither open nor shut, which
are few when the constraint has converged. Hardening ends that: it keeps the best units that the budget allows.
What is constrained is the method's choice: `METHODS` (Peng et al. 2023, arXiv 2302.14132).

Gates are given to the functions here as a dictionary from (field of flops.Shape, layer) to gate, e.g. ("heads", 3).
"""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn

from flops import SAMPLES, UserError, cost

TOLERANCE = 0.002  # of the dense cost, which hardening may leave unused for the sake of whole groups
# Units are kept in groups of so many, as odd sizes run slower (README, Speed): a register of AVX-512 holds 16 floats,
# and a convolution works on two registers at a time. A layer whose size is not a multiple uses half the group size.
ALIGN = {"units": 16, "heads": 1, "channels": 32}  # the finest kind first
FEWEST = {"units": 0, "heads": 0, "channels": 1}  # that must stay in a layer


class HardConcrete(nn.Module):
    """Gates of the units of one layer (arXiv 1712.01312). Calling it samples z while training; else z is deterministic.

    beta, gamma, zeta: temperature and the ends of the stretched interval, the paper's values (its section 4).
    drop: P(s < 1/2) at the start, so that gates start open and training starts from the dense model. It is DPHuBERT's
    0.01, as log alpha = log((1 - drop) / drop); P(z = 0), for which s has to be under 1/12, is then 0.002.
    """

    def __init__(self, units, beta=2 / 3, gamma=-0.1, zeta=1.1, drop=0.01):
        super().__init__()
        self.beta, self.gamma, self.zeta = beta, gamma, zeta
        self.shift = beta * math.log(-gamma / zeta)
        self.log_alpha = nn.Parameter(torch.full((units,), math.log((1 - drop) / drop)))

    def open_probability(self):
        """P(z != 0) of each unit: (units,) float64, since sums over a whole model need more digits than float32 has."""
        return torch.sigmoid(self.log_alpha.double() - self.shift)

    def forward(self):
        """z: (units,), differentiable in log_alpha.

        One sample serves the whole batch: a forward trains one sub-network, as slicing leaves one. The noise averages
        out over batches, processes and updates.
        """
        if not self.training:
            return self._stretched(self.log_alpha)
        noise = torch.logit(torch.rand_like(self.log_alpha), eps=1e-6)
        return self._stretched((noise + self.log_alpha) / self.beta)

    def _stretched(self, logit):
        return (torch.sigmoid(logit) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    @torch.no_grad()
    def kept(self):
        """Indices of the units that are open at evaluation: (kept,) int64."""
        return self._stretched(self.log_alpha).nonzero().flatten()

    @torch.no_grad()
    def harden(self, count):
        """Keep the `count` units that are most probably open; shut the others for good.

        Kept gates are opened at least halfway: one can be near 0 where training shut more than the budget asks for,
        and its unit would be kept in vain.
        """
        order = self.log_alpha.argsort(descending=True, stable=True)
        self.log_alpha.clamp_(min=0)
        self.log_alpha[order[count:]] = -math.inf


class Constraint(NamedTuple):
    """A cost that is kept at the budget by the gates of some kinds of units. `measure` takes a flops.Cost."""

    name: str
    measure: Callable
    kinds: tuple


# In the order of hardening: what the frontend keeps changes the rest's cost (the projection's), and not the reverse.
METHODS = {
    "mac": [Constraint("MACs", attrgetter("macs"), ("channels", "heads", "units"))],
    "size": [Constraint("parameters", attrgetter("params"), ("channels", "heads", "units"))],
    "sepsize": [
        Constraint("frontend parameters", attrgetter("frontend.params"), ("channels",)),
        Constraint("other parameters", lambda c: c.params - c.frontend.params, ("heads", "units")),
    ],
    "transformer": [Constraint("MACs", attrgetter("macs"), ("heads", "units"))],
}
KINDS = {method: sum((constraint.kinds for constraint in constraints), ()) for method, constraints in METHODS.items()}


def check_budget(shape, method, budget):
    """Raise UserError where `method` cannot bring a model of this dense shape down to `budget`, a fraction of its cost.

    The floor of a constraint keeps one channel per convolution and no heads or units, of the kinds that it governs.
    """
    dense = cost(shape, SAMPLES)
    for constraint in METHODS[method]:
        places = [(kind, layer) for kind in constraint.kinds for layer in range(len(getattr(shape, kind)))]
        smallest = shape.with_counts({place: FEWEST[place[0]] for place in places})
        floor = constraint.measure(cost(smallest, SAMPLES)) / constraint.measure(dense)
        if budget < floor:
            limit = f"bring the {constraint.name} under {math.ceil(floor * 1e4) / 1e4:.4f} of the dense model's"
            what = f"budget {budget:g} is out of reach: method {method} cannot {limit}"
            raise UserError(f"{what}; give a larger --budget or another --method")


def expected_shape(shape, gates):
    """`shape` with each gated count replaced by its expectation, the sum of open probabilities (float64 tensors)."""
    return shape.with_counts({place: gate.open_probability().sum() for place, gate in gates.items()})


class Lagrangian(nn.Module):
    """The penalty of a method: lambda_1 (S - t) + lambda_2 (S - t)^2, summed over its constraints (arXiv 1910.04732).

    Its only parameters are the multipliers, (constraints, 2) and 0 at the start; train them with gradient ascent.
    """

    def __init__(self, shape, method, budget):
        super().__init__()
        self.shape, self.method, self.budget = shape, method, budget
        self.dense = cost(shape, SAMPLES)
        self.multipliers = nn.Parameter(torch.zeros(len(METHODS[method]), 2))

    def sparsity(self, gates):
        """Expected sparsity S of each constrained cost: (constraints,) float64, differentiable."""
        expected = cost(expected_shape(self.shape, gates), SAMPLES)
        kept = [constraint.measure(expected) / constraint.measure(self.dense) for constraint in METHODS[self.method]]
        return 1 - torch.stack(kept)

    def forward(self, gates, warmup):
        """The penalty, a scalar. `warmup` in [0, 1] is the share of the target that is asked for now."""
        gap = self.sparsity(gates) - (1 - self.budget) * warmup
        return (self.multipliers * torch.stack((gap, gap * gap), dim=1)).sum()


@torch.no_grad()
def harden(gates, shape, method, budget, ragged=False):
    """Shut gates for good: the actual cost is then at most `budget` of the dense one, and close to it.

    Greedy, for each constraint: of the groups of units of all its layers (ragged: the single units), the best first,
    each is kept that still fits. Where that leaves more than TOLERANCE, single units follow, layer by layer, the finest
    kind first; and where no single unit fits any more, a group of a coarser kind replaces the worst groups of the
    finest, if that leaves less. gates: by place; their log alpha is changed. Raises UserError where even the smallest
    model costs more.
    """
    dense, kept = cost(shape, SAMPLES), {}
    for constraint in METHODS[method]:
        governed = {place: gate for place, gate in gates.items() if place[0] in constraint.kinds}
        kept |= {place: FEWEST[place[0]] for place in governed}

        def unused(counts, constraint=constraint):  # bind the constraint now: the loop variable changes
            now = cost(shape.with_counts(kept | counts), SAMPLES)
            return budget - constraint.measure(now) / constraint.measure(dense)

        if unused({}) < 0:
            raise UserError(f"budget {budget:g} is out of reach for the {constraint.name}; give a larger --budget")
        def one_more(place, size):  # the next whole group
            return {place: min((kept[place] // size + 1) * size, len(governed[place].log_alpha))}

        ranked = groups(governed, ragged)
        for place, size in ranked:
            if unused(one_more(place, size)) >= 0:
                kept |= one_more(place, size)
        finest_first = sorted(governed, key=lambda place: list(ALIGN).index(place[0]))
        for place in finest_first if unused({}) > TOLERANCE else ():
            while kept[place] < len(governed[place].log_alpha) and unused({place: kept[place] + 1}) >= 0:
                kept[place] += 1
        finest = finest_first[0][0]  # none of it fits any more; a head in the place of some units may leave less
        for place, size in ranked if unused({}) > TOLERANCE else ():
            trade = one_more(place, size)
            for fine, step in reversed(ranked):
                if fine[0] == finest != place[0] and unused(trade) < 0:
                    trade[fine] = max(0, trade.get(fine, kept[fine]) - step)
            if 0 <= unused(trade) < unused({}):
                kept |= trade
        for place, gate in governed.items():
            gate.harden(kept[place])


def groups(gates, ragged):
    """(place, size) of each group of units, best first. A group is as good as its middle unit.

    By log alpha: it orders units as the open probability does, and does not round to equal values near 0 and 1.
    """
    ranked = []
    for place, gate in gates.items():
        scores = gate.log_alpha.sort(descending=True).values
        align = 1 if ragged else ALIGN[place[0]]
        size = align if len(scores) % align == 0 else max(1, align // 2)
        beyond = scores.split(size)[FEWEST[place[0]] // size :]  # a unit that stays in any case is no group
        ranked += [(group[len(group) // 2].item(), place, size) for group in beyond]
    return [(place, size) for _, place, size in sorted(ranked, key=lambda group: -group[0])]
