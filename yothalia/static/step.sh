
{setup}
{folder}
export YOTHALIA_STOP="$folder/.stop-$SLURM_JOB_ID"; rm -f "$YOTHALIA_STOP"
await() {{ wait $!; code=$?; while [ $code = 138 ]; do wait $!; code=$?; done; return $code; }}
trap 'touch "$YOTHALIA_STOP"; kill -USR1 $runner 2>/dev/null' USR1    # {warn} seconds before the time is over

{together}{run}yothalia step "$folder"{step} & runner=$!
await
rm -f "$YOTHALIA_STOP"
[ $code = 85 ] && scontrol requeue $SLURM_JOB_ID    # it has saved, and goes on later
exit $code
