"""What the program hands to its logger: names, values and steps, without any pattern."""

import functools

from .events import guarded


def install(events, module, step_now) -> None:
    """Wraps the logging calls of wandb, TensorBoard (torch's and tensorboardX) or MLflow. step_now: the optimiser's step."""
    name = module.__name__

    @guarded(events)
    def write(source, step, values) -> None:
        numbers = {key: number for key, value in values.items() if (number := _number(value)) is not None}
        if numbers:
            at = step_now()
            events.write("logged", source=source, step=int(at if step is None else step), at=at, values=numbers)

    if name == "wandb.sdk.wandb_run":
        _wrap(module.Run, "log", lambda self, data, step=None, *a, **k: write("wandb", step, data))
    elif name == "wandb":
        if not hasattr(module, "sdk"):  # a module of this name that is not the package
            _wrap(module, "log", lambda data, step=None, *a, **k: write("wandb", step, data))
    elif name == "mlflow.tracking.fluent":
        _wrap(module, "log_metrics", lambda metrics, step=None, *a, **k: write("mlflow", step, metrics))
        _wrap(module, "log_metric", lambda key, value, step=None, *a, **k: write("mlflow", step, {key: value}))
    else:
        writer = module.SummaryWriter
        _wrap(
            writer,
            "add_scalar",
            lambda self, tag, value, step=None, *a, **k: write("tensorboard", k.get("global_step", step), {tag: value}),
        )
        _wrap(
            writer,
            "add_scalars",
            lambda self, tag, values, step=None, *a, **k: write(
                "tensorboard", k.get("global_step", step), {f"{tag}/{key}": value for key, value in values.items()}
            ),
        )
    events.write("hooked", name=name)


def _wrap(owner, name, look) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        look(*args, **kwargs)
        return result

    setattr(owner, name, call)


def _number(value):
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
