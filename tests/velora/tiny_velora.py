"""A tiny model and batch for the tests of VeLoRA, and its gradients computed the long way."""

import torch

from tests.seek.tiny_families import tiny_model

ALL = ("attention", "mlp", "down")


def batch(rows=3, tokens=17, padding=5, seed=0):
    """Padded on the right, the padding's labels left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 200, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, tokens - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def model(family="llama", dtype=torch.float64):
    """In training mode, in float64."""
    return tiny_model(family, dtype)


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss by name; the model is left without."""
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def recorded_inputs(model, names, run) -> dict[str, torch.Tensor]:
    """What the layers of these names read while `run()` runs."""
    found = {}

    def record(name):
        return lambda module, args: found.__setitem__(name, args[0].detach().clone())

    hooks = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    run()
    for hook in hooks:
        hook.remove()
    return found
