#!/usr/bin/env bash
# Usage: spot-notice.sh aws|gcp
#
# Waits on a worker until its cloud announces that it takes the node back, then tells Ray: the node is drained, for
# preemption. Its loss then counts as one of --max_preemptions, which are without limit by default, and not as one of
# --max_failures. Without this a spot node that goes looks like any node that crashed.
set -euo pipefail

case "${1:-}" in
  aws) url=${SPOT_METADATA_URL:-http://169.254.169.254}; notice_s=110 ;;  # of the two minutes
  gcp) url=${SPOT_METADATA_URL:-http://metadata.google.internal}; notice_s=25 ;;  # of the 30 seconds
  *) echo "usage: spot-notice.sh aws|gcp" >&2; exit 2 ;;
esac

announced() {
  case "$1" in
    aws)  # 404 until there is a notice, on on-demand nodes forever
      local token
      token=$(curl --silent --fail --max-time 5 --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
        "$url/latest/api/token") || return 1
      curl --silent --fail --max-time 5 --output /dev/null --header "X-aws-ec2-metadata-token: $token" \
        "$url/latest/meta-data/spot/instance-action" ;;
    gcp)
      [[ $(curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
        "$url/computeMetadata/v1/instance/preempted") == TRUE ]] ;;
  esac
}

until announced "$1"; do sleep "${SPOT_POLL_S:-5}"; done
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "$1 takes this spot node back" \
  --deadline-remaining-seconds "$notice_s"
