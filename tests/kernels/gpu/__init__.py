"""Of kernels/gpu: on a GPU as they are, without one in Triton's interpreter on the CPU."""
