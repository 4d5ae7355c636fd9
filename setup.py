"""Package metadata. Reads the version as text, so that installing never imports the package or jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

INSTALL_REQUIRES = [
    "absl-py>=2.1",
    "datasets>=4.0",
    "etils[epath]>=1.10",  # paths in buckets; comes with orbax
    "flax>=0.12.8",
    "fsspec>=2025.3",  # comes with datasets
    "huggingface_hub>=1.0",
    "jax>=0.10.2,<0.13",
    "jinja2>=3.1",  # chat templates
    "latex2sympy2_extended>=1.11",
    "math-verify>=0.9",
    "mpmath",
    "ml_collections>=1.0",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "pebble>=5.1",
    "protobuf>=5.0",  # sentencepiece tokenizers
    "pyarrow>=21.0",  # comes with datasets
    "rich>=13.7",
    "safetensors>=0.5",
    "scipy>=1.13",  # comes with jax
    "sentencepiece>=0.2",
    "sympy>=1.13",
    "tensorboardX>=2.6.2",
    "tokenizers>=0.22",
    "transformers>=5.0",
]

# With libtpu, of the version that belongs to jax: for igrpo_jax.aot on a machine without a TPU too.
TPU = ["jax[tpu]>=0.10.2,<0.13"]
GS = ["gcsfs>=2025.5"]  # what reaches gs://
REPORT = ["matplotlib>=3.9"]  # plots of igrpo_jax.report
STUDY = REPORT  # plots of benchmarks/matched_budget.py
S3 = ["s3fs>=2025.5"]
NOTEBOOK = ["ipykernel>=6.29", "nbclient>=0.10"]  # what runs notebooks/colab_tpu.ipynb in tests
# What a change needs before it is shown to others: fast tests, linter, types.
DEV = [
    "gcp-storage-emulator>=2026.1",
    "hypothesis>=6.100",
    "mypy>=1.15",
    "openai>=2.0",
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.17.6,<0.18",
    *GS,
    *STUDY,
]

EXTRAS_REQUIRE = {
    "tpu": TPU,
    "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
    "judge": ["openai>=2.0"],  # the generative judge, rewards.judge
    "gs": GS,
    "s3": S3,
    "report": REPORT,
    "study": STUDY,
    "tensorboard": ["tensorboard>=2.18"],  # the viewer of workdir/tensorboard, which tensorboardX writes
    # log.trackers
    "wandb": ["wandb>=0.19"],
    "trackio": ["trackio>=0.20"],
    "mlflow": ["mlflow>=3.0"],  # mlflow-skinny is enough with an MLFLOW_TRACKING_URI
    "dev": DEV,
    "test": [*DEV, *S3, "flask-cors>=5.0", "moto[s3]>=5.1", *NOTEBOOK, *TPU],  # moto: a stand-in of s3://
    "pages": ["PySide6>=6.8", "websockets>=13"],  # Qt's browser, for tests of the report's pages without a Chromium
    # What decoder, objectives and LoRA are compared with.
    "parity": ["torch==2.13.0", "trl==1.16.0", "peft>=0.18,<1"],
}


def version() -> str:
    text = (ROOT / "igrpo_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


setup(
    name="igrpo-jax",
    version=version(),
    description="iGRPO reinforcement learning of reasoning models in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["igrpo_jax", "igrpo_jax.*"]),
    package_data={"igrpo_jax.report": ["templates/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["igrpo-jax=igrpo_jax.__main__:main"]},
)
