"""The shape of a model of the wav2vec2 family, dense or pruned, and what it costs: multiply-accumulates and parameters.

    python flops.py --seconds 30              # the table of wav2vec2-base, on 30 s of audio
    python sslprune.py --describe CHECKPOINT  # that of any checkpoint, dense or pruned

`cost` is the only cost arithmetic of the project. It uses nothing but +, -, * and //, so integer counts give exact
integers, and expected counts (tensors) give the differentiable expected cost: the counts of different layers are
independent and each enters linearly, hence the expectation of the cost is the cost of the expectations.

One MAC is one multiplication and one addition; FLOPs = 2 MACs. Convolutions, linear layers, Q K^T and A V are counted;
normalisation, activation, softmax and biases are not. The counts stop at the encoder's features: a task head is not
among them.
"""

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

SAMPLE_RATE = 16_000  # Hz, of every waveform in this project
SECONDS = 10  # of audio: the length on which MACs are constrained and reported
SAMPLES = SECONDS * SAMPLE_RATE


class UserError(ValueError):
    """A mistake that the user can fix. The message says in one line what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Shape:
    """Everything that a model's size depends on. Counts are integers, or 0-dimensional tensors when expected."""

    channels: tuple  # outputs of each convolution of the frontend
    kernels: tuple  # width of each
    strides: tuple
    width: int  # features of the residual stream
    head_width: int  # features of one attention head
    heads: tuple  # of each Transformer layer; may be 0
    units: tuple  # of each layer's feed-forward part; may be 0
    position_kernel: int  # of the positional convolution
    position_groups: int
    # Whether LayerNorms stand behind each convolution and before each attention and feed-forward, as in large models.
    # In base, they stand behind attention and feed-forward, and a GroupNorm behind the first convolution.
    layer_norms: bool = False
    conv_bias: bool = False  # whether the convolutions of a large model have biases
    buckets: int = 0  # of WavLM's relative positions; 0 where there are none
    max_distance: int = 0

    def frames(self, samples):
        """Frames after each convolution for `samples` (int or integer tensor): n <- (n - kernel)//stride + 1."""
        counts = []
        for kernel, stride in zip(self.kernels, self.strides):
            samples = (samples - kernel) // stride + 1
            counts.append(samples)
        return counts

    def position_frames(self, frames):
        """Frames that the positional convolution computes: an even kernel makes one too many, which is dropped."""
        return frames + 1 - self.position_kernel % 2

    @property
    def receptive_field(self):
        """The fewest samples that make one frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides)):
            samples = (samples - 1) * stride + kernel
        return samples

    def with_counts(self, counts):
        """This shape with counts replaced; `counts` maps (field, layer) to a count, as in {("heads", 3): 7}."""
        fields = {name: list(getattr(self, name)) for name in ("channels", "heads", "units")}
        for (name, layer), count in counts.items():
            fields[name][layer] = count
        return replace(self, **{name: tuple(values) for name, values in fields.items()})

    def as_dict(self):
        """Plain lists and integers, for checkpoints and reports."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields):
        """The inverse of `as_dict`. Raises TypeError or ValueError where the fields are those of no possible model."""
        shape = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
        convolutions, layers = (shape.channels, shape.kernels, shape.strides), (shape.heads, shape.units)
        positive = [shape.width, shape.head_width, shape.position_kernel, shape.position_groups, *sum(convolutions, ())]
        numbers = [*positive, *sum(layers, ()), shape.buckets, shape.max_distance]
        truths = shape.layer_norms, shape.conv_bias
        if not all(type(truth) is bool for truth in truths) or truths == (False, True):
            raise ValueError("layer_norms and conv_bias do not fit together")
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers) or not all(positive):
            raise ValueError("a number of its shape is not a whole number in range")
        table_fits = shape.buckets % 4 == 0 and shape.max_distance > shape.buckets // 4
        if shape.buckets and not (table_fits and shape.width % shape.head_width == 0):
            raise ValueError("its buckets of relative positions do not fit together")
        equally_many = len(set(map(len, convolutions))) == len(set(map(len, layers))) == 1
        skips = any(kernel < stride for kernel, stride in zip(shape.kernels, shape.strides))
        if not shape.channels or not equally_many or skips or shape.width % shape.position_groups:
            raise ValueError("the numbers of its shape do not fit together")
        return shape


# wav2vec2-base (Baevski et al. 2020); HuBERT-base is the same.
BASE = Shape(
    channels=(512,) * 7, kernels=(10, 3, 3, 3, 3, 2, 2), strides=(5, 2, 2, 2, 2, 2, 2), width=768, head_width=64,
    heads=(12,) * 12, units=(3072,) * 12, position_kernel=128, position_groups=16,
)
# The same family at a fortieth of the size, with base's proportions: the frontend has 31 % of the MACs and 4.9 % of the
# parameters.
SMALL = replace(
    BASE, channels=(80,) * 7, width=192, head_width=32, heads=(6,) * 4, units=(800,) * 4, position_kernel=64,
)


class Part(NamedTuple):
    """MACs and parameters of one part of the model: integers, or tensors when expected."""

    macs: Any
    params: Any


class Cost(NamedTuple):
    """What `cost` returns: a `Part` for each part of the model, and the totals."""

    convolutions: list  # a Part per convolution of the frontend
    frontend: Part  # the sum of these
    projection: Part
    position: Part
    attention_linear: Part  # query, key, value and output maps of all layers
    attention_product: Part  # Q K^T and A V of all layers
    attention: Part  # the sum of these two
    ffn: Part
    total: Part
    macs: Any  # the total's
    params: Any


def cost(shape, samples):
    """MACs and parameters of an encoder of this shape on one utterance of `samples` samples at 16 kHz.

    Every trainable tensor of `transformer.Wav2Vec2` counts as parameters: a normalisation with the layer that it
    follows (the projection's with the projection), the mask embedding with the projection. Two vectors of
    `frontend.Projection` do not, since they are fixed: `scale` and `shut`, which slicing leaves about the LayerNorm.

    Raises ValueError where `samples` is less than the receptive field.
    """
    if samples < shape.receptive_field:
        raise ValueError(f"{samples} samples are fewer than the {shape.receptive_field} that make one frame")
    frame_counts = shape.frames(samples)
    convolutions, inputs = [], 1
    for layer, (outputs, kernel, frames) in enumerate(zip(shape.channels, shape.kernels, frame_counts)):
        weights = inputs * outputs * kernel
        norm = 2 * outputs if layer == 0 or shape.layer_norms else 0
        bias = outputs if shape.conv_bias else 0
        convolutions.append(Part(frames * weights, weights + norm + bias))
        inputs = outputs

    frames, width = frame_counts[-1], shape.width
    layer_norm = 2 * width
    projection = Part(frames * inputs * width, 2 * inputs + (inputs + 1) * width + width)  # LayerNorm, map, mask

    kernel = shape.position_kernel
    weights = width * (width // shape.position_groups) * kernel
    gains = kernel  # weight norm has one for each tap
    position = Part(shape.position_frames(frames) * weights, weights + gains + width + layer_norm)

    biases_and_norms = len(shape.heads) * (width + layer_norm)  # stay even where a layer loses all heads or units
    features = sum(shape.heads) * shape.head_width
    attention_linear = Part(4 * frames * width * features, (4 * width + 3) * features + biases_and_norms)
    if shape.buckets:  # a table of all dense heads; 8 features of each head, with a bias; a scale for each head
        table = shape.buckets * (width // shape.head_width)
        params = table + 8 * (shape.head_width + 1) * len(shape.heads) + sum(shape.heads)
        attention_linear = Part(attention_linear.macs + 8 * frames * features, attention_linear.params + params)
    attention_product = Part(2 * frames * frames * features, 0)
    units = sum(shape.units)
    ffn = Part(2 * frames * width * units, (2 * width + 1) * units + biases_and_norms)
    frontend = Part(*map(sum, zip(*convolutions)))
    attention = Part(*map(sum, zip(attention_linear, attention_product)))
    total = Part(*map(sum, zip(frontend, projection, position, attention, ffn)))
    parts = convolutions, frontend, projection, position, attention_linear, attention_product, attention, ffn, total
    return Cost(*parts, *total)


def table(shape, seconds=SECONDS):
    """The costs of each part on `seconds` of audio, as lines of text."""
    samples = round(seconds * SAMPLE_RATE)
    c, frame_counts = cost(shape, samples), shape.frames(samples)
    frames = frame_counts[-1]
    convolutions = enumerate(zip(shape.channels, frame_counts, c.convolutions), 1)
    rows = [(f"convolution {i} ({channels})", n, part) for i, (channels, n, part) in convolutions]
    rows += [
        ("frontend", None, c.frontend),
        ("projection", frames, c.projection),
        ("positional convolution", shape.position_frames(frames), c.position),
        (f"attention, linear ({sum(shape.heads)} heads)", frames, c.attention_linear),
        ("attention, QK^T and AV", frames, c.attention_product),
        (f"feed-forward ({sum(shape.units)} units)", frames, c.ffn),
        ("all", None, c.total),
    ]
    lines = [f"{'part':<30}{'frames':>9}{'MACs':>19}{'share':>9}{'parameters':>14}{'share':>9}"]
    for name, n, part in rows:
        macs, params = (f"{value:,}{value / whole:9.2%}" for value, whole in zip(part, c.total))
        lines.append(f"{name:<30}{'' if n is None else format(n, ','):>9}{macs:>28}{params:>23}")
    return "\n".join(lines)


def picture(shape, dense):
    """What each layer kept of the dense shape, as lines of text: a # for each whole twentieth."""
    lines = ["what each layer kept"]
    for kind, title in (("channels", "convolution"), ("heads", "heads of layer"), ("units", "units of layer")):
        for layer, (kept, full) in enumerate(zip(getattr(shape, kind), getattr(dense, kind)), 1):
            bar = "#" * max(kept > 0, 20 * kept // max(1, full))
            lines.append(f"{title:>15} {layer:2}  {bar:.<20}  {kept}/{full}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="MACs and parameters of wav2vec2-base, part by part.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of audio at 16 kHz (default %(default)s)")
    parser.error = lambda message: parser.exit(2, f"flops: {message}\n")
    seconds, shortest = parser.parse_args().seconds, BASE.receptive_field / SAMPLE_RATE
    if not shortest <= seconds <= 1e6:
        parser.error(f"--seconds {seconds:g}: give a length from {shortest:g}, which makes one frame, to a million")
    print(table(BASE, seconds))


if __name__ == "__main__":
    main()
