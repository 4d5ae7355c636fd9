#!/usr/bin/env bash
# Trains on all GPUs of this machine in one process. The arguments are those of igrpo_jax.main.
#
#   tpu_scripts/gpu_node.sh --config configs/gpu_h100.py --workdir runs/h100
#
# With --dry-run as the first argument it only prints the environment and the command. A run that gets SIGTERM saves and
# ends with 75; the same command resumes it. docs/scaling.md explains the settings and names their sources.
#
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  head_of_script && exit 0
elif [[ ${1:-} == --dry-run ]]; then
  SWITCH[dry-run]=yes
  shift
fi
(($#)) || die "give the arguments of igrpo_jax.main, such as --config configs/gpu_h100.py"
gpu_environment
[[ ! ${SWITCH[dry-run]} ]] || { run python -m igrpo_jax.main "$@" && exit; }
exec python -m igrpo_jax.main "$@" # instead of this shell, so that signals reach it
