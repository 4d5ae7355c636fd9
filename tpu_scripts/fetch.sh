#!/usr/bin/env bash
# Copies the folder of a run and its logs to this machine: metrics, samples and evaluations; with --checkpoints also its
# checkpoints and export. It needs a running slice (--name, --zone), except when it copies from a bucket.
#
#   tpu_scripts/fetch.sh --shared gs://BUCKET --run RUN [--checkpoints] [--to DIR]
#   tpu_scripts/fetch.sh --shared HOST:/EXPORT --run RUN --name NAME --zone ZONE [--checkpoints] [--to DIR]
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

FLAG[name]=-
FLAG[zone]=-
FLAG[to]=runs
MEANS[to]="folder here that gets the folders RUN and RUN.logs"
SWITCH[checkpoints]=""
MEANS[checkpoints]="with checkpoints and export"
parse_flags name zone project shared run to checkpoints -- "$@"
run=${FLAG[run]} to=${FLAG[to]}
if [[ ${FLAG[shared]} == gs://* ]]; then
  run mkdir -p "$to/$run" "$to/$run.logs"
  copy=(gcloud storage rsync --recursive)
  [[ ${FLAG[project]} == - ]] || copy+=("--project=${FLAG[project]}")
  logs=("${copy[@]}")
  [[ ${SWITCH[checkpoints]} ]] || copy+=('--exclude=^(checkpoints|damaged_checkpoints|export|reference)/')
  run "${copy[@]}" "${FLAG[shared]}/runs/$run" "$to/$run"
  # Runs on GKE have no logs there, and others have none in their first minute.
  run "${logs[@]}" "${FLAG[shared]}/runs/$run.logs" "$to/$run.logs" || echo "fetch.sh: no logs of $run yet" >&2
else
  [[ ${FLAG[name]} != - && ${FLAG[zone]} != - ]] ||
    die "--name, --zone: missing; ${FLAG[shared]} is read through a worker"
  left_out="--exclude=$run/checkpoints --exclude=$run/damaged_checkpoints --exclude=$run/export --exclude=$run/reference"
  [[ ! ${SWITCH[checkpoints]} ]] || left_out=""
  run mkdir -p "$to"
  # Logs may be missing as above. tar ends with 1 where a file has grown while it was read, as in a run under way.
  with_logs="\$([ -d shared/runs/$run.logs ] && echo $run.logs || echo fetch.sh: no logs of $run yet >&2)"
  on 0 "tar -czf run.tar.gz $left_out -C shared/runs $run $with_logs || [ \$? = 1 ]"
  tpus tpu-vm scp "${FLAG[name]}:run.tar.gz" "$to/$run.tar.gz" --worker=0
  run "${GCLOUD[@]}"
  run tar -xzf "$to/$run.tar.gz" -C "$to"
  run rm "$to/$run.tar.gz"
fi
