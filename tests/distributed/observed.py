"""
Runs a script in each rank as `accelerate launch` would, and writes down what trained there.

    accelerate launch --config_file ... tests/distributed/observed.py SCRIPT [ARGUMENTS]

Wrong settings run something else and exit with 0, so tests compare `$OBSERVED/<rank>.json` with what they asked for.
"""

import hashlib
import json
import os
import runpy
import sys
from pathlib import Path

import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

plain_train = transformers.Trainer.train
plain_init = AcceleratorState.__init__


def observed_train(self, *args, **kwargs):
    """Trains, and writes what was trained by what."""
    attached = [callback.handle for callback in self.callback_handler.callbacks if hasattr(callback, "handle")]
    answer = plain_train(self, *args, **kwargs)  # callbacks let go of their handles
    seen = {
        "world_size": self.args.world_size,
        "distributed_type": self.accelerator.distributed_type.value,
        "engine": [kind.__name__ for kind in type(self.model_wrapped).__mro__],
        "zero_stage": getattr(self.accelerator.state.deepspeed_plugin, "zero_stage", None),
        "offload": _offload(self.model_wrapped),
        "shards": sum(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in self.model.parameters()),
        "parameters": sum(1 for _ in self.model.parameters()),
        "losses": [entry["loss"] for entry in self.state.log_history if "loss" in entry],
        "plain_shares": [entry.get("seek/plain_share") for entry in self.state.log_history if "loss" in entry],
        "directions": _directions(attached),
        "layers": _layers(attached),
    }
    Path(os.environ["OBSERVED"], f"{self.args.process_index}.json").write_text(json.dumps(seen))
    return answer


def _directions(attached: list) -> str | None:
    """A digest of VeLoRA's last directions, to the bit."""
    for handle in attached:
        if hasattr(handle, "inputs"):
            drawn = [compressed.projector.directions.cpu().numpy().tobytes() for compressed in handle.inputs.values()]
            return hashlib.sha256(b"".join(drawn)).hexdigest()
    return None


def _layers(attached: list) -> list | None:
    """Who trained when, and the importance of layers, to the bit."""
    for handle in attached:
        if hasattr(handle, "history"):
            return [handle.history, handle.policy.state_dict()["importance"]]
    return None


def _offload(engine) -> list[str]:
    places = (getattr(engine, name, lambda: None)() for name in ("zero_offload_optimizer", "zero_offload_param"))
    devices = (getattr(place.device, "value", place.device) for place in places if place is not None)
    return [device for device in devices if device != "none"]


def fsdp_on_a_cpu(self, *args, fsdp_plugin=None, **kwargs):
    """Accelerate makes FSDP of several GPUs only, and trains with DDP on CPUs: says FSDP there too."""
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    transformers.Trainer.train = observed_train
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        AcceleratorState.__init__ = fsdp_on_a_cpu
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    # everything is written: threads of gloo now and then abort a process that is going down ("terminate called without
    # an active exception"), about once in fifty launches
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
