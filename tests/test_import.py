"""`import hf_tokenseek` is light: it needs nothing that is optional and touches no device."""

import os
import subprocess
import sys

import pytest

import hf_tokenseek

OPTIONAL = ("triton", "trl", "peft", "deepspeed")
# Each of these would start a device, or ask one. A function each: torch's compiler keeps a register of them.
DEVICE_CALLS = """
import torch
def touched(name):
    def touch(*args, **kwargs):
        raise AssertionError(f"torch.cuda.{name} was called")
    return touch
for name in ("current_device", "init", "_lazy_init", "get_device_properties", "set_device"):
    setattr(torch.cuda, name, touched(name))
"""


def run(code: str) -> None:
    # the paths of this process, so that the suite also runs without an installed package
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_import_needs_nothing_optional_and_touches_no_device():
    run(
        f"{DEVICE_CALLS}\nimport sys, hf_tokenseek\n"
        f"assert not {{*{OPTIONAL}}} & {{*sys.modules}}, {{*{OPTIONAL}}} & {{*sys.modules}}\n"
        "for name in hf_tokenseek.__all__: getattr(hf_tokenseek, name)\n"
    )


def test_trains_without_optional_packages():
    """A missing package raises ModuleNotFoundError wherever it is imported; nothing on the way to training does."""
    run(
        f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "import torch, transformers, hf_tokenseek\n"
        "hf_tokenseek.TokenSeekTrainer, hf_tokenseek.TokenSeekArguments\n"
        "config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=2)\n"
        "model = transformers.LlamaForCausalLM(config).train()\n"
        "ids = torch.arange(8)[None]\n"
        "with hf_tokenseek.attach(model, seek=True, lemo={'block': 2, 'dense_first': 0}):\n"
        "    model(input_ids=ids, labels=torch.where(ids > 5, ids, -100)).loss.backward()\n"
    )


def test_every_public_name_resolves_and_is_listed():
    for name in hf_tokenseek.__all__:
        assert getattr(hf_tokenseek, name).__name__ == name
    assert set(hf_tokenseek.__all__) <= set(dir(hf_tokenseek))


def test_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'Tokenseek'. Public names: .*'TokenSeekTrainer'"):
        hf_tokenseek.Tokenseek  # noqa: B018
