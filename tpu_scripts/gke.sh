#!/usr/bin/env bash
# Starts or resumes a run on a slice of TPUs of a GKE cluster: a node pool, and a JobSet with a pod on each host. The
# arguments of igrpo_jax.main follow after --, without --workdir.
#
#   tpu_scripts/gke.sh --name NAME --zone ZONE --cluster CLUSTER --topology v5p:2x2x2 --spot --shared gs://BUCKET \
#       --image IMAGE --run RUN -- --config configs/tpu_v5p.py --config.steps=100
#
# The cluster needs JobSet (jobset.sigs.k8s.io). The image needs a checkout of this repository in its working directory,
# and `pip install -e '.[tpu,gs]'`, with `wandb` and other extras that the run needs. --account may write to the bucket,
# by Workload Identity. Where a pod ends, as after a preemption, JobSet starts all of them again, and the run resumes. The
# same command starts a run again that has ended, and leaves one under way as it is. A node pool of this name is used
# where it has the machine, the topology and the --spot of the command. `kubectl logs` shows a pod's output. To end it:
# `kubectl delete jobset RUN`, then `gcloud container node-pools delete NAME`. A secret is made of a file of NAME=value
# lines by `kubectl create secret generic SECRET --from-env-file FILE`, which takes quotes as a part of the value.
#
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FLAG[cluster]="" FLAG[image]="" FLAG[account]=default FLAG[secret]=- FLAG[restarts]=100
FORM[cluster]='^[a-z][a-z0-9-]*$'
FORM[image]='^[a-z0-9][A-Za-z0-9._/:@-]*$'
FORM[account]='^[a-z0-9][a-z0-9.-]*$'
FORM[secret]='^[a-z0-9][a-z0-9.-]*$'
FORM[shared]='^gs://[a-z0-9][a-z0-9._-]*$'
FORM[run]='^[a-z][a-z0-9-]*$'
MEANS[cluster]="GKE cluster, in the zone of --zone"
MEANS[image]="container image with this repository"
FORM[restarts]='^[0-9]+$'
MEANS[restarts]="how often JobSet starts all pods again before it gives up, whatever ended them: a whole number"
MEANS[account]="Kubernetes service account of the pods"
MEANS[secret]="Kubernetes secret whose entries the run gets as variables, such as HF_TOKEN and WANDB_API_KEY"
MEANS[shared]="bucket of runs, gs://BUCKET"
MEANS[run]="name of the run, of its JobSet and folder: small letters, digits, -"
MEANS[name]="name of the node pool: small letters, digits, -"
parse_flags name zone project cluster topology spot shared image account secret run restarts -- "$@"
command -v kubectl >/dev/null || [[ ${SWITCH[dry-run]} ]] || die "kubectl: not on PATH; gcloud components install kubectl"
[[ " ${REST[*]} " == *" --config"[\ =]* ]] || die "--config: missing; give it after --, such as -- --config configs/X.py"
[[ " ${REST[*]} " != *" --workdir"[\ =]* ]] || die "--workdir: the folder is that of --run in the bucket; leave it out"

# The machine with four chips of each generation, which GKE combines to slices; a slice of one chip has its own.
grid=${FLAG[topology]#*:}
chips=$((${grid//x/*}))
per_host=$((chips < 4 ? chips : 4))
case ${FLAG[topology]%%:*} in
  v4) machine=ct4p-hightpu-${per_host}t kind=tpu-v4-podslice ;;
  v5p) machine=ct5p-hightpu-${per_host}t kind=tpu-v5p-slice ;;
  v5e) machine=ct5lp-hightpu-${per_host}t kind=tpu-v5-lite-podslice ;;
  v6e) machine=ct6e-standard-${per_host}t kind=tpu-v6e-slice ;;
esac
hosts=$((chips / per_host))

# quoted WORD prints it as a string of JSON, which YAML reads too. Kubernetes would put a variable in place of $(NAME).
quoted() {
  local word=${1//\\/\\\\}
  # shellcheck disable=SC2016 # the text $(, not a command
  word=${word//'$('/'$$('}
  word=${word//\"/\\\"}
  word=${word//$'\n'/\\n}
  printf '"%s"' "${word//$'\t'/\\t}"
}

manifest() {
  local word arguments="" variables=""
  for word in "$GRACE" "${REST[@]}" --workdir "${FLAG[shared]}/runs/${FLAG[run]}"; do
    arguments+=", $(quoted "$word")"
  done
  [[ ${FLAG[secret]} == - ]] || variables="
                  envFrom:
                    - secretRef:
                        name: $(quoted "${FLAG[secret]}")"
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${FLAG[run]}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${FLAG[restarts]}
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              serviceAccountName: ${FLAG[account]}
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $kind
                cloud.google.com/gke-tpu-topology: $grid
                cloud.google.com/gke-nodepool: ${FLAG[name]}
              containers:
                - name: trainer
                  image: $(quoted "${FLAG[image]}")
                  command: ["python", "-m", "igrpo_jax.main"$arguments]$variables
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    limits:
                      google.com/tpu: $per_host
YAML
}

# check_pool MACHINE,TOPOLOGY,SPOT ends where the node pool that is there is not what the run asks for: pods would wait
# in it for ever. That of a machine that is a slice by itself may have no topology.
check_pool() {
  local there wanted="$machine, $grid, ${SWITCH[spot]:-no}" its_machine its_grid its_spot
  IFS=, read -r its_machine its_grid its_spot <<<"$1"
  ((hosts > 1)) || its_grid=${its_grid:-$grid}
  if [[ ${its_spot,,} == true ]]; then its_spot=yes; else its_spot=no; fi
  there="$its_machine, $its_grid, $its_spot"
  [[ $there == "$wanted" ]] ||
    die "--name ${FLAG[name]}: a node pool of this name is there with machine, topology and spot = $there, and this" \
      "run asks for $wanted; give what it has, another --name, or delete it first:" \
      "${pools[*]} delete ${FLAG[name]} ${where[*]}"
}

pools=(gcloud container node-pools)
where=("--cluster=${FLAG[cluster]}" "--zone=${FLAG[zone]}")
[[ ${FLAG[project]} == - ]] || where+=("--project=${FLAG[project]}")
create=("${pools[@]}" create "${FLAG[name]}" "${where[@]}" "--machine-type=$machine" "--num-nodes=$hosts"
  --scopes=cloud-platform --quiet)
# A machine that is a slice by itself needs no topology.
((hosts == 1)) || create+=("--tpu-topology=$grid")
[[ ! ${SWITCH[spot]} ]] || create+=(--spot)
if [[ ${SWITCH[dry-run]} ]]; then
  run "${create[@]}"
  echo "kubectl create -f - <<'YAML'"
  manifest
  echo YAML
  exit 0
fi
# Nothing is printed where there is no such JobSet. One that has ended has the condition Completed or Failed.
state=$(kubectl get jobset "${FLAG[run]}" --ignore-not-found \
  -o 'jsonpath=there {.status.conditions[?(@.status=="True")].type}') ||
  fail "kubectl cannot tell whether run ${FLAG[run]} is under way, see above; nothing is changed"
if [[ $state && ! " $state " =~ \ (Completed|Failed)\  ]]; then
  echo "run ${FLAG[run]} is under way, and is left as it is; to end it: kubectl delete jobset ${FLAG[run]}"
  exit 0
fi
facts="config.machineType,placementPolicy.tpuTopology,config.spot"
if pool=$("${pools[@]}" describe "${FLAG[name]}" "${where[@]}" "--format=csv[no-heading]($facts)" 2>/dev/null); then
  check_pool "$pool"
else
  "${create[@]}"
fi
# Applied again, a JobSet that has ended starts no pods. It is deleted first, and waited for with its pods, whose names the
# new ones have.
[[ ! $state ]] || kubectl delete jobset "${FLAG[run]}" --cascade=foreground
manifest | kubectl create -f -
