#!/bin/bash
# A one-node SLURM on the loopback, for root: cluster.sh up DIR, then export SLURM_CONF=DIR/slurm.conf; cluster.sh down DIR
# Debian: apt-get install -y --no-install-recommends slurm-wlm munge. Everything lies in DIR, with a munge of its own.
set -euo pipefail
action=$1 dir=$2 host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf

await() {  # await SECONDS COMMAND...
    local tries=$((4 * $1)); shift
    for _ in $(seq "$tries"); do "$@" >/dev/null 2>&1 && return; sleep 0.25; done
    echo "gave up waiting for: $*" >&2; tail -n 20 "$dir"/log/* >&2; return 1
}
idle() { [ "$(sinfo -h -o %T)" = idle ]; }
ended() { ! kill -0 "$1"; }
ports() { python3 -c 'import socket; s = [socket.create_server(("127.0.0.1", 0)) for _ in "ab"]; print(*(x.getsockname()[1] for x in s))'; }

up() {
    mkdir -p "$dir"/{state,spool,log,munge}
    chmod 755 "$dir"; chmod 700 "$dir/munge"
    head -c 128 /dev/urandom > "$dir/munge/key"; chmod 400 "$dir/munge/key"
    # The socket's folder must be open to all users, the key's to none.
    mkdir -p "$dir/socket"; chmod 755 "$dir/socket"
    munged --force --key-file="$dir/munge/key" --socket="$dir/socket/munge" --pid-file="$dir/munge/pid" \
        --seed-file="$dir/munge/seed" --log-file="$dir/log/munged.log"
    read -r controller worker <<< "$(ports)"
    cat > "$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/socket/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=$controller
SlurmdPort=$worker
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
InactiveLimit=0
CompleteWait=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=${SLURM_TEST_CPUS:-2} State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    slurmctld
    slurmd
    await 30 idle
}

down() {
    scancel --user=root >/dev/null 2>&1 || true
    for file in "$dir"/slurmd.pid "$dir"/slurmctld.pid "$dir"/munge/pid; do
        pid=$(cat "$file" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || continue
        await 20 ended "$pid"
    done
}

"$action"
