#!/usr/bin/env bash
# Requests a slice of TPUs (a queued resource), waits until it exists, and sets up all of its workers.
#
#   tpu_scripts/create.sh --name NAME --zone ZONE --topology v5p:2x2x2 --shared gs://BUCKET [--spot] [--dry-run]
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

parse_flags name zone project topology spot shared environment poll -- "$@"
create_slice
await_slice
setup_slice
