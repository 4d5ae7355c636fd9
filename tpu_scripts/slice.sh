# shellcheck shell=bash
# The steps of a slice of TPUs: request it, wait for it, set it up, launch on it, delete it. It is sourced, never run.
#
# Only gcloud reaches the cloud, so a stub on PATH can replace it in tests (tests/test_tpu_scripts.py).

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# tpus COMMAND... puts the gcloud command line for this zone and project into GCLOUD.
tpus() {
  GCLOUD=(gcloud compute tpus "$@" "--zone=${FLAG[zone]}" --quiet)
  [[ ${FLAG[project]} == - ]] || GCLOUD+=("--project=${FLAG[project]}")
}

# on WORKERS COMMAND runs a line of shell on one worker, or on all.
on() {
  tpus tpu-vm ssh "${FLAG[name]}" "--worker=$1" "--command=$2"
  run "${GCLOUD[@]}"
}

# to_all FILE NAME copies a file to the home folder of every worker.
to_all() {
  tpus tpu-vm scp "$1" "${FLAG[name]}:$2" --worker=all
  run "${GCLOUD[@]}"
}

# accelerator TOPOLOGY prints gcloud's accelerator type. Types of v4 and v5p count cores, two per chip.
accelerator() {
  local sizes=${1#*:} chips
  chips=$((${sizes//x/*}))
  case ${1%%:*} in
    v4) echo "v4-$((2 * chips))" ;;
    v5p) echo "v5p-$((2 * chips))" ;;
    v5e) echo "v5litepod-$chips" ;;
    v6e) echo "v6e-$chips" ;;
  esac
}

# runtime TOPOLOGY prints the image of its VMs (https://docs.cloud.google.com/tpu/docs/runtimes).
runtime() {
  case ${1%%:*} in
    v4) echo tpu-ubuntu2204-base ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v5e) echo v2-alpha-tpuv5-lite ;;
    v6e) echo v2-alpha-tpuv6e ;;
  esac
}

# The steps of a slice. A step that fails prints the reason and returns 1; the caller may end or try again.

create_slice() {
  tpus queued-resources create "${FLAG[name]}" "--node-id=${FLAG[name]}" \
    "--accelerator-type=$(accelerator "${FLAG[topology]}")" "--runtime-version=$(runtime "${FLAG[topology]}")"
  [[ ! ${SWITCH[spot]} ]] || GCLOUD+=(--spot)
  run "${GCLOUD[@]}" || {
    echo "slice ${FLAG[name]} cannot be asked for, see above; if it is there: setup.sh, resume.sh or delete.sh" >&2
    return 1
  }
}

# request_state prints ACTIVE, SUSPENDED, ...; GONE if there is no such request, UNKNOWN if gcloud cannot tell.
request_state() {
  state_of queued-resources state.state
}

# state_of KIND FIELD prints the state of the request or of the slice, in the same words.
state_of() {
  local errors state
  tpus "$1" describe "${FLAG[name]}" "--format=value($2)"
  errors=$(mktemp)
  if state=$("${GCLOUD[@]}" 2>"$errors"); then
    echo "${state:-UNKNOWN}"
  elif grep -q NOT_FOUND "$errors"; then
    echo GONE
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm "$errors"
}

# await_slice waits until the request is granted, which may take days. A FAILED or SUSPENDED request never is.
await_slice() {
  local state
  tpus queued-resources describe "${FLAG[name]}" "--format=value(state.state)"
  [[ ! ${SWITCH[dry-run]} ]] || { run "${GCLOUD[@]}" && return; }
  while true; do
    state=$(request_state)
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | GONE)
        echo "the request for slice ${FLAG[name]} is $state; why: ${GCLOUD[*]/--format*/}; delete.sh takes it back" >&2
        return 1
        ;;
      *) echo "the request for slice ${FLAG[name]} is $state; looking again in ${FLAG[poll]} s" ;;
    esac
    sleep "${FLAG[poll]}"
  done
}

# Packs the checkout $0 into the archive $1, with uncommitted files and without the files that git ignores.
# shellcheck disable=SC2016 # the bash that runs this expands it
PACK='cd "$0" && git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d "" file; do [[ ! -e $file ]] || printf "%s\0" "$file"; done |
  tar --null --files-from=- -czf "$1"'

UNPACK="rm -rf igrpo_jax && mkdir igrpo_jax && tar -xzf igrpo_jax.tar.gz -C igrpo_jax"
ON_WORKER="bash igrpo_jax/tpu_scripts/on_worker.sh"

# setup_slice puts this checkout, its environment and the shared folder on all workers.
setup_slice() {
  local root folder=. done=""
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [[ ${SWITCH[dry-run]} ]] || folder=$(mktemp -d)
  if run bash -o pipefail -c "$PACK" "$root" "$folder/igrpo_jax.tar.gz" &&
    to_all "$folder/igrpo_jax.tar.gz" igrpo_jax.tar.gz &&
    if [[ ${FLAG[environment]} != - ]]; then to_all "${FLAG[environment]}" environment; fi &&
    on all "$UNPACK && $ON_WORKER setup ${FLAG[shared]}"; then
    done=yes
  else
    echo "not all workers of slice ${FLAG[name]} are set up; which and why stands above; then: setup.sh again" >&2
  fi
  [[ $folder == . ]] || rm -r "$folder"
  [[ $done ]]
}

# check_arguments ARGUMENTS_OF_MAIN... checks them before anything is requested.
check_arguments() {
  local word config="" is_config=""
  (($#)) || die "give the arguments of igrpo_jax.main after --, such as -- --config configs/tpu_v5p.py"
  for word in "$@"; do
    [[ $word != --workdir* ]] || die "$word: the folder is that of --run in the shared folder; leave --workdir out"
    if [[ $is_config || $word == --config=* ]]; then config=${word#--config=}; fi
    is_config=""
    if [[ $word == --config ]]; then is_config=yes; fi
  done
  check_config "$config"
}

# check_config FILE ends unless the workers will have the file: setup.sh sends the checkout without what git ignores. A
# file in the shared folder, ../shared/..., cannot be seen from here.
check_config() {
  local root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [[ $1 ]] || die "--config: missing; name the configuration file, such as -- --config configs/tpu_v5p.py"
  [[ $1 != ../shared/* ]] || return 0
  [[ $1 != /* && $1 != ../* ]] || die "--config $1: is not in the checkout, which the workers get; give a path in $root"
  [[ -f $root/$1 ]] || die "--config $1: no such file in $root; see $root/configs"
  ! git -C "$root" check-ignore -q "$1" || die "--config $1: git ignores it, so the workers do not get it; move the file"
}

# launch_run ARGUMENTS_OF_MAIN... starts the run on all workers, each in its own tmux session.
launch_run() {
  local run=${FLAG[run]}
  on all "$ON_WORKER start $(printf '%q ' "$run" "$@")" || {
    echo "run $run was not started on all workers; which and why stands above; the others end by themselves" >&2
    return 1
  }
}

delete_slice() {
  tpus queued-resources delete "${FLAG[name]}" --force
  run "${GCLOUD[@]}"
}
