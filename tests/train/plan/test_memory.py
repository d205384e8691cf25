"""Bytes that follow from parameters alone, by hand and against the optimisers and 4-bit layers they are of."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from train.config import MoveKDSFTConfig
from train.plan import memory as plan_memory


COUNTS = plan_memory.ParameterCounts(
    trained={"language model": 4000},
    frozen={"vision tower": 1000},
    trained_bytes=16_000,
    frozen_bytes=4000,
    optimizer={"own": 32_000, "float32": 28_000, "flat": 24_000},
    largest_layer=100,
    outside_layers=50,
)


@pytest.mark.parametrize(
    ("backend", "half", "expected"),
    [
        ("DDP", True, (20_000, 16_000, 32_000, 7, 16_000)),
        ("ZeRO-2", True, (10_000, 2_000, 10_000, 7, 8_000)),
        ("ZeRO-3", True, (2_500, 2_000, 10_000, 7, 18_000)),
        ("FSDP2", True, (5_000, 4_000, 7_000, 7, 500)),
        ("DDP", False, (20_000, 16_000, 32_000, 7, 16_000)),
        ("ZeRO-3", False, (5_000, 4_000, 10_000, 7, 36_000)),
        ("FSDP2", False, (5_000, 4_000, 7_000, 7, 1_000)),
    ],
)
def test_bytes_of_each_backend_by_hand(backend: str, half: bool, expected: tuple[int, ...]) -> None:
    memory = plan_memory.sharded_memory(backend, COUNTS, 4, teachers=7, activations=11, half=half)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.teachers, memory.communication) == expected
    assert memory.total == sum(expected) + 11


def test_one_gpu_has_nobody_to_exchange_with() -> None:
    assert plan_memory.sharded_memory("DDP", COUNTS, 1, 0, 0).communication == 0
    assert plan_memory.sharded_memory("FSDP2", COUNTS, 1, 0, 0).communication == 0
    with pytest.raises(ValueError, match="expected one of"):
        plan_memory.sharded_memory("ZeRO-1", COUNTS, 4, 0, 0)


class Shapes(nn.Module):
    """Parameters of every kind: an embedding, matrices above and below what is packed, a kernel, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 48)
        self.linear = nn.Linear(48, 150)
        self.small = nn.Linear(48, 20, bias=False)
        self.convolution = nn.Conv2d(3, 24, 14)
        self.norm = nn.LayerNorm(5000)
        self.frozen = nn.Linear(100, 100).requires_grad_(False)


@pytest.mark.parametrize("name", plan_memory.OPTIMIZERS)
def test_states_are_those_of_the_optimizer(name: str, tmp_path) -> None:
    """Of the class and with the arguments that Trainer takes for this name."""
    model = Shapes()
    args = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name in plan_memory.BITSANDBYTES_OPTIMIZERS:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        # As Trainer does for every embedding
        manager.register_module_override(model.embedding, "weight", {"optim_bits": 32})
        optimizer = optimizer_class(trained, **settings | {"is_paged": False} if "paged" in name else settings)
        optimizer.check_overrides()
        for index, parameter in enumerate(trained):
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    else:
        optimizer = optimizer_class(trained, **settings)
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    states = [
        value for state in optimizer.state.values() for key, value in state.items() if not key.startswith("qmap")
    ]
    real = sum(value.nbytes for value in states if torch.is_tensor(value) and value.dim())
    embeddings = {id(model.embedding.weight)}
    planned = [plan_memory.optimizer_bytes(name, 4, weight.shape, id(weight) in embeddings) for weight in trained]
    assert sum(planned) == real


def test_optimizers_that_are_not_known_are_refused(arguments) -> None:
    unknown = {name.value for name in OptimizerNames} - set(plan_memory.OPTIMIZERS)
    assert {"lomo", "galore_adamw", "ademamix", "adamw_torch_8bit"} <= unknown
    args = arguments()[1]
    for name in sorted(unknown):
        args.optim = name
        with pytest.raises(ValueError, match=f"`optim` is {name} .*adamw_torch, adamw_torch_fused"):
            plan_memory.optimizer_name(args)
    args.optim, args.optim_args = OptimizerNames.SGD, "momentum=0.9"
    with pytest.raises(ValueError, match="`optim` is sgd with `optim_args` momentum=0.9"):
        plan_memory.optimizer_name(args)


@pytest.mark.parametrize(
    ("settings", "backends"),
    [
        ({}, plan_memory.BACKENDS),
        ({"optim": "adafactor"}, ("DDP", "ZeRO-2", "ZeRO-3")),
        ({"optim": "paged_adamw_8bit"}, ("DDP", "ZeRO-2", "ZeRO-3")),
        ({"language_lora_rank": 8}, plan_memory.BACKENDS),
        ({"language_lora_rank": 8, "load_in_4bit": True}, ("DDP",)),
    ],
)
def test_backends_that_can_run_a_recipe(arguments, settings: dict, backends: tuple[str, ...]) -> None:
    args: MoveKDSFTConfig = arguments(**settings)[1]
    assert plan_memory.usable_backends(args) == backends


@pytest.mark.parametrize("double_quantized", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (150, 48), (1000, 333)])
def test_packed_bytes_are_those_of_bitsandbytes(shape: tuple[int, int], double_quantized: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = bitsandbytes.nn.Params4bit(
        torch.randn(shape), requires_grad=False, compress_statistics=double_quantized, quant_type="nf4"
    ).to("cpu")
    state = weight.quant_state
    tensors = [weight, state.absmax, state.code]
    tensors += [state.offset, state.state2.absmax, state.state2.code] if double_quantized else []
    assert plan_memory.packed_bytes(shape[0] * shape[1], double_quantized) == sum(each.nbytes for each in tensors)
