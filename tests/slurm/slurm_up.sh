#!/usr/bin/env bash
# Starts a real SLURM on this machine: one slurmctld, NODES slurmd, and its own munged.
#   slurm_up.sh DIR NODES PORT
# DIR must not exist and gets all files. Ports PORT to PORT + NODES are used. Node i is named n<i>, has
# the address 127.0.0.<10 + i> and its own UTS and mount namespaces, so that `hostname` prints n<i> and
# n<i> resolves while the machine's own name and /etc/hosts stay unchanged. Afterwards:
#   export SLURM_CONF=DIR/slurm.conf; sinfo
# Needs root with CAP_SYS_ADMIN, and slurmctld, slurmd, slurm-client and munge.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

dir=$1 nodes=$2 port=$3
last=$((nodes - 1))
conf=$dir/slurm.conf
socket=$dir/run/munge.socket

mkdir -m 755 "$dir"
mkdir "$dir"/{gpu,log,run,spool,state}

# munged requires that only the owner can write to its directories.
(umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
cp /etc/hosts "$dir/hosts"

# Eight fake GPUs per node: they can be scheduled, but not computed on.
for gpu in {0..7}; do : > "$dir/gpu/$gpu"; done
printf 'AutoDetect=off\nName=gpu File=%s/gpu/[0-7]\n' "$dir" > "$dir/gres.conf"

{
    cat << SETTINGS
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
# slurmd must listen everywhere (otherwise steps cannot be launched); the controller need not.
CommunicationParameters=NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired; 5 seconds is the minimum.
AuthInfo=socket=$socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
PropagateResourceLimits=NONE
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
SETTINGS
    for ((i = 0; i <= last; i++)); do
        echo "NodeName=n$i NodeAddr=127.0.0.$((10 + i)) Port=$((port + 1 + i))" \
            "Sockets=2 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:8"
        echo "127.0.0.$((10 + i)) n$i" >> "$dir/hosts"
        mkdir "$dir/spool/n$i"
    done
} > "$conf"

munged --force --socket="$socket" --key-file="$dir/munge.key" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
export SLURM_CONF=$conf
slurmctld -c
for ((i = 0; i <= last; i++)); do
    # shellcheck disable=SC2016 # the inner shell expands them
    unshare --uts --mount --propagation private bash -c \
        'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -c -N "$1"' \
        node "n$i" "$dir/hosts"
done

for _ in {1..100}; do
    idle=$(sinfo --noheader --Node --partition=main --states=idle --format=%N 2> /dev/null | wc -l)
    [[ $idle == "$nodes" ]] && exit 0
    sleep 0.1
done
echo "only ${idle:-0} of $nodes nodes came up within 10 seconds" >&2
tail -n 20 "$dir"/log/*.log >&2
exit 1
