"""replace_layers on torch.nn: same results, nothing else changed, and back."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import functional as F
from fastgpt import nn
from fastgpt.integrate import torch_nn

N, S, E, H = 3, 11, 32, 4


def padding() -> Tensor:
    """(n, s) bool, True = hidden: right padding in two of three rows."""
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[0, 7:] = True
    hidden[2, 9:] = True
    return hidden


def causal() -> Tensor:
    return torch.nn.Transformer.generate_square_subsequent_mask(S)


def encoder(norm_first: bool = False, batch_first: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        E, H, 2 * E, dropout=0.0, norm_first=norm_first, batch_first=batch_first
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that norm_first has no fast path
        return torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(E), **options)


def replaced(model: torch.nn.Module) -> Any:
    model = copy.deepcopy(model)
    fastgpt.replace_layers(model)
    return model


def same(got: torch.nn.Module, own: torch.nn.Module, *inputs: Tensor, **options: Any) -> None:
    """Outputs and every gradient."""
    found = []
    for model in (got, own):
        model.zero_grad()
        out = model(*inputs, **options)
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
def test_encoder_in_training(norm_first: bool, batch_first: bool, masks: str) -> None:
    own = encoder(norm_first, batch_first)
    x = torch.randn(N, S, E) if batch_first else torch.randn(S, N, E)
    options: dict[str, Any] = {}
    if masks in ("causal", "both"):
        options["mask"] = causal()
    if masks in ("padding", "both"):
        options["src_key_padding_mask"] = padding()
        if masks == "both":  # torch warns of masks of two kinds
            options["src_key_padding_mask"] = torch.zeros(N, S).masked_fill(padding(), -torch.inf)
    same(replaced(own), own, x, **options)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "causal"])
@pytest.mark.parametrize("nested", [False, True])
def test_encoder_in_inference(norm_first: bool, masks: str, nested: bool) -> None:
    """Where torch has a fast path of its own, packed or not: ours are called all the same."""
    own = encoder(norm_first, enable_nested_tensor=nested).eval()
    model = replaced(own)
    x = torch.randn(N, S, E)
    options: dict[str, Any] = {}
    if masks == "causal":
        options["mask"] = causal()
    if masks == "padding":
        options["src_key_padding_mask"] = padding()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are a prototype
        want = own(x, **options)
        torch.testing.assert_close(model(x, **options), want, rtol=1e-4, atol=1e-5)
        explained = str(fastgpt.explain(model, x, **options))
    assert explained.count("attention: cpu") == 2
    assert explained.count("layer_norm: cpu") == 5
    assert "torch (" not in explained


def test_decoder() -> None:
    torch.manual_seed(0)
    x, memory = torch.randn(N, S, E), torch.randn(N, S, E)
    for norm_first in (False, True):
        layer = torch.nn.TransformerDecoderLayer(
            E, H, 2 * E, dropout=0.0, norm_first=norm_first, batch_first=True
        )
        own = torch.nn.TransformerDecoder(layer, 2)
        model = replaced(own)
        options = {"tgt_mask": causal(), "tgt_is_causal": True}
        same(model, own, x, memory, **options)
        same(model, own, x, memory, memory_key_padding_mask=padding())
        assert isinstance(model.layers[0], torch_nn.TransformerDecoderLayer)


def test_the_result_can_be_viewed_as_torchs() -> None:
    own = torch.nn.MultiheadAttention(E, H)
    x = torch.randn(S, N, E)
    for model in (own, replaced(own)):
        assert model(x, x, x, need_weights=False)[0].view(-1, E).shape == (S * N, E)


def test_kernels_hub_is_reached_by_its_name() -> None:
    code = "import fastgpt; assert fastgpt.integrate.kernels_hub.REPOSITORY.is_dir()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_whole_transformer() -> None:
    torch.manual_seed(0)
    own = torch.nn.Transformer(E, H, 1, 1, 2 * E, dropout=0.0, batch_first=True)
    x, y = torch.randn(N, S, E), torch.randn(N, S, E)
    same(replaced(own), own, x, y, tgt_mask=causal())


@pytest.mark.parametrize(
    ("own", "shape"),
    [
        (torch.nn.LayerNorm(E), (N, E)),
        (torch.nn.LayerNorm((S, E), bias=False), (N, S, E)),
        (torch.nn.LayerNorm(E, elementwise_affine=False), (N, E)),
        (torch.nn.Softmax(dim=-1), (N, E)),
    ],
)
def test_single_layers(own: torch.nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = replaced(own)
    torch.testing.assert_close(model(x), own(x))
    assert type(model).__module__ == "fastgpt.nn"


def test_loss() -> None:
    own = torch.nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2)
    logits, target = torch.randn(7, 9), torch.randint(9, (7,))
    torch.testing.assert_close(replaced(own)(logits, target), own(logits, target))


def model_of_everything() -> torch.nn.Module:
    class Special(torch.nn.LayerNorm):
        pass

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(E, E), torch.nn.LayerNorm(E), Special(E), torch.nn.RMSNorm(E),
        torch.nn.Softmax(dim=-1),
    )  # fmt: skip
    model.add_module("attention", torch.nn.MultiheadAttention(E, H))
    model.add_module("loss", torch.nn.CrossEntropyLoss())
    return model


def test_the_report() -> None:
    model = model_of_everything()
    report = fastgpt.replace_layers(model)
    text = str(report)
    for line in (
        "1          torch.nn.LayerNorm",
        "fastgpt.nn.LayerNorm",
        "left: a subclass of torch.nn.LayerNorm, which may have a forward of its own",
        "left: fastgpt has no RMSNorm",
        "4 replaced, 2 left",
    ):
        assert line in text
    assert [entry.module for entry in report.left] == ["2", "3"]
    assert [entry.why for entry in fastgpt.replace_layers(model).replaced] == ["it was already"] * 4
    assert fastgpt.restore_layers(model) == 4
    assert [type(m).__module__.split(".")[0] for m in model.modules()].count("fastgpt") == 0
    assert "nothing in this model" in str(fastgpt.replace_layers(torch.nn.Linear(2, 2)))


def test_kinds_and_strict() -> None:
    model = model_of_everything()
    report = fastgpt.replace_layers(model, kinds=("softmax",))
    assert [(entry.module, entry.kind) for entry in report] == [("4", "softmax")]
    assert type(model[1]) is torch.nn.LayerNorm
    with pytest.raises(ValueError, match="which may have a forward of its own"):
        fastgpt.replace_layers(model, kinds=("layer_norm",), strict=True)
    assert type(model[1]) is torch.nn.LayerNorm, "strict changed something before it raised"
    fastgpt.replace_layers(model, kinds=("attention", "loss"), strict=True)
    assert type(model.attention) is nn.MultiheadAttention


def test_everything_else_stays() -> None:
    model = model_of_everything().bfloat16()
    tied = torch.nn.LayerNorm(E)
    model.add_module("tied", tied)
    model.add_module("again", tied)
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    modes = [m.training for m in model.modules()]
    fastgpt.replace_layers(model)
    assert all(x is y for x, y in zip(parameters, model.parameters(), strict=True))
    assert model.tied is model.again
    assert model.tied.weight.dtype == torch.float32
    assert [m.training for m in model.modules()] == modes
    assert isinstance(model[1], torch.nn.LayerNorm)
    model[1](torch.randn(2, E, dtype=torch.bfloat16))
    assert calls == [1]
    fresh = model_of_everything().bfloat16()
    fresh.add_module("tied", tied)
    fresh.add_module("again", tied)
    fresh.load_state_dict(model.state_dict())
    fastgpt.restore_layers(model)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_hooks_on_a_norm_are_called_inside_of_a_layer() -> None:
    model = encoder()
    calls: list[int] = []
    model.layers[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    fastgpt.replace_layers(model)
    model(torch.randn(N, S, E))
    assert calls == [1]


def test_a_wrapped_forward_is_left() -> None:
    model = torch.nn.Sequential(torch.nn.LayerNorm(E))
    own = model[0].forward
    model[0].forward = lambda x: own(x) + 1
    report = fastgpt.replace_layers(model)
    assert "its forward is wrapped" in report.left[0].why
    assert torch.equal(model(torch.zeros(1, E)), torch.ones(1, E))


def test_compiled() -> None:
    own = encoder().eval()
    x = torch.randn(N, S, E)
    compiled = torch.compile(replaced(own), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), own(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fastgpt.replace_layers("model"), TypeError, "model: expected a torch.nn.Module"),
        (lambda: fastgpt.restore_layers(None), TypeError, "model: expected a torch.nn.Module"),
        (
            lambda: fastgpt.replace_layers(torch.nn.Linear(2, 2), kinds="loss"),
            TypeError,
            "kinds: expected a tuple of names, got 'loss'",
        ),
        (
            lambda: fastgpt.replace_layers(torch.nn.Linear(2, 2), kinds=("norm",)),
            ValueError,
            "kinds: expected some of attention, layer_norm, softmax, loss, got 'norm'",
        ),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_torch_fx_records_one_node_of_each_op() -> None:
    own = torch.nn.Sequential(torch.nn.Linear(E, E), torch.nn.LayerNorm(E), torch.nn.Softmax(-1))
    model = replaced(own)
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [F.layer_norm, F.softmax]
    x = torch.randn(N, S, E)
    assert torch.equal(traced(x), model(x))


def test_what_subclassed_a_replaced_module_survives_the_restore() -> None:
    """A parametrization gives the module a class of its own, over ours."""

    class Twice(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    own = torch.nn.Sequential(torch.nn.LayerNorm(E))
    model = replaced(own)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Twice())
    x = torch.randn(N, E)
    want = own(x) * 2
    torch.testing.assert_close(model(x), want)
    assert fastgpt.restore_layers(model) == 1
    assert isinstance(model[0], torch.nn.LayerNorm)
    assert not isinstance(model[0], nn.LayerNorm)
    torch.testing.assert_close(model(x), want)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert type(model[0]) is torch.nn.LayerNorm
    assert torch.equal(model(x), own(x))


def test_kinds_from_an_iterator() -> None:
    model = torch.nn.Sequential(torch.nn.LayerNorm(E), torch.nn.Softmax(-1))
    assert len(fastgpt.replace_layers(model, kinds=iter(["softmax"])).replaced) == 1
    with pytest.raises(TypeError, match=r"^kinds: expected a tuple of names, got None"):
        fastgpt.replace_layers(model, kinds=None)


def test_a_decoder_of_ours_has_nothing_to_replace() -> None:
    config = fastgpt.GPTConfig(vocab_size=11, n_positions=8, n_layer=1, n_embd=8, n_head=2)
    report = fastgpt.replace_layers(fastgpt.GPT(config), strict=True)
    assert {(e.module, e.why) for e in report if e.kind == "attention"} == {
        ("h.0.attn", "it was already")
    }
