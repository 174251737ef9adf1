"""A run whose ranks hold batches of different lengths and with different labels, or none; started in each rank."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tokenseek import TokenSeekTrainer
from tests.tiny_training import arguments, pad

# (length, labels) of the two sequences of each micro-batch; the two ranks take them in turns
MICRO_BATCHES = [
    [(40, 4), (36, 3)], [(12, 2), (9, 1)],
    [(24, 5), (30, 2)], [(33, 0), (20, 0)],
    [(16, 16), (16, 16)], [(40, 2), (40, 2)],
    [(18, 18), (17, 17)], [(22, 22), (31, 31)],
]  # fmt: skip
STEPS = len(MICRO_BATCHES) // 2


def sequences() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length, labels in (row for micro_batch in MICRO_BATCHES for row in micro_batch):
        ids = torch.randint(1, 128, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (length - labels) + ids[length - labels :]})
    return found


def build(folder, accumulation: int, seek: dict, lean: bool) -> TokenSeekTrainer:
    args = arguments(
        folder,
        seek=seek,
        lean=lean,
        max_steps=STEPS,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, use_cache=False, **shape))
    return TokenSeekTrainer(model, args, train_dataset=sequences(), data_collator=pad)


if __name__ == "__main__":
    trainer = build(sys.argv[1], 1, {"context": 0.2}, lean=True)
    trainer.train()
    trainer.accelerator.end_training()
