"""GPT in the tools around transformers: Trainer, pipelines, PEFT, lm-eval; and the classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt

transformers = pytest.importorskip("transformers", minversion="4.57")

from fastgpt.integrate.hugging_face.gpt import CACHE
from tests.hf_gpt import SHAPE, classifier, gpt, ids, left_padded, module, word_tokenizer, wrapped


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_has_the_same_gradients(reentrant: bool) -> None:
    model, tokens = gpt(dropout=0.2), ids()
    gradients = []
    for checkpointed in (False, True):
        wrapper = wrapped(model).train()
        if checkpointed:
            wrapper.gradient_checkpointing_enable({"use_reentrant": reentrant})
        runs: list[int] = []
        wrapper.transformer.h[0].attn.register_forward_pre_hook(lambda *_, r=runs: r.append(1))
        torch.manual_seed(3)
        wrapper(tokens, labels=tokens).loss.backward()
        assert len(runs) == 1 + checkpointed
        gradients.append([p.grad for p in wrapper.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        wrapper(tokens, past_key_values=transformers.DynamicCache())
    wrapper.gradient_checkpointing_disable()
    assert wrapper(tokens, use_cache=True)[CACHE].get_seq_length() == 9


def rows(tokenizer: Any) -> list[dict[str, list[int]]]:
    texts = ("the cat sat on the mat and then it slept", "a dog ran under a tree", "very good") * 4
    return [{"input_ids": tokenizer(text).input_ids} for text in texts]


def test_trainer_learns_saves_resumes_and_evaluates(tokenizer: Any, tmp_path: Path) -> None:
    module("transformers.trainer", "accelerate")
    config = fastgpt.FastGPTConfig(**SHAPE, pad_token_id=tokenizer.pad_token_id)

    def trainer(steps: int, **arguments: Any) -> Any:
        torch.manual_seed(0)
        return transformers.Trainer(
            fastgpt.FastGPTForCausalLM(config),
            transformers.TrainingArguments(
                tmp_path / "run", max_steps=steps, per_device_train_batch_size=2,
                gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, save_steps=4,
                report_to=[], use_cpu=True, disable_tqdm=True, **arguments,
            ),
            train_dataset=rows(tokenizer),
            eval_dataset=rows(tokenizer)[:3],
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )  # fmt: skip

    whole = trainer(8)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    # Untrained, every word is as likely, and num_items_in_batch divides the sum of the whole batch;
    # transformers 4 counts among the items the first of each row, which is never predicted.
    every_word = torch.tensor(40.0).log().item()
    assert 0.75 * every_word < losses[0] < 1.05 * every_word
    assert losses[-1] < 0.6 * losses[0]
    assert whole.evaluate()["eval_loss"] < losses[0]
    predicted = whole.predict(rows(tokenizer)[:2]).predictions
    assert predicted.shape[0] == 2
    resumed = trainer(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, msg=name)
    # Label smoothing takes the logits, and must know that they are those of the next token.
    smoothed = trainer(1, label_smoothing_factor=0.1)
    smoothed.model = whole.model
    batch = smoothed.data_collator(rows(tokenizer)[:3])
    log_p = whole.model(**batch).logits[:, :-1].log_softmax(-1)
    counts = batch["labels"][:, 1:] >= 0
    nll = -log_p.gather(2, batch["labels"][:, 1:, None].clamp(min=0))[..., 0]
    want = (0.9 * nll + 0.1 * -log_p.mean(-1))[counts].mean().item()
    assert smoothed.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-3)


def test_trainer_of_a_classifier(tokenizer: Any, tmp_path: Path) -> None:
    module("transformers.trainer", "accelerate")
    torch.manual_seed(0)
    config = fastgpt.FastGPTConfig(**SHAPE, pad_token_id=0, num_labels=3)
    data = [{**row, "labels": i % 3} for i, row in enumerate(rows(tokenizer))]
    trainer = transformers.Trainer(
        fastgpt.FastGPTForSequenceClassification(config),
        transformers.TrainingArguments(
            tmp_path, max_steps=8, per_device_train_batch_size=3, gradient_accumulation_steps=2,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(torch.tensor(3.0).log().item(), rel=0.1)
    assert trainer.evaluate()["eval_loss"] < 0.5 * losses[0]


# --- pipelines, PEFT, lm-eval --------------------------------------------------------------------


def test_pipelines(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = fastgpt.FastGPTConfig(**SHAPE, pad_token_id=0, eos_token_id=1, num_labels=3)
    fastgpt.FastGPTForCausalLM(config).save_pretrained(tmp_path / "lm")
    fastgpt.FastGPTForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    texts = ["the cat", "a very good dog ran under"]
    for folder in ("lm", "classifier"):
        tokenizer.save_pretrained(tmp_path / folder)
    write = transformers.pipeline("text-generation", str(tmp_path / "lm"), device="cpu")
    written = write(texts, max_new_tokens=3, do_sample=False, batch_size=2)
    assert [text[0]["generated_text"].startswith(t) for text, t in zip(written, texts, strict=True)]
    judge = transformers.pipeline("text-classification", str(tmp_path / "classifier"), device="cpu")
    together, alone = judge(texts, batch_size=2, top_k=3), [judge(t, top_k=3) for t in texts]
    for got, want in zip(together, alone, strict=True):
        assert {x["label"] for x in got} == {"LABEL_0", "LABEL_1", "LABEL_2"}
        assert [x["score"] for x in got] == pytest.approx([x["score"] for x in want], rel=1e-4)
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_peft(kind: str, tmp_path: Path) -> None:
    peft = module("peft", "accelerate")
    task = {"task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(
            r=4, target_modules=["c_attn", "c_proj", "c_fc"], init_lora_weights=False, **task
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **task),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **task),
    }[kind]()
    # The band counts the hidden tokens between prefix and prompt too, so here it is wide.
    base, tokens, mask = wrapped(gpt(window=40)), ids(), left_padded()
    before = base(tokens, mask).logits
    model = peft.get_peft_model(base, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name in trained if "lora" not in name and "prompt" not in name]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(12):
        loss = model(tokens, attention_mask=mask, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    after = model(tokens, attention_mask=mask).logits[:, -9:]
    assert not torch.allclose(after, before, atol=1e-3)
    # A row alone, without its padding, is the same row.
    alone = model(tokens[:1, 3:], attention_mask=mask[:1, 3:]).logits[:, -6:]
    torch.testing.assert_close(alone, after[:1, 3:], rtol=1e-3, atol=1e-4)
    call = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    new = model.generate(input_ids=tokens, **call)[:, -4:]
    assert torch.equal(new[:, 0], after[:, -1].argmax(-1))
    grown = torch.cat((tokens, new[:, :1]), 1)
    step = model(grown, attention_mask=torch.cat((mask, mask[:, -1:]), 1)).logits[:, -1].argmax(-1)
    assert torch.equal(new[:, 1], step)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(wrapped(gpt(window=40)), tmp_path).eval()
    torch.testing.assert_close(again(tokens, attention_mask=mask).logits[:, -9:], after)


def test_lora_under_gradient_checkpointing() -> None:
    peft = module("peft", "accelerate")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    gradients = []
    for checkpointed in (False, True):
        base = wrapped(gpt())
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": True})
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config).train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert len(named) == 2 * 4 * 2, "A and B of four matrices in two layers, none of lm_head"
        gradients.append(named)
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, msg=name)


def test_lm_eval_scores_as_the_model_does(tokenizer: Any) -> None:
    lm_eval = module("lm_eval.models.huggingface", "accelerate")
    instance = module("lm_eval.api.instance")
    wrapper = wrapped(gpt())
    judge = lm_eval.HFLM(pretrained=wrapper, tokenizer=tokenizer, batch_size=2, device="cpu")
    assert judge.max_length == 48
    context, continuation = "the cat sat", " on the mat"
    request = instance.Instance("loglikelihood", {}, (context, continuation), 0)
    ((got, _),) = judge.loglikelihood([request], disable_tqdm=True)
    tokens = torch.tensor([tokenizer(context + continuation).input_ids])
    log_p = wrapper(tokens).logits.log_softmax(-1)[0, 2:-1]
    want = log_p.gather(1, tokens[0, 3:, None]).sum()
    assert got == pytest.approx(want.item(), rel=1e-4)


# --- classification ------------------------------------------------------------------------------


def test_classifier_reads_the_last_visible_token_of_each_row() -> None:
    model, texts = classifier(num_labels=3, pad_token_id=0), [ids(1, n)[0] for n in (7, 3, 5)]
    want = torch.cat([model(text[None]).logits for text in texts])
    hidden = model.transformer.hidden_states(texts[1][None])[:, -1]
    torch.testing.assert_close(want[1:2], model.score(hidden))
    for side in ("right", "left"):
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side=side)
        mask = (padded != 0).long()
        for call in ({"attention_mask": mask}, {}):
            torch.testing.assert_close(model(padded, **call).logits, want)
        embedded = model.get_input_embeddings()(padded)
        got = model(inputs_embeds=embedded, attention_mask=mask).logits
        torch.testing.assert_close(got, want)
    inside = texts[0].clone()
    inside[3] = 0
    shown = model(inside[None], torch.ones(1, 7)).logits
    torch.testing.assert_close(model(inside[None]).logits, shown)


@pytest.mark.parametrize(
    ("kwargs", "labels", "loss"),
    [
        ({"num_labels": 3}, torch.tensor([0, 2, 1]), torch.nn.functional.cross_entropy),
        ({"num_labels": 1}, torch.randn(3), lambda x, y: (x[:, 0] - y).square().mean()),
        (
            {"num_labels": 4},
            torch.tensor([[1.0, 0, 0, 1]] * 3),
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
        (
            {"num_labels": 2, "problem_type": "regression"},
            torch.randn(3, 2),
            torch.nn.functional.mse_loss,
        ),
    ],
    ids=["single_label", "regression", "multi_label", "regression_of_two"],
)
def test_classifier_has_the_losses_of_transformers(
    kwargs: dict[str, Any], labels: Tensor, loss: Any
) -> None:
    model = classifier(**kwargs)
    got = model(ids(), torch.ones(3, 9), labels=labels)
    torch.testing.assert_close(got.loss, loss(got.logits, labels))


def test_classifier_errors() -> None:
    with pytest.raises(ValueError, match=r"attention_mask: needed .* 3 rows"):
        classifier()(ids())
    mask = torch.ones(3, 9)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"attention_mask: .* none in row 1"):
        classifier()(ids(), mask)


def test_classifier_takes_a_prefix(tmp_path: Path) -> None:
    peft = module("peft", "accelerate")
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(classifier(num_labels=3), config)
    got = model(ids(), attention_mask=left_padded(), labels=torch.tensor([0, 1, 2]))
    got.loss.backward()
    assert got.logits.shape == (3, 3)
    assert [p for p in model.parameters() if p.requires_grad and p.grad is not None]
