"""Language models around their training objective, in JAX and Flax."""
