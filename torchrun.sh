#!/bin/sh
# Start a training on all GPUs of this machine, or of several: check the config and the data, then call torchrun.
#
#   ./torchrun.sh                                          built-in sample, no download
#   ./torchrun.sh run.yaml                                 every GPU of this machine; without a GPU one process
#   NPROC=2 ./torchrun.sh run.yaml --lr 3e-5               2 processes; flags go over the file
#   DRY_RUN=1 ./torchrun.sh run.yaml                       print the commands, run nothing
#   ./torchrun.sh run.yaml --check                         only read config and data (--help: list every key)
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./torchrun.sh run.yaml      on the first machine,
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 ./torchrun.sh run.yaml      and on the second
#   srun --nodes=2 --ntasks-per-node=1 ./torchrun.sh run.yaml          the same under SLURM
#
# Environment, each optional:
#   NPROC         processes on this machine              number of GPUs, else 1
#   NNODES        machines                               those of the SLURM step, else 1
#   NODE_RANK     which of them this is, from 0          that of SLURM, else 0
#   MASTER_ADDR   name of the machine with rank 0        first of the SLURM step; required when NNODES > 1
#   MASTER_PORT   a free port there                      29500
#   MAX_RESTARTS  restarts after a failed worker         0; a restart goes on from the newest checkpoint
#   PYTHON        interpreter                            python
#
# Bad config or data: one line and exit code 2, before any worker starts. Several machines need one model_path that
# all of them see.

set -eu

PYTHON=${PYTHON:-python}
train=$(dirname -- "$0")/train.py

# print with DRY_RUN=1, else run
run() {
    if [ "${DRY_RUN:-0}" = 1 ]; then echo "$@"; else "$@"; fi
}

# ---- help and check need no workers ----
for argument in "$@"; do
    case $argument in
    --check | --help | -h)
        run "$PYTHON" "$train" "$@"
        exit
        ;;
    esac
done

# ---- how many processes on how many machines ----
if [ -z "${NPROC:-}" ]; then
    NPROC=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
# only inside `srun`: a batch script runs on one node, whatever the size of its job
NNODES=${NNODES:-${SLURM_STEP_NUM_NODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}

if [ "$NNODES" -gt 1 ]; then
    if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_STEP_NODELIST:-}" ]; then
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    fi
    if [ -z "${MASTER_ADDR:-}" ]; then
        echo "torchrun.sh: MASTER_ADDR: expected the name of the machine with NODE_RANK=0, found nothing (NNODES=$NNODES)" >&2
        exit 2
    fi
fi

# ---- check first: torchrun would turn exit code 2 into 1 and a long report ----
if [ $# -gt 0 ]; then
    run "$PYTHON" "$train" "$@" --check
fi

# ---- go ----
# torchrun would set it too, with a warning; train.py sets its threads itself (num_threads)
if [ "$NPROC" -gt 1 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
if [ "$NNODES" -gt 1 ]; then
    set -- --nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
        --nproc-per-node="$NPROC" --max-restarts="${MAX_RESTARTS:-0}" "$train" "$@"
else
    set -- --standalone --nproc-per-node="$NPROC" --max-restarts="${MAX_RESTARTS:-0}" "$train" "$@"
fi
if [ "${DRY_RUN:-0}" = 1 ]; then
    run "$PYTHON" -m torch.distributed.run "$@"
else
    exec "$PYTHON" -m torch.distributed.run "$@" # exec: signals reach torchrun itself
fi
