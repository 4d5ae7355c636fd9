#!/usr/bin/env bash
# The commands that the other scripts run on each worker, in its home folder. Do not run it by hand.
#
#   on_worker.sh setup SHARED      installs the environment, and mounts the shared folder as `shared`; a bucket is not
#                                  mounted, because igrpo_jax reads and writes it itself
#   on_worker.sh start RUN ARGS... starts `run` in a tmux session RUN, once the last session of that name is over
#   on_worker.sh run RUN ARGS...   runs the trainer; keeps its output and its exit code in logs/RUN
#   on_worker.sh status RUN        prints its exit code, "running", or "absent"
#   on_worker.sh follow RUN        prints its output as it comes, with the worker's number
set -Eeuo pipefail

setup() {
  [[ ! -f environment ]] || chmod 600 environment
  # The images' own Python is older than the package needs; uv brings one.
  python3 -m pip install --quiet --user uv
  [[ -d venv ]] || .local/bin/uv venv --quiet --python 3.12 venv
  .local/bin/uv pip install --quiet --python venv/bin/python -e 'igrpo_jax[tpu,judge,wandb,trackio,mlflow,gs]'
  rm -f bucket
  case $1 in
    gs://*) echo "$1" >bucket ;;
    *) mount_shared "$1" ;;
  esac
}

# mount_shared HOST:/EXPORT. What is mounted already stays, because a run may be using it.
mount_shared() {
  local mounted
  mkdir -p shared
  if ! mountpoint -q shared; then
    apt_get install nfs-common
    sudo mount -t nfs "$1" shared
    [[ -w shared ]] || sudo chown "$(id -un)" shared
  else
    mounted=$(findmnt -nro SOURCE --mountpoint "$PWD/shared" | tail -n 1) # the last one hides those below it
    [[ ${mounted%/} == "${1%/}" ]] || {
      echo "on_worker.sh: error: $(hostname): --shared $1: $mounted is mounted in its place; end the runs, then on each worker: sudo umount ~/shared" >&2
      exit 1
    }
  fi
  mkdir -p shared/runs
}

# runs prints the folder of all runs, as it is named from the checkout.
runs() {
  if [[ -f bucket ]]; then echo "$(<bucket)/runs"; else echo ../shared/runs; fi
}

# A machine that has just started is still updating itself and holds apt's lock.
apt_get() {
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq -y "$@" >/dev/null
}

# A worker whose part of a run has ended may have to wait until the others have ended too.
start() {
  local patience=120
  [[ -f bucket ]] || mountpoint -q shared || { echo "on_worker.sh: error: $(hostname): no shared folder; run setup.sh" >&2 && exit 1; }
  while tmux has-session -t "=$1" 2>/dev/null; do
    ((patience-- > 0)) || { echo "on_worker.sh: error: $(hostname): run $1 is still going on" >&2 && exit 1; }
    sleep 1
  done
  rm -f "logs/$1/exit_code"
  tmux new-session -d -s "$1" bash igrpo_jax/tpu_scripts/on_worker.sh run "$@"
}

run() {
  local name=$1 status=0 keeper
  shift
  mkdir -p "logs/$name"
  trap '' HUP # tmux sends it when it is ended first, as the machine is taken away
  trap : TERM # the trainer gets it too, and saves; its exit code must still be written
  while sleep 60; do keep "$name" || true; done >/dev/null 2>&1 &
  keeper=$!
  set -- "$@" --workdir "$(runs)/$name"
  # What fails before the trainer starts is in its log too, with an exit code, so that it is not taken for a preemption.
  (read_environment && cd igrpo_jax && exec ../venv/bin/python -m igrpo_jax.main "$@") 2>&1 |
    (trap '' TERM && exec tee -a "logs/$name/log.txt") || status=${PIPESTATUS[0]}
  kill "$keeper" 2>/dev/null || true
  keep "$name" || echo "on_worker.sh: the log could not be copied to the shared folder" >&2
  echo "$status" >"logs/$name/exit_code"
}

# read_environment exports the NAME=value lines of the file `environment`. A value is taken as it stands, because a
# secret may hold what a shell would expand. Another line is named by its number, because it may be a part of a
# secret.
read_environment() {
  local number=0 value
  local blank='^[[:space:]]*(#.*)?$' entry='^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$'
  local quoted="^'(.*)'\$|^\"(.*)\"\$"
  [[ -f environment ]] || return 0
  while read -r || [[ $REPLY ]]; do
    ((number += 1))
    [[ ! $REPLY =~ $blank ]] || continue
    [[ $REPLY =~ $entry ]] || {
      echo "on_worker.sh: error: $(hostname): line $number of the --environment file is not NAME=value; correct it, then: setup.sh" >&2
      return 2
    }
    value=${BASH_REMATCH[3]%"${BASH_REMATCH[3]##*[![:space:]]}"} # without the blanks, or a carriage return, at its end
    REPLY=${BASH_REMATCH[2]}
    [[ ! $value =~ $quoted ]] || value=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
    export "$REPLY=$value"
  done <environment
}

# Copies the output of a run to where it outlives the machine. A new slice has other host names.
keep() {
  local copy
  copy=$1.logs/$(hostname).txt
  if [[ -f bucket ]]; then
    gcloud storage cp --quiet "logs/$1/log.txt" "$(runs)/$copy"
  else
    mkdir -p "shared/runs/$1.logs" && cp "logs/$1/log.txt" "shared/runs/$copy"
  fi
}

status() {
  if [[ -f logs/$1/exit_code ]]; then
    cat "logs/$1/exit_code"
  elif tmux has-session -t "=$1" 2>/dev/null; then
    echo running
  else
    echo absent
  fi
}

follow() {
  local worker
  worker=$(curl -fs -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || hostname)
  tail -n 50 -F "logs/$1/log.txt" | sed -u "s/^/[$worker] /"
}

case ${1-} in
  setup | start | run | status | follow) ;;
  *) sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
cd ~
trap 'echo "on_worker.sh: error: $(hostname): $BASH_COMMAND" >&2' ERR
"$@"
