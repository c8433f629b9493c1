"""The modules: equal to torch's own where torch has them, to the plain formula where not."""

import copy
import inspect
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastgpt
from fastgpt import GPTConfig, nn

CONFIG = GPTConfig(vocab_size=11, n_positions=32, n_layer=2, n_embd=24, n_head=3, window=4)
WIDE = GPTConfig(  # as GPT-3 13B: the heads together are not as wide as the residual stream
    vocab_size=11,
    n_positions=32,
    n_layer=2,
    n_embd=20,
    n_head=3,
    head_dim=7,
    window=4,
    layer_norm_eps=0.03,
)

PAIRS = {
    "layer_norm": (nn.LayerNorm, torch.nn.LayerNorm, {"normalized_shape": 6}),
    "layer_norm_plain": (
        nn.LayerNorm,
        torch.nn.LayerNorm,
        {"normalized_shape": (2, 3), "elementwise_affine": False},
    ),
    "softmax": (nn.Softmax, torch.nn.Softmax, {"dim": 1}),
    "cross_entropy": (
        nn.CrossEntropyLoss,
        torch.nn.CrossEntropyLoss,
        {"weight": torch.arange(1.0, 7.0), "ignore_index": 2, "label_smoothing": 0.1},
    ),
    "multihead_attention": (
        nn.MultiheadAttention,
        torch.nn.MultiheadAttention,
        {"embed_dim": 6, "num_heads": 2, "kdim": 5, "add_bias_kv": True},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_is_torchs_module_in_all_but_forward(name):
    ours, theirs, arguments = PAIRS[name]
    module, reference = ours(**arguments), theirs(**arguments)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert inspect.signature(ours.forward).parameters.keys() == (
        inspect.signature(theirs.forward).parameters.keys()
    )
    assert repr(module) == repr(reference)
    assert list(module.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(pickle.loads(pickle.dumps(copy.deepcopy(module))).state_dict())


def both_backward(ours, theirs, *inputs):
    """Outputs and all gradients of two functions at the same inputs, compared."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = function(*leaves)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))
        results.append([out.detach(), *(x.grad for x in leaves if x.requires_grad)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


def test_layer_norm_softmax_and_loss_compute_what_torch_does():
    x = torch.randn(4, 5, 6)
    for name in ("layer_norm", "softmax"):
        ours, theirs, arguments = PAIRS[name]
        both_backward(ours(**arguments), theirs(**arguments), x)
    ours, theirs, arguments = PAIRS["layer_norm_plain"]
    both_backward(ours(**arguments), theirs(**arguments), torch.randn(4, 2, 3))
    ours, theirs, arguments = PAIRS["cross_entropy"]
    both_backward(ours(**arguments), theirs(**arguments), torch.randn(9, 6), torch.arange(9) % 6)


def test_softmax_without_dim_goes_to_torch():
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        explanation = fastgpt.explain(nn.Softmax(), torch.randn(2, 3))
    assert str(explanation).startswith("softmax: torch")


def causal_mask(sq, sk):
    return torch.ones(sq, sk, dtype=torch.bool).triu(1)


L, S, N, E, H = 5, 7, 2, 12, 3
PADDING = torch.arange(S) >= torch.tensor([S, S - 2])[:, None]
FLOAT_MASK = torch.randn(L, S, generator=torch.Generator().manual_seed(1))
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "float_padding": {"key_padding_mask": PADDING * -2.0},
    "bool_mask": {"attn_mask": causal_mask(L, S)},
    "bool_mask_per_head": {"attn_mask": causal_mask(L, S).repeat(N * H, 1, 1)},
    "float_mask": {"attn_mask": FLOAT_MASK},
    "float_mask_per_head": {"attn_mask": FLOAT_MASK.repeat(N * H, 1, 1)},
    "both_bool": {"key_padding_mask": PADDING, "attn_mask": causal_mask(L, S)},
    "both_float": {"key_padding_mask": PADDING * -2.0, "attn_mask": FLOAT_MASK},
    "causal": {"attn_mask": causal_mask(L, S), "is_causal": True},
    "causal_padding": {
        "key_padding_mask": PADDING,
        "attn_mask": causal_mask(L, S),
        "is_causal": True,
    },
}


def mha_pair(**arguments):
    theirs = torch.nn.MultiheadAttention(E, H, **arguments)
    torch.nn.init.normal_(theirs.out_proj.bias)
    if theirs.in_proj_bias is not None:
        torch.nn.init.normal_(theirs.in_proj_bias)
    ours = nn.MultiheadAttention(E, H, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["seq_first", "batch_first"])
def test_multihead_attention_equals_torch(masks, batch_first):
    ours, theirs = mha_pair(batch_first=batch_first, kdim=E if batch_first else 8)
    query, key, value = torch.randn(N, L, E), torch.randn(N, S, ours.kdim), torch.randn(N, S, E)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    both_backward(
        lambda *x: ours(*x, need_weights=False, **MASKS[masks])[0],
        lambda *x: theirs(*x, need_weights=False, **MASKS[masks])[0],
        query,
        key,
        value,
    )
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=2e-5, atol=2e-5)


def test_multihead_self_attention_unbatched_and_causal():
    for causal in ({}, {"attn_mask": causal_mask(S, S), "is_causal": True}):
        ours, theirs = mha_pair()
        for masks in (causal, {**causal, "key_padding_mask": PADDING[1]}):
            both_backward(
                lambda x, m=masks, f=ours: f(x, x, x, need_weights=False, **m)[0],
                lambda x, m=masks, f=theirs: f(x, x, x, need_weights=False, **m)[0],
                torch.randn(S, E),
            )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({}, "need_weights"), ({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "ze")],
)
@pytest.mark.parametrize("average", [True, False])
def test_what_no_fused_kernel_gives_comes_from_torch_exactly(arguments, reason, average):
    ours, theirs = mha_pair(**arguments)
    x = torch.randn(S, N, E)
    options = {"key_padding_mask": PADDING, "average_attn_weights": average}
    for got, expected in zip(ours(x, x, x, **options), theirs(x, x, x, **options), strict=True):
        assert torch.equal(got, expected)
    explanation = str(fastgpt.explain(ours, x, x, x, need_weights=not arguments))
    assert explanation.startswith("multihead_attention: torch")
    assert reason in explanation
    assert not str(fastgpt.explain(mha_pair()[0], x, x, x, need_weights=False)).startswith("multi")


def test_multihead_attention_drops_weights_in_training_only():
    ours, theirs = mha_pair(dropout=0.5)
    x = torch.randn(S, N, E)
    torch.manual_seed(0)
    first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    ours, theirs = ours.eval(), theirs.eval()
    torch.testing.assert_close(
        ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0]
    )


def test_query_that_sees_no_key_gives_zero_attention():
    ours, _ = mha_pair()
    x = torch.randn(S, N, E)
    hidden = torch.ones(S, S, dtype=torch.bool)
    out, _ = ours(x, x, x, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))


def test_multihead_attention_rejects_what_it_cannot_read():
    ours, _ = mha_pair()
    x = torch.randn(S, N, E)
    with pytest.raises(ValueError, match="query: expected 2 or 3 dimensions"):
        ours(x[None], x[None], x[None], need_weights=False)
    with pytest.raises(ValueError, match="key: expected 3 dimensions as query"):
        ours(x, x[0], x, need_weights=False)
    with pytest.raises(TypeError, match="attn_mask: expected dtype bool or a float"):
        ours(x, x, x, need_weights=False, attn_mask=torch.ones(S, S, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"attn_mask": torch.ones(L, S - 1).bool()},
            ValueError,
            r"attn_mask: .*\(l, s\) = \(5, 7\)",
        ),
        ({"attn_mask": torch.zeros(1, S)}, ValueError, r"attn_mask: .*got \(1, 7\)"),
        ({"attn_mask": torch.zeros(S)}, ValueError, "attn_mask: expected shape"),
        ({"attn_mask": torch.zeros(1, 1, L, S)}, ValueError, "attn_mask: expected shape"),
        ({"attn_mask": torch.zeros(7, L, S)}, ValueError, r"attn_mask: .* = \(6, 5, 7\)"),
        ({"attn_mask": [[True]]}, TypeError, "attn_mask: expected a torch.Tensor, got list"),
        ({"key_padding_mask": torch.zeros(N, L)}, ValueError, r"key_padding_mask: .*\(n, s\)"),
        ({"query": torch.zeros(L, N, E + 1)}, ValueError, r"query: .*\(l, n, e\) = \(5, 2, 12\)"),
        ({"query": torch.zeros(L, N, E).int()}, TypeError, "query: expected dtype"),
        ({"query": None}, TypeError, "query: expected a torch.Tensor, got NoneType"),
        ({"key": torch.zeros(S, N + 1, E)}, ValueError, r"key: .*\(s, n, e\) = \(7, 2, 12\)"),
        ({"value": torch.zeros(S + 1, N, E)}, ValueError, r"value: .*\(7, 2, 12\), got \(8"),
    ],
)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_names_what_does_not_fit(arguments, error, message, need_weights):
    ours, _ = mha_pair()
    inputs = {"query": torch.zeros(L, N, E), "key": torch.zeros(S, N, E)}
    inputs["value"] = inputs["key"]
    with pytest.raises(error, match=message):
        ours(**{**inputs, **arguments}, need_weights=need_weights)


def test_multihead_attention_has_torchs_strides():
    for x in (torch.randn(S, N, E), torch.randn(S, E)):
        ours, theirs = mha_pair()
        got, want = (f(x, x, x, need_weights=False)[0] for f in (ours, theirs))
        assert got.stride() == want.stride()
        assert got.is_contiguous()


def plain_attention(module, x, visible, scale):
    """The formula, with the scores held: x (b, s, c), visible bool (b | 1, s, s)."""
    b, s, _ = x.shape
    qkv = torch.nn.functional.linear(x, module.c_attn.weight, module.c_attn.bias)
    q, k, v = (
        part.reshape(b, s, module.n_head, module.head_dim).transpose(1, 2)
        for part in qkv.chunk(3, dim=-1)
    )
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible[:, None], float("-inf"))
    out = scores.softmax(-1).nan_to_num() @ v
    out = out.transpose(1, 2).reshape(b, s, -1)
    return torch.nn.functional.linear(out, module.c_proj.weight, module.c_proj.bias)


def band(s, window):
    i, j = torch.arange(s)[:, None], torch.arange(s)
    return ((j <= i) & (i - j < (window or s)))[None]


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "banded"])
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["square", "heads_of_their_own_width"])
@pytest.mark.parametrize("padding", [None, "left", "holes"])
def test_causal_self_attention_is_the_formula(layer, config, padding):
    module = nn.CausalSelfAttention(config, layer)
    x = torch.randn(2, 9, config.n_embd)
    mask, visible = None, band(9, config.window_of(layer))
    if padding is not None:
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[1, : 3 if padding == "left" else 6 : 1 if padding == "left" else 2] = 0
        visible = visible & mask.bool()[:, None, :]
    both_backward(
        lambda x: module(x, mask),
        lambda x: plain_attention(module, x, visible, config.d_head**-0.5),
        x,
    )


def test_attention_scale_of_the_config_is_used():
    config = GPTConfig(**{**CONFIG.to_dict(), "attention_scale": 1.0})
    module = nn.CausalSelfAttention(config, 0)
    x = torch.randn(1, 9, 24)
    torch.testing.assert_close(module(x), plain_attention(module, x, band(9, None), 1.0))


def test_no_copy_between_the_projections(monkeypatch):
    seen = {}

    def attention(q, k, v, **options):
        seen["inputs"] = (q, k, v)
        b, h, s, d = q.shape
        seen["out"] = torch.zeros(b, s, h, d).transpose(1, 2)
        return seen["out"]

    module = nn.CausalSelfAttention(WIDE, 0)
    monkeypatch.setattr(nn.F, "attention", attention)
    module.c_proj.register_forward_pre_hook(lambda _, args: seen.update(merged=args[0]))
    module(torch.randn(2, 5, WIDE.n_embd))
    storages = {x.untyped_storage().data_ptr() for x in seen["inputs"]}
    assert len(storages) == 1
    assert all(x.stride(-1) == 1 for x in seen["inputs"])
    assert seen["merged"].data_ptr() == seen["out"].data_ptr()


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_mlp_is_the_formula(activation):
    module = nn.MLP(GPTConfig(**{**CONFIG.to_dict(), "activation": activation}))
    approximate = "tanh" if activation == "gelu_tanh" else "none"

    def plain(x):
        return module.c_proj(torch.nn.functional.gelu(module.c_fc(x), approximate=approximate))

    both_backward(module, plain, torch.randn(2, 5, 24))
    expected = module(x := torch.randn(2, 5, 24))
    module.c_fc = torch.nn.Sequential(module.c_fc)  # as a wrapper around the layer does
    torch.testing.assert_close(module(x), expected)


def plain_block(block, x, visible):
    norm = torch.nn.functional.layer_norm
    scale = block.attn.head_dim**-0.5

    def ln(x, module):
        return norm(x, module.normalized_shape, module.weight, module.bias, module.eps)

    def mlp(x):
        hidden = torch.nn.functional.gelu(block.mlp.c_fc(x), approximate="tanh")
        return block.mlp.c_proj(hidden)

    if block.post_norm:
        x = ln(x + plain_attention(block.attn, x, visible, scale), block.ln_1)
        return ln(x + mlp(x), block.ln_2)
    x = x + plain_attention(block.attn, ln(x, block.ln_1), visible, scale)
    return x + mlp(ln(x, block.ln_2))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_decoder_block_is_the_formula(norm, bias):
    block = nn.DecoderBlock(GPTConfig(**{**WIDE.to_dict(), "norm": norm, "bias": bias}), 1)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    both_backward(block, lambda x: plain_block(block, x, band(9, 4)), torch.randn(2, 9, 20))


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "banded"])
def test_padding_never_leaks(layer):
    block = nn.DecoderBlock(CONFIG, layer)
    x = torch.randn(2, 9, 24)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    poisoned = torch.where(mask[:, :, None], x, float("nan"))
    assert torch.equal(block(poisoned, mask)[mask], block(x, mask)[mask])
    torch.testing.assert_close(block(x, mask)[1, 3:], block(x[1:, 3:])[0])


def test_wrong_input_is_named():
    block = nn.DecoderBlock(CONFIG, 0)
    x = torch.randn(2, 9, 24)
    for wrong in (x[0], x[..., :23]):
        for module in (block, block.attn, block.mlp):
            with pytest.raises(ValueError, match=r"x: expected shape \(b, s, 24\), got"):
                module(wrong)
    for wrong, got in ((None, "NoneType"), ([1], "list"), (x.int(), "torch.int32")):
        for module in (block, block.attn, block.mlp):
            with pytest.raises(TypeError, match=f"x: expected .* got {got}"):
                module(wrong)
    with pytest.raises(
        ValueError, match=r"attention_mask: expected shape .* \(2, 9\), got \(2, 8\)"
    ):
        block(x, torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match="attention_mask: expected dtype bool or an integer"):
        block(x, torch.zeros(2, 9))


def gradients(block, x, run):
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().mean().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in block.parameters())]


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "banded"])
def test_compiled_block_equals_eager_and_compiles_at_most_twice(layer):
    block = nn.DecoderBlock(CONFIG, layer)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for s in (5, 3, 8, 13, 21, 2, 17, 32, 9, 30):
        x = torch.randn(2, s, 24)
        for got, expected in zip(
            gradients(block, x, compiled), gradients(block, x, block), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_activation_checkpointing_repeats_the_dropout():
    block = nn.DecoderBlock(GPTConfig(**{**CONFIG.to_dict(), "dropout": 0.3}), 1)
    x = torch.randn(2, 9, 24)
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(gradients(block, x, run))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    torch.manual_seed(4)
    assert not torch.equal(block(x), results[0][0])
    assert torch.equal(block.eval()(x), block(x))


def test_autocast_keeps_the_residual_stream_in_float32():
    block = nn.DecoderBlock(CONFIG, 1)
    x = torch.randn(2, 9, 24)
    expected = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    assert block.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_block_survives_deepcopy_and_pickle():
    block, x = nn.DecoderBlock(CONFIG, 1), torch.randn(2, 9, 24)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_hooks_of_every_layer_are_called(norm: str) -> None:
    """Also of those whose work is fused into another's."""
    block = nn.DecoderBlock(GPTConfig(**{**CONFIG.to_dict(), "norm": norm}), 0).eval()
    x = torch.randn(2, 5, block.attn.n_embd)
    want = block(x)
    called = []
    for name, module in block.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    torch.testing.assert_close(block(x), want)
    assert {"ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"} <= set(called)
    block.ln_2.register_forward_hook(lambda module, args, out: 0 * out)
    assert not torch.equal(block(x), want)


GLOBAL_HOOKS = {
    "register_module_forward_hook": lambda module, args, out: SEEN.add(module),
    "register_module_forward_pre_hook": lambda module, args: SEEN.add(module),
    "register_module_full_backward_hook": lambda module, grads, out: SEEN.add(module),
    "register_module_full_backward_pre_hook": lambda module, grads: SEEN.add(module),
}
SEEN: set[torch.nn.Module] = set()


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_of_every_module_see_the_fused_layers(kind: str) -> None:
    layer = torch.nn.TransformerEncoderLayer(24, 3, 24, dropout=0.0, batch_first=True)
    fastgpt.replace_layers(layer)
    block = nn.DecoderBlock(CONFIG, 0)
    SEEN.clear()
    handle = getattr(torch.nn.modules.module, kind)(
        lambda *args: GLOBAL_HOOKS[kind](*args)  # which returns nothing that replaces anything
    )
    try:
        layer(block(torch.randn(2, 5, 24, requires_grad=True))).sum().backward()
    finally:
        handle.remove()
    assert {block.ln_2, block.mlp.c_fc, layer.norm1, layer.norm2} <= SEEN
