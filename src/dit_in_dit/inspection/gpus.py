"""GPUs by name: memory, and peak rate of products, from NVIDIA's data sheets."""

from __future__ import annotations

# name: memory in GB, peak of dense bfloat16 products in TFLOPS
GPUS = {
    "a100": (80, 312),
    "h100": (80, 989),
    "h200": (141, 989),
    "b200": (180, 2250),
    "l40s": (48, 362),
    "rtx4090": (24, 165),
}
# The driver's names of devices with these peaks. Others with the chip (H100 PCIe, NVL, MIG) have lower peaks.
DRIVER_NAMES = {
    "A100-SXM4-40GB": "a100",
    "A100-SXM4-80GB": "a100",
    "A100-PCIE-40GB": "a100",
    "A100 80GB PCIe": "a100",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "B200": "b200",
    "L40S": "l40s",
    "GeForce RTX 4090": "rtx4090",
}


def peak_flops(driver_name: str) -> float | None:
    """Peak of dense bfloat16 products in FLOPs per second of the device with this name; None if unknown."""
    name = DRIVER_NAMES.get(driver_name.removeprefix("NVIDIA "))
    return GPUS[name][1] * 1e12 if name else None
