"""Settings that must be in place before jax is imported. A GPU run overrides them from outside (JAX_PLATFORMS=cuda)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu would otherwise look for a TPU
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a download
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork and spawn
