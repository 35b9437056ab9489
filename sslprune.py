"""Structured pruning of wav2vec2, HuBERT and WavLM for one task, under a budget of MACs or parameters.

    python sslprune.py --task asr --budget 0.5                    # the demo corpus, a small model trained from scratch
    python sslprune.py --task asr --budget 0.5 --checkpoint wav2vec2-base --data LibriSpeech
    python sslprune.py --task slu --budget 0.5 --checkpoint wav2vec2-base --data slurp --method size
    python sslprune.py --predict runs/asr-demo-mac-0.5-0/model.pt recording.wav ...
    python sslprune.py --evaluate runs/asr-demo-mac-0.5-0/model.pt
    python sslprune.py --describe runs/asr-demo-mac-0.5-0/model.pt
    python sslprune.py --export runs/asr-demo-mac-0.5-0/model.pt model.pt2
    torchrun --nproc-per-node 4 sslprune.py --task asr --budget 0.5 ...    # four processes, a GPU each

`prune_for_task` and `train` are the method. A run that was stopped or killed goes on by the same command with --resume.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import signal
import sqlite3
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

# OpenMP's threads spin while they wait for each other, for so long that beside one other busy process the demo takes 16
# times as long. After this many turns they sleep instead. OpenMP reads the variable when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # torch would import it later, and its functions keep the group of that moment
from torch import nn

import data
from flops import BASE, SAMPLES, SECONDS, SMALL, Shape, UserError, cost, picture, table
from gates import KINDS, METHODS, Lagrangian, check_budget, expected_shape, harden
from transformer import SpeechModel, Wav2Vec2, check_precision, exported, load, precision, read_checkpoint, read_ours

log = logging.getLogger("sslprune")

# --- Recipes: how long and how fast to train; the flag of the same name sets each number --------------------------

RECIPES = {
    # wav2vec2-base and larger. We could not run it to its end. Known recipes, for 100 hours of speech (DPHuBERT: 960):
    #   fairseq (base_100h.yaml)      1,600 s of audio an update, 80,000 updates: 356 passes; learning rate 3e-5
    #   transformers' CTC example     some 400 s; 3e-4, warmed up over 500 updates
    #   DPHuBERT, with a teacher      640 s, 50,000 updates: 9 passes; 2e-4, warmed up over 30 %, and then 1e-4
    # Here an update has 400 s, in four batches so that 24 GB suffice, and the three phases are 22, 44 and 22 passes.
    # The learning rates lie between the first two. DPHuBERT's are the halved rate of the sliced model, the rate of the
    # gates and the warm-up of the target (10 %). fairseq's are the masks, LayerDrop and the schedule of the rate.
    # Unlike there, the frontend trains, and dropout acts at all places, as in pre-training.
    "base": dict(
        dense_updates=20_000, prune_updates=40_000, finetune_updates=20_000, batch_seconds=100.0, accumulate=4,
        dense_lr=1e-4, prune_lr=1e-4, finetune_lr=5e-5, gate_lr=2e-2, warmup_share=0.1,
        layer_drop=0.1, time_mask=0.65, channel_mask=0.5, speed_perturbation=0.0,
    ),
    # The small model from scratch, chosen on the demo's dev set: phases of a few minutes, and gates fast enough for a
    # phase of some hundred updates under a target that moves slowly enough. Masks help longer training only.
    "small": dict(
        dense_updates=560, prune_updates=300, finetune_updates=180, batch_seconds=10.0, accumulate=1,
        dense_lr=1e-3, prune_lr=1e-3, finetune_lr=1e-3, gate_lr=0.2, warmup_share=0.5,
        layer_drop=0.0, time_mask=0.0, channel_mask=0.0, speed_perturbation=0.0,
    ),
}  # fmt: skip
SMALL_SLU = dict(dense_lr=5e-4, prune_lr=5e-4, finetune_lr=5e-4)  # at 1e-3 the small model does not learn the intents
BETAS, GATE_BETAS = (0.9, 0.98), (0.0, 0.9)  # of Adam: fairseq's for the weights; see make_optimizer for the gates'
LR_WARMUP, LR_DECAY, LR_LAST = 0.1, 0.5, 0.05  # tri-stage: parts of a phase, last rate over peak (fairseq)
CLIP = 1.0  # norm of the weights' gradient, against a rare wild batch
IN_A_ROW = 20  # updates without a finite gradient, after which the run gives up
PATIENCE = 600  # s to wait for a batch: a file server that is away for minutes does not end a run
CONVERGED = 0.02  # of the dense cost: hardening from this near the budget shuts few units that training left open

METRICS = {"asr": "word_error_rate", "slu": "intent_accuracy"}  # of each task
SPLITS = ("dev", "test")  # that are evaluated
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# --- The method ----------------------------------------------------------------------------------------------------

PHASES = {
    "dense": "train the dense model, because the method prunes a model that is trained for its task",
    "prune": "give each unit a gate, and train weights and gates together while the gates' expected cost has to fall to"
    " the budget. The error rises while the cost falls, and falls again where the cost stays",
    "finetune": "train the sliced model on, because it has lost units that were still partly open. The learning rate"
    " starts anew, so the error may rise first",
}


def prune_for_task(run):
    """The method, from where the run is: train, prune, harden, slice, train the sliced model on, and report."""
    options, model = run.options, run.model
    if run.phase == "dense":
        if options.dense_updates:
            train(run)
            save_model(model, run.out / "dense.pt")
            run.head_is_trained = True
        if run.head_is_trained:
            run.metrics_before = evaluate_splits(run)
            log.info("before pruning: %s", in_words(run.metrics_before))
        run.begin("prune")

    if run.phase == "prune":
        if options.budget < 1 and run.lagrangian is None:  # a resumed run has gates and multipliers already
            model.encoder.add_gates(KINDS[options.method])
            run.lagrangian = Lagrangian(run.start, options.method, options.budget).to(run.device)
        train(run)
        run.head_is_trained = True
        if run.lagrangian:
            run.expected, run.expected_counts = run.kept()
            warn_unless_converged(options, run.expected)
            harden(model.encoder.gates, run.start, options.method, options.budget, options.ragged)
            model.encoder = model.encoder.slice()
            check_precision(model)
            log.info("hardened, so that each gate is open or shut for good, and sliced: %s", size(model.encoder.shape))
        run.begin("finetune")

    train(run)
    save_model(model, run.out / "model.pt")  # first, so that nothing after it can lose the model
    finish(run, evaluate_splits(run, write_rows=True))
    run.begin("done")
    run.save()


def train(run):
    """One phase: minimise over weights and gates, and maximise over multipliers, the task's loss + the penalty."""
    options, model, lagrangian = run.options, run.model, run.lagrangian
    optimizer = run.optimizer = run.optimizer or make_optimizer(model, lagrangian, options.gate_lr)
    run.start_phase()
    updates = itertools.islice(stream(run), run.update, run.updates)
    for batches in load_batches(updates, run.corpus, options.workers, run.device):
        model.train()
        done = run.update / run.updates
        optimizer.param_groups[0]["lr"] = getattr(options, f"{run.phase}_lr") * tri_stage(done)
        optimizer.zero_grad(set_to_none=False)  # all processes add up the same tensors
        losses = []
        for utterances, waveforms, lengths in batches:  # one, unless --accumulate asks for more
            loss = model.loss(waveforms.to(run.device), lengths, utterances)
            loss.backward()
            losses.append(loss.detach())
        if lagrangian and losses:
            penalty = lagrangian(model.encoder.gates, warmup(done, options.warmup_share))
            (len(losses) * penalty).backward()  # as often as there are losses, by whose number `step` divides
        save_is_due = step(run, losses)
        watch(run, save_is_due)
    run.save()


def step(run, losses):
    """Average the gradients over the batches of all processes, and update, unless a number is not finite.

    losses: of this process's batches. Returns whether a save is due.
    """
    weights, *others = (group["params"] for group in run.optimizer.param_groups)
    others = list(itertools.chain(*others))  # gates and multipliers
    due = not rank() and time.monotonic() - run.saved > run.options.save_seconds  # the first process tells the others
    sums = torch.tensor([0, len(losses), due], dtype=torch.float64, device=run.device)
    sums[0] += sum(losses)
    gradients = [p.grad for p in (*weights, *others)]
    add_up([sums, *gradients])
    for gradient in gradients:
        gradient /= sums[1]
    norms = nn.utils.clip_grad_norm_(weights, CLIP), nn.utils.get_total_norm([p.grad for p in others]).to(run.device)
    # All numbers leave the device in one transfer, since each waits for all work that the device has in its queue.
    loss, count, due, *norms = torch.cat([sums, torch.stack(norms).double()]).tolist()
    loss = loss / count if count else math.nan  # where no process could read its batches
    run.update += 1
    if math.isfinite(loss) and all(map(math.isfinite, norms)):
        run.optimizer.step()
        run.losses.append(loss)
        run.left_out_in_a_row = 0
        return due
    run.left_out += 1
    run.left_out_in_a_row += 1
    log.warning("update %d left out: loss %g, norms of gradients %g and %g", run.update, loss, *norms)
    if run.left_out_in_a_row == IN_A_ROW:
        what = f"{IN_A_ROW} updates in a row had no finite loss or gradient (loss {loss:g}, gradient {norms[0]:g})"
        raise UserError(f"{what}; start anew with a smaller --{run.phase}-lr or --gate-lr, or with --dtype float32")
    return due


def tri_stage(done):
    """Learning rate over its peak when `done`, in [0, 1), of a phase is over: up linearly, hold, down exponentially."""
    if done < LR_WARMUP:
        return (done + 1e-3) / (LR_WARMUP + 1e-3)
    if done < 1 - LR_DECAY:
        return 1.0
    return LR_LAST ** ((done - (1 - LR_DECAY)) / LR_DECAY)


def warmup(done, share):
    """Part of the target sparsity that is asked for when `done` of a phase is over: linear over its first `share`."""
    return min(1.0, done / share) if share else 1.0


def make_optimizer(model, lagrangian, gate_lr):
    """Adam over the weights and, where there is a Lagrangian, over the gates, and over its multipliers, which ascend.

    The rate of gates and multipliers is constant. If it fell with the weights' rate, a lambda_1 that went far below 0
    while the target was out of reach could not come back in the phase, and gates would shut beyond the budget. They
    have no momentum (the first of GATE_BETAS), since they answer each other, and a lag makes the expected cost swing
    about the budget (Gidel et al. 2019, arXiv 1807.04740). The second beta is small, since a long memory of large
    gradients is a lag too. All this was tried in phases of some hundred updates, not in base's 40,000.
    """
    weights = [p for name, p in model.named_parameters() if not name.endswith("log_alpha")]
    groups = [{"params": weights, "betas": BETAS}]
    if lagrangian:
        theirs = {"lr": gate_lr, "betas": GATE_BETAS}
        log_alphas = [gate.log_alpha for gate in model.encoder.gates.values()]
        groups += [{"params": log_alphas, **theirs}, {"params": [lagrangian.multipliers], "maximize": True, **theirs}]
    for p in itertools.chain(*(group["params"] for group in groups)):
        p.grad = torch.zeros_like(p)  # LayerDrop leaves some without, and all processes add up the same tensors
    return torch.optim.Adam(groups)


def warn_unless_converged(options, expected):
    """Say so where training did not bring the expected costs to the budget, and what to change."""
    for constraint, kept in zip(METHODS[options.method], expected):
        if abs(kept - options.budget) > CONVERGED:
            then = "shuts what training kept" if kept > options.budget else "keeps what training shut"
            what = f"{kept:.3f} of the {constraint.name} are expected to be kept, not {options.budget:g}"
            more = "Give more --prune-updates, or a larger --gate-lr"
            log.warning("the constraint has not converged: %s, and hardening %s. %s", what, then, more)


# --- Watching and evaluating ---------------------------------------------------------------------------------------


def watch(run, save_is_due=False):
    """Before the first update and after each: save, measure the error on dev, and say where training is, when due."""
    now, options, every = time.monotonic(), run.options, run.options.evaluate_updates
    run.seconds, run.clock = run.seconds + now - run.clock, now
    if save_is_due:
        run.save()
    every = max(1, run.updates // 20) if every is None else every
    # prune_for_task evaluates at the end of the other phases; at the end of pruning the gates have to be measured.
    at_end = run.update == run.updates
    is_moment = run.phase == "prune" if at_end else every and run.update % every == 0
    is_measured = run.history and (run.history[-1]["phase"], run.history[-1]["update"]) == (run.phase, run.update)
    if every and is_moment and not is_measured and (run.update or run.head_is_trained):
        dev, _ = evaluate(run.model, run.corpus, "dev", options.batch_seconds, options.workers, characters=False)
        record(run, dev)
    elif run.countdown.is_due():
        record(run)


def record(run, dev=None):
    """Say where training is. dev: metrics on the dev split, which also make a line of metrics.jsonl."""
    metric, (kept, _) = METRICS[run.options.task], run.kept()
    loss = statistics.fmean(run.losses) if run.losses else None  # of the updates since the last line of metrics.jsonl
    words = [run.place, run.countdown.left(run.update), "" if loss is None else f"loss {loss:.3f}"]
    if run.lagrangian:
        shares = [f"{share:.1%} of the {c.name}" for c, share in zip(METHODS[run.options.method], kept)]
        words.append(f"gates keep {', '.join(shares)} (target {run.target:.1%})")
    if dev:
        words.append(in_words({"dev": {metric: dev[metric]}}))
        entry = {"phase": run.phase, "update": run.update, "loss": loss}
        entry["lr"] = run.optimizer.param_groups[0]["lr"] if run.optimizer and run.update else None
        entry |= {"target": run.target, "expected": kept}
        entry |= {"multipliers": run.lagrangian and run.lagrangian.multipliers.tolist(), "dev": dev[metric]}
        run.history.append(entry)
        run.losses.clear()
        write(run.out / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in run.history).encode())
    log.info("  ".join(filter(None, words)))


class Countdown:
    """The time that is left of `total` steps, of which `first` were made before. It is due ever less often."""

    def __init__(self, total=0, first=0):
        self.total, self.first, self.start = total, first, time.monotonic()
        self.said = self.start

    def is_due(self):
        now = time.monotonic()
        return now - self.said >= max(10, (now - self.start) / 50)

    def left(self, step):
        self.said = time.monotonic()
        if step == self.first:
            return ""
        return duration((self.said - self.start) / (step - self.first) * (self.total - step)) + " left"


def evaluate_splits(run, write_rows=False):
    """Metrics on all SPLITS. write_rows: also write each reference and hypothesis to SPLIT.tsv."""
    metrics, options = {}, run.options
    for split in SPLITS:
        metrics[split], rows = evaluate(run.model, run.corpus, split, options.batch_seconds, options.workers)
        if write_rows:
            rows = [("name", "reference", "hypothesis"), *rows]
            lines = ["\t".join(re.sub(r"[\t\r\n]", " ", field) for field in row) + "\n" for row in rows]
            write(run.out / f"{split}.tsv", "".join(lines).encode(errors="backslashreplace"))
    record(run, metrics["dev"])
    return metrics


def evaluate(model, corpus, split, batch_seconds, workers=None, characters=True):
    """Metrics of a model on one of SPLITS, as fractions, {name: value}, and (name, reference, hypothesis) of each.

    characters: whether to count their errors, too, which takes as long as recognising.
    """
    model.eval()
    device, asr = next(model.parameters()).device, model.task == "asr"
    utterances = data.usable(getattr(corpus, split), corpus, model.encoder.tensor_shape, ctc=False)
    groups = share(data.batches(utterances, batch_seconds), ranks())
    countdown, rows = Countdown(len(groups)), []  # rows: of each group
    with precision(model.dtype, device):  # around all batches, so that weights are cast once
        for done, loaded in enumerate(load_batches(groups, corpus, workers, device), 1):
            rows.append([])
            for batch, waveforms, lengths in loaded:
                hypotheses = model.transcribe(waveforms, lengths)
                if asr:  # the same function made the references
                    hypotheses = [data.transcript(text, model.raw_text) for text in hypotheses]
                rows[-1] += [(u.name, u.text if asr else u.intent, h) for u, h in zip(batch, hypotheses)]
            if countdown.is_due():
                log.info("evaluate %s %d/%d  %s", split, done, len(groups), countdown.left(done))
    share_skipped(corpus)
    corpus.check()
    rows = [row for groups in zip(*gather(rows)) for group in groups for row in group]  # as one process has them
    if not rows:
        raise UserError(f"no utterance of the {split} split could be read")
    _, references, hypotheses = zip(*rows)
    metrics = data.error_rates(references, hypotheses, characters) if asr else data.accuracies(references, hypotheses)
    return metrics, rows


def forward_seconds(models, device, dtype, repeats=12):
    """Seconds of each encoder's forward on 10 s of audio: the fewest, since other work can only add to them."""
    waveform = torch.randn(1, SAMPLES, generator=torch.Generator().manual_seed(0)).to(device)
    seconds = [[] for _ in models]
    with torch.no_grad(), precision(dtype, device):
        for _ in range(1 + repeats):
            for model, taken in zip(models, seconds):
                start = time.perf_counter()
                model.eval()(waveform)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
    return list(map(min, seconds))


# --- The report ----------------------------------------------------------------------------------------------------


def finish(run, metrics):
    """Write report.json and curve.svg, and say what became of the model. metrics: of the pruned model."""
    if not rank():
        report, options, model = make_report(run, metrics), run.options, shlex.quote(str(run.out / "model.pt"))
        subsets = [part for split in SPLITS if (name := getattr(options, split)) for part in (flag(split), name)]
        write(run.out / "curve.svg", curve(run.history, report).encode())
        write(run.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
        log.info("\n%s\n\n%s\n", picture(run.model.encoder.shape, run.start), comparison(report))
        log.info("%s: model.pt, report.json, curve.svg  (trained for %s)", run.out, duration(run.seconds))
        log.info("use it:   python sslprune.py --predict %s RECORDING...", model)
        log.info("look:     python sslprune.py --describe %s", model)
        log.info("measure:  python sslprune.py --evaluate %s %s", model, shlex.join(["--data", options.data, *subsets]))


def make_report(run, metrics):
    """What goes into report.json. metrics: of the pruned model."""
    options, metric = run.options, METRICS[run.options.task]
    encoders = {"dense": Wav2Vec2(run.start).to(run.device), "pruned": run.model.encoder}
    costs = [cost(encoder.shape, SAMPLES) for encoder in encoders.values()]
    dense, kept = ([constraint.measure(c) for constraint in METHODS[options.method]] for c in costs)
    flags = ("task", "method", "budget", "ragged", "dtype", "seed", "data", "checkpoint")
    report = {
        **{name: getattr(options, name) for name in flags},
        "achieved": sum(kept) / sum(dense),
        "kept": [k / d for k, d in zip(kept, dense)],
        "expected": run.expected,  # of each constrained cost, when the pruning phase ended; `kept` came of it
        "expected_counts": run.expected_counts,  # of units, likewise; the pruned shape came of them
        "converged": all(abs(share - options.budget) <= CONVERGED for share in run.expected or []),
        "metric": {"name": metric, **{split: values[metric] for split, values in metrics.items()}},
        "metrics": {"dense": run.metrics_before, "pruned": metrics},
        "skipped": len(run.corpus.skipped),
        "skipped_reasons": list(run.corpus.skipped),
        "too_long": run.too_long,  # utterances over --max-seconds, which training left out
        "updates": {phase: getattr(options, f"{phase}_updates") for phase in PHASES},
        "updates_left_out": run.left_out,
        "processes": ranks(),
        "train_seconds": round(run.seconds, 1),
    }
    seconds = forward_seconds(list(encoders.values()), run.device, run.model.dtype)
    for (name, encoder), c, taken in zip(encoders.items(), costs, seconds):
        front = {"frontend_macs": c.frontend.macs, "frontend_params": c.frontend.params}
        report[name] = {"macs": c.macs, "params": c.params, **front, "seconds": taken, "shape": encoder.shape.as_dict()}
    return report


def comparison(report):
    """The model before pruning against the pruned one, which was trained for longer, as text."""
    dense, pruned, metrics = report["dense"], report["pruned"], report["metrics"]
    rows = [
        (f"MACs ({SECONDS} s of audio)", "macs", 1e9, "G", 3),
        ("  of the frontend", "frontend_macs", 1e9, "G", 3),
        ("parameters", "params", 1e6, "M", 3),
        ("  of the frontend", "frontend_params", 1e6, "M", 3),
        (f"forward ({SECONDS} s of audio)", "seconds", 1e-3, "ms", 1),
    ]
    before = "dense" if report["updates"]["dense"] or report["checkpoint"] is None else "checkpoint"
    lines = [f"{'':<28}{before:>15}{'pruned':>15}{'kept':>10}"]
    for name, key, scale, unit, digits in rows:
        before, after = (f"{values[key] / scale:12.{digits}f} {unit:<2}" for values in (dense, pruned))
        lines.append(f"{name:<28}{before}{after}{pruned[key] / dense[key]:>10.{0 if key == 'seconds' else 2}%}")
    for split, values in metrics["pruned"].items():
        for name, value in values.items():
            before = f"{metrics['dense'][split][name]:.2%}" if metrics["dense"] else "-"
            lines.append(f"{name.replace('_', ' ') + ', ' + split:<28}{before:>15}{value:>15.2%}")
    return "\n".join(lines)


def curve(history, report):
    """The lines of metrics.jsonl as a picture, SVG: the dev metric above, the constrained costs below, over updates."""
    updates, metric, constraints = report["updates"], report["metric"]["name"], METHODS[report["method"]]
    ends = dict(zip(updates, itertools.accumulate(updates.values())))  # in updates of the whole run
    last, highest = max(1, *ends.values()), max([1e-9, *(entry["dev"] for entry in history)])
    colours = ("#36c", "#292")
    lines = [(f"dev {metric.replace('_', ' ')}", 30, "#c33", lambda entry: entry["dev"] / highest)]
    for i, constraint in enumerate(constraints):
        lines.append((f"{constraint.name} kept", 230, colours[i], lambda entry, i=i: entry["expected"][i]))
    lines.append(("target", 230, "#999", lambda entry: entry["target"]))
    before = report["metrics"]["dense"]
    levels = [("before pruning", 30, before["dev"][metric] / highest)] if before else []
    levels.append((f"budget {report['budget']:g}", 230, report["budget"]))

    def text(x, y, words, more='fill="#333"'):
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'

    right, middle = 'text-anchor="end"', 'text-anchor="middle"'
    title = f"{report['task']}, method {report['method']}, budget {report['budget']:g}"
    shapes = [text(50, 18, title, 'font-weight="bold"'), text(350, 438, "updates", middle)]
    for top, whole in ((30, highest), (230, 1)):
        shapes.append(f'<rect x="50" y="{top}" width="600" height="160" fill="none" stroke="#ccc"/>')
        shapes += [text(45, top + 164 - 160 * part, f"{100 * whole * part:.3g} %", right) for part in (0, 0.5, 1)]
    for name, top, level in levels:
        y = top + 160 * (1 - level)
        shapes += [f'<path d="M50 {y:.1f}h600" stroke="#333" stroke-dasharray="4"/>']
        shapes.append(text(655, max(y + 4, top + 26), name))
    for phase, end in ends.items():
        x, start = 50 + 600 * end / last, 50 + 600 * (end - updates[phase]) / last
        shapes.append(f'<path d="M{x:.1f} 30v360" stroke="#ccc"/>')
        shapes += [text(x, 405, end, middle), text((start + x) / 2, 422, phase, middle)] * (updates[phase] > 0)
    for number, (name, top, colour, value) in enumerate(lines):
        for phase, end in ends.items():  # a line for each, and a dot for each measurement: in between there was none
            entries = [entry for entry in history if entry["phase"] == phase]
            xs = [50 + 600 * (end - updates[phase] + entry["update"]) / last for entry in entries]
            points = [f"{x:.1f},{top + 160 * (1 - value(entry)):.1f}" for x, entry in zip(xs, entries)]
            shapes.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}"/>')
            shapes += [f'<path d="M{point}h0" stroke="{colour}" stroke-width="4"/>' for point in points]
        x, y = (655, 42) if top == 30 else (200 * number - 140, 382)  # where the lines seldom are
        shapes.append(text(x, y, name, f'fill="{colour}"'))
    style = 'font-family="sans-serif" font-size="12" stroke-linecap="round"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="450" {style}>'
    return "\n".join([head, '<rect width="820" height="450" fill="white"/>', *shapes, "</svg>", ""])


def size(shape):
    """Costs of a model, in words."""
    c = cost(shape, SAMPLES)
    return f"{c.macs / 1e9:.3f} GMACs on {SECONDS} s, {c.params / 1e6:.3f} M parameters"


def in_words(metrics):
    """{split: {name: value}} in a few words."""
    named = ((split, name, value) for split, values in metrics.items() for name, value in values.items())
    return ", ".join(f"{split} {name.replace('_', ' ')} {value:.2%}" for split, name, value in named)


def duration(seconds):
    """Hours, minutes and seconds, as 0:06:18."""
    return str(datetime.timedelta(seconds=round(seconds)))


# --- A run, and how it goes on after a death -----------------------------------------------------------------------

STATE = "training.state"  # the training checkpoint in the folder of a run
MEMORY = {"batch_seconds", "accumulate", "dtype"}  # may change as a run goes on: memory ended it, or bfloat16 is wrong


@dataclasses.dataclass(kw_only=True)
class Run:
    """All that a run is made of, where it is, and what it has measured.

    `save` writes it and `restored` brings it back. Together they make a resumed run end, on the CPU, in the same bits
    as one that was never stopped.
    """

    options: argparse.Namespace
    out: Path
    corpus: data.Corpus
    device: torch.device
    model: SpeechModel
    lagrangian: Lagrangian | None = None  # in the pruning phase
    optimizer: torch.optim.Optimizer | None = None
    countdown: Countdown = dataclasses.field(default_factory=Countdown)  # of the phase
    clock: float = 0.0  # s, until when the time is counted
    saved: float | None = None  # s, when it was saved last
    digest: bytes | None = None  # of the state that it goes on from
    # From here on: plain values, saved and restored as they are.
    start_shape: dict  # of the model that the budget is of
    head_is_trained: bool  # so that there is something to evaluate
    phase: str = "dense"  # one of PHASES, or "done"
    update: int = 0  # how many the phase has made
    seconds: float = 0.0  # of training
    metrics_before: dict | None = None  # of the model before pruning
    expected: list | None = None  # part of each constrained cost that gates were to keep when the pruning phase ended
    expected_counts: dict | None = None  # the units of each place that they were to keep then
    too_long: int = 0  # utterances that training leaves out
    left_out: int = 0  # updates without finite gradients
    left_out_in_a_row: int = 0
    losses: list = dataclasses.field(default_factory=list)  # of the updates since the last line of metrics.jsonl
    history: list = dataclasses.field(default_factory=list)  # the lines of metrics.jsonl

    def __post_init__(self):
        self.start = Shape.from_dict(self.start_shape)
        self.model.to(self.device).dtype = DTYPES[self.options.dtype]
        check_precision(self.model)
        short = [u for u in self.corpus.train if u.seconds <= self.options.max_seconds]
        self.too_long = len(self.corpus.train) - len(short)
        self.utterances = data.usable(short, self.corpus, self.start, self.options.task == "asr")
        self.corpus.check()
        if not self.utterances:
            raise UserError("no utterance of the training split is of use: all are over --max-seconds, or too short")

    @property
    def updates(self):
        """How many the phase has in all."""
        return getattr(self.options, f"{self.phase}_updates")

    @property
    def place(self):
        return f"{self.phase} {self.update}/{self.updates}" if self.updates else self.phase

    @property
    def target(self):
        """The fraction of the constrained costs that may be kept now: 1 - t of gates.py."""
        if not self.lagrangian:
            return 1.0 if self.phase == "dense" else self.options.budget
        return 1 - (1 - self.options.budget) * warmup(self.update / max(1, self.updates), self.options.warmup_share)

    @torch.no_grad()
    def kept(self):
        """What is kept, in expectation where gates are: parts of the constrained costs, {kind: [units by layer]}."""
        shape = expected_shape(self.model.encoder.tensor_shape, self.model.encoder.gates)
        now, start = cost(shape, SAMPLES), cost(self.start, SAMPLES)
        fractions = [float(c.measure(now) / c.measure(start)) for c in METHODS[self.options.method]]
        kinds = ("channels", "heads", "units")
        return fractions, {kind: [round(float(count), 1) for count in getattr(shape, kind)] for kind in kinds}

    def begin(self, phase):
        """Let the next phase begin."""
        self.phase, self.update, self.left_out_in_a_row = phase, 0, 0
        self.optimizer = self.lagrangian = None

    def start_phase(self):
        """Set what acts in training alone, start the clocks, and say which phase begins or goes on."""
        options, encoder = self.options, self.model.encoder
        encoder.layer_drop = options.layer_drop
        encoder.projection.time_mask, encoder.projection.channel_mask = options.time_mask, options.channel_mask
        self.clock, self.countdown = time.monotonic(), Countdown(self.updates, self.update)
        phases = [phase for phase in PHASES if getattr(options, f"{phase}_updates")]
        if self.phase in phases:
            prunes = self.phase == "dense" or options.budget < 1
            what = PHASES[self.phase] if prunes else "train the dense model on, without gates"
            log.info("phase %d of %d, %s: %s", phases.index(self.phase) + 1, len(phases), self.phase, what)
        watch(self)

    def save(self):
        """Write the training checkpoint: a SHA-256, and what torch.save makes of everything. All processes call it."""
        self.saved = time.monotonic()
        share_skipped(self.corpus)
        random = gather((torch.get_rng_state(), torch.cuda.get_rng_state() if self.device.type == "cuda" else None))
        if rank():
            return
        contents = {"settings": settings(self.options), "run": {name: getattr(self, name) for name in PLAIN}}
        if self.phase != "done":
            contents |= {
                "model": contents_of(self.model),
                "multipliers": self.lagrangian and self.lagrangian.multipliers.detach(),
                "optimizer": self.optimizer and self.optimizer.state_dict(),
                "random": random,
                "skipped": list(self.corpus.skipped),
                "corpus": self.corpus.fingerprint,
            }
        written = torch_bytes(contents)
        write(self.out / STATE, hashlib.sha256(written).digest(), written)

    @classmethod
    def restored(cls, state, options, out, corpus, device):
        """The Run that a training checkpoint holds."""
        if state["corpus"] != corpus.fingerprint:
            raise UserError(f"{options.data}: is not the corpus that {out} began with, or it has changed")
        kinds = KINDS[options.method] if state["multipliers"] is not None else ()
        model = read_ours(state["model"], out / STATE).model(kinds)
        parts = {"options": options, "out": out, "corpus": corpus, "device": device, "model": model}
        run = cls(**parts, digest=state["digest"], saved=time.monotonic(), **state["run"])
        for reason in state["skipped"]:
            corpus.skipped.setdefault(reason, False)
        if kinds:
            run.lagrangian = Lagrangian(run.start, options.method, options.budget).to(device)
            run.lagrangian.multipliers.data.copy_(state["multipliers"])
        if state["optimizer"]:
            run.optimizer = make_optimizer(model, run.lagrangian, options.gate_lr)
            run.optimizer.load_state_dict(state["optimizer"])
        cpu, cuda = state["random"][rank()]
        torch.set_rng_state(cpu)
        if cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(cuda)
        log.info("%s: goes on at %s", out, run.place)
        return run


PLAIN = [field.name for field in dataclasses.fields(Run)]
PLAIN = PLAIN[PLAIN.index("start_shape") :]


def read_state(out, options):
    """The training checkpoint in the folder of a run that --resume is to go on with; None where there is none yet."""
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise UserError(f"{out}: a file stands where --out needs a folder; give another --out")
    path, names = out / STATE, {path.name for path in out.iterdir()} if out.is_dir() else set()
    if STATE in names and not options.resume:
        raise UserError(f"{out}: holds another run; go on with it by --resume, give another --out, or remove it")
    if names and not options.resume:
        raise UserError(f"{out}: is not empty; give another --out")
    if STATE not in names:
        if names - {"log.txt", "lock", STATE + ".partial"}:
            raise UserError(f"{out}: holds no {STATE} to --resume from; give the --out of a run, or another")
        if options.resume:
            log.info("%s: there is nothing to resume; the run begins", out)
        return None
    contents = memoryview(path.read_bytes())
    if hashlib.sha256(contents[32:]).digest() != contents[:32]:
        dense = "with the dense.pt of this one as --checkpoint if it is there"
        raise UserError(f"{path}: is damaged; start anew in another --out, {dense}")
    state = torch.load(io.BytesIO(contents[32:]), map_location="cpu", weights_only=True)
    if list(state["run"]) != PLAIN:
        raise UserError(f"{path}: another version of sslprune wrote it; go on with that one, or give another --out")
    return state | {"digest": bytes(contents[:32])}


def settings(options):
    """What a run's result depends on: its flags, filled in by the recipe, and the number of processes.

    A corpus may move, so its fingerprint is compared elsewhere; a checkpoint is read once, so its name will do.
    """
    no_effect = {*COMMANDS, "resume", "out", "data", "device", "workers", "save_seconds", "skip_bad"}
    flags = {name: value for name, value in vars(options).items() if name not in no_effect}
    flags["checkpoint"] = options.checkpoint and Path(options.checkpoint).resolve().name
    return flags | {"processes": ranks()}


def check_settings(options, state, out):
    """Refuse to go on with a run with other flags than its own, but for those of MEMORY."""
    for name, now in settings(options).items():
        if now != (then := state["settings"].get(name)):
            what = "torchrun's --nproc-per-node" if name == "processes" else flag(name)
            then, now = ("not given" if v is None or v is False else "given" if v is True else v for v in (then, now))
            wrong = f"{out}: {what} was {then} when the run started, and is {now} now"
            if name not in MEMORY:
                raise UserError(f"{wrong}; give the flags that it was started with, or another --out")
            log.warning("%s; the run goes on, and ends as neither would have", wrong)


def contents_of(model):
    """What a model.pt holds of a SpeechModel: plain values and tensors, which load with weights_only=True."""
    return {
        "format": "sslprune",
        "shape": model.encoder.tensor_shape.as_dict(),
        "dense": model.encoder.dense.as_dict(),
        "task": model.task,
        "labels": model.labels,
        "raw_text": model.raw_text,
        "weights": {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()},
    }


def save_model(model, path):
    """Write a model.pt. Replaces the file in one step."""
    if not rank():
        write(path, torch_bytes(contents_of(model)))


def torch_bytes(contents):
    """The bytes that torch.save makes: in memory, so that `write` alone meets a full disk."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getbuffer()


def write(path, *parts):
    """Let the first process write bytes to a file in one step, whole or not at all: until then the old file stays."""
    path = Path(path)
    if rank():
        return
    if not path.name or path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file, and is not replaced by one")
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


# --- Batches -------------------------------------------------------------------------------------------------------


def stream(run):
    """The batches of each update of the phase that are this process's, without end.

    An epoch's batches follow from the seed, the phase and the epoch's number, so a resumed run makes the same ones.
    """
    options, phase, asr = run.options, run.phase, run.options.task == "asr"
    for epoch in itertools.count():
        rng = np.random.default_rng([options.seed, *phase.encode(), epoch])
        # The shortest first: CTC leaves its plateau of blanks sooner (SortaGrad; Amodei et al. 2016, arXiv 1512.02595).
        shortest_first = phase == "dense" and epoch == 0 and asr
        speeds, seconds = options.speed_perturbation, options.batch_seconds
        batches = data.training_batches(run.utterances, run.start, asr, speeds, seconds, rng, shortest_first)
        yield from share(batches, ranks() * options.accumulate)


def share(batches, size):
    """Of each `size` batches in a row, this process's: lists, as many in all processes, of which some may be empty."""
    return [batches[i : i + size][rank() :: ranks()] for i in range(0, len(batches), size)]


def load_batches(groups, corpus, workers, device):
    """Lists of (utterances, waveforms, lengths) for these lists of batches; what cannot be read is skipped.

    Threads read `workers` lists ahead: they need no shared memory, and reading, decoding and FFTs release Python's
    lock. They are daemons, so that a dead file server cannot keep the program from ending. Raises Stopped in all
    processes, before any uses its list, where one cannot read its own or was asked to stop.
    """
    workers = max(1, (4 if device.type == "cuda" else 1) if workers is None else workers)
    groups, reading = iter(groups), deque()

    def read(group, future):
        try:
            future.set_result([data.load_batch(batch) for batch in group])
        except BaseException as error:
            future.set_exception(error)  # raised where the result is asked for

    def read_ahead():
        for group in itertools.islice(groups, workers - len(reading)):
            reading.append(concurrent.futures.Future())
            threading.Thread(target=read, args=(group, reading[-1]), daemon=True).start()

    try:
        read_ahead()
        while reading:
            loaded, failure = [], None
            try:
                loaded = wait_for(reading.popleft())
                for reason in itertools.chain(*(bad for *_, bad in loaded)):
                    corpus.skip(reason)
                corpus.check()
            except UserError as error:
                failure = str(error), 2
            agree(failure, device)
            read_ahead()
            yield [batch for *batch, _ in loaded if batch[0]]
    finally:
        concurrent.futures.wait(reading, timeout=5)  # Python crashes where it ends while a thread is in a library


def wait_for(future):
    """The result that a thread sets; [] where a signal comes first. Raises UserError after PATIENCE."""
    for _ in range(PATIENCE):
        with contextlib.suppress(concurrent.futures.TimeoutError):
            return future.result(timeout=1)
        if stopping:
            return []
    raise UserError(f"audio could not be read in {PATIENCE} s; see to the corpus's files")


# --- Signals, and one run in a folder ------------------------------------------------------------------------------

stopping = []  # the signals that asked this process to stop


class Stopped(Exception):
    """All processes of the run stop here, where it can be saved. Arguments: why, and the exit status."""


def ask_to_stop(number, frame):
    """Signal handler: stop at the next opportunity; at a second Ctrl-C, at once."""
    if stopping and number == signal.SIGINT:
        raise KeyboardInterrupt
    stopping.append(number)


def agree(failure, device):
    """Raise Stopped in all processes where one cannot go on. failure: why this one cannot, and its exit status."""
    if stopping:
        failure = f"{signal.Signals(stopping[0]).name} stopped the run", 128 + stopping[0]
    failed = torch.tensor(failure is not None, dtype=torch.float32, device=device if ranks() > 1 else "cpu")
    add_up([failed])
    if failed:
        raise Stopped(*next(filter(None, gather(failure))))


@contextlib.contextmanager
def alone(run):
    """A context in which this run alone writes to its folder, logs into it, and is asked by signals to stop."""
    stopping.clear()
    with contextlib.ExitStack() as at_end:
        for number in (signal.SIGTERM, signal.SIGINT):
            at_end.callback(signal.signal, number, signal.signal(number, ask_to_stop))
        if not rank():
            run.out.mkdir(parents=True, exist_ok=True)
            lock(run.out, at_end)
            digest = None
            with contextlib.suppress(FileNotFoundError), open(run.out / STATE, "rb") as file:
                digest = file.read(32)
            if digest != run.digest:
                raise UserError(f"{run.out}: another run has just written to it; give another --out, or --resume")
        if run.saved is None:
            run.save()
        if not rank():
            handler = logging.FileHandler(run.out / "log.txt", encoding="utf-8", errors="backslashreplace")
            log.addHandler(handler)
            at_end.callback(handler.close)
            at_end.callback(log.removeHandler, handler)
        yield


def lock(folder, at_end):
    """Lock a folder until `at_end`, by a database's lock: all systems have it, and it does not outlive the process."""
    try:
        database = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
        database.execute("PRAGMA journal_mode=MEMORY")  # no file beside the lock
        database.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise UserError(f"{folder}: another run is writing to it; give another --out, or wait") from error
        log.warning("%s: cannot be locked (%s); see to it that no other run writes to it", folder, error)
    else:
        at_end.callback((folder / "lock").unlink, missing_ok=True)
        at_end.callback(database.close)  # comes first, since Windows removes no open file


# --- Many processes: torchrun, or whatever sets RANK and WORLD_SIZE, starts one for each GPU -----------------------


@contextlib.contextmanager
def processes(device):
    """A context in which this process is one of those that a launcher started, if one did."""
    if os.environ.get("RANK") and os.environ.get("WORLD_SIZE", "1") != "1":
        log.info("waiting for the %s processes that WORLD_SIZE names", os.environ["WORLD_SIZE"])
        try:
            if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
                raise ValueError("RANK is to be below WORLD_SIZE")
            patience = datetime.timedelta(seconds=3 * PATIENCE)  # longer than one process may wait for its audio
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        except (ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"RANK and WORLD_SIZE are set, and the processes cannot find each other ({why})") from error
        if rank():
            log.setLevel(logging.ERROR)
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if not dist.is_initialized() and os.environ.get(name, "1") not in ("", "0", "1"):
            each = f"{name} is {os.environ[name]}, and without RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT each task"
            more = "start them by torchrun, set these for each task, or ask for one task"
            raise UserError(f"{each} would train everything; {more}")
    try:
        yield
        gather(None)  # so that none ends while the first still writes
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank():
    """The number of this process. Process 0 writes and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def together():
    """A context for what all processes do at once: UserError where another one has died."""
    try:
        yield
    except RuntimeError as error:
        why = re.sub(r"^\[.*?\] *", "", str(error).splitlines()[0]).split(". ")[0]  # without the place in gloo's source
        what = f"the processes of this run could not agree ({why}): where another process has ended, it says why"
        raise UserError(f"{what}; the same command with --resume goes on") from error


def gather(item):
    """What each process has, in the order of their ranks."""
    items = [item] * ranks()
    if dist.is_initialized():
        with together():
            dist.all_gather_object(items, item)
    return items


def add_up(tensors):
    """Replace each tensor by its sum over the processes, which has the same bits in all of them."""
    if dist.is_initialized():
        with together():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()


def share_skipped(corpus):
    """Let each process know what the others had to skip."""
    for reason in itertools.chain(*gather([reason for reason, is_new in corpus.skipped.items() if is_new])):
        corpus.skip(reason)


# --- The commands --------------------------------------------------------------------------------------------------


def train_and_prune(options):
    """All of a run, from the options to the report."""
    device = find_device(options.device)
    with processes(device):
        run = prepare(options, device)
        if run is None:
            return
        with alone(run):
            introduce(run)
            try:
                prune_for_task(run)
            except Stopped as stopped:
                why, status = stopped.args
                run.save()
                raise Stopped(f"{why} (at {run.place}; the same command with --resume goes on)", status) from None


def prepare(options, device):
    """The Run, at its beginning or where --resume finds it; None where it has ended.

    What can be wrong with flags, checkpoint and corpus comes to light here, before anything is trained or written.
    """
    name = (data.corpus_folder(options.data) or Path("demo")).resolve().name
    out = Path(options.out or f"runs/{options.task}-{name}-{options.method}-{options.budget:g}-{options.seed}")
    state, checkpoint = read_state(out, options), None
    gather(None)  # before the first process writes there
    if state:
        start, trained = Shape.from_dict(state["run"]["start_shape"]), not state["settings"]["dense_updates"]
    else:
        checkpoint = options.checkpoint and read_checkpoint(options.checkpoint)
        start, trained = checkpoint.shape if checkpoint else SMALL, checkpoint and checkpoint.task == options.task
    fill_recipe(options, start, trained)
    if options.budget < 1:
        check_budget(start, options.method, options.budget)
    if state:
        check_settings(options, state, out)
        if state["run"]["phase"] == "done":
            log.info("%s: has run to its end; nothing is left to do", out)
            return None
    corpus = open_corpus(options, options.task, ("train", *SPLITS), options.raw_text)
    torch.manual_seed(options.seed)
    parts = {"options": options, "out": out, "corpus": corpus, "device": device}
    if state:
        return Run.restored(state, **parts)
    model, trained = model_to_prune(options, checkpoint, corpus)
    run = Run(**parts, model=model, start_shape=start.as_dict(), head_is_trained=trained)
    torch.manual_seed(options.seed + rank())  # after the weights, which are to be the same in all processes
    return run


def introduce(run):
    """Say what the run works on and, at its beginning, how long it takes at the measured speed of a forward."""
    options, corpus, labels = run.options, run.corpus, run.model.labels
    seconds = {split: sum(u.seconds for u in getattr(corpus, split)) for split in ("train", *SPLITS)}
    sizes = (f"{split} {len(getattr(corpus, split)):,} ({duration(s)})" for split, s in seconds.items())
    what = f"{len(labels)} characters" if options.task == "asr" else f"{len(labels)} intents"
    log.info("corpus   %s: utterances (time) of %s; %s", options.data, ", ".join(sizes), what)
    log.info("model    %s; %s", options.checkpoint or "from scratch", size(run.start))
    whole = cost(run.start, SAMPLES)
    whose = "the dense model's" if run.start == run.model.encoder.dense else "the already pruned checkpoint's"
    for constraint in METHODS[options.method] if options.budget < 1 else ():
        costs = f"{constraint.measure(whole):,} {constraint.name}"
        log.info("budget   %g of %s %s (method %s)", options.budget, whose, costs, options.method)
    updates, every = [getattr(options, f"{phase}_updates") for phase in PHASES], options.evaluate_updates
    evaluations = sum(n // (every or max(1, n // 20)) for n in updates) if every != 0 else 0
    audio = 3 * sum(updates) * options.batch_seconds * options.accumulate  # the backward takes two forwards' time
    audio += evaluations * seconds["dev"] / ranks() + 2 * (seconds["dev"] + seconds["test"]) / ranks()
    (forward,) = forward_seconds([run.model.encoder], run.device, run.model.dtype, repeats=2)
    about = f"; all {sum(updates):,} updates take about {duration(audio * forward / SECONDS)}" * (not run.seconds)
    log.info("folder   %s; seed %d, %s, %s%s", run.out, options.seed, run.device, options.dtype, about)


def fill_recipe(options, shape, trained):
    """Set what the command line left open, for a model of this shape. trained: whether its head is, for the task.

    A small checkpoint has no dense phase, even where its head is new: at equal updates, one made recognition worse and
    understanding no better (tests/experiment/README.md). Nobody has measured this for base.
    """
    small = shape.width < BASE.width
    recipe = RECIPES["small" if small else "base"] | (SMALL_SLU if small and options.task == "slu" else {})
    if trained or small and options.checkpoint is not None:
        recipe["dense_updates"] = 0
    vars(options).update({name: value for name, value in recipe.items() if getattr(options, name) is None})


def model_to_prune(options, checkpoint, corpus):
    """A SpeechModel, with the checkpoint's encoder where there is one, and whether its head is trained for the task."""
    asr, train = options.task == "asr", corpus.train
    labels = data.vocabulary(u.text for u in train) if asr else sorted({u.intent for u in train})
    if checkpoint is None or checkpoint.task != options.task:
        if checkpoint:
            what = f"its head for {checkpoint.task} is left out" if checkpoint.task else "has no head for a task"
            log.info("%s: %s; one for %s starts at random", options.checkpoint, what, options.task)
        encoder = checkpoint.encoder() if checkpoint else Wav2Vec2(SMALL)
        return SpeechModel(encoder, options.task, labels, options.raw_text), False
    model = checkpoint.model(raw_text=options.raw_text)
    if new := [label for label in labels if label not in model.outputs]:
        log.info("%s: its head had no output for %s; they are added", options.checkpoint, " ".join(new))
        model.add_labels(new)
    return model, True


def open_corpus(options, task, splits, raw_text):
    subsets = {split: getattr(options, split) for split in ("train", *SPLITS)}
    return data.open_corpus(options.data, task, options.seed, subsets, splits, options.skip_bad, raw_text)


def find_device(name):
    """The torch.device of this name; of None, a GPU where there is one."""
    try:
        if name in (None, "cuda"):
            set_by = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "RANK")  # torchrun, srun, mpirun
            local_rank = next((int(os.environ[each]) for each in set_by if os.environ.get(each, "").isdigit()), 0)
            gpus = torch.cuda.device_count()  # that this process sees, which may be its own alone
            name = f"cuda:{local_rank % max(1, gpus)}" if name or torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # random states and synchronisation are the current device's
            torch.set_float32_matmul_precision("high")  # TF32 for matrices as for convolutions, for which torch has
            torch.backends.cudnn.allow_tf32 = True  # it by default
        torch.zeros(1, device=device, dtype=torch.float64).item()  # counts and the first GroupNorm need float64
    except (RuntimeError, AssertionError, AttributeError, ValueError, TypeError, ImportError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name}: cannot be used here ({why})") from error
    return device


def predict(options):
    """Print a line for each recording, also where others cannot be read; returns the exit status."""
    path, *files = options.predict
    model, failed = load_to_use(path, options), []
    for file, result in zip(files, model.recognise(files)):
        if isinstance(result, UserError):
            failed.append(result)
        else:
            print(f"{file}\t{result}", flush=True)
    return max([0, *map(refuse, failed)])


def evaluate_model(options):
    """Print the metrics of a model on the dev and test splits of a corpus."""
    model = load_to_use(options.evaluate, options)
    if options.task not in (None, model.task):
        raise UserError(f"{options.evaluate}: was trained for {model.task}, not for {options.task}")
    corpus = open_corpus(options, model.task, SPLITS, model.raw_text)
    if model.task == "slu" and not any(u.intent in model.outputs for u in corpus.dev + corpus.test):
        raise UserError(f"{options.data}: has none of the model's intents; give the corpus that it is for as --data")
    batch_seconds = options.batch_seconds or RECIPES["small"]["batch_seconds"]
    for split in (split for split in SPLITS if getattr(corpus, split)):
        metrics, _ = evaluate(model, corpus, split, batch_seconds, options.workers)
        print(f"{options.data}: {in_words({split: metrics})}", flush=True)


def load_to_use(path, options):
    """A model.pt on the device and in the precision that the options name."""
    model = read_checkpoint(path).model(raw_text=options.raw_text or None).to(find_device(options.device))
    model.dtype = DTYPES[options.dtype]
    check_precision(model)
    return model


def describe(options):
    """Print the costs of a model on 10 s of audio, and what each of its layers kept."""
    encoder = read_checkpoint(options.describe).encoder()
    print(table(encoder.shape), picture(encoder.shape, encoder.dense), sep="\n\n")


def export(options):
    """Write a model as a program that torch alone loads: waveforms and lengths in, scores and frames out."""
    path, out = options.export
    if os.path.lexists(out):
        raise UserError(f"{out}: is there already; remove it, or give another name")
    if Path(out).suffix != ".pt2":
        onnx = "torch.onnx.export takes load(MODEL) as it is, see Deploying in README.md"
        raise UserError(f"{out}: is to be named .pt2, since it is a program of torch.export; for ONNX, {onnx}")
    model, buffer = load(path), io.BytesIO()
    torch.export.save(exported(model), buffer, extra_files={"labels.json": json.dumps(model.labels)})
    write(out, buffer.getbuffer())


# Other than a run: the function, and the flags that it uses.
EVALUATES = {"task", "data", "train", *SPLITS, "skip_bad", "batch_seconds", "workers"}
COMMANDS = {
    "predict": (predict, {"device", "dtype", "raw_text"}),
    "evaluate": (evaluate_model, {"device", "dtype", "raw_text", *EVALUATES}),
    "describe": (describe, set()),
    "export": (export, set()),
}


def bounded(kind, smallest, largest):
    """A type of argparse's: numbers of a kind (int or float) within bounds."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if smallest <= (value := kind(text)) <= largest:
                return value
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {smallest:g} to {largest:g}")

    return convert


def flag(name):
    return "--" + name.replace("_", "-")


def make_parser():
    """The parser of the command line."""
    count, seconds = bounded(int, 0, 10**9), bounded(float, 0.1, 1e5)
    form, path = argparse.RawDescriptionHelpFormatter, os.path.expanduser  # the shell leaves --out=~/x as it is
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = lambda message: sys.exit(refuse(message))
    add = parser.add_argument_group("what to do").add_argument
    add("--task", choices=sorted(METRICS), help="asr: transcripts with CTC; slu: intents")
    add("--budget", type=bounded(float, 1e-9, 1), help="fraction of the cost to keep; 1.0 prunes nothing")
    add("--predict", nargs="+", type=path, metavar=("MODEL", "FILE"), help="print what a model makes of recordings")
    add("--evaluate", type=path, metavar="MODEL", help="print a model's metrics on the dev and test splits of --data")
    add("--describe", type=path, metavar="CHECKPOINT", help="print the costs of a model, and what each layer kept")
    add("--export", nargs=2, type=path, metavar=("MODEL", "FILE.pt2"), help="write a program for torch.export.load")
    add = parser.add_argument_group("how").add_argument
    add("--method", choices=sorted(METHODS), default="mac", help="what the budget is of (default %(default)s)")
    add("--ragged", action="store_true", help="keep any number of units, not the multiples that run fast")
    corpora = "folder of manifests, Kaldi directories, LibriSpeech or SLURP (default: %(default)s)"
    add("--data", type=path, default="demo", help=corpora)
    for split in ("train", *SPLITS):
        add(f"--{split}", metavar="NAMES", help=f"subsets that are the {split} split, joined by commas")
    add("--raw-text", action="store_true", help="leave transcripts as they are: phonemes, case, punctuation")
    checkpoints = "pretrained model: Hugging Face, fairseq, torchaudio, or a .pt of ours (default: none)"
    add("--checkpoint", type=path, help=checkpoints)
    add("--out", type=path, help="folder of the run (default runs/TASK-DATA-METHOD-BUDGET-SEED)")
    add("--resume", action="store_true", help="go on with the run in --out; all other flags as before")
    saving = "seconds between two states that --resume can go on from (default %(default)g)"
    add("--save-seconds", type=bounded(float, 0, 1e9), default=600.0, metavar="N", help=saving)
    watching = "updates between measurements on dev (default: a twentieth of the phase; 0: none while training)"
    add("--evaluate-updates", type=count, metavar="N", help=watching)
    add("--seed", type=bounded(int, 0, 2**31 - 1), default=0, help="of weights, batches, masks and gates")
    add("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in; the weights are float32")
    add("--skip-bad", action="store_true", help="go on where over 1 %% of the utterances are unusable")
    add("--max-seconds", type=seconds, default=30.0, metavar="N", help="train on no longer ones (default %(default)g)")
    add("--workers", type=count, metavar="N", help="batches that threads read ahead (default: 4 with a GPU, else 1)")
    add = parser.add_argument_group("recipe (where each number is from: RECIPES in sslprune.py)").add_argument
    types = {"updates": count, "lr": bounded(float, 1e-12, 1), "seconds": seconds, "accumulate": bounded(int, 1, 10**6)}
    types["perturbation"] = bounded(float, 0, 0.5)
    notes = {"accumulate": "batches per update and process; ", "batch_seconds": "of audio in a batch; "}
    notes |= {"gate_lr": "of gates and multipliers; ", "warmup_share": "part of pruning in which the target falls; "}
    notes["dense_updates"] = "default 0 with a checkpoint that is small or trained for the task, else: "
    for name, small in RECIPES["small"].items():
        text = f"default {RECIPES['base'][name]:g}, of a small model {small:g}"
        text = notes.get(name, "") + text + (f" (slu {SMALL_SLU[name]:g})" if name in SMALL_SLU else "")
        add(flag(name), type=types.get(name.rpartition("_")[2], bounded(float, 0, 1)), metavar="N", help=text)
    return parser


def parse(arguments):
    """The command line as options; a mistake in it ends the program with one line and exit status 2."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    command = next((name for name in COMMANDS if getattr(options, name) is not None), None)
    for name, value in vars(options).items():
        if value == "":
            parser.error(f"{flag(name)} has an empty value; leave it out, or give it one")
        if command and name not in COMMANDS[command][1] | {command} and value != parser.get_default(name):
            parser.error(f"{flag(name)} has no meaning with --{command}; leave it out")
    if command is None and (options.task is None or options.budget is None):
        parser.error("give --task and --budget, as in --task asr --budget 0.5, or another command; see --help")
    if command == "predict" and len(options.predict) < 2:
        parser.error("--predict takes a model.pt and at least one recording")
    return options


def refuse(message):
    """Say in one line what is wrong; the exit status for it."""
    with contextlib.suppress(OSError):  # where nobody reads it
        print("sslprune:", " ".join(str(message).split()), file=sys.stderr)
    return 2


def main(arguments=None):
    """The program; returns its exit status: 0, 2 for a mistake that the user can fix, 128 and the signal's number."""
    for stream in (sys.stdout, sys.stderr):  # any file's name, in a terminal of any encoding
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
    options, status = parse(arguments), 128 + 13  # of what SIGPIPE ends
    stream = sys.stderr if options.predict else sys.stdout  # where the results go alone
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=stream)
    logging.raiseExceptions = False  # where nobody reads stdout any more, a run goes on, and log.txt has what it says
    try:
        commands = [function for name, (function, _) in COMMANDS.items() if getattr(options, name) is not None]
        status = (commands or [train_and_prune])[0](options) or 0
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # `| head` has read enough: Python is not to say so as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status
    except (UserError, OSError) as error:
        return refuse(error)
    except Stopped as stopped:
        why, status = stopped.args
        refuse(why)
        return status
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own only for a GPU's memory
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return refuse(f"out of memory; {'cut up the recording' if options.predict else 'give less --batch-seconds'}")
    except KeyboardInterrupt:
        refuse("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
