"""wav2vec2-base from scratch: the Transformer over the frontend's features, and the loading of everyone's checkpoints.

    features -> + positional convolution -> LayerNorm -> 12 x [x = LN(x + attention(x)), x = LN(x + ffn(x))]

(Baevski et al. 2020, arXiv 2006.11477; HuBERT-base, Hsu et al. 2021, is the same network.) Not here: the pre-norm variant
with LayerNorm in the frontend ("large-lv60"), the quantizer and the pre-training losses.
"""

import argparse
import copy
import json
import logging
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from flops import BASE, Shape
from frontend import Frontend, Projection, keep_columns, keep_rows, linear, valid
from gates import HardConcrete

log = logging.getLogger("sslprune")


class CheckpointError(ValueError):
    """A file that holds no model of this family. The message names the file, and the first keys concerned."""


class Position(nn.Module):
    """The relative position embedding: a wide grouped convolution with weight norm over its taps, and GELU."""

    def __init__(self, width, kernel, groups):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(width, width // groups, kernel).normal_(std=2 / (kernel * width) ** 0.5))
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(self.weight_v.detach(), dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(width))
        self.kernel, self.groups = kernel, groups

    def forward(self, x):
        """(batch, frames, width) -> the same."""
        norm = self.weight_v.square().sum((0, 1), keepdim=True).sqrt()
        weight = self.weight_v * (self.weight_g / norm)
        y = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        return F.gelu(y[..., : x.shape[1]]).transpose(1, 2)  # an even kernel makes one frame too many


class Attention(nn.Module):
    """Multi-head self-attention. A layer that lost all its heads adds the bias of its output map."""

    def __init__(self, width, heads, head_width, dropout):
        super().__init__()
        self.heads, self.head_width, self.dropout = heads, head_width, dropout
        self.query, self.key, self.value = (nn.Linear(width, heads * head_width) for _ in range(3))
        self.output = nn.Linear(heads * head_width, width)
        self.gate = None

    def forward(self, x, mask=None):
        """x: (batch, frames, width); mask: (batch, 1, 1, frames) bool, true where a key is valid; None where all are. Returns as x."""
        if self.heads == 0:
            return self.output(x[..., :0])  # the bias
        batch, frames, _ = x.shape
        q, k, v = (
            linear(x, layer.weight, layer.bias).view(batch, frames, self.heads, self.head_width).transpose(1, 2).contiguous()
            for layer in (self.query, self.key, self.value)
        )  # contiguous, since the fused attention takes no other
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(batch, frames, -1)
        weight = self.output.weight
        if self.gate is not None:
            weight = weight * self.gate().repeat_interleave(self.head_width)
        return linear(y, weight, self.output.bias)

    def slice(self):
        """Remove the shut heads, in place."""
        kept = self.gate.kept()
        features = (kept[:, None] * self.head_width + torch.arange(self.head_width, device=kept.device)).flatten()
        for layer in (self.query, self.key, self.value):
            keep_rows(layer, features)
            layer.out_features = len(features)
        keep_columns(self.output, features, self.gate()[kept].repeat_interleave(self.head_width))
        self.output.in_features = len(features)
        self.heads, self.gate = len(kept), None


class FeedForward(nn.Module):
    """linear, GELU, linear. A layer that lost all its units adds the bias of its second map."""

    def __init__(self, width, units, dropout):
        super().__init__()
        self.input, self.output = nn.Linear(width, units), nn.Linear(units, width)
        self.dropout = nn.Dropout(dropout)
        self.gate = None

    def forward(self, x):
        """(batch, frames, width) -> the same."""
        y = self.dropout(F.gelu(linear(x, self.input.weight, self.input.bias)))
        weight = self.output.weight if self.gate is None else self.output.weight * self.gate()
        return linear(y, weight, self.output.bias)

    def slice(self):
        """Remove the shut units, in place."""
        kept = self.gate.kept()
        keep_rows(self.input, kept)
        keep_columns(self.output, kept, self.gate()[kept])
        self.input.out_features = self.output.in_features = len(kept)
        self.gate = None


class Layer(nn.Module):
    """One post-norm Transformer block."""

    def __init__(self, width, heads, head_width, units, dropout):
        super().__init__()
        self.attention = Attention(width, heads, head_width, dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, units, dropout)
        self.ffn_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        """x and mask as for Attention -> (batch, frames, width)."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Wav2Vec2(nn.Module):
    """The encoder: dense, gated (after `add_gates`) or sliced (what `slice` returns), as its `shape` says.

    layer_drop and projection.mask_probability act in training only; set them as a recipe asks.
    """

    def __init__(self, shape, dropout=0.1):
        super().__init__()
        self.full_shape = shape  # of the tensors; `shape` is without what the gates shut
        self.frontend = Frontend(shape)
        self.projection = Projection(shape.channels[-1], shape.width, dropout)
        self.position = Position(shape.width, shape.position_kernel, shape.position_groups)
        self.norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(shape.width, heads, shape.head_width, units, dropout) for heads, units in zip(shape.heads, shape.units)
        )
        self.layer_drop = 0.0

    def forward(self, waveforms, lengths=None):
        """Features of a batch of utterances, each the same alone and padded.

        waveforms: (batch, samples) float32, 16 kHz, each normalised to zero mean and unit variance over its own samples.
        lengths: (batch,) int, the samples of each utterance; what is beyond them is not read. None: all are full length.
        Returns features (batch, frames, width), zero beyond each utterance's frames, and frames (batch,) int64.
        Raises ValueError where an utterance is too short to make a frame, or the arguments have other shapes.
        """
        if waveforms.dim() != 2 or not len(waveforms) or lengths is not None and lengths.shape != waveforms.shape[:1]:
            raise ValueError("waveforms must be (batch, samples), and lengths (batch,)")
        if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
            raise ValueError("lengths must be whole numbers")
        batch, samples = waveforms.shape
        shortest, longest = (samples, samples) if lengths is None else (int(lengths.min()), int(lengths.max()))
        if shortest < self.full_shape.receptive_field or longest > samples:
            raise ValueError(
                f"an utterance of {shortest} to {longest} samples: from {self.full_shape.receptive_field}, which make one"
                f" frame, to the {samples} of the batch are possible"
            )
        if shortest == samples:
            lengths = None
        if lengths is None:
            x, gate = self.frontend(waveforms)
            frames = torch.full((batch,), x.shape[1], device=x.device)
            mask = None
        else:
            lengths = lengths.to(waveforms.device, torch.int64)
            waveforms = waveforms.masked_fill(~valid(lengths, samples), 0)  # or a NaN there would reach the gradients
            all_frames = self.full_shape.frames(lengths)
            frames = all_frames[-1]
            x, gate = self.frontend(waveforms, all_frames[0])
            mask = valid(frames, x.shape[1])
        x = self.projection(x, gate)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        x = self.dropout(self.norm(x + self.position(x)))
        for layer in self.layers:
            if self.training and self.layer_drop and torch.rand(()) < self.layer_drop:
                continue
            x = layer(x, None if mask is None else mask[:, None, None])
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        return x, frames

    @property
    def gates(self):
        """The gates by place, as the functions of gates.py take them: {("channels", 0): HardConcrete, ...}."""
        gates = {("channels", layer): gate for layer, gate in enumerate(self.frontend.gates or [])}
        gates |= {("heads", i): layer.attention.gate for i, layer in enumerate(self.layers) if layer.attention.gate is not None}
        gates |= {("units", i): layer.ffn.gate for i, layer in enumerate(self.layers) if layer.ffn.gate is not None}
        return gates

    @property
    def shape(self):
        """The flops.Shape of this model as it is at evaluation: what slicing it now gives."""
        return self.full_shape.with_counts({place: len(gate.kept()) for place, gate in self.gates.items()})

    def add_gates(self, kinds):
        """Give each unit of these kinds ("channels", "heads", "units") a gate, open."""
        if "channels" in kinds:
            self.frontend.add_gates()
        for layer in self.layers:
            if "heads" in kinds and layer.attention.heads:
                layer.attention.gate = HardConcrete(layer.attention.heads)
            if "units" in kinds and layer.ffn.input.out_features:
                layer.ffn.gate = HardConcrete(layer.ffn.input.out_features)
        self.to(self.norm.weight.device).train(self.training)

    @torch.no_grad()
    def slice(self):
        """A new model without gates and without the units that are shut; its evaluation-mode output is this one's."""
        sliced = copy.deepcopy(self).eval()
        sliced.full_shape = self.shape
        if sliced.frontend.gates:
            sliced.projection.slice(*sliced.frontend.slice())
        for layer in sliced.layers:
            for part in (layer.attention, layer.ffn):
                if part.gate is not None:
                    part.slice()
        return sliced


# --- Checkpoints -------------------------------------------------------------------------------------------------------

# From the key names of transformers, torchaudio and fairseq to ours. The three do not contradict each other.
PREFIX = r"(?:wav2vec2\.|hubert\.|w2v_encoder\.w2v_model\.)?"
ENCODER = PREFIX + r"encoder\.(?:transformer\.)?"
KEYS = [
    (PREFIX + r"feature_extractor\.conv_layers\.(\d+)\.(?:conv|0)\.weight", r"frontend.convolutions.\1.weight"),
    (PREFIX + r"feature_extractor\.conv_layers\.0\.(?:layer_norm|2)\.(weight|bias)", r"frontend.convolutions.0.norm_\1"),
    (PREFIX + r"(?:(?:encoder\.)?feature_projection\.)?layer_norm\.(weight|bias)", r"projection.norm.\1"),
    (PREFIX + r"(?:(?:encoder\.)?feature_projection\.projection|post_extract_proj)\.(weight|bias)", r"projection.linear.\1"),
    (PREFIX + r"(?:masked_spec_embed|mask_emb|mask_generator\.mask_embedding)", r"projection.mask_embedding"),
    (ENCODER + r"pos_conv(?:_embed\.conv|\.0)\.bias", r"position.bias"),
    (ENCODER + r"pos_conv(?:_embed\.conv|\.0)\.(?:weight_g|parametrizations\.weight\.original0)", r"position.weight_g"),
    (ENCODER + r"pos_conv(?:_embed\.conv|\.0)\.(?:weight_v|parametrizations\.weight\.original1)", r"position.weight_v"),
    (ENCODER + r"layer_norm\.(weight|bias)", r"norm.\1"),
    (ENCODER + r"layers\.(\d+)\.(?:attention|self_attn)\.q_proj\.(weight|bias)", r"layers.\1.attention.query.\2"),
    (ENCODER + r"layers\.(\d+)\.(?:attention|self_attn)\.k_proj\.(weight|bias)", r"layers.\1.attention.key.\2"),
    (ENCODER + r"layers\.(\d+)\.(?:attention|self_attn)\.v_proj\.(weight|bias)", r"layers.\1.attention.value.\2"),
    (ENCODER + r"layers\.(\d+)\.(?:attention|self_attn)\.out_proj\.(weight|bias)", r"layers.\1.attention.output.\2"),
    (ENCODER + r"layers\.(\d+)\.(?:self_attn_)?layer_norm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    (ENCODER + r"layers\.(\d+)\.(?:feed_forward\.intermediate_dense|fc1)\.(weight|bias)", r"layers.\1.ffn.input.\2"),
    (ENCODER + r"layers\.(\d+)\.(?:feed_forward\.output_dense|fc2)\.(weight|bias)", r"layers.\1.ffn.output.\2"),
    (ENCODER + r"layers\.(\d+)\.final_layer_norm\.(weight|bias)", r"layers.\1.ffn_norm.\2"),
]
KEYS = [(re.compile(pattern), ours) for pattern, ours in KEYS]
INSIDE = re.compile(PREFIX + r"(?:feature_extractor|feature_projection|encoder)\.")  # what no model of this family may have more of

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class Inert:
    """Stands for a class of fairseq's that its checkpoints hold beside the weights; it has no behaviour."""


# What may be unpickled beside tensors and plain containers: what fairseq writes next to its weights.
ALLOWED = [
    argparse.Namespace,  # the training's command line
    (Inert, "fairseq.data.dictionary.Dictionary"),  # HuBERT's labels
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # metrics
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "bool")),
]


def load_pretrained(path):
    """An encoder in evaluation mode from a checkpoint: Hugging Face, fairseq, torchaudio, or a model.pt of ours.

    path: the file, or a folder that holds one. Weights become float32. What the encoder has no use for, such as a task head or
    a quantizer, is named in the log and left out.
    Raises CheckpointError where the file holds no wav2vec2-base-like model, OSError where it cannot be read.
    """
    path, config = find_checkpoint(path)
    contents = read_checkpoint(path)
    if contents.get("format") == "sslprune":
        shape, weights = unpack(contents, path)
        return build(Wav2Vec2, shape, {key.removeprefix("encoder."): w for key, w in weights.items() if key.startswith("encoder.")}, path)
    if isinstance(contents.get("model"), dict):  # fairseq's
        contents = contents["model"]
    weights, ignored = translate(contents, path)
    if ignored:
        log.info("%s: left out what the encoder has no use for, %d entries: %s", path, len(ignored), _shown(ignored))
    shape = infer_shape(weights, config, path)
    weights.setdefault("projection.scale", torch.ones(shape.channels[-1]))
    if "projection.mask_embedding" not in weights:  # torchaudio's models have none
        weights["projection.mask_embedding"] = torch.zeros(shape.width)
        log.info("%s: has no mask embedding; it starts at zero", path)
    return build(Wav2Vec2, shape, weights, path)


def find_checkpoint(path):
    """The checkpoint's file, and its config.json as a dictionary where it has one beside it, else {}."""
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin", "model.pt")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: holds none of {', '.join(names)}; give the file itself")
        path = found[0]
    elif not path.is_file():
        raise CheckpointError(f"{path}: there is no such file or folder")
    config = path.with_name("config.json")
    if path.name not in ("model.safetensors", "pytorch_model.bin") or not config.is_file():
        return path, {}
    try:
        config = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{config}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{config}: is not a model's configuration")
    return path, config


def read_checkpoint(path):
    """The dictionary that a .safetensors file, or a file of torch.save, holds. Nothing in it is executed."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    size = Path(path).stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(record.file_size for record in archive.infolist())
            if unpacked > size:  # torch.save does not compress
                raise CheckpointError(f"{path}: claims {unpacked} bytes in a file of {size}; torch.save writes no such file")
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings(action="ignore"):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile file can raise anything
        refused = re.search(r"GLOBAL ([\w.]+) (?:was not|whose)", str(error))
        why = f"holds an object of type {refused[1]}, which is not loaded" if refused else "is damaged, or not a file of torch.save"
        raise CheckpointError(f"{path}: {why}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: holds a {type(contents).__name__}, not a model's weights")
    for tensors in (contents, *(contents.get(key) for key in ("model", "weights"))):  # where the layouts have their tensors
        for key, tensor in tensors.items() if isinstance(tensors, dict) else ():
            if isinstance(tensor, torch.Tensor) and not _is_plain(tensor, size):
                raise CheckpointError(f"{path}: {_shown([key])} is not a dense tensor of numbers that the file holds")
    return contents


def _is_plain(tensor, size):
    """Whether a tensor is one of numbers that are all in a file of `size` bytes: not sparse, quantized or repeated by its strides."""
    strided = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return strided and not tensor.is_complex() and tensor.numel() * tensor.element_size() <= size


def _shown(keys):
    """The first of some keys, for an error: they come from a file, and may be anything."""
    shown = ", ".join("".join(c if c.isprintable() else "?" for c in str(key))[:80] for key in keys[:4])
    return shown + (" and more" if len(keys) > 4 else "")


def _read_safetensors(path):
    """name -> tensor. The layout: 8 bytes of header length, a JSON header, the tensors' bytes."""
    tensors, used = {}, 0
    data = bytearray(Path(path).stat().st_size)
    with open(path, "rb") as file:
        file.readinto(data)
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, sizes, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = torch.empty(sizes, device="meta").numel()
            if not 0 <= begin <= end <= len(data) - start or end - begin != count * dtype.itemsize:
                raise ValueError(f"{_shown([name])} lies outside of the file")
            used += end - begin
            if used > len(data) - start:
                raise ValueError(f"{_shown([name])} lies where another tensor is")
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).view(sizes) if count else torch.empty(sizes)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: is damaged, or not a safetensors file ({_shown([error])})") from error
    return tensors


def translate(contents, path):
    """Foreign keys to ours: a dictionary of our keys, and the list of the foreign keys that have no place in an encoder."""
    weights, ignored = {}, []
    for key, tensor in contents.items():
        ours = next((match.expand(ours) for pattern, ours in KEYS if (match := pattern.fullmatch(str(key)))), None)
        if ours is not None and isinstance(tensor, torch.Tensor):
            weights[ours] = tensor.float()
        elif INSIDE.match(str(key)):
            raise CheckpointError(f"{path}: {_shown([key])} does not belong to wav2vec2-base or HuBERT-base; no other architecture is read")
        else:
            ignored.append(str(key))
    if not weights:
        found = _shown(ignored) or "nothing"
        raise CheckpointError(f"{path}: holds no wav2vec2 weights of Hugging Face, fairseq, torchaudio or sslprune, but {found}")
    return weights, ignored


def infer_shape(weights, config, path):
    """The shape of a model from its tensors (our keys). What they do not tell is base's, or the config.json's."""
    base_like = {"do_stable_layer_norm": False, "feat_extract_norm": "group", "conv_bias": False, "hidden_act": "gelu", "feat_extract_activation": "gelu"}
    for name, value in base_like.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"{path}: its config.json has {name} = {_shown([config[name]])}; wav2vec2-base and HuBERT-base have {value}")

    def sizes(stack, name, dimension):
        """Of this tensor in every member of a stack of modules; a member that lacks it raises KeyError."""
        numbers = [int(key.split(".")[stack.count(".") + 1]) for key in weights if key.startswith(stack + ".")]
        if max(numbers, default=0) >= len(weights):
            raise ValueError(f"{stack} {max(numbers)} is there, and those before it are not")
        return [weights[f"{stack}.{number}.{name}"].shape[dimension] for number in range(max(numbers, default=-1) + 1)]

    try:
        width, position = weights["norm.weight"].shape[0], weights["position.weight_v"].shape
        head_width = width // config["num_attention_heads"] if "num_attention_heads" in config else BASE.head_width
        return Shape.from_dict({
            "channels": sizes("frontend.convolutions", "weight", 0),
            "kernels": sizes("frontend.convolutions", "weight", 2),
            "strides": list(config.get("conv_stride", BASE.strides)),
            "width": width,
            "head_width": head_width,
            "heads": [rows // head_width for rows in sizes("layers", "attention.query.weight", 0)],
            "units": sizes("layers", "ffn.input.weight", 0),
            "position_kernel": position[2],
            "position_groups": width // position[1],
        })  # fmt: skip
    except KeyError as error:
        raise CheckpointError(f"{path}: lacks {error.args[0]}") from error
    except (IndexError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"{path}: its tensors do not make a wav2vec2-base-like model ({error})") from error


def unpack(contents, path):
    """The shape and the weights of a model.pt of ours."""
    try:
        shape, weights = Shape.from_dict(contents["shape"]), dict(contents["weights"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a complete model.pt ({error})") from error
    for key, tensor in weights.items():
        if not (isinstance(key, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
            raise CheckpointError(f"{path}: is not a complete model.pt ({_shown([key])} is not the name of a tensor of floating-point numbers)")
    return shape, {key: tensor.float() for key, tensor in weights.items()}


def build(make, shape, weights, path):
    """make(shape), a module, with these weights, in evaluation mode. Every tensor must be there and of the right size."""
    if len(shape.channels) + len(shape.heads) > len(weights):  # each has several tensors; and a million would take hours to make
        raise CheckpointError(f"{path}: lacks the tensors of the layers that its shape promises")
    try:
        # On "meta": no memory, no time, as every tensor is assigned below. torch warns of layers without units.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = make(shape)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no model has the shape {shape} ({error})") from error
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    wrong = [f"{key} {tuple(weights[key].shape)} instead of {tuple(tensor.shape)}" for key, tensor in expected.items()
             if key in weights and weights[key].shape != tensor.shape]
    surplus = [key for key in weights if key not in expected]
    infinite = [key for key in weights if not weights[key].isfinite().all()]
    problems = {"lacks": missing, "has a wrong size for": wrong, "has no place for": surplus, "has values that are not finite in": infinite}
    for what, keys in problems.items():
        if keys:
            raise CheckpointError(f"{path}: {what} {_shown(keys)}")
    model.load_state_dict(weights, assign=True)
    return model.eval()
