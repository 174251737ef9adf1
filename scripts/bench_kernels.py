"""
Time of each kernel on this GPU, forward and backward, beside torch, FlexAttention and (if installed) Liger.

    python scripts/bench_kernels.py                             # Llama-3.2-1B and 3-8B shapes, 2048 and 32768 tokens
    python scripts/bench_kernels.py --tokens 8192 --cases selected_attention rms_norm

Every way's result is compared with the first one's before anything is timed. Interrupted, it goes on with the first
cell that is not finished. Run nothing beside it. Without a GPU it says so and does nothing.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bench_common import EVIDENCE, Results, Spread, environment, in_one_line, markdown_table
from kernel_cases import CASES, LLAMA, Contender, Shape, Sizes
from tqdm import tqdm

NOTES = """Milliseconds: median (20 %..80 % quantile). One sequence, bf16, rows selected at random; the attention
kernels' keys are all tokens, `head_statistics`, `compress` and `block_scores` read all rows, everything else works on
the selected rows. Backward is the gradient of every differentiable input. x triton: forward and backward (medians)
over those of the kernel."""
HEADER = ("operation, model, tokens", "way", "forward [ms]", "backward [ms]", "x triton")
# bfloat16 results of sums in another order: a few roundings of 2^-8, against the largest value
AGREEMENT = 4 * 2**-8

Stopwatch = Callable[[Callable], Sequence[float]]


def milliseconds(call: Callable) -> Sequence[float]:
    """Median and the 20 % and 80 % quantiles of many runs, with a cold L2 cache."""
    from triton.testing import do_bench

    return do_bench(call, quantiles=(0.5, 0.2, 0.8))


def measure(contenders: Sequence[Contender], stopwatch: Stopwatch) -> dict[str, dict]:
    """`{name: {"forward": [median, low, high], "backward": ...}}`, or `{"failed": reason}` in their place."""
    expected, figures = None, {}
    for contender in contenders:
        try:
            output = contender.run()
            if contender.comparable is not None:
                result = contender.comparable(output.detach()).float()
                expected = result if expected is None else expected
                _require_agreement(contender.name, result, expected)
            figures[contender.name] = {"forward": list(stopwatch(contender.run)), "backward": None}
            if contender.inputs:
                grad = torch.randn_like(output)
                backward = _backward(output, contender.inputs, grad)
                figures[contender.name]["backward"] = list(stopwatch(backward))
        # of a competitor or on a small GPU; the other ways still count
        except torch.OutOfMemoryError:
            figures[contender.name] = {"failed": "out of memory"}
    return figures


def _backward(output: torch.Tensor, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> Callable:
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def _require_agreement(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    distance = ((result - expected).abs().max() / expected.abs().max()).item()
    if not distance <= AGREEMENT:
        raise RuntimeError(
            f"{name!r} differs from the kernel by {distance:.2g} of the largest value, {AGREEMENT:.2g} is allowed: a "
            "time of a wrong result means nothing. Run scripts/test_gpu.sh."
        )


def table(cells: dict[str, dict]) -> str:
    """One line a cell and a way."""
    rows = []
    for cell, figures in cells.items():
        kernel = _total(figures["triton"])
        for name, found in figures.items():
            total = _total(found)
            ratio = "-" if kernel is None or total is None else f"{total / kernel:.2f}"
            rows.append((cell, name, *(_shown(found, part) for part in ("forward", "backward")), ratio))
    return markdown_table(HEADER, rows)


def _shown(found: dict, part: str) -> str:
    if "failed" in found:
        return found["failed"]
    return "-" if found[part] is None else f"{Spread(*found[part]):.3f}"


def _total(found: dict) -> float | None:
    return None if "failed" in found else found["forward"][0] + (found["backward"] or [0.0])[0]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [case.__name__ for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 32_768])
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the tokens that is selected")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument(
        "--output", type=Path, default=EVIDENCE / "bench_kernels.json", help="the table goes beside it"
    )
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    return parser.parse_args(argv)


def main(
    argv: Sequence[str] | None = None,
    device: str | None = None,
    shapes: Sequence[Shape] = LLAMA,
    stopwatch: Stopwatch = milliseconds,
) -> int:
    """Measures what is missing, prints and writes the tables; tests give another `device`, `shapes`, `stopwatch`."""
    options = parse(argv)
    device = device or ("cuda" if torch.cuda.is_available() else None)
    if device is None:
        print("no GPU found: nothing was run")
        return 0
    key = {**environment(), "ratio": options.ratio}
    results = Results(options.output, key, options.fresh)
    cells = {
        f"{case.__name__}, {shape.name}, {tokens} tokens": (case, shape, tokens)
        for case in CASES
        if case.__name__ in options.cases
        for shape in shapes
        for tokens in options.tokens
    }
    with tqdm([name for name in cells if name not in results], disable=None) as missing:
        for name in missing:
            missing.set_description(name)
            case, shape, tokens = cells[name]
            torch.manual_seed(0)
            sizes = Sizes(shape, tokens, max(1, round(options.ratio * tokens)), device, torch.bfloat16)
            results[name] = measure(case(sizes), stopwatch)
    report = table({name: results.cells[name] for name in cells})
    results.publish(f"# The kernels on a GPU\n\n{in_one_line(key)}\n\n{NOTES}\n\n{report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
