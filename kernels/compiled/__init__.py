"""What the compiler made of the kernels, read from the machine code."""
