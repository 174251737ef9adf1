"""Fine-tune Hugging Face models with a fraction of the activation memory, and in less time."""

__version__ = "0.1.0"

# Where each public name lives; imported on first use, so that `import hf_tokenseek` needs torch only when used.
_HOMES = {
    "IstCallback": "callbacks",
    "IstConfig": "ist",
    "LeanCallback": "callbacks",
    "LemoCallback": "callbacks",
    "LemoConfig": "lemo",
    "MemoryCallback": "callbacks",
    "SeekCallback": "callbacks",
    "SeekConfig": "seek",
    "TokenSeekArguments": "arguments",
    "TokenSeekSFTConfig": "sft",
    "TokenSeekSFTTrainer": "sft",
    "TokenSeekTrainer": "trainer",
    "VeloraCallback": "callbacks",
    "VeloraConfig": "velora",
    "attach": "patching",
}

__all__ = [
    "IstCallback",
    "IstConfig",
    "LeanCallback",
    "LemoCallback",
    "LemoConfig",
    "MemoryCallback",
    "SeekCallback",
    "SeekConfig",
    "TokenSeekArguments",
    "TokenSeekSFTConfig",
    "TokenSeekSFTTrainer",
    "TokenSeekTrainer",
    "VeloraCallback",
    "VeloraConfig",
    "attach",
]


def __getattr__(name: str):
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {__all__}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
