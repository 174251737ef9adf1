"""LeMo written down plainly: every layer computes everything, and what a dropped token would change is masked out."""

import inspect
from contextlib import ExitStack

import torch
from torch import Tensor

# registers an attention that detaches the keys and values of rows outside `naive_keep`
import tests.seek.naive  # noqa: F401
from hf_tokenseek.forwarding import named_inputs
from hf_tokenseek.patched_forward import replaced_forward
from hf_tokenseek.patching import find_layers

# norms before and behind the attention, before and behind the MLP, as the families' code has them
_NORMS = {
    "llama": ("input_layernorm", None, "post_attention_layernorm", None),
    "mistral": ("input_layernorm", None, "post_attention_layernorm", None),
    "gemma2": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "olmo2": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "glm4": ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    "gpt2": ("ln_1", None, "ln_2", None),
}


def kept_tokens(rows: Tensor, n: int) -> Tensor:
    """`(batch, n)`: which positions `rows` names."""
    keep = torch.zeros(len(rows), n + 1, dtype=torch.bool)
    return keep.scatter_(1, rows.masked_fill(rows < 0, n), True)[:, :n]


def naive_lemo(
    model,
    rows: dict[int, Tensor],
    inputs: dict,
    mode: str = "elide",
    mlp: str = "tokens",
    attention: str = "eager",
):
    """
    The model's output if each layer keeps `rows`.

    Args:
        rows (`dict[int, torch.LongTensor]`): kept positions by layer; layers that are not in it are plain.
        attention (`str`): one whose mask can be written into.
    """
    _, layers = find_layers(model)
    before = model.config._attn_implementation
    model.set_attn_implementation("naive_detach" if mode == "detach" else attention)
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, before)
        for index, kept in rows.items():
            forward = _layer(layers[index], kept, mode, mlp)
            stack.enter_context(replaced_forward(layers[index], forward))
        return model(**inputs, use_cache=False)


def _layer(layer, rows: Tensor, mode: str, mlp: str):
    plain = layer.forward
    signature = inspect.signature(plain)
    names = list(signature.parameters)

    def forward(*args, **kwargs):
        given = named_inputs(signature, args, kwargs)
        hidden, mask_name = given.pop(names[0]), next(name for name in names if "mask" in name)
        attention_mask = given.pop(mask_name)
        keep = kept_tokens(rows, hidden.shape[1])
        if mode == "elide":
            attention_mask = _without_dropped(attention_mask, keep)
        else:
            for module in layer.modules():
                module.naive_keep = keep
        here = keep[:, :, None]
        inputs = torch.where(here, hidden, hidden.detach()) if mode == "detach" else hidden

        def ridden(output, past):
            return torch.where(here, output, past if mode == "elide" else past + (output - past).detach())

        call = {mask_name: attention_mask, **given}
        if mlp == "tokens":
            return ridden(first_of(plain(inputs, **call)), hidden)
        attention, before, behind, before_mlp, behind_mlp = _halves(layer)
        attended = inputs + behind(attention(hidden_states=before(inputs), **call)[0])
        between = ridden(attended, hidden)
        return between + behind_mlp(layer.mlp(before_mlp(between)))

    return forward


def _halves(layer) -> tuple:
    """A layer's attention, and the norms before and behind it and its MLP."""
    names = _NORMS[layer.__class__.__name__.removesuffix("DecoderLayer").removesuffix("Block").lower()]
    norms = [getattr(layer, name) if name else torch.nn.Identity() for name in names]
    return getattr(layer, "attn" if hasattr(layer, "attn") else "self_attn"), *norms


def first_of(output):
    """The hidden states of what a layer gives."""
    return output[0] if isinstance(output, tuple) else output


def _without_dropped(mask: Tensor, keep: Tensor) -> Tensor:
    """Dropped keys are seen by nobody but themselves, so that every row sees something."""
    n = keep.shape[1]
    hidden = ~keep[:, None, None, :] & ~torch.eye(n, dtype=torch.bool)
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
