"""Pretrains the small model on unlabelled speech: masked prediction of cluster numbers (HuBERT, Hsu et al. 2021).

    SPEECH="ml-class/videos/cnn-audio/data speechocean762/WAVE speech-to-intent-benchmark/data/speech/clean
        DSPSpeech-20/speech_data free-spoken-digit-dataset/recordings
        --without PICO-tinyML-benchmark/MLTK_keyworkSpotting/dataset"
    run="reference/bin/torchrun --nproc-per-node 2 tests/experiment/pretrain.py"
    $run first $SPEECH --batch-seconds 32 --updates 3500
    $run pretrained $SPEECH --batch-seconds 32 --updates 5500 --teacher first --classes 200

The model and its masks are those of `transformers` (HubertModel, with the sizes of flops.SMALL); the reference
environment needs that library and scikit-learn. The classes are k-means clusters of cepstra or, with --teacher, of a
layer's features of an earlier model, which this one then begins with. What is written is a Hugging Face folder like
anyone's, in bfloat16. Processes that torchrun starts share the work: each has batches of its own.

The speech is that of the repositories lukas/ml-class, jimbozhang/speechocean762, zhongyuchen/DSPSpeech-20,
Picovoice/speech-to-intent-benchmark and Jakobovski/free-spoken-digit-dataset. No speaker of
thegtagamer/PICO-tinyML-benchmark, on whom the experiment trains and tests, is in it: of ml-class, which has words of
Speech Commands, too, 490 recordings by 170 of them are left out.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sklearn.cluster import MiniBatchKMeans
from torch import nn
from transformers import HubertConfig, HubertModel

sys.path.insert(0, str(Path(__file__).parents[2]))
import data  # noqa: E402
from flops import SAMPLE_RATE, SMALL, UserError  # noqa: E402

FRAME = 320  # samples from one frame to the next
ENDINGS = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
FITTED = 200_000  # frames to find the clusters from
TEMPERATURE = 0.1  # of the cosine similarities


def recordings(folders, without):
    """The normalised waveforms of all audio, as float16: 1.8 GB for 16 hours; no speaker of Speech Commands twice."""
    others = {speaker_of(path) for folder in without for path in audio_in(folder)} - {None}
    found, bad, theirs = [], 0, 0
    for path in (path for folder in folders for path in audio_in(folder)):
        if speaker_of(path) in others:
            theirs += 1
            continue
        try:
            found.append(data.waveform(data.Utterance("", path, 0.0)).astype(np.float16))
        except UserError:
            bad += 1
    hours = sum(map(len, found)) / SAMPLE_RATE / 3600
    print(f"{len(found)} recordings, {hours:.1f} h; {theirs} of left-out speakers; {bad} could not be read", flush=True)
    return [samples for samples in found if len(samples) >= SAMPLE_RATE // 2]


def audio_in(folder):
    """The paths of all audio below a folder."""
    return [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in ENDINGS]


def speaker_of(path):
    """The speaker that a file of Speech Commands names, SPEAKER_nohash_TAKE.wav; None for other files."""
    match = re.search(r"([0-9a-f]{8})_nohash_\d+", path.name)
    return match and match[1]


def cepstra(samples):
    """13 mel cepstra with first and second differences, a frame of the model each: (frames, 39) float32."""
    window, size, bands = 400, 512, 40
    cut = np.arange((len(samples) - window) // FRAME + 1)[:, None] * FRAME + np.arange(window)
    power = np.abs(np.fft.rfft(samples.astype(np.float32)[cut] * np.hanning(window), size)) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1) / SAMPLE_RATE * size
    bins = np.arange(size // 2 + 1)
    rising, falling = (
        (bins - edges[:-2, None]) / np.diff(edges)[:-1, None],
        (edges[2:, None] - bins) / np.diff(edges)[1:, None],
    )
    energies = np.log(power @ np.clip(np.minimum(rising, falling), 0, None).T + 1e-6)
    cosines = np.cos(np.pi / bands * (np.arange(bands) + 0.5) * np.arange(13)[:, None])
    c = energies @ cosines.T
    c = (c - c.mean(0)) / (c.std(0) + 1e-3)
    first = np.gradient(c, axis=0) if len(c) > 1 else 0 * c
    second = np.gradient(first, axis=0) if len(c) > 1 else 0 * c
    return np.concatenate((c, first, second), 1).astype(np.float32)


@torch.inference_mode()
def layer_features(model, layer, samples):
    """(frames, width) float32 of a layer's output, 1 being the first."""
    inputs = torch.from_numpy(samples.astype(np.float32))[None]
    return model(inputs, output_hidden_states=True).hidden_states[layer][0].numpy()


def classes_of(waveforms, extract, number, seed):
    """The cluster number of each frame of each waveform: a list of (frames,) int64."""
    rng = np.random.default_rng(seed)
    some, frames = [], 0
    for index in rng.permutation(len(waveforms)):
        some.append(extract(waveforms[index]))
        frames += len(some[-1])
        if frames > FITTED:
            break
    clusters = MiniBatchKMeans(number, batch_size=10_000, n_init=5, random_state=seed).fit(np.concatenate(some))
    return [clusters.predict(extract(samples)).astype(np.int64) for samples in waveforms]


def small_hubert(dropout=0.1):
    """HubertModel with the sizes of flops.SMALL."""
    s = SMALL
    return HubertModel(HubertConfig(
        hidden_size=s.width, num_hidden_layers=len(s.heads), num_attention_heads=s.heads[0],
        intermediate_size=s.units[0], conv_dim=s.channels, conv_kernel=s.kernels, conv_stride=s.strides,
        num_feat_extract_layers=len(s.channels), num_conv_pos_embeddings=s.position_kernel,
        num_conv_pos_embedding_groups=s.position_groups, hidden_dropout=dropout, attention_dropout=0.0,
        activation_dropout=0.0, feat_proj_dropout=dropout, layerdrop=0.0, mask_time_prob=0.65, mask_time_length=10,
        apply_spec_augment=True, vocab_size=32,
    ))  # fmt: skip


class MaskedPrediction(nn.Module):
    """The encoder and, for each class, an embedding that is compared with the projected frame by the cosine."""

    def __init__(self, encoder, classes, width=128):
        super().__init__()
        self.encoder, self.project = encoder, nn.Linear(encoder.config.hidden_size, width)
        self.classes = nn.Parameter(torch.randn(classes, width))

    def forward(self, waveforms, mask):
        """waveforms: (batch, samples), mask: (batch, frames) bool -> scores of the masked frames (masked, classes)."""
        features = self.encoder(waveforms, mask_time_indices=mask).last_hidden_state[mask]
        projected = nn.functional.normalize(self.project(features).float(), dim=-1)
        return projected @ nn.functional.normalize(self.classes, dim=-1).T / TEMPERATURE


def spans(rows, frames, rng, probability=0.8, length=10):
    """HuBERT's time mask: each frame begins a span of `length` with probability `probability` / `length`."""
    starts = rng.random((rows, frames)) < probability / length
    starts[np.arange(rows), rng.integers(0, max(1, frames - length), rows)] = True
    mask = np.zeros((rows, frames), bool)
    for shift in range(length):
        mask[:, shift:] |= starts[:, : frames - shift]
    return torch.from_numpy(mask)


def crops(waveforms, classes, seconds, longest, rng):
    """Batches without end of equally long crops: waveforms (batch, samples) float32, classes (batch, frames) int64."""
    while True:
        order = sorted(rng.permutation(len(waveforms)), key=lambda i: len(waveforms[i]) * rng.uniform(0.9, 1.1))
        groups, group = [], []
        for index in order:
            shortest = min(len(waveforms[i]) for i in [*group, index])
            if group and min(shortest, longest * SAMPLE_RATE) * (len(group) + 1) > seconds * SAMPLE_RATE:
                groups.append(group)
                group = []
            group.append(index)
        for number in rng.permutation(len(groups)):
            group = groups[number]
            samples = int(min(*(len(waveforms[i]) for i in group), longest * SAMPLE_RATE))
            frames, inputs, targets = (samples - 400) // FRAME + 1, [], []
            for i in group:
                start = rng.integers(0, (len(waveforms[i]) - samples) // FRAME + 1)
                inputs.append(waveforms[i][start * FRAME : start * FRAME + samples].astype(np.float32))
                targets.append(classes[i][start : start + frames])
            yield torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))


def train(model, batches, updates, lr, rng):
    """Minimise the cross entropy of the masked frames."""
    told = not dist.is_initialized() or dist.get_rank() == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    start, seconds, losses, right = time.monotonic(), 0.0, [], []
    for update in range(1, updates + 1):
        rate = lr * min(update / (0.08 * updates), (updates - update) / (0.92 * updates))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        waveforms, targets = next(batches)
        mask = spans(*targets.shape, rng)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(waveforms, mask)
        loss = nn.functional.cross_entropy(scores, targets[mask])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += waveforms.numel() / SAMPLE_RATE
        losses.append(loss.item())
        right.append((scores.argmax(1) == targets[mask]).float().mean().item())
        if told and (update % 50 == 0 or update == updates):
            speed = seconds / (time.monotonic() - start)  # of this process
            found = f"loss {np.mean(losses):.3f}  right {np.mean(right):.3f}"
            print(f"{update}/{updates}  {found}  {speed:.0f} x real time", flush=True)
            losses, right = [], []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the folder to write the model into")
    parser.add_argument("speech", nargs="+", help="folders: all audio below them is used")
    parser.add_argument("--without", action="append", default=[], help="folder of speakers to leave out")
    parser.add_argument("--teacher", help="the folder of an earlier model")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--batch-seconds", type=float, default=64.0)
    parser.add_argument("--longest", type=float, default=5.0, help="seconds of a crop")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(options.seed)
    waveforms = recordings(options.speech, options.without)
    encoder, extract = small_hubert(), cepstra
    if options.teacher:
        encoder.load_state_dict(HubertModel.from_pretrained(options.teacher, dtype=torch.float32).state_dict())
        teacher = HubertModel.from_pretrained(options.teacher, dtype=torch.float32).eval()
        extract = lambda samples: layer_features(teacher, options.layer, samples)  # noqa: E731
    classes = classes_of(waveforms, extract, options.classes, options.seed)  # the same in each process
    print(f"{len(np.unique(np.concatenate(classes)))} classes", flush=True)
    model = MaskedPrediction(encoder, options.classes).train()
    torch.manual_seed(options.seed + rank)
    rng = np.random.default_rng((options.seed, rank))
    batches = crops(waveforms, classes, options.batch_seconds, options.longest, rng)
    both = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    train(both, batches, options.updates, options.lr, rng)
    if rank == 0:
        encoder.to(torch.bfloat16).save_pretrained(options.out)


if __name__ == "__main__":
    main()
