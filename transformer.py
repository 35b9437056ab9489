"""wav2vec2, HuBERT and WavLM from scratch: the Transformer on top of the frontend, a task's head, and checkpoints.

    base:   features -> + positional convolution -> LN -> 12 x [x = LN(x + attention(x)), x = LN(x + ffn(x))] -> head
    large:  features -> + positional convolution -> 24 x [x = x + attention(LN(x)), x = x + ffn(LN(x))] -> LN -> head

(Baevski et al. 2020, arXiv 2006.11477; Hsu et al. 2021, arXiv 2106.07447; Chen et al. 2021, arXiv 2110.13900.) Not
here: quantizers and the losses of pre-training.
"""

import collections
import contextlib
import copy
import json
import logging
import math
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from flops import BASE, SAMPLE_RATE, SAMPLES, Shape, UserError
from frontend import GroupNormFrontend, LayerNormFrontend, Projection, cut, valid
from gates import HardConcrete

log = logging.getLogger("sslprune")

GROUP_SECONDS = 300  # of audio, that `predict` reads at a time
PIECE_SECONDS = 60  # of audio, that it recognises at once: a batch of files, or a piece of a longer recording
OVERLAP_SECONDS = 10  # of two pieces


class Position(nn.Module):
    """The relative position embedding: a wide grouped convolution with weight norm over its taps, and GELU."""

    def __init__(self, width, kernel, groups):
        super().__init__()
        weight = torch.empty(width, width // groups, kernel).normal_(std=2 / (kernel * width) ** 0.5)
        self.weight_v = nn.Parameter(weight)
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(width))
        self.kernel, self.groups = kernel, groups

    def forward(self, x):
        """(batch, frames, width) -> the same."""
        norm = self.weight_v.square().sum((0, 1), keepdim=True).sqrt()
        weight = self.weight_v * (self.weight_g / norm)
        tensors = x.transpose(1, 2), weight, self.bias
        # On CPUs with AMX, oneDNN's bfloat16 kernel is wrong where a group has fewer than 16 channels (torch 2.13).
        narrow = x.device.type == "cpu" and weight.shape[1] < 16
        if narrow and (torch.is_autocast_enabled("cpu") or weight.dtype == torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                tensors = (tensor.float() for tensor in tensors)
                y = F.conv1d(*tensors, padding=self.kernel // 2, groups=self.groups).to(x.dtype)
        else:
            y = F.conv1d(*tensors, padding=self.kernel // 2, groups=self.groups)
        return F.gelu(y[..., : x.shape[1]]).transpose(1, 2)  # an even kernel makes one frame too many


class Bias(nn.Module):
    """The output of a part that lost all its heads or units: a bias, whatever it is given."""

    def __init__(self, bias):
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x):
        return torch.zeros_like(x) + self.bias


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width, heads, head_width, dropout):
        super().__init__()
        self.heads, self.head_width, self.dropout, self.gate = heads, head_width, dropout, None
        if heads:
            self.query, self.key, self.value = (nn.Linear(width, heads * head_width) for _ in range(3))
        self.output = nn.Linear(heads * head_width, width) if heads else Bias(torch.zeros(width))

    def forward(self, x, mask=None):
        """x: (batch, frames, width) -> the same. mask: (batch, 1, 1, frames) bool, true for a valid key, or None."""
        if not self.heads:
            return self.output(x)
        layers = self.query, self.key, self.value
        q, k, v = (layer(x).unflatten(2, (self.heads, self.head_width)).transpose(1, 2) for layer in layers)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        if self.gate is not None:
            y = y * self.gate()[:, None, None].type_as(y)
        return self.output(torch.cat(y.unbind(1), dim=2))  # the heads side by side; ONNX's exporter fails with a view

    def slice(self):
        """Remove the shut heads, in place."""
        features = cut(self.gate, (self.query, self.key, self.value), self.output, self.head_width)
        self.heads, self.gate = len(features) // self.head_width, None
        if not self.heads:
            self.query = self.key = self.value = None
            self.output = Bias(self.output.bias)


class RelativePosition(nn.Module):
    """WavLM's table of relative positions (Chen et al. 2021, arXiv 2110.13900), in T5's buckets of distances."""

    def __init__(self, shape):
        super().__init__()
        self.table = nn.Embedding(shape.buckets, shape.width // shape.head_width)
        self.max_distance = shape.max_distance

    def forward(self, frames):
        """frames: int -> (heads of the dense model, frames, frames), for each query and each key."""
        frame = torch.arange(frames, device=self.table.weight.device)
        offset = frame - frame[:, None]
        distance, half = offset.abs(), self.table.num_embeddings // 2  # half of the buckets are for keys to come
        near = half // 2  # distances with a bucket each; the others share buckets of growing width
        far = torch.log(distance.clamp(min=near) / near) / math.log(self.max_distance / near) * (half - near)
        bucket = torch.where(distance < near, distance, (near + far.long()).clamp(max=half - 1))
        return self.table(bucket + half * (offset > 0)).permute(2, 0, 1)


class RelativeAttention(Attention):
    """WavLM's attention: the scores of head h get gate(query) table[bucket(key - query), h], with

        (a, b) = sigmoid(two sums of four features of G x_h),  gate = a (b c_h - 1) + 2

    where x_h is the part of the layer's input at the head's place. A sliced layer remembers the places of its heads.
    """

    def __init__(self, width, heads, head_width, dropout):
        super().__init__(width, heads, head_width, dropout)
        self.position_linear, self.position_scale = nn.Linear(head_width, 8), nn.Parameter(torch.ones(heads))
        self.register_buffer("places", torch.arange(heads))

    def forward(self, x, mask, table):
        """x, mask: as Attention's. table: what RelativePosition returns."""
        if not self.heads:
            return super().forward(x)
        parts = x.unflatten(2, (-1, self.head_width))[:, :, self.places]
        a, b = self.position_linear(parts).unflatten(3, (2, 4)).sum(4).sigmoid().transpose(1, 2).unbind(3)
        gate = a * (b * self.position_scale[:, None] - 1) + 2  # (batch, heads, frames)
        bias = gate[..., None] * table[self.places]
        return super().forward(x, bias if mask is None else bias.masked_fill(~mask, -math.inf))

    def slice(self):
        """As Attention's."""
        kept = self.gate.kept()
        super().slice()
        self.position_scale, self.places = nn.Parameter(self.position_scale[kept]), self.places[kept]


class FeedForward(nn.Module):
    """linear, GELU, linear."""

    def __init__(self, width, units, dropout):
        super().__init__()
        self.units, self.gate = units, None
        self.input = nn.Linear(width, units) if units else None
        self.output = nn.Linear(units, width) if units else Bias(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(batch, frames, width) -> the same."""
        if not self.units:
            return self.output(x)
        y = self.dropout(F.gelu(self.input(x)))
        return self.output(y if self.gate is None else y * self.gate().type_as(y))

    def slice(self):
        """Remove the shut units, in place."""
        self.units, self.gate = len(cut(self.gate, [self.input], self.output)), None
        if not self.units:
            self.input, self.output = None, Bias(self.output.bias)


class Layer(nn.Module):
    """One Transformer block. attention: an Attention, or another module that takes and returns the same."""

    def __init__(self, attention, width, units, dropout, pre_norm):
        super().__init__()
        self.attention, self.attention_norm = attention, nn.LayerNorm(width)
        self.ffn, self.ffn_norm = FeedForward(width, units, dropout), nn.LayerNorm(width)
        self.dropout, self.pre_norm = nn.Dropout(dropout), pre_norm

    def forward(self, x, *mask):
        """x: (batch, frames, width) -> the same. mask: what the attention takes beside x."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), *mask))
            return x + self.dropout(self.ffn(self.ffn_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, *mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Wav2Vec2(nn.Module):
    """The encoder: dense, gated (after `add_gates`) or sliced (what `slice` returns), as its `shape` says.

    layer_drop, projection.time_mask and projection.channel_mask act in training only; set them as a recipe asks.
    """

    def __init__(self, shape, dense=None, dropout=0.1):
        super().__init__()
        self.tensor_shape = shape  # of the tensors; the property `shape` leaves out what gates shut
        self.dense = dense or shape  # the shape before any slicing
        self.frontend = LayerNormFrontend(shape, self.dense.channels) if shape.layer_norms else GroupNormFrontend(shape)
        self.projection = Projection(shape.channels[-1], shape.width, self.dense.channels[-1], dropout)
        self.position = Position(shape.width, shape.position_kernel, shape.position_groups)
        self.norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(dropout)
        attention = RelativeAttention if shape.buckets else Attention
        self.relative = RelativePosition(shape) if shape.buckets else None
        self.layers = nn.ModuleList()
        for heads, units in zip(shape.heads, shape.units):
            attends = attention(shape.width, heads, shape.head_width, dropout)
            self.layers.append(Layer(attends, shape.width, units, dropout, shape.layer_norms))
        self.layer_drop = 0.0

    def forward(self, waveforms, lengths=None):
        """Features of a batch of utterances, each the same alone and padded.

        waveforms: (batch, samples) float32, 16 kHz, each of zero mean and unit variance over its own samples.
        lengths: (batch,) int, the samples of each utterance; what is beyond is not read. None: all are full length.
        Returns features (batch, frames, width), zero beyond each utterance's frames, and frames (batch,) int64.
        Raises ValueError where an utterance is too short to make a frame, or the arguments have other shapes.
        """
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling():  # a trace cannot depend on values
            lengths = self.checked(waveforms, lengths)
        if lengths is None:
            x, mask = self.frontend(waveforms), None
            frames = x.new_ones(x.shape[:2], dtype=torch.int64).sum(1)  # x.shape would be a constant of a trace
        else:
            waveforms = waveforms.masked_fill(~valid(lengths, waveforms.shape[1]), 0)  # no NaN may reach gradients
            after_first, *_, frames = self.tensor_shape.frames(lengths)
            x = self.frontend(waveforms, after_first)
            mask = valid(frames, x.shape[1])
        x, pre_norm = zero_beyond(mask, self.projection(x, frames)), self.tensor_shape.layer_norms
        x = x + self.position(x)
        x = self.dropout(x if pre_norm else self.norm(x))
        masks = [None if mask is None else mask[:, None, None]]
        if self.relative is not None:
            masks.append(self.relative(x.shape[1]))
        for layer in self.layers:
            if self.training and self.layer_drop and torch.rand(()) < self.layer_drop:
                continue
            x = layer(x, *masks)
        return zero_beyond(mask, self.norm(x) if pre_norm else x), frames

    def checked(self, waveforms, lengths):
        """`lengths` on the device of the waveforms, or None where no utterance is padded. Raises as `forward` says."""
        if waveforms.dim() != 2 or not len(waveforms) or lengths is not None and lengths.shape != waveforms.shape[:1]:
            raise ValueError("waveforms must be (batch, samples), and lengths (batch,)")
        if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
            raise ValueError("lengths must be whole numbers")
        needed, samples = self.tensor_shape.receptive_field, waveforms.shape[1]
        shortest, longest = (samples, samples) if lengths is None else (int(lengths.min()), int(lengths.max()))
        if shortest < needed or longest > samples:
            possible = f"from {needed}, which make one frame, to the {samples} of the batch are possible"
            raise ValueError(f"an utterance of {shortest} to {longest} samples: {possible}")
        return None if shortest == samples else lengths.to(waveforms.device, torch.int64)

    @property
    def gates(self):
        """The gates by place, as the functions of gates.py take them: {("channels", 0): HardConcrete, ...}."""
        found = {("channels", layer): gate for layer, gate in enumerate(self.frontend.gates or [])}
        found |= {("heads", i): layer.attention.gate for i, layer in enumerate(self.layers)}
        found |= {("units", i): layer.ffn.gate for i, layer in enumerate(self.layers)}
        return {place: gate for place, gate in found.items() if gate is not None}

    @property
    def shape(self):
        """The flops.Shape of this model as it is at evaluation: what slicing it now gives."""
        return self.tensor_shape.with_counts({place: len(gate.kept()) for place, gate in self.gates.items()})

    def add_gates(self, kinds):
        """Give each unit of these kinds ("channels", "heads", "units") a gate, open."""
        if "channels" in kinds:
            self.frontend.add_gates()
        for layer in self.layers:
            if "heads" in kinds and layer.attention.heads:
                layer.attention.gate = HardConcrete(layer.attention.heads)
            if "units" in kinds and layer.ffn.units:
                layer.ffn.gate = HardConcrete(layer.ffn.units)
        self.to(self.norm.weight.device).train(self.training)

    @torch.no_grad()
    def slice(self):
        """A new model without gates and without the units that are shut; its evaluation-mode output is this one's."""
        sliced = copy.deepcopy(self).eval()
        sliced.tensor_shape = self.shape
        if sliced.frontend.gates:
            sliced.projection.slice(sliced.frontend.slice())
        for layer in sliced.layers:
            for part in (layer.attention, layer.ffn):
                if part.gate is not None:
                    part.slice()
        return sliced


def zero_beyond(mask, x):
    """x: (batch, frames, width), with 0 in the frames for which mask (batch, frames) is false; None: all are valid."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


class SpeechModel(nn.Module):
    """The encoder and one linear layer: over frames, trained with CTC (asr), or over their mean (slu).

    labels: the names of the outputs: of asr the blank, the space and characters (data.vocabulary), of slu the intents.
    raw_text: whether transcripts are left as they are.
    """

    def __init__(self, encoder, task, labels, raw_text=False):
        super().__init__()
        self.encoder, self.task, self.labels, self.raw_text = encoder, task, list(labels), raw_text
        self.add_outputs()
        self.head = nn.Linear(encoder.tensor_shape.width, len(labels))
        self.dtype = torch.float32  # of the computation; weights, gates and losses are float32 in any case

    def forward(self, waveforms, lengths=None):
        """Scores (batch, frames, labels) for asr, (batch, labels) for slu; and frames (batch,). See Wav2Vec2."""
        with precision(self.dtype, waveforms.device):
            features, frames = self.encoder(waveforms, lengths)
            if self.task == "slu":
                features = features.sum(1) / frames[:, None]  # features are 0 beyond the valid frames
            return self.head(features), frames

    def loss(self, waveforms, lengths, utterances):
        """Mean over the batch of the CTC loss per character (asr) or of the cross entropy (slu)."""
        scores, frames = self(waveforms, lengths)
        if self.task == "slu":
            targets = torch.tensor([self.outputs[u.intent] for u in utterances], device=scores.device)
            return F.cross_entropy(scores.float(), targets)
        targets = [data.encode(u.text, self.outputs) for u in utterances]
        sizes = torch.tensor([len(target) for target in targets])
        log_probabilities = scores.float().log_softmax(2).transpose(0, 1)
        return F.ctc_loss(log_probabilities, torch.cat(targets).to(scores.device), frames, sizes, zero_infinity=True)

    def add_outputs(self):
        """Set `outputs`, {label: output}; of two outputs with one label, it has the first."""
        self.outputs = {label: output for output, label in reversed([*enumerate(self.labels)])}

    @torch.no_grad()
    def add_labels(self, new):
        """Add outputs to the head, of weight 0 and as unlikely as any other is."""
        self.labels += new
        self.add_outputs()
        weight, bias = self.head.weight, self.head.bias
        self.head = nn.Linear(weight.shape[1], len(self.labels), device=weight.device)
        self.head.weight.zero_()[: len(weight)] = weight
        self.head.bias.fill_(bias.min())[: len(bias)] = bias

    @torch.no_grad()
    def transcribe(self, waveforms, lengths=None):
        """Normalised waveforms (batch, samples) -> a list of transcripts (asr) or of intents (slu)."""
        waveforms = waveforms.to(next(self.parameters()).device)
        if waveforms.shape[1] > PIECE_SECONDS * SAMPLE_RATE:
            ends = [None] * len(waveforms) if lengths is None else lengths.tolist()
            return [self._transcribe_long(row[None, :end]) for row, end in zip(waveforms, ends)]
        scores, frames = self(waveforms, lengths)
        best = scores.argmax(-1).cpu()
        if self.task == "slu":
            return [self.labels[i] for i in best.tolist()]
        return [data.decode(outputs[:n], self.labels) for outputs, n in zip(best, frames.tolist())]

    def _transcribe_long(self, waveform):
        """The transcript or intent of (1, samples), from overlapping pieces."""
        shape, found = self.encoder.tensor_shape, []
        hop, total = math.prod(shape.strides), shape.frames(waveform.shape[1])[-1]
        length, overlap = (seconds * SAMPLE_RATE // hop for seconds in (PIECE_SECONDS, OVERLAP_SECONDS))
        with self.encoder.frontend.pieces(waveform, PIECE_SECONDS * SAMPLE_RATE):
            starts = range(0, max(1, total - overlap), length - overlap)
            for first in data.counted(starts, "recognised %d of %d pieces", len(starts)):
                last = min(first + length, total)
                scores = self(waveform[:, first * hop : (last - 1) * hop + shape.receptive_field])[0][0]
                if self.task == "slu":
                    found.append(scores * (last - first))
                else:  # half of each overlap
                    found.append(scores[overlap // 2 * (first > 0) : len(scores) - overlap // 2 * (last < total)])
        if self.task == "slu":
            return self.labels[sum(found).argmax().item()]
        return data.decode(torch.cat(found).argmax(-1).cpu(), self.labels)

    def predict(self, paths):
        """Audio files, or one -> a list of transcripts (asr) or of intents (slu). Raises UserError for a bad file.

        A recording of over a minute is recognised in overlapping pieces: in time and memory linear in its length.
        """
        results = list(self.recognise([paths] if isinstance(paths, (str, os.PathLike)) else paths))
        for error in results:
            if isinstance(error, UserError):
                raise error
        return results

    def recognise(self, paths):
        """What `predict` returns, as it comes; for a file that cannot be read, the UserError that says why.

        Files are read and recognised in groups of some minutes, in batches of like length.
        """
        group, paths = [], list(paths)
        for number, path in enumerate(paths, 1):
            try:
                samples = data.waveform(data.Utterance(str(path), path, 0.0))
                if len(samples) < self.encoder.tensor_shape.receptive_field:
                    raise UserError(f"{path}: {len(samples)} samples are too short to recognise anything in")
                group.append(data.Utterance(str(path), samples, len(samples) / SAMPLE_RATE))
            except UserError as error:
                group.append(error)
            readable = [u for u in group if isinstance(u, data.Utterance)]
            if sum(u.seconds for u in readable) > GROUP_SECONDS or number == len(paths):
                found = {}
                with precision(self.dtype, self.head.weight.device):  # around all: weights are cast once
                    for batch in data.batches(readable, PIECE_SECONDS):
                        found |= zip(map(id, batch), self.transcribe(*data.pad([u.audio for u in batch])))
                yield from (found.get(id(u), u) for u in group)
                group = []


class Padded(nn.Module):
    """A SpeechModel whose waveforms get zeros for one frame more, since an exported program wants two at least."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, waveforms, lengths):
        return self.model(F.pad(waveforms, (0, math.prod(self.model.encoder.tensor_shape.strides))), lengths)


def exported(model):
    """A SpeechModel as a torch.export.ExportedProgram, for any number of utterances and samples.

    It takes waveforms (batch, samples) float32 and lengths (batch,) int64, and returns scores and frames as the model
    does; of asr, there is a frame more than those.
    """
    arguments, any_size = (torch.zeros(2, SAMPLES), torch.tensor([SAMPLES, SAMPLES - 1])), torch.export.Dim.DYNAMIC
    sizes = ({0: any_size, 1: any_size}, {0: any_size})
    return torch.export.export(Padded(model.eval()), arguments, dynamic_shapes=sizes)


def precision(dtype, device):
    """A context in which convolutions and products compute in `dtype` (bfloat16), or as they are (float32)."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


@torch.no_grad()
def check_precision(model):
    """Raise UserError where a model's features in its dtype are far from those in float32: a backend may be wrong."""
    if model.dtype == torch.float32:
        return
    waveform = data.synthesise(["seven"], np.random.default_rng(0))
    waveform = torch.from_numpy(waveform / waveform.std())[None].to(model.head.weight.device)
    exact, _ = model.eval().encoder(waveform)
    with precision(model.dtype, waveform.device):
        difference = ((model.encoder(waveform)[0] - exact).norm() / exact.norm()).item()
    if not difference < 0.1:
        what = f"{str(model.dtype)[6:]} differ from those in float32 by {difference:.0%} of their norm"
        raise UserError(f"on this machine features in {what}, so results would mean nothing; give --dtype float32")


# --- Other people's checkpoints ------------------------------------------------------------------------------------
#
# read_checkpoint: a file, or several -> what they hold (nothing of it is executed) -> where in it an encoder is,
# whatever wraps it -> tensors in our names, and the shape -> Checkpoint


@dataclass
class Checkpoint:
    """What a file holds of a model. weights: in SpeechModel's names, of the encoder and of a head if any."""

    path: Path
    shape: Shape
    dense: Shape  # before any slicing
    weights: dict
    task: str | None = None  # where there is a head
    labels: list | None = None  # as its vocabulary has them
    raw_text: bool | None = None  # of our own models: whether they were trained on transcripts as they are

    def encoder(self):
        """The Wav2Vec2, in evaluation mode. Raises UserError for a missing, surplus or wrongly sized tensor."""
        weights = {key.removeprefix("encoder."): w for key, w in self.weights.items() if key.startswith("encoder.")}
        return self._filled(lambda: Wav2Vec2(self.shape, self.dense), weights)

    def model(self, gated=(), raw_text=None):
        """The SpeechModel, in evaluation mode, units of these kinds gated. Raises as `encoder`, and without a head.

        raw_text: whether transcripts are to be left as they are; None: as the checkpoint has it. Otherwise characters
        become those of normalised transcripts, unless there is such an output already.
        """
        if self.task is None:
            what = "give a model.pt that sslprune wrote, or a CTC model with the vocab.json of its head beside it"
            raise UserError(f"{self.path}: holds no head for a task; {what}")
        if None not in (raw_text, self.raw_text) and raw_text != self.raw_text:
            how = "as they are; give" if self.raw_text else "normalised; leave out"
            raise UserError(f"{self.path}: was trained on transcripts {how} --raw-text")
        labels, raw_text = self.labels, bool(raw_text or self.raw_text)
        if self.task == "asr" and not raw_text:
            if len({label.upper() for label in labels}) < len(labels):
                log.info("%s: tells upper from lower case, and transcripts do with --raw-text alone", self.path)
            inside = (data.normalise(f"a{label}a")[1:-1].strip() if len(label) == 1 else label for label in labels)
            taken, normal = set(labels), list(inside)  # of a word, where an apostrophe stays
            labels = [new if len(new) == 1 and new not in taken else old for old, new in zip(labels, normal)]

        parts = self.task, labels, raw_text
        return self._filled(lambda: SpeechModel(Wav2Vec2(self.shape, self.dense), *parts), self.weights, gated)

    def _filled(self, make, weights, gated=()):
        """The module that make() makes, units of these kinds gated, with these weights."""
        if len(self.shape.channels) + len(self.shape.heads) > len(weights):  # each has several; a million takes hours
            raise UserError(f"{self.path}: lacks the tensors of the layers that its shape promises")
        try:
            with torch.device("meta"):  # no memory, no time, as every tensor is assigned below
                model = make()
                if gated:
                    model.encoder.add_gates(gated)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{self.path}: no model has the shape {self.shape} ({error})") from error
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        sizes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        wrong = [key for key in expected if key in sizes and sizes[key] != expected[key]]
        heads = self.shape.width // self.shape.head_width
        places = {key: w for key, w in weights.items() if key.endswith(".places") and w.dim() == 1}
        places = {key: [-1, *w.tolist(), heads] for key, w in places.items()}
        problems = {
            "lacks": [key for key in expected if key not in sizes],
            "has a wrong size for": [f"{key} {sizes[key]} instead of {expected[key]}" for key in wrong],
            "has no place for": [key for key in sizes if key not in expected],
            "has values that are not finite in": [key for key in weights if not weights[key].isfinite().all()],
            "has impossible values in": [key for key, row in places.items() if sorted({*row}) != row],
        }
        for what, keys in problems.items():
            if keys:
                raise UserError(f"{self.path}: {what} {shown(keys)}")
        model.load_state_dict(weights, assign=True)
        return model.eval()


def load_pretrained(path):
    """An encoder in evaluation mode from a checkpoint: Hugging Face, fairseq, unilm, torchaudio, or a model.pt of ours.

    path: the file, or a folder that holds one. Weights become float32. What the encoder has no use for, such as a task
    head or a quantizer, is named in the log and left out.
    Raises UserError where the file holds no model of the wav2vec2 family, OSError where it cannot be read.
    """
    return read_checkpoint(path).encoder()


def load(path):
    """The SpeechModel in a model.pt, in evaluation mode. Raises UserError where the file holds none."""
    return read_checkpoint(path).model()


def read_checkpoint(path):
    """The Checkpoint in a file, or in a folder that holds one."""
    path = find_checkpoint(Path(path))
    if path.name.endswith(".index.json"):
        files, contents = read_json(path).get("weight_map"), {}
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise UserError(f"{path}: is no index of a checkpoint's files")
        for name in sorted({Path(name).name for name in files.values()}):
            if not path.with_name(name).is_file():
                raise UserError(f"{path}: names {name}, which is not there")
            contents |= read_file(path.with_name(name))
    else:
        contents = read_file(path)
    return read_ours(contents, path) if contents.get("format") == "sslprune" else read_public(contents, path)


def find_checkpoint(path):
    """The checkpoint's file, or its index where it is in several."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder; models of a hub are not fetched, give them as files")
    names = ["model.safetensors", "pytorch_model.bin", "model.pt"]
    names += [f"{name}.index.json" for name in names]
    known = [path / name for name in names if (path / name).is_file()]
    others = [file for file in data.listed(path, "*.*") if re.fullmatch(r"\.(safetensors|bin|pth?|ckpt)", file.suffix)]
    if not known and "adapter_model" in (file.stem for file in others):
        raise UserError(f"{path}: holds an adapter alone; merge it into its model, and give that")
    if not known and len(others) != 1:
        raise UserError(f"{path}: holds none of {', '.join(names)}; give the file itself")
    return (known or others)[0]


def read_json(path):
    """The dictionary in a JSON file."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds a {type(contents).__name__}, not a dictionary")
    return contents


def read_file(path):
    """The dictionary that a .safetensors file, or a file of torch.save, holds. Nothing in it is executed."""
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a git-lfs pointer, not the file that it stands for; `git lfs pull` fetches that")
    return read_safetensors(path) if start[8:9] == b"{" else read_pickle(path)


def read_safetensors(path):
    """name -> tensor. The layout: 8 bytes of header length, a JSON header, the tensors' bytes."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors, used, raw = {}, 0, bytearray(path.stat().st_size)
    with open(path, "rb") as file:
        file.readinto(raw)
    try:
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, sizes, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in dtypes:
                sizes = [end - begin]  # bytes, for `floats` to refuse if the encoder needs it
            dtype = dtypes.get(dtype, torch.uint8)
            count = torch.empty(sizes, device="meta").numel()
            if not 0 <= begin <= end <= len(raw) - start or end - begin != count * dtype.itemsize:
                raise ValueError(f"{shown([name])} lies outside of the file")
            used += end - begin
            if used > len(raw) - start:
                raise ValueError(f"{shown([name])} lies where another tensor is")
            tensor = torch.frombuffer(raw, dtype=dtype, count=count, offset=start + begin) if count else torch.empty(0)
            tensors[name] = tensor.view(sizes)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path}: is damaged, or not a safetensors file ({shown([error])})") from error
    return tensors


class Inert:
    """Stands for an object of any class but torch's own, or what a function made: it keeps what it was given."""

    builtin, arguments, state = None, (), None  # builtin: list or dict, where torch's loader wants to fill one

    def __new__(cls, *arguments):
        if cls.builtin:
            return cls.builtin()
        stand_in = super().__new__(cls)
        stand_in.arguments = arguments
        return stand_in

    def __setstate__(self, state):
        self.state = state


def read_pickle(path):
    """The dictionary in a file of torch.save, where an Inert stands for whatever is neither a tensor nor plain."""
    size, filled = path.stat().st_size, {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(record.file_size for record in archive.infolist())
            if unpacked > size:  # torch.save does not compress
                raise UserError(f"{path}: claims {unpacked} bytes in a file of {size}; torch.save writes no such file")
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        else:
            with open(path, "rb") as file:  # before torch 1.6: a magic number, a version, the machine, the contents
                operations = [operation for _ in range(4) for operation in pickletools.genops(file)]
            names = {name.replace(" ", ".") for operation, name, _ in operations if operation.name == "GLOBAL"}
            names = {name.replace("__builtin__.", "builtins.") for name in names}  # as Python 2 called it
        while True:  # once more for each class whose objects turn out to be filled as lists or dictionaries are
            stand_ins = [(type(name, (Inert,), {"builtin": filled.get(name)}), name) for name in names]
            try:
                safe, quiet = torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(action="ignore")
                with safe, quiet, open(path, "rb") as file:  # since torch goes by the ending of a path
                    contents = torch.load(file, map_location="cpu", weights_only=True)
                break
            except pickle.UnpicklingError as error:
                wanted = re.search(rf"Can only (\w+) .* but got <class '{__name__}\.(.+?)'>", str(error))
                if not wanted or wanted[2] in filled:
                    raise
                filled[wanted[2]] = list if wanted[1] in ("append", "extend") else collections.OrderedDict
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can raise anything
        refused = re.search(r"GLOBAL ([\w.]+) (?:was not|whose)", str(error))
        wrong = f"holds {refused[1][:80]}, which is not loaded" if refused else "is damaged, or not of torch.save"
        raise UserError(f"{path}: {wrong}; save the model's state_dict alone") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds a {type(contents).__name__}, not a dictionary; save the model's state_dict")
    return contents


def floats(key, tensor, path):
    """A tensor of a file as float32; no other than dense floating-point numbers that are really there will do."""
    is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not is_dense or tensor.is_complex() or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise UserError(f"{path}: {shown([key])} is not a dense tensor of numbers that the file holds")
    if key.endswith(".places"):
        return tensor if tensor.dtype == torch.int64 else torch.full_like(tensor, -1)  # which is refused as impossible
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise UserError(f"{path}: {shown([key])} is not of floats of 16 bits or more; no quantized model is read")
    return tensor.float()


def shown(keys):
    """The first of some keys, for an error: they come from a file, and may be anything."""
    texts = ["".join(c if c.isprintable() else "?" for c in str(key))[:80] for key in keys[:4]]
    return ", ".join(texts) + (" and more" if len(keys) > 4 else "")


def read_ours(contents, path):
    """The Checkpoint in a model.pt that sslprune wrote."""
    try:
        shape, dense = Shape.from_dict(contents["shape"]), Shape.from_dict(contents["dense"])
        weights = dict(contents["weights"])
        for name in ("channels", "heads", "units"):
            kept, full = getattr(shape, name), getattr(dense, name)
            if len(kept) != len(full) or any(map(int.__gt__, kept, full)):
                raise ValueError(f"its {name} are not some of the dense model's")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is not a complete model.pt ({error})") from error
    weights = {str(key): floats(str(key), tensor, path) for key, tensor in weights.items()}
    if "task" not in contents:  # an encoder alone
        return Checkpoint(path, shape, dense, weights)
    task, labels = contents["task"], contents.get("labels")
    named = isinstance(labels, list) and labels and all(isinstance(name, str) and data.is_name(name) for name in labels)
    if not (task == "slu" and named or task == "asr" and named and labels[0] == data.BLANK):
        raise UserError(f"{path}: its task or labels are none that sslprune writes")
    return Checkpoint(path, shape, dense, weights, task, labels, contents.get("raw_text") is True)


# From the key names of transformers, torchaudio, fairseq, unilm and s3prl to ours. They do not contradict each other.
FRONTEND = r"feature_extractor\.conv_layers\."
PROJECTION = r"(?:(?:encoder\.)?feature_projection\.)?"
ENCODER = r"encoder\.(?:transformer\.)?"
POSITION = ENCODER + r"pos_conv(?:_embed\.conv|\.0)\."
LAYER = ENCODER + r"layers\.(\d+)\."
ATTENTION = LAYER + r"(?:attention|self_attn)\.(?:attention\.)?"
KEYS = [
    (FRONTEND + r"(\d+)\.(?:conv|0)\.(weight|bias)", r"frontend.convolutions.\1.\2"),
    (FRONTEND + r"(\d+)\.(?:layer_norm|2|2\.1)\.(weight|bias)", r"frontend.norms.\1.\2"),
    (r"feature_extractor\.dummy_weight", r"projection.scale"),  # DPHuBERT's gates of the last convolution
    (PROJECTION + r"layer_norm\.(weight|bias)", r"projection.norm.\1"),
    (PROJECTION + r"(?:projection|post_extract_proj)\.(weight|bias)", r"projection.linear.\1"),
    (r"(?:masked_spec_embed|mask_emb|mask_generator\.mask_embedding)", r"projection.mask_embedding"),
    (POSITION + r"bias", r"position.bias"),
    (POSITION + r"(?:weight_g|parametrizations\.weight\.original0)", r"position.weight_g"),
    (POSITION + r"(?:weight_v|parametrizations\.weight\.original1)", r"position.weight_v"),
    (POSITION + r"weight", r"position.weight"),  # the two multiplied out
    (ENCODER + r"layer_norm\.(weight|bias)", r"norm.\1"),
    (ENCODER + r"layers\.0\.\w+\.(?:rel_attn_embed|relative_attention_bias)\.weight", r"relative.table.weight"),
    (ATTENTION + r"(?:gru_rel_pos_linear|grep_linear)\.(weight|bias)", r"layers.\1.attention.position_linear.\2"),
    (ATTENTION + r"(?:gru_rel_pos_const|grep_a)", r"layers.\1.attention.position_scale"),
    (ATTENTION + r"in_proj_(weight|bias)", r"layers.\1.attention.in_proj.\2"),  # torchaudio's: the next three in one
    (ATTENTION + r"q_proj\.(weight|bias)", r"layers.\1.attention.query.\2"),
    (ATTENTION + r"k_proj\.(weight|bias)", r"layers.\1.attention.key.\2"),
    (ATTENTION + r"v_proj\.(weight|bias)", r"layers.\1.attention.value.\2"),
    (ATTENTION + r"out_proj\.(weight|bias)", r"layers.\1.attention.output.\2"),
    (LAYER + r"(?:self_attn_)?layer_norm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    (LAYER + r"(?:feed_forward\.intermediate_dense|fc1)\.(weight|bias)", r"layers.\1.ffn.input.\2"),
    (LAYER + r"(?:feed_forward\.output_dense|fc2)\.(weight|bias)", r"layers.\1.ffn.output.\2"),
    (LAYER + r"final_layer_norm\.(weight|bias)", r"layers.\1.ffn_norm.\2"),
]
KEYS = [(re.compile(pattern), ours) for pattern, ours in KEYS]
INSIDE = re.compile(r"(?:feature_extractor|feature_projection|encoder|adapter)\.")  # where no other key may be
FIRST = re.compile(r"(.*?)" + FRONTEND + r"0\.(?:conv|0)\.weight(?:_orig)?")  # in each layout; its prefix is the rest's
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_\w+|module)\.")  # components that DataParallel, torch.compile or FSDP put in


def read_public(contents, path):
    """The Checkpoint in a file of a public library."""
    prefix, tensors = find_encoder(contents, path)
    said = what_it_says(contents, path)
    weights, ignored = translate(tensors, prefix, path)
    shape = infer_shape(weights, said, path)
    weights = completed(weights, shape, said, path)
    weights = {f"encoder.{key}": tensor for key, tensor in weights.items()}
    labels, head = ctc_head(tensors, said, path)
    if labels:
        ignored = [key for key in ignored if "lm_head." not in key]
    if ignored:
        log.info("%s: left out what the encoder has no use for, %d entries: %s", path, len(ignored), shown(ignored))
    return Checkpoint(path, shape, shape, weights | head, "asr" if labels else None, labels)


def completed(weights, shape, said, path):
    """The weights with what a public file has no tensor for, but a model of ours has."""
    if "projection.mask_embedding" not in weights:  # torchaudio's models have none
        log.info("%s: has no mask embedding; it starts at zero", path)
    # A part that DPHuBERT removed adds nothing to the residual, and the LayerNorm about it still runs.
    parts = {"attention": shape.heads, "ffn": shape.units}
    removed = [f"layers.{layer}.{part}" for part in parts for layer, count in enumerate(parts[part]) if not count]
    if removed:
        log.info("%s: has no %s", path, shown(removed))
    zeros = ["projection.mask_embedding", "projection.shut", *(f"{part}.output.bias" for part in removed)]
    defaults = {key: torch.zeros(shape.width) for key in zeros} | {"projection.scale": torch.ones(shape.channels[-1])}
    for layer, heads in enumerate(shape.heads) if shape.buckets else ():
        attention, total = f"layers.{layer}.attention.", range(shape.width // shape.head_width)
        all_places = [list(total)] * len(shape.heads)
        kept, where = said.get("places", (all_places, "encoder_remaining_heads, which it lacks,"))  # DPHuBERT's
        places = kept[layer] if isinstance(kept, list) and len(kept) == len(shape.heads) else None
        if heads and (not isinstance(places, list) or len(places) != heads or not all(p in total for p in places)):
            raise UserError(f"{path}: {where} does not name the places of the {heads} heads of layer {layer}")
        places = torch.tensor(places if heads else [], dtype=torch.int64)
        if not heads:
            empty = {"linear.weight": torch.zeros(8, shape.head_width), "linear.bias": torch.zeros(8)}
            empty["scale"] = torch.ones(0)
            defaults |= {f"{attention}position_{name}": tensor for name, tensor in empty.items()}
        elif (scale := weights.get(f"{attention}position_scale")) is not None:
            of_all = scale.numel() == len(total)  # as DPHuBERT keeps it
            weights[f"{attention}position_scale"] = scale.flatten()[places] if of_all else scale.flatten()
        weights[f"{attention}places"] = places
    return defaults | weights


def find_encoder(contents, path):
    """The prefix of the keys of the one encoder in a file, and the dictionary of tensors in which it is."""
    encoders = {}
    for place, holder in nested(contents):
        tensors = unpruned({WRAPPERS.sub("", str(key)): value for key, value in holder.items()}, path)
        for key in filter(FIRST.fullmatch, tensors):  # what optimizers keep of a frontend is no encoder
            prefix = FIRST.fullmatch(key)[1]
            if isinstance(tensors[key], torch.Tensor) and any(k.startswith(f"{prefix}encoder.") for k in tensors):
                encoders[f"{place}{prefix}" or "without a prefix"] = prefix, tensors
    if len(encoders) == 1:
        return next(iter(encoders.values()))
    what = f"several encoders ({shown(list(encoders))}); give one alone"
    if not encoders:
        what = f"no wav2vec2 of Hugging Face, fairseq, torchaudio or sslprune, but {shown(list(contents)) or 'nothing'}"
    if any("frontend.convolutions.0.weight" in str(key) for _, holder in nested(contents) for key in holder):
        what = "tensors of sslprune without their shape; give a model.pt, which sslprune.save_model writes"
    raise UserError(f"{path}: holds {what}")


def nested(contents):
    """(place, dictionary) of the dictionary and of those in it, six levels deep; an Inert's state is one too."""
    level = [("", contents)]
    for _ in range(6):
        yield from level
        inner = [(f"{place}{key}.", unwrapped(value)) for place, holder in level for key, value in holder.items()]
        # By identity, as a file may name the same dictionary a thousand times on every level.
        level = [*{id(value): (place, value) for place, value in inner if isinstance(value, dict)}.values()]


def unwrapped(value):
    """What an Inert holds: omegaconf's `_content` or `_val`, another object's attributes, an enum's only argument."""
    for _ in range(6):
        if not isinstance(value, Inert):
            break
        if isinstance(value.state, dict):
            value = next((value.state[name] for name in ("_content", "_val") if name in value.state), value.state)
        elif len(value.arguments) == 1:
            value = value.arguments[0]
    return value


def plain(value, levels=3):
    """A number, a text or a truth of a file, or lists of them, without what wraps them; another object's type."""
    value = unwrapped(value)
    if isinstance(value, (list, tuple)) and levels and len(value) <= 100:  # a model has no longer ones
        return [plain(inner, levels - 1) for inner in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else f"<{type(value).__name__}>"


def unpruned(tensors, path):
    """The tensors with X_orig and X_mask, which torch.nn.utils.prune makes of X, multiplied into X."""
    for key in [key[:-5] for key in tensors if key.endswith("_mask") and f"{key[:-5]}_orig" in tensors]:
        tensor, mask = (floats(key + part, tensors.pop(key + part), path) for part in ("_orig", "_mask"))
        if tensor.shape != mask.shape:
            raise UserError(f"{path}: {shown([key])}_orig and {shown([key])}_mask are not of one size")
        tensors[key] = tensor * mask
    return tensors


def translate(tensors, prefix, path):
    """Foreign tensors to ours: {our name: tensor}, and the keys that have no place in an encoder."""
    weights, ignored = {}, []
    for key, tensor in tensors.items():
        inner = key.removeprefix(prefix) if key.startswith(prefix) else ""
        ours = next((match.expand(ours) for pattern, ours in KEYS if (match := pattern.fullmatch(inner))), None)
        if ours and ".in_proj." in ours:
            parts = torch.atleast_1d(floats(key, tensor, path)).tensor_split(3)
            for name, part in zip(("query", "key", "value"), parts):
                weights[ours.replace("in_proj", name)] = part
        elif ours:
            weights[ours] = floats(key, tensor, path)
        elif INSIDE.match(inner):
            if inner.endswith("_orig"):
                raise UserError(f"{path}: {shown([key])} is a weight of torch.nn.utils.prune without its mask")
            other = "does not belong to wav2vec2, HuBERT or WavLM; no other architecture is read"
            raise UserError(f"{path}: {shown([key])} {other}, nor a quantized model or one with adapters")
        elif isinstance(tensor, torch.Tensor):
            ignored.append(key)
    if "frontend.norms.1.weight" not in weights:  # the first one's is a GroupNorm
        weights = {key.replace("norms.0.", "convolutions.0.norm_"): tensor for key, tensor in weights.items()}
    if (weight := weights.pop("position.weight", None)) is not None:
        gain = torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True) if weight.dim() == 3 else weight
        weights["position.weight_v"], weights["position.weight_g"] = weight, gain
    return weights, ignored


# What a file says of its model, and the names of it in Hugging Face, fairseq and unilm, torchaudio and DPHuBERT.
SAID = {
    "layer_norms": "feat_extract_norm extractor_mode",
    "pre_norm": "do_stable_layer_norm layer_norm_first encoder_layer_norm_first",
    "conv_bias": "conv_bias extractor_conv_bias",
    "strides": "conv_stride",
    "convolutions": "conv_feature_layers extractor_conv_layer_config",  # (channels, kernel, stride) of each
    "width": "encoder_embed_dim",
    "dense_heads": "num_attention_heads encoder_attention_heads",
    "heads": "encoder_num_heads",
    "head_width": "encoder_head_dim",
    "places": "encoder_remaining_heads",
    "layers": "num_hidden_layers encoder_layers encoder_num_layers",
    "units": "encoder_ff_interm_features",
    "has_heads": "encoder_use_attention",
    "has_units": "encoder_use_feed_forward",
    "position_kernel": "encoder_pos_conv_kernel",
    "position_groups": "encoder_pos_conv_groups",
    "buckets": "num_buckets encoder_num_buckets",
    "max_distance": "max_bucket_distance max_distance encoder_max_distance",
    "pad_token_id": "pad_token_id",
}
SAID = {name: ours for ours, names in SAID.items() for name in names.split()}
NORMS = {"group": False, "default": False, "group_norm": False, "layer": True, "layer_norm": True}
NEEDED = {  # other values mean another model
    "hidden_act": "gelu", "activation_fn": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True, "add_adapter": False, "conv_pos_batch_norm": False, "sampling_rate": SAMPLE_RATE,
}  # fmt: skip


def what_it_says(contents, path):
    """What a checkpoint says of its model, in itself and in files beside it: {name of ours: (value, where)}.

    Raises UserError where that is another architecture, or where two places contradict each other.
    """
    said, holders = {}, []
    for file in map(path.with_name, ("config.json", "preprocessor_config.json", "processor_config.json")):
        if file.is_file():
            parts = [(f"{file.name}: {place}", holder) for place, holder in nested(read_json(file))]
            if file.name == "config.json":  # only the encoder's part, and not that of a decoder or the like
                parts = [part for part in parts if "conv_stride" in part[1]][:1] or parts[:1]
            holders += parts
    # With fairseq's w2v_args in it, which is of the encoder, the rest of a dictionary is of others, and has defaults.
    holders += [(place, holder) for place, holder in nested(contents) if plain(holder.get("w2v_args")) is None]
    for place, key, value in [(place, key, value) for place, holder in holders for key, value in holder.items()]:
        name, value = SAID.get(key), plain(value)
        if key == "do_normalize" and value is False:  # WavLM-base's, whose GroupNorm makes it almost the same
            log.info("%s: %s%s is false, and audio is normalised all the same", path, place, key)
        if value in (None, "<Tensor>") or name is None and key not in NEEDED:
            continue
        known = [NEEDED[key]] if key in NEEDED else list(NORMS) if name == "layer_norms" else [value]
        if value not in known:
            wrong = f"{place}{key} is {shown([value])}, and {shown(known)} of what is read"
            raise UserError(f"{path}: is of another architecture or rate, and no other is read: {wrong}")
        if name is None:
            continue
        if name == "heads" and type(value) is int:  # as torchaudio says it of a model that is not pruned
            name = "dense_heads"
        values = {name: NORMS[value] if name == "layer_norms" else value}
        for name, value in (convolutions(key, value, path) if name == "convolutions" else values).items():
            before, where = said.setdefault(name, (value, f"{place}{key}"))
            if before != value and name != "pad_token_id":
                wrong = f"{where} is {shown([before])}, and {place}{key} is {shown([value])}"
                raise UserError(f"{path}: contradicts itself: {wrong}")
    return said


def convolutions(key, layers, path):
    """The fields of a Shape in fairseq's "[(512, 10, 5)] + [(512, 3, 2)] * 4 + ..." or in a list."""
    number = r"(\d{1,9})"
    parts = re.findall(rf"[(\[]{number}, *{number}, *{number}[)\]]\]?(?: *\* *(\d{{1,3}}))?", str(layers))
    if not parts:
        raise UserError(f"{path}: {key} is no list of (channels, kernel, stride): {shown([layers])}")
    sizes = [map(int, sizes) for *sizes, times in parts for _ in range(int(times or 1))]
    return dict(zip(("channels", "kernels", "strides"), map(list, zip(*sizes))))


def infer_shape(weights, said, path):
    """The shape of a model from its tensors (our keys), and what they do not show from what the file says."""
    try:
        shape = shape_of(weights, {name: value for name, (value, _) in said.items()})
        check_against(shape, said)
    except KeyError as error:
        raise UserError(f"{path}: lacks {error.args[0]}") from error
    except (IndexError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{path}: its tensors do not make a model of the wav2vec2 family ({error})") from error
    assumed = {
        f"heads of {shape.head_width}": not {"dense_heads", "head_width"} & said.keys() and not shape.buckets,
        "wav2vec2-base's strides": "strides" not in said,
        "pre-norm order" if shape.layer_norms else "post-norm order": "pre_norm" not in said,
        f"a maximum of {shape.max_distance} for relative positions": shape.buckets and "max_distance" not in said,
    }
    if any(assumed.values()):
        what = ", ".join(name for name, is_so in assumed.items() if is_so)
        log.info("%s: does not say otherwise, so these are assumed: %s", path, what)
    return shape


def shape_of(weights, said):
    """The Shape that these tensors have. Raises KeyError for a tensor that is missing, and much else."""
    modules = {key.rsplit(".", 2)[0] for key in weights}

    def sizes(stack, name, dimension):
        """Of this tensor in every member of a stack of modules: 0 without its module; without it alone, KeyError."""
        indices = [int(key.split(".")[stack.count(".") + 1]) for key in weights if key.startswith(stack + ".")]
        if max(indices, default=0) >= len(weights):
            raise ValueError(f"{stack} {max(indices)} is there, and those before it are not")
        keys = [f"{stack}.{index}.{name}" for index in range(max(indices, default=-1) + 1)]
        return [weights[key].shape[dimension] if key.rsplit(".", 2)[0] in modules else 0 for key in keys]

    width, position = weights["norm.weight"].shape[0], weights["position.weight_v"].shape
    layer_norms, table = "frontend.norms.1.weight" in weights, weights.get("relative.table.weight")
    heads = said.get("dense_heads", 16 if layer_norms else width // BASE.head_width)  # as in all public models
    heads = heads if table is None else table.shape[1]
    if heads == 0 and "head_width" not in said:
        raise ValueError("it does not say how many heads it has; put its config.json beside it")
    head_width = said.get("head_width") or width // heads
    return Shape.from_dict({
        "channels": sizes("frontend.convolutions", "weight", 0),
        "kernels": sizes("frontend.convolutions", "weight", 2),
        "strides": list(said.get("strides", BASE.strides)),
        "width": width,
        "head_width": head_width,
        "heads": [rows // head_width for rows in sizes("layers", "attention.query.weight", 0)],
        "units": sizes("layers", "ffn.input.weight", 0),
        "position_kernel": position[2],
        "position_groups": width // position[1],
        "layer_norms": layer_norms,
        "conv_bias": "frontend.convolutions.1.bias" in weights,
        "buckets": 0 if table is None else table.shape[0],
        "max_distance": 0 if table is None else said.get("max_distance", 800),
    })  # fmt: skip


def check_against(shape, said):
    """Raise ValueError where a file says something else of its model than its tensors do."""
    has = shape.as_dict() | {"layers": len(shape.heads), "pre_norm": shape.layer_norms}  # families have both or neither
    has |= {f"has_{part}": [count > 0 for count in has[part]] for part in ("heads", "units")}
    if shape.buckets:
        has["dense_heads"] = shape.width // shape.head_width
    for name in said.keys() & has.keys() - ({"max_distance"} if shape.buckets else {"max_distance", "buckets"}):
        told, where = said[name]
        if name in ("heads", "units"):  # one number for all layers or one for each; a removed part's has no meaning
            told = told if isinstance(told, list) else [told] * len(shape.heads)
            told = [n if count else 0 for n, count in zip(told, has[name])] + told[len(shape.heads) :]
        if told != has[name]:
            shows = shown([has[name]])
            raise ValueError(f"{where} is {shown([told])}, and its tensors have {shows}, in {name}")


def ctc_head(tensors, said, path):
    """Labels and weights of the head of a Hugging Face CTC model with its vocab.json beside it; else None and {}.

    Its blank becomes the first output. An output that no token names, or one that is no name, has its number as a mark.
    """
    head = {key.rpartition("lm_")[2]: tensor for key, tensor in tensors.items() if re.search(r"\blm_head\.\w+$", key)}
    file = path.with_name("vocab.json")
    if set(head) != {"head.weight", "head.bias"} or not file.is_file():
        return None, {}
    head = {key: floats(f"lm_{key}", tensor, path) for key, tensor in head.items()}
    size = head["head.bias"].numel()
    if any(tensor.shape[:1] != (size,) for tensor in head.values()):
        raise UserError(f"{path}: lm_head.weight and lm_head.bias are not of one size")
    outputs, special = read_vocabulary(file, size)
    if special.get("phone_delimiter_token") or "Phoneme" in str(special.get("tokenizer_class")):
        log.info("%s: is of phones, which no text is compared with; the head of %s is left out", file, path)
        return None, {}
    pad, delimiter = (str(special.get(name)) for name in ("pad_token", "word_delimiter_token"))
    padding = next((outputs[token] for token in (pad, "<pad>", "[PAD]") if token in outputs), None)
    blank, _ = said.get("pad_token_id", (0 if padding is None else padding, ""))
    if type(blank) is not int or not 0 <= blank < size or padding not in (None, blank):
        wrong = f"the padding token is output {padding}, and pad_token_id in config.json is {shown([blank])}"
        raise UserError(f"{file}: {wrong}; which of the head's {size} outputs is CTC's blank? make the two agree")
    labels = [f"<{unit}>" for unit in range(size)]
    for token, unit in outputs.items():
        if data.is_name(token) and token not in (data.BLANK, data.SPACE):
            labels[unit] = token
    space = next((outputs[token] for token in (delimiter, data.SPACE, " ") if token in outputs), None)
    if space is not None:
        labels[space] = data.SPACE
    order = [blank, *(unit for unit in range(size) if unit != blank)]
    log.info("%s: has a CTC head, with the %d labels of %s", path, size, file.name)
    return [data.BLANK, *(labels[unit] for unit in order[1:])], {key: tensor[order] for key, tensor in head.items()}


def read_vocabulary(file, size):
    """The outputs of a head of `size` that vocab.json names, {token: output}, and the tokenizer's special tokens."""
    names = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    first, second, added = (read_json(other) if (other := file.with_name(n)).is_file() else {} for n in names)
    special = {name: text.get("content") if isinstance(text, dict) else text for name, text in (first | second).items()}
    vocab = read_json(file)
    vocab = vocab.get(str(special.get("target_lang")), vocab)
    if not isinstance(vocab, dict) or any(isinstance(unit, dict) for unit in vocab.values()):
        raise UserError(f"{file}: has a vocabulary for each of several languages; leave that of this head alone in it")
    tokens = {}  # an output that the head does not have can never be recognised; of two tokens for one the first counts
    for token, unit in (vocab | added).items():
        if type(unit) is int and 0 <= unit < size:
            tokens.setdefault(unit, token)
    if not tokens:
        raise UserError(f"{file}: names none of the head's {size} outputs; correct it, or take it away")
    return {token: unit for unit, token in tokens.items()}, special
