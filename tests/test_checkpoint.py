"""Checkpoint folders: what is saved comes back, what does not fit is listed, nothing half loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig

SMALL = {
    "vocab_size": 23,
    "n_positions": 16,
    "n_layer": 3,
    "n_embd": 24,
    "n_head": 3,
    "window": 4,
}
TOKENS = torch.arange(2 * 12).view(2, 12) % 23


def small(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def edit(folder, change):
    """Rewrite the folder's tensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "bias": False},
        {"norm": "post", "n_embd": 20, "head_dim": 7, "attention_pattern": ("banded",)},
    ],
    ids=["tied", "untied_no_bias", "post_norm"],
)
def test_what_is_saved_comes_back(tmp_path, changes):
    model = small(**changes)
    model.save_pretrained(tmp_path / "new" / "folder")
    twin = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert twin.config == model.config
    assert not twin.training
    assert (twin.lm_head.weight is twin.wte.weight) == model.config.tie_embeddings
    assert twin.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor)
    assert torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
    twin.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.requires_grad and p.grad is not None for p in twin.parameters())


def test_tied_matrix_is_stored_once_and_only_two_files_are_written(tmp_path):
    small().save_pretrained(tmp_path)
    small().save_pretrained(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_dtype_is_kept_or_converted(tmp_path):
    small().bfloat16().save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).wte.weight.dtype == torch.bfloat16
    model = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", torch.int64])
def test_wrong_dtype_is_named(tmp_path, dtype):
    small().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=f"dtype: expected None or one of torch.float32.*{dtype}"):
        GPT.from_pretrained(tmp_path, dtype=dtype)


def test_a_tie_that_was_cut_is_not_lost_silently(tmp_path):
    model = small()
    model.lm_head.weight = torch.nn.Parameter(model.wte.weight.detach().clone())
    model.save_pretrained(tmp_path / "equal")
    torch.nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(ValueError, match=r"lm_head.weight: expected wte.weight, .*tie_weights"):
        model.save_pretrained(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    model.tie_weights()
    model.save_pretrained(tmp_path / "cut")


def test_missing_misshapen_and_unexpected_tensors_are_listed_together(tmp_path):
    small().save_pretrained(tmp_path)

    def change(tensors):
        del tensors["wpe.weight"], tensors["h.2.mlp.c_fc.bias"]
        tensors["ln_f.bias"] = torch.zeros(5)
        tensors["h.3.ln_1.weight"] = torch.zeros(24)
        tensors["h.0.attn.c_proj.weight"] = torch.zeros(24, 24, dtype=torch.int8)

    edit(tmp_path, change)
    with pytest.raises(ValueError, match="the tensors do not fit the model") as error:
        GPT.from_pretrained(tmp_path)
    message = str(error.value)
    assert "missing: h.2.mlp.c_fc.bias, wpe.weight;" in message
    assert "misshapen: ln_f.bias (expected (24,), got (5,));" in message
    assert "not float: h.0.attn.c_proj.weight (I8);" in message
    assert message.endswith("unexpected: h.3.ln_1.weight")


def test_long_lists_are_cut(tmp_path):
    small().save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({f"x{i:02}": torch.zeros(1) for i in range(25)}))
    with pytest.raises(ValueError, match=r"unexpected: x00, .*, x19 and 5 more$"):
        GPT.from_pretrained(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"expected a checkpoint folder, got .*nowhere"):
        GPT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not a checkpoint: expected config.*an empty folder"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"got notes\.txt"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        small().save_pretrained(tmp_path / "notes.txt")

    config = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json: expected JSON, got"),
        ("[]", "config.json: expected a JSON object, got list"),
        ("{}", "expected model_type fastgpt, gpt2, gpt_neo, got None"),
        ('{"model_type": "llama"}', "got 'llama'"),
        ('{"model_type": ["gpt2"]}', r"got \['gpt2'\]"),
        ('{"model_type": "gpt2"}', "config.json: 'n_embd' is missing"),
        ('{"model_type": "fastgpt", "n_layer": 2}', "needs the field vocab_size"),
        (
            json.dumps({"model_type": "fastgpt", **SMALL, "n_layer": 0}),
            "config.json: n_layer: expected an int >= 1, got 0",
        ),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)

    config.write_text(json.dumps({"model_type": "fastgpt", **SMALL}))
    with pytest.raises(ValueError, match=r"no model\.safetensors and no model\.safetensors\.index"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin, which can run code"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        GPT.from_pretrained(tmp_path)


def shard(folder):
    """Split the folder's tensors over two files and an index, as Hugging Face does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def test_shards_are_read_and_missing_ones_named(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    names = shard(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=f"missing shards {names[1]}"):
        GPT.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"expected file names, got \.\./elsewhere"):
        GPT.from_pretrained(tmp_path)
    for text in ("{}", "[]", "{"):
        index.write_text(text)
        with pytest.raises(ValueError, match="expected a JSON object with weight_map"):
            GPT.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert not index.exists()
    GPT.from_pretrained(tmp_path)


GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 23,
    "n_positions": 16,
    "n_layer": 3,
    "n_embd": 24,
    "n_head": 3,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "n_inner": None,
}
NEO = {
    "model_type": "gpt_neo",
    "vocab_size": 23,
    "max_position_embeddings": 16,
    "num_layers": 4,
    "hidden_size": 24,
    "num_heads": 3,
    "window_size": 4,
    "attention_types": [[["global", "local"], 2]],
    "activation_function": "gelu_new",
}


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["as_released", "with_head"])
def test_hugging_face_gpt2_layout(tmp_path, prefix):
    model = small(attention_pattern=("dense",))
    tensors = {}
    for name, tensor in model.state_dict().items():
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        tensors[prefix + name] = tensor.t() if conv1d else tensor
    tensors["lm_head.weight"] = tensors.pop(prefix + "lm_head.weight")
    tensors[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    tensors[f"{prefix}h.0.attn.masked_bias"] = torch.tensor(-1e4)
    write(tmp_path, GPT2, tensors)
    loaded = GPT.from_pretrained(tmp_path)
    expected = {**SMALL, "window": 256, "attention_pattern": ("dense",), "dropout": 0.1}
    assert loaded.config == GPTConfig(**expected)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.h[0].mlp.c_fc.weight.is_contiguous()

    tensors[f"{prefix}h.1.attn.c_attn.weight"] = torch.zeros(72, 24)
    del tensors[f"{prefix}wpe.weight"]
    write(tmp_path, GPT2, tensors)
    with pytest.raises(ValueError, match="do not fit") as error:
        GPT.from_pretrained(tmp_path)
    assert f"missing: {prefix}wpe.weight;" in str(error.value)
    misshapen = f"misshapen: {prefix}h.1.attn.c_attn.weight (expected (24, 72), got (72, 24))"
    assert str(error.value).endswith(misshapen)


def test_hugging_face_gpt_neo_layout(tmp_path):
    model = small(n_layer=4, attention_scale=1.0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = "transformer." + name
        if name.endswith("c_attn.weight"):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("c_attn", f"attention.{part}_proj")] = piece
        elif name.endswith("c_attn.bias"):
            tensor.zero_()
        else:
            tensors[name.replace("attn.c_proj", "attn.attention.out_proj")] = tensor
    tensors["lm_head.weight"] = tensors.pop("transformer.lm_head.weight")
    tensors["transformer.h.0.attn.attention.bias"] = torch.ones(1, 1, 16, 16).tril()
    for config in (
        NEO,
        {**NEO, "attention_layers": ["global", "local"] * 2},
    ):
        write(tmp_path, config, tensors)
        loaded = GPT.from_pretrained(tmp_path)
        assert [loaded.config.window_of(i) for i in range(4)] == [None, 4, None, 4]
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    loaded.save_pretrained(tmp_path / "ours")
    again = GPT.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**GPT2, "activation_function": "relu"}, "activation_function: expected one of gelu_new"),
        ({**GPT2, "n_inner": 100}, "n_inner: only 96 is supported, got 100"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention: only False"),
        (
            {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.3, "attn_pdrop": 0.5},
            "expected one rate for all, .* resid_pdrop = 0.0, embd_pdrop = 0.3, attn_pdrop = 0.5",
        ),
        ({**NEO, "attention_dropout": 0.2}, "embed_dropout = 0.0, attention_dropout = 0.2"),
        ({**NEO, "attention_types": [[["global"], 2]]}, "expected num_layers = 4 names, got 2"),
        ({**NEO, "attention_types": [[["sparse"], 4]]}, "expected global and local, got sparse"),
        ({**NEO, "intermediate_size": 100}, "intermediate_size: only 96"),
    ],
)
def test_hugging_face_settings_that_we_lack_are_refused(tmp_path, config, message):
    write(tmp_path, config, {"wte.weight": torch.zeros(23, 24)})
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def hugging_face_model(transformers, kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=23, n_positions=32, n_embd=24, n_layer=3, n_head=3
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.GPTNeoConfig(
            vocab_size=23,
            max_position_embeddings=32,
            hidden_size=24,
            num_layers=4,
            num_heads=3,
            attention_types=[[["global", "local"], 2]],
            window_size=5,
        )
        model = transformers.GPTNeoForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, transformers, kind):
    theirs = hugging_face_model(transformers, kind)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = GPT.from_pretrained(tmp_path)
    tokens = torch.arange(2 * 30).view(2, 30) * 7 % 23
    got, expected = ours(tokens, labels=tokens), theirs(tokens, labels=tokens)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.loss, expected.loss)

    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = theirs.generate(tokens[:, :9], pad_token_id=0, eos_token_id=None, **options)
    assert torch.equal(ours.generate(tokens[:, :9], **options), expected)
