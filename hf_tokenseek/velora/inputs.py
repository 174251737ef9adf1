"""Which linear layers of a decoder read the same tensor: the unit that can be compressed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..families import SHARED_BLOCK_INPUT
from ..lean.adapters import is_lora
from ..patching import find_layers

# paths inside a decoder layer, over all supported families; tests/velora/test_inputs.py tries them
_READERS = {
    "attention": re.compile(
        r"(.*\.)?(attn|self_attn|attention|multi_head_attention|laurel)\."
        r"(q_proj|k_proj|v_proj|gate_proj|g_proj|q_a_proj|kv_a_proj_with_mqa|qkv_proj|query_key_value|c_attn|W[qkv]"
        r"|Wqkv|linear_left)"
    ),
    "mlp": re.compile(
        r"((mlp|mlp\.shared_experts?|mlp\.shared_mlp)\.)?(gate_proj|up_proj|gate_up_proj|c_fc|dense_h_to_4h|fc1|Wi)"
        r"|ffn\.0"
    ),
    "down": re.compile(
        r"((mlp|mlp\.shared_experts?|mlp\.shared_mlp)\.)?(down_proj|dense_4h_to_h|fc2)|mlp\.(c_proj|Wo)|ffn\.2"
    ),
}
# further layers of a block, which read another tensor
_LATER = re.compile(r".*\.(o_proj|out_proj|dense|c_proj|Wo|q_b_proj|kv_b_proj|linear_right)")
# where a layer that is neither belongs to: it reads what the block reads, and keeps it
_BLOCKS = {"attention": re.compile(r".*att.*|laurel\..*"), "mlp": re.compile(r"(mlp|ffn|block_sparse_moe)\..*")}


@dataclass
class Input:
    """
    A tensor that linear layers of one decoder layer read.

    Attributes:
        name (`str`): `"attention"`, `"mlp"` or `"down"`; `"attention+mlp"` where both blocks read the same.
        path (`str`): of the decoder layer.
        readers (`dict[str, nn.Module]`): the layers that read it, by path: linear layers or PEFT's LoRA layers.
        compressible (`list[nn.Linear]`): what multiplies it by a trained weight: those layers, or their LoRA A.
        keepers (`list[str]`): trained modules that read and keep it, and cannot be compressed.
        width (`int`): its features.
    """

    name: str
    path: str
    readers: dict[str, nn.Module] = field(default_factory=dict)
    compressible: list[nn.Linear] = field(default_factory=list)
    keepers: list[str] = field(default_factory=list)
    width: int = 0

    @property
    def key(self) -> str:
        """Its name among all inputs of the model."""
        return f"{self.path}.{self.name}"

    def add(self, path: str, module: nn.Module) -> None:
        """Takes in a layer that reads it."""
        self.readers[path] = module
        found = _lora_a(module) if is_lora(module) else [module] if type(module) is nn.Linear else []
        trained = [linear for linear in found if linear.weight.requires_grad]
        self.compressible += trained
        if trained:
            self.width = trained[0].in_features
        elif _is_trained(module):
            self.keepers.append(f"{path} ({type(module).__name__})")


def find_inputs(model: nn.Module, names: tuple[str, ...]) -> Iterator[Input]:
    """
    The inputs of each decoder layer.

    Args:
        model (`transformers.PreTrainedModel`): a causal language model, with adapters or without.
        names (`tuple[str, ...]`): whose inputs are wanted.

    Yields:
        [`Input`]: those of these names that a trained layer reads, in the order of the layers. Layers that are not
        wanted but read the same tensor are its keepers.
    """
    shared = model.config.model_type in SHARED_BLOCK_INPUT
    path, layers = find_layers(model)
    for index, layer in enumerate(layers):
        found: dict[str, Input] = {}
        for inner, module in _layers_of(layer):
            name = _name_of(inner, module)
            if name is None:
                continue
            unit = "attention+mlp" if shared and name != "down" else name
            entry = found.setdefault(unit, Input(unit, f"{path}.{index}"))
            if name in names and _READERS[name].fullmatch(inner):
                entry.add(inner, module)
            elif _is_trained(module):
                entry.keepers.append(f"{inner} ({type(module).__name__})")
        yield from (entry for entry in found.values() if entry.compressible)


def _name_of(path: str, module: nn.Module) -> str | None:
    """Whose input a module reads, `None` if it has no matrix of its own or reads something else."""
    for name, pattern in _READERS.items():
        if pattern.fullmatch(path):
            return name
    owns_matrix = any(p is not None and p.dim() > 1 for p in module._parameters.values())
    if not owns_matrix or _LATER.fullmatch(path):
        return None
    return next((name for name, block in _BLOCKS.items() if block.fullmatch(path)), None)


def _layers_of(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules, but nothing from inside of a known layer: that is PEFT's."""
    known = [*_READERS.values(), _LATER]
    inside_of = None
    for path, module in block.named_modules():
        if inside_of is not None and path.startswith(inside_of):
            continue
        inside_of = f"{path}." if any(pattern.fullmatch(path) for pattern in known) else None
        yield path, module


def _lora_a(layer: nn.Module) -> list[nn.Linear]:
    """The A of each active adapter; none if a variant (PEFT's own VeLoRA, aLoRA) does not call them row by row."""
    variants = {type(variant).__name__ for variant in layer.lora_variant.values()}
    if variants - {"DoraLinearVariant"}:
        return []
    return [layer.lora_A[name] for name in layer.active_adapters if name in layer.lora_A]


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
