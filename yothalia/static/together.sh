# train together, {gpus} processes on each of {nodes} nodes
export MASTER_ADDR=$(hostname) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
srun --ntasks-per-node=1 bash -c '{run}torchrun \
  --nnodes=$SLURM_NNODES --node-rank=$SLURM_NODEID --nproc-per-node={gpus} \
  --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT -m yothalia.slurm "$0"' "$folder" &
await || exit $code
