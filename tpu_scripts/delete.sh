#!/usr/bin/env bash
# Deletes a slice and its request, after asking. The workers' disks are lost; the shared folder stays.
#
#   tpu_scripts/delete.sh --name NAME --zone ZONE [--yes]
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

SWITCH[yes]=""
MEANS[yes]="do not ask"
parse_flags name zone project yes -- "$@"
if [[ ! ${SWITCH[yes]}${SWITCH[dry-run]} ]]; then
  echo "slice ${FLAG[name]} in ${FLAG[zone]}, and all on its workers' disks, will be deleted; type its name to go on:"
  read -r answer || answer=""
  [[ $answer == "${FLAG[name]}" ]] || die "nothing is deleted; type ${FLAG[name]}, or give --yes"
fi
delete_slice
