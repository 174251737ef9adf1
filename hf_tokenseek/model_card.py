"""What a saved model says about its training: the tag `tokenseek`, the base model, and the configuration as JSON."""

import json
import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers.utils import logging

from . import __version__

logger = logging.get_logger(__name__)

TAG = "tokenseek"
START, END = "<!-- hf_tokenseek: start -->", "<!-- hf_tokenseek: end -->"


def write_model_card(folder: str | Path, model: nn.Module, methods: dict) -> None:
    """
    Writes `README.md` beside a saved model; in a card that is there already, adds the tag and replaces our section.

    Args:
        folder (`str` or `Path`): where the model was saved.
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the trained model, for the name of its base.
        methods (`dict`): each method's configuration, `None` or `False` where it was off.
    """
    try:
        _write(Path(folder) / "README.md", model, methods)
    # whatever stands in a card: it must not cost what is saved behind it
    except Exception as error:
        logger.warning(f"The model card in {str(folder)!r} does not say how the model was trained: {error}")


def _write(file: Path, model: nn.Module, methods: dict) -> None:
    if file.is_file():
        card = ModelCard.load(file, ignore_metadata_errors=True)
    else:
        name = file.resolve().parent.name
        card = ModelCard(f"---\n{_metadata(model).to_yaml()}\n---\n\n# {name}\n")
    card.data.tags = sorted({*(card.data.tags or []), TAG})
    before, _, rest = card.text.partition(START)
    after = rest.partition(END)[2]
    card.text = f"{before.rstrip()}\n\n{_section(methods)}{after}"
    card.save(file)


def _metadata(model: nn.Module) -> ModelCardData:
    name = getattr(model.config, "_name_or_path", None)
    # a folder of this machine is nobody's base model
    base = name if name and not os.path.isdir(name) else None
    return ModelCardData(base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=[TAG])


def _section(methods: dict) -> str:
    options = json.dumps(methods, indent=2)
    return (
        f"{START}\n## Training\n\n"
        f"Trained with hf_tokenseek {__version__}"
        " ([TokenSeek](https://huggingface.co/papers/2601.19739): gradients of selected tokens only). The weights "
        f"need nothing of it.\n\n```json\n{options}\n```\n{END}\n"
    )
