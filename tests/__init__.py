"""Tests of vit_jax."""

import importlib.metadata

# Most of the time goes into compiling small models once. Without LLVM's optimizations that takes half as long, and in
# one piece without fusion emitters a quarter. XLA ends at flags that it does not know: JAX 0.12 lacks the last one, and
# libtpu, which the planner's processes load, some of them.
FLAGS_OF_ALL = "--xla_backend_optimization_level=0"
XLA_FLAGS = f"{FLAGS_OF_ALL} --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
