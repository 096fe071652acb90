"""Where a model runs."""

from __future__ import annotations

import re

import torch


def choose(name: str) -> torch.device:
    """The device called `name`: auto (CUDA where there is one), cpu, cuda (the first one) or cuda:N; with its number.

    On CUDA, float32 is float32 from then on: cuDNN's convolutions would round to TF32, by PyTorch's default, which its
    matrix products do not and a CPU does not.

    Raises:
        ValueError: for another name, or a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    number = device.index or 0
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"device: {name} is not there; PyTorch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices: "
            "is it a CUDA build, is the driver new enough for it (nvidia-smi), and does a container get the GPU?"
        )
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", number)
