"""The kernels: operators (ops), their compiled implementation (native) and specification (reference)."""
