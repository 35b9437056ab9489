"""The counts against a hand computation, torch's own counter, sampling, and finite differences."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import HERE, TINY, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flops import BASE, SMALL, Shape, cost
from gates import KINDS, HardConcrete, expected_shape
from transformer import Wav2Vec2

P_SHUT = 1 / (1 + 99 * (1.1 / 0.1) ** (2 / 3))  # of a new gate: log alpha = log 99, in the formula of the paper


def test_base_costs_what_was_computed_by_hand():
    c = cost(BASE, 160_000)
    convolutions = [163_834_880, 12_582_125_568, 6_290_669_568, 3_144_941_568, 1_572_077_568, 523_763_712, 261_619_712]
    assert [part.macs for part in c.convolutions] == convolutions
    assert (c.frontend.macs, c.frontend.params) == (24_539_032_576, 4_200_448)
    assert c.projection.macs == 196_214_784
    assert c.position.macs == 2_359_296_000
    assert (c.attention_linear.macs, c.attention_product.macs) == (14_127_464_448, 4_589_586_432)
    assert c.attention.macs == 14_127_464_448 + 4_589_586_432
    assert c.ffn.macs == 28_254_928_896
    assert (c.macs, c.params) == (74_066_523_136, 94_371_712)
    assert BASE.frames(160_000) == [31_999, 15_999, 7_999, 3_999, 1_999, 999, 499]


# In samples: the 32 utterances of test-clean over which SUPERB adds up a model's MACs.
SUPERB = [
    *(20560, 34560, 38480, 42560, 45600, 48720, 52000, 55120, 59120, 62720, 66400, 71200, 75200, 78640, 82800, 87520),
    *(92720, 98560, 104400, 111120, 118480, 125040, 132720, 142640, 154000, 166720, 180880, 197920, 217920, 239280),
    *(268160, 326000),
]


@pytest.mark.parametrize(
    ("layers", "published", "here"),
    [
        (12, 1669, 1665.5),  # wav2vec2-base and HuBERT-base
        (2, 785, 785.3),  # DistilHuBERT
    ],
)
def test_macs_over_the_utterances_of_superb_are_those_that_it_publishes(layers, published, here):
    """In G. The profiler behind the published ones counts a little of what is not counted here."""
    shape = replace(BASE, heads=BASE.heads[:layers], units=BASE.units[:layers])
    macs = sum(cost(shape, samples).macs for samples in SUPERB) / 1e9
    assert macs == pytest.approx(published, rel=0.005)
    assert round(macs, 1) == here


def test_parameters_are_those_that_fairseq_publishes_less_what_only_pre_training_has():
    """In M: 94.70 of HuBERT-base and 95.04 of wav2vec2-base."""
    projection = 768 * 256 + 256
    hubert = projection + 504 * 256  # of codes
    quantizer = 512 * 640 + 640 + 2 * 320 * 128  # choice of the entries, and the entries
    wav2vec2 = projection + 256 * 256 + 256 + quantizer
    assert (projection, wav2vec2) == (196_864, 672_896)
    params = cost(BASE, 160_000).params
    assert [round((params + more) / 1e6, 2) for more in (hubert, wav2vec2)] == [94.70, 95.04]


def test_the_small_model_has_the_proportions_of_base():
    c = cost(SMALL, 160_000)
    assert 0.3 < c.frontend.macs / c.macs < 0.36
    assert c.frontend.params / c.params <= 0.05


def random_shape(rng, seed):
    """An unevenly pruned shape; every third has layers without heads or units, or convolutions of one channel."""
    layers, groups = rng.randint(0, 3), rng.choice([1, 2, 4])
    empty = seed % 3 == 0

    def count(highest, lowest):
        return lowest if empty and rng.random() < 0.5 else rng.randint(1, highest)

    return Shape(
        channels=tuple(count(12, 1) for _ in range(7)),
        kernels=BASE.kernels,
        strides=BASE.strides,
        width=groups * rng.randint(1, 6),
        head_width=rng.randint(1, 8),
        heads=tuple(count(5, 0) for _ in range(layers)),
        units=tuple(count(20, 0) for _ in range(layers)),
        position_kernel=rng.choice([3, 8, 16, 17]),
        position_groups=groups,
    )


def test_cost_equals_torchs_flop_counter_and_the_tensors_on_sixty_shapes():
    for seed in range(60):
        rng = random.Random(seed)
        shape, samples = random_shape(rng, seed), rng.randint(400, 9_000)
        model = Wav2Vec2(shape).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(1, samples))
        c = cost(shape, samples)
        assert counter.get_total_flops() == 2 * c.macs, (shape, samples)
        assert sum(parameter.numel() for parameter in model.parameters()) == c.params, shape
        assert all(isinstance(value, int) for value in (c.macs, c.params))


def test_each_parts_parameters_are_those_of_its_modules():
    model, c = Wav2Vec2(TINY), cost(TINY, 16_000)

    def numel(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert c.frontend.params == numel(model.frontend)
    assert c.projection.params == numel(model.projection)
    assert c.position.params == numel(model.position, model.norm)
    assert c.attention.params == numel(*(m for layer in model.layers for m in (layer.attention, layer.attention_norm)))
    assert c.ffn.params == numel(*(m for layer in model.layers for m in (layer.ffn, layer.ffn_norm)))


def test_integer_tensors_give_the_same_cost_as_integers():
    as_tensors = TINY.with_counts(
        {
            (kind, i): torch.tensor(n)
            for kind in ("channels", "heads", "units")
            for i, n in enumerate(getattr(TINY, kind))
        }
    )
    c, d = cost(TINY, 12_345), cost(as_tensors, 12_345)
    assert (d.macs, d.params) == (c.macs, c.params)
    assert d.macs.dtype == torch.int64


def test_frames_are_those_that_the_convolutions_make():
    lengths = [400, 401, 719, 720, 8_001]
    frames = [Wav2Vec2(TINY).eval()(torch.randn(1, n))[0].shape[1] for n in lengths]
    assert frames == [TINY.frames(n)[-1] for n in lengths] == TINY.frames(torch.tensor(lengths))[-1].tolist()
    assert TINY.receptive_field == 400
    with pytest.raises(ValueError, match="399"):
        cost(TINY, 399)


def test_expected_cost_is_the_mean_over_sampled_gates():
    model = tiny(KINDS["mac"], spread=2.0)
    gates = model.gates
    expected = cost(expected_shape(TINY, gates), 16_000)
    samples = []
    for gate in gates.values():
        gate.train()
    for _ in range(2_000):
        c = cost(TINY.with_counts({place: int((gate() > 0).sum()) for place, gate in gates.items()}), 16_000)
        samples.append((c.macs, c.params, c.frontend.params))
    samples = torch.tensor(samples, dtype=torch.float64)
    standard_error = samples.std(0) / len(samples) ** 0.5
    errors = samples.mean(0) - torch.stack([expected.macs, expected.params, expected.frontend.params]).detach()
    assert (errors.abs() < 3.5 * standard_error).all(), errors / standard_error
    assert (standard_error < 0.005 * samples.mean(0)).all()  # the test can tell a half per cent


def test_the_gradient_of_the_expected_cost_equals_finite_differences():
    model = tiny(KINDS["mac"], spread=2.0).double()
    gates, step = model.gates, 1e-5
    log_alphas = [gate.log_alpha for gate in gates.values()]
    for total in ("macs", "params"):
        gradients = torch.autograd.grad(getattr(cost(expected_shape(TINY, gates), 16_000), total), log_alphas)
        for log_alpha, gradient in zip(log_alphas, gradients):
            values = []
            for change in (step, -2 * step):
                with torch.no_grad():
                    log_alpha[1] += change
                    values.append(getattr(cost(expected_shape(TINY, gates), 16_000), total).item())
            with torch.no_grad():
                log_alpha[1] += step
            difference = (values[0] - values[1]) / (2 * step)
            assert gradient[1].item() == pytest.approx(difference, rel=1e-5)


def test_open_probabilities_are_summed_in_enough_digits_for_a_whole_model():
    gate = HardConcrete(3072)
    assert gate.open_probability().dtype == torch.float64
    assert gate.open_probability().sum().item() == pytest.approx((1 - P_SHUT) * 3072, rel=1e-6)


def run_flops(*arguments):
    command = [sys.executable, str(HERE.parent / "flops.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_the_table_of_base():
    printed = run_flops().stdout
    for number in ("24,539,032,576", "74,066,523,136", "94,371,712", "31,999", "4,589,586,432"):
        assert number in printed
    assert f"{cost(BASE, 56_000).macs:,}" in run_flops("--seconds", "3.5").stdout


def test_flops_needs_nothing_of_the_project():
    others = ["gates", "frontend", "transformer", "data", "sslprune", "torch"]
    code = f"import sys, flops; print(sorted(set({others}) & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True).stdout == "[]\n"
    )


@pytest.mark.parametrize(
    "arguments", [["--seconds", "0"], ["--seconds", "nan"], ["--seconds", "long"], ["a.pt"], ["--unknown"]]
)
def test_wrong_use_of_the_command_ends_in_one_line(arguments):
    result = run_flops(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("flops: ")
    assert result.stderr.count("\n") == 1


def test_shape_survives_a_checkpoint():
    shape = replace(BASE, heads=(0, 5, 12), units=(1, 2, 3))
    assert Shape.from_dict(shape.as_dict()) == shape


@pytest.mark.parametrize(
    "wrong", [{"head_width": 0}, {"head_width": 60}, {"width": "768"}, {"buckets": 30}, {"max_distance": 80}]
)
def test_a_shape_of_no_possible_wavlm_is_refused(wrong):
    fields = BASE.as_dict() | {"buckets": 320, "max_distance": 800}
    assert Shape.from_dict(fields).buckets == 320
    with pytest.raises((TypeError, ValueError)):
        Shape.from_dict(fields | wrong)
