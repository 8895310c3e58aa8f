"""Small matrices on a CPU: how near the products are, and that rows do not see each other."""

import subprocess
import sys

import pytest
import torch

from chatglm.hardware import cpu_linear
from chatglm.hardware.cpu_linear import KINDS, Int4Linear, Int8Linear, joined_product
from tests.servers import LIMIT

OUT, IN = 200, 384
# Error of a row of random numbers, of its length. Those of int4 are the weights' (trained matrices,
# whose numbers are less even, come out nearer).
NEAR = {"float16": 1e-6, "int8": 0.02, "int4": 0.14}


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param == "int4":
        pytest.importorskip("onnxruntime")
    return request.param


@pytest.fixture
def matrix():
    torch.manual_seed(0)
    return torch.randn(OUT, IN).half().float()


@pytest.fixture
def rows():
    torch.manual_seed(1)
    rows = torch.randn(256, IN)
    rows[3] *= 100
    return rows


def product(kind, matrix, bias=None):
    layer = KINDS[kind](matrix.shape[1], matrix.shape[0], bias is not None)
    layer.pack(layer.shrink(matrix))
    if bias is not None:
        layer.bias.data = bias
    return layer


def distance(ours, exact):
    """Of each row, as a part of its length."""
    return (ours - exact).norm(dim=1) / exact.norm(dim=1)


def test_every_row_is_near_the_exact_product_also_one_a_hundred_times_its_neighbours(
    kind, matrix, rows
):
    assert distance(product(kind, matrix)(rows), rows @ matrix.T).max() < NEAR[kind]


def test_a_row_is_to_the_last_bit_the_same_whatever_the_number_of_rows(kind, matrix, rows):
    multiply = product(kind, matrix)
    together = multiply(rows)
    for count in [*range(1, 34), 63, 64, 65, 127, 128, 255]:
        assert torch.equal(multiply(rows[:count]), together[:count]), count


def test_a_row_is_to_the_last_bit_the_same_in_any_place_beside_any_other(kind, matrix, rows):
    multiply = product(kind, matrix)
    alone = multiply(rows[:1])
    for place in range(18):
        among = torch.cat([rows[1 : place + 1], rows[:1], rows[20:30]])
        assert torch.equal(multiply(among)[place], alone[0]), place


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_number_breaks_its_row_and_no_other(kind, matrix, rows, broken):
    multiply = product(kind, matrix)
    whole = multiply(rows[:8])
    rows[5, 7] = broken
    out = multiply(rows[:8])
    assert not out[5].isfinite().any()
    out[5] = whole[5]
    assert torch.equal(out, whole)


def test_nothing_times_anything_is_nothing_and_the_bias_is_added(kind, matrix, rows):
    bias = torch.arange(OUT, dtype=torch.float32)
    assert torch.equal(product(kind, matrix, bias)(torch.zeros(3, IN)), bias.expand(3, OUT))
    assert torch.equal(product(kind, torch.zeros(OUT, IN), bias)(rows[:3]), bias.expand(3, OUT))


def test_it_takes_the_shapes_that_a_linear_layer_takes(kind, matrix, rows):
    multiply = product(kind, matrix)
    assert torch.equal(multiply(rows[:6].view(2, 3, IN)), multiply(rows[:6]).view(2, 3, OUT))


def test_without_vnni_inputs_have_so_few_steps_that_no_sum_of_two_products_overflows(
    monkeypatch, matrix, rows
):
    largest_input = 2 * 63 + 1  # with the zero point in the middle
    assert 2 * largest_input * 127 < 2**15
    monkeypatch.setattr(cpu_linear, "input_levels", lambda: 63)
    assert distance(product("int8", matrix)(rows), rows @ matrix.T).max() < 2 * NEAR["int8"]


def test_without_fbgemm_int8_is_computed_by_torchs_own_kernel(monkeypatch, matrix, rows):
    monkeypatch.setattr(cpu_linear, "has_fbgemm", lambda: False)
    assert distance(product("int8", matrix)(rows[:4]), rows[:4] @ matrix.T).max() < NEAR["int8"]


def test_int8_has_127_steps_for_the_largest_number_of_a_row():
    small = Int8Linear.shrink(torch.tensor([[127.0, -1.0, 0.4], [-2.0, 1.0, 0.0]]))
    assert small["weight"].tolist() == [[127, -1, 0], [-127, 64, 0]]
    assert small["weight_scale"].tolist() == pytest.approx([1, 2 / 127])


def test_int4_has_all_sixteen_steps_for_the_largest_number_of_a_group():
    numbers = torch.tensor([[-8.0, 7.0, *range(-7, 7)] * 2])
    small = Int4Linear.shrink(torch.cat([numbers, -2 * numbers], dim=1).repeat(1, 2))
    low, high = small["weight"] & 15, small["weight"] >> 4
    levels = torch.stack([low, high], dim=2).flatten(1).float() - 8  # in the order of the columns
    assert small["weight_scale"].shape == (1, 1) and set(levels.unique().tolist()) <= set(
        range(-8, 8)
    )
    assert small["weight_scale"].item() == -2  # of 16, the largest
    assert torch.equal(levels[0, :2], torch.tensor([4.0, -3.0]))  # -8 / -2; 7 / -2 rounded


def test_float32_matrices_whose_numbers_are_float16s_are_packed_and_lose_nothing(matrix, rows):
    upper, lower = torch.nn.Linear(IN, OUT), torch.nn.Linear(IN, 8)
    upper.weight.data, lower.weight.data = matrix, matrix[:8].clone()
    with torch.inference_mode():
        expected = torch.cat([upper(rows), lower(rows)], dim=1)
        multiply = joined_product(upper, lower)
        assert distance(multiply(rows), expected).max() < NEAR["float16"]
        assert torch.equal(multiply(rows[:1]), multiply(rows)[:1])


def test_float32_matrices_with_other_numbers_are_left_as_they_are(matrix, rows):
    layer = torch.nn.Linear(IN, OUT)
    layer.weight.data[0, 0] = 1e-9  # float16 has no such number
    with torch.inference_mode():
        assert torch.equal(joined_product(layer)(rows), layer(rows))


AT_ONCE = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import torch
from chatglm.hardware.cpu_linear import Int4Linear
sys.setswitchinterval(1e-6)
begin = threading.Barrier(8)
def pack(_):
    layer = Int4Linear(64, 64, False)
    begin.wait()
    layer.pack(layer.shrink(torch.ones(64, 64)))
list(ThreadPoolExecutor(8).map(pack, range(8)))
"""


def test_the_first_matrices_of_a_process_may_be_packed_at_once():
    """As loading does; onnxruntime takes the size of its thread pool only once."""
    pytest.importorskip("onnxruntime")
    subprocess.run([sys.executable, "-c", AT_ONCE], check=True, timeout=LIMIT)
