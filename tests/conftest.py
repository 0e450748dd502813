"""The strictest setting: eight host devices, warnings are errors, no silent rank promotion."""
import os

# Before JAX starts: the flag is read once.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tiny programs run once: they take longer to optimise than to run.
jax.config.update('jax_disable_most_optimizations', True)
