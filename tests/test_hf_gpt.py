"""GPT as a model of transformers: the same numbers, generation, checkpoints, heads, errors."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import GPT, GPTConfig

transformers = pytest.importorskip("transformers", minversion="4.57")

from fastgpt.integrate.hugging_face.gpt import CACHE
from tests.hf_gpt import SHAPE, gpt, ids, left_padded, wrapped

# --- the configuration ---------------------------------------------------------------------------


def test_config_has_the_fields_and_both_kinds_of_names() -> None:
    config = fastgpt.FastGPTConfig(**SHAPE, n_inner=7, num_labels=5)
    assert config.to_gpt_config() == GPTConfig(**SHAPE)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (48, 3, 2)
    assert (config.max_position_embeddings, config.num_labels, config.n_inner) == (48, 5, 7)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.sliding_window == 4
    assert fastgpt.FastGPTConfig(attention_pattern=("dense",)).sliding_window is None
    assert fastgpt.FastGPTConfig(hidden_size=96).n_embd == 96


@pytest.mark.parametrize("name", ["gpt1", "gpt3-small", "gpt3-13b"])
def test_config_presets(name: str) -> None:
    config = fastgpt.FastGPTConfig.preset(name, vocab_size=7, num_labels=3)
    assert config.to_gpt_config() == GPTConfig.preset(name, vocab_size=7)
    assert config.num_labels == 3


def test_config_defaults_are_a_preset() -> None:
    assert fastgpt.FastGPTConfig().to_gpt_config() == GPTConfig.preset("gpt3-small", head_dim=None)


@pytest.mark.parametrize("tied", [True, False])
def test_config_survives_json(tied: bool, tmp_path: Path) -> None:
    shape = GPTConfig(
        **SHAPE, tie_embeddings=tied, norm="post", attention_scale=0.5, head_dim=12, bias=False
    )
    config = fastgpt.FastGPTConfig.from_gpt_config(shape, num_labels=3, fused_loss=True)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is fastgpt.FastGPTConfig
    assert loaded.to_gpt_config() == shape
    assert (loaded.num_labels, loaded.fused_loss) == (3, True)
    assert loaded.tie_word_embeddings is loaded.tie_embeddings is tied
    assert fastgpt.FastGPTConfig(tie_word_embeddings=tied).tie_embeddings is tied


def test_config_refuses_what_gpt_config_refuses() -> None:
    with pytest.raises(ValueError, match="n_embd: expected a multiple of n_head = 3"):
        fastgpt.FastGPTConfig(**{**SHAPE, "n_embd": 49})
    with pytest.raises(ValueError, match="name: expected one of gpt1"):
        fastgpt.FastGPTConfig.preset("gpt4")
    with pytest.raises(ValueError, match="tie_word_embeddings: it is another name"):
        fastgpt.FastGPTConfig(tie_embeddings=True, tie_word_embeddings=False)


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "post", "attention_pattern": ("dense",)},
        {"n_embd": 40, "head_dim": 7, "n_head": 4},
        {"bias": False, "tie_embeddings": False},
    ],
    ids=["gpt3", "gpt1", "gpt3_13b", "untied_no_bias"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_logits_loss_and_gradients_are_gpts(changes: dict[str, Any], padded: bool) -> None:
    model, tokens = gpt(**changes), ids()
    wrapper = wrapped(model)
    mask = left_padded() if padded else None
    labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    want = model(tokens, mask, labels)
    got = wrapper(tokens, mask, labels=labels)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=0)
    torch.testing.assert_close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    gradients = {name: p.grad for name, p in wrapper.transformer.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_every_form_of_input_gives_the_same() -> None:
    model, tokens, mask = gpt(), ids(), left_padded()
    wrapper = wrapped(model)
    want = wrapper(tokens, mask).logits[mask.bool()]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    segments = torch.zeros_like(tokens)
    embedded = wrapper.get_input_embeddings()(tokens)
    for got in (
        wrapper(tokens, mask.bool()),
        wrapper(tokens, mask.float()),
        wrapper(tokens.int(), mask, position_ids=positions, token_type_ids=segments),
        wrapper(inputs_embeds=embedded, attention_mask=mask),
    ):
        torch.testing.assert_close(got.logits[mask.bool()], want, rtol=0, atol=0)
    last = wrapper(tokens, mask, logits_to_keep=1).logits
    torch.testing.assert_close(last, wrapper(tokens, mask).logits[:, -1:])
    some = wrapper(tokens, mask, logits_to_keep=torch.tensor([5, 7])).logits
    torch.testing.assert_close(some, wrapper(tokens, mask).logits[:, [5, 7]])


def test_outputs_are_those_of_transformers() -> None:
    wrapper, tokens = wrapped(gpt()), ids()
    got = wrapper(tokens, labels=tokens, output_hidden_states=True)
    assert got[CACHE].get_seq_length() == 9
    assert [tuple(h.shape) for h in got.hidden_states] == [(3, 9, 48)] * 3
    torch.testing.assert_close(wrapper.lm_head(got.hidden_states[-1]), got.logits)
    loss, logits = wrapper(tokens, labels=tokens, use_cache=False, return_dict=False)
    assert (loss, logits.shape) == (got.loss, got.logits.shape)
    body = fastgpt.FastGPTModel(wrapper.config)
    body.load_state_dict(wrapper.state_dict(), strict=False)
    got_body = body.eval()(tokens).last_hidden_state
    torch.testing.assert_close(got_body, got.hidden_states[-1])
    assert CACHE not in wrapper.train()(tokens)


def test_num_items_in_batch_divides_the_sum() -> None:
    wrapper, tokens = wrapped(gpt()), ids()
    mean, items = wrapper(tokens, labels=tokens).loss, tokens[:, 1:].numel()
    for count in (4 * items, torch.tensor(4 * items)):
        got = wrapper(tokens, labels=tokens, num_items_in_batch=count).loss
        torch.testing.assert_close(got, mean / 4)


def test_fused_loss_holds_no_logits() -> None:
    tokens = ids()
    plain, fused = wrapped(gpt()), wrapped(gpt(), fused_loss=True)
    got, want = fused.train()(tokens, labels=tokens), plain.train()(tokens, labels=tokens)
    assert got.logits is None
    torch.testing.assert_close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(fused.lm_head.weight.grad, plain.lm_head.weight.grad)
    assert fused.eval()(tokens, labels=tokens).logits is not None


def test_low_precision_has_a_float32_loss() -> None:
    wrapper = wrapped(gpt()).to(torch.bfloat16)
    got = wrapper(ids(), labels=ids())
    assert (got.logits.dtype, got.loss.dtype) == (torch.bfloat16, torch.float32)


def test_packed_documents_see_only_themselves() -> None:
    wrapper, tokens = wrapped(gpt()), ids(b=2, s=12)
    lengths = (5, 4, 3)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = wrapper(tokens, position_ids=positions).logits
    for got, document in zip(
        packed.split(lengths, dim=1), tokens.split(lengths, dim=1), strict=True
    ):
        torch.testing.assert_close(got, wrapper(document).logits)
    whole = wrapper(tokens, position_ids=torch.arange(12)[None]).logits
    torch.testing.assert_close(whole, wrapper(tokens).logits, rtol=0, atol=0)
    assert not torch.allclose(whole[:, 5:], packed[:, 5:])
    assert CACHE not in wrapper(tokens, position_ids=positions)
    with pytest.raises(ValueError, match=r"packed documents .* got a cache"):
        wrapper(tokens, position_ids=positions, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match=r"packed documents .* got dropout = 0.1"):
        wrapped(gpt(dropout=0.1)).train()(tokens, position_ids=positions)


@pytest.mark.parametrize("padded", [False, True])
def test_compiles_into_one_graph(padded: bool) -> None:
    wrapper, mask = wrapped(gpt()), left_padded() if padded else None
    compiled = torch.compile(wrapper, backend="eager", fullgraph=True)
    got = compiled(ids(), mask, labels=ids(), use_cache=False)
    want = wrapper(ids(), mask, labels=ids(), use_cache=False)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)


def test_compiles_into_one_graph_with_its_cache() -> None:
    wrapper = wrapped(gpt())
    with torch.no_grad():
        got = torch.compile(wrapper, backend="eager", fullgraph=True)(ids())
        want = wrapper(ids())
        assert got[CACHE].get_seq_length() == ids().shape[1]
    torch.testing.assert_close(got.logits, want.logits)


def test_initialised_as_gpt2() -> None:
    config = fastgpt.FastGPTConfig.from_gpt_config(
        GPTConfig(vocab_size=300, n_positions=64, n_layer=8, n_embd=128, n_head=4), num_labels=50
    )
    for kind in (fastgpt.FastGPTForCausalLM, fastgpt.FastGPTForSequenceClassification):
        for name, parameter in kind(config).named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            elif ".ln_" in name:
                assert (parameter == 1).all()
            else:
                std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
                assert parameter.std().item() == pytest.approx(std, rel=0.05), name


# --- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "how",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["dynamic", "static", "no_cache"],
)
def test_greedy_generation_is_gpts(how: dict[str, Any], padded: bool) -> None:
    model = gpt()
    mask = left_padded() if padded else torch.ones_like(ids())
    want = model.generate(ids(), 12, attention_mask=mask, do_sample=False)
    got = wrapped(model).generate(
        ids(), attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, **how
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("pattern", [("banded",), ("banded", "dense")])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_go_on_where_they_stopped(pattern: tuple[str, ...], kind: str) -> None:
    """In parts of several lengths, with masks: as the whole at once, in every layer's memory."""
    wrapper, tokens = wrapped(gpt(attention_pattern=pattern)), ids(s=14)
    mask = left_padded(s=14)
    if kind == "dynamic":
        cache = transformers.DynamicCache(config=wrapper.config)
    else:
        cache = transformers.StaticCache(config=wrapper.config, max_cache_len=20)
    want, got, past = wrapper(tokens, mask).logits, [], 0
    with torch.no_grad():
        for t in (3, 1, 5, 1, 1, 3):
            part = slice(past, past + t)
            step = wrapper(tokens[:, part], mask[:, : past + t], past_key_values=cache)
            got.append(step.logits)
            past += t
    visible = mask.bool()
    torch.testing.assert_close(torch.cat(got, 1)[visible], want[visible], rtol=1e-4, atol=1e-4)


def test_beams_and_samples() -> None:
    wrapper, prompt, mask = wrapped(gpt()), ids(), left_padded()
    call = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    best = wrapper.generate(prompt, num_beams=4, do_sample=False, **call)
    greedy = wrapper.generate(prompt, do_sample=False, **call)

    def log_likelihood(sequences: Tensor) -> Tensor:
        whole = torch.cat((mask, torch.ones(3, 6, dtype=mask.dtype)), dim=1)
        log_p = wrapper(sequences, whole).logits.log_softmax(-1)[:, 8:-1]
        return log_p.gather(2, sequences[:, 9:, None]).sum((1, 2))

    assert (log_likelihood(best) >= log_likelihood(greedy) - 1e-4).all()
    cached = wrapper.generate(prompt, num_beams=4, do_sample=False, use_cache=False, **call)
    assert torch.equal(best, cached), "the cache follows the beams"
    torch.manual_seed(1)
    drawn = wrapper.generate(prompt, do_sample=True, top_k=5, num_return_sequences=2, **call)
    assert drawn.shape == (6, 15)


@pytest.mark.parametrize(
    "how", [{"assistant_model": 1}, {"prompt_lookup_num_tokens": 3}], ids=["assistant", "lookup"]
)
def test_guessed_tokens_change_nothing(how: dict[str, Any]) -> None:
    """What was guessed wrongly leaves the caches again, those of banded layers too."""
    wrapper, prompt = wrapped(gpt()), ids(b=1)
    if "assistant_model" in how:
        how = {"assistant_model": wrapped(gpt(n_layer=1))}
    call = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    call["attention_mask"] = torch.ones_like(prompt)
    want = wrapper.generate(prompt, **call)
    assert torch.equal(wrapper.generate(prompt, **call, **how), want)


def test_generation_from_embeddings_and_from_a_cache() -> None:
    wrapper, prompt = wrapped(gpt()), ids(b=1)
    call = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    want = wrapper.generate(prompt, max_new_tokens=12, **call).sequences
    embedded = wrapper.get_input_embeddings()(prompt)
    got = wrapper.generate(inputs_embeds=embedded, max_new_tokens=12, **call).sequences
    assert torch.equal(got, want[:, 9:])
    begun = wrapper.generate(prompt, max_new_tokens=5, **call)
    cache = {"past_key_values": begun[CACHE]}
    got = wrapper.generate(begun.sequences, max_new_tokens=7, **cache, **call).sequences
    assert torch.equal(got, want)


def test_generation_beyond_n_positions_says_so() -> None:
    with pytest.raises(ValueError, match="n_positions = 48"):
        wrapped(gpt()).generate(ids(), max_new_tokens=60, do_sample=False, pad_token_id=0)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_folders_go_both_ways(tied: bool, tmp_path: Path) -> None:
    model, tokens = gpt(tie_embeddings=tied), ids()
    model.save_pretrained(tmp_path / "ours")
    want = model(tokens).logits
    for kind in (transformers.AutoModelForCausalLM, fastgpt.FastGPTForCausalLM):
        wrapper = kind.from_pretrained(tmp_path / "ours")
        assert type(wrapper) is fastgpt.FastGPTForCausalLM
        assert torch.equal(wrapper(tokens).logits, want)
        assert (wrapper.lm_head.weight is wrapper.transformer.wte.weight) == tied
        assert wrapper.num_parameters() == model.num_parameters()
    wrapper.save_pretrained(tmp_path / "theirs")
    again = GPT.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config
    assert torch.equal(again(tokens).logits, want)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(tokens).logits, want)
    wrapper.save_pretrained(tmp_path / "shards", max_shard_size="30kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(GPT.from_pretrained(tmp_path / "shards")(tokens).logits, want)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_takes_the_body_of_a_language_model(tied: bool, tmp_path: Path) -> None:
    model = gpt(tie_embeddings=tied)
    model.save_pretrained(tmp_path / "ours")
    wrapped(model).save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        classifier, report = fastgpt.FastGPTForSequenceClassification.from_pretrained(
            tmp_path / folder, num_labels=3, output_loading_info=True
        )
        assert set(report["missing_keys"]) == {"score.weight"}
        assert not report["unexpected_keys"]
        assert torch.equal(classifier.transformer.wte.weight, model.wte.weight)
        assert 0.005 < classifier.score.weight.std().item() < 0.05
        assert not hasattr(classifier.transformer, "lm_head")
    classifier.save_pretrained(tmp_path / "classifier")
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(auto(ids(b=1)).logits, classifier(ids(b=1)).logits)
    body = transformers.AutoModel.from_pretrained(tmp_path / "classifier")
    assert torch.equal(body(ids()).last_hidden_state, model.hidden_states(ids()))


def test_a_folder_of_transformers_must_not_contradict_itself(tmp_path: Path) -> None:
    wrapped(gpt()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("{", '{\n  "tie_word_embeddings": false,', 1))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        fastgpt.FastGPTForCausalLM.from_pretrained(tmp_path)


def test_resized_vocabulary(tmp_path: Path) -> None:
    for tied in (True, False):
        wrapper = wrapped(gpt(tie_embeddings=tied))
        want = wrapper(ids()).logits
        wrapper.resize_token_embeddings(50)
        assert wrapper.config.vocab_size == wrapper.transformer.config.vocab_size == 50
        assert (wrapper.lm_head.weight is wrapper.transformer.wte.weight) == tied
        torch.testing.assert_close(wrapper(ids()).logits[..., :40], want)
        assert wrapper(torch.full((1, 2), 49), labels=torch.full((1, 2), 49)).loss.isfinite()
        wrapper.save_pretrained(tmp_path)
        assert GPT.from_pretrained(tmp_path).config.vocab_size == 50


# --- errors, and who imports whom ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({}, ValueError, "input_ids: expected either .* neither"),
        ({"input_ids": ids(), "inputs_embeds": torch.ones(3, 9, 48)}, ValueError, "got both"),
        ({"inputs_embeds": torch.ones(3, 9, 4)}, ValueError, r"inputs_embeds: .*\(b, s, 48\)"),
        ({"input_ids": ids() + 40}, ValueError, r"input_ids\[0, 0\] is .* expected 0 to 39"),
        ({"input_ids": ids().float()}, TypeError, "input_ids: expected dtype int64"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids: expected a torch.Tensor, got list"),
        ({"input_ids": ids(s=49)}, ValueError, "n_positions = 48 tokens, got 49"),
        ({"input_ids": ids(), "labels": ids() - 9}, ValueError, r"labels\[\d, \d\] is -"),
        ({"input_ids": ids(), "labels": ids(s=8)}, ValueError, "labels: expected the shape"),
        ({"input_ids": ids(), "attention_mask": ids(s=8)}, ValueError, "attention_mask: .* shape"),
        (
            {"input_ids": ids(), "attention_mask": torch.full((3, 9), -1e4)},
            ValueError,
            "attention_mask: expected 1 .* got -10000",
        ),
        (
            {"input_ids": ids(), "attention_mask": torch.ones(3, 1, 9, 9)},
            ValueError,
            r"attention_mask: expected shape \(b, keys\)",
        ),
        ({"input_ids": ids(), "position_ids": ids(s=3)}, ValueError, "position_ids: expected sh"),
        (
            {"input_ids": ids(), "position_ids": torch.arange(40, 49)[None]},
            ValueError,
            "position_ids: expected 0 to 47 .* got 48",
        ),
        ({"input_ids": ids(), "position_ids": ids().float()}, TypeError, "position_ids: .*int64"),
        ({"input_ids": ids(), "output_attentions": True}, ValueError, "output_attentions: .*fused"),
        ({"input_ids": ids(), "token_type_ids": ids()}, ValueError, "token_type_ids: .*zeros"),
        ({"input_ids": ids(), "labels": ids(), "logits_to_keep": 1}, ValueError, "logits_to_keep"),
        ({"input_ids": ids(), "past_key_values": ((1, 2),)}, TypeError, "past_key_values: .*tuple"),
        (
            {
                "input_ids": ids(),
                "cache": transformers.DynamicCache(),
                "past_key_values": transformers.DynamicCache(),
            },
            ValueError,
            "past_key_values: .* both",
        ),
        ({"input_ids": ids(), "head_mask": 1}, TypeError, "head_mask"),
    ],
)
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrapped(gpt())(**call)


def run(code: str) -> str:
    root = str(Path(fastgpt.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_auto_classes_know_the_models_though_transformers_came_first() -> None:
    """The other order is that of this file, whose tests use the Auto classes."""
    said = run(
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "import fastgpt\n"
        "config = AutoConfig.for_model('fastgpt', n_embd=8, n_head=2, vocab_size=9, n_layer=1)\n"
        "print(type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)\n"
    )
    assert said.split() == ["FastGPTConfig", "FastGPTForCausalLM"]


def test_transformers_is_not_imported_before_it_is_needed_and_then_named() -> None:
    said = run(
        "import sys, fastgpt\n"
        "print('transformers' in sys.modules, hasattr(fastgpt, 'FastGPTForTelepathy'))\n"
        "sys.modules['transformers'] = None\n"
        "try: fastgpt.FastGPTForCausalLM\n"
        "except ImportError as error: print(error)\n"
    )
    assert said.startswith(
        "False False\nfastgpt.FastGPTForCausalLM needs transformers: pip install"
    )


def test_models_can_be_copied() -> None:
    wrapper = wrapped(gpt())
    twin = copy.deepcopy(wrapper)
    assert torch.equal(twin(ids()).logits, wrapper(ids()).logits)
    assert twin.lm_head.weight is twin.transformer.wte.weight
