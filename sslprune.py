"""Structured pruning of wav2vec2 for one task, under a budget of MACs or parameters.

    python sslprune.py --task asr --budget 0.5                        # the demo corpus, a small model trained from scratch
    python sslprune.py --task asr --budget 0.5 --checkpoint wav2vec2-base --data LibriSpeech
    python sslprune.py --task slu --budget 0.5 --checkpoint wav2vec2-base --data slurp --method size
    python sslprune.py --predict runs/asr-mac-0.5/model.pt recording.wav ...
    python sslprune.py --evaluate runs/asr-mac-0.5/model.pt --data LibriSpeech

A run has up to three phases. Without a checkpoint it first trains a dense model, since the method prunes a trained one. Then
weights, gates and multipliers train together under the budget (gates.py); the gates are hardened to the budget and the
model is sliced. Then the small model trains on. --budget 1.0 trains as long, and prunes nothing: the reference.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import logging.handlers
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read by torch's OpenMP: on a busy machine, threads that spin for long stall each other
import torch
import torch.nn.functional as F
from torch import nn

import data
import gates
from data import DataError
from flops import BASE, SAMPLE_RATE, SECONDS, SMALL, cost
from gates import METHODS, SAMPLES, BudgetError, Lagrangian
from transformer import CheckpointError, Wav2Vec2, build, find_checkpoint, load_pretrained, read_checkpoint, unpack

log = logging.getLogger("sslprune")

# How long and how fast to train; each number can be set by the flag of its name.
RECIPES = {
    # wav2vec2-base. The learning rates and the warm-up are DPHuBERT's (Peng et al., Interspeech 2023); masks and LayerDrop are
    # fairseq's recipe for 100 hours; the updates are ours: with 100 s of audio each, pruning and fine-tuning are about 17 passes
    # over those 100 hours. The dense phase falls away with a checkpoint.
    "base": dict(dense_updates=100_000, prune_updates=40_000, finetune_updates=20_000, batch_seconds=100.0,
                 dense_lr=2e-4, prune_lr=2e-4, finetune_lr=1e-4, gate_lr=2e-2, warmup_share=0.1, layer_drop=0.1, mask_probability=0.65),
    # The small model from scratch, chosen on the demo's dev sets: as long as a few minutes allow, and gates that are fast and a
    # target that is slow enough for a phase of some hundred updates.
    "small": dict(dense_updates=560, prune_updates=300, finetune_updates=180, batch_seconds=10.0,
                  dense_lr=5e-4, prune_lr=5e-4, finetune_lr=5e-4, gate_lr=0.2, warmup_share=0.5, layer_drop=0.0, mask_probability=0.0),
}  # fmt: skip
WARMUP, DECAY, LAST = 0.1, 0.5, 0.05  # tri-stage learning rate: shares of the phase, and the last rate over the peak (fairseq)
CLIP = 1.0  # norm of the weights' gradient, against the odd wild batch


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
        scores, frames = self(waveforms.to(device), None if lengths is None else lengths.to(device))
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
        encoder = self.encoder
        contents = {"format": "sslprune", "shape": encoder.full_shape.as_dict(), "task": self.task, "labels": self.labels,
                    "weights": {key: tensor.detach().cpu() for key, tensor in self.state_dict().items()}}  # fmt: skip
        buffer = io.BytesIO()  # so that a full disk is an OSError of ours, and not a RuntimeError from within torch.save
        torch.save(contents, buffer)
        write(path, buffer.getbuffer())


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
    named = isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels)
    if not (task == "slu" and named or task == "asr" and labels == data.VOCABULARY):
        raise CheckpointError(f"{path}: its task or labels are none that sslprune writes")
    shape, weights = unpack(contents, path)
    return build(lambda shape: SpeechModel(Wav2Vec2(shape), task, labels), shape, weights, path)


def write(path, contents):
    """Write bytes to a file in one step: whole, or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(contents)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error


# --- Evaluation --------------------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TASKS = {"asr": "word_error_rate", "slu": "intent_accuracy"}  # and the name of its metric


def usable(utterances, corpus, model, training=False):
    """The utterances that make a frame and, for training with CTC, enough of them for their transcript; the others are skipped."""
    kept = []
    for u in utterances:
        samples = round(u.seconds * SAMPLE_RATE)
        frames = model.encoder.full_shape.frames(samples)[-1]
        needed = data.frames_needed(u.text) if training and model.task == "asr" else 1
        if frames >= needed:
            kept.append(u)
        else:
            corpus.skip(f"{u.name}: {u.seconds:.3f} s of audio make {max(frames, 0)} frames; {needed} are needed")
    return kept


def evaluate(model, corpus, split, batch_seconds):
    """Metrics of a model on the "dev" or "test" split, as fractions: {name: value}, the task's own metric first."""
    model.eval()
    utterances = usable(getattr(corpus, split), corpus, model)
    references, hypotheses = [], []
    batches = data.batches(utterances, batch_seconds)
    show = progress_of(f"evaluate {split}", len(batches), last=False)
    for step, (batch, waveforms, lengths, bad) in enumerate(load_batches(model, batches), 1):
        for reason in bad:
            corpus.skip(reason)
        if batch:
            references += batch
            hypotheses += model.transcribe(waveforms, lengths)
        show(step)
    corpus.check()
    if not references:
        raise DataError(f"no utterance of the {split} split could be read")
    if model.task == "asr":
        texts = [u.text for u in references]
        return {
            "word_error_rate": data.error_rate(texts, hypotheses),
            "character_error_rate": data.error_rate(texts, hypotheses, split=list),
        }
    right = {"intent_accuracy": [h == u.intent for h, u in zip(hypotheses, references)]}
    if all("_" in u.intent for u in references):  # SLURP's two halves of an intent, scenario_action
        for half, name in ((0, "scenario_accuracy"), (-1, "action_accuracy")):
            right[name] = [h.split("_", 1)[half] == u.intent.split("_", 1)[half] for h, u in zip(hypotheses, references)]
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


def load_batches(model, batches):
    """An iterator over what data.Loader makes of these batches. Beside a GPU, worker processes prepare them."""
    workers = 0 if model.head.weight.device.type == "cpu" else 4
    return torch.utils.data.DataLoader(data.Loader(batches), batch_size=None, num_workers=workers)


def tri_stage(progress):
    """Learning rate over its peak at `progress` in [0, 1): up linearly, hold, down exponentially (fairseq's tri-stage)."""
    if progress < WARMUP:
        return (progress + 1e-3) / (WARMUP + 1e-3)
    if progress < 1 - DECAY:
        return 1.0
    return LAST ** ((progress - (1 - DECAY)) / DECAY)


def train(phase, model, corpus, options, lagrangian=None):
    """One phase: `{phase}_updates` updates at `{phase}_lr`; with a Lagrangian, of gates and multipliers too. Returns its seconds."""
    begin = time.monotonic()
    updates = getattr(options, f"{phase}_updates")
    encoder, device = model.encoder, model.head.weight.device
    log_alphas = [gate.log_alpha for gate in encoder.gates.values()]
    weights = [p for name, p in model.named_parameters() if not name.endswith("log_alpha")]
    groups = [{"params": weights, "peak": getattr(options, f"{phase}_lr")}]
    if lagrangian:
        groups += [{"params": log_alphas, "peak": options.gate_lr}, {"params": [lagrangian.multipliers], "peak": options.gate_lr, "maximize": True}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))  # fairseq's betas
    encoder.layer_drop, encoder.projection.mask_probability = options.layer_drop, options.mask_probability
    model.train()
    rng = np.random.default_rng([options.seed, *phase.encode()])
    show, losses = progress_of(phase, updates), []

    def details():
        text = f"  loss {torch.stack(losses).mean():.3f}"
        losses.clear()
        if lagrangian:
            text += "  expected to keep " + ", ".join(f"{kept:.3f}" for kept in (1 - lagrangian.sparsity(encoder.gates)).tolist())
        return text

    step = epoch = 0
    while step < updates:
        utterances = usable(corpus.train(int(rng.integers(2**31))), corpus, model, training=True)
        batches = data.batches(utterances, options.batch_seconds, rng)
        if phase == "dense" and epoch == 0 and model.task == "asr":
            # The shortest first: CTC leaves its plateau of blanks sooner (SortaGrad; Amodei et al. 2016, arXiv 1512.02595).
            batches = data.batches(utterances, options.batch_seconds)[::-1]
        started = step
        for batch, waveforms, lengths, bad in load_batches(model, batches):
            for reason in bad:
                corpus.skip(reason)
            if not batch:
                continue
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * tri_stage(step / updates)
            loss = model.loss(waveforms.to(device), lengths.to(device), batch)
            objective = loss
            if lagrangian:
                objective = loss + lagrangian(encoder.gates, min(1, step / max(1, options.warmup_share * updates)))
            optimizer.zero_grad()
            objective.backward()
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            step += 1
            losses.append(loss.detach())
            show(step, details)
            if step == updates:
                break
        corpus.check()
        if step == started:
            raise DataError("no utterance of the training split could be read")
        epoch += 1
    return time.monotonic() - begin


def progress_of(what, total, last=True):
    """A function to call after each of `total` steps; it logs where they are and how long is left, ever less often.

    It takes the step and a function that makes the details. last: whether to log the last step in any case.
    """
    start = shown = time.monotonic()

    def show(step, details=lambda: ""):
        nonlocal shown
        now = time.monotonic()
        if now - shown >= max(10, (now - start) / 50) or (step == total and last):
            left = round((now - start) / step * (total - step))
            log.info("%s %d/%d%s  %d:%02d left", what, step, total, details(), left // 60, left % 60)
            shown = now

    return show


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
        out, model, corpus, trained = prepare(options)
        messages.setTarget(logging.FileHandler(out / "log.txt", encoding="utf-8"))
        return run_phases(options, out, start, model, corpus, trained)
    finally:
        log.removeHandler(messages)
        messages.flush()
        if messages.target:
            messages.target.close()


def prepare(options):
    """Everything that can be wrong comes to light here, before anything is trained or written; then --out is made.

    Returns the folder of the run, the model, the corpus, and whether the model's head is trained already.
    """
    out = Path(options.out or f"runs/{options.task}-{options.method}-{options.budget:g}")
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise DataError(f"{out}: a file stands where --out needs a folder; give another --out")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: holds another run; give another --out, or remove it")
    device = usable_device(options.device)
    torch.manual_seed(options.seed)
    encoder, trained = prepare_model(options)
    shape = encoder.full_shape
    if options.budget < 1:
        gates.check_budget(shape, options.method, options.budget)
    recipe = dict(RECIPES["small" if shape.width < BASE.width else "base"])
    if options.checkpoint is not None:
        recipe["dense_updates"] = 0
    for name, value in recipe.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    subsets = {split: getattr(options, split) for split in ("train", "dev", "test")}
    corpus = data.open_corpus(options.data, options.task, options.seed, subsets, skip_bad=options.skip_bad)
    labels = data.VOCABULARY if options.task == "asr" else sorted({u.intent for u in corpus.train(0)})
    model = SpeechModel(encoder, options.task, labels)
    if trained is not None and trained.labels == model.labels:
        model = trained
    elif trained is not None:
        log.info("%s: was trained for other labels; its head starts anew", options.checkpoint)
        trained = None
    model.to(device).dtype = DTYPES[options.dtype]
    make_out(out, shape)
    return out, model, corpus, trained is not None


def run_phases(options, out, start, model, corpus, trained):
    """Train, prune, fine-tune, evaluate, save and report."""
    shape, device = model.encoder.full_shape, model.head.weight.device
    log.info("%s  seed %d  %s  %s", device, options.seed, options.data, describe(shape))
    train_seconds = 0.0
    phases = [phase for phase in PHASES if getattr(options, f"{phase}_updates")]

    def announce(phase, what=None):
        log.info("phase %d of %d, %s: %s", phases.index(phase) + 1, len(phases), phase, what or PHASES[phase])

    if "dense" in phases:
        announce("dense")
        train_seconds += train("dense", model, corpus, options)
        model.save(out / "dense.pt")
        trained = True
    dense_metrics = {split: evaluate(model, corpus, split, options.batch_seconds) for split in ("dev", "test")} if trained else None
    if dense_metrics:
        log.info("dense: %s", say(dense_metrics))

    dense_encoder = copy.deepcopy(model.encoder)
    if options.budget < 1:
        if "prune" in phases:
            announce("prune")
        model.encoder.add_gates(gates.KINDS[options.method])
        lagrangian = Lagrangian(shape, options.method, options.budget).to(device)
        train_seconds += train("prune", model, corpus, options, lagrangian)
        expected = 1 - lagrangian.sparsity(model.encoder.gates)
        gates.harden(model.encoder.gates, shape, options.method, options.budget, options.ragged)
        model.encoder = model.encoder.slice()
        log.info("hardened and sliced: %s", describe(model.encoder.shape))
    else:
        if "prune" in phases:
            announce("prune", "train the dense model as long as a pruning phase takes, without gates")
        train_seconds += train("prune", model, corpus, options)
        expected = torch.ones(len(METHODS[options.method]))
    if "finetune" in phases:
        announce("finetune", None if options.budget < 1 else "train the dense model on")
    train_seconds += train("finetune", model, corpus, options)
    model.save(out / "model.pt")  # before all that remains, so that nothing can lose it

    metrics = {split: evaluate(model, corpus, split, options.batch_seconds) for split in ("dev", "test")}
    report = make_report(options, dense_encoder, model, expected, {"dense": dense_metrics, "pruned": metrics}, corpus, train_seconds)
    write(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    log.info("\n%s\n\n%s\n", picture(report), table(report))
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    log.info("%s: model.pt, report.json, log.txt%s  (%d:%02d)", out, ", dense.pt" if "dense" in phases else "", minutes, seconds)


def make_report(options, dense_encoder, model, expected, metrics, corpus, train_seconds):
    """What goes into report.json."""
    kept = [achieved(dense_encoder.shape, model.encoder.shape, [constraint]) for constraint in METHODS[options.method]]
    report = {
        **{key: getattr(options, key) for key in ("task", "method", "budget", "ragged", "dtype", "seed", "data", "checkpoint")},
        "achieved": achieved(dense_encoder.shape, model.encoder.shape, METHODS[options.method]),
        "kept": kept,  # of each constrained cost
        "expected": expected.tolist(),  # the same in expectation, when the pruning phase ended
        "metric": {"name": TASKS[options.task], **{split: values[TASKS[options.task]] for split, values in metrics["pruned"].items()}},
        "metrics": metrics,
        "skipped": len(corpus.skipped),
        "skipped_reasons": list(corpus.skipped),
        "updates": {phase: getattr(options, f"{phase}_updates") for phase in PHASES},
        "train_seconds": round(train_seconds, 1),
    }
    encoders = {"dense": dense_encoder, "pruned": model.encoder}
    seconds = forward_seconds(list(encoders.values()), model.head.weight.device, model.dtype)
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
    for split in ("dev", "test"):
        for name, value in metrics["pruned"][split].items():
            before = "-" if metrics["dense"] is None else f"{metrics['dense'][split][name]:.2%}"
            lines.append(f"{name.replace('_', ' ') + ', ' + split:<28}{before:>15}{value:>15.2%}")
    return "\n".join(lines)


def make_out(out, shape):
    """Make the folder of a run, where there is room for what it will hold."""
    out.mkdir(parents=True, exist_ok=True)
    need = 3 * 4 * cost(shape, SAMPLES).params + 2**20  # dense.pt, model.pt and a copy that is being written, in float32
    free = shutil.disk_usage(out).free
    if free < need:
        raise DataError(f"{out}: {free / 1e6:.0f} MB are free, {need / 1e6:.0f} MB are needed; make room, or give another --out")


def usable_device(name):
    """The torch.device of this name; of None, a GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
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
    rate = number(float, 1e-12, 1, "a learning rate between 0 and 1")
    count = number(int, 0, 10**9, "a whole number from 0")
    length = number(float, 0.1, 1e5, "a number of seconds from 0.1")

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
    how.add_argument("--checkpoint", help="pretrained model: Hugging Face, fairseq, torchaudio, or a model.pt or dense.pt of ours")
    how.add_argument("--model", choices=("small", "base"), default="small", help="what to train without a checkpoint (default %(default)s)")
    how.add_argument("--out", help="folder of the run (default runs/TASK-METHOD-BUDGET)")
    how.add_argument("--seed", type=count, default=0)
    how.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in; the weights are float32 (default %(default)s)")
    how.add_argument("--skip-bad", action="store_true", help="go on where over 1 %% of the utterances are unusable")
    recipe = parser.add_argument_group("recipe (defaults: see RECIPES in sslprune.py)")
    kinds = {"updates": count, "seconds": length, "lr": rate, "share": share, "drop": share, "probability": share}
    for name in RECIPES["small"]:
        recipe.add_argument("--" + name.replace("_", "-"), type=kinds[name.rsplit("_", 1)[1]], metavar="N")
    options = parser.parse_args(arguments)

    if any(value == "" for value in vars(options).values()):
        parser.error("a flag has an empty value; leave the flag out, or give it one")
    instead = next((name for name in ("predict", "evaluate") if getattr(options, name) is not None), None)
    if instead:
        used = {"device", "dtype", instead}
        if instead == "evaluate":
            used |= {"task", "data", "dev", "test", "seed", "skip_bad", "batch_seconds"}
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
    corpus = data.open_corpus(options.data, model.task, options.seed, subsets, splits=("dev", "test"), skip_bad=options.skip_bad)
    seconds = options.batch_seconds or RECIPES["small"]["batch_seconds"]
    for split in ("dev", "test"):
        print(say({split: evaluate(model, corpus, split, seconds)}), flush=True)
    return 0


def refuse(message):
    """Say in one line what is wrong; the exit status for it."""
    print("sslprune:", " ".join(str(message).split()), file=sys.stderr)
    return 2


def main(arguments=None):
    """The program; returns its exit status: 0, 2 for what the user can mend, 130 where interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options = parse(arguments)
    try:
        if options.predict:
            return predict(options)
        if options.evaluate:
            return run_evaluation(options)
        run(options)
        return 0
    except (DataError, CheckpointError, BudgetError, OSError) as error:
        return refuse(error)
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own only for a GPU's memory
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return refuse(f"out of memory; give a smaller --batch-seconds ({error})")
    except KeyboardInterrupt:
        refuse("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
