"""A decoder of two layers, dense and banded, learns to continue a sequence that it has seen."""

import torch

from fastgpt import GPT, GPTConfig


def main() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=32, n_positions=64, n_layer=2, n_embd=64, n_head=4, window=16))
    ids = (torch.arange(64) * 5 % 32).repeat(4, 1)  # (b, s): 0 5 10 15 20 25 30 3 8 ...
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    print("prompt and what the model adds:")
    print(model.generate(ids[:1, :8], max_new_tokens=12, do_sample=False)[0].tolist())


if __name__ == "__main__":
    main()
