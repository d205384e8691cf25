"""
FSDP2 on processors, which accelerate has for accelerators alone: told to use the CPU it runs DDP and says nothing.

Started by `accelerate launch` in the place of `tests/helpers/launched.py`, with the same arguments. Only for tests:
the class that decides is changed in these processes; what is shipped calls accelerate as it is. The facts of a run
hold, beside those of `launched.py`, what was really spread over the processes.
"""

import sys
from pathlib import Path
from typing import Any

import torch


SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from tests.helpers import launched  # noqa: E402
from tests.helpers.launched import RecordingTrainer  # noqa: E402


class CpuAcceleratorState(AcceleratorState):
    """Takes FSDP where it is asked for, also on the CPU."""

    def __init__(self, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class FsdpRecordingTrainer(RecordingTrainer):
    """Notes what was spread while it trained."""

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
