"""The convolutional frontend of wav2vec2-base and the projection of its features (Baevski et al. 2020, arXiv 2006.11477).

    waveform -> [convolution -> (GroupNorm, first layer only) -> GELU] x 7 -> LayerNorm -> linear -> time masks

It has a twentieth of wav2vec2-base's parameters, and a third of its MACs.

Gates. A unit's gate multiplies its output, and what reads it is linear, so the gate is multiplied into the weights that read
it: the same function, without a second pass over a large activation. Slicing does the same once and for all. The exception
is the last convolution, which a LayerNorm reads; see `Projection`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from gates import HardConcrete

PIECE = 4_000  # frames of the first convolution (1.25 s of audio) in a piece: 8 MB at base's 512 channels


def valid(frames, length):
    """Which of `length` frames belong to the utterance: (batch, length) bool from frames (batch,) int."""
    return torch.arange(length, device=frames.device) < frames[:, None]


def keep_rows(layer, rows):
    """Keep only these outputs of a layer, in place: rows of all its parameters."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(parameter[rows]))


def keep_columns(layer, columns, scale=None):
    """Keep only these inputs of a linear layer or convolution, in place, times `scale` (one value per kept input)."""
    weight = layer.weight[:, columns]
    if scale is not None:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 2))
    layer.weight = nn.Parameter(weight)


def linear(x, weight, bias):
    """x W^T + b: (batch, frames, inputs) -> (batch, frames, outputs).

    On the CPU in float32 it is computed as a convolution over one frame, because torch leaves a convolution to oneDNN and a
    matrix product to MKL, and oneDNN is up to twice as fast on processors that are not Intel's. But on one thread torch
    has a slower convolution of its own.
    """
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain and weight.numel() and torch.get_num_threads() > 1:
        return F.conv1d(x.transpose(1, 2), weight[..., None], bias).transpose(1, 2)
    return F.linear(x, weight, bias)


class FirstConvolution(nn.Module):
    """The first convolution and its GroupNorm (one group per channel), with statistics over each utterance's valid frames.

    The public implementations count the padding in (transformers issue 21534, fairseq 3227, torchaudio 2242). Here the
    statistics come from the input: an output is w.p for a patch p of `kernel` samples, so a channel's mean is w.E[p] and its
    variance w.Cov[p].w, exactly. GroupNorm is then a gain and a shift of the kernel, known before the convolution runs, and
    makes no pass over the model's largest activation. The covariance is taken in float64: a high-pass kernel leaves a
    millionth of the power of speech, and float32 would lose that in the sum.
    """

    def __init__(self, channels, kernel, stride, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(channels, 1, kernel)))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.kernel, self.stride, self.eps = kernel, stride, eps

    def forward(self, waveforms, frames=None):
        """The patches p of the waveforms, and the kernel w and shift b of each utterance, such that w p + b is the output.

        waveforms: (batch, samples); frames: (batch,) int, or None where all are valid.
        Returns p (batch, kernel, frames), w (batch, channels, kernel), b (batch, channels, 1).
        """
        patches = waveforms.unfold(1, self.kernel, self.stride).transpose(1, 2).contiguous()
        weight = self.weight[:, 0]
        mean, variance = self.statistics(patches, weight, frames)
        gain = self.norm_weight * torch.rsqrt(variance + self.eps)
        shift = self.norm_bias - gain * mean
        return patches, gain[..., None] * weight, shift[..., None]

    @staticmethod
    def statistics(patches, weight, frames):
        """Mean and variance of each channel over the valid frames: (batch, channels) each, of the weight's dtype."""
        count, centred = patches.shape[2], patches.double()
        if frames is not None:
            outside, count = ~valid(frames, count)[:, None], frames[:, None]
            centred = centred.masked_fill(outside, 0)
        mean = centred.sum(2) / count  # (batch, kernel)
        centred = centred - mean[..., None]
        if frames is not None:
            centred = centred.masked_fill(outside, 0)
        kernel, w = weight.shape[1], weight.double()
        variance = 0
        for lag in range(kernel):  # w.Cov.w, one diagonal of the symmetric Cov at a time
            diagonal = (centred[:, lag:] * centred[:, : kernel - lag]).sum(2) / count
            products = w[:, lag:] * w[:, : kernel - lag] * (1 if lag == 0 else 2)
            variance = variance + (diagonal[:, None] * products).sum(2)
        return (mean[:, None] * w).sum(2).to(weight.dtype), variance.to(weight.dtype)


class Convolution(nn.Module):
    """A later convolution, without bias or padding. Its inputs' gate, if they have one, scales its weights."""

    def __init__(self, inputs, outputs, kernel, stride):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(outputs, inputs, kernel)))
        self.kernel, self.stride = kernel, stride

    def forward(self, x, gate=None):
        """(batch, channels, frames) -> the same."""
        return F.conv1d(x, self.weight if gate is None else self.weight * gate[:, None], stride=self.stride)


class Frontend(nn.Module):
    """The seven convolutions, each with GELU. `gates` is None, or has one HardConcrete per convolution."""

    def __init__(self, shape):
        super().__init__()
        channels, kernels, strides = shape.channels, shape.kernels, shape.strides
        first = FirstConvolution(channels[0], kernels[0], strides[0])
        later = (Convolution(*sizes) for sizes in zip(channels, channels[1:], kernels[1:], strides[1:]))
        self.convolutions = nn.ModuleList([first, *later])
        self.gates = None

    def forward(self, waveforms, frames=None):
        """waveforms: (batch, samples) -> features (batch, frames, channels), and the last layer's gate (channels,) or None.

        frames: (batch,) int, the valid frames after the *first* convolution, or None where there is no padding. The frames
        that are valid after any later one depend on no others.
        """
        first, *later = self.convolutions
        gates = [gate() for gate in self.gates] if self.gates else [None] * len(self.convolutions)
        patches, kernel, shift = first(waveforms, frames)
        outputs, rests = [], [None] * len(later)  # a layer's rest: the frames of the last piece that it has yet to read
        for piece in patches.tensor_split(self.pieces(patches), dim=2):
            x = F.gelu(torch.baddbmm(shift, kernel, piece))
            for layer, convolution in enumerate(later):
                if rests[layer] is not None:
                    x = torch.cat((rests[layer], x), dim=2)
                read = ((x.shape[2] - convolution.kernel) // convolution.stride + 1) * convolution.stride
                rests[layer] = x[..., read:]
                x = F.gelu(convolution(x, gates[layer]))
            outputs.append(x)
        return torch.cat(outputs, dim=2).transpose(1, 2), gates[-1]

    def pieces(self, patches):
        """How many pieces the frames are computed in, one after the other: the same sums, but in the processor's cache.

        Measured on wav2vec2-base, 10 s: the frontend takes two thirds of the time, and the memory of one piece. While training
        all activations are kept for the backward pass, so there is nothing to gain; nor is there on a GPU.
        """
        if torch.is_grad_enabled() or patches.device.type != "cpu":
            return 1
        batch, _, frames = patches.shape
        stride = math.prod(convolution.stride for convolution in self.convolutions[1:])
        return max(1, frames // max(PIECE // batch, 16 * stride))  # each piece is to make a frame in every layer

    def add_gates(self):
        self.gates = nn.ModuleList(HardConcrete(len(convolution.weight)) for convolution in self.convolutions)

    def slice(self):
        """Remove the shut channels, in place. Returns the last layer's kept channels (indices) and their gates."""
        kept = scale = None
        for convolution, gate in zip(self.convolutions, self.gates):
            if kept is not None:
                keep_columns(convolution, kept, scale)
            kept = gate.kept()
            scale = gate()[kept]
            keep_rows(convolution, kept)
        self.gates = None
        return kept, scale


class Projection(nn.Module):
    """LayerNorm over the channels, then the map to the model's width, dropout, and SpecAugment-style time masks.

    LayerNorm does not commute with gates. While gated, its statistics run over the open channels only and shut channels stay
    0 in its output, so that removing them changes nothing; the open gates of a sliced model stay as the vector `scale`.
    """

    def __init__(self, channels, width, dropout=0.1, mask_probability=0.0, mask_length=10):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, width)
        self.mask_embedding = nn.Parameter(torch.empty(width).uniform_())
        self.register_buffer("scale", torch.ones(channels))
        self.dropout = nn.Dropout(dropout)
        self.mask_probability, self.mask_length = mask_probability, mask_length

    def forward(self, x, gate=None):
        """x: (batch, frames, channels), gate: (channels,) or None -> (batch, frames, width)."""
        if gate is None:
            x = self.norm(x * self.scale)
        else:
            x = x * (self.scale * gate)
            is_open = (gate > 0).to(x.dtype)
            count = is_open.sum().clamp(min=1)
            centred = (x - x.sum(2, keepdim=True) / count) * is_open
            variance = centred.square().sum(2, keepdim=True) / count
            x = centred * torch.rsqrt(variance + self.norm.eps) * self.norm.weight + self.norm.bias * is_open
        x = self.dropout(linear(x, self.linear.weight, self.linear.bias))
        if self.training and self.mask_probability:
            x = torch.where(self.time_mask(x)[..., None], self.mask_embedding.to(x.dtype), x)
        return x

    def time_mask(self, x):
        """Spans of `mask_length` frames that start anywhere; without overlaps they would cover `mask_probability` of the frames.

        (0.65 covers half of them. Park et al. 2019, arXiv 1904.08779; with overlaps, as in wav2vec2.) x: (batch, frames, width) -> (batch, frames) bool.
        """
        starts = torch.rand(x.shape[:2], device=x.device) < self.mask_probability / self.mask_length
        earlier = F.pad(starts.float()[:, None], (self.mask_length - 1, 0))
        return F.max_pool1d(earlier, self.mask_length, stride=1)[:, 0] > 0

    def slice(self, kept, scale):
        """Keep only these input channels, in place, and their gates as `scale`."""
        keep_rows(self.norm, kept)
        self.norm.normalized_shape = (len(kept),)
        keep_columns(self.linear, kept)
        self.linear.in_features = len(kept)
        self.scale = self.scale[kept] * scale
