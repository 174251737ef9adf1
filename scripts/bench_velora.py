"""
VeLoRA on SmolLM2-135M: saved, gradient and optimizer bytes, step time, and held-out loss; all weights and LoRA.

    PYTHONPATH=kernels:. python scripts/bench_velora.py --bars              # bytes and times, then losses of 3 seeds
    PYTHONPATH=kernels:. python scripts/bench_velora.py --bars --seeds      # bytes and times only

Bytes and times: fp32, 1 x 1024 tokens of real text, labels everywhere, forward and backward; the rows take turns. Run
nothing beside that part; the training runs behind it are not timed. Losses: the docstring task, AdamW, the learning
rate that bench_quality chose for full training and for LoRA. Interrupted, it goes on with the first cell that is not
finished.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from bench_common import (
    DEVICE,
    EVIDENCE,
    MIB,
    Bar,
    Results,
    Spread,
    add_common_options,
    cell,
    collator,
    exit_status,
    in_one_line,
    judge,
    load_smollm2,
    markdown_table,
    mean_and_deviation,
    now,
    quotient,
)
from bench_step import real_text
from bench_tasks import docstrings
from bench_training import batches_of, held_out_loss, shuffled_batches, train_step, warmup_then_decay
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_tokenseek import attach
from hf_tokenseek.memory import SavedActivations
from hf_tokenseek.velora import VeloraAdamW

GROUPS, TENTH = 32, {"ratio": 0.1}
RATES = {False: 2e-4, True: 4e-3}  # chosen on the validation split, docs/evidence/quality-docstrings.md
LORA = {"task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Row:
    """
    A way of training.

    Args:
        name (`str`): what the table calls it.
        methods (`dict`): keywords of [`attach`].
        lora (`bool`): adapters of rank 16 on all linear layers, in place of the weights.
        peft (`bool`): PEFT's VeLoRA.
        checkpointing (`bool`): gradient checkpointing, not reentrant.
        trained_with (`dict`, *optional*): keywords of [`attach`] for the losses, where others make sense there.
    """

    name: str
    methods: dict = field(default_factory=dict)
    lora: bool = False
    peft: bool = False
    checkpointing: bool = False
    trained_with: dict | None = None


VELORA, STATE = {"velora": {"groups": GROUPS}}, {"velora": {"groups": GROUPS, "compressed_state": True}}
SEEK = {"seek": {**TENTH}, **VELORA}
PLAIN, OURS, OURS_SEEK, OURS_STATE = "full: plain", "full: VeLoRA", "full: VeLoRA + seek 0.1", "full: VeLoRA, state"
ROWS = (
    Row(PLAIN),
    Row("full: checkpointing", checkpointing=True),
    Row(OURS, VELORA),
    Row("full: VeLoRA + checkpointing", VELORA, checkpointing=True),
    Row(OURS_STATE, STATE),
    Row("full: VeLoRA + lean", {**VELORA, "lean": True}),
    Row(OURS_SEEK, SEEK, trained_with={"seek": True, **VELORA}),
    Row("LoRA: plain", lora=True),
    Row("LoRA: checkpointing", lora=True, checkpointing=True),
    Row("LoRA: PEFT's VeLoRA", lora=True, peft=True),
    Row("LoRA: VeLoRA", VELORA, lora=True),
    Row("LoRA: VeLoRA, state", STATE, lora=True),
    Row("LoRA: VeLoRA + seek 0.1", SEEK, lora=True, trained_with={"seek": True, **VELORA}),
)
# trained: what differs in more than rounding
LOSSES = tuple(
    row for row in ROWS if not row.checkpointing and "lean" not in row.methods and ", state" not in row.name
)


def build(row: Row, load: Callable, seed: int = 0) -> nn.Module:
    """A fresh model in training mode."""
    torch.manual_seed(seed)
    model, _ = load()
    model.config.use_cache = False
    if row.lora:
        import peft

        velora = peft.VeloraConfig(num_groups=GROUPS, init_type="batch_average_once") if row.peft else None
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA, velora_config=velora))
    return model.train()


@contextmanager
def prepared(model: nn.Module, row: Row, methods: dict) -> Iterator:
    """The model as the row trains it, for the time of the block; gives the handle, if there is one."""
    with ExitStack() as undo:
        if row.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            undo.callback(model.gradient_checkpointing_disable)
        yield undo.enter_context(attach(model, **methods)) if methods else None


def optimizer_for(model: nn.Module, row: Row, rate: float) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    kind = VeloraAdamW if row.methods.get("velora", {}).get("compressed_state") else torch.optim.AdamW
    return kind([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def count_bytes(row: Row, load: Callable, ids: Tensor) -> dict:
    """MiB that one step saves for backward, and that gradients and optimizer state take after it."""
    model = build(row, load)
    with prepared(model, row, row.methods):
        optimizer = optimizer_for(model, row, 0.0)
        model(input_ids=ids, labels=ids).loss.backward()  # directions are drawn, PEFT's too
        optimizer.zero_grad()
        with SavedActivations(model) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        saved_mib = saved.mib
        loss.backward()
        optimizer.step()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        state = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        mlp = {id(p) for name, p in model.named_parameters() if "_proj" in name and ".mlp." in name}
        compressed = [p for p in model.parameters() if id(p) in mlp and p.grad is not None]
        figures = {
            "saved_mib": saved_mib,
            "gradient_mib": _mib(gradients),
            "state_mib": _mib(state),
            # AdamW has two moments of the gradient's shape
            "mlp_mib": 3 * _mib([p.grad for p in compressed]),
        }
    return figures


def step_seconds(rows: Sequence[Row], load: Callable, ids: Tensor, repeats: int) -> dict[str, list[float]]:
    """Wall time of forward and backward, a row after the other in every round; the first round warms up."""
    models = {kind: build(Row("", lora=kind[0], peft=kind[1]), load) for kind in {(r.lora, r.peft) for r in rows}}
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for round_ in tqdm(range(repeats + 1), desc="rounds"):
        for row in tqdm(rows, leave=False):
            model = models[row.lora, row.peft]
            with prepared(model, row, row.methods):
                if row.methods.get("velora"):
                    model(input_ids=ids[:, :8], labels=ids[:, :8])  # draws directions, which a run does once
                model.zero_grad(set_to_none=True)
                began = now()
                model(input_ids=ids, labels=ids).loss.backward()
                if round_:
                    seconds[row.name].append(now() - began)
    return seconds


def train(row: Row, load: Callable, seed: int, steps: int, data: tuple) -> float:
    """Held-out loss after `steps` steps."""
    batches, held_out = data
    model = build(row, load, seed)
    methods = row.methods if row.trained_with is None else row.trained_with
    with prepared(model, row, methods) as handle:
        optimizer = optimizer_for(model, row, RATES[row.lora])
        schedule = warmup_then_decay(optimizer, steps)
        for step, batch in enumerate(tqdm(batches(steps, seed), leave=False, mininterval=5)):
            for method in () if handle is None else filter(None, (handle.seek, handle.velora)):
                method.begin_step(step)
            train_step(model, batch, optimizer)
            schedule.step()
    return held_out_loss(model, held_out)


def table(results: Results) -> str:
    """Markdown table of everything that has been measured."""
    lines, seconds = [], results.cells["seconds"]
    for row in ROWS:
        figures, base = results.cells[f"bytes | {row.name}"], "LoRA: plain" if row.lora else PLAIN
        plain = results.cells[f"bytes | {base}"]
        losses = [loss for name, loss in results.cells.items() if name.startswith(f"loss | {row.name} | ")]
        lines.append(
            (
                row.name,
                f"{figures['saved_mib']:.1f}",
                f"{figures['saved_mib'] / plain['saved_mib']:.3f}",
                f"{figures['gradient_mib']:.1f}",
                f"{figures['state_mib']:.1f}",
                f"{Spread.of(seconds[row.name]):.2f}",
                f"{quotient(seconds[row.name], seconds[base]):.3f}",
                f"{mean_and_deviation(losses)} ({len(losses)})" if losses else "",
            )
        )
    head = ("row", "saved [MiB]", "x plain", "gradients [MiB]", "state [MiB]", "step [s]", "x plain", "loss (seeds)")
    return markdown_table(head, lines)


def bars(results: Results, before: float) -> list[Bar]:
    """The project's bars; `before`: MiB of the inputs that are compressed, by formula."""
    seconds = results.cells["seconds"]
    found = {row.name: results.cells[f"bytes | {row.name}"] for row in ROWS}
    plain, ours = found[PLAIN], found[OURS]
    left = before - (plain["saved_mib"] - ours["saved_mib"])
    return [
        Bar("full: step / plain", quotient(seconds[OURS], seconds[PLAIN]).median, 1.03),
        Bar("LoRA: step / plain", quotient(seconds["LoRA: VeLoRA"], seconds["LoRA: plain"]).median, 1.03),
        Bar("full: what is left of the compressed inputs, counted", left / before, 1 / 20),
        Bar("full, seek 0.1: saved / plain", found[OURS_SEEK]["saved_mib"] / plain["saved_mib"], 0.10),
        Bar(
            "mlp and down: gradients and moments, compressed / dense",
            found[OURS_STATE]["mlp_mib"] / plain["mlp_mib"],
            1 / 15,
        ),
    ]


def _mib(tensors: Sequence[Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / MIB


def main(argv: Sequence[str] | None = None, load: Callable = load_smollm2) -> int:
    """Measures what is missing, prints and writes the table; `load` gives the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--eval-examples", type=int, default=24)
    add_common_options(parser)
    args = parser.parse_args(argv)
    names = ("tokens", "repeats", "steps", "batch", "max_length", "eval_examples")
    key = {"model": "SmolLM2-135M-Instruct", "dtype": "fp32", **{name: getattr(args, name) for name in names}}
    results = Results(args.output or EVIDENCE / "bench_velora.json", key, args.fresh)
    model, tokenizer = load()
    ids, config = real_text(tokenizer, 1, args.tokens).to(DEVICE), model.config
    cell(results, "seconds", lambda: step_seconds(ROWS, load, ids, args.repeats))
    for row in tqdm(ROWS, desc="bytes"):
        cell(results, f"bytes | {row.name}", lambda row=row: count_bytes(row, load, ids))
    if args.seeds:
        train_all(results, args, tokenizer, load)
    width = config.num_hidden_layers * (2 * config.hidden_size + config.intermediate_size)
    found = bars(results, width * args.tokens * 4 / MIB) if args.bars else []
    results.publish(
        f"# VeLoRA on SmolLM2-135M\n\n{in_one_line(key)}, groups {GROUPS}, inputs attention, mlp and down\n\n"
        f"{table(results)}\n\n```\n{judge(found)}\n```\n\n{results.origins()}"
    )
    return exit_status(found, args.strict)


def train_all(results: Results, args: argparse.Namespace, tokenizer, load: Callable) -> None:
    """The training runs, seed by seed."""
    collate = collator(tokenizer.pad_token_id)
    data = {split: docstrings(tokenizer, split, args.max_length) for split in ("train", "test")}
    held_out = batches_of(data["test"][: args.eval_examples], 8, collate)

    def batches(steps: int, seed: int) -> list[dict]:
        return shuffled_batches(data["train"], args.batch, steps, seed, collate)

    for seed, row in tqdm([(seed, row) for seed in args.seeds for row in LOSSES], desc="runs"):
        job = (row, load, seed, args.steps, (batches, held_out))
        cell(results, f"loss | {row.name} | {seed}", lambda job=job: train(*job))


if __name__ == "__main__":
    sys.exit(main())
