"""Evaluate a model on our layers with the LM Evaluation Harness: perplexity, multiple choice.

The tasks are plain dictionaries over local files, so nothing is downloaded; `--compare` evaluates
the model without our layers as well.
"""

import argparse
import json
import tempfile
from pathlib import Path

from _shared import DATA, model_folder, needs, summary

with needs("transformers", "lm_eval", "datasets"):
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

import fastgpt

SHOWN = ("word_perplexity", "bits_per_byte", "acc", "acc_norm")


def metric(name: str, aggregation: str, better: bool = True) -> dict:
    """A metric of the harness, how it is summed up, and whether more of it is better."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": better}


def text_task(text: Path, folder: Path) -> dict:
    """Perplexity of a text file; the harness reads rows, so the text becomes one row."""
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"--text {text}: {error.strerror}") from None
    if not content.strip():
        raise SystemExit(f"--text {text}: the file is empty")
    row = folder / "text.jsonl"
    row.write_text(json.dumps({"text": content}) + "\n")
    return {
        "task": "perplexity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(row)}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            metric("word_perplexity", "weighted_perplexity", better=False),
            metric("bits_per_byte", "bits_per_byte", better=False),
        ],
    }


def choice_task(questions: list[dict], shots: int, folder: Path) -> dict:
    """The likeliest of the choices of each question."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder)},
        "test_split": "test",
        "fewshot_split": "test",  # the harness leaves the question that is asked out
        "num_fewshot": shots,
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [metric("acc", "mean"), metric("acc_norm", "mean")],
    }


def read_questions(path: Path, limit: int | None) -> list[dict]:
    """JSON lines with question, choices, and answer, the index of the right choice."""
    try:
        questions = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"--questions {path}: {error}") from None
    wanted = {"question", "choices", "answer"}
    if not questions or any(not wanted <= set(question) for question in questions):
        raise SystemExit(f"--questions {path}: every line must have {', '.join(sorted(wanted))}")
    return questions[:limit]


def evaluate(model, tokenizer, tasks: list[dict], args: argparse.Namespace) -> dict:
    """What the harness measured: {task: {metric: value}}."""
    results = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=args.batch, max_length=args.max_length
        ),
        tasks=[dict(task) for task in tasks],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # thousands of tasks are read otherwise
    )
    return {
        task: {
            name: value
            for key, value in values.items()
            if (name := key.partition(",")[0]) in SHOWN and isinstance(value, float)
        }
        for task, values in results["results"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder of a causal LM")
    parser.add_argument("--text", type=Path, default=DATA / "story.txt")
    parser.add_argument("--questions", type=Path, default=DATA / "questions.jsonl")
    parser.add_argument("--shots", type=int, default=0, help="solved questions before each")
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512, help="tokens that are read at once")
    parser.add_argument("--compare", action="store_true", help="without our layers, too")
    args = parser.parse_args()

    questions = read_questions(args.questions, args.limit)
    folder = model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as rows:
        tasks = [
            text_task(args.text, Path(rows)),
            choice_task(questions, args.shots, Path(rows)),
        ]
        print(summary(fastgpt.replace_layers(model)), flush=True)
        columns = {"ours": evaluate(model, tokenizer, tasks, args)}
        if args.compare:
            fastgpt.restore_layers(model)
            columns["without"] = evaluate(model, tokenizer, tasks, args)

    print(f"\n{'task':12} {'metric':16}" + "".join(f"{name:>12}" for name in columns))
    for task, values in columns["ours"].items():
        for metric in values:
            cells = "".join(f"{column[task][metric]:12.4f}" for column in columns.values())
            print(f"{task:12} {metric:16}{cells}")
    chance = sum(1 / len(question["choices"]) for question in questions) / len(questions)
    print(f"an answer at random would have acc {chance:.4f}")


if __name__ == "__main__":
    main()
