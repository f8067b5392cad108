"""nlx kernels."""
