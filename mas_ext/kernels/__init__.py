"""The kernels, one file each: specification in plain PyTorch, compiled call, operator and gradient."""
