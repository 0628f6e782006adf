#!/bin/sh
# Start a training on all GPUs of one or several machines: check the config and the data, then call torchrun.
#
#   ./torchrun.sh                                          built-in sample, no download
#   ./torchrun.sh run.yaml                                 every GPU of this machine; without a GPU one process
#   NPROC=2 ./torchrun.sh run.yaml --lr 3e-5               2 processes; a flag replaces the file's value
#   DRY_RUN=1 ./torchrun.sh run.yaml                       print the commands, run nothing
#   ./torchrun.sh run.yaml --check                         only read config and data (--help: list every key)
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./torchrun.sh run.yaml      on the first machine,
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 ./torchrun.sh run.yaml      and on the second
#   srun --nodes=2 --ntasks-per-node=1 ./torchrun.sh run.yaml          the same under SLURM
#
# Environment, each optional:
#   NPROC         processes on this machine              number of GPUs, else 1
#   NNODES        machines                               those of the SLURM step, else 1
#   NODE_RANK     number of this machine, from 0         that of SLURM; required when NNODES > 1
#   MASTER_ADDR   name of the machine with NODE_RANK=0   first of the SLURM step; required when NNODES > 1
#   MASTER_PORT   a free port of that machine            29500
#   LOCAL_ADDR    with NODE_RANK=0: the address at which the other machines reach this one       MASTER_ADDR
#   RDZV_ID       a name that only this job has          that of the SLURM job, else mmbert
#   MAX_RESTARTS  restarts after a failed worker         0; a restart resumes from the newest checkpoint
#   PYTHON        interpreter                            python
#   PET_SIGNALS_TO_HANDLE           signals that torchrun passes on   SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds from a signal to a kill   120
#   (PyTorch before 2.13 ignores both: it passes on the first four signals and kills after 30 s)
#
# Bad config or data: one line and exit code 2, before any worker starts.
#
# After one of these signals the workers write a checkpoint and end with exit code 75, torchrun itself with 1. The same
# command, started again, resumes from the newest checkpoint. SLURM sends such a signal 3 minutes before its limit with
#   #SBATCH --signal=TERM@180                              or USR1@180
#
# One machine: every socket listens on 127.0.0.1 only. With `torchrun --standalone`, and with several machines, sockets
# listen on all addresses, and anybody who can connect to them can run code: use those on a trusted network only.
#
# Several machines need no shared folder. Each needs its own copy of the data and of the encoder, at the paths in the
# config (relative to the working folder). The machine with NODE_RANK=0 writes the run. A resume takes the newest
# checkpoint of any machine, which sends it to all others. If another machine has NODE_RANK=0 then, the run is written
# there from then on, without the earlier metrics and best step. MASTER_PORT of the first machine and ports chosen by
# the system must be open between the machines. Where a machine's own name resolves to 127.0.0.1 or to another network
# (see getent hosts "$(hostname)"), set the network interface, or the workers do not find each other:
#   GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 NNODES=2 ...

set -eu

PYTHON=${PYTHON:-python}
train=$(dirname -- "$0")/train.py

# print the command with DRY_RUN=1, else run it
run() {
    if [ "${DRY_RUN:-0}" = 1 ]; then echo "$@"; else "$@"; fi
}

# refuse NAME EXPECTED FOUND: one line and exit code 2
refuse() {
    echo "torchrun.sh: $1: expected $2, found ${3:-nothing} (NNODES=$NNODES)" >&2
    exit 2
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
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}

case $NNODES in
'' | 0* | *[!0-9]*) refuse NNODES "a number of machines" "$NNODES" ;;
esac
if [ "$NNODES" -gt 1 ]; then
    case $NODE_RANK in
    '' | *[!0-9]*) refuse NODE_RANK "which of the machines this is, from 0" "$NODE_RANK" ;;
    esac
    [ "$NODE_RANK" -lt "$NNODES" ] || refuse NODE_RANK "a number below NNODES" "$NODE_RANK"
    if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_STEP_NODELIST:-}" ]; then
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    fi
    [ -n "${MASTER_ADDR:-}" ] || refuse MASTER_ADDR "the name of the machine with NODE_RANK=0"
    export NODE_RANK # the check reads checkpoints on the machine with NODE_RANK=0 only
fi

# ---- check first: torchrun would turn exit code 2 into 1 and a long report ----
if [ $# -gt 0 ]; then
    run "$PYTHON" "$train" "$@" --check
fi

# ---- run ----
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
# The workers open their own store at each start; on one machine it listens on 127.0.0.1, torchrun's on all addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun would set it too, with a warning; train.py sets its threads from num_threads.
if [ "$NPROC" -gt 1 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
set -- --nproc-per-node="$NPROC" --max-restarts="${MAX_RESTARTS:-0}" "$train" "$@"
if [ "$NNODES" -gt 1 ]; then
    # torchrun orders the machines by these names; only that of rank 0 is used as an address ("~" sorts last)
    if [ "$NODE_RANK" -eq 0 ]; then
        is_host=1 name=${LOCAL_ADDR:-$MASTER_ADDR}
    else
        is_host=0 name=$(printf '~%05d' "$NODE_RANK")
    fi
    # read_timeout: the machines may start 10 minutes apart
    set -- --nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" \
        --rdzv-id="${RDZV_ID:-${SLURM_JOB_ID:-mmbert}}" --rdzv-conf="is_host=$is_host,read_timeout=600" \
        --local-addr="$name" "$@"
else
    # a rendezvous through a file opens no socket
    rendezvous=FILE
    [ "${DRY_RUN:-0}" = 1 ] || rendezvous=$(mktemp "${TMPDIR:-/tmp}/torchrun.XXXXXX")
    set -- --rdzv-backend=c10d --rdzv-endpoint="$rendezvous" --rdzv-conf=store_type=file "$@"
fi
if [ "${DRY_RUN:-0}" = 1 ]; then
    run "$PYTHON" -m torch.distributed.run "$@"
else
    exec "$PYTHON" -m torch.distributed.run "$@" # exec: signals reach torchrun itself
fi
