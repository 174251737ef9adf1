"""The truth for TokenSeek's passes: the plain model whose ditched rows are detached at every layer."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hf_tokenseek.patching import find_layers
from hf_tokenseek.seek.attention import _original_attention


def _detaching_attention(module, query, key, value, attention_mask, **kwargs):
    keep = module.naive_keep[:, None, :, None]
    key, value = torch.where(keep, key, key.detach()), torch.where(keep, value, value.detach())
    plain = _original_attention(module, "eager")
    return plain(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("naive_detach", _detaching_attention)
AttentionMaskInterface.register("naive_detach", eager_mask)


@contextmanager
def detached_rows(model, keep):
    """
    While open, `model` computes as always, but no gradient passes through rows outside `keep` (bool, `(batch, n)`):
    neither through their hidden states at any layer nor through their keys and values.
    """
    original = model.config._attn_implementation
    model.set_attn_implementation("naive_detach")
    for module in model.modules():
        module.naive_keep = keep

    def cut(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(keep[:, :, None], hidden, hidden.detach())
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    _, layers = find_layers(model)
    hooks = [module.register_forward_hook(cut) for module in [model.get_input_embeddings(), *layers]]
    # what is added between the embedding and the first layer (positions, norms) belongs to a row as well

    def cut_input(module, args, kwargs):
        return (torch.where(keep[:, :, None], args[0], args[0].detach()), *args[1:]), kwargs

    hooks.append(layers[0].register_forward_pre_hook(cut_input, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            del module.naive_keep
        model.set_attn_implementation(original)


def naive_loss(model, inputs, targets, keep):
    """Summed cross-entropy at `targets` (`(batch, n)`, -100 elsewhere) with the rows outside `keep` detached."""
    with detached_rows(model, keep):
        logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
