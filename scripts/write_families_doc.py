"""
Writes docs/families.md from hf_tokenseek/families.py: what is supported, what each family exercises, what is refused.

    PYTHONPATH=kernels:. python scripts/write_families_doc.py
"""

from pathlib import Path

import torch

from hf_tokenseek.families import BEFORE_HEAD, MIXES_PACKED, REFUSED, SUPPORTED
from hf_tokenseek.patching import attach
from hf_tokenseek.seek.attention import ScoutState
from tests.seek.tiny_families import REPRESENTATIVES, tiny_model

PATH = Path(__file__).parents[1] / "docs" / "families.md"
HEAD = """# Model families

Written by `scripts/write_families_doc.py` from `hf_tokenseek/families.py`; a test compares.

## Supported: {count}

`tests/seek/test_families.py` holds every family against the plain model of transformers, at tiny size: the logits of
scouting, the logits of the selected rows, and every parameter's gradient against the plain model with the ditched rows
detached at each layer; and with everything selected, loss and gradients of plain training. Padding left and right,
packed documents, batches of one and three, gradient checkpointing, float32 and bfloat16 take part with every family:
in all combinations with {representatives}, in six with the others. The
second column says what a family has, and the tests thereby use, beyond causal attention with a key and value for each
query head.

| `model_type` | exercised |
| --- | --- |
"""
REFUSALS = """
## Refused: {count}

These raise an error with the reason, and so does every `model_type` that is in neither table. A family joins the first
one when it passes the tests: add it to `SUPPORTED` and run them.

| reason | `model_type` |
| --- | --- |
"""
MIXED = """
Plain {families} mix packed documents under eager and sdpa attention (not under flash
attention), and so does every plain model in a loop of your own without a mask and with `use_cache=True`, transformers'
default, which the `Trainer` turns off. TokenSeek always keeps them apart. Where layers share K/V, transformers loses
gradients under *reentrant* gradient checkpointing, with TokenSeek and without: pass
`gradient_checkpointing_kwargs={{"use_reentrant": False}}`.
"""


class _RecordingState(ScoutState):
    """Scouts and writes down under which rules attention was called."""

    def __init__(self):
        super().__init__(None)
        self.rules: list[dict] = []

    def attend(self, module, query, key, value, **rule):
        heads, dims = query.shape[1] // key.shape[1], value.shape[-1] != key.shape[-1]
        self.rules.append({**rule, "grouped": heads > 1, "single": key.shape[1] == 1, "value_dim": dims})
        return super().attend(module, query, key, value, **rule)


def traits(family: str) -> list[str]:
    """What attention and head of the tiny model of `family` do, as it was seen to do it."""
    model, state = tiny_model(family), _RecordingState()
    with attach(model, seek=True) as handle, torch.no_grad():
        handle.seek.decoder.backbone(torch.arange(3, 23)[None], use_cache=False, seek=state)
        rule = handle.seek.decoder.head_rule
    windows = [r["window"] is not None for r in state.rules]
    config, stored = model.config, {k.untyped_storage().data_ptr() for k, _ in state.kept.values()}
    experts = any("expert" in name.lower() for name, _ in model.named_modules())
    found = {
        "sliding window": all(windows),
        "sliding window in some layers": any(windows) and not all(windows),
        "score softcap": any(r["softcap"] is not None for r in state.rules),
        "attention sinks": any(r["sinks"] is not None for r in state.rules),
        "latent K/V": getattr(config, "kv_lora_rank", None) is not None,
        "one K/V head": state.rules[0]["single"],
        "grouped K/V": state.rules[0]["grouped"] and not state.rules[0]["single"],
        "other value size": any(r["value_dim"] for r in state.rules),
        "K/V shared by layers": len(stored) < len(state.kept),
        "mixture of experts": experts,
        "logit scale": rule["logit_scale"] != 1.0,
        "logit softcap": bool(rule["softcap"]),
        "module before the head": family in BEFORE_HEAD,
    }
    return [name for name, present in found.items() if present]


def document() -> str:
    """The text of docs/families.md."""
    rows = [f"| {family} | {', '.join(traits(family))} |\n" for family in SUPPORTED]
    reasons: dict[str, list[str]] = {}
    for family, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(family)
    refused = [f"| {reason} | {', '.join(families)} |\n" for reason, families in reasons.items()]
    return "".join(
        [
            HEAD.format(count=len(rows), representatives=", ".join(REPRESENTATIVES)),
            *rows,
            MIXED.format(families=", ".join(MIXES_PACKED)),
            REFUSALS.format(count=len(REFUSED)),
            *refused,
        ]
    )


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(document())
    print(f"wrote {PATH}")
