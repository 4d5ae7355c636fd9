# shellcheck shell=bash
# What the scripts of this folder share: flags, running or printing commands, GPU settings. It is sourced, never run.

# Flags with a value that a script may take: the default ("" = required, - = no value), the form, and the meaning.
declare -A FLAG=([name]="" [zone]="" [project]=- [topology]="" [shared]="" [run]=igrpo [environment]=- [poll]=30)
# The grids that Google offers (docs.cloud.google.com/tpu/docs/v5e, v6e, v5p and v4), as regular expressions.
FLAT='1x1|2x2|2x4|4x4|4x8|8x8|8x16|16x16'
CUBE='2x2x[124]|2x4x4|(4|8|12|16|20|24)(x(4|8|12|16|20|24)){2}'
declare -A FORM=(
  [name]='^[a-z][a-z0-9-]*$'
  [zone]='^[a-z0-9-]+$'
  [topology]="^((v5e|v6e):($FLAT)|(v4|v5p):($CUBE))\$"
  [shared]='^(gs://[a-z0-9][a-z0-9._-]*|[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]+)$'
  [run]='^[A-Za-z0-9_-]+$'
  [poll]='^[0-9]+$'
)
declare -A MEANS=(
  [name]="name of the slice and of the request for it: small letters, digits, -"
  [zone]="zone of the slice, such as us-east5-a"
  [project]="Google Cloud project; without it gcloud's own"
  [topology]="chips and their grid, as for igrpo_jax.aot: v5e or v6e with ${FLAT//|/, }; v5p or v4 with 2x2x1, 2x2x2, 2x2x4, 2x4x4, or three multiples of 4 up to 24"
  [shared]="folder that all workers share: gs://BUCKET, or HOST:/EXPORT of an NFS server such as Filestore"
  [run]="name of the run, of its tmux session and folder: letters, digits, _ and -"
  [environment]="file of NAME=value lines for the run, such as HF_TOKEN and WANDB_API_KEY; copied, never printed"
  [poll]="seconds between two looks at the cloud: a whole number"
  [spot]="ask for a spot slice: cheap, and taken back at any time"
  [dry-run]="print the commands only"
)
declare -A SWITCH=([spot]="" [dry-run]="") # flags without a value
REST=()                                    # the arguments after --

# Slurm (before a time limit) and Kubernetes are told to wait 120 s between SIGTERM and the kill, and a run would give up
# saving after 25 s. It comes before the user's own arguments, which win.
GRACE=--config.checkpoint.preemption_grace=110

# die MESSAGE ends after bad input. fail MESSAGE ends after an error with good input.
die() {
  echo "${0##*/}: error: $*" >&2
  exit 2
}

fail() {
  echo "${0##*/}: error: $*" >&2
  exit 1
}

# parse_flags FLAG_OF_THIS_SCRIPT... -- ARGUMENTS fills FLAG, SWITCH and REST.
parse_flags() {
  local allowed=() name
  while [[ $1 != -- ]]; do
    allowed+=("$1")
    shift
  done
  shift
  allowed+=(dry-run)
  while (($#)); do
    case $1 in
      --help | -h) usage "${allowed[@]}" && exit 0 ;;
      --) shift && REST=("$@") && break ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
      --*) name=${1#--} ;;
      *) die "$1: not understood; see --help" ;;
    esac
    [[ " ${allowed[*]} " == *" $name "* ]] || die "--$name: no such flag; there are ${allowed[*]/#/--}"
    if [[ -v SWITCH[$name] ]]; then
      SWITCH[$name]=yes
      shift
    else
      (($# > 1)) || die "--$name: needs a value: ${MEANS[$name]}"
      FLAG[$name]=$2
      shift 2
    fi
  done
  for name in "${allowed[@]}"; do
    check_flag "$name"
  done
  [[ ${SWITCH[dry-run]} ]] || command -v gcloud >/dev/null ||
    die "gcloud: not on PATH; install the Google Cloud CLI (cloud.google.com/sdk/docs/install), then: gcloud auth login"
}

check_flag() {
  [[ ! -v SWITCH[$1] && ${FLAG[$1]} != - ]] || return 0
  [[ ${FLAG[$1]} ]] || die "--$1: missing; give the ${MEANS[$1]}"
  [[ ! -v FORM[$1] || ${FLAG[$1]} =~ ${FORM[$1]} ]] || die "--$1 ${FLAG[$1]}: must be the ${MEANS[$1]}"
  [[ $1 != environment || -r ${FLAG[$1]} ]] || die "--environment ${FLAG[$1]}: no such file, or it cannot be read"
  [[ $1 != environment ]] || check_environment "${FLAG[$1]}"
}

# check_environment FILE ends before anything is asked of the cloud, unless on_worker.sh can read all lines of the file.
# The line may be a part of a secret, so only its number is printed.
check_environment() {
  local wrong
  wrong=$(grep -anvEm1 '^[[:space:]]*(#.*|(export[[:space:]]+)?[A-Za-z_][A-Za-z0-9_]*=.*)?$' "$1") || return 0
  die "--environment $1: line ${wrong%%:*} is not NAME=value; give each variable a line of its own, and comments a #"
}

# usage FLAGS... prints the comment at the head of the script, and its flags.
usage() {
  local name default
  head_of_script
  for name in "$@"; do
    default=${FLAG[$name]-}
    default=${default#-}
    printf '  --%-13s%s%s\n' "$name" "${MEANS[$name]}" "${default:+ (default $default)}"
  done
}

head_of_script() {
  sed -n '2,/^[^#]/ { /^#SBATCH/d; s/^# \{0,1\}//p }' "$0"
}

# run COMMAND... runs the command, or with --dry-run prints it as it could be typed.
run() {
  if [[ ${SWITCH[dry-run]} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# gpu_environment sets XLA's settings for GPUs (docs/scaling.md has their sources) and keeps those that are set.
gpu_environment() {
  local name
  : "${XLA_CLIENT_MEM_FRACTION:=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}}"
  unset XLA_PYTHON_CLIENT_MEM_FRACTION # the old name: JAX refuses to start with both
  : "${XLA_FLAGS:=--xla_gpu_enable_latency_hiding_scheduler=true}"
  for name in XLA_CLIENT_MEM_FRACTION XLA_FLAGS; do
    export "${name?}"
    [[ ! ${SWITCH[dry-run]} ]] || echo "export $name=${!name@Q}"
  done
}
