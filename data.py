"""Corpora, audio, batches, transcripts and error rates.

A corpus is three lists of `Utterance`, read in the layout in which its users have it, which `open_corpus` recognises.
The demo corpus is synthesised, see the end of this file. Audio is 16 kHz mono float32 everywhere.
"""

import contextlib
import csv
import functools
import glob
import hashlib
import io
import json
import logging
import math
import os
import re
import stat
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import soundfile
import torch

from flops import SAMPLE_RATE, UserError

log = logging.getLogger("sslprune")

LONGEST = 6 * 3600  # s of a file: its samples take 1.4 GB of memory
BAD_SHARE = 0.01  # of a corpus: with more bad utterances than this something is wrong with all of it


@dataclass(frozen=True)
class Utterance:
    """A piece of speech. audio: its file, or the samples themselves (float32, 16 kHz)."""

    name: str
    audio: Path | np.ndarray
    seconds: float
    text: str = ""
    intent: str = ""  # of SLURP, scenario_action, where the scenario has no "_" of its own
    speaker: str = ""  # "" where nothing is known
    speed: float = 1.0  # the audio is played so many times as fast; `seconds` is what it then takes


def counted(items, message, *arguments):
    """The items; every ten seconds a line says how many of them are done."""
    said = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - said > 10:
            said = time.monotonic()
            log.info(message, number, *arguments)
        yield item


@dataclass
class Corpus:
    """What `open_corpus` returns: the utterances of each split, and what was wrong with others."""

    kind: str
    train: list = field(default_factory=list)
    dev: list = field(default_factory=list)
    test: list = field(default_factory=list)
    size: int = 0  # utterances, the skipped ones among them
    announced: set = field(default_factory=set)  # the changes of audio that have been logged, each once
    skip_bad: bool = False
    skipped: dict = field(default_factory=dict)  # {reason, which names its file: whether it was found since resuming}

    @property
    def fingerprint(self):
        """A SHA-256 of what is trained on and compared. It does not depend on where the corpus is."""
        splits = [[[u.name, u.text, u.intent, round(1000 * u.seconds)] for u in getattr(self, s)] for s in SPLITS]
        return hashlib.sha256(json.dumps([self.kind, splits]).encode()).hexdigest()

    def skip(self, reason):
        """Leave something out, for a reason that names it. It may quote any file, so nothing but text is shown."""
        reason = reason if len(reason) < 600 else f"{reason[:300]} ... {reason[-290:]}"
        reason = "".join(c if c.isprintable() else "?" for c in reason)
        if reason not in self.skipped and len(self.skipped) < 20:  # all of them are in the report
            log.warning("skipped: %s", reason)
        self.skipped[reason] = True

    def check(self):
        """Raise UserError where too many utterances are bad."""
        bad = sum(self.skipped.values())  # what was found before a run was resumed may be mended
        if bad > BAD_SHARE * self.size and not self.skip_bad:
            one = next(iter(self.skipped))
            raise UserError(f"{bad} of {self.size} utterances are unusable: mend them, or give --skip-bad. One: {one}")


# --- Batches -------------------------------------------------------------------------------------------------------

JITTER = 0.1  # of the lengths by which batches are formed


def training_batches(utterances, shape, ctc, speed_perturbation, batch_seconds, rng, shortest_first=False):
    """The batches of one epoch of training on usable utterances, in random order.

    shape, ctc: as for `usable`. speed_perturbation: as for `perturb_speed`, where that leaves an utterance usable.
    """
    if speed_perturbation:
        longest = max((u.seconds for u in utterances), default=0)
        played = zip(utterances, perturb_speed(utterances, speed_perturbation, rng))
        utterances = [old if new.seconds > longest or too_short(new, shape, ctc) else new for old, new in played]
    return batches(utterances, batch_seconds)[::-1] if shortest_first else batches(utterances, batch_seconds, rng)


def perturb_speed(utterances, change, rng):
    """The utterances slower by `change`, as they are, or faster, at random, with their pitch (Ko et al. 2015: 0.1)."""
    speeds = rng.choice([1 - change, 1.0, 1 + change], len(utterances)).tolist()
    return [replace(u, speed=speed, seconds=u.seconds / speed) for u, speed in zip(utterances, speeds)]


def usable(utterances, corpus, shape, ctc):
    """The utterances of which a model of this shape makes frames, with CTC enough for the text; others are skipped."""
    reasons = [too_short(u, shape, ctc) for u in utterances]
    for reason in filter(None, reasons):
        corpus.skip(reason)
    return [u for u, reason in zip(utterances, reasons) if reason is None]


def too_short(utterance, shape, ctc):
    """Why an utterance is too short for a model of this shape, or None."""
    frames = max(0, shape.frames(round(utterance.seconds * SAMPLE_RATE))[-1])
    needed = frames_needed(utterance.text) if ctc else 1
    if frames < needed:
        return f"{utterance.name}: {utterance.seconds:.3f} s of audio make {frames} frames; {needed} are needed"
    return None


def batches(utterances, seconds, rng=None):
    """Lists of utterances of like length that fill at most `seconds` of audio with padding; a longer one stands alone.

    With `rng` (numpy Generator) batches differ each time and come in random order; else they are fixed, longest first.
    """
    jitter = rng.uniform(1 - JITTER, 1 + JITTER, len(utterances)) if rng else np.ones(len(utterances))
    order = np.argsort([-u.seconds * j for u, j in zip(utterances, jitter)], kind="stable")
    filled, longest = [], 0.0
    for utterance in (utterances[i] for i in order):
        longest = max(longest, utterance.seconds)
        if not filled or longest * (len(filled[-1]) + 1) > seconds:
            filled.append([])
            longest = utterance.seconds
        filled[-1].append(utterance)
    if rng:
        rng.shuffle(filled)
    return filled


def load_batch(batch):
    """(utterances, waveforms (batch, samples) float32, lengths (batch,) int64, bad) of a list of utterances.

    What cannot be read is left out, and `bad` has the reasons. Where nothing is left, the tensors are None.
    """
    kept, waveforms, bad = [], [], []
    for utterance in batch:
        try:
            waveforms.append(waveform(utterance))
            kept.append(utterance)
        except UserError as error:
            bad.append(str(error))
    return kept, *(pad(waveforms) if kept else (None, None)), bad


def pad(waveforms):
    """Arrays of different length -> (batch, samples) float32 with zeros behind each, and lengths (batch,) int64."""
    lengths = [len(w) for w in waveforms]
    padded = np.zeros((len(waveforms), max(lengths)), np.float32)  # numpy's copies start no threads, unlike torch's
    for row, w in zip(padded, waveforms):
        row[: len(w)] = w
    return torch.from_numpy(padded), torch.tensor(lengths)


# --- Text and errors -----------------------------------------------------------------------------------------------

BLANK, SPACE = "<pad>", "|"  # CTC's blank, which is output 0, and the space between words, as wav2vec2 names them
WIDTHS = {c: unicodedata.normalize("NFKC", chr(c)) for c in range(0xFF01, 0xFFDD)}  # full-width letters, brackets, ...
APOSTROPHES = dict.fromkeys(map(ord, "\u2019\u2018\u201b\u02bb\u02bc\u055a\u1fbd\u1fbf\u2032`\u00b4"), "'")
# What is inside of words: zero-width joiners, two of Mongolian, middle dots (l\u00b7l), geresh, gershayim, a colon.
INNER = "\u200c\u200d\u180a\u180e\u00b7\u2022\u2027\u2219\u22c5\u05f3\u05f4:"
EDGES = re.compile(rf"^[{INNER}]+|(?<![\u094d\u09cd\u0d4d{INNER}])[{INNER}]+$")  # a joiner may follow a final virama
COLON = re.compile("(?<![A-Za-z\u00c0-\u024f]):|:(?![A-Za-z\u00c0-\u024f])")  # others are inside, as in EU:n and S:t
GERSHAYIM = re.compile('(?<=[\u05d0-\u05ea])"(?=[\u05d0-\u05ea])')  # as it is typed
# Quotation marks that may be apostrophes, too: several at once, the last behind punctuation, or the two not alike.
QUOTED = re.compile(r"(?<!\w)(?:'(\w.{0,999}?[^\w\s])'|[\u2018\u201a](\w.{0,999}?)[\u2018\u2019])(?!\w)|''+|``+")
ARMENIAN = "\u055b\u055c\u055e"  # stress, exclamation and question, over a vowel
SYMBOLS = "\u06fd\u06fe\u104c\u104d\u104e\u104f"  # that are words, of Sindhi and Burmese
BRACKETS = ("[]", "{}", "\u27e8\u27e9", "\u3010\u3011", "\u3014\u3015")
BETWEEN = rf"[^<>(){re.escape(''.join(BRACKETS))}]"
NOISE = "|".join(rf"\{a}(?={BETWEEN}*[^\W\d_]){BETWEEN}{{1,80}}\{b}" for a, b in BRACKETS)
NOISE += rf"|<[/|_*#]?[^\W\d_]{BETWEEN}{{0,80}}>|<\s\w+\s>"  # these also stand for less and greater
NOISE += r"|\(\s?[^\W\d_][\w-]{0,38}[.!]?\s?\)"  # one word alone, since people say what else is in parentheses


def normalise(text, dropped=None):
    """A transcript in upper case, of letters, marks, digits and apostrophes of any script; all else becomes a space.

    Superscripts and tone letters stay, and INNER inside a word. Marks of noise such as <unk> and [laughs]
    are no words. dropped: a Counter, which is told of each character and mark of noise that is left out.
    """
    before, text = text, unicodedata.normalize("NFC", text.translate(WIDTHS))  # NFKC makes letters of superscripts
    noise, text = re.findall(NOISE, text), re.sub(NOISE, " ", text)
    text = GERSHAYIM.sub("\u05f4", unicodedata.normalize("NFC", text.upper()))
    unquoted = COLON.sub(" ", QUOTED.sub(r" \1\2 ", text)).translate(APOSTROPHES)
    words = (EDGES.sub("", word) for word in "".join(map(_spelled, unquoted)).split())
    words = (word.strip("'") if word[:1] == word[-1:] == "'" else word for word in words)
    said = unicodedata.normalize("NFC", " ".join(filter(None, words)))
    if dropped is not None:
        dropped.update(noise)
        dropped.update(Counter("".join(text.translate(APOSTROPHES).split())) - Counter(said))
    return said if said == before else normalise(said)  # what is normalised, as what is recognised is, stays as it is


@functools.cache
def _spelled(character):
    """A character in a normalised transcript: itself, nothing where it is invisible, or else a space."""
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    if character in INNER + SYMBOLS + "'" or category == "Sk" and name.startswith("MODIFIER LETTER"):
        return character
    if category == "Cf" and character != "\u200b" or character in ARMENIAN or name.startswith("VARIATION SELECTOR"):
        return ""
    return character if category[0] in "LMN" else " "


def transcript(text, raw_text=False, dropped=None):
    """What is compared of a text, said or recognised: normalised, or (raw_text) as it is, on one line and without |."""
    if not raw_text:
        return normalise(text, dropped)
    return " ".join("".join(" " if c == SPACE or unicodedata.category(c) in ("Cc", "Cs") else c for c in text).split())


def is_name(text):
    """Whether a text can name something on a line of its own: it is not empty, and has no control characters."""
    return bool(text) and not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def vocabulary(texts):
    """The outputs of a recogniser of these normalised transcripts: the blank, the space, and their characters."""
    return [BLANK, SPACE, *sorted(set().union(*texts) - {" "})]


def encode(text, outputs):
    """The outputs for a normalised transcript: (characters,) int64. outputs: {character: output}."""
    return torch.tensor([outputs[SPACE if character == " " else character] for character in text])


MARK = re.compile(r"<.+>|\[.+\]")  # an output that stands for no sound: <pad>, which is CTC's blank, <s>, [UNK]


def decode(outputs, labels):
    """Greedy CTC decoding of the best outputs (frames,) int: without repeats, blanks and marks."""
    best = [labels[output] for output in torch.unique_consecutive(outputs).tolist() if output]
    spelled = [" " if label == SPACE else label for label in best if not MARK.fullmatch(label)]
    return " ".join("".join(spelled).replace("\u2581", " ").split())  # U+2581 begins a word in vocabularies of pieces


def frames_needed(text):
    """The fewest frames in which CTC can align a normalised transcript: a blank must stand between equal characters."""
    return len(text) + sum(a == b for a, b in zip(text, text[1:]))


def edit_distance(reference, hypothesis):
    """Levenshtein distance between two sequences: the fewest insertions, deletions and substitutions."""
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, h in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (r != h))
    return row[-1]


def error_rates(references, hypotheses, characters=True):
    """Edits over reference length, of the whole corpus: of words and, where `characters`, of characters, too."""
    rates, splits = {}, {"word_error_rate": str.split} | ({"character_error_rate": list} if characters else {})
    for name, split in splits.items():
        pairs = [(split(r), split(h)) for r, h in zip(references, hypotheses, strict=True)]
        edits = sum(edit_distance(reference, hypothesis) for reference, hypothesis in pairs)
        rates[name] = edits / max(1, sum(len(reference) for reference, _ in pairs))  # can exceed 1
    return rates


def accuracies(references, hypotheses):
    """Of intents and, where they are SLURP's scenario_action, of its two halves."""
    right = {"intent_accuracy": [h == r for h, r in zip(hypotheses, references)]}
    if all("_" in r for r in references):
        for half, name in ((0, "scenario_accuracy"), (-1, "action_accuracy")):
            right[name] = [h.split("_", 1)[half] == r.split("_", 1)[half] for h, r in zip(hypotheses, references)]
    return {name: sum(values) / len(values) for name, values in right.items()}


# --- Corpora -------------------------------------------------------------------------------------------------------

SPLITS = ("train", "dev", "test")
USUAL = {"train": "train", "dev": "dev", "test": "test"}
SUBSETS = {  # the folders or files that are each split, unless the user names others
    "table": USUAL,
    "SLURP": USUAL | {"dev": "devel"},
    "LibriSpeech": {"train": "train-clean-100", "dev": "dev-clean", "test": "test-clean"},
    "Kaldi": USUAL,
}
TENTH = 10  # of a corpus without a dev split, every tenth speaker of its training split becomes the dev split


def corpus_folder(path):
    """The folder of a corpus, or None for "demo". Raises UserError where there is none."""
    if str(path) == "demo":
        return None
    if not os.path.isdir(path):
        raise UserError(f"{path}: there is no such folder; --data takes a corpus's folder, or demo")
    return Path(path)


def open_corpus(path, task, seed=0, subsets=None, splits=SPLITS, skip_bad=False, raw_text=False):
    """The corpus at `path`, read in its own layout: tables and other manifests, SLURP, LibriSpeech, Kaldi's, or "demo".

    task: "asr" (what is needed is `text`) or "slu" (`intent`). seed: of the demo's training split. raw_text: as for
    `transcript`. subsets: {"train": "train-clean-100,train-clean-360", ...} overrides the names in SUBSETS, joined by
    commas. splits: those that must be there, or without "train" among them one of them; the others stay empty.
    Raises UserError for another layout, for a missing or empty split, and where over 1 % are bad and not `skip_bad`.
    """
    root, subsets = corpus_folder(path), {split: names for split, names in (subsets or {}).items() if names}
    if root is None and subsets:
        raise UserError("the demo corpus has no subsets to choose from")
    if root is None:
        return demo_corpus(task, seed, raw_text)
    kind = layout(root, subsets, splits)
    read = {"table": read_manifest, "SLURP": read_slurp, "LibriSpeech": read_librispeech, "Kaldi": read_kaldi}[kind]
    files = files_of_splits(root, kind, subsets)
    present = {split for split in SPLITS if split in subsets or all(files[split].values())}
    needs_dev = "dev" in splits and "dev" not in present and ("train" in splits or "train" in present)
    wanted = set(splits) - {"dev"} | {"train"} if needs_dev else set(splits)
    if "train" not in splits:
        wanted = wanted & present or wanted
    corpus, dropped = Corpus(kind, skip_bad=skip_bad), Counter()
    for split in sorted(wanted, key=SPLITS.index):
        for name, paths in files[split].items():
            if not paths:
                place = root / (name + {"table": ".tsv", "SLURP": ".jsonl"}.get(kind, ""))
                raise UserError(f"{place}: there is no such {split} subset; name what there is with --{split}")
            for where, row in counted(read(root, paths, task), "looked at %d utterances of %s", name):
                try:
                    getattr(corpus, split).append(checked(where, row, task, corpus.announced, raw_text, dropped))
                except UserError as error:
                    corpus.skip(str(error))
        if not getattr(corpus, split):
            bad = [f"; the first of {len(corpus.skipped)} bad ones: {reason}" for reason in corpus.skipped][:1]
            raise UserError(f"{root}: the {split} split has no usable utterance{''.join(bad)}")
    corpus.size = len(corpus.train) + len(corpus.dev) + len(corpus.test) + len(corpus.skipped)
    corpus.check()
    if needs_dev:
        take_dev(corpus, needed="train" in splits or not corpus.test)
    if task == "asr" and dropped:
        counts = ", ".join(f"{what} ({times})" for what, times in dropped.most_common())
        counts = "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in counts)
        log.info("left out of the transcripts: %s; --raw-text keeps transcripts as they are", counts)
    return corpus


def layout(root, subsets, splits):
    """The kind of the corpus in a folder: that of SUBSETS of which most of the subsets are there that are asked for.

    If there are none, the kind of which there is another one, so that an error can say what is missing.
    """
    found = {kind: files_of_splits(root, kind, subsets) for kind in SUBSETS}
    found = {kind: sum(map(bool, chain(*(files[s].values() for s in splits)))) for kind, files in found.items()}
    if any(found.values()):
        return max(found, key=found.get)
    for kind in reversed(SUBSETS):  # tables last: people have notes of all sorts in such files
        if subset_files(root, kind, "*"):
            return kind
    if (root / "wav.scp").exists():
        raise UserError(f"{root}: is one subset; give the folder around it, and name subsets by --train, --dev, --test")
    layouts = "NAME.tsv, NAME.csv, NAME.jsonl, Kaldi's NAME/wav.scp, LibriSpeech's NAME/SPEAKER/CHAPTER/*.trans.txt"
    raise UserError(f"{root}: is no known corpus; a subset is {layouts} or SLURP's dataset/slurp/NAME.jsonl")


def files_of_splits(root, kind, subsets):
    """{split: {name of a subset: its files}}."""
    names = SUBSETS[kind] | subsets
    if kind == "table" and "dev" not in subsets:
        names["dev"] = next((n for n in ("dev", "validation", "valid", "val") if subset_files(root, kind, n)), "dev")
    return {
        split: {name: subset_files(root, kind, glob.escape(name)) for name in map(str.strip, joined.split(","))}
        for split, joined in names.items()
    }


def subset_files(root, kind, name):
    """The files that make a subset. Of tables, the first is read. name: a pattern; a table's may have its ending."""
    if kind == "Kaldi":
        return listed(root, f"{name}/wav.scp")
    if kind == "LibriSpeech":
        return listed(root, f"{name}/*/*/*.trans.txt")

    def is_slurp(path):
        with open(path, "rb") as file:
            return re.search(rb'"recordings"\s*:', file.read(2**16)) is not None

    if kind == "SLURP":
        return [*filter(is_slurp, listed(root, f"dataset/slurp/{name}.jsonl") + listed(root, f"{name}.jsonl"))]
    endings = [".tsv", ".csv", ".jsonl"] + [".json"] * (name != "*")  # anything may have notes of its own in .json
    paths = listed(root, f"{name}.*") + listed(root, name)
    return [p for ending in endings for p in paths if p.suffix.lower() == ending and not is_slurp(p)]


def listed(folder, pattern):
    """The files in a folder that match a pattern, sorted: no pipes, and no names with a dot first, as macOS leaves."""
    paths = (folder / path for path in sorted(glob.glob(pattern, root_dir=folder)))
    return [path for path in paths if path.is_file()]


def take_dev(corpus, needed):
    """Make every tenth training speaker the dev split; `needed`: UserError where the training split is too small.

    Every tenth utterance instead, where a speaker is not known or those speakers have over half of the training split.
    """
    for what, key in (("speaker", lambda u: u.speaker), ("utterance", lambda u: u.name)):
        taken = set(sorted({key(u) for u in corpus.train})[::TENTH])
        dev, train = ([u for u in corpus.train if (key(u) in taken) == is_dev] for is_dev in (True, False))
        if "" not in map(key, corpus.train) and len(dev) <= len(train):
            corpus.dev, corpus.train = dev, train
            log.info("there is no dev split: every tenth training %s is one, %d utterances", what, len(dev))
            return
    if needed:
        raise UserError("there is no dev split, and the training split is too small to take one from; add one")


def checked(where, row, task, announced, raw_text=False, dropped=None):
    """The Utterance of a reader's row, with its file's length and its `transcript`. Raises UserError where it is bad.

    where: file and line, for errors. row: an Utterance, its audio the paths at which its file may be, or what is wrong
    with the row. announced: a set of the changes of audio that have been logged.
    """
    if isinstance(row, str):
        raise UserError(f"{where} {row}")
    if not is_name(row.name):
        raise UserError(f"{where} has no path, or none that is text")
    path = next(filter(os.path.isfile, row.audio), row.audio[0])  # which has no error for a name that cannot be
    with opened(path, pipes=False) as (sound, _):
        frames, rate, channels = sound.frames, sound.samplerate, sound.channels
    if frames == 0:
        raise UserError(f"{path}: is empty")
    if 0 < row.seconds < frames / rate - 0.5:
        raise UserError(f"{path}: only {row.seconds:g} s of its {frames / rate:g} are meant; cut recordings up")
    change = [f"{rate} Hz, resampled to {SAMPLE_RATE}"] * (rate != SAMPLE_RATE)
    change += [f"{channels} channels, mixed down"] * (channels > 1)
    if change and tuple(change) not in announced:
        announced.add(tuple(change))
        log.info("%s: %s (said once for all such files)", path, "; ".join(change))
    text = transcript(row.text, raw_text, dropped)
    if task == "asr" and not text:
        raise UserError(f"{row.name}: its transcript is empty")
    if task == "slu" and not is_name(row.intent):
        raise UserError(f"{row.name}: its intent is no name")
    return replace(row, audio=path, text=text, seconds=frames / rate)


# The readers take the corpus's folder, the files of a subset and the task, and yield (where, row) as `checked` takes
# them.

AUDIO = (".flac", ".wav", ".mp3", ".ogg", ".opus")  # the endings of LibriSpeech's audio


def read_librispeech(root, files, task):
    """SUBSET/SPEAKER/CHAPTER/ID.flac (or .wav, ...); the texts of a chapter in its .trans.txt, `ID TEXT` a line."""
    if task == "slu":
        raise UserError(f"{root}: LibriSpeech has no intents; use --task asr, or another corpus for --task slu")
    for transcripts in files:
        chapter = transcripts.parent
        audio = {path.stem: path for path in reversed(listed(chapter, "*.*")) if path.suffix.lower() in AUDIO}
        for where, name, text in _pairs(transcripts):
            path = audio.get(name, chapter / f"{name}.flac")
            row = Utterance(name, [path], 0.0, text, speaker=chapter.parent.name)
            yield where, row if Path(name).name == name and name != ".." else "is not `ID TEXT`"


def read_kaldi(root, files, task):
    """SUBSET/wav.scp, `ID PATH` a line, SUBSET/text, `ID TEXT`, SUBSET/utt2spk, and SUBSET/utt2intent or text for it.

    Paths are from the corpus's folder, or from the current one: recipes write them from where they run.
    """
    folder, tables = files[0].parent, {}
    if (folder / "segments").exists():
        raise UserError(f"{folder}: has segments; cut the recordings up, one file an utterance, and leave segments out")
    for file in ("wav.scp", "utt2spk", "text", "utt2intent"):
        tables[file] = {}
        for where, name, value in _pairs(folder / file) if (folder / file).is_file() else ():
            if name in tables[file]:
                yield where, f"has {name} once more"
            tables[file].setdefault(name, value)
    audio, speakers, texts, intents = tables.values()
    needed, file = (texts, "text") if task == "asr" or not intents else (intents, "utt2intent")
    if task == "slu" and not intents:
        log.info("%s: has no utt2intent; the text of an utterance is its intent", folder)
        intents = texts
    for name in sorted(texts.keys() - audio.keys()):
        yield f"{folder / 'wav.scp'}:", f"has no line for {name}"
    for name, value in audio.items():
        where, no_audio = f"{folder / 'wav.scp'}: {name}", re.search(r"\.ark:\d+|\|$|^$", value)
        if no_audio:
            problems = {"": "has no path", "|": "is a command, and no command is run; write its audio to a file"}
            archive = "is in a Kaldi archive, which is not read; write its audio to a file"
            yield where, problems.get(no_audio[0], archive)
        elif name not in needed:
            yield f"{folder / file}:", f"has no line for {name}"
        else:
            paths, more = [root / value, Path(value)], (intents.get(name, ""), speakers.get(name, ""))
            yield where, Utterance(name, paths, 0.0, texts.get(name, ""), *more)


COLUMNS = {  # of a manifest: the names by which a column goes
    "path": ("path", "audio_filepath", "file_name", "filename", "audio_file", "wav_filename", "wav", "audio"),
    "text": ("sentence", "text", "transcription", "transcript"),
    "intent": ("intent",),
    "speaker": ("speaker", "client_id", "speaker_id"),
}


def read_manifest(root, files, task):
    """NAME.tsv, .csv, .jsonl or .json: Common Voice's, NeMo's, pandas'. COLUMNS are read of each row or object.

    Audio is in the corpus's folder, in clips/ in it, beside, or where the path says; Common Voice's once lacked .mp3.
    """
    path, needed = files[0], "text" if task == "asr" else "intent"
    is_json = path.suffix.lower() in (".jsonl", ".json")
    for where, row in _objects(path) if is_json else _rows(path, needed):
        if isinstance(row, str):
            yield where, row
            continue
        plain = {key.lower(): v for key, v in row.items() if type(v) in (str, int, float) and v == v}  # pandas has NaN
        row = {key: str(value).strip() for key, value in plain.items()}
        cells = {what: next((row[key] for key in keys if row.get(key)), "") for what, keys in COLUMNS.items()}
        name = cells.pop("path")
        if any(row.get(key, "").strip("+-0.") for key in ("offset", "start", "start_time")):
            raise UserError(f"{where} is a part of {name}; cut recordings up, one file an utterance")
        if is_name(name) and not cells[needed]:
            yield where, f"has no {needed}, or none that is text"
            continue
        seconds = 0.0
        with contextlib.suppress(ValueError):  # where a manifest has offsets, a first part begins at 0
            seconds = float(row.get("duration", 0) if "offset" in row else 0)
        folders, names = (root, root / "clips", path.parent, Path()), (name, f"{name}.mp3", name.replace("\\", "/"))
        yield where, Utterance(name, [folder / each for each in names for folder in folders], seconds, **cells)


def _rows(path, needed):
    """(where, {column: field}) of each row of a table. Raises UserError where it has no path, or not what is needed."""
    lines, is_tsv = _lines(path) or [("", "")], path.suffix.lower() == ".tsv"
    delimiter = "\t" if is_tsv else next((d for d in ",;\t" if d in lines[0][1]), ",")
    csv.field_size_limit(2**31 - 1)  # pandas writes whole arrays
    reader = csv.reader((line + "\n" for _, line in lines), delimiter=delimiter, strict=True)
    unquoted = [(where, line.rstrip("\r").split("\t")) for where, line in lines]
    try:
        rows = [(lines[reader.line_num - 1][0], fields) for fields in reader]
        # Common Voice's quotation marks are its sentences', and those of two may look like a pair.
        ragged = [len({len(fields) for _, fields in each}) > 1 for each in (rows, unquoted)]
        if is_tsv and (ragged == [True, False] or any("\t" in f and "\n" in f for _, fields in rows for f in fields)):
            rows = unquoted
    except csv.Error as error:
        if not is_tsv:
            raise UserError(f"{lines[reader.line_num - 1][0]} is no CSV ({error})") from error
        rows = unquoted
    columns = [name.strip().lower() for name in rows[0][1]]
    for what in ("path", needed):
        if not set(columns) & set(COLUMNS[what]):
            names, separators = " or ".join(COLUMNS[what]), "tabs" if is_tsv else "commas, semicolons or tabs"
            raise UserError(f"{path}: its first line names no column {names}; columns are separated by {separators}")
    for where, fields in rows[1:]:
        is_long = any(fields[len(columns) :])
        yield where, f"has {len(fields)} fields, more than the first line" if is_long else dict(zip(columns, fields))


def _objects(path):
    """(where, entry) of each line of a file of JSON objects."""
    for where, line in _lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        yield where, entry if isinstance(entry, dict) else "is no JSON object, of which each line has one"


def read_slurp(root, files, task):
    """dataset/slurp/*.jsonl, a sentence a line with its recordings; those in slurp_real/ and slurp_synth/.

    Each recording is an utterance. The class is scenario_action: the field `intent` lacks the scenario on some lines.
    """
    audio = [root / place / kind for kind in ("slurp_real", "slurp_synth") for place in ("", "audio", "scripts/audio")]
    audio = [folder for folder in audio if folder.is_dir()]
    if not audio:
        raise UserError(f"{root}: holds no recordings in slurp_real/, audio/slurp_real/ or scripts/audio/slurp_real/")
    for where, entry in _objects(files[0]):
        try:
            scenario, action, text = (str(entry[key]) for key in ("scenario", "action", "sentence"))
            names = [str(recording["file"]) for recording in entry["recordings"]]
            if not is_name(scenario) or not is_name(action):
                raise ValueError("scenario or action is no name")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            yield where, entry if isinstance(entry, str) else f"is not an annotation of SLURP's ({repr(error)[:200]})"
            continue
        for file in names:
            if Path(file).name != file or not is_name(file):
                yield where, f"names no recording of the corpus: {file[:80]!r}"
            else:
                yield where, Utterance(file, [folder / file for folder in audio], 0.0, text, f"{scenario}_{action}")


def _lines(path):
    """(file and number, line) of each line of a UTF-8 text file that is not blank. Only a newline ends a line."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path}: is not UTF-8 text ({why}); save it as UTF-8") from error
    return [(f"{path}: line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _pairs(path):
    """(where, key, rest) of each line of a text file of keys with something behind them, separated by white space."""
    for where, line in _lines(path):
        key, *rest = line.split(None, 1)
        yield where, key, rest[0].strip() if rest else ""


# --- Audio ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path, pipes=True):
    """A soundfile.SoundFile, recognised by what is in the file and not by its name, and the file that it reads.

    pipes: whether it may be a pipe or a device, which is read to its end. Raises UserError where it is missing, not
    audio, or promises more than can be speech; also for what goes wrong in the context with it.
    """
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
        if not is_file and not pipes:
            raise UserError(f"{path}: is no regular file")
        with open(path, "rb") as source:
            file = source if is_file else io.BytesIO(source.read())
            # A descriptor is a third faster, and nothing is printed of damaged files. Windows' are a C runtime's own.
            with soundfile.SoundFile(file.fileno() if is_file and os.name == "posix" else file, closefd=False) as sound:
                if not 1_000 <= sound.samplerate <= 1_000_000 or sound.channels > 1_000:
                    raise UserError(f"{path}: {sound.samplerate} Hz, {sound.channels} channels: no recording of speech")
                if sound.frames == 2**63 - 1:
                    raise UserError(f"{path}: its header does not say how long it is; convert it to a file that does")
                if sound.frames > LONGEST * sound.samplerate:
                    raise UserError(f"{path}: is longer than {LONGEST} s; cut it up")
                yield sound, file
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing") from error
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        why = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
        raise UserError(f"{path}: is not readable audio ({why})") from error


def read_audio(path):
    """The whole file as float32 samples at 16 kHz, mono: (samples,). Other rates are resampled, channels averaged.

    Raises UserError where it is missing, truncated, empty, not audio, or holds a value that is not finite.
    """
    with opened(path) as (sound, file):
        pieces = []  # since a header may promise what the file does not hold, and some files cannot be sought in
        while len(piece := sound.read(2**20, dtype="float32", always_2d=True)):
            pieces.append(piece.mean(axis=1))
        if not pieces:
            raise UserError(f"{path}: is empty, or says so in its header")
        samples = np.concatenate(pieces)
        if len(samples) < sound.frames or is_truncated(sound, file, path):
            raise UserError(f"{path}: is truncated")
        if not np.isfinite(samples).all():
            raise UserError(f"{path}: holds values that are not finite")
        padded = sound.subtype == "GSM610" and "chunk seems to be truncated" in sound.extra_info  # see is_truncated
        return resample(samples[: -320 if padded else None], sound.samplerate)


def is_truncated(sound, file, path):
    """Whether a file that has been read is only the beginning of one. Raises UserError where not all of it was read."""
    # libsndfile notes a size that the file does not hold; one of 2 GB and more says that a pipe's writer did not know.
    pattern = r"^ *(?:data|SSND|BODY|Data Size|riff|Riff size) *: +(\d+) \(should be (\d+)\)"
    sizes = [map(int, found) for found in re.findall(pattern, sound.extra_info, re.MULTILINE)]
    # A chunk "seems" so that is not of whole blocks: libsndfile takes the byte behind an odd number of GSM's for one.
    remarks = re.search("(?<!chunk seems to be )truncated|lacks an end-of-stream|after the last page", sound.extra_info)
    if remarks or any(real < said < 2**31 - 2**16 for said, real in sizes):
        return True
    read, size, _ = file.tell(), file.seek(0, os.SEEK_END), file.seek(0)
    promised = re.search(rb"sample_count -i (\d+)", file.read(1024)) if sound.format == "NIST" else None
    if sound.format in ("MP3", "OGG") and read < 0.9 * size:  # of a variable rate without a header, or chained
        raise UserError(f"{path}: holds more than libsndfile reads of it; convert it to wav or flac")
    return promised is not None and sound.frames < int(promised[1])


def resample(samples, rate):
    """Band-limited resampling to 16 kHz of (samples,) float32: its spectrum is cut, or extended by zeros."""
    if rate == SAMPLE_RATE:
        return samples
    ratio = Fraction(rate).limit_denominator(SAMPLE_RATE) / SAMPLE_RATE
    # With zeros behind the samples both lengths are products of 2, 3 and 5: a prime's FFT takes ten times longer.
    needed, odd = math.ceil(len(samples) / ratio.numerator), [3**i * 5**j for i in range(5) for j in range(4)]
    length = min(o << (math.ceil(needed / o) - 1).bit_length() for o in odd)
    spectrum = np.fft.rfft(samples, length * ratio.numerator)
    count = max(1, round(len(samples) / ratio))
    return (np.fft.irfft(spectrum, length * ratio.denominator)[:count] / float(ratio)).astype(np.float32)


def waveform(utterance):
    """The samples of an utterance, normalised to zero mean and unit variance: (samples,) float32."""
    samples = utterance.audio if isinstance(utterance.audio, np.ndarray) else read_audio(utterance.audio)
    samples = resample(samples, SAMPLE_RATE * utterance.speed)
    return (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)


# --- The demo corpus: a source-filter synthesiser ------------------------------------------------------------------
#
# A glottal pulse train and noise (the sources) pass through three formant resonances (the filter), frame by frame;
# targets of neighbouring phones are smoothed into each other. It is no match for a recording, nor meant to be: it has
# voices, coarticulation, tempo and noise to generalise over, and needs no file.

# phone: milliseconds, loudness of the voice, loudness of the noise, frequencies in Hz of the formants. Vowels: Peterson
# and Barney 1952, table II, men. Consonants: round values that are usual in formant synthesis (Klatt 1980).
PHONES = {
    "i": (130, 1, 0, 270, 2290, 3010), "I": (90, 1, 0, 390, 1990, 2550), "E": (100, 1, 0, 530, 1840, 2480),
    "A": (120, 1, 0, 660, 1720, 2410), "a": (120, 1, 0, 730, 1090, 2440), "O": (130, 1, 0, 570, 840, 2410),
    "U": (90, 1, 0, 440, 1020, 2240), "u": (130, 1, 0, 300, 870, 2240), "V": (90, 1, 0, 640, 1190, 2390),
    "R": (120, 1, 0, 490, 1350, 1690), "m": (80, 0.4, 0, 250, 1000, 2200), "n": (80, 0.4, 0, 250, 1500, 2600),
    "l": (70, 0.6, 0, 360, 1300, 2700), "r": (70, 0.6, 0, 310, 1060, 1380), "w": (70, 0.6, 0, 290, 610, 2150),
    "y": (60, 0.6, 0, 260, 2070, 3020), "s": (110, 0, 0.5, 4500, 5500, 6500), "f": (100, 0, 0.2, 1400, 4000, 7000),
    "T": (100, 0, 0.2, 1600, 5000, 6800), "z": (90, 0.3, 0.3, 300, 5000, 6200), "v": (70, 0.4, 0.1, 300, 1300, 2300),
    "D": (60, 0.4, 0.1, 300, 1600, 2600), "p": (20, 0, 0.6, 700, 1100, 2200), "t": (20, 0, 0.7, 3000, 4000, 5200),
    "k": (30, 0, 0.7, 1200, 1800, 2600), "b": (20, 0.5, 0.3, 300, 900, 2200), "d": (20, 0.5, 0.4, 300, 1700, 2700),
    "_": (50, 0, 0, 500, 1500, 2500),
}  # fmt: skip

# Each stop has the silence of its closure before it.
WORDS = dict(pair.split(":") for pair in (
    "zero:zIrO one:wVn two:_tu three:Tri four:fOr five:faIv six:sI_ks seven:sEvVn eight:EI_t nine:naIn a:V "
    "alarm:Vlarm an:An any:Eni at:A_t coffee:_kOfi email:imEIl for:fOr in:In is:Iz it:I_t lights:laI_ts louder:laU_dR "
    "make:mEI_k me:mi music:myuzI_k my:maI new:nu now:naU off:Of play:_plEI rain:rEIn read:ri_d room:rum set:sE_t "
    "some:sVm stop:s_ta_p the:DV time:_taIm turn:_tRn up:V_p wake:wEI_k weather:wEDR what:wV_t will:wIl "
).split())  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Intents named as SLURP names them, scenario_action; # is any digit.
SENTENCES = {
    "alarm_set": ("set an alarm for #", "alarm for #", "wake me up at #"),
    "audio_volume_up": ("louder", "make it louder", "turn it up"),
    "datetime_query": ("what time is it", "what is the time", "time now"),
    "email_query": ("any new email", "read my email", "email"),
    "iot_coffee": ("make some coffee", "a coffee", "coffee now"),
    "iot_hue_lightoff": ("lights off", "turn the lights off", "lights off in room #"),
    "play_music": ("play some music", "play music", "music"),
    "weather_query": ("what is the weather", "weather now", "will it rain"),
}
ASR_WORDS = (*DIGITS, "alarm", "lights", "music", "play", "stop", "weather")
DEMO_SIZES = {"train": 800, "dev": 100, "test": 200}  # utterances


def synthesise(words, rng):
    """One utterance of these words in a voice of its own: (samples,) float32, 16 kHz. rng: numpy Generator."""
    hop, window = 160, 320  # 10 ms, 20 ms
    pitch, tract, tempo = np.exp(rng.uniform(np.log(90), np.log(240))), rng.uniform(0.85, 1.2), rng.uniform(0.8, 1.2)
    phones = ["_", "_"] + [phone for word in words for phone in WORDS[word] + "_"] + ["_"]
    targets = np.array([PHONES[phone] for phone in phones])
    durations = targets[:, 0] * tempo * rng.uniform(0.85, 1.15, len(phones)) / 1000
    durations = np.maximum(1, np.rint(durations * SAMPLE_RATE / hop)).astype(int)
    tracks = np.repeat(targets[:, 1:] * np.exp(rng.normal(0, 0.03, (len(phones), 5))), durations, axis=0)
    smooth = np.hanning(5) / np.hanning(5).sum()  # over 30 ms
    tracks = np.stack([np.convolve(np.pad(t, 2, mode="edge"), smooth, "valid") for t in tracks.T])
    voice, noise, formants = tracks[0], tracks[1], tracks[2:] * tract
    frames, samples = len(voice), len(voice) * hop + window
    vibrato = np.sin(2 * np.pi * rng.uniform(2, 5) * np.arange(samples) / SAMPLE_RATE)
    contour = pitch * (1.1 - 0.25 * np.linspace(0, 1, samples)) * (1 + 0.03 * vibrato)
    pulses = np.diff(np.floor(np.cumsum(contour) / SAMPLE_RATE), prepend=0) * np.sqrt(SAMPLE_RATE / pitch)
    breath = rng.standard_normal(samples)

    frequency = np.fft.rfftfreq(512, 1 / SAMPLE_RATE)
    bandwidth = np.array([80, 120, 160])[:, None, None] * rng.uniform(0.8, 1.3)
    resonances = 1 / (1 + ((frequency - formants[..., None]) / bandwidth) ** 2)
    envelope = (np.array([1, 0.6, 0.3])[:, None, None] * resonances).sum(0) + 0.003
    cut = np.arange(frames)[:, None] * hop + np.arange(window)
    sources = ((pulses, voice), (breath, noise))
    spectrum = sum(np.fft.rfft(s[cut] * np.hanning(window), 512) * loudness[:, None] for s, loudness in sources)
    pieces = np.fft.irfft(spectrum * envelope, 512)
    signal = np.zeros(frames * hop + 512)
    for start, piece in zip(range(0, frames * hop, hop), pieces):
        signal[start : start + 512] += piece
    signal += signal.std() * rng.uniform(0.01, 0.05) * rng.standard_normal(len(signal))
    return (signal / np.abs(signal).max() * 0.5).astype(np.float32)


def demo_corpus(task, seed, raw_text=False):
    """Strings of one to four words for asr, commands with an intent for slu. seed: of the training split alone."""
    corpus = Corpus("demo", size=sum(DEMO_SIZES.values()))
    for number, (split, size) in enumerate(DEMO_SIZES.items()):
        rng = np.random.default_rng([seed if split == "train" else 0, number])
        for i in range(size):
            intent, words = "", rng.choice(ASR_WORDS, rng.integers(1, 5)) if task == "asr" else ()
            if task == "slu":
                intent = list(SENTENCES)[i % len(SENTENCES)]
                words = [rng.choice(DIGITS) if word == "#" else word for word in rng.choice(SENTENCES[intent]).split()]
            samples, text = synthesise(words, rng), transcript(" ".join(words), raw_text)
            name, seconds = f"demo-{split}-{i:04}", len(samples) / SAMPLE_RATE
            getattr(corpus, split).append(Utterance(name, samples, seconds, text, intent))
    return corpus
