"""The paper's experiments: optimizers with curvature beside SGD and Adam, on its test problems."""
