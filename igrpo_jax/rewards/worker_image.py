"""What every worker of a pool begins with; imported by the server alone that workers are forks of (see `worker_start`).

The imports and tables of the mathematics take seconds and 100 MB, here once for all workers.
"""

import os

from igrpo_jax.rewards.worker_start import BLANK

os.environ.update(BLANK)  # before numpy is imported, which reads it

from igrpo_jax.rewards import verifier  # noqa: F401
from igrpo_jax.rewards.mathematics import grader

grader.warm_up()
