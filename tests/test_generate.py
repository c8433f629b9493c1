"""Generation: the cache changes nothing but the cost, and sampling does what its arguments say."""

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.cache import KVCache
from fastgpt.generate import sample

SMALL = {
    "vocab_size": 41,
    "n_positions": 40,
    "n_layer": 4,
    "n_embd": 24,
    "n_head": 3,
    "window": 6,
    "tie_embeddings": False,
}


def small(**changes):
    """A model whose greedy continuations wander instead of repeating one token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=2.0 if name.startswith("w") else 0.3)
    return model.eval()


def prompt(b=2, s=5, seed=1):
    return torch.randint(0, 41, (b, s), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy_without_cache(model, tokens, n, attention_mask=None):
    for _ in range(n):
        new = model(tokens, attention_mask=attention_mask).logits[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, new), dim=1)
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
    return tokens


@pytest.mark.parametrize("s", [1, 5, 6, 7, 20], ids=lambda s: f"prompt_{s}")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_pattern": ("banded",), "window": 1},
        {"window": 64},
        {"n_embd": 20, "head_dim": 7},
    ],
    ids=["alternating", "window_1", "window_beyond_n_positions", "heads_of_their_own_width"],
)
def test_greedy_is_the_same_with_and_without_the_cache(changes, s):
    model, tokens = small(**changes), prompt(s=s)
    n = model.config.n_positions - s
    out = model.generate(tokens, n, do_sample=False)
    assert out.shape == (2, model.config.n_positions)
    assert torch.equal(out, greedy_without_cache(model, tokens, n))
    assert len(set(out[:, s:].flatten().tolist())) > 4


def test_left_padded_rows_continue_as_they_would_alone():
    model, tokens = small(), prompt(3, 9)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = 0
    mask[2, :8] = 0
    out = model.generate(tokens, 25, attention_mask=mask, do_sample=False)
    assert torch.equal(out[:, :9], tokens)
    assert torch.equal(out, greedy_without_cache(model, tokens, 25, mask))
    for row, first in ((0, 0), (1, 4), (2, 8)):
        alone = model.generate(tokens[row : row + 1, first:], 25, do_sample=False)
        assert torch.equal(out[row, first:], alone[0])


@pytest.mark.parametrize("chunks", [(12, 12), (3, 1, 1, 9, 2, 8), (1,) * 24, (7, 17), (23, 1)])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@torch.no_grad()
def test_cache_filled_in_pieces_gives_the_logits_of_the_whole(chunks, padded, norm):
    model, tokens = small(norm=norm, attention_scale=0.7), prompt(2, 24)
    mask = torch.ones(2, 24, dtype=torch.bool)
    if padded:
        mask[1, : chunks[0] - 1] = False
    expected = model(tokens, attention_mask=mask).logits
    cache = model.new_cache(2, 30)
    first, parts = 0, []
    for t in chunks:
        part = slice(first, first + t)
        seen = mask[:, : first + t] if padded else None
        parts.append(model(tokens[:, part], attention_mask=seen, cache=cache).logits)
        first += t
    assert cache.length == 24
    assert cache.lengths.tolist() == [24, 24]
    got = torch.cat(parts, dim=1)
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_banded_layers_keep_only_their_window():
    cache = small().new_cache(2)
    assert [layer.k.shape for layer in cache.layers] == [(2, 3, 40, 8), (2, 3, 6, 8)] * 2
    assert [layer.ring for layer in cache.layers] == [False, True] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small().new_cache(2).layers[0].k.dtype == torch.bfloat16


def test_low_precision_generation_runs():
    tokens = prompt()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small().generate(tokens, 12, do_sample=False).shape == (2, 17)
    assert small().bfloat16().generate(tokens, 12, do_sample=False).shape == (2, 17)


def test_full_cache_says_so_and_stays_as_it_was():
    model = small()
    cache = model.new_cache(2, 6)
    with torch.no_grad():
        model(prompt(2, 5), cache=cache)
        with pytest.raises(ValueError, match="cache: full, it holds 5 of at most 6 tokens and 2"):
            model(prompt(2, 2), cache=cache)
        assert cache.length == 5
        model(prompt(2, 1), cache=cache)
        with pytest.raises(ValueError, match="cache: full"):
            model.h[0](torch.zeros(2, 1, 24), None, cache.layers[0])
        with pytest.raises(ValueError, match="cache: expected one for 3 rows, got one for 2"):
            model(prompt(3, 1), cache=cache)
        full = model.new_cache(1)
        model(prompt(1, 40), cache=full)
        with pytest.raises(ValueError, match=r"n_positions = 40 tokens, got 41 \(40 of them cach"):
            model(prompt(1, 1), cache=full)
    with pytest.raises(ValueError, match=r"cache: it has no gradient; .* torch.no_grad\(\)"):
        model(prompt(), cache=model.new_cache(2))


def padded(b=2, s=10):
    mask = torch.ones(b, s, dtype=torch.int64)
    mask[0, :4] = 0
    return mask


@pytest.mark.parametrize("mask", [None, torch.ones(2, 10, dtype=torch.int64)], ids=["none", "ones"])
def test_a_rejected_call_leaves_no_padding_behind(mask):
    model, tokens = small(), prompt(2, 10)
    cache = model.new_cache(2)
    with pytest.raises(ValueError, match="cache: it has no gradient"):
        model(tokens, padded(), cache=cache)
    hook = model.h[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            model(tokens, padded(), cache=cache)
        hook.remove()
        assert cache.start is None
        assert cache.length == 0
        torch.testing.assert_close(model(tokens, mask, cache=cache).logits, model(tokens).logits)
        assert cache.start is None


def test_a_call_that_needs_gradients_anywhere_stores_nothing():
    """A ring of a lower layer would have lost its oldest keys before an upper layer objects."""
    model, tokens = small().requires_grad_(False), prompt(2, 12)
    cache = model.new_cache(2)
    model(tokens[:, :8], cache=cache)
    model.h[3].requires_grad_(True)
    with pytest.raises(ValueError, match="cache: it has no gradient"):
        model(tokens[:, 8:], cache=cache)
    with torch.no_grad():
        got = model(tokens[:, 8:], cache=cache).logits
        torch.testing.assert_close(got, model(tokens).logits[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_pattern": ("dense",)},
            r"windows = \(None, 6, None, 6\), got one for \(None, N",
        ),
        ({"n_layer": 3}, "n_layer = 4, got one for 3"),
        ({"n_head": 2}, "n_head = 3, got one for 2"),
        ({"head_dim": 5}, "d_head = 8, got one for 5"),
        ({"n_positions": 30}, "n_positions = 40, got one for 30"),
    ],
)
@torch.no_grad()
def test_cache_of_another_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"cache: expected one for {message}"):
        small()(prompt(), cache=KVCache(GPTConfig(**{**SMALL, **changes}), 2))


@torch.no_grad()
def test_cache_of_another_dtype_or_kind_is_refused():
    model = small()
    for wrong in (model.bfloat16().new_cache(2), model.double().new_cache(2)):
        with pytest.raises(TypeError, match=r"cache: expected dtype torch.float32 as the model"):
            model.float()(prompt(), cache=wrong)
    with pytest.raises(TypeError, match=r"cache: expected a KVCache, .* got int"):
        model(prompt(), cache=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which casts between the two
        model(prompt(), cache=KVCache(model.config, 2))
    twin = KVCache(GPTConfig(**{**SMALL, "dropout": 0.5}), 2)
    assert torch.equal(model(prompt(), cache=twin).logits, model(prompt()).logits)


def test_cache_arguments_are_checked():
    config = GPTConfig(**SMALL)
    with pytest.raises(ValueError, match="capacity: expected 1 to n_positions = 40, got 41"):
        KVCache(config, 1, 41)
    with pytest.raises(ValueError, match="batch: expected an int >= 1, got 0"):
        KVCache(config, 0)
    with pytest.raises(TypeError, match=r"batch: expected an int >= 1, got 2.0"):
        small().new_cache(2.0)
    with pytest.raises(
        TypeError, match="capacity: expected an int from 1 to n_positions = 40, got '8'"
    ):
        small().new_cache(2, "8")
    with pytest.raises(TypeError, match="config: expected a GPTConfig, got dict"):
        KVCache(SMALL, 1)


@torch.no_grad()
def test_padding_that_the_cache_cannot_hold_is_rejected():
    model, tokens = small(), prompt(2, 4)
    for row, message in (
        ([1, 1, 0, 1], r"on the left only, got a hidden token behind a visible one at \[1, 2\]"),
        ([1, 1, 1, 0], r"on the left only.* at \[1, 3\]"),
        ([0, 0, 0, 0], "a visible token in every row, got none in row 1"),
    ):
        mask = torch.tensor([[1, 1, 1, 1], row])
        with pytest.raises(ValueError, match=message):
            model.generate(tokens, 3, attention_mask=mask)
        with pytest.raises(ValueError, match=message):
            model(tokens, attention_mask=mask, cache=model.new_cache(2))
    cache = model.new_cache(2)
    model(tokens, cache=cache)
    mask = torch.tensor([[1] * 5, [0] + [1] * 4])
    with pytest.raises(ValueError, match=r"padding of the cached tokens \[0, 0\], got \[0, 1\]"):
        model(tokens[:, :1], attention_mask=mask, cache=cache)


def test_eos_finishes_a_row_and_fills_it():
    model, tokens = small(), prompt()
    free = model.generate(tokens, 12, do_sample=False)
    eos = int(free[0, 8])
    out = model.generate(tokens, 12, do_sample=False, eos_token_id=eos)
    for row in range(2):
        new, expected = out[row, 5:].tolist(), free[row, 5:].tolist()
        end = expected.index(eos) if eos in expected else len(new)
        assert new[: end + 1] == expected[: end + 1]
        assert set(new[end + 1 :]) <= {eos}
    alone = model.generate(tokens[:1], 12, do_sample=False, eos_token_id=eos)
    assert alone.shape[1] == 5 + free[0, 5:].tolist().index(eos) + 1


def test_on_token_sees_every_token_as_it_comes():
    model, tokens, seen = small(), prompt(), []
    out = model.generate(tokens, 7, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), out[:, 5:])


def test_sampling_is_repeatable_and_nothing_is_left_changed():
    model, tokens = small(dropout=0.5).train(), prompt()
    model.h[0].eval()
    draws = [
        model.generate(tokens, 9, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert model.training
    assert not model.h[0].training
    assert model.h[1].training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.generate(tokens, 0), tokens)
    assert model.generate(tokens.int(), 2).dtype == torch.int32


def test_sample_draws_from_the_shaped_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        drawn = sample(logits, generator=generator, **options)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    for options, expected in (
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.05}, [1, 0, 0, 0]),
        ({"top_p": 1e-300}, [1, 0, 0, 0]),
        ({"temperature": 1e-45}, [1, 0, 0, 0]),
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
        ({"top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ):
        torch.testing.assert_close(
            frequencies(**options), torch.tensor(expected), rtol=0.0, atol=0.015, check_dtype=False
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 36}, ValueError, "5 prompt tokens and 36 new ones exceed n_positions"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected an int >= 0, got -1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens: expected an int"),
        ({"max_new_tokens": None}, TypeError, "max_new_tokens: expected an int"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number > 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number, got 'hot'"),
        ({"temperature": True}, TypeError, "temperature: expected a number, got True"),
        ({"do_sample": "no"}, TypeError, "do_sample: expected a bool, got 'no'"),
        ({"generator": 3}, TypeError, "generator: expected None or a torch.Generator, got 3"),
        ({"on_token": 3}, TypeError, "on_token: expected None or a function, got 3"),
        ({"top_p": "all"}, TypeError, "top_p: expected a number, got 'all'"),
        ({"input_ids": [[1]]}, TypeError, "input_ids: expected a torch.Tensor, got list"),
        ({"top_k": 0}, ValueError, "top_k: expected an int >= 1, got 0"),
        ({"top_k": 1.5}, TypeError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p: expected 0 < top_p <= 1, got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"eos_token_id": 41}, ValueError, r"eos_token_id: expected 0 to 40 \(vocab_size = 41\)"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id"),
        ({"input_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, "input_ids: expected shape"),
        ({"input_ids": torch.full((1, 2), 41)}, ValueError, r"input_ids\[0, 0\] is 41"),
        ({"attention_mask": torch.ones(2, 4).int()}, ValueError, r"attention_mask: .*\(2, 5\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        small().generate(**{"input_ids": prompt(), "max_new_tokens": 3, **arguments})


def test_sample_checks_its_own_arguments():
    with pytest.raises(TypeError, match="temperature: expected a number, got True"):
        sample(torch.zeros(1, 4), temperature=True)
    with pytest.raises(TypeError, match=r"generator: expected None or a torch.Generator"):
        sample(torch.zeros(1, 4), generator=3)
    banned = torch.tensor([[0.0, float("-inf")]])
    assert sample(banned, temperature=1e300).tolist() == [0]
