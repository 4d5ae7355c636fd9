#!/usr/bin/env bash
# Starts a run on all workers, or goes on with it: after -- stand the arguments of igrpo_jax.main, without --workdir.
#
#   tpu_scripts/launch.sh --name NAME --zone ZONE --run RUN -- --config configs/tpu_v5p.py --config.steps=100
#
# Each worker runs it in a tmux session RUN. What it says is in logs/RUN of the worker, and each minute it is copied to
# runs/RUN.logs of the shared folder. Follow it with logs.sh; on a spot slice use resume.sh, which launches it and goes
# on after a preemption.
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

parse_flags name zone project run -- "$@"
check_arguments "${REST[@]}"
launch_run "${REST[@]}"
