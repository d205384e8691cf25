"""
FSDP2 on CPUs, for tests. On CPUs accelerate itself runs DDP in place of FSDP, without a message.

Started by `accelerate launch` with the same arguments as `tests/helpers/launched.py`. It replaces accelerate's class
that chooses the backend, in these processes only. The record of a run also says what was sharded.
"""

import sys
from pathlib import Path
from typing import Any

import torch


SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.helpers import launched
from tests.helpers.launched import RecordingTrainer


class CpuAcceleratorState(AcceleratorState):
    """Chooses FSDP if it is asked for, also on CPUs."""

    def __init__(self, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class FsdpRecordingTrainer(RecordingTrainer):
    """Records what was sharded."""

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.wrapped = model
        return super().compute_loss(model, *args, **kwargs)

    def facts(self) -> dict[str, Any]:
        parameters = dict(self.wrapped.named_parameters())
        plugin = self.accelerator.state.fsdp_plugin
        return {
            "world_size": torch.distributed.get_world_size(),
            "backend": torch.distributed.get_backend(),
            "distributed_type": self.accelerator.distributed_type.value,
            "fsdp_version": plugin.fsdp_version,
            "state_dict_type": plugin.state_dict_type.name,
            "called": [name for name, _ in self.called],
            "is_fsdp_module": isinstance(self.wrapped, FSDPModule),
            "fsdp_modules": sorted(
                name for name, part in self.wrapped.named_modules() if isinstance(part, FSDPModule)
            ),
            "whole": sorted(name for name, value in parameters.items() if not isinstance(value, DTensor)),
            "trainable": sum(value.requires_grad for value in parameters.values()),
            "images": self.images,
            "log_history": self.state.log_history,
        }


if __name__ == "__main__":
    import accelerate.accelerator

    accelerate.accelerator.AcceleratorState = CpuAcceleratorState
    launched.RecordingTrainer = FsdpRecordingTrainer
    launched.main(sys.argv[1:])
