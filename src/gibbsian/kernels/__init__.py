"""How one chain moves: one family of kernels per file."""
