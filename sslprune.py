"""Structured pruning of wav2vec2 for one task, under a budget of MACs or parameters.

    python sslprune.py --task asr --budget 0.5                    # the demo corpus, a small model trained from scratch
    python sslprune.py --task asr --budget 0.5 --checkpoint wav2vec2-base --data LibriSpeech
    python sslprune.py --task slu --budget 0.5 --checkpoint wav2vec2-base --data slurp --method size
    python sslprune.py --predict runs/asr-mac-0.5/model.pt recording.wav ...
    python sslprune.py --evaluate runs/asr-mac-0.5/model.pt --data LibriSpeech
    python sslprune.py --describe runs/asr-mac-0.5/model.pt
    python sslprune.py --export runs/asr-mac-0.5/model.pt model.pt2
    torchrun --nproc-per-node 4 sslprune.py --task asr --budget 0.5 ...    # four processes, a GPU each

A run has up to three phases. Without a checkpoint it first trains a dense model, since the method prunes a trained one.
Then weights, gates and multipliers train together under the budget (gates.py); the gates are hardened to the budget and
the model is sliced. Then the small model trains on. --budget 1.0 trains as long, and prunes nothing: the reference.
When a run was stopped or killed, the same command with --resume goes on where it was.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a process group, see `processes`
from torch import nn
from torch.utils.data import DataLoader

import data
from flops import BASE, SAMPLES, SECONDS, SMALL, Shape, UserError, cost, picture, table
from gates import KINDS, METHODS, Lagrangian, check_budget, expected_shape, harden
from transformer import SpeechModel, Wav2Vec2, contents_of, exported, load, precision, read_checkpoint, read_ours
from transformer import save_model, torch_bytes, write

log = logging.getLogger("sslprune")

# --- Recipes: how long and how fast to train; each number can be set by the flag of its name -----------------------

RECIPES = {
    # wav2vec2-base. Learning rates and warm-up are DPHuBERT's (Peng et al., Interspeech 2023). Masks and LayerDrop are
    # those of fairseq's recipe for 100 hours (base_100h.yaml), which differs in the rest: it freezes the frontend, has
    # dropout on feed-forward activations only (here everywhere, as pre-training has it), and a learning rate of 3e-5.
    # The updates are ours: with 100 s of audio each, pruning and fine-tuning are 17 passes over those 100 hours.
    "base": dict(
        dense_updates=100_000, prune_updates=40_000, finetune_updates=20_000, batch_seconds=100.0,
        dense_lr=2e-4, prune_lr=2e-4, finetune_lr=1e-4, gate_lr=2e-2, warmup_share=0.1,
        layer_drop=0.1, time_mask=0.65, channel_mask=0.5, speed_perturbation=0.0,
    ),
    # The small model from scratch, chosen on the demo's dev set: as long as a few minutes allow, gates that are fast,
    # and a target that is slow enough for a phase of some hundred updates. Masks and the like need longer training.
    "small": dict(
        dense_updates=560, prune_updates=300, finetune_updates=180, batch_seconds=10.0,
        dense_lr=1e-3, prune_lr=1e-3, finetune_lr=1e-3, gate_lr=0.2, warmup_share=0.5,
        layer_drop=0.0, time_mask=0.0, channel_mask=0.0, speed_perturbation=0.0,
    ),
}  # fmt: skip
SMALL_SLU = dict(dense_lr=5e-4, prune_lr=5e-4, finetune_lr=5e-4)  # at 1e-3 the demo's intents are not learnt
BETAS, GATE_BETAS = (0.9, 0.98), (0.0, 0.9)  # of Adam: fairseq's for the weights; see make_optimizer for gates
WARMUP, DECAY, LAST = 0.1, 0.5, 0.05  # tri-stage learning rate: parts of a phase, the last rate over the peak (fairseq)
CLIP = 1.0  # norm of the weights' gradient, against the odd wild batch
IN_A_ROW = 20  # updates without a finite gradient; after so many nothing will mend itself
CONVERGED = 0.02  # of the dense cost: hardening from so near the budget shuts few units that training had left open

PHASES = {
    "dense": "train a dense model, since there is no trained one to prune",
    "prune": "train weights, gates and multipliers together",
    "finetune": "train the sliced model on",
}
METRICS = {"asr": "word_error_rate", "slu": "intent_accuracy"}  # of each task
SPLITS = ("dev", "test")  # that are evaluated
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --- The commands --------------------------------------------------------------------------------------------------


def main(arguments=None):
    """The program; returns its exit status: 0, 2 for what the user can mend, 128 and the signal that stopped it."""
    options = parse(arguments)
    stream = sys.stderr if options.predict else sys.stdout  # where the results go alone
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=stream)
    try:
        commands = {"predict": predict, "evaluate": evaluate_model, "describe": describe, "export": export}
        chosen = [command for name, command in commands.items() if getattr(options, name) is not None]
        return (chosen or [train_and_prune])[0](options)
    except (UserError, OSError) as error:
        return refuse(error)
    except Stopped as stopped:
        refuse(stopped)
        return 128 + stopped.number
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own only for a GPU's memory
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return refuse(f"out of memory; {'cut up the recording' if options.predict else 'give less --batch-seconds'}")
    except KeyboardInterrupt:
        refuse("interrupted")
        return 130


def refuse(message):
    """Say in one line what is wrong; the exit status for it."""
    print("sslprune:", printable(" ".join(str(message).split())), file=sys.stderr)
    return 2


def printable(text):
    """A text in which bytes of a file's name that are no characters can be printed."""
    return text.encode(errors="backslashreplace").decode()


def number(kind, smallest, largest):
    """A type of argparse's: numbers of a kind (int or float) within bounds."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not smallest <= value <= largest:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {smallest:g} to {largest:g}")
        return value

    return convert


def parse(arguments):
    """The command line as options; a mistake in it ends the program with one line and exit status 2."""
    fraction, count, seconds = number(float, 0, 1), number(int, 0, 10**9), number(float, 0.1, 1e5)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = lambda message: sys.exit(refuse(message))
    add = parser.add_argument_group("what to do").add_argument
    add("--task", choices=sorted(METRICS), help="asr: transcripts with CTC; slu: intents")
    add("--budget", type=number(float, 1e-9, 1), help="fraction of the cost to keep; 1.0 prunes nothing")
    add("--predict", nargs="+", metavar=("MODEL", "FILE"), help="print what a model makes of recordings")
    add("--evaluate", metavar="MODEL", help="print a model's metrics on the dev and test splits of --data")
    add("--describe", metavar="CHECKPOINT", help="print the costs of a model, and what each layer kept")
    add("--export", nargs=2, metavar=("MODEL", "FILE"), help="write a model as a program that torch.export.load loads")
    add = parser.add_argument_group("how").add_argument
    add("--method", choices=sorted(METHODS), default="mac", help="what the budget is of (default %(default)s)")
    add("--ragged", action="store_true", help="keep any number of units, not the multiples that run fast")
    add("--data", default="demo", help="folder of tables, a Kaldi directory, LibriSpeech or SLURP (default: demo)")
    for split in ("train", *SPLITS):
        add(f"--{split}", metavar="NAMES", help=f"subsets that are the {split} split, joined by commas")
    add("--checkpoint", help="pretrained model: Hugging Face, fairseq, torchaudio, or a .pt of ours (default: none)")
    add("--out", help="folder of the run (default runs/TASK-METHOD-BUDGET)")
    add("--resume", action="store_true", help="go on with the run in --out; all other flags as before")
    add("--save-seconds", type=number(float, 0, 1e9), default=600.0, metavar="N",
        help="how often to write what --resume needs (default %(default)g)")  # fmt: skip
    add("--evaluate-updates", type=count, metavar="N",
        help="how often to measure the error on dev while training (default: 20 times a phase; 0: never)")  # fmt: skip
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of weights, batches, masks and gates")
    add("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in; the weights are float32")
    add("--skip-bad", action="store_true", help="go on where over 1 %% of the utterances are unusable")
    add("--max-seconds", type=seconds, default=30.0, metavar="N", help="train on no longer ones (default %(default)g)")
    add("--accumulate", type=number(int, 1, 10**6), default=1, metavar="N", help="batches per update and process")
    add("--workers", type=count, metavar="N", help="processes that load audio (default: 4 with a GPU, else 0)")
    add = parser.add_argument_group("recipe (where each number is from: RECIPES in sslprune.py)").add_argument
    types = {"updates": count, "lr": number(float, 1e-12, 1), "seconds": seconds, "perturbation": number(float, 0, 0.5)}
    for name in RECIPES["small"]:
        defaults = f"default {RECIPES['base'][name]:g}, of a small model {RECIPES['small'][name]:g}"
        add(flag(name), type=types.get(name.rpartition("_")[2], fraction), metavar="N", help=defaults)
    options = parser.parse_args(arguments)
    check_combination(options, parser)
    return options


def flag(name):
    return "--" + name.replace("_", "-")


def check_combination(options, parser):
    """End the program where flags do not go together."""
    used_with = {
        "predict": {"device", "dtype"},
        "evaluate": {"device", "dtype", "task", "data", "train", *SPLITS, "skip_bad", "batch_seconds"},
        "describe": set(),
        "export": set(),
    }
    command = next((name for name in used_with if getattr(options, name) is not None), None)
    for name, value in vars(options).items():
        if value == "":
            parser.error(f"{flag(name)} has an empty value; leave it out, or give it one")
        if command and name not in used_with[command] | {command} and value != parser.get_default(name):
            parser.error(f"{flag(name)} has no meaning with --{command}; leave it out")
    if command is None and (options.task is None or options.budget is None):
        parser.error("give --task and --budget, as in --task asr --budget 0.5, or another command; see --help")
    if command == "predict" and len(options.predict) < 2:
        parser.error("--predict takes a model.pt and at least one recording")


def predict(options):
    """Print a line for each recording; one that cannot be read does not keep the others from being recognised."""
    path, *files = options.predict
    model, failed = load_to_use(path, options), []
    for file, result in zip(files, model.recognise(files)):
        if isinstance(result, UserError):
            failed.append(result)
        else:
            print(printable(f"{file}\t{result}"), flush=True)
    return max([0, *map(refuse, failed)])


def evaluate_model(options):
    """Print the metrics of a model on the dev and test splits of a corpus."""
    model = load_to_use(options.evaluate, options)
    if options.task not in (None, model.task):
        raise UserError(f"{options.evaluate}: was trained for {model.task}, not for {options.task}")
    corpus = open_corpus(options, model.task, SPLITS)
    if model.task == "slu" and not any(u.intent in model.outputs for u in corpus.test):
        raise UserError(f"{options.data}: has none of the model's intents; give the corpus that it is for as --data")
    for split in SPLITS:
        metrics, _ = evaluate(model, corpus, split, options.batch_seconds or RECIPES["small"]["batch_seconds"])
        print(f"{options.data}: {in_words({split: metrics})}", flush=True)
    return 0


def load_to_use(path, options):
    """A model.pt on the device and in the precision that the options name."""
    model = load(path).to(usable_device(options.device))
    model.dtype = DTYPES[options.dtype]
    return model


def describe(options):
    """Print the costs of a model on 10 s of audio, and what each of its layers kept."""
    encoder = read_checkpoint(options.describe).encoder()
    print(table(encoder.shape), picture(encoder.shape, encoder.dense), sep="\n\n")
    return 0


def export(options):
    """Write a model as a program that torch alone loads: waveforms and lengths in, scores and frames out."""
    path, out = options.export
    if os.path.lexists(out):
        raise UserError(f"{out}: is there already; remove it, or give another name")
    model, buffer = load(path), io.BytesIO()
    torch.export.save(exported(model), buffer, extra_files={"labels.json": json.dumps(model.labels)})
    write(out, buffer.getbuffer())
    return 0


# --- A run: its phases ---------------------------------------------------------------------------------------------


def train_and_prune(options):
    """All of a run, from the options to the report; returns the exit status."""
    start, device = time.monotonic(), usable_device(options.device)
    with processes(device):
        run = prepare(options, device)
        if run is not None:
            with logged_to(run.out / "log.txt"), stoppable():
                go_through_phases(run)
                minutes, seconds = divmod(round(time.monotonic() - start), 60)
                log.info("%s: model.pt, report.json, log.txt  (%d:%02d)", run.out, minutes, seconds)
    return 0


def go_through_phases(run):
    """Train, prune, harden, slice, fine-tune and report, from where the run is."""
    options, model, progress = run.options, run.model, run.progress
    log.info("%s  seed %d  %s  %s", run.device, options.seed, options.data, size_in_words(run.start_shape))
    if progress.phase == "dense":
        if options.dense_updates:
            train(run)
            if not rank():
                save_model(model, run.out / "dense.pt")
            progress.head_is_trained = True
        if progress.head_is_trained:
            progress.dense_metrics = evaluate_all(run)
            log.info("dense: %s", in_words(progress.dense_metrics))
        run.enter("prune")

    if progress.phase == "prune":
        train(run)
        progress.head_is_trained = True
        if run.lagrangian:
            progress.expected, progress.expected_counts = run.expected(), run.expected_counts()
            warn_unless_converged(options, progress.expected)
            harden(model.encoder.gates, run.start_shape, options.method, options.budget, options.ragged)
            model.encoder = model.encoder.slice()
            log.info("hardened and sliced: %s", size_in_words(model.encoder.shape))
        run.enter("finetune")

    train(run)
    if not rank():
        save_model(model, run.out / "model.pt")  # before all that remains, so that nothing can lose it
    metrics = evaluate_all(run, last=True)
    if not rank():
        report = make_report(run, metrics)
        write(run.out / "curve.svg", curve(run.progress.history, report["updates"], report["metric"]["name"]).encode())
        write(run.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
        log.info("\n%s\n\n%s\n", picture(model.encoder.shape, run.start_shape), comparison(report))
    run.enter("done")


def prepare(options, device):
    """The Run, at its beginning or where --resume finds it; None where it has ended.

    Everything that can be wrong comes to light here, before anything is trained or written; then --out is made.
    """
    out = Path(options.out or f"runs/{options.task}-{options.method}-{options.budget:g}")
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise UserError(f"{out}: a file stands where --out needs a folder; give another --out")
    state, checkpoint = read_state(out, options), None
    if options.checkpoint is not None and not state:
        checkpoint = read_checkpoint(options.checkpoint)
    shape = Shape.from_dict(state["progress"]["start_shape"]) if state else checkpoint.shape if checkpoint else SMALL
    fill_recipe(options, shape)
    if options.budget < 1:
        check_budget(shape, options.method, options.budget)
    if state:
        check_settings(options, state, out)
        if state["progress"]["phase"] == "done":
            log.info("%s: has run to its end; nothing is left to do", out)
            return None
    corpus = open_corpus(options, options.task, ("train", *SPLITS))
    torch.manual_seed(options.seed)
    if state:
        run = Run.restored(options, out, corpus, device, state)
    else:
        model, trained = model_to_prune(options, checkpoint, corpus)
        run = Run(options, out, corpus, device, model, Progress(shape.as_dict(), head_is_trained=trained))
        torch.manual_seed(options.seed + rank())  # after the weights, which are to be the same in all processes
    if not rank():
        out.mkdir(parents=True, exist_ok=True)
    if not state:
        run.save()
    return run


def usable_for_training(run):
    """The utterances of the training split that are not too long and fit the model; others are skipped."""
    short = [u for u in run.corpus.train if u.seconds <= run.options.max_seconds]
    run.progress.too_long = len(run.corpus.train) - len(short)
    usable = data.usable(short, run.corpus, frames_of(run.model), run.model.task == "asr")
    run.corpus.check()
    if not usable:
        raise UserError("no utterance of the training split is of use: all are over --max-seconds, or too short")
    return usable


def fill_recipe(options, shape):
    """Set what the command line left open, for a model of this shape."""
    recipe = dict(RECIPES["base"])
    if shape.width < BASE.width:
        recipe = RECIPES["small"] | (SMALL_SLU if options.task == "slu" else {})
    if options.checkpoint is not None:
        recipe["dense_updates"] = 0
    for name, value in recipe.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def model_to_prune(options, checkpoint, corpus):
    """A SpeechModel, with the checkpoint's encoder where there is one, and whether its head is trained for the task."""
    if options.task == "asr":
        labels = data.vocabulary(u.text for u in corpus.train)
    else:
        labels = sorted({u.intent for u in corpus.train})
    if checkpoint is None or checkpoint.task != options.task:
        if checkpoint:
            what = f"its head for {checkpoint.task} is left out" if checkpoint.task else "has no head for a task"
            log.info("%s: %s; one for %s starts at random", options.checkpoint, what, options.task)
        encoder = checkpoint.encoder() if checkpoint else Wav2Vec2(SMALL)
        return SpeechModel(encoder, options.task, labels), False
    model = checkpoint.model()
    new = [label for label in labels if label not in model.outputs]
    if new:
        log.info("%s: its head had no output for %s; they are added", options.checkpoint, " ".join(new))
        model.add_labels(new)
    return model, True


def open_corpus(options, task, splits):
    subsets = {split: getattr(options, split) for split in ("train", *SPLITS)}
    return data.open_corpus(options.data, task, options.seed, subsets, splits, options.skip_bad)


def usable_device(name):
    """The torch.device of this name; of None, a GPU where there is one."""
    try:
        if name in (None, "cuda"):
            local_rank = os.environ.get("LOCAL_RANK", "0")  # which torchrun sets
            name = f"cuda:{local_rank}" if name or torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # random states and synchronisation are the current device's
        torch.zeros(1, device=device, dtype=torch.float64).item()  # counts and the first GroupNorm need float64
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError, TypeError, ImportError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name}: cannot be used here ({why})") from error
    return device


# --- Training ------------------------------------------------------------------------------------------------------


def train(run):
    """Train to the end of the phase: min over weights and gates, max over multipliers, of the task's loss + penalty."""
    options, model, lagrangian = run.options, run.model, run.lagrangian
    encoder, progress, updates = model.encoder, run.progress, run.updates
    optimizer = run.optimizer = run.optimizer or make_optimizer(model, lagrangian, options.gate_lr)
    encoder.layer_drop = options.layer_drop
    encoder.projection.time_mask, encoder.projection.channel_mask = options.time_mask, options.channel_mask
    run.start_clock()
    announce(run)
    watch(run)
    show = countdown(progress.phase, updates, progress.update)
    while progress.update < updates:
        for batches in epoch(run):
            model.train()
            done = progress.update / updates  # of the phase
            optimizer.param_groups[0]["lr"] = getattr(options, f"{progress.phase}_lr") * tri_stage(done)
            optimizer.zero_grad(set_to_none=False)
            losses = []
            for utterances, waveforms, lengths in batches:
                loss = model.loss(waveforms.to(run.device), lengths, utterances)
                penalty = lagrangian(encoder.gates, run.warmup) if lagrangian else 0
                (loss + penalty).backward()
                losses.append(loss.detach())
            loss, asked = mean_gradients(run, losses)
            if loss is not None:
                progress.update += 1
                step(optimizer, loss, progress)
                show(progress.update, lambda: f"  loss {loss:.3f}  {kept_in_words(run)}")
            save_or_stop(run, asked)
            watch(run)
    run.save()


def announce(run):
    """Say which phase begins, and what the budget is of."""
    options, phase = run.options, run.progress.phase
    phases = [name for name in PHASES if getattr(options, f"{name}_updates")]
    if phase in phases:
        what = PHASES[phase] if phase == "dense" or options.budget < 1 else "train the dense model on, without gates"
        log.info("phase %d of %d, %s: %s", phases.index(phase) + 1, len(phases), phase, what)
    if run.lagrangian:
        whole = cost(run.start_shape, SAMPLES)
        whose = "the dense model's" if run.start_shape == run.model.encoder.dense else "the already pruned checkpoint's"
        for constraint in METHODS[options.method]:
            log.info("budget: %g of %s %s %s", options.budget, whose, f"{constraint.measure(whole):,}", constraint.name)


def epoch(run):
    """The batches of each update that is left in this epoch: this process's, as (utterances, waveforms, lengths).

    An epoch's batches follow from the seed, the phase and its number. An update takes the next few: one for each
    process, `accumulate` times. It depends on their number in all, and not on where each was computed.
    """
    options, model, corpus, progress = run.options, run.model, run.corpus, run.progress
    rng = np.random.default_rng([options.seed, *progress.phase.encode(), progress.epoch])
    # The shortest first: CTC leaves its plateau of blanks sooner (SortaGrad; Amodei et al. 2016, arXiv 1512.02595).
    shortest_first = progress.phase == "dense" and progress.epoch == 0 and model.task == "asr"
    batches = data.training_batches(
        run.utterances, frames_of(model), model.task == "asr",
        options.speed_perturbation, options.batch_seconds, rng, shortest_first,
    )  # fmt: skip
    size, first_update, from_start = ranks() * options.accumulate, progress.update, progress.groups_used == 0
    groups = [batches[i : i + size] for i in range(0, len(batches), size)]  # of an update, in all processes
    groups = [group[rank() :: ranks()] for group in groups[progress.groups_used :]]
    loaded = load_batches(list(itertools.chain(*groups)), corpus, options.workers, run.device)
    for group in groups:
        if progress.update == run.updates:
            break
        progress.groups_used += 1
        yield [batch for batch in itertools.islice(loaded, len(group)) if batch[0]]
    share_skipped(corpus)
    corpus.check()
    if from_start and progress.update == first_update:
        raise UserError("no utterance of the training split could be read")
    progress.epoch, progress.groups_used = progress.epoch + 1, 0


def load_batches(batches, corpus, workers, device):
    """An iterator over (utterances, waveforms, lengths) of these batches; what cannot be read is skipped."""
    if workers is None:
        workers = 4 if device.type == "cuda" else 0
    own = torch.Generator()  # or it would draw from the global one, and a resumed epoch has one iterator more
    loader = DataLoader(batches, None, collate_fn=data.load_batch, num_workers=workers, generator=own)
    with signals_blocked():
        loaded = iter(loader)
    for *batch, bad in loaded:
        for reason in bad:
            corpus.skip(reason)
        yield batch


def frames_of(model):
    """A function from samples to the frames that a model makes of them."""
    return lambda samples: model.encoder.tensor_shape.frames(samples)[-1]


def tri_stage(done):
    """Learning rate over its peak when `done`, in [0, 1), of a phase is over: up linearly, hold, down exponentially."""
    if done < WARMUP:
        return (done + 1e-3) / (WARMUP + 1e-3)
    if done < 1 - DECAY:
        return 1.0
    return LAST ** ((done - (1 - DECAY)) / DECAY)


def make_optimizer(model, lagrangian, gate_lr):
    """Adam over the weights and, where there is a Lagrangian, over the gates and its multipliers; the latter ascend.

    The rate of gates and multipliers is constant. If it fell with the weights' rate, multipliers that grew while the
    target was out of reach could not come down before the phase ends, and gates would be shut beyond the budget. They
    have no momentum (the first of GATE_BETAS): they answer each other, and its lag makes the expected cost swing about
    the budget (Gidel et al. 2019, arXiv 1807.04740). The second beta is small since their gradients vanish as the
    budget is met: a long memory of large ones is a lag too. All this was tried in phases of some hundred updates, not
    in base's 40,000.
    """
    weights = [p for name, p in model.named_parameters() if not name.endswith("log_alpha")]
    groups = [{"params": weights, "betas": BETAS}]
    if lagrangian:
        theirs = {"lr": gate_lr, "betas": GATE_BETAS}
        log_alphas = [gate.log_alpha for gate in model.encoder.gates.values()]
        groups += [{"params": log_alphas, **theirs}, {"params": [lagrangian.multipliers], "maximize": True, **theirs}]
    for group in groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)  # LayerDrop leaves some without, and the processes are to agree
    return torch.optim.Adam(groups)


def mean_gradients(run, losses):
    """Let all processes have the mean gradients of their batches. losses: of this process's batches.

    Returns the mean loss, None where no process had a batch, and what any of them was asked: to stop, to save.
    """
    gradients = [p.grad for group in run.optimizer.param_groups for p in group["params"]]
    due = not rank() and time.monotonic() - run.saved > run.options.save_seconds
    sums = [sum(losses), len(losses), len(stopping), due]
    sums = torch.tensor(sums, dtype=torch.float64, device=run.device)
    add_up([sums, *gradients])
    loss, count, stop, save = sums.tolist()
    if count > 1:
        for gradient in gradients:
            gradient /= count
    return loss / count if count else None, (bool(stop), bool(save))


def step(optimizer, loss, progress):
    """Make the update that the gradients ask for, or leave it out where they are not finite."""
    weights, *others = (group["params"] for group in optimizer.param_groups)
    others = [p.grad for p in itertools.chain(*others)]
    norms = nn.utils.clip_grad_norm_(weights, CLIP).item(), nn.utils.get_total_norm(others).item()
    if math.isfinite(loss) and all(map(math.isfinite, norms)):
        optimizer.step()
        progress.left_out_in_a_row = 0
        progress.losses.append(loss)
        return
    progress.left_out += 1
    progress.left_out_in_a_row += 1
    log.warning("update %d left out: loss %g, norms of gradients %g and %g", progress.update, loss, *norms)
    if progress.left_out_in_a_row == IN_A_ROW:
        raise UserError(
            f"{IN_A_ROW} updates in a row had no finite loss or gradient (loss {loss:g}, gradient {norms[0]:g});"
            f" start anew with a smaller --{progress.phase}-lr or --gate-lr, or with --dtype float32"
        )


def kept_in_words(run):
    """What the model is expected to keep of each constrained cost, and what of it is asked for now."""
    return f"expected to keep {', '.join(f'{kept:.3f}' for kept in run.expected())} (target {run.target:.3f})"


def countdown(what, total, first=0):
    """A function to call after each of `total` steps, `first` of them made before: it logs how long is left.

    It takes the step and a function that makes details, and logs ever less often.
    """
    start = shown = time.monotonic()

    def show(step, details=lambda: ""):
        nonlocal shown
        now = time.monotonic()
        if now - shown >= max(10, (now - start) / 50):
            left = round((now - start) / max(1, step - first) * (total - step))
            log.info("%s %d/%d%s  %d:%02d left", what, step, total, details(), left // 60, left % 60)
            shown = now

    return show


def warn_unless_converged(options, expected):
    """Say so where training did not bring the expected costs to the budget, and what to change."""
    for constraint, kept in zip(METHODS[options.method], expected):
        if abs(kept - options.budget) > CONVERGED:
            then = "shuts what training kept" if kept > options.budget else "keeps what training shut"
            log.warning(
                "the constraint has not converged: %.3f of the %s are expected to be kept, not %g, and hardening %s."
                " Give more --prune-updates, or a larger --gate-lr", kept, constraint.name, options.budget, then,
            )  # fmt: skip


# --- Evaluation ----------------------------------------------------------------------------------------------------


def evaluate_all(run, last=False):
    """Metrics on all SPLITS at the end of a phase. last: of the run; what was said goes into files."""
    found = {}
    for split in SPLITS:
        found[split], rows = evaluate(run.model, run.corpus, split, run.options.batch_seconds)
        if last and not rank():
            rows = [("name", "reference", "hypothesis"), *rows]
            lines = ["\t".join(re.sub(r"[\t\r\n]", " ", field) for field in row) + "\n" for row in rows]
            write(run.out / f"{split}.tsv", "".join(lines).encode(errors="backslashreplace"))
    record(run, found["dev"])
    return found


def watch(run):
    """Every so many updates, and before slicing: measure the error on dev, and record it."""
    progress, every = run.progress, run.options.evaluate_updates
    every = max(1, run.updates // 20) if every is None else every
    # evaluate_all records the ends of the other phases; that of pruning has to be measured before slicing.
    due = progress.phase == "prune" if progress.update == run.updates else every and progress.update % every == 0
    untrained = progress.update == 0 and not progress.head_is_trained
    recorded = progress.history and (progress.history[-1]["phase"], progress.history[-1]["update"])
    if every and due and not untrained and recorded != (progress.phase, progress.update):
        try:
            dev, _ = evaluate(run.model, run.corpus, "dev", run.options.batch_seconds)
        except Stopped:
            run.save()
            raise
        record(run, dev)


def record(run, dev):
    """Say where training is, and add it to metrics.jsonl. dev: metrics on the dev split."""
    progress, metric = run.progress, METRICS[run.model.task]
    entry = {
        "phase": progress.phase,
        "update": progress.update,
        "loss": statistics.fmean(progress.losses) if progress.losses else None,  # of the updates since the last entry
        "lr": run.optimizer.param_groups[0]["lr"] if run.optimizer and progress.update else None,
        "target": run.target,
        "expected": run.expected(),
        "multipliers": run.lagrangian and run.lagrangian.multipliers.tolist(),
        "dev": dev[metric],
    }
    progress.history.append(entry)
    progress.losses.clear()
    where = f"{progress.phase} {progress.update}/{run.updates}"
    log.info("%s  %s  %s", where, in_words({"dev": dev}), kept_in_words(run))
    if not rank():
        write(run.out / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in progress.history).encode())


def evaluate(model, corpus, split, batch_seconds):
    """Metrics of a model on one of SPLITS, as fractions, {name: value}, and (name, reference, hypothesis) of each."""
    model.eval()
    utterances = data.usable(getattr(corpus, split), corpus, frames_of(model), ctc=False)
    batches = data.batches(utterances, batch_seconds)
    mine = range(rank(), len(batches), ranks())  # each process has its part of the batches, however many there are
    show = countdown(f"evaluate {split}", len(mine))
    found = []  # (number of the batch, names, references, hypotheses)
    loaded = load_batches([batches[i] for i in mine], corpus, None, next(model.parameters()).device)
    for done, (i, (batch, waveforms, lengths)) in enumerate(zip(mine, loaded), 1):
        if stopping and ranks() == 1:  # many processes stop together, after an update
            raise Stopped(stopping[0], "an evaluation")
        if batch:
            said = [u.text if model.task == "asr" else u.intent for u in batch]
            found.append((i, [u.name for u in batch], said, model.transcribe(waveforms, lengths)))
        show(done)
    share_skipped(corpus)
    corpus.check()
    found = sorted(itertools.chain(*gather(found)))
    names, references, hypotheses = ([value for batch in found for value in batch[which]] for which in (1, 2, 3))
    if not references:
        raise UserError(f"no utterance of the {split} split could be read")
    score = data.error_rates if model.task == "asr" else data.accuracies
    return score(references, hypotheses), list(zip(names, references, hypotheses))


def forward_seconds(models, device, dtype, repeats=5):
    """Median seconds of each encoder's forward on 10 s of audio, in turn, so that a noisy machine slows all alike."""
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
    return [statistics.median(taken[1:]) for taken in seconds]  # the first was to warm up


# --- The report ----------------------------------------------------------------------------------------------------


def make_report(run, metrics):
    """What goes into report.json. metrics: of the pruned model."""
    options, progress, metric = run.options, run.progress, METRICS[run.options.task]
    encoders = {"dense": Wav2Vec2(run.start_shape).to(run.device), "pruned": run.model.encoder}
    costs = [cost(encoder.shape, SAMPLES) for encoder in encoders.values()]
    dense, kept = ([constraint.measure(c) for constraint in METHODS[options.method]] for c in costs)
    flags = ("task", "method", "budget", "ragged", "dtype", "seed", "data", "checkpoint")
    report = {
        **{name: getattr(options, name) for name in flags},
        "achieved": sum(kept) / sum(dense),
        "kept": [k / d for k, d in zip(kept, dense)],
        "expected": progress.expected,  # of each constrained cost, when the pruning phase ended; `kept` came of it
        "expected_counts": progress.expected_counts,  # of units, likewise; the pruned shape came of them
        "converged": all(abs(share - options.budget) <= CONVERGED for share in progress.expected or []),
        "metric": {"name": metric, **{split: values[metric] for split, values in metrics.items()}},
        "metrics": {"dense": progress.dense_metrics, "pruned": metrics},
        "skipped": len(run.corpus.skipped),
        "skipped_reasons": list(run.corpus.skipped),
        "too_long": progress.too_long,  # utterances over --max-seconds, which training left out
        "updates": {phase: getattr(options, f"{phase}_updates") for phase in PHASES},
        "updates_left_out": progress.left_out,
        "processes": ranks(),
        "train_seconds": round(progress.seconds, 1),
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
    lines = [f"{'':<28}{'before':>15}{'pruned':>15}{'kept':>10}"]
    for name, key, scale, unit, digits in rows:
        before, after = (f"{values[key] / scale:12.{digits}f} {unit:<2}" for values in (dense, pruned))
        lines.append(f"{name:<28}{before}{after}{pruned[key] / dense[key]:>10.2%}")
    for split, values in metrics["pruned"].items():
        for name, value in values.items():
            before = f"{metrics['dense'][split][name]:.2%}" if metrics["dense"] else "-"
            lines.append(f"{name.replace('_', ' ') + ', ' + split:<28}{before:>15}{value:>15.2%}")
    return "\n".join(lines)


def curve(history, updates, metric):
    """The lines of metrics.jsonl as a picture, SVG: the dev metric, and expected and target cost, over all updates.

    updates: how many each phase has, {phase: number}. metric: the name of what is measured on dev.
    """
    ends = dict(zip(updates, itertools.accumulate(updates.values())))  # in updates of the whole run
    xs = [ends[entry["phase"]] - updates[entry["phase"]] + entry["update"] for entry in history]
    last = max(1, *ends.values())
    highest = max([1e-9, *(entry["dev"] for entry in history)])
    name = f"{metric.replace('_', ' ')}, to {highest:.3g}"
    lines = {name: (30, "#c33", [entry["dev"] / highest for entry in history])}
    for i, _ in enumerate(history[0]["expected"] if history else []):
        lines[f"expected cost {i + 1}"] = (230, "#36c", [entry["expected"][i] for entry in history])
    lines["target"] = (230, "#999", [entry["target"] for entry in history])
    shapes = [f'<rect x="50" y="{top}" width="600" height="160" fill="none" stroke="#ccc"/>' for top in (30, 230)]
    shapes += [f'<path d="M{50 + 600 * x / last:.1f} 30v360" stroke="#ccc"/>' for x in ends.values()]
    for number, (name, (top, colour, ys)) in enumerate(lines.items()):
        points = " ".join(f"{50 + 600 * x / last:.1f},{top + 160 * (1 - y):.1f}" for x, y in zip(xs, ys))
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        shapes.append(f'<text x="660" y="{top + 12 + 14 * number}" fill="{colour}">{name}</text>')
    for phase in (phase for phase in ends if updates[phase]):
        where = f'x="{45 + 600 * ends[phase] / last:.1f}" y="405" text-anchor="end"'
        shapes.append(f"<text {where}>{phase} {ends[phase]}</text>")
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="820" height="420" font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="820" height="420" fill="white"/>', *shapes, "</svg>", ""])


def size_in_words(shape):
    c = cost(shape, SAMPLES)
    return f"{c.macs / 1e9:.3f} GMACs on {SECONDS} s, {c.params / 1e6:.3f} M parameters"


def in_words(metrics):
    """{split: {name: value}} in a few words."""
    named = ((split, name, value) for split, values in metrics.items() for name, value in values.items())
    return ", ".join(f"{split} {name.replace('_', ' ')} {value:.2%}" for split, name, value in named)


# --- State: how a run goes on after a death ------------------------------------------------------------------------

STATE = "training.state"  # the training checkpoint in the folder of a run
COMMANDS = {"predict", "evaluate", "describe", "export"}
NO_EFFECT_ON_RESULTS = COMMANDS | {"resume", "out", "device", "workers", "save_seconds", "skip_bad"}


@dataclasses.dataclass
class Progress:
    """Where a run is, and what it has found so far: plain values, which the training checkpoint holds as they are."""

    start_shape: dict  # of the model that the budget is of
    head_is_trained: bool  # so that there is something to evaluate
    phase: str = "dense"  # one of PHASES, or "done"
    update: int = 0  # how many the phase has made
    epoch: int = 0  # of the phase
    groups_used: int = 0  # of the epoch's batches, one group an update
    seconds: float = 0.0  # of training
    dense_metrics: dict | None = None
    expected: list | None = None  # part of each constrained cost that gates were to keep when the pruning phase ended
    expected_counts: dict | None = None  # the units of each place that they were to keep then
    too_long: int = 0  # utterances that training leaves out
    left_out: int = 0  # updates without finite gradients
    left_out_in_a_row: int = 0
    losses: list = dataclasses.field(default_factory=list)  # of the updates since the last line of metrics.jsonl
    history: list = dataclasses.field(default_factory=list)  # the lines of metrics.jsonl


class Run:
    """A run: its model, and all else that the rest of it depends on.

    `save` writes everything and `restored` brings it back: together they make a resumed run end, on the CPU, in the
    same bits as one that was never stopped.
    """

    def __init__(self, options, out, corpus, device, model, progress):
        self.options, self.out, self.corpus, self.device = options, out, corpus, device
        self.model, self.progress = model, progress
        model.to(device).dtype = DTYPES[options.dtype]
        self.start_shape = Shape.from_dict(progress.start_shape)
        self.lagrangian = self.optimizer = self.clock = None
        self.utterances = usable_for_training(self)  # which raises UserError where there is none

    @property
    def updates(self):
        """How many the phase has in all."""
        return getattr(self.options, f"{self.progress.phase}_updates")

    @property
    def warmup(self):
        """The part of the target that is asked for now."""
        return min(1, self.progress.update / max(1, self.options.warmup_share * self.updates))

    @property
    def target(self):
        """The fraction of the constrained costs that may be kept now."""
        if self.lagrangian:
            return 1 - (1 - self.options.budget) * self.warmup
        return 1.0 if self.progress.phase == "dense" else self.options.budget

    def expected(self):
        """The fraction of each constrained cost that gates are expected to keep, or that a model without gates has."""
        if self.lagrangian:
            return (1 - self.lagrangian.sparsity(self.model.encoder.gates)).tolist()
        now, start = (cost(shape, SAMPLES) for shape in (self.model.encoder.shape, self.start_shape))
        return [constraint.measure(now) / constraint.measure(start) for constraint in METHODS[self.options.method]]

    @torch.no_grad()
    def expected_counts(self):
        """How many units gates are expected to keep, {"channels": [in each layer], "heads": ..., "units": ...}."""
        shape = vars(expected_shape(self.start_shape, self.model.encoder.gates))
        return {kind: [round(float(count), 1) for count in shape[kind]] for kind in ("channels", "heads", "units")}

    def enter(self, phase):
        """Begin the next phase."""
        for name in ("update", "epoch", "groups_used", "left_out_in_a_row"):
            setattr(self.progress, name, 0)
        self.progress.phase = phase
        self.optimizer = self.lagrangian = self.clock = None
        if phase == "prune" and self.options.budget < 1:
            self.model.encoder.add_gates(KINDS[self.options.method])
            self.add_lagrangian()
        self.save()

    def add_lagrangian(self):
        self.lagrangian = Lagrangian(self.start_shape, self.options.method, self.options.budget).to(self.device)

    def start_clock(self):
        self.clock = self.saved = time.monotonic()

    def save(self):
        """Write the training checkpoint: a SHA-256, and what torch.save makes of everything. All processes call it."""
        self.saved = time.monotonic()
        if self.clock is not None:
            self.progress.seconds, self.clock = self.progress.seconds + self.saved - self.clock, self.saved
        share_skipped(self.corpus)
        random = gather((torch.get_rng_state(), torch.cuda.get_rng_state() if self.device.type == "cuda" else None))
        if rank():
            return
        contents = {"settings": settings(self.options), "progress": dataclasses.asdict(self.progress)}
        if self.progress.phase != "done":
            contents |= {
                "model": contents_of(self.model),
                "multipliers": self.lagrangian and self.lagrangian.multipliers.detach(),
                "optimizer": self.optimizer and self.optimizer.state_dict(),
                "random": random,
                "skipped": list(self.corpus.skipped),
                "corpus": [self.corpus.kind, self.corpus.size],
            }
        written = torch_bytes(contents)
        write(self.out / STATE, hashlib.sha256(written).digest(), written)

    @classmethod
    def restored(cls, options, out, corpus, device, state):
        """The Run that a training checkpoint holds."""
        if state["corpus"] != [corpus.kind, corpus.size]:
            now = f"it now has {corpus.size} utterances"
            raise UserError(f"{options.data}: is not the corpus that {out} began with; {now}")
        kinds = KINDS[options.method] if state["multipliers"] is not None else ()
        model = read_ours(state["model"], out / STATE).model(kinds)
        run = cls(options, out, corpus, device, model, Progress(**state["progress"]))
        for reason in state["skipped"]:
            corpus.skip(reason)
        if kinds:
            run.add_lagrangian()
            run.lagrangian.multipliers.data.copy_(state["multipliers"])
        if state["optimizer"]:
            run.optimizer = make_optimizer(model, run.lagrangian, options.gate_lr)
            run.optimizer.load_state_dict(state["optimizer"])
        cpu, cuda = state["random"][rank()]
        torch.set_rng_state(cpu)
        if cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(cuda)
        log.info("%s: goes on at %s %d/%d", out, run.progress.phase, run.progress.update, run.updates)
        return run


def read_state(out, options):
    """The training checkpoint in the folder of a run that --resume is to go on with; None where there is none yet."""
    path, found = out / STATE, sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not options.resume:
        if found:
            goes_on = "go on with it by --resume, " if STATE in found else ""
            raise UserError(f"{out}: holds another run; {goes_on}give another --out, or remove it")
        return None
    if STATE not in found:
        if set(found) - {"log.txt", STATE + ".partial"}:
            raise UserError(f"{out}: holds no {STATE} to --resume from; give the --out of a run, or another")
        log.info("%s: there is nothing to resume; the run begins", out)
        return None
    contents = memoryview(path.read_bytes())
    if hashlib.sha256(contents[32:]).digest() != contents[:32]:
        dense = "with the dense.pt of this one as --checkpoint if it is there"
        raise UserError(f"{path}: is damaged; start anew in another --out, {dense}")
    return torch.load(io.BytesIO(contents[32:]), map_location="cpu", weights_only=True)


def settings(options):
    """What a run's result depends on: its flags, after the recipe has filled them in, and the number of processes."""
    flags = {name: value for name, value in vars(options).items() if name not in NO_EFFECT_ON_RESULTS}
    return flags | {"processes": ranks()}


def check_settings(options, state, out):
    """Refuse to go on with a run with other flags than its own."""
    for name, now in settings(options).items():
        then = state["settings"].get(name)
        if now != then:
            what = "torchrun's --nproc-per-node" if name == "processes" else flag(name)
            other = f"was started with {what} {then}, and cannot go on with {now}"
            raise UserError(f"{out}: {other}; give the run's own, or another --out")


@contextlib.contextmanager
def logged_to(path):
    """A context in which what is logged goes into a file, too; in the process that writes."""
    handler = logging.NullHandler() if rank() else logging.FileHandler(path, encoding="utf-8")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


# --- Signals -------------------------------------------------------------------------------------------------------

stopping = []  # the signals that asked this process to stop


class Stopped(Exception):
    """A signal, of this number, asked the run to stop. It has saved itself."""

    def __init__(self, number, where):
        name = signal.Signals(number).name
        super().__init__(f"{name} stopped the run at {where}; the same command with --resume goes on")
        self.number = number


def ask_to_stop(number, frame):
    """Signal handler: stop at the next opportunity; at a second Ctrl-C, at once."""
    if stopping and number == signal.SIGINT:
        raise KeyboardInterrupt
    stopping.append(number)


@contextlib.contextmanager
def signals_blocked():
    """A context to start processes in that outlive signals to the whole group: their parent saves, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def save_or_stop(run, asked):
    """After an update: do what the processes were asked to (see mean_gradients)."""
    stop, save = asked
    if stop or save:
        run.save()
    if stop:
        raise Stopped((stopping or [signal.SIGTERM])[0], f"{run.progress.phase} {run.progress.update}/{run.updates}")


@contextlib.contextmanager
def stoppable():
    """A context in which SIGTERM and Ctrl-C let the run save itself first."""
    stopping.clear()
    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- Many processes: torchrun starts one for each GPU --------------------------------------------------------------


@contextlib.contextmanager
def processes(device):
    """A context in which this process is one of those that torchrun started, if it did.

    Optimizers import torch.distributed.nn.functional, whose functions keep the group of that time as a default value.
    Its threads then outlive destroy_process_group, and abort the process as Python ends; so it is imported before.
    """
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank():
            log.setLevel(logging.ERROR)
    try:
        yield
        gather(None)  # so that none ends while the first still writes
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank():
    """The number of this process; 0 is the one that writes and says things."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def together():
    """A context for what all processes do at once. If another one has died, it raises UserError instead of hanging."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this run could not agree ({why}): where another process has ended, it says why;"
            " the same command with --resume goes on"
        ) from error


def gather(item):
    """What each process has, in the order of their ranks."""
    items = [item] * ranks()
    if dist.is_initialized():
        with together():
            dist.all_gather_object(items, item)
    return items


def add_up(tensors):
    """Replace each tensor by its sum over the processes, which is the same to the last bit in all of them."""
    if dist.is_initialized():
        with together():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()


def share_skipped(corpus):
    """Let each process know what the others had to skip."""
    for reason in itertools.chain(*gather(list(corpus.skipped))):
        corpus.skip(reason)


if __name__ == "__main__":
    sys.exit(main())
