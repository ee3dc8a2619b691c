"""Target `cuda`: quantized layers as kernels of our own, on NVIDIA GPUs from sm_80 on."""
