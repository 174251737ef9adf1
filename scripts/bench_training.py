"""How the quality benches train, choose a learning rate, and judge what was learned."""

import math
from collections.abc import Callable, Iterable

import torch
from bench_common import Results
from torch import nn


def held_out_loss(model: nn.Module, batches: list[dict]) -> float:
    """Mean cross-entropy over the labelled tokens of `batches`."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            labelled = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**batch).loss) * labelled, count + labelled
    model.train()
    return total / count


def batches_of(data: list[dict], size: int, collate: Callable) -> list[dict]:
    """All of `data` in batches, in order."""
    return [collate(data[i : i + size]) for i in range(0, len(data), size)]


def shuffled_batches(data: list[dict], size: int, steps: int, seed: int, collate: Callable) -> list[dict]:
    """`steps` batches, reshuffled every epoch; the same for every method that has the same `size`."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < steps * size:
        order += torch.randperm(len(data), generator=generator).tolist()
    return batches_of([data[i] for i in order[: steps * size]], size, collate)


def train_step(model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer) -> float:
    """Forward, backward, clip at 1, AdamW, all in fp32."""
    loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def warmup_then_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a tenth of the steps, then linear decay to zero."""
    warmup = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup))
    )


def tried_rates(results: Results, name: str, rates: Iterable[float]) -> dict[float, float]:
    """Validation losses by learning rate, as far as rates have been tried; infinite where training diverged."""
    cells = {rate: f"rate | {name} | {rate}" for rate in rates}
    losses = {rate: results.cells[cell] for rate, cell in cells.items() if cell in results}
    return {rate: math.inf if math.isnan(loss) else loss for rate, loss in losses.items()}


def marked(rate: float, tried: Iterable[float]) -> str:
    """The learning rate, with a star at the edge of those that were tried: a better one may lie beyond."""
    return f"{rate:g}{'*' if rate in (min(tried, default=None), max(tried, default=None)) else ''}"
