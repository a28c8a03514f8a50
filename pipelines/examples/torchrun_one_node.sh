#!/usr/bin/env bash
# Teacher, store and student on one machine, each by several processes; run it again and it goes on where it stopped.
#   bash pipelines/examples/torchrun_one_node.sh                            two processes on CPU, embedded digits, minutes
#   DATA=cifar100 TEACHER=wrn_40_2 STUDENT=wrn_16_2 EPOCHS=240 STAGES=6 VIEWS=40 BATCH=64 PROCESSES=4 OUT=runs/four \
#       bash pipelines/examples/torchrun_one_node.sh                        one process per GPU
set -euo pipefail
data=${DATA:-digits} teacher=${TEACHER:-resnet20} student=${STUDENT:-resnet8} out=${OUT:-runs/one_node}
epochs=${EPOCHS:-12} stages=${STAGES:-3} views=${VIEWS:-4} batch=${BATCH:-64} processes=${PROCESSES:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads of each process

by_all() { torchrun --standalone --nproc-per-node "$processes" -m kcdcache "$@"; }

by_all fit --data "$data" --model "$teacher" --epochs "$epochs" --batch-size "$batch" --out "$out/teacher"
# every process fills its shard of the store, and the last one seals it
by_all precompute --data "$data" --teacher "$out/teacher" --views "$views" --store "$out/store"
by_all train --data "$data" --store "$out/store" --student "$student" --epochs "$epochs" --stages "$stages" \
    --batch-size "$batch" --keep 0.7 --out "$out/student"
kcdcache verify "$out/student"
