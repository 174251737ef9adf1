"""LoRA of every kind: only the gradients of A change, and by the formula; all groups are plain training."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from hf_tokenseek import TokenSeekTrainer, attach
from hf_tokenseek.velora import VeloraAdamW
from tests.peft import tiny_peft
from tests.peft.tiny_peft import adapted, lora
from tests.tiny_training import arguments, losses, trainer
from tests.velora.tiny_velora import batch, gradients, model
from tokenseek_kernels import compress, expand
from tokenseek_kernels.lean_lora import reference

EVERYWHERE = {"target_modules": "all-linear"}
KINDS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.1},
    "rslora": {"use_rslora": True},
    "biases": {"lora_bias": True},
    "head-saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "two": {},
}


def build(kind, dtype=torch.float64):
    """A tiny Llama with adapters on all linear layers, none of which is zero."""
    peft = adapted(model(dtype=dtype), lora(**EVERYWHERE, **KINDS[kind]))
    if kind == "two":
        torch.manual_seed(2)
        peft.add_adapter("second", lora(**EVERYWHERE, r=2))
        peft.base_model.set_adapter(["default", "second"])
    return peft


class ReferenceDropout(nn.Dropout):
    """The mask that follows from a seed, written out; autograd keeps it."""

    def forward(self, x):
        dropped = reference.dropped_elements(x.shape, x.device, self.p, int(torch.randint(2**62, ())))
        return x.masked_fill(dropped, 0) / reference.kept_share(self.p)


def swap_dropout(peft, old, new):
    for name, module in peft.named_modules():
        # that of o_proj, whose input attention keeps, stays torch's
        if type(module) is old and "o_proj" not in name:
            module.__class__ = new


def plain(peft, inputs):
    """Loss and gradients of PEFT's own training, with what each A reads and what comes back to it."""
    read, upstream, hooks = {}, {}, []
    for name, module in peft.named_modules():
        if ".lora_A." in name:

            def before(module, args, name=name):
                # DoRA gives A a unit matrix too, for the norm of the weight, and does not differentiate that
                if args[0].dim() == 3:
                    read[name] = args[0].detach()

            def after(module, _, grads, name=name):
                upstream[name] = grads[0]

            hooks += [module.register_forward_pre_hook(before), module.register_full_backward_hook(after)]
    swap_dropout(peft, nn.Dropout, ReferenceDropout)
    torch.manual_seed(3)
    found = gradients(peft, inputs)
    torch.manual_seed(3)
    loss = peft(**inputs).loss.detach()
    swap_dropout(peft, ReferenceDropout, nn.Dropout)
    for hook in hooks:
        hook.remove()
    return loss, found, read, upstream


def compressed(peft, inputs):
    """Loss and gradients with what is attached, and the same random numbers."""
    torch.manual_seed(3)
    loss = peft(**inputs).loss.detach()
    torch.manual_seed(3)
    return loss, gradients(peft, inputs)


def projectors(handle):
    """By the name of an A's weight."""
    owners = {id(m): c.projector for c in handle.velora.inputs.values() for m in c.unit.compressible}
    return lambda peft: {f"{name}.weight": owners[id(m)] for name, m in peft.named_modules() if id(m) in owners}


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_groups_as_features_equal_plain_training(kind):
    peft, inputs = build(kind), batch()
    loss, truth, *_ = plain(peft, inputs)
    for options in ({}, {"projector": "mixed"}):
        with attach(peft, velora={"groups": 128, **options}):
            found_loss, found = compressed(peft, inputs)
        assert found_loss == loss and found.keys() == truth.keys()
        for name, gradient in truth.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_only_gradients_of_a_change_and_by_the_formula(kind):
    """`dA = (dy^T x P) E^T` of the plain model's x and dy, under dropout those of the same mask."""
    peft, inputs = build(kind), batch()
    loss, truth, read, upstream = plain(peft, inputs)
    with attach(peft, velora={"groups": 7, "projector": "mixed"}) as handle:
        found_loss, found = compressed(peft, inputs)
        owned = projectors(handle)(peft)
    assert found_loss == loss and found.keys() == truth.keys()
    a_weights = {name for name in truth if ".lora_A." in name and "o_proj" not in name}
    assert set(owned) == a_weights and len(a_weights) == 2 * 6 * (2 if kind == "two" else 1)
    for name, gradient in truth.items():
        if name in owned:
            projector, a = owned[name], name.removesuffix(".weight")
            z = compress(read[a], projector.directions, projector.size, impl="reference")
            expected = upstream[a].flatten(0, -2).T @ expand(z, projector.expansion, projector.size).flatten(0, -2)
            assert not torch.allclose(expected, gradient, rtol=1e-3)
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-10, msg=name)
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-16, msg=name)
    assert type(peft.get_submodule(a)) is nn.Linear
    assert compressed(peft, inputs)[1].keys() == truth.keys()


@pytest.mark.parametrize("kind", ["lora", "dora", "dropout"])
def test_lean_layers_change_nothing(kind):
    """Attached before or after: lean LoRA layers leave the adapters to VeLoRA."""
    peft, inputs = build(kind), batch()
    with attach(peft, velora={"groups": 7}):
        loss, alone = compressed(peft, inputs)
    with attach(peft, lean=True, velora={"groups": 7}):
        found = [compressed(peft, inputs)]
    with attach(peft, velora={"groups": 7}), attach(peft, lean=True):
        found.append(compressed(peft, inputs))
    # under dropout lean draws o_proj's mask, which VeLoRA leaves to torch, from a seed: another one
    if kind == "dropout":
        loss, alone = found[0]
    for found_loss, together in found:
        torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_dropout_drops_its_share_and_scales_the_rest():
    peft, inputs = build("dropout", torch.float32), batch(rows=16, tokens=40, padding=0)
    seen = {}
    layer = peft.base_model.model.model.layers[0].mlp.up_proj
    dropout = layer.lora_dropout["default"]
    with attach(peft, velora={"groups": 4}):
        hook = dropout.register_forward_hook(lambda _, args, y: seen.update(x=args[0].detach(), y=y.detach()))
        peft(**inputs)
        hook.remove()
        x, y = seen["x"], seen["y"]
        # five standard errors of 40,960 draws
        assert abs(float((y == 0).float().mean()) - 0.1) < 5 * (0.1 * 0.9 / x.numel()) ** 0.5
        torch.testing.assert_close(y[y != 0], x[y != 0] / reference.kept_share(0.1))
        assert torch.equal(dropout.eval()(x), x)
    assert type(dropout) is nn.Dropout


def test_adapters_in_float32_on_a_base_in_bfloat16():
    """PEFT's `autocast_adapter_dtype`: A reads a cast of x, and z is that of x itself."""
    peft, inputs = build("lora", torch.bfloat16), batch()
    assert {p.dtype for p in peft.parameters() if p.requires_grad} == {torch.float32}
    loss, truth, *_ = plain(peft, inputs)
    with attach(peft, velora={"groups": 128}):
        found_loss, found = compressed(peft, inputs)
    assert found_loss == loss
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    with attach(peft, velora={"groups": 4}):
        few_loss, few = compressed(peft, inputs)
    assert few_loss == loss
    for name, gradient in truth.items():
        changed = ".lora_A." in name and "o_proj" not in name
        assert torch.equal(few[name], gradient) is not changed, name


def test_compressed_state_is_adamw_on_dense_gradients():
    runs = []
    for compressed_state in (False, True):
        peft = build("two")
        options = {"groups": 4, "compressed_state": compressed_state}
        kind = VeloraAdamW if compressed_state else torch.optim.AdamW
        with attach(peft, velora=options):
            optimizer = kind([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
            for step in range(5):
                peft(**batch(seed=step)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        runs.append({name: p.detach() for name, p in peft.named_parameters()})
    for name, dense in runs[0].items():
        torch.testing.assert_close(runs[1][name], dense, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_saved_loaded_and_merged_adapters_are_plain(kind, tmp_path):
    peft, inputs = build(kind, torch.float32), batch()
    with attach(peft, velora={"groups": 4, "compressed_state": True}):
        optimizer = VeloraAdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
        peft(**inputs).loss.backward()
        optimizer.step()
        peft.save_pretrained(tmp_path)
        expected = peft.eval()(**inputs).logits
        loaded = PeftModel.from_pretrained(model(dtype=torch.float32), tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        peft.train()
    assert torch.equal(peft.eval()(**inputs).logits, expected)
    assert set(peft.state_dict()) == set(loaded.state_dict())
    merged = peft.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_lora_that_does_not_run_its_a_is_refused():
    """PEFT's own VeLoRA keeps what it keeps; and it would train nothing with a compressed state."""
    peft = adapted(model(), tiny_peft.velora())
    with pytest.raises(ValueError, match="finds no trained linear layer that reads"):
        attach(peft, velora={"inputs": ["attention", "down"]})


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_quantised_base_is_left_alone(base, tmp_path):
    """QLoRA: all groups train as plainly, fewer train too."""
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    from tests.peft.test_quantised_base import QUANTISED

    model(dtype=torch.float32).save_pretrained(tmp_path)

    def quantised():
        options = {"quantization_config": BitsAndBytesConfig(**QUANTISED[base]), "dtype": torch.float32}
        loaded = type(model()).from_pretrained(tmp_path, **options)
        return adapted(prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False), lora(**EVERYWHERE))

    peft, inputs = quantised(), batch()
    loss, truth, *_ = plain(peft, inputs)
    for groups in (128, 4):
        with attach(peft, velora={"groups": groups}):
            found_loss, found = compressed(peft, inputs)
        assert float(found_loss) == pytest.approx(float(loss), rel=1e-5)
        error = tiny_peft.largest_error(found, truth)
        assert error <= 2e-5 if groups == 128 else error > 1e-2
        if groups == 4:
            b = {name: gradient for name, gradient in truth.items() if ".lora_B." in name}
            assert tiny_peft.largest_error(found, b) <= 2e-5
    runs = []
    for velora in (None, {"groups": 128}, {"groups": 4}):
        args = arguments(tmp_path, None, velora=velora, optim="sgd", learning_rate=0.3)
        runs.append(trainer(quantised(), args, TokenSeekTrainer))
        runs[-1].train()
    plainly, everything, few = map(losses, runs)
    assert everything == pytest.approx(plainly, rel=1e-4) and few != pytest.approx(plainly, rel=1e-5)
