"""Structured pruning of wav2vec2 for one task, under a budget of MACs or parameters.

    python sslprune.py --task asr --budget 0.5                    # the demo corpus, a small model trained from scratch
    python sslprune.py --task asr --budget 0.5 --checkpoint wav2vec2-base --data LibriSpeech
    python sslprune.py --task slu --budget 0.5 --checkpoint wav2vec2-base --data slurp --method size
    python sslprune.py --predict runs/asr-demo-mac-0.5-0/model.pt recording.wav ...
    python sslprune.py --evaluate runs/asr-demo-mac-0.5-0/model.pt
    python sslprune.py --describe runs/asr-demo-mac-0.5-0/model.pt
    python sslprune.py --export runs/asr-demo-mac-0.5-0/model.pt model.pt2
    torchrun --nproc-per-node 4 sslprune.py --task asr --budget 0.5 ...    # four processes, a GPU each

A run has up to three phases. The method prunes a trained model, so a run without a checkpoint first trains a dense one;
and so does one of wav2vec2-base whose head is for no task or another one. Then weights, gates and multipliers train
together under the budget (gates.py); the gates are hardened to the budget and the model is sliced. Then the small
model trains on, and its last state is model.pt. --budget 1.0 trains as long, and prunes nothing: the reference. When a
run was stopped or killed, the same command with --resume goes on where it was.
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
import signal
import sqlite3
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

# Threads of OpenMP spin while they wait for each other, long enough to wait for one that another process keeps off its
# core: beside one busy process the demo took 16 times as long. After so many turns they sleep. Read as torch starts.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a process group, see `processes`
from torch import nn

import data
from flops import BASE, SAMPLES, SECONDS, SMALL, Shape, UserError, cost, picture, table
from gates import KINDS, METHODS, Lagrangian, check_budget, expected_shape, harden
from transformer import SpeechModel, Wav2Vec2, check_precision, contents_of, exported, load, precision, read_checkpoint
from transformer import read_ours, save_model, torch_bytes, write

log = logging.getLogger("sslprune")

# --- Recipes: how long and how fast to train; each number can be set by the flag of its name -----------------------

RECIPES = {
    # wav2vec2-base. Nobody here could run it to its end. The known recipes, for 100 hours but DPHuBERT's 960:
    #   fairseq (base_100h.yaml)      1,600 s of audio an update, 80,000 updates: 356 passes; learning rate 3e-5
    #   transformers' example of CTC  some 400 s; 3e-4, warmed up over 500 updates
    #   DPHuBERT, with a teacher      640 s, 50,000 updates: 9 passes; 2e-4, warmed up over 30 %, and then 1e-4
    # Here an update has 400 s, in four batches so that 24 GB suffice, and the three phases are 22, 44 and 22 passes.
    # The rates lie between the first two. The sliced model has half the rate, as DPHuBERT's has; the gates' rate and
    # the warm-up of the target (10 %) are DPHuBERT's, too. Masks, LayerDrop and the weights' schedule are fairseq's.
    # Other than there, the frontend trains, and dropout acts at all places, as in pre-training.
    "base": dict(
        dense_updates=20_000, prune_updates=40_000, finetune_updates=20_000, batch_seconds=100.0, accumulate=4,
        dense_lr=1e-4, prune_lr=1e-4, finetune_lr=5e-5, gate_lr=2e-2, warmup_share=0.1,
        layer_drop=0.1, time_mask=0.65, channel_mask=0.5, speed_perturbation=0.0,
    ),
    # The small model from scratch, chosen on the demo's dev set: as long as a few minutes allow, gates that are fast,
    # and a target that is slow enough for a phase of some hundred updates. Masks and the like need longer training.
    "small": dict(
        dense_updates=560, prune_updates=300, finetune_updates=180, batch_seconds=10.0, accumulate=1,
        dense_lr=1e-3, prune_lr=1e-3, finetune_lr=1e-3, gate_lr=0.2, warmup_share=0.5,
        layer_drop=0.0, time_mask=0.0, channel_mask=0.0, speed_perturbation=0.0,
    ),
}  # fmt: skip
SMALL_SLU = dict(dense_lr=5e-4, prune_lr=5e-4, finetune_lr=5e-4)  # at 1e-3 the demo's intents are not learnt
BETAS, GATE_BETAS = (0.9, 0.98), (0.0, 0.9)  # of Adam: fairseq's for the weights; see make_optimizer for gates
WARMUP, DECAY, LAST = 0.1, 0.5, 0.05  # tri-stage learning rate: parts of a phase, the last rate over the peak (fairseq)
CLIP = 1.0  # norm of the weights' gradient, against the odd wild batch
IN_A_ROW = 20  # updates without a finite gradient; after so many nothing will mend itself
PATIENCE = 600  # s that reading a batch may take: a file server that is away for minutes ends no run
CONVERGED = 0.02  # of the dense cost: hardening from so near the budget shuts few units that training had left open

PHASES = {
    "dense": "train the dense model, since what is pruned is to be trained for the task",
    "prune": "train weights, gates and multipliers together",
    "finetune": "train the sliced model on",
}
METRICS = {"asr": "word_error_rate", "slu": "intent_accuracy"}  # of each task
SPLITS = ("dev", "test")  # that are evaluated
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --- The commands --------------------------------------------------------------------------------------------------


def main(arguments=None):
    """The program; returns its exit status: 0, 2 for what the user can mend, 128 and the signal that stopped it."""
    for stream in (sys.stdout, sys.stderr):  # any file's name, in a terminal of any encoding
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
    options, status = parse(arguments), 128 + 13  # of what SIGPIPE ends
    stream = sys.stderr if options.predict else sys.stdout  # where the results go alone
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=stream)
    logging.raiseExceptions = False  # where nobody reads stdout any more, a run goes on, and log.txt has what it says
    try:
        command, _ = COMMANDS.get(command_of(options), (train_and_prune, None))
        status = command(options)
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # `| head` has read enough: Python is not to say so as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status
    except (UserError, OSError) as error:
        return refuse(error)
    except Stopped as stopped:
        refuse(stopped)
        return 128 + stopped.args[0]
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own only for a GPU's memory
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return refuse(f"out of memory; {'cut up the recording' if options.predict else 'give less --batch-seconds'}")
    except KeyboardInterrupt:
        refuse("interrupted")
        return 130


def refuse(message):
    """Say in one line what is wrong; the exit status for it."""
    with contextlib.suppress(OSError):  # where nobody reads it
        print("sslprune:", " ".join(str(message).split()), file=sys.stderr)
    return 2


def number(kind, smallest, largest):
    """A type of argparse's: numbers of a kind (int or float) within bounds."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if smallest <= (value := kind(text)) <= largest:
                return value
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {smallest:g} to {largest:g}")

    return convert


def parse(arguments):
    """The command line as options; a mistake in it ends the program with one line and exit status 2."""
    fraction, count, seconds = number(float, 0, 1), number(int, 0, 10**9), number(float, 0.1, 1e5)
    form, path = argparse.RawDescriptionHelpFormatter, os.path.expanduser  # the shell leaves --out=~/x as it is
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.error = lambda message: sys.exit(refuse(message))
    add = parser.add_argument_group("what to do").add_argument
    add("--task", choices=sorted(METRICS), help="asr: transcripts with CTC; slu: intents")
    add("--budget", type=number(float, 1e-9, 1), help="fraction of the cost to keep; 1.0 prunes nothing")
    add("--predict", nargs="+", type=path, metavar=("MODEL", "FILE"), help="print what a model makes of recordings")
    add("--evaluate", type=path, metavar="MODEL", help="print a model's metrics on the dev and test splits of --data")
    add("--describe", type=path, metavar="CHECKPOINT", help="print the costs of a model, and what each layer kept")
    add("--export", nargs=2, type=path, metavar=("MODEL", "FILE.pt2"),
        help="write a model as a program that torch.export.load loads")  # fmt: skip
    add = parser.add_argument_group("how").add_argument
    add("--method", choices=sorted(METHODS), default="mac", help="what the budget is of (default %(default)s)")
    add("--ragged", action="store_true", help="keep any number of units, not the multiples that run fast")
    add("--data", type=path, default="demo",
        help="folder of manifests, Kaldi directories, LibriSpeech or SLURP (default: demo)")  # fmt: skip
    for split in ("train", *SPLITS):
        add(f"--{split}", metavar="NAMES", help=f"subsets that are the {split} split, joined by commas")
    add("--raw-text", action="store_true", help="leave transcripts as they are: phonemes, case, punctuation")
    add("--checkpoint", type=path,
        help="pretrained model: Hugging Face, fairseq, torchaudio, or a .pt of ours (default: none)")  # fmt: skip
    add("--out", type=path, help="folder of the run (default runs/TASK-DATA-METHOD-BUDGET-SEED)")
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
    add("--workers", type=count, metavar="N",
        help="batches that threads read ahead, one at least (default: 4 with a GPU, else 1)")  # fmt: skip
    add = parser.add_argument_group("recipe (where each number is from: RECIPES in sslprune.py)").add_argument
    types = {"updates": count, "lr": number(float, 1e-12, 1), "seconds": seconds, "perturbation": number(float, 0, 0.5)}
    types["accumulate"] = number(int, 1, 10**6)
    notes = {"accumulate": "batches per update and process; ", "batch_seconds": "of audio in a batch; "}
    notes["dense_updates"] = "0 with a checkpoint that is small or trained for the task; otherwise "
    for name, small in RECIPES["small"].items():
        defaults = f"default {RECIPES['base'][name]:g}, of a small model {small:g}"
        defaults += f" (slu {SMALL_SLU[name]:g})" if name in SMALL_SLU else ""
        help = notes.get(name, "") + defaults
        add(flag(name), type=types.get(name.rpartition("_")[2], fraction), metavar="N", help=help)
    options = parser.parse_args(arguments)
    check_combination(options, parser)
    return options


def flag(name):
    return "--" + name.replace("_", "-")


def command_of(options):
    """The name of the command that is asked for; None where it is a run."""
    return next((name for name in COMMANDS if getattr(options, name) is not None), None)


def check_combination(options, parser):
    """End the program where flags do not go together."""
    command = command_of(options)
    for name, value in vars(options).items():
        if value == "":
            parser.error(f"{flag(name)} has an empty value; leave it out, or give it one")
        if command and name not in COMMANDS[command][1] | {command} and value != parser.get_default(name):
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
    for split in SPLITS:
        if getattr(corpus, split):
            metrics, _ = evaluate(model, corpus, split, batch_seconds, options.workers)
            print(f"{options.data}: {in_words({split: metrics})}", flush=True)
    return 0


def load_to_use(path, options):
    """A model.pt on the device and in the precision that the options name."""
    model = read_checkpoint(path).model(raw_text=options.raw_text).to(usable_device(options.device))
    model.dtype = DTYPES[options.dtype]
    check_precision(model)
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
    if Path(out).suffix != ".pt2":
        onnx = "torch.onnx.export takes load(MODEL) as it is, see Deploying in README.md"
        raise UserError(f"{out}: is to be named .pt2, since it is a program of torch.export; for ONNX, {onnx}")
    model, buffer = load(path), io.BytesIO()
    torch.export.save(exported(model), buffer, extra_files={"labels.json": json.dumps(model.labels)})
    write(out, buffer.getbuffer())
    return 0


COMMANDS = {  # other than a run: the function, and the flags that it uses
    "predict": (predict, {"device", "dtype", "raw_text"}),
    "evaluate": (
        evaluate_model,
        {"device", "dtype", "task", "data", "train", *SPLITS, "raw_text", "skip_bad", "batch_seconds", "workers"},
    ),
    "describe": (describe, set()),
    "export": (export, set()),
}


# --- A run: its phases ---------------------------------------------------------------------------------------------


def train_and_prune(options):
    """All of a run, from the options to the report; returns the exit status."""
    device = usable_device(options.device)
    with processes(device):
        run = prepare(options, device)
        if run is not None:
            with writing(run), stoppable(run):
                go_through_phases(run)
                minutes, seconds = divmod(round(run.progress.seconds), 60)
                log.info("%s: model.pt, report.json, log.txt  (trained for %d:%02d)", run.out, minutes, seconds)
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
            log.info("before pruning: %s", in_words(progress.dense_metrics))
        run.enter("prune")

    if progress.phase == "prune":
        train(run)
        progress.head_is_trained = True
        if run.lagrangian:
            progress.expected, progress.expected_counts = run.expected(), run.expected_counts()
            warn_unless_converged(options, progress.expected)
            harden(model.encoder.gates, run.start_shape, options.method, options.budget, options.ragged)
            model.encoder = model.encoder.slice()
            check_precision(model)
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
    run.save()


def prepare(options, device):
    """The Run, at its beginning or where --resume finds it; None where it has ended.

    Everything that can be wrong comes to light here, before anything is trained or written.
    """
    corpus = (data.corpus_folder(options.data) or Path("demo")).resolve().name
    default = f"runs/{options.task}-{corpus}-{options.method}-{options.budget:g}-{options.seed}"
    out = Path(options.out or default)
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise UserError(f"{out}: a file stands where --out needs a folder; give another --out")
    state, checkpoint = read_state(out, options), None
    if options.checkpoint is not None and not state:
        checkpoint = read_checkpoint(options.checkpoint)
    shape = Shape.from_dict(state["progress"]["start_shape"]) if state else checkpoint.shape if checkpoint else SMALL
    trained = state["settings"]["dense_updates"] == 0 if state else checkpoint and checkpoint.task == options.task
    fill_recipe(options, shape, trained)
    if options.budget < 1:
        check_budget(shape, options.method, options.budget)
    if state:
        check_settings(options, state, out)
        if state["progress"]["phase"] == "done":
            log.info("%s: has run to its end; nothing is left to do", out)
            return None
    corpus = open_corpus(options, options.task, ("train", *SPLITS), options.raw_text)
    torch.manual_seed(options.seed)
    if state:
        run = Run.restored(options, out, corpus, device, state)
    else:
        model, trained = model_to_prune(options, checkpoint, corpus)
        run = Run(options, out, corpus, device, model, Progress(shape.as_dict(), head_is_trained=trained))
        torch.manual_seed(options.seed + rank())  # after the weights, which are to be the same in all processes
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


def fill_recipe(options, shape, trained):
    """Set what the command line left open, for a model of this shape. trained: whether its head is, for the task.

    A small pretrained model is pruned from the start also where its head is new: at equal updates, a dense phase first
    made understanding no better and recognition worse (README). Of base nobody knows.
    """
    recipe, small = dict(RECIPES["base"]), shape.width < BASE.width
    if small:
        recipe = RECIPES["small"] | (SMALL_SLU if options.task == "slu" else {})
    if trained or small and options.checkpoint is not None:
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
        return SpeechModel(encoder, options.task, labels, options.raw_text), False
    model = checkpoint.model(raw_text=options.raw_text)
    if model.raw_text != options.raw_text:
        raise UserError(f"{options.checkpoint}: was trained on transcripts as they are; give --raw-text")
    new = [label for label in labels if label not in model.outputs]
    if new:
        log.info("%s: its head had no output for %s; they are added", options.checkpoint, " ".join(new))
        model.add_labels(new)
    return model, True


def open_corpus(options, task, splits, raw_text):
    subsets = {split: getattr(options, split) for split in ("train", *SPLITS)}
    return data.open_corpus(options.data, task, options.seed, subsets, splits, options.skip_bad, raw_text)


def usable_device(name):
    """The torch.device of this name; of None, a GPU where there is one."""
    try:
        if name in (None, "cuda"):
            set_by = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "RANK")  # torchrun, srun, mpirun
            local_rank = next((int(os.environ[each]) for each in set_by if os.environ.get(each)), 0)
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
    groups = itertools.islice(stream(run), progress.update, updates)
    for batches in agreed(run, load_batches(groups, run.corpus, options.workers, run.device)):
        model.train()
        done = progress.update / updates  # of the phase
        optimizer.param_groups[0]["lr"] = getattr(options, f"{progress.phase}_lr") * tri_stage(done)
        optimizer.zero_grad(set_to_none=False)
        losses = []
        for utterances, waveforms, lengths in batches:
            loss = model.loss(waveforms.to(run.device), lengths, utterances)
            loss.backward()
            losses.append(loss.detach())
        if lagrangian and losses:
            penalty = lagrangian(encoder.gates, run.warmup)
            (len(losses) * penalty).backward()  # gradients are divided by the number of losses
        loss, stop, save = step(optimizer, mean_gradients(run, losses), progress)
        show(progress.update, lambda: f"  loss {loss:.3f}  {kept_in_words(run)}")  # noqa: B023
        save_or_stop(run, stop, save)
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


def stream(run):
    """The batches of each update of the phase that are this process's, without end.

    An epoch's batches follow from the seed, the phase and its number. An update takes the next few: one for each
    process, `accumulate` times. It depends on their number in all, and not on where each was computed.
    """
    options, model, phase = run.options, run.model, run.progress.phase
    size, ctc = ranks() * options.accumulate, model.task == "asr"
    for epoch in itertools.count():
        rng = np.random.default_rng([options.seed, *phase.encode(), epoch])
        # The shortest first: CTC leaves its plateau of blanks sooner (SortaGrad; Amodei et al. 2016, arXiv 1512.02595).
        shortest_first = phase == "dense" and epoch == 0 and ctc
        speeds, seconds = options.speed_perturbation, options.batch_seconds
        batches = data.training_batches(run.utterances, frames_of(model), ctc, speeds, seconds, rng, shortest_first)
        yield from (batches[i : i + size][rank() :: ranks()] for i in range(0, len(batches), size))


def load_batches(groups, corpus, workers, device):
    """Lists of (utterances, waveforms, lengths) for these lists of batches; what cannot be read is skipped.

    Threads read the next `workers` lists. Reading, decoding and FFTs let go of Python's lock, and a thread needs no
    shared memory to hand a batch over, and cannot be killed alone. It is a daemon: one that a dead file server holds
    does not keep the program from ending. Raises UserError where a list takes longer than PATIENCE or too much could
    not be read, and Stopped where a signal asks for it while it waits.
    """
    workers = max(1, (4 if device.type == "cuda" else 1) if workers is None else workers)
    groups, reading = iter(groups), deque()

    def read(group, future):
        try:
            future.set_result([data.load_batch(batch) for batch in group])
        except BaseException as error:
            future.set_exception(error)  # and so raised where the list is asked for

    def read_ahead():
        for group in itertools.islice(groups, workers - len(reading)):
            reading.append(concurrent.futures.Future())
            threading.Thread(target=read, args=(group, reading[-1]), daemon=True).start()

    try:
        read_ahead()
        while reading:
            loaded = wait_for(reading.popleft())
            read_ahead()
            for reason in itertools.chain(*(bad for *_, bad in loaded)):
                corpus.skip(reason)
            corpus.check()
            yield [batch for *batch, _ in loaded if batch[0]]
    finally:
        concurrent.futures.wait(reading, timeout=5)  # Python is not to end while a thread is in a library


def wait_for(future):
    """The result of a future that a thread is to set. Raises as `load_batches`."""
    for _ in range(PATIENCE):
        try:
            return future.result(timeout=1)
        except concurrent.futures.TimeoutError:
            if stopping:
                raise Stopped(stopping[0]) from None
    raise UserError(f"audio could not be read in {PATIENCE} s; see to the corpus's files, and go on with --resume")


def agreed(run, loaded):
    """What is loaded for each update, once all processes have theirs. Where that fails in one, all save and stop.

    They do so before any has begun with the update, so that resuming ends in the same bits.
    """
    while True:
        batches = failure = None
        try:
            batches = next(loaded, None)
        except (UserError, Stopped) as error:
            failure = error
        failed = failure is not None
        if ranks() > 1:
            failed = torch.tensor(float(failed), device=run.device)
            add_up([failed])
        if failed:
            run.save()
            raise next(filter(None, gather(failure)))
        if batches is None:
            return
        yield batches


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

    Returns sums over the processes, (4,) float64: of losses, their number, and whether to stop and to save.
    """
    gradients = [p.grad for group in run.optimizer.param_groups for p in group["params"]]
    due = not rank() and time.monotonic() - run.saved > run.options.save_seconds
    sums = torch.tensor([0, len(losses), len(stopping), due], dtype=torch.float64, device=run.device)
    sums[0] += sum(losses)
    add_up([sums, *gradients])
    for gradient in gradients:
        gradient /= sums[1]
    return sums


def step(optimizer, sums, progress):
    """Make the update that the gradients ask for, or leave it out where they are not finite. sums: mean_gradients'.

    Returns the mean loss, NaN where no process had a batch, and whether to stop and to save.
    """
    weights, *others = (group["params"] for group in optimizer.param_groups)
    others = [p.grad for p in itertools.chain(*others)]
    norms = nn.utils.clip_grad_norm_(weights, CLIP), nn.utils.get_total_norm(others).to(sums.device)
    # All numbers leave the device at once, since a transfer waits for all that was asked of it.
    loss, count, stop, save, *norms = torch.cat([sums, torch.stack(norms).double()]).tolist()
    loss = loss / count if count else math.nan
    progress.update += 1
    if math.isfinite(loss) and all(map(math.isfinite, norms)):
        optimizer.step()
        progress.left_out_in_a_row = 0
        progress.losses.append(loss)
        return loss, stop, save
    progress.left_out += 1
    progress.left_out_in_a_row += 1
    log.warning("update %d left out: loss %g, norms of gradients %g and %g", progress.update, loss, *norms)
    if progress.left_out_in_a_row == IN_A_ROW:
        raise UserError(
            f"{IN_A_ROW} updates in a row had no finite loss or gradient (loss {loss:g}, gradient {norms[0]:g});"
            f" start anew with a smaller --{progress.phase}-lr or --gate-lr, or with --dtype float32"
        )
    return loss, stop, save


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
        found[split], rows = evaluate(run.model, run.corpus, split, run.options.batch_seconds, run.options.workers)
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
            dev, _ = evaluate(
                run.model, run.corpus, "dev", run.options.batch_seconds, run.options.workers, characters=False
            )
        except (UserError, Stopped):
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
    log.info("%s  %s  %s", run.place, in_words({"dev": dev}), kept_in_words(run))
    if not rank():
        write(run.out / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in progress.history).encode())


def evaluate(model, corpus, split, batch_seconds, workers=None, characters=True):
    """Metrics of a model on one of SPLITS, as fractions, {name: value}, and (name, reference, hypothesis) of each.

    characters: whether their errors are counted, too, which takes as long as recognising.
    """
    model.eval()
    device, asr = next(model.parameters()).device, model.task == "asr"
    utterances = data.usable(getattr(corpus, split), corpus, frames_of(model), ctc=False)
    batches = data.batches(utterances, batch_seconds)
    mine = range(rank(), len(batches), ranks())  # each process has its part of the batches, however many there are
    show = countdown(f"evaluate {split}", len(mine))
    found, failure = [], None  # (number of the batch, names, references, hypotheses)
    loaded = load_batches(([batches[i]] for i in mine), corpus, workers, device)
    try:
        with precision(model.dtype, device):  # around all batches, so that weights are cast once
            for done, (i, part) in enumerate(zip(mine, loaded), 1):
                if stopping:
                    raise Stopped(stopping[0])
                for batch, waveforms, lengths in part:
                    references = [u.text if asr else u.intent for u in batch]
                    hypotheses = model.transcribe(waveforms, lengths)
                    if asr:  # compared is what has passed through the same function
                        hypotheses = [data.transcript(text, model.raw_text) for text in hypotheses]
                    found.append((i, [u.name for u in batch], references, hypotheses))
                show(done)
    except (UserError, Stopped) as error:
        failure = error  # of all processes, which would wait for this one
    parts = gather((failure, found))
    if failures := [failure for failure, _ in parts if failure]:
        raise failures[0]
    share_skipped(corpus)
    corpus.check()
    found = sorted(itertools.chain(*(part for _, part in parts)))
    names, references, hypotheses = ([value for batch in found for value in batch[which]] for which in (1, 2, 3))
    if not references:
        raise UserError(f"no utterance of the {split} split could be read")
    metrics = data.error_rates(references, hypotheses, characters) if asr else data.accuracies(references, hypotheses)
    return metrics, list(zip(names, references, hypotheses))


def forward_seconds(models, device, dtype, repeats=12):
    """Seconds of each encoder's forward on 10 s of audio: the fewest, as what else runs can only add to them."""
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
        lines.append(f"{name:<28}{before}{after}{pruned[key] / dense[key]:>10.{0 if key == 'seconds' else 2}%}")
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
    last = max(1, *ends.values())
    highest = max([1e-9, *(entry["dev"] for entry in history)])
    name = f"{metric.replace('_', ' ')}, to {highest:.3g}"
    lines = {name: (30, "#c33", lambda entry: entry["dev"] / highest)}
    for i, _ in enumerate(history[0]["expected"] if history else []):
        lines[f"expected cost {i + 1}"] = (230, "#36c", lambda entry, i=i: entry["expected"][i])
    lines["target"] = (230, "#999", lambda entry: entry["target"])
    shapes = [f'<rect x="50" y="{top}" width="600" height="160" fill="none" stroke="#ccc"/>' for top in (30, 230)]
    shapes += [f'<path d="M{50 + 600 * x / last:.1f} 30v360" stroke="#ccc"/>' for x in ends.values()]
    for number, (name, (top, colour, value)) in enumerate(lines.items()):
        for phase, end in ends.items():  # a line for each, and a dot for what was measured: between them nothing was
            entries = [entry for entry in history if entry["phase"] == phase]
            xs = [50 + 600 * (end - updates[phase] + entry["update"]) / last for entry in entries]
            points = [f"{x:.1f},{top + 160 * (1 - value(entry)):.1f}" for x, entry in zip(xs, entries)]
            shapes.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}"/>')
            shapes += [f'<path d="M{point}h0" stroke="{colour}" stroke-width="4"/>' for point in points]
        shapes.append(f'<text x="660" y="{top + 12 + 14 * number}" fill="{colour}">{name}</text>')
    for phase in (phase for phase in ends if updates[phase]):
        where = f'x="{45 + 600 * ends[phase] / last:.1f}" y="405" text-anchor="end"'
        shapes.append(f"<text {where}>{phase} {ends[phase]}</text>")
    style = 'font-family="sans-serif" font-size="12" stroke-linecap="round"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="420" {style}>'
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
NO_EFFECT_ON_RESULTS = {*COMMANDS, "resume", "out", "data", "device", "workers", "save_seconds", "skip_bad"}


@dataclasses.dataclass
class Progress:
    """Where a run is, and what it has found so far: plain values, which the training checkpoint holds as they are."""

    start_shape: dict  # of the model that the budget is of
    head_is_trained: bool  # so that there is something to evaluate
    phase: str = "dense"  # one of PHASES, or "done"
    update: int = 0  # how many the phase has made
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
        check_precision(model)
        self.start_shape = Shape.from_dict(progress.start_shape)
        self.lagrangian = self.optimizer = self.clock = self.saved = None
        self.utterances = usable_for_training(self)  # which raises UserError where there is none

    @property
    def updates(self):
        """How many the phase has in all."""
        return getattr(self.options, f"{self.progress.phase}_updates")

    @property
    def place(self):
        """Where it is, in words."""
        return self.progress.phase + (f" {self.progress.update}/{self.updates}" if self.updates else "")

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
        self.progress.phase, self.progress.update, self.progress.left_out_in_a_row = phase, 0, 0
        self.optimizer = self.lagrangian = self.clock = None
        if phase == "prune" and self.options.budget < 1:
            self.model.encoder.add_gates(KINDS[self.options.method])
            self.add_lagrangian()

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
                "corpus": self.corpus.fingerprint,
            }
        written = torch_bytes(contents)
        write(self.out / STATE, hashlib.sha256(written).digest(), written)

    @classmethod
    def restored(cls, options, out, corpus, device, state):
        """The Run that a training checkpoint holds."""
        if state["corpus"] != corpus.fingerprint:
            raise UserError(f"{options.data}: is not the corpus that {out} began with, or it has changed")
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
        run.saved = time.monotonic()
        cpu, cuda = state["random"][rank()]
        torch.set_rng_state(cpu)
        if cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(cuda)
        log.info("%s: goes on at %s", out, run.place)
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
        if set(found) - {"log.txt", "lock", STATE + ".partial"}:
            raise UserError(f"{out}: holds no {STATE} to --resume from; give the --out of a run, or another")
        log.info("%s: there is nothing to resume; the run begins", out)
        return None
    contents = memoryview(path.read_bytes())
    if hashlib.sha256(contents[32:]).digest() != contents[:32]:
        dense = "with the dense.pt of this one as --checkpoint if it is there"
        raise UserError(f"{path}: is damaged; start anew in another --out, {dense}")
    return torch.load(io.BytesIO(contents[32:]), map_location="cpu", weights_only=True)


def settings(options):
    """What a run's result depends on: its flags, after the recipe has filled them in, and the number of processes.

    The corpus itself is compared, and not its path; of the checkpoint, which is read once, the name alone.
    """
    flags = {name: value for name, value in vars(options).items() if name not in NO_EFFECT_ON_RESULTS}
    flags["checkpoint"] = options.checkpoint and Path(options.checkpoint).resolve().name
    return flags | {"processes": ranks()}


def check_settings(options, state, out):
    """Refuse to go on with a run with other flags than its own."""
    for name, now in settings(options).items():
        then = state["settings"].get(name)
        if now != then:
            what = "torchrun's --nproc-per-node" if name == "processes" else flag(name)
            given = [f"without {what}" if v is None or v is False else f"with {what} {v}" for v in (then, now)]
            then, now = (text.removesuffix(" True") for text in given)
            raise UserError(f"{out}: was started {then}, and cannot go on {now}; give its own flags, or another --out")


@contextlib.contextmanager
def writing(run):
    """A context in which this run alone writes to its folder, which holds a state, and what is logged goes there, too.

    The lock is a database's: every system has it, and no death of a process leaves it behind.
    """
    with contextlib.ExitStack() as at_end:
        if not rank():
            run.out.mkdir(parents=True, exist_ok=True)
            try:
                lock = sqlite3.connect(run.out / "lock", timeout=0, isolation_level=None)
                lock.execute("PRAGMA journal_mode=MEMORY")  # no file beside the lock
                lock.execute("BEGIN EXCLUSIVE")
                at_end.callback((run.out / "lock").unlink, missing_ok=True)
                at_end.callback(lock.close)  # before, or Windows keeps the file
            except sqlite3.Error as error:
                if "locked" in str(error):
                    raise UserError(f"{run.out}: another run is writing to it; give another --out, or wait") from error
                log.warning("%s: cannot be locked (%s); see to it that no other run writes to it", run.out, error)
            if run.saved is None and (run.out / STATE).exists():
                raise UserError(f"{run.out}: another run has just begun in it; give another --out")
        if run.saved is None:
            run.save()
        if not rank():
            handler = logging.FileHandler(run.out / "log.txt", encoding="utf-8", errors="backslashreplace")
            log.addHandler(handler)
            at_end.callback(handler.close)
            at_end.callback(log.removeHandler, handler)
        yield


# --- Signals -------------------------------------------------------------------------------------------------------

stopping = []  # the signals that asked this process to stop


class Stopped(Exception):
    """The signal of this number asked the run to stop, and it has saved itself. place: where it was."""

    place = "the start"

    def __str__(self):
        name = signal.Signals(self.args[0]).name
        return f"{name} stopped the run at {self.place}; the same command with --resume goes on"


def ask_to_stop(number, frame):
    """Signal handler: stop at the next opportunity; at a second Ctrl-C, at once."""
    if stopping and number == signal.SIGINT:
        raise KeyboardInterrupt
    stopping.append(number)


def save_or_stop(run, stop, save):
    """After an update: do what any of the processes was asked to."""
    if stop or save:
        run.save()
    if stop:
        raise Stopped((stopping or [signal.SIGTERM])[0])


@contextlib.contextmanager
def stoppable(run):
    """A context in which SIGTERM and Ctrl-C let the run save itself first."""
    stopping.clear()
    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Stopped as stopped:
        stopped.place = run.place
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- Many processes: torchrun, or whatever sets RANK and WORLD_SIZE, starts one for each GPU -----------------------


@contextlib.contextmanager
def processes(device):
    """A context in which this process is one of those that a launcher started, if one did.

    Optimizers import torch.distributed.nn.functional, whose functions keep the group of that time as a default value.
    Its threads then outlive destroy_process_group, and abort the process as Python ends; so it is imported before.
    """
    if os.environ.get("RANK") and os.environ.get("WORLD_SIZE", "1") != "1":
        log.info("waiting for the %s processes that WORLD_SIZE names", os.environ["WORLD_SIZE"])
        try:
            patience = datetime.timedelta(seconds=3 * PATIENCE)  # longer than one process may wait for its audio
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        except (ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"RANK and WORLD_SIZE are set, and the processes cannot find each other ({why})") from error
        if rank():
            log.setLevel(logging.ERROR)
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if not dist.is_initialized() and os.environ.get(name, "1") not in ("", "0", "1"):
            raise UserError(
                f"{name} is {os.environ[name]}, and without RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT each task"
                " would train everything; start them by torchrun, set these for each task, or ask for one task"
            )
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
