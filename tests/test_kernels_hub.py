"""Models that Hugging Face's `kernels` puts on our layers: same results, untouched state."""

from __future__ import annotations

import copy
import importlib.metadata
import socket
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

kernels = pytest.importorskip("kernels")

from fastgpt.integrate import kernels_hub
from fastgpt.integrate.kernels_hub import layers

Mode = kernels.Mode
NAMES = {nn.LayerNorm: "LayerNorm", nn.Softmax: "Softmax", nn.CrossEntropyLoss: "CrossEntropyLoss"}


class Tanh(nn.Module):
    """As transformers writes gelu in NewGELUActivation and FastGELUActivation."""

    def forward(self, input: Tensor) -> Tensor:
        inner = 0.7978845608028654 * (input + 0.044715 * torch.pow(input, 3.0))
        return 0.5 * input * (1.0 + torch.tanh(inner))


class Erf(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.gelu(input)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.tanh, self.erf, self.softmax = Tanh(), Erf(), nn.Softmax(-1)
        self.loss = nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1)
        self.head = nn.Linear(24, 11)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.erf(self.tanh(self.norm(x)))
        return self.loss(self.head(self.softmax(x) + x), target)


@pytest.fixture(autouse=True)
def _offline_and_unmarked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No connection is made, and no class keeps the name that a test gave it."""

    def connect(*args: object) -> None:
        raise AssertionError("a connection to the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    names = NAMES | {Tanh: "NewGELU", Erf: "GeLU"}
    for cls, name in names.items():
        kernels.replace_kernel_forward_from_hub(cls, name)
    yield
    for cls in names:
        del cls.kernel_layer_name, cls.kernel_condition


def kernelized(model: nn.Module, mode: object) -> nn.Module:
    with kernels.use_kernel_mapping(kernels_hub.mapping(), inherit_mapping=False):
        return kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)


def results(model: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    loss = model(x, target)
    return loss.detach(), *torch.autograd.grad(loss, (x, *model.parameters()))


@pytest.mark.parametrize(
    "mode", [Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE], ids=str
)
def test_a_kernelized_model(mode: object) -> None:
    plain = Model()
    ours = kernelized(copy.deepcopy(plain), mode)
    for name in ("norm", "tanh", "erf", "softmax", "loss"):
        module, own = getattr(ours, name), type(getattr(plain, name))
        assert type(module) is own
        assert "fastgpt" in module.forward.__func__.__module__
    assert list(ours.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    x, target = torch.randn(7, 24), torch.randint(11, (7,))
    want = results(plain, x, target)
    torch.testing.assert_close(results(ours, x, target), want)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(results(compiled, x, target), want)


def test_softmax_without_dim_is_torchs() -> None:
    softmax = kernelized(nn.Sequential(nn.Softmax()), Mode.TRAINING)
    x = torch.randn(3, 5)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        torch.testing.assert_close(softmax(x), x.softmax(1))


@pytest.mark.parametrize("name", layers.__all__)
def test_every_layer_loads_from_the_folder(name: str) -> None:
    loaded = kernels.get_local_kernel(kernels_hub.REPOSITORY)
    assert getattr(loaded.layers, name) is getattr(layers, name)
    for repository in kernels_hub.mapping()[name].values():
        assert repository.load() is getattr(layers, name)


def test_layer_names_are_those_of_transformers() -> None:
    activations = pytest.importorskip("transformers.activations")
    x = torch.randn(50)
    for name, activation in (
        ("NewGELU", activations.NewGELUActivation()),
        ("FastGELU", activations.FastGELUActivation()),
        ("GeLU", activations.GELUActivation()),
    ):
        torch.testing.assert_close(getattr(layers, name)()(x), activation(x))


def test_an_older_package_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.1")
    with pytest.raises(
        RuntimeError, match=r"kernels: expected version 0\.17 or later, got 0\.9\.1"
    ):
        kernels_hub.mapping()
