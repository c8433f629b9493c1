"""Zero-, one- and few-shot prompts, answered with and without our layers: the same, and how fast.

The model learns a task from its prompt alone (Brown et al. 2020, section 2): a description, then
no, one or a few solved examples, then the question. Decoding is greedy, so the answers must agree.
The questions are ones on which a model of 135 million weights can show what examples do.
"""

import argparse
import itertools
import re
import time
from typing import NamedTuple

from _shared import model_folder, needs, summary

with needs("transformers"):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

import fastgpt


class Task(NamedTuple):
    """A description, the words around question and answer, solved examples, and the question."""

    description: str
    question: str
    answer: str
    examples: list[tuple[str, str]]
    asked: str
    expected: str  # a pattern that a right answer contains
    new_tokens: int = 12

    def prompt(self, shots: int) -> str:
        solved = [
            f"{self.question}: {question}\n{self.answer}: {answer}"
            for question, answer in self.examples[:shots]
        ]
        return "\n\n".join(
            [self.description, *solved, f"{self.question}: {self.asked}\n{self.answer}:"]
        )


TASKS = {
    "sentiment": Task(
        "Is the review positive or negative?", "Review", "Sentiment",
        [
            ("The soup was cold and the waiter was rude.", "negative"),
            ("A wonderful hotel with friendly staff.", "positive"),
            ("The phone broke after two days.", "negative"),
            ("I laughed from beginning to end.", "positive"),
        ],
        "The plot is boring and the actors are terrible.", "negative",
    ),
    "translation": Task(
        "Translate English to French.", "English", "French",
        [
            ("cat", "chat"), ("house", "maison"), ("The water is cold.", "L'eau est froide."),
            ("Good evening", "Bonsoir"),
        ],
        "red", "rouge",
    ),
    "word correction": Task(
        "Correct the spelling of the word.", "Wrong", "Right",
        [("becuase", "because"), ("freind", "friend"), ("recieve", "receive"), ("teh", "the")],
        "speling", "spelling",
    ),
    "arithmetic": Task(
        "Solve the sum.", "Question", "Answer",
        [
            ("What is 2 plus 3?", "5"), ("What is 7 plus 1?", "8"),
            ("What is 10 plus 4?", "14"), ("What is 6 plus 3?", "9"),
        ],
        "What is 12 plus 2?", "14",
    ),
    "film genre": Task(
        "Name the genre of the film: comedy, horror, romance, war or science fiction.",
        "Film", "Genre",
        [
            ("A ghost hunts a family in an old house.", "horror"),
            ("Two strangers meet on a ferry and fall in love.", "romance"),
            ("A clumsy burglar is mistaken for the mayor.", "comedy"),
            ("A platoon must hold a bridge until morning.", "war"),
        ],
        "Robots on a distant planet build a spaceship to find Earth.", "science fiction|sci-fi",
    ),
    "chain of thought": Task(
        "Answer the question. Think step by step.", "Question", "Answer",
        [
            (
                "Anna has 3 apples and buys 2 bags of 4 apples. How many apples has she?",
                "Anna starts with 3 apples. 2 bags of 4 apples are 8 apples. 3 + 8 = 11. "
                "The answer is 11.",
            ),
            (
                "A bus has 20 seats and 12 are taken. How many are free?",
                "The bus has 20 seats. 12 are taken. 20 - 12 = 8. The answer is 8.",
            ),
            (
                "A box holds 6 eggs. How many eggs are in 3 boxes?",
                "One box holds 6 eggs. 3 boxes hold 3 * 6 = 18 eggs. The answer is 18.",
            ),
            (
                "Leo has 9 coins and spends 4. How many coins has he?",
                "Leo starts with 9 coins. He spends 4. 9 - 4 = 5. The answer is 5.",
            ),
        ],
        "Tom has 5 books and gets 3 more. How many books has he?", r"\b8\b", 40,
    ),
}  # fmt: skip


@torch.no_grad()
def answer(model, tokenizer, stop: list[int], task: Task, shots: int) -> tuple[str, float]:
    """What the model says, up to the end of the line, and the seconds that it took."""
    ids = tokenizer(task.prompt(shots), add_special_tokens=False, return_tensors="pt")["input_ids"]
    begin = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=task.new_tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],
    )
    seconds = time.perf_counter() - begin
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder of a causal LM")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 1, 4])
    args = parser.parse_args()

    folder = model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # An answer is one line: a token with a line feed in it ends it, as the model's own end does.
    newline = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    stop = [tokenizer.eos_token_id, *newline]

    print(summary(fastgpt.replace_layers(model)))
    fastgpt.restore_layers(model)
    model.generate(torch.tensor([[stop[0]]]), max_new_tokens=2, pad_token_id=stop[0])  # warm up
    print(f"\n{'task':17} shots  right  same  {'ours s':>6}  {'torch s':>7}  answer")
    differ = 0
    for name, shots in itertools.product(args.tasks, args.shots):
        task = TASKS[name]
        plain, slow = answer(model, tokenizer, stop, task, shots)
        fastgpt.replace_layers(model)
        text, fast = answer(model, tokenizer, stop, task, shots)
        fastgpt.restore_layers(model)
        right = "yes" if re.search(task.expected, text.lower()) else "no"
        same = "yes" if text == plain else "no"
        differ += text != plain
        print(f"{name:17} {shots:5d}  {right:5}  {same:4}  {fast:6.2f}  {slow:7.2f}  {text}")
    if differ:
        raise SystemExit(f"{differ} answers differ with and without our layers")


if __name__ == "__main__":
    main()
