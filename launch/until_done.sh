#!/usr/bin/env bash
# Runs a command again and again until it ends with 0 (done) or 1 (an error that the same command would meet again).
#
#   launch/until_done.sh python -m vit_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
#
# MAX_RESTARTS (default 100) and PAUSE_SECONDS between two starts (default 10) come from the environment. SIGTERM,
# SIGINT and SIGUSR1 are passed on; after the first two the command is not started again, and its status is ours.
#
# On several hosts give VIT_JAX_RUN_TOKEN the same secret on each, such as the output of `openssl rand -hex 16`: by it the
# processes know each other (docs/pods.md).
set -u

child=""
stopped="" # by which signal
sent=""    # to the command that runs

pass_on() {
  [ "$1" = USR1 ] || stopped=$1
  [ -z "$child" ] || { kill -"$1" "$child" 2>/dev/null && sent=$1; }
}
for name in TERM INT USR1; do
  # shellcheck disable=SC2064 # now is when $name is to be read
  trap "pass_on $name" "$name"
done

for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  # A signal that came before $child was known; a second one would end the command without a save.
  [ -z "$stopped" ] || [ -n "$sent" ] || kill -"$stopped" "$child"
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do # a trap ends `wait`, but not the command
    wait "$child"
    status=$?
  done
  child=""
  if [ "$status" -le 1 ] || [ -n "$stopped" ] || [ "$restart" -ge "${MAX_RESTARTS:-100}" ]; then
    exit "$status"
  fi
  echo "until_done: the command ended with $status; restart $((restart + 1)) of ${MAX_RESTARTS:-100}" >&2
  sleep "${PAUSE_SECONDS:-10}" &
  wait $! # so that a signal is answered at once
  [ -z "$stopped" ] || exit "$status"
done
