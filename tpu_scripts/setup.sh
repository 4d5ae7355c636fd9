#!/usr/bin/env bash
# Installs this checkout, as it is now, on all workers of a slice, and mounts the shared folder there unless it is a
# bucket. Run it after every change and after a reboot, but not during a run.
#
#   tpu_scripts/setup.sh --name NAME --zone ZONE --shared gs://BUCKET [--environment FILE] [--dry-run]
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

parse_flags name zone project shared environment -- "$@"
setup_slice
