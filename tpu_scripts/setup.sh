#!/usr/bin/env bash
# Brings this checkout, as it is now, what it needs and the shared folder to all workers of a slice; again after every
# change and after a reboot, but not while a run is under way.
#
#   tpu_scripts/setup.sh --name NAME --zone ZONE --shared HOST:/EXPORT [--environment FILE] [--dry-run]
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

parse_flags name zone project shared environment -- "$@"
setup_slice
