"""The GPU kernels without a GPU: compiled, executed lane by lane, counted and budgeted."""
