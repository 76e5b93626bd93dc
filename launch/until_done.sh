#!/usr/bin/env bash
# Restarts a command until it exits with 0 (done) or 1 (an error that the same command would repeat).
#
#   launch/until_done.sh python -m vit_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
#
# Environment: MAX_RESTARTS (default 100), and PAUSE_SECONDS between two starts (default 10). SIGTERM, SIGINT and SIGUSR1
# go to the command. After SIGTERM or SIGINT the command is not restarted, and this script exits with its status.
#
# On several hosts, set VIT_JAX_RUN_TOKEN to the same secret on each, such as the output of `openssl rand -hex 16`. The
# processes use it to recognise each other (docs/pods.md).
set -u

child=""
stopped="" # the signal that stopped us
sent=""    # the signal that we sent to the running command

pass_on() {
  [ "$1" = USR1 ] || stopped=$1
  [ -z "$child" ] || { kill -"$1" "$child" 2>/dev/null && sent=$1; }
}
for name in TERM INT USR1; do
  # shellcheck disable=SC2064 # $name expands now
  trap "pass_on $name" "$name"
done

for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  # Send a signal that came before $child was set, but only once: a second one would end the command without a save.
  [ -z "$stopped" ] || [ -n "$sent" ] || kill -"$stopped" "$child"
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do # a trap interrupts `wait`, but not the command
    wait "$child"
    status=$?
  done
  child=""
  if [ "$status" -le 1 ] || [ -n "$stopped" ] || [ "$restart" -ge "${MAX_RESTARTS:-100}" ]; then
    exit "$status"
  fi
  echo "until_done: the command ended with $status; restart $((restart + 1)) of ${MAX_RESTARTS:-100}" >&2
  sleep "${PAUSE_SECONDS:-10}" &
  wait $! # a signal interrupts `wait` at once
  [ -z "$stopped" ] || exit "$status"
done
