"""The devices of this machine."""

import torch


def devices() -> list[str]:
    """The names of the devices of this machine that PyTorch can use."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu", *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()) if kind)]


def present(device: torch.device | str) -> torch.device:
    """The device, which is here.

    Args:
        device: it, or its name: "cpu", "cuda", "cuda:1".

    Raises:
        ValueError: it is not here, or there is no such device.
    """
    here = devices()
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"there is no device {device!r}; here are {', '.join(here)}") from None
    if found.type != "cpu" and str(found) not in here and (found.index is not None or f"{found}:0" not in here):
        built = found.type == "cuda" and torch.version.cuda is None and torch.version.hip is None
        why = f" (this PyTorch {torch.__version__} is built without CUDA)" if built else ""
        raise ValueError(f"the device {str(found)!r} is not here{why}; here are {', '.join(here)}")
    return found
