"""What several tests use: small models, and checkpoints in the layouts of the public libraries."""

import argparse
import copy
import functools
import json
import logging
import multiprocessing
import os
import socket
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "experiment")]

import data
import sslprune
from flops import BASE, cost
from transformer import Wav2Vec2

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other where others use the machine

TINY = replace(
    BASE,
    channels=(8, 12, 10, 8, 6, 9, 7),
    width=32,
    head_width=4,
    heads=(3, 2, 4),
    units=(20, 12, 16),
    position_kernel=16,
    position_groups=4,
)

LETTERS = ["<pad>", "|", *"'ABCDEFGHIJKLMNOPQRSTUVWXYZ"]

CONSTRAINED = {  # stated again, from the design: what each method keeps within its budget
    "mac": [lambda c: c.macs],
    "size": [lambda c: c.params],
    "sepsize": [
        lambda c: c.frontend.params,
        lambda c: c.projection.params + c.position.params + c.attention.params + c.ffn.params,
    ],
    "transformer": [lambda c: c.macs],
}


def check_budget_is_kept(kept, dense, method, budget):
    """Each constrained cost is at most the budget, and within 0.2 % of it or so close that no further unit fits."""

    def shares(shape):
        return [measure(cost(shape, 160_000)) / measure(cost(dense, 160_000)) for measure in CONSTRAINED[method]]

    assert max(shares(kept)) <= budget
    if min(shares(kept)) > budget - 0.002:
        return
    for kind in ("heads", "units") if method == "transformer" else ("channels", "heads", "units"):
        for layer, (count, full) in enumerate(zip(getattr(kept, kind), getattr(dense, kind))):
            assert count == full or max(shares(kept.with_counts({(kind, layer): count + 1}))) > budget


def tiny(kinds=(), seed=0, spread=3.0, shape=TINY):
    """A tiny encoder in evaluation mode with random norms and biases; gates (of `kinds`) shut, half open and open."""
    torch.manual_seed(seed)
    model = Wav2Vec2(shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.add_gates(kinds)
    for gate in model.gates.values():
        torch.nn.init.normal_(gate.log_alpha, std=spread)
    return model


@functools.cache
def _demo(make, arguments, *_):
    return make(*arguments)


@pytest.fixture
def small(monkeypatch):
    """The demo corpus and the model from scratch at a size for tests.

    The corpus is synthesised once for all tests, the report's forward is timed once, and no file waits for the disk.
    """
    make = data.demo_corpus

    def made(*arguments):
        depends_on = *data.DEMO_SIZES.items(), *data.SENTENCES.items()  # which tests change
        return copy.deepcopy(_demo(make, arguments, depends_on))

    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(data, "demo_corpus", made)
    monkeypatch.setattr(data, "DEMO_SIZES", {"train": 40, "dev": 5, "test": 6})
    monkeypatch.setattr(sslprune, "SMALL", replace(TINY, heads=(3, 4), units=(60, 60)))
    monkeypatch.setattr(sslprune, "forward_seconds", functools.partial(sslprune.forward_seconds, repeats=1))


def as_processes(count, work, printed):
    """The exit statuses of work(rank) in each of `count` forked processes, told what any launcher tells its own.

    printed: the file into which all of them print.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def begin(rank):
        os.environ.update(address, WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank))
        logging.getLogger().handlers.clear()
        sys.stdout = sys.stderr = open(printed, "a", buffering=1)  # noqa: SIM115
        sys.exit(work(rank))

    torch.optim.Adam([torch.zeros(1)])  # imports half of torch, here and not in each process
    processes = [multiprocessing.get_context("fork").Process(target=begin, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()  # where it hangs
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="session")
def golden():
    """Features that transformers computed, and the weights in the layout of each library; see make_golden.py."""
    return torch.load(HERE / "golden.pt", weights_only=True)


def state_dict(golden, layout):
    """The state dict of a layout, in the library's own names."""
    return {key: golden["tensors"][index].float() for key, index in golden["layouts"][layout]["keys"].items()}


def write_safetensors(path, tensors, **changed):
    """A .safetensors file, written after its public description; `changed` replaces entries of the header."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        dtype = {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header | changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_layout(folder, golden, layout):
    """Write a layout as its library would, and return what a user would name: a file or a folder."""
    tensors, config = state_dict(golden, layout), golden["layouts"][layout]["config"]
    if layout.startswith("hf"):
        (folder / "config.json").write_text(json.dumps(config))
        if "old" in layout:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            write_safetensors(folder / "model.safetensors", tensors)
        return folder
    path = folder / f"{layout}.pt"
    if layout.startswith("fairseq"):
        arguments = argparse.Namespace(**config, w2v_args=argparse.Namespace(**config))
        moments = {0: {"step": 3, "exp_avg": torch.zeros(2, 3)}}
        torch.save(
            {
                "args": arguments,
                "model": tensors,
                "last_optimizer_state": {"state": moments},
                "extra_state": {"epoch": 1},
            },
            path,
        )
    else:
        torch.save(tensors, path)
    return path
