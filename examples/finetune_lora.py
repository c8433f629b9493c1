"""LoRA, prefix tuning and prompt tuning (peft) of a causal language model on our layers.

The model learns to name the sentiment of a review in one word. Its own weights stay as they are;
each method trains a few new ones, and falling loss shows that gradients pass through our kernels.
"""

import argparse
import copy
import time
from pathlib import Path

from _shared import DATA, model_folder, needs, read_rows, summary

with needs("transformers", "peft"):
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import fastgpt

PROMPT = "Review: {text}\nSentiment:"
# Few vectors carry all that prompt tuning learns, so its steps are larger.
LEARNING_RATE = {"lora": 1e-3, "prefix": 1e-2, "prompt": 3e-2}


def config_of(method: str, tokenizer_folder: Path) -> peft.PeftConfig:
    """What peft calls each method, at a size that suits a small model."""
    if method == "lora":  # its target modules default to what peft knows of the architecture
        return peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)
    if method == "prefix":  # keys and values of virtual tokens, in every layer
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    return peft.PromptTuningConfig(  # embeddings of virtual tokens, before the text
        task_type="CAUSAL_LM",
        num_virtual_tokens=12,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Is the review of a customer positive or negative?",
        tokenizer_name_or_path=str(tokenizer_folder),
    )


def encode(rows: list[dict[str, str]], tokenizer) -> dict[str, torch.Tensor]:
    """Prompts with their answers, padded on the right; only the answer counts in the loss."""
    prompts = [tokenizer(PROMPT.format(**row), add_special_tokens=False).input_ids for row in rows]
    answers = [tokenizer(f" {row['label']}", add_special_tokens=False).input_ids for row in rows]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for p, a in zip(prompts, answers, strict=True):
        padding = longest - len(p) - len(a)
        batch["input_ids"].append(p + a + [tokenizer.pad_token_id] * padding)
        batch["attention_mask"].append([1] * (len(p) + len(a)) + [0] * padding)
        batch["labels"].append([-100] * len(p) + a + [-100] * padding)
    return {name: torch.tensor(values) for name, values in batch.items()}


@torch.no_grad()
def loss_of(model, batches: list[dict[str, torch.Tensor]]) -> float:
    """The mean loss of the answers, without dropout."""
    model.eval()
    return sum(model(**batch).loss.item() for batch in batches) / len(batches)


def tune(model, method: str, train: list, held_out: list, epochs: int) -> None:
    """Train what the method adds and print the loss of both halves as it falls."""
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE[method]
    )
    before = loss_of(model, held_out)
    print(f"{method:6} before   held-out loss {before:6.3f}", flush=True)
    for epoch in range(epochs):
        model.train()
        begin, losses = time.perf_counter(), []
        for batch in train:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds = time.perf_counter() - begin
        print(
            f"{method:6} epoch {epoch + 1:2d} held-out loss {loss_of(model, held_out):6.3f}  "
            f"training loss {sum(losses) / len(losses):6.3f}  {seconds:5.1f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder of a causal LM")
    parser.add_argument("--data", type=Path, default=DATA / "sentiment.tsv", help="label, text")
    parser.add_argument("--methods", nargs="+", choices=LEARNING_RATE, default=list(LEARNING_RATE))
    parser.add_argument(
        "--rows", type=int, default=96, help="rows to train on, half as many to test"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    rows = read_rows(args.data, ("label", "text"))[: args.rows * 3 // 2]
    folder = model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    print(summary(fastgpt.replace_layers(base)))
    batches = [encode(rows[i : i + args.batch], tokenizer) for i in range(0, len(rows), args.batch)]
    train, held_out = batches[: -(-args.rows // args.batch)], batches[-(-args.rows // args.batch) :]

    for method in args.methods:
        set_seed(0)
        model = peft.get_peft_model(copy.deepcopy(base), config_of(method, folder))
        trainable, total = model.get_nb_trainable_parameters()
        print(
            f"\n{method}: {trainable:,} of {total:,} parameters ({trainable / total:.3%}) trained"
        )
        tune(model, method, train, held_out, args.epochs)


if __name__ == "__main__":
    main()
