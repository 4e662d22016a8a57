"""Training methods inside other training loops: callbacks for Lightning and for the Hugging Face Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.train.lowrank._method import TrainingMethod
from rankfold.train.lowrank._method_file import read_method, write_method

FILE = "rankfold_method.safetensors"


def lightning_callback(run: TrainingMethod) -> Any:
    """Return a Lightning callback that applies a training method to the module being trained, or to a part of it.

    The gradient of the penalty is added before each optimiser step: after the gradients have been accumulated,
    reduced and unscaled, and before they are clipped. The state of the method is part of Lightning's checkpoints.
    Training stops when the method is finished, and raises an error if the loss is NaN or Inf. Needs automatic
    optimisation with a single optimiser.

    Args:
        run: such as `SVDTraining(module.net)`.

    Raises:
        RankfoldError: Lightning is not installed.

    Example:
        >>> import rankfold as rf
        >>> from torch import nn
        >>> form, _ = rf.train.svd_form(nn.Sequential(nn.Linear(8, 8)))
        >>> callback = lightning_callback(rf.train.SVDTraining(form))  # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
    """
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError as problem:
        raise RankfoldError(f"the callback needs Lightning: pip install lightning ({problem})") from problem
    seen = {"steps": 0}

    def begin(_: Any, trainer: Any, *__: Any) -> None:
        seen["steps"] = trainer.global_step

    def check(_: Any, trainer: Any, __: Any, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise RankfoldError(
                f"the loss is {loss.item()} in step {trainer.global_step + 1}: go back to the last checkpoint, and "
                "lower the learning rate or look for such values in the data"
            )

    def end_batch(_: Any, trainer: Any, *__: Any) -> None:
        if trainer.global_step > seen["steps"]:  # not every batch is a step where gradients are accumulated
            seen["steps"] = trainer.global_step
            run.step()

    def end_epoch(_: Any, trainer: Any, *__: Any) -> None:
        run.epoch()
        trainer.should_stop = trainer.should_stop or run.finished

    hooks = {
        "on_train_start": begin,
        "on_before_backward": check,
        "on_before_optimizer_step": lambda *_: run.backward(),
        "on_train_batch_end": end_batch,
        "on_train_epoch_end": end_epoch,
        "state_dict": lambda _: run.state_dict(),
        "load_state_dict": lambda _, state: run.load_state_dict(state),
    }
    return type("TrainingMethodCallback", (Callback,), hooks)()


def trainer_callback(run: TrainingMethod) -> Any:
    """Return a callback for the Hugging Face `Trainer` that applies a training method to the model being trained.

    The gradient of the penalty is added before each optimiser step, after the gradients have been clipped, so it is
    not clipped itself. With float16 keep `max_grad_norm` above 0, because the Trainer unscales gradients only where
    it clips them. The state of the method is written to each checkpoint directory and read when the Trainer resumes
    from one. Training stops when the method is finished.

    Args:
        run: such as `SVDTraining(model)`.

    Raises:
        RankfoldError: transformers is not installed.

    Example:
        >>> import rankfold as rf
        >>> from torch import nn
        >>> form, _ = rf.train.svd_form(nn.Sequential(nn.Linear(8, 8)))
        >>> callback = trainer_callback(rf.train.SVDTraining(form))  # doctest: +SKIP
        >>> Trainer(model=form, callbacks=[callback], ...).train()  # doctest: +SKIP
    """
    try:
        from transformers import TrainerCallback
    except ImportError as problem:
        raise RankfoldError(f"the callback needs transformers: pip install transformers ({problem})") from problem

    def file_of(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE

    def begin(_: Any, args: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step and file_of(args, state).is_file():
            read_method(file_of(args, state), run)

    def save(_: Any, args: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.is_world_process_zero and file_of(args, state).parent.is_dir():
            write_method(file_of(args, state), run)

    def end_epoch(_: Any, __: Any, ___: Any, control: Any, **____: Any) -> Any:
        run.epoch()
        control.should_training_stop = control.should_training_stop or run.finished
        return control

    hooks = {
        "on_train_begin": begin,
        "on_pre_optimizer_step": lambda *_, **__: run.backward(),
        "on_optimizer_step": lambda *_, **__: run.step(),
        "on_epoch_end": end_epoch,
        "on_save": save,
    }
    return type("TrainingMethodCallback", (TrainerCallback,), hooks)()
