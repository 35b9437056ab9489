"""wav2vec2's convolutional frontend and the projection of its features (Baevski et al. 2020, arXiv 2006.11477).

    base:   waveform -> [convolution -> (GroupNorm, first layer only) -> GELU] x 7 -> LayerNorm -> linear -> masks
    large:  waveform -> [convolution -> LayerNorm -> GELU] x 7 -> LayerNorm -> linear -> masks

It has a twentieth of wav2vec2-base's parameters, and a third of its MACs.

Gates. A gate z multiplies its channel behind the activation. Where a LayerNorm reads the channel, it runs over all C
channels of the dense model, the shut ones being 0, so that the statistics do not jump as a gate shuts. With k kept
channels of C, LayerNorm (weight gamma, bias beta) is

    mean = sum_kept x / C,  variance = (sum_kept (x - mean)^2 + (C - k) mean^2) / C,  rstd = 1 / sqrt(variance + eps)
    y = (x - mean) rstd gamma + beta

Slicing is exact: what reads a channel takes over the gate's value. The projection's LayerNorm gives a shut channel the
value beta - mean rstd gamma, so slicing leaves C and the last vector of

    W LayerNorm(x) + b = W_kept y + (b + W_shut beta_shut) - (mean rstd) W_shut gamma_shut

In the large frontend, LayerNorm of 0 is not 0. There a gate acts twice, before the LayerNorm and behind the activation:

    u = z (w * x + b),  h = z GELU(LayerNorm(u))

so nothing of a shut channel remains. One forward serves the dense (k = C), the gated and the sliced model.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from gates import HardConcrete

TIME_SPAN = 10  # frames of a time mask (fairseq's recipes)
CHANNEL_SPAN = 1 / 12  # of the width, of a channel mask: 64 features of base's 768 (the same)


def valid(frames, length):
    """Which of `length` frames belong to the utterance: (batch, length) bool from frames (batch,) int."""
    return torch.arange(length, device=frames.device) < frames[:, None]


def cut(gate, writers, reader=None, size=1):
    """Remove the shut units of a gate, in place. Returns the outputs that are kept: (kept * size,) int64.

    writers: layers whose outputs are the units, `size` outputs each. reader: the layer whose inputs they are, if any,
    which takes over the gate's values.
    """
    kept = gate.kept()
    rows = (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
    for layer in writers:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(parameter[rows]))
    if reader is not None:
        scale = gate()[kept].repeat_interleave(size)
        reader.weight = nn.Parameter(reader.weight[:, rows] * scale.view(-1, *[1] * (reader.weight.dim() - 2)))
    for layer in (*writers, reader):  # let the attributes of torch's layers say what their tensors are
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        if isinstance(layer, nn.Conv1d):
            layer.out_channels, layer.in_channels, _ = layer.weight.shape
    return rows


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
        self.moments = None  # of the recording whose pieces are recognised, see `Frontend.pieces`

    def forward(self, waveforms, frames=None):
        """waveforms: (batch, samples); frames: (batch,) int, or None: all are valid -> (batch, channels, frames)."""
        patches = waveforms.unfold(1, self.kernel, self.stride).transpose(1, 2).contiguous()
        mean, variance = self.moments or self.moments_of(patches, frames)
        gain = self.norm_weight * torch.rsqrt(variance + self.eps)
        shift = self.norm_bias - gain * mean
        return torch.baddbmm(shift[..., None], gain[..., None] * self.weight[:, 0], patches)

    def moments_of(self, patches, frames):
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

    def moments_of_long(self, waveform, length):
        """`moments_of` a waveform (1, samples) of any length, from parts of about `length` samples."""
        moments, frames = [], (waveform.shape[1] - self.kernel) // self.stride + 1
        for part in torch.arange(frames).split(length // self.stride):
            samples = waveform[:, part[0] * self.stride : part[-1] * self.stride + self.kernel]
            patches = samples.unfold(1, self.kernel, self.stride).transpose(1, 2).contiguous()
            mean, variance = (values.double() for values in self.moments_of(patches, None))
            moments.append(torch.stack((mean, variance + mean.square())) * (len(part) / frames))
        mean, square = sum(moments)
        return mean.to(self.weight.dtype), (square - mean.square()).to(self.weight.dtype)


class Frontend(nn.Module):
    """What both frontends share. `gates` is None, or has one HardConcrete per convolution."""

    def __init__(self):
        super().__init__()
        self.convolutions, self.gates = nn.ModuleList(), None

    def add_gates(self):
        self.gates = nn.ModuleList(HardConcrete(len(convolution.weight)) for convolution in self.convolutions)

    def slice(self):
        """Remove the shut channels, in place; in evaluation mode. Returns the last layer's gate values (channels,)."""
        values = self.gates[-1]()
        for gate, convolution, reader in zip(self.gates, self.convolutions, [*self.convolutions[1:], None]):
            cut(gate, [convolution], reader)
        self.gates = None
        return values

    def pieces(self, waveform, length):
        """A context in which pieces of this waveform (1, samples) have the features that they have in the whole.

        length: samples, of the parts that may be in memory at once. One thread at a time: it sets the module's state.
        """
        return contextlib.nullcontext()


class GroupNormFrontend(Frontend):
    """The seven convolutions of base, each with GELU."""

    def __init__(self, shape):
        super().__init__()
        channels, kernels, strides = shape.channels, shape.kernels, shape.strides
        self.convolutions.append(FirstConvolution(channels[0], kernels[0], strides[0]))
        for sizes in zip(channels, channels[1:], kernels[1:], strides[1:]):
            self.convolutions.append(nn.Conv1d(*sizes, bias=False))
            nn.init.kaiming_normal_(self.convolutions[-1].weight)

    def forward(self, waveforms, frames=None):
        """waveforms: (batch, samples) -> features (batch, frames, channels).

        frames: (batch,) int, the valid frames after the *first* convolution, or None where there is no padding. The
        frames that are valid after any later one depend on no others.
        """
        x = waveforms
        for layer, convolution in enumerate(self.convolutions):
            x = F.gelu(convolution(x) if layer else convolution(x, frames))
            x = x if self.gates is None else x * self.gates[layer]()[:, None].type_as(x)
        return x.transpose(1, 2).contiguous()

    @contextlib.contextmanager
    def pieces(self, waveform, length):
        """As Frontend's: the GroupNorm has the moments of the whole."""
        first = self.convolutions[0]
        first.moments = first.moments_of_long(waveform, length)
        try:
            yield
        finally:
            first.moments = None


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


class LayerNormFrontend(Frontend):
    """The seven convolutions of large models, each with LayerNorm over its channels and GELU."""

    def __init__(self, shape, totals):
        """totals: the channels of the dense model."""
        super().__init__()
        self.norms = nn.ModuleList()
        for *sizes, total in zip((1, *shape.channels), shape.channels, shape.kernels, shape.strides, totals):
            self.convolutions.append(nn.Conv1d(*sizes, bias=shape.conv_bias))
            nn.init.kaiming_normal_(self.convolutions[-1].weight)
            self.norms.append(ChannelNorm(sizes[1], total))

    def forward(self, waveforms, frames=None):
        """As GroupNormFrontend's. A frame's norm depends on no other frame, so `frames` are not needed."""
        x = waveforms[:, None]
        for convolution, norm, gate in zip(self.convolutions, self.norms, self.gates or [None] * len(self.norms)):
            x = convolution(x).transpose(1, 2)
            z = None if gate is None else gate().type_as(x)
            x, _ = norm(x if z is None else x * z)
            x = F.gelu(x) if z is None else F.gelu(x) * z
            x = x.transpose(1, 2)
        return x.transpose(1, 2).contiguous()

    def slice(self):
        """As Frontend's. The convolution takes over the gate that acts before its LayerNorm."""
        for convolution, norm, gate in zip(self.convolutions, self.norms, self.gates):
            for parameter in convolution.parameters():
                parameter.data = parameter * gate().view(-1, *[1] * (parameter.dim() - 1))
            cut(gate, [norm])
        return super().slice()


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

    def forward(self, x, frames):
        """x: (batch, frames, channels), frames: (batch,) int -> (batch, frames, width)."""
        y, scaled_mean = self.norm(x * self.scale)
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

    def slice(self, gate):
        """Keep only the input channels whose gate value is not 0, in place. gate: (channels,)."""
        is_shut = gate == 0
        weight = self.linear.weight[:, is_shut]
        self.shut = self.shut + weight @ self.norm.weight[is_shut]
        self.linear.bias = nn.Parameter(self.linear.bias + weight @ self.norm.bias[is_shut])
        self.linear.weight = nn.Parameter(self.linear.weight[:, ~is_shut])
        self.linear.in_features = self.linear.weight.shape[1]
        self.norm.weight, self.norm.bias = (nn.Parameter(p[~is_shut]) for p in (self.norm.weight, self.norm.bias))
        self.scale = (self.scale * gate)[~is_shut]


def spans(starts, length):
    """Spans of `length` from these starts, (rows, size) bool -> the same.

    Where starts have the probability p / length, spans would cover p of a row if none overlapped (of 0.65, half).
    """
    return F.max_pool1d(F.pad(starts.float()[:, None], (length - 1, 0)), length, stride=1)[:, 0] > 0
