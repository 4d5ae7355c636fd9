#!/usr/bin/env bash
# Keeps a run going until it is done, from any state: it requests the slice if there is none, sets it up, launches the
# run and watches it. If the slice was taken back (its request is SUSPENDED or FAILED, or it is not there any more), it
# deletes the slice, requests a new one and launches the same command. If the run ended with 75 (preempted), or with 69
# (a process on another worker is gone) on a slice that is still there, it launches the run again.
#
#   tpu_scripts/resume.sh --name NAME --zone ZONE --topology v5p:2x2x2 --spot --shared gs://BUCKET --run RUN \
#       -- --config configs/tpu_v5p.py --config.steps=100
#
# Run it in tmux on a machine that stays up and is not part of the slice. You can stop and restart it at any time.
# It ends with 0 when the run is done, and with 1 when the run failed for another reason or --restarts are used up. The
# slice stays until delete.sh deletes it.
#
set -euo pipefail
# shellcheck source=tpu_scripts/slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/slice.sh"

PREEMPTED=75 LOST=69 # exit codes of igrpo_jax.main
FLAG[restarts]=100
FORM[restarts]='^[0-9]+$'
MEANS[restarts]="how often to start again before giving up: a whole number"
parse_flags name zone project topology spot shared environment run poll restarts -- "$@"
check_arguments "${REST[@]}"

attempts=0
launched="" # by this script on all workers, or found running
failed=""   # exit code of the run at the last check

# attempt WHY counts the attempts, and gives up after too many.
attempt() {
  ((attempts++ <= FLAG[restarts])) || fail "$1; --restarts ${FLAG[restarts]} are used up"
  echo "$1: attempt $attempts of $((FLAG[restarts] + 1))"
}

launch() {
  launched="" failed=""
  launch_run "${REST[@]}" && launched=yes
}

renew_slice() {
  launched=""
  create_slice && await_slice && setup_slice && launch
}

# slice_state prints READY, or the other state that the request or the slice is in; MISSING if the request says that
# there is a slice, and there is none.
slice_state() {
  local state
  state=$(request_state)
  if [[ $state == ACTIVE ]]; then
    state=$(state_of tpu-vm state)
    state=${state/GONE/MISSING}
  fi
  echo "$state"
}

# run_state prints the exit code of the run on worker 0, "running", "absent", or "unknown" if there is no answer.
run_state() {
  local said
  said=$(on 0 "$ON_WORKER status ${FLAG[run]} || echo absent") || said=unknown
  echo "${said##*$'\n'}"
}

look_after_run() {
  local status
  status=$(run_state)
  case $status in
    running) ((attempts)) || launched=yes ;;
    unknown) echo "worker 0 does not answer; looking again in ${FLAG[poll]} s" ;;
    *)
      if [[ ! $launched ]]; then
        attempt "slice ${FLAG[name]} is there, run ${FLAG[run]} is not under way"
        setup_slice && launch
      elif [[ $status == 0 ]]; then
        echo "run ${FLAG[run]} is done: fetch.sh brings its results, delete.sh gives the slice back"
        exit 0
      elif [[ $status == "$PREEMPTED" || $status == absent ]]; then
        attempt "run ${FLAG[run]} was preempted ($status)"
        launch
      elif [[ $status != "$failed" ]]; then
        failed=$status # another worker may have been taken away, which the cloud does not report yet
      elif [[ $status == "$LOST" ]]; then
        attempt "run ${FLAG[run]} lost a process on another worker ($status)"
        launch
      else
        fail "run ${FLAG[run]} failed with exit code $status; why: logs.sh, or fetch.sh"
      fi
      ;;
  esac
}

if [[ ${SWITCH[dry-run]} ]]; then
  echo "# what it does after a preemption:"
  tpus queued-resources describe "${FLAG[name]}" "--format=value(state.state)"
  run "${GCLOUD[@]}"
  delete_slice
  renew_slice
  run_state
  exit 0
fi
while true; do
  state=$(slice_state)
  case $state in
    READY) look_after_run || true ;;
    SUSPENDED | FAILED | PREEMPTED | TERMINATED | MISSING)
      attempt "slice ${FLAG[name]} is $state, and is replaced"
      if delete_slice; then renew_slice || true; fi
      ;;
    GONE)
      attempt "there is no slice ${FLAG[name]}, and it is asked for"
      renew_slice || true
      ;;
    *) echo "slice ${FLAG[name]} is $state; looking again in ${FLAG[poll]} s" ;;
  esac
  sleep "${FLAG[poll]}"
done
