#!/usr/bin/env bash
# Trains on a Cloud TPU slice: books it, installs this commit on all its hosts, runs the same command on each of them,
# and books it again when it is taken away, until the run is done.
#
#   export TPU_NAME=vit-l16 TPU_ZONE=europe-west4-a TPU_TYPE=v3-32
#   launch/tpu_vm.sh run --config=configs/vit_l16_i21k.py --workdir=gs://bucket/runs/l16
#   launch/tpu_vm.sh logs                # of host 0; logs 3: of host 3
#   launch/tpu_vm.sh stop                # SIGTERM: all hosts save, then end
#   launch/tpu_vm.sh delete              # nothing costs any more
#
# `run` is `create`, `install`, `start …` and `wait …`, which can be called one by one. The run goes on when `wait`
# is broken off, and `wait …` can be called again at any time.
#
# Needs gcloud, logged in, with a project that has quota for the type; `ssh-add ~/.ssh/google_compute_engine` once. The
# service account needs the bucket (docs/storage.md). Optional:
#   TPU_VERSION   image of the hosts (v2 to v4: tpu-ubuntu2204-base, the default; v5e: v2-alpha-tpuv5-lite;
#                 v5p: v2-alpha-tpuv5; v6e: v2-alpha-tpuv6e)
#   TPU_OPTIONS   more flags of `gcloud compute tpus queued-resources create` (default --spot; --reserved …)
#   POLL_SECONDS  between two looks at the run (60)
# shellcheck disable=SC2016 # what is in single quotes is read on the hosts
set -euo pipefail

: "${TPU_NAME:?export TPU_NAME, such as vit-l16}"
: "${TPU_ZONE:?export TPU_ZONE, such as europe-west4-a}"
options=("--zone=$TPU_ZONE")
here=$(cd "$(dirname "$0")/.." && pwd)

say() { echo "tpu_vm: $*" >&2; }

state() { # ACTIVE, WAITING_FOR_RESOURCES, …; nothing if it is not booked
  gcloud compute tpus queued-resources describe "$TPU_NAME" "${options[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}

on_hosts() { # which hosts, command
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${options[@]}" --worker="$1" --command="$2"
}

create() { # books the slice and waits until it is there
  local now more
  : "${TPU_TYPE:?export TPU_TYPE, such as v3-32}"
  read -r -a more <<<"${TPU_OPTIONS---spot}"
  while true; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      "")
        say "booking $TPU_TYPE"
        gcloud compute tpus queued-resources create "$TPU_NAME" "${options[@]}" --node-id="$TPU_NAME" \
          --accelerator-type="$TPU_TYPE" --runtime-version="${TPU_VERSION:-tpu-ubuntu2204-base}" \
          --scopes=https://www.googleapis.com/auth/cloud-platform ${more[@]+"${more[@]}"}
        ;;
      SUSPENDED | FAILED)
        say "$now: deleting, to book again"
        delete
        ;;
      *) say "$now" && sleep "${POLL_SECONDS:-60}" ;;
    esac
  done
}

install() { # copies this commit to all hosts; the hosts' own Python is too old
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git -C "$here" archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:vit_jax.tar.gz" "${options[@]}" --worker=all
  rm "$archive"
  on_hosts all 'set -e; mkdir -p vit_jax; tar -xzf vit_jax.tar.gz -C vit_jax
    python3 -m pip install --quiet --user uv
    [ -d venv ] || python3 -m uv venv --quiet --python 3.12 venv
    python3 -m uv pip install --quiet --python venv/bin/python -e "vit_jax[tpu,gcs]"'
}

start() { # starts the run on all hosts, where it goes on without us; what is left of one there is stopped before
  local arguments
  arguments=$(printf ' %q' "$@")
  on_hosts all 'old=$(cat run.pid 2>/dev/null || true)
    if [ -n "$old" ] && kill -TERM "$old" 2>/dev/null; then while kill -0 "$old" 2>/dev/null; do sleep 1; done; fi
    rm -f run.pid run.status'
  on_hosts all "cd vit_jax
    nohup setsid bash -c 'launch/until_done.sh ../venv/bin/python -m vit_jax.main \"\$@\" & echo \$! > ../run.pid
      wait \$!; echo \$? > ../run.status' run$arguments >> ../run.log 2>&1 < /dev/null &
    until [ -s ../run.pid ]; do sleep 0.1; done"
}

wait_for_end() { # waits for the run; books the slice again if it is taken away; ends with the run's status
  local status
  while true; do
    if [ "$(state)" != ACTIVE ]; then
      create && install && start "$@"
    else
      # A host that was rebooted knows nothing of its run.
      status=$(on_hosts 0 'cat run.status 2>/dev/null || kill -0 "$(cat run.pid)" 2>/dev/null || echo gone' || true)
      case $status in
        gone) say "the run is gone, starting it again" && start "$@" ;;
        [0-9]*) say "the run ended with $status" && return "$status" ;;
      esac
    fi
    sleep "${POLL_SECONDS:-60}"
  done
}

delete() { gcloud compute tpus queued-resources delete "$TPU_NAME" "${options[@]}" --force --quiet; }

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
  create | install | start | delete) "$command" "$@" ;;
  wait) wait_for_end "$@" ;;
  run) create && install && start "$@" && wait_for_end "$@" ;;
  logs) on_hosts "${1:-0}" 'tail -n 200 -F run.log' ;;
  stop) on_hosts all 'kill -TERM "$(cat run.pid)"' ;;
  *) sed -n '2,/^# shell/{/^# shell/d;s/^# \{0,1\}//;p}' "$0" && exit 1 ;;
esac
