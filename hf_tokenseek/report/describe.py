"""What a run was told and where it ran, for the first line of its record."""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from .. import __version__
from ..parameters import numel_of
from .record import Event


def describe_run(args: TrainingArguments, model: nn.Module, methods: dict[str, Any]) -> Event:
    """
    The event with everything that was decided before training.

    Args:
        args (`TrainingArguments`): those that differ from their defaults are told; the hub's tokens never are.
        model (`nn.Module`): the trained model.
        methods (`dict`): each method's configuration, by the name of its field in [`TokenSeekArguments`].
    """
    return {
        "kind": "run",
        "step": 0,
        "methods": methods,
        "arguments": {name: value for name, value in changed_arguments(args).items() if name not in methods},
        "model": _model(model),
        "software": {"hf_tokenseek": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "machine": {"device": _device(args.device), "processes": args.world_size},
    }


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments whose values are not the defaults."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(args)
    }
    # `to_dict` masks the hub's tokens
    return {name: value for name, value in args.to_dict().items() if name in defaults and value != defaults[name]}


def _model(model: nn.Module) -> dict[str, Any]:
    parameters = list(model.parameters())
    facts = {
        "class": type(model).__name__,
        "parameters": sum(map(numel_of, parameters)),
        "trained parameters": sum(numel_of(p) for p in parameters if p.requires_grad),
    }
    config = getattr(model, "config", None)
    if config is None:
        return facts
    name = getattr(config, "_name_or_path", "")
    text = config.get_text_config()
    return {
        # of a folder, the last part says enough
        "name": Path(name).name if Path(name).is_dir() else name,
        **facts,
        "family": config.model_type,
        "layers": getattr(text, "num_hidden_layers", None),
        "hidden size": getattr(text, "hidden_size", None),
    }


def _device(device: torch.device) -> str:
    module = torch.get_device_module(device)
    if hasattr(module, "get_device_name"):
        return module.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s)"
