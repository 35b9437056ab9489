"""Runs the experiment: one model, pruned by each method to each budget, in three folds, from two seeds.

    .venv/bin/python tests/experiment/grid.py asr quarter tables --results runs/results.jsonl --jobs 2
    .venv/bin/python tests/experiment/grid.py slu quarter tables --results runs/one.jsonl --only 0-1e-3+speed-mac-0.5-1
    .venv/bin/python tests/experiment/grid.py asr quarter tables --results runs/results.jsonl --jobs 2 --remedies

A task and an amount of data (`all` or `quarter`) have a corpus for each fold, which corpora.py writes. A point is a
fold, a set of flags, a method, a budget and a seed: a run of sslprune.py on one thread of the CPU, in runs/grid. First
all sets of flags are tried with seed 0, on the dense model and on `mac` 0.7. Then all points run from other seeds with
the set that has the fewest errors on dev for the dense model, and those two also with the set that has the fewest for
`mac` 0.7. Points that --results holds are not run again, and one that Ctrl-C interrupted goes on. A result is a line:
what the report says, and the errors of each test speaker, from which tests/experiment/curves.py makes intervals.
Where tests/experiment/results.jsonl has a line of the same point, the fields that differ are named.
--remedies then runs what might make the claim true, to be judged on dev: twice the updates, gates without a budget, and
a budget of 0.95; and a budget of 0.2, which ought to do harm, so that one sees whether this corpus can show harm.

Recognition begins with a model that has left CTC's plateau, in tests/experiment/starts. Where it is missing, it is made
first: the pretrained encoder, trained on the fold's training set without pruning.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from flops import UserError  # noqa: E402
from sslprune import torch_bytes, write  # noqa: E402

RUNS = ROOT / "runs" / "grid"
PRETRAINED, STARTS = ROOT / "tests" / "experiment" / "pretrained", ROOT / "tests" / "experiment" / "starts"
PUBLISHED = ROOT / "tests" / "experiment" / "results.jsonl"
FOLDS, TUNING_SEED, SEEDS = range(3), 0, (1, 2)
UPDATES = {"all": (1200, 800), "quarter": (720, 480)}  # of pruning and of fine-tuning; the same for all points
START_UPDATES = {"all": 2000, "quarter": 1000}
COMMON = "--batch-seconds 10 --evaluate-updates 0 --dense-updates 0 --dtype bfloat16"
START = "--budget 1 --batch-seconds 20 --evaluate-updates 0 --dtype bfloat16 --dense-lr 1e-3 --speed-perturbation 0.1"
START += " --prune-updates 0 --finetune-updates 0"
MASKS = "--time-mask 0.2 --channel-mask 0.1"
TRIED = {  # the sets of flags: learning rate, speed perturbation, masks
    "asr": {
        "1e-4+speed": "--prune-lr 1e-4 --finetune-lr 1e-4 --speed-perturbation 0.1",
        "3e-4+speed": "--prune-lr 3e-4 --finetune-lr 3e-4 --speed-perturbation 0.1",
        "1e-3+speed": "--prune-lr 1e-3 --finetune-lr 1e-3 --speed-perturbation 0.1",
        "3e-4+speed+masks": f"--prune-lr 3e-4 --finetune-lr 3e-4 --speed-perturbation 0.1 {MASKS}",
    },
    "slu": {
        "1e-3": "--prune-lr 1e-3 --finetune-lr 1e-3",
        "5e-4+speed": "--prune-lr 5e-4 --finetune-lr 5e-4 --speed-perturbation 0.1",
        "1e-3+speed": "--prune-lr 1e-3 --finetune-lr 1e-3 --speed-perturbation 0.1",
        "5e-4+speed+masks": f"--prune-lr 5e-4 --finetune-lr 5e-4 --speed-perturbation 0.1 {MASKS}",
    },
}
COMPARED = (("dense", 1.0), ("mac", 0.9), ("mac", 0.7), ("mac", 0.5), ("transformer", 0.7), ("transformer", 0.5))
TUNED = (("dense", 1.0), ("mac", 0.7))  # for which the flags are chosen
REMEDIES, CONTROL = (("gates", 1.0), ("mac", 0.95)), ("mac", 0.2)
TWICE = "+twice"  # behind the name of a set of flags: twice the updates
# Gates that are sampled, and no penalty: hardening then keeps all but 0.01 % of the MACs.
GATES_ALONE = "import sys, sslprune; sslprune.Lagrangian.forward = lambda self, *_: 0 * self.multipliers.sum(); "
GATES_ALONE += "sys.exit(sslprune.main())"
FEWEST_SPEAKERS = 20  # of test, for intervals over them


class Point(NamedTuple):
    """A run of the experiment. Its name is that of its folder."""

    fold: int
    flags: str
    method: str
    budget: float
    seed: int

    def __str__(self):
        return f"{self.fold}-{self.flags}-{self.method}-{self.budget:g}-{self.seed}"


def tuning(task):
    """The points that choose the flags."""
    return [Point(fold, flags, *which, TUNING_SEED) for flags in TRIED[task] for which in TUNED for fold in FOLDS]


def dev_error(result):
    """The part of the words or intents of dev that is wrong."""
    metrics = result["dev"]
    return metrics["word_error_rate"] if "word_error_rate" in metrics else 1 - metrics["intent_accuracy"]


def tried(task, results):
    """{(method, budget): {flags: error on dev, the mean of all folds}} of the sets of flags that have been tried."""
    found = {which: {} for which in TUNED}
    for which, flags in itertools.product(TUNED, TRIED[task]):
        mine = (*which, flags, TUNING_SEED)
        errors = [dev_error(r) for r in results if (r["method"], r["budget"], r["flags"], r["seed"]) == mine]
        if len(errors) == len(FOLDS):
            found[which][flags] = sum(errors) / len(errors)
    return found


def chosen(task, results):
    """The best flags for dense, and those for `mac` 0.7; None where some have not run."""
    errors = tried(task, results).values()
    return [min(e, key=e.get) for e in errors] if all(e.keys() == TRIED[task].keys() for e in errors) else None


def points_of(task, results):
    """All points that are known so far, in order: those that choose the flags, then those that the choice decides."""
    points, best = tuning(task), chosen(task, results)
    if best:
        for seed, flags, which in itertools.product(SEEDS, dict.fromkeys(best), COMPARED):
            if flags == best[0] or which in TUNED:
                points += [Point(fold, flags, *which, seed) for fold in FOLDS]
    return dict.fromkeys(points).keys()


def remedies(task, results):
    """The points that are judged on dev beside the result, with the best flags for dense; empty before these are known.

    Twice the updates are for dense and `mac`, from one seed.
    """
    flags, *_ = chosen(task, results) or [None]
    points = [Point(fold, flags, *which, seed) for seed in SEEDS for which in (*REMEDIES, CONTROL) for fold in FOLDS]
    longer = [which for which in COMPARED if which[0] != "transformer"]
    points += [Point(fold, f"{flags}{TWICE}", *which, SEEDS[0]) for which in longer for fold in FOLDS]
    return points if flags else []


def options_of(task, amount, point):
    """The flags of sslprune.py by which points differ from its defaults, but for what the name of a point says."""
    prune, finetune = (n * (2 if point.flags.endswith(TWICE) else 1) for n in UPDATES[amount])
    flags = TRIED[task][point.flags.removesuffix(TWICE)]
    return f"{COMMON} --prune-updates {prune} --finetune-updates {finetune} {flags}"


def fingerprint(checkpoint, corpus):
    """A few hexadecimals that tell this checkpoint and this corpus (its texts and durations) from others."""
    found = hashlib.sha256()
    for path in sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]:
        found.update(path.read_bytes())
    for split in (corpus.train, corpus.dev, corpus.test):
        found.update(json.dumps([(u.text, u.intent, u.speaker, round(u.seconds, 3)) for u in split]).encode())
    return found.hexdigest()[:8]


def speakers_of(corpus):
    """{name of an utterance: speaker} of the test set. Raises UserError where they are no ground for intervals."""
    speakers = {u.name: u.speaker for u in corpus.test}
    heard = {u.speaker for u in corpus.train + corpus.dev}
    found = set(speakers.values()) - {""}
    if "" in speakers.values() or len(found) < FEWEST_SPEAKERS or heard & found:
        raise UserError(
            f"intervals need {FEWEST_SPEAKERS} test speakers or more, a speaker for each utterance, and none of them in"
            f" train or dev; here are {len(found)}, {list(speakers.values()).count('')} utterances have none, and"
            f" {len(heard & found)} are in train or dev"
        )
    return speakers


def errors_of(task, rows, speakers):
    """({speaker: [errors, of how many]} of words and then, in recognition, of characters; [errors of each utterance]).

    rows: (name, reference, hypothesis) of test.tsv.
    """
    found, each = {}, []
    for name, reference, hypothesis in rows:
        if task == "asr":
            words, characters = ([split(text) for text in (reference, hypothesis)] for split in (str.split, list))
            numbers = [n for pair in (words, characters) for n in (data.edit_distance(*pair), len(pair[0]))]
        else:
            numbers = [int(reference != hypothesis), 1]
        found[speakers[name]] = [a + b for a, b in zip(found.get(speakers[name], [0] * len(numbers)), numbers)]
        each.append(numbers[0])
    return dict(sorted(found.items())), each


@functools.cache
def code():
    """A few hexadecimals that tell the program's six modules, as they were at first, from other versions."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))).hexdigest()[:8]


def cpu():
    """The name of this machine's CPU, and what torch computes by."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def run(out, *arguments, program=("sslprune.py",)):
    """Run sslprune.py on one thread, or go on with it; False where that failed, and the log says why."""
    command = [sys.executable, *program, "--device", "cpu", "--resume", "--out", out, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "w") as log:
        return not subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False).returncode


class Fold:
    """The corpus of a fold, and the checkpoint that its points begin with."""

    def __init__(self, task, amount, number, tables):
        self.task, self.amount = task, amount
        self.folder = tables / f"{task}-{amount}-{number}"
        self.corpus = data.open_corpus(self.folder, task)
        self.speakers = speakers_of(self.corpus)
        self.start = STARTS / f"{self.folder.name}.pt" if task == "asr" else PRETRAINED
        self.start_flags = f"{START} --dense-updates {START_UPDATES[amount]}"
        self.made_from = f"{fingerprint(PRETRAINED, self.corpus)} {self.start_flags}"
        if task == "asr" and self.start.exists() and torch.load(self.start).get("made_from") != self.made_from:
            raise UserError(f"{self.start}: was made from another encoder or corpus, or otherwise; remove it")

    def make_start(self):
        """Train the model that recognition begins with, and write it in bfloat16; False where that failed."""
        out = RUNS / f"{self.folder.name}-{self.made_from[:8]}" / "start"
        flags = f"--task {self.task} {self.start_flags}"
        if not run(out, "--checkpoint", PRETRAINED, "--data", self.folder, *flags.split()):
            return False
        contents = torch.load(out / "model.pt") | {"made_from": self.made_from}
        contents["weights"] = {name: weight.bfloat16() for name, weight in contents["weights"].items()}
        self.start.parent.mkdir(exist_ok=True)
        write(self.start, torch_bytes(contents))
        return True

    @functools.cached_property
    def inputs(self):
        """A few hexadecimals that tell this start and this corpus from others."""
        return fingerprint(self.start, self.corpus)

    def result(self, point):
        """Run a point, or go on with it, and return its result; None where that failed."""
        options, inputs = options_of(self.task, self.amount, point), self.inputs
        out = RUNS / f"{self.folder.name}-{inputs}-{code()}" / str(point)
        seed = len(FOLDS) * point.seed + point.fold  # no two folds begin with the same random numbers
        gates_alone = {"program": ("-c", GATES_ALONE)} if point.method == "gates" else {}
        own = f"--task {self.task} --budget {0.9999 if gates_alone else point.budget:g} --seed {seed}"
        own += f" --method {point.method}" if point.budget < 1 else ""
        flags = [*own.split(), *options.split()]
        if not run(out, "--checkpoint", self.start, "--data", self.folder, *flags, **gates_alone):
            return None
        report = json.loads((out / "report.json").read_text())
        counts, dense = report["expected_counts"] or {}, report["dense"]["shape"]
        rows = [line.split("\t") for line in (out / "test.tsv").read_text().splitlines()[1:]]
        by_speaker, each = errors_of(self.task, rows, self.speakers)
        return {
            "task": self.task,
            "amount": self.amount,
            **point._asdict(),
            "options": options,
            **{field: report[field] for field in ("converged", "updates", "updates_left_out", "skipped")},
            **{cost: report["pruned"][cost] / report["dense"][cost] for cost in ("macs", "params")},
            "expected": {kind: sum(counts[kind]) / sum(dense[kind]) for kind in counts},
            "dev": report["metrics"]["pruned"]["dev"],
            "seconds": report["train_seconds"],
            "cpu": cpu(),
            "torch": torch.__version__,
            "code": code(),
            "inputs": inputs,
            "speakers": by_speaker,
            "utterances": each,
        }


def at_a_time(jobs, function, items):
    """(item, function(item)) of all items, so many at a time, as they end; Ctrl-C ends those that are running."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:  # at Ctrl-C, which the running points have got, too, the others are not to begin
            pool.shutdown(cancel_futures=True)


def parse_result(line):
    """A result, from a line of JSON. Raises ValueError, KeyError, TypeError or AttributeError where it is none."""
    result = json.loads(line)
    rows = list(result["speakers"].values())
    numbers = [dev_error(result), *(result[field] for field in ("budget", "macs", "params")), *result["utterances"]]
    numbers += itertools.chain(*rows, result["expected"].values() if result["budget"] < 1 else ())
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        raise ValueError("has something else for a number")
    if not rows or any(len(row) != {"asr": 4, "slu": 2}[result["task"]] or not row[1] for row in rows):
        raise ValueError("has no counts for a speaker")
    if result["amount"] not in UPDATES or str(point_of(result)) not in every_point(result["task"]):
        raise ValueError("is of no point")
    missing = {"options", "inputs", "updates", "converged", "cpu", "code"} - result.keys()
    if missing:
        raise ValueError(f"has no {', '.join(sorted(missing))}")
    return result


def read_results(path):
    """The results in a file, which need not be there. Raises UserError for a line that is none."""
    results = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            results.append(parse_result(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wrong = f"{path}, line {number}: is no result of tests/experiment/grid.py ({error!r})"
            raise UserError(f"{wrong}; remove it") from error
    return results


def point_of(result):
    """The Point of a result."""
    return Point(*(result[field] for field in Point._fields))


def every_point(task):
    """{name: Point} of what can be run."""
    flags = [name + end for end in ("", TWICE) for name in TRIED[task]]
    found = itertools.product(FOLDS, flags, (*COMPARED, *REMEDIES, CONTROL), (TUNING_SEED, *SEEDS))
    return {str(p): p for p in (Point(fold, flags, *which, seed) for fold, flags, which, seed in found)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"grid: {message}\n")
    parser.add_argument("task", choices=TRIED)
    parser.add_argument("amount", choices=UPDATES)
    parser.add_argument("tables", type=Path, help="folder of the corpora, as corpora.py writes them")
    parser.add_argument("--results", type=Path, required=True, help="file to add the results to")
    parser.add_argument("--only", action="append", metavar="POINT", help="a point; any number of times")
    parser.add_argument("--remedies", action="store_true", help="run these, too, and the control; dev judges them")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="points at a time")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs is the number of points at a time, 1 at least")
    known = every_point(options.task)
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such point; there are {', '.join(known)}")
    only = [known[name] for name in options.only or ()]
    try:
        return run_all(options, only)
    except (UserError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "grid: interrupted; the same command goes on from here\n")


def run_all(options, only):
    """Make the starts that are missing, and run the points that --results lacks; returns an exit status."""
    task, amount = options.task, options.amount
    folds = {n: Fold(task, amount, n, options.tables.resolve()) for n in {p.fold for p in only} or FOLDS}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for fold, made in at_a_time(options.jobs, Fold.make_start, [f for f in folds.values() if not f.start.exists()]):
        if not made:
            raise UserError(f"{fold.start}: could not be made; the end of its log in {RUNS} says why")
        print(f"{fold.start.relative_to(ROOT)}: made", flush=True)
    results = {point_of(r): r for r in read_results(options.results) if (r["task"], r["amount"]) == (task, amount)}
    for point, result in results.items():
        now = options_of(task, amount, point), folds[point.fold].inputs if point.fold in folds else result["inputs"]
        if (result["options"], result["inputs"]) != now:
            raise UserError(f"{options.results}: {point} has another start, corpus or flags; name another file")
    published = {point_of(r): r for r in read_results(PUBLISHED) if (r["task"], r["amount"]) == (task, amount)}
    failed = set()

    def wanted():
        more = remedies(task, results.values()) if options.remedies else []
        return only or [*points_of(task, results.values()), *more]

    while todo := [p for p in wanted() if p not in failed | results.keys()]:
        for point, result in at_a_time(options.jobs, lambda p: folds[p.fold].result(p), todo):
            if result is None:
                failed.add(point)
                print(f"{point}: has failed; the end of its log in {RUNS} says why", file=sys.stderr, flush=True)
                continue
            results[point] = result
            with open(options.results, "a") as file:
                file.write(json.dumps(result) + "\n")
            told = f"dev {dev_error(result):.2%} wrong; {result['macs']:.1%} of the MACs; {result['seconds']:.0f} s"
            if point in published:
                differing = [field for field, value in result.items() if value != published[point].get(field)]
                told += f"; {PUBLISHED.name} has other {', '.join(differing) or 'nothing'}"
            print(f"{point}: {told}", flush=True)
    print(f"{len(results.keys() & set(wanted()))} of {len(wanted())} points are in {options.results}")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
