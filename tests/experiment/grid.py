"""Runs the experiment: one model, pruned by each method to each budget, from several seeds.

    .venv/bin/python tests/experiment/grid.py slu tables/commands --results runs/results.jsonl --jobs 2
    .venv/bin/python tests/experiment/grid.py asr tables/strings --results runs/results.jsonl --jobs 2
    .venv/bin/python tests/experiment/grid.py slu tables/commands --results runs/results.jsonl --only mac-0.5-0  # one

A point is a method, a budget and a seed: a run of sslprune.py on one thread of the CPU, in runs/grid, with the flags
below. Points that --results holds are not run again (another checkpoint, corpus or flags need another file), and an
interrupted one goes on; the most important come first. A result is a line: what the report says, and the errors of each
test speaker, from which tests/experiment/curves.py makes intervals.
"""

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from flops import UserError  # noqa: E402
from gates import METHODS  # noqa: E402
from sslprune import METRICS  # noqa: E402

# Flags of all points, of a task's, and of its dense reference where they differ. README says how dev chose them.
CHECKPOINT = {"asr": "tests/experiment/recogniser.pt", "slu": "tests/experiment/pretrained"}
COMMON = "--batch-seconds 10 --evaluate-updates 0 --dense-updates 0 --prune-updates 1200 --finetune-updates 800"
COMMON += " --dtype bfloat16"
FLAGS = {
    "asr": "--prune-lr 3e-4 --finetune-lr 3e-4 --speed-perturbation 0.1",
    "slu": "--prune-lr 1e-3 --finetune-lr 1e-3",
}
DENSE = FLAGS | {"slu": "--prune-lr 5e-4 --finetune-lr 5e-4 --speed-perturbation 0.1"}
POINTS = {  # (method, budgets, seeds), by importance; budget 1 is the dense reference
    "asr": [
        ("mac", (1.0, 0.7, 0.5), 3),
        ("transformer", (0.5, 0.7), 3),
        ("mac", (0.8, 0.9, 0.6), 3),
        ("transformer", (0.9, 0.4), 3),
        ("mac", (0.4, 0.3), 3),
        ("size", (0.5, 0.7, 0.3), 1),
        ("sepsize", (0.5, 0.7, 0.3), 1),
    ],
    "slu": [
        ("mac", (1.0, 0.7, 0.5), 3),
        ("transformer", (0.5, 0.7), 3),
        ("mac", (0.9, 0.3), 3),
        ("transformer", (0.9, 0.4), 3),  # which cannot go below 0.352
    ],
}
FEWEST_SPEAKERS = 20  # of test, for intervals over them


def points_of(task):
    """{name: (method, budget, seed)} of all points, the most important first."""
    points = [(m, b, s) for m, budgets, seeds in POINTS[task] for b in budgets for s in range(seeds)]
    return {f"{m if b < 1 else 'dense'}-{b:g}-{s}": (m, b, s) for m, b, s in points}


def flags_of(task, budget):
    """The flags of a point that are not its own."""
    return f"{COMMON} {(FLAGS if budget < 1 else DENSE)[task]}"


def fingerprint(task, corpus):
    """A few hexadecimals that tell this checkpoint and this corpus (its texts and durations) from others."""
    found, checkpoint = hashlib.sha256(), ROOT / CHECKPOINT[task]
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


def errors_by_speaker(task, rows, speakers):
    """{speaker: [errors, of how many]} of words and then, in recognition, of characters. rows: of test.tsv."""
    found = {}
    for name, reference, hypothesis in rows:
        if task == "asr":
            words, characters = ([split(text) for text in (reference, hypothesis)] for split in (str.split, list))
            numbers = [n for pair in (words, characters) for n in (data.edit_distance(*pair), len(pair[0]))]
        else:
            numbers = [int(reference != hypothesis), 1]
        found[speakers[name]] = [a + b for a, b in zip(found.get(speakers[name], [0] * len(numbers)), numbers)]
    return dict(sorted(found.items()))


def run_point(task, folder, point, out, speakers):
    """Run a point, or go on with it, and return its result; None where that failed, and the log says why."""
    method, budget, seed = point
    flags = flags_of(task, budget)
    own = f"--task {task} --method {method} --budget {budget:g} --seed {seed} --device cpu --resume {flags}"
    command = [sys.executable, "sslprune.py", "--checkpoint", CHECKPOINT[task], "--data", folder, "--out", out]
    command += own.split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(f"{out}.log", "w") as log:
        if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False).returncode:
            return None
    report = json.loads((out / "report.json").read_text())
    rows = [line.split("\t") for line in (out / "test.tsv").read_text().splitlines()[1:]]
    counts, dense = report["expected_counts"] or {}, report["dense"]["shape"]
    return {
        "name": out.name,
        "flags": flags,
        **{field: report[field] for field in ("task", "method", "budget", "seed", "converged", "updates")},
        **{cost: report["pruned"][cost] / report["dense"][cost] for cost in ("macs", "params")},
        "expected": {kind: sum(counts[kind]) / sum(dense[kind]) for kind in counts},
        "dev": report["metrics"]["pruned"]["dev"],
        "seconds": report["train_seconds"],
        "speakers": errors_by_speaker(task, rows, speakers),
    }


def run_points(task, folder, points, runs, speakers, jobs):
    """(name, result of run_point) of points, so many at a time, as they end; Ctrl-C ends those that are running."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_point, task, folder, p, runs / name, speakers): name for name, p in points.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:  # at Ctrl-C, which the running points have got, too, the others are not to begin
            pool.shutdown(cancel_futures=True)


def parse_result(line):
    """A result, from a line of JSON. Raises ValueError, KeyError, TypeError or AttributeError where it is none."""
    result = json.loads(line)
    columns = {"asr": 4, "slu": 2}[result["task"]]
    rows = list(result["speakers"].values())
    numbers = [result["dev"][METRICS[result["task"]]], *(result[f] for f in ("budget", "seed", "macs", "params"))]
    numbers += itertools.chain(*rows, result["expected"].values() if result["budget"] < 1 else ())
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError("has something else for a number")
    if not rows or any(len(row) != columns or not row[1] for row in rows):
        raise ValueError("has no counts for a speaker")
    if result["method"] not in METHODS or not 0 < result["budget"] <= 1:
        raise ValueError("has no such method or budget")
    missing = {"name", "flags", "inputs", "updates", "converged"} - result.keys()
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"grid: {message}\n")
    parser.add_argument("task", choices=POINTS)
    parser.add_argument("corpus", type=Path, help="folder of the corpus, as sslprune.py's --data")
    parser.add_argument("--results", type=Path, required=True, help="file to add the results to")
    parser.add_argument("--only", action="append", metavar="POINT", help="a point; any number of times")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="points at a time")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs is the number of points at a time, 1 at least")
    points = points_of(options.task)
    unknown = set(options.only or ()) - set(points)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such point; there are {', '.join(points)}")
    folder = options.corpus.resolve()
    try:
        corpus = data.open_corpus(folder, options.task)
        speakers, inputs = speakers_of(corpus), fingerprint(options.task, corpus)
        flags = hashlib.sha256(f"{flags_of(options.task, 0.5)} {flags_of(options.task, 1.0)}".encode()).hexdigest()
        runs = ROOT / "runs" / "grid" / f"{options.task}-{inputs}-{flags[:4]}"
        for parent in (runs, options.results.parent):
            parent.mkdir(parents=True, exist_ok=True)
        results = [result for result in read_results(options.results) if result["task"] == options.task]
    except (UserError, OSError) as error:
        parser.error(error)
    for result in results:
        if (result["inputs"], result["flags"]) != (inputs, flags_of(options.task, result["budget"])):
            other = f"{options.results}: {result['name']} has another checkpoint, corpus or flags"
            parser.error(f"{other}; name another file")
    done = {result["name"] for result in results}
    wanted = [name for name in points if name not in done and name in (options.only or points)]
    try:
        for name, result in run_points(
            options.task, folder, {n: points[n] for n in wanted}, runs, speakers, options.jobs
        ):
            if result is None:
                print(f"{name}: has failed; the end of {runs / name}.log says why", file=sys.stderr, flush=True)
                continue
            with open(options.results, "a") as file:
                file.write(json.dumps({**result, "inputs": inputs}) + "\n")
            dev = ", ".join(f"{key.replace('_', ' ')} {value:.2%}" for key, value in result["dev"].items())
            print(f"{name}: dev {dev}; {result['macs']:.1%} of the MACs; {result['seconds']:.0f} s", flush=True)
            done.add(name)
    except KeyboardInterrupt:
        parser.exit(130, "grid: interrupted; the same command goes on from here\n")
    print(f"{len(done & set(points))} of {len(points)} points are in {options.results}")
    return 0 if done >= set(wanted) else 2


if __name__ == "__main__":
    sys.exit(main())
