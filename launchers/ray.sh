ray job submit --working-dir . --entrypoint-num-cpus 4 --entrypoint-num-gpus 4 -- python3 -m wbdist launch --nproc 4 --grace 110 --on-preempt relaunch train.py
