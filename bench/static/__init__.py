"""What needs no GPU: kernels are compiled or interpreted, networks counted on fake tensors."""
