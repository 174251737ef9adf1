"""What `hf-tokenseek estimate` and `hf-tokenseek fit` do."""

import argparse
import json
from dataclasses import fields
from pathlib import Path

from .estimation import estimate
from .peaks import GIB
from .plan import budget_of, parse_size, recipe_options, try_ways
from .training import Training


def run_estimate(arguments: argparse.Namespace) -> int:
    """Prints the estimate; exit status 1 if it does not fit into `--gpu`."""
    methods = dict(parse_method(text) for text in arguments.method)
    training = _training(arguments, methods=methods, checkpointing=arguments.checkpointing)
    found = estimate(load_config(arguments.model), training)
    budget = budget_of(parse_size(arguments.gpu), arguments.headroom) if arguments.gpu else None
    fits = budget is None or found.peak.bytes <= budget
    if arguments.json:
        print(json.dumps({**found.to_dict(), "budget_bytes": budget, "fits": None if budget is None else fits}))
        return int(not fits)
    print(describe(found.model, found.parameters, found.trained, training))
    print(found.table())
    if budget is not None:
        verdict = "fits into" if fits else "does not fit into"
        print(f"{verdict} {budget / GIB:.2f} GiB: {arguments.gpu} less {arguments.headroom:.0%} for the above")
    return int(not fits)


def run_fit(arguments: argparse.Namespace) -> int:
    """Prints what was tried, and the first that fits as YAML; exit status 1 if none does."""
    import yaml

    config, training = load_config(arguments.model), _training(arguments)
    budget, tried = budget_of(parse_size(arguments.gpu), arguments.headroom), []
    for one in try_ways(config, training, budget):
        tried.append(one)
        if not arguments.json:
            # comments, so that the whole output is a configuration file
            print(f"# {one}", flush=True)
        if one.fits:
            break
    best = tried[-1] if tried[-1].fits else None
    options = None if best is None else recipe_options(best.training, arguments.model)
    if arguments.json:
        names = [{"way": t.way.name, "exact": t.way.exact, "refusal": t.refusal, "fits": t.fits} for t in tried]
        sizes = [None if t.estimate is None else t.estimate.peak.bytes for t in tried]
        rows = [{**name, "peak_bytes": size} for name, size in zip(names, sizes, strict=True)]
        print(json.dumps({"budget_bytes": budget, "tried": rows, "options": options}))
    elif options is None:
        smallest = min((t for t in tried if t.estimate), key=lambda t: t.estimate.peak.bytes, default=None)
        least = "" if smallest is None else f" The least is {smallest.estimate.peak_gib:.2f} GiB, {smallest.way.name}."
        print(
            f"# Nothing fits into {budget / GIB:.2f} GiB.{least} Train fewer tokens (--seq, --batch), adapters "
            "(--lora 16), or on several GPUs (--strategy fsdp --ranks 8)."
        )
    else:
        print(yaml.safe_dump(options, sort_keys=False), end="")
    return int(options is None)


def describe(model: str, parameters: int, trained: int, training: Training) -> str:
    """What is simulated, in two lines."""
    methods = [name if value is True else f"{name}={json.dumps(value)}" for name, value in training.methods.items()]
    methods += ["checkpointing"] if training.checkpointing else []
    return (
        f"{model}, {parameters / 1e9:.3f} B parameters, {trained / 1e9:.3f} B of them trained; {training.batch} x "
        f"{training.seq} tokens, the last {training.labels} of each sequence labelled\n"
        f"{', '.join(methods) or 'plain'}; {training.dtype}, {training.optimizer}, kernels of {training.device}\n"
    )


def parse_method(text: str) -> tuple[str, object]:
    """
    A method's name and configuration from `name` or `name=JSON`.

    Raises:
        ValueError: what stands behind `=` is no JSON.
    """
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value) if value else True
    except json.JSONDecodeError as error:
        raise ValueError(
            f"A method should be NAME or NAME=JSON, such as seek='{{\"context\": 0.2}}', got {text!r} ({error})."
        ) from error


def load_config(name: str):
    """
    The configuration of a model.

    Args:
        name (`str`): a name of the hub, a folder, or a `config.json`.

    Raises:
        ValueError: there is no such model, or it is of an unknown type.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if Path(name).suffix == ".json":
        values = json.loads(Path(name).read_text(encoding="utf-8"))
        family = values.get("model_type") if isinstance(values, dict) else None
        if family not in CONFIG_MAPPING:
            raise ValueError(f"{name!r} should have a `model_type` that transformers knows, got {family!r}.")
        return CONFIG_MAPPING[family].from_dict(values)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no model {name!r} that can be read ({str(error).splitlines()[0]}). Pass a name of the hub, a "
            "folder that holds a config.json, or that file itself."
        ) from error


def _training(arguments: argparse.Namespace, **others) -> Training:
    names = {field.name for field in fields(Training)} & set(vars(arguments)) - set(others)
    return Training(**{name: getattr(arguments, name) for name in names}, **others)
