"""Small GPTs as models of transformers, for the tests of `fastgpt.integrate.hugging_face.gpt`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import GPT, GPTConfig

SHAPE = {
    "vocab_size": 40,
    "n_positions": 48,
    "n_layer": 2,
    "n_embd": 48,
    "n_head": 3,
    "window": 4,
}
WORDS = "the a cat dog sat ran on under mat tree and then it slept good bad very".split()


def gpt(**changes: Any) -> GPT:
    """Wide weights, so that attention and argmax have something to decide."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def wrapped(model: GPT, **kwargs: Any) -> fastgpt.FastGPTForCausalLM:
    config = fastgpt.FastGPTConfig.from_gpt_config(model.config, **kwargs)
    wrapper = fastgpt.FastGPTForCausalLM(config)
    wrapper.transformer.load_state_dict(model.state_dict())
    return wrapper.eval()


def classifier(**kwargs: Any) -> fastgpt.FastGPTForSequenceClassification:
    torch.manual_seed(0)
    model = fastgpt.FastGPTForSequenceClassification(fastgpt.FastGPTConfig(**SHAPE, **kwargs))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def ids(b: int = 3, s: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(4, 40, (b, s), generator=torch.Generator().manual_seed(seed))


def left_padded(b: int = 3, s: int = 9) -> Tensor:
    """(b, s): row i has 3 - i hidden tokens on the left."""
    return (torch.arange(s) >= 3 - torch.arange(b)[:, None]).long()


def module(name: str, *others: str) -> ModuleType:
    """The module `name`; skips where it, or one of the `others` that it needs, does not import."""
    for needed in (*others, name):
        try:
            found = __import__(needed, fromlist=["_"])
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"{needed} does not import: {error}")
    return found


def word_tokenizer() -> Any:
    """One token per word of WORDS; id 0 is padding, 1 the end."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
