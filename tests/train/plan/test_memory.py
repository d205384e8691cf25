"""Bytes that follow from parameters alone, by hand and against the optimizers and 4-bit layers they are of."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from train.config import MoveKDSFTConfig
from train.plan import memory as plan_memory


class Layer(nn.Module):
    def __init__(self, size: int, trains: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size), requires_grad=trains)


class Student(nn.Module):
    """4000 trained parameters and 1000 frozen ones; 50 of the trained ones are outside layers."""

    _no_split_modules = ["Layer"]

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.ModuleList([*(Layer(100) for _ in range(39)), Layer(50)])
        self.vision_tower = nn.ModuleList(Layer(100, trains=False) for _ in range(10))
        self.projector = nn.Linear(49, 1)


@pytest.mark.parametrize(
    ("backend", "half", "expected"),
    [
        ("DDP", True, (20_000, 16_000, 32_000, 16_000)),
        ("ZeRO-2", True, (10_000, 2_000, 12_000, 8_000)),
        ("ZeRO-3", True, (2_500, 2_000, 12_000, 18_000)),
        ("FSDP2", True, (5_000, 4_000, 8_000, 500)),
        ("DDP", False, (20_000, 16_000, 32_000, 16_000)),
        ("ZeRO-3", False, (5_000, 4_000, 12_000, 36_000)),
        ("FSDP2", False, (5_000, 4_000, 8_000, 1_000)),
    ],
)
def test_bytes_of_each_backend_by_hand(arguments, backend: str, half: bool, expected: tuple[int, ...]) -> None:
    args = arguments(bf16=half)[1]
    memory = plan_memory.sharded_memory(backend, Student(), args, 4)
    assert memory == dict(zip(("weights", "gradients", "optimizer", "buffers"), expected, strict=True))
    if backend in ("DDP", "FSDP2"):  # one GPU has nobody to exchange with
        assert plan_memory.sharded_memory(backend, Student(), args, 1)["buffers"] == 0


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
    if name not in plan_memory.TORCH_OPTIMIZERS:
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
    planned = [plan_memory.optimizer_bytes(name, 4, weight.numel(), id(weight) in embeddings) for weight in trained]
    assert sum(planned) == real


def test_optimizers_that_are_not_known_are_refused(arguments) -> None:
    unknown = {name.value for name in OptimizerNames} - set(plan_memory.OPTIMIZERS)
    assert {"lomo", "galore_adamw", "ademamix", "adamw_torch_8bit", "adafactor", "sgd"} <= unknown
    args = arguments()[1]
    for name in sorted(unknown):
        args.optim = name
        with pytest.raises(ValueError, match=f"`optim` is {name} .*adamw_torch, adamw_torch_fused"):
            plan_memory.optimizer_name(args)
    args.optim, args.optim_args = OptimizerNames.ADAMW_TORCH, "amsgrad=true"
    with pytest.raises(ValueError, match="`optim` is adamw_torch with `optim_args` amsgrad=true"):
        plan_memory.optimizer_name(args)


@pytest.mark.parametrize(
    ("settings", "backends"),
    [
        ({}, plan_memory.BACKENDS),
        ({"optim": "paged_adamw_8bit"}, ("DDP", "ZeRO-2", "ZeRO-3")),
        ({"language_lora_rank": 8}, plan_memory.BACKENDS),
        ({"language_lora_rank": 8, "load_in_4bit": True}, ("DDP",)),
    ],
)
def test_backends_that_can_run_a_recipe(arguments, settings: dict, backends: tuple[str, ...]) -> None:
    args: MoveKDSFTConfig = arguments(**settings)[1]
    assert plan_memory.usable_backends(args) == backends


@pytest.mark.parametrize("shape", [(64, 64), (150, 48), (1000, 333)])
def test_packed_bytes_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = bitsandbytes.nn.Params4bit(
        torch.randn(shape), requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to("cpu")
    state = weight.quant_state
    tensors = [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert plan_memory.packed_bytes(shape[0] * shape[1]) == sum(each.nbytes for each in tensors)
