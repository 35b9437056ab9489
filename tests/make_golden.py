"""Makes tests/golden.pt: tiny wav2vec2 and HuBERT checkpoints and their features, as the public libraries make them.

The tests need nothing but golden.pt. Run this only to make the file anew, in a virtual environment apart from the
project's own, because it needs the libraries themselves:

    python -m venv reference && . reference/bin/activate && pip install "pip<24.1"
    pip install torch==2.13.0 transformers==5.23.0 numpy
    pip install --no-deps torchaudio==2.11.0
    pip install --no-deps hydra-core==1.0.7 omegaconf==2.0.6
    pip install antlr4-python3-runtime==4.8 bitarray sacrebleu
    pip download --no-deps --no-build-isolation --no-binary :all: fairseq==0.12.2 && tar xzf fairseq-0.12.2.tar.gz
    PYTHONPATH=fairseq-0.12.2 python tests/make_golden.py

(Made with Python 3.11. pip 24.1 and later refuse the metadata of omegaconf 2.0.6. fairseq is only imported, not built,
so the unpacked source is enough.) Two libraries need help, which `import_torchaudio` and `import_fairseq` give them at
run time; no file of theirs is changed. The file comes out the same, byte for byte, on the same machine and versions.

What golden.pt holds, all of it readable by `torch.load(..., weights_only=True)`:

    tensors     list of float16 tensors, the weights. They are *views* that overlap in four small storages, which keeps
                the file small while no two tensors are equal. Copy them before writing into one, or saving: `.float()`
                does, and gives contiguous tensors of exactly the values that the features were computed with.
    layouts     name -> {"keys": {key: index into tensors}, "config": dict or None}; the state dict of a layout is
                {key: tensors[index].float() for key, index in keys.items()}, in the library's own order.
                config is what the library writes into config.json (Hugging Face) or the model's part of the training
                arguments (fairseq: build an argparse.Namespace of it); None for torchaudio, whose files have none.
    waveforms   (3, samples) float32, each of zero mean and unit variance over its own samples, then zeros
    lengths     (3,) int64, samples of each
    features    list of 3 (frames, 128) float32: last_hidden_state of transformers for each waveform alone, unpadded
    frontend    list of 3 (frames, 16) float32: the last convolution's output, after its GELU, likewise
    versions    name -> version of each library

Before it writes, the script checks that transformers, torchaudio and fairseq all give these features.

The layouts, and the files they stand for:

    hf_base             Wav2Vec2Model: no prefix, weight norm as parametrizations.weight.original0 / original1
    hf_ctc              Wav2Vec2ForCTC: prefix wav2vec2., and lm_head
    hf_pretraining      Wav2Vec2ForPreTraining: prefix wav2vec2., quantizer, project_q, project_hid
    hf_old              as hf_ctc, weight norm as weight_g / weight_v, as in the public pytorch_model.bin files
    hf_old_pretraining  as hf_pretraining, with weight_g / weight_v: the file of facebook/wav2vec2-base
    hf_hubert           HubertModel: no prefix
    hf_hubert_ctc       HubertForCTC: prefix hubert., and lm_head
    torchaudio          what torchaudio.models.wav2vec2_base() is, smaller
    torchaudio_ctc      the same with aux_num_out: aux
    torchaudio_old      as torchaudio_ctc, with weight_g / weight_v, as torchaudio wrote them until it changed to
                        torch.nn.utils.parametrizations
    fairseq             the "model" of wav2vec_small.pt: mask_emb, quantizer, project_q, final_proj
    fairseq_ctc         the "model" of a CTC fine-tuning of it: prefix w2v_encoder.w2v_model., and w2v_encoder.proj
    fairseq_hubert      the "model" of HuBERT base: label_embs_concat, final_proj
    fairseq_hubert_ctc  the "model" of a CTC fine-tuning of that

What a fairseq file holds beside "model" (from fairseq's sources; the public files could not be fetched for a look):

- until October 2020 (wav2vec_small*.pt): "args", an argparse.Namespace (that of a fine-tuning holds another one as
  its `w2v_args`); "optimizer_history", a list of dicts; "extra_state", a dict with the epoch iterator's position and
  the metrics (an OrderedDict); "last_optimizer_state", tensors twice the size of the model. Whether the file is in
  PyTorch's format from before 1.6 (not a zip file), and whether its weights are float16, is for a loader not to care;
- later (HuBERT): "args" is None and "cfg" a dict of plain values (`OmegaConf.to_container`), "criterion" may be None,
  and "task_state" holds objects of the class fairseq.data.dictionary.Dictionary, for which `weights_only=True` refuses
  the file unless that name is allowed, if only for an inert stand-in (RVC-Project issue 2419).
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import nn

GOLDEN = Path(__file__).parent / "golden.pt"
LENGTHS = (3000, 5217, 7200)
CHANNELS, KERNELS, STRIDES = (12, 8, 10, 6, 8, 14, 16), (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
WIDTH, HEADS, UNITS, LAYERS = 128, 2, 24, 2
VOCABULARY, CODES, CODE_GROUPS, CODE_WIDTH = 11, 4, 2, 8
TOLERANCE = 2e-5  # between libraries, which differ in the order of their additions


# The libraries ------------------------------------------------------------------------------------------------------


def import_torchaudio():
    """torchaudio.models, without the package's own __init__, whose compiled library may not load (it may want CUDA).

    To be called before a model of transformers is named: transformers imports torchaudio where it is installed.
    """
    spec = importlib.util.find_spec("torchaudio")
    parent = types.ModuleType("torchaudio")
    parent.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("torchaudio", parent)
    import torchaudio.models.wav2vec2.utils

    return torchaudio.models


def import_fairseq():
    """fairseq, where Python is 3.11 or later, whose dataclasses refuse defaults that have no hash: give them one."""
    dataclass = dataclasses.dataclass

    def hashable(cls=None, /, **options):
        if cls is None:
            return lambda cls: hashable(cls, **options)
        if cls.__module__.partition(".")[0] in ("fairseq", "hydra", "omegaconf"):
            options.setdefault("unsafe_hash", True)
        return dataclass(cls, **options)

    with mock.patch("dataclasses.dataclass", hashable):
        import fairseq
    return fairseq


@contextlib.contextmanager
def old_weight_norm():
    """Within it, a library that asks for the parametrized weight norm gets the older one: weight_g and weight_v."""
    with mock.patch.object(nn.utils.parametrizations, "weight_norm", nn.utils.weight_norm):
        yield


# The weights --------------------------------------------------------------------------------------------------------


class Weights:
    """Draws weights out of a few pools of random numbers, and knows each again by its value."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        size = 4500  # the largest window spans 3832, and the last one begins at 7 for each one before it
        self.pools = {"gain": (torch.rand(size, generator=generator) + 0.5).half()}
        for name, deviation in ("wide", 0.35), ("middle", 0.15), ("narrow", 0.05):
            self.pools[name] = (torch.randn(size, generator=generator) * deviation).half()
        self.tensors, self.indices = [], {}

    def fill(self, module, skip=()):
        """Gives every parameter of the module that is not in `skip` a value of its own."""
        for name, parameter in module.named_parameters():
            if name not in skip:
                parameter.data.copy_(self.draw(self.pool(name), parameter.shape))

    @staticmethod
    def pool(name):
        """Where a parameter is drawn from, such that features are of order 1 and every part has a say in them.

        The first convolution's output is small, so that the epsilon of the GroupNorm after it is felt; attention is
        neither flat nor one-hot, and does not drown the differences between frames.
        """
        if name.endswith("original0") or "norm" in name and name.endswith("weight"):
            return "gain"
        if "conv_layers.0.conv" in name:
            return "narrow"
        if "conv" in name or "projection" in name:
            return "wide"
        return "middle" if name.endswith(("q_proj.weight", "k_proj.weight", "dense.weight")) else "narrow"

    def draw(self, pool, shape):
        """A window into the pool, whose rows overlap (no two alike), and which begins where no earlier one began."""
        strides = {1: (1,), 2: (29, 1), 3: (29, 3, 1), 4: (1, 29, 1, 1)}[len(shape)]
        tensor = self.pools[pool].as_strided(tuple(shape), strides, 7 * len(self.tensors))
        self.indices[self.identity(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        return tensor

    def index(self, tensor):
        assert torch.equal(tensor, tensor.half().float())
        return self.indices[self.identity(tensor)]

    @staticmethod
    def identity(tensor):
        return tuple(tensor.shape), tensor.detach().half().contiguous().numpy().tobytes()


def to_fairseq(key):
    """The name in fairseq of a weight of transformers' Wav2Vec2ForPreTraining (with weight_g and weight_v)."""
    key = key.removeprefix("wav2vec2.")
    renamed = {"masked_spec_embed": "mask_emb", "quantizer.codevectors": "quantizer.vars"}
    if key in renamed:
        return renamed[key]
    if key.startswith("feature_extractor."):
        return key.replace(".conv.", ".0.").replace(".layer_norm.", ".2.")
    for old, new in (
        ("feature_projection.projection.", "post_extract_proj."),
        ("feature_projection.", ""),
        ("project_hid.", "final_proj."),
        ("encoder.pos_conv_embed.conv.", "encoder.pos_conv.0."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    for old, new in (
        (".attention.", ".self_attn."),
        (".feed_forward.intermediate_dense.", ".fc1."),
        (".feed_forward.output_dense.", ".fc2."),
    ):
        key = key.replace(old, new)
    if key.startswith("encoder.layers.") and ".final_" not in key:
        key = key.replace(".layer_norm.", ".self_attn_layer_norm.")
    return key


# The models ---------------------------------------------------------------------------------------------------------


def transformers_models(weights):
    """Every model of transformers, all with the same weights."""
    sizes = dict(
        conv_dim=CHANNELS,
        conv_kernel=KERNELS,
        conv_stride=STRIDES,
        conv_bias=False,
        feat_extract_norm="group",
        do_stable_layer_norm=False,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=UNITS,
        num_hidden_layers=LAYERS,
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
        vocab_size=VOCABULARY,
    )
    codes = dict(
        num_codevectors_per_group=CODES,
        num_codevector_groups=CODE_GROUPS,
        codevector_dim=CODE_WIDTH,
        proj_codevector_dim=CODE_WIDTH,
    )
    config = transformers.Wav2Vec2Config(**sizes, **codes)
    hubert_config = transformers.HubertConfig(**sizes)

    models = {"hf_pretraining": transformers.Wav2Vec2ForPreTraining(config)}
    weights.fill(models["hf_pretraining"])
    base = models["hf_pretraining"].wav2vec2.state_dict()
    models["hf_ctc"] = transformers.Wav2Vec2ForCTC(config)
    models["hf_ctc"].wav2vec2.load_state_dict(base)
    weights.fill(models["hf_ctc"].lm_head)
    head = models["hf_ctc"].lm_head.state_dict()
    models["hf_base"] = transformers.Wav2Vec2Model(config)
    models["hf_base"].load_state_dict(base)
    models["hf_hubert"] = transformers.HubertModel(hubert_config)
    models["hf_hubert"].load_state_dict(base)
    models["hf_hubert_ctc"] = transformers.HubertForCTC(hubert_config)
    models["hf_hubert_ctc"].hubert.load_state_dict(base)
    models["hf_hubert_ctc"].lm_head.load_state_dict(head)
    with old_weight_norm():
        models["hf_old"] = transformers.Wav2Vec2ForCTC(config)
        models["hf_old_pretraining"] = transformers.Wav2Vec2ForPreTraining(config)
    for old, new in (("hf_old", "hf_ctc"), ("hf_old_pretraining", "hf_pretraining")):
        models[old].load_state_dict(with_old_names(models[new].state_dict()))
    return models


def with_old_names(state):
    names = ("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v")
    for new, old in names:
        state = {key.replace(new, old): value for key, value in state.items()}
    return state


def torchaudio_models(library, hf):
    """torchaudio's, made by its own importer out of transformers'."""
    imported = library.wav2vec2.utils.import_huggingface_model
    models = {"torchaudio": imported(hf["hf_base"]), "torchaudio_ctc": imported(hf["hf_ctc"])}
    with old_weight_norm():
        models["torchaudio_old"] = imported(hf["hf_old"])
    return models


def fairseq_models(weights, hf):
    """fairseq's, and the model part of the training arguments of each."""
    from fairseq.data import Dictionary
    from fairseq.models.hubert import HubertConfig, HubertCtc, HubertModel
    from fairseq.models.hubert.hubert_asr import HubertCtcConfig
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
    from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig, Wav2VecCtc
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
    from omegaconf import OmegaConf

    sizes = dict(
        conv_feature_layers=repr(list(zip(CHANNELS, KERNELS, STRIDES))),
        encoder_embed_dim=WIDTH,
        encoder_attention_heads=HEADS,
        encoder_ffn_embed_dim=UNITS,
        encoder_layers=LAYERS,
        final_dim=CODE_WIDTH,
    )
    letters = Dictionary()
    for letter in "ABCDEFG"[: VOCABULARY - len(letters)]:
        letters.add_symbol(letter)
    wav2vec2 = Wav2Vec2Config(quantize_targets=True, latent_vars=CODES, latent_groups=CODE_GROUPS, **sizes)
    hubert = HubertConfig(label_rate=50, **sizes)
    state = {to_fairseq(key): value for key, value in hf["hf_old_pretraining"].state_dict().items()}
    head = hf["hf_ctc"].lm_head.state_dict()

    models = {"fairseq": Wav2Vec2Model(wav2vec2)}
    models["fairseq"].load_state_dict(state)

    models["fairseq_hubert"] = HubertModel(hubert, HubertPretrainingConfig(), [letters])
    own = set(models["fairseq_hubert"].state_dict())
    shared = {key: value for key, value in state.items() if key in own and not key.startswith("final_proj.")}
    weights.fill(models["fairseq_hubert"], skip=shared)
    models["fairseq_hubert"].load_state_dict(shared, strict=False)

    task = types.SimpleNamespace(target_dictionary=letters, state_dict=lambda: {"dictionaries": [letters]})
    for name, build, options, config, pretraining in (
        ("fairseq", Wav2VecCtc.build_model, Wav2Vec2CtcConfig, wav2vec2, "audio_pretraining"),
        ("fairseq_hubert", HubertCtc.build_model, HubertCtcConfig, hubert, "hubert_pretraining"),
    ):
        pretrained = {"task": {"_name": pretraining, "data": ".", "normalize": False}, "model": plain(config)}
        model = build(options(w2v_args=OmegaConf.create(pretrained), normalize=False, data="."), task)
        own = set(model.w2v_encoder.w2v_model.state_dict())
        state = models[name].state_dict()
        model.w2v_encoder.w2v_model.load_state_dict({key: value for key, value in state.items() if key in own})
        model.w2v_encoder.proj.load_state_dict(head)
        models[name + "_ctc"] = model
    return models, {name: plain(hubert if "hubert" in name else wav2vec2) for name in models}


def plain(config):
    """A configuration of fairseq's as a dict of plain values, as its checkpoints hold it."""
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values | {"_name": "hubert" if "label_rate" in values else "wav2vec2"}


# The rest -----------------------------------------------------------------------------------------------------------


def make_waveforms(seed):
    """Noise, and tones that come and go."""
    options = dict(generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    waveforms = torch.zeros(len(LENGTHS), max(LENGTHS))
    for row, length in zip(waveforms, LENGTHS):
        angle = 2 * math.pi * torch.arange(length) / 16000
        sound = 0.5 * torch.randn(length, **options)
        for _ in range(3):
            frequency, rate, phase = torch.rand(3, **options) * torch.tensor([3000, 12, 6.28])
            sound += torch.sin(frequency * angle) * (1 + torch.sin(rate * angle + phase))
        row[:length] = (sound - sound.mean()) / sound.std(correction=0)
    return waveforms


@torch.no_grad()
def features_of(name, model, waveform):
    """(frames, width) features of one waveform, from any of the libraries' models."""
    model = model.eval()
    waveform = waveform[None]
    if name.startswith("torchaudio"):
        return model.extract_features(waveform)[0][-1][0]
    if name.startswith("fairseq"):
        model = model.w2v_encoder.w2v_model if hasattr(model, "w2v_encoder") else model
        found = model.extract_features(waveform, padding_mask=None, mask=False)
        return (found["x"] if isinstance(found, dict) else found[0])[0]
    model = getattr(model, model.base_model_prefix, model)
    return model(waveform).last_hidden_state[0]


def config_written(model):
    """config.json as the library writes it."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def interned(value):
    """Equal strings made the same object, so that the pickle holds each once."""
    if isinstance(value, dict):
        return {interned(key): interned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [interned(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torchaudio, fairseq = import_torchaudio(), import_fairseq()
    weights = Weights(seed=1)
    hf = transformers_models(weights)
    models, arguments = fairseq_models(weights, hf)
    models = hf | torchaudio_models(torchaudio, hf) | models

    waveforms = make_waveforms(seed=2)
    spoken = [waveform[:length] for waveform, length in zip(waveforms, LENGTHS)]
    features = [features_of("hf_base", hf["hf_base"], waveform) for waveform in spoken]
    with torch.no_grad():
        frontend = [hf["hf_base"].feature_extractor(waveform[None])[0].T.contiguous() for waveform in spoken]
    for name, model in models.items():
        difference = max((features_of(name, model, w) - f).abs().max().item() for w, f in zip(spoken, features))
        print(f"{name:20} {len(model.state_dict()):3} keys, differs from hf_base by at most {difference:.1e}")
        assert difference < TOLERANCE
    for feature in features:
        print("features", tuple(feature.shape), "deviation over time", feature.std(0).mean().item())
        assert 0.3 < feature.std() < 3 and feature.std(0).mean() > 0.1

    golden = {
        "layouts": {
            name: {
                "keys": {key: weights.index(value) for key, value in model.state_dict().items()},
                "config": config_written(model) if name in hf else arguments.get(name),
            }
            for name, model in models.items()
        },
        "tensors": weights.tensors,
        "waveforms": waveforms,
        "lengths": torch.tensor(LENGTHS),
        "features": features,
        "frontend": frontend,
        "versions": {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "torchaudio": importlib.metadata.version("torchaudio"),
            "fairseq": fairseq.__version__,
        },
    }
    assert len(set(weights.indices)) == len(weights.tensors)
    torch.save(interned(golden), GOLDEN)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
