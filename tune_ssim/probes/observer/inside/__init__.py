"""The observer inside a program's processes. Standard library and torch only; imports nothing until the program does."""

import json

from . import files
from .events import Events, guarded
from .imports import after_import


def start(settings_file: str) -> None:
    """Waits for torch and for loggers. settings_file: JSON with `folder`, `level`, `hold`, `weights`."""
    with open(settings_file, encoding="utf-8") as file:
        settings = json.load(file)
    events = Events(settings["folder"])
    guarded(events)(files.install)(events)
    state = {}

    @guarded(events)
    def optimiser(module) -> None:
        from . import steps

        state["steps"] = steps.install(events, settings)

    @guarded(events)
    def clip(module) -> None:
        from . import clips

        clips.install(events, module)

    @guarded(events)
    def sharded(module) -> None:
        from . import clips

        clips.install_fsdp(events, module)

    @guarded(events)
    def scaler(module) -> None:
        from . import steps

        steps.install_scaler(events, module)

    @guarded(events)
    def weights(module) -> None:
        from . import weights

        weights.install(events, module)

    @guarded(events)
    def logger(module) -> None:
        from . import loggers

        loggers.install(events, module, lambda: state["steps"].step if "steps" in state else 0)

    after_import(
        {
            "torch.optim.optimizer": optimiser,
            "torch.nn.utils.clip_grad": clip,
            "torch.distributed.fsdp.fully_sharded_data_parallel": sharded,
            "torch.amp.grad_scaler": scaler,
            "torch.nn.modules.module": weights,
            "torch.serialization": weights,
            "safetensors": weights,
            "safetensors.torch": weights,
            "wandb.sdk.wandb_run": logger,
            "wandb": logger,
            "torch.utils.tensorboard.writer": logger,
            "tensorboardX.writer": logger,
            "mlflow.tracking.fluent": logger,
        }
    )
