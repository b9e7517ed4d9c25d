"The kernels on a GPU: what they should take by a model, and what they take."
