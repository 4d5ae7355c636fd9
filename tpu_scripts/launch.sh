#!/usr/bin/env bash
# Starts or resumes a run on all workers. The arguments of igrpo_jax.main follow after --, without --workdir.
#
#   tpu_scripts/launch.sh --name NAME --zone ZONE --run RUN -- --config configs/tpu_v5p.py --config.steps=100
#
# Each worker runs it in a tmux session RUN. Its output is in logs/RUN on the worker, and every minute it is copied to
# runs/RUN.logs in the shared folder. Follow it with logs.sh. On a spot slice use resume.sh, which launches the run and
# resumes it after a preemption.
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

parse_flags name zone project run -- "$@"
check_arguments "${REST[@]}"
launch_run "${REST[@]}"
