"""Makes tests/families.pt: tiny models of the larger families and their features, as the public libraries make them.

The tests need nothing but families.pt. To make it anew, see make_golden.py for the environment (without fairseq):

    python tests/make_families.py

families.pt holds what golden.pt does, but for: layouts, zlib of JSON, name -> {"family", "keys", "config"}, where a key
with three indices is a concatenation of three tensors (torchaudio's in_proj); features, family -> list of
(frames, width) float32, last_hidden_state of transformers for each waveform alone.

    lv60          Wav2Vec2ForCTC, pre-norm, LayerNorms and biases in the frontend: lv60, XLSR-53, XLS-R, MMS
    hubert_large  HubertForCTC, the same
    hubert_plain  HubertForCTC without the biases, as torchaudio's HuBERT-large is
    wavlm         WavLMForCTC, post-norm, GroupNorm: WavLM-base and base-plus
    wavlm_large   WavLMForCTC, pre-norm, LayerNorms in the frontend without biases: WavLM-large

Each is there as hf_ctc, torchaudio and fairseq. torchaudio's are made by its own importer. fairseq's and unilm's names
(unilm is no package) come from transformers' by renaming.
"""

import json
import re
import zlib

import torch
import transformers
from make_golden import GOLDEN, Weights, config_written, import_torchaudio, to_fairseq, with_old_names

TORCHAUDIO = import_torchaudio()  # before a model of transformers is named, which would import all of torchaudio
FAMILIES = GOLDEN.with_name("families.pt")
LENGTHS = (2000, 2900)
SIZES = dict(
    conv_dim=(12, 8, 10, 6, 8, 14, 16), conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2),
    hidden_size=64, intermediate_size=24, num_hidden_layers=2, num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4, vocab_size=11,
)  # fmt: skip
LAYER_NORMS = dict(feat_extract_norm="layer", do_stable_layer_norm=True, num_attention_heads=16)
BUCKETS = dict(num_buckets=16, max_bucket_distance=20)  # so few that even these utterances reach beyond
MODELS = {
    "lv60": (transformers.Wav2Vec2ForCTC, transformers.Wav2Vec2Config, dict(conv_bias=True, **LAYER_NORMS)),
    "hubert_large": (transformers.HubertForCTC, transformers.HubertConfig, dict(conv_bias=True, **LAYER_NORMS)),
    "hubert_plain": (transformers.HubertForCTC, transformers.HubertConfig, dict(conv_bias=False, **LAYER_NORMS)),
    "wavlm": (transformers.WavLMForCTC, transformers.WavLMConfig, dict(num_attention_heads=4, **BUCKETS)),
    "wavlm_large": (transformers.WavLMForCTC, transformers.WavLMConfig, dict(**LAYER_NORMS, **BUCKETS)),
}


def to_unilm(key, has_group_norm):
    """The name in fairseq, or in unilm and s3prl, of a weight of transformers (with weight_g and weight_v)."""
    key = key.replace("rel_attn_embed.", "relative_attention_bias.").replace("gru_rel_pos_linear.", "grep_linear.")
    key = to_fairseq(key.replace("gru_rel_pos_const", "grep_a"))
    return key if has_group_norm else re.sub(r"(conv_layers\.\d+\.2\.)(?=weight|bias)", r"\g<1>1.", key)


def arguments(family, config):
    """What fairseq's and unilm's files say of the model."""
    said = {
        "extractor_mode": "layer_norm" if config.feat_extract_norm == "layer" else "default",
        "layer_norm_first": config.do_stable_layer_norm,
        "conv_bias": config.conv_bias,
        "conv_feature_layers": repr(list(zip(config.conv_dim, config.conv_kernel, config.conv_stride))),
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": "gelu",
    }
    if "wavlm" in family:
        said |= {"relative_position_embedding": True, "num_buckets": config.num_buckets, "gru_rel_pos": True}
        said |= {"max_distance": config.max_bucket_distance}
    return said


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    waveforms = torch.zeros(len(LENGTHS), max(LENGTHS))
    for row, length in zip(waveforms, LENGTHS):
        sound = torch.randn(length, generator=generator) + torch.sin(torch.arange(length) * 0.07)
        row[:length] = (sound - sound.mean()) / sound.std(correction=0)
    weights, layouts, features = Weights(seed=4), {}, {}
    for family, (kind, config_of, more) in MODELS.items():
        ctc = kind(config_of(**SIZES, **more)).eval()
        weights.fill(ctc)
        encoder = getattr(ctc, ctc.base_model_prefix)
        states = {"hf_ctc": (ctc.state_dict(), config_written(ctc))} if family != "hubert_plain" else {}
        has_group_norm, old = ctc.config.feat_extract_norm == "group", with_old_names(encoder.state_dict())
        renamed = {to_unilm(key, has_group_norm): value for key, value in old.items()}
        states["fairseq"] = renamed, arguments(family, ctc.config)
        imported = TORCHAUDIO.wav2vec2.utils.import_huggingface_model(encoder).eval()
        states["torchaudio"] = imported.state_dict(), None
        with torch.no_grad():
            spoken = [waveform[None, :length] for waveform, length in zip(waveforms, LENGTHS)]
            features[family] = [encoder(waveform).last_hidden_state[0] for waveform in spoken]
            for waveform, expected in zip(spoken, features[family]):
                difference = (imported(waveform)[0][0] - expected).abs().max().item()
                print(f"{family:14} torchaudio differs by {difference:.1e}, deviation {expected.std().item():.2f}")
                assert difference < 2e-5 and 0.3 < expected.std() < 3 and expected.std(0).mean() > 0.1
        for name, (state, config) in states.items():
            keys = {}
            for key, value in state.items():
                if "in_proj" in key:  # torchaudio's, of the three in one
                    keys[key] = [weights.index(part) for part in value.chunk(3)]
                else:
                    keys[key] = weights.index(value)
            layouts[f"{name}_{family}"] = {"family": family, "keys": keys, "config": config}
    packed = zlib.compress(json.dumps(layouts).encode())  # names take most of the room
    golden = {"layouts": packed, "tensors": weights.tensors, "waveforms": waveforms, "features": features}
    torch.save(golden | {"lengths": torch.tensor(LENGTHS)}, FAMILIES)
    print(f"{FAMILIES.name}: {FAMILIES.stat().st_size} bytes")


if __name__ == "__main__":
    main()
