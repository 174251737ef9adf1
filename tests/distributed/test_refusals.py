"""Ways of sharing work that are refused, by name, and a launch that would run something else than it was asked for."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from hf_tokenseek import IstConfig, LemoConfig, SeekConfig, VeloraConfig
from hf_tokenseek.ist import refusals as ist_refusals
from hf_tokenseek.lemo import refusals as lemo_refusals
from hf_tokenseek.seek import ranks
from hf_tokenseek.velora import refusals
from recipes.checks import check_strategy


def deepspeed(stage: int, **options) -> dict:
    config = {"zero_optimization": {"stage": stage}, **options}
    plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(config))
    return {"distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugin": plugin}


def fsdp(version: int) -> dict:
    return {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=version)}


def pretend(monkeypatch, module, arguments=None, **state) -> SimpleNamespace:
    """Arguments for `module`'s refusals, which see this state."""
    plain = {"distributed_type": DistributedType.MULTI_GPU, "deepspeed_plugin": None, "parallelism_config": None}
    monkeypatch.setattr(module, "AcceleratorState", lambda: SimpleNamespace(**{**plain, **state}))
    return SimpleNamespace(**{"n_gpu": 1, "torch_compile": False, **(arguments or {})})


def refuse(monkeypatch, config=None, arguments=None, **state) -> None:
    ranks.refuse_strategies(pretend(monkeypatch, ranks, arguments, **state), SeekConfig(**(config or {})))


def refuse_velora(monkeypatch, config=None, arguments=None, **state) -> None:
    refusals.refuse_arguments(pretend(monkeypatch, refusals, arguments, **state), VeloraConfig(**(config or {})))


def refuse_ist(monkeypatch, config=None, arguments=None, **state) -> SimpleNamespace:
    arguments = {"ddp_find_unused_parameters": None, **(arguments or {})}
    args = pretend(monkeypatch, ist_refusals, arguments, **state)
    ist_refusals.prepare_arguments(args, IstConfig(**(config or {})))
    return args


def refuse_lemo(monkeypatch, config=None, arguments=None, **state) -> None:
    arguments = {"use_liger_kernel": False, "label_smoothing_factor": 0.0, **(arguments or {})}
    lemo_refusals.refuse_arguments(
        pretend(monkeypatch, lemo_refusals, arguments, **state), LemoConfig(**(config or {}))
    )


@pytest.mark.parametrize("state", [{}, fsdp(2), deepspeed(1), deepspeed(2), deepspeed(3)])
def test_what_is_verified_passes(monkeypatch, state):
    refuse(monkeypatch, **state)
    refuse_velora(monkeypatch, **state)
    refuse_lemo(monkeypatch, **state)
    # DDP has to know that some parameters get no gradient
    assert refuse_ist(monkeypatch, **state).ddp_find_unused_parameters is True


PROBE, PAPER = {"probe_steps": 5}, {"score": "paper"}
SPLIT = {"sequence_parallel_size": 2}


@pytest.mark.parametrize(("config", "arguments", "state", "said"), [
    ({}, {"n_gpu": 4}, {}, r"DataParallel \(n_gpu=4\).*accelerate launch"),
    ({}, {}, fsdp(1), "version 1 of FSDP.*fsdp_version: 2"),
    ({}, {"parallelism_config": ParallelismConfig(tp_size=2)}, {}, "parallelism_config.tp_size=2"),
    ({}, {}, {"parallelism_config": ParallelismConfig(cp_size=4)}, "parallelism_config.cp_size=4.*Leave it out"),
    ({}, {}, deepspeed(3, **SPLIT), "DeepSpeed's sequence_parallel_size=2"),
    (PROBE, {}, fsdp(2), "probe_steps=5 under FSDP2.*probe_steps=0"),
    (PROBE, {}, deepspeed(3), "probe_steps=5 under ZeRO-3.*ZeRO-2"),
    (PAPER, {}, deepspeed(3), "score='paper' under ZeRO-3.*another score"),
])  # fmt: skip
def test_what_is_not_is_refused_by_name(monkeypatch, config, arguments, state, said):
    with pytest.raises(ValueError, match=said):
        refuse(monkeypatch, config, arguments, **state)


COMPRESSED = {"compressed_state": True}


@pytest.mark.parametrize(("config", "arguments", "state", "said"), [
    ({}, {"n_gpu": 4}, {}, r"DataParallel \(n_gpu=4\).*accelerate launch"),
    ({}, {}, fsdp(1), "version 1 of FSDP.*fsdp_version: 2"),
    ({}, {"parallelism_config": ParallelismConfig(tp_size=2)}, {}, "parallelism_config.tp_size=2.*Leave it out"),
    ({}, {}, deepspeed(3, **SPLIT), "DeepSpeed's sequence_parallel_size=2"),
    (COMPRESSED, {}, fsdp(2), "compressed_state=True does not support FSDP.*Use DDP, or compressed_state=False"),
    (COMPRESSED, {}, deepspeed(2), "compressed_state=True does not support DEEPSPEED.*Use DDP"),
    (COMPRESSED, {}, deepspeed(3), "compressed_state=True does not support DEEPSPEED.*Use DDP"),
])  # fmt: skip
def test_what_velora_does_not_know_is_refused_by_name(monkeypatch, config, arguments, state, said):
    with pytest.raises(ValueError, match=said):
        refuse_velora(monkeypatch, config, arguments, **state)


@pytest.mark.parametrize(("config", "arguments", "state", "said"), [
    ({}, {"n_gpu": 4}, {}, r"DataParallel \(n_gpu=4\).*accelerate launch"),
    ({}, {"ddp_find_unused_parameters": False}, {}, "ddp_find_unused_parameters=False"),
    ({}, {}, fsdp(1), "version 1 of FSDP.*fsdp_version: 2"),
    ({}, {"parallelism_config": ParallelismConfig(tp_size=2)}, {}, "parallelism_config.tp_size=2.*Leave it out"),
    ({"unbiased": True}, {}, fsdp(2), "unbiased=True under FSDP.*Use DDP"),
    ({"state": "offload"}, {}, fsdp(2), "state='offload' under FSDP.*another value of `state`"),
    ({"state": "keep"}, {}, deepspeed(2), "state='keep' under DEEPSPEED"),
    ({"policy": "gradient_norm"}, {}, deepspeed(3), "policy='gradient_norm' under DEEPSPEED"),
])  # fmt: skip
def test_what_sparse_tuning_does_not_know_is_refused_by_name(monkeypatch, config, arguments, state, said):
    with pytest.raises(ValueError, match=said):
        refuse_ist(monkeypatch, config, arguments, **state)


@pytest.mark.parametrize(("arguments", "state", "said"), [
    ({"n_gpu": 4}, {}, r"DataParallel \(n_gpu=4\).*accelerate launch"),
    ({}, fsdp(1), "version 1 of FSDP.*fsdp_version: 2"),
    ({"parallelism_config": ParallelismConfig(tp_size=2)}, {}, "parallelism_config.tp_size=2.*Leave it out"),
    ({}, deepspeed(3, **SPLIT), "DeepSpeed's sequence_parallel_size=2"),
])  # fmt: skip
def test_what_lemo_does_not_know_is_refused_by_name(monkeypatch, arguments, state, said):
    with pytest.raises(ValueError, match=f"LeMo does not support .*{said}"):
        refuse_lemo(monkeypatch, None, arguments, **state)


def test_velora_compresses_the_state_under_ddp(monkeypatch):
    refuse_velora(monkeypatch, COMPRESSED)


@pytest.mark.parametrize(("config", "state"), [(PROBE, {}), (PAPER, deepspeed(2)), (PROBE, deepspeed(1))])
def test_whole_weights_allow_gradients_inside_of_the_forward(monkeypatch, config, state):
    refuse(monkeypatch, config, **state)


def test_one_process_keeps_its_own_number():
    assert ranks.mean_over_ranks(0.3, torch.device("cpu")) == 0.3


@pytest.mark.parametrize("strategy", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_runs_something_else(monkeypatch, strategy):
    asked = SimpleNamespace(distributed_type=DistributedType(strategy))
    other = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    check_strategy(other)
    monkeypatch.setenv(f"ACCELERATE_USE_{strategy}", "true")
    check_strategy(asked)
    with pytest.raises(ValueError, match=f"asked for {strategy}, and would train with MULTI_CPU"):
        check_strategy(other)
