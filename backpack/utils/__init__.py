"""Small helpers: sub-sampling, parameter vectors, module classes, Kronecker algebra, examples."""
