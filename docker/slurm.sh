#!/usr/bin/env bash
# A server whose slices are computed on the GPUs of a Slurm cluster.
#   sbatch docker/slurm.sh
#   scancel --batch --signal=TERM JOB     (the end: scans under way are answered first, as when the job's time is over)
# A plain scancel ends the workers at once and the server 30 s later (KillWait); the next server reconstructs what was left.
# The first node runs server and scheduler; every task of the job is one worker with one GPU. The server takes scans at once and computes them
# on its own processors until scheduler and workers are there.
# RECON_ENV: the environment in which recon-gadgets[dask] is installed, on a file system that all nodes see.
# RECON_TLS: folder with ca.pem, cert.pem and key.pem (docs/console.md). Who can reach the scheduler can run code on the workers, so
#            there is no form of this without certificates.
# RECON_ALLOW: the scanner's network. RECON_HOST, RECON_LISTEN, RECON_PORT: name of the first node, the server's address and port.
#SBATCH --job-name=recon
#SBATCH --nodes=2
#SBATCH --ntasks=4
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@600
set -euo pipefail

: "${RECON_ENV:?the folder of the Python environment}"
: "${RECON_TLS:?the folder of the certificates}"
: "${RECON_ALLOW:?the network of the scanner, for example 10.1.2.0/24}"
port="${RECON_SCHEDULER_PORT:-8786}"
state="${RECON_STATE:-$HOME/recon-state}"
tls=(--tls-ca-file "$RECON_TLS/ca.pem" --tls-cert "$RECON_TLS/cert.pem" --tls-key "$RECON_TLS/key.pem")

for file in ca.pem cert.pem key.pem; do
  [ -r "$RECON_TLS/$file" ] || { echo "cannot read $RECON_TLS/$file" >&2; exit 1; }
done
mkdir -p "$state"
host="${RECON_HOST:-$(hostname)}"
scheduler="tls://$host:$port"
# shellcheck disable=SC2317  # called by the trap
finish() {
  trap - EXIT TERM INT
  # the server first: it finishes its scans while it still has workers
  for child in "${children[@]}"; do
    kill -TERM "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  done
}
children=()
trap finish EXIT
trap 'finish; exit 0' TERM INT

"$RECON_ENV/bin/dask" scheduler --protocol tls --host "$host" --port "$port" --no-dashboard \
  --dashboard-address 127.0.0.1:0 "${tls[@]}" &
scheduler_id=$!
srun --kill-on-bad-exit=0 "$RECON_ENV/bin/dask" worker "$scheduler" --nworkers 1 --nthreads 1 --memory-limit 0 --no-dashboard \
  --dashboard-address 127.0.0.1:0 --local-directory "${SLURM_TMPDIR:-/tmp}" "${tls[@]}" &
workers_id=$!
# --device is what the cluster's workers take. The GPUs of this node are theirs: the server, which runs here as well, must not see any
CUDA_VISIBLE_DEVICES="" "$RECON_ENV/bin/recon" serve --host "${RECON_LISTEN:-0.0.0.0}" --port "${RECON_PORT:-9002}" --device auto \
  --stop-seconds 420 --allow 127.0.0.1 --allow "$RECON_ALLOW" --spool "$state/spool" --scheduler "$scheduler" \
  --scheduler-ca "$RECON_TLS/ca.pem" --scheduler-cert "$RECON_TLS/cert.pem" --scheduler-key "$RECON_TLS/key.pem" &
server_id=$!
children=("$server_id" "$workers_id" "$scheduler_id")

# any of the three that ends takes the job with it: half a server would look like one
wait -n "${children[@]}"
echo "a part of the server has ended" >&2
exit 1
