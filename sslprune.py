"""Structured pruning of wav2vec2 for one task, under a budget of MACs or parameters.

    python sslprune.py --task asr --budget 0.5                        # the demo corpus, a small model trained from scratch
    python sslprune.py --task asr --budget 0.5 --checkpoint wav2vec2-base --data LibriSpeech
    python sslprune.py --task slu --budget 0.5 --checkpoint wav2vec2-base --data slurp --method size
    python sslprune.py --predict runs/asr-mac-0.5/model.pt recording.wav ...
    python sslprune.py --evaluate runs/asr-mac-0.5/model.pt --data LibriSpeech
    torchrun --nproc-per-node 4 sslprune.py --task asr --budget 0.5 ...      # on four GPUs

A run has up to three phases. Without a checkpoint it first trains a dense model, since the method prunes a trained one. Then
weights, gates and multipliers train together under the budget (gates.py); the gates are hardened to the budget and the
model is sliced. Then the small model trains on. --budget 1.0 trains as long, and prunes nothing: the reference. A run that
was stopped or killed goes on where it was when the same command is given with --resume.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import logging
import logging.handlers
import math
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read by torch's OpenMP: on a busy machine, threads that spin for long stall each other
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import gates
from data import DataError
from flops import BASE, SAMPLE_RATE, SECONDS, SMALL, Shape, cost
from gates import METHODS, SAMPLES, BudgetError, Lagrangian
from transformer import CheckpointError, Wav2Vec2, build, find_checkpoint, load_pretrained, read_checkpoint, unpack

log = logging.getLogger("sslprune")

# How long and how fast to train; each number can be set by the flag of its name.
RECIPES = {
    # wav2vec2-base. The learning rates and the warm-up are DPHuBERT's (Peng et al., Interspeech 2023); masks and LayerDrop are
    # fairseq's recipe for 100 hours; the updates are ours: with 100 s of audio each, pruning and fine-tuning are about 17 passes
    # over those 100 hours. The dense phase falls away with a checkpoint. DPHuBERT's gates had momentum and a rate that falls; ours have
    # neither (see make_optimizer), which has been tried in phases of some hundred updates only.
    "base": dict(dense_updates=100_000, prune_updates=40_000, finetune_updates=20_000, batch_seconds=100.0,
                 dense_lr=2e-4, prune_lr=2e-4, finetune_lr=1e-4, gate_lr=2e-2, warmup_share=0.1, layer_drop=0.1, mask_probability=0.65,
                 speed_perturbation=0.0, filter_decibels=0.0),
    # The small model from scratch, chosen on the dev sets of demo and digits: as long as a few minutes allow, and gates that are fast
    # and a target that is slow enough for a phase of some hundred updates. Too short for masks and the like, which need more.
    "small": dict(dense_updates=560, prune_updates=300, finetune_updates=180, batch_seconds=10.0,
                  dense_lr=1e-3, prune_lr=1e-3, finetune_lr=1e-3, gate_lr=0.2, warmup_share=0.5, layer_drop=0.0, mask_probability=0.0,
                  speed_perturbation=0.0, filter_decibels=0.0),
}  # fmt: skip
SMALL_SLU = dict(dense_lr=5e-4, prune_lr=5e-4, finetune_lr=5e-4)  # at 1e-3 the demo's intents are not learnt (24 % right on dev, not 93 %)
BETAS, GATE_BETAS = (0.9, 0.98), (0.0, 0.9)  # of Adam: fairseq's for the weights; for gates and multipliers see make_optimizer
WARMUP, DECAY, LAST = 0.1, 0.5, 0.05  # tri-stage learning rate of the weights: shares of the phase, and the last rate over the peak (fairseq)
CLIP = 1.0  # norm of the weights' gradient, against the odd wild batch
IN_A_ROW = 20  # updates without a finite gradient; after so many nothing will mend itself
CONVERGED = 0.02  # of the dense cost: hardening from so near the budget shuts few units that training had left open


class RunError(ValueError):
    """A run that cannot begin, or cannot go on. The message says what to do."""


class Stopped(Exception):
    """A signal asked the run to stop. It has saved itself."""


class SpeechModel(nn.Module):
    """The encoder and one linear layer: over frames, trained with CTC (asr), or over their mean (slu).

    labels: the names of the outputs; data.VOCABULARY for asr, the intents for slu.
    """

    def __init__(self, encoder, task, labels):
        super().__init__()
        self.encoder, self.task, self.labels = encoder, task, list(labels)
        self.head = nn.Linear(encoder.full_shape.width, len(labels))
        self.dtype = torch.float32  # of the computation; weights, gates and losses are float32 in any case

    def forward(self, waveforms, lengths=None):
        """waveforms and lengths as for the encoder -> scores (batch, frames, labels) and frames (batch,); slu: (batch, labels)."""
        with precision(self.dtype, waveforms.device):
            features, frames = self.encoder(waveforms, lengths)
            if self.task == "slu":
                features = features.sum(1) / frames[:, None]  # features are 0 beyond the valid frames
            return self.head(features), frames

    def loss(self, waveforms, lengths, utterances):
        """Mean over the batch of the CTC loss per character (asr) or of the cross entropy (slu)."""
        scores, frames = self(waveforms, lengths)
        if self.task == "slu":
            targets = torch.tensor([self.labels.index(u.intent) for u in utterances], device=scores.device)
            return F.cross_entropy(scores.float(), targets)
        targets = [data.encode(u.text) for u in utterances]
        log_probabilities = scores.float().log_softmax(2).transpose(0, 1)
        target_lengths = torch.tensor([len(target) for target in targets])
        return F.ctc_loss(log_probabilities, torch.cat(targets).to(scores.device), frames, target_lengths, zero_infinity=True)

    @torch.no_grad()
    def transcribe(self, waveforms, lengths=None):
        """Normalised waveforms (batch, samples) -> a list of transcripts (asr) or of intents (slu)."""
        device = self.head.weight.device
        scores, frames = self(waveforms.to(device), lengths)
        best = scores.argmax(-1).cpu()
        if self.task == "slu":
            return [self.labels[i] for i in best.tolist()]
        return [data.decode(units[:n]) for units, n in zip(best, frames.tolist())]

    def predict(self, paths):
        """Audio files -> a list of transcripts (asr) or of intents (slu). Raises DataError for a file that is not readable audio."""
        return [self._predict(path) for path in paths]

    def _predict(self, path):
        samples = data.waveform(data.Utterance(str(path), (path,), 0.0))
        if len(samples) < self.encoder.full_shape.receptive_field:
            raise DataError(f"{path}: {len(samples)} samples are too short to recognise anything in")
        return self.transcribe(torch.from_numpy(samples)[None])[0]

    def save(self, path):
        """Write a model.pt: shape, weights, task and labels. Replaces the file in one step."""
        buffer = io.BytesIO()  # so that a full disk is an OSError of ours, and not a RuntimeError from within torch.save
        torch.save(self.contents(), buffer)
        write(path, buffer.getbuffer())

    def contents(self):
        """What a model.pt holds."""
        return {"format": "sslprune", "shape": self.encoder.full_shape.as_dict(), "task": self.task, "labels": self.labels,
                "weights": {key: tensor.detach().cpu() for key, tensor in self.state_dict().items()}}  # fmt: skip


def precision(dtype, device):
    """A context in which convolutions and products compute in `dtype` (bfloat16), or as they are (float32)."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def load(path):
    """The SpeechModel in a model.pt of ours, in evaluation mode. Raises CheckpointError where the file holds none."""
    path, _ = find_checkpoint(path)
    contents = read_checkpoint(path)
    if contents.get("format") != "sslprune":
        raise CheckpointError(f"{path}: is no model.pt that sslprune wrote; --predict and --evaluate take no other")
    task, labels = contents.get("task"), contents.get("labels")
    named = isinstance(labels, list) and labels and all(isinstance(label, str) and label.isprintable() for label in labels)
    if not (task == "slu" and named or task == "asr" and labels == data.VOCABULARY):
        raise CheckpointError(f"{path}: its task or labels are none that sslprune writes")
    shape, weights = unpack(contents, path)
    return build(lambda shape: SpeechModel(Wav2Vec2(shape), task, labels), shape, weights, path)


def write(path, *parts):
    """Write bytes to a file in one step: whole, or not at all. What was there before survives whatever happens meanwhile."""
    path = Path(path)
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
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error


# --- Many processes: torchrun starts one for each GPU -------------------------------------------------------------------


def rank():
    """The number of this process; 0 is the one that writes and says things."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def together():
    """A context for what all processes do at once. Where another one is gone, that is a RunError, and no hang."""
    try:
        yield
    except RuntimeError as error:
        raise RunError("another process of this run has ended, and says why; the same command with --resume goes on") from error


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


def join(device):
    """Join the other processes where torchrun started this one."""
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank():
            log.setLevel(logging.ERROR)


# --- Evaluation --------------------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPLITS = ("dev", "test", "unseen")  # that are evaluated, where a corpus has them
TASKS = {"asr": "word_error_rate", "slu": "intent_accuracy"}  # and the name of its metric


def usable(utterances, corpus, model, training=False):
    """The utterances that make a frame and, for training with CTC, enough of them for their transcript; the others are skipped."""
    kept = []
    for u in utterances:
        frames, needed = frames_of(u, model, training)
        if frames >= needed:
            kept.append(u)
        else:
            corpus.skip(f"{u.name}: {u.seconds:.3f} s of audio make {max(frames, 0)} frames; {needed} are needed")
    return kept


def frames_of(utterance, model, training):
    """How many frames an utterance makes, and how many are needed."""
    frames = model.encoder.full_shape.frames(round(utterance.seconds * SAMPLE_RATE))[-1]
    return frames, data.frames_needed(utterance.text) if training and model.task == "asr" else 1


def evaluate(model, corpus, split, batch_seconds):
    """Metrics of a model on one of SPLITS, as fractions: {name: value}, the task's own metric first."""
    model.eval()
    batches = data.batches(usable(getattr(corpus, split), corpus, model), batch_seconds)
    share = range(rank(), len(batches), ranks())  # each process has its share of the same batches, however many there are
    show = progress_of(f"evaluate {split}", len(share), last=False)
    found = []  # (number of the batch, references, hypotheses)
    for step, (batch, waveforms, lengths, bad) in enumerate(load_batches(model, [batches[i] for i in share]), 1):
        leave_if_asked()
        for reason in bad:
            corpus.skip(reason)
        if batch:
            said = [u.text if model.task == "asr" else u.intent for u in batch]
            found.append((share[step - 1], said, model.transcribe(waveforms, lengths)))
        show(step)
    share_skipped(corpus)
    corpus.check()
    found = sorted(itertools.chain(*gather(found)))
    references, hypotheses = ([label for batch in found for label in batch[which]] for which in (1, 2))
    if not references:
        raise DataError(f"no utterance of the {split} split could be read")
    if model.task == "asr":
        return {
            "word_error_rate": data.error_rate(references, hypotheses),
            "character_error_rate": data.error_rate(references, hypotheses, split=list),
        }
    right = {"intent_accuracy": [h == r for h, r in zip(hypotheses, references)]}
    if all("_" in r for r in references):  # SLURP's two halves of an intent, scenario_action
        for half, name in ((0, "scenario_accuracy"), (-1, "action_accuracy")):
            right[name] = [h.split("_", 1)[half] == r.split("_", 1)[half] for h, r in zip(hypotheses, references)]
    return {name: sum(values) / len(values) for name, values in right.items()}


def forward_seconds(models, device, dtype, repeats=5):
    """Median seconds of each encoder's forward on 10 s of audio, measured in turn so that a noisy machine is equally so to all."""
    waveform = torch.randn(1, SAMPLES, generator=torch.Generator().manual_seed(0)).to(device)
    seconds = [[] for _ in models]
    with torch.no_grad(), precision(dtype, device):
        for repeat in range(repeats + 1):
            for model, taken in zip(models, seconds):
                start = time.perf_counter()
                model.eval()(waveform)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first is to warm up
                    taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


# --- Training ----------------------------------------------------------------------------------------------------------

PHASES = {
    "dense": "train a dense model, since there is no trained one to prune",
    "prune": "train weights, gates and multipliers together",
    "finetune": "train the sliced model on",
}


def load_batches(model, batches, workers=None):
    """An iterator over what data.Loader makes of these batches, in `workers` processes; 0: in this one. None: 4 beside a GPU, else 0."""
    if workers is None:
        workers = 4 if model.head.weight.is_cuda else 0
    own = torch.Generator()  # or an iterator would draw from the global one, and a resumed epoch needs one iterator more
    return torch.utils.data.DataLoader(data.Loader(batches), batch_size=None, num_workers=workers, generator=own)


def tri_stage(progress):
    """Learning rate over its peak at `progress` in [0, 1): up linearly, hold, down exponentially (fairseq's tri-stage)."""
    if progress < WARMUP:
        return (progress + 1e-3) / (WARMUP + 1e-3)
    if progress < 1 - DECAY:
        return 1.0
    return LAST ** ((progress - (1 - DECAY)) / DECAY)


def train(run):
    """Train to the end of the phase that the run is in, from where it is."""
    options, model, corpus, at, lagrangian = run.options, run.model, run.corpus, run.at, run.lagrangian
    encoder, device, phase = model.encoder, model.head.weight.device, at["phase"]
    updates = getattr(options, f"{phase}_updates")
    if run.optimizer is None:
        run.optimizer = make_optimizer(run)
    weights, *others = (group["params"] for group in run.optimizer.param_groups)
    others = list(itertools.chain(*others))
    encoder.layer_drop, encoder.projection.mask_probability = options.layer_drop, options.mask_probability
    model.train()
    run.clock = saved = time.monotonic()
    show, losses = progress_of(phase, updates, at["update"]), []

    def details():
        text = f"  loss {statistics.fmean(losses):.3f}"
        losses.clear()
        if lagrangian:
            text += "  expected to keep " + ", ".join(f"{kept:.3f}" for kept in (1 - lagrangian.sparsity(encoder.gates)).tolist())
        return text

    while at["update"] < updates:
        # An epoch's batches follow from the seed, the phase and its number, and an update takes the next few: one for each
        # process, `accumulate` times. It depends on their number in all, and not on where each was computed.
        rng = np.random.default_rng([options.seed, *phase.encode(), at["epoch"]])
        utterances = corpus.train(int(rng.integers(2**31)))
        short_enough = [u for u in utterances if u.seconds <= options.max_seconds]
        at["too_long"] = len(utterances) - len(short_enough)
        utterances = usable(short_enough, corpus, model, training=True)
        if options.speed_perturbation:
            utterances = perturb_speed(utterances, options, model, rng)
        if options.filter_decibels:
            utterances = data.filter_randomly(utterances, options.filter_decibels, rng)
        batches = data.batches(utterances, options.batch_seconds, rng)
        if phase == "dense" and at["epoch"] == 0 and model.task == "asr":
            # The shortest first: CTC leaves its plateau of blanks sooner (SortaGrad; Amodei et al. 2016, arXiv 1512.02595).
            batches = data.batches(utterances, options.batch_seconds)[::-1]
        size = ranks() * options.accumulate
        first, before = at["group"], at["update"]
        groups = [batches[i : i + size] for i in range(0, len(batches), size)][first:]
        loaded = iter(load_batches(model, [batch for group in groups for batch in group[rank() :: ranks()]], options.workers))
        for group in groups:
            run.optimizer.param_groups[0]["lr"] = getattr(options, f"{phase}_lr") * tri_stage(at["update"] / updates)  # of the weights
            run.optimizer.zero_grad(set_to_none=False)
            sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, batches, wish to stop, wish to save
            for _ in group[rank() :: ranks()]:
                batch, waveforms, lengths, bad = next(loaded)
                for reason in bad:
                    corpus.skip(reason)
                if batch:
                    objective = loss = model.loss(waveforms.to(device), lengths, batch)
                    if lagrangian:
                        objective = loss + lagrangian(encoder.gates, min(1, at["update"] / max(1, options.warmup_share * updates)))
                    objective.backward()
                    sums[:2] += torch.stack((loss.detach(), torch.ones_like(loss)))
            sums[2], sums[3] = len(stopping), rank() == 0 and time.monotonic() - saved > options.save_seconds
            add_up([sums, *(p.grad for p in weights + others)])
            loss, count, stop, save = sums.tolist()
            at["group"] += 1
            if count:
                losses.append(loss / count)
                update(run.optimizer, weights, others, losses[-1], count, at)
                show(at["update"], details)
            if stop or save:
                run.save()
                saved = time.monotonic()
            if stop:
                raise Stopped(f"{phase} {at['update']}/{updates}")
            if at["update"] == updates:
                break
        share_skipped(corpus)
        corpus.check()
        if at["update"] == before and first == 0:
            raise DataError("no utterance of the training split could be read, or none is short enough for --max-seconds")
        at["epoch"], at["group"] = at["epoch"] + 1, 0
    run.save()


def perturb_speed(utterances, options, model, rng):
    """The utterances at random speeds; one that this makes too long, or too short for its transcript, keeps its own."""

    def fits(utterance):
        frames, needed = frames_of(utterance, model, training=True)
        return frames >= needed and utterance.seconds <= options.max_seconds

    perturbed = data.perturb_speed(utterances, options.speed_perturbation, rng)
    return [new if fits(new) else old for new, old in zip(perturbed, utterances)]


def make_optimizer(run):
    """Adam over the weights and, where the run has a Lagrangian, over its gates and its multipliers; the latter ascend.

    The rate of gates and multipliers is constant. Were it to fall with the weights', multipliers that grew while the target was out of
    reach could not come down again before the phase ends, and gates would be shut beyond the budget, and selected early. Nor have they
    momentum (the first of GATE_BETAS): they answer each other, and its lag makes the expected cost swing about the budget (Gidel et al.
    2019, arXiv 1807.04740). The second is small since their gradients vanish as the budget is met: a long memory of large ones is a lag too.
    """
    options, model, lagrangian = run.options, run.model, run.lagrangian
    weights = [p for name, p in model.named_parameters() if not name.endswith("log_alpha")]
    groups = [{"params": weights, "betas": BETAS}]
    if lagrangian:
        theirs = {"lr": options.gate_lr, "betas": GATE_BETAS}
        log_alphas = [gate.log_alpha for gate in model.encoder.gates.values()]
        groups += [{"params": log_alphas, **theirs}, {"params": [lagrangian.multipliers], "maximize": True, **theirs}]
    for group in groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)  # LayerDrop leaves some without, and the processes are to agree
    return torch.optim.Adam(groups)


def update(optimizer, weights, others, loss, count, at):
    """Make the update that the sums of `count` batches' gradients ask for, or leave it out where they are not finite."""
    if count > 1:
        for p in weights + others:
            p.grad /= count
    norms = nn.utils.clip_grad_norm_(weights, CLIP).item(), nn.utils.get_total_norm([p.grad for p in others]).item()
    at["update"] += 1
    if math.isfinite(loss) and all(map(math.isfinite, norms)):
        optimizer.step()
        at["not_finite_in_a_row"] = 0
        return
    at["not_finite"] += 1
    at["not_finite_in_a_row"] += 1
    log.warning("update %d left out: its loss is %g, the norm of its gradients %g and %g", at["update"], loss, *norms)
    if at["not_finite_in_a_row"] == IN_A_ROW:
        raise RunError(
            f"{IN_A_ROW} updates in a row had no finite loss or gradient (loss {loss:g}, gradient {norms[0]:g});"
            f" start anew with a smaller --{at['phase']}-lr or --gate-lr, or with --dtype float32"
        )


def progress_of(what, total, first=0, last=True):
    """A function to call after each of `total` steps, `first` of them made before; it logs where they are and how long is left.

    It takes the step and a function that makes the details, and logs ever less often. last: whether to log the last step in any case.
    """
    start = shown = time.monotonic()

    def show(step, details=lambda: ""):
        nonlocal shown
        now = time.monotonic()
        if now - shown >= max(10, (now - start) / 50) or (step == total and last):
            left = round((now - start) / (step - first) * (total - step))
            log.info("%s %d/%d%s  %d:%02d left", what, step, total, details(), left // 60, left % 60)
            shown = now

    return show


# --- A run, and how it goes on after a death ----------------------------------------------------------------------------

STATE = "training.state"  # the training checkpoint in the folder of a run
HEADERS = "headers.json"  # of the corpus's files, so that they are read once
NOT_OF_THE_RUN = ("resume", "out", "device", "workers", "save_seconds", "predict", "evaluate")  # flags that change no result


class Run:
    """A run: its model, and all else that the rest of it depends on.

    at: where it is, and what it has found so far, in plain values. `save` writes everything, `restore` brings it back; together
    they are what makes a resumed run end, on the CPU, in the same bits.
    """

    def __init__(self, options, out, model, corpus, trained):
        self.options, self.out, self.model, self.corpus = options, out, model, corpus
        self.lagrangian = self.optimizer = self.clock = None
        # group: of the batches of the epoch's next update. seconds: of training. trained: whether there is a head to evaluate.
        self.at = {"phase": "dense", "update": 0, "epoch": 0, "group": 0, "seconds": 0.0, "trained": trained, "dense_metrics": None,
                   "expected": None, "too_long": 0, "not_finite": 0, "not_finite_in_a_row": 0, "dense_shape": model.encoder.shape.as_dict()}  # fmt: skip

    def enter(self, phase, **found):
        """Begin the next phase, with what the last one found."""
        self.at |= {"phase": phase, "update": 0, "epoch": 0, "group": 0, "not_finite_in_a_row": 0, **found}
        self.optimizer = self.clock = None
        if phase == "prune" and self.options.budget < 1:
            self.model.encoder.add_gates(gates.KINDS[self.options.method])
            self.add_lagrangian()
        self.save()

    def add_lagrangian(self):
        shape, device = self.model.encoder.full_shape, self.model.head.weight.device
        self.lagrangian = Lagrangian(shape, self.options.method, self.options.budget).to(device)

    def save(self):
        """Write the training checkpoint: a SHA-256, and what torch.save makes of everything. All processes come here together."""
        if self.clock is not None:
            now = time.monotonic()
            self.at["seconds"], self.clock = self.at["seconds"] + now - self.clock, now
        share_skipped(self.corpus)
        random = gather((torch.get_rng_state(), torch.cuda.get_rng_state() if self.model.head.weight.is_cuda else None))
        if rank():
            return
        contents = {"settings": settings(self.options), "at": self.at}
        if self.at["phase"] != "done":
            contents |= {
                "model": self.model.contents(),
                "gated": bool(self.model.encoder.gates),
                "multipliers": self.lagrangian and self.lagrangian.multipliers.detach(),
                "optimizer": self.optimizer and self.optimizer.state_dict(),
                "random": random,
                "skipped": list(self.corpus.skipped),
                "corpus": [self.corpus.kind, self.corpus.size],
            }
        buffer = io.BytesIO()
        torch.save(contents, buffer)
        write(self.out / STATE, hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer())

    def restore(self, state):
        """Go on from a training checkpoint; the model is already the one that it holds."""
        if state["corpus"] != [self.corpus.kind, self.corpus.size]:
            raise RunError(f"{self.options.data}: is not the corpus that {self.out} began with; it now has {self.corpus.size} utterances")
        self.at = state["at"]
        for reason in state["skipped"]:
            self.corpus.skip(reason)
        if state["gated"]:
            self.add_lagrangian()
            self.lagrangian.multipliers.data.copy_(state["multipliers"])
        if state["optimizer"]:
            self.optimizer = make_optimizer(self)
            self.optimizer.load_state_dict(state["optimizer"])
        cpu, cuda = state["random"][rank()]
        torch.set_rng_state(cpu)
        if cuda is not None and self.model.head.weight.is_cuda:
            torch.cuda.set_rng_state(cuda)


def settings(options):
    """What a run's result depends on: its flags, after the recipe has filled them in, and the number of processes."""
    return {name: value for name, value in vars(options).items() if name not in NOT_OF_THE_RUN} | {"processes": ranks()}


def read_state(out, options):
    """The training checkpoint in the folder of a run that --resume is to go on with; {} where there is none yet, or no --resume."""
    path, found = out / STATE, sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not options.resume:
        if found:
            goes_on = "go on with it by --resume, " if STATE in found else ""
            raise RunError(f"{out}: holds another run; {goes_on}give another --out, or remove it")
        return {}
    if STATE not in found:
        if set(found) - {"log.txt", HEADERS, HEADERS + ".partial", STATE + ".partial"}:
            raise RunError(f"{out}: holds no {STATE} to --resume from; give the --out of a run, or another")
        log.info("%s: there is nothing to resume; the run begins", out)
        return {}
    contents = memoryview(path.read_bytes())
    if hashlib.sha256(contents[32:]).digest() != contents[:32]:
        raise RunError(f"{path}: is damaged; start anew in another --out, with the dense.pt of this one as --checkpoint if it is there")
    return torch.load(io.BytesIO(contents[32:]), map_location="cpu", weights_only=True)


def check_settings(options, state, out):
    """Refuse to go on with a run with other flags than its own."""
    now, then = settings(options), state["settings"]
    for name in now:
        if now[name] != then.get(name):
            flag = "torchrun's --nproc-per-node" if name == "processes" else f"--{name.replace('_', '-')}"
            raise RunError(f"{out}: was started with {flag} {then.get(name)}, and cannot go on with {now[name]}; give the run's own, or another --out")


stopping = []  # the signals that asked this process to stop


def ask_to_stop(number, frame):
    """Signal handler: stop at the next opportunity; asked twice, at once."""
    if stopping:
        raise KeyboardInterrupt
    stopping.append(number)


def leave_if_asked():
    if stopping:
        raise Stopped("an evaluation")


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


# --- The script --------------------------------------------------------------------------------------------------------


def prepare_model(options):
    """The encoder to prune, and the SpeechModel whose head is already trained for this task where the checkpoint has one, else None."""
    if options.checkpoint is None:
        return Wav2Vec2({"small": SMALL, "base": BASE}[options.model]), None
    path, _ = find_checkpoint(options.checkpoint)
    trained = read_checkpoint(path)
    if trained.get("format") == "sslprune" and trained.get("task") == options.task:
        trained = load(path)
        return trained.encoder, trained
    return load_pretrained(options.checkpoint), None


def run(options):
    """The whole of a run, from the options to the report. Raises what the user can mend as an error of one line."""
    start = time.monotonic()
    messages = logging.handlers.MemoryHandler(1)  # keeps what there is to say until there is a log.txt
    log.addHandler(messages)
    try:
        device = usable_device(options.device)
        join(device)
        run = prepare(options, device)
        if run is None:
            return
        if not rank():
            messages.setTarget(logging.FileHandler(run.out / "log.txt", encoding="utf-8"))
        with stoppable():
            run_phases(run, start)
    except Stopped as stopped:
        name = signal.Signals(stopping[0]).name
        raise Stopped(f"{name} stopped the run at {stopped}; the same command with --resume goes on") from stopped
    finally:
        log.removeHandler(messages)
        messages.flush()
        if messages.target:
            messages.target.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare(options, device):
    """Everything that can be wrong comes to light here, before anything is trained or written; then --out is made.

    Returns the Run, at its beginning or where --resume finds it; None where that one has ended.
    """
    out = Path(options.out or f"runs/{options.task}-{options.method}-{options.budget:g}")
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise DataError(f"{out}: a file stands where --out needs a folder; give another --out")
    state = read_state(out, options)
    torch.manual_seed(options.seed)
    trained = None
    if state:
        shape = Shape.from_dict(state["at"]["dense_shape"])
    else:
        encoder, trained = prepare_model(options)
        shape = encoder.full_shape
    recipe = dict(RECIPES["base"])
    if shape.width < BASE.width:
        recipe = RECIPES["small"] | (SMALL_SLU if options.task == "slu" else {})
    if options.checkpoint is not None:
        recipe["dense_updates"] = 0
    for name, value in recipe.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.budget < 1:
        gates.check_budget(shape, options.method, options.budget)
    if state:
        check_settings(options, state, out)
        if state["at"]["phase"] == "done":
            log.info("%s: has run to its end; nothing is left to do", out)
            return None
    corpus = open_shared_corpus(options, out)
    if state:
        model = model_of(state)
    else:
        labels = data.VOCABULARY if options.task == "asr" else sorted({u.intent for u in corpus.train(0)})
        model = SpeechModel(encoder, options.task, labels)
        if trained is not None and trained.labels == model.labels:
            model = trained
        elif trained is not None:
            log.info("%s: was trained for other labels; its head starts anew", options.checkpoint)
            trained = None
    model.to(device).dtype = DTYPES[options.dtype]
    run = Run(options, out, model, corpus, trained is not None)
    if not rank():
        make_out(out, shape)
        if corpus.headers:
            write(out / HEADERS, json.dumps(corpus.headers).encode())
    if state:
        run.restore(state)
        log.info("%s: goes on at %s %d/%d", out, run.at["phase"], run.at["update"], getattr(options, f"{run.at['phase']}_updates"))
    else:
        torch.manual_seed(options.seed + rank())  # after the weights, which are to be the same in all processes
        run.save()
    return run


def open_shared_corpus(options, out):
    """The corpus of --data. One process reads the headers of its files, and keeps them beside the run; the others have them from it."""
    subsets = {split: getattr(options, split) for split in ("train", "dev", "test")}
    headers = {}
    for turn in range(2):
        if (rank() == 0) == (turn == 0):
            if rank() == 0 and (out / HEADERS).exists():
                headers = data.read_headers(out / HEADERS)
            corpus = data.open_corpus(options.data, options.task, options.seed, subsets, skip_bad=options.skip_bad, headers=headers, hold_out=options.hold_out)
        headers = gather(headers)[0]
    return corpus


def model_of(state):
    """The SpeechModel in a training checkpoint, with gates where it had them."""
    contents = state["model"]
    model = SpeechModel(Wav2Vec2(Shape.from_dict(contents["shape"])), contents["task"], contents["labels"])
    if state["gated"]:
        model.encoder.add_gates(gates.KINDS[state["settings"]["method"]])
    model.load_state_dict(contents["weights"])
    return model


def run_phases(run, start):
    """Train, prune, fine-tune, evaluate, save and report, from where the run is."""
    options, model, out, at = run.options, run.model, run.out, run.at
    shape, device = Shape.from_dict(at["dense_shape"]), model.head.weight.device
    log.info("%s  seed %d  %s  %s", device, options.seed, options.data, describe(shape))
    phases = [phase for phase in PHASES if getattr(options, f"{phase}_updates")]

    def announce(phase, what=None):
        if phase in phases:
            log.info("phase %d of %d, %s: %s", phases.index(phase) + 1, len(phases), phase, what or PHASES[phase])

    if at["phase"] == "dense":
        if "dense" in phases:
            announce("dense")
            train(run)
            save_model(model, out / "dense.pt")
            at["trained"] = True
        metrics = evaluate_all(run) if at["trained"] else None
        if metrics:
            log.info("dense: %s", say(metrics))
        run.enter("prune", dense_metrics=metrics)

    if at["phase"] == "prune":
        announce("prune", None if options.budget < 1 else "train the dense model as long as a pruning phase takes, without gates")
        train(run)
        kept = [1.0] * len(METHODS[options.method])
        if options.budget < 1:
            kept = (1 - run.lagrangian.sparsity(model.encoder.gates)).tolist()
            warn_unless_converged(kept, options)
            gates.harden(model.encoder.gates, shape, options.method, options.budget, options.ragged)
            model.encoder, run.lagrangian = model.encoder.slice(), None
            log.info("hardened and sliced: %s", describe(model.encoder.shape))
        run.enter("finetune", expected=kept)

    announce("finetune", None if options.budget < 1 else "train the dense model on")
    train(run)
    save_model(model, out / "model.pt")  # before all that remains, so that nothing can lose it
    metrics = evaluate_all(run)
    if not rank():
        report = make_report(run, metrics)
        write(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
        log.info("\n%s\n\n%s\n", picture(report), table(report))
    run.enter("done")
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    log.info("%s: model.pt, report.json, log.txt%s  (%d:%02d)", out, ", dense.pt" if "dense" in phases else "", minutes, seconds)


def evaluate_all(run):
    return {split: evaluate(run.model, run.corpus, split, run.options.batch_seconds) for split in SPLITS if getattr(run.corpus, split)}


def save_model(model, path):
    if not rank():
        model.save(path)


def warn_unless_converged(kept, options):
    """Say so where training did not bring the expected cost to the budget, and what to change."""
    for constraint, share in zip(METHODS[options.method], kept):
        if abs(share - options.budget) > CONVERGED:
            then = "shuts what training kept" if share > options.budget else "keeps what training shut"
            log.warning(
                "the constraint has not converged: %.3f of the %s are expected to be kept, not %g, and hardening %s."
                " Give more --prune-updates, or a larger --gate-lr", share, constraint.name, options.budget, then,
            )  # fmt: skip


def make_report(run, metrics):
    """What goes into report.json. metrics: of the pruned model."""
    options, model, at = run.options, run.model, run.at
    constraints, device = METHODS[options.method], model.head.weight.device
    dense_encoder = Wav2Vec2(Shape.from_dict(at["dense_shape"])).to(device)  # of any weights: it is only to be timed
    encoders = {"dense": dense_encoder, "pruned": model.encoder}
    report = {
        **{key: getattr(options, key) for key in ("task", "method", "budget", "ragged", "dtype", "seed", "data", "hold_out", "checkpoint")},
        "achieved": achieved(dense_encoder.shape, model.encoder.shape, constraints),
        "kept": [achieved(dense_encoder.shape, model.encoder.shape, [constraint]) for constraint in constraints],
        "expected": at["expected"],  # of each constrained cost, when the pruning phase ended; `kept` is what it came to
        "converged": all(abs(share - options.budget) <= CONVERGED for share in at["expected"]),
        "metric": {"name": TASKS[options.task], **{split: values[TASKS[options.task]] for split, values in metrics.items()}},
        "metrics": {"dense": at["dense_metrics"], "pruned": metrics},
        "skipped": len(run.corpus.skipped),
        "skipped_reasons": list(run.corpus.skipped),
        "too_long": at["too_long"],  # utterances over --max-seconds, which training left out
        "updates": {phase: getattr(options, f"{phase}_updates") for phase in PHASES},
        "updates_left_out": at["not_finite"],
        "processes": ranks(),
        "train_seconds": round(at["seconds"], 1),
    }
    seconds = forward_seconds(list(encoders.values()), device, model.dtype)
    for (key, encoder), taken in zip(encoders.items(), seconds):
        c = cost(encoder.shape, SAMPLES)
        report[key] = {"macs": c.macs, "params": c.params, "frontend_macs": c.frontend.macs, "frontend_params": c.frontend.params,
                       "seconds": taken, "shape": encoder.shape.as_dict()}  # fmt: skip
    return report


def achieved(dense, kept, constraints):
    """The kept fraction of what is constrained; of several constraints, of their sum."""
    costs = [cost(shape, SAMPLES) for shape in (kept, dense)]
    kept, dense = (sum(constraint.measure(c) for constraint in constraints) for c in costs)
    return kept / dense


def describe(shape):
    """A model's cost in a few words."""
    c = cost(shape, SAMPLES)
    return f"{c.macs / 1e9:.3f} GMACs on {SECONDS} s, {c.params / 1e6:.3f} M parameters"


def say(metrics):
    """{split: {name: value}} in a few words."""
    return ", ".join(f"{split} {name.replace('_', ' ')} {value:.2%}" for split, values in metrics.items() for name, value in values.items())


def picture(report):
    """What each layer kept, a # for each kept twentieth."""
    lines = ["what each layer kept"]
    for kind, title in (("channels", "convolution"), ("heads", "heads of layer"), ("units", "units of layer")):
        for layer, (kept, full) in enumerate(zip(report["pruned"]["shape"][kind], report["dense"]["shape"][kind]), 1):
            bar = "#" * math.ceil(20 * kept / max(1, full))
            lines.append(f"{title:>15} {layer:2}  {bar:.<20}  {kept}/{full}")
    return "\n".join(lines)


def table(report):
    """Dense against pruned, as text."""
    dense, pruned, metrics = report["dense"], report["pruned"], report["metrics"]

    def row(name, key, scale, unit, digits):
        a, b = dense[key], pruned[key]
        return f"{name:<28}{a / scale:>12.{digits}f} {unit:<2}{b / scale:>12.{digits}f} {unit:<2}{b / a:>10.2%}"

    # The dense model is the one before pruning; the pruned one has been trained for longer. --budget 1.0 trains the dense as long.
    lines = [
        f"{'':<28}{'dense, before':>15}{'pruned':>15}{'kept':>10}",
        row(f"MACs ({SECONDS} s of audio)", "macs", 1e9, "G", 3),
        row("  of the frontend", "frontend_macs", 1e9, "G", 3),
        row("parameters", "params", 1e6, "M", 3),
        row("  of the frontend", "frontend_params", 1e6, "M", 3),
        row(f"forward ({SECONDS} s of audio)", "seconds", 1e-3, "ms", 1),
    ]
    for split in metrics["pruned"]:
        for name, value in metrics["pruned"][split].items():
            before = "-" if metrics["dense"] is None else f"{metrics['dense'][split][name]:.2%}"
            lines.append(f"{name.replace('_', ' ') + ', ' + split:<28}{before:>15}{value:>15.2%}")
    return "\n".join(lines)


def make_out(out, shape):
    """Make the folder of a run, where there is room for what it will hold."""
    out.mkdir(parents=True, exist_ok=True)
    # In float32: dense.pt, model.pt, and the training checkpoint (weights and two moments of Adam's) with a copy being written.
    need = 8 * 4 * cost(shape, SAMPLES).params + 2**20
    free = shutil.disk_usage(out).free
    if free < need:
        raise DataError(f"{out}: {free / 1e6:.0f} MB are free, {need / 1e6:.0f} MB are needed; make room, or give another --out")


def usable_device(name):
    """The torch.device of this name; of None, a GPU where there is one."""
    try:
        if name in (None, "cuda"):
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name or torch.cuda.is_available() else "cpu"  # torchrun sets it
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()  # the counts and the first convolution's statistics need float64
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise DataError(f"--device {name}: cannot be used here ({why})") from error
    return device


def parse(arguments):
    """The command line as options; a mistake in it ends the program with one line and exit status 2."""

    def number(kind, lowest, highest, what):
        def convert(text):
            try:
                value = kind(text)
            except ValueError:
                value = math.nan
            if not lowest <= value <= highest:
                raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
            return value

        return convert

    fraction = number(float, 1e-9, 1, "a fraction over 0 and up to 1, as in 0.5")
    share = number(float, 0, 1, "a probability")
    decibels = number(float, 0, 40, "a number of decibels from 0 to 40")
    half = number(float, 0, 0.5, "a fraction from 0 to 0.5")
    rate = number(float, 1e-12, 1, "a learning rate between 0 and 1")
    count = number(int, 0, 10**9, "a whole number from 0")
    times = number(int, 1, 10**6, "a whole number from 1")
    length = number(float, 0.1, 1e5, "a number of seconds from 0.1")
    wait = number(float, 0, 1e9, "a number of seconds from 0")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: sys.exit(refuse(message))
    what = parser.add_argument_group("what to do")
    what.add_argument("--task", choices=sorted(TASKS), help="asr: transcripts with CTC; slu: intents")
    what.add_argument("--budget", type=fraction, help="fraction of the dense cost to keep; 1.0 prunes nothing")
    what.add_argument("--predict", nargs="+", metavar=("MODEL", "FILE"), help="print what a model.pt makes of these recordings")
    what.add_argument("--evaluate", metavar="MODEL", help="print the metrics of a model.pt on the dev and test splits of --data")
    how = parser.add_argument_group("how")
    how.add_argument("--method", choices=sorted(METHODS), default="mac", help="what the budget is of (default %(default)s)")
    how.add_argument("--ragged", action="store_true", help="keep any number of channels and units, not the multiples that run fast")
    how.add_argument("--data", default="demo", help="folder of LibriSpeech, SLURP or the Free Spoken Digit Dataset (default: demo)")
    for split in ("train", "dev", "test"):
        how.add_argument(f"--{split}", metavar="NAMES", help=f"subsets that are the {split} split, joined by commas (LibriSpeech, SLURP)")
    how.add_argument("--hold-out", metavar="SPEAKER", help="train without this speaker of the digits corpus, and report the error on it too")
    how.add_argument("--checkpoint", help="pretrained model: Hugging Face, fairseq, torchaudio, or a model.pt or dense.pt of ours")
    how.add_argument("--model", choices=("small", "base"), default="small", help="what to train without a checkpoint (default %(default)s)")
    how.add_argument("--out", help="folder of the run (default runs/TASK-METHOD-BUDGET)")
    how.add_argument("--resume", action="store_true", help="go on with the run in --out, after whatever stopped it; all other flags as before")
    how.add_argument("--save-seconds", type=wait, default=600.0, metavar="N", help="how often to write what --resume needs (default %(default)g)")
    how.add_argument("--seed", type=count, default=0)
    how.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in; the weights are float32 (default %(default)s)")
    how.add_argument("--skip-bad", action="store_true", help="go on where over 1 %% of the utterances are unusable")
    how.add_argument("--max-seconds", type=length, default=30.0, metavar="N", help="leave longer utterances out of training (default %(default)g)")
    how.add_argument("--accumulate", type=times, default=1, metavar="N", help="batches per update and process (default %(default)s)")
    how.add_argument("--workers", type=count, metavar="N", help="processes that load audio beside each that trains (default: 4 with a GPU, else 0)")
    recipe = parser.add_argument_group("recipe (defaults: see RECIPES in sslprune.py)")
    kinds = {"updates": count, "seconds": length, "lr": rate, "share": share, "drop": share, "probability": share, "perturbation": half, "decibels": decibels}
    for name in RECIPES["small"]:
        recipe.add_argument("--" + name.replace("_", "-"), type=kinds[name.rsplit("_", 1)[1]], metavar="N")
    options = parser.parse_args(arguments)

    if options.speed_perturbation and options.speed_perturbation * data.SPEED_STEPS < 1:
        parser.error(f"--speed-perturbation {options.speed_perturbation:g}: speeds are in steps of {1 / data.SPEED_STEPS:g}; give that or more, or 0")
    if any(value == "" for value in vars(options).values()):
        parser.error("a flag has an empty value; leave the flag out, or give it one")
    instead = next((name for name in ("predict", "evaluate") if getattr(options, name) is not None), None)
    if instead:
        used = {"device", "dtype", instead}
        if instead == "evaluate":
            used |= {"task", "data", "dev", "test", "seed", "skip_bad", "batch_seconds", "hold_out"}
        for name, value in vars(options).items():
            if name not in used and value != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} has no meaning with --{instead}; leave it out")
    if options.predict and len(options.predict) < 2:
        parser.error("--predict takes a model.pt and at least one recording")
    if not instead and (options.task is None or options.budget is None):
        parser.error("give --task and --budget, as in --task asr --budget 0.5, or --predict or --evaluate; see --help")
    return options


def load_to_use(path, options):
    """A model.pt on the device and in the precision that the options name."""
    model = load(path).to(usable_device(options.device))
    model.dtype = DTYPES[options.dtype]
    return model


def predict(options):
    """Print a line for each recording; one that cannot be read does not keep the others from being recognised."""
    path, *files = options.predict
    model = load_to_use(path, options)
    failed = []
    for file in files:
        try:
            print(f"{file}\t{model.predict([file])[0]}", flush=True)
        except DataError as error:
            failed.append(error)
    for error in failed:
        refuse(error)
    return 2 if failed else 0


def run_evaluation(options):
    """Print the metrics of a model on the dev and test splits of a corpus."""
    model = load_to_use(options.evaluate, options)
    if options.task not in (None, model.task):
        raise DataError(f"{options.evaluate}: was trained for {model.task}, not for {options.task}")
    subsets = {split: getattr(options, split) for split in ("dev", "test")}
    corpus = data.open_corpus(options.data, model.task, options.seed, subsets, splits=("dev", "test"), skip_bad=options.skip_bad, hold_out=options.hold_out)
    seconds = options.batch_seconds or RECIPES["small"]["batch_seconds"]
    for split in filter(lambda split: getattr(corpus, split), SPLITS):
        print(say({split: evaluate(model, corpus, split, seconds)}), flush=True)
    return 0


def refuse(message):
    """Say in one line what is wrong; the exit status for it."""
    print("sslprune:", " ".join(str(message).split()), file=sys.stderr)
    return 2


def main(arguments=None):
    """The program; returns its exit status: 0, 2 for what the user can mend, 128 and the signal's number where one stopped it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options = parse(arguments)
    try:
        if options.predict:
            return predict(options)
        if options.evaluate:
            return run_evaluation(options)
        run(options)
        return 0
    except (DataError, CheckpointError, BudgetError, RunError, OSError) as error:
        return refuse(error)
    except Stopped as stopped:
        refuse(stopped)
        return 128 + stopping[0]
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own only for a GPU's memory
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return refuse(f"out of memory; {'cut up the recording' if options.predict else 'give a smaller --batch-seconds'} ({error})")
    except KeyboardInterrupt:
        refuse("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
