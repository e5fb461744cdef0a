#!/usr/bin/env bash
# A Ray cluster inside a Slurm job, and a command of bss-ray on it:
#
#   sbatch cluster/slurm.sh train --config my.yaml --storage_path /shared/runs --name mine
#
# from the folder with your YAML files and modules; `bss-ray` and `ray` must be on the PATH (activate the environment
# first). Before the time limit the run is stopped and the job queued again: the same command resumes the run.
# Not `ray symmetric-run`: it ends with `ray stop`, which ends your other jobs on the node too, and passes no signal on.
#
#SBATCH --job-name=bss-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

wait_nodes_s=${WAIT_NODES_S:-600}  # how long the nodes may take to join
command=${1:?usage: sbatch cluster/slurm.sh train|score|tune OPTIONS}

# Ports belong to the job, between Ray's own and those that Linux hands out (32768): jobs that share a node do not meet.
port=$((20000 + SLURM_JOB_ID % 120 * 100))
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)  # this script runs there
ip=${HEAD_IP:-$(hostname -I | cut -d ' ' -f 1)}  # set HEAD_IP if the network between the nodes is another
temp=/tmp/ray-$SLURM_JOB_ID  # short: Ray's sockets are in it

# A token of this job, in the environment of its steps alone.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_ADDRESS=$ip:$port
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}  # srun does not take it from sbatch
export RAY_grpc_keepalive_timeout_ms=120000  # README.md, "Outages of the network"
# With several network interfaces name the one between the nodes:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Ray itself takes all CPUs of a node, given to the job or not.
# shellcheck disable=SC2016  # of the node, not of this script
node='exec ray start "$@" --num-cpus="$SLURM_CPUS_ON_NODE"'
common=(--block --disable-usage-stats --temp-dir="$temp" --dashboard-agent-listen-port=$((port + 3))
  --min-worker-port=0 --max-worker-port=0)  # 0: any that is free

steps=()
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" bash -c "$node" ray \
  --head --node-ip-address="$ip" --port="$port" --dashboard-port=$((port + 1)) \
  --ray-client-server-port=$((port + 2)) "${common[@]}" &
steps+=($!)
if ((SLURM_NNODES > 1)); then
  srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" bash -c "$node" ray \
    --address="$RAY_ADDRESS" "${common[@]}" &
  steps+=($!)
fi

# shellcheck disable=SC2329  # the trap calls it
finish() {
  kill "${steps[@]}" 2>/dev/null || true
  wait "${steps[@]}" 2>/dev/null || true
  srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" rm -rf "$temp" || true
}
trap finish EXIT

joined=0
patience() {
  if ((SECONDS > wait_nodes_s)); then
    echo "slurm.sh: ${joined:-0} of $SLURM_NNODES nodes joined in $wait_nodes_s s (WAIT_NODES_S); see above why" >&2
    exit 1
  fi
  for step in "${steps[@]}"; do
    kill -0 "$step" 2>/dev/null || { echo "slurm.sh: ray start ended on a node; see above why" >&2; exit 1; }
  done
  sleep 2
}
alive() { timeout 60 python -c 'import ray; ray.init(logging_level="ERROR"); print(sum(n["Alive"] for n in ray.nodes()))'; }

until (exec 3<>"/dev/tcp/$ip/$port") 2>/dev/null; do patience; done  # Ray's client would try for minutes
until joined=$(alive 2>/dev/null) && ((joined >= SLURM_NNODES)); do patience; done
echo "slurm.sh: $joined nodes at $RAY_ADDRESS"

# The driver runs in the background of this shell, so that signals arrive at once. USR1 comes from --signal, TERM from scancel
# --signal=TERM --batch and from preemption, which queues the job again by itself.
requeue=false
bss-ray "$@" &
driver=$!
trap 'requeue=true; kill -TERM $driver' USR1
trap 'kill -TERM $driver' TERM INT

# A signal ends `wait` before the driver has written its checkpoint: wait until there is no driver, then ask how it ended.
while kill -0 "$driver" 2>/dev/null; do wait "$driver" || true; done
code=0
wait "$driver" || code=$?
trap - USR1 TERM INT  # Slurm signals again when it queues the job

if $requeue && ((code != 0)); then
  echo "slurm.sh: $command stopped ahead of the time limit; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
