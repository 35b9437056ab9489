"""Loading: every public layout gives the features of transformers, and what is no such file is refused in one line."""

import argparse
import dataclasses
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import HERE, TINY, state_dict, tiny, write_layout, write_safetensors

import transformer
from flops import SMALL, UserError
from gates import KINDS
from sslprune import save_model
from transformer import SpeechModel, load, load_pretrained, read_checkpoint, read_pickle

LAYOUTS = [
    "hf_base", "hf_ctc", "hf_pretraining", "hf_old", "hf_old_pretraining", "hf_hubert", "hf_hubert_ctc",
    "torchaudio", "torchaudio_ctc", "torchaudio_old", "fairseq", "fairseq_ctc", "fairseq_hubert", "fairseq_hubert_ctc",
]  # fmt: skip


def test_the_golden_file_has_these_layouts(golden):
    assert sorted(golden["layouts"]) == sorted(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_features_of_transformers(golden, layout, tmp_path):
    model = load_pretrained(write_layout(tmp_path, golden, layout))
    assert not model.training
    assert (model.shape.heads, model.shape.head_width, model.shape.units) == ((2, 2), 64, (24, 24))
    waveforms, lengths = golden["waveforms"], golden["lengths"]
    with torch.no_grad():
        batch, frames = model(waveforms, lengths)
        for row, (waveform, n, expected) in enumerate(zip(waveforms, lengths, golden["features"])):
            assert (model(waveform[None, :n])[0][0] - expected).abs().max() < 1e-4
            assert frames[row] == len(expected)
            assert (batch[row, : len(expected)] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_every_layout_lands_in_its_place(golden, layout, tmp_path):
    """Features alone would not show it: softmax cancels the key's bias, and masks act in training only."""
    ours = load_pretrained(write_layout(tmp_path, golden, layout)).state_dict()
    theirs = state_dict(golden, "hf_base")
    if layout.startswith("torchaudio"):  # its models have no mask embedding
        theirs["masked_spec_embed"] = torch.zeros(128)
    assert len(ours) == len(theirs) + 2  # what slicing leaves
    assert (ours.pop("projection.scale") == 1).all()
    assert (ours.pop("projection.shut") == 0).all()
    for tensor in theirs.values():
        assert sum(tensor.shape == other.shape and torch.equal(tensor, other) for other in ours.values()) == sum(
            tensor.shape == other.shape and torch.equal(tensor, other) for other in theirs.values()
        )
    assert torch.equal(ours["layers.1.attention.key.bias"], theirs["encoder.layers.1.attention.k_proj.bias"])


def test_what_is_left_out_is_named(golden, tmp_path, caplog):
    caplog.set_level("INFO")
    load_pretrained(write_layout(tmp_path, golden, "hf_pretraining"))
    for key in ("quantizer.codevectors", "project_hid.weight"):
        assert key in caplog.text


def test_half_precision_weights_become_float32(golden, tmp_path):
    write_safetensors(tmp_path / "half.safetensors", {k: v.half() for k, v in state_dict(golden, "hf_base").items()})
    model = load_pretrained(tmp_path / "half.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.norm.weight, state_dict(golden, "hf_base")["encoder.layer_norm.weight"])


def test_our_own_file_in_half_precision_becomes_float32(tmp_path):
    weights = {f"encoder.{key}": tensor.half() for key, tensor in tiny().state_dict().items()}
    torch.save(
        {"format": "sslprune", "shape": TINY.as_dict(), "dense": TINY.as_dict(), "weights": weights},
        tmp_path / "model.pt",
    )
    assert {p.dtype for p in load_pretrained(tmp_path).parameters()} == {torch.float32}


def test_a_pruned_model_loads_from_its_own_file(tmp_path):
    model = SpeechModel(tiny(KINDS["mac"]).slice(), "slu", ["yes", "no"]).eval()
    save_model(model, tmp_path / "model.pt")
    loaded, encoder, waveforms = load(tmp_path), load_pretrained(tmp_path), torch.randn(1, 3_000)
    assert (loaded.encoder.shape, loaded.encoder.dense, loaded.task, loaded.labels) == (
        model.encoder.shape,
        TINY,
        "slu",
        ["yes", "no"],
    )
    with torch.no_grad():
        assert torch.equal(loaded(waveforms)[0], model(waveforms)[0])
        assert torch.equal(encoder(waveforms)[0], model.encoder(waveforms)[0])
    contents = torch.load(tmp_path / "model.pt", weights_only=True)
    del contents["dense"]
    torch.save(contents, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "complete", "dense")


@pytest.mark.parametrize(
    "dense", [TINY.as_dict() | {"channels": [8, 12, 10, 8, 6, 9, 2]}, TINY.as_dict() | {"heads": [3, 2]}]
)
def test_a_dense_shape_of_which_the_model_is_no_part_is_refused(tmp_path, dense):
    save_model(SpeechModel(tiny(), "slu", ["yes", "no"]), tmp_path / "model.pt")
    torch.save(torch.load(tmp_path / "model.pt", weights_only=True) | {"dense": dense}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "dense")


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(path, *words):
    with pytest.raises(UserError) as info:
        load_pretrained(path)
    message = str(info.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in (path.name, *words):
        assert word in message, message


def test_a_hostile_pickle_is_not_executed(golden, tmp_path):
    trap = tmp_path / "trap"
    torch.save({"model": state_dict(golden, "fairseq"), "args": Hostile(trap)}, tmp_path / "zip.pt")
    torch.save({"model": Hostile(trap)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Hostile(trap)))
    refused(tmp_path / "zip.pt", "mkdir")
    refused(tmp_path / "legacy.pt")
    refused(tmp_path / "bare.bin")
    assert not trap.exists()
    with open(tmp_path / "bare.bin", "rb") as file:  # the trap does work
        pickle.load(file)
    assert trap.exists()


OBJECTS = """
import argparse, collections, dataclasses, datetime, enum, functools, pathlib, sys, types, uuid
import numpy as np, torch

framework = sys.modules["framework"] = types.ModuleType("framework")

def of_framework(made):
    made.__module__ = "framework"
    setattr(framework, made.__name__, made)
    return made

Mode = of_framework(enum.Enum("Mode", {"A": "a", "B": "b"}))
Config = of_framework(dataclasses.make_dataclass("Config", [("lr", float, 0.1)]))
Frozen = of_framework(dataclasses.make_dataclass("Frozen", [("lr", float, 0.1)], frozen=True, slots=True))
Attributes = of_framework(type("Attributes", (dict,), {}))
Items = of_framework(type("Items", (list,), {}))
Stateful = of_framework(type("Stateful", (), {"__getstate__": lambda self: [1, 2], "__setstate__": print}))
work = of_framework(types.FunctionType((lambda: None).__code__, {}, "work"))
work.__qualname__ = "work"
attributes, defaults, cycle = Attributes(lr=1), collections.defaultdict(list, a=[1]), of_framework(type("C", (), {}))()
attributes.extra, cycle.itself = 1, cycle
everything = [
    pathlib.PosixPath("/a/b"), pathlib.PureWindowsPath("c:/x"), datetime.datetime.now(datetime.timezone.utc),
    uuid.uuid4(),
    np.int32(1), np.float16(1), np.datetime64("2020-01-01"), np.arange(3), np.array([1, "a"], object), np.array(["a"]),
    np.zeros(2, [("a", "i4")]), np.random.default_rng(0), np.dtype("f4"), attributes, defaults, cycle, Items([1, 2]),
    collections.Counter("abc"), collections.deque([1, 2], 3), functools.partial(work, 1, a=2), work, Mode, Mode.A,
    Config(), Frozen(), Stateful(), argparse.Namespace(a=1), types.SimpleNamespace(a=1), {Mode.A: 1}, {Mode.B, 1},
    frozenset([1]), torch.nn.Linear(2, 2), ValueError("a"), range(3), slice(1), 1j, bytearray(b"a"), ..., print, eval,
]
tensors = torch.load(sys.argv[1], weights_only=True)
torch.save({"hyper_parameters": {"all": everything}, "state_dict": tensors, "callbacks": everything}, sys.argv[1])
for number, thing in enumerate(everything):
    torch.save({"a": thing, "state_dict": tensors}, f"{sys.argv[1]}.{number}")
    torch.save({"a": thing, "state_dict": tensors}, f"{sys.argv[1]}.{number}.old", _use_new_zipfile_serialization=False)
"""


def test_tensors_load_whatever_objects_stand_beside_them(golden, tmp_path, capfd):
    """Their classes are in no module that could be imported here."""
    path = tmp_path / "x.pt"
    torch.save({"encoder.layer_norm.weight": torch.ones(3)}, path)
    subprocess.run([sys.executable, "-c", OBJECTS, str(path)], check=True)
    files = list(tmp_path.iterdir())
    assert len(files) > 80
    for file in files:
        try:
            tensors = read_pickle(file)["state_dict"]
        except UserError as error:  # in torch's format of before zip files, a module and a range
            assert file.name in ("x.pt.31.old", "x.pt.33.old") and "save the model's state_dict alone" in str(error)
        else:
            assert torch.equal(tensors["encoder.layer_norm.weight"], torch.ones(3)), file
    assert capfd.readouterr().out == ""


class DictConfig:  # as omegaconf's: the values are in its _content, each in a node
    pass


def held(value):
    """A plain value as omegaconf holds it."""
    config = DictConfig()
    if isinstance(value, dict):
        config.__dict__ = {"_parent": config, "_content": {key: held(inner) for key, inner in value.items()}}
    elif isinstance(value, list):
        config.__dict__ = {"_parent": config, "_content": [held(inner) for inner in value]}
    else:
        config.__dict__ = {"_parent": config, "_val": value}
    return config


def test_what_an_object_says_is_obeyed_as_a_dictionary_is(golden, tmp_path):
    layers = [[12, 10, 5], [8, 3, 2], [10, 3, 3], [6, 3, 2], [8, 3, 2], [14, 2, 2], [16, 2, 2]]
    said = {"model": {"encoder_attention_heads": 4, "conv_feature_layers": layers, "extractor_mode": "default"}}
    torch.save({"cfg": held(said), "model": state_dict(golden, "fairseq")}, tmp_path / "x.pt")
    shape = load_pretrained(tmp_path / "x.pt").shape
    assert (shape.heads, shape.strides) == ((4, 4), (5, 2, 3, 2, 2, 2, 2))
    said["model"]["layer_norm_first"] = True
    torch.save({"cfg": held(said), "model": state_dict(golden, "fairseq")}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "cfg.model.layer_norm_first is True")


def test_objects_that_hold_each_other_a_million_times_take_no_time(golden, tmp_path):
    inner = {}
    for _ in range(8):
        inner = {key: inner for key in range(1000)} | {"conv_stride": [[inner] * 100] * 100}
    torch.save({"cfg": inner, "model": state_dict(golden, "fairseq")}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "shape")


class Asks:
    """Unpickling this would call a function of any module."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_a_function_of_another_module_would_do_is_not_done(golden, tmp_path, is_zip):
    trap = str(tmp_path / "trap")
    asked = [Asks(eval, f"open({trap!r}, 'w')"), Asks(open, trap, "w"), Asks(subprocess.Popen, ["touch", trap])]
    for thing in [*asked, Asks(getattr, Asks(__import__, "os"), "system")]:
        contents = {"x": thing, "model": state_dict(golden, "fairseq")}
        torch.save(contents, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
        try:
            load_pretrained(tmp_path / "x.pt")
        except UserError:  # the format of before zip files names some of them otherwise
            assert not is_zip
        assert not os.path.exists(trap)
    with pytest.raises(UserError, match="holds .*system"):
        torch.save({"x": Asks(os.system, f"touch {trap}")}, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
        load_pretrained(tmp_path / "x.pt")
    assert not os.path.exists(trap)


def test_the_one_checkpoint_of_a_folder_is_found_whatever_its_ending_says(golden, tmp_path):
    path = tmp_path / "wav2vec2.safetensors"
    torch.save(state_dict(golden, "hf_base"), path)
    (tmp_path / "._wav2vec2.safetensors").write_bytes(b"\0\5\x16\7")  # as macOS leaves it
    assert load_pretrained(tmp_path).shape.width == 128
    path.rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match="holds an adapter alone"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("layout", ["hf_old", "hf_base", "torchaudio"])
def test_a_truncated_file_is_refused(golden, layout, tmp_path):
    path = write_layout(tmp_path, golden, layout)
    path = path if path.is_file() else next(p for p in path.iterdir() if p.suffix != ".json")
    whole = path.read_bytes()
    for share in (0, 0.0001, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path)


def change(golden, layout="hf_base", **changed):
    tensors = state_dict(golden, layout)
    for key, value in changed.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"encoder.layers.1.feed_forward.output_dense.bias": None}, ["layers.1.ffn.output.bias"]),
        ({"feature_extractor.conv_layers.3.conv.weight": None}, ["frontend.convolutions.3.weight"]),
        ({"encoder.layer_norm.weight": None}, ["norm.weight"]),
        ({"masked_spec_embed": torch.zeros(5)}, ["mask_embedding", "(5,)", "(128,)"]),
        ({"encoder.layers.0.attention.q_proj.weight": torch.zeros(128, 100)}, ["layers.0.attention.query.weight"]),
        ({"encoder.layers.0.attention.q_proj.weight": torch.zeros(100, 128)}, ["layers.0.attention"]),
        ({"feature_projection.projection.weight": torch.zeros(3)}, ["projection.linear.weight", "(3,)"]),
        ({"encoder.pos_conv_embed.conv.parametrizations.weight.original1": torch.zeros(128, 0, 128)}, []),
        (
            {"feature_extractor.conv_layers.1.layer_norm.weight": torch.ones(8)},
            ["lacks", "frontend.norms.1.bias"],
        ),
        ({"feature_extractor.conv_layers.1.conv.bias": torch.ones(8)}, ["layer_norms and conv_bias"]),
        ({"encoder.layers.0.attention.rel_attn_embed.weight": torch.ones(8)}, ["wav2vec2 family"]),
        ({"encoder.layers.0.attention.rel_attn_embed.weight": torch.ones(8, 3)}, ["relative positions"]),
        ({"encoder.layers.0.attention.rel_attn_embed.weight": torch.ones(8, 2)}, ["lacks", "attention.position_scale"]),
        ({"encoder.layers.0.adapter_layer.norm.weight": torch.ones(8)}, ["adapter_layer", "no other architecture"]),
    ],
)
def test_a_tensor_too_many_too_few_or_of_the_wrong_size_is_named(golden, tmp_path, changed, words):
    path = tmp_path / "changed.pt"
    torch.save(change(golden, **changed), path)
    refused(path, *words)


def test_files_of_something_else_are_refused(tmp_path):
    torch.save({"weight": torch.ones(3), "bias": torch.ones(3)}, tmp_path / "linear.pt")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    torch.save({"model": 3}, tmp_path / "number.pt")
    torch.save({"format": "sslprune", "shape": {"channels": [1]}, "weights": {}}, tmp_path / "shape.pt")
    torch.save({"format": "sslprune", "shape": TINY.as_dict() | {"width": -1}, "weights": {}}, tmp_path / "negative.pt")
    torch.save(
        {"format": "sslprune", "shape": TINY.as_dict(), "dense": TINY.as_dict(), "weights": {"encoder.norm.weight": 3}},
        tmp_path / "weights.pt",
    )
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "arguments.pt")
    whole = {f"encoder.{key}": tensor for key, tensor in tiny().state_dict().items()}
    wrong = {
        "surplus": torch.ones(1),
        "integers": torch.ones(32, dtype=torch.int64),
        "complex": torch.ones(32, dtype=torch.complex64),
        "nan": torch.full((32,), torch.nan),
    }
    for name, tensor in wrong.items():
        key = "encoder.extra" if name == "surplus" else "encoder.norm.bias"
        torch.save(
            {"format": "sslprune", "shape": TINY.as_dict(), "dense": TINY.as_dict(), "weights": whole | {key: tensor}},
            tmp_path / f"weights-{name}.pt",
        )
    (tmp_path / "text.txt").write_text("{} is a set of braces\n")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in tmp_path.iterdir():
        refused(path)
    refused(tmp_path / "missing.pt", "no such file")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [128], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [128], "data_offsets": [10**9, 10**9 + 512]},
        {"dtype": "F32", "shape": [128], "data_offsets": [-512, 0]},
        {"dtype": "F32", "shape": [-128], "data_offsets": [0, 512]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 512]},
        {"dtype": "F32", "shape": "128", "data_offsets": [0, 512]},
        {"dtype": "F32", "shape": [128]},
        7,
    ],
)
def test_a_safetensors_header_that_lies_is_refused(golden, tmp_path, entry):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, state_dict(golden, "hf_base"), **{"encoder.layer_norm.weight": entry})
    refused(path, "damaged")


def test_a_safetensors_header_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for length in (2**63, 10**6, 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        refused(path)


def test_safetensors_that_share_their_bytes_are_refused(golden, tmp_path):
    path, entry = tmp_path / "model.safetensors", {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]}
    tensors = state_dict(golden, "hf_base")
    write_safetensors(path, tensors, **{f"quantizer.{i}": entry for i in range(5)})
    refused(path, "damaged", "another tensor")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"weights": torch.zeros(2**20)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in whole.infolist():
            bomb.writestr(record.filename, whole.read(record))
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    refused(tmp_path / "bomb.pt", "claims 4")


@pytest.mark.parametrize("how", ["repeated", "sparse", "complex", "many layers"])
def test_tensors_that_are_not_in_the_file_are_refused(tmp_path, how):
    encoder = tiny()
    contents = {
        "format": "sslprune",
        "shape": TINY.as_dict(),
        "dense": TINY.as_dict(),
        "weights": {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()},
    }
    if how == "many layers":
        contents["dense"] = contents["shape"] = contents["shape"] | {"heads": [1] * 300_000, "units": [1] * 300_000}
    else:
        changed = {
            "repeated": torch.ones(1).half().expand(2**45),
            "sparse": torch.eye(32).to_sparse(),
            "complex": torch.ones(32, dtype=torch.complex64),
        }
        contents["weights"]["encoder.norm.weight"] = changed[how]
    torch.save(contents, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "layers" if how == "many layers" else "encoder.norm.weight")


def test_names_from_a_file_cannot_steer_a_terminal(tmp_path):
    torch.save({"\x1b[2Jweight\n": torch.ones(3)}, tmp_path / "escape.pt")
    refused(tmp_path / "escape.pt", "?[2Jweight?")
    torch.save({"encoder.\x1b[2J": torch.ones(3)}, tmp_path / "escape.pt")
    refused(tmp_path / "escape.pt", "encoder.?[2J")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_stable_layer_norm", True),
        ("feat_extract_norm", "layer"),
        ("conv_bias", True),
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-6),
        ("add_adapter", True),
        ("num_hidden_layers", 3),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "renamed.safetensors"])
def test_a_config_of_another_architecture_is_refused(golden, tmp_path, name, value, file):
    path = write_layout(tmp_path, golden, "hf_base") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    refused(tmp_path / file, "layers" if name == "num_hidden_layers" else name)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"num_attention_heads": 1e400}',
        '{"conv_stride": [1e400]}',
        '{"num_attention_heads": 0}',
        '{"num_attention_heads": "two"}',
        '{"conv_stride": 5}',
    ],
)
def test_a_damaged_config_is_refused(golden, tmp_path, text):
    (write_layout(tmp_path, golden, "hf_base") / "config.json").write_text(text)
    with pytest.raises(UserError):
        load_pretrained(tmp_path)


# --- What wraps the keys, and what a file says of itself ---


def features(model, golden):
    with torch.no_grad():
        return model(golden["waveforms"], golden["lengths"])[0]


def wrapped(tensors, how):
    """The tensors as tools save them."""
    middle = {"_fsdp_wrapped_module": "encoder.layers.", "_checkpoint_wrapped_module": "encoder.layers."}
    if how in middle:  # around the whole, and around each layer
        return {
            f"{how}." + re.sub(r"^(encoder\.layers\.\d+)\.", rf"\1.{how}.", key): tensor
            for key, tensor in tensors.items()
        }
    if how == "lightning":
        state = {f"model.wav2vec2.{key}": tensor for key, tensor in tensors.items()} | {
            "model.classifier.weight": torch.ones(3, 128)
        }
        return {
            "epoch": 3,
            "global_step": 7,
            "state_dict": state,
            "optimizer_states": [{"state": {}}],
            "hyper_parameters": {"lr": 1e-4},
        }
    if how in ("state_dict", "model_state_dict", "model_weight", "model"):
        return {how: tensors, "step": 3}
    if how == "deep":
        return {
            "checkpoint": {
                "ema": None,
                "net": {f"_orig_mod.module.student.{key}": tensor for key, tensor in tensors.items()},
            }
        }
    return {f"{how}.{key}": tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "how",
    [
        "module",
        "_orig_mod",
        "_orig_mod.module",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "encoder.backbone",
        "lightning",
        "state_dict",
        "model_state_dict",
        "model_weight",
        "model",
        "deep",
    ],
)
@pytest.mark.parametrize("layout", ["hf_base", "torchaudio", "fairseq"])
def test_whatever_wraps_the_keys_is_seen_through(golden, tmp_path, layout, how):
    torch.save(wrapped(state_dict(golden, layout), how), tmp_path / "x.ckpt")
    expected = load_pretrained(write_layout(tmp_path, golden, layout))
    model = load_pretrained(tmp_path / "x.ckpt")
    assert torch.equal(features(model, golden), features(expected, golden))


def test_two_encoders_in_a_file_are_refused_by_their_names(golden, tmp_path):
    tensors = state_dict(golden, "hf_base")
    torch.save(
        {f"{name}.{key}": tensor for name in ("student", "teacher") for key, tensor in tensors.items()},
        tmp_path / "x.pt",
    )
    refused(tmp_path / "x.pt", "student", "teacher")
    torch.save({"state_dict": tensors, "ema_state_dict": dict(tensors)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "state_dict., ema_state_dict.", "give one alone")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_put_together_by_their_index(golden, tmp_path, ending):
    tensors = state_dict(golden, "hf_ctc")
    names, weight_map = sorted(tensors), {}
    for shard in range(3):
        part = {name: tensors[name] for name in names[shard::3]}
        file = f"{'model' if ending == 'safetensors' else 'pytorch_model'}-{shard}.{ending}"
        write_safetensors(tmp_path / file, part) if ending == "safetensors" else torch.save(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / ("model.safetensors.index.json" if ending == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for path in (tmp_path, index):
        assert (features(load_pretrained(path), golden)[0, :9] - golden["features"][0][:9]).abs().max() < 1e-4
    (tmp_path / file).unlink()
    refused(index, file)
    index.write_text('{"weight_map": 5}')
    refused(index, "index")


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("hf_base", "encoder.pos_conv_embed.conv."),
        ("fairseq", "encoder.pos_conv.0."),
        ("torchaudio", "encoder.transformer.pos_conv_embed.conv."),
    ],
)
def test_a_positional_weight_without_its_norm_loads(golden, tmp_path, layout, key):
    tensors = state_dict(golden, layout)
    expected = load_pretrained(write_layout(tmp_path, golden, layout))
    v, g = (
        next(tensors.pop(name) for name in list(tensors) if name.startswith(key) and name.endswith(ends))
        for ends in (("weight_v", "original1"), ("weight_g", "original0"))
    )
    tensors[key + "weight"] = v / v.square().sum((0, 1), keepdim=True).sqrt() * g
    torch.save(tensors, tmp_path / "x.pt")
    assert (features(load_pretrained(tmp_path / "x.pt"), golden) - features(expected, golden)).abs().max() < 1e-5


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("layout", ["hf_ctc", "torchaudio", "fairseq"])
def test_pruned_weights_are_multiplied_with_their_masks(golden, tmp_path, layout, prefix):
    tensors, masked = state_dict(golden, layout), {}
    torch.manual_seed(0)
    for key, tensor in tensors.items():
        mask = (torch.rand_like(tensor) < 0.5).float()
        parts = {"_orig": tensor, "_mask": mask} if key.endswith(("weight", "weight_v")) else {"": tensor}
        masked |= {f"{prefix}{key}{part}": value for part, value in parts.items()}
        tensors[key] = tensor * mask if len(parts) == 2 else tensor
    torch.save(tensors, tmp_path / "expected.pt")
    torch.save(masked, tmp_path / "x.pt")
    expected = load_pretrained(tmp_path / "expected.pt").state_dict()
    found = load_pretrained(tmp_path / "x.pt").state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_mask_that_is_missing_or_of_another_size_is_named(golden, tmp_path):
    tensors, key = state_dict(golden, "hf_base"), "encoder.layer_norm.weight"
    tensors[f"{key}_orig"] = tensors.pop(key)
    torch.save(tensors, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", f"{key}_orig", "without its mask")
    torch.save(tensors | {f"{key}_mask": torch.ones(5)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", f"{key}_mask", "one size")


def test_heads_of_every_kind_are_left_out_and_named(golden, tmp_path, caplog):
    """XVector's has an entry that is named as the frontend is."""
    caplog.set_level("INFO")
    tensors = state_dict(golden, "hf_ctc")
    heads = {
        "feature_extractor.weight": torch.ones(5, 9),
        "tdnn.0.kernel.weight": torch.ones(4, 4),
        "projector.bias": torch.ones(4),
        "layer_weights": torch.ones(3),
        "num_batches_tracked": torch.tensor(3),
        "mask": torch.ones(2, dtype=torch.bool),
        "codes.weight": torch.ones(4, dtype=torch.int8),
    }
    torch.save(tensors | heads, tmp_path / "x.pt")
    load_pretrained(tmp_path / "x.pt")
    assert "feature_extractor.weight" in caplog.text
    write_safetensors(
        tmp_path / "x.safetensors",
        tensors | {key: tensor.float() for key, tensor in heads.items()},
        codes={"dtype": "I8", "shape": [0], "data_offsets": [0, 0]},
    )
    load_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_quantized_weights_inside_the_encoder_are_refused_by_name(golden, tmp_path, dtype):
    key = "encoder.layers.1.attention.k_proj.weight"
    torch.save(state_dict(golden, "hf_base") | {key: torch.ones(128, 128).to(dtype)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", key, "16 bits")


@pytest.mark.parametrize("where", ["config.json", "args", "cfg", "nested cfg"])
def test_heads_and_strides_are_what_the_file_says(golden, tmp_path, where):
    """Four heads of 32, where the golden model has two of 64; the third convolution with a stride of 3."""
    strides = [5, 2, 3, 2, 2, 2, 2]
    said = {
        "encoder_attention_heads": 4,
        "conv_feature_layers": "[(12, 10, 5)] + [(8, 3, 2)] + [(10, 3, 3)] + [(6, 3, 2)]"
        " + [(8, 3, 2), (14, 2, 2), (16, 2, 2)]",
    }
    path = tmp_path / "anything.pt"
    contents = {
        "config.json": state_dict(golden, "hf_base"),
        "args": {"args": argparse.Namespace(**said), "model": state_dict(golden, "fairseq")},
        "cfg": {"args": None, "cfg": {"model": said, "task": {"data": "x"}}, "model": state_dict(golden, "fairseq")},
        "nested cfg": {
            "cfg": {"model": {"encoder_embed_dim": 768, "w2v_args": argparse.Namespace(model=said)}},  # a default
            "model": state_dict(golden, "fairseq_ctc"),
        },
    }[where]
    torch.save(contents, path)
    if where == "config.json":
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "conv_stride": strides}))
    shape = load_pretrained(path).shape
    assert (shape.heads, shape.head_width, list(shape.strides)) == ((4, 4), 32, strides)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_norm_first", True),
        ("activation_fn", "relu"),
        ("extractor_mode", "layer_norm"),
        ("conv_bias", True),
        ("encoder_layers", 12),
    ],
)
def test_a_fairseq_model_of_another_architecture_is_refused_by_name(golden, tmp_path, name, value):
    torch.save(
        {"cfg": {"model": {"encoder_attention_heads": 2, name: value}}, "model": state_dict(golden, "fairseq")},
        tmp_path / "x.pt",
    )
    refused(tmp_path / "x.pt", "layers" if name == "encoder_layers" else name)
    for holder in ({"cfg": {"model": {name: value}}}, {"args": argparse.Namespace(**{name: value})}):  # said alone
        torch.save(holder | {"model": state_dict(golden, "fairseq")}, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", "layers" if name == "encoder_layers" else name)


@pytest.mark.parametrize("name", ["do_stable_layer_norm", "conv_bias", "add_adapter", "feat_extract_activation"])
@pytest.mark.parametrize("holder", ["hyper_parameters", "config"])
def test_what_a_file_says_in_the_names_of_hugging_face_is_obeyed(golden, tmp_path, name, holder):
    value = "relu" if name.endswith("activation") else True
    torch.save({holder: {name: value}, "state_dict": state_dict(golden, "hf_base")}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", name)
    said = {"num_attention_heads": 4, name: None, "feat_proj_layer_norm": True}
    torch.save({holder: said, "state_dict": state_dict(golden, "hf_base")}, tmp_path / "x.pt")
    assert load_pretrained(tmp_path / "x.pt").shape.heads == (4, 4)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    refused(tmp_path / "x.pt", "contradicts itself", "num_attention_heads is 2", f"{holder}.num_attention_heads is 4")


def test_tensors_of_kinds_that_no_encoder_has_are_ignored_outside_of_it(golden, tmp_path):
    path, tensors, key = tmp_path / "model.safetensors", state_dict(golden, "hf_base"), "encoder.layer_norm.bias"
    first = torch.zeros(4, dtype=torch.float16)  # whose bytes are said to be others
    expected = load_pretrained(write_layout(tmp_path, golden, "hf_base")).state_dict()
    for dtype in ("I8", "F8_E4M3", "F8_E8M0", "BOOL"):
        said = {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}
        write_safetensors(path, {"head.x": first} | tensors, **{"head.x": said})
        found = load_pretrained(path).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        del tensors[key]
        write_safetensors(path, {key: first} | tensors, **{key: said})
        refused(path, key, "16 bits")
        tensors = state_dict(golden, "hf_base")


def test_tensors_are_found_six_levels_deep(golden, tmp_path):
    nested = state_dict(golden, "hf_base")
    for name in "edcba":
        nested = {name: nested}
    torch.save(nested, tmp_path / "x.pt")
    load_pretrained(tmp_path / "x.pt")


@pytest.mark.parametrize("layers", ["[[12, 10, 5], [8, 3, 2]]", "[(12, 10)]", 7])
def test_strides_that_cannot_be_read_or_are_too_few_are_refused(golden, tmp_path, layers):
    model = state_dict(golden, "fairseq")
    torch.save({"cfg": {"model": {"conv_feature_layers": layers}}, "model": model}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "do not fit" if layers == "[[12, 10, 5], [8, 3, 2]]" else "conv_feature_layers")


def test_what_has_to_be_assumed_is_said_in_one_line_and_only_then(golden, tmp_path, caplog):
    caplog.set_level("INFO")
    load_pretrained(write_layout(tmp_path, golden, "hf_base"))
    load_pretrained(write_layout(tmp_path, golden, "fairseq"))
    assert "are assumed" not in caplog.text
    torch.save(state_dict(golden, "torchaudio"), tmp_path / "folder.pt")
    (tmp_path / "config.json").unlink()
    load_pretrained(tmp_path / "folder.pt")
    (line,) = [record.getMessage() for record in caplog.records if "are assumed" in record.getMessage()]
    assert all(word in line for word in ("heads of 64", "strides", "norm"))


def test_a_git_lfs_pointer_is_named_as_one(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 377667514\n")
        refused(tmp_path / name, "git-lfs", "git lfs pull")


def test_the_pretrained_model_in_the_repository_is_the_small_one():
    """See pretrain.py."""
    model = load_pretrained(HERE / "experiment" / "pretrained")
    assert model.shape == SMALL
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/"):
        with pytest.raises(UserError, match="is no file"):
            save_model(SpeechModel(tiny(), "slu", ["a"]), path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_the_bare_tensors_of_a_model_of_ours_are_refused_with_what_to_do(tmp_path):
    torch.save(SpeechModel(tiny(), "slu", ["a"]).state_dict(), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "shape", "save_model")


# --- A fine-tuned CTC model keeps its head ---


def write_ctc(folder, golden, tokens, bias=torch.arange(11.0), **config):
    """A CTC model as Hugging Face saves one; its head's bias has the numbers of its outputs."""
    write_layout(folder, golden, "hf_ctc")
    tensors = state_dict(golden, "hf_ctc")
    tensors["lm_head.bias"] = bias
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "vocab.json").write_text(json.dumps(tokens))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return tensors


def test_a_fine_tuned_ctc_model_keeps_its_head_and_vocabulary(golden, tmp_path):
    tokens = {
        "[PAD]": 9,
        "|": 4,
        "a": 0,
        "b": 1,
        "<s>": 2,
        "é": 3,
        "'": 5,
        "d": 6,
        "[UNK]": 7,
        "ß": 8,
    }  # and one without a name
    tensors = write_ctc(tmp_path, golden, tokens, pad_token_id=9)
    model = load(tmp_path)
    assert model.task == "asr"
    assert model.labels == ["<pad>", "A", "B", "<s>", "É", "|", "'", "D", "[UNK]", "ß", "<10>"]
    with torch.no_grad():
        scores, frames = model(golden["waveforms"][:1, :3000])
        hidden = golden["features"][0]
        expected = hidden @ tensors["lm_head.weight"].T + tensors["lm_head.bias"]
    assert (scores[0] - expected[:, [9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10]]).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("tokens", "said", "labels"),
    [
        ({"a": 0, " ": 1, "[PAD]": 2}, {}, "<pad> A |"),
        ({"a": 0, "_": 1, "|": 2, "<pad>": 3}, {"word_delimiter_token": "_"}, "<pad> A | <2>"),
        ({"a": 0, "<space>": 1, "<pad>": 2}, {"word_delimiter_token": "<space>"}, "<pad> A |"),
        ({"σ": 1, "ς": 2, "’": 3, "[PAD]": 0, "A": 4, "a": 5}, {}, "<pad> Σ Σ ' A a"),
        ({"ا": 0, "\u200c": 1, "<pad>": 2}, {}, "<pad> ا \u200c"),
    ],
)
def test_vocabularies_of_other_tokenizers(golden, tmp_path, tokens, said, labels):
    write_ctc(tmp_path, golden, tokens, pad_token_id=None)
    if said:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    model = load(tmp_path)
    assert model.labels[: len(tokens)] == labels.split(" ")
    save_model(model, tmp_path / "model.pt")
    assert load(tmp_path / "model.pt").labels == model.labels


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"a": 99, "b": "c", "d": -1, "e": True}, ["names none", "11"]),
        ({"eng": {"a": 0}}, ["languages"]),
        ({"a": 0, "[PAD]": 1}, ["output 1", "pad_token_id", "is 0"]),
    ],
)
def test_a_vocabulary_that_does_not_fit_its_head_is_refused_by_name(golden, tmp_path, tokens, words):
    write_ctc(tmp_path, golden, tokens, pad_token_id=0)
    with pytest.raises(UserError) as info:
        load_pretrained(tmp_path)
    assert all(word in str(info.value) for word in ("vocab.json", *words)), info.value


def test_an_odd_entry_does_not_cost_the_head(golden, tmp_path):
    """Phonemes, an id beyond the head, one twice, one that is none, a hole, and a token that no line can show."""
    tokens = {"<pad>": 0, "tʃ": 1, "|": 2, "a": 3, "b": 99, "c": 3, "d": "e", "\x85": 4, "f": 5}
    write_ctc(tmp_path, golden, tokens, pad_token_id=0)
    (tmp_path / "added_tokens.json").write_text('{"<s>": 11, "[NOISE]": 10}')
    assert load(tmp_path).labels == "<pad> tʃ | A <4> F <6> <7> <8> <9> [NOISE]".split()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_blank_and_the_space_are_those_of_the_tokenizer(golden, tmp_path, file):
    write_ctc(tmp_path, golden, {"<pad>": 0, "*": 1, "#": 2, "|": 3}, pad_token_id=None)
    said = {"pad_token": {"content": "*"}, "word_delimiter_token": "#"}
    (tmp_path / file).write_text(json.dumps(said))
    assert load(tmp_path).labels[:4] == ["<pad>", "<0>", "|", "<3>"]
    (tmp_path / file).write_text('{"pad_token": "*", "word_delimiter_token": null}')
    assert load(tmp_path).labels[:4] == ["<pad>", "<0>", "#", "|"]


def test_what_a_broken_head_or_tokenizer_says_is_one_line(golden, tmp_path):
    write_ctc(tmp_path, golden, {"<pad>": 0, "|": 1}, pad_token_id=0)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": ["*"], "word_delimiter_token": {"content": {}}}')
    assert load(tmp_path).labels[:2] == ["<pad>", "|"]
    write_ctc(tmp_path, golden, {"<pad>": 0}, bias=torch.zeros(12))
    refused(tmp_path / "model.safetensors", "lm_head.bias")


def test_characters_stay_as_they_are_with_raw_text(golden, tmp_path):
    write_ctc(tmp_path, golden, {"<pad>": 0, "a": 1, "ß": 2, "N": 3, "n": 4, "th": 5}, pad_token_id=0)
    assert load(tmp_path).labels[:6] == ["<pad>", "A", "ß", "N", "n", "th"]
    model = read_checkpoint(tmp_path).model(raw_text=True)
    assert model.raw_text and model.labels[:6] == ["<pad>", "a", "ß", "N", "n", "th"]
    save_model(model, tmp_path / "model.pt")
    again = load(tmp_path / "model.pt")
    assert again.raw_text and again.labels == model.labels
    with pytest.raises(UserError, match="as they are; give --raw-text"):
        read_checkpoint(tmp_path / "model.pt").model(raw_text=False)
    (tmp_path / "normal").mkdir()
    save_model(SpeechModel(tiny(), "asr", ["<pad>", "|", "A"]), tmp_path / "normal" / "model.pt")
    with pytest.raises(UserError, match="normalised; leave out --raw-text"):
        read_checkpoint(tmp_path / "normal").model(raw_text=True)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_model_for_another_rate_is_refused_by_name_and_one_without_normalisation_is_told(
    golden, tmp_path, name, caplog
):
    caplog.set_level("INFO")
    write_layout(tmp_path, golden, "hf_base")
    for rate in (16_000, 8_000):
        said = {"sampling_rate": rate, "do_normalize": True}
        (tmp_path / name).write_text(json.dumps(said if name[:3] == "pre" else {"feature_extractor": said}))
        if rate == 16_000:
            load_pretrained(tmp_path)
            assert "do_normalize" not in caplog.text
            (tmp_path / name).write_text((tmp_path / name).read_text().replace("true", "false"), "utf-8-sig")
            load_pretrained(tmp_path)
            assert "do_normalize is false, and audio is normalised all the same" in caplog.text
    with pytest.raises(UserError, match=rf"{name}: .*sampling_rate is 8000, and 16000"):
        load_pretrained(tmp_path)


# --- Pruned models of DPHuBERT, in torchaudio's names ---


class Encoder(torch.nn.Module):
    """DPHuBERT's model in plain torch.nn, with its names: three layers, one without attention, one without units."""

    def __init__(self, channels=(6, 5), width=12, head_width=4, heads=(2, 0, 3), units=(7, 9, 0)):
        super().__init__()
        nn = torch.nn
        self.heads = heads
        convolutions = [nn.Module() for _ in channels]
        for n, (convolution, kernel, stride) in enumerate(zip(convolutions, (10, 3), (5, 2))):
            convolution.conv = nn.Conv1d(channels[n - 1] if n else 1, channels[n], kernel, stride, bias=False)
        convolutions[0].layer_norm = nn.GroupNorm(channels[0], channels[0])
        self.feature_extractor = nn.Module()
        self.feature_extractor.conv_layers = nn.ModuleList(convolutions)
        self.feature_extractor.dummy_weight = nn.Parameter(torch.rand(channels[-1]))
        self.encoder, projection, transformer = nn.Module(), nn.Module(), nn.Module()
        self.encoder.feature_projection, self.encoder.transformer = projection, transformer
        projection.layer_norm, projection.projection = nn.LayerNorm(channels[-1]), nn.Linear(channels[-1], width)
        transformer.pos_conv_embed = nn.Module()
        convolution = nn.Conv1d(width, width, 8, padding=4, groups=3)
        transformer.pos_conv_embed.conv = nn.utils.parametrizations.weight_norm(convolution, dim=2)
        transformer.layer_norm = nn.LayerNorm(width)
        transformer.layers = nn.ModuleList(nn.Module() for _ in heads)
        for layer, count, unit in zip(transformer.layers, heads, units):
            layer.layer_norm, layer.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            if count:
                layer.attention = nn.Module()
                for name in ("q_proj", "k_proj", "v_proj"):
                    setattr(layer.attention, name, nn.Linear(width, count * head_width))
                layer.attention.out_proj = nn.Linear(count * head_width, width)
            if unit:
                layer.feed_forward = nn.Module()
                layer.feed_forward.intermediate_dense = nn.Linear(width, unit)
                layer.feed_forward.output_dense = nn.Linear(unit, width)

    def forward(self, x):
        gelu, transformer = torch.nn.functional.gelu, self.encoder.transformer
        x = x[:, None]
        for convolution in self.feature_extractor.conv_layers:
            x = convolution.conv(x)
            x = gelu(convolution.layer_norm(x) if hasattr(convolution, "layer_norm") else x)
        x = self.encoder.feature_projection.layer_norm(x.transpose(1, 2) * self.feature_extractor.dummy_weight)
        x = self.encoder.feature_projection.projection(x)
        position = transformer.pos_conv_embed.conv(x.transpose(1, 2))[..., :-1]
        x = transformer.layer_norm(x + gelu(position).transpose(1, 2))
        for layer, count in zip(transformer.layers, self.heads):
            if count:
                part = layer.attention
                maps = (part.q_proj, part.k_proj, part.v_proj)
                q, k, v = (linear(x).unflatten(2, (count, -1)).transpose(1, 2) for linear in maps)
                weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
                x = x + part.out_proj((weights @ v).transpose(1, 2).flatten(2))
            x = layer.layer_norm(x)
            if hasattr(layer, "feed_forward"):
                x = x + layer.feed_forward.output_dense(gelu(layer.feed_forward.intermediate_dense(x)))
            x = layer.final_layer_norm(x)
        return x


SAYS = {  # the values of removed parts, 12 heads and 5 units, mean nothing
    "extractor_mode": "group_norm", "extractor_conv_layer_config": [(6, 10, 5), (5, 3, 2)],
    "extractor_conv_bias": False, "encoder_embed_dim": 12, "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 3, "encoder_num_layers": 3,
    "encoder_use_attention": [True, False, True], "encoder_use_feed_forward": [True, True, False],
    "encoder_num_heads": [2, 12, 3], "encoder_head_dim": 4, "encoder_ff_interm_features": [7, 9, 5],
    "encoder_layer_norm_first": False, "normalize_waveform": False,
}  # fmt: skip


def write_dphubert(path, **changed):
    torch.manual_seed(0)
    model = Encoder().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    torch.save({"state_dict": model.state_dict(), "config": SAYS | changed}, path)
    return model


def test_a_model_of_dphubert_computes_what_it_does_there(tmp_path):
    theirs = write_dphubert(tmp_path / "x.pth")
    ours = load_pretrained(tmp_path / "x.pth")
    assert (ours.shape.heads, ours.shape.head_width, ours.shape.units) == ((2, 0, 3), 4, (7, 9, 0))
    waveforms = torch.randn(2, 800)
    with torch.no_grad():
        assert (ours(waveforms)[0] - theirs(waveforms)).abs().max() < 1e-5
    save_model(SpeechModel(ours, "slu", ["a"]), tmp_path / "model.pt")
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path / "model.pt")(waveforms)[0], ours(waveforms)[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("extractor_mode", "layer_norm"),
        ("extractor_conv_bias", True),
        ("encoder_layer_norm_first", True),
        ("extractor_conv_layer_config", [(6, 10, 5), (4, 3, 2)]),
        ("extractor_conv_layer_config", [(6, 10, 5), (5, 2, 2)]),
        ("extractor_conv_layer_config", "none"),
        ("encoder_embed_dim", 16),
        ("encoder_pos_conv_kernel", 7),
        ("encoder_pos_conv_groups", 4),
        ("encoder_num_layers", 4),
        ("encoder_use_attention", [True, True, True]),
        ("encoder_use_feed_forward", [True, False, False]),
        ("encoder_num_heads", [2, 0, 4]),
        ("encoder_num_heads", [2, 0, 3, 1]),
        ("encoder_head_dim", 2),
        ("encoder_ff_interm_features", [7, 8, 0]),
        ("encoder_ff_interm_features", "many"),
    ],
)
def test_what_dphubert_says_is_obeyed_or_refused(tmp_path, name, value):
    write_dphubert(tmp_path / "x.pth", **{name: value})
    refused(tmp_path / "x.pth", "heads" if name == "encoder_head_dim" else name)


def test_what_stands_about_an_encoder_says_nothing_of_it_or_is_seen_through(golden, tmp_path, caplog):
    """An encoder-decoder's configuration of its encoder, and DeepSpeed's lists of what is frozen."""
    path = write_layout(tmp_path, golden, "hf_ctc")
    config = json.loads((path / "config.json").read_text())
    outer = {"model_type": "speech-encoder-decoder", "decoder": {"num_attention_heads": 3, "hidden_act": "relu"}}
    (path / "config.json").write_text(json.dumps(outer | {"encoder": config}))
    heads = load_pretrained(path).shape.head_width
    assert heads == config["hidden_size"] // config["num_attention_heads"]
    (path / "config.json").write_text(json.dumps(outer | {"encoder": config | {"do_stable_layer_norm": True}}))
    refused(path, "do_stable_layer_norm")
    tensors = state_dict(golden, "fairseq")
    frozen = {key: tensor for key, tensor in tensors.items() if "feature_extractor" in key}
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    contents = {"module": tensors, "frozen_param_shapes": shapes, "frozen_param_fragments": frozen}
    (tmp_path / "deepspeed").mkdir()
    torch.save(contents, tmp_path / "deepspeed" / "states.pt")
    assert load_pretrained(tmp_path / "deepspeed").shape.heads


def test_the_head_of_a_recogniser_of_phones_is_left_out_with_a_word(golden, tmp_path, caplog):
    write_ctc(tmp_path, golden, {"<pad>": 0, "a": 1, "tʃ": 2}, pad_token_id=0)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"phone_delimiter_token": " "}))
    with caplog.at_level("INFO"):
        assert read_checkpoint(tmp_path).task is None
    assert "is of phones" in caplog.text


def test_a_narrow_model_that_does_not_say_how_many_heads_it_has_is_refused(golden, monkeypatch, tmp_path):
    wide = dataclasses.replace(transformer.BASE, head_width=256)  # wider than the model is
    monkeypatch.setattr(transformer, "BASE", wide)
    torch.save(state_dict(golden, "fairseq"), tmp_path / "bare.pt")
    refused(tmp_path / "bare.pt", "how many heads", "config.json")
