"""What the experiment says: differences with intervals, the verdict on the paper's claim, and the figure.

    .venv/bin/python tests/experiment/curves.py                     # the page's, from results.jsonl
    .venv/bin/python tests/experiment/curves.py runs/results.jsonl  # your own, from grid.py

prints the verdict and the tables, as they stand in the README, and draws curve.svg beside the results.

A condition is a method at a budget, with a set of flags. Its errors are those of all folds, in which each speaker is
tested once, and of all seeds. The interval of a difference holds the middle 95 % of 10,000 draws: as many speakers as
there are, drawn with replacement, the same ones for both conditions (a bootstrap, Bisani and Ney, ICASSP 2004), plus a
normal number for other runs (`difference`). It is for these training sets and starts: what others would change is not
in it. What the words of `judged` mean, CLAIMS and MARGIN were fixed before the first point ran. Nothing is said of a
task and an amount of data before all of its points are there.
"""

import argparse
import functools
import itertools
import math
import textwrap
from pathlib import Path

import grid
import numpy as np
from grid import UserError

from gates import KINDS

MARGIN = 0.05  # of the dense model's error
DRAWS = 10_000
METHODS = {  # in the figure
    "dense": ("#000000", "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0Z"),
    "mac": ("#0072b2", "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0Z"),
    "transformer": ("#d55e00", "M-4.5-4.5h9v9h-9Z"),  # about the other sign, where both are at one place
}
ERRORS = {"asr": "word errors", "slu": "intents wrong"}
AMOUNTS = {"quarter": "a quarter", "all": "all data"}
MORE_ACCURATE, NO_WORSE, LITTLE_WORSE = "more accurate", "no worse", "worse by less than the margin"
SHOWS_BETTER, SHOWS_NO_WORSE = {MORE_ACCURATE}, {MORE_ACCURATE, NO_WORSE, LITTLE_WORSE}
CLAIMS = [  # (the claim, what is compared with what, at which budgets, which words show it)
    ("`mac` more accurate than dense with 10 to 30 % fewer MACs", "mac", "dense", (0.9, 0.7), SHOWS_BETTER),
    ("`mac` no worse than dense with 50 % fewer MACs", "mac", "dense", (0.5,), SHOWS_NO_WORSE),
    ("`mac` more accurate than `transformer` with as many MACs", "mac", "transformer", (0.7, 0.5), SHOWS_BETTER),
]


class Condition:
    """The runs of a method at a budget with a set of flags: of each fold and seed one."""

    def __init__(self, results):
        self.results = sorted(results, key=lambda r: (r["seed"], r["fold"]))
        self.macs, self.params = (np.mean([r[cost] for r in results]) for cost in ("macs", "params"))
        self.dev = np.mean([grid.dev_error(r) for r in results])
        first = self.results[0]["seed"]
        self.speakers = [len(r["speakers"]) for r in self.results if r["seed"] == first]  # of each fold
        # (seeds, speakers, numbers): errors, of how many; in recognition, of characters after those of words
        self.counts = self.of_seeds(lambda r: [r["speakers"][s] for s in sorted(r["speakers"])])
        self.utterances = self.of_seeds(lambda r: r["utterances"])  # (seeds, utterances): errors

    def of_seeds(self, function):
        """An array of function(result), one after the other in the order of folds, for each seed."""
        seeds = itertools.groupby(self.results, lambda r: r["seed"])
        return np.array([np.concatenate([function(r) for r in runs]) for _, runs in seeds])

    def errors(self, which=0):
        """Part of the words or intents (0), or of the characters (1), that is wrong, for each seed."""
        return self.counts[:, :, 2 * which].sum(1) / self.counts[:, :, 2 * which + 1].sum(1)

    def folds(self):
        """The counts of each fold: (seeds, speakers, numbers) each."""
        return np.split(self.counts, np.cumsum(self.speakers)[:-1], axis=1)


# --- Statistics ----------------------------------------------------------------------------------------------------


def sampling_variance(changes, total):
    """Variance of changes.sum() / total.sum() by the draw of speakers: linearised, as of a ratio (Cochran 1977)."""
    rest = changes - changes.sum() / total.sum() * total
    return (rest**2).sum() / total.sum() ** 2 * len(total) / (len(total) - 1)


def variance_between_runs(conditions):
    """How much the error of a fold varies from run to run, beyond what these speakers' own luck explains.

    Two runs of a condition differ by what is theirs and by what each speaker's words did in each. The bootstrap over
    speakers has the latter already: their squared difference, less its variance by speakers, is twice the former.
    """
    found = []
    for counts in itertools.chain(*(condition.folds() for condition in conditions)):
        total = counts[0, :, 1]
        for one, other in itertools.combinations(counts[:, :, 0], 2):
            changes = one - other
            found.append((changes.sum() / total.sum()) ** 2 / 2 - sampling_variance(changes, total) / 2)
    return max(0.0, np.mean(found))


@functools.cache
def drawn(speakers):
    """How often each of so many speakers is drawn, (DRAWS, speakers), and DRAWS normal numbers; always the same."""
    random = np.random.RandomState(0)
    return random.multinomial(speakers, [1 / speakers] * speakers, size=DRAWS).astype(float), random.randn(DRAWS)


def difference(ours, theirs, between_runs):
    """Our error less theirs, and its interval: (difference, lower, upper).

    between_runs: the variance of a fold's error. In a fold, the difference of the means of S runs each varies by
    2 `between_runs` / S; folds weigh by their words.
    """
    changes = (ours.counts - theirs.counts)[:, :, 0].mean(0)
    total = ours.counts[0, :, 1]
    speakers, normal = drawn(len(total))
    weights = np.array([counts[0, :, 1].sum() for counts in ours.folds()]) / total.sum()
    noise = np.sqrt(2 * between_runs / len(ours.counts) * (weights**2).sum())
    lower, upper = np.percentile(speakers @ changes / (speakers @ total) + noise * normal, (2.5, 97.5))
    return changes.sum() / total.sum(), lower, upper


def in_folds(ours, theirs):
    """The difference in each fold."""
    pairs = zip(ours.folds(), theirs.folds())
    return [(a - b)[:, :, 0].mean(0).sum() / a[0, :, 1].sum() for a, b in pairs]


def mapsswe(ours, theirs):
    """P of the matched-pairs test of word errors in sentences (Gillick and Cox, ICASSP 1989), two-sided.

    It asks whether these very runs differ on other utterances; neither other speakers nor other runs are in it.
    """
    changes = (ours.utterances - theirs.utterances).mean(0)
    deviation = changes.std(ddof=1) / np.sqrt(len(changes))
    return math.erfc(abs(changes.mean()) / deviation / math.sqrt(2)) if deviation else float(not changes.any())


# --- Results -------------------------------------------------------------------------------------------------------


class Panel:
    """All conditions of a task and an amount of data."""

    def __init__(self, task, amount, results):
        self.task, self.amount, self.results = task, amount, {grid.point_of(r): r for r in results}
        self.best, self.tried = grid.chosen(task, results), grid.tried(task, results)

        def condition(flags, which):
            mine = (flags, *which)
            found = [r for r in results if (r["flags"], r["method"], r["budget"]) == mine and r["seed"] in grid.SEEDS]
            return Condition(found)

        self.points = {which: condition(self.best[0], which) for which in grid.COMPARED}
        alike = self.best[0] == self.best[1]
        self.beside = {which: self.points[which] if alike else condition(self.best[1], which) for which in grid.TUNED}
        self.between_runs = variance_between_runs(dict.fromkeys([*self.points.values(), *self.beside.values()]))
        self.dense = self.points["dense", 1.0]
        self.margin = MARGIN * np.mean(self.dense.errors())

    def difference(self, ours, theirs):
        return difference(ours, theirs, self.between_runs)

    def judged(self, ours, theirs):
        """What the difference's interval says, in words; with a margin where theirs is dense."""
        dense = theirs in (self.dense, self.beside["dense", 1.0])
        return judged(self.difference(ours, theirs), self.margin if dense else 0)

    def __str__(self):
        return f"{self.task.upper()}, {AMOUNTS[self.amount]}"


def read(path):
    """([Panel], [what is not whole yet, in words]) of a file of results. Raises UserError."""
    groups, alike = {}, {}
    for number, result in enumerate(grid.read_results(path), 1):
        task, amount, point = result["task"], result["amount"], grid.point_of(result)
        test_set = {speaker: counts[1::2] for speaker, counts in result["speakers"].items()}
        same = {
            (task, amount, point.fold): (result["inputs"], test_set, len(result["utterances"])),
            (task, amount, point.flags): result["options"],
        }
        group = groups.setdefault((task, amount), {})
        if point in group or any(alike.setdefault(key, value) != value for key, value in same.items()):
            raise UserError(
                f"{path}, line {number}: is the same point as an earlier line, or differs from one in its start, corpus"
                " or flags; remove one of them"
            )
        group[point] = result
    panels, missing = [], []
    for (task, amount), group in groups.items():
        to_go = grid.points_of(task, group.values()) - group.keys()
        if to_go:
            missing.append(f"{task} {amount} has {len(group)} points, and lacks {len(to_go)} or more")
        else:
            panels.append(Panel(task, amount, group.values()))
    if not panels:
        found = "; ".join(missing) or "it has no results"
        raise UserError(f"{path}: nothing is said before all points of a task and an amount are there: {found}")
    return sorted(panels, key=lambda p: (list(ERRORS).index(p.task), list(AMOUNTS).index(p.amount))), missing


# --- Words ---------------------------------------------------------------------------------------------------------


def in_points(values):
    """A difference with its interval."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * value for value in values))


def judged(values, margin):
    """What the interval of a difference says, in words."""
    _, lower, upper = values
    if upper < 0:
        return MORE_ACCURATE
    if upper < margin:
        return NO_WORSE if lower <= 0 else LITTLE_WORSE
    return "worse" if lower > 0 else "not told apart"


def verdict(panels):
    """Five sentences: what is compared, whether each part of the paper's claim is shown, and what tuning does to it.

    A part is shown where a budget's word is one that it wants. It is refuted where the intervals of all its budgets lie
    above what it allows: above 0, or above the margin where it says "no worse".
    """
    heads, tuned = [], []
    for p in panels:
        error, counts = 100 * np.mean(p.dense.errors()), p.dense.counts[0]
        of = f"of {counts[:, 1].sum():,}, by {len(counts)} speakers; margin {100 * p.margin:.2f} points"
        heads.append(f"{p}, {error:.2f} % {ERRORS[p.task]} ({of})")
        theirs = p.beside["mac", 0.7]
        same, own = p.judged(theirs, p.beside["dense", 1.0]), p.judged(theirs, p.dense)
        each = f"{same}; each with its own best, {own}"
        tuned.append(f"{p}: {'the same are best for dense' if p.best[0] == p.best[1] else each}")
    lines = [f"Dense on test: {'. '.join(heads)}."]
    for claim, method, other, budgets, wanted in CLAIMS:
        said = []
        for p in panels:
            theirs = {budget: p.dense if other == "dense" else p.points[other, budget] for budget in budgets}
            pairs = {budget: (p.points[method, budget], theirs[budget]) for budget in budgets}
            words = {budget: p.judged(*pair) for budget, pair in pairs.items()}
            where = " and ".join(f"{budget:g}" for budget, word in words.items() if word in wanted)
            allowed = p.margin if wanted is SHOWS_NO_WORSE else 0
            lowest = min(p.difference(*pair)[1] for pair in pairs.values())
            shown = f"shown at {where}" if where else "refuted" if lowest > allowed else "not shown"
            said.append(f"{p}: {shown} ({', '.join(f'{budget:g} {word}' for budget, word in words.items())})")
        lines.append(f"{claim}. {'. '.join(said)}.")
    lines.append(f"`mac` 0.7 against dense, both with the flags that are best for `mac` 0.7. {'. '.join(tuned)}.")
    return "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in lines)


def rows(head, lines):
    """Markdown of a table: the first column is text, the others are numbers."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] + ["---:"] * (len(head) - 1), *lines])


def table(panels):
    """Markdown: a line for each condition."""
    lines = []
    for panel in panels:
        beside = panel.beside.items() if panel.best[0] != panel.best[1] else ()
        for (method, budget), p in [*panel.points.items(), *beside]:
            mine = panel.points if p in panel.points.values() else panel.beside
            dense, equal = mine["dense", 1.0], mine.get(("transformer", budget)) if method == "mac" else None
            name = f"{panel.task} {panel.amount} {f'`{method}` {budget:g}' if p is not dense else method}"
            name += f", `{panel.best[1]}`" if mine is panel.beside else ""
            name += "" if all(r["converged"] for r in p.results) else " (not converged)"
            kept = [] if p is dense else [np.mean([r["expected"][kind] for r in p.results]) for kind in KINDS["mac"]]
            errors = [f"{100 * np.mean(p.errors(which)):.2f}" for which in range(2 if panel.task == "asr" else 1)]
            folds = ", ".join(f"{100 * change:+.1f}" for change in in_folds(p, dense))
            less = "" if p is dense else f"{in_points(panel.difference(p, dense))} ({folds})"
            lines.append([
                name,
                f"{p.macs:.1%}",
                f"{p.params:.1%}",
                ", ".join(f"{share:.0%}" for share in kept),
                f"{100 * p.dev:.2f}",
                errors[0] + "".join(f" ({error})" for error in errors[1:]),
                ", ".join(f"{100 * error:.1f}" for error in p.errors()),
                less + (f", p {mapsswe(p, dense):.2g}" if less and panel.task == "asr" else ""),
                in_points(panel.difference(p, equal)) if equal else "",
            ])  # fmt: skip
    head = ["wrong, in %", "MACs", "parameters", "channels, heads, units, expected before hardening", "on dev"]
    less = ["minus dense [95 %] (in each fold), MAPSSWE's p", "minus `transformer` [95 %]"]
    return rows([*head, "on test (characters)", "each seed", *less], lines)


def tuning_table(panels):
    """Markdown: errors on dev by which the flags were chosen."""
    lines = []
    for panel in panels:
        for flags in grid.TRIED[panel.task]:
            found = [panel.tried[which][flags] for which in grid.TUNED]
            cells = [f"**{100 * e:.2f}**" if flags == best else f"{100 * e:.2f}" for e, best in zip(found, panel.best)]
            lines.append([f"{panel.task} {panel.amount} `{flags}`", *cells])
    return rows(["wrong on dev, in %", "dense", "`mac` 0.7"], lines)


def remedies_table(panels):
    """Markdown: errors on dev of what might make the claim true, beside dense and `mac` 0.9; "" if none has run."""
    lines = []
    for panel in panels:
        error = {point: 100 * grid.dev_error(result) for point, result in panel.results.items()}
        tried = grid.remedies(panel.task, panel.results.values())
        beside = [p for p in error if p.flags == panel.best[0] and p.seed in grid.SEEDS and p[2:4] in grid.COMPARED[:2]]
        conditions = {}  # {(flags, method, budget): its points}
        for p in beside + tried if error.keys() & tried else ():
            conditions.setdefault(p[1:4], []).append(p)
        for (flags, method, budget), mine in conditions.items():
            dense = [p._replace(method="dense", budget=1.0) for p in mine]
            once = [p._replace(flags=flags.removesuffix(grid.TWICE)) for p in mine]
            if error.keys() >= {*mine, *dense}:
                name = f"{panel.task} {panel.amount} {f'`{method}` {budget:g}' if budget < 1 else method}"
                name += ", twice the updates" * flags.endswith(grid.TWICE)
                cells = [name, f"{np.mean([error[p] for p in mine]):.2f}"]
                for others in (dense, once):
                    changes = [error[p] - error[other] for p, other in zip(mine, others)]
                    each = ", ".join(f"{change:+.1f}" for change in changes)
                    cells.append("" if others == mine else f"{np.mean(changes):+.2f} ({each})")
                lines.append(cells)
    head = ["wrong on dev, in %", "mean", "minus dense (each run)", "minus once the updates (each run)"]
    return rows(head, lines) if lines else ""


def origin(panels):
    """Lines: what each panel's runs were made by, and how far two of them are apart."""
    lines = []
    for panel in panels:
        made = sorted({f"{r['cpu']}, code {r['code']}" for r in panel.results.values()})
        apart = 100 * math.sqrt(panel.between_runs)
        between = f"the standard deviation between runs of a fold is {apart:.2f} points"
        lines.append(f"- {panel}: {len(panel.results)} runs ({'; '.join(made)}); {between}.")
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in lines)


# --- The figure ----------------------------------------------------------------------------------------------------


def axes(panel, x, y, fewest, low, high):
    """SVG elements: a frame, its ticks and titles. x, y: from MACs and errors to places; what follows: their ranges."""
    step = next(s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 8)
    body = []
    for tick in np.arange(np.ceil(low / step), high / step) * step:
        body.append(f'<path d="M0 {y(tick):.1f}h380" stroke="#ddd"/>')
        body.append(f'<text x="-6" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.3g}</text>')
    for tick in range(10, 101, 10):
        if tick >= 100 * fewest:
            body.append(f'<text x="{x(tick / 100):.1f}" y="276" text-anchor="middle">{tick}</text>')
    return [
        *body,
        '<rect width="380" height="260" fill="none" stroke="#888"/>',
        f'<text x="190" y="-18" text-anchor="middle">{panel}: {ERRORS[panel.task]} on test, %</text>',
        '<text x="190" y="296" text-anchor="middle">MACs kept, %</text>',
    ]


def sign(method, x, y):
    """An SVG element: a method's sign about a place."""
    colour, path = METHODS[method]
    return f'<path class="{method}" transform="translate({x:.2f} {y:.2f})" d="{path}" fill="none" stroke="{colour}"/>'


def drawn_panel(panel):
    """SVG elements: error on test over MACs kept, as the table has them, and intervals of the differences from dense.

    The dashed line is dense, the dotted one dense and the margin: below it, a pruned model is no worse.
    """
    reference, spans = np.mean(panel.dense.errors()), {}  # spans: error, and the ends of the interval
    for key, p in panel.points.items():
        values = panel.difference(p, panel.dense) if p is not panel.dense else (0, 0, 0)
        spans[key] = [reference + value for value in values]
    low, high = min(span[1] for span in spans.values()), max(span[2] for span in spans.values())
    low, high = min(low, reference), max(high, reference + panel.margin)
    low, high = low - 0.05 * max(high - low, 0.01), high + 0.05 * max(high - low, 0.01)
    fewest = min(p.macs for p in panel.points.values()) - 0.03

    def x(macs):
        return 380 * (macs - fewest) / (1.02 - fewest)

    def y(error):
        return 260 * (high - error) / (high - low)

    body = axes(panel, x, y, fewest, low, high)
    body.append(f'<path d="M0 {y(reference):.1f}h380" stroke="#000" stroke-dasharray="4 3"/>')
    body.append(f'<path d="M0 {y(reference + panel.margin):.1f}h380" stroke="#000" stroke-dasharray="1 3"/>')
    for i, (method, (colour, _)) in enumerate(METHODS.items()):
        mine = sorted((panel.points[key].macs, span) for key, span in spans.items() if key[0] == method)
        places = [(x(macs), *map(y, span)) for macs, span in mine]
        # Where MACs are equal, intervals lie on each other: thin and half transparent, both are seen.
        line = f'stroke="{colour}" stroke-opacity="0.6"'
        body += [f'<path d="M{px:.1f} {bottom:.1f}V{top:.1f}" {line}/>' for px, _, bottom, top in places]
        through = " ".join(f"{px:.1f},{at:.1f}" for px, at, *_ in places)
        body.append(f'<polyline points="{through}" fill="none" {line}/>')
        body += [sign(method, px, at) for px, at, *_ in places]
        body.append(sign(method, 100 * i + 4, 316))
        body.append(f'<text x="{100 * i + 13}" y="320" fill="{colour}">{method}</text>')
    return body


def figure(panels):
    """SVG: a panel for each task (below each other) and amount of data (side by side)."""
    tasks, amounts = (list(dict.fromkeys(getattr(p, field) for p in panels)) for field in ("task", "amount"))
    width, height = 450 * len(amounts), 375 * len(tasks)
    body = []
    for p in panels:
        place = f"{50 + 450 * amounts.index(p.amount)} {40 + 375 * tasks.index(p.task)}"
        body += [f'<g id="{p.task}-{p.amount}" transform="translate({place})">', *drawn_panel(p), "</g>"]
    size = f'width="{width}" height="{height}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>", ""])


def report(panels):
    """The verdict and the tables, as Markdown."""
    parts = verdict(panels), table(panels), origin(panels), tuning_table(panels), remedies_table(panels)
    return "\n\n".join(filter(None, parts)) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"curves: {message}\n")
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).with_name("results.jsonl"))
    path = parser.parse_args().results
    try:
        panels, missing = read(path)
        path.with_name("curve.svg").write_text(figure(panels))
    except (UserError, OSError) as error:
        parser.error(error)
    print(report(panels), end="")
    for line in missing:
        print(f"\nNothing is said of the rest: {line}.")


if __name__ == "__main__":
    main()
