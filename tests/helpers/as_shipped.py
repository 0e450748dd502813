"""The flags of XLA for tests, and compiler options for those whose result depends on the kernels that users run."""
import importlib.metadata

# From version 0.11 on, jaxlib has no switch of its fusion emitters.
_HAS_SWITCH = tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 11)
OPTIONS = {'xla_cpu_use_fusion_emitters': True} if _HAS_SWITCH else {}
# Programs compile in half the time without the newer fusion emitters.
QUICK = '--xla_cpu_parallel_codegen_split_count=1' + ' --xla_cpu_use_fusion_emitters=false' * _HAS_SWITCH
