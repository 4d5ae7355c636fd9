#!/usr/bin/env bash
# Follows what a run says on all workers, each line under the number of its worker; Ctrl-C ends the following alone.
#
#   tpu_scripts/logs.sh --name NAME --zone ZONE --run RUN
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

parse_flags name zone project run -- "$@"
on all "$ON_WORKER follow ${FLAG[run]}"
