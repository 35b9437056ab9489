"""wav2vec2-base's convolutional frontend and the projection of its features (Baevski et al. 2020, arXiv 2006.11477).

    waveform -> [convolution -> (GroupNorm, first layer only) -> GELU] x 7 -> LayerNorm -> linear -> masks

It has a twentieth of wav2vec2-base's parameters, and a third of its MACs.

Gates. A gate multiplies its unit's output. What reads the unit is linear, so the gate is multiplied into the weights
that read it: the same function, without a second pass over a large activation. Slicing does the same once and for all.
The last convolution is the exception, since a LayerNorm reads it: its gates multiply the channels themselves, and
LayerNorm (weight gamma, bias beta) runs over all C channels of the dense model, the shut ones being 0. A shut channel's
normalised value is then beta - mean rstd gamma, so slicing needs only C and one vector of the rest. With k kept
channels of C, and rstd = 1 / sqrt(variance + eps),

    mean = sum_kept x / C,  variance = (sum_kept (x - mean)^2 + (C - k) mean^2) / C,  y = (x - mean) rstd gamma + beta
    W LayerNorm(x) + b = W_kept y + (b + W_shut beta_shut) - (mean rstd) W_shut gamma_shut

is exact, and one forward serves the dense (k = C), the gated and the sliced model.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gates import HardConcrete

TIME_SPAN = 10  # frames of a time mask (fairseq's recipes)
CHANNEL_SPAN = 1 / 12  # of the width, of a channel mask: 64 features of base's 768 (the same)


def valid(frames, length):
    """Which of `length` frames belong to the utterance: (batch, length) bool from frames (batch,) int."""
    return torch.arange(length, device=frames.device) < frames[:, None]


def gated(layer, x, gate):
    """layer(x * gate) for a linear layer or a convolution, with the gate of its inputs (inputs,) in the weights."""
    weight = layer.weight * gate.view(-1, *[1] * (layer.weight.dim() - 2))
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv1d(x, weight, stride=layer.stride)


def keep_rows(layer, rows):
    """Keep only these outputs of a layer, in place: rows of all its parameters."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(parameter[rows]))
    _set_sizes(layer)


def keep_columns(layer, columns, scale=None):
    """Keep only these inputs of a linear layer or convolution, in place, times `scale` (one value per kept input)."""
    weight = layer.weight[:, columns]
    if scale is not None:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 2))
    layer.weight = nn.Parameter(weight)
    _set_sizes(layer)


def _set_sizes(layer):
    """Let the attributes of torch's layers say what their tensors are."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    if isinstance(layer, nn.Conv1d):
        layer.out_channels, layer.in_channels, _ = layer.weight.shape


class FirstConvolution(nn.Module):
    """The first convolution and its GroupNorm (a group per channel), with statistics over an utterance's valid frames.

    The public implementations count the padding in (transformers issue 21534, fairseq 3227, torchaudio 2242). Here the
    statistics come from the input: an output is w.p for a patch p of `kernel` samples, so a channel's mean is w.E[p]
    and its variance w.Cov[p].w, exactly. GroupNorm is then a gain and a shift of the kernel, known before the
    convolution runs, and makes no pass over the model's largest activation. The covariance is taken in float64: a
    high-pass kernel leaves a millionth of the power of speech, and float32 would lose that in the sum.
    """

    def __init__(self, channels, kernel, stride, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(channels, 1, kernel)))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.kernel, self.stride, self.eps = kernel, stride, eps

    def forward(self, waveforms, frames=None, statistics=None):
        """waveforms: (batch, samples); frames: (batch,) int, or None: all are valid -> (batch, channels, frames).

        statistics: mean and variance, (batch, channels) each, to normalise with; None: the waveforms' own.
        """
        patches = waveforms.unfold(1, self.kernel, self.stride).transpose(1, 2).contiguous()
        mean, variance = statistics or self.statistics(patches, frames)
        gain = self.norm_weight * torch.rsqrt(variance + self.eps)
        shift = self.norm_bias - gain * mean
        return torch.baddbmm(shift[..., None], gain[..., None] * self.weight[:, 0], patches)

    def statistics(self, patches, frames):
        """Mean and variance, (batch, channels) each, of channels over the valid of patches (batch, kernel, frames)."""
        centred, count = patches.double(), patches.shape[2]
        if frames is not None:
            outside, count = ~valid(frames, count)[:, None], frames[:, None]
            centred = centred.masked_fill(outside, 0)
        mean = centred.sum(2) / count  # (batch, kernel)
        centred = centred - mean[..., None]
        if frames is not None:
            centred = centred.masked_fill(outside, 0)
        w, variance = self.weight[:, 0].double(), 0
        for lag in range(self.kernel):  # w.Cov.w, one diagonal of the symmetric Cov at a time
            diagonal = (centred[:, lag:] * centred[:, : self.kernel - lag]).sum(2) / count
            products = w[:, lag:] * w[:, : self.kernel - lag] * (1 if lag == 0 else 2)
            variance = variance + (diagonal[:, None] * products).sum(2)
        return (mean[:, None] * w).sum(2).to(self.weight.dtype), variance.to(self.weight.dtype)

    def statistics_of_long(self, waveform, length):
        """`statistics` of a waveform (1, samples) of any length, from parts of about `length` samples."""
        moments, frames = [], (waveform.shape[1] - self.kernel) // self.stride + 1
        for part in torch.arange(frames).split(length // self.stride):
            samples = waveform[:, part[0] * self.stride : part[-1] * self.stride + self.kernel]
            patches = samples.unfold(1, self.kernel, self.stride).transpose(1, 2).contiguous()
            mean, variance = (values.double() for values in self.statistics(patches, None))
            moments.append(torch.stack((mean, variance + mean.square())) * (len(part) / frames))
        mean, square = sum(moments)
        return mean.to(self.weight.dtype), (square - mean.square()).to(self.weight.dtype)


class Frontend(nn.Module):
    """The seven convolutions, each with GELU. `gates` is None, or has one HardConcrete per convolution."""

    def __init__(self, shape):
        super().__init__()
        channels, kernels, strides = shape.channels, shape.kernels, shape.strides
        self.convolutions = nn.ModuleList([FirstConvolution(channels[0], kernels[0], strides[0])])
        for sizes in zip(channels, channels[1:], kernels[1:], strides[1:]):
            self.convolutions.append(nn.Conv1d(*sizes, bias=False))
            nn.init.kaiming_normal_(self.convolutions[-1].weight)
        self.gates = None

    def forward(self, waveforms, frames=None, statistics=None):
        """waveforms: (batch, samples) -> features (batch, frames, channels), and the last layer's gate (channels,).

        frames: (batch,) int, the valid frames after the *first* convolution, or None where there is no padding. The
        frames that are valid after any later one depend on no others. The gate is None where there are no gates.
        """
        gates = [gate() for gate in self.gates] if self.gates else [None] * len(self.convolutions)
        first, *later = self.convolutions
        x = F.gelu(first(waveforms, frames, statistics))
        for convolution, gate in zip(later, gates):  # each with the gate of the one before it, whose channels it reads
            x = F.gelu(convolution(x) if gate is None else gated(convolution, x, gate))
        return x.transpose(1, 2).contiguous(), gates[-1]

    def add_gates(self):
        self.gates = nn.ModuleList(HardConcrete(len(convolution.weight)) for convolution in self.convolutions)

    def slice(self):
        """Remove the shut channels, in place; in evaluation mode, where gates are not sampled.

        Returns the last layer's kept channels (indices), and its gate.
        """
        kept = scale = None
        for convolution, gate in zip(self.convolutions, self.gates):
            if kept is not None:
                keep_columns(convolution, kept, scale)
            kept = gate.kept()
            scale = gate()[kept]
            keep_rows(convolution, kept)
        last, self.gates = self.gates[-1](), None
        return kept, last


class ChannelNorm(nn.Module):
    """LayerNorm over `total` channels of which all but the given are 0; see the module's docstring."""

    def __init__(self, channels, total, eps=1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.total, self.eps = total, eps

    def forward(self, x):
        """x: (batch, frames, channels) -> y (the same), and mean * rstd (batch, frames, 1)."""
        mean = x.sum(2, keepdim=True) / self.total
        centred = x - mean
        squares = centred.square().sum(2, keepdim=True) + (self.total - x.shape[2]) * mean.square()
        rstd = torch.rsqrt(squares / self.total + self.eps)
        return centred * rstd * self.weight + self.bias, mean * rstd


class Projection(nn.Module):
    """LayerNorm over the channels, then the map to the model's width, dropout, and masks over time and over features.

    scale: (channels,), the gates of the kept channels, and shut: (width,), W_shut gamma_shut, are what slicing leaves.
    time_mask, channel_mask: probabilities; see `spans`. They act in training only (SpecAugment, Park et al. 2019, arXiv
    1904.08779, as in wav2vec2: a learnt embedding for the masked frames, 0 for the masked features).
    """

    def __init__(self, channels, width, total, dropout=0.1):
        super().__init__()
        self.norm, self.linear = ChannelNorm(channels, total), nn.Linear(channels, width)
        self.mask_embedding = nn.Parameter(torch.empty(width).uniform_())
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("shut", torch.zeros(width))
        self.dropout = nn.Dropout(dropout)
        self.time_mask = self.channel_mask = 0.0

    def forward(self, x, frames, gate=None):
        """x: (batch, frames, channels), frames: (batch,) int, gate: (channels,) or None -> (batch, frames, width)."""
        y, scaled_mean = self.norm(x * (self.scale if gate is None else self.scale * gate))
        x = self.dropout(self.linear(y) - scaled_mean * self.shut)
        if self.training and self.time_mask:
            starts = torch.rand(x.shape[:2], device=x.device) < self.time_mask / TIME_SPAN
            first = (torch.rand(len(x), device=x.device) * frames).long()  # an utterance without a span gets one here
            starts = starts | ~starts.any(1, keepdim=True) & F.one_hot(first, x.shape[1]).bool()
            x = torch.where(spans(starts, TIME_SPAN)[..., None], self.mask_embedding.to(x.dtype), x)
        if self.training and self.channel_mask:
            length = max(1, round(CHANNEL_SPAN * x.shape[2]))
            starts = torch.rand(len(x), x.shape[2], device=x.device) < self.channel_mask / length
            x = x.masked_fill(spans(starts, length)[:, None], 0)
        return x

    def slice(self, kept, gate):
        """Keep only these input channels (indices), in place; gate: (channels,) of all."""
        is_shut = torch.ones_like(gate, dtype=torch.bool).index_fill(0, kept, False)
        weight = self.linear.weight[:, is_shut]
        self.shut = self.shut + weight @ self.norm.weight[is_shut]
        self.linear.bias = nn.Parameter(self.linear.bias + weight @ self.norm.bias[is_shut])
        keep_rows(self.norm, kept)
        keep_columns(self.linear, kept)
        self.scale = self.scale[kept] * gate[kept]


def spans(starts, length):
    """Spans of `length` from these starts, (rows, size) bool -> the same.

    Where starts have the probability p / length, spans would cover p of a row if none overlapped (of 0.65, half).
    """
    return F.max_pool1d(F.pad(starts.float()[:, None], (length - 1, 0)), length, stride=1)[:, 0] > 0
