"""Corpora, audio, batches, vocabulary and error rates.

A corpus is three lists of `Utterance`, read in the layout in which its users have it and recognised by that layout; see
`open_corpus`. The demo corpus is synthesised: see the end of this file. Audio is 16 kHz mono float32 everywhere.
"""

import json
import logging
import math
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch

log = logging.getLogger("sslprune")

SAMPLE_RATE = 16_000  # Hz; flops.py has it too, since neither imports the other
LONGEST = 3600  # s of a file: attention takes the square of its length, and an hour takes an hour of a processor
FILTER = (0, 150, 300, 600, 1200, 2400, 4800, 8000)  # Hz: the corners of random filters, an octave apart
SPEED_STEPS = 40  # random speeds are multiples of a fortieth, since the FFT takes ten times as long for an arbitrary ratio
JITTER = 0.1  # of the lengths by which batches are formed
BAD_SHARE = 0.01  # of a corpus: with more bad utterances than this something is wrong with all of it


class DataError(ValueError):
    """Input that cannot be used. The message names the file and the reason."""


@dataclass(frozen=True)
class Utterance:
    """A piece of speech: its audio is its `sources`, joined; each a file, or the samples themselves (float32, 16 kHz)."""

    name: str
    sources: tuple
    seconds: float
    text: str = ""
    intent: str = ""  # scenario_action, where the scenario has no "_" of its own
    speed: float = 1.0  # the audio is played so many times as fast; `seconds` is what it then takes
    gains: tuple = ()  # in dB at FILTER's frequencies, of a filter that it passes through; none: no filter


@dataclass
class Corpus:
    """What `open_corpus` returns. `train` is a function from a seed (int) to the utterances of one epoch."""

    kind: str
    train: Callable = lambda epoch_seed: []
    dev: list = field(default_factory=list)
    test: list = field(default_factory=list)
    unseen: list = field(default_factory=list)  # of a speaker who is in no other split
    size: int = 0  # utterances, the skipped ones among them
    headers: dict = field(default_factory=dict)  # of the files; see `header`
    skip_bad: bool = False
    skipped: dict = field(default_factory=dict)  # the reasons, each with its file, in order; the values mean nothing

    def skip(self, reason):
        """Leave something out, for a reason that names it. What it quotes may come from any file, and goes to a terminal."""
        reason = "".join(c if c.isprintable() else "?" for c in reason)
        if reason not in self.skipped:
            self.skipped[reason] = True
            if len(self.skipped) <= 20:  # all of them are in the report
                log.warning("skipped: %s", reason)

    def check(self):
        """Raise DataError where too many utterances are bad."""
        if len(self.skipped) > BAD_SHARE * self.size and not self.skip_bad:
            one = next(iter(self.skipped))
            raise DataError(f"{len(self.skipped)} of {self.size} utterances are unusable: mend them, or give --skip-bad. One: {one}")


# --- Audio -------------------------------------------------------------------------------------------------------------


def read_audio(path):
    """The whole file as float32 samples at 16 kHz, mono: (samples,). Other rates are resampled, channels averaged.

    Raises DataError where it is missing, truncated, empty, not audio, or holds a value that is not finite.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate, promised = file.samplerate, file.frames
            check_length(path, promised, rate, file.channels)
            # Piece by piece, since a header may promise what the file does not hold.
            pieces = [piece.mean(axis=1) for piece in file.blocks(2**20, dtype="float32", always_2d=True)]
            samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
            shortened = re.search(r"should be|truncated", file.extra_info, re.IGNORECASE)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: {_why_unreadable(path, error)}") from error
    if not len(samples):
        raise DataError(f"{path}: is empty")
    if len(samples) < promised or shortened:
        raise DataError(f"{path}: is truncated")
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: holds values that are not finite")
    return resample(samples, rate)


def check_length(path, frames, rate, channels):
    """Raise DataError for a header that promises more than can be speech, before anything is allocated for it."""
    if not 1_000 <= rate <= 1_000_000 or channels > 1_000:
        raise DataError(f"{path}: {rate} Hz with {channels} channels is no recording of speech")
    if frames > LONGEST * rate:
        raise DataError(f"{path}: is longer than {LONGEST} s; cut it up")


def _why_unreadable(path, error):
    if not Path(path).exists():
        return "is missing"
    return f"is not readable audio ({getattr(error, 'error_string', error)})"


def resample(samples, rate, gains=()):
    """Band-limited resampling to 16 kHz of (samples,) float32, in the frequency domain: its spectrum is cut or extended by zeros.

    gains: in dB, at the frequencies of FILTER, of a filter to pass through on the way.
    """
    if rate == SAMPLE_RATE and not gains:
        return samples
    ratio = Fraction(rate).limit_denominator(SAMPLE_RATE) / SAMPLE_RATE
    # Zeros behind the samples make both lengths products of small numbers, for which the FFT is ten times as fast as for a prime.
    length = fast_length(math.ceil(len(samples) / ratio.numerator))
    spectrum = np.fft.rfft(samples, length * ratio.numerator)
    if gains:
        frequencies = np.arange(len(spectrum)) * (SAMPLE_RATE / (length * ratio.denominator))
        spectrum *= 10 ** (np.interp(frequencies, FILTER, gains) / 20)
    count = max(1, round(len(samples) / ratio))
    return (np.fft.irfft(spectrum, length * ratio.denominator)[:count] / float(ratio)).astype(np.float32)


def fast_length(length):
    """The smallest product of powers of 2, 3 and 5 that is at least `length`."""
    odd = [3**i * 5**j for i in range(5) for j in range(4)]
    return min(o << (math.ceil(length / o) - 1).bit_length() for o in odd)


def waveform(utterance):
    """The samples of an utterance, normalised to zero mean and unit variance: (samples,) float32."""
    parts = [source if isinstance(source, np.ndarray) else read_audio(source) for source in utterance.sources]
    samples = resample(np.concatenate(parts), SAMPLE_RATE * utterance.speed, utterance.gains)
    return (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)


def pad(waveforms):
    """Arrays of different length -> (batch, samples) float32 with zeros behind each, and lengths (batch,) int64."""
    lengths = torch.tensor([len(w) for w in waveforms])
    padded = torch.zeros(len(waveforms), int(lengths.max()))
    for row, w in zip(padded, waveforms):
        row[: len(w)] = torch.from_numpy(w)
    return padded, lengths


def perturb_speed(utterances, share, rng):
    """The utterances at random speeds from 1 - share to 1 + share, their pitch and formants with them: more voices than there are.

    (Ko et al. 2015, "Audio Augmentation for Speech Recognition", with the three speeds 0.9, 1.0 and 1.1.) In whole steps of
    1 / SPEED_STEPS. rng: numpy Generator.
    """
    steps = int(share * SPEED_STEPS + 1e-9)
    speeds = (1 + rng.integers(-steps, steps + 1, len(utterances)) / SPEED_STEPS).tolist()
    return [replace(u, speed=speed, seconds=u.seconds / speed) for u, speed in zip(utterances, speeds)]


def filter_randomly(utterances, decibels, rng):
    """The utterances through random filters, as other microphones and rooms have: independent normal gains at the frequencies of FILTER.

    decibels: their standard deviation. rng: numpy Generator.
    """
    return [replace(u, gains=tuple(gains)) for u, gains in zip(utterances, rng.normal(0, decibels, (len(utterances), len(FILTER))).tolist())]


# --- Batches -----------------------------------------------------------------------------------------------------------


def batches(utterances, seconds, rng=None):
    """Lists of utterances of like length that fill at most `seconds` of audio, padding included; a longer one stands alone.

    With `rng` (numpy Generator) the batches differ each time and come in random order; else they are fixed, longest first.
    """
    jitter = rng.uniform(1 - JITTER, 1 + JITTER, len(utterances)) if rng else np.ones(len(utterances))
    order = np.argsort([-u.seconds * j for u, j in zip(utterances, jitter)], kind="stable")
    found, longest = [], 0.0
    for utterance in (utterances[i] for i in order):
        longest = max(longest, utterance.seconds)
        if not found or longest * (len(found[-1]) + 1) > seconds:
            found.append([])
            longest = utterance.seconds
        found[-1].append(utterance)
    if rng:
        rng.shuffle(found)
    return found


class Loader(torch.utils.data.Dataset):
    """Batches with their audio, for torch.utils.data.DataLoader(..., batch_size=None).

    An item is (utterances, waveforms (batch, samples) float32, lengths (batch,) int64, bad): what could not be read is left out,
    and `bad` has the reasons. Where nothing is left, utterances is empty and the tensors are None.
    """

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        kept, waveforms, bad = [], [], []
        for utterance in self.batches[index]:
            try:
                waveforms.append(waveform(utterance))
                kept.append(utterance)
            except DataError as error:
                bad.append(str(error))
        return kept, *(pad(waveforms) if kept else (None, None)), bad


# --- Text and errors ---------------------------------------------------------------------------------------------------

# wav2vec2's characters, in the order of its output units; the first is CTC's blank as well as padding, "|" is between words.
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
INDEX = {character: index for index, character in enumerate(VOCABULARY)}


def normalise(text):
    """A transcript in the vocabulary's characters: upper case, without accents, and with a space for anything else."""
    text = unicodedata.normalize("NFKD", text.upper()).replace("\u2019", "'")
    text = "".join(character for character in text if not unicodedata.combining(character))
    return " ".join("".join(c if c in INDEX else " " for c in text).split())


def encode(text):
    """Output units of a normalised transcript: (characters,) int64."""
    return torch.tensor([INDEX["|" if character == " " else character] for character in text], dtype=torch.int64)


def decode(units):
    """Greedy CTC decoding: repeats collapsed, blanks removed. units: (frames,) int -> transcript."""
    units = torch.unique_consecutive(units).tolist()
    return " ".join("".join(VOCABULARY[u] for u in units if u > INDEX["<unk>"]).replace("|", " ").split())


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


def error_rate(references, hypotheses, split=str.split):
    """Edits over reference length, of a whole corpus: of words, or of characters with split=list. A fraction, which can exceed 1."""
    edits = sum(edit_distance(split(r), split(h)) for r, h in zip(references, hypotheses, strict=True))
    return edits / max(1, sum(len(split(r)) for r in references))


# --- Corpora -----------------------------------------------------------------------------------------------------------

SUBSETS = {  # the folders (LibriSpeech) or annotation files (SLURP) of each split, unless the user names others
    "LibriSpeech": {"train": "train-clean-100", "dev": "dev-clean", "test": "test-clean"},
    "SLURP": {"train": "train", "dev": "devel", "test": "test"},
}


def open_corpus(path, task, seed=0, subsets=None, splits=("train", "dev", "test"), skip_bad=False, headers=None, hold_out=None):
    """The corpus at `path`, read in its own layout: LibriSpeech, SLURP, Free Spoken Digit Dataset, or "demo".

    task: "asr" (what is needed is `text`) or "slu" (`intent`). seed: of the training split where it is composed (digits, demo).
    splits: those that must be there.
    subsets: {"train": "train-clean-100,train-clean-360", ...} overrides the names of the folders or annotation files, joined
    by commas. Bad utterances are left out, and named in `skipped`. headers: what `header` is to remember, as an earlier run found it.
    hold_out: a speaker of the digits corpus, all of whose recordings are the split "unseen", and in no other.
    Raises DataError where the layout is none of these, a split is missing or empty, or over 1 % are bad and not `skip_bad`.
    """
    subsets = {split: names for split, names in (subsets or {}).items() if names}
    if path in (None, "demo"):
        if hold_out:
            raise DataError("--hold-out takes a speaker of the Free Spoken Digit Dataset; the demo corpus has a new voice in each utterance")
        if subsets:
            raise DataError("the demo corpus has no subsets to choose from")
        return demo_corpus(task, seed)
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; --data takes a corpus's folder, or demo")
    if (root / "recordings").is_dir():
        kind, read = "digits", read_digits
    elif next(root.glob("*/*/*/*.trans.txt"), None):
        kind, read = "LibriSpeech", read_librispeech
    elif _slurp_annotations(root):
        kind, read = "SLURP", read_slurp
    else:
        raise DataError(
            f"{root}: is no known corpus; LibriSpeech has SUBSET/SPEAKER/CHAPTER/*.trans.txt, SLURP dataset/slurp/*.jsonl,"
            " the Free Spoken Digit Dataset recordings/*.wav"
        )
    if kind == "LibriSpeech" and task == "slu":
        raise DataError(f"{root}: LibriSpeech has no intents; use --task asr, or SLURP for --task slu")
    if kind == "digits" and subsets:
        raise DataError(f"{root}: the digits corpus is split by take; it has no subsets to choose from")
    if hold_out:
        if kind != "digits":
            raise DataError(f"--hold-out takes a speaker of the Free Spoken Digit Dataset; {kind} has other speakers in dev and test than in train")
        speakers = sorted({speaker(recording) for recording in read_digits(root, "unseen", {}, skip=None)})
        if hold_out not in speakers:
            raise DataError(f"--hold-out {hold_out}: is no speaker of {root}, which has {', '.join(speakers)}")
        splits = (*splits, "unseen")
    corpus, found, said = Corpus(kind, skip_bad=skip_bad, headers={} if headers is None else headers), {}, set()
    for split in splits:
        found[split] = []
        for utterance in read(root, split, SUBSETS.get(kind, {}) | subsets, corpus.skip):
            if hold_out and (speaker(utterance) == hold_out) != (split == "unseen"):
                continue
            try:
                found[split].append(_checked(utterance, task, corpus.headers, said))
            except DataError as error:
                corpus.skip(str(error))
        if not found[split]:
            reason = f"; the first of {len(corpus.skipped)} bad ones: {next(iter(corpus.skipped))}" if corpus.skipped else ""
            raise DataError(f"{root}: the {split} split has no usable utterance{reason}")
    corpus.size = sum(map(len, found.values())) + len(corpus.skipped)
    corpus.check()
    if kind == "digits" and task == "asr":
        corpus.train = lambda epoch_seed: digit_strings(found["train"], np.random.default_rng([seed, 0, epoch_seed]))
        rngs = {split: np.random.default_rng([0, number]) for number, split in enumerate(("dev", "test", "unseen"), 1)}
        composed = {split: digit_strings(found[split], rngs[split], times=EVALUATED) for split in found if split != "train"}
    else:
        composed = found
        corpus.train = lambda epoch_seed: found["train"]
    corpus.dev, corpus.test, corpus.unseen = (composed.get(split, []) for split in ("dev", "test", "unseen"))
    return corpus


def header(path, known):
    """Frames, sampling rate and channels of an audio file. known: {path: [size, time of change, frames, rate, channels]}, kept up."""
    try:
        status = os.stat(path)
        entry = known.get(str(path), [])
        if entry[:2] != [status.st_size, status.st_mtime_ns]:
            info = soundfile.info(path)
            entry = known[str(path)] = [status.st_size, status.st_mtime_ns, info.frames, info.samplerate, info.channels]
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: {_why_unreadable(path, error)}") from error
    return entry[2:]


def read_headers(path):
    """What `header` knows, from the file in which a run keeps it."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not all(len(entry) == 5 and all(type(number) is int for number in entry) for entry in known.values()):
            raise ValueError("not headers")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is damaged; remove it, and the headers are read again") from error
    return known


def _checked(utterance, task, headers, said):
    """The utterance with its length from the header of its file, and its transcript normalised. Raises DataError.

    said: a set, of what has been logged and is not to be logged again.
    """
    (path,) = utterance.sources
    frames, rate, channels = header(path, headers)
    if frames == 0:
        raise DataError(f"{path}: is empty")
    check_length(path, frames, rate, channels)
    change = [f"{rate} Hz, resampled to {SAMPLE_RATE}"] * (rate != SAMPLE_RATE)
    change += [f"{channels} channels, mixed down"] * (channels > 1)
    if change and tuple(change) not in said:
        said.add(tuple(change))
        log.info("%s: %s (said once for all such files)", path, "; ".join(change))
    text = normalise(utterance.text)
    if task == "asr" and not text:
        raise DataError(f"{utterance.name}: its transcript is empty")
    return replace(utterance, text=text, seconds=frames / rate)


def read_librispeech(root, split, subsets, skip):
    """SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac; the texts of a chapter in its .trans.txt, `ID TEXT` a line."""
    for subset in subsets[split].split(","):
        if not (root / subset).is_dir():
            raise DataError(f"{root / subset}: there is no such folder; name the {split} subsets with --{split}")
        for transcripts in sorted((root / subset).glob("*/*/*.trans.txt")):
            for number, line in _lines(transcripts):
                name, _, text = line.partition(" ")
                if re.fullmatch(r"[\w-]+", name):
                    yield Utterance(name, (transcripts.parent / f"{name}.flac",), 0.0, text)
                else:
                    skip(f"{transcripts}: line {number} is not `ID TEXT`")


def _slurp_annotations(root):
    return next((folder for folder in (root / "dataset" / "slurp", root) if next(folder.glob("*.jsonl"), None)), None)


def read_slurp(root, split, subsets, skip):
    """dataset/slurp/*.jsonl, a sentence a line with its recordings; those in slurp_real/ and slurp_synth/.

    Each recording is an utterance. The class is scenario_action: the field `intent` lacks the scenario on some lines.
    """
    annotations = _slurp_annotations(root)
    audio = [folder / kind for kind in ("slurp_real", "slurp_synth") for folder in (root, root / "audio", root / "scripts" / "audio")]
    audio = [folder for folder in audio if folder.is_dir()]
    if not audio:
        raise DataError(f"{root}: holds no slurp_real/ with SLURP's recordings, nor audio/slurp_real/ or scripts/audio/slurp_real/")
    for subset in subsets[split].split(","):
        path = annotations / f"{subset}.jsonl"
        if not path.is_file():
            raise DataError(f"{path}: there is no such file; name the {split} annotations with --{split}")
        for number, line in _lines(path):
            try:
                entry = json.loads(line)
                scenario, action, text = (str(entry[key]) for key in ("scenario", "action", "sentence"))
                files = [str(recording["file"]) for recording in entry["recordings"]]
                if not (scenario and action and f"{scenario}{action}".isprintable()):
                    raise ValueError("scenario or action is no name")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                skip(f"{path}: line {number} is not an annotation of SLURP's ({repr(error)[:200]})")
                continue
            for file in files:
                if Path(file).name != file or not file.isprintable() or len(file.encode()) > 255:
                    skip(f"{path}: line {number} names no recording of the corpus: {file[:80]!r}")
                    continue
                place = next((folder / file for folder in audio if (folder / file).is_file()), audio[0] / file)
                yield Utterance(file, (place,), 0.0, text, f"{scenario}_{action}")


def read_digits(root, split, subsets, skip):
    """recordings/{digit}_{speaker}_{take}.wav of the Free Spoken Digit Dataset: takes 0-4 test, 5-9 dev, the rest training."""
    takes = {"test": range(5), "dev": range(5, 10), "train": range(10, 1_000_000), "unseen": range(1_000_000)}[split]
    for path in sorted((root / "recordings").glob("*.wav")):
        match = re.fullmatch(r"(\d)_(\w+)_(\d{1,6})", path.stem)
        if match and int(match[3]) in takes:
            digit = DIGITS[int(match[1])]
            yield Utterance(path.stem, (path,), 0.0, digit, digit)
        elif not match and split == "train":  # name it once
            skip(f"{path}: is not named DIGIT_SPEAKER_TAKE.wav")


def speaker(recording):
    """Of an utterance of `read_digits`."""
    return recording.name.split("_", 1)[1].rsplit("_", 1)[0]


PAUSE = np.zeros(SAMPLE_RATE // 10, np.float32)  # between the digits of a string
EVALUATED = 4  # strings that each recording is in where it is evaluated: the error of one such set is 2 points off another's


def digit_strings(recordings, rng, times=1):
    """Strings of two to five digits of one speaker (its last may be shorter); each recording is in so many of them as `times` says."""
    strings = []
    for name in sorted({speaker(r) for r in recordings}) * times:
        own = [r for r in recordings if speaker(r) == name]
        order = rng.permutation(len(own)).tolist()
        while order:
            chosen = [own[order.pop()] for _ in range(min(len(order), rng.integers(2, 6)))]
            sources = [source for r in chosen for source in (PAUSE, *r.sources)][1:]
            seconds = sum(r.seconds for r in chosen) + len(PAUSE) / SAMPLE_RATE * (len(chosen) - 1)
            name = "+".join(r.name for r in chosen)
            strings.append(Utterance(name, tuple(sources), seconds, " ".join(r.text for r in chosen)))
    return strings


def _lines(path):
    """(number, line) of each line of a UTF-8 text file that is not blank. Nothing but a newline ends a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


# --- The demo corpus: a source-filter synthesiser -------------------------------------------------------------------------
#
# A glottal pulse train and noise (the sources) pass through four formant resonances (the filter), frame by frame; targets of
# neighbouring phones are smoothed into each other. It is no match for a recording, and is not meant to be: it has voices,
# coarticulation, tempo and noise to generalise over, and needs no file.

# phone: milliseconds, loudness of the voice, loudness of the noise, frequencies in Hz of the formants. Vowels: Peterson and
# Barney 1952, table II, men. Consonants: round values that are usual in formant synthesis (Klatt 1980).
PHONES = {
    "i": (130, 1.0, 0.0, 270, 2290, 3010), "I": (90, 1.0, 0.0, 390, 1990, 2550), "E": (100, 1.0, 0.0, 530, 1840, 2480),
    "A": (120, 1.0, 0.0, 660, 1720, 2410), "a": (120, 1.0, 0.0, 730, 1090, 2440), "O": (130, 1.0, 0.0, 570, 840, 2410),
    "U": (90, 1.0, 0.0, 440, 1020, 2240), "u": (130, 1.0, 0.0, 300, 870, 2240), "V": (90, 1.0, 0.0, 640, 1190, 2390),
    "R": (120, 1.0, 0.0, 490, 1350, 1690), "m": (80, 0.4, 0.0, 250, 1000, 2200), "n": (80, 0.4, 0.0, 250, 1500, 2600),
    "G": (80, 0.4, 0.0, 250, 2000, 2800), "l": (70, 0.6, 0.0, 360, 1300, 2700), "r": (70, 0.6, 0.0, 310, 1060, 1380),
    "w": (70, 0.6, 0.0, 290, 610, 2150), "y": (60, 0.6, 0.0, 260, 2070, 3020), "h": (60, 0.0, 0.2, 500, 1500, 2500),
    "s": (110, 0.0, 0.5, 4500, 5500, 6500), "S": (110, 0.0, 0.5, 2200, 2900, 3800), "f": (100, 0.0, 0.2, 1400, 4000, 7000),
    "T": (100, 0.0, 0.2, 1600, 5000, 6800), "z": (90, 0.3, 0.3, 300, 5000, 6200), "v": (70, 0.4, 0.1, 300, 1300, 2300),
    "D": (60, 0.4, 0.1, 300, 1600, 2600), "p": (20, 0.0, 0.6, 700, 1100, 2200), "t": (20, 0.0, 0.7, 3000, 4000, 5200),
    "k": (30, 0.0, 0.7, 1200, 1800, 2600), "b": (20, 0.5, 0.3, 300, 900, 2200), "d": (20, 0.5, 0.4, 300, 1700, 2700),
    "g": (30, 0.5, 0.4, 300, 1600, 2000), "j": (70, 0.2, 0.4, 300, 2200, 3000), "_": (50, 0.0, 0.0, 500, 1500, 2500),
}  # fmt: skip

# Each stop has the silence of its closure before it.
WORDS = {
    "zero": "zIrO", "one": "wVn", "two": "_tu", "three": "Tri", "four": "fOr", "five": "faIv", "six": "sI_ks", "seven": "sEvVn",
    "eight": "EI_t", "nine": "naIn", "a": "V", "alarm": "Vlarm", "an": "An", "any": "Eni", "at": "A_t", "coffee": "_kOfi",
    "email": "imEIl", "for": "fOr", "in": "In", "is": "Iz", "it": "I_t", "lights": "laI_ts", "louder": "laU_dR", "make": "mEI_k",
    "me": "mi", "music": "myuzI_k", "my": "maI", "new": "nu", "now": "naU", "off": "Of", "play": "_plEI", "rain": "rEIn",
    "read": "ri_d", "room": "rum", "set": "sE_t", "some": "sVm", "stop": "s_ta_p", "the": "DV", "time": "_taIm", "turn": "_tRn",
    "up": "V_p", "wake": "wEI_k", "weather": "wEDR", "what": "wV_t", "will": "wIl",
}  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Intents named as SLURP names them, scenario_action; # is any digit.
COMMANDS = {
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

    frames = len(voice)
    samples = frames * hop + window
    contour = pitch * (1.1 - 0.25 * np.linspace(0, 1, samples)) * (1 + 0.03 * np.sin(2 * np.pi * rng.uniform(2, 5) * np.arange(samples) / SAMPLE_RATE))
    pulses = np.diff(np.floor(np.cumsum(contour) / SAMPLE_RATE), prepend=0) * np.sqrt(SAMPLE_RATE / pitch)
    breath = rng.standard_normal(samples)

    frequency = np.fft.rfftfreq(512, 1 / SAMPLE_RATE)
    bandwidth = np.array([80, 120, 160])[:, None, None] * rng.uniform(0.8, 1.3)
    resonances = 1 / (1 + ((frequency - formants[..., None]) / bandwidth) ** 2)
    envelope = (np.array([1, 0.6, 0.3])[:, None, None] * resonances).sum(0) + 0.003
    cut = np.arange(frames)[:, None] * hop + np.arange(window)
    shape = np.hanning(window)
    spectrum = np.fft.rfft(pulses[cut] * shape, 512) * voice[:, None] + np.fft.rfft(breath[cut] * shape, 512) * noise[:, None]
    pieces = np.fft.irfft(spectrum * envelope, 512)
    signal = np.zeros(frames * hop + 512)
    for start, piece in zip(range(0, frames * hop, hop), pieces):
        signal[start : start + 512] += piece
    signal += signal.std() * rng.uniform(0.01, 0.05) * rng.standard_normal(len(signal))
    return (signal / np.abs(signal).max() * 0.5).astype(np.float32)


def demo_corpus(task, seed):
    """The demo corpus: strings of one to four words for asr, commands with an intent for slu.

    seed: of the training split; dev and test are the same for all.
    """
    splits = {}
    for number, (split, size) in enumerate(DEMO_SIZES.items()):
        rng = np.random.default_rng([seed if split == "train" else 0, number])
        splits[split] = []
        for i in range(size):
            if task == "asr":
                intent, words = "", list(rng.choice(ASR_WORDS, rng.integers(1, 5)))
            else:
                intent = list(COMMANDS)[i % len(COMMANDS)]
                words = [rng.choice(DIGITS) if word == "#" else word for word in rng.choice(COMMANDS[intent]).split()]
            samples = synthesise(words, rng)
            name = f"demo-{split}-{i:04}"
            splits[split].append(Utterance(name, (samples,), len(samples) / SAMPLE_RATE, normalise(" ".join(words)), intent))
    return Corpus("demo", lambda epoch_seed: splits["train"], splits["dev"], splits["test"], size=sum(DEMO_SIZES.values()))
