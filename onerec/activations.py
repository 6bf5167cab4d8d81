"""Names of the experts' activations, which both the operations and the kernels know."""

GATED = ("swiglu", "geglu")
PLAIN = ("gelu", "relu")
