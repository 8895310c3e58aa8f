"""The trial for CUDA, without a GPU: its kernels against plain loops, the engine on these loops.

TRITON_INTERPRET=1 pytest -n 0 tests/test_gpu_kernels.py     # the kernels too: needs Triton
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import chatglm
from bench import gpu_kernels
from bench.gpu_trial import TOKENS, ask_all, tried
from tests.original import GOLDEN

PAGE, GROUPS, SIZE, PAGES = 32, 2, 16, 60
needs_triton = pytest.mark.skipif(
    not gpu_kernels.ready(torch.device("cpu")), reason="needs Triton, and TRITON_INTERPRET=1"
)


def places_of(row: int, keys: torch.Tensor, table: torch.Tensor, ends: torch.Tensor):
    """Where the keys of one sequence lie: pages, and places within these."""
    steps = torch.arange(int(ends[row + 1] - ends[row]))
    return table[row].long()[steps // keys.shape[1]], steps % keys.shape[1]


def plain_write(new_keys, new_values, keys, values, table, ends) -> None:
    for row in range(len(table)):
        pages, within = places_of(row, keys, table, ends)
        if len(pages):
            keys[pages[-1], within[-1]] = new_keys[row]
            values[pages[-1], within[-1]] = new_values[row]


def plain_attend(query, keys, values, table, ends, scale: float) -> torch.Tensor:
    out = torch.zeros_like(query)
    for row in range(len(table)):
        places = places_of(row, keys, table, ends)
        if len(places[0]):
            own = [part[places].transpose(0, 1)[None] for part in (keys, values)]
            asked = query[row][None, :, None]  # [1, H, 1, d]
            mixed = scaled_dot_product_attention(asked, *own, scale=scale, enable_gqa=True)
            out[row] = mixed[0, :, 0]
    return out


@needs_triton
@pytest.mark.parametrize("heads", [4, 32])
@pytest.mark.parametrize("lengths", [[1], [1, 0, 33, 32], [200, 64, 65, 1, 7, 500]])
def test_the_kernels_write_and_attend_as_plain_loops_do(heads, lengths):
    dice = torch.Generator().manual_seed(heads + len(lengths))
    order = torch.randperm(PAGES, generator=dice).int()  # pages lie anywhere
    table, begin = torch.full((len(lengths), 20), -1, dtype=torch.int32), 0
    for row, length in enumerate(lengths):  # 0: a row that pads a CUDA graph
        number = -(-length // PAGE)
        table[row, :number] = order[begin : begin + number]
        begin += number
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    keys, values = torch.randn(2, PAGES, PAGE, GROUPS, SIZE, generator=dice)
    new = torch.randn(2, GROUPS, len(lengths), SIZE, generator=dice).transpose(1, 2)
    query = torch.randn(heads, len(lengths), SIZE, generator=dice).transpose(0, 1)
    expected_keys, expected_values = keys.clone(), values.clone()
    plain_write(*new, expected_keys, expected_values, table, ends)
    gpu_kernels.write(*new, keys, values, table, ends)
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)
    out = gpu_kernels.attend(query, keys, values, table, ends, 0.3)
    expected = plain_attend(query, keys, values, table, ends, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_the_engine_answers_on_the_trial_as_before(monkeypatch, name):
    calls = []

    def attend(*args):
        calls.append(args)
        return plain_attend(*args)

    monkeypatch.setattr(gpu_kernels, "write", plain_write)
    monkeypatch.setattr(gpu_kernels, "attend", attend)
    tokenizer, model = chatglm.load(GOLDEN / name, device="cpu")
    expected = ask_all(tokenizer, model)
    assert len(set(expected)) > 1 and not calls
    with tried(model, page=True):
        assert ask_all(tokenizer, model) == expected
    assert len(calls) >= model.config.num_hidden_layers * (TOKENS - 1)
    calls.clear()
    assert ask_all(tokenizer, model) == expected and not calls  # nothing is left of it
