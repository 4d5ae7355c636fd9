#!/usr/bin/env bash
# Follows the output of a run on all workers; each line begins with the number of its worker. Ctrl-C ends only this
# command, not the run.
#
#   tpu_scripts/logs.sh --name NAME --zone ZONE --run RUN
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

parse_flags name zone project run -- "$@"
on all "$ON_WORKER follow ${FLAG[run]}"
