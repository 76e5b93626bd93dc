#!/usr/bin/env bash
# Trains on a Cloud TPU slice: books it, installs this commit on all its hosts, and runs the same command on each. When
# the slice is preempted, it books it again, until the run is done.
#
#   export TPU_NAME=vit-l16 TPU_ZONE=europe-west4-a TPU_TYPE=v3-32
#   launch/tpu_vm.sh run --config=configs/vit_l16_i21k.py --workdir=gs://bucket/runs/l16
#   launch/tpu_vm.sh logs                # of host 0; logs 3: of host 3; logs 3 1: of host 3 of slice 1
#   launch/tpu_vm.sh stop                # SIGTERM: all hosts save, then end
#   launch/tpu_vm.sh delete              # ends all cost
#
# `run` does `create`, `install`, `start …` and `wait …`, which you can also call one by one. If you interrupt `wait`,
# the run continues, and you can call `wait …` again at any time.
#
# A failed step is retried after a pause. After MAX_FAILURES failures in a row the script exits with 1, and the booked
# slice stays booked.
#
# Needs gcloud, logged in, with a project that has quota for the type; `ssh-add ~/.ssh/google_compute_engine` once. The
# service account needs the bucket (docs/storage.md). Optional:
#   TPU_SLICES    slices of TPU_TYPE that train together, over the data centre's network (1)
#   TPU_VERSION   image of the hosts (v2 to v4: tpu-ubuntu2204-base, the default; v5e: v2-alpha-tpuv5-lite;
#                 v5p: v2-alpha-tpuv5; v6e: v2-alpha-tpuv6e)
#   TPU_OPTIONS   more flags of `gcloud compute tpus queued-resources create` (default --spot; --reserved …)
#   POLL_SECONDS  between two checks of the run, and before a retry (60)
#   MAX_FAILURES  of booking, deleting, installing or starting in a row (10)
# shellcheck disable=SC2016 # the hosts expand what is in single quotes
set -euo pipefail

: "${TPU_NAME:?export TPU_NAME, such as vit-l16}"
: "${TPU_ZONE:?export TPU_ZONE, such as europe-west4-a}"
options=("--zone=$TPU_ZONE")
nodes=("$TPU_NAME") # a queued resource has one node per slice
as_nodes=("--node-id=$TPU_NAME")
if [ "${TPU_SLICES:-1}" -gt 1 ]; then
  nodes=()
  for ((slice = 0; slice < TPU_SLICES; slice++)); do nodes+=("$TPU_NAME-$slice"); done
  as_nodes=("--node-count=$TPU_SLICES" "--node-prefix=$TPU_NAME")
fi
here=$(cd "$(dirname "$0")/.." && pwd)

scratch=$(mktemp -d)
errors=$scratch/errors
trap 'rm -r "$scratch"' EXIT

say() { echo "tpu_vm: $*" >&2; }

state() { # ACTIVE, WAITING_FOR_RESOURCES, …; NOT_FOUND if it is not booked; UNKNOWN if gcloud could not tell
  local answer
  # Standard error is separate because it may have warnings.
  if answer=$(gcloud compute tpus queued-resources describe "$TPU_NAME" "${options[@]}" \
    --format='value(state.state)' 2>"$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -q '^ERROR: .*) NOT_FOUND: ' "$errors"; then
    echo NOT_FOUND
  else
    say "gcloud could not tell the state of $TPU_NAME: $(cat "$errors")"
    echo UNKNOWN
  fi
}

failures=0
failed() { # what; counts failures and gives up after too many
  failures=$((failures + 1))
  say "$1 failed, $failures of ${MAX_FAILURES:-10} times in a row"
  if [ "$failures" -ge "${MAX_FAILURES:-10}" ]; then
    say "giving up. What is booked costs until \`launch/tpu_vm.sh delete\`"
    exit 1 # as after an error that the same command would repeat
  fi
}

pause() { sleep "${POLL_SECONDS:-60}"; }

on_host() { # host, slice, command
  gcloud compute tpus tpu-vm ssh "${nodes[$2]}" "${options[@]}" --worker="$1" --command="$3"
}

on_all_hosts() { # command
  local slice
  for slice in "${!nodes[@]}"; do on_host all "$slice" "$1" || return; done
}

# `set -e` is off in a function that is called before `&&` or `||`, so each of these returns at its first failure.

create() { # books the slice and waits until it is ready
  local now more
  : "${TPU_TYPE:?export TPU_TYPE, such as v3-32}"
  read -r -a more <<<"${TPU_OPTIONS---spot}"
  while true; do
    now=$(state)
    case $now in
      ACTIVE) failures=0 && return ;;
      NOT_FOUND)
        say "booking $TPU_TYPE"
        gcloud compute tpus queued-resources create "$TPU_NAME" "${options[@]}" "${as_nodes[@]}" \
          --accelerator-type="$TPU_TYPE" --runtime-version="${TPU_VERSION:-tpu-ubuntu2204-base}" \
          --scopes=https://www.googleapis.com/auth/cloud-platform ${more[@]+"${more[@]}"} || failed booking
        ;;
      SUSPENDED | FAILED)
        say "$now: deleting it before booking again"
        delete || failed deleting
        ;;
      UNKNOWN) failed "looking at $TPU_NAME" ;;
      *) say "$now" && failures=0 ;;
    esac
    pause
  done
}

install() { # copies this commit to all hosts; the hosts' own Python is too old
  local archive=$scratch/vit_jax.tar.gz node
  git -C "$here" archive --format=tar.gz --output="$archive" HEAD || return
  for node in "${nodes[@]}"; do
    gcloud compute tpus tpu-vm scp "$archive" "$node:vit_jax.tar.gz" "${options[@]}" --worker=all || return
  done
  on_all_hosts 'set -e; mkdir -p vit_jax; tar -xzf vit_jax.tar.gz -C vit_jax
      python3 -m pip install --quiet --user uv
      [ -d venv ] || python3 -m uv venv --quiet --python 3.12 venv
      python3 -m uv pip install --quiet --python venv/bin/python -e "vit_jax[tpu,gcs]"'
}

start() { # stops what is left of an earlier run, then starts the run on all hosts, in the background
  local arguments token
  arguments=$(printf ' %q' "$@")
  token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # the secret that the processes of the run share
  on_all_hosts 'old=$(cat run.pid 2>/dev/null || true)
    if [ -n "$old" ] && kill -TERM "$old" 2>/dev/null; then while kill -0 "$old" 2>/dev/null; do sleep 1; done; fi
    rm -f run.pid run.status' &&
    on_all_hosts "cd vit_jax && export VIT_JAX_RUN_TOKEN=$token || exit
    nohup setsid bash -c 'launch/until_done.sh ../venv/bin/python -m vit_jax.main \"\$@\" & echo \$! > ../run.pid
      wait \$!; echo \$? > ../run.status' run$arguments >> ../run.log 2>&1 < /dev/null &
    until [ -s ../run.pid ]; do sleep 0.1; done"
}

watch() { # the first step (install, start or nothing), arguments; waits for the run, returns its status
  local to_do=$1 status
  shift
  while true; do
    case $(state) in
      UNKNOWN) [ -z "$to_do" ] || failed "looking at $TPU_NAME" ;; # a started run continues meanwhile
      ACTIVE)
        if [ "$to_do" = install ]; then { install && to_do=start; } || failed installing; fi
        if [ "$to_do" = start ]; then { start "$@" && to_do=""; } || failed starting; fi
        if [ -z "$to_do" ]; then
          failures=0
          # A rebooted host has lost its run.
          status=$(on_host 0 0 'cat run.status 2>/dev/null || kill -0 "$(cat run.pid)" 2>/dev/null || echo gone' || true)
          case $status in
            gone) say "the run is gone, starting it again" && to_do=start && continue ;;
            [0-9]*) say "the run ended with $status" && return "$status" ;;
          esac
        fi
        ;;
      *) # preempted, or not ready yet
        create
        to_do=install
        continue
        ;;
    esac
    pause
  done
}

arguments_needed() { # arguments of vit_jax.main
  [ $# -gt 0 ] && return
  say "'$command' needs the arguments of vit_jax.main: launch/tpu_vm.sh $command --config=… --workdir=gs://…"
  exit 1
}

delete() { gcloud compute tpus queued-resources delete "$TPU_NAME" "${options[@]}" --force --quiet; }

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
  create | install | delete) "$command" ;;
  start) arguments_needed "$@" && start "$@" ;;
  wait) arguments_needed "$@" && watch "" "$@" ;;
  run) arguments_needed "$@" && watch install "$@" ;;
  logs) on_host "${1:-0}" "${2:-0}" 'tail -n 200 -F run.log' ;;
  stop) on_all_hosts 'kill -TERM "$(cat run.pid)"' ;;
  *) sed -n '2,/^# shell/{/^# shell/d;s/^# \{0,1\}//;p}' "$0" && exit 1 ;;
esac
