#!/bin/bash
# Pre-training on several machines under Slurm, one process a GPU, started again until it is done:
#     sbatch --nodes 8 launch/slurm.sh @presets/ucf101-s3d --videos UCF-101 --splits ucfTrainTestlist \
#         --flow flow/ucf101 --prototypes prototypes.npz --out runs/ucf101
# All arguments go to pretrain.py. PYTHON names another interpreter than python.
#SBATCH --job-name=goca
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=goca-%j.out
# 300 s before its time is up, Slurm sends USR1 to every process: they agree on a step, save, and leave with 138. srun
# starts the processes itself: torchrun would hide their status and take the signal for its own end. Start it in a folder
# that all nodes share.
set -u
AGAIN=50  # starts at most

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=1 PYTHON=${PYTHON:-python}

# srun returns the highest status, and those that it ends have 137 or 143: a process with bad input leaves this file
export BAD_INPUT=$PWD/.goca-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.bad-input  # a new name: no node has it in a cache

# srun takes --cpus-per-task from sbatch no longer (Slurm 22.05); the shells pass signals by, python answers them
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    trap : USR1 TERM INT
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    "$PYTHON" pretrain.py "$@"
    status=$?
    [ "$status" != 2 ] || touch "$BAD_INPUT"
    exit "$status"' pretrain "$@"
status=$?
[ ! -e "$BAD_INPUT" ] || status=2
rm -f "$BAD_INPUT"

# 138: asked to stop (128 + USR1); 75: another process ended or hung. 2 is bad input, which another start does not mend.
case $status in
    0) echo "done" ;;
    2) echo "bad input: see above; not started again" ;;
    *) if [ "${SLURM_RESTART_COUNT:-0}" -lt "$AGAIN" ]; then
           echo "status $status: the job is put back in the queue and continues from its last checkpoint"
           scontrol requeue "$SLURM_JOB_ID"
       fi ;;
esac
exit "$status"
