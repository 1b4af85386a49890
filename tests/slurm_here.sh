#!/bin/bash
# A Slurm of two nodes on this machine, for tests: start DIR | stop DIR. Needs slurmctld, slurmd, slurm-client, munge, and root.
set -euo pipefail
dir=$2; conf=$dir/slurm.conf
case $1 in
start)
  mkdir -p "$dir"/{state,n1,n2}
  cat > "$conf" <<EOF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/ctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/ctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SlurmdTimeout=20
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmctldParameters=enable_configless
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17001 CPUs=2
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17002 CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
EOF
  mkdir -p /run/munge /etc/munge /var/log/munge /var/lib/munge
  [ -f /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 2>/dev/null
  chown -R munge:munge /etc/munge /run/munge /var/log/munge /var/lib/munge; chmod 700 /etc/munge; chmod 600 /etc/munge/munge.key; chmod 755 /run/munge
  for i in $(seq 20); do munge -n >/dev/null 2>&1 && break; su -s /bin/bash munge -c /usr/sbin/munged 2>/dev/null || true; sleep .5; done
  SLURM_CONF=$conf slurmctld -c
  for n in n1 n2; do SLURM_CONF=$conf slurmd -N $n; done
  for i in $(seq 60); do [ "$(SLURM_CONF=$conf sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && exit 0; sleep .5; done
  echo 'the nodes did not come up' >&2; tail -5 "$dir"/*.log >&2; exit 1;;
stop)
  SLURM_CONF=$conf timeout 20 scancel -u root 2>/dev/null || true; sleep 1
  SLURM_CONF=$conf timeout 20 scontrol shutdown 2>/dev/null || true; sleep 1
  # what is left of what was started here, by its own number
  for f in "$dir"/*.pid /run/munge/munged.pid; do [ -f "$f" ] && kill "$(cat "$f")" 2>/dev/null || true; done
  for i in $(seq 20); do
    left=; for f in "$dir"/*.pid /run/munge/munged.pid; do [ -f "$f" ] && kill -0 "$(cat "$f")" 2>/dev/null && left=1; done
    [ -z "$left" ] && break; sleep .5
  done;;
esac
